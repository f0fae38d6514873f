"""Maps against height rasters: the same numbers as on plain arrays, whatever the grids and the cutting."""

from __future__ import annotations

import geopandas
import numpy as np
import pytest
from scipy import stats
from shapely.geometry import box
from whole_arrays import score_arrays

import canopy
from canopy import metrics
from canopy.errors import InputError
from canopy.evaluation import pixels
from canopy.evaluation.maps import HeightMap
from canopy.evaluation.scores import intervals, replicate
from canopy.evaluation.strata import LEAST_WANTED, BlockLayout
from canopy.geo.grid import Grid

WEST, NORTH, UTM = 500_000.0, 4_882_000.0, "EPSG:32618"
BANDS = ("canopy_height", "height_lower", "height_upper")


@pytest.fixture(scope="module")
def lidar(forest):
    return forest((260, 310), 0)


@pytest.fixture(scope="module")
def predicted(lidar):
    rng = np.random.default_rng(1)
    heights = (0.9 * lidar + rng.normal(0, 1.5, lidar.shape)).round(3).astype(np.float32)
    heights[:20, :30] = np.nan
    return heights


@pytest.fixture
def paths(write_map, predicted, lidar):
    """Of the map and its reference."""
    return write_map("m.tif", predicted), write_map("r.tif", lidar)


def quick(map_, reference, **options):
    """Scores without intervals and shift."""
    return canopy.evaluate(map_, reference, **({"replicates": 0, "shift": False} | options))


# ---- scores ---------------------------------------------------------------------------------------
def test_equals_the_arrays_on_one_grid(write_map, predicted, lidar):
    holed = lidar.copy()
    holed[100:140, 50:90] = np.nan
    result = quick(write_map("m.tif", predicted), write_map("r.tif", holed))
    expected = score_arrays(predicted, holed)
    for name, score in result.overall.metrics.items():
        assert score.value == pytest.approx(expected[name], rel=1e-9, abs=1e-9), name
    assert set(expected) - set(result.overall.metrics) == {"interval_coverage", "interval_width_m"}
    assert result.joint.sum() == result.overall.n


def test_windows_give_what_one_piece_gives_and_are_small(paths, monkeypatch):
    class Counted:
        total = done = 0

        def start(self, total, what):
            self.total, self.done = total, 0

        def advance(self, steps=1):
            self.done += steps

    largest, read = [0], HeightMap.read

    def watched(self, grid, **options):
        largest[0] = max(largest[0], *grid.shape)
        return read(self, grid, **options)

    monkeypatch.setattr(HeightMap, "read", watched)
    one = canopy.evaluate(*paths, by=("height", "cover"), replicates=50, shift=False)
    monkeypatch.setattr(pixels, "WINDOW_PX", 50)
    largest[0], progress = 0, Counted()
    other = canopy.evaluate(*paths, by=("height", "cover"), replicates=50, shift=False, progress=progress)
    assert progress.done == progress.total == 6 * 7  # 260 x 310 px
    assert largest[0] == 52  # a window and its margin, whatever the raster's size
    parts = [(one.strata[by][name], other.strata[by][name]) for by in one.strata for name in one.strata[by]]
    for a, b in ((one.overall, other.overall), *parts):
        assert [s.note for s in a.metrics.values()] == [s.note for s in b.metrics.values()]
        for name, score in a.metrics.items():
            one_by_one = [
                (score.value, b[name].value),
                *zip(score.ci95 or (), b[name].ci95 or (), strict=True),
            ]
            for was, found in (pair for pair in one_by_one if pair != (None, None)):
                assert found == pytest.approx(was, rel=1e-9, abs=1e-9), name
    np.testing.assert_array_equal(one.joint, other.joint)
    np.testing.assert_allclose(one.blocks.mae_m, other.blocks.mae_m, rtol=1e-9)
    np.testing.assert_allclose(one.preview.map_m, other.preview.map_m, rtol=1e-5)


