"""What a shard holds: members as spans of bytes, samples by uid. Headers are read, and each `<key>.json`; no more.

Samples are matched by uid: the `uid` in `<key>.json` where there is one (img2dataset's keys are running numbers), else
the key, the file name up to its first dot. A tar that is cut off or damaged is a `ShardError`; a member or a json that
can't be used refuses its sample, with a reason to count.

Leaves out: what is inside an image or an npz.
"""

import json
import os
import re
import struct
import sys
import tarfile
from collections.abc import MutableMapping
from itertools import starmap
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the recipe's root, for dr
from dr.tar import parse_plain_header

JSON_LIMIT = 10_000_000  # bytes; a larger <key>.json is refused, not read
TAIL_LIMIT = 1 << 20  # bytes of zeros that may follow a tar's last member: some tools pad this far
CHUNK = 1 << 20
NAME_LIMIT = 100  # bytes in a plain ustar header
SIZE_LIMIT = 8**11  # likewise
HEADER_BUFFER = 8192  # small: every header is a read of its own, which by default is as long as the file system likes
OPEN_FILES = 128  # of 1,024 that a process may have by default

PACKED_SPAN = struct.Struct("<IIQQ")  # extension, path, offset, size

FORBIDDEN = re.compile(r"[/\\\x00-\x1f]").search  # in a member's name

IMAGES = ("jpg", "jpeg", "png", "webp")


class ShardError(Exception):
    """Why a shard can't be joined, for people."""


class OpenFiles(dict):
    """Descriptors by path, of the files read last: unaligned images may lie in more shards than may be open."""

    def descriptor(self, path):
        descriptor = self.pop(path, None)
        if descriptor is None:
            if len(self) >= OPEN_FILES:
                os.close(self.pop(next(iter(self))))
            descriptor = os.open(path, os.O_RDONLY)
        self[path] = descriptor  # the last in the order
        return descriptor

    def close(self):
        while self:
            os.close(self.popitem()[1])


open_files = OpenFiles()


class Span(NamedTuple):
    """A member's bytes in its shard."""

    path: str
    offset: int
    size: int

    def chunks(self):
        for at in range(0, self.size, CHUNK):
            length = min(CHUNK, self.size - at)
            data = os.pread(open_files.descriptor(self.path), length, self.offset + at)
            if len(data) != length:
                raise ShardError(f"{self.path} was cut off while it was read")
            yield data

    def read(self):
        return b"".join(self.chunks())


def same(a, b):
    return a == b or (
        a.size == b.size and all(x == y for x, y in zip(a.chunks(), b.chunks(), strict=True))
    )


class Samples(MutableMapping):
    """``{uid: {extension: Span}}``, packed: a sample of eight members takes 0.4 KB rather than 2."""

    def __init__(self):
        self.packed, self.names, self.numbers = {}, [], {}  # names: the paths and the extensions

    def number(self, name):
        if name not in self.numbers:
            self.numbers[name] = len(self.names)
            self.names.append(name)
        return self.numbers[name]

    def __setitem__(self, uid, members):
        spans = [
            (self.number(extension), self.number(path), *at)
            for extension, (path, *at) in members.items()
        ]
        self.packed[uid] = b"".join(starmap(PACKED_SPAN.pack, spans))

    def __getitem__(self, uid):
        spans, names = PACKED_SPAN.iter_unpack(self.packed[uid]), self.names
        return {names[extension]: Span(names[path], *at) for extension, path, *at in spans}

    def __delitem__(self, uid):
        del self.packed[uid]

    def __contains__(self, uid):
        return uid in self.packed

    def __iter__(self):
        return iter(self.packed)

    def __len__(self):
        return len(self.packed)


class Contents(NamedTuple):
    """What one source holds for a shard, by uid."""

    samples: Samples
    refused: dict  # uid -> why this sample can't be used


