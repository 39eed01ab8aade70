"""The join writes each complete sample once, the same bytes every time, and no wrong shard."""

import errno
import hashlib
import io
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import join_shards
import numpy as np
import pytest
import torch
import webdataset
from lib import tar_writer
from lib.tar_writer import has_index, index_path
from shards import read_shard, read_tars, reinforced_sample, stored_embeddings, write_shard

from dr.index import make_index
from dr.sample import REINFORCED_MEMBERS, embeddings
from dr.tar import parse_plain_header

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "join_shards.py"
A, B, C, D = (digit * 32 for digit in "abcd")


def image_of(uid):
    return b"picture of " + uid.encode() + bytes(200_000)  # longer than the writer's buffer


def sha256_of(uid):
    return hashlib.sha256(image_of(uid)).hexdigest()


def caption(uid):
    return uid, {
        "url.txt": b"https://example.org/" + uid.encode(),
        "txt": b"caption of " + uid.encode(),
    }


def image(number, uid, **about):
    """A sample as img2dataset writes it."""
    key = f"{number:09d}"
    about = {"uid": uid, "key": key, "status": "success", "sha256": sha256_of(uid), **about}
    return key, {
        "jpg": image_of(uid),
        "json": json.dumps(about).encode(),
        "txt": b"caption of " + uid.encode(),
    }


def reinforcement(uid, embeddings="npz", **about):
    return uid, {
        "url.txt": b"https://example.org/" + uid.encode(),
        "syn.json": json.dumps({"syn_text": [f"said of {uid}"]}).encode(),
        "paug.json": json.dumps({"param_aug": [[1]]}).encode(),
        embeddings: b"embeddings of " + uid.encode() + bytes(200_000),
        "json": json.dumps({"uid": uid, "sha256": sha256_of(uid), **about}).encode(),
    }


def without(lost, sample):
    key, members = sample
    return key, {extension: data for extension, data in members.items() if extension != lost}


class Folders:
    """Captions, images and reinforcements of some shards, and where they are joined."""

    def __init__(self, folder):
        self.captions, self.images, self.reinforcements = (
            folder / name for name in ("captions", "images", "dr")
        )
        self.output = folder / "joined"

    def write(
        self, name="00000000.tar", uids=(A, B, C), captions=None, images=None, reinforcements=None
    ):
        write_shard(self.captions / name, captions or [caption(uid) for uid in uids])
        write_shard(self.images / name, images or [image(i, uid) for i, uid in enumerate(uids)])
        write_shard(
            self.reinforcements / name, reinforcements or [reinforcement(uid) for uid in uids]
        )

    def arguments(self, *more, sources=None, output=None):
        sources = sources or (self.captions, self.images, self.reinforcements)
        arguments = [argument for source in sources for argument in ("--source", source)]
        return [
            str(argument)
            for argument in (*arguments, "--output", output or self.output, "--workers", 1, *more)
        ]

    def join(self, *more, output=None, **keywords):
        """Join in this process; the report."""
        join_shards.main(self.arguments(*more, output=output, **keywords))
        return self.report(output)

    def join_failing(self, *more, **keywords):
        """Join where a shard must fail; the report."""
        with pytest.raises(SystemExit, match="failed"):
            self.join(*more, **keywords)
        return self.report()

    def report(self, output=None):
        return json.loads(((output or self.output) / "join_report.json").read_text())

    def joined(self, name="00000000.tar"):
        """{uid: {extension: bytes}} of a joined shard, in order; its samples must be contiguous."""
        samples, last = {}, None
        for member, data in read_shard(self.output / name):
            uid, _, extension = member.partition(".")
            assert uid == last or uid not in samples, f"{uid} is torn apart"
            assert extension not in samples.setdefault(uid, {}), f"{member} twice"
            samples[uid][extension], last = data, uid
        return samples


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path)


def partials(folder):
    return [
        path for path in folder.rglob("*") if ".tar." in path.name and path.suffix == ".partial"
    ]


# what is joined


def test_sample_is_the_union_of_its_members_under_its_uid(folders):
    folders.write()
    report = folders.join()
    for uid, members in folders.joined().items():
        expected = {**reinforcement(uid)[1], **image(0, uid)[1], **caption(uid)[1]}
        assert {**members, "json": b""} == {**expected, "json": b""}
        assert (
            json.loads(members["json"])["status"] == "success"
        )  # img2dataset's, from the earlier source
    assert report["samples"] == 3 and report["left_out"] == {} and report["shards"] == {"joined": 1}


def test_order_is_that_of_the_reinforcements(folders):
    folders.write(
        captions=[caption(uid) for uid in (A, B, C)],
        images=[image(i, uid) for i, uid in enumerate((C, A, B))],
        reinforcements=[reinforcement(uid) for uid in (B, C, A)],
    )
    folders.join()
    assert list(folders.joined()) == [B, C, A]


def test_order_is_that_of_the_first_source_without_reinforcements(folders):
    folders.write(captions=[caption(uid) for uid in (B, C, A)])
    folders.join("--require", "image,caption", sources=(folders.captions, folders.images))
    assert list(folders.joined()) == [B, C, A]


def test_torn_samples_of_a_source_become_contiguous(folders):
    parts = [
        (uid, {extension: data})
        for extension in reinforcement(A)[1]
        for uid, data in ((uid, reinforcement(uid)[1][extension]) for uid in (A, B))
    ]
    folders.write(uids=(A, B), reinforcements=parts)
    folders.join()
    assert list(folders.joined()) == [A, B]


def test_bf16_embeddings_and_every_image_format_make_a_complete_sample(folders):
    images = [
        (uid, {extension: image_of(uid)})
        for uid, extension in ((A, "png"), (B, "WEBP"), (C, "jpeg"))
    ]
    folders.write(images=images, reinforcements=[reinforcement(uid, "pth.gz") for uid in (A, B, C)])
    assert folders.join()["samples"] == 3
    assert "webp" in folders.joined()[B]


def test_missing_and_extra_samples_are_counted_by_reason(folders):
    folders.write(
        captions=[caption(uid) for uid in (A, B)],
        images=[
            image(0, A),
            without("txt", image(1, C)),
            without("txt", image(2, D, status="failed_to_download")),
        ],
        reinforcements=[reinforcement(uid) for uid in (A, B, C)],
    )
    report = folders.join()
    assert list(folders.joined()) == [A]
    assert report["left_out"] == {
        "no image": 1,
        "no caption": 1,
        "no image, no caption, no reinforcement": 1,
    }


@pytest.mark.parametrize("lost", ["syn.json", "paug.json", "npz"])
def test_half_a_reinforcement_is_none(folders, lost):
    folders.write(uids=(A, B), reinforcements=[without(lost, reinforcement(A)), reinforcement(B)])
    assert folders.join()["left_out"] == {"no reinforcement": 1}


