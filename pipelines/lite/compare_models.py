"""Models on the same pixels of the pack: plain, registered and aligned; by site, by height; and pictures.

    python pipelines/compare_models.py RAW REGISTERED --model old=default --model new=FILE --json OUT.json

RAW and REGISTERED are folders of `canopy data chips` with --no-register and without. `aligned` moves each tile's
raw label by up to 12 m to where the model itself sees the crowns (FFT peak), and counts the tile's inner part.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from default_model import REACH_M, shift_between

from canopy.chips.shards import ChipShards
from canopy.chips.store import Chip
from canopy.models.checkpoint import load_model
from canopy.training.scoring import plain, predict_chip, score

COLUMNS = ("mae_m", "r", "r2", "block_r2", "bias_m", "edge_error")
Groups = dict[str, Callable[[Chip], bool]]
GROUPS: Groups = {
    "val": lambda c: c.row.split == "val" and c.row.kind != "neon",
    "plots (val)": lambda c: c.row.split == "val" and c.row.kind == "neon",
    "plots OSBS": lambda c: c.row.split == "val" and c.row.site.startswith("NEON OSBS"),
    "plots MLBS": lambda c: c.row.split == "val" and c.row.site.startswith("NEON MLBS"),
    "test": lambda c: c.row.split == "test",
    "Natural Bridge": lambda c: c.row.split == "test" and c.row.site.startswith("Natural"),
    "Autzen": lambda c: c.row.split == "test" and c.row.site.startswith("Autzen"),
    "autumn": lambda c: c.row.split == "test_hard",
    "Bald Rock": lambda c: c.row.site.startswith("Bald"),
}


def aligned(chip: Chip, pred: np.ndarray) -> Chip:
    """The chip, its label moved to where `pred` sees the crowns, without the outermost 12 m."""
    if chip.row.kind == "neon":
        return chip
    down, right, peak, _ = shift_between(pred, chip.chm_m)
    down, right = (int(round(s)) if peak > 0.1 else 0 for s in (down, right))
    moved = np.roll(chip.chm_m, (-down, -right), (0, 1))
    out = np.full_like(moved, np.nan)
    inner = np.s_[REACH_M:-REACH_M, REACH_M:-REACH_M]
    out[inner] = moved[inner]
    return Chip(chip.row, chip.rgb, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("raw", type=Path)
    parser.add_argument("registered", type=Path)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folders = {"plain": _held(args.raw), "registered": _held(args.registered)}
    tables: dict[str, dict[str, dict[str, dict[str, float | None]]]] = {}
    for named in args.model:
        name, _, file = named.partition("=")
        model = load_model(file)
        known: dict[str, np.ndarray] = {}

        def pred(chip: Chip) -> np.ndarray:
            if chip.row.id not in known:
                with torch.autocast("cpu", torch.bfloat16):
                    known[chip.row.id] = predict_chip(model, chip, 512, 0)
            return known[chip.row.id]

        for group, wanted in GROUPS.items():
            if args.only and group not in args.only:
                continue
            for kind, chips in {**folders, "aligned": folders["plain"]}.items():
                some = [c for c in chips if wanted(c)]
                if kind == "aligned":
                    some = [aligned(c, pred(c)) for c in some]
                if some:
                    row = plain(score(some, pred))["all"]
                    tables.setdefault(group, {}).setdefault(kind, {})[name] = row
    for group, kinds in tables.items():
        for kind, rows in kinds.items():
            for name, row in rows.items():
                bins = " ".join(
                    f"{v:+.1f}" if v is not None else "-"
                    for k, v in row.items()
                    if k.startswith("bias_") and k != "bias_m"
                )
                cells = " | ".join("-" if row[c] is None else f"{row[c]:.2f}" for c in COLUMNS)
                print(f"| {group} | {kind} | {name} | {row['n']} | {cells} | {bins} |")
    if args.json:
        args.json.write_text(json.dumps(tables, indent=1))
    print(time.strftime("%H:%M:%S"))


def _held(folder: Path) -> list[Chip]:
    shards = ChipShards(folder)
    rows = [i for i, r in enumerate(shards.rows) if r.split != "train" or r.site.startswith("Bald")]
    return [shards[i].as_chip() for i in rows]


if __name__ == "__main__":
    main()
