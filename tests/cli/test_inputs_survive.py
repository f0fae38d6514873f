"""No command writes over what it reads, whatever kind of input it is and whatever --overwrite says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

STAND = {
    "type": "Polygon",
    "coordinates": [[[-75, 44.08], [-74.99, 44.08], [-74.99, 44.09], [-75, 44.09], [-75, 44.08]]],
}

# Words of a command; the file that would be lost stands last, after a bar.
CASES = [
    "predict image.tif -o image.tif | image.tif",
    "predict image.tif --aoi stand.json -o stand.tif | stand.json",
    "predict image.tif --aoi stand.png --quicklook -o stand.tif | stand.png",
    "predict --imagery pictures -o pictures/image.tif | pictures/image.tif",
    "map run/tiles/image.tif --grid utm -o run | run/tiles/image.tif",
    "map image.tif --aoi run/tiles/stand.json --grid utm -o run | run/tiles/stand.json",
    "evaluate chm.tif --reference report/blocks.csv -o report | report/blocks.csv",
    "evaluate report/metrics.json --reference chm.tif -o report | report/metrics.json",
    "compare chm.tif out/change.tif -o out | out/change.tif",
    "compare out/change.tif chm.tif -o out | out/change.tif",
    "compare chm.tif other.tif --aoi out/stand.json -o out | out/stand.json",
    "stats chm.tif --zones zones.parquet -o zones.parquet | zones.parquet",
    "stats chm.csv --zones zones.parquet -o chm.csv | chm.csv",
    "trees chm.tif --crowns crowns.gpkg -o crowns.gpkg | crowns.gpkg",
    "data chm points.laz -o points.laz | points.laz",
    "data chm --dsm dsm.tif --dtm dtm.tif -o dsm.tif | dsm.tif",
    "data chm --dsm dsm.tif --dtm dtm.tif -o dtm.tif | dtm.tif",
    "data chm points.laz --aoi stand.json -o stand.json | stand.json",
    "data gedi granule.h5 --aoi stand.gpkg -o stand.gpkg | stand.gpkg",
    "data gedi granule.h5 --l4a other.gpkg -o other.gpkg | other.gpkg",
    "data chips --manifest chips/index.csv -o chips | chips/index.csv",
    "calibrate gedi chm.tif --shots shots.parquet -o chm.tif | chm.tif",
    "calibrate gedi chm.tif --shots shots.gedi.json -o shots.tif | shots.gedi.json",
    "calibrate interval model.safetensors --data chips -o model.safetensors | model.safetensors",
    "calibrate interval model.safetensors --data chips --kept-from a.safetensors -o a.safetensors"
    " | a.safetensors",
    "models convert old.pth -o old.pth | old.pth",
    "models convert head.pth --backbone body.pth -o body.pth | body.pth",
    "models convert head.pth --config sizes.json -o sizes.json | sizes.json",
    "models quantize model.safetensors --data chips -o model.safetensors | model.safetensors",
]


@pytest.mark.parametrize("case", CASES)
def test_an_input_is_never_an_output(
    canopy: Callable, make_image: Callable, model_file: Path, tmp_path: Path, case: str
) -> None:
    line, victim = case.split(" | ")
    words = line.split()
    for word in words[1:]:  # every file that is named is there; what has to be read first can be
        path = tmp_path / word
        if not path.suffix or path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if word == words[words.index("-o") + 1] and word != victim:
            continue
        if path.suffix == ".tif":
            make_image(word)
        elif path.suffix == ".json" and "stand" in word:
            path.write_text(json.dumps(STAND))
        elif path.suffix == ".safetensors":
            path.write_bytes(model_file.read_bytes())
        else:
            path.write_bytes(b"something that matters")
    if words[0] == "map":
        words += ["--model", model_file]
    before = (tmp_path / victim).read_bytes()
    ran = canopy(*words, "--overwrite")
    assert ran.code == 2 and "of the inputs" in ran.error_line, ran.err
    assert (tmp_path / victim).read_bytes() == before
