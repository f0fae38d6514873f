"""How much a height depends on the crop it was seen in, and what is left of that at the seams of a map.

    python benchmarks/seams.py MODEL IMAGE... --out bench_out
    python benchmarks/seams.py default a.tif b.tif --lattices 512/448 384/320 --pairs 16

A map is made of crops that overlap (`canopy/inference/lattice.py`). For each lattice, pairs of neighbouring
crops are cut from valid imagery at random places and predicted; the same pixels seen from both give the
difference D.

    dependence    mean and 99.9th percentile of |D| where both crops serve the pixel
    level         99th percentile of |mean of D| over 32 px of a seam: what the eye sees as squares
    step          what the seam adds to the difference of two neighbouring pixels: |change of weight x D|
    waste         pixels the network sees per pixel mapped

The margin (outermost pixels of a crop that are dropped) and the ramp (over which crops are blended) share
the overlap; every split of `--margins` is judged from the same predictions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

LATTICES = ("256/224", "512/448", "768/672", "1024/896", "256/160", "512/384")
MARGINS = ("1/16", "1/4", "3/8", "7/16")  # of the overlap, on each side
LIMIT_M = 0.1
RUN_PX = 32
TRIES = 400


def differences(
    model: Any, source: Any, grid: Any, crop_px: int, stride_px: int, pairs: int, seed: int = 0
) -> np.ndarray:
    """D (pairs, crop, overlap) in metres: across the seam along the last axis. Half the pairs lie side by
    side, half one above the other.

    Raises:
        SystemExit: the image has not enough valid pixels together.
    """
    import torch

    rng, found = np.random.default_rng(seed), []
    length, overlap = crop_px + stride_px, crop_px - stride_px
    for _ in range(TRIES):
        if len(found) == pairs:
            break
        upright = len(found) % 2 == 1
        height, width = (length, crop_px) if upright else (crop_px, length)
        if grid.height < height or grid.width < width:
            break
        row, col = rng.integers(0, grid.height - height + 1), rng.integers(0, grid.width - width + 1)
        imagery = source.read(grid.window(int(row), int(col), height, width))
        if not imagery.valid.all():
            continue
        rgb = np.swapaxes(imagery.rgb, 1, 2) if upright else imagery.rgb
        crops = [rgb[:, :, :crop_px], rgb[:, :, stride_px:length]]
        # Turned only to find the seam in one place: the network sees the image as it is.
        crops = [np.swapaxes(crop, 1, 2) for crop in crops] if upright else crops
        with torch.inference_mode():
            made = model(torch.from_numpy(np.stack(crops)))[:, 0].numpy().astype(np.float64)
        made = np.swapaxes(made, 1, 2) if upright else made
        found.append(made[0][:, stride_px:] - made[1][:, :overlap])
    if len(found) < pairs:
        raise SystemExit(
            f"no {pairs} valid places of {crop_px} x {length} px found; give more or larger images"
        )
    return np.stack(found)


def judge(found: np.ndarray, margin_px: int) -> dict[str, float]:
    """The numbers of this file's head for D (pairs, along, across) and a margin."""
    from canopy.inference.lattice import Lattice, taper

    along, overlap = found.shape[1:]
    ramp = overlap - 2 * margin_px
    served = found[:, :, margin_px : overlap - margin_px]
    weights = taper(Lattice(along, along - overlap, margin_px))[:ramp]
    change = np.diff(np.concatenate([[0.0], weights, [1.0]]))
    # D between neighbouring pixels, also over the ends of the ramp, where a weight starts from nothing.
    around = found[:, :, max(0, margin_px - 1) : overlap - margin_px + 1]
    if margin_px == 0:
        around = np.pad(around, ((0, 0), (0, 0), (1, 1)), mode="edge")
    between = (around[..., 1:] + around[..., :-1]) / 2
    step = np.abs(between * change)
    runs = served[:, : along // RUN_PX * RUN_PX].reshape(len(found), -1, RUN_PX, ramp).mean(axis=(2, 3))
    return {
        "mean_m": float(np.abs(served).mean()),
        "p999_m": float(np.percentile(np.abs(served), 99.9)),
        "level_m": float(np.percentile(np.abs(runs), 99)),
        "step_p999_m": float(np.percentile(step, 99.9)),
        "step_max_m": float(step.max()),
    }


def by_distance(found: np.ndarray, bins: int = 8) -> list[dict[str, float]]:
    """Mean and 99.9th percentile of |D| by the distance to the nearer crop's border."""
    overlap = found.shape[2]
    distance = np.minimum(np.arange(overlap), np.arange(overlap)[::-1])
    edges = np.unique(np.linspace(0, overlap // 2, bins + 1).round().astype(int))
    rows = []
    for low, high in pairwise(edges):
        part = np.abs(found[..., (distance >= low) & (distance < high)])
        rows.append(
            {
                "from_px": int(low),
                "to_px": int(high),
                "mean_m": float(part.mean()),
                "p999_m": float(np.percentile(part, 99.9)),
            }
        )
    return rows


def measure(
    model: Any, source: Any, grid: Any, lattices: Sequence[str], pairs: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Table rows, one for each lattice and margin, and the profiles by distance."""
    rows, profiles = [], {}
    for name in lattices:
        crop_px, stride_px = (int(part) for part in name.split("/"))
        overlap = crop_px - stride_px
        found = differences(model, source, grid, crop_px, stride_px, pairs)
        profiles[name] = by_distance(found)
        for share in MARGINS:
            over, under = (int(part) for part in share.split("/"))
            margin = overlap * over // under
            facts = {"lattice": name, "waste": (crop_px / stride_px) ** 2, "margin": margin}
            rows.append(facts | {"ramp": overlap - 2 * margin} | judge(found, margin))
        print(f"  {name} done", file=sys.stderr, flush=True)
    return rows, profiles


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("model", nargs="?", default="default", help="a name or a model file")
    parser.add_argument(
        "image", nargs="*", default=["demo"], help="image files (a mosaic), or the name of a source"
    )
    parser.add_argument("--lattices", nargs="+", default=LATTICES, metavar="CROP/STRIDE")
    parser.add_argument("--pairs", type=int, default=12, help="pairs of crops for each lattice")
    options = parser.parse_args(argv)
    from canopy.imagery.open import open_imagery
    from canopy.models.checkpoint import load_model

    model = load_model(options.model)
    source = open_imagery(options.image[0] if len(options.image) == 1 else options.image)
    area = source.area()
    if area is None:
        raise SystemExit("the imagery has no extent of its own; give files")
    grid = area.grid(area.output_crs(source.native_crs), model.config.gsd_m)
    rows, profiles = measure(model, source, grid, options.lattices, options.pairs)
    settings = {"model": Path(options.model).name, "pairs": options.pairs, "images": len(options.image)}
    shown = [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    common.show("Seams (metres)", shown, [f"wanted: waste <= 1.31 with steps below {LIMIT_M} m"])
    for name, profile in profiles.items():
        text = ", ".join(
            f"{p['from_px']}-{p['to_px']} px {p['mean_m']:.3f}/{p['p999_m']:.2f}" for p in profile
        )
        print(f"{name} by distance to the crop's border, mean/p99.9: {text}")
    common.save(options.out, "seams", settings, {"lattices": rows, "profiles": profiles})


if __name__ == "__main__":
    main()