def test_required_parts_are_the_members_that_training_requires():
    for sample in map(set, itertools.product(*REINFORCED_MEMBERS.values())):
        assert join_shards.find_parts(sample) == set(join_shards.HOW_TO_GET)
        for lost in sample:
            assert len(join_shards.find_parts(sample - {lost})) == 2


def test_keep_incomplete_keeps_every_sample_and_require_the_named_part(folders):
    folders.write(
        captions=[caption(A), caption(B)],
        images=[without("txt", image(0, C))],
        reinforcements=[reinforcement(B)],
    )
    folders.join("--keep-incomplete")
    assert list(folders.joined()) == [B, A, C]
    folders.join("--require", "caption")
    assert list(folders.joined()) == [B, A]


def test_equal_duplicates_are_written_once_and_differing_ones_counted(folders):
    other = {**image(0, A)[1], "txt": b"another caption"}
    folders.write(uids=(A, B), images=[(image(0, A)[0], other), image(1, B)])
    report = folders.join()
    assert report["differing"] == {"txt": 1, "json": 2}  # url.txt and B's txt are equal
    assert folders.joined()[A]["txt"] == caption(A)[1]["txt"]


def test_sample_that_a_source_holds_twice_is_kept_if_equal_and_left_out_if_not(folders):
    folders.write(
        uids=(A, B),
        reinforcements=[
            reinforcement(A),
            reinforcement(B),
            reinforcement(A),
            (B, {"npz": b"other"}),
        ],
    )
    report = folders.join()
    assert list(folders.joined()) == [A]
    assert report["left_out"] == {"two different members of one name in one source": 1}


def test_uid_under_two_numbers_is_left_out(folders):
    folders.write(uids=(A, B), images=[image(0, A), image(1, B), image(2, A)])
    assert folders.join()["left_out"] == {"a uid twice in one source": 1}


def test_verify_hash_leaves_out_changed_images(folders):
    folders.write(images=[image(0, A), image(1, B, sha256="0" * 64), image(2, C, sha256=None)])
    assert folders.join()["samples"] == 3
    report = folders.join("--verify-hash")
    assert list(folders.joined()) == [A, C]
    assert report["left_out"] == {"a changed image (sha256)": 1} and report["unverified"] == 1


def test_patterns_and_folders_of_shards(folders):
    for name in ("00/0.tar", "00/1.tar", "01/0.tar"):
        folders.write(name)
    folders.join()
    assert list(read_tars(folders.output)) == ["00/0.tar", "00/1.tar", "01/0.tar"]
    assert json.loads((folders.output / "00" / "sizes.json").read_text()) == {
        "0.tar": 3,
        "1.tar": 3,
    }
    whole = read_tars(folders.output)
    shutil.rmtree(folders.output)
    folders.join("--shards", "00/{0..1}.tar")
    assert list(read_tars(folders.output)) == ["00/0.tar", "00/1.tar"]
    shutil.rmtree(folders.output)
    pattern = str(folders.reinforcements) + "/{00..01}/0.tar"
    folders.join(sources=(folders.captions, folders.images, pattern))
    assert read_tars(folders.output) == {name: whole[name] for name in ("00/0.tar", "01/0.tar")}


# images of shards that are not aligned with the others


def unaligned(folders, name, samples):
    return write_shard(folders.images.parent / "elsewhere" / name, samples)


def join_unaligned(folders, *more, **keywords):
    elsewhere = folders.images.parent / "elsewhere"
    sources = (folders.captions, folders.reinforcements)
    return folders.join("--unaligned-source", elsewhere, *more, sources=sources, **keywords)


def index_of(folder):
    (path,) = folder.glob(".joined/unaligned-*.sqlite")
    return path


def test_images_of_unaligned_shards_join_as_if_they_were_aligned(folders, tmp_path):
    for name, uids in (("00000000.tar", (A, B)), ("00000001.tar", (C, D))):
        folders.write(name, uids=uids)
    folders.join(output=tmp_path / "aligned")
    unaligned(folders, "x/part-7.tar", [image(1, D), image(2, "e" * 32), image(0, A)])
    unaligned(folders, "x/part-8.tar", [image(0, C)])
    with tarfile.open(unaligned(folders, "y.tar", []), "w", format=tarfile.PAX_FORMAT) as tar:
        for extension, data in image(1, B)[1].items():
            info, data = member(f"./1.{extension}", data=data, mtime=1.5)
            tar.addfile(info, io.BytesIO(data))
    # in this place, so that the images' json comes before the reinforcements'
    sources = ["--source", folders.captions, "--unaligned-source", tmp_path / "elsewhere"]
    sources += ["--source", folders.reinforcements, "--output", folders.output]
    join_shards.main([*map(str, sources), "--workers", "2"])
    assert len(read_tars(folders.output)) == 2
    assert read_tars(folders.output) == read_tars(tmp_path / "aligned")


def test_unaligned_images_need_no_more_open_files_and_no_different_hashes(
    folders, tmp_path, monkeypatch
):
    folders.write()
    for number, uid in enumerate((C, A, D, B)):
        unaligned(folders, f"{number}.tar", [image(number, uid)])
    join_unaligned(folders)
    monkeypatch.setattr("lib.shards.MAX_OPEN_FILES", 1)
    monkeypatch.setattr("lib.index.hash_uid", lambda uid: 1)
    join_unaligned(folders, output=tmp_path / "again")
    assert list(folders.joined()) == [A, B, C]
    assert read_tars(tmp_path / "again") == read_tars(folders.output)


def test_uid_in_two_unaligned_shards_is_left_out_and_failed_downloads_count_as_missing(folders):
    folders.write()
    failed = without("jpg", image(1, B, status="failed_to_download"))
    unaligned(folders, "0.tar", [image(0, A), failed])
    unaligned(folders, "1.tar", [image(0, A), image(1, C)])
    assert join_unaligned(folders)["left_out"] == {"a uid twice in one source": 1, "no image": 1}
    assert list(folders.joined()) == [C]


def test_index_is_kept_until_a_shard_changes(folders):
    folders.write()
    unaligned(folders, "0.tar", [image(0, A)])
    assert join_unaligned(folders)["samples"] == 1
    first = index_of(folders.output).stat()
    assert join_unaligned(folders)["shards"] == {"already there": 1}
    assert index_of(folders.output).stat() == first
    unaligned(folders, "1.tar", [image(0, B)])
    assert join_unaligned(folders)["shards"] == {"joined": 1}
    assert list(folders.joined()) == [A, B]
    index_of(folders.output).write_bytes(b"no index")
    index_of(folders.output).with_name(
        f".{index_of(folders.output).name}.elsewhere-1.partial"
    ).touch()  # of a killed run
    assert join_unaligned(folders)["samples"] == 2
    assert not list(folders.output.glob(".joined/.*.partial"))


