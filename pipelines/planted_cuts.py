"""How well `canopy compare` finds clear-cuts: synthetic forest, cuts of 0.1, 0.5 and 2 ha, another sun.

    python pipelines/planted_cuts.py cuts --seeds 0 1 2

Each seed is a wooded square of 640 m, seen twice; the second time under another sun and camera, and without
the trees of seven squares. Both images are mapped with bands, compared as two dates without any further
option, and OUT/table.md counts what was found. Running it again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import rasterio
import shapely
from steps import canopy, run, step

from canopy.geo.grid import Grid
from canopy.imagery.named import DemoSource
from canopy.synth.forest import SceneSpec

HA = (2, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1)
OFF_M = (15, 50)
SIDE_M, EDGE_M, BESIDE_M = 640.0, 20.0, 30.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="default")
    return run(partial(chain, parser.parse_args()))


def chain(args: argparse.Namespace) -> None:
    found = []
    for seed in args.seeds:
        folder = args.out / f"seed{seed}"
        if not (folder / "zones.gpkg").exists():
            folder.mkdir(parents=True, exist_ok=True)
            plant(folder, seed)
        maps = [
            step(folder / f"{date}_chm.tif", "predict", folder / f"{date}.tif", "--model", args.model,
                 "--interval", 0.9, "-o", folder / f"{date}_chm.tif")
            for date in ("early", "late")
        ]  # fmt: skip
        canopy("compare", *maps, "--zones", folder / "zones.gpkg", "-o", folder / "change", "--overwrite")
        found.append(judge(folder))
    (args.out / "table.md").write_text(table(found))
    print(table(found))


def table(found: list[list[tuple[Any, ...]]]) -> str:
    """What `judge` says of all seeds, as Markdown."""
    lines = ["| ground | squares | significant as zones | found in classes.tif | ground lower or lost |"]
    lines += ["|---|---:|---:|---:|---:|"]
    names = [*(f"cut of {ha:g} ha" for ha in sorted(set(HA))), "no cut, same sizes", *map(off, OFF_M)]
    for name in names:
        rows = [row for one in found for row in one if row[0] == name]
        zone, pixel = ("" if rows[0][k] is None else f"{sum(row[k] for row in rows)}" for k in (1, 2))
        share = np.average([row[3] for row in rows], weights=[row[4] for row in rows])
        lines.append(f"| {name} | {len(rows) if zone else ''} | {zone} | {pixel} | {share:.1%} |")
    return "\n".join(lines) + "\n"


def off(metres: int) -> str:
    """The name of a row."""
    return f"ground {metres} m and more off any cut"


def plant(folder: Path, seed: int) -> None:
    """early.tif, late.tif, and zones.gpkg: the cuts, and as many squares of the same sizes without one."""
    spec = SceneSpec(seed=seed, density=0.8)
    later = dataclasses.replace(
        spec, sun_azimuth_deg=170.0, sun_elevation_deg=55.0, gain=(1.05, 1.03, 1.0), noise=0.015
    )
    grid = DemoSource(spec, SIDE_M).native_grid
    early, late, bare = (
        DemoSource(s, SIDE_M).tile(grid) for s in (spec, later, dataclasses.replace(later, density=0.0))
    )
    rgb, free, rng = late.rgb.copy(), np.ones(grid.shape, bool), np.random.default_rng(seed)
    zones = []
    for cut, ha in [*((True, ha) for ha in HA), *((False, ha) for ha in HA)]:
        side, edge, beside = (round(m / spec.gsd_m) for m in ((ha * 1e4) ** 0.5, EDGE_M, BESIDE_M))
        best = None
        for _ in range(400):
            r, c = (int(rng.integers(edge, n - side - edge)) for n in grid.shape)
            around = np.s_[max(r - beside, 0) : r + side + beside, max(c - beside, 0) : c + side + beside]
            cover = float((early.chm[r : r + side, c : c + side] > 5).mean())
            if free[around].all() and (best is None or cover > best[0]):
                best = cover, r, c
            if best is not None and best[0] > 0.85:
                break
        if best is None:
            continue  # no room is left
        here = np.s_[best[1] : best[1] + side, best[2] : best[2] + side]
        free[here] = False
        if cut:
            rgb[:, *here] = bare.rgb[:, *here]
        box = shapely.box(*grid.window(best[1], best[2], side, side).bounds)
        zones.append({"name": f"{ha:g} ha", "ha": ha, "cut": cut, "geometry": box})
    for name, image, day in (("early", early.rgb, "2018-07-01"), ("late", rgb, "2022-07-01")):
        with rasterio.open(
            folder / f"{name}.tif", "w", driver="GTiff", count=3, dtype="uint8", height=grid.height,
            width=grid.width, crs=grid.crs.to_wkt(), transform=grid.transform, photometric="RGB", tiled=True,
        ) as file:  # fmt: skip
            file.write(image)
            file.update_tags(ACQUISITION_DATE=day)
    geopandas.GeoDataFrame(zones, crs=grid.crs.to_wkt()).to_file(folder / "zones.gpkg")


def judge(folder: Path) -> list[tuple[Any, ...]]:
    """Per square: what it is, whether significant as a zone, whether half of it is called lower or lost, the
    share of it that is, pixels; and the same of the ground some metres and more off any cut."""
    table = geopandas.read_file(folder / "change" / "zones.gpkg").iloc[:-1]
    with rasterio.open(folder / "change" / "classes.tif") as file:
        codes, crs = file.read(1), file.crs
        grid = Grid.of(crs, file.transform, file.shape)
    lower, rows = np.isin(codes, (3, 5)), list[tuple[Any, ...]]()
    away = {metres: codes != 255 for metres in OFF_M}
    for zone in table.itertuples():
        west, south, east, north = zone.geometry.bounds
        (top, left), (bottom, right) = (
            map(round, grid.rowcol(x, y)) for x, y in ((west, north), (east, south))
        )
        inside = lower[top:bottom, left:right]
        name, share = f"cut of {zone.ha:g} ha" if zone.cut else "no cut, same sizes", float(inside.mean())
        rows.append((name, bool(zone.significant), share >= 0.5, share, float(inside.size)))
        for metres in OFF_M if zone.cut else ():
            wide = round(metres / grid.gsd_m)
            away[metres][max(top - wide, 0) : bottom + wide, max(left - wide, 0) : right + wide] = False
    for metres, there in away.items():
        rows.append((off(metres), None, None, float(lower[there].mean()), float(there.sum())))
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
