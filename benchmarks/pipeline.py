"""What a map costs beside its network: wall and processor time over pure model time, by kind of source.

    python benchmarks/pipeline.py                              # the default model, 2048 x 2048 px
    python benchmarks/pipeline.py --model FILE --size 5000 --backend torch --sources jpeg http

Sources are a tiled JPEG GeoTIFF, a tiled deflate GeoTIFF, and the JPEG one from an HTTP server on this
machine that answers late and slowly. Every case is a process of its own and runs, in turn: pure forward
passes, the whole job (read, predict, blend, write, finish the COG), pure forward passes again. The ratio is
of the job to the mean of the passes before and after it, at equal numbers of crops.

On a machine that others use too, only the ratio of processor times means something; on a quiet one the ratio
of wall times is the one that counts.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import common

SOURCES = ("jpeg", "deflate", "http")
PURE_CROPS = 16  # forward passes of this many crops stand for all
LEGEND = """\
wall, cpu: of the job over pure forward passes of as many crops, by wall and by processor time (aim: 1.05);
in job: its wall over that of its own passes, which the readers slow down but a change of pace does not move.
wall s, cpu s: of the job; its COG: from the last pixel to the renamed file, overlapped with nothing."""


class Slow(ThreadingHTTPServer):
    """Serves a folder's files with byte ranges: every answer `delay_s` late, bytes at `rate` a second."""

    daemon_threads = True

    def __init__(self, folder: Path, delay_s: float, rate: float) -> None:
        self.folder, self.delay_s, self.rate = folder, delay_s, rate
        self.lock, self.free_at, self.requests, self.sent = threading.Lock(), 0.0, 0, 0
        super().__init__(("127.0.0.1", 0), _Answer)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def wait_for(self, size: int) -> None:
        """Sleep until these bytes have passed a line that all connections share."""
        with self.lock:
            self.requests, self.sent = self.requests + 1, self.sent + size
            self.free_at = max(self.free_at, time.monotonic()) + size / self.rate
            due = self.free_at
        time.sleep(max(0.0, due - time.monotonic()) + self.delay_s)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no news."""


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Slow

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.server.folder / Path(self.path).name
        if not path.is_file():
            self.send_error(404)
            return
        content, wanted = path.read_bytes(), self.headers.get("Range", "")
        first, last = 0, len(content) - 1
        if wanted.startswith("bytes="):
            low, _, high = wanted.removeprefix("bytes=").partition("-")
            first, last = int(low), min(last, int(high or last))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        else:
            self.send_response(200)
        part = content[first : last + 1] if body else b""
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.server.wait_for(len(part))
        self.wfile.write(part)


# ---- one case, in a process of its own -----------------------------------------------------------
def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Pure passes, the job, pure passes."""
    import canopy
    from canopy.inference.engine import kept_memory
    from canopy.inference.options import OneMapOptions
    from canopy.inference.predict import prepare

    model = common.cheap_model() if case["model"] == "cheap" else canopy.load_model(case["model"])
    job = prepare(
        OneMapOptions(images=(case["image"],), out=case["to"], overwrite=True, **case["options"]), model=model
    )
    finishing = _watch_finish()
    with kept_memory():
        before = pure(job)
    clock = common.Clock()
    summary = job.run().summary
    took = clock.read()
    with kept_memory():
        after = pure(job)
    crops = summary.crops_predicted
    alone = {k: crops * (before[k] + after[k]) / 2 for k in before}
    return {
        **took,
        "crops": crops,
        "pixels": summary.pixels,
        "model_wall_s": alone["wall_s"],
        "model_cpu_s": alone["cpu_s"],
        "model_in_run_s": summary.model_seconds,
        "finish": finishing,
        "peak_mb": common.peak_mb(),
    }


