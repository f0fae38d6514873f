"""What makes a default model, from a data pack to its card. A step whose result is there is left out.

    python pipelines/default_model.py PACK -o runs/default
    python pipelines/default_model.py PACK -o runs/try --pretrain configs/pretrain/smoke.yaml \
        --train configs/finetune/smoke.yaml --synth 16

PACK has manifest.csv (image, heights, split) and ssl/manifest_ssl.csv (images without heights). Rows for
tests are never looked at before the last step, which scores them.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from baselines import beside_baselines, card_text
from steps import run, step

from canopy.errors import DataError
from canopy.files import replacing

COLUMNS = ("id", "rgb_path", "chm_path", "site", "split", "crs", "year_rgb", "year_chm", "licence")
_LEAST_SIDE_M = 100.0  # plots of 20 m hold no more than one view


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pack", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--pretrain", default="configs/pretrain/cpu-small.yaml", metavar="CONFIG")
    parser.add_argument("--train", default="configs/finetune/canopy-small.yaml", metavar="CONFIG")
    parser.add_argument("--synth", type=int, default=400, metavar="N", help="chips of the procedural forest")
    parser.add_argument("--init-from", metavar="FILE", help="an encoder, instead of pretraining one")
    return run(partial(chain, parser.parse_args()))


def chain(args: argparse.Namespace) -> None:
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)

    # 1. Chips: pairs of image and heights, drawn ones beside them.
    chips, drawn = out / "chips", out / "synth"
    step(chips / "index.csv", "data", "chips", "--manifest", args.pack / "manifest.csv", "-o", chips)
    step(drawn / "index.csv", "data", "chips", "--synth", args.synth, "-o", drawn)

    # 2. An encoder that has seen many images without heights.
    encoder = Path(args.init_from) if args.init_from else out / "encoder" / "encoder.safetensors"
    if not encoder.exists():
        table = write_ssl_table(args.pack, out / "ssl")
        images = out / "ssl" / "chips"
        step(images / "index.csv", "data", "chips", "--manifest", table, "-o", images)
        step(encoder, "pretrain", args.pretrain, f"data.chips={images}", "-o", out / "encoder")

    # 3. Heights.
    model = step(
        out / "model" / "model.safetensors",
        "train", args.train, f"data.chips=[{chips},{drawn}]", f"init_from={encoder}", "-o", out / "model",
    )  # fmt: skip

    # 4. Intervals from the validation chips, and the int8 network.
    calibrated = step(
        out / "calibrated.safetensors",
        "calibrate", "interval", model, "--data", chips, "-o", out / "calibrated.safetensors",
    )  # fmt: skip
    if importlib.util.find_spec("nncf"):
        quantised = calibrated.with_suffix(".int8.zip")
        step(quantised, "models", "quantize", calibrated, "--data", chips, "-o", quantised)

    # 5. The card, with scores beside those of both baselines.
    write_card(calibrated, chips, out)


def write_card(model: Path, chips: Path, out: Path) -> None:
    """Score a model on all splits, keep the scores in its file, and write model-card.md."""
    from canopy.models.checkpoint import describe, save_checkpoint
    from canopy.models.registry import load_model

    loaded = load_model(model)
    scores = beside_baselines(loaded, chips, ("val", "test", "test_hard"))
    card = {**loaded.card, "scores": scores} | {split: tables["model"] for split, tables in scores.items()}
    save_checkpoint(out / "default.safetensors", loaded, json.loads(json.dumps(card)))
    with replacing(out / "model-card.md") as part:
        part.write_text(card_text(describe(out / "default.safetensors")), encoding="utf-8")
    print(f"{out / 'default.safetensors'}: the model; {out / 'model-card.md'}: its card")


def write_ssl_table(pack: Path, out: Path) -> Path:
    """OUT/ssl.csv: all images that are not held out; heights only where the probe may look at them."""
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "ssl.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in ssl_rows(pack):
            for column in ("rgb_path", "chm_path"):  # paths count from the manifest's folder
                if row[column]:
                    row[column] = os.path.relpath(pack / row[column], out)
            writer.writerow(row)
    return out / "ssl.csv"


def ssl_rows(pack: Path) -> Iterator[dict[str, str]]:
    """Rows of that table, paths relative to the pack."""
    for row in _read(pack / "manifest.csv"):
        wide = float(row.get("xmax") or _LEAST_SIDE_M) - float(row.get("xmin") or 0) >= _LEAST_SIDE_M
        if wide and row["split"] in ("train", "val"):
            yield {name: row.get(name, "") for name in COLUMNS}
    for row in _read(pack / "ssl" / "manifest_ssl.csv"):
        if row["split"] != "test":
            named = {"site": row["place"], "split": "train", "year_rgb": row["year"]}
            yield {name: row.get(name, "") for name in COLUMNS} | named


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise DataError("no such table", where=path, expected="a folder with manifest.csv and ssl/")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    raise SystemExit(main())
