"""The folder of a run: made, emptied, and its finished files looked after."""

from __future__ import annotations

import shutil
from pathlib import Path

from canopy.errors import OutputError
from canopy.files import file_sha256
from canopy.inference.region import shards
from canopy.inference.region.ledger import Ledger
from canopy.inference.region.pins import RUN_FILE
from canopy.inference.region.task import TILES, tile_path
from canopy.runtime import log

LEDGER = "ledger.sqlite"


def make_folder(folder: Path) -> None:
    """Make a run's folder; OutputError where that is impossible."""
    try:
        (folder / TILES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot be made ({error.strerror})", where=folder) from error


def clear(folder: Path) -> None:
    """Remove what a run made, and nothing else."""
    for name in (RUN_FILE, LEDGER, f"{LEDGER}-wal", f"{LEDGER}-shm", "catalog.json", "collection.json",
                 "model.json", "mosaic", "mosaic.vrt", "index.gti.gpkg", "overview.tif",
                 "status.json"):  # fmt: skip
        (folder / name).unlink(missing_ok=True)
    for name in (TILES, shards.FOLDER, "stac", "published"):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name, ignore_errors=True)
    (folder / TILES).mkdir(exist_ok=True)


def check_files(ledger: Ledger, folder: Path, verify: bool) -> None:
    """Finished tiles whose file is gone or changed are pending again."""
    lost = []
    for row in ledger.rows("done"):
        path = tile_path(folder, row.task.id)
        try:
            same = path.stat().st_size == row.bytes
            if same and verify:
                same = file_sha256(path) == row.sha256
        except OSError:
            same = False
        if not same:
            lost.append(row.task.ordinal)
    for ordinal in lost:
        ledger.lose(ordinal, "its file was missing or changed")
    if lost:
        log.warning(f"{len(lost)} finished tiles have lost their file and are made again")
    ledger.commit()
