"""`canopy compare`: two height maps of one place, as two products or as two dates."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from canopy import __version__
from canopy.errors import ConfigError, InputError, OutputError
from canopy.evaluation import change as changes
from canopy.evaluation.agreement import PairSums
from canopy.evaluation.gather import BlockSums, preview_side
from canopy.evaluation.pairing import PairWindow, common_grid, pair_windows
from canopy.evaluation.product_dates import dates_text, years_apart
from canopy.evaluation.products import HeightProduct, open_product
from canopy.files import told_as_output
from canopy.geo.aoi import AOI
from canopy.geo.cog import CogWriter
from canopy.geo.encoding import BandSpec
from canopy.geo.grid import Grid
from canopy.runtime import Progress

MODES = ("auto", "products", "dates")
COVER_CLASSES = {1: "open in both", 2: "canopy in A only", 3: "canopy in B only", 4: "canopy in both"}
# Two maps of one model whose imagery is this far apart are two dates, not two products.
DATES_APART_YEARS = 0.5


@dataclass(frozen=True)
class CompareOptions:
    """What `canopy compare` can be asked.

    Attributes:
        mode: "products", "dates" (A is the earlier one) or "auto".
        gsd: ground metres per pixel of the common grid; None: the coarser map's own pixels.
        cover_m: canopy is what is higher.
        block_m: side of the blocks of the table, ground metres.
        confidence: of a change (dates).
        sigma_a, sigma_b: standard deviation of each map's pixel in metres (dates).
        nodata_a, nodata_b: values that mean missing, in place of what the files say.
        report: whether to draw report.html.
    """

    mode: str = "auto"
    gsd: float | None = None
    cover_m: float = 2.0
    block_m: float = 100.0
    confidence: float = 0.95
    sigma_a: float | None = None
    sigma_b: float | None = None
    nodata_a: float | None = None
    nodata_b: float | None = None
    overwrite: bool = False
    report: bool = True

    def check(self) -> None:
        """Raises InputError for a value out of range."""
        if self.mode not in MODES:
            raise ConfigError(f"{self.mode!r}", where="--as", expected=", ".join(MODES))
        for name, value, top in (("--cover-height", self.cover_m, 50), ("--block-m", self.block_m, 1e5)):
            if not 0 < value <= top:
                raise ConfigError(f"{value:g} m", where=name, expected=f"above 0, up to {top:g}")
        changes.z_of(self.confidence)


@dataclass(eq=False)
class Comparison:
    """What was found; the arrays are for the report, `to_dict` is compare.json."""

    mode: str
    facts: dict[str, Any]
    sums: PairSums
    blocks: BlockSums
    preview: BlockSums
    classes_ha: dict[str, float] = field(default_factory=dict)
    rule: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        plain = {"mode": self.mode, **self.facts, "overall": self.sums.overall()}
        if self.mode == "dates":
            plain |= {"change": {"rule": self.rule, "area_ha": self.classes_ha}}
        return plain | {
            "cover": self.sums.cover_rows(),
            "by_height": self.sums.height_rows(),
            "notes": self.notes,
        }


def compare(
    a: Any,
    b: Any,
    out: str | Path,
    options: CompareOptions | None = None,
    *,
    area: AOI | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two height maps (anything `open_product` takes) and write maps, tables and a report to `out`.

    Differences are B - A. Products: difference.tif, cover.tif. Dates: change.tif (change and its interval),
    classes.tif. Both: compare.json, summary.csv, cover.csv, by_height.csv, blocks.csv, report.html.

    Raises InputError for maps that cannot be read or do not meet, impossible options, or existing outputs
    without `overwrite`; nothing is written then.
    """
    options = options or CompareOptions()
    options.check()
    with open_product(a, nodata=options.nodata_a) as one, open_product(b, nodata=options.nodata_b) as two:
        mode, why = choose_mode(one, two, options.mode)
        grid = common_grid(one, two, area, options.gsd)
        with staging(Path(out), options.overwrite) as folder:
            run = _Run(one, two, grid, mode, options)
            found = run.walk(folder, area, progress)
            found.facts["mode_because"] = why
            from canopy.evaluation.compare_files import write_files  # matplotlib takes a second to import

            write_files(found, folder, options.report)
    return found


