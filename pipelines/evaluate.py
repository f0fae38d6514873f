"""Score models on a named benchmark: `python pipelines/evaluate.py pack --model default --data-dir
../shared/data`.

Thin: `canopy evaluate --benchmark` does the same with more options.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from canopy.errors import CanopyError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("benchmark", help="a file's stem in data_manifests/benchmarks")
    parser.add_argument("--model", action="append", default=[], help="name or file; may be repeated")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    from canopy.cli.evaluate import evaluate_benchmark
    from canopy.runtime import setup_logging

    setup_logging()
    try:
        return evaluate_benchmark(args.benchmark, args.model, args.data_dir, args.out)
    except CanopyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
