"""Names of sources: recognised, listed, and shown without secrets."""

from __future__ import annotations

import pytest

from canopy.errors import ImageryError
from canopy.files import host_of, is_template, is_url, list_directory, looks_like_raster, redact


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://h.org/a.tif", "https://h.org/a.tif"),
        ("https://h.org/a.tif?sig=abc&se=1", "https://h.org/a.tif"),
        ("cannot open https://me:pw@h.org:8080/a.tif?k=v now", "cannot open https://h.org:8080/a.tif now"),
        ("'https://h.org/a.tif?k=v': 403", "'https://h.org/a.tif': 403"),
        ("a.tif?sig=abc, band 1: IReadBlock failed", "a.tif band 1: IReadBlock failed"),
        ("is it there? yes", "is it there? yes"),
        ("plain words", "plain words"),
    ],
)
def test_secrets_are_not_shown(text, shown):
    assert redact(text) == shown


def test_urls_templates_and_hosts():
    assert is_url("HTTPS://h/a") and not is_url("ftp://h/a") and not is_url("a/b.tif")
    assert (
        is_template("https://h/{z}/{x}/{y}") and is_template("https://h/{q}") and not is_template("a{b}.tif")
    )
    assert host_of("https://me:pw@h.org:81/a") == "h.org:81"


def test_rasters_are_known_by_their_first_bytes():
    for first in (
        b"II*\0rest",
        b"MM\0*rest",
        b"II+\0",
        b"\x89PNG\r\n",
        b"\xff\xd8\xff\xe0",
        b"\0\0\0\x0cjP  \r\n",
    ):
        assert looks_like_raster(first)
    for first in (b"", b"{", b"<html>", b"<VRTDataset", b"PK\3\4"):
        assert not looks_like_raster(first)


def test_a_directory_lists_its_images_by_name_and_nothing_else(tmp_path):
    for name in ("b.tif", "a.TIF", "c.jp2", "d.vrt", ".hidden.tif", "e.txt", "f.tif.aux.xml", "g.json"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "sub.tif").mkdir()
    assert [path.name for path in list_directory(tmp_path)] == ["a.TIF", "b.tif", "c.jp2", "d.vrt"]
    (tmp_path / "none").mkdir()
    with pytest.raises(ImageryError, match="holds no image"):
        list_directory(tmp_path / "none")
