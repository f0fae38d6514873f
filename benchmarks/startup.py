"""How long `canopy --help` takes: wall seconds of a new process, the median of several.

python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import common

# The last is the floor under the others.
COMMANDS = {
    "canopy --help": [*common.canopy_command(), "--help"],
    "canopy predict --help": [*common.canopy_command(), "predict", "--help"],
    "python -c pass": [sys.executable, "-c", "pass"],
}


def seconds_of(command: list[str]) -> dict[str, float]:
    """Wall and processor seconds of one run."""
    clock = common.Clock()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return clock.read()


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--times", type=int, default=11)
    options = parser.parse_args(argv)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in COMMANDS}
    for command in COMMANDS.values():
        seconds_of(command)  # files into the disk cache
    for _ in range(options.times):
        for name, command in COMMANDS.items():
            runs[name].append(seconds_of(command))
        time.sleep(0.05)
    rows = [
        {
            "command": name,
            "median wall s": statistics.median(run["wall_s"] for run in found),
            "best wall s": min(run["wall_s"] for run in found),
            "median cpu s": statistics.median(run["cpu_s"] for run in found),
        }
        for name, found in runs.items()
    ]
    common.show(f"Start-up, {options.times} runs in turn", rows)
    common.save(options.out, "startup", {"times": options.times}, rows)


if __name__ == "__main__":
    main()
