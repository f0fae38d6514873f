"""The server of `canopy serve`: a page, tiles and answers, to this computer alone.

Only 127.0.0.1 is listened on, requests that name another host are refused (a page elsewhere could point its
own name at this address), and no name from a request is ever opened: layers go by number, and the page's own
files are those of one folder.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable
from typing import Any

import numpy as np

from canopy.errors import CanopyError, ConfigError, require
from canopy.viewer.page import STATIC, View
from canopy.viewer.tiles import MAX_ZOOM, height_png, image_webp

HOST = "127.0.0.1"
DEFAULT_PORT = 8000
_PORTS_TRIED = 50
EXTRA = "canopy-height[serve]"
PROFILE_POINTS = 400
MOST_VERTICES = 2000
# Pixels in a polygon's frame: more is a job for `canopy stats`, which shows its progress.
MOST_ZONE_PX = 4e8
_MOST_BODY_BYTES = 1_000_000


def make_app(view: View) -> Any:
    """The ASGI application for a view. Raises MissingDependencyError without the extra `serve`."""
    require("the local web map", EXTRA, "starlette", "uvicorn")
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    config = view.config()

    def place(request: Request) -> tuple[int, int, int]:
        zoom, x, y = (request.path_params[name] for name in ("z", "x", "y"))
        if zoom > MAX_ZOOM or max(x, y) >= 2**zoom:
            raise HTTPException(404, "no such tile")
        return zoom, x, y

    def heights(request: Request) -> Response:
        number = request.path_params["layer"]
        if number >= len(view.layers):
            raise HTTPException(404, "no such layer")
        return Response(height_png(view.layers[number].pyramid.tile(*place(request))), media_type="image/png")

    def image(request: Request) -> Response:
        if view.image is None:
            raise HTTPException(404, "no image")
        return Response(image_webp(view.image.pyramid.tile(*place(request))), media_type="image/webp")

    def ask(answer: Callable[[View, list[tuple[float, float]]], Any]) -> Callable[[Request], Any]:
        """A question about points, which come as JSON: [[longitude, latitude], ...]."""

        async def asked(request: Request) -> Response:
            if int(request.headers.get("content-length") or _MOST_BODY_BYTES + 1) > _MOST_BODY_BYTES:
                raise HTTPException(413, "too much at once")
            points = _points(await request.body())
            return JSONResponse(await run_in_threadpool(answer, view, points))

        return asked

    def refused(_: Request, error: Exception) -> Response:
        code = error.status_code if isinstance(error, HTTPException) else 400
        text = error.detail if isinstance(error, HTTPException) else str(error)
        return JSONResponse({"error": text}, code)

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        async def sender(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_headers(config)]
            await send(message)

        await routes(scope, receive, sender)

    routes = Starlette(
        routes=[
            Route("/config.json", lambda _: JSONResponse(config)),
            Route("/heights/{layer:int}/{z:int}/{x:int}/{y:int}.png", heights),
            Route("/image/{z:int}/{x:int}/{y:int}.webp", image),
            Route("/point", ask(_point), methods=["POST"]),
            Route("/profile", ask(_profile), methods=["POST"]),
            Route("/zone", ask(_zone), methods=["POST"]),
            Mount("/", StaticFiles(directory=STATIC, html=True)),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
        exception_handlers={HTTPException: refused, CanopyError: refused},
    )
    return guarded


def _headers(config: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    """The page may load from this server, and pictures of the base maps on offer; nobody may embed it."""
    hosts = {base["template"].split("{")[0].rsplit("/", 1)[0] for base in config["bases"]}
    origins = sorted({"/".join(host.split("/")[:3]) for host in hosts})
    policy = (
        f"default-src 'self'; img-src 'self' data: blob: {' '.join(origins)}; "
        "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
    )
    return [
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"cache-control", b"no-cache"),
    ]


# ---- questions ------------------------------------------------------------------------------------
def _points(body: bytes) -> list[tuple[float, float]]:
    """Points of a request. Raises ConfigError for anything else."""
    try:
        points = [(float(lon), float(lat)) for lon, lat in json.loads(body)]
    except (TypeError, ValueError):
        raise ConfigError("not a list of points", expected="[[longitude, latitude], ...]") from None
    if not 1 <= len(points) <= MOST_VERTICES:
        raise ConfigError(f"{len(points)} points", expected=f"1 to {MOST_VERTICES}")
    if not all(abs(lon) <= 180 and abs(lat) <= 90 for lon, lat in points):
        raise ConfigError("a point beyond the Earth", expected="degrees, longitude first")
    return points


def _point(view: View, points: list[tuple[float, float]]) -> list[dict[str, Any]]:
    return [layer.point(*points[0]) for layer in view.layers]


def _profile(view: View, points: list[tuple[float, float]]) -> dict[str, Any]:
    """Heights at even steps along a line: metres from its start, and per map metres or None."""
    from canopy.geo.crs import geod_of, to_crs
    from canopy.viewer.layers import LONLAT

    geod = geod_of(to_crs(LONLAT))
    lons, lats = np.array(points).T
    lengths = geod.line_lengths(lons, lats)
    along = np.concatenate([[0], np.cumsum(lengths)])
    finest = min(layer.heights.gsd_m for layer in view.layers)
    steps = int(min(max(along[-1] / finest, 1), PROFILE_POINTS - 1)) + 1
    at = np.linspace(0, along[-1], steps)
    # Straight in degrees between two vertices, as close to the geodesic as a screen can show.
    lon, lat = np.interp(at, along, lons), np.interp(at, along, lats)
    series = []
    for layer in view.layers:
        values, valid = layer.sample(lon, lat)
        series.append([float(v) if ok else None for v, ok in zip(values[0], valid, strict=True)])
    return {"m": at.tolist(), "lon": lon.tolist(), "lat": lat.tolist(), "heights_m": series}


def _zone(view: View, points: list[tuple[float, float]]) -> list[dict[str, Any]]:
    """The numbers of `canopy stats` for a ring, per map."""
    if len(points) < 3:
        raise ConfigError(f"{len(points)} points", expected="three or more")
    lons, lats = np.array(points).T
    side = 111_320.0
    m2 = np.ptp(lons) * side * math.cos(math.radians(lats.mean())) * np.ptp(lats) * side
    for layer in view.layers:
        if m2 / layer.heights.gsd_m**2 > MOST_ZONE_PX:
            raise ConfigError(
                f"a polygon of some {m2 / 1e6:,.0f} km2", expected="less here",
                remedy="canopy stats MAP --zones FILE takes polygons of any size",
            )  # fmt: skip
    return [layer.zone(points) for layer in view.layers]


# ---- running --------------------------------------------------------------------------------------
def listen(port: int | None) -> socket.socket:
    """A socket on 127.0.0.1: the port, or where none was asked for the first free one from 8000 on.

    Raises ConfigError where the port is taken.
    """
    tried = [port] if port is not None else range(DEFAULT_PORT, DEFAULT_PORT + _PORTS_TRIED)
    for number in tried:
        here = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            here.bind((HOST, number))
            here.listen()  # whoever is told the address may call at once
            return here
        except OSError as error:
            here.close()
            reason = error.strerror
    raise ConfigError(
        f"port {port or f'{DEFAULT_PORT} to {tried[-1]}'} cannot be had ({reason})", where="--port",
        remedy="leave --port out for the next free one" if port else "name a free one with --port",
    )  # fmt: skip


def run(view: View, here: socket.socket, open_at: str | None = None) -> None:
    """Serve until Ctrl-C; `open_at` is the address to show in the browser."""
    import contextlib
    import threading
    import webbrowser

    import uvicorn

    server = uvicorn.Server(uvicorn.Config(make_app(view), log_level="warning", timeout_graceful_shutdown=1))
    if open_at:
        threading.Timer(0.5, webbrowser.open, [open_at]).start()
    with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again once it has ended
        server.run(sockets=[here])
