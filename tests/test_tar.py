"""Tars are read as tarfile and WebDataset read them, whatever made them, and damage is told."""

import io
import os
import random
import tarfile

import pytest
import webdataset as wds
from shards import reinforced_sample, uid, write_reinforced_shards, write_shard

from dr.sample import USED_MEMBERS
from dr.sources import stream
from dr.tar import MAX_MEMBER, group_members, read_headers, read_samples, sample_spans, split_name


class Pipe:
    """Can only be read, and never more than asked for."""

    def __init__(self, data):
        self.stream = io.BytesIO(data)

    def read(self, size):
        return self.stream.read(size)


def members(data, stream=io.BytesIO):
    """Names and bytes of the plain files, from a file or a pipe."""
    found = []
    for key, sample in read_samples(stream(data), lambda extension: True):
        found += [(f"{key}.{extension}", content) for extension, content in sample.items()]
    return found


STREAMS = pytest.mark.parametrize("stream", [io.BytesIO, Pipe], ids=["file", "pipe"])


def packed(tar_format, names, **fields):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 700
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(name.encode().ljust(700, b".")[:700]))
    return stream.getvalue()


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
@pytest.mark.parametrize(
    "names",
    [["a.txt", "b.jpg"], ["a.txt", "folder/" * 20 + "b.jpg", "c" * 90 + ".d.jpg"], ["é.txt"]],
)
@pytest.mark.parametrize("fields", [{}, {"mtime": 1.5}])
@STREAMS
def test_every_format_gives_what_tarfile_gives(tar_format, names, fields, stream):
    data = packed(tar_format, names, **fields)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(member.name, tar.extractfile(member).read()) for member in tar]
    assert members(data, stream) == expected and [name for name, _ in expected] == names


