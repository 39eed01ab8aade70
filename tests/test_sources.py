"""Any sample by its place: what WebDataset reads in order, and a shard that is damaged costs what
can't be read."""

import io
import json
import os
import tarfile

import join_shards
import pytest
import reinforce
import torch
import webdataset as wds
from lib.report import printable
from lib.samples import ShardSamples
from shards import (
    AUGMENTATION,
    read_samples,
    reinforced_sample,
    stored_embeddings,
    uid,
    write_reinforced_shards,
    write_shard,
)
from torch.nn.functional import normalize
from verify_shards import ShardVerifier

import hf_dataset_example as example
from dr import sources
from dr.sample import USED_MEMBERS, BadSample, ReinforcedProcessor
from dr.sampling import RandomChoice
from dr.sources import ShardReader, count_samples, stream
from dr.tar import PLAIN_MEMBERS, read_headers, read_sizes
from dr.transforms import compose_from_config, split_for_device


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


# --- training and the commands read a shard in one way --------------------------------------------
def members_of(seed, about=None):
    """A complete sample, which every command can use."""
    rows = torch.randn(8, 12, generator=torch.Generator().manual_seed(seed)).split([8, 4], dim=1)
    unit = torch.cat([normalize(block, dim=1) for block in rows], dim=1)
    about = json.dumps({"uid": uid(seed)} if about is None else about).encode()
    return {**reinforced_sample(seed), "npz": stored_embeddings(unit[:4], unit[4:]), "json": about}


def plain(*seeds):
    return [(uid(seed), members_of(seed)) for seed in seeds]


def entries(samples):
    """Names and contents of members, or of what a tar can hold besides."""
    return [(f"{key}.{name}", data) for key, found in samples for name, data in found.items()]


def renamed(change, *seeds):
    return [(change(name), data) for name, data in entries(plain(*seeds))]


