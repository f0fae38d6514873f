"""`canopy data list | describe | get | verify`, from a server of this machine."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import behaviour_support as support
import pytest
import yaml

NAME = "NEON_D01_HARV_DP3_732000_4713000_CHM.tif"
PLACE = f"HARV-2022-08/{NAME}"
HERE = ("--bbox", "42.5369,-72.1727", "--size-m", "300")
BODY = random.Random(1).randbytes(300_000)


class Host(ThreadingHTTPServer):
    """Files by path, with ranges; the first answer of a path in `cuts` ends in the middle."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.cuts: set[str] = set()
        self.log: list[tuple[str, int]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the game."""


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Host

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        body = self.server.files.get(path)
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(wanted[1]) if wanted else 0
        self.server.log.append((path, first))
        part = b"" if body is None else body[first : int(wanted[2]) + 1 if wanted and wanted[2] else None]
        self.send_response(404 if body is None else 206 if wanted else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        if body is not None:
            self.send_header("ETag", f'"{hashlib.md5(body).hexdigest()}"')
            if wanted:
                self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(body)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if path in self.server.cuts:
            self.server.cuts.discard(path)
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.wfile.write(part)


@pytest.fixture
def neon(tmp_path, monkeypatch) -> Iterator[Host]:
    """NEON's API with one tile of HARV, and manifests that point to it."""
    host = Host()
    threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    folder = tmp_path / "manifests"
    shutil.copytree(support.ROOT / "data_manifests", folder)
    manifest = folder / "labels" / "neon.yaml"
    manifest.write_text(yaml.safe_dump(yaml.safe_load(manifest.read_text()) | {"href": f"{host.url}/api"}))
    monkeypatch.setenv("CANOPY_MANIFESTS", str(folder))
    monkeypatch.setenv("NEON_API_TOKEN", "top-secret")
    row = {"name": NAME, "size": len(BODY), "md5": hashlib.md5(BODY).hexdigest()}
    row["url"] = f"{host.url}/files/{NAME}?sig=top-secret"
    sites = [{"siteCode": "HARV", "availableMonths": ["2022-08"]}]
    host.files = {
        f"/files/{NAME}": BODY,
        "/api/products/DP3.30015.001": json.dumps({"data": {"siteCodes": sites}}).encode(),
        "/api/data/DP3.30015.001/HARV/2022-08": json.dumps({"data": {"files": [row]}}).encode(),
    }
    yield host
    host.shutdown()
    host.server_close()


def test_files_are_listed_fetched_kept_and_verified(canopy, neon, tmp_path) -> None:
    ran = canopy("data", "get", "neon", *HERE, "-o", "out", "--dry-run")
    assert f"HARV-2022-08/{NAME}" in ran.out and "1 files" in ran.out and "CC0 1.0" in ran.out
    assert not (tmp_path / "out").exists() and not [p for p, _ in neon.log if p.startswith("/files/")]
    neon.cuts.add(f"/files/{NAME}")  # the connection breaks once
    ran = canopy("data", "get", "neon", *HERE, "-o", "out", "-v")
    assert "1 fetched" in ran.out and "top-secret" not in ran.out + ran.err
    assert (tmp_path / "out" / PLACE).read_bytes() == BODY
    asked = [first for path, first in neon.log if path.startswith("/files/")]
    assert len(asked) >= 2 and asked[-1] > 0, "a broken download is gone on with"
    told = canopy("data", "get", "neon", *HERE, "-o", "out", "--json").json
    support.check_keys("get", told)
    assert told["kept"] == [PLACE] and told["fetched"] == []
    assert "1 files are as they were fetched" in canopy("data", "verify", "out").out
    (tmp_path / "out" / PLACE).write_bytes(b"x")
    assert PLACE in canopy("data", "verify", "out", code=2).error_line


def test_a_file_that_is_not_what_was_promised_is_refused(canopy, neon, tmp_path) -> None:
    neon.files[f"/files/{NAME}"] = BODY[:-1] + b"?"
    ran = canopy("data", "get", "neon", *HERE, "-o", "out", code=2)
    assert NAME in ran.error_line and not (tmp_path / "out" / PLACE).exists()


def test_bad_wishes_write_nothing(canopy, neon, tmp_path) -> None:
    for words, says in (
        (("neon", *HERE, "--max-gb", "0.0000001"), "--yes"),
        (("neom", *HERE), "did you mean 'neon'"),
        (("neon", *HERE, "--product", "chn"), "no product 'chn'"),
        (("neon", "--bbox", "142.5,-72.17", "--size-m", "300"), "latitude"),
        (("neon", "--site", "HARW"), "did you mean HARV"),
    ):
        assert says in canopy("data", "get", *words, "-o", "out", code=2).error_line
        assert not (tmp_path / "out").exists()


def test_lists_and_descriptions(canopy, neon) -> None:
    told = canopy("data", "list", "--json").json
    assert {"naip", "ign-ortho", "demo"} <= set(told["imagery"])
    support.check_keys("data_list", {kind: dict.fromkeys(rows) for kind, rows in told.items()})
    assert all(row["licence"] for rows in told.values() for row in rows.values())
    for name in ("neon", "naip", "HARV", "france-lidar-hd"):
        support.check_keys(f"describe_{name}", canopy("data", "describe", name, "--json").json)
    assert "neon" in canopy("data", "verify", "all", "--json").json["manifests"]
    canopy("data", "describe", "nothing", code=2)
