"""Read synthetic captions: lines of JSON, ``{"uid": …, "syn_text": [str, …]}``."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .shards import describe_type, parse_uid

GZIP = b"\x1f\x8b"  # how such a file begins
_SURROGATE = re.compile("[\ud800-\udfff]").search  # half a character, which no tokenizer takes


class LineError(Exception):
    """What is wrong with a line, for people."""


def read_synthetic_captions(path: Path) -> tuple[dict[str, list[str]], int]:
    """Read a file of synthetic captions, also one compressed with gzip.

    Blank lines, byte order marks and other fields are ignored.

    Returns:
        The captions by uid, without blank ones (so a list may be empty), and how many were blank.

    Raises:
        SystemExit: a line is wrong, or a uid has two lines with different captions. The message
            names file, line and field.
    """
    captions: dict[str, list[str]] = {}
    blank = 0
    try:
        for number, line in enumerate(_read_lines(path), 1):
            try:
                parsed = _parse_line(line)
                if parsed is None:
                    continue
                uid, found = parsed
                usable = [caption for caption in found if caption.strip()]
                if captions.setdefault(uid, usable) != usable:
                    raise LineError(f"field uid: {uid!r} has other captions in a line before")
            except LineError as error:
                raise SystemExit(f"error: {path}, line {number}: {error}") from None
            blank += len(found) - len(usable)
    except (EOFError, zlib.error) as error:
        raise SystemExit(f"error: {path}: damaged gzip: {error}") from None
    if not captions:
        raise SystemExit(f"error: {path} has no captions: expected lines with uid and syn_text")
    return captions, blank


def _read_lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        if file.peek(2)[:2] == GZIP:
            with gzip.open(file) as inflated:
                yield from inflated
        else:
            yield from file


def _parse_line(line: bytes) -> tuple[str, list[str]] | None:
    """A line's uid and captions; None if it is blank; raises LineError."""
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
    for field in ("uid", "syn_text"):
        if field not in record:
            raise LineError(f"field {field}: missing")
    try:
        uid = parse_uid(record["uid"])
    except ValueError as error:
        raise LineError(f"field uid: {error}") from error
    captions = record["syn_text"]
    if not isinstance(captions, list):
        found = describe_type(captions)
        raise LineError(f"field syn_text: expected a list of captions, found {found}")
    for place, caption in enumerate(captions):
        if not isinstance(caption, str):
            found = describe_type(caption)
            raise LineError(f"field syn_text: expected text, entry {place} is {found}")
        if _SURROGATE(caption):
            raise LineError(f"field syn_text: entry {place} is not valid Unicode")
    return uid, captions
