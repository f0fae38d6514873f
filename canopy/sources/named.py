"""Sources of the manifests, opened by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from canopy.errors import ImageryError, refuse_options
from canopy.geo.aoi import AOI
from canopy.geo.crs import to_crs
from canopy.sources.imagery import ImagerySource, ReadOptions
from canopy.sources.manifest import ImageryManifest, named_source

UINT8_WHITE = 255.0


def open_named(name: str, area: AOI | None, options: ReadOptions) -> ImagerySource:
    """Open a source of `data_manifests/imagery`.

    What the user said wins over the manifest's bands and scaling.

    Raises:
        InputError: no such source; the message names the nearest one and lists all.
    """
    manifest = named_source(name)
    source = _open(manifest, area, _with_declared(options, manifest))
    source.notes.append(f"{manifest.name}: {manifest.attribution}, {manifest.licence}")
    return source


def _with_declared(options: ReadOptions, manifest: ImageryManifest) -> ReadOptions:
    """Fill what the user left open from the manifest."""
    if manifest.kind in ("demo", "xyz"):
        return options
    # White = 255 is what uint8 means anyway; leaving it out keeps a uint16 file from passing unnoticed.
    declared = None if manifest.scale == UINT8_WHITE else manifest.scale
    return replace(
        options,
        bands=options.bands if options.bands is not None else manifest.bands,
        scale=options.scale if options.scale is not None else declared,
    )


def _open(manifest: ImageryManifest, area: AOI | None, options: ReadOptions) -> ImagerySource:
    if manifest.kind == "demo":
        from canopy.sources.demo import DemoSource

        refuse_options(
            {
                "--bands": options.bands, "--scale": options.scale, "--input-crs": options.crs,
                "--nodata": options.nodata, "--datetime": options.datetime,
            },
            where=manifest.name, because="the demo is a scene of its own, drawn in RGB for one day",
        )  # fmt: skip
        return DemoSource()
    if manifest.kind == "xyz":
        return _open_tiles(manifest, area, options)
    if manifest.kind == "stac":
        from canopy.sources.stac import StacQuery, open_stac

        query = StacQuery(
            manifest.location(), manifest.name, manifest.collection, manifest.assets, manifest.signing
        )
        return open_stac(query, area, options, gsd_m=manifest.gsd_m)
    return _open_local(manifest, options)


def _open_tiles(manifest: ImageryManifest, area: AOI | None, options: ReadOptions) -> ImagerySource:
    from canopy.sources.xyz import DEFAULT_GSD_M, TileService, TileSource

    service = TileService(
        manifest.location(),
        manifest.name,
        tile_px=manifest.tile_px,
        min_zoom=manifest.min_zoom,
        max_zoom=manifest.max_zoom,
        absent_statuses=manifest.absent_statuses,
        placeholder_sha256=manifest.placeholder_sha256,
        outline=AOI(manifest.geometry, to_crs("EPSG:4326")),
    )
    # Finer than the imagery itself there is nothing to fetch.
    wanted = replace(options, gsd_m=max(options.gsd_m or DEFAULT_GSD_M, manifest.gsd_m))
    return TileSource(service, wanted, area=area)


def _open_local(manifest: ImageryManifest, options: ReadOptions) -> ImagerySource:
    from canopy.sources.files import open_files
    from canopy.sources.paths import is_url, list_directory

    location = manifest.location()
    if manifest.kind == "file" and (is_url(location) or Path(location).is_file()):
        return open_files([location], options, name=manifest.name)
    if manifest.kind == "dir" and Path(location).is_dir():
        files = [str(path) for path in list_directory(Path(location))]
        return open_files(files, options, name=manifest.name, newest_first=True)
    raise ImageryError(
        f"the source {manifest.name!r} reads from a {manifest.kind} that is not there", where=location
    )
