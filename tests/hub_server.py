"""A small Hugging Face Hub on 127.0.0.1 for the tests: what huggingface_hub asks of data set and
model repositories, over HTTP.

    with hub_server({"apple/DataCompDR-12M": folder}) as hub:
        run(command, env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")})
    assert hub.sent("00000000.tar") == size

``hub_server(repos, token=None, gated=(), break_once=(), slow=0, redirect=False)``

    repos       {repository: folder}: what the folder holds is what its branch main holds, at every
    request token       a str: whoever doesn't send it gets 401, with the Hub's error codes gated
    repositories whose files (not their lists) are refused with 403, as if one hadn't accepted their
    terms break_once  paths in a repository: the first GET of such a file is cut off after half of
    what was asked for slow        seconds to wait after each PIECE bytes of a file redirect
    whether shards are redirected to another host (localhost instead of 127.0.0.1), as to the Hub's
    CDN

``hub.url`` is for HF_ENDPOINT (in the environment of a subprocess: huggingface_hub reads it when it
is imported). ``hub.requests`` are the requests so far, in order: ``method``, ``path`` (decoded,
without the query), ``range`` (the Range header or None), ``headers`` (lower-case names),
``status``, ``sent`` (bytes of a file that went out). ``hub.gets(name)`` are the GETs of the file
``name`` (none: of any file) that got bytes, ``hub.sent(name)`` their sum.

Answers: /api/datasets/REPO[/revision/REV], …/tree/REV[/PATH], …/paths-info/REV, and HEAD and GET of
/datasets/REPO/resolve/REV/PATH, with Range. Works with snapshot_download, hf_hub_download, HfApi
and HfFileSystem. Files other than TEXT have LFS metadata, as shards have on the Hub. Model repositories
have the same routes without /datasets. A model repository whose folder is in ``repos`` can be
created and written, so upload_folder works: text in the commit, other files by LFS. Leaves out:
pages of a listing, Xet, writing of data sets, and commits other than the present one.
"""

import base64
import contextlib
import functools
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from huggingface_hub.repocard import metadata_load

PIECE = 1 << 16  # bytes that are sent at once
TEXT = (".md", ".json", ".jsonl", ".txt", ".gitattributes")  # stored in git itself, without LFS
ROUTE = re.compile(
    r"/api/(?:datasets|models)/(?P<repo>[^/]+/[^/]+)"
    r"(?:/(?P<call>revision|tree|paths-info|preupload|commit)/(?P<rev>[^/]+)(?:/(?P<path>.+))?)?"
    r"|(?:/datasets)?/(?P<repo2>[^/]+/[^/]+)/(?P<resolve>resolve)/(?P<rev2>[^/]+)/(?P<path2>.+)"
    r"|/(?P<repo4>[^/]+/[^/]+)[.]git/info/lfs/objects/(?P<batch>batch)"
    r"|/cdn/(?P<repo3>[^/]+/[^/]+)/(?P<path3>.+)"
)


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    headers: dict
    status: int = 0
    sent: int = 0


@dataclass
class Hub:
    """The options of :func:`hub_server`, and what has been asked."""

    repos: dict
    token: str | None
    gated: tuple
    break_once: set
    slow: float
    redirect: bool
    requests: list
    closing: threading.Event
    url: str = ""
    uploads: dict = field(default_factory=dict)  # bytes by SHA-256
    created: list = field(default_factory=list)  # requests for repositories

    def gets(self, name=""):
        """The GETs of a file, answered by bytes of it."""
        files = (
            r
            for r in self.requests
            if r.method == "GET" and ("/resolve/" in r.path or r.path.startswith("/cdn/"))
        )
        return [
            request
            for request in files
            if request.status in (200, 206) and request.path.endswith(name)
        ]

    def sent(self, name=""):
        return sum(request.sent for request in self.gets(name))


