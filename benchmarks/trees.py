"""How well `canopy trees` finds the known trees of the synthetic forest: `python benchmarks/trees.py`.

Each seed is a square of forest of another kind. Its trees are those of the least height or more whose stem is
seen from above; one is found where a top lies on its crown, no further from the stem than half its radius;
all other tops are false, further ones on the same crown too. The true heights are tried, and the map that
the default model makes of the image.
"""

from __future__ import annotations

import argparse
from typing import Any

import geopandas
import numpy as np
import rioxarray  # noqa: F401  (registers the .rio accessor)
import xarray

import canopy
from canopy.evaluation.grids import pixel_areas_m2
from canopy.imagery.named import DemoSource
from canopy.synth.forest import random_spec
from canopy.synth.render import truth


def forest(
    seed: int, side_m: float, name: str = "chm"
) -> tuple[DemoSource, xarray.DataArray, xarray.DataArray]:
    """A square of forest, its true heights (y, x) in metres and its image (band, y, x)."""
    scene = DemoSource(random_spec(seed), side_m)
    grid = scene.native_grid
    tile = scene.tile(grid)
    x = grid.xy(0, np.arange(grid.width) + 0.5)[0]
    y = grid.xy(np.arange(grid.height) + 0.5, 0)[1]
    height = xarray.DataArray(tile.chm, {"y": y, "x": x}, ("y", "x"), name=name)
    image = xarray.DataArray(tile.rgb, {"y": y, "x": x}, ("band", "y", "x"))
    return scene, *(array.rio.write_crs(grid.crs.to_wkt()) for array in (height, image))


def score(scene: DemoSource, found: geopandas.GeoDataFrame, lowest_m: float) -> dict[str, Any]:
    """Counts of trees, tops and hits; of the hits the errors of height (m) and of crown area (share)."""
    grid = scene.native_grid
    west, north = grid.xy(0, 0)
    known = truth(scene.spec, west - scene.origin_xy[0], north - scene.origin_xy[1], *grid.shape)
    trees = known.trees
    rows, cols = (
        np.floor(v).astype(int)
        for v in grid.rowcol(trees.x + scene.origin_xy[0], trees.y + scene.origin_xy[1])
    )
    inside = (
        (rows >= 0) & (rows < grid.height) & (cols >= 0) & (cols < grid.width) & (trees.height >= lowest_m)
    )
    seen = np.flatnonzero(inside)
    seen = seen[known.owner[rows[seen], cols[seen]] == seen]
    at = (np.floor(v).astype(int) for v in grid.rowcol(found["x"].to_numpy(), found["y"].to_numpy()))
    tallest = found.assign(tree=known.owner[tuple(at)]).sort_values("height_m")
    tallest = tallest.drop_duplicates("tree", keep="last")
    hits = tallest[tallest["tree"].isin(seen)]
    x, y, radius = (values[hits["tree"]] for values in (trees.x, trees.y, trees.radius))
    away = np.hypot(hits["x"] - scene.origin_xy[0] - x, hits["y"] - scene.origin_xy[1] - y)
    hits = hits[away <= radius / 2]
    areas = np.bincount(known.owner[known.owner >= 0], minlength=len(trees)) * pixel_areas_m2(grid).mean()
    return {
        "trees": len(seen), "tops": len(found), "hits": len(hits),
        "height": hits["height_m"].to_numpy() - trees.height[hits["tree"]],
        "crown": hits["crown_m2"].to_numpy() / areas[hits["tree"]] - 1,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--side-m", type=float, default=300.0)
    parser.add_argument("--min-height", type=float, default=5.0)
    given = parser.parse_args(argv)
    print("| heights | forest | trees | tops | precision | recall | F1 | height bias | MAE | crown area |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    rows: dict[str, list[dict[str, Any]]] = {"true": [], "default model": []}
    for seed in given.seeds:
        scene, height, image = forest(seed, given.side_m)
        for name, heights in (("true", height), ("default model", canopy.predict(image))):
            rows[name].append(
                score(scene, canopy.trees(heights, min_height_m=given.min_height), given.min_height)
            )
            show(name, f"seed {seed}", rows[name][-1:])
    for name, scores in rows.items():
        show(name, "all", scores)


def show(name: str, kind: str, scores: list[dict[str, Any]]) -> None:
    """A line of the table, of scores taken together."""
    trees, tops, hits = (sum(one[key] for one in scores) for key in ("trees", "tops", "hits"))
    height, crown = (np.concatenate([one[key] for one in scores]) for key in ("height", "crown"))
    told = f"{height.mean():+.2f} m | {abs(height).mean():.2f} m | {np.median(crown):+.0%}" if hits else "| |"
    precision, recall, f1 = hits / max(tops, 1), hits / max(trees, 1), 2 * hits / max(tops + trees, 1)
    shares = f"{precision:.2f} | {recall:.2f} | {f1:.2f}"
    print(f"| {name} | {kind} | {trees:,} | {tops:,} | {shares} | {told} |", flush=True)


if __name__ == "__main__":
    main()