def test_damaged_unaligned_shard_is_told_and_its_samples_come_when_it_is_mended(folders, capsys):
    folders.write()
    unaligned(folders, "0.tar", [image(0, A)])
    shard = unaligned(folders, "1.tar", [image(0, B)])
    overwrite(shard, second_member(shard), b"rubbish" * 70)  # of the same size
    for _ in range(2):  # whether the index is new or not
        with pytest.raises(SystemExit, match="1 unaligned shards can't be read"):
            join_unaligned(folders)
        assert "joining without the unaligned 1.tar" in capsys.readouterr().err
    assert folders.report()["left_out"] == {"no image": 2}
    unaligned(folders, "1.tar", [image(0, B)])
    join_unaligned(folders)
    assert list(folders.joined()) == [A, B]


def test_two_patterns_of_one_folder_are_two_unaligned_sources(folders):
    folders.write()
    for number, uid in enumerate((A, B, C)):
        unaligned(folders, f"{number}.tar", [image(number, uid)])
    elsewhere = folders.images.parent / "elsewhere"
    patterns = [f"{elsewhere}/{{0,1}}.tar", f"{elsewhere}/{{2..2}}.tar"]
    options = [option for pattern in patterns for option in ("--unaligned-source", pattern)]
    folders.join(*options, sources=(folders.captions, folders.reinforcements))
    assert list(folders.joined()) == [A, B, C]


def test_index_can_be_built_beforehand(folders):
    folders.write()
    unaligned(folders, "0.tar", [image(0, A)])
    elsewhere = ("--unaligned-source", folders.images.parent / "elsewhere", "--index-only")
    join_shards.main(
        folders.arguments(*elsewhere, sources=(folders.captions, folders.reinforcements))
    )
    assert index_of(folders.output).exists() and not read_tars(folders.output)


# several tasks


def test_tasks_share_out_the_shards_and_one_folder(folders, tmp_path, monkeypatch):
    for number in range(5):
        folders.write(f"{number % 2:02d}/{number:08d}.tar", uids=(A, B, C)[: 1 + number % 3])
    whole = folders.join(output=tmp_path / "whole")
    for index in range(2):
        join_shards.main(folders.arguments("--task-index", index, "--task-count", 3))
    with pytest.raises(SystemExit, match="no report of report-2-of-3"):
        join_shards.main(["--output", str(folders.output), "--report"])
    for name, value in (("ID", "7"), ("MIN", "5"), ("COUNT", "3")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    join_shards.main(folders.arguments())
    join_shards.main(["--output", str(folders.output), "--report"])
    assert read_tars(folders.output) == read_tars(tmp_path / "whole")
    merged = folders.report()
    assert {name: merged[name] for name in ("shards", "samples", "bytes", "failed")} == {
        name: whole[name] for name in ("shards", "samples", "bytes", "failed")
    }
    for folder in ("00", "01"):
        sizes = (folders.output / folder / "sizes.json").read_text()
        assert sizes == (tmp_path / "whole" / folder / "sizes.json").read_text()


def test_every_shard_belongs_to_one_task():
    for shards in range(9):
        for count in range(1, 12):
            names = list(range(shards))
            parts = [join_shards.select_share(names, index, count) for index in range(count)]
            assert [shard for part in parts for shard in part] == list(range(shards))


def test_merged_report_tells_what_failed_in_any_task(folders):
    for number in range(2):
        folders.write(f"{number:08d}.tar")
    (folders.images / "00000001.tar").write_bytes(b"")
    join_shards.main(folders.arguments("--task-index", 0, "--task-count", 2))
    with pytest.raises(SystemExit):
        join_shards.main(folders.arguments("--task-index", 1, "--task-count", 2))
    with pytest.raises(SystemExit, match="1 of 2 shards failed"):
        join_shards.main(["--output", str(folders.output), "--report"])
    assert list(folders.report()["failed"]) == ["00000001.tar"]


def test_sizes_lose_no_shard_that_another_task_finishes_meanwhile(folders, monkeypatch):
    for number in range(2):
        folders.write(f"{number:08d}.tar")
    folders.join()
    late, elsewhere = folders.output / ".joined" / "00000001.tar.json", folders.output / "late"
    late.rename(elsewhere)
    publish_json = join_shards.publish_json

    def publish(path, content):
        if elsewhere.exists():  # the other task finishes after our listing, and writes before us
            elsewhere.rename(late)
        publish_json(path, content)

    monkeypatch.setattr(join_shards, "publish_json", publish)
    join_shards.write_sizes([folders.output])
    assert json.loads((folders.output / "sizes.json").read_text()) == {
        "00000000.tar": 3,
        "00000001.tar": 3,
    }


# bf16


def test_bf16_embeddings_are_those_of_the_npz_rounded_to_nearest_even(folders, tmp_path):
    generator = torch.Generator().manual_seed(0)
    stored = {
        name: torch.randn(rows, 8, generator=generator)
        for name, rows in (("image_emb", 4), ("text_emb", 6))
    }
    stored["image_emb"][0] = torch.tensor(
        [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-7, 1, -1, 0, 2**-126, 3.0]
    )  # ties
    uid, members = reinforcement(A)
    folders.write(
        uids=(A,), reinforcements=[(uid, {**members, "npz": stored_embeddings(**stored)})]
    )
    for output in (folders.output, tmp_path / "again"):
        folders.join("--embeddings", "bf16", output=output)
    sample = folders.joined()[A]
    assert "npz" not in sample and {*sample, "npz"} == {
        *members,
        "safetensors",
        "jpg",
        "txt",
        "npz",
    }
    read = embeddings({"safetensors": sample["safetensors"]})
    assert {tensor.dtype for tensor in read.values()} == {torch.bfloat16}
    assert all(read[name].equal(stored[name].bfloat16()) for name in stored)
    assert read["image_emb"][0, :3].tolist() == [1, 1 + 2**-6, 1 + 2**-7]
    assert read_tars(folders.output) == read_tars(tmp_path / "again")
    folders.join("--embeddings", "bf16", "--recheck")
    assert has_index(folders.output / "00000000.tar")
    assert folders.join()["shards"] == {"joined": 1} and "npz" in folders.joined()[A]


def test_npz_that_can_not_be_narrowed_costs_its_sample(folders):
    def npz(**arrays):
        stream = io.BytesIO()
        np.savez_compressed(stream, **arrays)
        return stream.getvalue()

    rows = np.ones((2, 3), np.float32)
    bad = {
        A: npz(image_emb=np.array([print], object), text_emb=rows),  # a pickle
        B: npz(image_emb=np.zeros((5000, 5000), np.float32), text_emb=rows),  # inflates to 100 MB
        C: b"no npz",
        D: npz(image_emb=rows, text_emb=rows),
    }
    samples = [(uid, {**reinforcement(uid)[1], "npz": data}) for uid, data in bad.items()]
    folders.write(uids=tuple(bad), reinforcements=samples)
    assert folders.join("--embeddings", "bf16")["left_out"] == {
        "unreadable npz": 2,
        "oversized npz": 1,
    }
    assert list(folders.joined()) == [D]


def test_bf16_embeddings_in_pth_gz_stay_what_they_are_and_two_members_become_one(folders):
    packed, npz = reinforcement(A, "pth.gz"), reinforced_sample(1)["npz"]
    packed[1]["pth.gz"] = reinforced_sample(0, bf16=True)["pth.gz"]
    both = (B, {**reinforcement(B)[1], "npz": npz, "pth.gz": packed[1]["pth.gz"]})
    folders.write(uids=(A, B), reinforcements=[packed, both])
    folders.join("--embeddings", "bf16")
    one, other = folders.joined().values()
    kinds = {"npz", "safetensors", "pth.gz"}
    assert kinds & set(one) == kinds & set(other) == {"safetensors"}
    for given, made in (({"pth.gz": packed[1]["pth.gz"]}, one), ({"npz": npz}, other)):
        before, after = embeddings(given), embeddings({"safetensors": made["safetensors"]})
        assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)


