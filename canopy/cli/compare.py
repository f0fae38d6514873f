"""`canopy compare`, `stats`, `trees` and `serve`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from canopy.cli.options import DryRun, Json, Overwrite, Quiet, Verbose, print_json, takes_groups
from canopy.evaluation.compare import CompareOptions, Comparison
from canopy.evaluation.compare import compare as compare_maps
from canopy.inference.options import AreaOptions

_HELP_MAP = "GeoTIFF, VRT or folder of tiles."
MapNodata = Annotated[float | None, typer.Option("--nodata", help="Map value that means missing.")]
MapBand = Annotated[
    str | None,
    typer.Option("--band", metavar="N|NAME", help="The height's band, of a file with several."),
]


@takes_groups
def compare(
    a: Annotated[str, typer.Argument(metavar="A.tif", help=f"First (earlier) map: {_HELP_MAP}")],
    b: Annotated[str, typer.Argument(metavar="B.tif", help="Second (later) map, likewise.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder for maps, tables, report.")],
    place: AreaOptions,
    options: CompareOptions,
    zones: Annotated[
        Path | None, typer.Option("--zones", metavar="POLYGONS", help="Also the change of each polygon.")
    ] = None,
    band: Annotated[str | None, typer.Option("--band", metavar="N|NAME", help="Of both maps.")] = None,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare two canopy height maps, in any CRS and pixel size: two products, or two dates.

    Writes difference.tif and cover.tif (products), or change.tif and classes.tif (dates: gain, loss, change
    in height
    where it is significant), with compare.json, CSV tables and report.html. The published v1 and v2 maps are
    read as
    they are: a quadkey tile, or a folder with chm/ (and msk/, metadata/).

    Examples:

      canopy compare ours.tif published/v2 -o agreement

      canopy compare chm_2018.tif chm_2022.tif --as dates --sigma-a 3 --sigma-b 3 -o change

      canopy compare v1 v2 --bbox 44.083,-71.296 --size-m 5000 -o v1-v2
    """
    from canopy.runtime import log, progress_bar, setup_logging

    setup_logging(quiet, verbose)
    bands = {"band_a": options.band_a or band, "band_b": options.band_b or band}
    with progress_bar(quiet or json_) as progress:
        found = compare_maps(
            a, b, out, zones=zones, layer=None if place.aoi else place.layer, area=place.area(),
            overwrite=overwrite, inputs=[place.aoi], progress=progress,
            **(options.model_dump() | bands),
        )  # fmt: skip
    for note in found.notes:
        log.warning(f"note: {note}")
    if json_:
        print_json(found.to_dict() | {"folder": str(out)})
    elif not quiet:
        _print(found, out)


def _print(found: Comparison, out: Path) -> None:
    overall, grid = found.sums.overall(), found.facts["grid"]
    correlation = "" if overall["r"] is None else f", r {overall['r']:.2f}"
    typer.echo(
        f"compared as {found.mode} on {grid['width_px']} x {grid['height_px']} px of {grid['gsd_m']:.3g} m, "
        f"{overall['area_ha']:,.1f} ha valid in both"
    )
    typer.echo(
        f"B - A: mean {overall['mean_difference_m']:+.2f} m, mean absolute "
        f"{overall['mean_absolute_difference_m']:.2f} m{correlation}"
    )
    if found.mode == "dates":
        parts = (f"{name} {ha:,.1f} ha" for name, ha in found.classes_ha.items())
        typer.echo(f"at {found.rule['confidence']:.0%} confidence: {', '.join(parts)}")
    if found.zones is not None:
        changed, total = int(found.zones["significant"][:-1].sum()), found.zones.iloc[-1]
        bounds = f"{total['change_lower_m']:+.2f} to {total['change_upper_m']:+.2f}"
        typer.echo(
            f"{len(found.zones) - 1} polygons, {changed} of them changed; together {total['change_m']:+.2f} m"
            + ("" if total.isna()["change_lower_m"] else f" ({bounds})")
        )
    typer.echo(
        f"{out}: maps, tables, compare.json" + (", report.html" if (out / "report.html").exists() else "")
    )


