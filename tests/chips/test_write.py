"""A folder of chips: cut once, same bytes after a kill, readable without geo libraries, streams resumable."""

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
import torch
from affine import Affine
from torch.utils.data import DataLoader

from canopy.chips import cut
from canopy.chips.augment import AugmentSettings
from canopy.chips.data import ChipDataset
from canopy.chips.index import read_index
from canopy.chips.plan import CutRules, _year, edges, plan_shards, read_pairs
from canopy.chips.splits import SplitRules
from canopy.chips.store import ChipShards, read_store
from canopy.chips.write import write_chips
from canopy.errors import DataError, InputError
from canopy.geo.crs import transformer
from canopy.synth.forest import random_spec
from canopy.synth.render import render

UTM, X, Y = "EPSG:32617", 400_000.0, 4_000_000.0
RULES = CutRules(size_px=128, register=False)


def save(path: Path, values: np.ndarray, gsd: float, x: float, y: float, **profile: object) -> None:
    with rasterio.open(
        path, "w", driver="GTiff", count=len(values), dtype=values.dtype, height=values.shape[1],
        width=values.shape[2], crs=UTM, transform=Affine(gsd, 0, x, 0, -gsd, y), **profile,
    ) as file:  # fmt: skip
        file.write(values)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """Five pairs of 256 px in a row, 20 m apart; the last is test; one has GEDI shots and no lidar there."""
    import pyarrow as pa
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for i in range(5):
        tile = render(random_spec(3000), 148.0 * i, 0.0, 256, 256)
        chm = tile.chm.reshape(128, 2, 128, 2).max(axis=(1, 3)).astype(np.float32)
        if i == 1:
            chm[:64, :64] = -9999
        x = X + 148 * i
        save(folder / f"rgb{i}.tif", np.maximum(tile.rgb, 7), 0.5, x, Y)
        save(folder / f"chm{i}.tif", chm[None], 1.0, x, Y, nodata=-9999)
        rows.append({
            "id": f"p{i}", "rgb_path": f"rgb{i}.tif", "chm_path": f"chm{i}.tif", "site": f"site{i // 3}",
            "split": "test" if i == 4 else "train", "year_rgb": "2020", "year_chm": "2021",
            "gedi_path": "shots.parquet" if i == 1 else "", "kind": "neon" if i == 2 else "",
            "licence": "CC0",
        })  # fmt: skip
    lon, lat = transformer(UTM, "EPSG:4326").transform([X + 148 + 30.0], [Y - 30.0])
    parquet.write_table(pa.table({"lat": lat, "lon": lon, "rh_98": [17.25]}), folder / "shots.parquet")
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "manifest.csv"


@pytest.fixture(scope="module")
def folder(manifest, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cut") / "chips"
    write_chips(manifest, out, RULES)
    return out


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.suffix in (".safetensors", ".csv")
    }


