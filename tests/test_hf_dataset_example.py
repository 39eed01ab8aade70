import functools
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import hub_server
from image_server import serving
from lib import draw_sample, http_image
from lib.reinforcement import Reinforcement
from PIL import Image, ImageOps
from shards import encode, picture, stored_embeddings, uid, write_shard

import dr.tar
import hf_dataset_example as example
from dr.sample import BadSample
from dr.transforms import compose_from_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
CONFIG = json.loads((ROOT / "configs" / "datacompdr12m.json").read_text())
COMPOSE = compose_from_config(CONFIG["reinforce"]["image_augmentation"])
SHARD = "00000000.tar"


def unit_rows(rows, generator):
    """``[rows, 1536]``: two blocks of unit length side by side."""
    blocks = torch.randn(rows, 2, 768, generator=generator)
    return torch.nn.functional.normalize(blocks, dim=2).reshape(rows, 1536)


@functools.cache
def parameters(augmentations):
    torch.manual_seed(0)
    return [COMPOSE.compress(COMPOSE(picture(0, 120, 160))[1]) for _ in range(augmentations)]


def sample(seed, url, joined=False, bf16=False, augmentations=30, captions=5, **changed):
    """A sample as DataCompDR stores it (joined: with image and caption), image at url/<seed>.jpg"""
    generator, jpeg = torch.Generator().manual_seed(seed), encode(picture(seed, 120, 160))
    emb = unit_rows(augmentations, generator), unit_rows(1 + captions, generator)
    members = {
        "url.txt": f"{url}/{seed}.jpg".encode(),
        "syn.json": json.dumps(
            {"syn_text": [f"synthetic {t} of {seed} 狗" for t in range(captions)]}
        ).encode(),
        "paug.json": json.dumps({"param_aug": parameters(augmentations)}).encode(),
        "pth.gz" if bf16 else "npz": stored_embeddings(*emb, bf16),
        "json": json.dumps({"uid": uid(seed), "sha256": hashlib.sha256(jpeg).hexdigest()}).encode(),
    }
    if joined:
        members |= {"jpg": jpeg, "txt": f"original of {seed}".encode()}
    return uid(seed), members | changed


@pytest.fixture
def web():
    """A server: ``answers`` {path: (status, headers, bytes)}, ``asked`` [(path, User-Agent)]."""
    asked, answers = [], {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["User-Agent"]))
            seed = self.path.strip("/").removesuffix(".jpg")
            found = (
                (200, {}, encode(picture(int(seed), 120, 160)))
                if seed.isdecimal()
                else (404, {}, b"")
            )
            status, headers, data = answers.get(self.path, found)
            self.send_response(status)
            for name, value in {"Content-Length": len(data), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answers, server.url = (
        asked,
        answers,
        f"http://127.0.0.1:{server.server_port}",
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run(tmp_path, *arguments, endpoint="http://127.0.0.1:1", **environment):
    """The script as a person runs it, from another folder."""
    command = [sys.executable, str(ROOT / "hf_dataset_example.py"), *map(str, arguments)]
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        **environment,
    }
    return subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )


def said(text):
    """What was printed, by its first word."""
    return {
        line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines() if line.strip()
    }


def error_of(*arguments):
    """The one line with which ``main`` ends."""
    with pytest.raises(SystemExit) as ended:
        example.main(list(map(str, arguments)))
    assert isinstance(ended.value.code, str) and "\n" not in ended.value.code
    return ended.value.code


# the Hub


def test_first_sample_is_streamed_and_the_shard_is_not_downloaded(tmp_path, web):
    shard = write_shard(tmp_path / "fp32" / SHARD, (sample(seed, web.url) for seed in range(100)))
    assert shard.stat().st_size > 20e6
    with hub_server({"apple/DataCompDR-12M": shard.parent}) as hub:
        ran = run(
            tmp_path, endpoint=hub.url, PYTHONIOENCODING="ascii"
        )  # the captions are not ASCII
    assert ran.returncode == 0, ran.stderr
    told = said(ran.stdout)
    assert told["image"].startswith("[3, 224, 224] float32 160x120 image")
    for name in ("image_emb", "text_emb", "syn_text_emb"):
        assert told[name].startswith("[1536] float32")
    assert told["syn_caption"].startswith("synthetic ") and told["syn_caption"].endswith(
        " of 0 \\u72d7"
    )
    assert 0 < hub.sent(SHARD) < 600_000
    assert [path for path, _ in web.asked] == ["/0.jpg"]
    assert "urllib" not in web.asked[0][1] and "://" in web.asked[0][1]
    assert list(tmp_path.rglob("*.tar")) == [shard]


