"""All benchmarks one after another, then the targets: what `make bench` runs.

    python benchmarks/run.py --out bench                   # about 20 minutes on two quiet cores
    python benchmarks/run.py --out bench --size full       # the sizes that docs/performance.md reports; hours
    python benchmarks/run.py --out bench --only startup throughput

Each is a process of its own, so that one that fails leaves the others alone; exit code 1 then. A target that
is missed is no failure. By hand: before_after.py (two checkouts), quality.py (needs the data pack).
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import common

# Script: its arguments at either size; None leaves it out.
STEPS: dict[str, tuple[str | None, str]] = {
    "startup": ("", ""),
    "throughput": (
        "--models default:1024 large:640 --rounds 1",
        "--models default:4096 large:1536 --rounds 3",
    ),
    "memory": ("--sizes 5000 20000", ""),
    "evaluate": (None, ""),
}


def run_step(script: str, arguments: str, out: Path) -> str:
    """Run one; '' or what went wrong."""
    print(f"\n== {script} {arguments}", flush=True)
    path, result = Path(__file__).with_name(f"{script}.py"), out / f"{script}.json"
    before = result.stat().st_mtime_ns if result.exists() else 0
    started = time.perf_counter()
    code = subprocess.run([sys.executable, str(path), *arguments.split(), "--out", str(out)]).returncode
    print(f"   {time.perf_counter() - started:.0f} s", flush=True)
    # A script may end with 1 to say that its own limit was missed: the results are there then.
    wrote = result.exists() and result.stat().st_mtime_ns > before
    return "" if wrote else f"{script}: exit code {code}, no results"


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", choices=["quick", "full"], default="quick")
    parser.add_argument("--only", nargs="+", choices=list(STEPS), help="these alone")
    options = parser.parse_args(argv)
    out = options.out or Path("bench")
    out.mkdir(parents=True, exist_ok=True)
    chosen = {name: sizes[options.size == "full"] for name, sizes in STEPS.items()}
    failed = [
        run_step(name, arguments, out)
        for name, arguments in chosen.items()
        if arguments is not None and (not options.only or name in options.only)
    ]
    targets = Path(__file__).with_name("targets.py")
    subprocess.run([sys.executable, str(targets), "--out", str(out)], check=True)
    print("\n".join(filter(None, failed)), file=sys.stderr)
    sys.exit(any(failed))


if __name__ == "__main__":
    main()
