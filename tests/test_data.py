"""Shards become batches: what belongs together stays together, and bad samples cost nothing but themselves."""

import itertools
import json
import logging
import random
from argparse import Namespace

import pytest
import torch
import webdataset as wds
from shards import (
    AUGMENTATION,
    reinforced_sample,
    reinforcement_options,
    stored_embeddings,
    tokenizer,
    uid,
    write_reinforced_shards,
    write_shard,
)
from torch.utils.data import DataLoader
from torchvision import transforms as T

from dr.batch import unpack_batch
from dr.data import UsableSamples, student_augmentation, training_stages
from dr.sample import PLAIN_MEMBERS, decode_image
from dr.transforms import compose_from_config, split_for_device, to_normalized


def preprocess(size=24, interpolation=T.InterpolationMode.BICUBIC, mean=(0.5, 0.4, 0.3)):
    """A training transform as OpenCLIP's image_transform makes it."""
    return T.Compose(
        [
            T.RandomResizedCrop(size, interpolation=interpolation),
            T.ToTensor(),
            T.Normalize(mean, (0.2, 0.2, 0.2)),
        ]
    )


def options(tmp_path, **changes):
    return reinforcement_options(tmp_path, **{"batch_size": 8, **changes})


def pipeline(args, shards, repeat=True, is_train=True):
    """As the patched get_wds_dataset puts it together, without shuffling."""
    shards = wds.SimpleShardList(shards).urls
    stages = training_stages(args, preprocess(), tokenizer, is_train, len(shards))
    source = ({"url": url} for url in (itertools.cycle(shards) if repeat else shards))
    return wds.DataPipeline(
        lambda: source, stages.shards, stages.open, stages.read, *stages.prepare
    )


def test_a_batch_holds_images_texts_and_the_rows_that_belong_to_them(tmp_path):
    random.seed(0)
    batch = next(iter(pipeline(options(tmp_path), write_reinforced_shards(tmp_path))))
    images, texts, image_emb, text_emb, statistics = batch
    assert images.shape == (8, 24, 24, 3) and images.dtype == torch.uint8
    assert torch.equal(statistics, torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.2, 0.2]]))
    assert texts.shape == (8, 2, 2) and image_emb.shape == (8, 12) and text_emb.shape == (8, 2, 12)
    assert torch.equal(
        texts[:, :, 1], torch.arange(8)[:, None].expand(8, 2)
    )  # the samples, in order
    assert (texts[:, 0, 0] == 0).all() and (texts[:, 1, 0] > 0).all()
    assert torch.equal(text_emb[:, :, 0], -texts[:, :, 1] - texts[:, :, 0] / 64)
    assert torch.equal(image_emb[:, 0].floor(), torch.arange(8.0))


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_of_both_precisions_make_float32_batches_without_rounding(tmp_path, workers):
    stored = [3.0, 1 + 2**-20]  # the second is no bfloat16
    samples = []
    for seed, bf16 in enumerate([True, False] * 8):
        member = stored_embeddings(*[torch.full((4, 12), stored[not bf16])] * 2, bf16)
        sample = {**reinforced_sample(seed, bf16=bf16), "pth.gz" if bf16 else "npz": member}
        samples.append((uid(seed), sample))
    write_shard(tmp_path / "0.tar", samples)
    source = pipeline(options(tmp_path), str(tmp_path / "0.tar"))
    _, _, image_emb, text_emb, _ = next(
        iter(DataLoader(source, batch_size=None, num_workers=workers))
    )
    assert image_emb.dtype == text_emb.dtype == torch.float32
    assert image_emb[:, 0].tolist() == text_emb[:, 1, 0].tolist() == stored * 4


def test_large_samples_end_a_block_early(tmp_path, monkeypatch):
    monkeypatch.setattr("dr.data.BLOCK_BYTES", 20_000)  # a sample holds some 3 KB
    read, opened = [], training_stages(options(tmp_path), preprocess(), tokenizer, True, 1)
    members = [{**reinforced_sample(seed), "__key__": uid(seed)} for seed in range(100)]

    def source():
        for sample in members:
            read.append(sample["__key__"])
            yield sample

    drawn = opened.read(source())
    size = sum(map(len, members[0].values()))
    assert next(drawn)["__key__"] == uid(0) and 1 < len(read) <= 20_000 // size + 2
    assert [sample["__key__"] for sample in drawn] == [uid(seed) for seed in range(1, 100)]


