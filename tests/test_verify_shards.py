"""verify_shards.py finds what training cannot use, and proves which embeddings are whose."""

import gzip
import io
import json
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import verify_shards
from conftest import ROOT, environment, run
from PIL import Image
from shards import (
    AUGMENTATION,
    encode,
    picture,
    read_samples,
    reinforced_sample,
    stored_embeddings,
    uid,
    write_shard,
)

from dr.params import register_model
from dr.sample import embeddings
from dr.transforms import compose_from_config

SCRIPT = ROOT / "scripts" / "verify_shards.py"
MODEL = ROOT / "tests" / "data" / "tiny_vit.json"  # 16 wide
DIMENSIONS = (8, 4)  # of the made-up samples


def rows_of(number, seed, dimensions=DIMENSIONS):
    """Rows whose blocks have unit length."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [torch.randn(number, width, generator=generator) for width in dimensions]
    return torch.cat([torch.nn.functional.normalize(block, dim=1) for block in blocks], dim=1)


def good(seed, bf16=False, **kwargs):
    """The members of a sample that training can use: 4 augmentations, 3 synthetic captions."""
    members = reinforced_sample(seed, bf16=bf16, **kwargs)
    members["pth.gz" if bf16 else "npz"] = stored_embeddings(
        rows_of(4, seed), rows_of(4, seed + 1), bf16
    )
    return members


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps({"reinforce": {"image_augmentation": AUGMENTATION}}))
    return path


@pytest.fixture
def verify(config, tmp_path, capsys):
    """Run the script in this process: exit status, what it printed, and its report."""

    def verify(*arguments, made_up=True):
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        options = ["--config", config, "--teacher-dimension", *DIMENSIONS] if made_up else []
        status = 0
        try:
            verify_shards.main(
                [str(a) for a in (*arguments, *options, "--workers", 1, "--report", report)]
            )
        except SystemExit as error:
            status = error.code
        return (
            status,
            capsys.readouterr().out,
            json.loads(report.read_text()) if report.exists() else None,
        )

    return verify


def command(config, *arguments):
    options = ["--config", config, "--teacher-dimension", *DIMENSIONS]
    return [str(part) for part in (sys.executable, SCRIPT, *arguments, *options)]


# --- what can be seen without teachers ------------------------------------------------------------
@pytest.mark.slow
def test_good_shards_are_usable_and_the_last_line_says_so(config, tmp_path):
    write_shard(
        tmp_path / "joined" / "00" / "00000000.tar", [(uid(seed), good(seed)) for seed in range(5)]
    )
    write_shard(
        tmp_path / "joined" / "00000000.tar",
        [(uid(seed), good(seed, bf16=True)) for seed in range(5, 9)],
    )
    write_shard(tmp_path / "joined" / "00000001.tar", [(uid(9), good(9, as_string=True))])
    (tmp_path / "joined" / "sizes.json").write_text('{"00000000.tar": 4, "00000001.tar": 1}')
    done = run(command(config, tmp_path / "joined", "--workers", 2), env=environment())
    assert done.returncode == 0, done.stderr
    assert "3 shards, 10 samples, 10 of them read" in done.stdout
    assert (
        "6 with 4 augmentations, 3 synthetic captions, embeddings 12 wide, float32" in done.stdout
    )
    assert (
        "4 with 4 augmentations, 3 synthetic captions, embeddings 12 wide, bfloat16" in done.stdout
    )
    assert (
        done.stdout.splitlines()[-1]
        == "usable: training can use 10 of the 10 samples read; go ahead"
    )


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


def planted(marker, bf16):
    stream = io.BytesIO()
    if not bf16:
        np.savez(
            stream,
            image_emb=np.array([Planted(marker)], dtype=object),
            text_emb=rows_of(4, 0).numpy(),
        )
        return stream.getvalue()
    torch.save({"image_emb": Planted(marker), "text_emb": rows_of(4, 0)}, stream)
    return gzip.compress(stream.getvalue())


def replaced(member, change):
    """A damage that puts another content into the place of a member."""

    def damage(members, tmp_path):
        members[member] = change(members[member])

    return damage


def without(member):
    return lambda members, tmp_path: members.pop(member)


def embedded(change):
    """A damage of the image embeddings ``[4, 12]``."""

    def damage(members, tmp_path):
        stored = {name: table.clone() for name, table in embeddings(members).items()}
        stored["image_emb"] = change(stored["image_emb"])
        members["npz"] = stored_embeddings(**stored)

    return damage


def last_parameters(entry):
    """A damage of the last augmentation only."""

    def damage(members, tmp_path):
        params = json.loads(members["paug.json"])["param_aug"]
        members["paug.json"] = json.dumps({"param_aug": [*params[:-1], entry]}).encode()

    return damage


def scaled_blocks(table):
    """Rows of the right length as a whole, whose blocks are not."""
    return table * torch.tensor([1.2] * DIMENSIONS[0] + [0.56**0.5] * DIMENSIONS[1])


DAMAGES = {
    "lacks an image (jpg or jpeg or png or webp)": without("jpg"),
    "lacks a caption (txt)": without("txt"),
    "lacks synthetic captions (syn.json)": without("syn.json"),
    "lacks augmentation parameters (paug.json)": without("paug.json"),
    "lacks embeddings (npz or safetensors or pth.gz)": without("npz"),
    "undecodable image": replaced("jpg", lambda data: data[: len(data) // 2]),
    "oversized jpg": replaced("jpg", lambda data: bytes(2**26 + 1)),
    "empty caption": replaced("txt", lambda data: b"\n"),
    "unreadable txt": replaced("txt", lambda data: b"\xff"),
    "unreadable syn.json": replaced("syn.json", lambda data: b"{}"),
    "unreadable paug.json": replaced("paug.json", lambda data: data[:-2]),
    "unreadable npz": replaced("npz", lambda data: data[:-9]),
    "row counts disagree": embedded(lambda table: table[:3]),
    "embedding width": embedded(lambda table: table[:, :-1]),
    "embeddings are not finite": embedded(
        lambda table: torch.cat([table[:3], table[3:] * float("nan")])
    ),
    "a teacher's block is not of unit length": embedded(scaled_blocks),
    "augmentation parameters": last_parameters([[0, 0, 9, 9], [[99, 0.0], [0, 0.0]]]),
    "crop box outside the image": last_parameters(
        [[2, 0, 39, 9], [[0, 0.0], [0, 0.0]]]
    ),  # of 40 x 48 pixels
}


def test_each_kind_of_damage_is_counted_under_its_reason_and_its_first_sample_is_named(
    verify, tmp_path
):
    """Two of each kind; what is wrong in one of four augmentations only is found too."""
    samples, first = [(uid(900), good(900))], {}
    for number, (reason, damage) in enumerate(DAMAGES.items()):
        for seed in (number, number + 100) if reason != "oversized jpg" else (number,):
            members = good(seed)
            damage(members, tmp_path)
            samples.append((uid(seed), members))
        first[reason] = uid(number)
    shard = write_shard(tmp_path / "joined" / "00000000.tar", samples)
    status, out, report = verify(shard)
    assert status == 1
    assert report["bad"] == {reason: 2 if reason != "oversized jpg" else 1 for reason in DAMAGES}
    assert {reason: found["uid"] for reason, found in report["first"].items()} == first
    assert {found["shard"] for found in report["first"].values()} == {str(shard)}
    assert report["samples"] == report["read"] == len(samples) and not report["usable"]
    for reason in DAMAGES:
        (line,) = [line for line in out.splitlines() if line.startswith(reason + "  ")]
        count, share, named = line.removeprefix(reason).split(maxsplit=2)
        assert int(count) == report["bad"][reason] and share == f"{int(count) / len(samples):.2%}"
        assert named.startswith(f"{first[reason]} of {shard}")
    assert out.splitlines()[-1].startswith(
        "NOT usable: 35 of 36 samples (97.22%) can't be used, more than --max-bad"
    )


def test_captions_stored_letter_by_letter_are_flagged(verify, tmp_path):
    """A string where a list belongs was stored as its letters; a short caption is none of those."""
    samples = [(uid(seed), good(seed)) for seed in range(4)]
    for (_, members), captions in zip(samples, ["dog", "cat", "hen"], strict=False):
        members["syn.json"] = json.dumps({"syn_text": list(captions)}).encode()
    short = {"syn.json": json.dumps({"syn_text": ["I", "an ox", "a"]}).encode(), "txt": b"x"}
    samples[3][1].update(short)
    status, out, report = verify(write_shard(tmp_path / "0.tar", samples))
    assert status == 1 and report["bad"] == {"one-letter captions": 3}
    assert "syn_text is ['d', 'o', 'g']" in out and "reinforce again" in out.splitlines()[-1]


def test_members_with_unknown_extensions_are_counted_and_the_first_explained(verify, tmp_path):
    rule = "the key ends at the first dot of the file name"
    dotted = [(f"photo.{n}", good(n)) for n in range(3)]
    samples = [(uid(n), good(n)) for n in range(4, 8)]
    shard = write_shard(tmp_path / "0.tar", [*dotted, *samples])
    write_shard(tmp_path / "1.tar", [(uid(9), {**good(9), "bmp": b"", "cls": b"1"})])
    status, out, report = verify(tmp_path, "--max-bad", 0.2)
    first = "members with unknown extensions: 22, the first is 'photo.0.jpg', read as key 'photo'"
    assert status == 0 and report["unknown"] == 22
    assert report["first_unknown"].startswith(first) and f"{first} and extension '0.jpg'" in out
    status, out, report = verify(shard)
    assert status == 1 and report["bad"] == {"lacks an image (jpg or jpeg or png or webp)": 1}
    (detail,) = [found["detail"] for found in report["first"].values()]
    assert "members with unknown extensions: 21" in detail and rule in detail


def test_an_image_of_over_64_mb_that_training_can_read_is_good(verify, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4800, 4800, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=0)
    members = good(0)
    del members["jpg"]
    members |= {"png": stream.getvalue(), "paug.json": drawn(AUGMENTATION, 4, 4800, 4800)}
    assert len(members["png"]) > 2**26
    assert verify(write_shard(tmp_path / "0.tar", [(uid(0), members)]))[0] == 0


# --- crop boxes of another picture size -----------------------------------------------------------
def drawn(augmentation, count, height, width, seed=0):
    """A paug.json for a picture of this size."""
    torch.manual_seed(seed)
    compose, blank = compose_from_config(augmentation), Image.new("RGB", (width, height))
    params = []
    for _ in range(count):
        entry = {
            "random_resized_crop": compose.transforms["random_resized_crop"].sample_params(blank)
        }
        entry["rand_augment"] = compose.transforms["rand_augment"].sample_params(blank)
        params.append(compose.compress(entry))
    return json.dumps({"param_aug": params}).encode()


def boxed_shard(path, count, boxes, pictures, samples=12, augmentation=AUGMENTATION, about=None):
    """Samples whose boxes were drawn for pictures of another size, given by their longer side."""
    shapes = [(0.7, 1), (1, 0.75), (1, 1)]
    made = []
    for seed in range(samples):
        height, width = shapes[seed % 3]
        members = good(seed)
        size = round(height * pictures), round(width * pictures)
        members["jpg"] = encode(Image.new("RGB", size[::-1]))
        for_size = round(height * boxes), round(width * boxes)
        members["paug.json"] = drawn(augmentation, count, *for_size, seed)
        members["npz"] = stored_embeddings(rows_of(count, seed), rows_of(4, seed + 1))
        if about:
            members["json"] = json.dumps(about(*shapes[seed % 3])).encode()
        made.append((uid(seed), members))
    return write_shard(path, made)


@pytest.mark.parametrize("count", [2, 10, 30])
@pytest.mark.parametrize(
    ("boxes", "pictures", "words"),
    [(512, 1024, "half"), (1024, 512, "twice"), (512, 512, None), (200, 600, "a third of")],
)
def test_boxes_drawn_for_pictures_of_another_size_are_not_usable(
    verify, tmp_path, count, boxes, pictures, words
):
    shard = boxed_shard(tmp_path / "0.tar", count, boxes, pictures)
    status, out, report = verify(shard)
    found = report["crop_boxes"]
    assert found["samples"] == 12
    for direction in ("height", "width"):
        assert found[direction]["median"] / found[direction]["expected"] == pytest.approx(
            boxes / pictures, rel=0.25
        )
        assert f"{direction}  " in out
    if words is None:
        assert status == 0 and found["verdict"] is None
        return
    assert status == 1 and found["verdict"] in report["wrong"]
    said = f"boxes belong to images of about {words} this size: download them at that size, "
    if count > 2:  # two boxes only tell about how much
        assert f"{said}{boxes} on the longer side" in out.splitlines()[-1] or boxes == 200
        assert said in out.splitlines()[-1]
    assert "boxes belong to images of about " in out.splitlines()[-1]


@pytest.mark.parametrize("scale", [[0.9, 1.0], [1.0, 1.0], [0.05, 0.08]])
@pytest.mark.parametrize("count", [2, 10])
def test_what_boxes_should_cover_depends_on_their_number_and_on_the_config(
    tmp_path, verify, config, scale, count
):
    crop = {**AUGMENTATION["random_resized_crop"], "scale": scale, "ratio": [0.9, 1.1]}
    augmentation = {**AUGMENTATION, "random_resized_crop": crop}
    own = tmp_path / "config.json"
    own.write_text(json.dumps({"reinforce": {"image_augmentation": augmentation}}))
    for boxes, expected in ((300, 0), (180, 1)):
        shard = boxed_shard(tmp_path / "0.tar", count, boxes, 300, 24, augmentation)
        arguments = [str(shard), "--config", str(own), "--teacher-dimension", "8", "4"]
        report = tmp_path / "boxes.json"
        try:
            verify_shards.main([*arguments, "--workers", "1", "--report", str(report)])
            status = 0
        except SystemExit as error:
            status = error.code
        assert (status, bool(json.loads(report.read_text())["crop_boxes"]["verdict"])) == (
            expected,
            bool(expected),
        )


def test_boxes_that_fit_the_originals_say_which_download_would_match(verify, tmp_path):
    def original(side):
        return lambda height, width: {
            "original_height": round(height * side),
            "original_width": round(width * side),
        }

    for side, setting in ((1500, "resize_mode=no"), (3000, "image_size=1500")):
        shard = boxed_shard(tmp_path / "0.tar", 10, 1500, 512, about=original(side))
        status, out, _ = verify(shard)
        assert status == 1
        assert "they fit the originals by their json: download them with" in out.splitlines()[-1]
        assert setting in out.splitlines()[-1]
    strange = ("original_height", "1500"), ("original_width", None), ("original_height", -1)
    for field, value in strange:
        about = {**original(1500)(1, 1), field: value}
        shard = boxed_shard(tmp_path / "0.tar", 10, 1500, 512, about=lambda h, w, a=about: a)
        status, out, _ = verify(shard)
        assert status == 1 and "fit the originals" not in out


def test_a_config_without_a_random_resized_crop_or_with_a_fixed_size_has_nothing_to_compare(
    tmp_path, capsys
):
    fixed = {**AUGMENTATION, "resize": {"size": [200, 200]}}
    cropless = {n: v for n, v in AUGMENTATION.items() if n != "random_resized_crop"}
    for augmentation, size in ((fixed, 200), (cropless, None)):
        (tmp_path / "config.json").write_text(
            json.dumps({"reinforce": {"image_augmentation": augmentation}})
        )
        samples = []
        for seed in range(4):
            members = {**good(seed), "jpg": encode(picture(seed, 900, 700))}
            if size:
                members["paug.json"] = drawn(AUGMENTATION, 4, size, size, seed)
            else:
                params = json.loads(members["paug.json"])["param_aug"]
                params = [entry[1:] for entry in params]
                members["paug.json"] = json.dumps({"param_aug": params}).encode()
            samples.append((uid(seed), members))
        shard = write_shard(tmp_path / "0.tar", samples)
        arguments = [str(shard), "--config", str(tmp_path / "config.json")]
        verify_shards.main([*arguments, "--teacher-dimension", "8", "4", "--workers", "1"])
        out = capsys.readouterr().out
        assert "usable: training can use 4 of the 4" in out
        assert ("crop boxes cover" in out) == bool(size)


def test_bfloat16_blocks_may_be_off_by_what_bfloat16_rounds(verify, tmp_path):
    stored = [scale * rows_of(4, 0) for scale in (1.005, 1.02)]
    for scaled, bf16, expected in ((0, True, 0), (1, True, 1), (0, False, 1)):
        members = good(0, bf16=bf16)
        members["pth.gz" if bf16 else "npz"] = stored_embeddings(
            stored[scaled], rows_of(4, 1), bf16
        )
        assert verify(write_shard(tmp_path / "0.tar", [(uid(0), members)]))[0] == expected


@pytest.mark.parametrize("bf16", [False, True])
def test_planted_pickles_are_refused_and_do_not_run(verify, tmp_path, bf16):
    members = good(0, bf16)
    members["pth.gz" if bf16 else "npz"] = planted(tmp_path / "marker", bf16)
    status, _, report = verify(
        write_shard(tmp_path / "0.tar", [(uid(0), members), (uid(1), good(1))])
    )
    assert status == 1 and report["bad"] == {"unreadable pth.gz" if bf16 else "unreadable npz": 1}
    assert not (tmp_path / "marker").exists()


def test_samples_are_put_together_as_trainings_reader_does_it(verify, tmp_path):
    """It skips links, and starts a sample where the key changes or an extension repeats."""
    a, b = good(0), good(1)
    text = {"txt": a.pop("txt")}
    shard = write_shard(
        tmp_path / "0.tar", [(uid(0), a), (uid(1), b), (uid(1), text), (uid(0), text)]
    )
    del b["jpg"]
    with tarfile.open(shard, "a") as tar:
        link = tarfile.TarInfo(f"{uid(2)}.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, str(shard)
        tar.addfile(link)
        for extension, data in b.items():
            info = tarfile.TarInfo(f"{uid(2)}.{extension}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    _, _, report = verify(shard)
    lacks = {"lacks a caption (txt)": 1, "lacks an image (jpg or jpeg or png or webp)": 3}
    assert report["bad"] == lacks and report["read"] == 5


def test_max_bad_is_the_largest_share_that_passes(verify, tmp_path):
    samples = [(uid(seed), good(seed)) for seed in range(4)]
    del samples[2][1]["txt"]
    shard = write_shard(tmp_path / "0.tar", samples)
    status, out, report = verify(shard, "--max-bad", 0.25)
    assert (
        status == 0
        and report["usable"]
        and "usable: training can use 3 of the 4" in out.splitlines()[-1]
    )
    status, out, report = verify(shard, "--max-bad", 0.2499)
    assert status == 1 and not report["usable"]
    assert (
        out.splitlines()[-1].startswith("NOT usable: 1 of 4 samples (25.00%)")
        and "join again" in out
    )


def test_damaged_shards_are_told_and_the_others_are_read(verify, tmp_path):
    folder = tmp_path / "joined"
    for shard in range(5):
        write_shard(
            folder / f"{shard:08d}.tar",
            [(uid(seed), good(seed)) for seed in range(3 * shard, 3 * shard + 3)],
        )
    sizes = {f"{shard:08d}.tar": 3 for shard in range(6)}
    (folder / "sizes.json").write_text(json.dumps({**sizes, "00000003.tar": 4}))
    whole = (folder / "00000001.tar").read_bytes()
    (folder / "00000001.tar").write_bytes(whole[: len(whole) // 2])  # in its second sample
    write_shard(folder / "00000002.tar", [])
    status, out, report = verify(folder, "--max-bad", 1)
    assert (
        status == 1
        and report["read"] == report["samples"] == 3 + 2 + 3 + 3
        and report["bad"] == {"lacks embeddings (npz or safetensors or pth.gz)": 1}
    )
    faults = {Path(shard).name: fault for shard, fault in report["faults"].items()}
    assert list(faults) == [f"{shard:08d}.tar" for shard in (1, 2, 3, 5)]
    assert "not a whole tar" in faults["00000001.tar"] and "no sample" in faults["00000002.tar"]
    assert "3 samples" in faults["00000003.tar"] and "sizes.json" in faults["00000003.tar"]
    assert "No such file" in faults["00000005.tar"]
    assert "4 of 6 shards" in out.splitlines()[-1] and "--recheck" in out.splitlines()[-1]
    status, _, report = verify(f"{folder}/{{00000000,00000004}}.tar")
    assert status == 0 and report["read"] == 6


def test_linked_folders_are_read_and_hidden_ones_are_not(verify, tmp_path):
    for number, name in enumerate(("joined/00", "elsewhere", "joined/.old")):
        write_shard(tmp_path / name / "0.tar", [(uid(number), good(number))])
        (tmp_path / name / "sizes.json").write_text('\ufeff{"0.tar": 1}', encoding="utf-8")
    (tmp_path / "joined" / "01").symlink_to(tmp_path / "elsewhere")
    status, _, report = verify(tmp_path / "joined")
    assert status == 0 and report["shards"] == 2 and report["read"] == 2
    (tmp_path / "elsewhere" / "sizes.json").write_text('{"0.tar": 1, "1.tar": 2}')
    status, _, report = verify(tmp_path / "joined")
    assert status == 1 and list(report["faults"]) == [str(tmp_path / "joined/01/1.tar")]
    for sizes in ('{"0.tar": true}', '{"0.tar": "1"}', '{"0.tar": -1}', '{"0.tar": 1.0}', "[1]"):
        (tmp_path / "elsewhere" / "sizes.json").write_text(sizes)
        assert "expected an object with the number" in verify(tmp_path / "joined")[0]
    (tmp_path / "elsewhere" / "sizes.json").unlink()
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "joined")
    assert "is a link to" in verify(tmp_path / "joined")[0]


def test_text_of_a_shard_does_not_reach_the_terminal_as_it_is(verify, tmp_path):
    members = good(0)
    members["npz"] = b"\x1b[2J"
    status, out, report = verify(
        write_shard(tmp_path / "0.tar", [("\x1b[31m\udcffkey", members), (uid(1), good(1))])
    )
    assert status == 1 and report["bad"] == {"unreadable npz": 1}
    assert "?[31m?key" in out and "\x1b" not in out


# --- a part of the samples ------------------------------------------------------------------------
@pytest.fixture(scope="module")
def many(tmp_path_factory):
    members = {**good(0), "npz": stored_embeddings(rows_of(4, 0), rows_of(4, 1))}
    return write_shard(
        tmp_path_factory.mktemp("many") / "0.tar", [(uid(seed), members) for seed in range(100)]
    )


def test_a_part_is_chosen_by_seed_and_uid_alone(many, tmp_path, verify):
    def chosen(shard=many, seed=0, part=None, number=None):
        verifier = verify_shards.ShardVerifier(AUGMENTATION, DIMENSIONS, seed, part, number, 100)
        found = verifier((str(shard), None))
        assert found["samples"] == 100 and found["read"] == len(found["good"])
        return {sample.uid for sample in found["good"]}

    some = chosen(part=0.3)
    assert 15 <= len(some) <= 45 and some == chosen(part=0.3)
    assert some < chosen(part=0.6) and len(chosen(part=1.0)) == 100
    assert some != chosen(part=0.3, seed=1)
    assert len(chosen(number=7)) == 7 and chosen(number=7) < chosen(number=8)
    order = list(read_samples(many).items())
    assert some == chosen(write_shard(tmp_path / "other name.tar", order[::-1]), part=0.3)
    # what is not chosen is not looked at
    damaged = [(key, members if key in some else {**members, "jpg": b""}) for key, members in order]
    status, out, report = verify(write_shard(tmp_path / "damaged.tar", damaged), "--part", 0.3)
    assert (
        status == 0
        and report["read"] == len(some)
        and f"100 samples, {len(some)} of them read" in out
    )


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
def test_of_samples_that_are_not_chosen_only_headers_are_read(tmp_path, verify):
    members = {**good(0), "url.txt": bytes(200_000), "jpg": good(0)["jpg"] + bytes(200_000)}
    shard = write_shard(tmp_path / "0.tar", [(uid(seed), members) for seed in range(20)])

    def count(number):
        verifier = verify_shards.ShardVerifier(AUGMENTATION, DIMENSIONS, 0, None, number, 0)
        return verifier((str(shard), None))

    count(1)  # what is imported and opened once

    def bytes_read(number):
        def total():
            return int(Path("/proc/self/io").read_text().split()[1])  # rchar

        before = total()
        assert count(number)["read"] == number
        return total() - before

    one, all_of_them = bytes_read(1), bytes_read(20)
    assert all_of_them > 20 * 200_000 and one < all_of_them / 3


# --- with teachers --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A small quickstart: pictures, reinforced by two teachers of random weights, and joined."""
    folder = tmp_path_factory.mktemp("quickstart")
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = open_clip.create_model(register_model(str(MODEL))).state_dict()
        torch.save({"epoch": 1, "state_dict": state}, folder / f"teacher-{seed}.pt")
    config = {
        "model_name": f"{MODEL},{MODEL}",
        "pretrained": f"{folder}/teacher-0.pt,{folder}/teacher-1.pt",
        "num_samples": 3,
        "reinforce": {"image_augmentation": AUGMENTATION},
    }
    (folder / "config.json").write_text(json.dumps(config))

    def script(name, *options):
        done = run([sys.executable, ROOT / "scripts" / name, *options], env=environment())
        assert done.returncode == 0, done.stderr

    data, plain, reinforced = folder / "datasets", folder / "plain", folder / "reinforced"
    script(
        "quickstart/data.py",
        "--output",
        data,
        "--limit",
        12,
        "--held-out",
        20,
        "--shards",
        2,
        "--size",
        48,
    )
    sources = ["--source", data / "DataComp-12M", "--source", data / "DataComp-12M-images"]
    script("join_shards.py", *sources, "--require", "image,caption", "--output", plain)
    captions = ["--synthetic-captions", data / "synthetic_captions.jsonl"]
    pattern = f"{plain}/{{00000000..00000001}}.tar"
    script(
        "reinforce.py",
        "--input",
        pattern,
        "--output",
        reinforced,
        "--config",
        folder / "config.json",
        *captions,
    )
    for output, options in (("joined", []), ("joined-bf16", ["--embeddings", "bf16"])):
        script(
            "join_shards.py",
            *sources,
            "--source",
            reinforced,
            "--output",
            folder / output,
            *options,
        )
    return folder


