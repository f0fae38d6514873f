"""Chips that need no cutting, as a chips folder: those in memory, and those of the procedural forest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from canopy.chips.index import INDEX_CSV, SHARDS, ChipRow, begin_folder, check_folder, write_index
from canopy.chips.store import Chip, described, write_store
from canopy.errors import InputError
from canopy.runtime import NoProgress, Progress

SYNTH_SITE = "procedural forest"
_PER_SHARD = 64
_FORMAT = 1  # raise it when the same seeds would give other chips


def write_made(folder: Path, chips: Iterable[Chip], source: str, licence: str = "") -> list[ChipRow]:
    """Write chips as `canopy data chips` would have left them: shards/, and last index.csv and .parquet.

    Args:
        folder: created; chips: each with a unique id; source: says what they are, in every shard.

    Returns:
        The index's rows.
    """
    rows: list[ChipRow] = []
    waiting: dict[str, list[Chip]] = {}
    count: dict[str, int] = {}

    def flush(split: str) -> None:
        name = f"{SHARDS}/{split}-{count.get(split, 0):04d}.safetensors"
        count[split] = count.get(split, 0) + 1
        write_store(folder / name, waiting[split], source)
        rows.extend(described(chip, name, licence) for chip in waiting.pop(split))

    for chip in chips:
        waiting.setdefault(chip.row.split, []).append(chip)
        if len(waiting[chip.row.split]) == _PER_SHARD:
            flush(chip.row.split)
    for split in list(waiting):
        flush(split)
    write_index(folder, rows)
    return rows


def synth_chips(count: int, side_px: int = 512, first_seed: int = 1000) -> Iterator[Chip]:
    """Training chips of the procedural forest, each another place, sun and camera; heights are cell maxima.

    Seeds start far from 0, the demo's, so that the demo scene is new to a model trained on these.
    """
    from canopy.synth.forest import random_spec
    from canopy.synth.render import render

    half = side_px // 2
    for seed in range(first_seed, first_seed + count):
        tile = render(random_spec(seed), 0.0, 0.0, side_px, side_px)
        chm = tile.chm.reshape(half, 2, half, 2).max(axis=(1, 3)).astype(np.float32)
        yield Chip(ChipRow(f"synth_{seed}", SYNTH_SITE, "synth", "train"), np.maximum(tile.rgb, 1), chm)


def write_synth(
    folder: str | Path,
    count: int,
    side_px: int = 512,
    first_seed: int = 1000,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A chips folder of the procedural forest, to train on beside real chips: `data.chips=[chips,synth]`.

    A folder that holds these very chips is left as it is.

    Returns:
        chips, folder's settings, and `cut_now`, whether they were made by this call.

    Raises:
        InputError: bad numbers, or the folder holds something else.
        OutputError: it cannot be written.
    """
    folder, progress = Path(folder), progress or NoProgress()
    if count < 1 or side_px < 32 or side_px % 2:
        raise InputError(f"{count} chips of {side_px} px", expected="at least 1, of an even number >= 32")
    made = {"count": count, "size_px": side_px, "first_seed": first_seed}
    settings = {"format": _FORMAT, "synth": made}
    check_folder(folder, settings, overwrite)
    known = folder / "settings.json"
    same = known.is_file() and known.read_text() == json.dumps(settings, indent=2) + "\n"
    if same and (folder / INDEX_CSV).is_file():
        return {"chips": count, "settings": settings, "cut_now": False}
    for old in [folder / INDEX_CSV, *folder.glob(f"{SHARDS}/*")]:
        old.unlink(missing_ok=True)
    begin_folder(folder, settings)
    progress.start(count, "drawing the procedural forest")

    def told() -> Iterator[Chip]:
        for chip in synth_chips(count, side_px, first_seed):
            yield chip
            progress.advance()

    write_made(folder, told(), SYNTH_SITE, "Apache-2.0")
    return {"chips": count, "settings": settings, "cut_now": True}