def test_the_image_is_the_stored_augmentation_at_the_students_size_and_normalisation(tmp_path):
    random.seed(1)
    batch = next(iter(pipeline(options(tmp_path), write_reinforced_shards(tmp_path))))
    config = {
        **AUGMENTATION,
        "random_resized_crop": {"size": 24, "interpolation": "bicubic"},
        "normalize": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]},
    }
    compose = compose_from_config(config)
    images, _, _ = unpack_batch(batch, torch.device("cpu"))
    for seed, (image, row) in enumerate(zip(images, batch[2][:, 0], strict=True)):
        sample = reinforced_sample(seed)
        params = json.loads(sample["paug.json"])["param_aug"][round(float(row - seed) * 64)]
        assert torch.equal(
            image, compose.reapply(decode_image(sample), compose.decompress(params))[0]
        )


def test_erased_images_are_the_stored_augmentation_too(tmp_path):
    """Erasing is done on floats, so these images leave the worker as such."""
    config = {**AUGMENTATION, "random_erase": {"p": 1.0, "value": 0.3}}
    compose = compose_from_config(student_augmentation(config, preprocess()))
    img = decode_image(reinforced_sample(0))
    whole, params = compose(img)
    early, statistics = split_for_device(compose)
    assert torch.equal(to_normalized(early.reapply(img, params)[0][None], statistics)[0], whole)


def test_one_caption_an_image_when_mixing(tmp_path):
    args = options(
        tmp_path,
        dataset_reinforcement_mix_synthetic=True,
        dataset_reinforcement_mix_synthetic_ratio=0.5,
        batch_size=40,
    )
    _, texts, _, text_emb, _ = next(iter(pipeline(args, write_reinforced_shards(tmp_path))))
    assert texts.shape == (40, 1, 2) and text_emb.shape == (40, 1, 12)
    assert torch.equal(text_emb[:, :, 0], -texts[:, :, 1] - texts[:, :, 0] / 64)
    assert 8 <= (texts[:, 0, 0] > 0).sum() <= 32


@pytest.mark.parametrize(
    "interpolation", [T.InterpolationMode.BICUBIC, T.InterpolationMode.BILINEAR]
)
def test_size_interpolation_and_normalisation_follow_the_student(interpolation):
    config = student_augmentation(
        AUGMENTATION, preprocess(256, interpolation, mean=(0.0, 0.0, 0.0))
    )
    assert config["random_resized_crop"] == {
        "size": [256, 256],
        "interpolation": interpolation.value,
    }
    assert config["normalize"] == {"mean": [0.0, 0.0, 0.0], "std": [0.2, 0.2, 0.2]}
    config = student_augmentation(AUGMENTATION, preprocess(), "bilinear")
    assert config["random_resized_crop"]["interpolation"] == "bilinear"


def test_broken_samples_are_skipped_with_key_shard_and_reason(tmp_path, caplog):
    broken = {1: {"npz": None}, 2: {"jpg": b"gone"}, 4: {"paug.json": b'{"param_aug": [1]}'}}
    samples = []
    for seed in range(6):
        members = {**reinforced_sample(seed), **broken.get(seed, {})}
        samples.append(
            (uid(seed), {name: data for name, data in members.items() if data is not None})
        )
    shard = write_shard(tmp_path / "00000000.tar", samples)
    (batch,) = pipeline(options(tmp_path, batch_size=3), str(shard), repeat=False)
    assert batch[1][:, 0, 1].tolist() == [0, 3, 5]
    messages = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 3
    for seed, reason in (
        (1, "lacks embeddings"),
        (2, "undecodable image"),
        (4, "row counts disagree"),
    ):
        (message,) = (m for m in messages if uid(seed) in m)
        assert reason in message and str(shard) in message and "number 1 " in message


def test_warnings_of_a_kind_get_rarer_and_keep_counting(tmp_path, caplog):
    samples = [(uid(seed), {"txt": b"caption"}) for seed in range(1000)]
    shard = write_shard(tmp_path / "00000000.tar", [*samples, (uid(1000), reinforced_sample(1000))])
    list(pipeline(options(tmp_path, batch_size=1), str(shard), repeat=False))
    counts = [record.message.split("(number ")[1].split()[0] for record in caplog.records]
    assert counts == ["1", "2", "3", "4", "5", "10", "100", "1000"]


