"""A web server on 127.0.0.1 for the tests of the image download: it answers as told, well or badly,
and counts."""

import contextlib
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Page(NamedTuple):
    """What a path answers with."""

    body: bytes = b""
    status: int = 200
    headers: dict = {}  # noqa: RUF012, not changed
    cut: int = 0  # bytes that are announced, and not sent
    first_status: int | None = None  # of the first answer only
    drip: int = 0  # bytes that a header grows by, one in a tenth of a second
    slow: bool = False  # answers when the server is released, or after 90 s


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, path = self.server, self.path
        with server.lock:
            server.hits[path] += 1
            first = server.hits[path] == 1
        page = server.pages.get(path, Page(b"no such page", status=404))
        if page.slow:
            server.released.wait(90)
        self.send_response(page.first_status if first and page.first_status else page.status)
        for name, value in page.headers.items():
            self.send_header(name, value)
        if page.drip:
            self.flush_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(b"X-Drip: ")
                for _ in range(page.drip):
                    if server.released.wait(0.1):
                        break
                    self.wfile.write(b"x")
                self.wfile.write(b"\r\n")
        self.send_header("Content-Length", str(len(page.body)))
        with contextlib.suppress(OSError):  # a client that has given up
            self.end_headers()
            self.wfile.write(page.body[: len(page.body) - page.cut])

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages, self.hits, self.lock, self.released = (
            {},
            Counter(),
            threading.Lock(),
            threading.Event(),
        )

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}{path}"

    def add(self, path, *page, **keywords):
        """Have a path answer; returns its address."""
        self.pages[path] = Page(*page, **keywords)
        return self.url(path)

    def handle_error(self, *_):
        pass  # a client that has given up


@contextlib.contextmanager
def serving():
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
