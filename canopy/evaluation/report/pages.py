"""What `canopy evaluate` and `canopy compare` leave behind: JSON, tables, figures and report.html.

The words of the pages are in `templates`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy.evaluation.report import figures
from canopy.evaluation.scores import JOINT_STEP_M, Evaluation, Score
from canopy.evaluation.zones import write_table
from canopy.files import replacing, told_as_output, write_json
from canopy.metrics import BIN_NAMES

if TYPE_CHECKING:
    import pandas

METRICS = "metrics.json"
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


# ---- the pages ------------------------------------------------------------------------------------
def evaluation_page(result: Evaluation) -> tuple[str, dict[str, bytes]]:
    """The page of an evaluation, and its pictures as PNG by name."""
    bins = result.overall.by_height
    rows = [(name, int(s["n"].value or 0), s["bias_m"], s["mae_m"]) for name, s in bins.items()]
    pictures = {
        "error_by_height": figures.error_by_height(rows, "reference height (m)"),
        "density": figures.density(result.joint, JOINT_STEP_M, "reference height (m)", "map height (m)"),
    }
    if result.samples is not None and len(result.samples):
        lon, lat, theirs, ours = result.samples.to_numpy().T
        pictures["samples"] = figures.points_map(lon, lat, ours - theirs, "map - reference (m)")
    if (p := result.preview) is not None:
        picture = {} if p.image is None else {"image": p.image}
        both = picture | {"reference": p.reference_m, "map": p.map_m}
        error = figures.difference_map(p.map_m - p.reference_m, "map - reference (m)", p.gsd_m)
        pictures |= {"side_by_side": figures.side_by_side(both, p.gsd_m), "error_map": error}
    page = render(
        "evaluate.html.j2", result=result, facts=result.provenance, notes=result.notes, pictures=pictures,
        heights=[
            (f"{name} m", s["n"].value, s["bias_m"].value, s["mae_m"].value, s["rmse_m"].value)
            for name, s in bins.items()
        ],
        shown=[name for name in _STRATUM if name in result.overall.metrics],
    )  # fmt: skip
    return page, pictures


def comparison_page(found: Any) -> str:
    """The page of a `Comparison`."""
    preview = found.preview
    a, b, metres = preview.mean("a"), preview.mean("b"), found.facts["grid"]["gsd_m"] * preview.side_px
    words = "change in height, B - A (m)" if found.mode == "dates" else "B - A (m)"
    # The most frequent class of each preview pixel, 0 where unknown.
    most = np.stack([preview.sums[name] for name in found.legend.values()]).argmax(axis=0)
    codes = np.where(preview.count > 0, np.array(list(found.legend))[most], 0)
    rows = [
        (name, r["n"], Score(r["mean_difference_m"]), Score(r["mean_absolute_difference_m"]))
        for name, r in zip(BIN_NAMES, found.sums.height_rows(), strict=True)
    ]
    differences = ("mean of B - A", "mean |B - A|")
    pictures = {
        "side_by_side": figures.side_by_side({"A": a, "B": b}, metres),
        "difference_map": figures.difference_map(b - a, words, metres),
        "classes": figures.class_map(codes, found.legend, metres),
        "density": figures.density(found.sums.joint, 1.0, "height in A (m)", "height in B (m)"),
        "by_height": figures.error_by_height(
            rows, "mean height of both maps (m)", differences, "difference (m)"
        ),
    }
    return render("compare.html.j2", found=found, facts=found.facts, notes=found.notes, pictures=pictures)


def render(template: str, **content: Any) -> str:
    """A page or a table; in HTML everything that files are called is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent / "templates")
    html = template.endswith(".html.j2")
    environment = Environment(loader=folder, autoescape=html, undefined=StrictUndefined)
    environment.filters |= {
        "bar": lambda text: text.replace("|", "/"),
        "base64": lambda png: base64.b64encode(png).decode("ascii"),
        "cell": cell_text,
        "interval": interval_text,
        "label": label,
        "number": number_text,
        "percent": lambda share, digits=0: f"{share:.{digits}%}",
    }
    return environment.get_template(template).render(**content).lstrip()


def cell_text(value: Any) -> str:
    """A value as a person reads it: numbers with about four digits, None as a dash."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    return number_text(float(value)) if isinstance(value, float | np.floating) else str(value)


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


def interval_text(score: Score) -> str:
    """ "1.92 to 2.31"; nothing for counts, and where there is no interval."""
    if score.ci95 is None or isinstance(score.value, int):
        return ""
    return " to ".join(number_text(end) for end in score.ci95)


def label(name: str) -> str:
    """A metric's name for people."""
    if name.startswith("cover_"):
        what, height = name.removeprefix("cover_").rsplit("_", 1)
        return f"cover above {height.removesuffix('m')} m, {what.replace('iou', 'IoU').replace('f1', 'F1')}"
    if name.endswith("_error_m"):
        return f"error of the {name[1:].split('_')[0]}th height percentile (m)"
    return LABELS.get(name, name.replace("_", " "))


# ---- files ----------------------------------------------------------------------------------------
def write_results(result: Evaluation, out: str | Path) -> None:
    """Write everything of an evaluation into the folder `out`, metrics.json last.

    Raises OutputError when the disk refuses.
    """
    folder = Path(out).expanduser()
    with told_as_output(folder):
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for by, parts in result.strata.items():
            name = "".join(c if c.isalnum() or c in "-_" else "_" for c in by)[:60]
            write_csv(folder / f"by_{name}.csv", [{by: n, **wide_row(s.metrics)} for n, s in parts.items()])
        write_csv(folder / "blocks.csv", result.blocks)
        page, pictures = evaluation_page(result)
        for name, png in pictures.items():
            _write(folder / "figures" / f"{name}.png", png)
        _write(folder / "report.html", page.encode())
        write_json(folder / METRICS, result.to_dict())


def wide_row(scores: Mapping[str, Score], names: Sequence[str] = ()) -> dict[str, float | None]:
    """Scores as columns NAME, NAME_low95, NAME_high95; of n the value alone."""
    row: dict[str, float | None] = {}
    for name in names or scores:
        score = scores.get(name, Score(None))
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
    write_csv(folder / "blocks.csv", found.block_table())
    if found.zones is not None:
        write_table(found.zones, folder / "zones.csv")
        write_table(found.zones, folder / "zones.gpkg")
    if page:
        _write(folder / "report.html", comparison_page(found).encode())


def write_csv(path: Path, table: pandas.DataFrame | Sequence[Mapping[str, Any]]) -> None:
    """A table with a header; what is missing is empty, numbers have nine digits."""
    import pandas

    with replacing(path) as part:
        pandas.DataFrame(table).to_csv(part, index=False, float_format="%.9g")


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as part:
        part.write_bytes(data)
