"""Synthetic chips as a folder like any other, and several folders read as one."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from typer.testing import CliRunner

from canopy.chips.store import ChipShards, read_index, write_store
from canopy.chips.write import synth_chips, write_made, write_synth
from canopy.errors import DataError, InputError


@pytest.fixture(scope="module")
def synth(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "synth"
    assert write_synth(folder, 3, 64)["cut_now"]
    return folder


def test_synthetic_chips_are_a_folder(synth):
    shards = ChipShards(synth)
    assert [(r.id, r.kind, r.split, r.height_px) for r in shards.rows] == [
        (f"synth_{s}", "synth", "train", 64) for s in (1000, 1001, 1002)
    ]
    for made, read in zip(synth_chips(3, 64), shards, strict=True):
        assert np.array_equal(made.rgb, read.rgb) and read.weight.min() == 1
        np.testing.assert_allclose(read.chm_m, made.chm_m, atol=0.0051)
        assert read.row.height_p95_m == pytest.approx(np.percentile(made.chm_m, 95))
        assert read.row.label_share == 1 and read.row.height_max_m == pytest.approx(
            made.chm_m.max(), abs=1e-3
        )


def test_made_once_the_same_bytes_and_never_over_other_things(synth, tmp_path):
    before = {p: p.read_bytes() for p in synth.rglob("*") if p.is_file()}
    assert not write_synth(synth, 3, 64)["cut_now"]
    (synth / "index.csv").unlink()  # as a run leaves it that was killed
    assert write_synth(synth, 3, 64)["cut_now"]
    assert before == {p: p.read_bytes() for p in synth.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="other files"):
        write_synth(synth, 4, 64)
    with pytest.raises(InputError, match="even"):
        write_synth(tmp_path / "odd", 1, 63)
    assert not (tmp_path / "odd").exists()


def test_several_folders_are_one(synth, make_chip, tmp_path):
    chips = [make_chip("a", split="train"), make_chip("b", split="val", site="t"), make_chip("c", side_m=20)]
    rows = write_made(tmp_path / "real", chips, "test")
    assert [r.id for r in rows] == [r.id for r in read_index(tmp_path / "real")]
    both = ChipShards([tmp_path / "real", synth])
    assert [r.id for r in both.rows] == ["a", "c", "b", "synth_1000", "synth_1001", "synth_1002"]
    assert np.array_equal(both[2].rgb, chips[1].rgb) and np.array_equal(both[3].rgb, ChipShards(synth)[0].rgb)
    again = pickle.loads(pickle.dumps(both))
    assert np.array_equal(again[4].rgb, both[4].rgb) and again.fingerprint == both.fingerprint
    assert both.fingerprint != ChipShards(synth).fingerprint
    assert [r.id for r in ChipShards([synth, tmp_path / "real"], splits=["val"]).rows] == ["b"]
    with pytest.raises(DataError, match=r"synth_1000 is also in .*synth"):
        ChipShards([synth, synth])
    with pytest.raises(DataError, match="no such chips"):
        ChipShards([synth, tmp_path / "none"])


def test_a_single_shard_is_read_without_its_index(make_chip, tmp_path):
    chips = [make_chip("a"), make_chip("b", seed=1)]
    write_store(tmp_path / "some.safetensors", chips, "abc")
    shards = ChipShards(tmp_path / "some.safetensors")
    assert [r.id for r in shards.rows] == ["a", "b"] and np.array_equal(shards[1].rgb, chips[1].rgb)
    write_store(tmp_path / "other.safetensors", chips, "abcd")
    assert ChipShards(tmp_path / "other.safetensors").fingerprint != shards.fingerprint


def test_the_command(tmp_path):
    from canopy.cli.data import app

    def call(*words: str):
        return CliRunner().invoke(app, ["chips", *words])

    done = call("--synth", "1", "--size-px", "64", "--seed", "7", "-o", str(tmp_path / "s"), "--json")
    assert done.exit_code == 0 and '"cut_now": true' in done.stdout
    assert [r.id for r in read_index(tmp_path / "s")] == ["synth_1007"]
    for words in ([], ["--synth", "1", "--manifest", "m.csv"]):
        done = call(*words, "-o", str(tmp_path / "n"))
        assert isinstance(done.exception, InputError) and not (tmp_path / "n").exists()