def choose_mode(a: HeightProduct, b: HeightProduct, asked: str) -> tuple[str, str]:
    """ "products" or "dates", and why."""
    if asked != "auto":
        return asked, "asked for"
    same = a.tags.get("CANOPY_MODEL_SHA256") or a.kind, b.tags.get("CANOPY_MODEL_SHA256") or b.kind
    years = years_apart(a.dates, b.dates)
    if same[0] == same[1] and years is not None and abs(years) >= DATES_APART_YEARS:
        if years < 0:
            raise InputError(
                f"A is of {dates_text(a.dates)}, B of {dates_text(b.dates)}", where=f"{a.name}, {b.name}",
                expected="the earlier map first", remedy="swap them, or add --as products",
            )  # fmt: skip
        return "dates", "one product, imagery of different dates"
    return "products", "not known to be two dates of one product; --as dates compares them as such"


# Of the canopy of A: beyond this share "no significant change" says more of the errors than of the trees.
_BLIND_SHARE = 0.1


class _Run:
    """One walk over the common grid."""

    def __init__(
        self, a: HeightProduct, b: HeightProduct, grid: Grid, mode: str, options: CompareOptions
    ) -> None:
        self.a, self.b, self.grid, self.options, self.mode = a, b, grid, options, mode
        self.dates = mode == "dates"
        classes = changes.CLASSES if self.dates else COVER_CLASSES
        self.class_sums = [f"class_{code}" for code in classes]
        self.classes_m2 = dict.fromkeys(classes, 0.0)
        names = ["a", "b", "abs", "area", *self.class_sums]
        self.blocks = BlockSums(grid, max(1, round(options.block_m / grid.gsd_m)), names)
        self.preview = BlockSums(grid, preview_side(grid), ["a", "b", *self.class_sums])
        thresholds = sorted({2.0, 5.0, 10.0, float(options.cover_m)})
        self.sums = PairSums(thresholds)
        self.notes = [*a.notes, *b.notes]
        self.canopy_m2 = self.blind_m2 = 0.0
        if self.dates:
            self.z = changes.z_of(options.confidence)
            self.errors = (
                changes.choose_error("a", options.sigma_a, a.level, a.step_m),
                changes.choose_error("b", options.sigma_b, b.level, b.step_m),
            )

    def walk(self, folder: Path, area: AOI | None, progress: Progress | None) -> Comparison:
        windows = pair_windows(self.a, self.b, self.grid, area=area, interval=self.dates, progress=progress)
        with contextlib.ExitStack() as stack:
            values, classes = (stack.enter_context(writer) for writer in self._writers(folder))
            for window in windows:
                stored, codes = self._changed(window) if self.dates else self._differs(window)
                at = window.row, window.col
                values.write(stored.astype(np.float32), window.valid, *at)
                classes.write(codes[None].astype(np.float32), window.valid, *at)
                self._count(window, codes)
            if self.sums.n == 0:
                raise InputError(
                    "no pixel is valid in both maps", where=f"{self.a.name}, {self.b.name}",
                    remedy="check their nodata rules (--nodata-a, --nodata-b)",
                )  # fmt: skip
        return self._comparison(area)

    def _writers(self, folder: Path) -> tuple[CogWriter, CogWriter]:
        tags = {
            "CANOPY_VERSION": __version__, "CANOPY_COMPARED_A": self.a.name, "CANOPY_COMPARED_B": self.b.name,
        }  # fmt: skip
        if self.dates:
            bands = [BandSpec("change"), BandSpec("change_lower"), BandSpec("change_upper")]
            first, second, codes = "change.tif", "classes.tif", changes.CLASSES
        else:
            bands = [BandSpec("difference")]
            first, second, codes = "difference.tif", "cover.tif", COVER_CLASSES
        legend = "; ".join(f"{code} {name}" for code, name in codes.items())
        return (
            CogWriter(folder / first, self.grid, bands, tags=tags),
            CogWriter(
                folder / second, self.grid, [BandSpec("class", "1", 1.0)], encoding="uint8m",
                tags=tags | {"CANOPY_CLASSES": legend}, overviews="mode",
            ),
        )  # fmt: skip

    def _differs(self, window: PairWindow) -> tuple[np.ndarray, np.ndarray]:
        a, b = window.a.height_m, window.b.height_m
        codes = 1 + (a > self.options.cover_m) + 2 * (b > self.options.cover_m).astype(np.uint8)
        return (b - a)[None], codes

    def _changed(self, window: PairWindow) -> tuple[np.ndarray, np.ndarray]:
        change, lower, upper = changes.difference_interval(window.a, window.b, self.errors, self.z)
        codes = changes.classify(window.a.height_m, window.b.height_m, lower, upper, self.options.cover_m)
        canopy = window.valid & (window.a.height_m > self.options.cover_m)
        self.canopy_m2 += float(window.area_m2[canopy].sum())
        # Were it to fall to the ground, its change would be minus its height: would the interval hold 0?
        blind = canopy & (window.a.height_m <= upper - change)
        self.blind_m2 += float(window.area_m2[blind].sum())
        return np.stack([change, lower, upper]), codes

    def _count(self, window: PairWindow, codes: np.ndarray) -> None:
        valid, a, b, area = window.valid, window.a.height_m, window.b.height_m, window.area_m2
        self.sums.add(a[valid], b[valid], area[valid])
        members = {f"class_{code}": codes == code for code in self.classes_m2}
        for code in self.classes_m2:
            self.classes_m2[code] += float(area[valid & members[f"class_{code}"]].sum())
        at = window.row, window.col
        self.preview.add(*at, valid, {"a": a, "b": b, **members})
        by_area = {name: np.where(member, area, 0) for name, member in members.items()}
        self.blocks.add(*at, valid, {"a": a, "b": b, "abs": np.abs(b - a), "area": area, **by_area})

    def _comparison(self, area: AOI | None) -> Comparison:
        grid = self.grid
        facts = {
            "a": _side_facts(self.a),
            "b": _side_facts(self.b),
            "years_apart": years_apart(self.a.dates, self.b.dates),
            "grid": {
                "crs": f"EPSG:{grid.crs.epsg}" if grid.crs.epsg else grid.crs.to_wkt(),
                "width_px": grid.width,
                "height_px": grid.height,
                "gsd_m": grid.gsd_m,
                "bounds": list(grid.bounds),
            },
            "area": area.describe() if area else None,
            "cover_height_m": self.options.cover_m,
            "block_m": self.blocks.side_px * grid.gsd_m,
            "canopy_version": __version__,
        }
        legend = changes.CLASSES if self.dates else COVER_CLASSES
        found = Comparison(self.mode, facts, self.sums, self.blocks, self.preview, notes=list(self.notes))
        found.classes_ha = {legend[code]: m2 / 1e4 for code, m2 in self.classes_m2.items()}
        if self.dates:
            blind = self.blind_m2 / self.canopy_m2 if self.canopy_m2 else 0.0
            found.rule = {
                "confidence": self.options.confidence,
                "error_a": self.errors[0].source,
                "error_b": self.errors[1].source,
                "expected_false_share": 1 - self.options.confidence,
                "undetectable_canopy_share": blind,
            }
            if blind > _BLIND_SHARE:
                found.notes.append(
                    f"in {blind:.0%} of A's canopy not even the loss of all of it would be significant: the "
                    "maps' errors are too wide for single pixels. Errors that both share (one model, one "
                    "place) cancel: if you know what is left, give --sigma-a and --sigma-b"
                )
            found.notes += [
                f"the error of {side} is {error.source}"
                for side, error in zip("AB", self.errors, strict=True)
                if error.source.startswith("ASSUMED")
            ]
        return found


