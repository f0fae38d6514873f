"""Where the time of `canopy predict` goes: read, warp, predict, blend, write; wall and processor seconds.

    python benchmarks/stages.py                     # the default model on 1536 x 1536 px, two kinds of file
    python benchmarks/stages.py --size 4096 --model cheap     # all but the model

`native` is a JPEG file on the model's own grid, whose pixels are copied; `warped` a deflate file of 0.6 m in
another CRS. Stages run at the same time in several threads, so their wall seconds may add up to more than the
run's; what a stage calls in another stage counts there alone.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import common

# Stage -> the functions it consists of, as `module:name` or `module:Class.name`.
STAGES = {
    "read": ["canopy.geo.reading:_read_native"],
    "warp": ["canopy.geo.reading:warp_window", "canopy.geo.reading:copy_window"],
    "mosaic, scale": ["canopy.imagery.files:Mosaic.read"],
    "fill, pack": ["canopy.inference.engine:_read"],
    "predict": ["canopy.inference.predictor:Predictor.__call__"],
    "blend": [f"canopy.inference.lattice:Canvas.{name}" for name in ("begin", "add", "finish")],
    "write": ["canopy.geo.cog:CogWriter.write"],
    "finish the COG": ["canopy.geo.cog:CogWriter.close"],
}
IMAGES = {
    "native": {"compress": "jpeg"},
    # 0.785 m of web mercator are 0.6 m on the ground here, at 40 degrees north.
    "warped": {"compress": "deflate", "gsd_m": 0.785, "crs": "EPSG:3857"},
}
GROUND_M = {"native": 0.5, "warped": 0.6}


class Stopwatch:
    """Exclusive wall and processor seconds of named stages, over all threads."""

    def __init__(self) -> None:
        self.wall_s: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.cpu_s: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._local, self._lock = threading.local(), threading.Lock()

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time is added to `stage`; calls into other stages are taken off."""

        def call(*args: Any, **options: Any) -> Any:
            inner: list[list[float]] = self._local.__dict__.setdefault("inner", [])
            inner.append([0.0, 0.0])
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **options)
            finally:
                took = time.perf_counter() - wall, time.thread_time() - cpu
                nested = inner.pop()
                if inner:
                    inner[-1][0] += took[0]
                    inner[-1][1] += took[1]
                with self._lock:
                    self.wall_s[stage] += took[0] - nested[0]
                    self.cpu_s[stage] += took[1] - nested[1]

        return call


@contextmanager
def watching() -> Iterator[Stopwatch]:
    """Within it, the functions of `STAGES` are timed."""
    watch, undo = Stopwatch(), []
    try:
        for stage, places in STAGES.items():
            for place in places:
                module, _, path = place.partition(":")
                *holders, name = path.split(".")
                holder = import_module(module)
                for part in holders:
                    holder = getattr(holder, part)
                original = getattr(holder, name)
                undo.append((holder, name, original))
                setattr(holder, name, watch.timed(stage, original))
        yield watch
    finally:
        for holder, name, original in reversed(undo):
            setattr(holder, name, original)


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each stage for one image."""
    import canopy
    from canopy.inference.options import OneMapOptions
    from canopy.inference.predict import prepare

    model = common.cheap_model() if case["model"] == "cheap" else canopy.load_model(case["model"])
    job = prepare(
        OneMapOptions(images=(case["image"],), out=case["to"], overwrite=True, device="cpu"), model=model
    )
    clock = common.Clock()
    with watching() as watch:
        summary = job.run().summary
    whole = clock.read()
    # The network's own threads are in nobody's thread time: what no other stage used is the network's.
    others = sum(seconds for stage, seconds in watch.cpu_s.items() if stage != "predict")
    cpu_s = watch.cpu_s | {"predict": max(watch.cpu_s["predict"], whole["cpu_s"] - others)}
    return whole | {"pixels": summary.pixels, "stage_wall_s": watch.wall_s, "stage_cpu_s": cpu_s}


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of one run."""
    rows = []
    for stage in STAGES:
        wall, cpu = found["stage_wall_s"][stage], found["stage_cpu_s"][stage]
        rows.append(_row(stage, wall, cpu, found))
    rest = sum(row["cpu s"] for row in rows if row["stage"] != "predict")
    rows.append(_row("all but predict", None, rest, found))
    rows.append(_row("the run", found["wall_s"], found["cpu_s"], found))
    return rows


def _row(stage: str, wall: float | None, cpu: float, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "stage": stage,
        "wall s": wall,
        "% of wall": None if wall is None else 100 * wall / found["wall_s"],
        "cpu s": cpu,
        "% of cpu": 100 * cpu / found["cpu_s"],
        "cpu s/Mpx": cpu / (found["pixels"] / 1e6),
    }


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", type=int, default=1536, help="side of the map, pixels")
    parser.add_argument("--model", default="default", help="cheap, or what canopy.load_model takes")
    parser.add_argument("--dir", help="where images and maps go; default: a temporary folder")
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(run_case(json.loads(options.child))))
        return
    results = {}
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        for name, kind in IMAGES.items():
            image = Path(folder) / f"{name}.tif"
            side = round(options.size * 0.5 / GROUND_M[name])
            common.make_image(image, side, **kind)
            case = {"image": str(image), "to": str(Path(folder) / "chm.tif"), "model": options.model}
            found = results[name] = common.alone(__file__, case)
            title = f"{name}: {kind}, map of {found['pixels'] / 1e6:.1f} Mpx, model {options.model}"
            common.show(title, rows_of(found))
    common.save(options.out, "stages", {"size": options.size, "model": options.model}, results)


if __name__ == "__main__":
    sys.exit(main())
