"""What a map holds beside heights: interval bands, acquisition days, quality flags.

The network's further outputs and the scores behind the flags are blended over the crops like heights are, and
only then turned into bands. So these bands depend on tiles, batches and threads as little as heights do.

The band `quality`: why a height may deserve less trust, bit by bit.

| bit | value | set where |
|---|---|---|
| 0 | 1 | shadow: much darker than its surroundings, and dark |
| 1 | 2 | haze or cloud suspected: bright, colourless, without dark spots (dark channel: He et al. 2011) |
| 2 | 4 | over-exposed: a channel at its upper end |
| 3 | 8 | low sun: shadow on more than a third of the surroundings |
| 4 | 16 | water-like: smooth, dark and not green |
| 5 | 32 | out of domain: colour and texture of the surroundings unlike the training images |
| 6 | 64 | acquisition date unknown |

Every score is computed crop by crop and blended like the heights, so that no flag depends on tiles. Bits are
suspicions by simple rules, not a classification.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from canopy.geo.area import AOI
    from canopy.geo.cog import BandSpec
    from canopy.inference.options import PredictOptions
    from canopy.models.height import HeightModel
    from canopy.models.intervals import IntervalTable


Band = tuple[str, str]
HEIGHT_BAND: Band = ("canopy_height", "m")
DATE_BAND: Band = ("acquisition_date", "d")
INTERVAL_BANDS: tuple[Band, Band] = (("height_lower", "m"), ("height_upper", "m"))
QUALITY_BAND: Band = ("quality", "1")


@dataclass(frozen=True)
class Extras:
    """What is wanted beside heights.

    Attributes:
        date: the acquisition day, since 1970-01-01, 0 where unknown.
        interval: the model's calibration, for lower and upper bands; `level` is their coverage.
        quality: rules of the quality flags, for a band of them.
        judge: the rules by which a sample of the crops is judged, for `findings`.
        tallest_m: height from which the model does not tell taller trees apart.
        raw: hand out the layers themselves, and then the days, for resampling (see `regrid`).
    """

    date: bool = False
    interval: IntervalTable | None = None
    level: float = 0.9
    quality: QualityRules | None = None
    judge: QualityRules | None = None
    tallest_m: float = math.inf
    raw: bool = False

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the network is to give, by name (`HeightModel.layers`): heights first."""
        return ("height_m", "spread_m") if self.interval else ("height_m",)

    @property
    def layers(self) -> int:
        """Layers that are predicted and blended: the network's outputs, then scores of the flags."""
        return len(self.outputs) + (len(NAMES) if self.quality else 0)

    @property
    def bands(self) -> tuple[Band, ...]:
        """Names and units of the map's bands, in order."""
        bands: tuple[Band, ...] = (HEIGHT_BAND,)
        bands += INTERVAL_BANDS if self.interval is not None else ()
        bands += (DATE_BAND,) if self.date else ()
        return bands + ((QUALITY_BAND,) if self.quality is not None else ())

    def stack(self, layers: np.ndarray, days: np.ndarray) -> np.ndarray:
        """Blended layers (`layers`, h, w) and days (h, w) -> the map's bands (b, h, w) float32."""
        if self.raw:
            return np.concatenate([layers, days[None].astype(np.float32)]).astype(np.float32, copy=False)
        bands, given = [layers[0]], len(self.outputs)
        if self.interval is not None:
            # Where there is nothing a layer may hold anything; it is masked later.
            clean = np.maximum(np.nan_to_num(layers[:given]).astype(np.float64), 0.0)
            bands += self.interval.bounds(clean[0], clean[1], self.level)
        if self.date:
            bands.append(days.astype(np.float32))
        if self.quality is not None:
            bands.append(self.quality.flags(layers[given:], days).astype(np.float32))
        return np.stack(bands).astype(np.float32, copy=False)


