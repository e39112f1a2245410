"""A run's report served live: the page of `report`, to this machine alone, for reading alone.

The page's only script is its own, which looks for news; the browser is told to run no other, to load nothing, and to ask nobody
else. A request that names another host is refused: a web page elsewhere could otherwise point its own name at this machine
(DNS rebinding) and read what is served here.
"""

from __future__ import annotations

import base64
import hashlib
import socketserver
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib.resources import files
from pathlib import Path

from fedkseed.errors import ConfigError, FedKSeedError
from fedkseed.report.charts import charts
from fedkseed.report.markup import Html, tag
from fedkseed.report.page import page
from fedkseed.report.picture import render_svg
from fedkseed.report.reading import read
from fedkseed.runs.answers import ANSWERS
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.layout import CONFIG, METRICS
from fedkseed.text import visible

HOST = "127.0.0.1"
SILENCE = 30.0
"""Seconds after which a connection that says nothing is closed."""
SCRIPT = files(__package__).joinpath("live.js").read_text(encoding="utf-8")
_FOOT = Html(tag("p", "Live", id="live", class_="status").text + f"<script>{SCRIPT}</script>")
_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
# styles are the page's own and its pictures'; the script is known by its hash
POLICY = (
    f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class LivePage:
    """The page of a run as it is now, drawn anew when a file of the run has changed."""

    def __init__(self, run: Path) -> None:
        folder = RunFolder.open(run)
        self._run = run
        self._files = [run / CONFIG, run / METRICS, run / ANSWERS, folder.checkpoint_path]
        self._lock = threading.Lock()
        self._stamp: object = None
        self._content = b""

    def content(self) -> bytes:
        """The page's bytes.

        Raises:
            FedKSeedError: the run cannot be read, see `report`.
        """
        with self._lock:  # one drawing at a time: matplotlib bears no more
            stamp = [_stamp(file) for file in self._files]  # before reading, so that what comes meanwhile is seen next time
            if stamp != self._stamp:
                record = read(self._run)
                shown = charts(record)
                pictures = {chart.name: render_svg(chart.name, chart.draw) for chart in shown if chart.draw is not None}
                self._content = page(self._run, record, shown, pictures, _FOOT).encode()
                self._stamp = stamp
            return self._content


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


class Watch(socketserver.ThreadingTCPServer):
    """An HTTP server on the loopback address that answers `GET /` with a run's page, and nothing else.

    Args:
        run: the run's folder.
        port: where to listen; 0 takes a free one.

    Raises:
        RunFolderError: there is no run.
        ConfigError: the port cannot be had.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, run: Path, port: int) -> None:
        self.page = LivePage(run)
        try:
            super().__init__((HOST, port), _Answer)
        except OSError as error:
            raise ConfigError(f"--port {port}: {error.strerror}; give another one, or 0 for any that is free") from error
        number = self.server_address[1]
        self.address = f"http://{HOST}:{number}/"
        self.hosts = (f"{HOST}:{number}", f"localhost:{number}")

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that goes away in the middle is nobody's concern."""


class _Answer(BaseHTTPRequestHandler):
    server: Watch
    timeout = SILENCE
    server_version, sys_version = "fedkseed", ""

    def do_GET(self) -> None:
        if self.headers.get_all("Host") not in [[host] for host in self.server.hosts]:
            self._send(HTTPStatus.MISDIRECTED_REQUEST, f"this is not {self.server.address}; ask for that")
        elif self.path != "/":
            self._send(HTTPStatus.NOT_FOUND, f"there is only {self.server.address}")
        else:
            try:
                content = self.server.page.content()
            except FedKSeedError as error:
                self._send(HTTPStatus.SERVICE_UNAVAILABLE, visible(error))
                return
            tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            if self.headers.get("If-None-Match") == tag:
                self._send(HTTPStatus.NOT_MODIFIED, tag=tag)
            else:
                self._send(HTTPStatus.OK, content, "text/html", tag)

    do_HEAD = do_GET  # noqa: N815

    def _send(self, status: HTTPStatus, content: str | bytes = b"", kind: str = "text/plain", tag: str | None = None) -> None:
        data = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if tag is not None:
            self.send_header("ETag", tag)
        if status is not HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of requests."""