def pure(job: Any) -> dict[str, float]:
    """Seconds of one crop in full batches, by wall and by processor."""
    import torch

    from canopy.inference.predictor import Predictor

    request, side = job.options, job.model.config.crop_px
    predictor = Predictor(
        job.model, device=request.device, precision=request.precision, batch_size=request.batch_size,
        extras=job.extras, runner=job.runner,
    )  # fmt: skip
    count = predictor.batch_size
    crops = torch.rand((count, 3, side, side), device=predictor.device)
    predictor(crops)
    clock = common.Clock()
    passes = max(1, PURE_CROPS // count)
    for _ in range(passes):
        predictor(crops)
    _ = predictor.seconds  # waits for a GPU
    return {key: value / (passes * count) for key, value in clock.read().items()}


def _watch_finish() -> dict[str, float]:
    """Times of `CogWriter.close` from now on; filled when it has run."""
    from canopy.geo.cog import CogWriter

    times: dict[str, float] = {}
    close = CogWriter.close

    def timed(self: CogWriter) -> None:
        clock = common.Clock()
        close(self)
        times.update(clock.read())

    CogWriter.close = timed  # type: ignore[method-assign]
    return times


# ---- all cases -----------------------------------------------------------------------------------
def row_of(source: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A table row: medians over the rounds."""
    wall, cpu, model_wall, model_cpu = (
        common.middle(runs, k) for k in ("wall_s", "cpu_s", "model_wall_s", "model_cpu_s")
    )
    finish = {key: common.middle([run["finish"] for run in runs], key) for key in ("wall_s", "cpu_s")}
    return {
        "source": source,
        "Mpx": runs[0]["pixels"] / 1e6,
        "crops": runs[0]["crops"],
        "wall s": wall,
        "cpu s": cpu,
        "wall": wall / model_wall,
        "cpu": cpu / model_cpu,
        "in job": wall / common.middle(runs, "model_in_run_s"),
        "beside, cpu s/Mpx": (cpu - model_cpu) / runs[0]["pixels"] * 1e6,
        "COG s": finish["wall_s"],
        "COG cpu s": finish["cpu_s"],
        "peak MB": common.middle(runs, "peak_mb"),
    }


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="default", help="cheap, or a model's name or file")
    parser.add_argument("--size", type=int, default=2048, help="image side, pixels")
    parser.add_argument("--sources", nargs="+", default=SOURCES, choices=SOURCES)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--delay-ms", type=float, default=50, help="of every answer of the slow server")
    parser.add_argument(
        "--mb-per-s", type=float, default=5, help="of the slow server, all connections together"
    )
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(run_case(json.loads(options.child))))
        return
    with tempfile.TemporaryDirectory() as folder:
        images = {
            kind: common.make_image(Path(folder) / f"{kind}.tif", options.size, compress=kind)
            for kind in ("jpeg", "deflate")
        }
        server = Slow(Path(folder), options.delay_ms / 1000, options.mb_per_s * 1e6)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = {name: str(path) for name, path in images.items()} | {"http": server.url("jpeg.tif")}
        settings = {name: getattr(options, name) for name in ("backend", "device", "precision")}
        case = {"model": options.model, "options": settings}
        cases = {
            name: lambda name=name: common.alone(
                __file__, case | {"image": where[name], "to": str(Path(folder) / f"{name}-map.tif")}
            )
            for name in options.sources
        }
        found = common.in_turn(cases, options.rounds)
        server.shutdown()
    rows = [row_of(name, runs) for name, runs in found.items()]
    title = (
        f"Pipeline: {options.model}, {options.size} x {options.size} px, {options.backend}, {options.device}"
    )
    slow = f"http: {options.delay_ms:g} ms, {options.mb_per_s:g} MB/s; {server.requests} requests, "
    common.show(title, rows, [LEGEND, f"{slow}{server.sent / 1e6:.1f} MB"])
    kept = {key: value for key, value in vars(options).items() if key not in ("out", "child")}
    common.save(options.out, "pipeline", kept, {"rows": rows, "runs": found})


if __name__ == "__main__":
    sys.exit(main())
