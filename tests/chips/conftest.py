"""Small made-up chips, and a folder of them that was cut from files."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine

from canopy.chips.store import Chip, ChipRow
from canopy.geo.crs import transformer
from canopy.synth.forest import random_spec
from canopy.synth.render import render

UTM, X, Y = "EPSG:32617", 400_000.0, 4_000_000.0


@pytest.fixture(scope="session")
def make_chip() -> Callable[..., Chip]:
    """Makes a chip whose heights can be read off the red channel."""

    def make(id="a", site="s", kind="lidar", split="train", side_m=64, seed=0, shots=()) -> Chip:
        rng = np.random.default_rng(seed)
        chm = rng.uniform(1, 30, (side_m, side_m)).round(2).astype(np.float32)
        red = (chm * 8).astype(np.uint8).repeat(2, 0).repeat(2, 1)
        rgb = np.stack([red, red // 2 + 1, np.full_like(red, 40)])
        row = ChipRow(id, site, kind, split, shots=len(shots))
        return Chip(row, rgb, chm, np.array(shots, np.float32).reshape(-1, 4))

    return make


@pytest.fixture
def save() -> Callable[..., None]:
    return save_raster


def save_raster(path: Path, values: np.ndarray, gsd: float, x: float = X, y: float = Y, **profile) -> None:
    """Bands (n, h, w) with their upper-left corner at x, y."""
    with rasterio.open(
        path, "w", driver="GTiff", count=len(values), dtype=values.dtype, height=values.shape[1],
        width=values.shape[2], transform=Affine(gsd, 0, x, 0, -gsd, y), **{"crs": UTM, **profile},
    ) as file:  # fmt: skip
        file.write(values)


@pytest.fixture(scope="session")
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
        save_raster(folder / f"rgb{i}.tif", np.maximum(tile.rgb, 7), 0.5, X + 148 * i)
        save_raster(folder / f"chm{i}.tif", chm[None], 1.0, X + 148 * i, nodata=-9999)
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


@pytest.fixture(scope="session")
def folder(manifest, tmp_path_factory) -> Path:
    """Its chips of 128 px; not to be changed."""
    from canopy.chips.options import CutOptions
    from canopy.chips.write import write_chips

    out = tmp_path_factory.mktemp("cut") / "chips"
    write_chips(manifest, out, CutOptions(size_px=128, undo_shift=False))
    return out
