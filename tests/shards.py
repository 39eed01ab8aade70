"""Small real shards for the tests: tars of real JPEGs, captions and reinforcements."""

import gzip
import io
import json
import tarfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch.nn.functional import normalize

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


def reinforced_sample(
    seed, augmentations=4, captions=3, width=12, bf16=False, as_string=False, kind=None
):
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
    kind = kind or ("pth.gz" if bf16 else "npz")
    members[kind] = stored_embeddings(image_emb, text_emb, kind != "npz", kind)
    return members


def dfndr_sample(
    seed,
    lists,
    originals=1,
    augmentations=4,
    width=12,
    bf16=False,
    in_text_emb=(),
    unit=False,
    kind=None,
):
    """The members of one joined sample of the DFNDR layout, in which everything says what it is.

    Row a of ``image_emb`` begins with ``9, a, seed``; row c of the original captions with ``0, c,
    seed``; row s of list k (from 1) with ``k, s, seed``. The captions are "caption k s of seed".

    Args:
        lists: numbers of synthetic captions, by key of ``syn.json``.
        originals: number of original captions; several are stored as ``texts`` in ``json``.
        in_text_emb: keys of lists whose embeddings follow the original captions' in ``text_emb``;
            the others are in ``<key>_emb``.
        unit: scale each half of an embedding to length 1, as teachers do.
    """

    def embed(kind, count):
        rows = torch.zeros(count, width)
        rows[:, 0], rows[:, 1], rows[:, 2] = kind, torch.arange(count), seed
        if unit:
            rows[:, 3] = rows[:, width // 2] = 1
            rows = torch.cat([normalize(half) for half in rows.chunk(2, dim=1)], dim=1)
        return rows

    members = reinforced_sample(seed, augmentations, bf16=bf16)
    captions = {
        key: [f"caption {k} {s} of {seed}" for s in range(count)]
        for k, (key, count) in enumerate(lists.items(), 1)
    }
    texts = [f"caption 0 {c} of {seed}" for c in range(originals)]
    arrays = {f"{key}_emb": embed(k, count) for k, (key, count) in enumerate(lists.items(), 1)}
    tail = [arrays.pop(f"{key}_emb") for key in in_text_emb]
    arrays |= {
        "image_emb": embed(9, augmentations),
        "text_emb": torch.cat([embed(0, originals), *tail]),
    }
    members["syn.json"] = json.dumps(captions).encode()
    members["txt"] = texts[0].encode()
    if originals > 1:
        members["json"] = json.dumps({"uid": uid(seed), "texts": texts}).encode()
    kind = kind or ("pth.gz" if bf16 else "npz")
    members.pop("pth.gz" if bf16 else "npz")
    members[kind] = stored_embeddings(bf16=kind != "npz", kind=kind, **arrays)
    return members


def stored_embeddings(image_emb, text_emb, bf16=False, kind=None, **others):
    arrays = {"image_emb": image_emb, "text_emb": text_emb, **others}
    stream = io.BytesIO()
    if kind == "safetensors":
        return safetensors.torch.save({name: array.bfloat16() for name, array in arrays.items()})
    if bf16:
        torch.save({name: array.bfloat16() for name, array in arrays.items()}, stream)
        return gzip.compress(stream.getvalue())
    np.savez(stream, **{name: array.numpy() for name, array in arrays.items()})
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
