"""canopy: RGB imagery in, georeferenced canopy height maps out.

The names below are the public API. They load on first use, so that `import canopy`
(and `canopy --help`) does not pay for torch, xarray or GDAL.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "AOI": "canopy.geo.area",
    "Grid": "canopy.geo.grid",
    "Raster": "canopy.geo.reading",
    "HeightModel": "canopy.models.height",
    "load_model": "canopy.models.registry",
    "open_imagery": "canopy.imagery.open",
    "predict": "canopy.inference.predict",
    "evaluate": "canopy.evaluation.evaluate",
    "compare": "canopy.evaluation.compare",
    "stats": "canopy.evaluation.zones",
    "trees": "canopy.evaluation.trees.table",
    "CanopyError": "canopy.errors",
    "InputError": "canopy.errors",
}

__all__ = [
    "AOI",
    "CanopyError",
    "Grid",
    "HeightModel",
    "InputError",
    "Raster",
    "compare",
    "evaluate",
    "load_model",
    "open_imagery",
    "predict",
    "stats",
    "trees",
]

if TYPE_CHECKING:
    from canopy.errors import CanopyError, InputError
    from canopy.evaluation.compare import compare
    from canopy.evaluation.evaluate import evaluate
    from canopy.evaluation.trees.table import trees
    from canopy.evaluation.zones import stats
    from canopy.geo.area import AOI
    from canopy.geo.grid import Grid
    from canopy.geo.reading import Raster
    from canopy.imagery.open import open_imagery
    from canopy.inference.predict import predict
    from canopy.models.height import HeightModel
    from canopy.models.registry import load_model


def __getattr__(name: str) -> Any:
    if name == "data":  # training data needs Lightning
        return importlib.import_module("canopy.data")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'canopy' has no attribute {name!r}; it offers {', '.join(__all__)}")
    # `canopy.predict` the function must win over a submodule of the same name, so bind it here.
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
