"""NAIP's file names: a quarter of a 7.5-minute quadrangle of the US Geological Survey.

File names that say where a tile is, both ways: name -> place and place -> name.

Every tile is a frozen record that is checked when it is made, whose `filename` is the name and whose `bounds`
(west, south, east, north) are in `crs`. `read_name` finds the grammar of a name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date
from pathlib import PurePosixPath
from typing import Literal, Protocol

from canopy.errors import InputError
from canopy.geo.tiles import quadkey_bounds, quadkey_rc
from canopy.labels.neon import KM, Bounds, NeonTile, require

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


class TileName(Protocol):
    """What every grammar gives."""

    @property
    def filename(self) -> str: ...
    @property
    def bounds(self) -> Bounds: ...
    @property
    def crs(self) -> str: ...


# ---- IGN LiDAR HD ----------------------------------------------------------------------------
IGN_CRS = {
    "LAMB93": "EPSG:2154",
    "RGAF09UTM20": "EPSG:5490",
    "UTM22RGFG95": "EPSG:2972",
    "RGR92UTM40S": "EPSG:2975",
    "RGM04UTM38S": "EPSG:4471",
    "RGM23UTM38S": "EPSG:10674",
}
_IGN = re.compile(
    r"LHD_(?P<zone>[A-Z]{3})_(?P<x>\d{4})[_-](?P<y>\d{4})_(?P<kind>PTS|MN[THS])(?:_(?P<state>[OC]))?"
    r"(?:_(?P<step>\dM\d\d))?_(?P<crs>[A-Z0-9]+)_(?P<datum>[A-Z0-9]+)(?P<end>\.copc\.laz|\.tif)?"
)


@dataclass(frozen=True)
class LidarHdTile:
    """A 1 km tile of IGN's LiDAR HD; the name holds its north-west corner in km.

    Attributes:
        x_km, y_km: west and NORTH edge, km.
        kind: PTS (points), MNH (height), MNT (terrain) or MNS (surface).
        state: O or C in the name, or None.
        step: pixel side as written, such as 0M50, or None (points).
        zone: FXX (mainland) or an overseas code.
        crs_code, datum: as written, such as LAMB93 and IGN69.
    """

    x_km: int
    y_km: int
    kind: Literal["PTS", "MNH", "MNT", "MNS"] = "MNH"
    state: str | None = "O"
    step: str | None = "0M50"
    zone: str = "FXX"
    crs_code: str = "LAMB93"
    datum: str = "IGN69"

    def __post_init__(self) -> None:
        require(
            0 <= self.x_km < 10_000 and 0 < self.y_km < 10_000,
            f"tile {self.x_km}, {self.y_km}",
            "km of four digits",
        )
        require(self.crs_code in IGN_CRS, f"CRS {self.crs_code}", ", ".join(IGN_CRS))
        require(
            (self.kind == "PTS") == (self.step is None),
            f"{self.kind} with step {self.step}",
            "a step for rasters only",
        )

    @classmethod
    def at(cls, x: float, y: float, kind: Literal["PTS", "MNH", "MNT", "MNS"] = "MNH") -> LidarHdTile:
        """The mainland tile that holds a point of EPSG:2154; its south edge belongs to the tile below."""
        return cls(int(x // KM), -int(-y // KM), kind, *((None, None) if kind == "PTS" else ("O", "0M50")))

    @classmethod
    def parse(cls, name: str) -> LidarHdTile | None:
        """The tile of a file name (its ending may be missing), or None where it is of another grammar."""
        found = _IGN.fullmatch(name)
        if not found or found["crs"] not in IGN_CRS or (found["kind"] == "PTS") != (found["step"] is None):
            return None
        if found["end"] and found["end"].endswith("laz") != (found["kind"] == "PTS"):
            return None
        kind: Literal["PTS", "MNH", "MNT", "MNS"] = found["kind"]  # type: ignore[assignment]
        return cls(
            int(found["x"]),
            int(found["y"]),
            kind,
            found["state"],
            found["step"],
            found["zone"],
            found["crs"],
            found["datum"],
        )

    @property
    def filename(self) -> str:
        """The file's name."""
        parts = [
            f"LHD_{self.zone}_{self.x_km:04d}_{self.y_km:04d}_{self.kind}",
            self.state,
            self.step,
            self.crs_code,
            self.datum,
        ]
        return "_".join(part for part in parts if part) + (".copc.laz" if self.kind == "PTS" else ".tif")

    @property
    def bounds(self) -> Bounds:
        """(west, south, east, north) of the tile, metres."""
        west, north = self.x_km * KM, self.y_km * KM
        return west, north - KM, west + KM, north

    @property
    def raster_bounds(self) -> Bounds:
        """Bounds of the GeoTIFF: IGN's rasters are centred on pixel corners, so they begin half a pixel
        (0.25 m at 0.5 m) west and north of the tile."""
        if self.step is None:
            return self.bounds
        half = float(self.step.replace("M", ".")) / 2
        west, south, east, north = self.bounds
        return west - half, south + half, east - half, north + half

    @property
    def crs(self) -> str:
        """CRS by its code in the name."""
        return IGN_CRS[self.crs_code]


