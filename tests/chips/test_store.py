"""Shards and folders: heights to the centimetre, several folders read as one, broken files named."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest

from canopy.chips.store import Chip, ChipRow, ChipShards, crop_of, predict_chip, read_index
from canopy.chips.write import synth_chips, write_folder, write_synth
from canopy.errors import DataError, InputError


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
    before = {p: p.read_bytes() for p in synth.rglob("*") if p.is_file() and p.suffix != ".parquet"}
    assert not write_synth(synth, 2, 64)["cut_now"]
    (synth / "index.csv").unlink()  # as a run leaves it that was killed
    assert write_synth(synth, 2, 64)["cut_now"]
    assert all(path.read_bytes() == data for path, data in before.items())
    with pytest.raises(InputError, match="other settings"):
        write_synth(synth, 4, 64)
    with pytest.raises(InputError, match="even"):
        write_synth(tmp_path / "odd", 1, 63)
    assert not (tmp_path / "odd").exists()


def test_several_folders_are_one(synth, make_chip, tmp_path):
    chips = [make_chip("a", shots=[(10, 12, 21.5, 0.5)]), make_chip("b", split="val", site="t")]
    chips[0].chm_m[3:5] = np.nan
    rows = write_folder(tmp_path / "real", [*chips, make_chip("c", side_m=20)], "CC0")
    assert [r.id for r in rows] == [r.id for r in read_index(tmp_path / "real")] == ["a", "b", "c"]
    both = ChipShards([tmp_path / "real", synth])
    assert [r.id for r in both.rows] == ["a", "b", "c", "synth_1000", "synth_1001"]
    np.testing.assert_allclose(both[0].chm_m, chips[0].chm_m, atol=0.0051)
    assert both[0].weight[3:5].max() == 0 and np.array_equal(both[0].shots, chips[0].shots)
    assert both[2].row.height_px == 40 and both[2].row.licence == "CC0"
    assert np.array_equal(both[1].rgb, chips[1].rgb) and np.array_equal(both[3].rgb, ChipShards(synth)[0].rgb)
    again = pickle.loads(pickle.dumps(both))
    assert np.array_equal(again[4].rgb, both[4].rgb) and again.fingerprint == both.fingerprint
    assert both.fingerprint != ChipShards(synth).fingerprint
    assert [r.id for r in ChipShards([synth, tmp_path / "real"], splits=["val"]).rows] == ["b"]


def test_broken_folders_are_named(synth, make_chip, tmp_path):
    with pytest.raises(DataError, match=r"synth_1000 is also in .*synth"):
        ChipShards([synth, synth])
    with pytest.raises(DataError, match="no such chips"):
        ChipShards([synth, tmp_path / "none"])
    with pytest.raises(DataError, match="no chips of test"):
        ChipShards(synth, splits=["test"])
    (row,) = write_folder(tmp_path / "bad", [make_chip("a")])
    (tmp_path / "bad" / row.shard).write_bytes(b"not chips at all, sorry")
    with pytest.raises(DataError, match="chip a cannot be read"):
        ChipShards(tmp_path / "bad")[0]
    (tmp_path / "bad" / "index.csv").write_text("id,site\na,s\n")
    with pytest.raises(DataError, match="no index"):
        ChipShards(tmp_path / "bad")


def test_no_geo_library_is_needed_to_read(synth):
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['rasterio', 'geopandas', 'pyproj', 'odc', 'shapely']))\n"
        "from canopy.chips import data, register, targets, write\n"
        "from canopy.chips.store import ChipShards\n"
        f"print(len(ChipShards({str(synth)!r})[0].rgb))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.strip() == "3", done.stderr[-500:]


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
