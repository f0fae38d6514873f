"""All benchmarks one after another, then the targets: what `make bench` runs.

    python benchmarks/run.py --out bench                   # about 20 minutes on two quiet cores
    python benchmarks/run.py --out bench --size full       # the sizes that docs/performance.md reports; hours
    python benchmarks/run.py --out bench --only startup throughput

Each is a process of its own, so that one that fails leaves the others alone; exit code 1 then. A target that
is missed is no failure.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import common


@dataclass(frozen=True)
class Step:
    """A benchmark: its script and its arguments at either size; None leaves it out.

    `cuda`: only where there is such a device.
    """

    script: str
    quick: str | None = ""
    full: str | None = ""
    cuda: bool = False

    @property
    def path(self) -> Path:
        return Path(__file__).with_name(f"{self.script}.py")


STEPS = [
    Step("startup"),
    Step(
        "throughput",
        "--models default:1024 large:640 --rounds 1",
        "--models default:4096 large:1536 --rounds 3",
    ),
    Step("memory", "--sizes 5000 20000", ""),
    Step("workers", "--size 2048", "--size 8192"),
    Step("lidar", "--points 3000000", "--points 20000000"),
    Step("gedi", "--shots 30000 --layouts auto rows", ""),
    Step("evaluate", None, ""),
]


def run_step(step: Step, arguments: str, out: Path) -> str:
    """Run one; '' or what went wrong."""
    print(f"\n== {step.script} {arguments}", flush=True)
    command = [sys.executable, str(step.path), *arguments.split(), "--out", str(out)]
    result = out / f"{step.script}.json"
    before = result.stat().st_mtime_ns if result.exists() else 0
    started = time.perf_counter()
    code = subprocess.run(command).returncode
    print(f"   {time.perf_counter() - started:.0f} s", flush=True)
    # A script may end with 1 to say that its own limit was missed: the results are there then.
    wrote = result.exists() and result.stat().st_mtime_ns > before
    return "" if wrote else f"{step.script}: exit code {code}, no results"


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", choices=["quick", "full"], default="quick")
    parser.add_argument("--only", nargs="+", choices=[step.script for step in STEPS], help="these alone")
    options = parser.parse_args(argv)
    out = options.out or Path("bench")
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for step in STEPS:
        arguments = step.quick if options.size == "quick" else step.full
        if arguments is None or (options.only and step.script not in options.only):
            continue
        if step.cuda and not has_cuda():
            print(f"\n== {step.script}: no CUDA device", flush=True)
            continue
        failed.append(run_step(step, arguments, out))
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("targets.py")), "--out", str(out)], check=True
    )
    for line in filter(None, failed):
        print(line, file=sys.stderr)
    sys.exit(any(failed))


if __name__ == "__main__":
    main()