def stats(
    height_map: Annotated[
        str, typer.Argument(metavar="MAP.tif", help="Height map: a GeoTIFF, VRT, or folder of tiles.")
    ],
    zones: Annotated[
        Path, typer.Option("--zones", metavar="POLYGONS", help="Polygons: any vector file, any CRS.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", metavar="TABLE", help="A .parquet or .gpkg (with the polygons), or .csv."
        ),
    ],
    percentiles: Annotated[
        str, typer.Option("--percentiles", metavar="LIST", help="Of height, 0 to 100.")
    ] = "5,25,50,75,95",
    above: Annotated[
        str, typer.Option("--above", metavar="LIST", help="Cover is the share of ground higher, metres.")
    ] = "2,5,10",
    interval: Annotated[
        float | None,
        typer.Option("--interval", metavar="0.9", help="Add intervals of means and covers."),
    ] = None,
    total: Annotated[bool, typer.Option("--total", help="A last row for all polygons together.")] = False,
    nodata: MapNodata = None,
    band: MapBand = None,
    layer: Annotated[str | None, typer.Option("--layer", help="Of a vector file that has several.")] = None,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Mean height, percentiles, canopy cover and area per polygon.

    Pixels count by the ground they share with the polygon, so small and crooked polygons are exact. Polygons
    outside the map stay in the table with n = 0. Intervals need a map of canopy predict --interval 0.9; they
    take into account that neighbouring errors are alike (docs/uncertainty.md).

    Example: canopy stats chm.tif --zones stands.gpkg -o stats.parquet
    """
    from canopy.evaluation.scores import without_nan
    from canopy.evaluation.zones import stats as zone_stats
    from canopy.runtime import log, progress_bar, setup_logging

    setup_logging(quiet, verbose)
    shares, heights = _numbers(percentiles, "--percentiles"), _numbers(above, "--above")
    with progress_bar(quiet or json_) as progress:
        table = zone_stats(
            height_map, zones, out, overwrite=overwrite, progress=progress, percentiles=shares,
            above_m=heights, interval=interval, total=total, nodata=nodata, band=band, layer=layer,
        )  # fmt: skip
    for note in table.attrs["notes"]:
        log.warning(f"note: {note}")
    whole = without_nan(table.loc[:, "n":].iloc[-1].to_dict()) if total else None
    table = table.iloc[: len(table) - total]
    empty = int((table["n"] == 0).sum())
    valid_ha = float(table["valid_ha"].sum())
    mean = float((table["mean_m"] * table["valid_ha"]).sum() / valid_ha) if valid_ha else None
    facts = {
        "file": str(out), "zones": len(table), "without_pixels": empty, "valid_ha": valid_ha, "mean_m": mean,
        "notes": list(table.attrs["notes"]),
    } | ({"total": whole} if whole else {})  # fmt: skip
    if json_:
        print_json(facts)
    elif not quiet:
        height = "" if mean is None else f", mean height {mean:.1f} m"
        outside = f", {empty} without valid pixels" if empty else ""
        typer.echo(f"{out}: {len(table)} polygons{outside}, {valid_ha:,.1f} ha{height}")


def trees(
    height_map: Annotated[
        str, typer.Argument(metavar="MAP.tif", help="Height map: a GeoTIFF, VRT, or folder of tiles.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", metavar="TABLE", help="A .gpkg (layers crowns and tops) or .parquet (GeoParquet)."
        ),
    ],
    crowns: Annotated[
        Path | None,
        typer.Option("--crowns", metavar="POLYGONS", help="Put heights on these, of any detector, instead."),
    ] = None,
    min_height: Annotated[
        float | None, typer.Option("--min-height", help="Of a tree, metres. Default: 2.")
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            "--window", metavar="A,B,C",
            help="No two tops within a crown of A + B h + C h^2 metres. Default: 2.51503,0,0.00901 (all "
            "trees of Popescu and Wynne 2004).",
        ),
    ] = None,
    smooth: Annotated[
        float | None, typer.Option("--smooth", help="Of the heights first, sigma in metres. Default: 0.5.")
    ] = None,
    nodata: MapNodata = None,
    band: MapBand = None,
    layer: Annotated[str | None, typer.Option("--layer", help="Of crowns that have several.")] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Tree tops and crowns of a height map, or the heights of crowns from anybody's detector.

    Tops are the highest places within a window that grows with height; crowns are a watershed from them.
    The heights are the map's: docs/trees.md says how many trees are found, and how well.

    Examples:

      canopy trees chm.tif -o trees.gpkg

      canopy trees chm.tif --min-height 5 --window 3.75105,-0.17919,0.01241 -o pines.parquet

      canopy trees chm.tif --crowns detected.gpkg -o heights.gpkg
    """
    from canopy.evaluation.trees.table import trees as tree_table
    from canopy.runtime import log, progress_bar, setup_logging

    setup_logging(quiet, verbose)
    options = {
        "min_height_m": min_height, "window": window and _numbers(window, "--window"), "smooth_m": smooth,
        "nodata": nodata, "band": band, "layer": layer,
    }  # fmt: skip
    with progress_bar(quiet or json_) as progress:
        table = tree_table(
            height_map, out, crowns=crowns, overwrite=overwrite, dry_run=dry_run, progress=progress,
            **{name: value for name, value in options.items() if value is not None},
        )  # fmt: skip
    notes, work = table.attrs["notes"], table.attrs["work"]
    for note in notes:
        log.warning(f"note: {note}")
    name = "height_m" if crowns is None else "p95_m"
    height = float(table[name].mean()) if len(table) and not dry_run and table[name].notna().any() else None
    facts = {"file": str(out), "work": work, "notes": notes}
    if json_ and dry_run:
        print_json({"dry_run": True} | facts)
    elif json_:
        print_json(facts | {"trees": len(table), f"mean_{name}": height})
    elif dry_run:
        typer.echo(f"{out}: nothing written; would walk over {work}")
    elif not quiet:
        told = "" if height is None else f", mean {name.removesuffix('_m').replace('_', ' ')} {height:.1f} m"
        typer.echo(f"{out}: {len(table):,} {'trees' if crowns is None else 'crowns'}{told}")


def _numbers(text: str, where: str) -> tuple[float, ...]:
    """Numbers of a comma-separated list."""
    from canopy.errors import ConfigError

    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"cannot read {text!r}", where=where, expected="numbers, such as 2,5,10") from None


