"""List a data pack's imagery for pretraining: `python pipelines/ssl_manifest.py PACK -o FOLDER`.

FOLDER/ssl.csv has all unlabelled images that are not held out, and the labelled train and val tiles with
their heights, which only the probe looks at. Then `canopy data chips --manifest FOLDER/ssl.csv -o CHIPS`.
Held-out rows (test splits of both tables) are left out: nothing of them is ever looked at before scoring.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from canopy.errors import CanopyError, DataError
from canopy.files import replacing

COLUMNS = ("id", "rgb_path", "chm_path", "site", "split", "crs", "year_rgb", "year_chm", "licence")
_LEAST_SIDE_M = 100.0  # plots of 20 m hold no more than one view


def rows_of(pack: Path) -> Iterator[dict[str, str]]:
    """Rows of the new table, paths relative to the pack."""
    for row in _read(pack / "manifest.csv"):
        wide = float(row["xmax"]) - float(row["xmin"]) >= _LEAST_SIDE_M
        if wide and row["split"] in ("train", "val"):
            yield {name: row.get(name, "") for name in COLUMNS}
    for row in _read(pack / "ssl" / "manifest_ssl.csv"):
        if row["split"] != "test":
            named = {"site": row["place"], "split": "train", "year_rgb": row["year"]}
            yield {name: row.get(name, "") for name in COLUMNS} | named


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise DataError("no such table", where=path, expected="a folder with manifest.csv and ssl/")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    try:
        rows = list(rows_of(args.pack))
        args.output.mkdir(parents=True, exist_ok=True)
        for row in rows:
            for column in ("rgb_path", "chm_path"):  # paths count from the manifest's folder
                if row[column]:
                    row[column] = os.path.relpath(args.pack / row[column], args.output)
        with replacing(args.output / "ssl.csv") as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    except CanopyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{len(rows)} images in {args.output / 'ssl.csv'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
