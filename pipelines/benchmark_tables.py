"""What makes the benchmark tables: models scored on named benchmarks, all tables on one page.

    python pipelines/benchmark_tables.py -o runs/benchmarks --model default --benchmark pack=../shared/data
    python pipelines/benchmark_tables.py -o runs/benchmarks --model default --model v1-small \
        --benchmark neon-test=data/neon --benchmark sao-paulo=data/sp

Each benchmark's folder is filled by the commands that `canopy evaluate --benchmark NAME` names where it lacks
something. Maps that an earlier run of the same model left are used again.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from steps import canopy, run

from canopy.errors import ConfigError
from canopy.files import replacing


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--model", action="append", required=True, help="name or file; may be repeated")
    parser.add_argument("--benchmark", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--replicates", type=int, default=1000, help="of the bootstrap; 0: no intervals")
    return run(partial(chain, parser.parse_args()))


def chain(args: argparse.Namespace) -> None:
    models = [word for name in args.model for word in ("--model", name)]
    tables = []
    for given in args.benchmark:
        name, equals, folder = given.partition("=")
        if not (name and equals and folder):
            raise ConfigError(f"{given!r} is no NAME=DIR", where="--benchmark")
        out = args.out / name
        canopy(
            "evaluate", "--benchmark", name, "--data-dir", folder, *models,
            "--replicates", args.replicates, "-o", out,
        )  # fmt: skip
        tables.append((out / "results.md").read_text(encoding="utf-8").strip())
    with replacing(args.out / "benchmarks.md") as part:
        part.write_text("\n\n".join(["# Benchmarks", *tables]) + "\n", encoding="utf-8")
    print(f"{args.out / 'benchmarks.md'}: all tables")


if __name__ == "__main__":
    raise SystemExit(main())
