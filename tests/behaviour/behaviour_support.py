"""What the behaviour suite stands on: commands in this process, goldens, and inputs made on the fly.

Nothing here knows a module of canopy below `canopy` and `canopy.cli.main`, so that the suite tells whether a
rebuilt canopy still does what the recorded one did.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from rasterio.crs import CRS
from scipy import ndimage

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
GOLDENS = HERE / "goldens"
RECORDING = os.environ.get("CANOPY_RECORD") == "1"
"""Write goldens instead of comparing with them (see record.py)."""

HEIGHT_TOL_M = 0.02
"""How far heights may lie from those of the recorded release."""
ROUNDING_M = 0.0005
"""Goldens hold millimetres."""


# ---- commands ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def error_line(self) -> str:
        """The last line on stderr: the one-line error of a command that failed."""
        return self.err.strip().splitlines()[-1]

    @property
    def json(self) -> Any:
        """The one object that `--json` prints."""
        return json.loads(self.out)


def run(folder: Path, *words: object, code: int = 0) -> Ran:
    """`canopy WORDS` in `folder`, through the real entry point, in this process; it must exit with `code`.

    A text among the words may hold several of them, as a shell's line does.
    """
    from canopy.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    typed = [part for word in words for part in (shlex.split(word) if isinstance(word, str) else [str(word)])]
    argv, sys.argv = sys.argv, ["canopy", *typed]
    found: Any = 0
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as stop:
                found = stop.code
    finally:
        sys.argv = argv
    ran = Ran(int(found or 0), out.getvalue(), err.getvalue())
    assert ran.code == code, f"canopy {' '.join(map(str, words))}: exit {ran.code}\n{ran.out}\n{ran.err}"
    assert "Traceback" not in ran.err, ran.err
    return ran


def program(*words: object) -> list[str]:
    """The command as a process of its own; give it `env=environment()`."""
    code = "import sys; sys.argv[0] = 'canopy'; from canopy.cli.main import main; main()"
    return [sys.executable, "-c", code, *(str(word) for word in words)]


def environment() -> dict[str, str]:
    """This process's, with this checkout's canopy in front."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# ---- goldens ----------------------------------------------------------------------------------
def metres(path: Path, band: int = 1) -> np.ndarray:
    """(height, width) float32 heights, NaN where nodata."""
    with rasterio.open(path) as dataset:
        values = dataset.read(band, masked=True).astype(np.float32).filled(np.nan)
        return values * dataset.scales[band - 1]


def check_heights(
    name: str, heights_m: np.ndarray, *, stride: int = 4, tol_m: float = HEIGHT_TOL_M, share: float = 1.0,
    mean_m: float | None = None, mask_share: float = 0.0,
) -> None:  # fmt: skip
    """Heights (h, w) in metres with NaN where there are none are those recorded under `name`.

    The mask is compared everywhere, and may differ in `mask_share` of the pixels. Heights are compared at
    every `stride`-th pixel: all but 1 - `share` must lie within `tol_m`; or, with `mean_m`, the mean counts.
    """
    valid, picked = np.isfinite(heights_m), heights_m[::stride, ::stride]
    path = GOLDENS / f"{name}.npz"
    if RECORDING:
        mm = np.where(np.isfinite(picked), np.round(np.nan_to_num(picked) * 1000), -32768).astype(np.int32)
        mm = mm.astype(np.int16) if np.abs(mm).max(initial=0) <= 32768 else mm
        np.savez_compressed(path, mm=mm, valid=np.packbits(valid), shape=valid.shape)
        return
    with np.load(path) as golden:
        shape = tuple(golden["shape"])
        assert heights_m.shape == shape, f"{name}: {heights_m.shape}, was {shape}"
        was_valid = np.unpackbits(golden["valid"], count=valid.size).reshape(shape).astype(bool)
        was = golden["mm"] / 1000.0
    changed = int((valid != was_valid).sum())
    assert changed <= mask_share * valid.size, f"{name}: {changed} of {valid.size} pixels differ in validity"
    apart = np.abs(picked - was)[(valid & was_valid)[::stride, ::stride]]
    if mean_m is not None:
        assert apart.mean() <= mean_m, f"{name}: heights moved by {apart.mean():.3f} m in the mean"
        return
    far = float((apart > tol_m + ROUNDING_M).mean()) if apart.size else 0.0
    assert far <= 1 - share, f"{name}: {far:.2%} of heights moved by over {tol_m} m, most {apart.max():.3f} m"


def check_values(name: str, found: dict[str, Any], *, rel: float = 1e-6, abs_: float = 1e-9) -> None:
    """A flat dict of numbers, texts and lists of them is the one recorded; new entries are allowed."""
    was = _recorded(name, "values", found)
    for key, value in was.items():
        assert key in found, f"{name}: {key} is gone"
        _same(f"{name}: {key}", found[key], value, rel, abs_)


