"""One self-contained HTML page: headings, paragraphs, tables and inline pictures; nothing is loaded from
anywhere.

The page of `canopy evaluate`: report.html, which needs nothing else, and its pictures as PNG files.

The files of a judgement: metrics.json, one table per way of cutting, one of blocks, and the report.
"""

from __future__ import annotations

import base64
import csv
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from canopy.errors import InputError
from canopy.evaluation import figures
from canopy.evaluation.scores import BlockTable, Evaluation, Preview, Score, Scores
from canopy.files import replacing, told_as_output

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: #20262b;
  background: #fff; margin: 0 auto; padding: 1.5rem 1.2rem 4rem; max-width: 62rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; border-bottom: 2px solid #d8dde0; padding-bottom: .2rem; }
p.lead { color: #47525a; margin: 0 0 1rem; }
p, li { max-width: 48rem; }
table { border-collapse: collapse; margin: .6rem 0 1rem; font-size: .92rem; font-variant-numeric:
tabular-nums; } caption { text-align: left; color: #47525a; font-size: .9rem; padding-bottom: .3rem; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid #e1e5e7; text-align: right; vertical-align: top; }
th { background: #f3f5f6; font-weight: 600; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td { white-space: nowrap; }
td.text { white-space: normal; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
figure { margin: 1rem 0 1.4rem; }
figure img { max-width: 100%; height: auto; }
figcaption { color: #47525a; font-size: .9rem; max-width: 48rem; }
ul.notes { background: #fff6e0; border-left: 4px solid #e69f00; padding: .7rem 1rem .7rem 2rem; margin: 1rem
0; } .small { color: #47525a; font-size: .85rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  .wide { overflow: visible; }
  table { font-size: 8.5pt; }
  th, td { padding: .15rem .4rem; }
  @page { margin: 15mm; }
}
"""


class Page:
    """Collects parts in reading order; `html()` gives the document."""

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]
        if lead:
            self._parts.append(f'<p class="lead">{escape(lead)}</p>')

    def heading(self, text: str) -> None:
        """A section's heading."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str, small: bool = False) -> None:
        """A paragraph."""
        opening = '<p class="small">' if small else "<p>"
        self._parts.append(f"{opening}{escape(text)}</p>")

    def notes(self, notes: Iterable[str]) -> None:
        """A marked list; nothing where there is none."""
        items = "".join(f"<li>{escape(note)}</li>" for note in notes)
        if items:
            self._parts.append(f'<ul class="notes">{items}</ul>')

    def table(
        self,
        headers: Sequence[str],
        rows: Iterable[Sequence[Any]],
        caption: str = "",
        text_columns: Iterable[int] = (),
    ) -> None:
        """A table; the first column and `text_columns` are left-aligned, None is a dash."""
        style = ['class="text"' if i in set(text_columns) else "" for i in range(len(headers))]

        def line(tag: str, cells: Sequence[Any]) -> str:
            marked = (
                f"<{tag} {how}".rstrip() + f">{escape(cell_text(c))}</{tag.split()[0]}>"
                for how, c in zip(style, cells, strict=True)
            )
            return f"<tr>{''.join(marked)}</tr>"

        head = line('th scope="col"', headers)
        body = "".join(line("td", row) for row in rows)
        title = f"<caption>{escape(caption)}</caption>" if caption else ""
        self._parts.append(
            f'<div class="wide"><table>{title}<thead>{head}</thead><tbody>{body}</tbody></table></div>'
        )

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Nested plain data as a two-column table, names joined by dots."""
        self.table(["fact", "value"], list(_flat(facts)), text_columns=(1,))

    def figure(self, png: bytes, caption: str, alt: str) -> None:
        """A picture, embedded."""
        data = base64.b64encode(png).decode("ascii")
        self._parts.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{escape(alt)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def html(self) -> str:
        """The whole document."""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
            + "\n".join(self._parts)
            + "\n</body>\n</html>\n"
        )


def cell_text(value: Any) -> str:
    """A value as a person reads it: numbers with about four digits, None as a dash."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number_text(value)
    return str(value)


def number_text(value: float) -> str:
    """
    >>> number_text(12345.6), number_text(3.14159), number_text(-0.0004)
    ('12,346', '3.14', '0.00')
    """
    if value != value:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"
    return text.removeprefix("-") if not float(text) else text


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in facts.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            for i, part in enumerate(value, 1):
                yield from _flat(part, f"{name}.{i}.")
        elif isinstance(value, list | tuple):
            yield name, ", ".join(cell_text(part) for part in value) or "-"
        else:
            yield name, cell_text(value)


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


METRICS = "metrics.json"


def check_folder(out: str | Path, overwrite: bool) -> Path:
    """A folder that results may go to. Raises InputError, before any work."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError("a file", where=folder, expected="a folder")
    if (folder / METRICS).exists() and not overwrite:
        raise InputError("holds an evaluation already", where=folder, remedy="use --overwrite to replace it")
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError("the folder cannot be written to", where=parent)
    return folder


def write_results(result: Evaluation, out: str | Path) -> list[Path]:
    """Write everything into the folder `out`, metrics.json last; returns the files.

    Raises OutputError when the disk refuses.
    """
    folder = Path(out)
    with told_as_output(folder):
        folder.mkdir(parents=True, exist_ok=True)
        written = [write_tables(result, folder), *_strata_tables(result, folder)]
        written.append(_write_csv(folder / "blocks.csv", *_block_rows(result)))
        # The page and its figures are made by a module of their own.
        if importlib.util.find_spec("canopy.evaluation.report") is not None:
            report = importlib.import_module("canopy.evaluation.report")
            report.write_report(result, folder)
        written.append(_write_text(folder / METRICS, json.dumps(result.to_dict(), indent=2, allow_nan=False)))
    return written


def write_tables(result: Evaluation, folder: Path) -> Path:
    """scores.csv: every metric, plain and with the shift undone, with its interval."""
    rows = list(_score_rows("overall", result.overall))
    if result.corrected is not None:
        rows += _score_rows("shift undone", result.corrected)
    return _write_csv(folder / "scores.csv", ("scores", "metric", "value", "low95", "high95", "note"), rows)


def _score_rows(name: str, scores: Scores) -> Iterator[list[Any]]:
    for metric, score in scores.metrics.items():
        yield [name, metric, *_cells(score), score.note]
    for part in scores.by_height:
        for metric, score in part.scores.items():
            yield [name, f"{metric} at {part.name} m", *_cells(score), score.note]


def _cells(score: Score) -> list[float | None]:
    low, high = score.ci95 or (None, None)
    return [score.value, low, high]


def _strata_tables(result: Evaluation, folder: Path) -> Iterator[Path]:
    """by_NAME.csv: a row per stratum, three columns per metric."""
    ways = dict.fromkeys(stratum.by for stratum in result.strata)
    for by in ways:
        parts = [s for s in result.strata if s.by == by]
        metrics = list(dict.fromkeys(name for part in parts for name in part.scores.metrics))
        head = [by, *(h for m in metrics for h in ((m,) if m == "n" else (m, f"{m}_low95", f"{m}_high95")))]
        rows = []
        for part in parts:
            row: list[Any] = [part.name]
            for metric in metrics:
                cells = _cells(part.scores.metrics.get(metric, Score(None)))
                row += cells[:1] if metric == "n" else cells
            rows.append(row)
        yield _write_csv(folder / f"by_{_file_name(by)}.csv", head, rows)


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in text)[:60]


def _block_rows(result: Evaluation) -> tuple[Sequence[str], Iterator[list[Any]]]:
    table = result.blocks
    names = (
        "west",
        "south",
        "east",
        "north",
        "lon",
        "lat",
        "n",
        "map_mean_m",
        "reference_mean_m",
        "bias_m",
        "mae_m",
    )
    head = ("site", "crs", *names)
    columns = [getattr(table, name).tolist() for name in names]
    sites = [table.sites[i] for i in table.site.tolist()]
    crs = [table.crs[min(i, len(table.crs) - 1)] for i in table.site.tolist()]
    return head, ([*row] for row in zip(sites, crs, *columns, strict=True))


def _write_csv(path: Path, head: Sequence[str], rows: Any) -> Path:
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows([_plain(cell) for cell in row] for row in rows)
    return path


def _plain(cell: Any) -> Any:
    return f"{cell:.6g}" if isinstance(cell, float) and abs(cell) < 1e4 else cell


def _write_text(path: Path, text: str) -> Path:
    with replacing(path) as part:
        part.write_text(text + "\n", encoding="utf-8")
    return path