def belong_together(report):
    """12 pictures x 3 augmentations, and x (1 + 5) captions, all with a cosine of 1 within 1e-3."""
    assert report["read"] == 12 and report["usable"] and not report["bad"] and not report["faults"]
    found = report["teachers"]
    assert [(row["of"], row["rows"]) for row in found] == [("image", 36), ("text", 72)] * 2
    assert [row["teacher"] for row in found] == [0, 0, 1, 1]
    return all(1 - 1e-3 <= row["min"] <= row["mean"] <= 1 + 1e-3 for row in found)


@pytest.mark.slow
def test_the_quickstarts_embeddings_are_those_of_its_teachers(quickstart, tmp_path):
    report = tmp_path / "report.json"
    options = [
        "--config",
        quickstart / "config.json",
        "--workers",
        1,
        "--teachers",
        "--report",
        report,
    ]
    done = run([sys.executable, SCRIPT, quickstart / "joined", *options], env=environment())
    assert done.returncode == 0, done.stderr + done.stdout
    assert belong_together(json.loads(report.read_text()))
    assert done.stdout.splitlines()[-1].startswith("usable: training can use 12 of the 12")


@pytest.mark.slow
def test_so_are_those_that_the_join_has_made_bfloat16(quickstart, verify):
    options = ["--config", quickstart / "config.json", "--teachers"]
    status, _, report = verify(quickstart / "joined-bf16", *options, made_up=False)
    assert status == 0 and belong_together(report)


