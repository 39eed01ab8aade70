"""Run by test_sampling_runs.py and sampling_coverage.py under torchrun, with a patched tree on
PYTHONPATH: the trainer itself, writing down what it trains on.

    torchrun … recorded_training.py RUNS.json

RUNS.json is a list of {"record": folder, "options": trainer's options, "event": what happens to
it}, run one after the other. Each rank appends to <folder>/<rank>.jsonl: {"epoch", "first",
"batches"} when it starts an epoch or goes on with it; for each batch {"samples", "captions",
"augmentations"}, decoded from the tensors that reach the model (see shards.reinforced_sample); and
for each step {"loss"}. Events, each on one rank:

    ["kill", rank, n]      SIGKILL before its n-th batch is trained on
    ["term", rank, n]      SIGTERM there
    ["kill saving", 0, n]  SIGKILL while the n-th checkpoint is written
    ["remove", rank, n, path]  the file is gone from there on
    ["slow", rank, s]      each batch takes s seconds longer
"""

import json
import os
import signal
import sys
import time
from importlib import import_module

import open_clip
import torch
import torch.distributed as dist

main, train, checkpoint = (
    import_module(f"{os.environ['TRAINER']}.{name}") for name in ("main", "train", "dr.checkpoint")
)

rank = int(os.environ.get("RANK", 0))


def make_tokenizer(model, **_):
    """ "caption t of s" -> [t, s, …, the end's token], the largest of the model's vocabulary."""
    end = open_clip.get_model_config(model)["text_cfg"]["vocab_size"] - 1

    def tokenizer(texts):
        tokens = torch.zeros(len(texts), 16, dtype=torch.long)
        tokens[:, -1] = end
        for row, text in zip(tokens, texts, strict=True):
            row[0], row[1] = (int(word) for word in text.split()[1::2])
        return tokens

    return tokenizer


def record(run):
    os.makedirs(run["record"], exist_ok=True)
    file = open(os.path.join(run["record"], f"{rank}.jsonl"), "a", buffering=1)  # noqa: SIM115
    what, where, number, *more = run.get("event") or (None, None, None)
    count = 0

    def write(**entry):
        file.write(json.dumps(entry) + "\n")

    def unpack_batch(batch, device):
        nonlocal count
        count += 1
        if where == rank and what == "slow":
            time.sleep(number)
        elif where == rank and count == number and what != "kill saving":
            if what == "remove":
                os.remove(more[0])
            else:
                os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM}[what])
        images, texts, teacher = original["unpack"](batch, device)
        samples = texts[: len(images), 1].tolist()
        augmentations = None
        if teacher:
            rows = teacher["dist_image_features"][:, 0].tolist()
            augmentations = [
                round((row - sample) * 64) for row, sample in zip(rows, samples, strict=True)
            ]
        captions = texts[-len(images) :, 0].tolist()
        write(
            samples=samples,
            captions=captions,
            augmentations=augmentations,
            images=images.double().sum().item(),
        )
        return images, texts, teacher

    def backward(loss, scaler):
        write(loss=loss.item())
        original["backward"](loss, scaler)

    def train_one_epoch(model, data, loss, epoch, *args, **kwargs):
        loader = data["train"].dataloader
        write(epoch=epoch, first=loader.first, batches=loader.num_batches)
        return original["epoch"](model, data, loss, epoch, *args, **kwargs)

    saved = 0

    def fsync(descriptor):
        nonlocal saved
        saved += 1
        if (
            what == "kill saving" and where == rank and saved == 2 * number - 1
        ):  # the folder is synchronised too
            os.truncate(descriptor, 1000)
            os.kill(os.getpid(), signal.SIGKILL)
        original["fsync"](descriptor)

    train.unpack_batch, train.backward, main.train_one_epoch, os.fsync = (
        unpack_batch,
        backward,
        train_one_epoch,
        fsync,
    )


original = {
    "unpack": train.unpack_batch,
    "backward": train.backward,
    "epoch": main.train_one_epoch,
    "fsync": os.fsync,
}
torch.set_num_threads(1)
main.get_tokenizer = make_tokenizer
assert checkpoint.os is os
with open(sys.argv[1]) as file:
    runs = json.load(file)
for run in runs:
    record(run)
    main.main([str(option) for option in run["options"]])
    dist.init_process_group = lambda *args, **kwargs: None  # the next run goes on in the same group
