"""teacher_scale.py finds the scale at which the pairs of the data are most probable."""

import json
import re
import sys

import pytest
import teacher_scale
import torch
from conftest import ROOT, environment
from conftest import run as run_command
from shards import AUGMENTATION, reinforced_sample, stored_embeddings, uid, write_shard
from test_trainer import settings, train
from torch.nn.functional import cross_entropy, normalize

SAMPLES, WIDTHS, BATCH = 96, [16, 8], 32
AS_IN_TRAINING = {
    "random_resized_crop": {"size": 64, "scale": [0.9, 1.0], "interpolation": "bicubic"},
    "rand_augment": {"enable": False},
}


def make_pairs(noise, seed, width):
    torch.manual_seed(seed)
    images = normalize(torch.randn(SAMPLES, width))
    return images, normalize(images + noise * torch.randn(SAMPLES, width))


@pytest.fixture
def world(tmp_path):
    """Reinforced shards of two teachers; the original captions fit worse than the synthetic ones."""
    pairs = {
        noise: [make_pairs(noise, seed, width) for seed, width in enumerate(WIDTHS)]
        for noise in (0.6, 0.2)
    }
    images = torch.cat([images for images, _ in pairs[0.2]], dim=1)
    texts = [torch.cat([texts for _, texts in pairs[noise]], dim=1) for noise in (0.6, 0.2)]
    samples = []
    for n in range(SAMPLES):
        members = reinforced_sample(n, augmentations=2, captions=1)
        rows = {"image_emb": images[[n, n]], "text_emb": torch.stack([texts[0][n], texts[1][n]])}
        samples.append((uid(n), {**members, "npz": stored_embeddings(**rows)}))
    samples.insert(5, (uid(1000), {"txt": b"not reinforced"}))
    rows = {"image_emb": torch.full((2, 24), torch.nan), "text_emb": texts[0][:2]}
    samples.insert(6, (uid(1001), {**members, "npz": stored_embeddings(**rows)}))
    write_shard(tmp_path / "joined" / "00000000.tar", samples)
    config = {"model_name": "a,b", "pretrained": "x,y", "num_samples": 2}
    config["reinforce"] = {"image_augmentation": AUGMENTATION}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path, pairs


def run(folder, *options):
    given = [folder / "joined", "--config", folder / "config.json", *options]
    teacher_scale.main([str(argument) for argument in given])


