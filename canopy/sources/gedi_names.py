"""What GEDI granules call things: beams, and the variables of Level 2A, 2B and 4A, versions 2 and 3.

A variable is looked for under several names, first match first, so that a granule's version is told by what
it holds and never by its file name. Version 3 renamed the quality flags (`l2a_quality_flag_rel3`; a plain
`quality_flag`, where one remains beside it, means less) and moved Level 2B's coordinates to the beam's root.
Data dictionaries: GEDI L2A and L2B product data dictionaries (LP DAAC), GEDI04_A user guide (ORNL DAAC).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

BEAM_NAME = re.compile(r"^BEAM[01]{4}$")
FULL_POWER = frozenset({"BEAM0101", "BEAM0110", "BEAM1000", "BEAM1011"})
COVERAGE = frozenset({"BEAM0000", "BEAM0001", "BEAM0010", "BEAM0011"})
# Seconds of `delta_time` are counted from 2018-01-01T00:00:00 UTC; this is that instant in Unix seconds.
EPOCH_UNIX_S = 1_514_764_800
# Fill values of GEDI's floats are -9999 and -999999.
FILL_BELOW = -9_998.5
RH_COUNT = 101


@dataclass(frozen=True)
class Variable:
    """One quantity per shot.

    Attributes:
        column: name of the output column.
        paths: names inside a beam's group, in the order they are looked for.
        kind: "number" (float64 while read), "flag" (small whole number, missing = -1) or "shot" (uint64).
        dtype: Arrow type of the output column.
        needed: whether a granule without it is refused.
    """

    column: str
    paths: tuple[str, ...]
    kind: str = "number"
    dtype: str = "float32"
    needed: bool = False


SHOT_NUMBER = Variable("shot_number", ("shot_number", "geolocation/shot_number"), "shot", "uint64", True)
LAT = Variable("lat", ("lat_lowestmode", "geolocation/lat_lowestmode"), dtype="float64", needed=True)
LON = Variable("lon", ("lon_lowestmode", "geolocation/lon_lowestmode"), dtype="float64", needed=True)
RH_PATH = "rh"
QUALITY_V3 = "l2a_quality_flag_rel3"

# Level 2A columns between the heights and the time, in the order of the output.
L2A = (
    Variable("sensitivity", ("sensitivity", "geolocation/sensitivity")),
    Variable("sensitivity_a2", ("geolocation/sensitivity_a2", "sensitivity_a2")),
    Variable("quality_flag", (QUALITY_V3, "quality_flag"), "flag", "uint8"),
    Variable("degrade_flag", ("degrade_flag", "geolocation/degrade_flag"), "flag", "uint8"),
    Variable("solar_elevation", ("solar_elevation", "geolocation/solar_elevation")),
    Variable("elev_lowestmode", ("elev_lowestmode", "geolocation/elev_lowestmode")),
    Variable("dem", ("digital_elevation_model", "geolocation/digital_elevation_model")),
    Variable(
        "landsat_water_persistence", ("land_cover_data/landsat_water_persistence",), "flag", "uint8"
    ),
    Variable("urban_proportion", ("land_cover_data/urban_proportion",), "flag", "uint8"),
)  # fmt: skip
TIME = Variable("time", ("delta_time", "geolocation/delta_time"), dtype="time")

# Level 2B: canopy cover (0..1) and plant area index (m2/m2). Level 4A: aboveground biomass density (Mg/ha).
L2B = (
    Variable("cover", ("cover",)),
    Variable("pai", ("pai",)),
    Variable("l2b_quality_flag", ("l2b_quality_flag_rel3", "l2b_quality_flag"), "flag", "uint8"),
)
L4A = (
    Variable("agbd", ("agbd",)),
    Variable("l4_quality_flag", ("l4a_quality_flag_rel3", "l4_quality_flag"), "flag", "uint8"),
)
COMPANIONS = {"L2B": L2B, "L4A": L4A}


def beam_type(name: str, description: str | None) -> str | None:
    """`full` or `coverage`: by the group's `description`, else by the known names; None if neither tells."""
    text = (description or "").lower()
    for word in ("full", "coverage"):
        if word in text:
            return word
    return "full" if name in FULL_POWER else "coverage" if name in COVERAGE else None
