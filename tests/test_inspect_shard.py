"""inspect_shard.py shows what a shard holds, bounded, and judges it as training would."""

import io
import json
import sys
import zipfile
from pathlib import Path

import inspect_shard
import numpy as np
import pytest
from conftest import ROOT, environment, run
from hub_server import hub_server
from shards import dfndr_sample, uid, write_shard

COCO, CONTEXT = "syn_text_dfn_mscoco38k", "syn_text_dfn_context77"


def joined(seed, **kwargs):
    return uid(seed), dfndr_sample(seed, {COCO: 5, CONTEXT: 2}, **kwargs)


def without(sample, *names):
    key, members = sample
    return key, {name: data for name, data in members.items() if name not in names}


@pytest.fixture
def inspect(tmp_path, capsys):
    """Inspect a shard of these samples: exit status, and what was printed."""

    def inspect(samples, *options):
        shard = write_shard(tmp_path / "00000000.tar", samples)
        try:
            inspect_shard.main([str(shard), *options])
        except SystemExit as error:
            return error.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return inspect


def test_members_keys_types_shapes_and_counts_of_the_first_samples_are_printed(inspect):
    samples = [joined(0), joined(1, bf16=True), joined(2, originals=3), joined(3)]
    status, told = inspect(samples)
    lines = told.splitlines()
    assert status == 0 and lines[-1] == "training can read these 3 samples"
    arrays = f"image_emb {{0}} [4, 12]; text_emb {{0}} [1, 12]; {COCO}_emb {{0}} [5, 12]; {CONTEXT}_emb {{0}} [2, 12]"
    assert arrays.format("float32") in told and arrays.format("bfloat16") in told
    assert f"{COCO}: list of 5, the first is text, 'caption 1 0 of 0'" in told
    assert "JPEG image, 48x40, RGB" in told and "param_aug: list of 4" in told
    assert "texts: list of 3, the first is text, 'caption 0 0 of 2'" in told
    assert told.count("  training can read it\n") == 3 and uid(3) not in told
    counts = [line.split(" with ") for line in lines if " with " in line]
    counts = {name: int(number) for number, name in counts}
    assert counts["npz"] == 2 and counts["pth.gz"] == 1 and counts["syn.json"] == 3


def test_a_reinforcement_shard_says_what_the_join_has_to_add(inspect):
    bare = [without(joined(seed), "jpg", "txt", "url.txt") for seed in range(2)]
    status, told = inspect(bare, "--dataset", "dfndr12m", "--samples", "9")
    assert status == 0 and "no image URLs (url.txt)" in told
    assert told.splitlines()[-1] == (
        "training can read the reinforcements of these 2 samples; 2 lack an image (jpg or jpeg or "
        "png or webp), 2 lack a caption (txt): the join (scripts/join_shards.py) takes these from "
        "other shards"
    )
    status, told = inspect([without(joined(0), "jpg")])
    assert status == 0 and "no image URLs" not in told and "1 lack a caption" not in told


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


def pickled_npz(marker):
    stream = io.BytesIO()
    np.savez(stream, image_emb=np.array([Planted(marker)], dtype=object), text_emb=np.ones((1, 12)))
    return stream.getvalue()


