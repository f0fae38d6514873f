"""GEDI granules: the pack's real files against its CSV, the synthetic forest's truth, and small own files."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geopandas
import h5py
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
from matplotlib import image

from canopy.errors import DataError, InputError
from canopy.geo.area import AOI
from canopy.labels.gedi import FILTERS, apply_filter, extract_shots, survey
from canopy.labels.granules import shot_weights
from canopy.labels.shots import read_shots

# Beyond 2**53, where floats lose whole numbers, and beyond the signed 64 bits.
BIG = 2**63 + 1


def l2a_columns(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A beam of good shots along a line in Kentucky."""
    rng = np.random.default_rng(seed)
    return {
        "shot_number": np.arange(count, dtype=np.uint64) + np.uint64(BIG),
        "lat_lowestmode": 38.0 + 0.0005 * np.arange(count),
        "lon_lowestmode": -84.5 + 0.0003 * np.arange(count),
        "rh": np.sort(rng.uniform(-3, 40, (count, 101)).astype(np.float32), axis=1),
        "delta_time": 1e8 + 0.0082 * np.arange(count),
        "quality_flag": np.ones(count, np.uint8),
        "degrade_flag": np.zeros(count, np.uint8),
        "sensitivity": np.full(count, 0.97, np.float32),
        "geolocation/sensitivity_a2": np.full(count, 0.98, np.float32),
        "solar_elevation": np.full(count, -20, np.float32),
        "elev_lowestmode": np.full(count, 250, np.float32),
        "digital_elevation_model": np.full(count, 245, np.float32),
        "land_cover_data/landsat_water_persistence": np.zeros(count, np.uint8),
        "land_cover_data/urban_proportion": np.zeros(count, np.uint8),
    }


Beams = dict[str, dict[str, np.ndarray]]


@pytest.fixture
def granule(tmp_path: Path) -> Callable[..., Path]:
    """`granule({"BEAM0101": columns}, "a.h5")` writes a file of GEDI's layout."""

    def make(beams: Beams, name: str = "a.h5", short_name: str = "GEDI_L2A", **rh: Any) -> Path:
        with h5py.File(tmp_path / name, "w") as file:
            file.attrs["short_name"] = np.array([short_name], dtype=object)
            for beam, columns in beams.items():
                group = file.create_group(beam)
                for column, values in columns.items():
                    group.create_dataset(column, data=values, **(rh if column == "rh" else {}))
        return tmp_path / name

    return make


def run(files: Any, tmp_path: Path, name: str = "out.parquet", **options: Any) -> geopandas.GeoDataFrame:
    files = [files] if isinstance(files, Path) else files
    extract_shots(files, tmp_path / name, overwrite=True, **options)
    return read_shots(tmp_path / name)


# --- real files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The two real granules (one unpacked) and the independent CSV, shot numbers as texts."""
    folder, unpacked = shared / "data" / "gedi", tmp_path_factory.mktemp("gedi")
    archive = next(folder.glob("*.zip"))
    zipfile.ZipFile(archive).extractall(unpacked)
    table = pandas.read_csv(folder / "gedi_l2a_footprints.csv", dtype={"shot_number": str})
    return {
        "amazon": next(folder.glob("*.h5")),
        "mato_grosso": next(unpacked.glob("*.h5")),
        "zip": archive,
        "csv": folder / "gedi_l2a_footprints.csv",
        "table": table.set_index("shot_number"),
    }


@pytest.mark.parametrize(
    ("name", "source", "count"), [("amazon", "gedidb", 8000), ("mato_grosso", "rGEDI", 301)]
)
def test_real_shots_agree_with_the_packs_csv(real, tmp_path, name, source, count):
    shots = run(real[name], tmp_path, filter="none", rh=(25, 50, 95, 98, 100))
    told = real["table"][real["table"].source == source].loc[[str(n) for n in shots.shot_number]]
    assert len(shots) == count == len(told) and (told.beam.to_numpy() == shots.beam.to_numpy()).all()
    assert np.abs(told.lat.to_numpy() - shots.lat.to_numpy()).max() < 1e-7
    assert np.abs(told.lon.to_numpy() - shots.lon.to_numpy()).max() < 1e-7
    for percent in (25, 50, 95, 98, 100):
        assert np.abs(told[f"rh{percent}"].to_numpy() - shots[f"rh_{percent}"].to_numpy()).max() < 0.0051
    if source == "rGEDI":
        assert shots.beam_type.value_counts().to_dict() == {"full": 188, "coverage": 113}
        assert shots.time.min() == pandas.Timestamp("2019-04-18T08:21:59.206121Z")  # its name says 08:03:38
        assert np.abs(told.sensitivity.to_numpy() - shots.sensitivity.to_numpy()).max() < 1e-4
        assert (told.quality_flag.to_numpy() == shots.quality_flag.to_numpy()).all()