@STREAMS
def test_a_long_name_among_plain_ones_and_members_that_are_not_files(stream):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind in (
            ("a.txt", b"0"),
            ("link.txt", b"2"),
            ("x" * 150 + ".txt", b"0"),
            ("folder", b"5"),
            ("b.txt", b"0"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.txt" if kind == b"2" else ""
            tar.addfile(info)
    assert [name for name, _ in members(file.getvalue(), stream)] == [
        "a.txt",
        "x" * 150 + ".txt",
        "b.txt",
    ]


def test_unwanted_and_oversized_members_are_skipped(tmp_path):
    path = tmp_path / "large.tar"
    with tarfile.open(path, "w") as tar:
        for name, size in (("a.txt", 5), ("a.jpg", MAX_MEMBER + 1), ("a.npz", 7)):
            info = tarfile.TarInfo(name)
            info.size = size
            with open("/dev/zero", "rb") as zeros:
                tar.addfile(info, zeros)
    with open(path, "rb") as file:
        assert list(read_samples(file, lambda extension: extension != "txt")) == [
            ("a", {"npz": bytes(7)})
        ]
        assert [list(sample) for _, sample in sample_spans(file)] == [["txt", "npz"]]


@pytest.mark.parametrize("keep", [3 * 512 + 100, 2 * 512, 512 + 3, 100])
@STREAMS
def test_a_cut_tar_raises(keep, stream):
    data = packed(tarfile.USTAR_FORMAT, ["a.txt"] * 3)
    with pytest.raises(tarfile.ReadError):
        members(data[:keep], stream)


def broken(**fields):
    """A whole member, then a header with other contents."""
    data = packed(tarfile.GNU_FORMAT, ["a.txt"])
    header = bytearray(packed(tarfile.GNU_FORMAT, ["b.txt"])[:512])
    for at, value in fields.values():
        header[at : at + len(value)] = value
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    return data[:1536] + header + bytes(20 * 512)


@pytest.mark.parametrize(
    "data",
    [
        os.urandom(2000),
        packed(tarfile.GNU_FORMAT, ["a.txt"])[:1536] + os.urandom(2000),
        broken(size=(124, b"\xff" * 12)),
        broken(size=(124, b"x" * 12)),
        broken(type=(156, b"L"), size=(124, b"00100000000\0")),
    ],
    ids=["rubbish", "rubbish after a member", "negative size", "no size", "long name of 16 MB"],
)
@STREAMS
def test_a_damaged_header_raises(data, stream):
    with pytest.raises(tarfile.ReadError):
        members(data, stream)


@pytest.mark.parametrize(
    "after", [b"x", bytes(600) + b"x", packed(tarfile.GNU_FORMAT, ["b.txt"]), bytes(2**21)]
)
def test_data_after_the_end_mark_raises_where_a_whole_tar_is_asked_for(after):
    data = packed(tarfile.GNU_FORMAT, ["a.txt"])
    assert len(list(read_headers(io.BytesIO(data), whole=True))) == 1
    assert len(list(read_headers(io.BytesIO(data + after)))) == 1
    with pytest.raises(tarfile.ReadError, match="after the end mark"):
        list(read_headers(io.BytesIO(data + after), whole=True))


# --- grouping -------------------------------------------------------------------------------------
def grouped(names):
    return [
        (key, list(sample)) for key, sample in group_members((name, "content") for name in names)
    ]


def test_members_are_grouped_before_they_are_filtered():
    """Two malformed shards: a member that nobody reads still separates samples."""
    repeated = ["k.jpg", "k.json", "k.json", "k.txt"]
    assert grouped(repeated) == [("k", ["jpg", "json"]), ("k", ["json", "txt"])]
    between = ["a.jpg", "b.json", "a.txt"]
    assert grouped(between) == [("a", ["jpg"]), ("b", ["json"]), ("a", ["txt"])]
    for names, expected in ((repeated, [["jpg"], ["txt"]]), (between, [["jpg"], [], ["txt"]])):
        data = packed(tarfile.GNU_FORMAT, names)
        samples = read_samples(io.BytesIO(data), lambda extension: extension != "json")
        assert [list(sample) for _, sample in samples] == expected


NAMES = ["a", "b", "a.b", "d/a", "d.e/a", "d/.a", ".a", "__a__", "__a__/b", "a\nb", "é"]
EXTENSIONS = ["", ".", ".jpg", ".JPG", ".json", ".syn.json", ".__key__", ".c/d"]


@pytest.mark.parametrize("seed", range(100))
def test_samples_are_those_of_webdatasets_own_grouping(seed, tmp_path):
    """On random member names. webdataset raises on a repeated extension: see test_trainer.py for
    OpenCLIP's rule."""
    rng, seen, names = random.Random(seed), set(), []
    for _ in range(40):
        name = rng.choice(NAMES) + rng.choice(EXTENSIONS)
        if ".__key__" in name or (split_name(name) or name) in seen:
            continue
        names.append(name)
        seen.add(split_name(name) or name)
    path = tmp_path / "0.tar"
    path.write_bytes(packed(tarfile.GNU_FORMAT, names))
    expected = [
        (
            sample.pop("__key__"),
            {name: data for name, data in sample.items() if not name.startswith("__")},
        )
        for sample in wds.tarfile_to_samples()([{"url": str(path)}])
    ]
    with open(path, "rb") as file:
        assert list(read_samples(file, lambda extension: True)) == expected and len(expected) > 3
        assert [(key, list(sample)) for key, sample in sample_spans(file)] == [
            (key, list(sample)) for key, sample in expected
        ]


def test_samples_are_those_that_webdataset_reads(tmp_path):
    shards = wds.SimpleShardList(write_reinforced_shards(tmp_path)).urls
    expected = [
        {
            name: data
            for name, data in sample.items()
            if name in {*USED_MEMBERS, "__key__", "__url__"}
        }
        for sample in wds.tarfile_to_samples()({"url": url} for url in shards)
    ]
    found = stream(({"url": url} for url in shards), USED_MEMBERS.__contains__)
    assert [item.sample for item in found] == expected and len(expected) > 8


def test_a_damaged_shard_gives_what_comes_before_and_the_next_one_goes_on(tmp_path):
    samples = [(uid(seed), reinforced_sample(seed)) for seed in range(4)]
    first, second = (
        write_shard(tmp_path / f"{n}.tar", part)
        for n, part in enumerate((samples[:2], samples[2:]))
    )
    first.write_bytes(first.read_bytes()[: first.stat().st_size // 2])
    urls = [str(first), str(tmp_path / "missing.tar"), str(second)]
    items = list(stream(({"url": url} for url in urls), USED_MEMBERS.__contains__))
    keys = [item.sample["__key__"] for item in items if item.skipped is None]
    assert keys[-2:] == [uid(2), uid(3)] and uid(1) not in keys[:-2][:-1]
    assert [item.skipped.url for item in items if item.skipped] == urls[:2]


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_headers_tell_where_each_member_is(tar_format, tmp_path):
    data = packed(tar_format, ["a.txt", "b.jpg", "folder/" * 20 + "c.jpg", "d.txt"])
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    with open(path, "rb") as file:
        found = [(m.name, data[m.offset : m.offset + m.size]) for m in read_headers(file)]
        assert [data[m.header : m.header + 512] != bytes(512) for m in read_headers(file)] == [
            True
        ] * 4
        later = list(read_headers(file))[2]
        assert list(read_headers(file, later.header, later.header + 1)) == [later]
    assert found == members(data) and len(found) == 4


@pytest.mark.parametrize("name", ["b.jpg", "b" * 120 + ".jpg"], ids=["plain", "long name"])
@pytest.mark.parametrize("cut", [200, 600])
def test_of_a_cut_tar_the_whole_members_are_found_and_the_cut_raises(name, cut, tmp_path):
    data = packed(tarfile.GNU_FORMAT, ["a.txt", name, "c.txt"])
    at = data.index(b"c.txt")
    path = tmp_path / "a.tar"
    path.write_bytes(data[: at + cut])
    found = []
    with open(path, "rb") as file, pytest.raises(tarfile.TarError):
        for member in read_headers(file):
            found.append(member.name)
    assert found == ["a.txt", name]
