"""Downloads: resumed, complete, verified, renamed only then; rows 30, 31, 32 and 37 of the fault table."""

from __future__ import annotations

import functools
import hashlib
import os
import random
import threading
from email.utils import formatdate
from time import time

import pytest
import rasterio

from canopy.download import download, only_one
from canopy.errors import DataError, FetchError, OutputError
from canopy.files import check_digest
from canopy.web import RetryPolicy, gdal_options, get, peek, use_policy

BODY = random.Random(0).randbytes(300_000)
DIGEST = hashlib.sha256(BODY).hexdigest()


right = functools.partial(check_digest, "sha256", DIGEST)


def right_size(path) -> None:
    if path.stat().st_size != len(BODY):
        raise DataError("another size")


def test_a_file_arrives_whole_and_verified_and_is_fetched_once(server, tmp_path):
    url, target = server.put("/a.bin", BODY), tmp_path / "deep" / "a.bin"
    for _ in range(3):
        assert download(url, target, check=right).read_bytes() == BODY
    assert [p.name for p in target.parent.iterdir()] == ["a.bin"] and server.asked("a.bin") == 1
    target.with_name("a.bin.part").write_bytes(b"x" * 1000)
    assert download(url, target, overwrite=True, check=right).read_bytes() == BODY
    assert server.log[-1][2] == 0 and server.asked("a.bin") == 2
    assert peek(url, 5) == (BODY[:5], len(BODY)) and peek(server.url + "/none") == (b"", None)


