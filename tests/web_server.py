"""A web server on loopback that serves a folder by ranges, remembers what it was asked, and misbehaves on demand."""

from __future__ import annotations

import email.utils
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Web(ThreadingHTTPServer):
    """Serves `folder`.

    `asked` holds (method, path, first byte, end) of every request, `now` and `most` how many are answered at once.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.asked: list[tuple[str, str, int, int]] = []
        self.lock = threading.Lock()
        self.now = self.most = 0
        self.ranges = True
        # how many of the next answers are 503, and how many end in the middle
        self.busy = self.cuts = 0
        self.refused = 0
        self.forbidden = False
        self.etag = '"one"'
        self.delay = 0.0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def gets(self, name=""):
        """Byte ranges that were asked for, without those of one byte that ask for the size."""
        return [(a, b) for method, path, a, b in self.asked if method == "GET" and name in path and b - a > 1]

    def handle_error(self, request, client_address):
        pass

    def take(self, name):
        """Whether the next answer is to be one of these."""
        with self.lock:
            left = getattr(self, name)
            setattr(self, name, max(0, left - 1))
        return left > 0


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        with self.server.lock:
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        try:
            self.answer(body=True)
        finally:
            with self.server.lock:
                self.server.now -= 1

    def answer(self, body):
        server = self.server
        path = server.folder / self.path.lstrip("/").split("?")[0]
        time.sleep(server.delay)
        if server.take("busy"):
            return self.refuse(503)
        if server.forbidden:
            return self.refuse(403)
        if not path.is_file():
            return self.refuse(404)
        data = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if server.ranges else None
        first, end = (int(found[1]), min(int(found[2] or len(data)) + 1, len(data))) if found else (0, len(data))
        server.asked.append((self.command, self.path, first, end))
        if first >= len(data):
            return self.refuse(416)
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - first))
        self.send_header("Last-Modified", email.utils.formatdate(path.stat().st_mtime, usegmt=True))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        if not body:
            return None
        part = data[first:end]
        if server.take("cuts"):
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            return None
        self.wfile.write(part)
        return None

    def refuse(self, code):
        with self.server.lock:
            self.server.refused += 1
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()