def test_a_map_against_itself_is_perfect(paths):
    result = canopy.evaluate(paths[1], paths[1], replicates=100)
    for value, names in (
        (0, "mae_m rmse_m bias_m nmae edge_error p95_error_m"),
        (1, "r2 block_r2 cover_iou_2m"),
    ):
        assert {result.overall[name].value for name in names.split()} == {value}
    assert result.corrected is result.overall and result.overall["mae_m"].ci95 == (0, 0)


@pytest.mark.parametrize(("east", "north"), [(2.0, 0.0), (1.3, -0.6)])
def test_a_shift_is_found_and_undone(write_map, paths, predicted, lidar, east, north):
    moved = write_map("moved.tif", predicted, west=WEST + east, north=NORTH + north)
    result = canopy.evaluate(moved, paths[1], replicates=0)
    found = result.to_dict()
    assert found["shift"]["sure"]
    assert found["shift_m"] == pytest.approx({"east": east, "north": north}, abs=0.15)
    straight = score_arrays(predicted, lidar)["mae_m"]
    assert result.overall["mae_m"].value > straight + 0.3
    assert result.corrected["mae_m"].value < straight + 0.1


@pytest.mark.parametrize("stat", ["mean", "max", "p95"])
def test_the_finer_side_is_pooled_onto_the_coarser(write_map, lidar, stat):
    coarse = lidar[:130, :155]
    fine = coarse.repeat(2, 0).repeat(2, 1)
    fine = (fine + np.random.default_rng(3).gamma(1, 1, fine.shape)).astype(np.float32)
    cells = fine.reshape(130, 2, 155, 2).swapaxes(1, 2).reshape(130, 155, 4).astype(np.float64)
    pooled = {"mean": cells.mean(-1), "max": cells.max(-1), "p95": np.percentile(cells, 95, axis=-1)}[stat]
    both = write_map("fine.tif", fine, gsd=0.5), write_map("r.tif", coarse)
    result, expected = quick(*both, stat=stat), score_arrays(pooled, coarse.astype(np.float64))
    for name in ("n", "mae_m", "rmse_m", "r2", "block_r2", "edge_error", "cover_iou_5m"):
        assert result.overall[name].value == pytest.approx(expected[name], rel=1e-6), name
    # The other way round the grid is the same, and so is every difference but its sign.
    back = quick(*both[::-1], stat=stat).overall["bias_m"].value
    assert back == pytest.approx(-expected["bias_m"], rel=1e-6)


def test_floor_counts_low_heights_as_zero_on_both_sides(write_map, paths, predicted, lidar):
    low = [np.where(x < 2, np.float32(0), x) for x in (predicted, lidar)]
    expected = score_arrays(*low)["mae_m"]
    for option in ({"floor_m": 2.0}, {"sensor": "Optech Gemini"}):
        got = quick(*paths, **option)
        assert got.overall["mae_m"].value == pytest.approx(expected, rel=1e-6)
        assert got.provenance["floor_m"] == [2.0]
    tagged = write_map("t.tif", lidar, tags={"CANOPY_SENSOR": "Gemini"})
    assert quick(paths[0], tagged).provenance["floor_m"] == [2.0]


def test_bands_are_judged_on_pixels_and_on_nothing_else(write_map, lidar):
    """Bands that are exact by construction fail as intervals of coarser pixels' means and of percentiles."""
    rng = np.random.default_rng(5)
    map_m = (lidar + rng.normal(0, 1, lidar.shape)).astype(np.float32)
    low, high = ((map_m + s * rng.gamma(2, 1, map_m.shape)).astype(np.float32) for s in (-1, 1))
    path = write_map("m.tif", np.stack([map_m, low, high]), names=BANDS)
    reference = write_map("r.tif", lidar)
    scores = quick(path, reference).overall
    inside = (low <= lidar) & (high >= lidar)
    assert scores["interval_coverage"].value == pytest.approx(inside.mean(), abs=1e-6)
    assert scores["interval_width_m"].value == pytest.approx((high - low).mean(), abs=1e-4)
    assert "interval_coverage" in scores.by_height["0-2"]
    # A map of 0.5 m against lidar of 1 m is what bands are calibrated on.
    half = write_map("h.tif", np.stack([map_m, low, high]).repeat(2, 1).repeat(2, 2), names=BANDS, gsd=0.5)
    again = quick(half, reference).overall["interval_coverage"].value
    assert again == pytest.approx(inside.mean(), abs=1e-3)
    coarse = write_map("c.tif", lidar[::4, ::4], gsd=4.0)
    fine = write_map("f.tif", lidar.repeat(2, 0).repeat(2, 1), gsd=0.5)
    for other, stat, why in (
        (coarse, "mean", "pixels of 4 m are none"), (fine, "p95", "not of the p95"),
        (coarse, "max", "not of the max"),
    ):  # fmt: skip
        result = quick(path, other, stat=stat, by=("height",))
        for scores in (result.overall, *result.strata["height"].values()):
            for name in ("interval_coverage", "interval_width_m"):
                assert scores[name].value is None and why in str(scores[name].note)
            assert "interval_coverage" not in scores.by_height["0-2"]


