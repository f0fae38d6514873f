"""NAIP's file names: a quarter of a 7.5-minute quadrangle of the US Geological Survey."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date

from canopy.errors import InputError

_NAME = re.compile(
    r"(?:[a-z]{2}_)?m_(?P<lat>\d\d)(?P<lon>\d{3})(?P<quad>\d\d)_(?P<quarter>nw|ne|sw|se)_(?P<zone>\d{1,2})_"
    r"(?P<gsd>\d{1,3}|h)_(?P<acquired>\d{8})(?:_(?P<published>\d{8}))?(?:\.tif)?"
)
_QUARTERS = ("nw", "ne", "sw", "se")
_STEP = 0.125  # 7.5 minutes


@dataclass(frozen=True)
class NaipTile:
    """A quarter quadrangle.

    The first five digits are the south-east corner of a one-degree block (degrees north and west); its 64
    quadrangles count from the north-west corner, row by row. Images reach some 300 m beyond the bounds.

    Attributes:
        lat, lon_west: of that corner, degrees north and degrees WEST.
        quad: 1 to 64.
        quarter: nw, ne, sw or se.
        zone: UTM zone of the pixels, north.
        gsd: ground sample distance as written: 1, h (half a metre), 060, 030.
        acquired, published: days; the second may be missing.
    """

    lat: int
    lon_west: int
    quad: int
    quarter: str
    zone: int
    gsd: str
    acquired: date
    published: date | None = None

    def __post_init__(self) -> None:
        fits = 1 <= self.quad <= 64 and self.quarter in _QUARTERS and 1 <= self.zone <= 60
        if not (fits and 0 <= self.lat < 90 and 0 <= self.lon_west < 180):
            raise InputError(
                f"quadrangle {self.lat}, {self.lon_west}, {self.quad} {self.quarter}, zone {self.zone}",
                expected="a quadrangle of 01 to 64, a quarter of nw, ne, sw, se and a zone of 1 to 60",
            )

    @classmethod
    def at(
        cls, lat: float, lon: float, acquired: date, *, zone: int | None = None, gsd: str = "060"
    ) -> NaipTile:
        """The tile that holds a point (degrees; west is negative), in the UTM zone of the point."""
        block_lat, block_west = int(lat // 1), int(-(lon // 1)) - 1
        row = 15 - int((lat - block_lat) // (_STEP / 2))
        col = int((lon + block_west + 1) // (_STEP / 2))
        quad = row // 2 * 8 + col // 2 + 1
        zone = zone or int((lon + 180) // 6) + 1
        return cls(block_lat, block_west, quad, _QUARTERS[row % 2 * 2 + col % 2], zone, gsd, acquired)

    @classmethod
    def parse(cls, name: str) -> NaipTile | None:
        """The tile of a file name or STAC item id, or None where it is of another grammar."""
        found = _NAME.fullmatch(name)
        if not found:
            return None
        try:
            days = [
                date.fromisoformat(found[key]) if found[key] else None for key in ("acquired", "published")
            ]
        except ValueError:
            return None
        if days[0] is None or not 1 <= int(found["quad"]) <= 64:
            return None
        return cls(
            int(found["lat"]), int(found["lon"]), int(found["quad"]), found["quarter"], int(found["zone"]),
            found["gsd"], days[0], days[1],
        )  # fmt: skip

    @property
    def filename(self) -> str:
        """The file's name."""
        days = [f"{day:%Y%m%d}" for day in (self.acquired, self.published) if day]
        place = f"{self.lat:02d}{self.lon_west:03d}{self.quad:02d}_{self.quarter}_{self.zone}"
        return f"m_{place}_{self.gsd}_{'_'.join(days)}.tif"

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(west, south, east, north) of the quarter quadrangle, degrees; exact in binary."""
        row, col = divmod(self.quad - 1, 8)
        quarter = _QUARTERS.index(self.quarter)
        west = -self.lon_west - 1 + col * _STEP + quarter % 2 * _STEP / 2
        north = self.lat + 1 - row * _STEP - quarter // 2 * _STEP / 2
        return west, north - _STEP / 2, west + _STEP / 2, north

    @property
    def crs(self) -> str:
        """CRS of the bounds, NAD 83; that of the pixels is `pixel_crs`."""
        return "EPSG:4269"

    @property
    def pixel_crs(self) -> str:
        """CRS of the pixels: NAD 83, UTM north."""
        return f"EPSG:{26900 + self.zone}"
