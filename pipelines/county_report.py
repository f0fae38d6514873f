"""A county from imagery to a report: the map in tiles, heights per polygon, and scores where there is lidar.

    python pipelines/county_report.py configs/region/county.yaml aoi=county.gpkg out=county --dry-run
    python pipelines/county_report.py configs/region/county.yaml aoi=county.gpkg out=county \
        --zones stands.gpkg --reference lidar_chm.tif

The config's keys are the options of `canopy map`; `key=value` overrides them. OUT gets what `canopy map`
makes; OUT-report gets stats.csv, stats.parquet (with the polygons), the scores' report.html, and index.md.
Running it again goes on where it stopped.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from steps import canopy, run, step

from canopy.config import load_settings
from canopy.files import replacing
from canopy.region.options import MapOptions


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="a file of configs/region, or one like them")
    parser.add_argument("override", nargs="*", metavar="key=value")
    parser.add_argument("--zones", type=Path, help="polygons: stands, parishes, ...")
    parser.add_argument("--reference", type=Path, help="lidar heights, shots or plots, to score the map by")
    parser.add_argument("--dry-run", action="store_true", help="only say what the map would take")
    return run(partial(chain, parser.parse_intermixed_args()))


def chain(args: argparse.Namespace) -> None:
    options = load_settings(MapOptions, args.config, args.override)
    words = [*options.images]
    for name in sorted(options.model_fields_set - {"images"}):
        value = getattr(options, name)
        if value is not False and value is not None:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]

    # 1. The map; a run that is there goes on.
    canopy("map", *words, *(["--dry-run"] if args.dry_run else []))
    if args.dry_run:
        return
    mosaic, report = options.folder / "mosaic.vrt", Path(f"{options.folder}-report")
    report.mkdir(parents=True, exist_ok=True)
    lines = ["# Canopy height", "", f"- map: {mosaic}, as STAC {options.folder / 'catalog.json'}"]

    # 2. Heights and cover per polygon.
    if args.zones:
        for end in (".parquet", ".csv"):
            step(report / f"stats{end}", "stats", mosaic, "--zones", args.zones, "-o", report / f"stats{end}")
        lines.append(f"- per polygon: {report / 'stats.csv'}, with the polygons {report / 'stats.parquet'}")

    # 3. How far it can be trusted.
    if args.reference:
        scores = report / "scores"
        step(
            scores / "report.html", "evaluate", mosaic, "--reference", args.reference, "-o", scores
        )  # fmt: skip
        lines.append(f"- scores: {scores / 'report.html'}")
    with replacing(report / "index.md") as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{report / 'index.md'}: what there is")


if __name__ == "__main__":
    raise SystemExit(main())
