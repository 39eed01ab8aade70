"""Open untrusted URLs: http and https only, bounded in bytes and in seconds.

The module does not block requests to your own network: a URL may lead to a machine next to yours.
The time to look up a host's name is the system's setting.
"""

import functools
import http.client
import io
import socket
import string
import time
import urllib.parse
import urllib.request
from typing import Any, NamedTuple


class _Bounds(NamedTuple):
    """Of a request and the redirects that it leads to."""

    max_bytes: int
    max_seconds: float
    end: float  # by the monotonic clock


class _TimedSocket(io.RawIOBase):
    """Reads a socket up to a point in time; its own timeout starts again with every byte."""

    def __init__(self, raw: Any, sock: socket.socket, bounds: _Bounds) -> None:
        self.raw, self.sock, self.bounds = raw, sock, bounds
        self.timeout = sock.gettimeout()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self.bounds.end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"not at its end after {self.bounds.max_seconds} s")
        self.sock.settimeout(min(left, self.timeout or left))
        return self.raw.readinto(buffer)

    def close(self) -> None:
        self.raw.close()
        super().close()


class _BoundedResponse(http.client.HTTPResponse):
    """Bounded in seconds, for headers and body together, and in bytes of the body."""

    def __init__(self, sock: socket.socket, *args: Any, bounds: _Bounds, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.max_bytes = bounds.max_bytes
        raw = self.fp.detach()  # type: ignore[attr-defined]  # of the buffered reader
        self.fp = io.BufferedReader(_TimedSocket(raw, sock, bounds))

    def read(self, amt: int | None = None) -> bytes:
        """The whole body. Raises ValueError if it is longer than ``max_bytes``."""
        body = bytearray()
        while piece := self.read1(1 << 16):
            body += piece
            if len(body) > self.max_bytes:
                raise ValueError(f"more than {self.max_bytes} bytes")
        if self.length:  # read1 does not report a body that was cut off
            raise http.client.IncompleteRead(b"", self.length)
        return bytes(body)


class _BoundedHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def __init__(self, max_bytes: int, max_seconds: float) -> None:
        super().__init__()
        self.max_bytes, self.max_seconds = max_bytes, max_seconds

    def http_request(self, request: Any) -> Any:
        # URLs may have spaces, or letters beyond ASCII.
        request.full_url = urllib.parse.quote(request.full_url, safe=string.punctuation)
        if not hasattr(request, "bounds"):  # a redirect has those of the first request
            end = time.monotonic() + self.max_seconds
            request.bounds = _Bounds(self.max_bytes, self.max_seconds, end)
        return self.do_request_(request)

    https_request = http_request

    def do_open(self, http_class: Any, request: Any, **options: Any) -> Any:  # type: ignore[override]
        def connect(*args: Any, **kwargs: Any) -> Any:
            connection = http_class(*args, **kwargs)
            respond = functools.partial(_BoundedResponse, bounds=request.bounds)
            connection.response_class = respond
            return connection

        return super().do_open(connect, request, **options)


class _RedirectHandler(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request: Any, *args: Any) -> Any:
        redirected: Any = super().redirect_request(request, *args)
        redirected.bounds = request.bounds
        return redirected


def bounded_opener(max_bytes: int, max_seconds: float) -> urllib.request.OpenerDirector:
    """An opener like urllib's own, but without file, ftp and data, and with bounds.

    Args:
        max_bytes: of a body; ``read()`` of the response raises ValueError beyond.
        max_seconds: from the request to the end of the body, redirects included; TimeoutError
            beyond. The ``timeout`` of ``open`` is how long a server may be silent.
    """
    proxies = {
        scheme: proxy
        for scheme, proxy in urllib.request.getproxies().items()
        if scheme in ("http", "https")
    }
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(proxies),
        urllib.request.UnknownHandler(),
        _BoundedHandler(max_bytes, max_seconds),
        urllib.request.HTTPDefaultErrorHandler(),
        _RedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener
