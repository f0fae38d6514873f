"""What a map holds beside heights: interval bands, acquisition days, quality flags.

The network's further outputs and the scores behind the flags are blended over the crops like heights are, and
only then turned into bands. So these bands depend on tiles, batches and threads as little as heights do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from canopy.geo.encoding import BandSpec
from canopy.models.intervals import IntervalTable, table_of

if TYPE_CHECKING:
    from canopy.geo.aoi import AOI
    from canopy.inference.quality import QualityRules
    from canopy.inference.request import Request
    from canopy.models.height import HeightModel

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
        quality: rules of the quality flags.
        raw: hand out the layers themselves, and then the days, for resampling (see `regrid`).
    """

    date: bool = False
    interval: IntervalTable | None = None
    level: float = 0.9
    quality: QualityRules | None = None
    raw: bool = False

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the network is to give, by name (`HeightModel.layers`): heights first."""
        return ("height_m", *(self.interval.hints(self.level) if self.interval else ()))

    @property
    def views(self) -> int:
        """Over how many views of a crop the spread is taken (`canopy.inference.views`)."""
        return self.interval.views if self.interval else 1

    @property
    def layers(self) -> int:
        """Layers that are predicted and blended: the network's outputs, then scores of the flags."""
        return len(self.outputs) + (len(self.quality.names) if self.quality else 0)

    @property
    def bands(self) -> tuple[Band, ...]:
        """Names and units of the map's bands, in order."""
        return band_list(self.date, self.interval is not None, self.quality is not None)

    def stack(self, layers: np.ndarray, days: np.ndarray) -> np.ndarray:
        """Blended layers (`layers`, h, w) and days (h, w) -> the map's bands (b, h, w) float32."""
        if self.raw:
            return np.concatenate([layers, days[None].astype(np.float32)]).astype(np.float32, copy=False)
        bands, given = [layers[0]], len(self.outputs)
        if self.interval is not None:
            # Where there is nothing a layer may hold anything; it is masked later.
            clean = np.maximum(np.nan_to_num(layers[:given]).astype(np.float64), 0.0)
            hint = clean[1] if given == 2 else clean[1:]
            bands += self.interval.bounds(clean[0], hint, self.level)
        if self.date:
            bands.append(days.astype(np.float32))
        if self.quality is not None:
            bands.append(self.quality.flags(layers[given:], days).astype(np.float32))
        return np.stack(bands).astype(np.float32, copy=False)


def extras_of(request: Request, model: HeightModel, aoi: AOI | None = None) -> Extras:
    """What a request wants beside heights; where the area lies may decide how wide its bands are.

    Raises:
        ConfigError: the model's file lacks the calibration that it takes; it names the remedy.
    """
    table = quality = None
    if request.interval is not None:
        area = aoi or request.area
        table = table_of(model.card, () if area is None else _corners(area))
        table.check_level(request.interval)
    if request.quality_band:
        from canopy.inference.quality import rules_of

        quality = rules_of(model.card)
    return Extras(request.date_band, table, request.interval or 0.9, quality)


def _corners(aoi: AOI) -> list[tuple[float, float]]:
    """(lon, lat) of the corners of an area's bounding box."""
    west, south, east, north = aoi.bounds_lonlat
    return [(lon, lat) for lon in (west, east) for lat in (south, north)]


def band_specs(bands: Sequence[Band]) -> list[BandSpec]:
    """How a map's bands are written: flags stay whole numbers in every encoding."""
    return [BandSpec(*band, 1.0 if band == QUALITY_BAND else None) for band in bands]


def band_list(date: bool, interval: bool, quality: bool) -> tuple[Band, ...]:
    """Names and units of a map's bands, in order."""
    bands: tuple[Band, ...] = (HEIGHT_BAND,)
    bands += INTERVAL_BANDS if interval else ()
    bands += (DATE_BAND,) if date else ()
    return bands + ((QUALITY_BAND,) if quality else ())
