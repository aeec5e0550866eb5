"""A proxy on loopback that misbehaves on purpose, between an S3 client and a real S3 server."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase, BytesIO
from typing import Any, BinaryIO
from urllib.parse import urlsplit

#: An S3 client asks again for what it reads after three seconds without an answer, for what it writes after ten.
LATE_S = 12.0


class Mischief(Enum):
    """What happens to a request."""

    THROTTLE = "503 SlowDown, and the store never hears of it"
    DENY = "403 AccessDenied, and the store never hears of it"
    LOSE_ANSWER = "the store does it, and the connection breaks before the answer"
    BREAK = "the connection breaks, and the store never hears of it"
    FRAME = "the store keeps the framing of a chunked upload as content"
    CUT = "the store loses the last byte"
    FLIP = "the store changes a byte in the middle"
    LATE = "the store does it, and the answer comes when nobody waits for it any more"


MANGLING = (Mischief.FRAME, Mischief.CUT, Mischief.FLIP)
#: Headers by which a store would find out what happens to a body.
_INTEGRITY = (
    "content-md5",
    "content-encoding",
    "x-amz-checksum",
    "x-amz-content-sha256",
    "x-amz-decoded",
    "x-amz-trailer",
)


@dataclass
class Proxy:
    """Rules: the next `count` requests of a method whose path contains `word` meet with `mischief`."""

    rules: list[tuple[str, str, Mischief]] = field(default_factory=list)
    met: list[tuple[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, method: str, word: str, mischief: Mischief, count: int = 1) -> None:
        self.rules += [(method, word, mischief)] * count

    def judge(self, method: str, path: str) -> Mischief | None:
        with self.lock:
            for number, (wanted, word, mischief) in enumerate(self.rules):
                if method == wanted and word in path:
                    del self.rules[number]
                    self.met.append((method, path))
                    return mischief
        return None


def _mangled(body: bytes, mischief: Mischief | None, *, is_framed: bool) -> bytes:
    if mischief not in MANGLING:
        return body
    if mischief is Mischief.FRAME:
        return body if is_framed else b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    if is_framed:
        body = b"".join(_chunks(BytesIO(body)))
    if mischief is Mischief.CUT:
        return body[:-1]
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


def _chunks(file: BinaryIO | BufferedIOBase) -> Iterator[bytes]:
    while size := int(file.readline().split(b";")[0], 16):
        yield file.read(size)
        file.readline()
    while file.readline().strip():
        pass


@contextmanager
def proxy_to(endpoint: str, at: tuple[str, int] = ("127.0.0.1", 0)) -> Iterator[tuple[Proxy, str]]:
    """A proxy to `endpoint`, and its own URL. It answers at `at`, a host and a port, and nobody does when it ends."""
    proxy, place = Proxy(), urlsplit(endpoint)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self._body()
            mischief = proxy.judge(self.command, self.path)
            if mischief is Mischief.THROTTLE:
                self._answer(503, b"<Error><Code>SlowDown</Code><Message>slower, please</Message></Error>", {})
                return
            if mischief is Mischief.DENY:
                self._answer(403, b"<Error><Code>AccessDenied</Code><Message>no more room</Message></Error>", {})
                return
            if mischief is Mischief.BREAK:
                self._hang_up()
                return
            is_framed = "aws-chunked" in self.headers.get("Content-Encoding", "")
            body = _mangled(body, mischief, is_framed=is_framed)
            onward = http.client.HTTPConnection(place.hostname or "", place.port or 80, timeout=30)
            dropped = ("transfer-encoding", *(_INTEGRITY if mischief in MANGLING else ()))
            headers = {key: value for key, value in self.headers.items() if not key.lower().startswith(dropped)}
            headers["Content-Length"] = str(len(body))
            onward.request(self.command, self.path, body, headers)
            answer = onward.getresponse()
            data = answer.read()
            onward.close()
            if mischief is Mischief.LOSE_ANSWER:
                self._hang_up()
                return
            if mischief is Mischief.LATE:
                time.sleep(LATE_S)
            self._answer(answer.status, data, dict(answer.getheaders()))

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return b"".join(_chunks(self.rfile))

        def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response_only(status)
            length = headers.get("Content-Length", str(len(data))) if self.command == "HEAD" else str(len(data))
            skipped = ("content-length", "transfer-encoding", "connection")
            for key, value in headers.items():
                if key.lower() not in skipped:
                    self.send_header(key, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _hang_up(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(at, Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy, f"http://{at[0]}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
