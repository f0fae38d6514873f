"""From pairs to a folder of chips: the right pixels, cut once, same bytes after a kill, bad ones named."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from scipy import ndimage

from canopy.chips import cut
from canopy.chips.cut import mark_missing, screen
from canopy.chips.options import CutOptions, SplitOptions
from canopy.chips.plan import _year, edges
from canopy.chips.store import ChipShards, read_index
from canopy.chips.write import write_chips
from canopy.errors import DataError, InputError
from canopy.synth.forest import random_spec
from canopy.synth.render import render

OPTIONS = CutOptions(size_px=128, undo_shift=False)


# ---- is it fit to learn from? ---------------------------------------------------------------------
@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    tile = render(random_spec(2001), 0.0, 0.0, 256, 256)
    return np.maximum(tile.rgb, 1), tile.chm.reshape(128, 2, 128, 2).max(axis=(1, 3)).astype(np.float32)


def test_the_screen_keeps_a_good_pair_and_says_why_it_rejects(pair):
    rgb, chm = pair
    reason, found = screen(rgb, chm)
    assert reason == "" and found["match"] > 0.2 and found["sharpness"] > 0.4
    nothing, cloudy = np.full_like(chm, np.nan), rgb.copy()
    cloudy[:, :150] = 237
    hazy = (255 * (0.55 + 0.08 * rgb / 255)).astype(np.uint8)
    blurred = ndimage.zoom(rgb[:, ::8, ::8], (1, 8, 8), order=3)
    gone = np.where(np.arange(256) < 100, rgb, 0)
    few = np.where(np.arange(128) < 5, chm, np.nan)
    for image, heights, wanted in (
        (gone, chm, "no image"), (0 * rgb, nothing, "no image"), (rgb, few, "no label"),
        (cloudy, chm, "cloud"), (hazy, chm, "haze"), (blurred, chm, "blur"),
    ):  # fmt: skip
        assert screen(image, heights)[0] == wanted
    assert screen(rgb, nothing, need_label=False)[0] == ""


def test_labels_of_another_place_do_not_match_and_flat_ones_are_not_judged(pair):
    rgb, chm = pair
    other = render(random_spec(2001), 9000.0, 7000.0, 256, 256).chm
    other = other.reshape(128, 2, 128, 2).max(axis=(1, 3)).astype(np.float32)
    assert screen(rgb, other)[1]["match"] < 0.1 < screen(rgb, chm)[1]["match"]
    reason, found = screen(rgb, np.zeros_like(chm))
    assert np.isnan(found["match"]) and reason == ""


def test_shadows_are_image_and_wide_black_is_not():
    rgb = np.full((3, 40, 40), 90, np.uint8)
    rgb[:, :, :10] = 2  # JPEG noise in a nodata collar
    rgb[:, 30:33, 30:33] = 0  # a deep shadow
    marked = mark_missing(rgb)
    assert (marked[:, :, :10] == 0).all() and (marked[:, :, 10:].min(axis=0) >= 1).all()


# ---- a folder of chips ------------------------------------------------------------------------------
def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.suffix in (".safetensors", ".csv")
    }


def test_chips_are_the_pixels_of_their_pairs(folder, manifest):
    shards = ChipShards(folder)
    for i in range(0, len(shards), 3):
        chip, row = shards[i], shards[i].row
        with rasterio.open(manifest.parent / f"rgb{row.pair[1]}.tif") as file:
            image = file.read()[:, row.row : row.row + 128, row.col : row.col + 128]
        with rasterio.open(manifest.parent / f"chm{row.pair[1]}.tif") as file:
            label = file.read(1)[row.row // 2 : row.row // 2 + 64, row.col // 2 : row.col // 2 + 64]
        assert np.array_equal(chip.rgb, image)
        assert np.allclose(chip.chm_m, np.where(label == -9999, np.nan, label), atol=0.0051, equal_nan=True)
        assert row.licence == "CC0" and row.gsd_m == pytest.approx(0.5, abs=0.01)


def test_weights_floor_and_shots(folder):
    shards = ChipShards(folder)
    rows = {r.pair: r for r in shards.rows}
    assert rows["p0"].weight == pytest.approx(np.exp(-0.2), abs=1e-4)
    assert rows["p2"].floor_m == 2 and rows["p0"].floor_m == 0
    neon = shards[shards.rows.index(rows["p2"])]
    low = neon.chm_m < 2
    assert low.any() and np.allclose(neon.weight[low], np.exp(-0.2) / 3, atol=1e-3)
    holder = next(i for i, r in enumerate(shards.rows) if r.shots)
    assert np.allclose(shards[holder].shots, [[30, 30, 17.25, 1]], atol=0.05)


def test_train_chips_near_the_test_pair_are_dropped_with_the_reason(folder):
    rows = read_index(folder)
    near = [r for r in rows if r.reason == "too close to a test chip"]
    assert {r.pair for r in near} == {"p3"} and {r.col for r in near} == {128} and len(rows) == 20
    far = [r for r in rows if r.pair == "p3" and not r.reason]
    assert far and all(r.test_distance_m == pytest.approx(84, abs=1) for r in far)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["train_chips_within_buffer_of_test"] == 0
    assert summary["rejected_by_reason"]["too close to a test chip"] == 2
    assert summary["shards"] == 5 and summary["by_split"]["test"]["chips"] == 4


def test_a_rerun_cuts_nothing_and_changes_nothing(folder, manifest, monkeypatch):
    before = digests(folder)
    monkeypatch.setattr(cut, "_cut", lambda *_: pytest.fail("cut twice"))
    assert write_chips(manifest, folder, OPTIONS)["cut_now"] == 0
    assert digests(folder) == before


KILLED = """
import os, sys, signal
from canopy.chips.options import CutOptions
from canopy.chips.write import write_chips
real = os.replace
def kill(a, b):
    real(a, b)
    if str(b).endswith('.safetensors'): os.kill(os.getpid(), signal.SIGKILL)
