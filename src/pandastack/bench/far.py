"""A folder of an object store, as somebody far away would see it: read-only over HTTP, each answer as late as wanted."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Far:
    """`url` is where it is. `delay_s` may be changed at any time."""

    def __init__(self, folder: Path) -> None:
        self.delay_s = 0.0
        self._chunks = 0
        self._lock = threading.Lock()
        far = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                far.answer(self, folder / self.path.lstrip("/"))

            def log_message(self, *_: Any) -> None:
                """Nothing: what is measured prints."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"

    def answer(self, request: BaseHTTPRequestHandler, file: Path) -> None:
        time.sleep(self.delay_s)
        try:
            data, status = file.read_bytes(), 200
        except OSError:
            data, status = b"", 404
        if file.parent.parent.name == "chunks":
            with self._lock:
                self._chunks += 1
        request.send_response(status)
        request.send_header("Content-Length", str(len(data)))
        request.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        request.end_headers()
        request.wfile.write(data)

    def asked(self) -> int:
        """How many chunks since the last call."""
        with self._lock:
            chunks, self._chunks = self._chunks, 0
        return chunks


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Far]:
    far = Far(folder)
    thread = threading.Thread(target=far.server.serve_forever, name="far object store", daemon=True)
    thread.start()
    try:
        yield far
    finally:
        far.server.shutdown()
        far.server.server_close()
        thread.join()
