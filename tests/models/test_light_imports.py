"""Models, training and chip reading work on a GPU box without any geo library."""

from __future__ import annotations

import subprocess
import sys

# None in sys.modules makes an import fail, and still lets torch ask whether a library is there.
BLOCKER = """
import sys
sys.modules.update(dict.fromkeys({blocked}))
{code}
"""
GEO = {"rasterio", "geopandas", "pyproj", "odc", "shapely", "rioxarray", "xarray", "fiona"}
HEAVY = GEO | {"torch", "timm", "scipy", "pytorch_lightning", "matplotlib"}


def run_blocked(blocked: set[str], code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKER.format(blocked=sorted(blocked), code=code)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-800:]


def test_no_geo_library_is_needed():
    modules = ["models.checkpoint", "models.height", "chips.store", "chips.data", "cli.train"]
    run_blocked(GEO, f"import {', '.join('canopy.' + m for m in modules)}, canopy.training.fit")


def test_listing_models_needs_no_torch():
    run_blocked(HEAVY, "import canopy.cli.models, canopy.models.checkpoint")
