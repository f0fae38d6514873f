"""What the C library's way with freed memory costs a network on the CPU, and what keeping that memory saves.

    python benchmarks/allocation.py                            # the default model
    python benchmarks/allocation.py MODEL --shapes 4x256 4x512 1x1024

Processor seconds per Mpx of forward passes, in the program (user) and in the kernel (system), with glibc's
usual behaviour and under `canopy.inference.engine.kept_memory`.
"""

from __future__ import annotations

import resource
from contextlib import nullcontext
from typing import Any

import common


def one(model: Any, batch: int, side: int, passes: int = 2) -> dict[str, float]:
    """User and system seconds per Mpx, and page faults per pass."""
    import torch

    rgb = torch.rand(batch, 3, side, side)
    with torch.inference_mode():
        model(rgb)
        before = resource.getrusage(resource.RUSAGE_SELF)
        for _ in range(passes):
            model(rgb)
        after = resource.getrusage(resource.RUSAGE_SELF)
    mpx = passes * batch * side * side / 1e6
    return {
        "user s/Mpx": (after.ru_utime - before.ru_utime) / mpx,
        "system s/Mpx": (after.ru_stime - before.ru_stime) / mpx,
        "faults/pass": (after.ru_minflt - before.ru_minflt) // passes,
    }


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("model", nargs="?", default="default")
    parser.add_argument("--shapes", nargs="+", default=["4x256", "4x512", "1x1024"], metavar="BATCHxSIDE")
    options = parser.parse_args(argv)
    import canopy
    from canopy.inference.engine import kept_memory

    model, rows = canopy.load_model(options.model), []
    for shape in options.shapes:
        batch, side = (int(part) for part in shape.split("x"))
        for memory, context in (("usual", nullcontext), ("kept", kept_memory)):
            with context():
                rows.append({"batch": batch, "crop px": side, "memory": memory} | one(model, batch, side))
    common.show(f"Freed memory: {options.model}", rows)
    common.save(options.out, "allocation", {"model": options.model, "shapes": options.shapes}, rows)


if __name__ == "__main__":
    main()
