"""Shards with an index: the same samples with fewer bytes and reads, whatever the index says."""

import io
import json
import logging
import os
import random
import tarfile
from pathlib import Path

import index_shards
import pytest
import torch
from lib.tar_writer import has_index, index_path, write_index, write_tar
from shards import (
    AUGMENTATION,
    dfndr_sample,
    reinforced_sample,
    stored_embeddings,
    uid,
    write_shard,
)

from dr.index import ShardIndex
from dr.sample import BadSample, ReinforcedProcessor
from dr.sampling import ScheduledChoice
from dr.sources import ShardReader, count_samples
from dr.transforms import compose_from_config, split_for_device

KINDS = ("npz", "safetensors", "pth.gz")


def processor(**options):
    return ReinforcedProcessor(*split_for_device(compose_from_config(AUGMENTATION)), **options)


def contents(path, passes=(0,), made=None):
    """What training takes of each sample of a shard, or why it takes none."""
    made = made or processor()
    reader, found = ShardReader([str(path)], made.wanted.__contains__), []
    for place in range(count_samples([str(path)])[0][0]):
        for pass_ in passes:
            choice = ScheduledChoice(0, pass_)
            try:
                selected = made.read_rows(made.select(reader.read(0, place), choice), choice)
                found.append({
                    name: value.tolist() if isinstance(value, torch.Tensor) else value
                    for name, value in selected.items()
                })  # fmt: skip
            except BadSample as error:
                found.append(str(error))
    return found


def samples(kind, number=5):
    lists = {"syn_text_a": 2, "syn_text_b": 3}
    for seed in range(number):
        yield uid(seed), reinforced_sample(seed, width=12, kind=kind)
        yield uid(100 + seed), dfndr_sample(seed, lists, 2, kind=kind)


def broken_samples():
    """One that can be used, one for each thing that can be wrong with embeddings, and one."""
    good = reinforced_sample(0, kind="npz")
    without = {name: data for name, data in good.items() if name != "npz"}
    rows = torch.ones(4, 12)
    for seed, change in enumerate((
        {"npz": good["npz"]},
        {"npz": good["npz"][:-200]},
        {"npz": b"hello"},
        {"npz": stored_embeddings(rows[:3], rows)},
        {"npz": stored_embeddings(rows, rows[:2])},
        {"npz": stored_embeddings(rows * float("nan"), rows)},
        {"npz": stored_embeddings(rows.int(), rows)},
        {"npz": stored_embeddings(rows[0], rows)},
        {"npz": stored_embeddings(rows, rows, kind="safetensors")},
        {"safetensors": stored_embeddings(rows, rows)},
        {"safetensors": stored_embeddings(rows, rows, kind="safetensors")[:-1]},
        {},
        {"bmp": b"x", "npz": good["npz"]},
    )):  # fmt: skip
        yield uid(seed), without | change
    yield uid(99), {"txt": b"no image", "bmp": b"x", "face.json": b"{}"}


@pytest.mark.parametrize("kind", [*KINDS, "broken"])
def test_a_shard_with_an_index_gives_the_same_samples(kind, tmp_path, caplog):
    made = list(broken_samples() if kind == "broken" else samples(kind))
    path = write_shard(tmp_path / "0.tar", made)
    expected = contents(path, passes=range(4))
    assert "0.tar.index is missing. The shard is read without it" in caplog.text
    write_index(path)
    caplog.clear()
    assert contents(path, passes=range(4)) == expected and not caplog.text
    assert count_samples([str(path)]) == [(len(made), "")]
    assert sum(isinstance(sample, str) for sample in expected) == (48 if kind == "broken" else 0)


def test_one_caption_of_chosen_lists_is_read_by_index_too(tmp_path):
    path = write_shard(tmp_path / "0.tar", samples("npz"))
    ways = [processor(mix_ratio=1.0), processor(mix_ratio=0.0), processor(width=12)]
    expected = [contents(path, range(4), way) for way in ways]
    write_index(path)
    assert [contents(path, range(4), way) for way in ways] == expected