def test_bf16_set_has_a_repository_of_its_own_and_later_samples_are_reached(tmp_path, web):
    shard = write_shard(
        tmp_path / "bf16" / SHARD, (sample(seed, web.url, bf16=True) for seed in range(4))
    )
    with hub_server({"apple/DataCompDR-12M-bf16": shard.parent}) as hub:
        ran = run(tmp_path, "--bf16", "--index", 2, endpoint=hub.url)
    assert ran.returncode == 0, ran.stderr
    assert said(ran.stdout)["image_emb"].startswith("[1536] bfloat16")
    assert ran.stdout.startswith(f"apple/DataCompDR-12M-bf16, sample 2: {uid(2)}\n")


def test_without_network_one_line_says_so(tmp_path):
    ran = run(tmp_path, HF_TOKEN="hf_notToBeSeen")
    assert ran.returncode == 1 and ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1 and "network" in ran.stderr and "--shard" in ran.stderr
    assert "hf_notToBeSeen" not in ran.stderr


def test_import_does_nothing(tmp_path):
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import hf_dataset_example",
    ]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout == ran.stderr == "" and list(tmp_path.iterdir()) == []


# what belongs together


@pytest.mark.parametrize("bf16", [False, True])
def test_rows_are_those_of_the_augmentation_and_the_caption(bf16):
    _, members = sample(7, "", joined=True, bf16=bf16)
    generator = torch.Generator().manual_seed(7)
    image_emb, text_emb = unit_rows(30, generator), unit_rows(6, generator)
    params = json.loads(members["paug.json"])["param_aug"]
    for seed, augmentation in enumerate((0, 7, 29, None)):
        chosen = example.choose(members, COMPOSE, augmentation, seed)
        a, s = chosen["augmentation"], chosen["synthetic"]
        assert augmentation in (None, a)
        assert chosen["syn_caption"] == f"synthetic {s} of 7 狗"
        expected, _ = COMPOSE.reapply(
            Image.open(io.BytesIO(members["jpg"])), COMPOSE.decompress(params[a])
        )
        assert torch.equal(chosen["image"], expected)
        for name, row in (
            ("image_emb", image_emb[a]),
            ("text_emb", text_emb[0]),
            ("syn_text_emb", text_emb[1 + s]),
        ):
            assert torch.equal(chosen[name], row.bfloat16() if bf16 else row), name


def test_seed_draws_the_same_again_and_other_seeds_others():
    _, members = sample(0, "", joined=True)
    drawn = [
        tuple(
            example.choose(members, COMPOSE, None, seed)[name]
            for name in ("augmentation", "synthetic")
        )
        for seed in (*range(15), *range(15))
    ]
    assert drawn[:15] == drawn[15:]
    assert len({a for a, _ in drawn}) >= 6 and {s for _, s in drawn} == set(range(5))


def test_printed_cosines_are_each_teachers_own(tmp_path, capsys):
    key, members = sample(3, "", joined=True)
    shard = write_shard(tmp_path / SHARD, [(key, members)])
    example.main(["--shard", str(shard), "--augmentation", "11", "--seed", "5"])
    with np.load(io.BytesIO(members["npz"])) as stored:
        image, texts = stored["image_emb"][11], stored["text_emb"]
    told = capsys.readouterr().out
    s = int(said(told)["syn_caption"].split()[1])
    for k, teacher in enumerate(
        ("teacher 0: ViT-L-14, openai", "teacher 1: ViT-L-14, datacomp_xl_s13b_b90k")
    ):
        first, second = (
            texts[row, 768 * k : 768 * (k + 1)] @ image[768 * k : 768 * (k + 1)]
            for row in (0, 1 + s)
        )
        assert f"{teacher}: cosine with caption {first:.3f}, with syn_caption {second:.3f}" in told


def test_blocks_that_are_not_of_unit_length_are_no_teachers():
    _, members = sample(0, "", augmentations=4, captions=2)
    teachers = ["first", "second"]
    right, wrong = ([768, 768], [512, 1024])
    assert Reinforcement(COMPOSE, COMPOSE, teachers, right).cosines(members).shape == (2, 3, 4)
    with pytest.raises(BadSample, match=r"not of unit length.*512 and 1024"):
        Reinforcement(COMPOSE, COMPOSE, teachers, wrong).cosines(members)


