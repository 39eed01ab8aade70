"""caption.py writes synthetic captions: the same again for a uid, in files that reinforce.py reads."""

import gzip
import io
import json
import sys

import caption
import open_clip
import pytest
import torch
from conftest import ROOT, environment, run
from lib.captioner import Captioner, Sampling, draw_tokens
from lib.captions import SyntheticCaptions
from lib.shards import ShardError
from PIL import Image
from shards import encode, picture, uid, write_shard

from dr.weights import register_model

MODEL = ROOT / "tests" / "data" / "tiny_coca.json"
SAMPLES, SHARDS = 5, 3


def save_captioner(path):
    """Random weights; OpenCLIP does not initialise the decoder's output layer."""
    torch.manual_seed(0)
    model = open_clip.create_model(register_model(str(MODEL)))
    torch.nn.init.normal_(model.text_decoder.text_projection)
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Image shards, the last one damaged, and a captioner of random weights."""
    folder = tmp_path_factory.mktemp("caption")
    for shard in range(SHARDS):
        seeds = range(shard * SAMPLES, (shard + 1) * SAMPLES)
        samples = [(uid(seed), {"jpg": encode(picture(seed))}) for seed in seeds]
        samples.append((uid(900 + shard), {"jpg": b"gone"}))
        write_shard(folder / "images" / f"{shard:08d}.tar", samples)
    save_captioner(folder / "coca.pt")
    return folder


@pytest.fixture(scope="module")
def captioner(world):
    return Captioner(str(MODEL), str(world / "coca.pt"), torch.device("cpu"), "fp32")


def arguments(world, output, *options, shards="{00000000..00000002}.tar"):
    command = ["--input", f"{world}/images/{shards}", "--output", output, "--model", MODEL]
    command += ["--pretrained", world / "coca.pt", "--max-tokens", 6, "--captions", 3, *options]
    return [str(argument) for argument in command]


def refused(world, output, *options):
    with pytest.raises(SystemExit) as error:
        caption.main(arguments(world, output, *options))
    return str(error.value)


def preprocess(captioner, seeds):
    return torch.stack([captioner.preprocess(picture(s)) for s in seeds]), [uid(s) for s in seeds]


# --- the captioner --------------------------------------------------------------------------------
def test_captions_depend_on_the_uid_the_seed_and_the_image_only(captioner):
    how = Sampling(captions=3, max_tokens=6)
    images, uids = preprocess(captioner, range(4))
    written = captioner.write_captions(images, uids, how)
    assert all(len(set(captions)) == 3 for captions in written)
    assert captioner.write_captions(images[2:3], uids[2:3], how) == written[2:3]
    assert captioner.write_captions(images.flip(0), uids[::-1], how) == written[::-1]
    others = captioner.write_captions(images, uids, how._replace(seed=1))
    others += captioner.write_captions(images.flip(0), uids, how)
    others += captioner.write_captions(images, uids[::-1], how)
    assert not any(captions in others for captions in written)
    assert len({captions[0] for captions in written}) == 4


def test_sampling_follows_the_models_probabilities():
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()[[3, 0, 2, 1, 4]]  # of tokens 0 to 4
    numbers = (torch.arange(10000) + 0.5) / 10000
    rows = logits.expand(len(numbers), -1)
    drawn = draw_tokens(rows, numbers, 1.0).bincount(minlength=5) / len(numbers)
    torch.testing.assert_close(drawn, logits.exp(), rtol=0, atol=2e-3)
    nucleus = draw_tokens(rows, numbers, 0.8).bincount(minlength=5) / len(numbers)
    expected = torch.tensor([0, 0.5, 0.15, 0.2, 0]) / 0.85
    torch.testing.assert_close(nucleus, expected, rtol=0, atol=2e-3)
    assert draw_tokens(rows, numbers, 1e-6).unique().tolist() == [1]


@torch.inference_mode()
def test_the_most_probable_tokens_are_those_of_the_models_forward_pass(captioner):
    """Greedy sampling and a beam search with one beam; OpenCLIP's forward pass is the reference."""
    images, uids = preprocess(captioner, range(2))
    greedy = captioner.write_captions(images, uids, Sampling(1, top_p=1e-6, max_tokens=4))
    beam = captioner.write_captions(images, uids, Sampling(1, beams=1, max_tokens=4))
    tokens = torch.full((2, 1), captioner.start)
    for _ in range(4):
        text = torch.cat([tokens, torch.ones_like(tokens[:, :1])], dim=1)
        logits = captioner.model(images, text)["logits"][:, tokens.shape[1] - 1]
        tokens = torch.cat([tokens, logits.argmax(1, keepdim=True)], dim=1)
    assert captioner.start not in tokens[:, 1:] and captioner.end not in tokens
    expected = [[" ".join(captioner.tokenizer.decode(row[1:]).split())] for row in tokens.tolist()]
    assert greedy == beam == expected