def bomb():
    """An npz of few bytes that inflates to 80 MB."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image_emb.npy", bytes(80 << 20))
    return stream.getvalue()


def test_why_training_cannot_read_a_sample_is_said(inspect, tmp_path):
    marker = tmp_path / "marker"
    key, members = joined(0)
    rows = {
        "image_emb": np.ones((4, 12)),
        "text_emb": np.ones((2, 12)),
        f"{COCO}_emb": np.ones((5, 12)),
    }
    stream = io.BytesIO()
    np.savez(stream, **rows)
    cases = {
        "lacks augmentation parameters (paug.json)": without((key, members), "paug.json")[1],
        f"text_emb has 2 rows for 1 original captions and 5 under {COCO}, 2 under {CONTEXT}": {
            **members,
            "npz": stream.getvalue(),
        },
        "undecodable image": {**members, "jpg": b"no image"},
        "unreadable syn.json: expected a list of captions": {**members, "syn.json": json.dumps({COCO: "a"}).encode()},
        "would have to be unpickled": {**members, "npz": pickled_npz(marker)},
        "oversized npz": {**members, "npz": bomb()},
    }  # fmt: skip
    for reason, changed in cases.items():
        status, told = inspect([(key, changed)])
        assert (status == 1 and f"training cannot read it: {reason}" in told) or reason in told, (
            told
        )
        assert told.splitlines()[-1].startswith("training cannot read 1 of these 1 samples; most: ")
        assert reason in told.splitlines()[-1]
    assert "image_emb object [1]" in inspect([(key, {**members, "npz": pickled_npz(marker)})])[1]
    assert not marker.exists()


def test_lists_that_training_is_to_use_are_found_or_the_keys_named(inspect):
    status, told = inspect([joined(0)], "--syn-text-key-regex", "^syn_text_dfn_mscoco38k$")
    assert status == 0
    status, told = inspect([joined(0)], "--syn-text-key-regex", "^syn_text$")
    assert status == 1 and f"matches no key of syn.json; found {COCO}, {CONTEXT}" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["x.tar", "--syn-text-key-regex", "["], "'[' is no regular expression"),
        (["x.tar", "--samples", "0"], "expected at least 1"),
        ([], "expected SHARD or --dataset"),
    ],
)
def test_wrong_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as refused:
        inspect_shard.main(options)
    assert refused.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_what_is_read_and_printed_is_bounded(inspect, monkeypatch):
    key, members = joined(0)
    strange = {**members, "txt": b"\x1b[31m" + b"x" * 100_000, "meta.json": b"[" * 500 + b"]" * 500}
    status, told = inspect([(key, strange)])
    assert status == 0 and "\x1b" not in told and max(map(len, told.splitlines())) < 1200
    monkeypatch.setattr(inspect_shard, "MAX_READ", 100_000)
    status, told = inspect([(key, strange), joined(1)])
    assert status == 1
    last = told.splitlines()[-1]
    assert last.startswith("training cannot read this shard: its first ") and "100000 bytes" in last


def test_a_file_that_is_no_shard_is_one_line(inspect, tmp_path, capsys):
    compressed = tmp_path / "00000000.tar.gz"
    compressed.write_bytes(b"\x1f\x8b" + bytes(1000))
    with pytest.raises(SystemExit):
        inspect_shard.main([str(compressed)])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("training cannot read this shard: not a whole, uncompressed tar")
    with pytest.raises(FileNotFoundError):  # run_command prints it as one line
        inspect_shard.main([str(tmp_path / "nowhere.tar")])
    assert inspect([])[1].splitlines()[-1] == "training cannot read this shard: it has no samples"
    for address in ("hf://", "hf://apple", "hf://apple/DFNDR-12M/../x.tar", "hf://a b/c/d.tar"):
        with pytest.raises(SystemExit, match="expected an address such as hf://apple/DFNDR-12M"):
            inspect_shard.main([address])


@pytest.mark.slow
def test_of_a_shard_on_the_hub_only_the_beginning_is_transferred(tmp_path):
    filler = ("filler", {"npz": bytes(24 << 20)})
    write_shard(tmp_path / "hub" / "shards" / "00000000.tar", [joined(0), joined(1), filler])
    (tmp_path / "hub" / "README.md").write_text("---\nlicense: cc-by-nc-nd-4.0\n---\n")
    script = [sys.executable, ROOT / "scripts" / "inspect_shard.py"]
    with hub_server({"apple/DFNDR-12M": tmp_path / "hub"}, slow=0.02) as hub:
        environ = environment(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
        done = run([*script, "--dataset", "dfndr12m", "--samples", "1"], env=environ)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(
            "hf://apple/DFNDR-12M/shards/00000000.tar: the first 1 samples"
        )
        assert f"sample 0: {uid(0)}" in done.stdout
        assert 0 < hub.sent("00000000.tar") < 8 << 20  # of 24 MB; sockets have buffers
    assert not list((tmp_path / "hf").rglob("*.tar"))
