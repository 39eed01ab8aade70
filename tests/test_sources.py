"""Any sample by its place: what WebDataset reads in order, and a shard that is damaged costs what
can't be read."""

import os

import pytest
import webdataset as wds
from shards import reinforced_sample, uid, write_reinforced_shards, write_shard

from dr import sources
from dr.sample import USED_MEMBERS, BadSample
from dr.sources import ShardReader, count_samples
from dr.tar import read_headers, read_sizes


def shards(tmp_path, number=3, samples=5):
    return wds.SimpleShardList(
        write_reinforced_shards(tmp_path, shards=number, samples=samples)
    ).urls


def reason(reader, shard, place):
    with pytest.raises(BadSample) as raised:
        reader.read(shard, place)
    return raised.value.reason


def test_samples_are_those_that_webdataset_reads_whatever_the_order(tmp_path, monkeypatch):
    paths = shards(tmp_path)
    expected = {
        (shard, place): {
            name: data
            for name, data in sample.items()
            if name in {*USED_MEMBERS, "__key__", "__url__"}
        }
        for shard, path in enumerate(paths)
        for place, sample in enumerate(wds.tarfile_to_samples()([{"url": path}]))
    }
    assert len(expected) == 15
    monkeypatch.setattr(sources, "MAX_OPEN_SAMPLES", 7)
    reader = ShardReader(paths, USED_MEMBERS.__contains__)
    for shard, place in [*expected, *reversed(expected)]:
        assert reader.read(shard, place) == expected[shard, place]
        assert len(reader.open) <= 2
    few = ShardReader(paths, "txt".__eq__).read(1, 2)
    assert few == {name: expected[1, 2][name] for name in ("__key__", "__url__", "txt")}


def test_what_a_damaged_shard_costs(tmp_path):
    paths = shards(tmp_path)
    with open(paths[0], "rb") as file:
        at = next(member.offset for member in read_headers(file) if member.name == f"{uid(3)}.npz")
    os.truncate(paths[0], at)
    os.remove(paths[1])
    reader = ShardReader([*paths, str(tmp_path / "sub")], USED_MEMBERS.__contains__)
    (tmp_path / "sub").write_bytes(os.urandom(5000))
    assert ["npz" in reader.read(0, place) for place in range(4)] == [
        True,
        True,
        True,
        False,
    ]  # cut before its npz
    assert reason(reader, 0, 4) == sources.UNREADABLE
    assert [reason(reader, 1, place) for place in range(5)] == [sources.UNREADABLE] * 5
    assert reader.read(2, 4)["__key__"] == uid(14)
    assert reason(reader, 2, 5) == "not in its shard"
    assert reason(reader, 3, 0) == sources.UNREADABLE
    os.truncate(paths[2], 1000)  # while it is open
    assert reason(reader, 2, 4) == sources.UNREADABLE
    counts = count_samples([*paths, str(tmp_path / "sub")])
    assert [size for size, _ in counts] == [4, 0, 0, 0] and all(fault for _, fault in counts)


def test_sizes_json_tells_the_sizes_in_each_folder(tmp_path):
    for folder in ("a", "b", "c"):
        write_shard(
            tmp_path / folder / "0.tar", [(uid(seed), reinforced_sample(seed)) for seed in range(2)]
        )
    (tmp_path / "a" / "sizes.json").write_text('{"0.tar": 7}')
    (tmp_path / "b" / "sizes.json").write_text('{"1.tar": 7}')
    paths = [str(tmp_path / folder / "0.tar") for folder in ("a", "b", "c")]
    folders = [str(tmp_path / folder) for folder in ("a", "b", "c")]
    assert [read_sizes(folder) for folder in folders] == [{"0.tar": 7}, {"1.tar": 7}, {}]
    assert count_samples(paths[1:]) == [(2, ""), (2, "")]
    (tmp_path / "c" / "sizes.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"c/sizes\.json: expected an object"):
        read_sizes(folders[2])