@torch.inference_mode()
def test_beams_find_captions_that_are_more_probable_and_distinct(captioner):
    images, _ = preprocess(captioner, range(3))
    embs = captioner.model._encode_image(images)[1]

    def log_probability(rows):  # [3, beams, T], of tokens that do not end
        assert captioner.end not in rows
        total = 0
        for place in range(1, rows.shape[2]):
            prefixes = rows[:, :, :place].flatten(0, 1)
            repeated = embs.repeat_interleave(rows.shape[1], dim=0)
            steps = captioner._predict(repeated, prefixes).log_softmax(1)
            total = total + steps.gather(1, rows[:, :, place].reshape(-1, 1))[:, 0]
        return total.view(3, -1)

    rows = captioner._search_beams(embs, Sampling(beams=8, max_tokens=3))
    found = log_probability(rows)
    greedy = log_probability(captioner._search_beams(embs, Sampling(beams=1, max_tokens=3)))
    assert (found[:, 0] >= greedy[:, 0] - 1e-5).all() and (found.diff(dim=1) <= 1e-5).all()
    assert all(len(set(map(tuple, beams))) == 8 for beams in rows.tolist())


def test_blank_and_repeated_captions_are_drawn_again_and_an_ended_caption_ends(captioner):
    """With a decoder that knows four tokens: two words, a blank, and the end."""
    allowed = [captioner.tokenizer.encode(word)[0] for word in ("dog", "cat")]
    blank = next(t for t in range(49406) if not captioner.tokenizer.decode([t]).strip())
    fixed = torch.full((49408,), -torch.inf)
    fixed[[*allowed, blank, captioner.end]] = 0.0

    class Decoder(torch.nn.Module):
        def forward(self, embs, texts):
            return fixed.expand(*texts.shape[:2], -1).clone()

    whole, captioner.model.text_decoder = captioner.model.text_decoder, Decoder()
    try:
        images, uids = preprocess(captioner, range(6))
        how = Sampling(captions=2, max_tokens=1)
        written = captioner.write_captions(images, uids, how)
        assert all(set(captions) <= {"dog", "cat"} for captions in written)
        assert [len(captions) for captions in written].count(2) >= 5  # two of four tokens, 5 rounds
        many = captioner.write_captions(images, uids, how._replace(captions=20, max_tokens=2))
        words = {word for captions in many for caption in captions for word in caption.split()}
        assert all(len(set(captions)) == len(captions) < 20 for captions in many)
        assert {w.replace("dog", "").replace("cat", "") for w in words} == {""}
        beams = captioner.write_captions(images, uids, how._replace(beams=3, max_tokens=3))
        assert all(len(set(captions)) == len(captions) for captions in beams)
    finally:
        captioner.model.text_decoder = whole


