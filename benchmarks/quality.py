"""How often images are flagged out of domain: `python benchmarks/quality.py PACK [--every 6]`.

The reference comes from the pack's training images and the limit from its val images, as `canopy calibrate
interval` makes them. Flagged is an image whose crops are beyond the limit on average. Towns are NAIP images
of Californian cities: a tenth of them was looked at when the descriptor was designed, none sets a number.
Real desert is NAIP of Palm Springs with at most six annotated trees. The pack shows no sea: real water is
patches of three ponds in the towns, in one to three years, laid side by side in mirrored copies.
Further deserts and waters are generated.
"""

from __future__ import annotations

import csv
from pathlib import Path

import common
import numpy as np
import rasterio
from scipy import ndimage

from canopy.calibration.calibrate import crops_described, fit_domain
from canopy.calibration.collect import load_chips
from canopy.inference.layers import CARD_KEY, QualityRules, rules_of

MODEL_GSD_M = 0.5
FEW_TREES = 6
PATCH_PX = 40
PONDS = (
    "long_beach_2018_47", "long_beach_2020_47", "claremont_2016_8", "claremont_2018_8", "claremont_2020_8",
    "palm_springs_2020_76",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("chips", type=Path, help="its pairs, cut by canopy data chips")
    parser.add_argument("--every", type=int, default=6, help="take every n-th town image")
    parser.add_argument("--generated", type=int, default=40, help="deserts and lakes to generate, each")
    options = parser.parse_args(argv)
    images = {
        s: [c.rgb for c in load_chips(options.chips, (s,))[0]] for s in ("train", "val", "test", "test_hard")
    }
    rules = rules_of({CARD_KEY: fit_domain(images.pop("train"), images["val"])})
    groups = {name: [_ratio(rules, image) for image in found] for name, found in images.items()}
    scenes = list(csv.DictReader((options.pack / "ssl" / "manifest_ssl.csv").open(newline="")))
    bare = [r for r in scenes if r["place"] == "palm_springs" and int(r["n_tree_points"]) <= FEW_TREES]
    groups["desert, real"] = [_ratio(rules, _read(options.pack / r["rgb_path"])) for r in bare]
    groups["water, real"] = [_ratio(rules, image) for image in real_water(options.pack)]
    for name, place in (("farmland, KY", "Versailles"), ("rainforest, Peru", "near Iquitos")):
        found = [options.pack / r["rgb_path"] for r in scenes if r["place"].startswith(place)]
        groups[name] = [_ratio(rules, _read(path)) for path in found]
    towns = sorted((options.pack / "ssl" / "naip_ca").glob("*.tif"))[:: options.every]
    groups["towns"] = [_ratio(rules, _read(path)) for path in towns]
    groups["deserts"] = [_ratio(rules, desert(seed)) for seed in range(options.generated)]
    groups["water"] = [_ratio(rules, water(seed)) for seed in range(options.generated)]
    rows = []
    for name, found in groups.items():
        values = np.array([v for v in found if v is not None])
        flagged = round(100 * float((values > 1).mean()), 2) if len(values) else None
        rows.append({"images": name, "number": len(values), "flagged %": flagged})
    common.show("Flagged out of domain", rows)
    common.save(options.out, "quality", {"every": options.every, "generated": options.generated}, rows)


def _ratio(rules: QualityRules, image: np.ndarray) -> float | None:
    """Mean distance of an image's crops in units of the limit; None where it is too small."""
    described = crops_described(image)
    return float(np.mean([rules.distance(d) for d in described])) / rules.limit if described else None


def _read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        factor = file.res[0] / MODEL_GSD_M
        return file.read() if factor == 1 else ndimage.zoom(file.read(), (1, factor, factor), order=1)


def real_water(pack: Path) -> list[np.ndarray]:
    """Images of 512 px, uint8: patches of ponds in the towns' images, each mirrored to and fro."""
    made = []
    for pond in PONDS:
        rgb = _read(pack / "ssl" / "naip_ca" / f"{pond}.tif")
        places = [
            (slice(top, top + PATCH_PX), slice(left, left + PATCH_PX))
            for top in range(0, rgb.shape[1] - PATCH_PX + 1, PATCH_PX // 4)
            for left in range(0, rgb.shape[2] - PATCH_PX + 1, PATCH_PX // 4)
        ]
        # Water is bluer than lawn and asphalt, and as smooth as anything in the image.
        patches = [rgb[:, *place] / 255.0 for place in places]
        score = [(p[2] - p[:2].max(axis=0)).mean() - 4 * p.mean(axis=0).std() for p in patches]
        best = rgb[:, *places[int(np.argmax(score))]]
        made.append(np.pad(best, ((0, 0), (0, 512 - PATCH_PX), (0, 512 - PATCH_PX)), mode="symmetric"))
    return made


def _field(rng: np.random.Generator, sigma_px: float, side: int = 512) -> np.ndarray:
    made = ndimage.gaussian_filter(rng.normal(size=(side, side)), sigma_px, mode="wrap")
    return made / made.std()


def desert(seed: int) -> np.ndarray:
    """Sand, stones and dunes, uint8 (3, 512, 512)."""
    rng = np.random.default_rng([1, seed])
    sand = np.array([0.72, 0.58, 0.42]) * rng.uniform(0.75, 1.2) + rng.normal(0, 0.03, 3)
    light = 1 + 0.05 * _field(rng, 40) + rng.uniform(0.01, 0.04) * _field(rng, 8)
    light += rng.uniform(0.005, 0.02) * _field(rng, 1)
    light += rng.uniform(0, 0.05) * np.sin((np.arange(512) + 20 * _field(rng, 30)) / rng.uniform(6, 25))
    stones = ndimage.binary_dilation(rng.random((512, 512)) < rng.uniform(0, 0.002), iterations=2)
    return _bytes(sand[:, None, None] * light * np.where(stones, 0.6, 1.0))


def water(seed: int) -> np.ndarray:
    """Dark to turbid water with waves, uint8 (3, 512, 512)."""
    rng = np.random.default_rng([2, seed])
    colours = [[0.10, 0.17, 0.22], [0.06, 0.10, 0.13], [0.15, 0.25, 0.25], [0.25, 0.30, 0.28]]
    tone = np.array(colours[rng.integers(4)]) * rng.uniform(0.75, 1.25)
    waves = 1 + 0.05 * _field(rng, 60) + rng.uniform(0.01, 0.06) * _field(rng, 1.5)
    return _bytes(tone[:, None, None] * waves + rng.uniform(0, 0.01) * rng.normal(size=(512, 512)))


def _bytes(rgb: np.ndarray) -> np.ndarray:
    return np.round(np.clip(rgb, 1 / 255, 1) * 255).astype(np.uint8)


if __name__ == "__main__":
    main()
