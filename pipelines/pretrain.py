"""Pretrain an encoder: `python pipelines/pretrain.py CONFIG.yaml [key=value ...] -o RUN_DIR [--resume]`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from canopy.config import load_settings
from canopy.errors import CanopyError
from canopy.runtime import setup_logging


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, section.key=value")
    parser.add_argument("-o", "--output", type=Path, required=True, help="run folder")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--fast-dev-run", action="store_true", help="two steps and a probe")
    args = parser.parse_intermixed_args()
    from lightning_utilities.core.rank_zero import rank_zero_only

    from canopy.training.pretrain_run import pretrain
    from canopy.training.pretrain_settings import PretrainSettings

    setup_logging()
    try:
        settings = load_settings(PretrainSettings, args.config, args.overrides)
        command = shlex.join(["python", "pipelines/pretrain.py", *sys.argv[1:]])
        card = pretrain(
            settings, args.output, resume=args.resume, fast_dev_run=args.fast_dev_run, command=command
        )
        if not getattr(rank_zero_only, "rank", 0):  # one of several processes has the word
            print(json.dumps({k: card[k] for k in ("objective", "steps", "minutes", "probe")}))
    except CanopyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
