"""`canopy data`: make, fetch and prepare data. Here: synthetic scenes with exact truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from canopy.cli.common import Json, Overwrite, Quiet, Verbose, print_json
from canopy.cli.data_catalog import describe, get, list_data, verify
from canopy.cli.data_chips import chips
from canopy.cli.data_chm import chm
from canopy.cli.data_gedi import gedi

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _data() -> None:
    """Data: synthetic scenes, lidar, GEDI and imagery."""


@app.command("synth")
def synth(
    out_dir: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder for the five files.")],
    seed: Annotated[int, typer.Option("--seed", help="What stands where; 0 is the demo's scene.")] = 0,
    size_m: Annotated[float, typer.Option("--size-m", help="Side of the square, metres.")] = 1000.0,
    gsd: Annotated[float, typer.Option("--gsd", help="Pixel side in metres, 0.1 to 5.")] = 0.5,
    gedi_jitter_m: Annotated[
        float, typer.Option("--gedi-jitter-m", help="Standard deviation of GEDI's position error per axis.")
    ] = 0.0,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """A procedural forest and everything that is known of it, all from the same trees.

    Writes DIR/rgb.tif (imagery), chm.tif (true height, metres), points.laz (classified lidar),
    gedi.h5 (GEDI L2A layout) and scene.json (place, what was planted, checksums).

    Example: canopy data synth -o scene --seed 7 --size-m 500
    """
    from canopy.runtime import progress_bar, setup_logging
    from canopy.sources.synth_scene import write_scene

    setup_logging(quiet, verbose)
    with progress_bar(quiet or json_) as progress:
        facts = write_scene(
            out_dir,
            seed,
            size_m,
            gsd,
            gedi_jitter_m=gedi_jitter_m,
            overwrite=overwrite,
            progress=progress,
        )
    if json_:
        print_json(facts)
        return
    if quiet:
        return
    planted = facts["planted"]
    side = f"{facts['width_px']} x {facts['height_px']} px of {facts['spec']['gsd_m']:g} m"
    typer.echo(f"{out_dir}: {side}, {facts['crs']}")
    typer.echo(
        f"{planted['trees']} trees, tallest {planted['highest_m']:.1f} m, cover {planted['cover']:.0%}; "
        f"{planted['points']['total']} points, {planted['gedi']['count']} GEDI shots"
    )


app.command("chips")(chips)
app.command("chm")(chm)
app.command("gedi")(gedi)
app.command("list")(list_data)
app.command("describe")(describe)
app.command("get")(get)
app.command("verify")(verify)