def test_another_embedding_width_is_refused_at_the_first_sample_and_skipped_later(tmp_path, caplog):
    shards = write_reinforced_shards(tmp_path)
    args = options(tmp_path, distill_teacher_dimension=[8, 8])
    with pytest.raises(ValueError, match="12 wide, expected 16 by --distill-teacher-dimension"):
        next(iter(pipeline(args, shards)))
    samples = [
        (uid(seed), reinforced_sample(seed, width=9 if seed == 2 else 12)) for seed in range(4)
    ]
    shard = write_shard(tmp_path / "odd.tar", samples)
    (batch,) = pipeline(options(tmp_path, batch_size=3), str(shard), repeat=False)
    assert batch[1][:, 0, 1].tolist() == [0, 1, 3]
    assert "embedding width" in caplog.text


@pytest.mark.parametrize("repeat", [True, False], ids=["resampled", "in passes"])
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"jpg": None}, r"40 x lacks an image \(jpg or jpeg or png or webp\)"),
        ({"jpg": b"gone"}, "40 x undecodable image"),
        ({"npz": b"gone"}, "40 x unreadable npz"),
    ],
    ids=["lacking", "undecodable", "unreadable"],
)
def test_a_worker_without_a_usable_sample_stops_and_says_what_is_lacking(
    tmp_path, repeat, members, message
):
    for shard in range(2):
        samples = []
        for seed in range(20 * shard, 20 * shard + 20):
            sample = {**reinforced_sample(seed), **members}
            samples.append(
                (uid(seed), {name: data for name, data in sample.items() if data is not None})
            )
        write_shard(tmp_path / f"{shard:08d}.tar", samples)
    if repeat:
        message = message.replace("40 x", r"\d+ x")
    with pytest.raises(RuntimeError, match=message) as raised:
        next(iter(pipeline(options(tmp_path), f"{tmp_path}/{{00000000..00000001}}.tar", repeat)))
    assert "not one sample can be used" in str(
        raised.value
    ) and "embeddings (npz or pth.gz)" in str(raised.value)


def test_shards_without_any_sample_stop_the_run(tmp_path):
    shard = write_shard(tmp_path / "empty.tar", [])
    with pytest.raises(RuntimeError, match="no readable sample"):
        next(iter(pipeline(options(tmp_path), str(shard))))


def test_one_usable_sample_is_enough_to_go_on(tmp_path):
    samples = [(uid(seed), {"txt": b"caption"}) for seed in range(50)]
    shard = write_shard(tmp_path / "00000000.tar", [*samples, (uid(51), reinforced_sample(51))])
    batches = iter(pipeline(options(tmp_path, batch_size=1), str(shard)))
    for _ in range(120):  # many passes over the shard
        assert next(batches)[1][0, 0, 1] == 51


def test_plain_training_keeps_image_and_caption_only():
    stages = training_stages(Namespace(dataset_reinforcement=False), None, None, True, 1)
    sample = {"__key__": "k", "__url__": "u", **reinforced_sample(0), "pickle": b"", "webp": b""}
    (kept,) = stages.read([sample])
    assert set(kept) == {"__key__", "__url__", "jpg", "webp", "txt"}
    assert stages.prepare is None


def test_validation_is_never_reinforced_and_may_be_empty_in_a_worker(tmp_path):
    stages = training_stages(options(tmp_path), preprocess(), tokenizer, False, 1)
    assert stages.prepare is None
    assert list(stages.used([])) == []


def test_a_worker_that_once_used_a_sample_goes_on_through_bad_shards():
    """Drawn with replacement, the same bad shards may come up many times in a row."""
    samples = UsableSamples(2, PLAIN_MEMBERS)
    assert list(samples.count_used([1])) == [1]
    for _ in range(2):  # two epochs of the trainer
        for _ in zip(
            samples.shards(itertools.cycle([{"url": "a"}, {"url": "b"}])), range(100), strict=False
        ):
            samples.read += 1000


def test_giving_up_waits_for_the_shuffle_buffer():
    """Samples that are still in the shuffle buffer may be the usable ones."""
    samples = UsableSamples(2, PLAIN_MEMBERS)
    shards = samples.shards(itertools.cycle([{"url": "a"}, {"url": "b"}]))
    opened = 0
    with pytest.raises(RuntimeError, match="not one sample"):
        for _ in shards:
            opened += 1
            samples.read += 1000
    assert opened == 2 + 5  # both shards, then 5,000 samples more


def test_giving_up_waits_until_every_shard_was_opened():
    """Of few shards drawn with replacement one may come up late."""
    samples = UsableSamples(2, PLAIN_MEMBERS)
    for _ in zip(samples.shards(itertools.repeat({"url": "a"})), range(100), strict=False):
        samples.read += 1000
