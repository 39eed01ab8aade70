"""Data sets on the Hugging Face Hub: find shards, read the beginning of one, explain errors."""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HTTPError  # HTTPError: of httpx or its successor
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, logging

from .datasets import DataSet

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# Shards of a repository whose layout is not known.
is_shard = re.compile(r"(?:[\w-]+/)*\d+\.tar").fullmatch


class HubError(Exception):
    """Why a file of the Hub cannot be read, in a line for people."""


class LimitReached(Exception):
    """More bytes of a shard were asked for than are read."""


# --- errors ---------------------------------------------------------------------------------------
def page_of(repo: str) -> str:
    return f"{re.sub('//.*@', '//', constants.ENDPOINT)}/datasets/{repo}"


def status_of(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def explain(error: BaseException, repo: str) -> str:
    """One line about what failed, without text from the server and without the token."""
    host, status = urlsplit(constants.ENDPOINT).hostname, status_of(error)
    if isinstance(error, GatedRepoError):
        return (
            f"{repo} is gated: accept its terms on {page_of(repo)}, and set HF_TOKEN to a token of "
            "that account"
        )
    if status == 401 and not get_token():
        return f"{host} refuses {repo} without a token (401): set HF_TOKEN, or check the name"
    if status in (401, 403):
        token = "the token (HF_TOKEN, or that of hf auth login)"
        return f"{token} may not read {repo} ({status}): set another one"
    if status == 404:
        return (
            f"{host} has no data set {repo}, or no longer has this file (404): check the name and "
            "HF_ENDPOINT"
        )
    if status:
        return f"{host} answers with status {status}"
    if isinstance(error, HubError):
        return str(error)
    if isinstance(error, OSError) and error.errno:
        return f"{error.filename or 'writing'}: {os.strerror(error.errno)}"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, so huggingface_hub uses no network: unset it"
    return (
        f"no answer from {host}, or not all of it ({type(error).__name__}): check the network and "
        "HF_ENDPOINT"
    )


def prepare_client() -> None:
    """Exit with a line if HF_ENDPOINT or HF_TOKEN cannot be right; end huggingface_hub's log."""
    logging.set_verbosity_error()  # errors are reported here
    endpoint = urlsplit(constants.ENDPOINT)
    if endpoint.scheme not in ("http", "https") or not endpoint.hostname:
        raise SystemExit("HF_ENDPOINT is no URL such as https://huggingface.co")
    if not re.fullmatch(r"[\x21-\x7e]*", get_token() or ""):
        raise SystemExit("HF_TOKEN contains a space or a character that no token has: set it again")


@contextlib.contextmanager
def hub_errors_in_one_line(repo: str) -> Iterator[None]:
    """Exit with one line if the Hub does not answer, or another kind of server does."""
    try:
        yield
    except (HTTPError, ConnectionError) as error:
        raise SystemExit(explain(error, repo)) from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise SystemExit(
            f"{page_of(repo)} is not answered by a Hub ({type(error).__name__}): check HF_ENDPOINT"
        ) from None


# --- the beginning of a shard ---------------------------------------------------------------------
def shard_path(number: int, per_folder: int) -> str:
    """Shard 1003 is 00001003.tar, or 01/00000003.tar where folders hold 1,000 each."""
    if not per_folder:
        return f"{number:08d}.tar"
    return f"{number // per_folder:02d}/{number % per_folder:08d}.tar"


class HubShard(NamedTuple):
    """A shard of a data set on the Hub."""

    repository: str
    path: str

    @classmethod
    def parse(cls, text: str) -> "HubShard":
        """``hf://OWNER/NAME[/PATH]``, with or without ``datasets/``; without a path, its first
        shard.

        Raises:
            SystemExit: it is no such address, or the data set has no shards.
        """
        parts = text.removeprefix("hf://").removeprefix("datasets/").split("/")
        repository, path = "/".join(parts[:2]), "/".join(parts[2:])
        if not REPOSITORY.fullmatch(repository) or {"", ".", ".."} & set(parts[2:]):
            raise SystemExit(
                f"{text}: expected an address such as hf://apple/DFNDR-12M/00000000.tar, or "
                "hf://apple/DFNDR-12M for its first shard"
            )
        return cls(repository, path or find_first_shard(repository))

    @classmethod
    def first_of(cls, dataset: DataSet) -> "HubShard":
        """The first shard of a data set. Raises SystemExit if its Hub lists none."""
        if dataset.per_folder is None:
            return cls(dataset.repository, find_first_shard(dataset.repository))
        return cls(dataset.repository, shard_path(0, dataset.per_folder))

    def __str__(self) -> str:
        return f"hf://{self.repository}/{self.path}"


def find_first_shard(repository: str) -> str:
    """Path of the first shard that the Hub lists; exits with a line if there is none."""
    prepare_client()
    with hub_errors_in_one_line(repository):
        for entry in HfApi().list_repo_tree(repository, repo_type="dataset", recursive=True):
            if is_shard(entry.path):
                return entry.path
    raise SystemExit(f"{repository} has no shards such as 00000000.tar; see {page_of(repository)}")


class Beginning:
    """The first bytes of a file, read forward as they come.

    ``read`` raises LimitReached where more than ``limit`` bytes are needed.
    """

    def __init__(self, chunks: Iterator[bytes], limit: int) -> None:
        self.chunks, self.left, self.buffer = chunks, limit, b""

    def read(self, size: int) -> bytes:
        parts = [self.buffer]
        length = len(self.buffer)
        while length < size and (chunk := next(self.chunks, b"")):
            self.left -= len(chunk)
            if self.left < 0:
                raise LimitReached
            parts.append(chunk)
            length += len(chunk)
        data = b"".join(parts)
        self.buffer = data[size:]
        return data[:size]


@contextlib.contextmanager
def open_beginning(shard: HubShard, limit: int) -> Iterator[Beginning]:
    """Stream a shard; closing it ends the transfer. Nothing is written to disk.

    Args:
        shard: to read.
        limit: bytes to read at most.

    Raises:
        SystemExit: the Hub refuses it, or does not answer.
    """
    prepare_client()
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes=0-{limit}"}
    url = hf_hub_url(shard.repository, shard.path, repo_type="dataset")
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            yield Beginning(response.iter_bytes(), limit)
    except (HTTPError, ConnectionError) as error:
        raise SystemExit(explain(error, shard.repository)) from None