def test_chips_are_the_pixels_of_their_pairs(folder, manifest):
    shards = ChipShards(folder)
    for i in range(0, len(shards), 3):
        chip = shards[i]
        row = chip.row
        with rasterio.open(manifest.parent / f"rgb{row.pair[1]}.tif") as file:
            image = file.read()[:, row.row : row.row + 128, row.col : row.col + 128]
        with rasterio.open(manifest.parent / f"chm{row.pair[1]}.tif") as file:
            label = file.read(1)[row.row // 2 : row.row // 2 + 64, row.col // 2 : row.col // 2 + 64]
        assert np.array_equal(chip.rgb, image)
        assert np.allclose(chip.chm_m, np.where(label == -9999, np.nan, label), atol=0.0051, equal_nan=True)
        assert chip.row.licence == "CC0" and chip.row.gsd_m == pytest.approx(0.5, abs=0.01)


def test_train_chips_near_the_test_pair_are_dropped_with_the_reason(folder):
    rows = read_index(folder)
    near = [r for r in rows if r.reason == "too close to a test chip"]
    assert {r.pair for r in near} == {"p3"} and {r.col for r in near} == {128}
    kept = [r for r in rows if not r.reason]
    assert len(kept) + len([r for r in rows if r.reason]) == 20
    far = [r for r in kept if r.pair == "p3"]
    assert far and all(r.test_distance_m == pytest.approx(84, abs=1) for r in far)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["train_chips_within_buffer_of_test"] == 0
    assert summary["rejected_by_reason"]["too close to a test chip"] == 2


def test_a_rerun_cuts_nothing_and_changes_nothing(folder, manifest, monkeypatch):
    before = digests(folder)
    stamps = {p: p.stat().st_mtime_ns for p in (folder / "shards").iterdir()}
    monkeypatch.setattr(cut, "_cut_block", lambda *_: pytest.fail("cut twice"))
    assert write_chips(manifest, folder, RULES)["cut_now"] == 0
    assert digests(folder) == before
    assert {p: p.stat().st_mtime_ns for p in (folder / "shards").iterdir()} == stamps


def test_killed_midway_and_run_again_gives_the_same_bytes(folder, manifest, tmp_path):
    """A process is killed the moment it renames its first shard, before any row is noted."""
    out = tmp_path / "chips"
    code = (
        "import os, sys, signal\n"
        "from canopy.chips.plan import CutRules\n"
        "from canopy.chips.write import write_chips\n"
        "real = os.replace\n"
        "def kill(a, b):\n"
        "    real(a, b)\n"
        "    if str(b).endswith('.safetensors'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.replace = kill\n"
        "write_chips(sys.argv[1], sys.argv[2], CutRules(size_px=128, register=False))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(manifest), str(out)], timeout=120)
    assert done.returncode == -9 and not (out / "index.csv").exists()
    assert list((out / "shards").glob("*.safetensors")) and not list((out / "shards").glob("*.json"))
    write_chips(manifest, out, RULES)
    assert digests(out) == digests(folder)
    assert not list(out.rglob("*.part"))


def test_a_longer_manifest_keeps_ids_and_a_damaged_shard_is_cut_again(manifest, tmp_path, folder):
    out = tmp_path / "chips"
    write_chips(manifest, out, RULES, limit=2)
    first = {r.id for r in read_index(out)}
    write_chips(manifest, out, RULES)
    assert first <= {r.id for r in read_index(out)}
    shard = out / read_index(out)[0].shard
    shard.write_bytes(shard.read_bytes()[:-10])
    assert write_chips(manifest, out, RULES)["cut_now"] == 1
    assert digests(out)["index.csv"] == digests(folder)["index.csv"]


def test_other_settings_and_foreign_folders_are_refused(folder, manifest, tmp_path):
    with pytest.raises(InputError, match="other settings"):
        write_chips(manifest, folder, CutRules(size_px=64, register=False))
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="other files"):
        write_chips(manifest, tmp_path, RULES)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_an_unreadable_pair_is_named_and_the_rest_is_cut(manifest, tmp_path):
    for path in manifest.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    broken = tmp_path / "chm0.tif"
    broken.write_bytes(broken.read_bytes()[:5000])
    summary = write_chips(tmp_path / "manifest.csv", tmp_path / "out", RULES, limit=3)
    reasons = {r.pair: r.reason for r in read_index(tmp_path / "out")}
    assert reasons["p0"].startswith("unreadable") and reasons["p1"] == "" and summary["unreadable"] == 4


def test_manifests_that_cannot_be_used_are_refused_before_anything_is_written(manifest, tmp_path):
    def attempt(text: str, match: str) -> None:
        bad = manifest.parent / "bad.csv"
        bad.write_text(text)
        with pytest.raises(DataError, match=match):
            write_chips(bad, tmp_path / "out", RULES)
        assert not (tmp_path / "out").exists()

    attempt("id,rgb_path,chm_path\n", "no rows")
    attempt("id,rgb_path\na,rgb0.tif\n", "chm_path")
    attempt("id,rgb_path,chm_path\na,rgb0.tif,none.tif\n", "does not exist")
    attempt("id,rgb_path,chm_path\n../a,rgb0.tif,chm0.tif\n", "unfit")
    attempt("id,rgb_path,chm_path\na,rgb0.tif,chm0.tif\na,rgb1.tif,chm1.tif\n", "twice")
    attempt("id,rgb_path,chm_path\na,/vsizip/x.zip/rgb0.tif,chm0.tif\n", "virtual path")
    attempt("id,rgb_path,chm_path,sensor\na,rgb0.tif,chm0.tif,sonar\n", "sonar")


def test_only_a_single_date_is_a_date():
    assert _year("2019") == 2019.5 and _year("2019-07-02T10:00Z") == pytest.approx(2019.5, abs=0.01)
    assert _year("") is _year("2010 or earlier") is _year("2019 (OSBS) / 2018 (MLBS)") is None


def test_windows_leave_nothing_out_and_never_overlap():
    for length in range(20, 900, 14):
        cuts = edges(length, 128)
        sizes = np.diff(cuts)
        assert cuts[0] == 0 and cuts[-1] == length and (sizes > 0).all()
        assert length < 128 or (sizes[-1] >= 64 and sizes.max() <= 192)


def test_a_shard_holds_what_the_chips_store_reads(folder):
    row = next(r for r in read_index(folder) if r.shard)
    store = read_store(folder / row.shard)
    chip = next(c for c in store.chips if c.row.id == row.id)
    assert np.array_equal(chip.rgb, ChipShards(folder).subset([row])[0].rgb)


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


def test_no_geo_library_is_needed_to_read(folder):
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['rasterio', 'geopandas', 'pyproj', 'odc', 'shapely']))\n"
        "from canopy.chips import screen, synthetic, targets\n"
        "from canopy.chips.store import ChipShards\n"
        f"print(len(ChipShards({str(folder)!r})[0].rgb))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "3", done.stderr[-500:]


