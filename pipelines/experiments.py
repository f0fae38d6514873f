"""Run a matrix: `python pipelines/experiments.py CHIPS -o DIR --matrix configs/experiments/proof.yaml`.

Runs that are finished are skipped, unfinished ones go on. DIR gets a folder per run, results.csv, results.md.
`--var dinov2=runs/dinov2/encoder.safetensors` fills "{dinov2}" in the matrix; key=value overrides the matrix,
as in `set.steps=800 seeds=[0,1,2]`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chips", type=Path, help="folder of canopy data chips")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--matrix", type=Path, required=True)
    parser.add_argument("--var", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--list", action="store_true", help="say what would be run")
    args = parser.parse_intermixed_args()
    from canopy.config import named_values
    from canopy.errors import CanopyError
    from canopy.runtime import setup_logging
    from canopy.training.experiments import jobs, load_matrix, run_matrix

    setup_logging()
    try:
        matrix = load_matrix(args.matrix, args.overrides)
        variables = named_values(args.var, "--var")
        if args.list:
            print("\n".join(f"{job.id} {' '.join(job.overrides)}" for job in jobs(matrix, variables)))
            return 0
        failed = run_matrix(matrix, args.matrix.parent, args.chips, args.output, variables)
    except CanopyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(args.output / "results.md")
    return 3 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
