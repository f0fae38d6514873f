"""Train the GEDI model: `python pipelines/train_gedi.py DATA -o gedi.safetensors --hold-out Natural`.

DATA is a data pack, chips folder or chips file: footprints are then simulated on its lidar heights. With
--shots and --imagery real shots are joined to imagery instead, and DATA is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from canopy.errors import CanopyError, ConfigError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="?", help="data pack, chips folder or chips file")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--shots", type=Path, action="append", default=[], help="GEDI table; may be repeated")
    parser.add_argument("--imagery", action="append", default=[], help="imagery of each --shots, in order")
    parser.add_argument("--splits", default="train,val,test", help="of DATA")
    parser.add_argument("--hold-out", action="append", default=[], metavar="REGION", help="never trained on")
    parser.add_argument("--rh", type=int, default=98)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--per-chip", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        print(json.dumps(_run(args), indent=2))
    except CanopyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(args: argparse.Namespace) -> dict[str, object]:
    import numpy as np

    from canopy.calibration.gedi_area import score_gedi, split_regions, train_gedi
    from canopy.models.gedi import save_gedi_model
    from canopy.runtime import progress_bar, setup_logging

    setup_logging()
    samples = _samples(args)
    train, unseen = split_regions(samples, args.hold_out) if args.hold_out else (samples, None)
    with progress_bar() as progress:
        model = train_gedi(
            train, rh=args.rh, steps=args.steps, minutes=args.minutes, seed=args.seed, progress=progress
        )
    middle = float(np.median(train.height_m))
    facts: dict[str, object] = {
        "rh": args.rh, "samples": len(train), "regions": sorted(set(train.region.tolist())),
        "simulated": not args.shots,
        "training": score_gedi(model, train.take(np.arange(0, len(train), len(train) // 500 + 1)), middle),
    }  # fmt: skip
    if unseen is not None:
        facts["held_out"] = {
            region: score_gedi(model, unseen.take(unseen.region == region), middle)
            for region in sorted(set(unseen.region.tolist()))
        }
    save_gedi_model(args.output, model, facts)
    return facts


def _samples(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    import numpy as np

    from canopy.calibration.collect import load_chips, places_of
    from canopy.calibration.gedi_area import Samples, joined, simulated

    if args.data is not None:
        chips, _ = load_chips(args.data, args.splits.split(","))
        return simulated(
            chips, per_chip=args.per_chip, rh=args.rh, seed=args.seed, places=places_of(args.data)
        )
    if not args.shots or len(args.shots) != len(args.imagery):
        raise ConfigError("nothing to train on", expected="DATA, or one --imagery for every --shots")
    from canopy.imagery.open import open_imagery
    from canopy.labels.shots import read_shots

    parts = [
        joined(open_imagery(where, area=None), read_shots(table), rh=args.rh, region=table.stem)
        for table, where in zip(args.shots, args.imagery, strict=True)
    ]
    return Samples(*(np.concatenate([getattr(p, f) for p in parts]) for f in Samples.__dataclass_fields__))


if __name__ == "__main__":
    raise SystemExit(main())
