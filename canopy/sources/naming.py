"""File names that say where a tile is, both ways: name -> place and place -> name.

Every tile is a frozen record that is checked when it is made, whose `filename` is the name and whose `bounds`
(west, south, east, north) are in `crs`. `read_name` finds the grammar of a name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, Protocol

from canopy.geo.tiles import quadkey_bounds, quadkey_rc
from canopy.sources.naming_naip import NaipTile
from canopy.sources.naming_neon import KM, Bounds, NeonTile, require


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
