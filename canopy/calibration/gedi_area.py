"""Footprints over a whole map, predicted from imagery by a GEDI model: shots where the satellite took none.

As published, the map is then matched to the model's prediction over the area, not to single shots.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from canopy.calibration.discs import Footprints, local_xy, map_grid
from canopy.errors import DataError
from canopy.geo.crs import transformer
from canopy.models.gedi import FACTS, load_gedi_model

if TYPE_CHECKING:
    from canopy.geo.grid import Grid
    from canopy.sources.imagery import ImagerySource

MOST = 1_000
_ROOM_M = 13.0


def predicted_footprints(
    map_path: str | Path, model_path: str | Path, source: ImagerySource, *, most: int = MOST
) -> Footprints:
    """Footprints on an even lattice over a map, with the heights that a GEDI model sees in the imagery.

    Raises:
        CheckpointError: no GEDI model. DataError: the imagery shows none of the map.
    """
    import pandas

    from canopy.calibration.gedi_samples import crops_at
    from canopy.calibration.gedi_train import predict_gedi
    from canopy.sources.gedi_footprint import pool_over_disc

    model = load_gedi_model(model_path)
    grid = map_grid(map_path)
    lon, lat = lattice(grid, most)
    values = pool_over_disc(Path(map_path), pandas.DataFrame({"lon": lon, "lat": lat}), f"p{model.rh}")
    known = np.isfinite(values)
    lon, lat, values = lon[known], lat[known], values[known]
    rgb, seen = crops_at(source, lon, lat)
    if not seen.any():
        raise DataError(
            "the imagery shows none of the map", where=source.name, remedy="use the map's imagery"
        )
    facts = np.full((int(seen.sum()), len(FACTS)), np.nan, np.float32)
    facts[:, 0], facts[:, 1] = lat[seen], lon[seen]
    heights = predict_gedi(model, rgb[seen], facts).astype(np.float64)
    xy = local_xy(grid, lon[seen], lat[seen])
    return Footprints(heights, values[seen, None].astype(np.float64), xy, model.rh)


def lattice(grid: Grid, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes and latitudes of at most about `most` places, evenly over a map, off its edge."""
    height, width = grid.shape
    room = _ROOM_M / grid.gsd_m
    step = max(25.0 / grid.gsd_m, float(np.sqrt(height * width / most)))
    rows, cols = (np.arange(room + step / 2, n - room, step) for n in (height, width))
    row, col = (v.ravel() for v in np.meshgrid(rows, cols, indexing="ij"))
    west, _, _, north = grid.bounds
    px, py = grid.pixel
    lon, lat = transformer(grid.crs, "EPSG:4326").transform(west + col * px, north - row * py)
    return np.asarray(lon), np.asarray(lat)
