"""Maps against height rasters: the same numbers as on plain arrays, whatever the grids and the cutting."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.warp import Resampling, calculate_default_transform, reproject

import canopy
from canopy.errors import ImageryError, InputError
from canopy.evaluation import pixels as rasters
from canopy.evaluation.scores import Evaluation

stand = runpy.run_path(str(Path(__file__).with_name("stand.py")))
score_arrays = runpy.run_path(str(Path(__file__).parents[1] / "whole_arrays.py"))["score_arrays"]
WEST, NORTH, UTM = stand["WEST"], stand["NORTH"], stand["UTM"]
REFERENCE = stand["forest"](0)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write("a.tif", heights, gsd=0.5, west=...)` in the test's folder; see stand.py."""
    return lambda name, *bands, **kw: stand["write_heights"](tmp_path / name, *bands, **kw)


def predicted(seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    heights = (0.9 * REFERENCE + rng.normal(0, 1.5, REFERENCE.shape)).round(3).astype(np.float32)
    heights[:20, :30] = np.nan
    return heights


def plain(result: Evaluation) -> dict[str, float | None]:
    return {name: score.value for name, score in result.overall.metrics.items()}


def test_equals_the_arrays_on_one_grid(write: Callable[..., Path]) -> None:
    reference = REFERENCE.copy()
    reference[100:140, 50:90] = np.nan
    map_m = predicted()
    result = canopy.evaluate(write("m.tif", map_m), write("r.tif", reference), replicates=0, shift=False)
    expected = score_arrays(map_m, reference)
    for name, value in plain(result).items():
        assert value == pytest.approx(expected[name], rel=1e-9, abs=1e-9), name
    assert set(expected) - set(plain(result)) == {"interval_coverage", "interval_width_m"}
    counts, _, _ = np.histogram2d(*(x[np.isfinite(map_m + reference)] for x in (reference, map_m)), bins=5)
    assert result.joint.sum() == counts.sum() == result.overall.n


def test_windows_give_what_one_piece_gives(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write("m.tif", predicted()), write("r.tif", REFERENCE)
    results = []
    for side in (50, 100, 1000):
        monkeypatch.setattr(rasters, "WINDOW_PX", side)
        results.append(canopy.evaluate(*paths, by=("height", "cover"), replicates=50, shift=False))
    one = results[-1]
    for other in results[:-1]:
        for a, b in ((one.overall, other.overall), *(
            (one.strata[by][name], other.strata[by][name]) for by in one.strata for name in one.strata[by]
        )):  # fmt: skip
            for name in a.metrics:
                if a[name].value is None:
                    assert b[name].value is None
                    continue
                assert b[name].value == pytest.approx(a[name].value, rel=1e-9, abs=1e-9), name
                if a[name].ci95:
                    assert b[name].ci95 == pytest.approx(a[name].ci95, rel=1e-9, abs=1e-9), name
        np.testing.assert_array_equal(one.joint, other.joint)
        np.testing.assert_allclose(one.blocks.mae_m, other.blocks.mae_m, rtol=1e-9)
        np.testing.assert_allclose(one.previews[0].map_m, other.previews[0].map_m, rtol=1e-5)


def test_a_map_against_itself_is_perfect(write: Callable[..., Path]) -> None:
    path = write("r.tif", REFERENCE)
    result = canopy.evaluate(path, path, replicates=100)
    got = plain(result)
    zero = ("mae_m", "rmse_m", "bias_m", "nmae", "edge_error", "p95_error_m")
    assert [got[name] for name in zero] == [0] * len(zero)
    assert [got[name] for name in ("r2", "block_r2", "cover_iou_2m")] == [1, 1, 1]
    assert result.shift is not None
    assert result.shift.length_m < 0.01
    assert result.corrected is result.overall
    assert result.overall["mae_m"].ci95 == (0, 0)


@pytest.mark.parametrize(("east", "north"), [(2.0, 0.0), (0.0, -2.0), (1.3, -0.6)])
def test_a_shift_is_found_and_undone(write: Callable[..., Path], east: float, north: float) -> None:
    moved = write("m.tif", predicted(), west=WEST + east, north=NORTH + north)
    result = canopy.evaluate(moved, write("r.tif", REFERENCE), replicates=0)
    assert result.shift is not None
    assert result.shift.sure
    assert result.shift.east_m == pytest.approx(east, abs=0.15)
    assert result.shift.north_m == pytest.approx(north, abs=0.15)
    assert result.corrected is not None
    straight = score_arrays(predicted(), REFERENCE)["mae_m"]
    assert result.overall["mae_m"].value > straight + 0.3
    assert result.corrected["mae_m"].value < straight + 0.1
    shift_m = result.to_dict()["shift_m"]
    assert np.hypot(shift_m["east"], shift_m["north"]) == pytest.approx(np.hypot(east, north), abs=0.15)


def test_web_mercator_against_utm_needs_no_step(write: Callable[..., Path], tmp_path: Path) -> None:
    reference = write("r.tif", REFERENCE)
    out = tmp_path / "mercator.tif"
    with rasterio.open(reference) as source:
        transform, width, height = calculate_default_transform(
            source.crs, "EPSG:3857", source.width, source.height, *source.bounds, resolution=1.0
        )
        profile = source.profile | {
            "crs": "EPSG:3857",
            "transform": transform,
            "width": width,
            "height": height,
        }
        with rasterio.open(out, "w", **profile) as target:
            band = np.full((height, width), np.nan, np.float32)
            reproject(
                source.read(1), band, src_transform=source.transform, src_crs=source.crs,
                src_nodata=np.nan, dst_transform=transform, dst_crs="EPSG:3857",
                resampling=Resampling.bilinear,
            )  # fmt: skip
            target.write(band, 1)
    result = canopy.evaluate(out, reference, replicates=0)
    # 1 m of Web Mercator is 0.79 m on the ground here, so the reference's grid is the coarser one.
    assert result.provenance["grid"]["crs"] == UTM
    assert result.overall.n > 0.97 * REFERENCE.size
    assert result.overall["mae_m"].value < 0.6
    assert abs(result.overall["bias_m"].value) < 0.02
    assert result.shift.length_m < 0.1


@pytest.mark.parametrize("stat", ["mean", "max", "p95"])
def test_the_finer_side_is_pooled_onto_the_coarser(write: Callable[..., Path], stat: str) -> None:
    fine = np.repeat(np.repeat(REFERENCE[:130, :155], 2, 0), 2, 1)
    fine = (fine + np.random.default_rng(3).gamma(1, 1, fine.shape)).astype(np.float32)
    cells = fine.reshape(130, 2, 155, 2).swapaxes(1, 2).reshape(130, 155, 4).astype(np.float64)
    pooled = {"mean": cells.mean(-1), "max": cells.max(-1), "p95": np.percentile(cells, 95, axis=-1)}[stat]
    paths = write("fine.tif", fine, gsd=0.5), write("r.tif", REFERENCE[:130, :155])
    result = canopy.evaluate(*paths, stat=stat, replicates=0, shift=False)
    expected = score_arrays(pooled, REFERENCE[:130, :155].astype(np.float64))
    for name in ("n", "mae_m", "rmse_m", "r2", "block_r2", "edge_error", "cover_iou_5m"):
        assert result.overall[name].value == pytest.approx(expected[name], rel=1e-6), name
    # The other way round the grid is the same, and so is every difference but its sign.
    back = canopy.evaluate(*paths[::-1], stat=stat, replicates=0, shift=False)
    assert back.overall["bias_m"].value == pytest.approx(-expected["bias_m"], rel=1e-6)


def test_centimetres_in_integers_and_published_nodata(write: Callable[..., Path]) -> None:
    map_cm = (
        np.where(np.isfinite(predicted()), np.maximum(predicted(), 0) * 100, 65535).round().astype(np.uint16)
    )
    path = write("m.tif", map_cm, nodata=65535)
    with rasterio.open(path, "r+") as dataset:
        dataset.scales = (0.01,)
    result = canopy.evaluate(path, write("r.tif", REFERENCE), replicates=0, shift=False)
    expected = score_arrays(np.where(map_cm == 65535, np.nan, map_cm * 0.01), REFERENCE)
    assert result.overall["mae_m"].value == pytest.approx(expected["mae_m"], abs=1e-5)
    assert result.overall.n == expected["n"]


def test_floor_counts_low_heights_as_zero_on_both_sides(write: Callable[..., Path]) -> None:
    paths = write("m.tif", predicted()), write("r.tif", REFERENCE)
    low = [np.where(x < 2, 0, x) for x in (predicted(), REFERENCE)]
    expected = score_arrays(np.where(np.isfinite(predicted()), low[0], np.nan), low[1])["mae_m"]
    for option in ({"floor_m": 2.0}, {"sensor": "Optech Gemini"}):
        got = canopy.evaluate(*paths, replicates=0, shift=False, **option)
        assert got.overall["mae_m"].value == pytest.approx(expected, rel=1e-6)
        assert got.provenance["floor_m"] == [2.0]
    tagged = write("t.tif", REFERENCE, tags={"CANOPY_SENSOR": "Gemini"})
    assert canopy.evaluate(paths[0], tagged, replicates=0, shift=False).provenance["floor_m"] == [2.0]


def test_impossible_heights_are_left_out_and_said(write: Callable[..., Path]) -> None:
    map_m = np.nan_to_num(predicted(), nan=-9999)
    result = canopy.evaluate(
        write("m.tif", map_m, nodata=None), write("r.tif", REFERENCE), replicates=0, shift=False
    )
    assert result.overall.n == REFERENCE.size - 600
    assert any("impossible heights" in note for note in result.notes)


def test_interval_bands_are_judged(write: Callable[..., Path]) -> None:
    map_m = np.nan_to_num(predicted())
    rng = np.random.default_rng(5)
    low, high = map_m - rng.gamma(2, 1, map_m.shape), map_m + rng.gamma(2, 1, map_m.shape)
    names = ("canopy_height", "height_lower", "height_upper")
    path = write("m.tif", map_m, low.astype(np.float32), high.astype(np.float32), names=names)
    result = canopy.evaluate(path, write("r.tif", REFERENCE), replicates=0, shift=False)
    inside = (low.astype(np.float32) <= REFERENCE) & (high.astype(np.float32) >= REFERENCE)
    assert result.overall["interval_coverage"].value == pytest.approx(inside.mean(), abs=1e-6)
    assert result.overall["interval_width_m"].value == pytest.approx((high - low).mean(), abs=1e-4)
    assert "interval_coverage" in result.overall.by_height["0-2"]


def test_bands_of_pixels_are_not_judged_by_other_things(write: Callable[..., Path]) -> None:
    """Bands that are exact by construction fail as intervals of coarser pixels' means and of percentiles."""
    map_m = np.nan_to_num(predicted())
    names = ("canopy_height", "height_lower", "height_upper")
    path = write("m.tif", map_m, map_m - 1, map_m + 1, names=names)
    coarse = write("c.tif", REFERENCE[:260, :310].reshape(65, 4, 62, 5)[:, 0, :, 0], gsd=4.0)
    fine = write("f.tif", REFERENCE.repeat(2, 0).repeat(2, 1), gsd=0.5)
    for reference, stat, why in (
        (coarse, "mean", "pixels of 4 m are none"), (fine, "p95", "not of the p95"),
        (coarse, "max", "not of the max"),
    ):  # fmt: skip
        result = canopy.evaluate(path, reference, stat=stat, by=("height",), replicates=0, shift=False)
        for scores in (result.overall, *result.strata["height"].values()):
            for name in ("interval_coverage", "interval_width_m"):
                assert scores[name].value is None and why in str(scores[name].note)
            assert "interval_coverage" not in scores.by_height["0-2"]
    judged = canopy.evaluate(path, fine, replicates=0, shift=False).overall["interval_coverage"].value
    assert judged == pytest.approx((abs(map_m - REFERENCE) <= 1).mean(), abs=1e-3)
    # A map of 0.5 m against lidar of 1 m is what bands are calibrated on.
    layers = (band.repeat(2, 0).repeat(2, 1) for band in (map_m, map_m - 1, map_m + 1))
    half = write("h.tif", *layers, names=names, gsd=0.5)
    result = canopy.evaluate(half, write("r.tif", REFERENCE), replicates=0, shift=False)
    assert result.overall["interval_coverage"].value == pytest.approx(judged, abs=1e-3)


def test_date_gap_is_stated(write: Callable[..., Path]) -> None:
    map_path = write("m.tif", predicted(), tags={"CANOPY_DATES": "2019-06-01"})
    dated = write("r.tif", REFERENCE, tags={"ACQUISITION_DATE": "2021-06-01"})
    result = canopy.evaluate(map_path, dated, replicates=0, shift=False)
    assert result.provenance["date_gap_years"] == pytest.approx(2.0, abs=0.05)
    assert any("2.0 years after" in note for note in result.notes)
    unknown = canopy.evaluate(map_path, write("u.tif", REFERENCE), replicates=0, shift=False)
    assert unknown.provenance["date_gap_years"] is None
    assert any("gap is unknown" in note for note in unknown.notes)
    given = canopy.evaluate(
        map_path, write("g.tif", REFERENCE), reference_date="2018-06", replicates=0, shift=False
    )
    assert given.provenance["date_gap_years"] == pytest.approx(-1.0, abs=0.1)


def test_slope_in_scaled_degrees(write: Callable[..., Path]) -> None:
    degrees = np.full(REFERENCE.shape, 7.5)
    degrees[:, 150:] = 25.0
    raw = write("s.tif", ((degrees + 5) * 100).astype(np.uint16), nodata=None)
    with rasterio.open(raw, "r+") as dataset:
        dataset.scales, dataset.offsets = (0.01,), (-5.0,)
    result = canopy.evaluate(
        write("m.tif", predicted()), write("r.tif", REFERENCE), slope=raw, replicates=0, shift=False
    )
    assert list(result.strata["slope"]) == ["5-10 deg", "20-30 deg"]


def test_strata_of_rasters_polygons_and_slope(write: Callable[..., Path], tmp_path: Path) -> None:
    import geopandas
    from shapely.geometry import box

    h, w = REFERENCE.shape
    classes = (np.arange(w) // 100 + 3 * (np.arange(h)[:, None] > 130)).astype(np.uint8)
    zones = geopandas.GeoDataFrame(
        {"zone": ["north", "south"]},
        geometry=[box(WEST, NORTH - 100, WEST + w, NORTH), box(WEST, NORTH - h, WEST + w, NORTH - 150)],
        crs=UTM,
    )
    zones.to_file(tmp_path / "zones.gpkg")
    dem = np.where(np.arange(w) < 150, 0.0, 0.3 * (np.arange(w) - 150))[None].repeat(h, 0).astype(np.float32)
    paths = write("m.tif", predicted()), write("r.tif", REFERENCE)
    result = canopy.evaluate(
        *paths, by=(f"class={write('c.tif', classes, nodata=255)}", f"zone={tmp_path / 'zones.gpkg'}:zone"),
        dem=write("dem.tif", dem), replicates=0, shift=False,
    )  # fmt: skip
    parts = {(by, name): s for by, part in result.strata.items() for name, s in part.items()}
    error = np.abs(predicted() - REFERENCE)
    rows = np.arange(h)[:, None] + 0 * np.arange(w)
    masks = {("class", str(k)): classes == k for k in range(7)}
    masks |= {("zone", "north"): rows < 100, ("zone", "south"): rows >= 150}
    for key, mask in masks.items():
        assert parts[key]["mae_m"].value == pytest.approx(np.nanmean(error[mask]), rel=1e-6), key
        assert parts[key].n == np.isfinite(error[mask]).sum()
    slopes = list(result.strata["slope"])
    assert slopes == ["0-5 deg", "5-10 deg", "10-20 deg"]  # 16.7 degrees, and what lies between


def test_several_references_are_pooled_and_named(write: Callable[..., Path]) -> None:
    map_path = write("m.tif", predicted())
    a, b = write("a.tif", REFERENCE[:, :150]), write("b.tif", REFERENCE[:, 150:], west=WEST + 150)
    result = canopy.evaluate(map_path, [a, b], by=("site",), replicates=0, shift=False)
    whole = canopy.evaluate(map_path, write("r.tif", REFERENCE), replicates=0, shift=False)
    assert list(result.strata["site"]) == ["a", "b"]
    for name in ("n", "mae_m", "rmse_m", "r2", "cover_iou_2m"):
        assert result.overall[name].value == pytest.approx(whole.overall[name].value, rel=1e-9)
    assert result.overall.n == sum(s.n for s in result.strata["site"].values())
    assert set(result.blocks.site) == {"a", "b"}


def test_what_cannot_be_scored(write: Callable[..., Path], tmp_path: Path) -> None:
    reference = write("r.tif", REFERENCE)
    cases = {
        "overlap": (write("far.tif", predicted(), west=WEST + 5000), reference, {}),
        "valid in both": (write("void.tif", np.full_like(REFERENCE, np.nan)), reference, {}),
        "coordinate reference": (write("nocrs.tif", predicted(), crs=None), reference, {}),
        "a raster, not a table": (reference, reference, {"kind": "gedi"}),
        "'chn'": (reference, reference, {"kind": "chn"}),
        "statistic": (reference, reference, {"stat": "median"}),
        "unknown stratum": (reference, reference, {"by": ("forest_type",)}),
        "tell the slope": (reference, reference, {"by": ("slope",)}),
        "no such file": (reference, tmp_path / "missing.tif", {}),
    }
    for text, (map_path, ref, options) in cases.items():
        with pytest.raises((InputError, ImageryError), match=text):
            canopy.evaluate(map_path, ref, out=tmp_path / "report", **options)
    assert not (tmp_path / "report").exists()


def test_real_lidar_before_and_after_its_pits_were_filled(shared: Path) -> None:
    folder = shared / "data" / "pairs"
    names = sorted(path.name for path in (folder / "chm_raw").glob("ky_*.tif"))[:2]
    maps, references = ([folder / kind / name for name in names] for kind in ("chm_raw", "chm"))
    result = canopy.evaluate(maps[0], references[0], by=("height",), replicates=100)
    # Filling pits raises heights and nothing else: the raw model lies below, and in the same place.
    assert result.overall.n > 40_000
    assert -3 < result.overall["bias_m"].value < 0
    assert result.overall["r"].value > 0.6
    assert result.shift.length_m < 0.3
    assert result.overall["p98_error_m"].value == pytest.approx(0, abs=0.5)
    low, high = result.overall["bias_m"].ci95
    assert low < result.overall["bias_m"].value < high
    other = canopy.evaluate(maps[1], references[1], replicates=0)
    assert other.provenance["grid"]["crs"] == "EPSG:26917"


def test_reads_small_windows_and_tells_its_progress(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from canopy.evaluation.maps import HeightMap

    class Counted:
        total = done = 0

        def start(self, total: int, what: str) -> None:
            self.total, self.done = total, 0

        def advance(self, steps: int = 1) -> None:
            self.done += steps

    largest = 0
    read = HeightMap.read

    def watched(self: HeightMap, grid: canopy.Grid, **options: object) -> object:
        nonlocal largest
        largest = max(largest, *grid.shape)
        return read(self, grid, **options)

    monkeypatch.setattr(HeightMap, "read", watched)
    monkeypatch.setattr(rasters, "WINDOW_PX", 50)
    progress = Counted()
    paths = write("m.tif", predicted()), write("r.tif", REFERENCE)
    result = canopy.evaluate(*paths, replicates=0, shift=False, progress=progress)
    assert progress.done == progress.total == 6 * 7  # 260 x 310 px
    assert largest == 52  # a window and its margin, whatever the raster's size
    assert max(result.previews[0].map_m.shape) <= 1500
