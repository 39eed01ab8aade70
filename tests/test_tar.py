"""Tars are read as tarfile and WebDataset read them, whatever made them, and damage is told."""

import io
import os
import tarfile

import pytest
import webdataset as wds
from shards import reinforced_sample, uid, write_reinforced_shards, write_shard

from dr.data import tar_to_samples
from dr.reinforcement import REINFORCED_MEMBERS
from dr.tar import MAX_MEMBER, member_spans, read_members


def members(data, wanted=lambda name: True):
    return list(read_members(io.BytesIO(data), wanted))


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


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    "names", [["a.txt", "b.jpg"], ["a.txt", "folder/" * 20 + "b.jpg", "c" * 90 + ".d.jpg"], ["é.txt"]]
)
@pytest.mark.parametrize("fields", [{}, {"mtime": 1.5}])
def test_every_format_gives_what_tarfile_gives(tar_format, names, fields):
    data = packed(tar_format, names, **fields)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(member.name, tar.extractfile(member).read()) for member in tar]
    assert members(data) == expected and [name for name, _ in expected] == names


def test_a_long_name_among_plain_ones_and_members_that_are_no_files():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
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
    assert [name for name, _ in members(stream.getvalue())] == ["a.txt", "x" * 150 + ".txt", "b.txt"]


def test_what_is_not_wanted_and_what_is_too_large_is_passed_over(tmp_path):
    path = tmp_path / "large.tar"
    with tarfile.open(path, "w") as tar:
        for name, size in (("a.txt", 5), ("a.jpg", MAX_MEMBER + 1), ("a.npz", 7)):
            info = tarfile.TarInfo(name)
            info.size = size
            with open("/dev/zero", "rb") as zeros:
                tar.addfile(info, zeros)
    with open(path, "rb") as stream:
        assert [name for name, _ in read_members(stream, lambda name: name != "a.txt")] == ["a.npz"]


@pytest.mark.parametrize("keep", [3 * 512 + 100, 2 * 512, 512 + 3, 100])
def test_a_cut_is_told(keep):
    data = packed(tarfile.USTAR_FORMAT, ["a.txt"] * 3)
    with pytest.raises(tarfile.TarError):
        members(data[:keep])


def test_rubbish_is_told():
    with pytest.raises(tarfile.TarError):
        members(os.urandom(2000))


def test_samples_are_those_that_webdataset_reads(tmp_path):
    shards = wds.SimpleShardList(write_reinforced_shards(tmp_path)).urls
    used = {extension for extensions in REINFORCED_MEMBERS.values() for extension in extensions}
    expected = [
        {name: data for name, data in sample.items() if name in {*used, "__key__", "__url__"}}
        for sample in wds.tarfile_to_samples()({"url": url} for url in shards)
    ]
    assert list(tar_to_samples({"url": url} for url in shards)) == expected and len(expected) > 8


def test_a_damaged_shard_gives_what_comes_before_and_the_next_one_goes_on(tmp_path, caplog):
    samples = [(uid(seed), reinforced_sample(seed)) for seed in range(4)]
    first, second = (write_shard(tmp_path / f"{n}.tar", part) for n, part in enumerate((samples[:2], samples[2:])))
    first.write_bytes(first.read_bytes()[: first.stat().st_size // 2])
    urls = [str(first), str(tmp_path / "missing.tar"), str(second)]
    keys = [sample["__key__"] for sample in tar_to_samples({"url": url} for url in urls)]
    assert keys[-2:] == [uid(2), uid(3)] and uid(1) not in keys[:-2][:-1]
    assert [url in record.message for url, record in zip(urls, caplog.records, strict=False)] == [True, True]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_tell_where_each_member_is(tar_format, tmp_path):
    data = packed(tar_format, ["a.txt", "b.jpg", "folder/" * 20 + "c.jpg", "d.txt"])
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    with open(path, "rb") as file:
        found = [(name, data[offset : offset + size]) for name, offset, size in member_spans(file)]
    assert found == members(data) and len(found) == 4


@pytest.mark.parametrize("name", ["b.jpg", "b" * 120 + ".jpg"], ids=["plain", "long name"])
@pytest.mark.parametrize("cut", [200, 600])
def test_of_a_cut_tar_the_whole_members_are_found_and_the_cut_is_told(name, cut, tmp_path):
    data = packed(tarfile.GNU_FORMAT, ["a.txt", name, "c.txt"])
    at = data.index(b"c.txt")
    path = tmp_path / "a.tar"
    path.write_bytes(data[: at + cut])
    found = []
    with open(path, "rb") as file, pytest.raises(tarfile.TarError):
        for member in member_spans(file):
            found.append(member[0])
    assert found == ["a.txt", name]
