"""docs/your-data.md: its commands lead from a folder of pictures to a trained and evaluated model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import ROOT, environment
from shards import encode, picture, read_samples
from test_caption import MODEL as CAPTIONER
from test_caption import save_captioner

from dr.weights import register_model

STUDENT = ROOT / "tests" / "data" / "tiny_vit.json"
PICTURES = 200


def read_blocks(kind):
    page = (ROOT / "docs" / "your-data.md").read_text()
    return re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)


def save_teachers(folder):
    """Two teachers of random weights, which take images of 32 and of 48 pixels."""
    config = json.loads(STUDENT.read_text())
    config["vision_cfg"]["image_size"] = 48
    (folder / "tiny_48.json").write_text(json.dumps(config))
    models = [STUDENT, folder / "tiny_48.json"]
    for number, model in enumerate(models):
        torch.manual_seed(number)
        state = open_clip.create_model(register_model(str(model))).state_dict()
        torch.save(state, folder / f"teacher-{number}.pt")
    weights = [folder / f"teacher-{number}.pt" for number in range(2)]
    return {
        "model_name": ",".join(map(str, models)),
        "pretrained": ",".join(map(str, weights)),
        "num_samples": 2,
    }


@pytest.mark.slow
@pytest.mark.extended
def test_the_page_is_walked_as_typed_on_200_pictures_with_small_models(pinned_tree, tmp_path):
    settings, steps, *_ = read_blocks("bash")
    config = json.loads(settings.split("<<'JSON'\n")[1].removesuffix("JSON\n"))
    config |= save_teachers(tmp_path)
    config["reinforce"]["image_augmentation"]["random_resized_crop"]["size"] = 32
    for n in range(PICTURES):
        path = tmp_path / "pictures" / str(n % 3) / f"{n}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(n)) if n else b"gone")
        path.with_suffix(".txt").write_text(f"picture {n}")
    save_captioner(tmp_path / "coca.pt")
    given = {
        "IMAGES": "pictures",
        "CAPTIONER": f"--model {CAPTIONER} --pretrained coca.pt --captions 2 --max-tokens 6",
        "D": "$PWD/datasets/mine",
        "PROCESSES": "1",
        "SAMPLES": "70",
        "WIDTHS": "16 16",
    }
    names = re.findall(r"^([A-Z]+)=", settings, re.MULTILINE)
    assert names == list(given)  # of the page
    lines = [f'{name}="{value}"' for name, value in given.items()]
    lines += ["export NUM_NODES=1 NUM_GPUS=0 IMAGENET_VAL= REPORT_TO="]
    lines += [
        f"export MODEL={STUDENT} GLOBAL_BATCH=16 ITERATIONS=2 WARMUP=1 CHECKPOINTS=1 WORKERS=1"
    ]
    lines += ["mkdir -p $D", f"cat >$D/config.json <<'JSON'\n{json.dumps(config)}\nJSON", steps]

    for name in ("scripts", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "open_clip").symlink_to(pinned_tree)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = "set -euo pipefail\n" + "\n".join(lines)
    env = environment(PATH=path)
    env.pop("PYTHON")  # the page has python
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "usable: training can use 139 of the 139 samples read" in done.stdout
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert {"image_to_text_R@1", "text_to_image_R@1"} <= set(result)

    mine = tmp_path / "datasets" / "mine"
    lines = (mine / "pairs" / "bad_images.jsonl").read_text().splitlines()
    bad = [json.loads(line) for line in lines]
    assert [(entry["source"], entry["reason"]) for entry in bad] == [
        ("0/0.jpg", "undecodable image")
    ]
    assert sorted(path.name for path in (mine / "captions").glob("*.jsonl")) == [
        "00000000.jsonl",
        "00000001.jsonl",
    ]
    samples = read_samples(mine / "joined" / "00000001.tar")
    assert all({"jpg", "txt", "syn.json", "paug.json", "npz"} < set(m) for m in samples.values())
    teachers = json.loads((mine / "reinforcements" / "reinforce.json").read_text())["teachers"]
    assert [teacher["input_size"] for teacher in teachers] == [[32, 32], [48, 48]]
