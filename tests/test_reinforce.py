"""reinforce.py stores the teachers' embeddings of the captions and of the augmented images."""

import hashlib
import json
import sys

import open_clip
import pytest
import torch
from conftest import ROOT, environment, run
from shards import AUGMENTATION, encode, picture, read_samples, uid, write_shard

from dr.params import register_model
from dr.sample import augmentation_parameters, caption, decode_image, embeddings, synthetic_captions
from dr.transforms import compose_from_config

pytestmark = pytest.mark.slow

MODEL = ROOT / "tests" / "data" / "tiny_vit.json"
SAMPLES, SHARDS = 5, 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Image-caption shards, synthetic captions, two teachers of random weights, their config."""
    folder = tmp_path_factory.mktemp("reinforce")
    lines = []
    for shard in range(SHARDS):
        samples = []
        for seed in range(shard * SAMPLES, (shard + 1) * SAMPLES):
            samples.append(
                (uid(seed), {"jpg": encode(picture(seed)), "txt": f"picture {seed}".encode()})
            )
            lines.append(
                {"uid": uid(seed), "syn_text": [f"other words {n} for {seed}" for n in range(3)]}
            )
        write_shard(folder / "plain" / f"{shard:08d}.tar", samples)
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = open_clip.create_model(register_model(str(MODEL))).state_dict()
        prefix = "module." if seed else ""  # as a run of several processes saves it
        torch.save(
            {"epoch": 1, "state_dict": {prefix + k: v for k, v in state.items()}},
            folder / f"teacher-{seed}.pt",
        )
    config = {
        "model_name": f"{MODEL},{MODEL}",
        "pretrained": f"{folder}/teacher-0.pt,{folder}/teacher-1.pt",
        "num_samples": 4,
        "reinforce": {"image_augmentation": AUGMENTATION},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def reinforce(world, output, *options, ranks=1, shards="{00000000..00000002}.tar"):
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        if ranks > 1
        else []
    )
    command = [sys.executable, *torchrun, ROOT / "scripts" / "reinforce.py"]
    command += [
        "--input",
        f"{world}/plain/{shards}",
        "--output",
        output,
        "--config",
        world / "config.json",
    ]
    return run(
        [*command, "--synthetic-captions", world / "captions.jsonl", *options], env=environment()
    )


@torch.inference_mode()
def embed(world, images, captions):
    """An independent look: OpenCLIP's own validation normalisation and calls."""
    parts = []
    for seed in (0, 1):
        model = open_clip.create_model(register_model(str(MODEL))).eval()
        state = torch.load(world / f"teacher-{seed}.pt", weights_only=True)["state_dict"]
        model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
        text = model.encode_text(open_clip.get_tokenizer("tiny_vit")(captions))
        parts.append(
            [torch.nn.functional.normalize(x, dim=1) for x in (model.encode_image(images), text)]
        )
    return [torch.cat(both, dim=1) for both in zip(*parts, strict=True)]


@pytest.mark.parametrize("stored_as", ["npz", "pth.gz"])
def test_stored_rows_are_the_teachers_embeddings_of_exactly_those_images_and_captions(
    world, tmp_path, stored_as
):
    done = reinforce(world, tmp_path, "--format", stored_as, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    compose = compose_from_config(AUGMENTATION)
    tolerance = {"npz": 1e-5, "pth.gz": 4e-3}[stored_as]  # bfloat16 has 8 bits
    for shard in range(SHARDS):
        plain = read_samples(world / "plain" / f"{shard:08d}.tar")
        made = read_samples(tmp_path / f"{shard:08d}.tar")
        assert list(made) == list(plain)
        for key, members in made.items():
            assert set(members) == {"syn.json", "paug.json", stored_as, "json"}
            sample = {**plain[key], **members}
            sha256 = hashlib.sha256(plain[key]["jpg"]).hexdigest()
            assert json.loads(members["json"]) == {"uid": key, "sha256": sha256}
            img = decode_image(sample)
            stored_params = augmentation_parameters(sample)
            assert len({json.dumps(params) for params in stored_params}) == 4
            images = torch.stack(
                [compose.reapply(img, compose.decompress(p))[0] for p in stored_params]
            )
            expected = embed(world, images, [caption(sample), *synthetic_captions(sample)])
            for name, rows in zip(("image_emb", "text_emb"), expected, strict=True):
                found = embeddings(sample)[name]
                assert found.dtype == (torch.float32 if stored_as == "npz" else torch.bfloat16)
                torch.testing.assert_close(found.float(), rows, rtol=0, atol=tolerance)
                norms = found.float().unflatten(1, (2, 16)).norm(dim=2)
                torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-2)


def test_bytes_do_not_depend_on_workers_and_finished_shards_are_skipped(world, tmp_path):
    assert reinforce(world, tmp_path / "a").returncode == 0
    assert reinforce(world, tmp_path / "b", "--workers", "2").returncode == 0
    names = [f"{shard:08d}.tar" for shard in range(SHARDS)]
    assert [(tmp_path / "a" / n).read_bytes() for n in names] == [
        (tmp_path / "b" / n).read_bytes() for n in names
    ]
    (tmp_path / "a" / names[1]).unlink()
    times = [(tmp_path / "a" / name).stat().st_mtime_ns for name in (names[0], names[2])]
    done = reinforce(world, tmp_path / "a")
    assert "1 shards reinforced, 5 samples" in done.stdout
    assert times == [(tmp_path / "a" / name).stat().st_mtime_ns for name in (names[0], names[2])]
    assert (tmp_path / "a" / names[1]).read_bytes() == (tmp_path / "b" / names[1]).read_bytes()


def test_shards_made_in_another_way_are_not_mixed_in(world, tmp_path):
    assert reinforce(world, tmp_path, shards="00000000.tar").returncode == 0
    done = reinforce(world, tmp_path, "--seed", "1")
    assert (
        done.returncode == 1
        and "made with other settings" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "00000001.tar").exists()


def test_samples_that_lack_something_are_left_out_and_counted(world, tmp_path):
    whole = {"jpg": encode(picture(0)), "txt": b"picture"}
    samples = [
        (uid(0), whole),
        (uid(1), {"txt": b"picture"}),
        (uid(2), {**whole, "jpg": b"gone"}),
        (uid(900), whole),
        (
            "00007",
            {**whole, "json": json.dumps({"uid": uid(3), "sha256": "as downloaded"}).encode()},
        ),
    ]
    write_shard(world / "plain" / "odd.tar", samples)
    done = reinforce(world, tmp_path, shards="odd.tar")
    assert done.returncode == 0
    made = read_samples(tmp_path / "odd.tar")
    assert list(made) == [uid(0), uid(3)]
    assert json.loads(made[uid(3)]["json"])["sha256"] == "as downloaded"
    for reason in ("1 lacks an image", "1 undecodable image", "1 no synthetic captions"):
        assert reason in done.stdout


def test_missing_shards_are_told_before_anything_is_done(world, tmp_path):
    done = reinforce(world, tmp_path / "out", shards="{00000000..00000009}.tar")
    assert (
        done.returncode == 1 and "7 of 10 shards" in done.stderr and "00000003.tar" in done.stderr
    )