# pictures that can't be had


def no_picture(web, case):
    """Make sample 0 a bad one; returns the reason to report, and the members to change."""
    url, dead = f"{web.url}/0.jpg", "dead link"
    web.answers["/to-a-file.jpg"] = (302, {"Location": "file:///etc/hostname"}, b"")
    web.answers["/to-ftp.jpg"] = (302, {"Location": "ftp://127.0.0.1:1/0.jpg"}, b"")
    web.answers["/circle.jpg"] = (302, {"Location": f"{web.url}/circle.jpg"}, b"")
    web.answers["/cut.jpg"] = (200, {"Content-Length": "5000"}, b"half")
    web.answers["/long.jpg"] = (200, {}, b"x" * (http_image.MAX_BYTES + 1))
    web.answers["/page.jpg"] = (200, {}, b"<html>parked</html>")
    page = json.dumps({"sha256": hashlib.sha256(b"<html>parked</html>").hexdigest()}).encode()
    return {
        "404": (dead, {"url.txt": f"{web.url}/gone.jpg".encode()}),
        "refused": (dead, {"url.txt": b"http://127.0.0.1:1/0.jpg"}),
        "file": (dead, {"url.txt": b"file:///etc/hostname"}),
        "ftp": (dead, {"url.txt": b"ftp://127.0.0.1/0.jpg"}),
        "no scheme": (dead, {"url.txt": b"0.jpg"}),
        "bad port": (dead, {"url.txt": b"http://127.0.0.1:99999999/0.jpg"}),
        "bad host": (dead, {"url.txt": "http://[狗/0.jpg".encode()}),
        "redirect to file": (dead, {"url.txt": f"{web.url}/to-a-file.jpg".encode()}),
        "redirect to ftp": (dead, {"url.txt": f"{web.url}/to-ftp.jpg".encode()}),
        "redirect for ever": (dead, {"url.txt": f"{web.url}/circle.jpg".encode()}),
        "too long": (dead, {"url.txt": f"{web.url}/long.jpg".encode()}),
        "cut off": (dead, {"url.txt": f"{web.url}/cut.jpg".encode()}),
        "another picture": ("changed image", {"url.txt": f"{web.url}/99.jpg".encode()}),
        "no picture": (
            "undecodable image",
            {"url.txt": f"{web.url}/page.jpg".encode(), "json": page},
        ),
        "no hash": ("no image, and no URL", {"url.txt": url.encode(), "json": b"{}"}),
        "deep json": (
            "no image, and no URL",
            {"url.txt": url.encode(), "json": b"[" * 200_000},
        ),
        "no json": ("no image, and no URL", {"url.txt": url.encode(), "json": b"["}),
        "no captions": ("unreadable syn.json", {"syn.json": b"[]"}),
        "empty caption": ("empty caption", {"txt": b" ", "url.txt": url.encode()}),
        "other boxes": (
            "augmentation parameters",
            {"paug.json": json.dumps({"param_aug": [None] * 30}).encode()},
        ),
        "other rows": (
            "row counts disagree",
            {"paug.json": json.dumps({"param_aug": [None] * 29}).encode()},
        ),
    }[case]


CASES = (
    *(
        "404",
        "refused",
        "file",
        "ftp",
        "no scheme",
        "bad port",
        "bad host",
        "redirect to file",
        "redirect to ftp",
    ),
    *(
        "redirect for ever",
        "too long",
        "cut off",
        "another picture",
        "no picture",
        "no hash",
        "no json",
    ),
    "deep json",
    *("no captions", "empty caption", "other boxes", "other rows"),
)


@pytest.mark.parametrize("case", CASES)
def test_a_bad_sample_is_reported_and_the_next_is_tried(tmp_path, web, monkeypatch, capsys, case):
    monkeypatch.setattr(http_image, "MAX_BYTES", 100_000)
    reason, changed = no_picture(web, case)
    shard = write_shard(tmp_path / SHARD, [sample(0, web.url, **changed), sample(1, web.url)])
    example.main(["--shard", str(shard)])
    told = capsys.readouterr()
    assert told.err.startswith(f"sample 0 skipped: {reason}") and len(told.err.splitlines()) == 1
    assert told.out.startswith(f"{shard}, sample 1: {uid(1)}\n")


