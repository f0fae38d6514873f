"""How QGIS shows a raster: the `.qml` beside it, in QGIS 3's own XML.

QGIS loads NAME.qml with NAME.tif: heights in a ramp that is even in perceived lightness, differences in one
with white at zero, classes with their names and colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

# matplotlib's viridis; blue is taller and red lower, as in the reports (ColorBrewer's RdBu).
HEIGHTS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
CLASS_COLOURS = ("#e8e4da", "#56b4e9", "#e69f00", "#009e73", "#d55e00")
CHANGES = ("#b2182b", "#ef8a62", "#fddbc7", "#f7f7f7", "#d1e5f0", "#67a9cf", "#2166ac")


def ramp_style(low: float, high: float, colours: Sequence[str] = HEIGHTS, unit: str = "m") -> str:
    """A style that shows band 1 from `low` to `high` in colours that are spread evenly."""
    renderer, root = _renderer("singlebandpseudocolor")
    renderer.attrib |= {"classificationMin": f"{low:g}", "classificationMax": f"{high:g}"}
    shader = SubElement(
        SubElement(renderer, "rastershader"), "colorrampshader", colorRampType="INTERPOLATED",
        classificationMode="1", clip="0", minimumValue=f"{low:g}", maximumValue=f"{high:g}",
    )  # fmt: skip
    for number, colour in enumerate(colours):
        value = low + (high - low) * number / (len(colours) - 1)
        SubElement(shader, "item", value=f"{value:g}", label=f"{value:.3g} {unit}", color=colour, alpha="255")
    return _text(root)


def class_style(classes: Mapping[int, tuple[str, str]]) -> str:
    """A style that shows band 1 as classes: code -> (name, colour)."""
    renderer, root = _renderer("paletted")
    palette = SubElement(renderer, "colorPalette")
    for code, (name, colour) in classes.items():
        SubElement(palette, "paletteEntry", value=str(code), label=name, color=colour, alpha="255")
    return _text(root)


def _renderer(kind: str) -> tuple[Element, Element]:
    root = Element("qgis", version="3.22", styleCategories="Symbology")
    pipe = SubElement(root, "pipe")
    renderer = SubElement(pipe, "rasterrenderer", type=kind, band="1", opacity="1", alphaBand="-1")
    SubElement(renderer, "rasterTransparency")
    return renderer, root


def _text(root: Element) -> str:
    SubElement(root, "blendMode").text = "0"
    return (
        f"<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n{tostring(root, encoding='unicode')}\n"
    )
