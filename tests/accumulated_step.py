"""Compare the trainer's step with and without gradient accumulation.

test_trainer.py runs this script with a patched tree on PYTHONPATH. It prints, as JSON, the largest
relative difference of any parameter's gradient between one batch and the same batch as several
micro-batches, and the relative difference of the logit scale's gradient.
"""

import json
import os
import sys
from importlib import import_module
from types import SimpleNamespace

import open_clip
import torch

TRAINER = os.environ["TRAINER"]
Batch = import_module(f"{TRAINER}.dr.batch").Batch
create_loss = import_module(f"{TRAINER}.dr.loss").create_loss
register_model = import_module(f"{TRAINER}.dr.params").register_model
parse_args = import_module(f"{TRAINER}.params").parse_args
train_one_epoch = import_module(f"{TRAINER}.train").train_one_epoch

BATCH, PARTS, WIDTH = 12, 3, 10


class Loader(list):
    num_samples = BATCH

    @property
    def num_batches(self):
        return len(self)


def gradients(model_config, options, captions, parts):
    torch.manual_seed(0)
    config = [
        "--dataset-reinforcement",
        "--dataset-reinforcement-config",
        sys.argv[2],
        "--distill-teacher-dimension",
        "6",
        "4",
    ]
    args = parse_args(
        [
            *config,
            "--distill-logit-scale",
            "20",
            "--precision",
            "fp32",
            "--accum-freq",
            str(parts),
            *options,
        ]
    )
    vars(args).update(
        device="cpu",
        rank=0,
        world_size=1,
        distill=False,
        wandb=False,
        local_rank=0,
        skip_scheduler=True,
    )
    model = open_clip.create_model(register_model(model_config), output_dict=True)
    whole = (
        torch.randn(BATCH, 3, 32, 32),
        torch.randint(1, 400, (BATCH, captions, 16)),
        torch.randn(BATCH, WIDTH),
        torch.randn(BATCH, captions, WIDTH),
    )
    statistics = torch.tensor([[0.0] * 3, [1.0] * 3])  # what images are normalised with
    chunks = zip(*(tensor.chunk(parts) for tensor in whole), strict=True)
    loader = Loader(
        Batch(images, texts, [], image_emb, text_emb, statistics)
        for images, texts, image_emb, text_emb in chunks
    )
    data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train_one_epoch(model, data, create_loss(args), 0, optimizer, None, None, None, args)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


worst, scale = 0.0, 0.0
for captions in (1, 2):
    for weights in (["0", "1"], ["0.25", "0.75"]):
        options = ["--distill-loss-weights", *weights, "--distill-average-after-softmax"]
        one, several = (gradients(sys.argv[1], options, captions, parts) for parts in (1, PARTS))
        for name, expected in one.items():
            difference = float(
                (several[name] - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
            )
            worst = max(worst, difference)
            scale = max(scale, difference) if name == "logit_scale" else scale
print(json.dumps({"worst": worst, "logit_scale": scale}))