def test_urls_with_spaces_and_other_letters_are_fetched(tmp_path, web, capsys):
    web.answers["/a%20%E7%8B%97%2B.jpg"] = (200, {}, encode(picture(0, 120, 160)))
    shard = write_shard(
        tmp_path / SHARD, [sample(0, web.url, **{"url.txt": f"{web.url}/a 狗%2B.jpg\n".encode()})]
    )
    example.main(["--shard", str(shard)])
    assert capsys.readouterr().err == ""


def test_url_that_drips_is_given_up(tmp_path, web, monkeypatch, capsys):
    monkeypatch.setattr(http_image, "TIMEOUT", 1)
    with serving() as server:
        drips = sample(0, "", **{"url.txt": server.add("/drip", drip=300).encode()})
        example.main(["--shard", str(write_shard(tmp_path / SHARD, [drips, sample(1, web.url)]))])
    assert capsys.readouterr().err.startswith("sample 0 skipped: dead link")


def test_only_so_many_samples_are_tried(tmp_path, web, capsys):
    gone = [sample(seed, f"{web.url}/gone") for seed in range(3)]
    shard = write_shard(tmp_path / SHARD, [*gone, sample(3, web.url), sample(4, f"{web.url}/gone")])
    assert "samples 0 to 2 cannot be used" in error_of("--shard", shard, "--tries", 3)
    assert capsys.readouterr().err.count("dead link") == 3 == len(web.asked)
    example.main(["--shard", str(shard), "--tries", "4"])
    assert f"sample 3: {uid(3)}" in capsys.readouterr().out
    assert "samples 4 to 4 cannot be used" in error_of("--shard", shard, "--index", 4)


# local shards


def test_joined_shard_needs_no_network_and_has_the_original_caption(tmp_path, capsys):
    shard = write_shard(
        tmp_path / SHARD, [sample(seed, "http://127.0.0.1:1", joined=True) for seed in range(3)]
    )
    example.main(["--shard", str(shard), "--index", "1", "--augmentation", "29"])
    told = capsys.readouterr()
    assert said(told.out)["caption"] == "original of 1" and told.err == ""
    assert "augmentation 29 of 30" in told.out and said(told.out)["image_emb"].startswith(
        "[1536] float32 row 29 of 30"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--index", "2"], "has no sample 2"),
        (["--augmentation", "30"], "--augmentation 30: this sample has 30"),
        (["--teacher-dimension", "768", "512"], "the teachers' widths are 768 and 512"),
        (["--teacher-dimension", "1536"], "--teacher-dimension has 1 widths"),
        (["--config", "nowhere.json"], "--config nowhere.json cannot be used"),
    ],
)
def test_what_the_shard_does_not_have_is_refused_in_one_line(tmp_path, arguments, message):
    shard = write_shard(tmp_path / SHARD, [sample(seed, "", joined=True) for seed in range(2)])
    assert message in error_of("--shard", shard, *arguments)


def test_unequal_widths_are_those_of_the_configs_models(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)

    def rows(count):
        blocks = [torch.randn(count, width, generator=generator) for width in (512, 768)]
        return torch.cat([torch.nn.functional.normalize(block, dim=1) for block in blocks], dim=1)

    changed = {"npz": stored_embeddings(rows(30), rows(6))}
    joined = write_shard(tmp_path / SHARD, [sample(0, "", joined=True, **changed)])
    # a picture is asked for only where the widths are right
    alone = write_shard(tmp_path / "alone" / SHARD, [sample(0, "http://127.0.0.1:1", **changed)])
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**CONFIG, "model_name": "ViT-B-32,ViT-L-14"}))
    example.main(["--shard", str(joined), "--config", str(config)])
    assert "teacher 1: ViT-L-14" in capsys.readouterr().out
    assert "1280 numbers in an embedding, but the teachers' widths are 768 and 768" in error_of(
        "--shard", alone
    )
    config.write_text(json.dumps({**CONFIG, "model_name": "ViT-B-32,NoSuchModel"}))
    assert "--teacher-dimension" in error_of("--shard", alone, "--config", config)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--index", "-1"],
        ["--augmentation", "-1"],
        ["--tries", "0"],
        ["--seed", "x"],
        ["--shard", "x", "--bf16"],
        ["--output", "x.exe"],
        ["--output", "nowhere/x.png"],
    ],
)
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        example.main(arguments)
    assert ended.value.code == 2 and arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "no tar at all, " * 100, "cut", None])
