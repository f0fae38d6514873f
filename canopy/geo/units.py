"""Units of heights: as the field writes them, and what a raster's band says of its own."""

from __future__ import annotations

import re

from rasterio.io import DatasetReader

from canopy.errors import ImageryError
from canopy.files import public_name

FOOT, US_FOOT = 0.3048, 1200 / 3937
# After `metres_per` has made plurals, brackets and American spelling one.
_METRES_PER = {
    **dict.fromkeys(("m", "metre", "mtr", "epsg:9001"), 1.0),
    **dict.fromkeys(("dm", "decimetre"), 0.1),
    **dict.fromkeys(("cm", "centimetre"), 0.01),
    **dict.fromkeys(("mm", "millimetre"), 0.001),
    **dict.fromkeys(("ft", "foot", "international foot", "foot international", "epsg:9002"), FOOT),
    **dict.fromkeys(
        ("us survey foot", "survey foot", "us foot", "foot us", "us ft", "ft us", "usft", "ftus", "sft",
         "us survey ft", "foot us survey", "epsg:9003"),
        US_FOOT,
    ),
}  # fmt: skip
_ABOVE = re.compile(r" (above|over) (the )?ground( level)?$| agl$")
# A unit in a name: in brackets, or as its last words.
_BRACKETS = re.compile(r"[\[(]([^\[\]()]*)[\])]")
_TAGS = ("units", "unit", "unittype", "unit_type", "z_units", "z_unit", "vertical_units", "vertical_unit")

UNITS_EXPECTED = "metres, decimetres, centimetres, millimetres, feet or US survey feet"


def metres_per(unit: str) -> float | None:
    """Metres in a unit as it is named: `m`, `Feet`, `US survey foot`, `[cm]`, `m above ground`; else None.

    >>> metres_per("Meters (above ground)"), metres_per("furlong")
    (1.0, None)
    """
    text = re.sub(r"[\s_\-()\[\]]+", " ", unit.lower().replace(".", "")).strip()
    text = re.sub(r"^urn:ogc:def:uom:epsg::", "epsg:", text)
    text = _ABOVE.sub("", text.replace("meter", "metre").replace("feet", "foot"))
    words = text.split(" ")
    if len(words) == 2 and words[0].startswith(words[1]):  # "metre (m)"
        text = words[0]
    return _METRES_PER.get(text, _METRES_PER.get(text.removesuffix("s")))


def unit_in_name(name: str) -> str | None:
    """The unit that the name of a band or column ends in or has in brackets: `chm_ft`, `Height (cm)`."""
    for found in _BRACKETS.findall(name):
        if metres_per(found) is not None:
            return str(found).strip()
    words = [word for word in re.split(r"[\s_,\-.]+", name.strip()) if word]
    tails = (" ".join(words[-count:]) for count in (3, 2, 1) if len(words) > count)
    return next((tail for tail in tails if metres_per(tail) is not None), None)


def band_unit(dataset: DatasetReader, band: int) -> tuple[str, float] | None:
    """The unit of a band's values as it is written, and its metres; None where the file says nothing of it.

    It may be the band's unit, a tag of band or file, or stand in the band's description.

    Raises:
        ImageryError: a unit that is no known one of heights, or two that contradict each other.
    """
    where, said = public_name(dataset.name), dict[str, float]()
    tags = {name.lower(): value for name, value in {**dataset.tags(), **dataset.tags(band)}.items()}
    texts = [(dataset.units[band - 1] or "").strip(), *(tags.get(name, "") for name in _TAGS)]
    texts.append(unit_in_name(dataset.descriptions[band - 1] or "") or "")
    remedy = f"write the band's true unit into the file: rio edit-info --bidx {band} --units m FILE"
    for number, text in enumerate(texts):
        metres = metres_per(text) if text else None
        if text and metres is None and number == 0:
            raise ImageryError(f"heights in {text!r}", where=where, expected=UNITS_EXPECTED, remedy=remedy)
        if metres is not None:
            said[text] = metres
    if len(set(said.values())) > 1:
        raise ImageryError(
            f"says that band {band} is in {' and in '.join(said)}", where=where, expected="one unit"
        )
    return next(iter(said.items()), None)