os.replace = kill
write_chips(sys.argv[1], sys.argv[2], CutOptions(size_px=128, undo_shift=False))
"""


def test_killed_midway_and_run_again_gives_the_same_bytes(folder, manifest, tmp_path):
    """A process is killed the moment it renames its first shard, before any row is noted."""
    out = tmp_path / "chips"
    done = subprocess.run([sys.executable, "-c", KILLED, str(manifest), str(out)], timeout=600)
    assert done.returncode == -9 and not (out / "index.csv").exists()
    assert len(list((out / "shards").glob("*"))) == 1
    write_chips(manifest, out, OPTIONS, limit=2)
    first = {r.id for r in read_index(out)}
    write_chips(manifest, out, OPTIONS)  # a longer manifest keeps what was cut
    assert first <= {r.id for r in read_index(out)}
    assert digests(out) == digests(folder) and not list(out.rglob("*.part"))


def test_other_settings_and_foreign_folders_are_refused(folder, manifest, tmp_path):
    with pytest.raises(InputError, match="other settings"):
        write_chips(manifest, folder, CutOptions(size_px=64, undo_shift=False))
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="other files"):
        write_chips(manifest, tmp_path, OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("id,rgb_path,chm_path\n", "no rows"),
        ("id,rgb_path\na,rgb0.tif\n", "chm_path"),
        ("id,rgb_path,chm_path\na,rgb0.tif,none.tif\n", "does not exist"),
        ("id,rgb_path,chm_path\n../a,rgb0.tif,chm0.tif\n", "unfit"),
        ("id,rgb_path,chm_path\na,rgb0.tif,chm0.tif\na,rgb1.tif,chm1.tif\n", "twice"),
        ("id,rgb_path,chm_path\na,/vsizip/x.zip/rgb0.tif,chm0.tif\n", "virtual path"),
        ("id,rgb_path,chm_path,sensor\na,rgb0.tif,chm0.tif,sonar\n", "sonar"),
    ],
)
def test_manifests_that_cannot_be_used_leave_nothing(manifest, tmp_path, text, says):
    bad = manifest.parent / "bad.csv"
    bad.write_text(text)
    with pytest.raises(DataError, match=says):
        write_chips(bad, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()


def test_only_a_single_date_is_a_date():
    assert _year("2019") == 2019.5 and _year("2019-07-02T10:00Z") == pytest.approx(2019.5, abs=0.01)
    assert _year("") is _year("2010 or earlier") is _year("2019 (OSBS) / 2018 (MLBS)") is None


def test_windows_leave_nothing_out_and_never_overlap():
    for length in range(20, 900, 14):
        cuts = edges(length, 128)
        sizes = np.diff(cuts)
        assert cuts[0] == 0 and cuts[-1] == length and (sizes > 0).all()
        assert length < 128 or (sizes[-1] >= 64 and sizes.max() <= 192)


def test_real_tiles_and_plots_are_cut_and_their_labels_moved_onto_the_trees(shared, tmp_path):
    pack = shared / "data"
    with (pack / "manifest.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["id"] in ("ky_blackmtn_r00c02", "neon_osbs_12")]
    for row in rows:
        for column in ("rgb_path", "chm_path"):
            row[column] = str((pack / row[column]).resolve())
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    write_chips(tmp_path / "manifest.csv", tmp_path / "out")
    kept = {r.pair: r for r in read_index(tmp_path / "out") if not r.reason}
    tile, plot = kept["ky_blackmtn_r00c02"], kept["neon_osbs_12"]
    assert tile.shift_sure and tile.shift_applied and tile.shift_right_m == pytest.approx(-5.4, abs=0.5)
    assert (plot.height_px, plot.width_px, plot.floor_m) == (40, 40, 2.0)
    assert (tmp_path / "out" / "contact_sheet.png").stat().st_size > 5000


def test_rows_without_a_height_file_are_cut_resampled_and_screened(tmp_path, save):
    sharp = np.random.default_rng(0).integers(40, 200, (3, 150, 150)).astype(np.uint8)
    lines = ["id,rgb_path,chm_path,site"]
    for i, (name, values) in enumerate({"sharp": sharp, "cloud": np.full_like(sharp, 240)}.items()):
        save(tmp_path / f"{name}.tif", values, 0.6, 400_000 + 500 * i, crs="EPSG:26917")
        lines.append(f"{name},{name}.tif,,here")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    splits = SplitOptions(val=0, test=0)
    summary = write_chips(tmp_path / "list.csv", tmp_path / "out", CutOptions(), splits)
    assert summary["chips"] == 1 and summary["rejected_by_reason"] == {"cloud": 1}
    chip = ChipShards(tmp_path / "out", splits=("train",))[0]
    assert chip.row.pair == "sharp" and chip.row.gsd_m == pytest.approx(0.5, abs=0.01)
    assert chip.rgb.shape == (3, 180, 180)  # 150 px of 0.6 m
    assert np.isnan(chip.chm_m).all() and (chip.weight == 0).all() and np.isnan(chip.row.height_p95_m)
