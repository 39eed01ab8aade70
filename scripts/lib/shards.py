"""Find shards, and read their headers: members as spans of bytes, grouped by uid.

Samples are matched by uid: the ``uid`` in ``<key>.json`` if there is one (img2dataset's keys are
running numbers), else the key. Only headers and each ``<key>.json`` are read. A tar that is damaged
or cut off raises ``ShardError``. A bad member or json makes its sample refused, with a reason.
Members with unknown extensions belong to their sample, and are counted.

``dr.sample`` decodes images and embeddings.
"""

import json
import os
import re
import struct
import tarfile
from collections.abc import Iterator, MutableMapping
from itertools import starmap
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from braceexpand import braceexpand

from dr.tar import IMAGE_MEMBERS, Member, Unknown, group_members, merge_unknown, read_headers

CHUNK = 1 << 20
MAX_JSON = 10_000_000  # bytes; a larger <key>.json is not read
MAX_NAME = 100  # bytes, in a plain ustar header
MAX_SIZE = 8**11  # bytes, likewise
MAX_OPEN_FILES = 128  # a process may have 1,024 by default
HEADER_BUFFER = 8192  # each header is one read; the default buffer may be as large as megabytes

_PACKED_SPAN = struct.Struct("<IIQQ")  # numbers of the extension and the path, offset, size
FORBIDDEN_NAME = "a member name with a folder or control character"
_FORBIDDEN = re.compile(r"[/\\\x00-\x1f]").search  # in a member's name
_UID = re.compile(r"[^./\\\x00-\x1f\ud800-\udfff]+").fullmatch  # can be a file name


class ShardError(Exception):
    """Why a shard cannot be used, in a line for people."""


class OpenFiles(dict[str, int]):
    """Descriptors of the files read last, by path. Unaligned images may lie in many shards."""

    def descriptor(self, path: str) -> int:
        descriptor = self.pop(path, None)
        if descriptor is None:
            if len(self) >= MAX_OPEN_FILES:
                os.close(self.pop(next(iter(self))))
            descriptor = os.open(path, os.O_RDONLY)
        self[path] = descriptor  # now the last in the order
        return descriptor

    def close(self) -> None:
        while self:
            os.close(self.popitem()[1])


open_files = OpenFiles()


class Span(NamedTuple):
    """The bytes of a member in its shard."""

    path: str
    offset: int
    size: int

    def chunks(self) -> Iterator[bytes]:
        for start in range(0, self.size, CHUNK):
            length = min(CHUNK, self.size - start)
            data = os.pread(open_files.descriptor(self.path), length, self.offset + start)
            if len(data) != length:
                raise ShardError(f"{self.path} was cut off while it was read")
            yield data

    def read(self) -> bytes:
        return b"".join(self.chunks())

    def has_same_bytes(self, other: "Span") -> bool:
        if self == other:
            return True
        return self.size == other.size and all(
            mine == theirs for mine, theirs in zip(self.chunks(), other.chunks(), strict=True)
        )


class Samples(MutableMapping[str, dict[str, Span]]):
    """``{uid: {extension: Span}}``, packed: a sample of eight members takes 0.4 KB, not 2."""

    def __init__(self) -> None:
        self._packed: dict[str, bytes] = {}
        self._names: list[str] = []  # paths and extensions
        self._numbers: dict[str, int] = {}

    def _number(self, name: str) -> int:
        if name not in self._numbers:
            self._numbers[name] = len(self._names)
            self._names.append(name)
        return self._numbers[name]

    def __setitem__(self, uid: str, members: dict[str, Span]) -> None:
        spans = [
            (self._number(extension), self._number(path), offset, size)
            for extension, (path, offset, size) in members.items()
        ]
        self._packed[uid] = b"".join(starmap(_PACKED_SPAN.pack, spans))

    def __getitem__(self, uid: str) -> dict[str, Span]:
        names = self._names
        return {
            names[extension]: Span(names[path], offset, size)
            for extension, path, offset, size in _PACKED_SPAN.iter_unpack(self._packed[uid])
        }

    def __delitem__(self, uid: str) -> None:
        del self._packed[uid]

    def __contains__(self, uid: object) -> bool:
        return uid in self._packed

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


