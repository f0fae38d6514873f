"""Score a model beside both baselines: `python pipelines/score_pack.py CHIPS --model NAME --splits val`.

`--publish MODEL.safetensors --card docs/model-card.md` stores the scores in a copy of the model and
writes its card. A model that was trained on the val rows too cannot be judged by them: `--unseen SIBLING`
names the same training without them, whose val scores and calibration the copy gets instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from canopy.config import named_values
from canopy.errors import CanopyError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chips", type=Path, help="folder of canopy data chips")
    parser.add_argument("--model", default="default")
    parser.add_argument("--splits", default="val", help="val,test,test_hard; test is for reports only")
    parser.add_argument(
        "--unseen", metavar="SIBLING", help="model file: val scores and calibration of this one"
    )
    parser.add_argument("--crop-px", type=int, help="score, and publish, with this crop side")
    parser.add_argument("--overlap-px", type=int, help="publish with this overlap of crops")
    parser.add_argument("--margin-px", type=int, help="publish with this margin of crops")
    parser.add_argument("--publish", type=Path, help="write the model with these scores here")
    parser.add_argument("--card", type=Path, help="write the model card here")
    parser.add_argument("--json", type=Path, help="write all scores here")
    parser.add_argument("--note", action="append", default=[], metavar="KEY=TEXT", help="facts for the card")
    args = parser.parse_args()
    try:
        _run(args)
    except CanopyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(args: argparse.Namespace) -> None:
    from canopy.calibration.intervals import CARD_KEY as GAP
    from canopy.inference.layers import CARD_KEY as QUALITY
    from canopy.models.checkpoint import describe, load_model, save_checkpoint
    from canopy.models.heads import CARD_KEY as INTERVALS
    from canopy.training.fit import height_table, markdown_table, model_card, score_with_baselines

    notes = named_values(args.note, "--note")
    model = load_model(args.model)
    lattice = {name: getattr(args, name) for name in ("crop_px", "overlap_px", "margin_px")}
    model.config = dataclasses.replace(model.config, **{k: v for k, v in lattice.items() if v is not None})
    splits = tuple(args.splits.split(","))
    scores = score_with_baselines(model, args.chips, splits)
    sibling = load_model(args.unseen) if args.unseen else None
    if sibling:
        scores |= score_with_baselines(sibling, args.chips, ("val",))
    for split, tables in scores.items():
        print(f"{split}\n{markdown_table(tables)}\n\n{height_table(tables)}\n")
    if args.json:
        args.json.write_text(json.dumps(scores, indent=1))
    if args.publish:
        card = {**model.card, **notes, "scores": {**model.card.get("scores", {}), **scores}}
        if sibling:
            card |= {key: sibling.card[key] for key in (INTERVALS, GAP, QUALITY) if key in sibling.card}
        for split in scores:
            card[split] = scores[split]["model"]
        save_checkpoint(args.publish, model, json.loads(json.dumps(card)))
        if args.card:
            args.card.write_text(model_card(describe(args.publish)))


if __name__ == "__main__":
    raise SystemExit(main())