def check_keys(name: str, found: Any) -> None:
    """Every key that this JSON object had is still there; new keys are allowed."""
    gone = set(_recorded(name, "keys", sorted(set(_key_paths(found))))) - set(_key_paths(found))
    assert not gone, f"{name}: {sorted(gone)} are gone"


def check_report(name: str, found: Any, *, skip: str = "ci95", loose: str = "$^", by: float = 0.03,
                 rel: float = 1e-6) -> None:  # fmt: skip
    """A JSON object has the keys it had, and its numbers are those it had, to `rel`.

    Numbers whose dotted name fits `skip` are not compared; those that fit `loose` may differ by `by`
    and 0.5 %.
    """
    check_keys(name, found)
    numbers = {key: value for key, value in _leaves(found) if not re.search(skip, key)}
    check_values(name, {k: v for k, v in numbers.items() if not re.search(loose, k)}, rel=rel)
    differ = {k: v for k, v in numbers.items() if re.search(loose, k)}
    check_values(f"{name}_loose", differ, rel=0.005, abs_=by)


def _leaves(found: Any, before: str = "") -> Iterator[tuple[str, float]]:
    """Numbers with their dotted names."""
    pairs = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    for key, value in pairs:
        yield from _leaves(value, f"{before}{key}.")
    if isinstance(found, int | float) and not isinstance(found, bool):
        yield before.rstrip("."), found


def _recorded(name: str, part: str, found: Any) -> Any:
    path = GOLDENS / f"{name}.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    if RECORDING:
        content[part] = json.loads(json.dumps(found, default=float))
        path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    return content[part]


def _key_paths(found: Any, before: str = "") -> Iterator[str]:
    if isinstance(found, dict):
        for key, value in found.items():
            yield f"{before}{key}"
            yield from _key_paths(value, f"{before}{key}.")
    elif isinstance(found, list) and found:
        yield from _key_paths(found[0], f"{before}0.")


def _same(where: str, found: Any, was: Any, rel: float, abs_: float) -> None:
    if isinstance(was, list):
        assert len(found) == len(was), f"{where}: {len(found)} entries, were {len(was)}"
        for one, other in zip(found, was, strict=True):
            _same(where, one, other, rel, abs_)
    elif isinstance(was, float) or (isinstance(was, int) and not isinstance(was, bool)):
        ok = found == was or bool(np.isclose(found, was, rtol=rel, atol=abs_, equal_nan=True))
        assert ok, f"{where} is {found}, was {was}"
    else:
        assert found == was, f"{where} is {found!r}, was {was!r}"


def check_grid(name: str, path: Path) -> None:
    """What a reader of a raster sees before its pixels is what was recorded, places to a centimetre."""
    with rasterio.open(path) as dataset:
        found = {
            "crs": dataset.crs.to_string(), "transform": list(dataset.transform)[:6], "count": dataset.count,
            "shape": list(dataset.shape), "dtypes": list(dataset.dtypes), "nodata": str(dataset.nodata),
            "descriptions": list(dataset.descriptions), "scales": list(dataset.scales),
            "units": list(dataset.units),
        }  # fmt: skip
    check_values(name, found, rel=1e-9)


# ---- inputs -----------------------------------------------------------------------------------
UTM, WEST, NORTH, GSD = "EPSG:32618", 500_000.0, 4_882_000.0, 0.5


def forest(height_px: int, width_px: int, seed: int = 0, gsd_m: float = GSD) -> tuple[np.ndarray, np.ndarray]:
    """A wood seen from above: uint8 (3, h, w) colours, never 0, and float32 (h, w) heights in metres.

    Domed crowns stand where smooth noise is high, and are lit from the north-west.
    """
    rng = np.random.default_rng(seed)
    dense = ndimage.gaussian_filter(rng.normal(size=(height_px, width_px)), 14 / gsd_m)
    dense = (dense - dense.min()) / np.ptp(dense)
    heights = np.zeros((height_px, width_px), np.float32)
    for _ in range(int(height_px * width_px * gsd_m**2 / 14)):
        row, col = int(rng.integers(height_px)), int(rng.integers(width_px))
        radius_m, pick = float(rng.uniform(1.5, 4.5)), float(rng.random())
        if pick > 1.6 * dense[row, col] - 0.25:
            continue
        r = int(np.ceil(radius_m / gsd_m))
        top, left = max(row - r, 0), max(col - r, 0)
        place = np.s_[top : row + r + 1, left : col + r + 1]
        rows, cols = np.ogrid[top : min(row + r + 1, height_px), left : min(col + r + 1, width_px)]
        away = ((rows - row) ** 2 + (cols - col) ** 2) * gsd_m**2 / radius_m**2
        dome = (5 * radius_m + 2) * np.sqrt(np.maximum(0, 1 - away))
        heights[place] = np.maximum(heights[place], dome)
    down, right = np.gradient(ndimage.gaussian_filter(heights, 1.0), gsd_m)
    light = np.clip(1 + 0.16 * (down + right), 0.35, 1.6)
    light *= np.where(np.roll(heights, (6, 6), (0, 1)) > heights + 4, 0.55, 1.0)
    ground, crown = np.array([150, 135, 105.0]), np.array([62, 92, 48.0])
    share = np.clip(heights / 3, 0, 1)[None]
    colours = (ground[:, None, None] * (1 - share) + crown[:, None, None] * share) * light
    colours += rng.normal(0, 5, colours.shape)
    return np.clip(colours, 2, 250).astype(np.uint8), np.round(heights, 3)