def test_scales_and_recall_are_those_of_a_gradient_descent_on_the_same_batches(world, capsys):
    folder, pairs = world
    run(folder, "--teacher-dimension", 16, 8, "--batch-size", BATCH)
    said = capsys.readouterr().out
    assert "96 samples in batches of 32; 2 bad ones skipped" in said
    lines = [line.split() for line in said.splitlines() if line.startswith(("orig", "synth"))]
    suggested = {}
    for kind, noise in (("original", 0.6), ("synthetic", 0.2)):
        rows = [line for line in lines if line[0] == kind]
        for (images, texts), row in zip(pairs[noise], rows[:2], strict=True):
            scale = torch.tensor(1.0, requires_grad=True)  # of its logarithm
            optimizer = torch.optim.LBFGS([scale], max_iter=50, line_search_fn="strong_wolfe")

            def mean_loss(images=images, texts=texts, scale=scale):
                losses = []
                for i, t in zip(images.split(BATCH), texts.split(BATCH), strict=True):
                    logits, labels = scale.exp() * i @ t.T, torch.arange(BATCH)
                    losses += [cross_entropy(logits, labels), cross_entropy(logits.T, labels)]
                return sum(losses) / len(losses)

            def step(optimizer=optimizer, mean_loss=mean_loss):
                optimizer.zero_grad()
                loss = mean_loss()
                loss.backward()
                return loss

            optimizer.step(step)
            best = float(scale.detach().exp())
            suggested.setdefault(kind, []).append(best)
            assert float(row[1]) == pytest.approx(best, rel=0.05)
            assert float(row[2]) == pytest.approx(-mean_loss().item(), abs=5e-3)
            shape = (SAMPLES // BATCH, BATCH, -1)
            similar = images.view(shape) @ texts.view(shape).transpose(1, 2)
            for direction, column in ((similar, row[3]), (similar.transpose(1, 2), row[4])):
                recall = (direction.argmax(2) == torch.arange(BATCH)).float().mean()
                assert column == f"{recall:.1%}"
        assert rows[2][-1] == "ensemble" and float(rows[2][1]) > min(float(r[2]) for r in rows[:2])
    found = said.split('DISTILL_LOGIT_SCALE="')[1].split('"')[0].split()
    assert [float(scale) for scale in found] == pytest.approx(suggested["synthetic"], rel=0.06)


def test_embeddings_of_other_teachers_and_empty_folders_are_one_line(world, capsys):
    folder, _ = world
    with pytest.raises(teacher_scale.ShardError, match="numbers, expected 20"):
        run(folder, "--teacher-dimension", 10, 10)
    shard = folder / "joined" / "00000000.tar"
    shard.write_bytes(shard.read_bytes()[:-20000])
    with pytest.raises(teacher_scale.ShardError, match=r"00000000\.tar is not a whole tar"):
        run(folder, "--teacher-dimension", 16, 8)
    shard.unlink()
    with pytest.raises(SystemExit, match="no shards"):
        run(folder, "--teacher-dimension", 16, 8)


@pytest.mark.slow
@pytest.mark.extended
def test_openclip_trains_the_scale_of_a_quickstart_teacher_to_the_suggested_one(
    pinned_tree, tmp_path
):
    """A short training leaves the scale below its optimum, so it goes on, for the scale alone."""
    scripts, data, batch = ROOT / "scripts", tmp_path / "datasets", 64
    clean, pattern = data / "DataComp-12M-clean", "{00000000..00000003}.tar"
    pairs = clean / "shards" / pattern

    model = ROOT / "configs" / "quickstart_vit.json"

    def call(*command):
        done = run_command(command, env=environment(pinned_tree), cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def train_teacher(name, *arguments, **changes):
        """The checkpoint, and the scale at the end."""
        changes |= {"MODEL": model, "NAME": name, "GLOBAL_BATCH": batch, "CHECKPOINTS": 1}
        environ = settings(pinned_tree, "", pairs, tmp_path / "logs", NUM_PROCESSES=1, **changes)
        done = train(pinned_tree, environ, *arguments, script="run_datacomp12m.sh")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        said = (tmp_path / "logs" / name / "out.log").read_text()
        path = tmp_path / "logs" / name / "checkpoints" / "epoch_1.pt"
        return path, float(re.findall(r"Logit Scale: ([0-9.]+)", said)[-1])

    options = ["--output", data, "--shards", 4, "--held-out", 20]
    call(sys.executable, scripts / "quickstart" / "data.py", *options)
    sources = ["--source", clean / pattern, "--source", data / "DataComp-12M-images"]
    options = [*sources, "--require", "image,caption", "--output", pairs.parent]
    call(sys.executable, scripts / "join_shards.py", *options)
    teacher, early = train_teacher("teacher", ITERATIONS=200, LR="2e-3", WARMUP=20)
    scale_alone = ["--pretrained", teacher, "--lock-image", "--lock-text"]
    _, learned = train_teacher("scale", *scale_alone, ITERATIONS=100, LR=0.03, WARMUP=5)

    config = {
        "model_name": str(model),
        "pretrained": str(teacher),
        "num_samples": 1,
        "reinforce": {"image_augmentation": {**AUGMENTATION, **AS_IN_TRAINING}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    reinforced = ["--config", tmp_path / "config.json", "--output", tmp_path / "reinforced"]
    reinforced += ["--synthetic-captions", data / "synthetic_captions.jsonl", "--input", pairs]
    call(sys.executable, scripts / "reinforce.py", *reinforced)
    options = ["--config", tmp_path / "config.json", "--batch-size", batch]
    said = call(sys.executable, scripts / "teacher_scale.py", tmp_path / "reinforced", *options)
    suggested = float(re.search(r'DISTILL_LOGIT_SCALE="(.*)"', said)[1])
    assert suggested == pytest.approx(learned, rel=0.2) and learned > 1.3 * early