def test_a_finished_shard_without_an_up_to_date_index_gets_one(folders):
    folders.write()
    folders.join()
    shard = folders.output / "00000000.tar"
    made = index_path(shard).read_bytes()
    with open(shard, "rb") as file:
        assert made == make_index(file)
    index_path(shard).unlink()
    assert folders.join()["shards"] == {"already there": 1}
    assert index_path(shard).read_bytes() == made
    os.utime(shard, (1, 1))
    folders.join()
    assert has_index(shard)


def test_torch_is_not_imported_without_bf16(folders):
    folders.write()
    code = "import sys, join_shards\njoin_shards.main(sys.argv[1:])\n"
    code += "assert not {'torch', 'numpy'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    subprocess.run(
        [sys.executable, "-c", code, *folders.arguments()],
        env=environment,
        check=True,
        capture_output=True,
    )


# never a wrong result


def test_same_bytes_whatever_the_workers_and_the_buffer(folders, tmp_path, monkeypatch):
    for number in range(4):
        folders.write(f"{number:08d}.tar")
    folders.join()
    folders.join("--workers", 3, output=tmp_path / "three")

    monkeypatch.setattr(tar_writer, "BUFFER", 1000)
    folders.join(output=tmp_path / "narrow")
    assert len(read_tars(folders.output)) == 4
    assert (
        read_tars(folders.output) == read_tars(tmp_path / "three") == read_tars(tmp_path / "narrow")
    )


def test_header_is_plain_ustar(folders):
    folders.write()
    folders.join()
    data = (folders.output / "00000000.tar").read_bytes()
    assert data[257:265] == b"ustar\x0000" and len(data) % 10240 == 0
    with tarfile.open(folders.output / "00000000.tar") as tar:
        assert {(m.type, m.mode, m.mtime, m.uid, m.gid, m.uname) for m in tar} == {
            (b"0", 0o644, 0, 0, 0, "")
        }


