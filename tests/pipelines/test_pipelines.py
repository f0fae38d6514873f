"""The chains of record run from end to end on smoke configs, and a second run does nothing twice."""

from __future__ import annotations

import csv
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio

UTM = "EPSG:32618"
HEAD = ("id", "kind", "site", "split", "rgb_path", "chm_path")


@pytest.fixture
def script(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`script("county_report", ...)`: the exit code of a script's main, in the checkout."""
    monkeypatch.syspath_prepend(str(repo / "pipelines"))
    monkeypatch.chdir(repo)

    def run(name: str, *words: object) -> int:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        main = runpy.run_path(str(repo / "pipelines" / f"{name}.py"), run_name="pipeline")["main"]
        return int(main())

    return run


def write_tif(path: Path, values: np.ndarray, number: int) -> None:
    """(bands, h, w) over 128 m, two kilometres from the next."""
    side = 128 / values.shape[2]
    place = rasterio.Affine(side, 0, 500_000 + 2_000 * number, 0, -side, 4_882_000)
    with rasterio.open(
        path, "w", driver="GTiff", count=len(values), dtype=values.dtype, crs=UTM, transform=place,
        height=values.shape[1], width=values.shape[2],
    ) as dataset:  # fmt: skip
        dataset.write(values)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles of the procedural forest as a data pack: pairs for training, validation and tests."""
    from canopy.synth.forest import random_spec
    from canopy.synth.render import render

    folder, rows = tmp_path_factory.mktemp("pack"), []
    for number in range(14):
        tile = render(random_spec(4000 + number), 0.0, 0.0, 256, 256)
        rgb, chm = np.maximum(tile.rgb, 1), tile.chm.reshape(128, 2, 128, 2).max(axis=(1, 3))
        split = "val" if number < 8 else {12: "test", 13: "test_hard"}.get(number, "train")
        kind = "neon" if number in (1, 3) else "other"
        for turn in range(8 if split == "train" else 1):
            name = f"t{number}_{turn}"
            turned = [
                np.ascontiguousarray(np.rot90(v, turn % 4, (1, 2))[:, :, :: 1 if turn < 4 else -1])
                for v in (rgb, chm[None].astype(np.float32))
            ]
            write_tif(folder / f"{name}_rgb.tif", turned[0], len(rows))
            write_tif(folder / f"{name}_chm.tif", turned[1], len(rows))
            rows.append((name, kind, f"forest {number}", split, f"{name}_rgb.tif", f"{name}_chm.tif"))
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([HEAD, *rows])
    return folder


@pytest.mark.slow
def test_the_default_models_chain(script: Callable, pack: Path, tmp_path: Path, capsys) -> None:
    words = (pack, "-o", tmp_path / "run", "--synth", 4, "--train", "configs/finetune/smoke.yaml")
    assert script("default_model", *words) == 0
    told = capsys.readouterr().out
    assert "$" not in told and told.count("canopy data chips") == 2 and "canopy calibrate interval" in told
    card = (tmp_path / "run" / "model-card.md").read_text()
    assert "## Facts" in card and "Test rows" in card
    from canopy.models.checkpoint import describe

    made = describe(tmp_path / "run" / "default.safetensors")["card"]
    assert "interval" in str(made) and made["scores"]["val"]["model"]["all"]["mae_m"] > 0
    assert script("default_model", *words) == 0  # all but the card is there
    assert "canopy " not in capsys.readouterr().out


def test_what_a_pack_lacks_is_told(script: Callable, tmp_path: Path, capsys) -> None:
    assert script("default_model", tmp_path, "-o", tmp_path / "run") == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_tables_of_benchmarks(
    script: Callable, pack: Path, small_model: Path, tmp_path: Path, capsys
) -> None:
    words = ("-o", tmp_path / "out", "--model", small_model, "--replicates", 0)
    assert script("benchmark_tables", *words, "--benchmark", f"pack={pack}") == 0
    page = (tmp_path / "out" / "benchmarks.md").read_text()
    assert page.startswith("# Benchmarks") and "| small `" in page
    assert script("benchmark_tables", *words, "--benchmark", "pack") == 2
    assert "'pack' is no NAME=DIR" in capsys.readouterr().err


def test_a_county_from_imagery_to_report(
    script: Callable, pack: Path, small_model: Path, repo: Path, tmp_path: Path, capsys
) -> None:
    import geopandas
    from shapely.geometry import box

    config = tmp_path / "county.yaml"
    config.write_text(
        "grid: utm\nzoom: 18\nencoding: uint16cm\ndevice: cpu\nbackend: torch\ndate_band: true\n"
    )
    stands = [box(500_000, 4_881_872, 500_064, 4_882_000), box(500_064, 4_881_900, 500_128, 4_882_000)]
    geopandas.GeoDataFrame({"stand": [1, 2]}, geometry=stands, crs=UTM).to_file(tmp_path / "stands.gpkg")
    words = (config, f"images=[{pack / 't0_0_rgb.tif'}]", f"model={small_model}", f"out={tmp_path / 'map'}",
             "--zones", tmp_path / "stands.gpkg", "--reference", pack / "t0_0_chm.tif")  # fmt: skip
    assert script("county_report", *words, "--dry-run") == 0
    assert not (tmp_path / "map").exists()
    assert script("county_report", *words) == 0
    report = tmp_path / "map-report"
    assert len(list(csv.DictReader((report / "stats.csv").open()))) == 2
    assert (report / "scores" / "report.html").is_file() and "scores" in (report / "index.md").read_text()
    before = (report / "stats.csv").stat().st_mtime_ns
    assert script("county_report", *words) == 0
    assert (report / "stats.csv").stat().st_mtime_ns == before


def test_the_configs_of_regions_are_options_of_canopy_map(repo: Path) -> None:
    from canopy.config import load_settings
    from canopy.region.options import MapOptions

    configs = sorted((repo / "configs" / "region").glob("*.yaml"))
    assert len(configs) >= 3
    assert all(load_settings(MapOptions, path).folder.name for path in configs)