def commit_of(folder):
    """Forty hex digits that change with what the folder holds."""
    paths = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    held = [
        (path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
        for path in paths
    ]
    return hashlib.sha1(repr(held).encode()).hexdigest()


@functools.lru_cache(1000)
def hashes(path, size, _mtime):
    """git's hash of a file, and its SHA-256."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % size + data).hexdigest(), hashlib.sha256(data).hexdigest()


def entry_of(folder, path):
    """What the Hub lists of a file or folder."""
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {
            "type": "directory",
            "oid": hashlib.sha1(name.encode()).hexdigest(),
            "size": 0,
            "path": name,
        }
    size, (blob, sha256) = (
        path.stat().st_size,
        hashes(path, path.stat().st_size, path.stat().st_mtime_ns),
    )
    about = {"type": "file", "oid": blob, "size": size, "path": name}
    if not name.endswith(TEXT):
        about["lfs"] = {"oid": sha256, "size": size, "pointerSize": 134}
    return about


def choose_mode(about):
    """How huggingface_hub is to upload a file."""
    mode = "regular" if about["path"].endswith(TEXT) else "lfs"
    return {"path": about["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}


def etag_of(about):
    return about["lfs"]["oid"] if "lfs" in about else about["oid"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept, as the Hub's are
    timeout = 30
    server_version, sys_version = "hub", ""

    @property
    def hub(self):
        return self.server.hub

    def log_message(self, *_):
        pass

    def handle_any(self):
        url = urlsplit(self.path)
        path, headers = (
            unquote(url.path),
            {name.lower(): value for name, value in self.headers.items()},
        )
        self.request_seen = Request(self.command, path, headers.get("range"), headers)
        self.hub.requests.append(self.request_seen)
        body = self.rfile.read(int(headers.get("content-length", 0)))
        if self.command == "PUT" and path.startswith("/lfs/"):
            self.hub.uploads[path.removeprefix("/lfs/")] = body
            return self.answer({})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        route = ROUTE.fullmatch(url.path)
        if not route:
            return self.refuse(404, "NotFound", "Not Found")
        found = {
            name: unquote(value) for name, value in route.groupdict().items() if value is not None
        }
        repo = found.get("repo") or found.get("repo2") or found.get("repo3") or found["repo4"]
        name = found.get("path") or found.get("path2") or found.get("path3") or ""
        if self.hub.token is not None and "path3" not in found:
            given = headers.get("authorization")
            if given is None:
                return self.refuse(401, "RepoNotFound", "Repository not found")
            if given != f"Bearer {self.hub.token}":
                return self.refuse(401, None, "Invalid credentials in Authorization header")
        if repo not in self.hub.repos:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        folder = Path(self.hub.repos[repo])
        revision, commit = found.get("rev") or found.get("rev2") or "main", commit_of(folder)
        if revision not in ("main", commit):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if ".." in name.split("/"):
            return self.refuse(400, None, "Bad path")
        if "resolve" in found or "path3" in found:
            return self.answer_file(repo, folder, name, commit, redirected="path3" in found)
        call = found.get("call")
        if "batch" in found:
            return self.answer(self.accept_uploads(json.loads(body)))
        if call == "preupload":
            return self.answer({"files": [choose_mode(file) for file in json.loads(body)["files"]]})
        if call == "commit":
            return self.commit(folder, body)
        if call in (None, "revision"):
            return self.answer(self.about(repo, folder, commit))
        if call == "tree":
            recursive = parse_qs(url.query).get("recursive", ["false"])[0].lower() == "true"
            if not (folder / name).is_dir():
                return self.refuse(404, "EntryNotFound", "Entry not found")
            paths = sorted((folder / name).rglob("*") if recursive else (folder / name).iterdir())
        else:
            asked = (
                json.loads(body)["paths"]
                if body[:1] == b"{"
                else parse_qs(body.decode()).get("paths", [])
            )
            paths = [
                folder / path
                for path in asked
                if (folder / path).exists() and ".." not in path.split("/")
            ]
        return self.answer([entry_of(folder, path) for path in paths])

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    # --- writing ----------------------------------------------------------------------------------
    def create(self, asked):
        repo = f"{asked['organization']}/{asked['name']}"
        if self.hub.token is not None and self.given_token() != self.hub.token:
            return self.refuse(401, None, "Invalid credentials in Authorization header")
        if repo not in self.hub.repos:
            return self.refuse(403, None, f"No rights to create {repo}")
        self.hub.created.append(asked)
        Path(self.hub.repos[repo]).mkdir(parents=True, exist_ok=True)
        return self.answer({"url": f"{self.hub.url}/{repo}", "name": repo})

    def given_token(self):
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def accept_uploads(self, asked):
        return {
            "transfer": "basic",
            "objects": [
                {**about, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{about['oid']}"}}}
                for about in asked["objects"]
            ],
        }

    def commit(self, folder, body):
        for line in map(json.loads, body.splitlines()):
            about = line["value"]
            if line["key"] == "file":
                data = base64.b64decode(about["content"])
            elif line["key"] == "lfsFile":
                data = self.hub.uploads[about["oid"]]
                assert hashlib.sha256(data).hexdigest() == about["oid"]
            else:
                continue
            path = folder / about["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        commit = commit_of(folder)
        return self.answer(
            {"commitUrl": f"{self.hub.url}/x/y/commit/{commit}", "commitOid": commit}
        )

    def about(self, repo, folder, commit):
        card = folder / "README.md"
        entries = [entry_of(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()]
        return {
            "_id": "0" * 24,
            "id": repo,
            "author": repo.partition("/")[0],
            "sha": commit,
            "lastModified": "2024-06-01T00:00:00.000Z",
            "private": False,
            "gated": "auto" if repo in self.hub.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "cardData": (metadata_load(card) if card.is_file() else None) or {},
            "siblings": [
                {
                    "rfilename": about["path"],
                    "size": about["size"],
                    "blobId": about["oid"],
                    "lfs": {**about["lfs"], "sha256": about["lfs"]["oid"]}
                    if "lfs" in about
                    else None,
                }
                for about in entries
            ],
        }

    def answer_file(self, repo, folder, name, commit, redirected):
        path = folder / name
        if not path.is_file():
            return self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        if repo in self.hub.gated and not redirected:
            return self.refuse(403, "GatedRepo", "Access to this data set is restricted")
        about, data = entry_of(folder, path), path.read_bytes()
        headers = {"ETag": f'"{etag_of(about)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if self.hub.redirect and not redirected and "lfs" in about:
            location = f"http://localhost:{self.server.server_port}/cdn/{repo}/{quote(name)}"
            linked = {
                "X-Linked-Etag": headers["ETag"],
                "X-Linked-Size": str(len(data)),
                "Location": location,
            }
            return self.begin(302, 0, {**headers, **linked})
        start, stop = 0, len(data)
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            if asked[1]:
                start, stop = int(asked[1]), min(int(asked[2]) + 1 if asked[2] else stop, stop)
            elif asked[2]:
                start = max(0, stop - int(asked[2]))
            if start >= stop:
                return self.refuse(416, None, "Range", {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self.begin(
            206 if asked else 200,
            stop - start,
            {**headers, "Content-Type": "application/octet-stream"},
        )
        if self.command != "GET":
            return None
        breaks = name in self.hub.break_once
        self.hub.break_once.discard(name)
        end = start + (stop - start) // 2 if breaks else stop
        for at in range(start, end, PIECE):
            if self.hub.closing.is_set():
                break
            self.wfile.write(data[at : min(at + PIECE, end)])
            self.request_seen.sent += min(at + PIECE, end) - at
            if self.hub.slow:
                self.hub.closing.wait(self.hub.slow)
        if self.request_seen.sent < stop - start:
            self.close_connection = True
        return None

    def begin(self, status, length, headers):
        self.request_seen.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def answer(self, value):
        body = json.dumps(value).encode()
        self.begin(200, len(body), {"Content-Type": "application/json"})
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message, headers=()):
        told = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        body = json.dumps({"error": message}).encode()
        self.begin(status, len(body), {**told, **dict(headers), "Content-Type": "application/json"})
        if self.command != "HEAD":
            self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """A client that goes away in the middle is part of the tests."""


@contextlib.contextmanager
def hub_server(repos, token=None, gated=(), break_once=(), slow=0, redirect=False):
    """See the module's docstring; yields the :class:`Hub`, whose server has stopped when the block
    ends."""
    names = {break_once} if isinstance(break_once, str) else set(break_once or ())
    hub = Hub(dict(repos), token, tuple(gated), names, slow, redirect, [], threading.Event())
    server = Server(("127.0.0.1", 0), Handler)
    server.hub = hub
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