# ---- global maps -----------------------------------------------------------------------------
_ETH = re.compile(
    r"ETH_GlobalCanopyHeight_10m_2020_(?P<ns>[NS])(?P<lat>\d\d)(?P<ew>[EW])(?P<lon>\d{3})_Map(?P<sd>_SD)?\.tif"
)


@dataclass(frozen=True)
class EthTile:
    """A 3-degree tile of the ETH global canopy height map 2020; the name holds its south-west corner.

    Attributes:
        lat, lon: south-west corner, degrees, multiples of 3.
        spread: the file of standard deviations.
    """

    lat: int
    lon: int
    spread: bool = False

    def __post_init__(self) -> None:
        fits = self.lat % 3 == 0 and self.lon % 3 == 0 and -90 <= self.lat <= 87 and -180 <= self.lon <= 177
        require(fits, f"corner {self.lat}, {self.lon}", "multiples of 3 degrees within -90..87, -180..177")

    @classmethod
    def at(cls, lat: float, lon: float, spread: bool = False) -> EthTile:
        """The tile that holds a point."""
        return cls(int(lat // 3) * 3, int(lon // 3) * 3, spread)

    @classmethod
    def parse(cls, name: str) -> EthTile | None:
        """The tile of a file name, or None where it is of another grammar."""
        found = _ETH.fullmatch(name)
        if not found:
            return None
        lat = int(found["lat"]) * (1 if found["ns"] == "N" else -1)
        return cls(lat, int(found["lon"]) * (1 if found["ew"] == "E" else -1), bool(found["sd"]))

    @property
    def filename(self) -> str:
        """The file's name."""
        north, east = "N" if self.lat >= 0 else "S", "E" if self.lon >= 0 else "W"
        corner = f"{north}{abs(self.lat):02d}{east}{abs(self.lon):03d}"
        return f"ETH_GlobalCanopyHeight_10m_2020_{corner}_Map{'_SD' if self.spread else ''}.tif"

    @property
    def bounds(self) -> Bounds:
        """(west, south, east, north), degrees."""
        return self.lon, self.lat, self.lon + 3, self.lat + 3

    @property
    def crs(self) -> str:
        """EPSG:4326."""
        return "EPSG:4326"


@dataclass(frozen=True)
class QuadkeyTile:
    """A tile of the published canopy height maps of 2024 (v1, zoom 9) and 2026 (v2, zoom 10).

    Attributes:
        quadkey: 9 or 10 digits of 0 to 3.
    """

    quadkey: str

    def __post_init__(self) -> None:
        require(len(self.quadkey) in (9, 10), f"quadkey {self.quadkey!r}", "9 digits (v1) or 10 (v2)")
        quadkey_rc(self.quadkey)

    @classmethod
    def parse(cls, name: str) -> QuadkeyTile | None:
        """The tile of a file name, or None where it is of another grammar."""
        return cls(name[:-4]) if re.fullmatch(r"[0-3]{9,10}\.tif", name) else None

    @property
    def version(self) -> int:
        """1 or 2."""
        return len(self.quadkey) - 8

    @property
    def filename(self) -> str:
        """The file's name."""
        return f"{self.quadkey}.tif"

    @property
    def bounds(self) -> Bounds:
        """(west, south, east, north), metres."""
        return quadkey_bounds(self.quadkey)

    @property
    def crs(self) -> str:
        """EPSG:3857."""
        return "EPSG:3857"


def base_name(name: str) -> str:
    """Last part of a path or URL, without a query."""
    return PurePosixPath(name.replace("\\", "/").split("?")[0]).name


def read_name(name: str) -> TileName | None:
    """What a file name (or path, or URL) says about its place, or None where no grammar fits.

    Raises:
        InputError: it fits a grammar but contradicts itself, such as a NEON site in a wrong domain.
    """
    base = base_name(name)
    for grammar in (NeonTile, LidarHdTile, EthTile, QuadkeyTile, NaipTile):
        tile: TileName | None = grammar.parse(base)
        if tile is not None:
            return tile
    return None
