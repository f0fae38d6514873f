"""`canopy data gedi` through the command line."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from canopy.labels.shots import read_shots


@pytest.fixture
def granule(tmp_path: Path) -> Path:
    """Forty shots near Frankfort, Kentucky, on two beams; one in four is bad."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for beam in ("BEAM0001", "BEAM1000"):
            columns = {
                "shot_number": np.arange(20, dtype=np.uint64) + np.uint64(2**60 + 1),
                "lat_lowestmode": 38.0 + 0.001 * np.arange(20),
                "lon_lowestmode": np.full(20, -84.5),
                "rh": np.tile(np.arange(101, dtype=np.float32) / 4, (20, 1)),
                "delta_time": np.arange(20.0),
                "quality_flag": (np.arange(20) % 4 > 0).astype(np.uint8),
                "degrade_flag": np.zeros(20, np.uint8),
                "sensitivity": np.full(20, 0.99, np.float32),
                "land_cover_data/landsat_water_persistence": np.zeros(20, np.uint8),
                "land_cover_data/urban_proportion": np.zeros(20, np.uint8),
            }
            for name, values in columns.items():
                file[f"{beam}/{name}"] = values
    return tmp_path / "a.h5"


def test_it_writes_the_shots_and_says_how_many(canopy, granule, tmp_path):
    ran = canopy("data", "gedi", granule, "-o", "shots.parquet", "--rh", "50, 95,98")
    assert ran.code == 0 and "30 of 40 shots" in ran.out and "quality_flag 10" in ran.out
    assert "note: a.h5: no sensitivity_a2" in ran.err
    shots = read_shots(tmp_path / "shots.parquet")
    assert len(shots) == 30 and (shots.rh_95 == 23.75).all() and (shots.rh_50 == 12.5).all()
    assert canopy("data", "gedi", granule, "-o", "shots.parquet", "-q", "--overwrite").out == ""


def test_json_is_one_object_with_the_counts(canopy, granule):
    words = ("data", "gedi", granule, "-o", "s.parquet", "--bbox", "38.005,-84.5", "--size-m", 700, "--json")
    ran = canopy(*words)
    told = json.loads(ran.out)
    assert ran.code == 0 and told["shots"]["read"] == 40 and told["filter"] == "strict"
    counts = told["shots"]
    parts = counts["outside"] + sum(counts["rejected"].values()) + counts["kept"]
    assert parts == 40 and counts["kept"] == 10 and told["granules"][0]["beams"]["BEAM1000"] == 20
    assert canopy(*words).code == 2  # the file is kept
    assert canopy(*words, "--overwrite").code == 0


def test_the_area_is_echoed_and_a_dry_run_stops_there(canopy, granule, tmp_path):
    ran = canopy("data", "gedi", granule, "--bounds", "-84.6,37.9,-84.4,38.1", "-o", "s.parquet", "--dry-run")
    assert ran.code == 0 and "37.90-38.10 N, 84.60-84.40 W" in ran.out and "40 shots" in ran.out
    told = canopy("data", "gedi", granule, "-o", "s.parquet", "--dry-run", "--json").out
    assert json.loads(told)["shots"] == {"in_files": 40} and not (tmp_path / "s.parquet").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("a.h5", "--bbox", "10,10", "--size-m", "900"), "none of 40 shots"),
        (("a.h5", "--bounds", "37.9,-84.6,38.1,-84.4"), "swapped"),
        (("a.h5", "--size-m", "900"), "--bbox"),
        (("a.h5", "--rh", "95,high"), "--rh"),
        (("a.h5", "--rh", "101"), "--rh"),
        (("a.h5", "--filter", "best"), "strict, loose, none"),
        (("none.h5",), "no such file"),
        (("a.h5", "a.h5"), "given twice"),
        (("a.h5", "--l2b", "a.h5"), "cover"),
    ],
)
def test_bad_input_exits_2_in_one_line_and_writes_nothing(canopy, granule, tmp_path, words, told):
    ran = canopy("data", "gedi", *words, "-o", "s.parquet")
    assert ran.code == 2 and told in ran.error_line and "Traceback" not in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


@pytest.mark.parametrize("library", ["h5py", "pyarrow"])
def test_a_missing_library_is_named_with_its_remedy(canopy, granule, monkeypatch, tmp_path, library):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == library:
            raise ImportError(f"no {name}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    ran = canopy("data", "gedi", granule, "-o", "s.parquet")
    assert ran.code == 2 and library in ran.error_line
    assert "pip install 'canopy-height[gedi]'" in ran.error_line and not (tmp_path / "s.parquet").exists()


def test_help_has_an_example_and_documents_the_filters(canopy):
    ran = canopy("data", "gedi", "--help")
    assert ran.code == 0 and "canopy data gedi GEDI02_A" in ran.out and "--filter" in ran.out
    assert "sensitivity" in ran.out and "--l4a" in ran.out