def scan(file, start=0, end=None):
    """Yield ``(name, offset of the header, Span, fault)`` of a tar's members, reading headers only.

    ``fault``: why the member must not be used. With an ``end``: the members that begin between ``start`` and there;
    without: all, and it is looked at whether the tar ends as it should.
    """
    offset, length, tar = start, os.fstat(file.fileno()).st_size, None
    try:
        while end is None or offset < end:
            fault, first = None, offset
            file.seek(offset)
            header = file.read(tarfile.BLOCKSIZE)
            if header and not header.strip(b"\0"):
                break  # the end mark; Python 3.10's tarfile fails on one that is all there is
            if plain := parse_plain_header(header):
                name, size = plain
                data = offset + tarfile.BLOCKSIZE
                offset = data + size + -size % tarfile.BLOCKSIZE
                if offset > length:
                    raise tarfile.ReadError("unexpected end of data")
            else:
                file.seek(offset)
                if tar is None:
                    tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115, the caller closes the file
                else:
                    tar.offset = offset
                info = tar.next()
                tar.members.clear()  # tarfile keeps every header otherwise
                if info is None:
                    break
                name, size, data, offset = info.name, info.size, info.offset_data, tar.offset
                if size < 0:  # tarfile would go backwards, for ever
                    raise tarfile.ReadError(f"a member of negative size, at byte {first}")
                if info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    fault = "a member that is not a plain file"
            name = name.removeprefix("./")
            if not fault and FORBIDDEN(name):
                fault = "a member name with a folder or control character"
            elif not fault and size >= SIZE_LIMIT:
                fault = "a member of 8 GiB or more"
            yield name, first, Span(file.name, data, size), fault
    except (tarfile.TarError, ValueError, LookupError, OverflowError) as error:
        raise ShardError(f"{file.name} is not a whole tar: {error}") from error
    if end is not None:
        return
    # tarfile takes a cut between two members, or rubbish for a header, for the end
    file.seek(offset)
    tail = file.read(TAIL_LIMIT + 1)
    if len(tail) < tarfile.BLOCKSIZE:
        raise ShardError(f"{file.name} is not a whole tar: cut off at byte {offset}, no end mark")
    if len(tail) > TAIL_LIMIT or tail.strip(b"\0"):
        raise ShardError(
            f"{file.name} is not a whole tar: damaged, or several in one file, at byte {offset}"
        )


def read_json(span):
    if span.size > JSON_LIMIT:
        raise ValueError
    about = json.loads(span.read())
    return about if isinstance(about, dict) else {}


def read_contents(file, start=0, end=None, extents=None):
    """The :class:`Contents` of a shard, or of the part of it between two bytes.

    ``extents``: a dict that takes up, by uid, between which bytes a sample's members lie, headers included.
    """
    by_key, faults, bounds = Samples(), {}, {}
    current, members = None, {}  # the sample that is being read
    for name, offset, span, fault in scan(file, start, end):
        if fault:
            name = re.split(r"[/\\]", name)[-1]  # the sample that it would belong to
        key, _, extension = name.partition(".")
        if not key or not extension:
            continue  # not part of a sample for WebDataset either
        if key != current:
            if current is not None:
                by_key[current] = members
            current, members = key, by_key.get(key, {})
        if extents is not None:
            bounds[key] = bounds.get(key, (offset,))[0], span.offset + span.size
        extension = extension.lower()  # as WebDataset reads it
        if extension in members and not fault and not same(members[extension], span):
            fault = "two different members of one name in one source"
        if fault:
            faults.setdefault(key, fault)
        else:
            members.setdefault(extension, span)
    if current is not None:
        by_key[current] = members

    contents = Contents(Samples(), {})
    for key, members in by_key.items():
        uid, fault, about = key, faults.get(key), {}
        if "json" in members:
            try:
                about = read_json(members["json"])
                uid = about.get("uid", key)
            except (ValueError, RecursionError):
                fault = fault or "an unreadable json"
        if not isinstance(uid, str) or not re.fullmatch(r"[^./\\\x00-\x1f\ud800-\udfff]+", uid):
            uid, fault = key, "a uid that can't be a file name"
        uid = key if uid == key else uid  # one string for both
        if uid in contents.samples:
            fault = "a uid twice in one source"
        if any(len(os.fsencode(f"{uid}.{extension}")) > NAME_LIMIT for extension in members):
            fault = f"a name of over {NAME_LIMIT} bytes"
        if str(about.get("status")).startswith(
            "failed"
        ):  # img2dataset's failed_to_download, failed_to_resize
            members = {
                extension: span for extension, span in members.items() if extension not in IMAGES
            }
        contents.samples[uid] = members
        if extents is not None:
            first, last = bounds[key]
            before = extents.get(uid, (first, last))
            extents[uid] = min(first, before[0]), max(last, before[1])
        if fault:
            contents.refused.setdefault(uid, fault)
    return contents