def extras_of(options: PredictOptions, model: HeightModel, aoi: AOI | None = None) -> Extras:
    """What is wanted beside heights; where the area lies may decide how wide its bands are.

    Raises:
        ConfigError: the model's file lacks the calibration that it takes; it names the remedy.
    """
    table = quality = None
    if options.interval is not None:
        from canopy.models.intervals import check_level, table_of

        box = () if aoi is None else aoi.bounds_lonlat
        corners = [(lon, lat) for lon in box[::2] for lat in box[1::2]]
        table = table_of(model.card, corners)
        check_level(table.levels, options.interval)
    judge = rules_of(model.card) if CARD_KEY in model.card else QualityRules.without_reference()
    if options.quality_band:
        quality = rules_of(model.card)
    return Extras(options.date_band, table, options.interval or 0.9, quality, judge, tallest_of(model.card))


def band_specs(bands: Sequence[Band]) -> list[BandSpec]:
    """How a map's bands are written: flags stay whole numbers in every encoding."""
    from canopy.geo.cog import BandSpec

    return [BandSpec(*band) for band in bands]


CARD_KEY = "quality"
CELL_PX, JUDGED_PX = 64, 384
SHADOW, HAZE, EXPOSURE, LOW_SUN, WATER, DOMAIN, UNDATED = (1 << bit for bit in range(7))
NAMES = ("shadow", "haze", "exposure", "low_sun", "water", "domain")
BITS = (*NAMES, "date_unknown")
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# A blended score above this sets the bit; low sun and domain have scales of their own, both 1 at the line.
_LINE = {"shadow": 0.5, "haze": 0.5, "exposure": 0.5, "low_sun": 1.0, "water": 0.5, "domain": 1.0}
_LOW_SUN_SHARE = 0.35


