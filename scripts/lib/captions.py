"""Read synthetic captions: lines of JSON, ``{"uid": …, "syn_text": [str, …]}``.

A line may have several lists, one for each captioner, under keys that start with ``syn_text``. The
captions of a data set are in one file, or in a folder with a file for each shard, as
``scripts/caption.py`` writes them.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .report import printable
from .shards import ShardError, describe_type, parse_uid

KEY = "syn_text"  # of the lists of captions; other captioners' keys start with it
SETTINGS = "caption.json"  # in the folder of a data set's captions: the captioners' settings by key
GZIP = b"\x1f\x8b"  # how such a file begins
_SURROGATE = re.compile("[\ud800-\udfff]").search  # half a character, which no tokenizer takes


Captions = dict[str, dict[str, list[str]]]  # lists by uid and key


class LineError(Exception):
    """What is wrong with a line, for people."""


class SyntheticCaptions:
    """The synthetic captions of a data set.

    Args:
        path: a file, which is read at once, or a folder with a file for each shard.

    Attributes:
        blank: how many captions were blank in the file; 0 for a folder.
        settings: the file that records how the captions were made, or the file of captions itself.

    Raises:
        ShardError: the file is not one of captions.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.blank, self.keys = path, 0, list[str]()
        self.in_shards = path.is_dir()
        self.settings = path / SETTINGS if self.in_shards else path
        if not self.in_shards:
            self._all, self.blank = read_captions(path)
        elif self.settings.exists():
            self.keys = list(json.loads(self.settings.read_text()))

    def of_shard(self, name: str) -> Captions:
        """The captions of a shard's samples (of a file: all), without blank ones.

        Args:
            name: file name of the shard.

        Raises:
            ShardError: they are missing or damaged, or those of a captioner are missing.
        """
        if not self.in_shards:
            return self._all
        path = find_captions(self.path, name)
        if path is None:
            raise ShardError(f"there is no file of captions {captions_path(self.path, name)}")
        captions, _ = read_captions(path)
        for key in self.keys:
            if not any(key in lists for lists in captions.values()):
                raise ShardError(
                    f"{path} has no captions under {key}, as {self.settings} says: run "
                    "scripts/caption.py again"
                )
        return captions


def is_key(text: str) -> bool:
    """Whether captions may be stored under this key."""
    return re.fullmatch(rf"{KEY}[A-Za-z0-9_-]*", text) is not None


def captions_path(folder: Path, shard: str) -> Path:
    """The file of a shard's captions."""
    return folder / f"{shard.removesuffix('.tar')}.jsonl"


def find_captions(folder: Path, shard: str) -> Path | None:
    """The file of a shard's captions, which may be compressed; None: there is none."""
    path = captions_path(folder, shard)
    found = (path, path.with_name(f"{path.name}.gz"))
    return next((path for path in found if path.is_file()), None)


def has_captions(path: Path, key: str) -> bool:
    """Whether the first line of a file has captions under a key.

    Raises:
        ShardError: the line is wrong, or the file is damaged.
    """
    try:
        parsed = next(filter(None, map(_parse_line, _read_lines(path))), None)
    except LineError as error:
        raise ShardError(f"{path}: the first line: {error}") from None
    return parsed is not None and key in parsed[1]


def read_captions(path: Path) -> tuple[Captions, int]:
    """Read a file of synthetic captions, also one compressed with gzip.

    Blank lines, byte order marks and other fields are ignored.

    Returns:
        The captions by uid and key, without blank ones (so a list may be empty), and how many were
        blank.

    Raises:
        ShardError: a line is wrong, or a uid has two lines with different captions. The message
            names file, line and field.
    """
    captions: Captions = {}
    blank = 0
    for number, line in enumerate(_read_lines(path), 1):
        try:
            parsed = _parse_line(line)
            if parsed is None:
                continue
            uid, found = parsed
            usable = {
                key: [caption for caption in texts if caption.strip()]
                for key, texts in found.items()
            }
            if captions.setdefault(uid, usable) != usable:
                raise LineError(f"field uid: {uid!r} has other captions in a line before")
        except LineError as error:
            raise ShardError(f"{path}, line {number}: {error}") from None
        blank += sum(len(found[key]) - len(usable[key]) for key in found)
    if not captions:
        raise ShardError(f"{path} has no captions: expected lines with uid and syn_text")
    return captions, blank


def _read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, inflated if it is compressed; raises ShardError if that is damaged."""
    with open(path, "rb") as file:
        if file.peek(2)[:2] != GZIP:
            yield from file
            return
        try:
            with gzip.open(file) as inflated:
                yield from inflated
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ShardError(f"{path}: damaged gzip: {error}") from None


def _parse_line(line: bytes) -> tuple[str, dict[str, list[str]]] | None:
    """A line's uid and lists of captions; None if it is blank; raises LineError."""
    try:
        text = line.decode("utf-8").strip().lstrip("\ufeff").strip()
    except UnicodeDecodeError as error:
        raise LineError(f"not UTF-8: {error}") from error
    if not text:
        return None
    try:
        record: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LineError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        found = describe_type(record)
        raise LineError(f"expected an object with uid and syn_text, found {found}")
    lists = {key: record[key] for key in record if key.startswith(KEY)}
    for field, is_there in (("uid", "uid" in record), (KEY, bool(lists))):
        if not is_there:
            raise LineError(f"field {field}: missing")
    try:
        uid = parse_uid(record["uid"])
    except ValueError as error:
        raise LineError(f"field uid: {error}") from error
    for key, captions in lists.items():
        if not is_key(key):
            raise LineError(f"field {printable(key)}: expected a name of letters, digits, _ and -")
        _check_captions(key, captions)
    return uid, lists


def _check_captions(key: str, captions: Any) -> None:
    """Raise LineError if a field is no list of captions."""
    if not isinstance(captions, list):
        found = describe_type(captions)
        raise LineError(f"field {key}: expected a list of captions, found {found}")
    for place, caption in enumerate(captions):
        if not isinstance(caption, str):
            found = describe_type(caption)
            raise LineError(f"field {key}: expected text, entry {place} is {found}")
        if _SURROGATE(caption):
            raise LineError(f"field {key}: entry {place} is not valid Unicode")