def test_real_granules_that_lack_flags_are_judged_by_the_rest_and_it_is_said(real, tmp_path):
    report = extract_shots([real["mato_grosso"]], tmp_path / "strict.parquet")
    assert any("not judged by water" in note for note in report["notes"])
    strict, loose = (
        read_shots(tmp_path / "strict.parquet"),
        run(real["mato_grosso"], tmp_path, filter="loose"),
    )
    assert 0 < len(strict) < len(loose) == 301
    assert set(strict.shot_number.tolist()) <= set(loose.shot_number.tolist())
    with pytest.raises(DataError, match=r"l2a_quality_flag_rel3, quality_flag.*--filter none"):
        run(real["amazon"], tmp_path)  # cut out without one of the fields
    with pytest.raises(DataError, match="Unpack"):
        run(real["zip"], tmp_path)
    table = read_shots(real["csv"])
    assert len(table) == 8301 and table.shot_number.dtype == np.uint64
    assert str(table.shot_number.iloc[0]) == real["table"].index[0]
    assert {"rh_95", "rh_98", "elev_lowestmode", "beam"} <= set(table)


# --- versions, variables ------------------------------------------------------------------------------


def test_version_3_is_told_by_its_variables(granule, tmp_path):
    columns = l2a_columns(6)
    columns["l2a_quality_flag_rel3"] = np.array([1, 0, 1, 0, 1, 1], np.uint8)
    columns["quality_flag"][:] = 1  # where one is left, it means less than the renamed one
    path = granule({"BEAM0101": columns})
    assert survey([path])[0]["version"] == 3
    assert run(path, tmp_path).shot_number.tolist() == [BIG, BIG + 2, BIG + 4, BIG + 5]
    del columns["quality_flag"]
    assert len(run(granule({"BEAM0101": columns}, "b.h5"), tmp_path)) == 4
    assert survey([granule({"BEAM0101": l2a_columns(3)}, "c.h5")])[0]["version"] == 2


def test_shot_numbers_are_exact_everywhere(granule, tmp_path):
    columns = l2a_columns(5)
    columns["shot_number"] = np.array([2**53 + 1, 2**63 - 1, 2**63 + 1, 2**64 - 2, 2**64 - 1], np.uint64)
    wanted = columns["shot_number"].tolist()
    shots = run(granule({"BEAM0101": columns}), tmp_path)
    assert shots.shot_number.dtype == np.uint64 and shots.shot_number.tolist() == wanted
    assert geopandas.read_parquet(tmp_path / "out.parquet").shot_number.tolist() == wanted
    shots.drop(columns="geometry").to_csv(tmp_path / "shots.csv", index=False)
    shots.drop(columns="geometry").to_parquet(tmp_path / "plain.parquet")
    for name in ("shots.csv", "plain.parquet"):
        assert read_shots(tmp_path / name).shot_number.tolist() == wanted


def test_fill_values_become_nulls_and_never_pass(granule, tmp_path):
    columns = l2a_columns(8)
    columns["lat_lowestmode"][0] = -9999
    columns["lon_lowestmode"][1] = np.nan
    columns["sensitivity"][2] = -9999
    columns["land_cover_data/urban_proportion"][3] = 255
    columns["rh"][4] = -9999
    columns["digital_elevation_model"][5] = -999999  # nobody can say that the ground was found
    columns["delta_time"][6] = np.nan
    path = granule({"BEAM0000": columns})
    report = extract_shots([path], tmp_path / "strict.parquet")
    rejected = report["shots"].pop("rejected")
    assert report["shots"] == {"read": 8, "no_position": 2, "outside": 0, "duplicate": 0, "kept": 2}
    assert {k: v for k, v in rejected.items() if v} == {
        "sensitivity": 1, "urban": 1, "elevation": 1, "no_height": 1}  # fmt: skip
    strict = read_shots(tmp_path / "strict.parquet")
    assert strict.time.isna().tolist() == [True, False]
    loose = run(path, tmp_path, filter="loose")
    assert loose.shot_number.tolist() == [BIG + 3, BIG + 6, BIG + 7]
    everything = run(path, tmp_path, filter="none")
    assert len(everything) == 6 and everything.rh_95.isna().sum() == 1


