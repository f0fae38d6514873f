"""Downloads: resumed, complete, verified, renamed only then; rows 30, 31, 32 and 37 of the fault table."""

from __future__ import annotations

import hashlib
import random
import threading

import httpx
import pytest

from canopy import download as http
from canopy.download import download, only_one
from canopy.errors import DataError, FetchError, OutputError
from canopy.files import file_sha256

BODY = random.Random(0).randbytes(300_000)
DIGEST = hashlib.sha256(BODY).hexdigest()


def test_a_file_arrives_whole_and_verified(server, tmp_path):
    path = download(server.put("/a.bin", BODY), tmp_path / "deep" / "a.bin", sha256=DIGEST)
    assert path.read_bytes() == BODY and file_sha256(path) == DIGEST
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]


def test_it_is_fetched_once(server, tmp_path):
    url = server.put("/a.bin", BODY)
    for _ in range(3):
        download(url, tmp_path / "a.bin", sha256=DIGEST)
    assert server.asked("a.bin") == 1
    download(url, tmp_path / "a.bin", overwrite=True)
    assert server.asked("a.bin") == 2


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


def test_cut_connections_resume_where_they_stopped(server, tmp_path):
    url = server.put("/a.bin", BODY)
    server.cut("/a.bin", times=5, after=50_000)
    assert download(url, tmp_path / "a.bin", sha256=DIGEST).read_bytes() == BODY
    starts = [first for _, _, first in server.log]
    assert starts == [0, 50_000, 100_000, 150_000, 200_000, 250_000]


def test_a_host_that_sends_a_byte_a_try_is_given_up_on(server, tmp_path):
    url = server.put("/a.bin", BODY)
    server.cut("/a.bin", times=1000, after=1)
    with pytest.raises(FetchError, match="gave up after 4 attempts"):
        download(url, tmp_path / "a.bin")
    assert server.asked("a.bin") == 4