@pytest.mark.parametrize("size", [0, 1, 60_000, 8**11 - 1])
@pytest.mark.parametrize(
    "name", ["a.txt", f"{A}.syn.json", "n" * 96 + ".jpg", "größe.txt", "\udcff.txt"]
)
def test_headers_are_written_and_read_as_tarfile_does(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    made = tar_writer.make_header(name, size)
    assert made == info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
    assert parse_plain_header(made) == (name, size)
    for at in (3, 130, 150, 400):  # any bit that flips shows in the checksum
        assert parse_plain_header(made[:at] + bytes([made[at] ^ 1]) + made[at + 1 :]) is None


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
def test_tar_reads_the_output(folders, tmp_path):
    folders.write()
    folders.join()
    shard = folders.output / "00000000.tar"
    listed = subprocess.run(["tar", "tvf", shard], check=True, capture_output=True, text=True)
    assert listed.stderr == "" and len(listed.stdout.splitlines()) == 3 * 7
    (tmp_path / "unpacked").mkdir()
    subprocess.run(["tar", "xf", shard, "-C", tmp_path / "unpacked"], check=True)
    assert (tmp_path / "unpacked" / f"{A}.jpg").read_bytes() == image_of(A)


def test_webdataset_reads_the_samples(folders):
    folders.write()
    folders.join()
    samples = list(webdataset.WebDataset(str(folders.output / "00000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [A, B, C]
    assert (
        samples[1]["jpg"] == image_of(B)
        and samples[1]["syn.json"] == reinforcement(B)[1]["syn.json"]
    )


def test_finished_shards_are_skipped_and_changed_ones_redone(folders):
    for number in range(2):
        folders.write(f"{number:08d}.tar")
    first = folders.join()
    times = [path.stat().st_mtime_ns for path in sorted(folders.output.glob("*.tar"))]
    again = folders.join()
    assert [path.stat().st_mtime_ns for path in sorted(folders.output.glob("*.tar"))] == times
    assert again["shards"] == {"already there": 2} and again["samples"] == first["samples"] == 6

    folders.write("00000001.tar", uids=(A,))
    shutil.rmtree(folders.captions)  # what is finished needs its sources no more
    folders.captions.mkdir()
    write_shard(folders.captions / "00000001.tar", [caption(A)])
    assert folders.join()["shards"] == {"already there": 1, "joined": 1}
    assert json.loads((folders.output / "sizes.json").read_text()) == {
        "00000000.tar": 3,
        "00000001.tar": 1,
    }

    with open(folders.output / "00000001.tar", "ab") as file:
        file.write(b"x")
    assert folders.join()["shards"] == {"already there": 1, "joined": 1}

    with open(folders.images / "00000001.tar", "r+b") as file:  # another picture of the same size
        file.seek(600)
        file.write(b"x")
    assert folders.join()["shards"] == {"already there": 1, "joined": 1}


def test_killed_run_leaves_no_half_shard_and_is_finished_by_the_next(folders, tmp_path):
    uids = [f"{number:032x}" for number in range(60)]
    for number in range(6):
        folders.write(f"{number:08d}.tar", uids=uids)
    folders.join(output=tmp_path / "undisturbed")
    whole = read_tars(tmp_path / "undisturbed")

    # dies by itself while it writes its third shard
    slow = (
        "import os, signal, sys, join_shards\n"
        "from lib.tar_writer import TarWriter\n"
        "copy, seen = TarWriter.copy, []\n"
        "def dying(tar, span):\n"
        "    seen.append(span)\n"
        "    if len(seen) > 1000: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    copy(tar, span)\n"
        "TarWriter.copy = dying\n"
        "join_shards.main(sys.argv[1:])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    killed = subprocess.run(
        [sys.executable, "-c", slow, *folders.arguments()], env=environment, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL
    assert read_tars(folders.output) == {name: whole[name] for name in list(whole)[:2]}
    assert len(partials(folders.output)) == 1 and not (folders.output / "sizes.json").exists()

    # is killed from outside, with two workers
    command = [sys.executable, str(SCRIPT), *folders.arguments("--workers", 2)]
    process = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    while len(read_tars(folders.output)) < 3 and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # its workers go with it
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("workers outlive the run")
    assert all(whole[name] == data for name, data in read_tars(folders.output).items())

    report = folders.join()
    assert report["shards"]["already there"] >= 3
    assert read_tars(folders.output) == whole and partials(folders.output) == []
    assert (folders.output / "sizes.json").read_text() == (
        tmp_path / "undisturbed" / "sizes.json"
    ).read_text()


def test_recheck_finds_a_flipped_byte_and_joins_that_shard_again(folders, capsys):
    for number in range(2):
        folders.write(f"{number:08d}.tar")
    folders.join()
    whole, shard = read_tars(folders.output), folders.output / "00000001.tar"
    overwrite(shard, len(whole["00000001.tar"]) // 2, b"\x01")
    assert folders.join()["shards"] == {"already there": 2}  # the size alone doesn't tell
    assert folders.join("--recheck")["shards"] == {"already there": 1, "joined": 1}
    assert "00000001.tar: joined again, it was damaged: differs" in capsys.readouterr().err
    assert read_tars(folders.output) == whole


def test_recheck_without_sources_tells_a_whole_tar_from_a_broken_one(folders):
    for number in range(2):
        folders.write(f"{number:08d}.tar")
    folders.join()
    for name in ("00000000.tar", "00000001.tar"):
        (folders.images / name).unlink()
    assert folders.join("--recheck")["shards"] == {"already there": 2}
    overwrite(
        folders.output / "00000001.tar",
        second_member(folders.output / "00000001.tar"),
        b"rubbish" * 70,
    )
    failed = folders.join_failing("--recheck")["failed"]
    assert list(failed) == ["00000001.tar"] and "damaged" in failed["00000001.tar"]


PEAK = (
    "import sys, join_shards\n"
    "join_shards.main(sys.argv[1:])\n"
    "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
)


def peak_memory(folders):
    """KB, of a process that joins."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    command = [sys.executable, "-c", PEAK, *folders.arguments()]
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return int(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_memory_grows_by_less_than_a_kilobyte_a_sample(folders):
    folders.write()
    few, many = peak_memory(folders), 20_000
    for source, extensions in (
        (folders.images, ("jpg", "txt")),
        (folders.reinforcements, ("syn.json", "paug.json", "npz")),
    ):
        with tarfile.open(source / "00000000.tar", "w") as tar:
            for number in range(many):
                for extension in extensions:
                    tar.addfile(tarfile.TarInfo(f"{number:032x}.{extension}"))
                    tar.members.clear()
    assert peak_memory(folders) - few < many
    assert folders.report()["samples"] == many


def test_memory_does_not_grow_with_a_member(folders):
    folders.write()
    path = folders.reinforcements / "00000000.tar"
    with tarfile.open(path, "w") as tar, open("/dev/zero", "rb") as zeros:
        for uid in (A, B, C):
            for extension, data in reinforcement(uid)[1].items():
                info = tarfile.TarInfo(f"{uid}.{extension}")
                info.size = 300_000_000 if uid == B and extension == "npz" else len(data)
                tar.addfile(info, zeros if uid == B and extension == "npz" else io.BytesIO(data))
    assert peak_memory(folders) < 100_000
    assert folders.report()["bytes"] > 300_000_000


# bad input


def second_member(path):
    """Where the second member begins."""
    with tarfile.open(path) as tar:
        return tar.getmembers()[1].offset


def overwrite(path, at, data):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def double(path):
    path.write_bytes(path.read_bytes() * 2)


BAD_SHARDS = {
    "zero bytes": (lambda path: os.truncate(path, 0), "no end mark"),
    "cut in a header": (lambda path: os.truncate(path, 300), "no end mark"),
    "cut in a member": (
        lambda path: os.truncate(path, second_member(path) + 600),
        "cut off inside a member",
    ),
    "cut between members": (lambda path: os.truncate(path, second_member(path)), "no end mark"),
    "zeros from some point on": (
        lambda path: overwrite(path, second_member(path), bytes(3 << 20)),
        "damaged",
    ),
    "rubbish for a header": (
        lambda path: overwrite(path, second_member(path), b"rubbish" * 70),
        "no valid header",
    ),
    "two tars in one file": (double, "several tars in one file"),
    "not a tar": (lambda path: path.write_bytes(b"<html>404</html>" * 1000), "not a whole tar"),
    "compressed": (lambda path: path.write_bytes(b"\x1f\x8b" + bytes(3000)), "not a whole tar"),
    "missing": (lambda path: path.unlink(), "not in the source"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "not in the source"),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
@pytest.mark.parametrize("which", ["images", "reinforcements"])
def test_bad_shard_fails_with_one_line_and_the_others_go_on(folders, which, case, capsys):
    damage, line = BAD_SHARDS[case]
    for number in range(3):
        folders.write(f"{number:08d}.tar")
    damage(getattr(folders, which) / "00000001.tar")
    report = folders.join_failing("--shards", "{00000000..00000002}.tar")
    assert (
        list(read_tars(folders.output)) == ["00000000.tar", "00000002.tar"]
        and partials(folders.output) == []
    )
    assert list(report["failed"]) == ["00000001.tar"] and line in report["failed"]["00000001.tar"]
    errors = capsys.readouterr().err
    assert errors.count("failed: ") == 1 and "Traceback" not in errors
    assert json.loads((folders.output / "sizes.json").read_text()) == {
        "00000000.tar": 3,
        "00000002.tar": 3,
    }


def test_failed_shard_is_joined_when_its_source_is_mended(folders):
    folders.write()
    (folders.images / "00000000.tar").write_bytes(b"")
    folders.join_failing()
    folders.write()
    assert folders.join()["shards"] == {"joined": 1}


def member(name, type=tarfile.REGTYPE, data=b"x", **more):
    info = tarfile.TarInfo(name)
    info.type, info.size = type, len(data) if type == tarfile.REGTYPE else 0
    for attribute, value in more.items():
        setattr(info, attribute, value)
    return info, data


BAD_MEMBERS = {
    "parent": (member(f"../{B}.png"), "a member name with a folder or control character"),
    "absolute": (member(f"/{B}.png"), "a member name with a folder or control character"),
    "folder": (member(f"pictures/{B}.png"), "a member name with a folder or control character"),
    "backslash": (member(f"..\\{B}.png"), "a member name with a folder or control character"),
    "newline": (member(f"{B}.p\nng"), "a member name with a folder or control character"),
    "symbolic link": (
        member(f"{B}.png", tarfile.SYMTYPE, linkname="/etc/hosts"),
        "a member that is not a plain file",
    ),
    "hard link": (
        member(f"{B}.png", tarfile.LNKTYPE, linkname=f"{A}.txt"),
        "a member that is not a plain file",
    ),
    "device": (member(f"{B}.png", tarfile.CHRTYPE), "a member that is not a plain file"),
    "sparse": (
        member(
            f"{B}.png",
            pax_headers={
                "GNU.sparse.map": "0,1",
                "GNU.sparse.size": "9",
                "GNU.sparse.numblocks": "1",
            },
        ),
        "a member that is not a plain file",
    ),
    "long name": (member(f"{B}.{'p' * 100}"), "a name of over 100 bytes"),
    "unreadable json": (member(f"{B}.json", data=b'{"uid": '), "an unreadable json"),
    "not text": (member(f"{B}.json", data=b"\xff\x00\x80"), "an unreadable json"),
    "deep json": (member(f"{B}.json", data=b"[" * 200_000), "an unreadable json"),
    "huge json": (member(f"{B}.json", data=b" " * 10_000_001), "an unreadable json"),
    "uid that is a path": (
        member(f"{B}.json", data=b'{"uid": "../b"}'),
        "a uid that can't be a file name",
    ),
    "uid that is no text": (
        member(f"{B}.json", data=b'{"uid": "\\ud800"}'),
        "a uid that can't be a file name",
    ),
    **{
        f"uid that is {reason}": (
            member(f"{B}.json", data=b'{"uid": %s}' % value),
            f"a uid that is {reason}",
        )
        for value, reason in (
            (b"null", "null"),
            (b"true", "true or false"),
            (b"1.5", "a number with a point"),
            (b"1e400", "a number with a point"),
            (b"[7]", "a list"),
            (b'{"id": 7}', "an object"),
        )
    },
    "uid of 5,000 digits": (
        member(f"{B}.json", data=b'{"uid": %s}' % (b"7" * 5000)),
        "an unreadable json",
    ),
    "uid with a dot": (
        member(f"{B}.json", data=b'{"uid": "photo.1"}'),
        "a uid with a dot, where its key would end",
    ),
    "blank uid": (member(f"{B}.json", data=b'{"uid": ""}'), "a uid that can't be a file name"),
}


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_bad_member_costs_its_sample_only(folders, case, tar_format, capsys):
    (info, data), reason = BAD_MEMBERS[case]
    if case == "sparse" and tar_format == tarfile.GNU_FORMAT:
        pytest.skip("tarfile can't write it")
    folders.write()
    with tarfile.open(folders.captions / "00000000.tar", "a", format=tar_format) as tar:
        tar.addfile(info, io.BytesIO(data))
    report = folders.join()
    assert list(folders.joined()) == [A, C]
    assert report["left_out"] == {reason: 1}
    assert f"00000000.tar: 1 skipped for {reason}, first {B}" in capsys.readouterr().err


@pytest.mark.parametrize("number", [17, 0, -5, 10**40])
def test_a_whole_number_as_uid_is_its_digits(folders, number):
    """img2dataset writes an integer column so; captions and reinforcements may have it as text."""
    uid = str(number)
    downloaded = image(0, uid)[1] | {"json": json.dumps({"uid": number}).encode()}
    folders.write(uids=(uid,), images=[("000000000", downloaded)])
    assert folders.join()["samples"] == 1 and list(folders.joined()) == [uid]
    members = reinforcement(uid)[1] | {"json": json.dumps({"uid": number}).encode()}
    write_shard(folders.reinforcements / "00000000.tar", [("0", members)])
    folders.join()
    assert list(folders.joined()) == [uid]
    aligned = ["--source", folders.captions, "--source", folders.reinforcements]
    unaligned = ["--unaligned-source", folders.images, "--output", folders.output, "--workers", "1"]
    join_shards.main([str(argument) for argument in (*aligned, *unaligned)])
    assert folders.report()["samples"] == 1


def test_keys_with_dots_are_named_with_the_rule_and_their_members_counted(folders, capsys):
    rule = "the key ends at the first dot of the file name"
    dotted = [(f"photo.{n}", reinforcement(A)[1] | caption(A)[1]) for n in range(3)]
    dotted = [(key, without("json", (key, members))[1]) for key, members in dotted]
    folders.write(captions=dotted, images=dotted, reinforcements=dotted)
    with pytest.raises(SystemExit) as error:
        folders.join()
    assert "no source contains images (jpg, jpeg, png or webp): " in str(error.value)
    first = "the first is 'photo.0.url.txt', read as key 'photo' and extension '0.url.txt'"
    assert f"members with unknown extensions: 45, {first} ({rule})" in str(error.value)
    # Some have a plain key: the others are counted, and the first of the run is explained.
    for name in ("00000000.tar", "00000001.tar"):
        folders.write(name, captions=[*map(caption, (A, B, C)), dotted[0]])
    capsys.readouterr()
    report = folders.join()
    assert report["samples"] == 6 and report["unknown"] == 10
    assert report["left_out"] == {"no image, no caption, no reinforcement": 2}
    out, err = capsys.readouterr()
    assert re.search(r"members with unknown extensions +10\n", out)
    assert err.count(first) == 1 and rule in err
    # A shard that has no other sample fails, and says so.
    folders.write("00000002.tar", captions=dotted, images=dotted, reinforcements=dotted)
    (line,) = folders.join_failing()["failed"].values()
    assert "no sample would be left" in line and "'photo.0.url.txt'" in line and rule in line


def test_members_packed_from_a_folder_and_stray_files_do_no_harm(folders):
    folders.write()
    with tarfile.open(folders.captions / "00000000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member(".", tarfile.DIRTYPE)[0])
        for name in ("./README", "./.DS_Store"):
            tar.addfile(member(name)[0], io.BytesIO(b"x"))
        for uid in (A, B, C):
            for extension, data in caption(uid)[1].items():
                info, data = member(
                    f"./{uid}.{extension}", data=data, mtime=1.5
                )  # a float: a PAX header
                tar.addfile(info, io.BytesIO(data))
    assert folders.join()["samples"] == 3


def test_member_of_negative_size_fails_the_shard(folders):
    folders.write()
    header = bytearray((folders.captions / "00000000.tar").read_bytes()[:512])
    header[124:136] = (
        b"\xff" * 10 + b"\xfc\x00"
    )  # -1024 in base 256: tarfile would read this header again and again
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
    overwrite(folders.captions / "00000000.tar", 0, header)
    assert "no valid header at byte 0" in folders.join_failing()["failed"]["00000000.tar"]


def test_full_disk_fails_the_shard_and_leaves_nothing(folders, monkeypatch):
    folders.write("00000000.tar")
    folders.write("00000001.tar")
    copy, copied = tar_writer.TarWriter.copy, Counter()

    def full(tar, span):
        copied["members"] += 1
        if copied["members"] == 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        copy(tar, span)

    monkeypatch.setattr(tar_writer.TarWriter, "copy", full)
    report = folders.join_failing()
    assert "No space left" in report["failed"]["00000000.tar"]
    assert list(read_tars(folders.output)) == ["00000001.tar"] and partials(folders.output) == []


def test_file_size_limit_fails_the_large_shard_and_leaves_nothing(folders):
    folders.write("00000000.tar", uids=[f"{number:032x}" for number in range(30)])
    folders.write("00000001.tar")
    command = [sys.executable, str(SCRIPT), *folders.arguments()]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    run = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert (
        run.returncode == 1
        and run.stderr.count("failed: ") == 1
        and "00000000.tar: failed: " in run.stderr
    )
    assert "Traceback" not in run.stderr
    assert list(read_tars(folders.output)) == ["00000001.tar"] and partials(folders.output) == []


def test_full_file_system_fails_what_does_not_fit_and_leaves_nothing_half(folders):
    """On a tmpfs of 2 MB, where this user may mount one."""
    folders.write("00000000.tar", uids=[f"{number:032x}" for number in range(30)])
    folders.write("00000001.tar")
    folders.output.mkdir()
    mount = f"mount -t tmpfs -o size=2m tmpfs {folders.output}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no mounting here")
    join = shlex.join([sys.executable, str(SCRIPT), *folders.arguments()])
    shell = f"{mount} && {join}; echo status $?; ls -A {folders.output}"
    run = subprocess.run(["unshare", "-rm", "sh", "-c", shell], capture_output=True, text=True)
    assert "00000000.tar: failed: [Errno 28] No space left on device" in run.stderr
    lines = run.stdout.splitlines()
    assert lines[lines.index("status 1") + 1 :] == [
        ".joined",
        "00000001.tar",
        "00000001.tar.index",
        "join_report.json",
        "sizes.json",
    ]


def test_shard_with_nothing_left_fails(folders):
    folders.write("00000000.tar")
    folders.write("00000001.tar", images=[image(0, A, status="failed_to_download")])
    report = folders.join_failing()
    assert "no sample would be left: 3 with no image" in report["failed"]["00000001.tar"]
    assert list(read_tars(folders.output)) == ["00000000.tar"]


@pytest.mark.parametrize(
    ("forgotten", "script"),
    [
        ("images", "download_images.sh"),
        ("captions", "download_datacompdr12m.sh"),
        ("reinforcements", "reinforce.py"),
    ],
)
def test_forgotten_source_is_an_error_that_says_what_gets_it(folders, forgotten, script):
    folders.write(images=[(uid, {"jpg": image_of(uid)}) for uid in (A, B, C)])
    sources = [
        getattr(folders, name)
        for name in ("captions", "images", "reinforcements")
        if name != forgotten
    ]
    with pytest.raises(SystemExit, match=rf"no source contains {forgotten} (?s:.)*{script}"):
        folders.join(sources=sources)
    assert not folders.output.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--source", "nowhere/{0..3}.tar"], "no such folder"),
        (["--source", "nowhere"], "no such folder"),
        (["--source", "."], "inside"),
        (["--shards", "../{0..3}.tar"], "relative"),
        (["--shards", "{0..3.tar"], "no brace pattern"),
        (["--shards", "{8..9}.tar"], r"none of these 2 shards is in .*dr, the last --source"),
        (["--shards", "*.tar"], "expected a brace pattern"),
        (["--source", __file__], "expected a folder, a tar, or a brace pattern"),
        (["--require", "video"], None),
        (["--workers", "0"], None),
        (["--task-index", "2", "--task-count", "2"], None),
        (["--task-index", "1"], None),
        (["--unaligned-source", "nowhere"], "no such folder"),
        (["--embeddings", "fp8"], None),
    ],
)
def test_wrong_options_are_refused(folders, more, message, monkeypatch):
    folders.write()
    monkeypatch.chdir(folders.images.parent)
    with pytest.raises(SystemExit, match=message):
        folders.join(*more)
    assert not folders.output.exists()


# links


def link_away(folder, name, elsewhere):
    """Move a sub-folder to another place, and put a link there."""
    elsewhere.mkdir(parents=True, exist_ok=True)
    (folder / name).rename(elsewhere / name)
    (folder / name).symlink_to(elsewhere / name)


def test_linked_folders_are_followed_and_the_shards_of_each_source_counted(
    folders, tmp_path, capsys
):
    names = [f"0{number}/00000000.tar" for number in range(3)]
    for name, uid in zip(names, (A, B, C), strict=True):
        folders.write(name, uids=(uid,))
    expected = folders.join()["samples"], read_tars(folders.output)
    for source in (folders.captions, folders.images, folders.reinforcements):
        link_away(source, "02", tmp_path / "other disk" / source.name)
    link_away(folders.output, "01", tmp_path / "other disk" / "output")
    shutil.rmtree(folders.output / "02")
    capsys.readouterr()
    report = folders.join()
    assert (report["samples"], {n: (folders.output / n).read_bytes() for n in names}) == expected
    assert report["source_shards"] == {
        str(source): 3 for source in (folders.captions, folders.images, folders.reinforcements)
    }
    assert f"3 shards in {folders.images}\n" in capsys.readouterr().out
    folders.join("--task-index", 0, "--task-count", 2)
    (folders.output / "01" / "sizes.json").unlink()
    folders.join("--task-index", 1, "--task-count", 2)
    join_shards.main(["--output", str(folders.output), "--report"])
    assert [len(json.loads(path.read_text())) for path in folders.output.glob("*/sizes.json")] == [
        1
    ] * 3


@pytest.mark.parametrize("lacks", ["captions", "images", "reinforcements"])
def test_a_shard_that_one_source_lacks_is_reported(folders, lacks, capsys):
    for name in ("00000000.tar", "00000001.tar", "00000002.tar"):
        folders.write(name)
    (getattr(folders, lacks) / "00000001.tar").unlink()
    if lacks == "reinforcements":  # they name the shards to join
        report = folders.join()
        said = (
            f"1 shards are not joined, because {folders.reinforcements} lacks them, the first is "
        )
        said += "00000001"
    else:
        report, said = folders.join_failing(), "failed: not in the source"
    out, err = capsys.readouterr()
    folder = getattr(folders, lacks)
    assert f"2 shards in {folder}\n" in out and said in out + err
    assert f"1 shards that others have are not in {folder}, the first is 00000001.tar" in out
    assert re.search(rf"shards that others have, not in {folder} +1\n", out)
    assert report["lacking_shards"] == {str(folder): 1}
    assert folders.join("--shards", "{00000000,00000002}.tar")["lacking_shards"] == {}


@pytest.mark.parametrize("where", ["itself", "above", "beside each other"])
def test_a_cycle_of_links_ends_with_a_line(folders, where, tmp_path):
    folders.write()
    if where == "beside each other":
        for one, other in (("a", "b"), ("b", "a")):
            (tmp_path / one).mkdir()
            (tmp_path / one / "deeper").symlink_to(tmp_path / other)
        (folders.images / "loop").symlink_to(tmp_path / "a")
    else:
        target = {"itself": folders.images, "above": folders.images.parent}[where]
        (folders.images / "loop").symlink_to(target)
    for option in ("--source", "--unaligned-source"):
        with pytest.raises(
            SystemExit, match=r"is a link to .*, a folder above it: remove the link"
        ):
            folders.join(option, folders.images)


def test_a_link_that_leads_nowhere_is_not_passed_over(folders, tmp_path):
    folders.write("00/00000000.tar")
    (folders.images / "01").symlink_to(tmp_path / "not mounted")
    with pytest.raises(SystemExit, match=r"images/01 is a link to .*not mounted, which does not"):
        folders.join()
    (folders.images / "01").unlink()
    (folders.images / "00" / "00000001.tar").symlink_to(tmp_path / "gone.tar")
    (folders.images / ".lock").symlink_to(tmp_path / "of an editor")
    folders.write("00/00000002.tar")
    assert folders.join()["lacking_shards"] == {}  # nor do the others have it
    (folders.reinforcements / "00" / "00000001.tar").symlink_to(tmp_path / "gone.tar")
    assert list(folders.join_failing()["failed"]) == ["00/00000001.tar"]


def test_a_folder_that_can_not_be_read_is_not_passed_over(folders, monkeypatch):
    folders.write("00/00000000.tar")
    (folders.images / "01").mkdir()
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("01"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
    with pytest.raises(PermissionError, match="01"):
        folders.join()


def test_the_output_is_no_source_by_a_link_either(folders):
    folders.write()
    folders.join()
    before = read_tars(folders.output)
    (folders.images / "joined").symlink_to(folders.output)
    with pytest.raises(SystemExit, match=r"images/joined is a link to .* the folder of --output"):
        folders.join()
    (folders.images / "joined").unlink()
    (folders.images / "00000000.tar").unlink()
    (folders.images / "00000000.tar").symlink_to(folders.output / "00000000.tar")
    failed = folders.join_failing()["failed"]
    assert failed == {
        "00000000.tar": f"is itself the shard in the source {folders.images} (the"
        " shard joined earlier, from other sources or settings, is still there)"
    }
    assert read_tars(folders.output) == before


def test_output_over_a_source_is_refused(folders):
    folders.write()
    before = read_tars(folders.images)
    with pytest.raises(SystemExit, match="is the folder of a source"):
        folders.join(output=folders.images)
    assert read_tars(folders.images) == before


def test_interrupted_run_ends_its_workers_and_says_what_to_do(folders):
    uids = [f"{number:032x}" for number in range(60)]
    for number in range(20):
        folders.write(f"{number:08d}.tar", uids=uids)
    command = [sys.executable, str(SCRIPT), *folders.arguments("--workers", 2)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not read_tars(folders.output) and process.poll() is None:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and "run it again" in errors and "Traceback" not in errors
    assert partials(folders.output) == []


# the shell face


def run_face(folders, *arguments, face=("scripts/join_datacompdr12m.sh",), size="12M", **variables):
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        f"DATACOMP{size}_PATH": str(folders.captions),
        f"DATACOMP{size}_IMAGES_PATH": str(folders.images),
        f"DATACOMPDR{size}_NOIMG_PATH": str(folders.reinforcements),
        f"DATACOMPDR{size}_PATH": str(folders.output),
        **variables,
    }
    command = ["bash", str(ROOT / face[0]), *face[1:], *arguments]
    return subprocess.run(
        command, env=environment, cwd=folders.images.parent, capture_output=True, text=True
    )


def test_shell_face_joins_what_its_variables_name(folders):
    for number in range(3):
        folders.write(
            f"{number:08d}.tar", images=[image(0, A), image(1, B), image(2, C, sha256="0")]
        )
    run = run_face(folders, "--verify-hash", SHARDS="{00000001..00000002}.tar", WORKERS="2")
    assert run.returncode == 0, run.stderr
    assert "samples joined" in run.stdout
    assert list(read_tars(folders.output)) == ["00000001.tar", "00000002.tar"]
    assert list(folders.joined("00000001.tar")) == [A, B]


def test_shell_face_names_the_variable_and_the_script_of_a_missing_folder(folders):
    folders.write()
    shutil.rmtree(folders.images)
    run = run_face(folders)
    assert run.returncode == 1
    for said in ("DATACOMP12M_IMAGES_PATH", str(folders.images), "scripts/download_images.sh"):
        assert said in run.stderr


def test_shell_face_tells_its_exit_status_and_help(folders):
    folders.write()
    (folders.images / "00000000.tar").write_bytes(b"")
    assert run_face(folders).returncode == 1
    told = run_face(folders, "--help")
    assert (
        told.returncode == 0
        and "DATACOMP12M_IMAGES_PATH" in told.stdout
        and "--verify-hash" in told.stdout
    )


def test_shell_face_of_1b_mirrors_the_folders(folders):
    for name in ("00/00000000.tar", "00/00000001.tar", "65/00000000.tar"):
        folders.write(name)
    run = run_face(folders, face=("scripts/join_datacompdr1b.sh",), size="1B")
    assert run.returncode == 0, run.stderr
    assert list(read_tars(folders.output)) == [
        "00/00000000.tar",
        "00/00000001.tar",
        "65/00000000.tar",
    ]
    assert json.loads((folders.output / "65" / "sizes.json").read_text()) == {"00000000.tar": 3}


def test_shell_face_joins_unaligned_images_that_bring_the_captions(folders):
    folders.write("00/00000000.tar")
    (folders.images / "00" / "00000000.tar").rename(folders.images / "other.tar")
    face = {"face": ("scripts/join_datacompdr1b.sh",), "size": "1B"}
    run = run_face(folders, **face, DATACOMP1B_PATH="", IMAGES_UNALIGNED="1")
    assert run.returncode == 0, run.stderr
    assert folders.joined("00/00000000.tar")[A]["txt"] == image(0, A)[1]["txt"]


def test_slurm_array_joins_all_and_its_report_says_so(folders):
    for number in range(4):
        folders.write(f"{number:08d}.tar")
    face = ("scripts/join_slurm.sh", "scripts/join_datacompdr12m.sh")
    for task in "12":
        array = {
            "SLURM_ARRAY_TASK_ID": task,
            "SLURM_ARRAY_TASK_MIN": "1",
            "SLURM_ARRAY_TASK_COUNT": "2",
        }
        run = run_face(
            folders, face=face, **array, SLURM_SUBMIT_DIR=str(ROOT), SLURM_CPUS_PER_TASK="1"
        )
        assert run.returncode == 0, run.stderr
    assert run_face(folders, "--report").returncode == 0
    assert folders.report()["shards"] == {"joined": 4} and folders.report()["tasks"] == 2


# the benchmark


@pytest.mark.slow
def test_benchmark_prints_its_table_and_leaves_nothing(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "scripts" / "benchmarks" / "join.py"),
        "--folder",
        str(tmp_path),
    ]
    run = subprocess.run(
        [*command, "--samples", "5", "--runs", "1"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    for way in ("| 1 | cat |", "| 2 | unpack and pack |", "| 2 | join |", "largest rounding error"):
        assert way in run.stdout
    assert list(tmp_path.iterdir()) == []
    run = subprocess.run([*command, "--samples", "1000000000000"], capture_output=True, text=True)
    assert run.returncode == 1 and "GB free" in run.stderr