def _side_facts(product: HeightProduct) -> dict[str, Any]:
    crs = product.crs
    return {
        "name": product.name,
        "kind": product.kind,
        "files": len(product.tiles),
        "crs": f"EPSG:{crs.epsg}" if crs.epsg else crs.to_wkt(),
        "gsd_m": product.gsd_m,
        "step_m": product.step_m,
        "dates": dates_text(product.dates),
        "model": product.tags.get("CANOPY_MODEL"),
        "interval_level": product.level,
    }


@contextlib.contextmanager
def staging(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` whose files move into it at the end, or vanish on an error.

    Raises InputError when `out` is a file, holds anything and `overwrite` is not set, or has no parent
    folder.
    """
    out = out.expanduser()
    if out.exists() and not out.is_dir():
        raise InputError("a file", where=out, expected="a folder for the results")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise InputError(
            "the folder has files already", where=out, remedy="add --overwrite, or name another with -o"
        )
    parent = out.absolute().parent
    if not parent.is_dir():
        raise InputError("no such folder", where=parent, remedy="create it first")
    if not os.access(parent, os.W_OK):
        raise OutputError("the folder cannot be written to", where=parent)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=parent))
    try:
        with told_as_output(out):
            yield folder
            out.mkdir(exist_ok=True)
            for path in sorted(folder.iterdir()):
                os.replace(path, out / path.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def finite(value: float | None) -> float | None:
    """None for NaN and infinity: JSON has neither."""
    return None if value is None or not math.isfinite(value) else float(value)
