"""Named sources: strict manifests, nearest names, and the best source for an area."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from canopy.errors import ConfigError, ImageryError, InputError
from canopy.geo.area import AOI
from canopy.imagery.manifests import all_sources, best_source, known_names, named_source
from canopy.imagery.open import open_imagery
from canopy.imagery.xyz import TileSource

SHIPPED = {"demo", "ign-ortho", "maxar-open-data", "naip", "neon-rgb", "swissimage", "vantor-open-data"}
MINIMAL = """
name: {name}
title: Test
kind: {kind}
href: {href}
gsd_m: 0.5
licence: CC0
attribution: nobody
dates: 2020/2021
coverage: [-72, 44, -71, 45]
"""


@pytest.fixture
def manifests(tmp_path, monkeypatch):
    """`manifests(text, name)` writes one manifest into an otherwise empty set."""
    folder = tmp_path / "manifests" / "imagery"
    folder.mkdir(parents=True)
    monkeypatch.setenv("CANOPY_MANIFESTS", str(folder.parent))

    def write(text: str, name: str = "mine") -> Path:
        path = folder / f"{name}.yaml"
        path.write_text(text)
        return path

    return write


def test_every_shipped_manifest_is_valid_and_says_its_terms():
    sources = {source.name: source for source in all_sources()}
    assert set(sources) >= SHIPPED and list(sources) == sorted(sources) == known_names()
    for source in sources.values():
        assert source.licence and source.attribution and source.notes and 0 < source.gsd_m <= 3
        assert source.geometry.is_valid and not source.geometry.is_empty
        first, last = source.dates.split("/")
        assert first[:4].isdigit() and first <= last
        assert "sig=" not in source.href and "token" not in source.href.lower()


@pytest.mark.parametrize(
    ("name", "lat", "lon", "inside"),
    [
        ("naip", 44.083, -71.296, True),  # White Mountains
        ("naip", 37.8, -83.6, True),  # Kentucky
        ("naip", 43.7, -79.4, False),  # Toronto
        ("naip", 45.5, -73.6, False),  # Montreal
        ("naip", 49.3, -123.1, False),  # Vancouver
        ("naip", 32.4, -117.0, False),  # Tijuana
        ("naip", 31.7, -106.4, False),  # Ciudad Juarez
        ("ign-ortho", 48.4, 2.7, True),  # Fontainebleau
        ("ign-ortho", 42.3, 9.15, True),  # Corte
        ("ign-ortho", 50.85, 4.35, False),  # Brussels
        ("ign-ortho", 41.4, 2.2, False),  # Barcelona
        ("swissimage", 46.8, 8.2, True),  # Obwalden
        ("swissimage", 45.46, 9.19, False),  # Milan
    ],
)
def test_coverages_know_which_side_of_a_border_they_are_on(name, lat, lon, inside):
    assert named_source(name).geometry.covers(AOI.from_bbox([lat, lon], size_m=500).lonlat) is inside


@pytest.mark.parametrize(
    ("lat", "lon", "name"),
    [(44.083, -71.296, "naip"), (48.4, 2.7, "ign-ortho"), (46.8, 8.2, "swissimage"), (-3.1, -60.0, None)],
)
def test_the_best_source_covers_the_area_wholly(lat, lon, name):
    best = best_source(AOI.from_bbox([lat, lon], size_m=1000))
    assert (best.name if best else None) == name


def test_an_area_that_a_source_covers_only_in_part_has_no_best_source():
    across = AOI.from_bounds((-79.2, 42.0, -78.6, 44.5))
    assert best_source(across) is None


def test_an_unknown_key_names_the_nearest(manifests):
    manifests(MINIMAL.format(name="mine", kind="file", href="a.tif") + "licens: x\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml.*'licens'.*did you mean 'licence'"):
        named_source("mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("gsd_m: 0.5", "gsd_m: -1"), "gsd_m"),
        (("kind: file", "kind: files"), "kind"),
        (("href: a.tif", "href: ''"), "needs href"),
        (("coverage: [-72, 44, -71, 45]", "coverage: [-71, 44, -72, 45]"), "west, south, east, north"),
        (("coverage: [-72, 44, -71, 45]", "coverage: 'POLYGON (('"), "coverage"),
        (("coverage: [-72, 44, -71, 45]", "coverage: [-72, 44, -71, 99]"), "coverage"),
        (("name: mine", "name: yours"), "expected 'mine'"),
        (("licence: CC0\n", ""), "licence"),
        (("title: Test", "title: [unclosed"), "YAML"),
    ],
)
def test_a_wrong_manifest_says_what_is_wrong(manifests, change, message):
    manifests(MINIMAL.format(name="mine", kind="file", href="a.tif").replace(*change))
    with pytest.raises(ConfigError, match=message) as caught:
        named_source("mine")
    assert "mine.yaml" in str(caught.value)


def test_coverage_may_be_boxes_or_wkt(manifests):
    base = MINIMAL.format(name="mine", kind="file", href="a.tif").replace(
        "coverage: [-72, 44, -71, 45]", "{}"
    )
    for text in (
        "[[-72, 44, -71.5, 45], [-71.5, 44, -71, 45]]",
        "POLYGON ((-72 44, -71 44, -71 45, -72 45, -72 44))",
    ):
        manifests(base.replace("{}", f"coverage: {text}"))
        assert named_source("mine").geometry.bounds == (-72, 44, -71, 45)


def test_an_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(InputError, match=r"naips: .*did you mean 'naip'.*demo, ign-ortho"):
        open_imagery("naips")
    with pytest.raises(InputError, match="one of demo"):
        open_imagery("zzzzzz")


def test_a_directory_source_reads_the_place_named_by_its_variable(make_tif, rgb, tmp_path, monkeypatch):
    monkeypatch.delenv("CANOPY_NEON_RGB", raising=False)
    with pytest.raises(InputError, match=r"neon-rgb.*\$CANOPY_NEON_RGB, which is not set"):
        open_imagery("neon-rgb")
    make_tif(rgb, "neon/2019_HARV_6_732000_4713000_image.tif", photometric="RGB")
    monkeypatch.setenv("CANOPY_NEON_RGB", str(tmp_path / "neon"))
    source = open_imagery("neon-rgb")
    assert source.name == "neon-rgb" and any("CC0" in note for note in source.notes)
    assert source.read(source.native_grid).valid.all()
    monkeypatch.setenv("CANOPY_NEON_RGB", str(tmp_path / "elsewhere"))
    with pytest.raises(ImageryError, match="is not there"):
        open_imagery("neon-rgb")


def test_a_declared_scale_is_used_and_the_users_wins(manifests, make_tif, rgb):
    values = rgb.astype(np.uint16) * 10
    path = make_tif(values, photometric="RGB")
    manifests(MINIMAL.format(name="mine", kind="file", href=path) + "scale: 4000\n")
    for scale, white in ((None, 4000), (2550.0, 2550)):
        source = open_imagery("mine", scale=scale)
        np.testing.assert_allclose(
            source.read(source.native_grid).rgb, np.clip(values / white, 0, 1), atol=1e-6
        )


def test_white_255_does_not_let_a_uint16_file_pass(manifests, make_tif, rgb):
    path = make_tif(rgb.astype(np.uint16), photometric="RGB")
    manifests(MINIMAL.format(name="mine", kind="file", href=path) + "scale: 255\n")
    with pytest.raises(ImageryError, match="--scale"):
        open_imagery("mine")


def test_tile_sources_open_without_asking_the_host():
    source = open_imagery("ign-ortho", area=AOI.from_bbox([48.4, 2.7], size_m=500))
    assert isinstance(source, TileSource) and 0.3 < source.native_gsd_m <= 0.6
    assert source.name == "ign-ortho" and source.area() is not None
    assert not source.covers(AOI.from_bbox([50.85, 4.35], size_m=500))


def test_a_folder_that_is_no_manifest_set_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("CANOPY_MANIFESTS", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="CANOPY_MANIFESTS"):
        open_imagery("naip")