def test_many_at_once_fetch_it_once(server, tmp_path):
    url = server.put("/a.bin", BODY)
    server.fail("/a.bin", times=1, status=200, delay_s=0.2)
    done: list[bytes] = []
    work = [
        threading.Thread(target=lambda: done.append(download(url, tmp_path / "a.bin").read_bytes()))
        for _ in range(4)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert done == [BODY] * 4 and server.asked("a.bin") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_who_waited_verifies_what_the_other_left(server, tmp_path):
    """A file that appears while one waits for the lock is trusted no more than one that was there before."""
    target, caught = tmp_path / "a.bin", []

    def wait_for_it() -> None:
        try:
            download(server.put("/a.bin", BODY), target, check=right)
        except DataError as error:
            caught.append(str(error))

    with only_one(target):
        waiting = threading.Thread(target=wait_for_it)
        waiting.start()
        waiting.join(0.3)
        target.write_bytes(b"damaged")
    waiting.join()
    assert len(caught) == 1 and "sha256 is" in caught[0]


def test_cut_connections_resume_where_they_stopped(server, tmp_path):
    url = server.put("/a.bin", BODY)
    server.cut("/a.bin", times=5, after=50_000)
    assert download(url, tmp_path / "a.bin").read_bytes() == BODY
    starts = [first for _, _, first in server.log]
    assert starts == [0, 50_000, 100_000, 150_000, 200_000, 250_000]
    server.cut("/b.bin", times=1000, after=1)
    with pytest.raises(FetchError, match="gave up after 4 attempts"):
        download(server.put("/b.bin", BODY), tmp_path / "b.bin")


def test_an_interrupted_run_resumes_in_the_next_unless_the_file_changed(server, tmp_path):
    left = tmp_path / "a.bin.part"
    for part in (BODY[:123_456], BODY):
        left.write_bytes(part)
        assert download(server.put("/a.bin", BODY), tmp_path / "a.bin").read_bytes() == BODY
        assert server.log[-1][2] == len(part)
        (tmp_path / "a.bin").unlink()
    left.write_bytes(BODY[::-1][:123_456])
    os.utime(left, (1e9, 1e9))  # of another version, long ago: both have one length
    assert download(server.url + "/a.bin", tmp_path / "a.bin").read_bytes() == BODY
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_host_without_ranges_and_a_part_that_is_too_long_start_anew(server, tmp_path):
    url = server.put("/a.bin", BODY)
    server.no_ranges.add("/a.bin")
    for left in (b"something else", b"more than there is" * 100_000):
        (tmp_path / "a.bin.part").write_bytes(left)
        assert download(url, tmp_path / "a.bin", check=right).read_bytes() == BODY
        (tmp_path / "a.bin").unlink()
        server.no_ranges.clear()


def retry_after(wait: str) -> str:
    """The header's value, `in N s` as a date: made in the test, whose name all processes must agree on."""
    return formatdate(time() + float(wait.split()[1]), usegmt=True) if wait.startswith("in ") else wait


@pytest.mark.parametrize("wait", ["0", "soon", "in 0 s"])
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_host_is_asked_again(server, tmp_path, status, wait):
    url = server.put("/a.bin", BODY)
    server.fail("/a.bin", times=2, status=status, headers={"Retry-After": retry_after(wait)})
    assert download(url, tmp_path / "a.bin").read_bytes() == BODY


@pytest.mark.parametrize("wait", ["3600", "in 3600 s"])
def test_a_host_that_asks_for_more_patience_than_there_is_is_given_up_on(server, tmp_path, wait):
    url = server.put("/a.bin", BODY)
    server.fail("/a.bin", times=100, status=503, headers={"Retry-After": retry_after(wait)})
    with pytest.raises(FetchError, match=r"asks to wait 3\d{3} s"):
        download(url, tmp_path / "a.bin")
    server.faults.clear()
    server.fail("/a.bin", times=100, status=503)
    with pytest.raises(FetchError, match=r"127\.0\.0\.1:\d+ answered 503.*4 attempts"):
        download(url, tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()


def test_a_wrong_digest_is_refused_and_discarded(server, tmp_path):
    url = server.put("/a.bin", BODY[:-1] + b"x")
    with pytest.raises(DataError, match=f"expected {DIGEST}"):
        download(url, tmp_path / "a.bin", check=right)
    with pytest.raises(DataError, match="another size"):
        download(server.put("/b.bin", BODY[1:]), tmp_path / "b.bin", check=right_size)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine.bin").write_bytes(b"mine")
    with pytest.raises(DataError, match="sha256 is"):
        download(url, tmp_path / "mine.bin", check=right)
    assert (tmp_path / "mine.bin").read_bytes() == b"mine"


def test_refusals_are_not_retried(server, tmp_path):
    with pytest.raises(FetchError, match="no such file"):
        download(server.url + "/none.bin", tmp_path / "a.bin")
    server.fail("/b.bin", times=9, status=401)
    with pytest.raises(FetchError, match="refuses"):
        download(server.url + "/b.bin", tmp_path / "b.bin")
    with pytest.raises(FetchError, match="sent a web page instead of the file"):
        download(server.put("/c.bin", "<html>portal</html>", "text/html"), tmp_path / "c.bin")
    with pytest.raises(FetchError, match="not a usable URL"):
        get("http://host:port/")
    assert len(server.log) == 3 and list(tmp_path.iterdir()) == []


def test_signed_urls_are_signed_again_and_leave_no_trace(server, tmp_path, caplog):
    caplog.set_level("DEBUG")
    url = server.put("/signed/a.bin", BODY)
    server.signature = "good"
    sign = lambda href, fresh: f"{href}?sig={'good' if fresh else 'stale'}"  # noqa: E731
    path = download(url, tmp_path / "a.bin", sign=sign)
    assert path.read_bytes() == BODY
    assert "sig=" not in str(path) and "good" not in caplog.text and "stale" not in caplog.text
    with pytest.raises(FetchError, match="403") as caught:
        download(url, tmp_path / "b", sign=lambda href, fresh: href + "?sig=topsecret")
    assert "topsecret" not in str(caught.value)


def test_a_token_does_not_follow_to_another_host(server, tmp_path):
    other = server.put("/b.bin", BODY).replace("127.0.0.1", "localhost")
    seen: list[str | None] = []
    server.routes["/a.bin"] = lambda *_: (302, {"Location": other}, b"")
    server.see = lambda headers: seen.append(headers.get("X-API-Token"))
    assert get(server.url + "/a.bin", headers={"X-API-Token": "secret"}).content == BODY
    assert seen == ["secret", None]


def test_a_place_that_cannot_be_written_says_so(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        download(server.put("/a.bin", BODY), tmp_path / "file" / "a.bin")


def test_gdal_has_the_same_patience(server):
    with use_policy(RetryPolicy(timeout_s=5.0)), rasterio.Env(**gdal_options(server.url)):
        assert rasterio.env.getenv()["GDAL_HTTP_TIMEOUT"] == "20"
        assert rasterio.env.getenv()["GDAL_HTTP_PROXY"] == ""
    assert "GDAL_HTTP_PROXY" not in gdal_options("https://host.org/a.tif")
