"""An S3 server on loopback (moto) with latency, errors, cut bodies and outages.

with S3Server() as server:
    server.upload(folder, "bucket/shards")

Run as a script, it serves a folder as s3://bucket/shards, with 20 ms of latency and 1 % of errors,
until Ctrl-C, and prints the variables with which clients find it:

    python tests/s3_server.py FOLDER
"""

import os
import random
import sys
import threading
import time
from pathlib import Path

import s3fs
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


class S3Server:
    """The server; attributes may be changed while it runs.

    Attributes:
        url: of the endpoint.
        latency: seconds before each answer.
        errors: share of GET requests that get status 503.
        cut: share of GET requests whose body ends too early.
        down: whether every request gets status 503.
        requests: number of GET requests so far.
        range_bytes: bytes sent for ranges so far.
        fails: GET requests for paths that end with it get status 500.
    """

    def __init__(self):
        self.latency, self.errors, self.cut = 0.0, 0.0, 0.0
        self.down, self.fails, self.requests, self.range_bytes = False, None, 0, 0
        self.rng, self.app = random.Random(0), DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def _answer(self, environ, start_response):
        time.sleep(self.latency)
        is_read = environ["REQUEST_METHOD"] == "GET" and "HTTP_RANGE" in environ
        self.requests += is_read
        fails = is_read and self.fails and environ["PATH_INFO"].endswith(self.fails)
        if self.down or fails or (is_read and self.rng.random() < self.errors):
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        body = self.app(environ, start_response)
        if not is_read:
            return body
        data = b"".join(body)
        self.range_bytes += len(data)
        # The server closes a connection whose body is shorter than its Content-Length.
        return [data[: len(data) // 2] if self.rng.random() < self.cut else data]

    def environment(self):
        """Variables with which s3fs finds the server."""
        return {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "a-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.url,
            "AWS_MAX_ATTEMPTS": "1",
        }

    def upload(self, folder, target):
        """Upload the files of a folder to ``bucket/prefix``; returns its URL."""
        store = s3fs.S3FileSystem()
        bucket = target.partition("/")[0]
        if not store.exists(bucket):
            store.mkdir(bucket)
        for path in sorted(Path(folder).iterdir()):
            if path.is_file():
                store.pipe_file(f"{target}/{path.name}", path.read_bytes())
        return f"s3://{target}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


if __name__ == "__main__":
    with S3Server() as running:
        os.environ |= running.environment()
        running.upload(sys.argv[1], "bucket/shards")
        running.latency, running.errors = 0.02, 0.01
        for setting in running.environment().items():
            print("export {}={}".format(*setting), flush=True)
        threading.Event().wait()