def test_strict_is_at_least_as_strict_as_loose(granule, tmp_path):
    """A shot with good flags whose "ground" lies 396 m off the terrain, and one that saw too little."""
    columns = l2a_columns(6)
    columns["elev_lowestmode"][1] += 396
    columns["geolocation/sensitivity_a2"][2] = 0.6
    shots = run(granule({"BEAM0101": columns}), tmp_path)
    assert shots.shot_number.tolist() == [BIG, BIG + 3, BIG + 4, BIG + 5]


def test_versions_are_never_mixed(granule):
    new = l2a_columns(3) | {"l2a_quality_flag_rel3": np.ones(3, np.uint8)}
    with pytest.raises(DataError, match=r"version 2 beside b\.h5 of version 3"):
        survey([granule({"BEAM0101": l2a_columns(3)}), granule({"BEAM0101": new}, "b.h5")])


def test_the_filters_limits_are_as_documented():
    shots = {
        "lat": np.array([38.0, 38.0, 10.0, -10.0, 38.0, 38.0, 38.0, 38.0]),
        "quality_flag": np.array([1, 1, 1, 1, 0, 1, 1, 1]),
        "degrade_flag": np.array([0, 0, 0, 0, 0, 3, 0, 0]),
        "sensitivity": np.array([0.951, 0.95, 0.97, 0.981, 0.99, 0.99, 0.99, 0.99]),
        "landsat_water_persistence": np.array([9, 0, 0, 0, 0, 0, 10, 0]),
        "urban_proportion": np.array([49, 0, 0, 0, 0, 0, 0, 50]),
    }
    good, rejected = apply_filter(FILTERS["strict"], pandas.DataFrame(shots))
    assert good.tolist() == [True, False, False, True, False, False, False, False]
    assert rejected == {"quality_flag": 1, "degrade_flag": 1, "sensitivity": 2, "water": 1, "urban": 1}


def test_weights_grow_with_sensitivity_and_power():
    sensitivity = np.array([0.0, 0.5, 0.725, 0.95, 0.99, np.nan])
    full, coverage = shot_weights("full", sensitivity), shot_weights("coverage", sensitivity)
    assert full == pytest.approx([0, 0.25, 0.625, 1, 1, 0.25]) and coverage == pytest.approx(full / 2)
    assert shot_weights(None, sensitivity) == pytest.approx(coverage)


# --- areas --------------------------------------------------------------------------------------------


def test_areas_keep_what_lies_in_them(granule, tmp_path):
    path = granule({"BEAM0101": l2a_columns(100)})  # from 38.0 N 84.5 W to 38.05 N 84.47 W
    box = run(path, tmp_path, area=AOI.from_bounds((-84.5, 38.0, -84.49, 38.0105)))
    assert len(box) == 22  # 38.0000 to 38.0105 by 0.0005, edges included
    around = run(path, tmp_path, area=AOI.from_bbox("38.01,-84.494", 500))
    x, y = around.to_crs(32616).geometry.x, around.to_crs(32616).geometry.y
    assert 5 < len(around) < 12 and max(np.ptp(x), np.ptp(y)) < 500
    path = granule({"BEAM0101": l2a_columns(4) | {"lon_lowestmode": np.array([179.95, -179.95, 179, -179])}})
    shots = run(path, tmp_path, area=AOI.from_bounds((179.9, 37, -179.9, 39)))
    assert shots.lon.tolist() == [179.95, -179.95]


# --- several granules, other levels -------------------------------------------------------------------


def test_a_shot_in_two_granules_is_kept_once(granule, tmp_path):
    one = granule({"BEAM0101": l2a_columns(10)}, "a.h5")
    later = l2a_columns(10)
    later["shot_number"] += np.uint64(7)
    two = granule({"BEAM0101": later, "BEAM0000": l2a_columns(2)}, "b.h5")
    report = extract_shots([one, two], tmp_path / "out.parquet")
    numbers = read_shots(tmp_path / "out.parquet").query("beam == 'BEAM0101'").shot_number.tolist()
    assert numbers == [BIG + i for i in range(17)] and report["shots"]["duplicate"] == 3
    with pytest.raises(DataError, match="given twice"):
        extract_shots([one, one], tmp_path / "twice.parquet")


def test_cover_and_biomass_are_joined_by_shot_number(granule, tmp_path):
    path = granule({"BEAM0101": l2a_columns(20), "BEAM0000": l2a_columns(3)})
    order = np.random.default_rng(0).permutation(15)
    l2b = {"shot_number": (np.arange(15) + 3).astype(np.uint64)[order] + np.uint64(BIG),
           "cover": (0.01 * (np.arange(15) + 3))[order].astype(np.float32),
           "pai": np.where(order == 0, -9999, 2.0).astype(np.float32),
           "l2b_quality_flag": np.ones(15, np.uint8)}  # fmt: skip
    l4a = {"shot_number": np.array([BIG + 5, 7], np.uint64), "agbd": np.array([123.5, 1.0])}
    report = extract_shots(
        [path], tmp_path / "out.parquet",
        l2b=[granule({"BEAM0101": l2b}, "b.h5", "GEDI_L2B")],
        l4a=[granule({"BEAM0101": l4a}, "c.h5", "GEDI_L4A")],
    )  # fmt: skip
    assert report["matched"] == {"L2B": 15, "L4A": 1} and len(report["notes"]) == 2
    shots = read_shots(tmp_path / "out.parquet").query("beam == 'BEAM0101'").reset_index()
    cover = [np.nan if not 3 <= i < 18 else 0.01 * i for i in range(20)]
    assert shots.cover.to_numpy() == pytest.approx(cover, nan_ok=True)
    assert np.isnan(shots.pai[3]) and (shots.pai[4:18] == 2).all()
    assert shots.agbd[5] == 123.5 and shots.agbd.notna().sum() == 1
    assert (shots.l2b_quality_flag[3:18] == 1).all() and shots.l4_quality_flag.isna().all()
    old = {
        "shot_number": l2b["shot_number"],
        "cover": l2b["cover"],
        "l2b_quality_flag": np.ones(15, np.uint8),
    }
    new = l2a_columns(20) | {"l2a_quality_flag_rel3": np.ones(20, np.uint8)}
    with pytest.raises(DataError, match=r"o\.h5: a granule of version 2 beside n\.h5 of version 3"):
        extract_shots(
            [granule({"BEAM0101": new}, "n.h5")], tmp_path / "mixed.parquet",
            l2b=[granule({"BEAM0101": old}, "o.h5", "GEDI_L2B")],
        )  # fmt: skip
    with pytest.raises(DataError, match="GEDI_L4A; expected GEDI L2B"):
        extract_shots([path], tmp_path / "other.parquet", l2b=[tmp_path / "c.h5"])


# --- bad files ----------------------------------------------------------------------------------------


def test_missing_and_empty_beams_are_passed_over(granule, tmp_path):
    empty = {name: values[:0] for name, values in l2a_columns(1).items()}
    path = granule({"BEAM0101": l2a_columns(4), "BEAM0110": empty, "BEAM1000": {}, "METADATA": {}})
    assert survey([path])[0]["beams"] == {"BEAM0101": 4} and len(run(path, tmp_path)) == 4


def damaged(name: str) -> dict[str, np.ndarray]:
    columns = l2a_columns(5)
    if name in columns:
        del columns[name]
    return columns


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (damaged("rh"), "looked for rh"),
        (damaged("lat_lowestmode"), "looked for lat_lowestmode, geolocation/lat_lowestmode"),
        (damaged("shot_number"), "looked for shot_number"),
        (l2a_columns(5) | {"rh": np.zeros((5, 100), np.float32)}, r"shape \(5, 100\)"),
        (l2a_columns(5) | {"sensitivity": np.zeros(4)}, "expected 5 shots"),
    ],
)
def test_granules_that_break_their_promise_are_named(granule, tmp_path, columns, told):
    with pytest.raises(DataError, match=told) as caught:
        run(granule({"BEAM0101": columns}), tmp_path)
    assert "a.h5" in str(caught.value) and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


def test_foreign_and_truncated_files(granule, tmp_path):
    whole = granule({"BEAM0101": l2a_columns(400)}, "whole.h5", chunks=(32, 101), compression=1)
    cut = tmp_path / "cut.h5"
    cut.write_bytes(whole.read_bytes()[:-5000])
    (tmp_path / "text.h5").write_text("<html>log in first</html>")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["temperature"] = np.zeros(3)
    holes = bytearray(whole.read_bytes())
    holes[len(holes) // 3 : len(holes) // 3 + 3000] = bytes(3000)
    (tmp_path / "holes.h5").write_bytes(holes)
    granule({"BEAM0101": l2a_columns(2)}, "l2b.h5", "GEDI_L2B")
    for name, told in (
        ("cut.h5", "truncated"), ("text.h5", "another format"), ("foreign.h5", "no beams.*temperature"),
        ("holes.h5", "holes.h5"), ("l2b.h5", "GEDI_L2B"), ("none.h5", "no such file"), (".", "a folder"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=told):
            run(tmp_path / name, tmp_path)
    assert not (tmp_path / "out.parquet").exists() and not list(tmp_path.glob(".*"))


# --- the output ---------------------------------------------------------------------------------------


def test_the_output_is_geoparquet_with_the_promised_columns(granule, tmp_path):
    path = granule({"BEAM0101": l2a_columns(3)}, "GEDI02_A_x.h5")
    extract_shots([path], tmp_path / "a.parquet")
    schema = pq.read_schema(tmp_path / "a.parquet")
    assert schema.names == [
        "shot_number", "beam", "beam_type", "lat", "lon", "rh_95", "rh_98", "sensitivity", "sensitivity_a2",
        "quality_flag", "degrade_flag", "solar_elevation", "elev_lowestmode", "dem",
        "landsat_water_persistence", "urban_proportion", "time", "granule", "weight", "geometry"]  # fmt: skip
    assert str(schema.field("shot_number").type) == "uint64"
    assert str(schema.field("time").type) == "timestamp[us, tz=UTC]"
    shots = geopandas.read_parquet(tmp_path / "a.parquet")
    assert shots.crs.to_epsg() == 4326 and (shots.geometry.x == shots.lon).all()
    assert shots.attrs["filter"] == "strict" and shots.attrs["granules"] == ["GEDI02_A_x.h5"]
    assert shots.granule.tolist() == ["GEDI02_A_x"] * 3 and (shots.geometry.y == shots.lat).all()
    assert shots.time[0] == pandas.Timestamp("2018-01-01", tz="UTC") + pandas.Timedelta(1e8, "s")
    extract_shots([path], tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_a_quicklook_lies_beside_the_shots(granule, tmp_path):
    path = granule({"BEAM0101": l2a_columns(300), "BEAM0000": l2a_columns(20, 1)})
    report = extract_shots([path], tmp_path / "shots.gpkg", quicklook=True)
    assert report["quicklook"] == str(tmp_path / "shots.png")
    picture = image.imread(tmp_path / "shots.png")
    assert picture.shape[1] > 900 and len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 50
    with pytest.raises(InputError, match=r"shots\.png.*exists"):
        extract_shots([path], tmp_path / "shots.parquet", quicklook=True)
    assert not (tmp_path / "shots.parquet").exists()


def test_a_geopackage_gives_the_same_shots(granule, tmp_path):
    path = granule({"BEAM0101": l2a_columns(3)})
    table, package = run(path, tmp_path), run(path, tmp_path, "shots.gpkg")
    assert package.shot_number.tolist() == table.shot_number.tolist()
    assert (package.rh_95 == table.rh_95).all() and (package.geometry == table.geometry).all()


@pytest.mark.parametrize(
    ("text", "told"),
    [("a,b\n1,2\n", "no column shot_number"), ("shot_number,lat,lon,rh95\n1.9e16,0,0,3\n", "1.9e16"),
     ("shot_number,lat,lon\n1,0,0\n", "rh_95")],
)  # fmt: skip
def test_tables_that_are_not_shots(tmp_path, text, told):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=told):
        read_shots(path)
    path.rename(tmp_path / "table.parquet")
    with pytest.raises(DataError, match="Parquet"):
        read_shots(tmp_path / "table.parquet")
