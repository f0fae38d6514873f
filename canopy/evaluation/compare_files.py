"""What `canopy compare` leaves behind besides its maps: compare.json, the tables, and report.html."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from canopy.evaluation import figures
from canopy.evaluation.change import CLASSES
from canopy.evaluation.compare_maps import COVER_CLASSES, Comparison
from canopy.evaluation.page import Page, number_text

# A block with fewer valid pixels than this share of a full one ranks nowhere: its mean says little.
RANKED_SHARE = 0.25
SHOWN_BLOCKS = 10
_LABELS = {
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


def write_files(found: Comparison, folder: Path, page: bool = True) -> None:
    """Write the tables, the JSON and (if wanted) the page of a comparison into `folder`."""
    plain = found.to_dict()
    write_json(folder / "compare.json", plain)
    write_csv(folder / "summary.csv", [{"quantity": k, "value": v} for k, v in plain["overall"].items()])
    write_csv(folder / "cover.csv", plain["cover"])
    write_csv(folder / "by_height.csv", plain["by_height"])
    if found.mode == "dates":
        write_csv(folder / "change.csv", [{"class": k, "ha": v} for k, v in found.classes_ha.items()])
    blocks = block_rows(found)
    write_csv(folder / "blocks.csv", blocks)
    if page:
        (folder / "report.html").write_text(report(found, blocks), encoding="utf-8")


def write_json(path: Path, plain: Mapping[str, Any]) -> None:
    """Indented JSON; NaN is refused rather than written."""
    path.write_text(json.dumps(plain, indent=2, allow_nan=False, default=str) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of one kind with a header; None is empty, numbers have nine digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        if not rows:
            return
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


def block_rows(found: Comparison) -> list[dict[str, Any]]:
    """One row per block with valid pixels, in reading order; hectares of every class where dates are
    compared.
    """
    blocks = found.blocks
    grid = blocks.block_grid()
    lon, lat = blocks.centres_lonlat()
    means = {name: blocks.mean(name) for name in ("a", "b", "abs")}
    rows = []
    for row, col in zip(*np.nonzero(blocks.count), strict=True):
        at = row, col
        west, north = grid.xy(row, col)
        east, south = grid.xy(row + 1, col + 1)
        plain: dict[str, Any] = {
            "lon": round(float(lon[at]), 7), "lat": round(float(lat[at]), 7),
            "west": west, "south": south, "east": east, "north": north,
            "n": int(blocks.count[at]), "area_ha": float(blocks.sums["area"][at]) / 1e4,
            "mean_a_m": float(means["a"][at]), "mean_b_m": float(means["b"][at]),
            "mean_difference_m": float(means["b"][at] - means["a"][at]),
            "mean_absolute_difference_m": float(means["abs"][at]),
        }  # fmt: skip
        legend = CLASSES if found.mode == "dates" else COVER_CLASSES
        for code, name in legend.items():
            plain[f"{name.replace(' ', '_').lower()}_ha"] = float(blocks.sums[f"class_{code}"][at]) / 1e4
        rows.append(plain)
    return rows


def class_picture(found: Comparison) -> np.ndarray:
    """The most frequent class of each preview pixel, 0 where unknown, uint8 (h, w)."""
    legend = CLASSES if found.mode == "dates" else COVER_CLASSES
    stack = np.stack([found.preview.sums[f"class_{code}"] for code in legend])
    codes = np.array(list(legend))[stack.argmax(axis=0)]
    return np.where(found.preview.count > 0, codes, 0).astype(np.uint8)


def report(found: Comparison, blocks: Sequence[Mapping[str, Any]]) -> str:
    """The page, as HTML."""
    a, b = (found.facts[side]["name"] for side in "ab")
    dates = found.mode == "dates"
    kind = "Canopy change" if dates else "Agreement of two canopy height maps"
    page = Page(kind, _lead(found))
    page.notes(found.notes)
    page.heading("In short")
    overall = found.sums.overall()
    rows = [(_LABELS[k], f"{v:.1%}" if k.startswith("within") else v) for k, v in overall.items()]
    page.table(["quantity", "value"], rows, caption=f"A = {a}; B = {b}. Differences are B - A.")
    if dates:
        _change_section(page, found)
    _cover_section(page, found)
    _pictures(page, found)
    page.heading("By height")
    heights = [
        {
            "name": f"{r['low_m']:g}+" if r["high_m"] is None else f"{r['low_m']:g}-{r['high_m']:g}",
            "n": r["n"],
            "bias": (r["mean_difference_m"], None, None),
            "mae": (r["mean_absolute_difference_m"], None, None),
        }
        for r in found.sums.height_rows()
    ]
    page.figure(
        figures.error_by_height(
            heights, "mean height of both maps (m)", ("mean of B - A", "mean |B - A|"), "difference (m)"
        ),
        "Mean and mean absolute difference by the mean height of both maps, over the share of "
        "pixels. Neither map is taken for the truth.",
        "Differences by height class",
    )
    _block_section(page, found, blocks)
    page.heading("Provenance")
    page.facts(found.facts)
    return page.html()


def _lead(found: Comparison) -> str:
    grid, facts = found.facts["grid"], found.facts
    sides = (
        f"{s.upper()}: {facts[s]['name']} ({facts[s]['kind']}, imagery {facts[s]['dates']})" for s in "ab"
    )
    size = (
        f"{grid['width_px']} x {grid['height_px']} px of {number_text(grid['gsd_m'])} m, {grid['crs'][:40]}"
    )
    return f"{'; '.join(sides)}. Compared on {size}."


def _change_section(page: Page, found: Comparison) -> None:
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


def _cover_section(page: Page, found: Comparison) -> None:
    page.heading("Cover")
    rows = [
        (
            f"above {r['above_m']:g} m", f"{r['cover_a']:.1%}", f"{r['cover_b']:.1%}",
            r["only_a_ha"], r["only_b_ha"],
            f"{r['agree']:.1%}", r["iou"],
        )
        for r in found.sums.cover_rows()
    ]  # fmt: skip
    page.table(
        [
            "canopy",
            "cover in A",
            "cover in B",
            "only A (ha)",
            "only B (ha)",
            "ground that agrees",
            "overlap (IoU)",
        ],
        rows,
    )


def _pictures(page: Page, found: Comparison) -> None:
    preview, dates = found.preview, found.mode == "dates"
    a, b = preview.mean("a"), preview.mean("b")
    metres = found.facts["grid"]["gsd_m"] * preview.side_px
    page.heading("Where")
    page.figure(
        figures.side_by_side(a, b, ("A", "B"), metres),
        "Both maps with one colour scale; grey is missing in either.",
        "The two maps beside each other",
    )  # fmt: skip
    label = "change in height, B - A (m)" if dates else "B - A (m)"
    page.figure(
        figures.difference_map(b - a, label, metres),
        "Orange: B is higher. Purple: B is lower.",
        "Map of the differences",
    )
    legend = CLASSES if dates else COVER_CLASSES
    caption = "Significant changes." if dates else f"Canopy above {found.facts['cover_height_m']:g} m."
    if preview.side_px > 1:
        side = preview.side_px
        caption += f" Each picture pixel shows the most frequent class of {side} x {side} map pixels."
    page.figure(figures.class_map(class_picture(found), legend, metres), caption, "Map of the classes")
    edges = np.arange(found.sums.joint.shape[0] + 1.0)
    page.figure(
        figures.density(found.sums.joint, edges, "height in A (m)", "height in B (m)"),
        "How often which pair of heights occurs.", "Density of the heights of A and B",
    )  # fmt: skip


def _block_section(page: Page, found: Comparison, blocks: Sequence[Mapping[str, Any]]) -> None:
    full = found.blocks.side_px**2
    ranked = [row for row in blocks if row["n"] >= RANKED_SHARE * full] or list(blocks)
    side = number_text(found.facts["block_m"])
    page.heading(f"Blocks of {side} m")
    names = ["lon", "lat", "n", "mean_a_m", "mean_b_m", "mean_difference_m", "mean_absolute_difference_m"]
    headers = ["longitude", "latitude", "pixels", "A (m)", "B (m)", "B - A (m)", "mean |B - A| (m)"]
    for title, sign in (("B higher than A", -1), ("B lower than A", 1)):
        order = sorted(ranked, key=lambda row, sign=sign: sign * row["mean_difference_m"])[:SHOWN_BLOCKS]  # type: ignore[misc]
        order = [row for row in order if row["mean_difference_m"] * sign < 0]
        rows = [[f"{r[k]:.5f}" if k in ("lon", "lat") else r[k] for k in names] for r in order]
        if rows:
            page.table(
                headers, rows, caption=f"{title}: the largest differences. All blocks are in blocks.csv."
            )
