"""A real HTTP server on this machine that serves bytes with range support and misbehaves on command.

Loaded by the `server` fixture of tests/conftest.py.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Fault:
    """One way to misbehave, for the next `times` requests whose path matches.

    `cut_after` sends the true headers, that many bytes of the body, and then drops the connection.
    """

    path: re.Pattern[str]
    times: int
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut_after: int | None = None
    delay_s: float = 0.0
    from_byte: int = 0


class Server(ThreadingHTTPServer):
    """Files by path, routes by function, faults by pattern, and a log of what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, tuple[bytes, str]] = {}
        self.times: dict[str, int] = {}  # when they were put there
        self.routes: dict[str, Callable[[str, dict[str, list[str]], bytes], Answer]] = {}
        self.faults: list[Fault] = []
        self.no_ranges: set[str] = set()
        self.signature: str | None = None  # when set, /signed/* answers 403 without ?sig=<this>
        self.log: list[tuple[str, str, int]] = []  # (method, path with query, first byte)
        self.lock = threading.Lock()
        self.see: Callable[[Any], None] = lambda headers: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, path: str, content: bytes | dict | str, kind: str = "application/octet-stream") -> str:
        """Serve `content` at `path`; returns the URL."""
        if isinstance(content, dict):
            content, kind = json.dumps(content), "application/json"
        self.times[path] = int(time.time())
        self.files[path] = (content.encode() if isinstance(content, str) else content, kind)
        return self.url + path

    def fail(self, path: str, times: int = 1, status: int = 503, **more: object) -> None:
        """The next `times` requests matching the pattern `path` get `status` (and headers, body, delay_s)."""
        self.faults.append(Fault(re.compile(path), times, status, **more))  # type: ignore[arg-type]

    def cut(self, path: str, times: int = 1, after: int = 1000, from_byte: int = 0) -> None:
        """Drop the connection after `after` body bytes, for requests that start at or past `from_byte`."""
        self.faults.append(Fault(re.compile(path), times, cut_after=after, from_byte=from_byte))

    def asked(self, path: str) -> int:
        """How many requests matched the pattern."""
        return sum(1 for _, seen, _ in self.log if re.search(path, seen))

    def take_fault(self, path: str, first: int) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.path.search(path) and first >= fault.from_byte:
                    fault.times -= 1
                    return fault
        return None

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the game."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(send_body=False)

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self, send_body: bool = True) -> None:
        server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(wanted[1]) if wanted else 0
        with server.lock:
            server.log.append((self.command, self.path, first))
            server.see(self.headers)
        self.respond(body, wanted, first, send_body)

    def respond(self, body: bytes, wanted: re.Match[str] | None, first: int, send_body: bool) -> None:
        server, parts = self.server, urlsplit(self.path)
        query = parse_qs(parts.query)
        fault = server.take_fault(self.path, first)
        if fault and fault.delay_s:
            time.sleep(fault.delay_s)
        if fault and fault.cut_after is None and fault.status != 200:
            return self.send(fault.status, fault.headers, fault.body, send_body)
        if fault and fault.body:
            return self.send(200, fault.headers, fault.body, send_body)
        if (
            server.signature is not None
            and parts.path.startswith("/signed/")
            and query.get("sig") != [server.signature]
        ):
            return self.send(403, {}, b"signature expired", send_body)
        if parts.path in server.routes:
            return self.send(*server.routes[parts.path](self.path, query, body), send_body)
        if parts.path not in server.files:
            return self.send(404, {}, b"not here", send_body)
        content, kind = server.files[parts.path]
        headers = {"Content-Type": kind}
        since = self.headers.get("If-Unmodified-Since")
        if since and parsedate_to_datetime(since).timestamp() < server.times.get(parts.path, 0):
            return self.send(412, {}, b"changed", send_body)
        cut = fault.cut_after if fault else None
        if wanted is None or parts.path in server.no_ranges:
            return self.send(200, headers, content, send_body, cut)
        if first >= len(content):
            return self.send(416, {"Content-Range": f"bytes */{len(content)}"}, b"", send_body)
        last = min(int(wanted[2]) if wanted[2] else len(content) - 1, len(content) - 1)
        headers |= {"Content-Range": f"bytes {first}-{last}/{len(content)}", "Accept-Ranges": "bytes"}
        return self.send(206, headers, content[first : last + 1], send_body, cut)

    def send(
        self,
        status: int,
        headers: dict[str, str],
        body: bytes,
        send_body: bool = True,
        cut_after: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not send_body:
            return
        if cut_after is not None and cut_after < len(body):
            self.wfile.write(body[:cut_after])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.wfile.write(body)


def start() -> Server:
    """A running server; stop it with `shutdown()` and `server_close()`."""
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server
