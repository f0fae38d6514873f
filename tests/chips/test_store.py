"""Shards and folders: heights to the centimetre, several folders read as one, broken files named."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from canopy.chips.index import ChipRow, read_index
from canopy.chips.store import Chip, ChipShards, crop_of, predict_chip, read_store, write_store
from canopy.chips.synthetic import synth_chips, write_made, write_synth
from canopy.errors import DataError, InputError


def test_a_shard_holds_its_chips_and_the_same_bytes(make_chip, tmp_path):
    first, second = make_chip("a", split="train"), make_chip("b", split="val", side_m=20, seed=1)
    first.chm_m[3:5] = np.nan
    shots = np.array([[10, 12, 21.5, 0.5]], np.float32)
    second = Chip(second.row, second.rgb, second.chm_m, shots)
    for name in ("c", "d"):
        write_store(tmp_path / f"{name}.safetensors", [first, second], "abc")
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "d.safetensors").read_bytes()
    store = read_store(tmp_path / "c.safetensors")
    assert store.data_sha256 == "abc" and [c.row.id for c in store.chips] == ["a", "b"]
    np.testing.assert_allclose(store.chips[0].chm_m, first.chm_m, atol=0.0051)
    assert np.array_equal(store.chips[0].rgb, first.rgb) and store.chips[0].weight[3:5].max() == 0
    (val,) = store.of_split("val", "test")
    assert np.array_equal(val.shots, shots) and val.row.shots == 1 and val.row.height_px == 40
    shards = ChipShards(tmp_path / "c.safetensors")  # read alone, without an index
    assert [r.id for r in shards.rows] == ["a", "b"] and np.array_equal(shards[1].shots, shots)
    write_store(tmp_path / "other.safetensors", [first, second], "abcd")
    assert ChipShards(tmp_path / "other.safetensors").fingerprint != shards.fingerprint


def test_shards_of_earlier_versions_are_read(make_chip, tmp_path):
    import json

    from safetensors.numpy import load_file, save_file

    chip, path = make_chip("a"), tmp_path / "c.safetensors"
    write_store(path, [chip], "abc")
    rows = json.dumps([{"id": "a", "site": "s", "kind": "lidar", "split": "train"}])
    old = {"format": "canopy-chips", "rows": rows, "data_sha256": "abc"}
    save_file(load_file(path), path, metadata=old)
    assert np.array_equal(read_store(path).chips[0].rgb, chip.rgb)


def test_broken_files_are_named(tmp_path):
    with pytest.raises(DataError, match="no such chips file"):
        read_store(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not chips at all, sorry")
    with pytest.raises(DataError, match="damaged"):
        read_store(tmp_path / "bad.safetensors")


# ---- folders ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def synth(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "synth"
    assert write_synth(folder, 2, 64)["cut_now"]
    return folder


def test_synthetic_chips_are_a_folder_made_once(synth, tmp_path):
    rows = ChipShards(synth).rows
    assert [(r.id, r.kind, r.split, r.height_px) for r in rows] == [
        (f"synth_{s}", "synth", "train", 64) for s in (1000, 1001)
    ]
    for made, read in zip(synth_chips(2, 64), ChipShards(synth), strict=True):
        assert np.array_equal(made.rgb, read.rgb) and read.weight.min() == 1 and read.row.label_share == 1
        np.testing.assert_allclose(read.chm_m, made.chm_m, atol=0.0051)
        assert read.row.height_p95_m == pytest.approx(np.percentile(made.chm_m, 95), abs=1e-3)
    before = {p: p.read_bytes() for p in synth.rglob("*") if p.is_file()}
    assert not write_synth(synth, 2, 64)["cut_now"]
    (synth / "index.csv").unlink()  # as a run leaves it that was killed
    assert write_synth(synth, 2, 64)["cut_now"]
    assert before == {p: p.read_bytes() for p in synth.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="other settings"):
        write_synth(synth, 4, 64)
    with pytest.raises(InputError, match="even"):
        write_synth(tmp_path / "odd", 1, 63)
    assert not (tmp_path / "odd").exists()


def test_several_folders_are_one(synth, make_chip, tmp_path):
    chips = [make_chip("a", split="train"), make_chip("b", split="val", site="t"), make_chip("c", side_m=20)]
    rows = write_made(tmp_path / "real", chips, "test")
    assert [r.id for r in rows] == [r.id for r in read_index(tmp_path / "real")]
    both = ChipShards([tmp_path / "real", synth])
    assert [r.id for r in both.rows] == ["a", "c", "b", "synth_1000", "synth_1001"]
    assert np.array_equal(both[2].rgb, chips[1].rgb) and np.array_equal(both[3].rgb, ChipShards(synth)[0].rgb)
    again = pickle.loads(pickle.dumps(both))
    assert np.array_equal(again[4].rgb, both[4].rgb) and again.fingerprint == both.fingerprint
    assert both.fingerprint != ChipShards(synth).fingerprint
    assert [r.id for r in ChipShards([synth, tmp_path / "real"], splits=["val"]).rows] == ["b"]
    with pytest.raises(DataError, match=r"synth_1000 is also in .*synth"):
        ChipShards([synth, synth])
    with pytest.raises(DataError, match="no such chips"):
        ChipShards([synth, tmp_path / "none"])


# ---- whole chips ------------------------------------------------------------------------------------------
def test_a_whole_chip_is_its_crops_blended_at_the_labels_pixels():
    rng = np.random.default_rng(0)
    rgb = rng.integers(1, 256, (3, 100, 140), dtype=np.uint8)
    chip = Chip(ChipRow("a", "s", "lidar", "val"), rgb, np.ones((50, 70), np.float32))
    made = predict_chip(lambda crops: np.stack([crops[:, 0], 2 * crops[:, 1]], axis=1), chip, 64, 24, batch=3)
    wanted = rgb[:2].astype(float).reshape(2, 50, 2, 70, 2).mean(axis=(2, 4)) / 255
    np.testing.assert_allclose(made, wanted * [[[1]], [[2]]], atol=1e-6)
    rgb[:, :10] = 0  # no image
    crop = crop_of(chip, 0, 100, 64)
    assert crop.shape == (3, 64, 64) and crop.dtype == np.float32 and (crop > 0).all()
    np.testing.assert_array_equal(crop[:, 10:, :40], rgb[:, 10:64, 100:].astype(np.float32) / 255)