def test_file_that_is_no_shard_is_one_line(tmp_path, content):
    shard = tmp_path / SHARD
    if content == "cut":
        write_shard(shard, [sample(0, "", joined=True)])
        shard.write_bytes(shard.read_bytes()[:100_000])
    elif content is not None:
        shard.write_text(content)
    assert str(shard) in error_of("--shard", shard)


def test_member_beyond_the_bound_is_not_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dr.tar, "MAX_MEMBER", 300_000)
    huge = sample(0, "", joined=True, jpg=b"x" * 300_001, **{"url.txt": b"http://127.0.0.1:1/"})
    shard = write_shard(tmp_path / SHARD, [huge, sample(1, "", joined=True)])
    example.main(["--shard", str(shard)])
    assert "sample 0 skipped: dead link" in capsys.readouterr().err


def test_nothing_of_a_shard_is_written_to_disk(tmp_path, monkeypatch):
    shard = write_shard(tmp_path / "a" / SHARD, [sample(0, "", joined=True)])
    with tarfile.open(shard, "a") as tar:
        for name in ("../escaped.txt", "/escaped.txt"):
            tar.addfile(tarfile.TarInfo(name))
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    assert "has no sample 9" in error_of("--shard", shard, "--index", 9)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [SHARD]


# the sheet


def test_sheet_shows_the_original_and_all_that_is_stored(tmp_path, capsys):
    key, members = sample(0, "", joined=True, augmentations=30)
    heights = {}
    for count in (10, 30):
        _, fewer = sample(0, "", joined=True, augmentations=count)
        shard = write_shard(tmp_path / SHARD, [(key, fewer)])
        example.main(
            ["--shard", str(shard), "--output", str(tmp_path / "sheet.png"), "--augmentation", "4"]
        )
        assert f"{tmp_path}/sheet.png" in capsys.readouterr().out
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.format == "PNG" and sheet.mode == "RGB" and sheet.width == 1600
            heights[count] = sheet.height
            size = (draw_sample.ORIGINAL, draw_sample.ORIGINAL)
            original = ImageOps.contain(
                Image.open(io.BytesIO(members["jpg"])), size, Image.Resampling.BICUBIC
            )
            corner = draw_sample.MARGIN
            shown = sheet.crop((corner, corner, corner + original.width, corner + original.height))
            assert shown.tobytes() == original.tobytes()
            assert {color for _, color in sheet.getcolors(2**24)} >= {
                draw_sample.COLD,
                draw_sample.HOT,
            }
    assert heights[30] > heights[10] > 800


@pytest.mark.parametrize(
    "captions", [["\x1b[31mred\x07\nline two \ud800", "狗 🐕"], ["long \x9b" * 50_000]]
)
def test_strange_captions_are_cut_and_do_not_reach_the_terminal(tmp_path, capsys, captions):
    changed = {
        "syn.json": json.dumps({"syn_text": captions}).encode(),
        "txt": ("x" * 100_000).encode(),
    }
    key, members = sample(0, "", joined=True, captions=len(captions), augmentations=3, **changed)
    shard = write_shard(tmp_path / SHARD, [(key, members)])
    example.main(["--shard", str(shard), "--output", str(tmp_path / "sheet.png")])
    told = capsys.readouterr().out
    assert not set("\x1b\x9b\ud800") & set(told)
    assert max(map(len, told.splitlines())) < 1100
    assert Image.open(tmp_path / "sheet.png").size[0] == 1600


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (
            [[14, 87, 236, 275], [[9, -0.27], [3, -30.453]]],
            ["275x236 at 87, 14", "Sharpness -0.27", "TranslateX -30 px"],
        ),
        ([[0, 0, 5, 6], [[0, 0.0], [5, 9.0]]], ["6x5 at 0, 0", "Identity", "Rotate +9°"]),
        (
            [[0, 0, 5, 6], [[10, 7.0], [11, 178.5]]],
            ["6x5 at 0, 0", "Posterize 7 bits", "Solarize from 178"],
        ),
        ([[0, 0, 5, 6], None], ["6x5 at 0, 0"]),
    ],
)
def test_parameters_in_words(params, words):
    assert draw_sample.describe_parameters(COMPOSE.decompress(params)) == words
