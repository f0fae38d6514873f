"""The tiles as one raster: DIR/mosaic, an index that GDAL and QGIS open, with overviews of the whole region.

It is a VRT, which every GDAL reads: over the tiles themselves, or, when they are many thousands, over a
spatial index of them (GTI, GDAL 3.9 or later), so that opening stays quick. DIR/mosaic.vrt is the same, for
programs that go by the suffix. Tiles partition the region's grid, so there is neither gap nor overlap; tiles
without imagery have no file and read as nodata.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import rasterio
from odc.geo.crs import CRS

from canopy.errors import OutputError
from canopy.files import replacing
from canopy.geo.grid import Grid
from canopy.inference.extras import band_specs
from canopy.inference.region.ledger import Ledger
from canopy.inference.region.plan import Prepared
from canopy.inference.region.task import TILES
from canopy.inference.region.tiling import TileTask, Tiling

MOSAIC = "mosaic"
OVERVIEW = "overview.tif"
INDEX = "index.gti.gpkg"
VRT_MOST_TILES = 10_000
# The overview file starts where it is at most this wide; finer levels are in the tiles themselves.
OVERVIEW_PX = 8192
OVERVIEW_FROM = 8
_STRIP = 512
_GDAL_TYPES = {"float32": "Float32", "uint16": "UInt16", "uint8": "Byte"}


def write_mosaic(ledger: Ledger, prepared: Prepared, folder: Path, most_vrt: int = VRT_MOST_TILES) -> Path:
    """Write DIR/mosaic with its overviews; returns its path.

    Raises:
        OutputError: it cannot be written.
    """
    tiling, bands, encoding = prepared.tiling, prepared.bands, prepared.settings.encoding
    count = ledger.counts()["done"]
    for name in (INDEX, OVERVIEW):
        (folder / name).unlink(missing_ok=True)
    indexed = count > most_vrt
    tiles = [] if indexed else [row.task for row in ledger.rows("done")]
    path = folder / f"{MOSAIC}.vrt"

    def write(overview: bool) -> None:
        if indexed:
            lines = _over_index(tiling, encoding, bands, overview)
        else:
            lines = _over_tiles(tiling, tiles, encoding, bands, overview)
        _write_text(path, lines)

    if indexed:
        facts = _index_facts(tiling, encoding, len(bands))
        _write_index(folder / INDEX, tiling, (row.task for row in ledger.rows("done")), facts)
    write(overview=False)
    if count and write_overview(path, folder / OVERVIEW, tiling.area, encoding, bands):
        write(overview=True)
    _write_text(folder / MOSAIC, iter([path.read_text(encoding="utf-8")]))
    return folder / MOSAIC


def overview_factor(area: Grid) -> int:
    """How many pixels of the map make one of the overview file: a power of two."""
    factor = OVERVIEW_FROM
    while max(area.shape) / factor > OVERVIEW_PX:
        factor *= 2
    return factor


def write_overview(
    mosaic: Path, path: Path, area: Grid, encoding: str, bands: tuple[tuple[str, str], ...]
) -> bool:
    """The whole region at a coarse pixel, as a COG (which has the coarser levels inside).

    Read through the tiles' own overviews, so that it costs a glance at every tile. False where the region is
    too small to need one.
    """
    from rasterio.enums import Resampling
    from rasterio.windows import Window

    from canopy.geo.raster import CogWriter, raster_env

    factor = overview_factor(area)
    height, width = -(-area.height // factor), -(-area.width // factor)
    if max(height, width) < 64:
        return False
    px, py = area.pixel
    west, north = area.xy(0, 0)
    grid = Grid.of(area.crs, (px * factor, 0, west, 0, -py * factor, north), (height, width))
    writer = CogWriter(path, grid, band_specs(bands), encoding=encoding, overwrite=True)
    with raster_env(), rasterio.open(mosaic) as dataset, writer:
        scales = np.array(dataset.scales, np.float32)[:, None, None]
        for row in range(0, height, _STRIP):
            for col in range(0, width, _STRIP):
                h, w = min(_STRIP, height - row), min(_STRIP, width - col)
                fine_h = min(h * factor, area.height - row * factor)
                fine_w = min(w * factor, area.width - col * factor)
                window = Window(col * factor, row * factor, fine_w, fine_h)
                # Heights are averaged; days and flags are taken as they are somewhere.
                parts = [
                    dataset.read(
                        number, window=window, out_shape=(h, w), masked=True,
                        resampling=Resampling.average if unit == "m" else Resampling.nearest,
                    )
                    for number, (_, unit) in enumerate(bands, 1)
                ]  # fmt: skip
                values = np.stack([np.ma.filled(p.astype(np.float32), np.nan) for p in parts]) * scales
                writer.write(values, np.logical_and.reduce(np.isfinite(values)), row, col)
    return True


def _stored(encoding: str) -> tuple[str, str, float]:
    """GDAL's type, nodata text and scale of an encoding."""
    from canopy.geo.encoding import encoding_named

    found = encoding_named(encoding)
    nodata = "nan" if np.isnan(found.nodata) else f"{found.nodata:g}"
    return _GDAL_TYPES[found.dtype], nodata, found.step_m


def _over_tiles(
    tiling: Tiling, tiles: list[TileTask], encoding: str, bands: tuple[tuple[str, str], ...], overview: bool
) -> Iterator[str]:
    """Lines of a VRT over the tiles themselves."""
    dtype = _stored(encoding)[0]

    def sources(number: int) -> Iterator[str]:
        for task in tiles:
            top, left, height, width = tiling.offset(task.row, task.col)
            size = f'xSize="{width}" ySize="{height}"'
            yield (
                f'    <SimpleSource><SourceFilename relativeToVRT="1">{TILES}/{escape(task.id)}.tif'
                f"</SourceFilename><SourceBand>{number}</SourceBand>"
                f'<SourceProperties RasterXSize="{width}" RasterYSize="{height}" DataType="{dtype}" '
                f'BlockXSize="512" BlockYSize="512"/>'
                f'<SrcRect xOff="0" yOff="0" {size}/><DstRect xOff="{left}" yOff="{top}" {size}/>'
                "</SimpleSource>"
            )

    return _vrt(tiling, sources, encoding, bands, overview)


