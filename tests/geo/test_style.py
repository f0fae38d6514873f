"""What QGIS and GDAL show of a file at first sight: its style, its colours, its statistics."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio

from canopy.errors import InputError
from canopy.geo.cog import BandSpec, CogWriter
from canopy.geo.grid import Grid
from canopy.geo.style import class_style, ramp_style

GRID = Grid.of("EPSG:32618", (0.5, 0, 500_000, 0, -0.5, 4_000_000), (40, 50))


def test_heights_have_a_ramp_and_statistics(tmp_path: Path) -> None:
    heights = np.random.default_rng(0).gamma(3, 5, (1, 40, 50)).astype(np.float32)
    valid = heights[0] < 30
    with CogWriter(tmp_path / "chm.tif", GRID, [BandSpec("canopy_height")], style=ramp_style(0, 35)) as file:
        file.write(heights, valid)
    with rasterio.open(tmp_path / "chm.tif") as made:
        told = made.tags(1)
    assert float(told["STATISTICS_MEAN"]) == pytest.approx(heights[0][valid].mean(), rel=1e-5)
    assert float(told["STATISTICS_MAXIMUM"]) == pytest.approx(heights[0][valid].max(), rel=1e-6)
    style = ElementTree.fromstring((tmp_path / "chm.qml").read_text().split("\n", 1)[1])
    values = [float(item.attrib["value"]) for item in style.iter("item")]
    assert (values[0], values[-1]) == (0, 35) and values == sorted(values)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chm.qml", "chm.tif"]
    (tmp_path / "chm.tif").unlink()
    with pytest.raises(InputError, match=r"chm\.qml"):  # somebody's own style is not replaced unasked
        CogWriter(tmp_path / "chm.tif", GRID, [BandSpec("canopy_height")], style=ramp_style(0, 35))


def test_classes_have_names_and_colours(tmp_path: Path) -> None:
    classes = {1: ("no change", "#e8e4da"), 5: ("canopy lost", "#d55e00")}
    codes = np.where(np.arange(50) < 25, 1, 5) * np.ones((1, 40, 1))
    with CogWriter(
        tmp_path / "class.tif", GRID, [BandSpec("class", "1")], encoding="uint8m", overviews="mode",
        style=class_style(classes), colours={code: colour for code, (_, colour) in classes.items()},
    ) as file:  # fmt: skip
        file.write(codes.astype(np.float32), np.ones((40, 50), bool))
    with rasterio.open(tmp_path / "class.tif") as made:
        assert made.colormap(1)[5][:3] == (0xD5, 0x5E, 0x00)
        np.testing.assert_array_equal(made.read(), codes)
    style = ElementTree.fromstring((tmp_path / "class.qml").read_text().split("\n", 1)[1])
    found = {
        int(e.attrib["value"]): (e.attrib["label"], e.attrib["color"]) for e in style.iter("paletteEntry")
    }
    assert found == classes