# --- wrong indices --------------------------------------------------------------------------------
def change_number(content, rng):
    """Another number in one place of an index, or two samples changed over."""
    sample = rng.choice(content["samples"])
    what = rng.randrange(5)
    if what == 0:
        one, other = rng.sample(range(len(content["samples"])), 2)
        rows = content["samples"]
        rows[one], rows[other] = rows[other], rows[one]
    elif what == 1:
        at = rng.randrange(2, len(sample))
        sample[at] += rng.choice([-512, -1, 1, 512])
    elif what == 2:
        sample[1] = rng.randrange(len(content["layouts"]))
    elif what == 3:
        sample[0] = rng.choice([uid(7), uid(0), ""])
    else:
        layout = rng.choice([layout for layout in content["layouts"] if layout["arrays"]])
        array = rng.choice(list(layout["arrays"].values()))
        at = rng.randrange(6)
        array[at] = rng.choice(["F32", "F16", "BF16"]) if at == 3 else rng.choice([0, 12, 48, 192])


@pytest.mark.parametrize("seed", range(25))
def test_a_wrong_index_never_gives_wrong_data(seed, tmp_path, caplog):
    rng = random.Random(seed)
    path = write_shard(tmp_path / "0.tar", samples(rng.choice(KINDS[:2])))
    expected = contents(path, passes=range(2))
    write_index(path)
    content = json.loads(index_path(path).read_text())
    for _ in range(rng.randint(1, 2)):
        change_number(content, rng)
    index_path(path).write_text(json.dumps(content))
    caplog.clear()
    assert contents(path, passes=range(2)) == expected
    assert caplog.text.count("shard is read without it") <= 1


def rewrite(index, **fields):
    index.write_text(json.dumps({**json.loads(index.read_text()), **fields}))


def leave_out(index, name):
    (layout, *others) = json.loads(index.read_text())["layouts"]
    del layout["arrays"][name]
    rewrite(index, layouts=[layout, *others])


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path, index: rewrite(index, header=512.0), "is damaged"),
        (lambda path, index: rewrite(index, header=0), "is damaged"),
        (lambda path, index: leave_out(index, "image_emb"), "is damaged"),
        (lambda path, index: (index.unlink(), index.mkdir()), "can't be read: IsADirectoryError"),
        (lambda path, index: index.unlink(), "is missing"),
        (lambda path, index: os.utime(path, (1, 1)), "is stale"),
        (lambda path, index: path.write_bytes(path.read_bytes() + bytes(512)), "is stale"),
        (lambda path, index: index.write_bytes(index.read_bytes()[:-10]), "is damaged"),
        (lambda path, index: index.write_bytes(os.urandom(1000)), "is damaged"),
        (lambda path, index: index.write_bytes(b"[" * 10**6), "is damaged"),
        (lambda path, index: index.write_bytes(bytes(2**21)), "is damaged: it is too large"),
        (lambda path, index: index.write_text('{"version": 9}'), "is of version 9, expected 1"),
    ],
    ids=[
        "float",
        "header",
        "array",
        "folder",
        "missing",
        "time",
        "size",
        "cut",
        "rubbish",
        "nested",
        "large",
        "version",
    ],
)
def test_an_index_that_cannot_be_used_costs_one_line(damage, fault, tmp_path, caplog):
    path = write_shard(tmp_path / "0.tar", samples("npz"))
    expected = contents(path)
    write_index(path)
    damage(path, index_path(path))
    caplog.clear()
    caplog.set_level(logging.INFO)
    assert contents(path) == expected
    assert len(caplog.records) == 1 and f"0.tar.index {fault}" in caplog.text


def test_embeddings_that_begin_with_something_else_cost_their_samples_only(tmp_path):
    members = reinforced_sample(0)
    path = write_shard(tmp_path / "0.tar", [(uid(0), {**members, "npz": b"x" + members["npz"]})])
    expected = contents(path)
    write_index(path)
    assert contents(path) == expected


def test_the_index_of_another_shard_gives_no_wrong_data(tmp_path):
    """Of the same size and time, with other samples."""
    first, second = (
        write_shard(tmp_path / f"{n}.tar", [(uid(seed), reinforced_sample(0)) for seed in seeds])
        for n, seeds in enumerate((range(4), range(4, 8)))
    )
    for path in (first, second):
        os.utime(path, (1, 1))
        write_index(path)
    expected = contents(second)
    index_path(first).rename(index_path(second))
    assert contents(second) == expected and expected[0]["__key__"] == uid(4)


