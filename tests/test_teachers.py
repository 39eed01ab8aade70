"""reinforce.py with teachers of different kinds, and with captions in a file for each shard."""

import io
import json
import sys

import numpy as np
import open_clip
import pytest
import reinforce
import safetensors.torch
import torch
from conftest import ROOT, environment, run
from lib.teachers import Teacher
from shards import AUGMENTATION, encode, picture, read_samples, uid, write_shard
from torch.nn.functional import normalize

from dr.sample import augmentation_parameters, decode_image, embeddings
from dr.transforms import compose_from_config
from dr.weights import register_model

pytestmark = pytest.mark.slow

MODEL = ROOT / "tests" / "data" / "tiny_vit.json"
HUB = "hf-hub:tiny/teacher"
STATISTICS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bilinear"}
OPENAI = {**AUGMENTATION["normalize"], "interpolation": "bicubic"}
SAMPLES = 6


def save(model_config, path, seed):
    """Save a model of random weights; returns it."""
    torch.manual_seed(seed)
    model = open_clip.create_model(register_model(str(model_config))).eval()
    state = {name: rows.contiguous() for name, rows in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(state, path)
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards, captions for each of them, and three teachers: of OpenCLIP, a SigLIP model with a
    larger input and other statistics, and one in a cache of the Hub."""
    folder = tmp_path_factory.mktemp("teachers")
    for shard in range(2):
        seeds = range(shard * SAMPLES, (shard + 1) * SAMPLES)
        samples = [(uid(s), {"jpg": encode(picture(s, 60, 70)), "txt": b"picture"}) for s in seeds]
        write_shard(folder / "pairs" / f"{shard:08d}.tar", samples)
        lines = [
            {
                "uid": uid(s),
                "syn_text_a": [f"a {n} {s}" for n in range(2)],
                "syn_text_b": [f"b {s}"],
            }
            for s in seeds
        ]
        path = folder / "captions" / f"{shard:08d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(map(json.dumps, lines)))
    plain = json.loads(MODEL.read_text())
    siglip = json.loads(MODEL.read_text()) | {"init_logit_bias": -10, "embed_dim": 8}
    siglip["vision_cfg"]["image_size"], siglip["text_cfg"]["context_length"] = 48, 24
    siglip["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
    (folder / "tiny_sigmoid.json").write_text(json.dumps(siglip))
    models = [
        (save(MODEL, folder / "a" / "plain.safetensors", 0), 32, OPENAI),
        (
            save(folder / "tiny_sigmoid.json", folder / "b" / "siglip.safetensors", 1),
            48,
            STATISTICS,
        ),
    ]
    about = {"preprocess_cfg": STATISTICS}
    (folder / "b" / "open_clip_config.json").write_text(json.dumps(about))
    hub = folder / "hf" / "hub" / "models--tiny--teacher"
    snapshot = hub / "snapshots" / ("0" * 40)
    models.append((save(MODEL, snapshot / "open_clip_model.safetensors", 2), 32, STATISTICS))
    about = {"model_cfg": plain, "preprocess_cfg": STATISTICS}
    (snapshot / "open_clip_config.json").write_text(json.dumps(about))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0" * 40)
    config = {
        "model_name": f"{MODEL},{folder}/tiny_sigmoid.json,{HUB}",
        "pretrained": f"{folder}/a/plain.safetensors,{folder}/b/siglip.safetensors,",
        "num_samples": 3,
        "reinforce": {"image_augmentation": AUGMENTATION},
    }
    (folder / "config.json").write_text(json.dumps(config))
    config["model_name"], config["pretrained"] = str(MODEL), f"{folder}/a/plain.safetensors"
    (folder / "one.json").write_text(json.dumps(config))
    return folder, models


def arguments(folder, output, *options, config="one.json"):
    pattern = f"{folder}/pairs/{{00000000,00000001}}.tar"
    given = ["--input", pattern, "--output", output, "--config", folder / config]
    given += ["--synthetic-captions", folder / "captions", *options]
    return [str(argument) for argument in given]


@torch.inference_mode()
def test_each_teacher_gets_the_same_augmentation_at_its_size_statistics_and_interpolation(
    world, tmp_path
):
    folder, models = world
    env = environment(HF_HOME=str(folder / "hf"), HF_HUB_OFFLINE="1")
    command = [sys.executable, ROOT / "scripts" / "reinforce.py"]
    command += arguments(folder, tmp_path, "--batch-size", 7, config="config.json")
    done = run([*command, "--task-index", 1, "--task-count", 2], env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001.tar", "reinforce.json"]
    tokenizers = [
        open_clip.get_tokenizer(register_model(str(name)))
        for name in (MODEL, folder / "tiny_sigmoid.json", MODEL)
    ]
    plain = read_samples(folder / "pairs" / "00000001.tar")
    for key, members in read_samples(tmp_path / "00000001.tar").items():
        sample = {**plain[key], **members}
        img, stored = decode_image(sample), embeddings(sample)
        lists = json.loads(members["syn.json"])
        assert list(lists) == ["syn_text_a", "syn_text_b"]
        with np.load(io.BytesIO(members["npz"])) as arrays:
            shapes = {name: len(arrays[name]) for name in arrays}
        expected = {"image_emb": 3, "text_emb": 1, "syn_text_a_emb": 2, "syn_text_b_emb": 1}
        assert shapes == expected
        captions = ["picture", *lists["syn_text_a"], *lists["syn_text_b"]]
        blocks = zip(
            models,
            tokenizers,
            stored["image_emb"].split([16, 8, 16], dim=1),
            stored["text_emb"].split([16, 8, 16], dim=1),
            strict=True,
        )
        for (model, size, wanted), tokenizer, image_emb, text_emb in blocks:
            crop = {"size": size, "interpolation": wanted["interpolation"]}
            compose = compose_from_config(
                {
                    **AUGMENTATION,
                    "random_resized_crop": crop,
                    "normalize": {name: wanted[name] for name in ("mean", "std")},
                }
            )
            params = [compose.decompress(entry) for entry in augmentation_parameters(sample)]
            images = torch.stack([compose.reapply(img, entry)[0] for entry in params])
            for found, rows in (
                (image_emb, model.encode_image(images)),
                (text_emb, model.encode_text(tokenizer(captions))),
            ):
                torch.testing.assert_close(found, normalize(rows), rtol=0, atol=1e-5)
    teachers = json.loads((tmp_path / "reinforce.json").read_text())["teachers"]
    fields = [
        (t["input_size"], t["context_length"], t["dimension"], t["logit_bias"]) for t in teachers
    ]
    assert fields == [([32, 32], 16, 16, None), ([48, 48], 24, 8, -10), ([32, 32], 16, 16, None)]
    assert [t["logit_scale"] for t in teachers] == pytest.approx([1 / 0.07] * 3)
    assert teachers[1] | STATISTICS == teachers[1] and teachers[0] | OPENAI == teachers[0]


def test_captions_that_do_not_fit_fail_their_shard_alone_and_settings_are_kept(
    world, tmp_path, capsys
):
    folder, _ = world
    captions = tmp_path / "captions"
    captions.mkdir()
    lines = (folder / "captions" / "00000000.jsonl").read_text().splitlines()
    lines[0] = json.dumps({"uid": uid(900), "syn_text": ["of no picture"]})
    (captions / "00000000.jsonl").write_text("\n".join(lines))
    given = arguments(folder, tmp_path / "out", "--synthetic-captions", captions)

    def refuse(said):
        with pytest.raises(SystemExit) as error:
            reinforce.main(given)
        assert said in str(error.value) and "\n" not in str(error.value)

    refuse("00000001.tar: there is no file of captions")
    said = capsys.readouterr()
    assert "1 shards reinforced, 5 samples; skipped: 1 no synthetic captions" in said.out
    assert "1 captions without a sample" in said.out
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["00000000.tar"]
    (captions / "00000001.jsonl").write_text('{"syn_text": ["x"]}')
    refuse("00000001.jsonl, line 1: field uid: missing")
    (captions / "00000001.jsonl").write_text(f'{{"uid": "{uid(6)}", "syn_text/../x": ["x"]}}')
    refuse("line 1: field syn_text/../x: expected a name of letters, digits, _ and -")
    recorded = tmp_path / "out" / "reinforce.json"
    earlier = json.loads(recorded.read_text())
    del earlier["teachers"]  # as earlier versions wrote it
    recorded.write_text(json.dumps(earlier))
    lines = (folder / "captions" / "00000001.jsonl").read_text()
    (captions / "00000001.jsonl").write_text(lines)
    reinforce.main(given)
    assert len(read_samples(tmp_path / "out" / "00000001.tar")) == SAMPLES
    given += ["--precision", "pure_bf16"]
    refuse("were made with other settings")


def test_bfloat16_weights_give_nearly_the_same_embeddings_of_unit_length(world):
    folder, _ = world
    weights, images = str(folder / "b" / "siglip.safetensors"), torch.rand(4, 3, 48, 48)
    embedded = {}
    for precision in ("fp32", "bf16", "pure_bf16"):
        model = str(folder / "tiny_sigmoid.json")
        teacher = Teacher(model, weights, torch.device("cpu"), precision)
        embedded[precision] = teacher.embed(images, ["a", "b"])
        teacher.check_batch(images, ["a", "b"], *embedded[precision])
    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}
    for precision in ("bf16", "pure_bf16"):
        for found, exact in zip(embedded[precision], embedded["fp32"], strict=True):
            assert ((found * exact).sum(1) > 0.99).all() and not torch.equal(found, exact)
            torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))


def test_a_teacher_that_mixes_the_samples_of_a_batch_is_refused(world, tmp_path):
    class Mixing(torch.nn.Module):  # as BatchNorm in training mode
        def forward(self, rows):
            return rows - rows.mean(0)

    folder, _ = world
    teacher = Teacher(str(MODEL), f"{folder}/a/plain.safetensors", torch.device("cpu"), "fp32")
    teacher.model.visual.ln_pre = Mixing()
    images, captions = torch.rand(4, 3, 32, 32), ["a", "b"]
    with pytest.raises(
        SystemExit, match="embeds one image to two embeddings, alone and in a batch"
    ):
        teacher.check_batch(images, captions, *teacher.embed(images, captions))


def test_teachers_that_cannot_be_used_are_one_line(world, tmp_path, monkeypatch):
    folder, _ = world
    broken = json.loads(MODEL.read_text())
    broken["text_cfg"]["hf_tokenizer_name"] = str(tmp_path / "no-tokenizer")
    (tmp_path / "tiny_broken.json").write_text(json.dumps(broken))
    weights = f"{folder}/a/plain.safetensors"
    with pytest.raises(
        SystemExit, match=r"the teacher .*tiny_broken.* can't be loaded: its tokenizer: "
    ) as error:
        Teacher(str(tmp_path / "tiny_broken.json"), weights, torch.device("cpu"), "fp32")
    assert "\n" not in str(error.value)
    config = json.loads((folder / "one.json").read_text())
    config["reinforce"] = {
        "image_augmentation": {**AUGMENTATION, "random_resized_crop": {"size": 40}}
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        SystemExit, match=r"the crop is \[40, 40\] pixels, but teacher .* takes \[32"
    ):
        reinforce.main(arguments(folder, tmp_path / "out", config=tmp_path / "config.json"))
    assert not (tmp_path / "out").exists()