def write_raster(
    path: Path, bands: np.ndarray, *, crs: str | None = UTM, west: float = WEST, north: float = NORTH,
    gsd: float = GSD, transform: Affine | None = None, nodata: float | None = None,
    mask: np.ndarray | None = None, scale: float = 1.0, names: Sequence[str] = (),
    tags: dict[str, str] | None = None, **profile: Any,
) -> Path:  # fmt: skip
    """Write (bands, h, w) or (h, w) as a GeoTIFF of `gsd` metres at an upper left corner."""
    bands = bands if bands.ndim == 3 else bands[None]
    settings = {
        "driver": "GTiff", "count": len(bands), "dtype": bands.dtype.name, "height": bands.shape[1],
        "width": bands.shape[2], "crs": crs, "nodata": nodata,
        "transform": transform or Affine(gsd, 0, west, 0, -gsd, north), **profile,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", **settings) as dataset:
        dataset.write(bands)
        dataset.scales = (scale,) * len(bands)
        if names:
            dataset.descriptions = tuple(names)
        if mask is not None:
            dataset.write_mask(mask)
        dataset.update_tags(**(tags or {}))
    return path


def write_image(path: Path, rgb: np.ndarray, **more: Any) -> Path:
    """Write uint8 (3, h, w) as an RGB GeoTIFF; see `write_raster`."""
    return write_raster(path, rgb, **({"photometric": "RGB"} | more))


def write_granule(
    path: Path, lon: np.ndarray, lat: np.ndarray, rh_m: np.ndarray, **columns: np.ndarray
) -> Path:
    """A GEDI L2A granule of n shots, dealt to a full and a coverage beam; rh_m is (n, 101)."""
    import h5py

    n = len(lon)
    values = {
        "shot_number": np.arange(n, dtype=np.uint64) + np.uint64(196400000000000000), "lat_lowestmode": lat,
        "lon_lowestmode": lon, "rh": rh_m.astype(np.float32), "delta_time": 1.1e8 + np.arange(n) * 0.01,
        "quality_flag": np.ones(n, np.uint8), "degrade_flag": np.zeros(n, np.uint8),
        "sensitivity": np.full(n, 0.97, np.float32),
        "land_cover_data/landsat_water_persistence": np.zeros(n, np.uint8),
        "land_cover_data/urban_proportion": np.zeros(n, np.uint8),
    } | columns  # fmt: skip
    with h5py.File(path, "w") as file:
        for beam, part in (("BEAM0101", slice(0, None, 2)), ("BEAM0001", slice(1, None, 2))):
            for name, column in values.items():
                file[f"{beam}/{name}"] = column[part]
    return path


def warped(source: Path, path: Path, crs: str, gsd: float) -> Path:
    """The same raster in another CRS, by GDAL: images bilinear and 0 as nodata, heights averaged and NaN."""
    from rasterio.warp import Resampling, calculate_default_transform, reproject

    with rasterio.open(source) as dataset:
        transform, width, height = calculate_default_transform(
            dataset.crs, crs, dataset.width, dataset.height, *dataset.bounds, resolution=gsd
        )
        image = dataset.count == 3
        nothing, kernel = (0, Resampling.bilinear) if image else (float("nan"), Resampling.average)
        values = np.full((dataset.count, height, width), nothing, dataset.dtypes[0])
        reproject(
            dataset.read(), values, src_transform=dataset.transform, src_crs=dataset.crs,
            src_nodata=None if image else nothing, dst_transform=transform, dst_crs=CRS.from_string(crs),
            resampling=kernel,
        )  # fmt: skip
    colours = {"photometric": "RGB"} if image else {}
    return write_raster(path, values, crs=crs, transform=transform, nodata=nothing, **colours)


def names_below(folder: Path) -> set[str]:
    """All files and folders below a folder, as relative paths."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def listed(words: Iterable[object]) -> str:
    """Words as a comma-separated option."""
    return ",".join(str(word) for word in words)
