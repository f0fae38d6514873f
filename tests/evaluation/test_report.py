"""The page of an evaluation: whole, self-contained, one colour scale, well-formed."""

from __future__ import annotations

import dataclasses
import io
from html.parser import HTMLParser

import numpy as np
import pandas
import pytest

from canopy.evaluation.evaluate import evaluate
from canopy.evaluation.report import figures
from canopy.evaluation.report.pages import cell_text, evaluation_page, label, ranked, strip, write_results
from canopy.evaluation.scores import Score


class Checked(HTMLParser):
    """Every tag closed in order; addresses and table rows kept."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.links, self.alts, self.widths = [], [], [], {}
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.links += [value for key, value in attrs if key in ("src", "href")]
        self.alts += [value for key, value in attrs if key == "alt"]
        if tag not in ("meta", "img"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


@pytest.fixture(scope="module")
def judged(tmp_path_factory, forest):
    """A noisy, shrunken map of a forest, with its interval, judged in blocks."""
    import rasterio

    folder = tmp_path_factory.mktemp("judged")
    truth = forest(300, 7)
    noise = np.random.default_rng(1).normal(0, 2, truth.shape)
    made = np.maximum(0.7 * truth + 3 + noise, 0).astype(np.float32)
    made[:30] = np.nan
    for name, bands in (("truth", [truth]), ("map", [made, made - 4, made + 4])):
        with rasterio.open(
            folder / f"{name}.tif", "w", driver="GTiff", count=len(bands), dtype="float32",
            height=300, width=300,
            crs="EPSG:32618", transform=rasterio.Affine(1, 0, 5e5, 0, -1, 4_882_000), nodata=float("nan"),
        ) as dataset:  # fmt: skip
            dataset.write(np.stack(bands))
            if name == "map":
                dataset.descriptions = ("canopy_height", "height_lower", "height_upper")
    return evaluate(
        folder / "map.tif", folder / "truth.tif", by=("height",), block_m=50, replicates=50, shift=False
    )


def test_the_page_is_whole_and_needs_nothing_else(judged, tmp_path):
    write_results(judged, tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Checked(text)
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert all(page.alts) and len(page.alts) == len(page.links)
    for words in (
        "Scores", "By reference height", "Where", "Best and worst blocks of 50", "By height", "Provenance",
        "mean absolute error", "95 % interval", "share inside the map", "@media print",
    ):  # fmt: skip
        assert words in text, words
    assert "http://" not in text and "https://" not in text and str(tmp_path) not in text
    names = {p.name for p in (tmp_path / "figures").iterdir()}
    assert {
        "density.png",
        "error_by_height.png",
        "side_by_side.png",
        "error_map.png",
        "worst_blocks.png",
    } <= names
    assert f"{judged.overall.n:,}" in text


def test_blocks_are_ranked_and_cut_out_of_the_picture(judged):
    order = ranked(judged.blocks)
    assert (np.diff(judged.blocks.mae_m[order]) >= 0).all()
    assert (judged.blocks.n[order] >= 0.25 * judged.blocks.n.max()).all()
    worst = int(order[-1])
    caption, left, right = strip(judged.previews, judged.blocks.iloc[worst])
    assert left.shape == right.shape == (50, 50) and f"{judged.blocks.mae_m[worst]:.1f}" in caption
    known = np.isfinite(left)
    assert np.abs(left - right)[known].mean() == pytest.approx(judged.blocks.mae_m[worst], abs=1e-3)


def test_samples_get_a_map_of_points(judged):
    rng = np.random.default_rng(0)
    points = pandas.DataFrame(
        {
            "lon": -75 + rng.random(50) / 10, "lat": 44 + rng.random(50) / 10,
            "reference_m": rng.random(50) * 30, "map_m": rng.random(50) * 30,
        }
    )  # fmt: skip
    made = dataclasses.replace(judged, kind="gedi", samples=points, previews=())
    assert "Map of sample errors" in evaluation_page(made)[0]


def test_both_sides_share_one_scale():
    left, right = np.full((20, 20), 3.0), np.full((20, 20), 33.0)
    assert figures.scale_top(left, right) == 35
    assert figures.difference_top(np.array([np.nan, -7.2])) == 8
    assert figures.scale_top(np.full((2, 2), np.nan)) == 5


def test_pictures_of_nothing_are_drawn_too():
    from PIL import Image

    nothing = np.full((5, 90), np.nan)
    for png in (
        figures.side_by_side(nothing, nothing, ("a", "b"), 1.0),
        figures.difference_map(nothing, "m", 1.0),
        figures.class_map(np.zeros((5, 5)), {1: "one", 2: "two"}, 30.0),
        figures.density(np.zeros((80, 80)), 1.0, "x", "y"),
        figures.error_by_height([("0-2", 0, Score(None), Score(None))], "m"),
    ):
        assert min(Image.open(io.BytesIO(png)).size) > 100


@pytest.mark.parametrize(
    ("name", "words"),
    [("mae_m", "mean absolute error (m)"), ("cover_iou_2m", "cover above 2 m, IoU"), ("p95_error_m", "95th"),
     ("something_new", "something new")],
)  # fmt: skip
def test_labels(name, words):
    assert words in label(name)


def test_numbers_for_people():
    assert [cell_text(v) for v in (None, 3, 1234567, 0.123, -0.0001, float("nan"), "x")] == [
        "-", "3", "1,234,567", "0.12", "0.00", "-", "x",
    ]  # fmt: skip
