"""Options that contradict each other are refused at start-up, naming both sides."""

import json
import sys

import pytest
from conftest import ROOT, environment, run
from shards import AUGMENTATION

pytestmark = pytest.mark.slow

CONFIG = ROOT / "configs" / "datacompdr12m.json"
GOOD = f"--dataset-reinforcement --dataset-reinforcement-config {CONFIG} --distill-logit-scale 100"
NO_CROP = {
    "reinforce": {
        "image_augmentation": {n: a for n, a in AUGMENTATION.items() if n != "random_resized_crop"}
    }
}
UNKNOWN = {"reinforce": {"image_augmentation": {"colour_jitter": {}}}}
REFUSED = [
    ("--dataset-reinforcement --distill-logit-scale 100", ["needs --dataset-reinforcement-config"]),
    (f"{GOOD} --dataset-reinforcement-config nowhere.json", ["nowhere.json", "No such file"]),
    (f"{GOOD} --dataset-reinforcement-config {{no_crop}}", ["no random_resized_crop"]),
    (f"{GOOD} --dataset-reinforcement-config {{unknown}}", ["colour_jitter"]),
    (f"{GOOD} --dataset-reinforcement-config {{no_json}}", ["no_json"]),
    (f"{GOOD} --dataset-reinforcement-config {{other}}", ["reinforce.image_augmentation"]),
    (GOOD.replace("--distill-logit-scale 100", ""), ["--distill-loss-weights 1.0 1.0", "no --distill-logit-scale"]),
    (f"{GOOD} --siglip", ["--dataset-reinforcement", "--siglip"]),
    (f"{GOOD} --model coca_ViT-B-32", ["--dataset-reinforcement", "CoCa model coca_ViT-B-32"]),
    (f"{GOOD} --distill-model ViT-B-32 --distill-pretrained x", ["--dataset-reinforcement", "--distill-model"]),
    (f"{GOOD} --model ViT-B-16-SigLIP", ["--dataset-reinforcement", "SigLIP model ViT-B-16-SigLIP"]),
    (f"{GOOD} --train-data pairs.csv", ["--dataset-reinforcement", "--train-data pairs.csv"]),
    (f"{GOOD} --horovod", ["--dataset-reinforcement", "--horovod"]),
    (f"{GOOD} --aug-cfg scale=0.5", ["--dataset-reinforcement", "--aug-cfg"]),
    (f"{GOOD} --dataset-type csv", ["--dataset-reinforcement", "--dataset-type csv"]),
    (
        f"{GOOD} --dataset-reinforcement-mix-synthetic --dataset-reinforcement-mix-synthetic-ratio 1.5",
        ["--dataset-reinforcement-mix-synthetic-ratio 1.5", "0 to 1"],
    ),
    (f"{GOOD} --dataset-reinforcement-mix-synthetic-ratio -0.1", ["ratio -0.1", "0 to 1"]),
    (f"{GOOD} --dataset-reinforcement-mix-synthetic-ratio 0.5", ["ratio 0.5", "without --dataset-reinforcement-mix"]),
    (f"{GOOD} --distill-loss-weights 0 0", ["--distill-loss-weights 0.0 0.0"]),
    (f"{GOOD} --distill-loss-weights -1 1", ["--distill-loss-weights -1.0 1.0"]),
    (f"{GOOD} --distill-teacher-dimension 768 0", ["--distill-teacher-dimension 768 0"]),
    (
        f"{GOOD} --distill-teacher-dimension 768 768 --distill-logit-scale 1 2 3",
        ["--distill-logit-scale has 3 values", "--distill-teacher-dimension 2"],
    ),
    (f"--dataset-reinforcement-config {CONFIG}", ["-config was given without --dataset-reinforcement"]),
    ("--distill-average-after-softmax", ["without --dataset-reinforcement"]),
    ("--dataset-without-replacement --dataset-resampled", ["--dataset-without-replacement", "--dataset-resampled"]),
    (
        "--dataset-without-replacement --train-data a.tar::b.tar --train-data-upsampling-factors 1::2",
        ["--dataset-without-replacement", "--train-data-upsampling-factors"],
    ),
    (
        "--dataset-without-replacement --train-data pipe:cat_0.tar",
        ["--dataset-without-replacement", "--train-data pipe:cat_0.tar: streams can't be read at any place"],
    ),
    ("--dataset-without-replacement --train-data https://a.b/0.tar", ["https://a.b/0.tar: streams can't be read"]),
    ("--dataset-without-replacement --train-data ab1://a/0.tar", ["--train-data ab1://a/0.tar: Protocol not known: ab1"]),
    ("--dataset-without-replacement --train-data pairs.csv", ["--dataset-without-replacement", "pairs.csv"]),
    ("--save-every-n-steps 5 --dataset-type synthetic", ["--save-every-n-steps", "--dataset-type synthetic"]),
    ("--save-every-n-steps 5 --horovod", ["--save-every-n-steps", "--horovod"]),
    ("--save-every-n-steps -1", ["--save-every-n-steps -1"]),
    ("--keep-last-k 0", ["--keep-last-k 0"]),
    ("--max-skipped-fraction 10", ["--max-skipped-fraction 10.0", "0 to 1"]),
    ("--total-steps 0 --train-num-samples 10", ["--total-steps 0", "1 or more"]),
    ("--total-steps 5", ["--total-steps 5 needs --train-num-samples"]),
    ("--total-steps 5 --train-num-samples 9 --horovod", ["--total-steps", "--horovod"]),
    ("--copy-codebase --logs {tree}/runs", ["--copy-codebase copies {tree}", "--logs {tree}/runs"]),
    (
        "--remote-sync file://{logs}/r --remote-sync-protocol fsspec --logs {logs}",
        ["--remote-sync file://{logs}/r is inside --logs"],
    ),
    (
        "--remote-sync {logs}/r/s --remote-sync-protocol fsspec --logs {logs}",
        ["--remote-sync {logs}/r/s is inside --logs"],
    ),
    ("--remote-sync s3://bucket/runs", ["--remote-sync s3://bucket/runs", "aws", "not installed"]),
    ("--model nowhere/model.json", ["no model config file nowhere/model.json"]),
    ("--model MobileCLIP3-S9", ["OpenCLIP has no model MobileCLIP3-S9", "open_clip_torch 3.2 and newer", "found 3."]),
    (
        "--model ViT-B-16 --pretrained nowhere.pt",
        ["--pretrained nowhere.pt: there is no such file", "no weights of this name for ViT-B-16", "openai, "],
    ),
    ("--use-bn-sync", ["--use-bn-sync works on GPUs only"]),
    (f"{GOOD} --distill-logit-bias -10", ["--distill-logit-bias", "sigmoid"]),
    (f"{GOOD} --dataset-reinforcement-syn-text-key-regex (", ["key-regex (: expected a regular expression"]),
    (f"{GOOD} --dataset-reinforcement-filter-image-size -1", ["filter-image-size -1"]),
    ("--dataset-reinforcement-sample-sequential", ["without --dataset-reinforcement"]),
    ("--dataset-reinforcement-syn-text-key-regex a", ["without --dataset-reinforcement"]),
    (
        "--pretrained {mobileclip_s1.pt} --image-mean 0.5 0.5 0.5",
        ["mobileclip_s1.pt", "mean [0.0, 0.0, 0.0], std [1.0, 1.0, 1.0], bilinear", "--image-mean [0.5, 0.5, 0.5]",
         "--ignore-pretrained-statistics"],
    ),
]  # fmt: skip
ACCEPTED = [
    "",
    "--siglip",
    "--dataset-without-replacement --train-data /data/{0..3}.tar --save-every-n-steps 5 --keep-last-k 1",
    "--dataset-resampled --save-every-n-steps 5 --max-skipped-fraction 0",
    f"{GOOD} --dataset-without-replacement --max-skipped-fraction 0.5",
    "--model coca_ViT-B-32",
    "--model MobileCLIP2-S4",
    "--model ViT-B-16 --pretrained openai",
    "--model MobileCLIP-S1 --pretrained datacompdr",
    f"{GOOD} --dataset-reinforcement-sample-sequential --dataset-reinforcement-filter-image-size 64",
    "--pretrained {mobileclip_s1.pt}",
    "--pretrained {mobileclip_s1.pt} --image-mean 0 0 0 --image-std 1 1 1 --image-interpolation bilinear",
    "--pretrained {mobileclip_s1.pt} --image-mean 0.5 0.5 0.5 --ignore-pretrained-statistics",
    "--copy-codebase --logs {tree}/logs",
    "--copy-codebase --logs {logs}",
    "--remote-sync file://{logs}-remote --remote-sync-protocol fsspec --logs {logs}",
    "--remote-sync memory://bucket --remote-sync-protocol fsspec --logs {logs}",
    "--total-steps 5 --train-num-samples 9",
    GOOD,
    f"{GOOD} --distill-teacher-dimension 768 768 --distill-logit-scale 100 50 --distill-average-after-softmax",
    f"{GOOD} --dataset-reinforcement-mix-synthetic --dataset-reinforcement-mix-synthetic-ratio 1.0",
    f"--dataset-reinforcement --dataset-reinforcement-config {CONFIG} --distill-loss-weights 1 0",
]
PARSE = """
import contextlib, importlib, io, json, os, sys
parse_args = importlib.import_module(os.environ["TRAINER"] + ".params").parse_args
for line in json.loads(sys.stdin.read()):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parse_args(line.split())
        print(json.dumps([0, ""]))
    except SystemExit as stop:
        print(json.dumps([stop.code, said.getvalue()]))
"""


