"""`canopy serve --export`: the page as a folder of plain files for any web space, tiles and all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from canopy.errors import InputError
from canopy.files import check_output, told_as_output, write_json
from canopy.runtime import NoProgress, Progress
from canopy.viewer.page import STATIC, View
from canopy.viewer.tiles import Pixels, Pyramid, height_png, image_webp, tile_at, tile_grid, tiles_in

# Some 200 MB; a page of more is no page.
MOST_TILES = 6000


def export(
    view: View,
    out: str | Path,
    inputs: Sequence[object] = (),
    *,
    overwrite: bool = False,
    most_tiles: int = MOST_TILES,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the page of a view into a folder, whole or not at all.

    The finest zooms are left out until no more than `most_tiles` tiles remain; the page then shows and tells
    means of the map's pixels, and says so.

    Args:
        view: what to show.
        out: the folder; new or empty, or with `overwrite` an earlier export.
        inputs: what the view was opened from, which is never written over.

    Returns:
        folder, tiles, bytes, gsd_m (ground metres of the finest tiles) and notes, JSON-ready.

    Raises:
        InputError: the folder cannot be used. OutputError: it cannot be written; nothing is left then.
    """
    (folder,) = check_output(out, inputs, overwrite=overwrite, folder=True)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "viewer.js").is_file():
        raise InputError("holds something other than an exported page", where=folder, expected="a new folder")
    config = view.config() | {"static": True}
    shown = [*zip(view.layers, config["layers"], strict=True)]
    jobs: list[tuple[Pyramid, dict[str, Any], str, Callable[[Pixels | None], bytes]]] = [
        (layer.pyramid, about, f"heights/{number}/{{}}/{{}}/{{}}.png", height_png)
        for number, (layer, about) in enumerate(shown)
    ]
    if view.image is not None:
        jobs.append((view.image.pyramid, config["image"], "image/{}/{}/{}.webp", image_webp))
    while (count := sum(len(_tiles(about)) for _, about, _, _ in jobs)) > most_tiles:
        deepest = max(about["max_zoom"] for _, about, _, _ in jobs)
        for _, about, _, _ in jobs:
            about["max_zoom"] = min(about["max_zoom"], deepest - 1)
            about["min_zoom"] = min(about["min_zoom"], about["max_zoom"])
    notes = []
    for layer, about in shown:
        west, south, east, north = about["bounds"]
        middle = tile_at((west + east) / 2, (south + north) / 2, about["max_zoom"])
        about["gsd_m"] = tile_grid(about["max_zoom"], *middle).gsd_m
        if about["max_zoom"] < layer.pyramid.deepest:
            notes.append(
                f"{layer.name}: heights are means over {about['gsd_m']:.2g} m; the map's own pixels "
                f"of {layer.heights.gsd_m:.2g} m would be too many for a page"
            )
            about["notes"].append(notes[-1])
    progress = progress or NoProgress()
    progress.start(count, "tiles")
    with told_as_output(folder):
        size = _write(folder, config, jobs, progress)
    return {
        "folder": str(folder), "tiles": count, "bytes": size, "gsd_m": config["layers"][0]["gsd_m"],
        "notes": notes,
    }  # fmt: skip


def _tiles(about: dict[str, Any]) -> list[tuple[int, int, int]]:
    """(zoom, x, y) of a layer's tiles, the finest first, since coarse ones may be made of them."""
    zooms = range(about["max_zoom"], about["min_zoom"] - 1, -1)
    return [(zoom, x, y) for zoom in zooms for x, y in tiles_in(about["bounds"], zoom)]


def _write(
    folder: Path, config: dict[str, Any], jobs: Sequence[tuple[Pyramid, dict[str, Any], str, Any]],
    progress: Progress,
) -> int:  # fmt: skip
    """Write beside `folder` under a hidden name, then take its name; returns the bytes written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        part.chmod(0o755)
        shutil.copytree(STATIC, part, dirs_exist_ok=True)
        write_json(part / "config.json", config)
        for pyramid, about, name, encode in jobs:
            for at in _tiles(about):
                path = part / name.format(*at)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode(pyramid.tile(*at)))
                progress.advance()
        size = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
        if folder.is_dir():
            shutil.rmtree(folder)
        part.rename(folder)
        return size
    finally:
        shutil.rmtree(part, ignore_errors=True)
