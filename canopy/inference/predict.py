"""`canopy.predict`: one call from imagery to a canopy height map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from canopy.geo.aoi import AOI
from canopy.geo.choose import choose_area
from canopy.inference.job import prepare
from canopy.inference.request import Options, Request
from canopy.runtime import Progress, log

if TYPE_CHECKING:
    import xarray as xr

    from canopy.models.height import HeightModel


def predict(
    image: str | Path | Sequence[str | Path] | None = None,
    *,
    model: str | Path | HeightModel = "default",
    imagery: str | None = None,
    area: AOI | None = None,
    bbox: str | Sequence[float] | None = None,
    size_m: float | None = None,
    bounds: str | Sequence[float] | None = None,
    bounds_crs: Any = "EPSG:4326",
    aoi: str | Path | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> xr.DataArray | Path:
    """Map canopy height.

    Args:
        image: one or several image files, directories or URLs; or give `imagery`.
        model: a model's name or file, or a `HeightModel`.
        imagery: a named source, a STAC address, a tile template or a path.
        area: an `AOI`; or one of `bbox` (LAT,LON with `size_m`, or LAT,LON,LAT,LON), `bounds` (W,S,E,N in
            `bounds_crs`) and `aoi` (a vector file). By default all of the imagery.
        out: a GeoTIFF to write, with its STAC item (and picture) beside it.
        options: the other options of `canopy predict` under the same names, see
            `canopy.inference.request.Options`.

    Returns:
        Without `out`, a DataArray (y, x) of metres, NaN where there is no height, with its CRS for rioxarray;
        (band, y, x) with `date_band`. With `out`, its path.

    Raises:
        InputError: whatever cannot be done as asked; nothing was written.

    >>> import canopy
    >>> chm = canopy.predict("image.tif")  # doctest: +SKIP
    """
    images: Sequence[str | Path] = (
        () if image is None else [image] if isinstance(image, (str, Path)) else image
    )
    request = Request(
        images=tuple(str(one) for one in images),
        imagery=imagery,
        area=area or choose_area(bbox=bbox, size_m=size_m, bounds=bounds, bounds_crs=bounds_crs, aoi=aoi),
        model=model,
        out=out,
        **options,
    )
    job = prepare(request)
    for note in job.notes:
        log.warning(note)
    result = job.run(progress)
    return result.files.tif if result.files else result.data  # type: ignore[return-value]
