"""Map a region from a config.

    python pipelines/predict_region.py configs/region/county.yaml aoi=county.gpkg out=county

The keys are the options of `canopy map`; `key=value` on the command line overrides the file. `--dry-run` says
what it would take, at the config's price.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import typer

from canopy.cli.map import run_map
from canopy.config import load_settings
from canopy.errors import CanopyError
from canopy.region.plan import RegionSettings
from canopy.runtime import setup_logging


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="a file of configs/region, or one like them")
    parser.add_argument("override", nargs="*", metavar="key=value")
    for flag in ("--resume", "--retry-failed", "--verify", "--dry-run", "--overwrite", "--json"):
        parser.add_argument(flag, action="store_true", help=f"as {flag} of canopy map")
    parser.add_argument("-q", "--quiet", action="store_true")
    parser.add_argument("-v", "--verbose", action="store_true")
    options = vars(parser.parse_intermixed_args())
    config, overrides = options.pop("config"), options.pop("override")
    setup_logging(quiet=options["quiet"], verbose=options.pop("verbose"))
    try:
        run_map(load_settings(RegionSettings, config, overrides), **options)
    except CanopyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except typer.Exit as stop:
        return stop.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
