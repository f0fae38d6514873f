"""The page of `canopy evaluate`: report.html, which needs nothing else, and its pictures as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from canopy.evaluation import figures
from canopy.evaluation.page import Page, number_text
from canopy.evaluation.result import BlockTable, Evaluation, Preview, Score, Scores
from canopy.files import replacing

# Pages of a hundred sites stay readable: the largest references are drawn, the rest are in the tables.
SHOWN_PREVIEWS = 4
SHOWN_BLOCKS = 8
STRIP_BLOCKS = 3
# A block with fewer pixels than this share of the fullest one ranks nowhere: its mean says little.
RANKED_SHARE = 0.25
# A block smaller than this in the picture shows nothing.
STRIP_PX = 12
LABELS = {
    "n": "pixels or samples",
    "mae_m": "mean absolute error (m)",
    "rmse_m": "root mean square error (m)",
    "bias_m": "bias, map - reference (m)",
    "r2": "R2",
    "r": "correlation r",
    "nmae": "relative error above 2 m (nMAE)",
    "nmae_plus1": "the same, divided by 1 + height",
    "block_r2": "block-R2 (50 x 50 px)",
    "edge_error": "edge error",
    "edge_error_symmetric": "edge error, symmetric",
    "interval_coverage": "share inside the map's interval",
    "interval_width_m": "mean width of that interval (m)",
}
_STRATUM = ("n", "mae_m", "bias_m", "rmse_m", "r2", "r", "cover_iou_2m")


def write_report(result: Evaluation, folder: str | Path) -> list[Path]:
    """Write report.html and figures/*.png into an existing folder; returns the files.

    The page carries its pictures inside; the PNG files are the same ones for other documents.
    """
    folder = Path(folder)
    (folder / "figures").mkdir(exist_ok=True)
    book = _Figures()
    text = report(result, book)
    written = [_replace(folder / "figures" / f"{name}.png", data) for name, data in book.drawn.items()]
    return [*written, _replace(folder / "report.html", text.encode("utf-8"))]


def _replace(path: Path, data: bytes) -> Path:
    with replacing(path) as part:
        part.write_bytes(data)
    return path


class _Figures:
    """The pictures of a page by file name."""

    def __init__(self) -> None:
        self.drawn: dict[str, bytes] = {}

    def put(self, page: Page, name: str, png: bytes, caption: str, alt: str) -> None:
        self.drawn[name] = png
        page.figure(png, caption, alt)


def report(result: Evaluation, book: _Figures | None = None) -> str:
    """The page as HTML."""
    book = book or _Figures()
    page = Page("Canopy height map: how good is it here?", _lead(result))
    page.notes(result.notes)
    _headline(page, result)
    _by_height(page, result, book)
    _pictures(page, result, book)
    _blocks(page, result, book)
    _strata(page, result)
    page.heading("Provenance")
    page.facts(result.provenance)
    return page.html()


# ---- sections -------------------------------------------------------------------------------------
def _lead(result: Evaluation) -> str:
    facts = result.provenance
    reference = facts.get("reference") or [{}]
    name = facts.get("map", {}).get("name") or f"{len(facts.get('map', {}).get('maps', []))} maps"
    against = str(reference[0].get("name", result.kind))
    more = int(facts.get("references", len(reference))) - 1
    what = {"chm": "height raster", "gedi": "GEDI shots", "plots": "field plots"}.get(
        result.kind, result.kind
    )
    return (
        f"{name} against {against}{f' and {more} more' if more > 0 else ''} ({what}). "
        f"{str(facts.get('rule', '')).capitalize()}."
    )


def _headline(page: Page, result: Evaluation) -> None:
    page.heading("Scores")
    corrected = result.corrected is not None and result.corrected is not result.overall
    headers = ["metric", "value", "95 % interval"] + (["shift undone", "95 % interval"] if corrected else [])
    rows = []
    for name, score in result.overall.metrics.items():
        row = [label(name), _value(name, score), _interval(score)]
        if corrected and result.corrected is not None:
            other = result.corrected.metrics.get(name, Score(None))
            row += [_value(name, other), _interval(other)]
        rows.append(row)
    page.table(headers, rows, caption=_how_certain(result), text_columns=())
    page.text(_shift_text(result))
    absent = dict.fromkeys(
        f"{label(name)}: {score.note}" for name, score in result.overall.metrics.items() if score.note
    )
    if absent:
        page.text("; ".join(absent) + ".", small=True)


def _how_certain(result: Evaluation) -> str:
    bootstrap = result.provenance.get("bootstrap") or {}
    if not bootstrap.get("replicates"):
        return ""
    return (
        f"Intervals: bootstrap of {bootstrap['replicates']} draws over "
        f"{bootstrap.get('blocks_with_data', '?')} blocks of "
        f"{number_text(float(bootstrap.get('block_m', 0)))} m."
    )


def _shift_text(result: Evaluation) -> str:
    shift = result.shift
    if shift is None:
        return f"Shift between map and reference: not measured ({result.shift_note or 'no reason given'})."
    east = f"{abs(shift.east_m):.1f} m {'east' if shift.east_m >= 0 else 'west'}"
    north = f"{abs(shift.north_m):.1f} m {'north' if shift.north_m >= 0 else 'south'}"
    text = (
        f"The map lies {east} and {north} of the reference (structures correlate {shift.fit:.2f} there, "
        f"{shift.fit_unshifted:.2f} unshifted; {shift.windows} windows)."
    )
    if not shift.sure:
        text += f" This is not sure ({shift.note or 'weak fit'}), so nothing was undone."
    return text


def _by_height(page: Page, result: Evaluation, book: _Figures) -> None:
    page.heading("By reference height")
    rows = height_rows(result.overall)
    book.put(
        page, "error_by_height", figures.error_by_height(rows, "reference height (m)"),
        "Bias and mean absolute error by reference height with 95 % intervals, over the share of pixels. "
        "A map that shrinks towards its mean is too high on the left and too low on the right.",
        "Error by reference height",
    )  # fmt: skip
    table = [
        (f"{part.name} m", *(_cell(part.scores.get(k)) for k in ("n", "bias_m", "mae_m", "rmse_m")))
        for part in result.overall.by_height
    ]
    page.table(["reference height", "n", "bias (m)", "MAE (m)", "RMSE (m)"], table)
    book.put(
        page, "density", figures.density(
            result.joint.counts, result.joint.edges_m, "reference height (m)", "map height (m)"
        ),
        "How often which pair of heights occurs.", "Density of map heights over reference heights",
    )  # fmt: skip


def height_rows(scores: Scores) -> list[dict[str, Any]]:
    """Rows for `figures.error_by_height`."""

    def triple(score: Score | None) -> tuple[float | None, float | None, float | None] | None:
        if score is None or score.value is None:
            return None
        return (score.value, *(score.ci95 or (None, None)))

    return [
        {
            "name": part.name,
            "n": int((part.scores["n"].value or 0) if "n" in part.scores else 0),
            "bias": triple(part.scores.get("bias_m")),
            "mae": triple(part.scores.get("mae_m")),
        }
        for part in scores.by_height
    ]


def _pictures(page: Page, result: Evaluation, book: _Figures) -> None:
    page.heading("Where")
    samples = result.samples
    if samples is not None and len(samples.lon):
        book.put(
            page, "samples", figures.points_map(
                samples.lon, samples.lat, samples.map_m - samples.reference_m, "map - reference (m)"
            ),
            "Every sample at its place. Orange: the map is too high. Purple: too low.",
            "Map of sample errors",
        )  # fmt: skip
    largest = sorted(result.previews, key=lambda p: -int(np.isfinite(p.map_m).sum()))[:SHOWN_PREVIEWS]
    for index, preview in enumerate(largest, 1):
        number = f"_{index}" if len(largest) > 1 else ""
        book.put(
            page, f"side_by_side{number}", figures.side_by_side(
                preview.reference_m, preview.map_m, ("reference", "map"), preview.gsd_m
            ),
            f"{preview.site}: reference and map with one colour scale; grey is not scored.",
            f"Reference and map at {preview.site}",
        )  # fmt: skip
        book.put(
            page, f"error_map{number}",
            figures.difference_map(preview.error_m, "map - reference (m)", preview.gsd_m),
            f"{preview.site}: error. Orange: the map is too high. Purple: too low.",
            f"Map of the errors at {preview.site}",
        )  # fmt: skip
    if len(result.previews) > len(largest):
        page.text(f"Drawn: the largest {len(largest)} of {len(result.previews)} references.", small=True)


def _blocks(page: Page, result: Evaluation, book: _Figures) -> None:
    blocks = result.blocks
    if len(blocks) < 2:
        return
    page.heading(f"Best and worst blocks of {number_text(float(blocks.side_m))} m")
    order = ranked(blocks)
    shown = min(SHOWN_BLOCKS, len(order) // 2)
    headers = ["site", "longitude", "latitude", "n", "reference (m)", "map (m)", "bias (m)", "MAE (m)"]
    for title, chosen in (("Best", order[:shown]), ("Worst", order[::-1][:shown])):
        rows = [_block_row(blocks, int(i)) for i in chosen]
        page.table(headers, rows, caption=f"{title} by mean absolute error. All blocks are in blocks.csv.")
        strips = [s for s in (strip(result, int(i)) for i in chosen) if s is not None][:STRIP_BLOCKS]
        if strips:
            book.put(
                page, f"{title.lower()}_blocks", figures.block_strip(strips, ("map", "reference", "error")),
                f"{title} blocks, one scale for both heights.", f"{title} blocks: map, reference, error",
            )  # fmt: skip


def ranked(blocks: BlockTable) -> np.ndarray:
    """Indexes of the blocks with enough pixels, best MAE first."""
    enough = np.flatnonzero(blocks.n >= RANKED_SHARE * blocks.n.max())
    return enough[np.argsort(blocks.mae_m[enough], kind="stable")]


def _block_row(blocks: BlockTable, i: int) -> list[Any]:
    return [
        blocks.sites[int(blocks.site[i])], f"{blocks.lon[i]:.5f}", f"{blocks.lat[i]:.5f}", int(blocks.n[i]),
        float(blocks.reference_mean_m[i]), float(blocks.map_mean_m[i]), float(blocks.bias_m[i]),
        float(blocks.mae_m[i]),
    ]  # fmt: skip


def strip(result: Evaluation, i: int) -> tuple[str, np.ndarray, np.ndarray] | None:
    """(caption, map, reference) of a block out of its preview; None where it is too small there to show."""
    blocks = result.blocks
    middle = (blocks.west[i] + blocks.east[i]) / 2, (blocks.south[i] + blocks.north[i]) / 2
    preview = _preview_at(result.previews, blocks.sites[int(blocks.site[i])], middle)
    if preview is None:
        return None
    west, south, east, north = preview.bounds
    height, width = preview.map_m.shape
    x = [(v - west) / (east - west) * width for v in (blocks.west[i], blocks.east[i])]
    y = [(north - v) / (north - south) * height for v in (blocks.north[i], blocks.south[i])]
    rows = slice(max(0, round(y[0])), min(height, round(y[1])))
    cols = slice(max(0, round(x[0])), min(width, round(x[1])))
    part = preview.map_m[rows, cols], preview.reference_m[rows, cols]
    if min(part[0].shape) < STRIP_PX or not np.isfinite(part[0]).any():
        return None
    return f"MAE {blocks.mae_m[i]:.1f} m", *part


def _preview_at(previews: Sequence[Preview], site: str, xy: tuple[float, float]) -> Preview | None:
    """The preview of a site that holds a point: several references may share a site's name."""
    for preview in previews:
        west, south, east, north = preview.bounds
        if preview.site == site and west <= xy[0] <= east and south <= xy[1] <= north:
            return preview
    return None


def _strata(page: Page, result: Evaluation) -> None:
    for by in dict.fromkeys(stratum.by for stratum in result.strata):
        page.heading(f"By {by}")
        names = [
            name for name in _STRATUM if any(name in s.scores.metrics for s in result.strata if s.by == by)
        ]
        rows = []
        for stratum in result.strata:
            if stratum.by != by:
                continue
            metrics: Mapping[str, Score] = stratum.scores.metrics
            mae = metrics.get("mae_m", Score(None))
            row: list[Any] = [stratum.name]
            for name in names:
                row.append(_value(name, metrics.get(name, Score(None))))
                if name == "mae_m":
                    row.append(_interval(mae))
            rows.append(row)
        headers = [by]
        for name in names:
            headers.append(label(name))
            if name == "mae_m":
                headers.append("95 % interval")
        page.table(headers, rows)


# ---- words ----------------------------------------------------------------------------------------
def label(name: str) -> str:
    """A metric's name for people."""
    if name in LABELS:
        return LABELS[name]
    if name.startswith("cover_"):
        what, height = name.removeprefix("cover_").rsplit("_", 1)
        return f"cover above {height.removesuffix('m')} m, {what.replace('iou', 'IoU').replace('f1', 'F1')}"
    if name.startswith("p") and name.endswith("_error_m"):
        return f"error of the {name[1:].split('_')[0]}th height percentile (m)"
    return name.replace("_", " ")


def _value(name: str, score: Score) -> str:
    if score.value is None:
        return "-"
    return f"{int(score.value):,}" if name == "n" else number_text(float(score.value))


def _cell(score: Score | None) -> Any:
    if score is None or score.value is None:
        return None
    return score.value if isinstance(score.value, int) else float(score.value)


def _interval(score: Score) -> str:
    if score.ci95 is None or isinstance(score.value, int):
        return ""
    low, high = score.ci95
    return f"{number_text(float(low))} to {number_text(float(high))}"
