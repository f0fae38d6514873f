"""A disk that fills in the middle of a run: a real one, small enough to fill.

CANOPY_DISK_ROUNDS=20 fills it twenty times, each at another point.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rasterio

from canopy.errors import OutputError
from canopy.region.ledger import Ledger
from canopy.region.options import MapOptions

ROUNDS = int(os.environ.get("CANOPY_DISK_ROUNDS", "6"))
SIZE = "64m"  # CogWriter wants 16 MB and more before it starts a tile
NOT_ALLOWED = ("permission denied", "must be superuser", "not permitted", "only root")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        words = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
        made = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if made.returncode:
        assert any(words in made.stderr.lower() for words in NOT_ALLOWED), made.stderr
        pytest.skip(f"no file system may be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class Filler(threading.Thread):
    """Another user of the disk: takes all that is free, some time after a run there has so many tiles."""

    def __init__(self, disk: Path, run: Path, tiles: int, wait_s: float) -> None:
        super().__init__(daemon=True)
        self.folder, self.tiles, self.count, self.wait_s, self.ended = (
            disk,
            run / "tiles",
            tiles,
            wait_s,
            False,
        )

    def run(self) -> None:
        while not self.ended and len(list(self.tiles.glob("*.tif"))) < self.count:
            time.sleep(0.0005)
        time.sleep(self.wait_s)
        with (self.folder / "filler").open("wb") as file:
            while not self.ended:
                free = os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_frsize
                if free:
                    with contextlib.suppress(OSError):
                        os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, free)
                time.sleep(0.0005)

    def __exit__(self, *exception: object) -> None:
        self.ended = True
        self.join()
        (self.folder / "filler").unlink()

    def __enter__(self) -> Filler:
        self.start()
        return self


def check_readable(folder: Path) -> int:
    """Every file under its final name can be read to its end; returns how many tiles there are."""
    tiles = list((folder / "tiles").glob("*.tif"))
    for path in [*tiles, *(p for p in (folder / "mosaic", folder / "index.gti.gpkg") if p.exists())]:
        with rasterio.open(path) as dataset:
            dataset.read()
    for path in folder.rglob("*.json"):
        if not path.name.startswith("."):
            json.loads(path.read_text(encoding="utf-8"))
    if (folder / "ledger.sqlite").exists():
        with Ledger(folder / "ledger.sqlite", read_only=True) as ledger:
            done = {tile.id: outcome.sha256 for tile, outcome in ledger.rows("done")}
        for tile, digest in done.items():
            content = (folder / "tiles" / f"{tile}.tif").read_bytes()
            assert hashlib.sha256(content).hexdigest() == digest
    return len(tiles)


def test_a_disk_that_fills_anywhere_leaves_nothing_broken_and_the_run_goes_on(
    options: Callable[..., MapOptions], make_run: Callable, hashes: Callable, disk: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    make_run(options(zoom=20))
    expected = hashes(options().folder)
    assert len(expected) > 4
    die, stopped = random.Random(1), []
    for number in range(ROUNDS):
        wish = options(out=str(disk / f"run-{number}"), zoom=20)
        tiles, wait_s = die.randint(0, len(expected)), die.uniform(0.0, 0.15)
        with Filler(disk, wish.folder, tiles, wait_s):
            try:
                make_run(wish)
            except OutputError as error:
                assert error.exit_code == 1 and "\n" not in str(error)
                stopped.append(check_readable(wish.folder))
                with capsys.disabled() if ROUNDS > 6 else contextlib.nullcontext():
                    print(f"round {number + 1}: full with {tiles}, stopped with {stopped[-1]} tiles: {error}")
        result = make_run(wish)
        assert result.exit_code == 0 and hashes(wish.folder) == expected
        check_readable(wish.folder)
        assert not [p.name for p in (wish.folder / "tiles").iterdir() if p.name.startswith(".")]
    assert len(stopped) > ROUNDS // 2 and len(set(stopped)) > 1