def stream(folder: Path, rows=None, batch=3, side=64, augment=None, **more) -> ChipDataset:
    shards = ChipShards(folder, splits=["train"])
    return ChipDataset(shards.subset(rows) if rows else shards, batch, side, augment, **more)


def test_batches_do_not_depend_on_workers_and_begin_where_they_should(folder):
    def take(dataset, count, workers=0):
        loader = iter(DataLoader(dataset, batch_size=None, num_workers=workers))
        return [next(loader) for _ in range(count)]

    def augmented() -> ChipDataset:
        return stream(folder, augment=AugmentSettings(), seed=5)

    plain = take(augmented(), 5)
    later = augmented()
    later.first = 3
    ahead = take(augmented(), 5, workers=2) + take(later, 2)
    for a, b in zip(plain + plain[3:], ahead, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert plain[0].rgb.shape == (3, 3, 64, 64) and plain[0].target.shape == (3, 1, 32, 32)
    whole = stream(folder, batch=4).make(5)  # two processes see together what one does
    parts = [stream(folder, batch=2) for _ in range(2)]
    for rank, part in enumerate(parts):
        part.rank, part.world = rank, 2
    for one, two in zip(whole, zip(*(part.make(5) for part in parts), strict=True), strict=True):
        assert torch.equal(one, torch.cat(two))


def test_shots_count_only_where_lidar_knows_nothing(folder):
    rows = ChipShards(folder, splits=["train"]).rows
    holder = [r for r in rows if r.shots]
    batch = stream(folder, holder, 1, 128).make(0)
    row, col, metres, weight, radius = batch.shots[0, 0].tolist()
    assert (row, col) == pytest.approx((30, 30), abs=0.05) and metres == pytest.approx(17.25)
    assert weight == 1 and radius == pytest.approx(12.5, rel=0.01)  # its disc has no lidar
    assert batch.shots.shape == (1, 16, 5) and (batch.shots[0, 1:, 3] == 0).all()
    assert (stream(folder, holder, 1, 128, with_shots=False).make(0).shots[..., 3] == 0).all()
    assert (stream(folder, [r for r in rows if not r.shots], 2).make(0).shots[..., 3] == 0).all()


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


def test_rows_without_a_height_file_are_cut_resampled_and_screened(tmp_path):
    rng = np.random.default_rng(0)
    images = {"sharp": rng.integers(40, 200, (3, 150, 150)), "cloud": np.full((3, 150, 150), 240)}
    lines = ["id,rgb_path,chm_path,site"]
    for i, (name, values) in enumerate(images.items()):
        where = Affine(0.6, 0, 400_000 + 500 * i, 0, -0.6, 4_000_000)
        with rasterio.open(
            tmp_path / f"{name}.tif", "w", driver="GTiff", count=3, dtype="uint8", height=150, width=150,
            crs="EPSG:26917", transform=where,
        ) as file:  # fmt: skip
            file.write(values.astype(np.uint8))
        lines.append(f"{name},{name}.tif,,here")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    summary = write_chips(
        tmp_path / "list.csv", tmp_path / "out", CutRules(size_px=256), SplitRules(val=0, test=0)
    )
    assert summary["chips"] == 1 and summary["rejected_by_reason"] == {"cloud": 1}
    shards = ChipShards(tmp_path / "out", splits=("train",))
    chip = shards[0]
    assert chip.row.pair == "sharp" and chip.row.gsd_m == pytest.approx(0.5, abs=0.01)
    assert chip.rgb.shape == (3, 180, 180)  # 150 px of 0.6 m
    assert np.isnan(chip.chm_m).all() and (chip.weight == 0).all() and np.isnan(chip.row.height_p95_m)


def test_shards_are_planned_by_split(manifest):
    shards = plan_shards(read_pairs(manifest), RULES, SplitRules())
    assert {s.split for s in shards} == {"train", "test"} and len({s.key for s in shards}) == len(shards)
