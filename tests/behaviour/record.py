"""Record the goldens of this folder anew: `python tests/behaviour/record.py [pytest options, as -k map]`.

Do this only where heights, scores or keys were meant to change, read `git diff --stat` after it, and say in
the commit why they moved. `goldens/small.safetensors` and `goldens/bands.json` are inputs and are never
recorded: a network of 0.12 M parameters, trained for five minutes on 14 woods of `behaviour_support.forest`,
and what `canopy calibrate interval` added to its card on 52 others.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    os.environ["CANOPY_RECORD"] = "1"
    sys.exit(pytest.main([str(Path(__file__).resolve().parent), "-q", *sys.argv[1:]]))
