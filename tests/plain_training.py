"""Run with a tree on PYTHONPATH by test_trainer.py: plain training on plain shards, on a tree
patched or not.

Prints, as JSON, digests of the first batches and the losses of every step.
"""

import hashlib
import json
import logging
import os
import sys
from importlib import import_module

import open_clip
import torch

data, main, params = (
    import_module(f"{os.environ['TRAINER']}.{name}") for name in ("data", "main", "params")
)

# The trainer's sample shuffle is seeded by the clock: without it, what is left is what has to be
# the same.
data._SAMPLE_SHUFFLE_SIZE = data._SAMPLE_SHUFFLE_INITIAL = 1
model, shards, logs, resampled = sys.argv[1:]
options = [
    "--train-data", shards, "--train-num-samples", "48", "--dataset-type", "webdataset", "--batch-size", "8",
    "--workers", "2", "--epochs", "2", "--model", "tiny_vit", "--warmup", "2", "--lr", "1e-3", "--precision", "fp32",
    "--seed", "3", "--log-every-n-steps", "1", *(["--dataset-resampled"] if resampled == "resampled" else []),
]  # fmt: skip


def digest(tensors):
    return hashlib.sha256(
        b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)
    ).hexdigest()[:16]


class Losses(logging.Handler):
    found = []  # noqa: RUF012

    def emit(self, record):
        message = record.getMessage()
        if message.startswith("Train Epoch"):
            self.found.append(message.split("LR:")[1])


torch.set_num_threads(1)
open_clip.add_model_config(model)
args = params.parse_args(options)
vars(args).update(world_size=1, rank=0, distributed=False)
main.random_seed(3)
preprocess = main.create_model_and_transforms("tiny_vit")[1]
tokenizer = main.get_tokenizer("tiny_vit")
main.random_seed(3)
loader = data.get_wds_dataset(args, preprocess, True, tokenizer=tokenizer).dataloader
batches = [digest([batch[0], batch[1].squeeze(1)]) for batch in loader]

logging.getLogger().addHandler(Losses())
main.main([*options, "--logs", logs, "--name", "run"])
print(json.dumps({"batches": batches, "losses": Losses.found}))