def swap_images(samples):
    first, second = list(samples)[:2]
    samples[first]["jpg"], samples[second]["jpg"] = samples[second]["jpg"], samples[first]["jpg"]
    return {first, second}


def shift_rows(name):
    def shift(samples):
        key = list(samples)[2]
        stored = embeddings(samples[key])
        samples[key]["npz"] = stored_embeddings(**{**stored, name: stored[name].roll(1, dims=0)})
        return {key}

    return shift


def swap_teachers(samples):
    key = list(samples)[3]
    stored = {name: table.roll(16, dims=1) for name, table in embeddings(samples[key]).items()}
    samples[key]["npz"] = stored_embeddings(**stored)
    return {key}


@pytest.mark.parametrize(
    "mix_up, kinds",
    [
        (swap_images, {"image"}),
        (shift_rows("image_emb"), {"image"}),
        (shift_rows("text_emb"), {"text"}),
        (swap_teachers, {"image", "text"}),
    ],
    ids=["images swapped", "augmentations shifted", "captions shifted", "teachers swapped"],
)
@pytest.mark.slow
def test_what_does_not_belong_together_is_found_and_the_worst_is_named(
    quickstart, verify, tmp_path, mix_up, kinds
):
    """All of these pass every check that needs no teacher."""
    samples = read_samples(quickstart / "joined" / "00000000.tar")
    mixed_up = mix_up(samples)
    shard = write_shard(tmp_path / "joined" / "00000000.tar", samples.items())
    arguments = [
        shard,
        quickstart / "joined" / "00000001.tar",
        "--config",
        quickstart / "config.json",
    ]
    assert verify(*arguments, made_up=False)[0] == 0
    # teachers that have learnt nothing find all pictures much alike
    status, out, report = verify(*arguments, "--teachers", "--min-cosine", 0.9999, made_up=False)
    assert status == 1 and not report["bad"]
    for row in report["teachers"]:
        if row["of"] in kinds:
            assert (
                row["min"] < 0.9999
                and row["worst"]["uid"] in mixed_up
                and row["worst"]["shard"] == str(shard)
            )
            assert row["under_min_cosine"] >= len(mixed_up)
        else:
            assert row["min"] > 0.9999 and not row["under_min_cosine"]
    last = out.splitlines()[-1]
    assert (
        last.startswith("NOT usable")
        and any(key in last for key in mixed_up)
        and str(shard) in last
    )