def test_date_gap_is_stated(write_map, predicted, lidar):
    map_path = write_map("m.tif", predicted, tags={"CANOPY_DATES": "2019-06-01"})
    dated = write_map("dated.tif", lidar, tags={"ACQUISITION_DATE": "2021-06-01"})
    undated = write_map("undated.tif", lidar)
    for reference, options, gap, words in (
        (dated, {}, 2.0, "2.0 years after"), (undated, {}, None, "gap is unknown"),
        (undated, {"reference_date": "2018-06"}, -1.0, "1.0 years before"),
    ):  # fmt: skip
        result = quick(map_path, reference, **options)
        assert result.provenance["date_gap_years"] == pytest.approx(gap, abs=0.1)
        assert any(words in note for note in result.notes)


# ---- strata ---------------------------------------------------------------------------------------
def test_strata_of_rasters_polygons_and_slope(write_map, paths, predicted, lidar, tmp_path):
    h, w = lidar.shape
    classes = (np.arange(w) // 100 + 9 * (np.arange(h)[:, None] > 130)).astype(np.uint8)
    north = box(WEST, NORTH - 100, WEST + w, NORTH), box(WEST, NORTH - h, WEST + w, NORTH - 150)
    zones = geopandas.GeoDataFrame({"zone": ["north", "south"]}, geometry=list(north), crs=UTM)
    zones.to_file(tmp_path / "zones.gpkg")
    dem = np.where(np.arange(w) < 150, 0.0, 0.3 * (np.arange(w) - 150))[None].repeat(h, 0).astype(np.float32)
    ways = f"class={write_map('c.tif', classes, nodata=255)}", f"zone={tmp_path / 'zones.gpkg'}:zone"
    result = quick(*paths, by=ways, dem=write_map("dem.tif", dem))
    error, rows = np.abs(predicted - lidar), np.arange(h)[:, None] + 0 * np.arange(w)
    masks = {("class", str(k)): classes == k for k in (0, 1, 2, 3, 9, 10, 11, 12)}
    masks |= {("zone", "north"): rows < 100, ("zone", "south"): rows >= 150}
    for (by, name), mask in masks.items():
        scores = result.strata[by][name]
        assert scores["mae_m"].value == pytest.approx(np.nanmean(error[mask]), rel=1e-6), (by, name)
        assert scores.n == np.isfinite(error[mask]).sum()
    assert list(result.strata["class"]) == ["0", "1", "2", "3", "9", "10", "11", "12"]
    assert list(result.strata["slope"]) == ["0-5 deg", "5-10 deg", "10-20 deg"]  # 16.7 degrees, and between


def test_several_references_are_pooled_and_named(write_map, paths, lidar):
    a, b = write_map("a.tif", lidar[:, :150]), write_map("b.tif", lidar[:, 150:], west=WEST + 150)
    result, whole = quick(paths[0], [a, b], by=("site",)), quick(*paths)
    for name in ("n", "mae_m", "rmse_m", "r2", "cover_iou_2m"):
        assert result.overall[name].value == pytest.approx(whole.overall[name].value, rel=1e-9)
    assert list(result.strata["site"]) == ["a", "b"] and set(result.blocks.site) == {"a", "b"}
    assert result.overall.n == sum(scores.n for scores in result.strata["site"].values())


def test_what_cannot_be_scored(paths):
    for words, options in (
        ("a raster, not a table", {"kind": "gedi"}), ("tell the slope", {"by": ("slope",)}),
        ("no such file", {"image": "none.tif"}),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            quick(*paths, **options)


def test_real_lidar_before_and_after_its_pits_were_filled(shared):
    """Filling pits raises heights and nothing else: the raw model lies below, and in the same place."""
    folder = shared / "data" / "pairs"
    name = min(path.name for path in (folder / "chm_raw").glob("ky_*.tif"))
    result = canopy.evaluate(folder / "chm_raw" / name, folder / "chm" / name, replicates=100)
    assert result.overall.n > 40_000 and result.overall["r"].value > 0.6
    assert -3 < result.overall["bias_m"].value < 0
    assert np.hypot(*result.to_dict()["shift_m"].values()) < 0.3
    assert result.overall["p98_error_m"].value == pytest.approx(0, abs=0.5)


# ---- blocks and intervals -------------------------------------------------------------------------
def field(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """120 x 120 px of heights and errors alike over a few pixels; (n,) map, reference, block of 20 px."""
    # White noise smeared over 5 x 5 pixels by a box: cheap and exactly of known variance.
    padded = np.pad(rng.normal(size=(2, 124, 124)).cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))
    smooth = (padded[:, 5:, 5:] - padded[:, :-5, 5:] - padded[:, 5:, :-5] + padded[:, :-5, :-5]) / 5
    reference, error = 15 + 4 * smooth[0], 0.5 + 2 * smooth[1]
    rows, cols = np.indices((120, 120)) // 20
    return (reference + error).ravel(), reference.ravel(), (rows * 6 + cols).ravel()


def test_intervals_cover_the_truth_at_their_nominal_rate():
    # Errors are normal with mean 0.5 and standard deviation 2, independent of the height.
    truth = {"bias_m": 0.5, "rmse_m": np.sqrt(4 + 0.25), "mae_m": stats.foldnorm(0.25, scale=2).mean()}
    rng, fields = np.random.default_rng(0), 240
    hits, naive = dict.fromkeys(truth, 0), 0
    for k in range(fields):
        p, r, block = field(rng)
        rows = metrics.pixel_sums(p, r, block, 36)
        found = intervals(metrics.scores(replicate(rows, 300, k % 5)), 36)
        for name, value in truth.items():
            low, high = found[name]
            hits[name] += low <= value <= high
        naive += abs((p - r).mean() - 0.5) <= 1.96 * (p - r).std() / np.sqrt(p.size)
    rates = {name: count / fields for name, count in hits.items()}
    assert all(0.90 <= rate <= 0.98 for rate in rates.values()), rates
    assert naive / fields < 0.6, "resampling pixels instead would be right less than six times in ten"


def test_few_blocks_give_a_reason_and_missing_values_no_interval(paths):
    few = canopy.evaluate(*paths, shift=False, block_m=150, replicates=50).overall
    assert few["mae_m"].ci95 is None and "6 blocks of 150 m with data, at least 10" in few["mae_m"].note
    drawn = np.where(np.arange(100) < 90, 1.0, np.nan)
    assert intervals({"x": drawn, "y": np.arange(100.0)}, 20)["x"] is None


@pytest.mark.parametrize(
    ("side", "gsd", "expected"),
    [(2000, 1.0, 250), (1000, 1.0, 200), (256, 1.0, 50), (4000, 0.5, 500), (300, 30.0, 50)],
)
def test_block_side_is_the_largest_that_leaves_enough(side, gsd, expected):
    layout = BlockLayout([Grid.of(UTM, (gsd, 0, WEST, 0, -gsd, NORTH), (side, side))])
    assert layout.side_px == expected and layout.side_px % metrics.BLOCK_PX == 0
    assert layout.count >= LEAST_WANTED or expected == 50