def fill(text, names):
    """The text with {name} replaced; other braces are shard patterns."""
    for name, path in names.items():
        text = text.replace(f"{{{name}}}", str(path))
    return text


@pytest.fixture(scope="module")
def outcomes(tree, tmp_path_factory):
    """What the patched trainer's own parser says of each command line."""
    folder = tmp_path_factory.mktemp("configs")
    files = {
        "no_crop": json.dumps(NO_CROP),
        "unknown": json.dumps(UNKNOWN),
        "no_json": "{",
        "other": '{"a": 1}',
        "mobileclip_s1.pt": "",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    names = {"tree": tree, "logs": folder / "logs", **{name: folder / name for name in files}}
    lines = [fill(line, names) for line in [*(line for line, _ in REFUSED), *ACCEPTED]]
    environ = environment(
        tree, PATH="/usr/bin:/bin", CUDA_VISIBLE_DEVICES=""
    )  # without aws and GPUs
    done = run([sys.executable, "-c", PARSE], input=json.dumps(lines), env=environ)
    assert done.returncode == 0, done.stderr
    return names, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("index", range(len(REFUSED)), ids=[message[0] for _, message in REFUSED])
def test_contradicting_options_are_refused_in_one_line(outcomes, index):
    names, found = outcomes
    status, said = found[index]
    assert status == 2
    assert said.startswith("error: ") and said.count("\n") == 1
    for part in REFUSED[index][1]:
        assert fill(part, names) in said


def test_options_that_go_together_are_taken(outcomes):
    assert outcomes[1][len(REFUSED) :] == [[0, ""]] * len(ACCEPTED)
