"""Train a height model: `python pipelines/finetune.py CONFIG.yaml [key=value ...] -o RUN_DIR [--resume]`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from canopy.config import load_settings
from canopy.errors import CanopyError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, section.key=value")
    parser.add_argument("-o", "--output", type=Path, required=True, help="run folder")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_intermixed_args()
    from canopy.training.fit import finetune
    from canopy.training.settings import FinetuneSettings

    try:
        settings = load_settings(FinetuneSettings, args.config, args.overrides)
        command = shlex.join(["python", "pipelines/finetune.py", *sys.argv[1:]])
        print(finetune(settings, args.output, resume=args.resume, command=command))
    except CanopyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