def link(name, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, f"{uid(0)}.jpg"
    return info


def without(name, sample):
    key, found = sample
    return key, {other: data for other, data in found.items() if other != name}


A, B, C = (uid(seed) for seed in range(3))
ALL = [A, B, C]
one, two, three = plain(0, 1, 2)
torn = [without("npz", two), (B, {"npz": two[1]["npz"]})]
dotted = [(f"photo.{seed}", members_of(seed)) for seed in range(5)]
# Each layout: members; what training keeps; what the join and reinforce.py keep, by uid, where it
# is something else; and the reason that they count for the others.
LAYOUTS = {
    "plain": (entries(plain(0, 1, 2)), ALL, None, ""),
    "packed from a folder": (renamed("./{}".format, 0, 1, 2), ALL, None, ""),
    "keys that are running numbers": (
        entries([(f"{n:09d}", members_of(n)) for n in range(3)]),
        ALL,
        None,
        "",
    ),
    "uids that are numbers": (
        entries([(f"{n}", members_of(n, {"uid": 17 + n})) for n in range(3)]),
        ["17", "18", "19"],
        None,
        "",
    ),
    "no uid in the json": (
        entries([("a", members_of(0, {})), ("b", members_of(1, [7])), ("c", members_of(2, "x"))]),
        ["a", "b", "c"],
        None,
        "",
    ),
    "no json": (entries(without("json", s) for s in plain(0, 1, 2)), ALL, None, ""),
    "long keys": (renamed(lambda name: name[:32] + "x" * 90 + name[32:], 0, 1, 2), ALL, None, ""),
    "keys that differ in case": (
        entries([("ab", members_of(0)), ("AB", members_of(1)), ("Ab", members_of(2))]),
        ALL,
        None,
        "",
    ),
    "upper-case extensions": (
        renamed(lambda name: name[:32] + name[32:].upper(), 0, 1, 2),
        ALL,
        None,
        "",
    ),
    "other members and files": (
        [
            *entries([(A, {**one[1], "cls": b"1", "bmp": b"x", "face.json": b"{}"}), two, three]),
            ("README", b"x"),
            (".DS_Store", b"x"),
            ("__meta__/a.jpg", b"x"),
            ("d/.hidden", b"x"),
        ],
        ALL,
        None,
        "",
    ),
    "folders among the members": (
        [*entries([one]), link("folder", tarfile.DIRTYPE), *entries([two, three])],
        ALL,
        None,
        "",
    ),
    "a hard link for an image": (
        [
            *entries([one, without("jpg", two)]),
            link(f"{B}.jpg", tarfile.LNKTYPE),
            *entries([three]),
        ],
        [A, C],
        None,
        "a member that is not a plain file",
    ),
    "a sample without its image": (
        entries([one, without("jpg", two), three]),
        [A, C],
        None,
        "no image",
    ),
    "keys with dots": (
        entries([one, *dotted, three]),
        [A, C],
        None,
        "no image, no caption, no reinforcement",
    ),
    "a photo and its copies with dots": (
        entries([one, ("photo", members_of(1)), *dotted[2:], three]),
        ALL,
        None,
        "",
    ),
    "members in two places": (
        entries([torn[0], one, torn[1], three]),
        [A, C],
        [A, B, C],  # the join puts them together; to reinforce, image and caption are enough
        "",
    ),
    "a uid that is null": (
        entries([one, (B, members_of(1, {"uid": None})), three]),
        [A, B, C],
        [A, C],
        "a uid that is null",
    ),
    "names with folders": (
        renamed("pictures/{}".format, 0, 1, 2),
        ALL,
        [],
        "a member name with a folder or control character",
    ),
    "no sample": ([], [], None, ""),
}


def pack(path, found, tar_format):
    with tarfile.open(path, "w", format=tar_format) as tar:
        for entry in found:
            info = entry if isinstance(entry, tarfile.TarInfo) else tarfile.TarInfo(entry[0])
            data = b"" if info is entry else entry[1]
            info.size = len(data)
            info.mtime = 1.5 if tar_format == tarfile.PAX_FORMAT else 1  # a header of its own
            tar.addfile(info, io.BytesIO(data))


class Kept:
    """The uids that training and each command keep of a shard."""

    def __init__(self, shard, folder):
        self.shard, self.folder = str(shard), folder
        compose, statistics = split_for_device(compose_from_config(AUGMENTATION))
        self.processor = ReinforcedProcessor(compose, statistics, None, 12)
        self.config = folder / "config.json"
        config = {"model_name": "a,b", "pretrained": "a,b", "num_samples": 4}
        self.config.write_text(
            json.dumps({**config, "reinforce": {"image_augmentation": AUGMENTATION}})
        )
        self.uids = {}  # by key
        with open(shard, "rb") as file:
            for key, found in example.read_samples(file, "json".__eq__):
                about = json.loads(found.get("json", b"{}"))
                about = about.get("uid") if isinstance(about, dict) else None
                self.uids[key] = str(about or key.removeprefix("./"))

    def is_good(self, row):
        try:
            return self.processor.augment(
                self.processor.select(row, RandomChoice()), RandomChoice()
            )
        except BadSample:
            return None

    def streamed(self):
        items = list(stream([{"url": self.shard}], USED_MEMBERS.__contains__))
        assert not any(item.skipped for item in items)
        return [item.sample["__key__"] for item in items if self.is_good(item.sample)]

    def by_place(self):
        ((count, fault),) = count_samples([self.shard])
        assert not fault
        reader = ShardReader([self.shard], USED_MEMBERS.__contains__)
        rows = [reader.read(0, place) for place in range(count)]
        return [row["__key__"] for row in rows if self.is_good(row)]

    def verified(self):
        found = ShardVerifier(AUGMENTATION, [8, 4], 0, None, None, 99)((self.shard, None))
        assert found["fault"] == ("holds no sample" if not found["samples"] else None)
        good = [sample.uid for sample in sorted(found["good"], key=lambda s: s.position)]
        assert len(good) == found["read"] - found["bad"].total()
        return good

    def shown(self, capsys):
        options = ["--config", str(self.config), "--teacher-dimension", "8", "4", "--tries", "1"]
        keys = []
        for place in range(10):
            try:
                example.main(["--shard", self.shard, "--index", str(place), *options])
                title = capsys.readouterr().out.partition("\n")[0].rpartition(": ")[2]
                keys += [key for key in self.uids if printable(key, 80) == title]
            except SystemExit:
                capsys.readouterr()
        return keys

    def joined(self):
        output = self.folder / "joined"
        try:
            join_shards.main(["--source", self.shard, "--output", str(output), "--workers", "1"])
        except SystemExit as error:
            return [], str(error) + (output / "join_report.json").read_text()
        made = read_samples(output / "0.tar")
        return list(made), (output / "join_report.json").read_text()

    def reinforced(self):
        captions = {uid: {"syn_text": ["a"]} for uid in ("photo", *self.uids.values())}
        compose = compose_from_config(
            {**AUGMENTATION, "normalize": {"enable": False, "mean": [0.5], "std": [0.5]}}
        )
        augment = reinforce.Augmenter(compose, [compose], 2, captions, 0)
        samples = list(ShardSamples(self.shard, PLAIN_MEMBERS, augment))
        reasons = " ".join(sample["skipped"] for sample in samples if "skipped" in sample)
        return [sample["uid"] for sample in samples if "skipped" not in sample], reasons


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids="ugp"
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_and_all_commands_keep_the_same_samples(layout, tar_format, tmp_path, capsys):
    found, expected, matched, reason = LAYOUTS[layout]
    if layout == "long keys" and tar_format == tarfile.USTAR_FORMAT:
        pytest.skip("ustar has no such names")
    pack(tmp_path / "0.tar", found, tar_format)
    kept = Kept(tmp_path / "0.tar", tmp_path)
    for keys in (kept.streamed(), kept.by_place(), kept.verified(), kept.shown(capsys)):
        assert [kept.uids[key] for key in keys] == expected
    joined, told = kept.joined()
    reinforced, _ = kept.reinforced()
    assert sorted(joined) == sorted(expected if matched is None else matched)
    assert sorted(reinforced) == sorted(joined)
    assert reason in told
