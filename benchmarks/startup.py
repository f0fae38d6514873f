"""How long `canopy --help` takes: seconds of a new process, the median of several; Python alone is the floor.

python benchmarks/startup.py
"""

from __future__ import annotations

import subprocess
import sys

import common

CANOPY = "import sys; sys.argv[0] = 'canopy'; from canopy.cli.main import main; main()"
COMMANDS = {
    "canopy --help": [CANOPY, "--help"],
    "canopy predict --help": [CANOPY, "predict", "--help"],
    "python -c pass": ["pass"],
}


def seconds_of(words: list[str]) -> dict[str, float]:
    """Wall and processor seconds of one run."""
    clock = common.Clock()
    subprocess.run([sys.executable, "-c", *words], check=True, stdout=subprocess.DEVNULL)
    return clock.read()


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--times", type=int, default=11)
    options = parser.parse_args(argv)
    for words in COMMANDS.values():
        seconds_of(words)  # files into the disk cache
    runs = common.in_turn({n: lambda words=w: seconds_of(words) for n, w in COMMANDS.items()}, options.times)
    rows = [
        {"command": name, "wall s": common.middle(found, "wall_s"), "cpu s": common.middle(found, "cpu_s")}
        for name, found in runs.items()
    ]
    common.show(f"Start-up, median of {options.times} runs in turn", rows)
    common.save(options.out, "startup", {"times": options.times}, rows)


if __name__ == "__main__":
    main()
