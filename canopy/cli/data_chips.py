"""`canopy data chips`: parse, call, print."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from canopy.cli.common import Json, Overwrite, Quiet, Verbose, print_json, refuse_given
from canopy.cli.groups import takes_groups
from canopy.errors import InputError
from canopy.runtime import Progress, log, progress_bar, setup_logging

if TYPE_CHECKING:
    from canopy.chips.plan import CutRules
    from canopy.chips.splits import SplitRules

_OF_PAIRS = (
    "gsd", "label_rule", "register", "max_shift_m", "rh", "buffer_m", "block_m", "val", "test", "hold_out",
    "limit", "workers",
)  # fmt: skip
_FIRST_SEED = 1000  # far from 0, the demo's


@dataclass(frozen=True)
class CutOptions:
    """How chips are cut, see `canopy.chips.plan.CutRules`."""

    size_px: Annotated[int, typer.Option("--size-px", help="Side of a chip's image, pixels.")] = 256
    gsd: Annotated[
        float, typer.Option("--gsd", help="Ground metres per image pixel; labels get twice it.")
    ] = 0.5
    label_rule: Annotated[
        str, typer.Option("--label-rule", help="Several label pixels become one: mean or max.")
    ] = "mean"
    register: Annotated[
        bool, typer.Option("--register/--no-register", help="Measure and undo the shift of labels.")
    ] = True
    max_shift_m: Annotated[
        float, typer.Option("--max-shift-m", help="Undo shifts up to this; reject chips beyond it.")
    ] = 10.0
    rh: Annotated[int, typer.Option("--rh", help="Relative height of GEDI shots (column gedi_path).")] = 98

    def rules(self) -> CutRules:
        from canopy.chips.plan import CutRules

        return CutRules(self.size_px, self.gsd, self.label_rule, self.register, self.max_shift_m, self.rh)


@dataclass(frozen=True)
class SplitOptions:
    """How chips without a split get one, see `canopy.chips.splits.SplitRules`."""

    buffer_m: Annotated[
        float, typer.Option("--buffer-m", help="Drop train chips closer than this to a test chip.")
    ] = 50.0
    block_m: Annotated[
        float, typer.Option("--block-m", help="Blocks that go to one split as a whole, where none is given.")
    ] = 1000.0
    val: Annotated[float, typer.Option("--val", help="Share of blocks for validation.")] = 0.1
    test: Annotated[float, typer.Option("--test", help="Share of blocks for testing.")] = 0.1
    hold_out: Annotated[
        list[str] | None,
        typer.Option("--hold-out", help="Site (or pattern) that is test as a whole; repeat."),
    ] = None
    seed: Annotated[int, typer.Option("--seed", help="Of the splits, or of the first synthetic chip.")] = 0

    def rules(self) -> SplitRules:
        from canopy.chips.splits import SplitRules

        held_out = tuple(self.hold_out or ())
        return SplitRules(self.block_m, self.val, self.test, held_out, self.buffer_m, self.seed)


@takes_groups
def chips(
    *,
    context: typer.Context,
    out_dir: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder for the chips.")],
    manifest: Annotated[
        Path | None,
        typer.Option("--manifest", metavar="FILE", help="CSV or Parquet table of pairs, see below."),
    ] = None,
    synth: Annotated[
        int | None,
        typer.Option("--synth", metavar="N", help="Instead: N chips of the procedural forest, for training."),
    ] = None,
    cut: CutOptions,
    split: SplitOptions,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first rows of the manifest.")] = None,
    workers: Annotated[int, typer.Option("--workers", help="Processes.")] = 1,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Cut pairs of image and canopy height into training chips.

    The manifest has columns rgb_path, chm_path (paths count from its folder) and, if known, id, site, kind,
    split, crs, date_rgb, date_chm (or year_...), sensor or floor_m, gedi_path, licence. Rows without chm_path
    become chips without heights, for canopy pretrain. Given splits are kept; the rest is split by
    blocks of ground. DIR gets shards/, index.csv and .parquet, summary.json and
    contact_sheet.png. Run it again to go on after an interruption or with a longer manifest: nothing is cut
    twice. Exit code 3 when some files could not be read (index.csv says which).

    With --synth there is no manifest; canopy train mixes such chips in by data.chips=[chips,synth].

    Example: canopy data chips --manifest pairs/manifest.csv -o chips --hold-out 'WLOU*' --workers 4
    """
    if (manifest is None) == (synth is None):
        raise InputError("needs either --manifest or --synth")
    setup_logging(quiet, verbose)
    with progress_bar(quiet or json_) as progress:
        if manifest is None:
            refuse_given(
                context, *_OF_PAIRS, where="--synth", because="synthetic chips are drawn, not cut or split"
            )
            summary, told = _synth(out_dir, synth or 0, cut, split, overwrite, progress)
        else:
            summary, told = _pairs(manifest, out_dir, cut, split, limit, workers, overwrite, progress)
    if json_:
        print_json(summary)
    elif not quiet:
        typer.echo(f"{out_dir}: {told}")
    if summary.get("unreadable"):
        typer.echo(f"canopy: {summary['unreadable']} chips could not be read; see index.csv", err=True)
        raise typer.Exit(3)


def _pairs(
    manifest: Path,
    out_dir: Path,
    cut: CutOptions,
    split: SplitOptions,
    limit: int | None,
    workers: int,
    overwrite: bool,
    progress: Progress,
) -> tuple[dict[str, Any], str]:
    from canopy.chips.summary import split_note, table
    from canopy.chips.write import write_chips

    summary = write_chips(
        manifest, out_dir, cut.rules(), split.rules(),
        limit=limit, workers=workers, overwrite=overwrite, progress=progress,
    )  # fmt: skip
    note = split_note(summary)
    if note:
        log.warning(f"note: {note}")
    return summary, f"{table(summary)}\n{summary['cut_now']} of {summary['shards']} shards cut now"


def _synth(
    out_dir: Path, count: int, cut: CutOptions, split: SplitOptions, overwrite: bool, progress: Progress
) -> tuple[dict[str, Any], str]:
    from canopy.chips.made import write_synth

    seed = _FIRST_SEED + split.seed
    summary = write_synth(out_dir, count, cut.size_px, seed, overwrite=overwrite, progress=progress)
    return summary, f"{count} synthetic chips, {'made' if summary['cut_now'] else 'there already'}"
