"""Files are whole or not there, outputs never go over inputs, names are known and shown without secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from canopy.errors import DataError, ImageryError, InputError, OutputError
from canopy.files import (
    check_output,
    host_of,
    is_template,
    is_url,
    list_directory,
    looks_like_raster,
    redact,
    replacing,
    told_as_output,
)


def test_the_name_holds_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as one:
        one.write_text("one")
        with replacing(path) as two:  # another writer has a file of its own
            two.write_text("two")
            assert path.read_text() == "old"
        assert path.read_text() == "two" and one.parent == tmp_path and one.name.startswith(".a.json.")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), DataError("what it was")])
def test_a_failure_leaves_nothing_and_stays_what_it_was(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(type(error)) as caught, replacing(path) as part:
        part.write_text("half")
        raise error
    assert caught.value is error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_errors_of_the_system_are_told_with_the_remedy(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"the network cannot be written \(No such file.*Look elsewhere"),
        replacing(tmp_path / "no" / "a", "the network cannot be written", "look elsewhere") as part,
    ):
        part.write_text("x")
    with pytest.raises(OutputError, match="here: cannot be made"), told_as_output("here", "cannot be made"):
        raise PermissionError(13, "Permission denied")


# ---- the one check of outputs -------------------------------------------------------------------
def test_never_over_an_input_whatever_its_kind(tmp_path: Path) -> None:
    folder = tmp_path / "tiles"
    folder.mkdir()
    for name in ("aoi.json", "zones.dbf", "zones.shp", "tiles/a.tif"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "link.tif").symlink_to(folder / "a.tif")
    cases = [
        ("aoi.json", [tmp_path / "aoi.json"]),
        ("aoi.json", [None, ["other.tif", str(tmp_path / "tiles" / ".." / "aoi.json")]]),
        ("zones.dbf", [tmp_path / "zones.shp"]),
        ("tiles/a.tif", [folder]),
        ("link.tif", [folder / "a.tif"]),
    ]
    for out, inputs in cases:
        with pytest.raises(InputError, match="is one of the inputs"):
            check_output(tmp_path / out, inputs, overwrite=True)
    with pytest.raises(InputError, match="holds one of the inputs"):
        check_output(folder, [folder / "a.tif"], overwrite=True, folder=True)


def test_what_exists_is_kept_unless_told_otherwise_and_names_are_checked(tmp_path: Path) -> None:
    old = tmp_path / "old.tif"
    old.write_bytes(b"x")
    assert check_output([tmp_path / "new.tif", old], ["https://host/old.tif"], overwrite=True)[1] == old
    assert check_output(tmp_path / "fresh", overwrite=False, folder=True) == [tmp_path / "fresh"]
    for out, options, message in (
        ([tmp_path / "new.tif", old], {}, r"exists already.*--overwrite"),
        (tmp_path, {"folder": True}, "not empty"),
        (tmp_path / ("a" * 250 + ".tif"), {}, "240 bytes"),
        (tmp_path / "none" / "a.tif", {}, "no such directory"),
        (tmp_path, {}, "is a directory"),
        (tmp_path / "a.png", {"suffixes": (".tif", ".tiff")}, r"ending in \.tif or \.tiff"),
    ):
        with pytest.raises(InputError, match=message):
            check_output(out, overwrite=False, **options)


# ---- names --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://h.org/a.tif?sig=abc&se=1", "https://h.org/a.tif"),
        ("cannot open https://me:pw@h.org:8080/a.tif?k=v now", "cannot open https://h.org:8080/a.tif now"),
        ("'https://h.org/a.tif?k=v': 403", "'https://h.org/a.tif': 403"),
        ("a.tif?sig=abc, band 1: IReadBlock failed", "a.tif band 1: IReadBlock failed"),
        ("is it there? yes", "is it there? yes"),
    ],
)
def test_secrets_are_not_shown(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_names_are_recognised() -> None:
    assert is_url("HTTPS://h/a") and not is_url("ftp://h/a") and not is_url("a/b.tif")
    assert is_template("https://h/{z}/{x}/{y}") and is_template("https://h/{q}")
    assert not is_template("a{b}.tif")
    assert host_of("https://me:pw@h.org:81/a") == "h.org:81"
    assert all(map(looks_like_raster, (b"II*\0rest", b"MM\0*rest", b"\x89PNG\r\n", b"\xff\xd8\xff\xe0")))
    assert not any(map(looks_like_raster, (b"", b"{", b"<html>", b"<VRTDataset", b"PK\3\4")))


def test_a_directory_lists_its_images_by_name_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b.tif", "a.TIF", "c.jp2", "d.vrt", ".hidden.tif", "e.txt", "f.tif.aux.xml", "g.json"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "sub.tif").mkdir()
    assert [path.name for path in list_directory(tmp_path)] == ["a.TIF", "b.tif", "c.jp2", "d.vrt"]
    with pytest.raises(ImageryError, match="holds no image"):
        list_directory(tmp_path / "sub.tif")
