"""File names of NEON's airborne products: site, product and the tile's south-west corner."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from canopy.errors import InputError
from canopy.sources.neon_sites import aop_crs, neon_site

Bounds = tuple[float, float, float, float]
KM = 1000


def require(fits: bool, what: str, expected: str) -> None:
    """Raise InputError unless a name's field fits."""
    if not fits:
        raise InputError(what, expected=expected)


NeonKind = Literal["CHM", "DTM", "DSM", "points", "image"]
_NEON_LIDAR = re.compile(
    r"NEON_D(?P<domain>\d\d)_(?P<site>[A-Z]{4})_(?P<level>DP[13])_(?P<east>\d{6})_(?P<north>\d{7})_"
    r"(?P<kind>CHM\.tif|DTM\.tif|DSM\.tif|classified_point_cloud_colorized\.laz|classified_point_cloud\.laz)"
)
_NEON_IMAGE = re.compile(
    r"(?P<year>\d{4})_(?P<site>[A-Z]{4})_(?P<visit>\d+)_(?P<east>\d{6})_(?P<north>\d{7})_image\.tif"
)


@dataclass(frozen=True)
class NeonTile:
    """A 1 km tile of NEON's airborne products; the name holds its south-west corner.

    Attributes:
        site: whose name the file carries, the flight site.
        kind: CHM, DTM, DSM, points (classified point cloud) or image (camera mosaic).
        easting, northing: of the south-west corner, metres, whole kilometres.
        year, visit: of an image; lidar names carry neither.
        coloured: the point cloud has colours, which its name says.
    """

    site: str
    kind: NeonKind
    easting: int
    northing: int
    year: int | None = None
    visit: int | None = None
    coloured: bool = True

    def __post_init__(self) -> None:
        site = neon_site(self.site)
        require(
            site.published_under is None,
            f"{self.site} has no files of its own",
            f"{site.flight_site}, which it is published under",
        )
        require(
            self.easting % KM == 0 and self.northing % KM == 0 and 100_000 <= self.easting < 1_000_000
            and 1_000_000 <= self.northing < 10_000_000,
            f"corner {self.easting}, {self.northing}",
            "whole kilometres, 6 digits east and 7 north",
        )  # fmt: skip
        require(
            (self.kind == "image") == (self.year is not None) == (self.visit is not None),
            f"year {self.year}, visit {self.visit} of a {self.kind}",
            "both for an image, neither for lidar",
        )

    @classmethod
    def at(
        cls,
        site: str,
        kind: NeonKind,
        x: float,
        y: float,
        *,
        year: int | None = None,
        visit: int | None = None,
    ) -> NeonTile:
        """The tile that holds a point, in the CRS of the site's flights; a site published under another one
        gives that one's tile."""
        return cls(neon_site(site).flight_site, kind, int(x // KM) * KM, int(y // KM) * KM, year, visit)

    @classmethod
    def parse(cls, name: str) -> NeonTile | None:
        """The tile of a file name, or None where the name is of another grammar. Raises InputError for an
        unknown site, or a domain that is not the site's."""
        image, lidar = _NEON_IMAGE.fullmatch(name), _NEON_LIDAR.fullmatch(name)
        if image:
            return cls(
                image["site"],
                "image",
                int(image["east"]),
                int(image["north"]),
                int(image["year"]),
                int(image["visit"]),
            )
        if not lidar:
            return None
        kind: NeonKind = "points" if lidar["kind"].endswith(".laz") else lidar["kind"][:3]  # type: ignore[assignment]
        if (kind == "points") != (lidar["level"] == "DP1"):
            return None
        domain = neon_site(lidar["site"]).domain
        require(
            f"D{lidar['domain']}" == domain,
            f"{name}: site {lidar['site']} in domain D{lidar['domain']}",
            domain,
        )
        return cls(
            lidar["site"],
            kind,
            int(lidar["east"]),
            int(lidar["north"]),
            coloured=kind != "points" or "color" in lidar["kind"],
        )

    @property
    def filename(self) -> str:
        """The file's name."""
        corner = f"{self.easting:06d}_{self.northing:07d}"
        if self.kind == "image":
            return f"{self.year}_{self.site}_{self.visit}_{corner}_image.tif"
        start = f"NEON_{neon_site(self.site).domain}_{self.site}"
        if self.kind == "points":
            return f"{start}_DP1_{corner}_classified_point_cloud{'_colorized' if self.coloured else ''}.laz"
        return f"{start}_DP3_{corner}_{self.kind}.tif"

    @property
    def bounds(self) -> Bounds:
        """(west, south, east, north) in metres."""
        return self.easting, self.northing, self.easting + KM, self.northing + KM

    @property
    def crs(self) -> str:
        """CRS of the site's flights."""
        return aop_crs(self.site)