def test_a_shard_that_is_cut_while_it_is_read_costs_what_is_cut(tmp_path):
    path = write_shard(tmp_path / "0.tar", samples("npz"))
    write_index(path)
    made = processor()
    reader, choice = ShardReader([str(path)], made.wanted.__contains__), ScheduledChoice(0, 0)
    selected = made.select(reader.read(0, 9), choice)
    os.truncate(path, 2000)
    with pytest.raises(BadSample, match="cut off"):
        made.read_rows(selected, choice)
    with pytest.raises(BadSample, match="cut off"):
        reader.read(0, 8)


# --- what it saves --------------------------------------------------------------------------------
def input_of_process():
    lines = Path("/proc/self/io").read_text().split("\n")
    return tuple(int(line.split()[1]) for line in (lines[0], lines[2]))  # bytes, reads


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux only")
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_bytes_and_reads_of_a_sample_at_the_proportions_of_datacompdr(kind, tmp_path):
    """30 augmentations, 5 synthetic captions, two teachers, and an image of 68 KB."""
    shape = {"augmentations": 30, "captions": 5, "width": 1536, "kind": kind}
    one = reinforced_sample(0, **shape)
    one["jpg"] += bytes(68_000 - len(one["jpg"]))
    path = tmp_path / "0.tar"
    with open(path, "wb") as file:
        write_tar(file, [(uid(seed), one) for seed in range(40)])
    write_index(path)
    assert index_path(path).stat().st_size < 0.002 * path.stat().st_size
    made = processor()
    reader, choice = ShardReader([str(path)], made.wanted.__contains__), ScheduledChoice(0, 0)
    costs = [input_of_process()]
    for place in range(40):
        made.read_rows(made.select(reader.read(0, place), choice), choice)
        costs.append(input_of_process())
    opening, *each = [
        tuple(after - before for after, before in zip(*pair, strict=True))
        for pair in zip(costs[1:], costs, strict=False)
    ]
    overhead = [costs[0][0] and 200, 1]  # reading /proc/self/io is one read itself
    assert all(size <= 100_000 + overhead[0] and reads <= 6 + overhead[1] for size, reads in each)
    assert opening[1] <= 6 + overhead[1] + 1  # the index


# --- the commands ---------------------------------------------------------------------------------
def test_index_shards_writes_what_is_missing_and_reports_what_cannot_have_one(tmp_path, capsys):
    for name in ("a/0", "a/1", "b/2"):
        write_shard(tmp_path / f"{name}.tar", samples("npz", 1))
    index_shards.main([str(tmp_path / "a"), str(tmp_path / "b/2.tar"), "--workers", "1"])
    assert "indices written              3" in " ".join(capsys.readouterr().out.split("\n"))
    paths = sorted(tmp_path.rglob("*.tar"))
    assert len(paths) == 3 and all(map(has_index, paths))
    before = index_path(paths[0]).stat().st_mtime_ns
    os.utime(paths[1], (1, 1))
    os.truncate(paths[2], 3000)
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        info = tarfile.TarInfo("a.txt")
        info.type, info.linkname = tarfile.SYMTYPE, "b.txt"
        tar.addfile(info)
        tar.addfile(tarfile.TarInfo("b.txt"))
    with pytest.raises(SystemExit, match="2 of 4 shards have no index"):
        index_shards.main([str(tmp_path), "--workers", "2"])
    told = capsys.readouterr()
    assert "links.tar: no index:" in told.err and "is not stored as a plain file" in told.err
    assert "2.tar: no index:" in told.err and "cut off inside a member" in told.err
    assert index_path(paths[0]).stat().st_mtime_ns == before and has_index(paths[1])
    assert not index_path(paths[2]).exists()
    with pytest.raises(SystemExit, match="no shards"):
        index_shards.main([str(tmp_path / "a" / "none.tar")])


def test_headers_with_extensions_have_an_index(tmp_path):
    """As WebDataset's writer makes them, with times that are not whole seconds."""
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, members in samples("npz", 2):
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mtime = len(data), 1.5
                tar.addfile(info, io.BytesIO(data))
    expected = contents(path)
    write_index(path)
    assert len(expected) == 4 and contents(path) == expected
    assert ShardIndex(index_path(path).read_bytes(), path.stat().st_size, None).header == 1536
