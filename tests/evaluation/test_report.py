"""The page of an evaluation: whole, self-contained, one colour scale, well-formed."""

from __future__ import annotations

import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from canopy.evaluation.evaluate import evaluate
from canopy.evaluation.report import figures
from canopy.evaluation.report.pages import evaluation_page, write_results
from canopy.evaluation.scores import Score


class Checked(HTMLParser):
    """Every tag closed in order; addresses kept."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.links, self.alts = [], [], []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.links += [value for key, value in attrs if key in ("src", "href")]
        self.alts += [value for key, value in attrs if key == "alt"]
        if tag not in ("meta", "img"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


@pytest.fixture
def judged(write_map, forest):
    """A noisy, shrunken map of a forest, judged in blocks; its name needs escaping."""
    truth = forest(300, 7)
    made = np.maximum(0.7 * truth + 3 + np.random.default_rng(1).normal(0, 2, truth.shape), 0)
    made[:30] = np.nan
    paths = write_map("a & b.tif", made.astype(np.float32)), write_map("truth.tif", truth)
    return evaluate(*paths, by=("height",), block_m=50, replicates=50, shift=False)


def test_the_page_is_whole_and_needs_nothing_else(judged, tmp_path):
    write_results(judged, tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    page = Checked(text)
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert all(page.alts) and len(page.alts) == len(page.links)
    for words in (
        "Scores", "By reference height", "Where", "Blocks of 50", "By height", "Provenance",
        "mean absolute error", "95 % interval", "@media print", "a &amp; b.tif", f"{judged.overall.n:,}",
    ):  # fmt: skip
        assert words in text, words
    assert "http://" not in text and "https://" not in text and str(tmp_path) not in text
    names = {p.stem for p in (tmp_path / "out" / "figures").iterdir()}
    assert names == {"density", "error_by_height", "side_by_side", "error_map"}


def test_the_image_stands_beside_the_heights_and_the_shift_is_in_words(write_map, forest, tmp_path):
    truth = forest(200, 7)
    rgb = np.stack([np.clip(truth * 6, 0, 255)] * 3).astype(np.uint8)
    reference, moved = write_map("truth.tif", truth), write_map("m.tif", truth, west=499_997.0)
    image = write_map("rgb.tif", rgb, nodata=None, names=(), photometric="RGB")
    found = evaluate(moved, reference, image=image, replicates=0)
    assert found.shift_words == "3.0 m west of"
    shown, (_, height) = found.preview.image, found.preview.map_m.shape
    assert shown.shape == (*found.preview.map_m.shape, 3) and height == 197
    np.testing.assert_allclose(shown[..., 0] * 255, rgb[0, :, :197], atol=1)
    text, pictures = evaluation_page(found)
    assert "3.0 m west of the reference" in text
    width = Image.open(io.BytesIO(pictures["side_by_side"])).size[0]
    assert width > 3 * figures.PANEL_INCHES * figures.DPI, "three panels"


def test_one_scale_for_both_sides_and_pictures_of_nothing():
    assert figures.scale_top(np.full((20, 20), 3.0), np.full((20, 20), 33.0)) == 35
    assert figures.difference_top(np.array([np.nan, -7.2])) == 8
    nothing = np.full((5, 90), np.nan)
    for png in (
        figures.side_by_side({"a": nothing, "b": nothing}, 1.0),
        figures.difference_map(nothing, "m", 1.0),
        figures.class_map(np.zeros((5, 5)), {1: "one", 2: "two"}, 30.0),
        figures.density(np.zeros((80, 80)), 1.0, "x", "y"),
        figures.error_by_height([("0-2", 0, Score(None), Score(None))], "m"),
    ):
        assert min(Image.open(io.BytesIO(png)).size) > 100
