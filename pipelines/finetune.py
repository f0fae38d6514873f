"""Train a height model: `python pipelines/finetune.py CONFIG.yaml [key=value ...] -o RUN_DIR [--resume]`.

The same as `canopy train`, for machines where only the checkout is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from canopy.cli.main import main

    sys.argv = [sys.argv[0], "train", *sys.argv[1:]]
    main()
