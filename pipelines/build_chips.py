"""Cut a data pack into one chips file: `python pipelines/build_chips.py PACK -o CHIPS.safetensors`."""

from __future__ import annotations

import argparse
from pathlib import Path

from canopy.chips.cut import cut_pack, cut_synth
from canopy.chips.store import write_store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", type=Path, help="folder with manifest.csv")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--synth", type=int, default=0, help="add this many chips of the procedural forest")
    args = parser.parse_args()
    chips, digest = cut_pack(args.pack)
    chips += cut_synth(args.synth)
    write_store(args.output, chips, digest)
    print(f"{len(chips)} chips of data {digest[:12]} in {args.output}")


if __name__ == "__main__":
    main()
