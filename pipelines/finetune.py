"""Train a height model: `python pipelines/finetune.py CONFIG.yaml [key=value ...] -o RUN_DIR [--resume]`.

The same as `canopy train`, for machines where only the checkout is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from canopy.cli.main import main

    if sys.argv[1:2] != ["train"]:  # processes that Lightning starts are given it
        sys.argv.insert(1, "train")
    main()
