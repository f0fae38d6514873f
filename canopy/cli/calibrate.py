"""`canopy calibrate`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from canopy.cli.options import Json, Overwrite, Quiet, Verbose, print_json

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _calibrate() -> None:
    """Calibrate: correct a map by GEDI; give a model intervals."""


@app.command("gedi")
def gedi(
    map_: Annotated[Path, typer.Argument(metavar="MAP.tif", help="Height map in metres.")],
    shots: Annotated[
        Path, typer.Option("--shots", metavar="SHOTS.parquet", help="Table of canopy data gedi.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="CORRECTED.tif", help="GeoTIFF to write.")],
    rh: Annotated[int, typer.Option("--rh", help="Relative height to match: 95, 98, ...")] = 98,
    band: Annotated[
        str | None,
        typer.Option("--band", metavar="N|NAME", help="The height's band, of several."),
    ] = None,
    encoding: Annotated[str, typer.Option("--encoding", help="float32, uint16cm or uint8m.")] = "float32",
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Correct a height map by the GEDI shots that lie on it.

    Writes CORRECTED.tif with the band correction_se (its standard error), CORRECTED.gedi.json (fit, and
    scores on shots it was not fitted on) and CORRECTED.gedi.png. Bare ground stays at 0 m;
    where there is no clear evidence for a change nothing changes.

    Example: canopy calibrate gedi chm.tif --shots shots.parquet -o chm_gedi.tif
    """
    from canopy.calibration.gedi import correct_map
    from canopy.runtime import log, progress_bar, setup_logging

    setup_logging(quiet, verbose)
    with progress_bar(quiet or json_) as progress:
        report = correct_map(
            map_, shots, out, rh=rh, band=band, encoding=encoding, overwrite=overwrite, progress=progress
        )
    for note in report["notes"]:
        log.warning(f"note: {note}")
    if json_:
        print_json(report)
    elif not quiet:
        typer.echo(f"{report['output']}: corrected by {report['shots']} shots{_held_out(report['held_out'])}")


def _held_out(scores: dict[str, Any]) -> str:
    if not scores["n"]:
        return "; too few to hold some out"

    def change(key: str) -> str:
        return f"{scores['before'][key]:.2f} m before, {scores['after'][key]:.2f} m after"

    text = f"; {scores['n']} held out: MAE {change('mae_m')}"
    outliers = scores["n"] - scores["n_good"]
    if outliers and scores["n_good"]:
        text += f" (without {outliers} that no curve explains: {change('mae_good_m')})"
    return text


@app.command("interval")
def interval(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's name or .safetensors file.")],
    data: Annotated[Path, typer.Option("--data", help="A chips folder (canopy data chips).")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="MODEL2", help="Model file to write.")],
    kept_from: Annotated[
        list[Path] | None,
        typer.Option(
            "--kept-from",
            metavar="MODEL",
            help="A model of the same training that was kept from some sites (data.val_sites): it tells how "
            "wide bands must be in new places. Several.",
        ),
    ] = None,
    splits: Annotated[str, typer.Option("--splits", help="Held-out splits to calibrate on.")] = "val",
    report: Annotated[
        str, typer.Option("--report", help="Splits to report coverage on and nothing else.")
    ] = "test,test_hard",
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Give a model calibrated intervals, for `canopy predict --interval` and for areas.

    Predicts the held-out chips, reads off how far the lidar lies from the predictions (split conformal, by
    predicted height and spread), verifies each half of the blocks with the calibration of the other, and
    writes the model with the result in its card. Tensors are not touched. The training images become the
    reference of --quality-band's out-of-domain flag. With lidar of your own place as --data, bands hold
    there. Chips that the model was trained on make them too narrow: it says how many there are.

    Example: canopy calibrate interval default --data chips -o calibrated.safetensors
    Example: canopy calibrate interval default --data my_chips --splits train,val -o mine.safetensors
    """
    from canopy.calibration.calibrate import calibrate_model
    from canopy.runtime import progress_bar, setup_logging

    setup_logging(quiet, verbose)
    with progress_bar(quiet or json_) as progress:
        facts = calibrate_model(
            model, data, out, kept_from=kept_from or (), splits=_names(splits),
            report_splits=_names(report), overwrite=overwrite, progress=progress,
        )  # fmt: skip
    if json_:
        print_json(facts)
    elif not quiet:
        _print_coverage(facts)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _print_coverage(facts: dict[str, Any]) -> None:
    seen = facts["seen_in_training"]
    told = f", {seen} of them seen in training" if seen else ""
    typer.echo(f"{facts['output']}: calibrated on {facts['chips']} chips{told}")
    for row in facts["verified_on_unseen_halves"]:
        _print_row(f"{100 * row['level']:.0f} % bands, unseen halves", row["overall"])
        if row["level"] == 0.9:
            for name, part in row["by_height"].items():
                _print_row(f"  predicted {name} m", part)
    for size, row in facts.get("areas_on_unseen_halves", {}).items():
        _print_row(f"90 % of means over {size} m, unseen halves", row)
    for site, row in (facts.get("new_places") or {}).get("places", {}).items():
        _print_row(f"90 % bands in new places, {site}", row)
    for split, row in facts["elsewhere"].items():
        _print_row(f"90 % bands, {split}", row["overall"])


def _print_row(name: str, row: dict[str, Any]) -> None:
    typer.echo(f"{name}: {100 * row['coverage']:.1f} % inside, mean width {row['mean_width_m']:.1f} m")