# --- the command ----------------------------------------------------------------------------------
@pytest.mark.slow
def test_captioners_run_one_after_the_other_for_any_number_of_ranks_tasks_and_kills(
    world, tmp_path, capsys
):
    one, many = tmp_path / "one", tmp_path / "many"
    caption.main(arguments(world, one))
    said = capsys.readouterr().out
    assert "3 shards captioned, 15 samples; skipped: 3 undecodable image" in said
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = arguments(world, many, "--workers", 1, shards="{00000001,00000002}.tar")
    done = run([*torchrun, ROOT / "scripts" / "caption.py", *options], env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert f"rank {rank}: 1 shards captioned, 5 samples" in done.stdout
    (many / ".00000000.jsonl.0123abcd.partial").write_text("{")  # a killed run's
    (many / "00000002.jsonl").unlink()
    for task in (0, 1):
        caption.main(arguments(world, many, "--task-index", task, "--task-count", 2))
    files = [f"{shard:08d}.jsonl" for shard in range(SHARDS)]
    assert sorted(path.name for path in many.iterdir()) == [*files, "caption.json"]
    assert [(one / n).read_bytes() for n in files] == [(many / n).read_bytes() for n in files]
    first = [json.loads(line) for line in (one / files[0]).read_text().splitlines()]
    assert [line["uid"] for line in first] == [uid(n) for n in range(SAMPLES)]
    assert all(set(line) == {"uid", "syn_text"} for line in first)

    options = ("--key", "syn_text_beams", "--beams", 3)
    caption.main(arguments(world, one, *options, shards="00000000.tar"))
    both = [json.loads(line) for line in (one / files[0]).read_text().splitlines()]
    assert all(len(line["syn_text_beams"]) == 3 for line in both)
    assert [{key: line[key] for key in ("uid", "syn_text")} for line in both] == first
    captions = SyntheticCaptions(one)
    lists = captions.of_shard("00000000.tar")[uid(0)]
    assert lists == {key: both[0][key] for key in ("syn_text", "syn_text_beams")}
    with pytest.raises(ShardError, match="has no captions under syn_text_beams"):
        captions.of_shard("00000001.tar")
    assert "were made with other settings" in refused(world, one, "--seed", 1)


def test_what_cannot_be_captioned_is_one_line(world, tmp_path, capsys):
    clip, out = ROOT / "tests" / "data" / "tiny_vit.json", tmp_path / "out"
    torch.save(open_clip.create_model(register_model(str(clip))).state_dict(), tmp_path / "clip.pt")
    said = refused(world, out, "--model", clip, "--pretrained", tmp_path / "clip.pt")
    assert said == (
        f"error: the captioner {clip} is a CLIP without generate: expected a CoCa model, such as "
        "coca_ViT-L-14"
    )
    assert "--max-tokens 32" in refused(world, out, "--max-tokens", 32) and not out.exists()
    assert "no weights: give an OpenCLIP tag" in refused(world, out, "--pretrained", "")
    assert "has its own weights" in refused(world, out, "--model", "hf-hub:a/b")
    assert not out.exists()
    whole = (world / "images" / "00000000.tar").read_bytes()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "00000000.tar").write_bytes(whole[:-20000])
    (tmp_path / "images" / "00000001.tar").write_bytes(whole)
    narrow = io.BytesIO()
    Image.new("RGB", (1, 200_000)).save(narrow, "PNG")  # of 200 megapixels once it is resized
    bad = [(uid(0), {"txt": b"no image"}), (uid(1), {"png": narrow.getvalue()})]
    write_shard(tmp_path / "images" / "00000002.tar", bad)
    said = refused(world, out, "--input", f"{tmp_path}/images/{{00000000..00000002}}.tar")
    assert "rank 0: 2 of 3 shards failed" in said and "\n" not in said
    said = capsys.readouterr().err
    assert "00000000.tar: failed: not a whole tar: " in said
    assert "00000002.tar: failed: no sample would be left: 1 lacks an image (jpg" in said
    assert said.rstrip().endswith("), 1 oversized image")
    assert sorted(path.name for path in out.iterdir()) == ["00000001.jsonl", "caption.json"]
    (out / "00000000.jsonl.gz").write_bytes(gzip.compress(b'{"uid": "a"}' * 99)[:-20])
    said = refused(world, out, "--input", f"{tmp_path}/images/{{00000000..00000001}}.tar")
    assert "1 of 1 shards failed" in said and "damaged gzip" in said
    (out / "caption.json").unlink()
    assert "has captions that this script did not make" in refused(world, out)
