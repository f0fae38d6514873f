"""Files are whole or not there, whoever else writes them and whatever the disk says."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from canopy.errors import DataError, InputError, OutputError
from canopy.files import check_output, file_sha256, replacing, told_as_output


def test_the_name_holds_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
        assert part.parent == tmp_path and part.name.startswith(".a.json.")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), DataError("what it was")])
def test_a_failure_leaves_nothing_and_stays_what_it_was(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(type(error)) as caught, replacing(path) as part:
        part.write_text("half")
        raise error
    assert caught.value is error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as one:
        one.write_text("one")
        with replacing(path) as two:
            two.write_text("two")
        assert path.read_text() == "two"
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    """A real refusal of the system: files of this process may not grow beyond 1,000 bytes."""
    code = (
        "import resource, signal, sys\n"
        "from canopy.errors import OutputError\n"
        "from canopy.files import replacing\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    with replacing(sys.argv[1]) as part:\n"
        "        part.write_bytes(bytes(5000))\n"
        "except OutputError as error:\n"
        "    print(error)\n"
    )
    path = tmp_path / "a.bin"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{path}: cannot be written (File too large)\n"
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_told_with_the_remedy(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"the network cannot be written \(No such file.*Look elsewhere"),
        replacing(tmp_path / "no" / "a", "the network cannot be written", "look elsewhere") as part,
    ):
        part.write_text("x")


def test_errors_of_the_system_become_one_kind() -> None:
    with pytest.raises(OutputError, match="here: cannot be made"), told_as_output("here", "cannot be made"):
        raise PermissionError(13, "Permission denied")


def test_hash_of_a_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000
    (tmp_path / "a").write_bytes(data)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


class TestCheckOutput:
    """Every command hands its outputs and all its inputs to `files.check_output`."""

    def test_never_over_an_input_whatever_its_kind(self, tmp_path: Path) -> None:
        folder = tmp_path / "tiles"
        folder.mkdir()
        for name in ("aoi.json", "zones.dbf", "zones.shp", "tiles/a.tif"):
            (tmp_path / name).write_bytes(b"x")
        cases = [
            ("aoi.json", [tmp_path / "aoi.json"]),
            ("aoi.json", [None, ["other.tif", str(tmp_path / "tiles" / ".." / "aoi.json")]]),
            ("zones.dbf", [tmp_path / "zones.shp"]),
            ("tiles/a.tif", [folder]),
        ]
        for out, inputs in cases:
            with pytest.raises(InputError, match="is one of the inputs"):
                check_output(tmp_path / out, inputs, overwrite=True)
        link = tmp_path / "link.tif"
        link.symlink_to(folder / "a.tif")
        with pytest.raises(InputError, match="is one of the inputs"):
            check_output(link, [folder / "a.tif"], overwrite=True)
        with pytest.raises(InputError, match="holds one of the inputs"):
            check_output(folder, [folder / "a.tif"], overwrite=True, folder=True)

    def test_what_exists_is_kept_unless_told_otherwise(self, tmp_path: Path) -> None:
        old = tmp_path / "old.tif"
        old.write_bytes(b"x")
        with pytest.raises(InputError, match=r"exists already.*--overwrite"):
            check_output([tmp_path / "new.tif", old], overwrite=False)
        assert check_output([tmp_path / "new.tif", old], ["https://host/old.tif"], overwrite=True)[1] == old
        with pytest.raises(InputError, match="not empty"):
            check_output(tmp_path, overwrite=False, folder=True)
        assert check_output(tmp_path / "fresh", overwrite=False, folder=True) == [tmp_path / "fresh"]

    def test_names_that_cannot_be_written(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="240 bytes"):
            check_output(tmp_path / ("a" * 250 + ".tif"), overwrite=True)
        with pytest.raises(InputError, match="no such directory"):
            check_output(tmp_path / "none" / "a.tif", overwrite=True)
        with pytest.raises(InputError, match="is a directory"):
            check_output(tmp_path, overwrite=True)
        with pytest.raises(InputError, match=r"ending in \.tif or \.tiff"):
            check_output(tmp_path / "a.png", overwrite=True, suffixes=(".tif", ".tiff"))
