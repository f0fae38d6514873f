"""What `canopy evaluate` and `canopy compare` leave behind: JSON, tables, figures and report.html."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy.evaluation import figures
from canopy.evaluation.scores import Evaluation, HeightBin, Score, Scores
from canopy.files import check_output, replacing, told_as_output, write_json

if TYPE_CHECKING:
    import pandas

METRICS = "metrics.json"
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
COMPARED = {
    "n": "pixels valid in both",
    "area_ha": "their ground area (ha)",
    "mean_a_m": "mean height, A (m)",
    "mean_b_m": "mean height, B (m)",
    "mean_difference_m": "mean of B - A (m)",
    "mean_absolute_difference_m": "mean absolute difference (m)",
    "rms_difference_m": "root mean square difference (m)",
    "r": "correlation",
    "p05_difference_m": "5th percentile of B - A (m)",
    "p50_difference_m": "median of B - A (m)",
    "p95_difference_m": "95th percentile of B - A (m)",
    "within_1m": "within 1 m of each other",
    "within_2m": "within 2 m of each other",
    "within_5m": "within 5 m of each other",
}
_STRATUM = ("n", "mae_m", "bias_m", "rmse_m", "r2", "r", "cover_iou_2m")
_KINDS = {"chm": "height raster", "gedi": "GEDI shots", "plots": "field plots"}


# ---- the page -------------------------------------------------------------------------------------
class Page:
    """Collects parts in reading order; `html()` gives the document, `pictures` the PNGs by name."""

    def __init__(self, title: str, conclusion: str, lead: str = "", notes: Iterable[str] = ()) -> None:
        self.title, self.conclusion, self.lead, self.notes = title, conclusion, lead, list(notes)
        self.parts: list[dict[str, Any]] = []
        self.pictures: dict[str, bytes] = {}

    def heading(self, text: str) -> None:
        """A section's heading."""
        self.parts.append({"kind": "heading", "text": text})

    def text(self, text: str, small: bool = False) -> None:
        """A paragraph."""
        self.parts.append({"kind": "text", "text": text, "small": small})

    def table(self, headers: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> None:
        """A table; None is a dash, numbers are shortened by `cell_text`."""
        self.parts.append({"kind": "table", "headers": headers, "rows": list(rows), "caption": caption})

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Nested plain data as a two-column table, names joined by dots."""
        rows = list(_flat(facts))
        self.parts.append({"kind": "table", "headers": ["fact", "value"], "rows": rows, "facts": True})

    def figure(self, name: str, png: bytes, caption: str, alt: str) -> None:
        """A picture, embedded."""
        self.pictures[name] = png
        data = base64.b64encode(png).decode("ascii")
        self.parts.append({"kind": "figure", "data": data, "caption": caption, "alt": alt})

    def html(self) -> str:
        """The whole document; everything that files are called is escaped."""
        from jinja2 import Environment, FileSystemLoader

        environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
        environment.filters["cell"] = cell_text
        return environment.get_template("report.html.j2").render(page=self).lstrip()


def cell_text(value: Any) -> str:
    """A value as a person reads it: numbers with about four digits, None as a dash."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        return number_text(float(value))
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


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
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


# ---- canopy evaluate ------------------------------------------------------------------------------
def evaluation_page(result: Evaluation) -> Page:
    """The page of an evaluation."""
    page = Page("Canopy height map: how good is it here?", _verdict(result), _lead(result), result.notes)
    _headline(page, result)
    _by_height(page, result)
    _pictures(page, result)
    _blocks(page, result)
    _strata(page, result)
    page.heading("Provenance")
    page.facts(result.provenance)
    return page


def _verdict(result: Evaluation) -> str:
    """The sentence that a reader takes away."""
    mae, bias, n = (result.overall.metrics.get(name, Score(None)) for name in ("mae_m", "bias_m", "n"))
    if mae.value is None:
        return "Nothing could be scored."
    ends = f" (95 % interval {_interval(mae)} m)" if mae.ci95 else ""
    text = f"On average the map's heights are {number_text(mae.value)} m off{ends}"
    if bias.value is not None:
        side = "high" if bias.value >= 0 else "low"
        text += f", and {number_text(abs(bias.value))} m too {side} overall"
    what = "pixels" if result.kind == "chm" else "samples"
    return f"{text}, over {int(n.value or 0):,} {what}."


def _lead(result: Evaluation) -> str:
    facts = result.provenance
    reference = facts.get("reference") or [{}]
    name = facts.get("map", {}).get("name") or f"{len(facts.get('map', {}).get('maps', []))} maps"
    more = int(facts.get("references", len(reference))) - 1
    return (
        f"{name} against {reference[0].get('name', result.kind)}{f' and {more} more' if more > 0 else ''} "
        f"({_KINDS.get(result.kind, result.kind)}). {str(facts.get('rule', '')).capitalize()}."
    )


def _headline(page: Page, result: Evaluation) -> None:
    page.heading("Scores")
    corrected = result.corrected if result.corrected is not result.overall else None
    headers = ["metric", "value", "95 % interval"] + (["shift undone", "95 % interval"] if corrected else [])
    rows = []
    for name, score in result.overall.metrics.items():
        row = [label(name), _value(score), _interval(score)]
        if corrected:
            other = corrected.metrics.get(name, Score(None))
            row += [_value(other), _interval(other)]
        rows.append(row)
    bootstrap = result.provenance.get("bootstrap") or {}
    caption = ""
    if bootstrap.get("replicates"):
        caption = (
            f"Intervals: bootstrap of {bootstrap['replicates']} draws over "
            f"{bootstrap.get('blocks_with_data', '?')} blocks of "
            f"{number_text(float(bootstrap.get('block_m', 0)))} m."
        )
    page.table(headers, rows, caption)
    page.text(_shift_text(result))
    absent = dict.fromkeys(
        f"{label(name)}: {score.note}" for name, score in result.overall.metrics.items() if score.note
    )
    if absent:
        page.text("; ".join(absent) + ".", small=True)


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


def _by_height(page: Page, result: Evaluation) -> None:
    page.heading("By reference height")
    bins = result.overall.by_height
    page.figure(
        "error_by_height", figures.error_by_height([_bin_row(part) for part in bins], "reference height (m)"),
        "Bias and mean absolute error by reference height with 95 % intervals, over the share of pixels. "
        "A map that shrinks towards its mean is too high on the left and too low on the right.",
        "Error by reference height",
    )  # fmt: skip
    names = ("n", "bias_m", "mae_m", "rmse_m")
    rows = [(f"{part.name} m", *(part.scores[name].value for name in names)) for part in bins]
    page.table(["reference height", "n", "bias (m)", "MAE (m)", "RMSE (m)"], rows)
    joint = result.joint
    page.figure(
        "density",
        figures.density(joint.counts, joint.edges_m, "reference height (m)", "map height (m)"),
        "How often which pair of heights occurs.", "Density of map heights over reference heights",
    )  # fmt: skip


def _bin_row(part: HeightBin) -> dict[str, Any]:
    """A row for `figures.error_by_height`."""

    def triple(name: str) -> tuple[float, float | None, float | None] | None:
        score = part.scores[name]
        return None if score.value is None else (score.value, *(score.ci95 or (None, None)))

    return {
        "name": part.name, "n": int(part.scores["n"].value or 0), "bias": triple("bias_m"),
        "mae": triple("mae_m"),
    }  # fmt: skip


def _pictures(page: Page, result: Evaluation) -> None:
    page.heading("Where")
    samples = result.samples
    if samples is not None and len(samples):
        lon, lat, theirs, ours = samples.to_numpy().T
        page.figure(
            "samples",
            figures.points_map(lon, lat, ours - theirs, "map - reference (m)"),
            "Every sample at its place. Orange: the map is too high. Purple: too low.",
            "Map of sample errors",
        )  # fmt: skip
    largest = sorted(result.previews, key=lambda p: -int(np.isfinite(p.map_m).sum()))[:SHOWN_PREVIEWS]
    for index, preview in enumerate(largest, 1):
        number = f"_{index}" if len(largest) > 1 else ""
        pair = preview.reference_m, preview.map_m
        page.figure(
            f"side_by_side{number}", figures.side_by_side(*pair, ("reference", "map"), preview.gsd_m),
            f"{preview.site}: reference and map with one colour scale; grey is not scored.",
            f"Reference and map at {preview.site}",
        )  # fmt: skip
        page.figure(
            f"error_map{number}",
            figures.difference_map(pair[1] - pair[0], "map - reference (m)", preview.gsd_m),
            f"{preview.site}: error. Orange: the map is too high. Purple: too low.",
            f"Map of the errors at {preview.site}",
        )  # fmt: skip
    if len(result.previews) > len(largest):
        page.text(f"Drawn: the largest {len(largest)} of {len(result.previews)} references.", small=True)


def _blocks(page: Page, result: Evaluation) -> None:
    if len(result.blocks) < 2:
        return
    page.heading(f"Best and worst blocks of {number_text(result.block_m)} m")
    order = ranked(result.blocks)
    shown = min(SHOWN_BLOCKS, len(order) // 2)
    headers = ["site", "longitude", "latitude", "n", "reference (m)", "map (m)", "bias (m)", "MAE (m)"]
    columns = ["site", "lon", "lat", "n", "reference_mean_m", "map_mean_m", "bias_m", "mae_m"]
    for title, chosen in (("Best", order[:shown]), ("Worst", order[::-1][:shown])):
        rows = _degrees(result.blocks.iloc[chosen][columns])
        page.table(headers, rows, f"{title} by mean absolute error. All blocks are in blocks.csv.")
        strips = [s for s in (strip(result, int(i)) for i in chosen) if s is not None][:STRIP_BLOCKS]
        if strips:
            page.figure(
                f"{title.lower()}_blocks", figures.block_strip(strips, ("map", "reference", "error")),
                f"{title} blocks, one scale for both heights.", f"{title} blocks: map, reference, error",
            )  # fmt: skip


def _degrees(table: pandas.DataFrame) -> list[tuple[Any, ...]]:
    """Rows of a table whose lon and lat are shown to a metre."""
    shown = table.assign(lon=table["lon"].map("{:.5f}".format), lat=table["lat"].map("{:.5f}".format))
    return list(shown.itertuples(index=False, name=None))


def ranked(blocks: pandas.DataFrame) -> np.ndarray:
    """Positions of the blocks with enough pixels, best MAE first."""
    enough = np.flatnonzero(blocks["n"] >= RANKED_SHARE * blocks["n"].max())
    return enough[np.argsort(blocks["mae_m"].to_numpy()[enough], kind="stable")]


def strip(result: Evaluation, i: int) -> tuple[str, np.ndarray, np.ndarray] | None:
    """(caption, map, reference) of a block out of its preview; None where it is too small there to show."""
    block = result.blocks.iloc[i]
    x, y = (block.west + block.east) / 2, (block.south + block.north) / 2
    for preview in result.previews:  # several references may share a site's name
        west, south, east, north = preview.bounds
        if preview.site == block.site and west <= x <= east and south <= y <= north:
            break
    else:
        return None
    height, width = preview.map_m.shape
    cols = [round((v - west) / (east - west) * width) for v in (block.west, block.east)]
    rows = [round((north - v) / (north - south) * height) for v in (block.north, block.south)]
    here = np.s_[max(0, rows[0]) : rows[1], max(0, cols[0]) : cols[1]]
    pair = preview.map_m[here], preview.reference_m[here]
    if min(pair[0].shape) < STRIP_PX or not np.isfinite(pair[0]).any():
        return None
    return f"MAE {block.mae_m:.1f} m", *pair


def _strata(page: Page, result: Evaluation) -> None:
    for by in dict.fromkeys(stratum.by for stratum in result.strata):
        page.heading(f"By {by}")
        parts = [stratum for stratum in result.strata if stratum.by == by]
        names = [name for name in _STRATUM if any(name in part.scores.metrics for part in parts)]
        rows = []
        for part in parts:
            scores = {name: part.scores.metrics.get(name, Score(None)) for name in names}
            cells = [
                [_value(s), _interval(s)] if name == "mae_m" else [_value(s)] for name, s in scores.items()
            ]
            rows.append([part.name, *(text for cell in cells for text in cell)])
        headers = [[label(n), "95 % interval"] if n == "mae_m" else [label(n)] for n in names]
        page.table([by, *(text for cell in headers for text in cell)], rows)


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


def _value(score: Score) -> str:
    return cell_text(score.value)


def _interval(score: Score) -> str:
    if score.ci95 is None or isinstance(score.value, int):
        return ""
    return " to ".join(number_text(float(end)) for end in score.ci95)


# ---- canopy compare -------------------------------------------------------------------------------
def comparison_page(found: Any, blocks: pandas.DataFrame) -> Page:
    """The page of a `Comparison`."""
    a, b = (found.facts[side]["name"] for side in "ab")
    title = "Canopy change" if found.mode == "dates" else "Agreement of two canopy height maps"
    page = Page(title, _outcome(found), _compared(found), found.notes)
    page.heading("In short")
    rows = [
        (COMPARED[k], f"{v:.1%}" if k.startswith("within") else v) for k, v in found.sums.overall().items()
    ]
    page.table(["quantity", "value"], rows, f"A = {a}; B = {b}. Differences are B - A.")
    if found.mode == "dates":
        _change(page, found)
    _cover(page, found)
    _compared_pictures(page, found)
    _compared_heights(page, found)
    _compared_blocks(page, found, blocks)
    page.heading("Provenance")
    page.facts(found.facts)
    return page


def _outcome(found: Any) -> str:
    """The sentence that a reader takes away."""
    overall = found.sums.overall()
    if found.mode == "dates":
        ha = found.classes_ha
        return (
            f"Of {number_text(sum(ha.values()))} ha, canopy was lost on {number_text(ha['canopy lost'])} and "
            f"gained on {number_text(ha['canopy gained'])} at {found.rule['confidence']:.0%} confidence."
        )
    side = "taller" if overall["mean_difference_m"] >= 0 else "lower"
    return (
        f"On average B is {number_text(abs(overall['mean_difference_m']))} m {side} than A, and "
        f"{overall['within_2m']:.0%} of the pixels agree within 2 m."
    )


def _compared(found: Any) -> str:
    grid, facts = found.facts["grid"], found.facts
    sides = (
        f"{s.upper()}: {facts[s]['name']} ({facts[s]['kind']}, imagery {facts[s]['dates']})" for s in "ab"
    )
    size = (
        f"{grid['width_px']} x {grid['height_px']} px of {number_text(grid['gsd_m'])} m, {grid['crs'][:40]}"
    )
    return f"{'; '.join(sides)}. Compared on {size}."


def _change(page: Page, found: Any) -> None:
    page.heading("Change")
    total = sum(found.classes_ha.values())
    rows = [(name, ha, f"{ha / total:.2%}") for name, ha in found.classes_ha.items()]
    page.table(["class", "ha", "share"], rows)
    rule = found.rule
    page.text(
        f"A pixel counts as changed where the {rule['confidence']:.0%} interval of B - A leaves out 0. "
        f"Error of A: {rule['error_a']}. Error of B: {rule['error_b']}. Of ground without any change about "
        f"{rule['expected_false_share']:.0%} would still be called changed. Canopy is what is higher than "
        f"{found.facts['cover_height_m']:g} m; gained and lost are significant changes across that height."
    )


def _cover(page: Page, found: Any) -> None:
    page.heading("Cover")
    headers = ["canopy", "cover in A", "cover in B", "only A (ha)", "only B (ha)", "ground that agrees"]
    rows = [
        (
            f"above {r['above_m']:g} m", f"{r['cover_a']:.1%}", f"{r['cover_b']:.1%}",
            r["only_a_ha"], r["only_b_ha"], f"{r['agree']:.1%}", r["iou"],
        )
        for r in found.sums.cover_rows()
    ]  # fmt: skip
    page.table([*headers, "overlap (IoU)"], rows)


def _compared_pictures(page: Page, found: Any) -> None:
    preview, dates = found.preview, found.mode == "dates"
    a, b = preview.mean("a"), preview.mean("b")
    metres = found.facts["grid"]["gsd_m"] * preview.side_px
    page.heading("Where")
    page.figure(
        "side_by_side", figures.side_by_side(a, b, ("A", "B"), metres),
        "Both maps with one colour scale; grey is missing in either.", "The two maps beside each other",
    )  # fmt: skip
    words = "change in height, B - A (m)" if dates else "B - A (m)"
    page.figure(
        "difference_map", figures.difference_map(b - a, words, metres),
        "Orange: B is higher. Purple: B is lower.", "Map of the differences",
    )  # fmt: skip
    # The most frequent class of each preview pixel, 0 where unknown.
    stack = np.stack([preview.sums[f"class_{code}"] for code in found.legend])
    codes = np.where(preview.count > 0, np.array(list(found.legend))[stack.argmax(axis=0)], 0)
    caption = "Significant changes." if dates else f"Canopy above {found.facts['cover_height_m']:g} m."
    if preview.side_px > 1:
        side = preview.side_px
        caption += f" Each picture pixel shows the most frequent class of {side} x {side} map pixels."
    page.figure("classes", figures.class_map(codes, found.legend, metres), caption, "Map of the classes")
    edges = np.arange(found.sums.joint.shape[0] + 1.0)
    page.figure(
        "density", figures.density(found.sums.joint, edges, "height in A (m)", "height in B (m)"),
        "How often which pair of heights occurs.", "Density of the heights of A and B",
    )  # fmt: skip


def _compared_heights(page: Page, found: Any) -> None:
    page.heading("By height")
    rows = [
        {
            "name": f"{r['low_m']:g}+" if r["high_m"] is None else f"{r['low_m']:g}-{r['high_m']:g}",
            "n": r["n"],
            "bias": (r["mean_difference_m"], None, None),
            "mae": (r["mean_absolute_difference_m"], None, None),
        }
        for r in found.sums.height_rows()
    ]
    words = ("mean of B - A", "mean |B - A|")
    page.figure(
        "by_height",
        figures.error_by_height(rows, "mean height of both maps (m)", words, "difference (m)"),
        "Mean and mean absolute difference by the mean height of both maps, over the share of "
        "pixels. Neither map is taken for the truth.",
        "Differences by height class",
    )  # fmt: skip


def _compared_blocks(page: Page, found: Any, blocks: pandas.DataFrame) -> None:
    enough = blocks[blocks["n"] >= RANKED_SHARE * found.blocks.side_px**2]
    enough = (enough if len(enough) else blocks).sort_values("mean_difference_m", kind="stable")
    page.heading(f"Blocks of {number_text(found.facts['block_m'])} m")
    names = ["lon", "lat", "n", "mean_a_m", "mean_b_m", "mean_difference_m", "mean_absolute_difference_m"]
    headers = ["longitude", "latitude", "pixels", "A (m)", "B (m)", "B - A (m)", "mean |B - A| (m)"]
    for title, part in (
        ("B higher than A", enough[enough["mean_difference_m"] > 0][::-1]),
        ("B lower than A", enough[enough["mean_difference_m"] < 0]),
    ):
        if len(part):
            caption = f"{title}: the largest differences. All blocks are in blocks.csv."
            page.table(headers, _degrees(part[names][:SHOWN_BLOCKS]), caption)


# ---- files ----------------------------------------------------------------------------------------
def check_folder(out: str | Path, inputs: Sequence[Any], overwrite: bool) -> None:
    """Raises InputError, before any work, for a folder that results may not go to."""
    folder = Path(out).expanduser()
    if not folder.exists() or not folder.is_dir():
        check_output(folder, inputs, overwrite=overwrite, folder=True, expected="a directory for the results")
    else:
        names = (METRICS, "scores.csv", "blocks.csv", "report.html")
        check_output([folder / name for name in names], inputs, overwrite=overwrite)


def write_results(result: Evaluation, out: str | Path) -> None:
    """Write everything of an evaluation into the folder `out`, metrics.json last.

    Raises OutputError when the disk refuses.
    """
    folder = Path(out).expanduser()
    with told_as_output(folder):
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        rows = list(_score_rows("overall", result.overall))
        if result.corrected is not None:
            rows += _score_rows("shift undone", result.corrected)
        write_csv(folder / "scores.csv", rows)
        for by in dict.fromkeys(stratum.by for stratum in result.strata):
            name = "".join(c if c.isalnum() or c in "-_" else "_" for c in by)[:60]
            parts = [stratum for stratum in result.strata if stratum.by == by]
            write_csv(folder / f"by_{name}.csv", [{by: s.name, **wide_row(s.scores)} for s in parts])
        write_csv(folder / "blocks.csv", result.blocks)
        page = evaluation_page(result)
        for name, png in page.pictures.items():
            _write(folder / "figures" / f"{name}.png", png)
        _write(folder / "report.html", page.html().encode())
        write_json(folder / METRICS, result.to_dict())


def _score_rows(name: str, scores: Scores) -> Iterator[dict[str, Any]]:
    """scores.csv: every metric, plain and with the shift undone, with its interval."""
    every = list(scores.metrics.items())
    for part in scores.by_height:
        every += [(f"{metric} at {part.name} m", score) for metric, score in part.scores.items()]
    for metric, score in every:
        low, high = score.ci95 or (None, None)
        yield {
            "scores": name, "metric": metric, "value": score.value, "low95": low, "high95": high,
            "note": score.note,
        }  # fmt: skip


def wide_row(scores: Scores, names: Sequence[str] | None = None) -> dict[str, float | None]:
    """Scores as columns NAME, NAME_low95, NAME_high95; of n the value alone."""
    row: dict[str, float | None] = {}
    for name in names or list(scores.metrics):
        score = scores.metrics.get(name, Score(None))
        row[name] = score.value
        if name != "n":
            row[f"{name}_low95"], row[f"{name}_high95"] = score.ci95 or (None, None)
    return row


def write_comparison(found: Any, folder: Path, page: bool = True) -> None:
    """Write the tables, the JSON and (if wanted) the page of a `Comparison` into `folder`."""
    plain = found.to_dict()
    write_json(folder / "compare.json", plain)
    write_csv(folder / "summary.csv", [{"quantity": k, "value": v} for k, v in plain["overall"].items()])
    write_csv(folder / "cover.csv", plain["cover"])
    write_csv(folder / "by_height.csv", plain["by_height"])
    if found.mode == "dates":
        write_csv(folder / "change.csv", [{"class": k, "ha": v} for k, v in found.classes_ha.items()])
    blocks = found.block_table()
    write_csv(folder / "blocks.csv", blocks)
    if page:
        _write(folder / "report.html", comparison_page(found, blocks).html().encode())


def write_csv(path: Path, table: pandas.DataFrame | Sequence[Mapping[str, Any]]) -> None:
    """A table with a header; what is missing is empty, numbers have nine digits."""
    import pandas

    frame = table if isinstance(table, pandas.DataFrame) else pandas.DataFrame(list(table))
    with replacing(path) as part:
        frame.to_csv(part, index=False, float_format="%.9g")


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as part:
        part.write_bytes(data)