class Contents(NamedTuple):
    """What one source holds for a shard.

    Attributes:
        samples: all of its samples by uid.
        refused: why a sample cannot be used, by uid.
        unknown: members with unknown extensions.
    """

    samples: Samples
    refused: dict[str, str]
    unknown: Unknown | None = None


# --- reading a shard ------------------------------------------------------------------------------
def read_json_object(span: Span) -> dict[str, Any]:
    """The object in a json member; empty for any other JSON value.

    Raises:
        ValueError: it is not JSON, or larger than ``MAX_JSON``.
        RecursionError: it is nested too deeply.
    """
    if span.size > MAX_JSON:
        raise ValueError(f"{span.size} bytes, at most {MAX_JSON} are read")
    return parse_json_object(span.read())


def parse_json_object(data: bytes) -> dict[str, Any]:
    """As :func:`read_json_object`."""
    content = json.loads(data)
    return content if isinstance(content, dict) else {}


def describe_type(value: object) -> str:
    """What a JSON value is, for messages."""
    names = {str: "text", bool: "true or false", int: "a whole number", list: "a list"}
    names |= {float: "a number with a point", dict: "an object", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def parse_uid(uid: object) -> str:
    """A uid from JSON as text; whole numbers, which ``img2dataset`` writes too, as their digits.

    Raises:
        ValueError: it cannot be the uid of a sample; the message is a reason to count by.
    """
    if isinstance(uid, int) and not isinstance(uid, bool):
        return str(uid)
    if not isinstance(uid, str):
        raise ValueError(f"a uid that is {describe_type(uid)}")
    if not _UID(uid):
        dotted = _UID(uid.replace(".", "_")) is not None
        raise ValueError(
            "a uid with a dot, where its key would end"
            if dotted
            else "a uid that can't be a file name"
        )
    return uid


def strip_name(name: str) -> str:
    """A member's name, or a key, without the ``./`` of a tar that was packed from a folder."""
    return name.removeprefix("./")


def is_forbidden(name: str) -> bool:
    """Whether a name, or a key, has a folder or control character."""
    return _FORBIDDEN(name) is not None


def _check_members(
    file: BinaryIO, start: int, end: int | None
) -> Iterator[tuple[str, tuple[Member, str | None]]]:
    """Yield ``(name, (member, why it cannot be used))`` of the members of a tar."""
    try:
        for member in read_headers(file, start, end, whole=True):
            name, fault = strip_name(member.name), None
            if not member.is_file:
                fault = "a member that is not a plain file"
            elif is_forbidden(name):
                fault = FORBIDDEN_NAME
            elif member.size >= MAX_SIZE:
                fault = "a member of 8 GiB or more"
            if fault:
                name = re.split(r"[/\\]", name)[-1]  # of the sample that it would belong to
            yield name, (member, fault)
    except tarfile.TarError as error:
        raise ShardError(f"{file.name} is not a whole tar: {error}") from error


def read_contents(
    file: BinaryIO,
    start: int = 0,
    end: int | None = None,
    extents: dict[str, tuple[int, int]] | None = None,
) -> Contents:
    """Read what a shard holds, or the part of it between two bytes.

    Args:
        file: the tar.
        start: offset of the first header to read.
        end: where to stop; None: at the end, and the tar must be whole.
        extents: if given, receives for each uid the first and the last byte of its members,
            headers included.

    Raises:
        ShardError: the tar is damaged or cut off.
    """
    by_key, faults, unknown = Samples(), dict[str, str](), None
    bounds: dict[str, tuple[int, int]] = {}
    for key, found in group_members(_check_members(file, start, end)):
        unknown = merge_unknown(unknown, found.unknown)
        members = by_key.get(key, {})  # of a sample whose members are not neighbours
        for extension, (member, fault) in found.items():
            span = Span(file.name, member.offset, member.size)
            if not fault and not members.setdefault(extension, span).has_same_bytes(span):
                fault = "two different members of one name in one source"
            if fault:
                faults.setdefault(key, fault)
            if extents is not None:
                first, _ = bounds.get(key, (member.header, 0))
                bounds[key] = first, member.offset + member.size
        by_key[key] = members

    contents = Contents(Samples(), {}, unknown)
    for key, members in by_key.items():
        uid, members, fault = _identify(key, members)
        fault = faults.get(key) or fault
        if uid in contents.samples:
            fault = "a uid twice in one source"
        if any(len(os.fsencode(f"{uid}.{extension}")) > MAX_NAME for extension in members):
            fault = f"a name of over {MAX_NAME} bytes"
        contents.samples[uid] = members
        if fault:
            contents.refused.setdefault(uid, fault)
        if extents is not None:
            first, last = bounds[key]
            before = extents.get(uid, (first, last))
            extents[uid] = min(first, before[0]), max(last, before[1])
    return contents


def _identify(key: str, members: dict[str, Span]) -> tuple[str, dict[str, Span], str | None]:
    """A sample's uid, its members without the image of a failed download, and what is wrong."""
    about: dict[str, Any] = {}
    fault = None
    if "json" in members:
        try:
            about = read_json_object(members["json"])
        except (ValueError, RecursionError):
            fault = "an unreadable json"
    try:
        uid = parse_uid(about.get("uid", key))
    except ValueError as error:
        uid, fault = key, fault or str(error)
    if str(about.get("status")).startswith("failed"):  # img2dataset's failed_to_download, …_resize
        members = {name: span for name, span in members.items() if name not in IMAGE_MEMBERS}
    return key if uid == key else uid, members, fault  # one string object for equal key and uid


# --- finding shards -------------------------------------------------------------------------------
def find_files(folder: Path, suffix: str, output: Path | None = None) -> list[str]:
    """The files below a folder whose names end with ``suffix``; links to folders are followed.

    Args:
        folder: where to search. Names that begin with a dot are ignored.
        suffix: of the names.
        output: a folder that must not be found below ``folder``.

    Returns:
        Paths relative to ``folder``, with /, sorted.

    Raises:
        SystemExit: a link leads nowhere, back to a folder above it, or to ``output``.
        OSError: a folder cannot be read.
    """

    def stop(error: OSError) -> None:
        raise error

    found = []
    above = {str(folder): {os.path.realpath(folder)}}  # of each folder to visit, itself included
    for parent, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        parents = above.pop(parent)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            path = os.path.join(parent, name)
            real = os.path.realpath(path)
            if real in parents or _is_inside(folder, real):
                raise SystemExit(f"{path} is a link to {real}, a folder above it: remove the link")
            if output is not None and _is_inside(output, real) and os.path.islink(path):
                raise SystemExit(
                    f"{path} is a link to {real}, which is the folder of --output {output}, or "
                    "above it: remove the link, or choose another --output"
                )
            above[path] = parents | {real}
            if suffix and name.endswith(suffix):  # a mistake, reported when it is read
                found.append(Path(path).relative_to(folder).as_posix())
        for name in files:
            path = os.path.join(parent, name)
            if name.startswith("."):
                continue
            if name.endswith(suffix):
                found.append(Path(path).relative_to(folder).as_posix())
            elif os.path.islink(path) and not os.path.exists(path):
                raise SystemExit(
                    f"{path} is a link to {os.readlink(path)}, which does not exist: is a disk not "
                    "mounted? Or remove the link"
                )
    return sorted(found)


def _is_inside(path: Path, folder: str) -> bool:
    return os.path.commonpath([os.path.realpath(path), folder]) == folder


def expand_braces(pattern: str) -> list[str]:
    """The names that a brace pattern such as ``{00000000..00000003}.tar`` stands for."""
    try:
        return list(dict.fromkeys(braceexpand(pattern)))
    except ValueError as error:
        raise SystemExit(f"{pattern} is no brace pattern: {error}") from None


def choose_shards(source: "Source", pattern: str | None, option: str, output: Path) -> list[str]:
    """The names of a source's shards, or those of a brace pattern that --shards gives.

    Args:
        source: whose shards.
        pattern: of --shards, or None.
        option: which gave the source.
        output: where finished shards, which may have lost their source, are.

    Raises:
        SystemExit: there are none, or a name is not that of a tar below the source's folder.
    """
    names = expand_braces(pattern) if pattern else source.shards()
    if not names:
        raise SystemExit(f"no shards (*.tar) in {source.folder}, {option}")
    check_names(names)
    if pattern and not any(source.stamp(name) or (output / name).exists() for name in names):
        raise SystemExit(
            f"--shards {pattern}: none of these {len(names)} shards is in {source.folder}, "
            f"{option}; expected a brace pattern of their names, such as "
            "'{00000000..00000007}.tar'"
        )
    return names


def check_names(names: list[str]) -> None:
    """Exit with a line if a name given by --shards is not that of a tar below a source's folder."""
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts or Path(name).suffix != ".tar":
            raise SystemExit(
                "--shards: expected names of tars relative to the folder of the source, without "
                f"'..', found {name}"
            )


class Source(NamedTuple):
    """A folder of shards.

    Attributes:
        folder: names of shards are relative to it.
        names: the shards that a pattern allows; None: all that are in the folder.
    """

    folder: Path
    names: frozenset[str] | None

    @classmethod
    def parse(cls, text: str, option: str = "--source", hint: str = "") -> "Source":
        """A folder, a tar, or a brace pattern of tars below the folder before the first brace."""
        if Path(text).is_dir():
            return cls(Path(text), None)
        root = "/" if text.startswith("/") else "."
        folder = Path(text.partition("{")[0].rpartition("/")[0] or root)
        if Path(text).exists() and not text.endswith(".tar"):
            raise SystemExit(
                f"{option} {text}: expected a folder, a tar, or a brace pattern of tars"
            )
        if not folder.is_dir() or ("{" not in text and not Path(text).is_file()):
            raise SystemExit(f"{option} {text}: no such folder{hint}")
        paths = (Path(path) for path in expand_braces(text))
        return cls(folder, frozenset(path.relative_to(folder).as_posix() for path in paths))

    def check_output(self, output: Path, option: str) -> None:
        """Exit with a line if what is written to ``output`` would become part of this source."""
        inside = [output.resolve(), *(output.resolve().parents if self.names is None else ())]
        if self.folder.resolve() in inside:
            raise SystemExit(
                f"--output {output} is the folder of {option} or inside it: choose another folder"
            )
        if self.names is None:
            find_files(self.folder, ".tar", output)

    def shards(self) -> list[str]:
        if self.names is not None:
            return sorted(self.names)
        return find_files(self.folder, ".tar")

    def path(self, name: str) -> Path:
        """Raises ShardError if the source does not have this shard."""
        path = self.folder / name
        if (self.names is not None and name not in self.names) or not path.is_file():
            raise ShardError(f"not in the source {self.folder}")
        return path

    def stamp(self, name: str) -> list[int] | None:
        """Size and time of change of a shard, for records; None if it does not exist."""
        path = self.folder / name
        return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None

    def holds(self, name: str, path: Path) -> bool:
        """Whether a path is a shard of the source, by a link."""
        shard = self.folder / name
        return path.exists() and shard.exists() and os.path.samefile(shard, path)

    def contents(self, name: str) -> Contents:
        with open(str(self.path(name)), "rb", buffering=HEADER_BUFFER) as file:
            return read_contents(file)
