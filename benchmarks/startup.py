"""How long `canopy --help` takes: wall seconds of a new process, the median of several.

python benchmarks/startup.py
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import common

# What is measured -> arguments of python; the last is the floor under the others.
COMMANDS = {
    "canopy --help": ["-m", "canopy.cli.main", "--help"],
    "canopy predict --help": ["-m", "canopy.cli.main", "predict", "--help"],
    "python -c pass": ["-c", "pass"],
}


def command_of(name: str) -> list[str]:
    """The installed script where there is one, as users call it."""
    script = shutil.which("canopy", path=str(Path(sys.executable).parent))
    if script and name.startswith("canopy"):
        return [script, *name.split()[1:]]
    return [sys.executable, *COMMANDS[name]]


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
    for name in COMMANDS:
        seconds_of(command_of(name))  # files into the disk cache
    for _ in range(options.times):
        for name in COMMANDS:
            runs[name].append(seconds_of(command_of(name)))
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