def _vrt(
    tiling: Tiling,
    sources: Callable[[int], Iterator[str]],
    encoding: str,
    bands: tuple[tuple[str, str], ...],
    overview: bool,
) -> Iterator[str]:
    """Lines of a VRT of the region's grid; `sources` gives those of a band, by its number."""
    area = tiling.area
    yield f'<VRTDataset rasterXSize="{area.width}" rasterYSize="{area.height}">'
    yield f'  <SRS dataAxisToSRSAxisMapping="{axis_mapping(area.crs)}">{escape(area.crs.to_wkt())}</SRS>'
    west, north = area.xy(0, 0)
    px, py = area.pixel
    yield f"  <GeoTransform>{west!r}, {px!r}, 0.0, {north!r}, 0.0, {-py!r}</GeoTransform>"
    yield '  <Metadata><MDI key="AREA_OR_POINT">Area</MDI></Metadata>'
    dtype, nodata, scale = _stored(encoding)
    for number, (name, unit) in enumerate(bands, 1):
        yield f'  <VRTRasterBand dataType="{dtype}" band="{number}" blockXSize="512" blockYSize="512">'
        yield f"    <Description>{name}</Description><UnitType>{unit}</UnitType>"
        yield f"    <NoDataValue>{nodata}</NoDataValue>"
        if unit == "m" and scale != 1:
            yield f"    <Offset>0</Offset><Scale>{scale!r}</Scale>"
        yield from sources(number)
        if overview:
            yield (
                f'    <Overview><SourceFilename relativeToVRT="1">{OVERVIEW}</SourceFilename>'
                f"<SourceBand>{number}</SourceBand></Overview>"
            )
        yield "  </VRTRasterBand>"
    yield "</VRTDataset>"


def axis_mapping(crs: CRS) -> str:
    """Which axes of a CRS a raster's x and y are, in GDAL's words: `2,1` where northings come first.

    GDAL's own rule (OGRSpatialReference, traditional GIS order). Readers that heed it, as GDAL's tools and
    QGIS do, would place a mosaic in EPSG:2193 on another continent without it.
    """
    axes = crs.proj.axis_info[:2]
    directions, names = [axis.direction for axis in axes], [axis.name.lower() for axis in axes]
    # Around a pole both axes point the same way, and only their names tell them apart.
    polar = directions in (["north"] * 2, ["south"] * 2)
    swapped = names[0].startswith("northing") if polar else directions == ["north", "east"]
    return "2,1" if swapped else "1,2"


def _over_index(
    tiling: Tiling, encoding: str, bands: tuple[tuple[str, str], ...], overview: bool
) -> Iterator[str]:
    """Lines of a VRT whose only source is the index of the tiles, which GDAL's GTI driver reads."""
    area = tiling.area
    size = f'xSize="{area.width}" ySize="{area.height}"'
    dtype = _stored(encoding)[0]

    def source(number: int) -> Iterator[str]:
        yield (
            f'    <SimpleSource><SourceFilename relativeToVRT="1">{INDEX}</SourceFilename>'
            f'<SourceBand>{number}</SourceBand><SourceProperties RasterXSize="{area.width}" '
            f'RasterYSize="{area.height}" DataType="{dtype}" BlockXSize="512" BlockYSize="512"/>'
            f'<SrcRect xOff="0" yOff="0" {size}/><DstRect xOff="0" yOff="0" {size}/></SimpleSource>'
        )

    return _vrt(tiling, source, encoding, bands, overview)


def _index_facts(tiling: Tiling, encoding: str, count: int) -> dict[str, str]:
    """What the GTI driver must know beside the tiles' outlines."""
    west, south, east, north = tiling.area.bounds
    px, py = tiling.area.pixel
    dtype, nodata, _ = _stored(encoding)
    return {
        "RESX": repr(px), "RESY": repr(py), "MINX": repr(west), "MINY": repr(south), "MAXX": repr(east),
        "MAXY": repr(north), "BAND_COUNT": str(count), "DATA_TYPE": ",".join([dtype] * count),
        "NODATA": ",".join([nodata] * count), "LOCATION_FIELD": "location",
    }  # fmt: skip


def _write_index(path: Path, tiling: Tiling, tasks: Iterator[TileTask], facts: dict[str, str]) -> None:
    """A GeoPackage of the tiles' outlines and places, a thousand rows at a time."""
    import geopandas
    import shapely

    page: list[TileTask] = []

    def flush() -> None:
        if not page:
            return
        boxes = [shapely.box(*tiling.window(task.row, task.col).bounds) for task in page]
        table = {"location": [f"{TILES}/{task.id}.tif" for task in page], "tile": [task.id for task in page]}
        frame = geopandas.GeoDataFrame(table, geometry=boxes, crs=tiling.area.crs.to_wkt())
        extra = {"mode": "a"} if path.exists() else {"layer_metadata": facts}
        frame.to_file(path, layer="tiles", driver="GPKG", engine="pyogrio", **extra)
        page.clear()

    try:
        for task in tasks:
            page.append(task)
            if len(page) == 20_000:
                flush()
        flush()
    except OSError as error:
        raise OutputError(f"cannot be written ({error})", where=path) from error


def _write_text(path: Path, lines: Iterator[str]) -> None:
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(line if line.endswith("\n") else f"{line}\n")