def serve(
    maps: Annotated[
        list[str],
        typer.Argument(
            metavar="MAP.tif|DIR [MAP2.tif]", help="One or two maps; a folder may be of `canopy map`."
        ),
    ],
    imagery: Annotated[
        str | None,
        typer.Option(
            "--imagery", metavar="FILE|DIR|URL",
            help="What lies under the heights; an XYZ template too. Default: the first map's own source, if "
            "it is on this computer.",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", min=1, max=65535, help="Default: the first free one from 8000 on."),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    export: Annotated[
        Path | None,
        typer.Option("-o", "--export", metavar="DIR", help="Write the page for any web space instead."),
    ] = None,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Show height maps in the browser, with their image, a swipe, profiles and statistics of polygons.

    The page is for this computer alone (127.0.0.1), needs nothing from elsewhere, and ends with Ctrl-C.

    Examples:

      canopy serve chm.tif --open

      canopy serve chm_2018.tif chm_2022.tif --imagery aerial.tif

      canopy serve county

      canopy serve chm.tif --export page
    """
    from canopy.errors import InputError, refuse_options, require
    from canopy.runtime import log, setup_logging
    from canopy.viewer import app
    from canopy.viewer.page import open_view

    setup_logging(quiet, verbose)
    if len(maps) > 2:
        raise InputError(f"{len(maps)} maps", where="canopy serve", expected="one or two")
    if export is not None:
        refuse_options({"--port": port, "--open": open_ or None}, where="--export", because="serves nothing")
        _export_page(maps, imagery, export, overwrite=overwrite, json_=json_, quiet=quiet)
        return
    refuse_options(
        {"--overwrite": overwrite or None, "--json": json_ or None}, where="canopy serve",
        because="without --export nothing is written",
    )  # fmt: skip
    require("the local web map", app.EXTRA, "starlette", "uvicorn")
    with app.listen(port) as here:
        view = open_view(maps, imagery)
        for layer in view.layers:
            for note in layer.heights.notes:
                log.warning(f"note: {note}")
        address = f"http://{app.HOST}:{here.getsockname()[1]}/"
        typer.echo(f"{address} (Ctrl-C ends it)")
        app.run(view, here, address if open_ else None)
    log.info("stopped")


def _export_page(
    maps: list[str], imagery: str | None, folder: Path, *, overwrite: bool, json_: bool, quiet: bool
) -> None:
    """Write the page of `canopy serve --export`, and say what it is."""
    from canopy.runtime import log, progress_bar
    from canopy.viewer.export import export as export_page
    from canopy.viewer.page import open_view

    with progress_bar(quiet or json_) as progress:
        found = export_page(
            open_view(maps, imagery), folder, [*maps, imagery], overwrite=overwrite, progress=progress
        )
    for note in found["notes"]:
        log.warning(f"note: {note}")
    if json_:
        print_json(found)
    elif not quiet:
        typer.echo(
            f"{folder}: a page of {found['tiles']:,} tiles, {found['bytes'] / 1e6:,.1f} MB; "
            f"see it with: python -m http.server --directory {folder}"
        )
