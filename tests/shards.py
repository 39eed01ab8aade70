"""Small real shards for the tests: tars of real JPEGs, captions and reinforcements."""

import gzip
import io
import json
import tarfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dr.transforms import compose_from_config


def write_shard(path, samples):
    """Write a WebDataset tar.

    Args:
        path: the tar to write; its folder is made.
        samples: iterable of ``(key, {extension: bytes})``, written in this order as
            ``<key>.<extension>``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def read_shard(path):
    """Return ``[(member name, bytes), …]`` of a tar, in order."""
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar if member.isfile()]


def read_samples(path):
    """Return ``{key: {extension: bytes}}`` of a tar, in order."""
    samples = {}
    for name, data in read_shard(path):
        key, _, extension = name.partition(".")
        samples.setdefault(key, {})[extension] = data
    return samples


def read_tars(folder):
    """Return ``{name: bytes}`` of the tars in a folder and below it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*.tar"))
    }


# --- reinforced samples ---------------------------------------------------------------------------
AUGMENTATION = {
    "to_rgb": {"enable": True},
    "random_resized_crop": {"size": 32, "interpolation": "bicubic"},
    "rand_augment": {"enable": True, "p": 1.0},
    "to_tensor": {"enable": True},
    "normalize": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    },
}


def picture(seed, height=40, width=48):
    """A smooth coloured picture, different for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.BICUBIC)


def encode(img, image_format="JPEG"):
    stream = io.BytesIO()
    img.save(stream, image_format)
    return stream.getvalue()


def uid(seed):
    return f"{seed:032x}"


def reinforced_sample(seed, augmentations=4, captions=3, width=12, bf16=False, as_string=False):
    """The members of one joined sample by extension.

    Row a of ``image_emb`` is ``seed + a / 64`` throughout, row t of ``text_emb`` is
    ``-seed - t / 64``, and caption t of sample s is "caption t of s", so that a test can see which
    rows came with which caption.
    """
    torch.manual_seed(seed)
    img, compose = picture(seed), compose_from_config(AUGMENTATION)
    params = [compose.compress(compose(img)[1]) for _ in range(augmentations)]
    image_emb = seed + torch.arange(augmentations)[:, None] / 64 + torch.zeros(1, width)
    text_emb = -seed - torch.arange(1 + captions)[:, None] / 64 + torch.zeros(1, width)
    members = {
        "jpg": encode(img),
        "txt": f"caption 0 of {seed}".encode(),
        "url.txt": b"https://example.org/",
        "syn.json": json.dumps(
            {"syn_text": [f"caption {1 + t} of {seed}" for t in range(captions)]}
        ).encode(),
        "paug.json": json.dumps(
            {"param_aug": json.dumps(params) if as_string else params}
        ).encode(),
        "json": json.dumps({"uid": uid(seed)}).encode(),
    }
    members["pth.gz" if bf16 else "npz"] = stored_embeddings(image_emb, text_emb, bf16)
    return members


def stored_embeddings(image_emb, text_emb, bf16=False):
    stream = io.BytesIO()
    if bf16:
        torch.save({"image_emb": image_emb.bfloat16(), "text_emb": text_emb.bfloat16()}, stream)
        return gzip.compress(stream.getvalue())
    np.savez(stream, image_emb=image_emb.numpy(), text_emb=text_emb.numpy())
    return stream.getvalue()


def tokenizer(texts):
    """Caption t of sample s -> [t, s]."""
    return torch.tensor([[int(text.split()[1]), int(text.split()[3])] for text in texts])


def reinforcement_options(folder, **others):
    """The trainer's options of reinforced training, with a config in ``folder``, and ``others``."""
    config = folder / "config.json"
    config.write_text(json.dumps({"reinforce": {"image_augmentation": AUGMENTATION}}))
    return Namespace(
        **{
            "dataset_reinforcement": True,
            "dataset_reinforcement_config": str(config),
            "dataset_reinforcement_mix_synthetic": False,
            "dataset_reinforcement_mix_synthetic_ratio": 0.0,
            "dataset_reinforcement_syn_text_key_regex": "^syn_text.*$",
            "dataset_reinforcement_filter_image_size": 0,
            "dataset_reinforcement_sample_sequential": False,
            "distill_teacher_dimension": [8, 4],
            "image_interpolation": None,
            **others,
        }
    )


def write_reinforced_shards(folder, shards=2, samples=20, **kwargs):
    """Write joined shards of different samples; returns the brace pattern that names them."""
    for shard in range(shards):
        seeds = range(shard * samples, (shard + 1) * samples)
        write_shard(
            Path(folder) / f"{shard:08d}.tar",
            [(uid(seed), reinforced_sample(seed, **kwargs)) for seed in seeds],
        )
    return f"{folder}/{{00000000..{shards - 1:08d}}}.tar"