@pytest.mark.slow
def test_teachers_can_be_named_in_the_place_of_the_configs(quickstart, verify):
    config = ["--config", quickstart / "config.json", "--min-cosine", 0.9999, "--embed", 4]
    swapped = ["--teachers", MODEL, quickstart / "teacher-1.pt", MODEL, quickstart / "teacher-0.pt"]
    status, _, report = verify(quickstart / "joined", *config, *swapped, made_up=False)
    assert status == 1 and all(row["min"] < 0.9999 for row in report["teachers"])
    assert [row["rows"] for row in report["teachers"]] == [12, 24, 12, 24]  # of 4 images


# --- what a person can get wrong ------------------------------------------------------------------
def test_bad_input_gets_one_clear_line(config, tmp_path, many):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{}")
    teacher = ["--teachers", MODEL, tmp_path / "no-weights.pt"]
    for arguments, said in (
        ([tmp_path / "empty"], "no shards in"),
        ([f"{tmp_path}/{{0..3}}.tar"], "no shards in"),
        ([many, "--config", tmp_path / "none.json"], "none.json"),
        ([many, "--config", tmp_path / "broken.json"], "is no reinforcement config"),
        ([many, "--config", config, *teacher], "no-weights.pt can't be loaded"),
        ([many, "--config", config], "give --teacher-dimension"),
    ):
        with pytest.raises(SystemExit if said != "none.json" else OSError) as error:
            verify_shards.main([str(argument) for argument in arguments])
        line = str(error.value)
        assert said in line and "\n" not in line
    for arguments in (
        ["--part", "0"],
        ["--part", "2"],
        ["--samples", "0"],
        ["--teachers", "ViT-B-32"],
    ):
        with pytest.raises(SystemExit) as error:
            verify_shards.main([str(many), *arguments])
        assert error.value.code == 2


def test_nothing_found_is_one_line_and_an_exit_status(config, tmp_path):
    done = run(command(config, tmp_path), env=environment())
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr.startswith(f"error: no shards in {tmp_path}")
        and len(done.stderr.splitlines()) == 1
    )


@pytest.mark.slow
def test_an_interruption_is_one_line(config, tmp_path):
    members = {**good(0), "jpg": encode(picture(0, 1200, 1600))}
    shard = write_shard(tmp_path / "0.tar", [(uid(seed), members) for seed in range(400)])
    process = subprocess.Popen(
        command(config, shard, "--workers", 1), env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        told = ""
        while "verify:" not in told and (
            char := process.stderr.read(1)
        ):  # the progress bar: it has begun
            told += char
        process.send_signal(signal.SIGINT)
        told += process.stderr.read()
        assert process.wait(timeout=60) == 1
    finally:
        process.kill()
    assert "interrupted; nothing was changed, run it again" in told and "Traceback" not in told