@dataclass(frozen=True)
class QualityRules:
    """Scores and flags, with the reference of the training images' colour and texture.

    Attributes:
        centre, scale: (f,) of the crop descriptors of training images.
        root: (f, f); root @ ((d - centre) / scale) has the length of d's Mahalanobis distance.
        limit: distance beyond which a crop is out of domain.
    """

    centre: np.ndarray
    scale: np.ndarray
    root: np.ndarray
    limit: float

    @classmethod
    def without_reference(cls) -> QualityRules:
        """Rules that find nothing out of domain, for a model that has no reference."""
        return cls(np.zeros(DESCRIPTORS), np.ones(DESCRIPTORS), np.eye(DESCRIPTORS), math.inf)

    def __call__(self, rgb: np.ndarray, wanted: np.ndarray) -> dict[str, int]:
        """Pixels of a crop by flag, and `judged`, how many there were; of its middle, which is cheaper."""
        place = tuple(
            slice(max(0, (n - JUDGED_PX) // 2), max(0, (n - JUDGED_PX) // 2) + JUDGED_PX)
            for n in wanted.shape
        )
        if not wanted[place].any():
            place = np.s_[:, :]
        wanted, rgb = wanted[place], rgb[:, *place]
        bits = self.flags(self.scores(rgb, wanted), np.ones(wanted.shape))[wanted]
        counts = {name: int((bits & 1 << bit != 0).sum()) for bit, name in enumerate(NAMES)}
        return {"judged": bits.size, **counts}

    def scores(self, rgb: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Scores (6, h, w) float32 of one crop: rgb (3, h, w) in 0..1, holes filled; valid (h, w).

        A pure function of the crop; low sun and domain are the same at all of its pixels.
        """
        from scipy import ndimage

        luma = np.tensordot(_LUMA, rgb, 1)
        near = ndimage.uniform_filter(luma, 5, mode="nearest")
        # The lit part of the crop: its median would sink into the shadows that it is to find.
        usual = float(np.percentile(luma[valid], 70)) if valid.any() else 0.0
        shadow = ((near < 0.45 * usual) & (near < 0.22)).astype(np.float32)
        top, low = rgb.max(axis=0), rgb.min(axis=0)
        dark = ndimage.minimum_filter(ndimage.uniform_filter(low, 3, mode="nearest"), 15, mode="nearest")
        grey = ndimage.uniform_filter(top - low, 15, mode="nearest")
        haze = ((dark > 0.45) & (grey < 0.16)).astype(np.float32)
        exposed = ndimage.uniform_filter((top >= 0.99).astype(np.float32), 5, mode="nearest")
        mean = ndimage.uniform_filter(luma, 15, mode="nearest")
        square = ndimage.uniform_filter(luma * luma, 15, mode="nearest")
        rough = np.sqrt(np.maximum(square - mean * mean, 0.0))
        green = ndimage.uniform_filter(2 * rgb[1] - rgb[0] - rgb[2], 15, mode="nearest")
        water = ((rough < 0.012) & (mean < 0.35) & (green < 0.04)).astype(np.float32)
        share = float(shadow[valid].mean()) if valid.any() else 0.0
        flat = np.ones(luma.shape, np.float32)
        distance = self.distance(descriptor(rgb)) / self.limit
        layers = [shadow, haze, exposed, flat * (share / _LOW_SUN_SHARE), water, flat * distance]
        return np.stack(layers).astype(np.float32)

    def distance(self, described: np.ndarray) -> float:
        """Mahalanobis distance of a descriptor to the training images'."""
        return float(np.linalg.norm(self.root @ ((described - self.centre) / self.scale)))

    def flags(self, scores: np.ndarray, days: np.ndarray) -> np.ndarray:
        """Blended scores (6, h, w) and days (h, w) -> uint8 (h, w)."""
        bits = np.where(days > 0, 0, UNDATED).astype(np.uint8)
        for number, (name, score) in enumerate(zip(NAMES, scores, strict=True)):
            bits |= np.where(score > _LINE[name], 1 << number, 0).astype(np.uint8)
        return bits

    def describe(self) -> str:
        """The bits, for a tag: `1 shadow, 2 haze, ...`."""
        return ", ".join(f"{1 << bit} {name}" for bit, name in enumerate(BITS))


def rules_of(card: Mapping[str, Any]) -> QualityRules:
    """The rules in a model's card.

    Raises:
        ConfigError: there are none; it says how to make them. CheckpointError: they cannot be used.
    """
    if CARD_KEY not in card:
        raise ConfigError(
            "this model has no reference of its training images", where="--quality-band",
            remedy="make one: canopy calibrate interval MODEL --data CHIPS -o MODEL2.safetensors",
        )  # fmt: skip
    raw = card[CARD_KEY]
    try:
        centre, scale, root = (np.asarray(raw[name], np.float64) for name in ("centre", "scale", "root"))
        size = DESCRIPTORS
        if centre.shape != (size,) or scale.shape != (size,) or root.shape != (size, size):
            raise ValueError("its arrays have other sizes")
        return QualityRules(centre, scale, root, float(raw["limit"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the model's quality reference cannot be used ({error})", remedy="run canopy calibrate interval"
        ) from error


# --- what a map should be known by ------------------------------------------------------------------------

# Shares below these are not worth a line.
_WORTH = {"domain": 0.05, "tall": 0.01, "shadow": 0.1, "haze": 0.02, "exposure": 0.02, "low_sun": 0.1}
# Of the model and not of the imagery: no warning.
UNJUDGED = "the model has no record of its training images to compare with"
_TOLD = {
    "domain": "looks unlike the training images in {} of the map: expect larger errors there",
    "tall": "taller than the model can tell in {} of it ({:.0f} m or more): trees there may be higher",
    "shadow": "deep shadow in {} of it, where trees are easily missed",
    "haze": "haze or cloud suspected in {} of it",
    "exposure": "over-exposed in {} of it",
    "low_sun": "low sun in {} of it: long shadows hide trees",
}  # fmt: skip


def tallest_of(card: Mapping[str, Any]) -> float:
    """The height from which a model does not tell taller trees apart: the end of its calibration."""
    known = card.get(CARD_KEY, {}).get("tallest_m") or max(card.get("intervals", {}).get("height_m") or [0])
    return float(known or math.inf)


def top_of_range(tallest_m: float) -> float:
    """The height, metres, that a model's brightest colour stands for: a little more than it can tell."""
    return 40.0 if math.isinf(tallest_m) else 5.0 * math.ceil(1.2 * tallest_m / 5)


def findings(judged: Mapping[str, int], tall: float, extras: Extras) -> dict[str, float]:
    """Shares (0..1) of a map: `tall` as given (NaN without a height), flags by the pixels that were judged.

    What the model's card cannot tell (`domain` without a reference, `tall` without a calibration) is absent.
    """
    shares = {}
    if extras.judge is not None and judged.get("judged"):
        known = [name for name in NAMES if name != "domain" or math.isfinite(extras.judge.limit)]
        shares = {name: judged.get(name, 0) / judged["judged"] for name in known}
    if math.isfinite(extras.tallest_m) and math.isfinite(tall):
        shares["tall"] = tall
    return {name: round(share, 4) for name, share in shares.items()}


def told(found: Mapping[str, float], extras: Extras) -> list[str]:
    """What of the findings is worth a line to a person."""
    lines = [
        text.format(f"{100 * found[name]:.0f} %", extras.tallest_m)
        for name, text in _TOLD.items() if found.get(name, 0.0) >= _WORTH[name]
    ]  # fmt: skip
    unjudged = extras.judge is not None and math.isinf(extras.judge.limit)
    return [*lines, *([UNJUDGED] if unjudged else [])]


# --- what an image looks like ---------------------------------------------------------------------------

DESCRIPTORS = 15


def descriptor(rgb: np.ndarray) -> np.ndarray:
    """Colour and texture (15,) of an image (3, h, w) in 0..1: the mean over its cells of `CELL_PX`.

    Brightness and its spread, greenness and redness and their spreads, roughness at four scales, shares of
    dark, bright and green pixels, and how far edges keep to two and to four directions (roofs and streets do,
    crowns do not). Written for pixels of about half a metre.
    """
    from scipy import ndimage

    cell = min(CELL_PX, *rgb.shape[1:])
    h, w = (n // cell * cell for n in rgb.shape[1:])
    x = np.asarray(rgb[:, :h, :w], np.float32)

    def pool(values: np.ndarray) -> np.ndarray:
        return values.reshape(h // cell, cell, w // cell, cell).mean(axis=(1, 3), dtype=np.float64)

    def spread(values: np.ndarray, floor: float) -> np.ndarray:
        return np.log(np.sqrt(np.maximum(pool(values * values) - pool(values) ** 2, 0)) + floor)

    luma, total = x.mean(axis=0), x.sum(axis=0) + 1e-3
    green, red = x[1] / total - 1 / 3, (x[0] - x[2]) / total
    out = [pool(luma), spread(luma, 5e-3), pool(green), spread(green, 3e-3), pool(red), spread(red, 3e-3)]
    before = luma
    for radius in (1, 2, 4, 8):
        smooth = ndimage.uniform_filter(luma, 2 * radius + 1, mode="nearest")
        out.append(np.log(np.sqrt(pool((before - smooth) ** 2)) + 2e-3))
        before = smooth
    usual = np.repeat(np.repeat(out[0], cell, 0), cell, 1)
    out += [pool(m.astype(np.float32)) for m in (luma < 0.5 * usual, luma > 1.5 * usual, green > 0.03)]
    gx, gy = ndimage.sobel(luma, 1), ndimage.sobel(luma, 0)
    power = gx * gx + gy * gy + 1e-6
    # Doubled and doubled-again angles of the gradient as complex numbers: no arc tangent needed.
    twice = (gx * gx - gy * gy + 2j * gx * gy) / power
    for turn in (twice * twice, twice):
        parts = [pool(power * part) / pool(power) for part in (turn.real, turn.imag)]
        out.append(np.hypot(*parts))
    return np.stack(out).reshape(DESCRIPTORS, -1).mean(axis=1)
