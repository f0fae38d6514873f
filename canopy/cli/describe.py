"""`canopy data describe FILE`: what canopy would take from a file, said by the readers of its commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from canopy.errors import CanopyError, InputError

_LOOK_PX = 512  # side of each of the nine windows of a quick look at heights
_CLOUDS, _GRANULES = (".las", ".laz"), (".h5", ".hdf5")
_MODELS = (".safetensors", ".ckpt", ".pth", ".pt")


def describe_file(path: Path, *, band: str | None = None, layer: str | None = None) -> dict[str, Any]:
    """JSON-ready facts of an image, height raster, vector file, table, point cloud, granule or model.

    Args:
        path: an existing file, or a .gdb folder.
        band: number or name of the height's band, as `--band` of the commands.
        layer: of a vector file, as `--layer` of the commands.

    Raises CanopyError, the reader's own, for a file that no reader takes.
    """
    from canopy.evaluation.samples import PARQUETS, TEXTS
    from canopy.geo.vector import FIRST_BYTES

    suffix = path.suffix.lower()
    if suffix in _CLOUDS:
        return _cloud(path)
    if suffix in _GRANULES:
        return _granule(path)
    if suffix in _MODELS:
        from canopy.models.checkpoint import describe

        return {"kind": "model", **describe(path)}
    if suffix in (*FIRST_BYTES, *TEXTS, *PARQUETS, ".gdb"):
        return _vector(path, layer)
    return _raster(path, band)


def _views(views: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """What each reader makes of the file, or why it refuses it; an error where all of them do."""
    found: dict[str, Any] = {}
    errors: dict[str, CanopyError] = {}
    for name, view in views.items():
        try:
            found[name] = view()
        except CanopyError as error:
            errors[name], found[name] = error, {"refused": str(error)}
    if len(errors) < len(views):
        return found
    if len({str(error) for error in errors.values()}) == 1:
        raise next(iter(errors.values()))
    raise InputError("; ".join(f"{name.replace('_', ' ')}: {error}" for name, error in errors.items()))


def _crs(given: Any) -> dict[str, Any]:
    """The horizontal part that places pixels and shapes, and the datum of heights where one is named."""
    import pyproj

    from canopy.geo.crs import to_crs

    if not given:
        return {"crs": None}
    try:
        own = pyproj.CRS(given.to_wkt())
        vertical = next((part.name for part in own.sub_crs_list if part.is_vertical), None)
        if vertical is None and len(own.axis_info) == 3:
            vertical = "heights above the ellipsoid"
        return {"crs": str(to_crs(given)), "crs_name": own.name, "vertical_datum": vertical}
    except (CanopyError, pyproj.exceptions.CRSError):  # the views say what is wrong with it
        return {"crs": str(given)}


# ---- rasters --------------------------------------------------------------------------------------
def _raster(path: Path, band: str | None) -> dict[str, Any]:
    from canopy.geo.reading import open_raster

    with open_raster(path, georeferenced=False) as ds:
        tags = ds.tags()
        bands = [
            {"band": i, "name": name, "colour": colour.name, "type": kind, "unit": unit, "nodata": nodata,
             "validity": [flag.name for flag in flags]}
            for i, (name, colour, kind, unit, nodata, flags) in enumerate(
                zip(ds.descriptions, ds.colorinterp, ds.dtypes, ds.units, ds.nodatavals, ds.mask_flag_enums,
                    strict=True), 1)
        ]  # fmt: skip
        facts = {
            "kind": "raster",
            "driver": ds.driver,
            "size_px": [ds.width, ds.height],
            **_crs(ds.crs),
            "bands": bands,
        }
    return facts | _views(
        {"as_imagery": lambda: _imagery(path, tags), "as_heights": lambda: _heights(path, tags, band)}
    )


def _dated(days: Sequence[str], tags: Mapping[str, str], path: Path) -> dict[str, Any]:
    from canopy.imagery.dates import acquisition_date

    if not days:
        return {"date": None, "date_from": "none"}
    tagged = tags.get("CANOPY_DATES") or str(acquisition_date(tags, "")) == days[0]
    named = acquisition_date({}, str(path))
    return {"date": "/".join(days), "date_from": "tag" if tagged else "name" if named else "a file beside it"}


def _imagery(path: Path, tags: Mapping[str, str]) -> dict[str, Any]:
    from canopy.imagery.base import ReadOptions
    from canopy.imagery.files import open_files

    with open_files([str(path)], ReadOptions(), name=str(path)) as source:
        source.scenes[0].check()
        plan = source.scenes[0].facts.plan
        return {
            "crs": str(source.native_crs),
            "gsd_m": source.native_gsd_m,
            "rgb_bands": "palette" if plan.palette is not None else list(plan.indexes),
            "white": plan.divisor,
            **_dated(source.dates, tags, path),
            "notes": list(source.notes),
        }


def _heights(path: Path, tags: Mapping[str, str], band: str | None) -> dict[str, Any]:
    from canopy.evaluation.grids import own_grid
    from canopy.evaluation.opening import open_heights

    with open_heights(path, band=band) as heights:
        bands, grid = heights.tiles[0].bands, own_grid(heights)
        h, w = (min(side, _LOOK_PX) for side in grid.shape)
        tops, lefts = (
            {round(part * (side - size)) for part in (0, 0.5, 1)}
            for side, size in zip(grid.shape, (h, w), strict=True)
        )
        low, high, usable = [], [], 0
        for top in sorted(tops):
            for left in sorted(lefts):
                values, valid = heights.read(grid.window(top, left, h, w))
                usable += int(valid.sum())
                if valid.any():
                    low.append(float(values[0][valid].min()))
                    high.append(float(values[0][valid].max()))
        return {
            "crs": str(heights.crs),
            "gsd_m": heights.gsd_m,
            "height_band": bands.indexes[0],
            "interval_bands": list(bands.indexes[1:]),
            "metres_per_value": bands.scale[0],
            "offset_m": bands.offset[0],
            "looked_at_px": len(tops) * len(lefts) * h * w,
            "usable_px": usable,
            "heights_m": [min(low), max(high)] if low else None,
            "impossible_value": heights.impossible[1] if heights.impossible[0] else None,
            **_dated(heights.dates, tags, path),
            "notes": list(heights.notes),
        }


# ---- shapes and tables ----------------------------------------------------------------------------
def _vector(path: Path, layer: str | None) -> dict[str, Any]:
    from pyogrio import list_layers

    from canopy.evaluation.samples import PARQUETS, TEXTS, load_samples, table_format
    from canopy.geo.vector import layer_of, read_zones

    suffix = path.suffix.lower()
    text, parquet = suffix in TEXTS, suffix in PARQUETS

    def taken(polygons: bool) -> dict[str, Any]:
        return {} if text or parquet else {"layer": layer_of(path, layer, polygons)}

    def zones() -> dict[str, Any]:
        frame, crs, areas = read_zones(path, layer)
        used = sum(area is not None for area in areas)
        return {**taken(True), "features": len(frame), "polygons": used, "crs": str(crs)}

    def samples(kind: str) -> dict[str, Any]:
        found = load_samples(kind, path, layer=layer)
        shapes = sorted(set(found.frame.geom_type.dropna()))
        notes = [f"{count} rows left out: {why}" for why, count in found.dropped.items()]
        notes += [f"converted from {found.unit} to metres"] if found.unit else []
        return {
            **(taken(False) if kind == "plots" else {}), "rows": len(found.frame), "geometry": shapes,
            "height_column": found.column, "radius_m": found.radius_m, "date": "/".join(found.dates) or None,
            "notes": notes,
        }  # fmt: skip

    views = {"as_zones": zones, "as_plots": lambda: samples("plots")}
    if text:
        del views["as_zones"]
    if text or parquet:
        views["as_gedi_shots"] = lambda: samples("gedi")
    facts: dict[str, Any] = {"kind": "table" if text else "vector"}
    found = _views(views)
    if text:
        facts["delimiter"], facts["decimal"] = table_format(path)
    elif not parquet:
        facts["layers"] = {str(name): str(shapes) for name, shapes in list_layers(path)}
    return facts | found


# ---- lidar ----------------------------------------------------------------------------------------
def _cloud(path: Path) -> dict[str, Any]:
    from canopy.labels.points import open_lidar

    file = open_lidar(path)
    return {
        "kind": "point cloud", "points": file.points, "crs": str(file.crs), "bounds": list(file.bounds),
        "metres_per_z": file.z_to_m, "point_format": file.point_format, "points_are_dated": file.has_dates,
    }  # fmt: skip


def _granule(path: Path) -> dict[str, Any]:
    from canopy.labels.granules import beams_of, open_granule

    with open_granule(path) as file:
        beams = {beam.name: {"shots": beam.count, "type": beam.type} for beam in beams_of(file, path)}
    return {"kind": "GEDI L2A granule", "crs": "EPSG:4326", "beams": beams}