def test_an_interrupted_run_resumes_in_the_next(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(BODY[:123_456])
    download(server.put("/a.bin", BODY), tmp_path / "a.bin", sha256=DIGEST)
    assert server.log[0][2] == 123_456 and (tmp_path / "a.bin").read_bytes() == BODY


def test_a_complete_part_is_recognised(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(BODY)
    assert download(server.put("/a.bin", BODY), tmp_path / "a.bin").read_bytes() == BODY


@pytest.mark.parametrize("manners", ["If-Range", "no If-Range", "no versions"])
def test_a_file_that_changed_since_is_never_joined_from_two_versions(server, tmp_path, manners):
    """Both versions have one length: nothing but what the host says of its versions tells them apart."""
    newer = BODY[::-1]
    url = server.put("/a.bin", BODY)
    if manners != "If-Range":
        (server.no_if_range if manners == "no If-Range" else server.no_versions).add("/a.bin")
    server.cut("/a.bin", times=1, after=100_000)
    server.fail("/a.bin", times=100, status=503)
    with pytest.raises(FetchError, match="503"):
        download(url, tmp_path / "a.bin")
    assert (tmp_path / "a.bin.part").stat().st_size == 100_000
    server.faults.clear()
    server.put("/a.bin", newer)
    assert download(url, tmp_path / "a.bin").read_bytes() == newer
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_file_that_did_not_change_is_resumed_without_a_digest(server, tmp_path):
    url = server.put("/a.bin", BODY)
    server.cut("/a.bin", times=1, after=100_000)
    server.fail("/a.bin", times=100, status=503)
    with pytest.raises(FetchError):
        download(url, tmp_path / "a.bin")
    server.faults.clear()
    assert download(url, tmp_path / "a.bin").read_bytes() == BODY
    assert server.log[-1][2] == 100_000


def test_overwriting_begins_at_the_first_byte(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1000)
    url = server.put("/a.bin", BODY)
    assert download(url, tmp_path / "a.bin", overwrite=True, sha256=DIGEST).read_bytes() == BODY


def test_who_waited_verifies_what_the_other_left(server, tmp_path):
    """A file that appears while one waits for the lock is trusted no more than one that was there before."""
    target, caught = tmp_path / "a.bin", []

    def wait_for_it() -> None:
        try:
            download(server.put("/a.bin", BODY), target, sha256=DIGEST)
        except DataError as error:
            caught.append(str(error))

    with only_one(target):
        waiting = threading.Thread(target=wait_for_it)
        waiting.start()
        waiting.join(0.3)
        target.write_bytes(b"damaged")
    waiting.join()
    assert len(caught) == 1 and "another sha256" in caught[0]


def test_a_host_without_ranges_starts_anew(server, tmp_path):
    url = server.put("/a.bin", BODY)
    server.no_ranges.add("/a.bin")
    (tmp_path / "a.bin.part").write_bytes(b"something else")
    assert download(url, tmp_path / "a.bin").read_bytes() == BODY


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_host_is_asked_again(server, tmp_path, status):
    url = server.put("/a.bin", BODY)
    server.fail("/a.bin", times=2, status=status, headers={"Retry-After": "0"})
    assert download(url, tmp_path / "a.bin").read_bytes() == BODY


def test_a_host_that_never_recovers_leaves_no_file(server, tmp_path):
    url = server.put("/a.bin", BODY)
    server.fail("/a.bin", times=100, status=503)
    with pytest.raises(FetchError, match=r"127\.0\.0\.1:\d+ answered 503.*4 attempts"):
        download(url, tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()


def test_a_wrong_digest_is_refused_and_discarded(server, tmp_path):
    url = server.put("/a.bin", BODY[:-1] + b"x")
    with pytest.raises(DataError, match=f"expected {DIGEST}"):
        download(url, tmp_path / "a.bin", sha256=DIGEST)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine.bin").write_bytes(b"mine")
    with pytest.raises(DataError, match="exists with another sha256"):
        download(url, tmp_path / "mine.bin", sha256=DIGEST)
    assert (tmp_path / "mine.bin").read_bytes() == b"mine"


def test_a_web_page_is_not_a_file(server, tmp_path):
    url = server.put("/a.bin", "<html>portal</html>", "text/html")
    with pytest.raises(FetchError, match="sent a web page instead of the file"):
        download(url, tmp_path / "a.bin")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_and_a_refusal_are_not_retried(server, tmp_path):
    with pytest.raises(FetchError, match="no such file"):
        download(server.url + "/none.bin", tmp_path / "a.bin")
    server.fail("/b.bin", times=9, status=401)
    with pytest.raises(FetchError, match="refuses"):
        download(server.url + "/b.bin", tmp_path / "b.bin")
    assert len(server.log) == 2


def test_signed_urls_are_signed_again_and_leave_no_trace(server, tmp_path, caplog):
    url = server.put("/signed/a.bin", BODY)
    server.signature = "good"
    sign = lambda href, fresh: f"{href}?sig={'good' if fresh else 'stale'}"  # noqa: E731
    path = download(url, tmp_path / "a.bin", sign=sign)
    assert path.read_bytes() == BODY
    assert "sig=" not in str(path) and "good" not in caplog.text and "stale" not in caplog.text
    with pytest.raises(FetchError, match="403") as caught:
        download(url, tmp_path / "b", sign=lambda href, fresh: href + "?sig=topsecret")
    assert "topsecret" not in str(caught.value)


def test_a_place_that_cannot_be_written_says_so(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        download(server.put("/a.bin", BODY), tmp_path / "file" / "a.bin")


# ---- the rules of waiting --------------------------------------------------------------------
def test_waits_double_spread_and_are_capped():
    rules = http.RetryPolicy(first_wait_s=1.0, longest_wait_s=10.0)
    for attempt, nominal in enumerate((1, 2, 4)):
        waits = [rules.wait_s(attempt) for _ in range(50)]
        assert 0.75 * nominal <= min(waits) < max(waits) <= 1.25 * nominal
    assert rules.wait_s(20) == 10.0 and rules.wait_s(0, retry_after_s=7) == 7.0


def test_retry_after_is_read_as_seconds_or_as_a_date():
    from email.utils import formatdate
    from time import time

    def seconds(text: str) -> float | None:
        return http.retry_after_s(httpx.Response(503, headers={"Retry-After": text}))

    assert seconds("12") == 12.0 and seconds("soon") is None
    assert seconds(formatdate(time() + 100, usegmt=True)) == pytest.approx(100, abs=3)
    assert http.retry_after_s(httpx.Response(503)) is None
