"""A region from a server that fails: what is lost, and whether anything is wrong.

    python benchmarks/region_outage.py                    # 144 tiles, both kinds of faults

- transient: a fifth of all requests answer 429 or 503, are cut in the middle, or come after a second. Every
  tile has to be made, with the heights, byte for byte, that the same file has from the disk.
- permanent: a part of the file always answers 500. Exit 3, every failed tile in the ledger with its reason,
  and every pixel elsewhere right.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

from region_small import left_behind, map_command, report, small_image, small_model

KINDS: dict[str, dict[str, Any]] = {
    "429": {"status": 429}, "503": {"status": 503}, "cut": {"cut_after": 300}, "slow": {"delay_s": 1.0},
}  # fmt: skip


def servers() -> ModuleType:
    """The misbehaving HTTP server of the tests."""
    spec = importlib.util.spec_from_file_location(
        "servers", Path(__file__).parents[1] / "tests" / "servers.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["servers"] = module
    spec.loader.exec_module(module)
    return module


def run(words: list[str]) -> int:
    return subprocess.run(words, stderr=subprocess.DEVNULL, check=False).returncode


def same_where_valid(found: Path, expected: Path) -> dict[str, int]:
    """Pixels of a mosaic that are missing, and that differ where they are not."""
    import numpy as np
    import rasterio

    with rasterio.open(found) as a, rasterio.open(expected) as b:
        one, other = a.read(1), b.read(1)
    made = np.isfinite(one)
    return {
        "pixels_missing": int((np.isfinite(other) & ~made).sum()),
        "pixels_wrong": int((one[made] != other[made]).sum()),
    }


def from_server(top: Path, image: Path, model: Path, die: random.Random, lasting: bool) -> dict[str, Any]:
    """The region of a file on a failing server, beside the same from the disk."""
    module = servers()
    server = module.start()
    content = image.read_bytes()
    url = server.put("/image.tif", content, "image/tiff")
    faults: Counter[str] = Counter()
    # GDAL writes the directory first, then the blocks from north to south.
    bad = range(len(content) // 2, len(content) * 6 // 10)

    def misbehave(path: str, first: int) -> Any:
        if lasting:
            faults["500"] += first in bad
            return module.Fault(re.compile("."), 1, 500) if first in bad else None
        if die.random() >= 0.2:
            return None
        kind = die.choice(list(KINDS))
        faults[kind] += 1
        return module.Fault(re.compile("."), 1, **KINDS[kind])

    folder = top / ("permanent" if lasting else "transient")
    server.take_fault = misbehave
    words = map_command(folder, url, model, "--workers", 2)
    if lasting:
        words[words.index("--attempts") + 1] = "2"
    code = run(words)
    server.shutdown()
    found = left_behind(folder)
    states = Counter(state for state, _ in found["rows"].values())
    result = {
        "exit": code, "requests": len(server.log), "faults": dict(faults), "tiles": dict(states),
        **same_where_valid(folder / "mosaic", top / "file" / "mosaic"),
    }  # fmt: skip
    if lasting:
        from canopy.region.ledger import Ledger

        with Ledger(folder / "ledger.sqlite", read_only=True) as ledger:
            reasons = [row.reason or "" for row in ledger.rows("failed")]
        result["reasons"] = Counter(re.sub(r"[\d.:]+", "#", reason) for reason in reasons).most_common(3)
        result["without_reason"] = sum(not reason for reason in reasons)
        result["ok"] = code == 3 and not result["pixels_wrong"] and not result["without_reason"]
        result["ok"] &= 0 < states["failed"] < sum(states.values())
    else:
        result["ok"] = code == 0 and not result["pixels_missing"] + result["pixels_wrong"]
        result["ok"] &= set(states) == {"done"}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("transient", "permanent"))
    parser.add_argument("--tiles", type=int, default=12, help="along a side of the region")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for region_outage.json")
    options = parser.parse_args()
    die = random.Random(options.seed)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        image, model = small_image(top / "image.tif", options.tiles), small_model(top / "small.safetensors")
        subprocess.run(map_command(top / "file", image, model), check=True)
        for what in ("transient", "permanent"):
            if options.only in (None, what):
                results[what] = from_server(top, image, model, die, what == "permanent")
                print(what, json.dumps(results[what]), flush=True)
    report(results, options.out, "region_outage")
    sys.exit(not all(one["ok"] for one in results.values()))


if __name__ == "__main__":
    main()
