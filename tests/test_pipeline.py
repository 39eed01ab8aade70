"""Shards become batches: what belongs together stays together, and bad samples cost nothing but
themselves."""

import itertools
import json
import logging
import random
from functools import partial

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
from torch.utils.data import DataLoader, IterableDataset
from torchvision import transforms as T

from dr.batch import unpack_batch
from dr.chain import Counts, SkipLimit, Streak, Tally, batches, in_blocks, shuffled
from dr.pipeline import (
    BaselineStages,
    adapt_augmentation,
    adapt_stages,
    keep_image_and_caption,
    make_processor,
)
from dr.sample import (
    PLAIN_MEMBERS,
    USED_MEMBERS,
    BadSample,
    BaselineProcessor,
    decode_image,
)
from dr.sampling import RandomChoice
from dr.sources import (
    MAX_UNREADABLE_SHARDS,
    Item,
    ShardReader,
    StreamState,
    passes,
    stream,
)
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
    others = {"batch_size": 8, "max_skipped_fraction": 1.0, "world_size": 1}
    return reinforcement_options(tmp_path, **{**others, "save_every_n_steps": 0, **changes})


def pipeline(args, shards, repeat=True):
    """The chain over a stream of shards, without shuffling."""
    urls = wds.SimpleShardList(shards).urls
    urls = itertools.cycle(urls) if repeat else urls
    processor = make_processor(args, preprocess())
    tally = Tally(processor.members, SkipLimit(10**9, 1.0))
    samples = stream(({"url": url} for url in urls), USED_MEMBERS.__contains__)
    for batch, _ in batches(samples, processor, tokenizer, args.batch_size, tally):
        yield batch


class Batches(IterableDataset):
    def __init__(self, *arguments):
        self.arguments = arguments

    def __iter__(self):
        return pipeline(*self.arguments)


def test_a_batch_holds_images_texts_and_the_rows_that_belong_to_them(tmp_path):
    random.seed(0)
    batch = next(iter(pipeline(options(tmp_path), write_reinforced_shards(tmp_path))))
    images, texts, uids, image_emb, text_emb, statistics = batch
    assert uids == [uid(seed) for seed in range(8)]
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
    source = Batches(options(tmp_path), str(tmp_path / "0.tar"))
    batch = next(iter(DataLoader(source, batch_size=None, num_workers=workers)))
    image_emb, text_emb = batch.image_emb, batch.text_emb
    assert image_emb.dtype == text_emb.dtype == torch.float32
    assert image_emb[:, 0].tolist() == text_emb[:, 1, 0].tolist() == stored * 4


def test_items_are_selected_in_blocks_and_nothing_is_lost(tmp_path):
    read = []
    items = in_blocks((read.append(number) or number for number in range(100)), 64)
    assert next(items) == 0 and len(read) == 64
    assert list(items) == list(range(1, 100))


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
    for seed, (image, row) in enumerate(zip(images, batch.image_emb[:, 0], strict=True)):
        sample = reinforced_sample(seed)
        params = json.loads(sample["paug.json"])["param_aug"][round(float(row - seed) * 64)]
        assert torch.equal(
            image, compose.reapply(decode_image(sample), compose.decompress(params))[0]
        )


def test_erased_images_are_the_stored_augmentation_too(tmp_path):
    """Erasing is done on floats, so these images leave the worker as such."""
    config = {**AUGMENTATION, "random_erase": {"p": 1.0, "value": 0.3}}
    compose = compose_from_config(adapt_augmentation(config, preprocess()))
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
    _, texts, _, _, text_emb, _ = next(iter(pipeline(args, write_reinforced_shards(tmp_path))))
    assert texts.shape == (40, 1, 2) and text_emb.shape == (40, 1, 12)
    assert torch.equal(text_emb[:, :, 0], -texts[:, :, 1] - texts[:, :, 0] / 64)
    assert 8 <= (texts[:, 0, 0] > 0).sum() <= 32


@pytest.mark.parametrize(
    "interpolation", [T.InterpolationMode.BICUBIC, T.InterpolationMode.BILINEAR]
)
def test_size_interpolation_and_normalisation_follow_the_student(interpolation):
    config = adapt_augmentation(AUGMENTATION, preprocess(256, interpolation, mean=(0.0, 0.0, 0.0)))
    assert config["random_resized_crop"] == {
        "size": [256, 256],
        "interpolation": interpolation.value,
    }
    assert config["normalize"] == {"mean": [0.0, 0.0, 0.0], "std": [0.2, 0.2, 0.2]}
    config = adapt_augmentation(AUGMENTATION, preprocess(), "bilinear")
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
    assert batch.texts[:, 0, 1].tolist() == [0, 3, 5]
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
    shard = write_shard(tmp_path / "00000000.tar", [(uid(1000), reinforced_sample(1000)), *samples])
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
    assert batch.texts[:, 0, 1].tolist() == [0, 1, 3]
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
    ) and "embeddings (npz or safetensors or pth.gz)" in str(raised.value)


def test_shards_without_any_sample_stop_the_run(tmp_path):
    shard = write_shard(tmp_path / "empty.tar", [])
    with pytest.raises(RuntimeError, match="no readable sample"):
        next(iter(pipeline(options(tmp_path), str(shard))))


def test_one_usable_sample_is_enough_to_go_on(tmp_path):
    samples = [(uid(seed), {"txt": b"caption"}) for seed in range(50)]
    shard = write_shard(tmp_path / "00000000.tar", [*samples, (uid(51), reinforced_sample(51))])
    made = pipeline(options(tmp_path, batch_size=1), str(shard))
    for _ in range(120):  # many passes over the shard
        assert next(made).texts[0, 0, 1] == 51


# --- OpenCLIP's stages ----------------------------------------------------------------------------
def passed(items):
    yield from items


def adapted(args, is_train, read=passed, decode=passed):
    """OpenCLIP's pipeline, with stages that do nothing for all that the test is not about."""
    stages = [read, *([passed] if is_train else []), passed, decode, passed, passed, passed, passed]
    return adapt_stages([passed, *stages], args, preprocess(), tokenizer, is_train, 1000)


def test_the_baseline_keeps_image_and_caption_only_also_in_validation(tmp_path):
    sample = {"__key__": "k", "__url__": "u", **reinforced_sample(0), "pickle": b"", "webp": b""}
    kept = {"__key__", "__url__", "jpg", "webp", "txt"}
    assert [set(sample) for sample in keep_image_and_caption([sample])] == [kept]
    for is_train in (True, False):
        args = options(tmp_path, dataset_reinforcement=False)
        assert keep_image_and_caption in adapted(args, is_train)


def test_validation_is_never_reinforced_and_may_be_empty_in_a_worker(tmp_path):
    stages = adapted(options(tmp_path), is_train=False)
    assert len(stages) == 9
    assert list(wds.DataPipeline(lambda: [], *stages[1:])) == []


RULE = "the key ends at the first dot of the file name"


@pytest.mark.parametrize("kind", ["reinforced", "baseline"])
def test_keys_with_dots_cost_the_same_in_both_samplings_and_the_first_is_explained(
    kind, tmp_path, caplog
):
    """Ten samples with a dot in their key are one sample of 70 unknown members."""
    samples = [(f"photo.{n}", reinforced_sample(n)) for n in range(10)]
    plain = [(uid(n), reinforced_sample(n)) for n in range(10, 14)]
    lacking = [(uid(n), {"txt": b"caption"}) for n in range(20, 28)]  # more than are logged
    shard = write_shard(tmp_path / "0.tar", [*lacking, *samples, *plain])
    args = options(tmp_path, batch_size=4)
    reinforced = make_processor(args, preprocess())
    processor = reinforced if kind == "reinforced" else BaselineProcessor(preprocess())
    wanted = {e for extensions in processor.members.values() for e in extensions}.__contains__
    state = StreamState(0, [13], [], 1, 0, (0, 0))
    baseline = BaselineStages(Tally(PLAIN_MEMBERS, SkipLimit(10**9, 1.0)), outlive_sigterm=False)
    found = {}
    for sampling, source in (
        ("with replacement", stream([{"url": str(shard)}], wanted)),
        ("without", itertools.islice(passes(ShardReader([str(shard)], wanted), state), 13)),
    ):
        caplog.clear()
        tally = Tally(processor.members, SkipLimit(10**9, 1.0))
        list(batches(source, processor, tokenizer, 4, tally))
        found[sampling] = tally.take_counts()
        (line,) = [line for line in caplog.messages if RULE in line]
        assert f"Skipped sample photo of {shard}: lacks an image" in line
        assert "members with unknown extensions: 70, the first is 'photo.0.jpg'" in line
        assert "read as key 'photo' and extension '0.jpg'" in line
    if kind == "baseline":
        caplog.clear()
        read = wds.tarfile_to_samples()([{"url": str(shard)}])
        list(baseline.check_members(read))
        found["OpenCLIP's stages"] = baseline.tally.take_counts()
        (line,) = [line for line in caplog.messages if RULE in line]
        assert "members with unknown extensions: 70, the first is 'photo.0.jpg'" in line
    counts = Counts(13, {"lacks an image (jpg or jpeg or png or webp)": 9})
    assert found == dict.fromkeys(found, counts)


def test_shards_of_dotted_keys_only_end_with_the_explanation(tmp_path):
    write_shard(tmp_path / "0.tar", [(f"photo.{n}", reinforced_sample(n)) for n in range(3)])
    with pytest.raises(RuntimeError, match=f"not one sample can be used.*'photo.0.jpg'.*{RULE}"):
        list(pipeline(options(tmp_path), str(tmp_path / "0.tar")))


def test_the_baseline_counts_what_openclips_stages_drop(tmp_path, caplog):
    """Samples without an image or caption, and those that decoding swallows."""

    def decode(samples):
        for sample in samples:
            if sample["jpg"] != b"gone":
                yield {
                    **sample,
                    "image": torch.zeros(3),
                    "text": torch.tensor([int(sample["txt"])]),
                }

    def select(samples):
        return (sample for sample in samples if "jpg" in sample)

    found = [{"jpg": b""}, {"jpg": b"gone"}, {}, {"jpg": b""}, {"jpg": b"gone"}, {"jpg": b""}]
    samples = [
        {"__key__": str(n), "__url__": "u", "txt": b"%d" % n, **sample}
        for n, sample in enumerate(found)
    ]
    baseline = BaselineStages(Tally(PLAIN_MEMBERS, SkipLimit(1000, 1.0)), outlive_sigterm=False)
    rows = baseline.finish_sample(
        decode(baseline.start_sample(select(baseline.check_members(samples))))
    )
    assert [row["__key__"] for row in rows] == ["0", "3", "5"]
    lacks = "lacks an image (jpg or jpeg or png or webp)"
    counts = baseline.tally.take_counts()
    assert counts == Counts(6, {lacks: 1, "undecodable image or caption": 2})
    assert "Skipped sample 1 of u" in caplog.text
    texts = ["whatever", "the tokenizer gives"]  # text itself in OpenCLIP's own tests
    ((made, counts),) = baseline.finish_batch([(torch.zeros(2, 3), texts, ["a", "b"])])
    assert made.texts is texts and made.uids == ["a", "b"] and counts == Counts(0, {})


def test_a_baseline_that_can_decode_nothing_gives_up():
    baseline = BaselineStages(Tally(PLAIN_MEMBERS, SkipLimit(10**9, 1.0)), outlive_sigterm=False)
    sample = {"__key__": "k", "__url__": "u", "jpg": b"", "txt": b""}
    with pytest.raises(RuntimeError, match="1000 samples in a row: not one sample can be used"):
        for _ in baseline.start_sample(itertools.repeat(sample)):
            pass
    with pytest.raises(RuntimeError, match="10 shards in a row have no readable sample"):
        for _ in baseline.open_shards(itertools.repeat({"url": "u"})):
            pass


# --- giving up ------------------------------------------------------------------------------------
def stream_of(count, good):
    """Items of which a stage can use those for which ``good`` says so."""
    for number in count:
        yield Item({"__key__": str(number), "__url__": "u", "good": good(number)}, RandomChoice())


class Picky:
    """A processor whose stages refuse samples."""

    members, statistics = PLAIN_MEMBERS, None

    def __init__(self, refuses):
        self.refuses = refuses

    def stage(self, name, row):
        if self.refuses == name and not row["good"]:
            raise BadSample(f"refused by {name}")
        return {**row, "captions": [row["__key__"]], "image": torch.zeros(1)}

    def select(self, sample, choice):
        return self.stage("select", sample)

    def read_rows(self, row, choice):
        return row

    def augment(self, row, choice):
        return self.stage("augment", row)


def picky_tokenizer(texts):
    if any(text == "bad" for text in texts):
        raise ValueError("bad text")
    return torch.zeros(len(texts), 2, dtype=torch.long)


@pytest.mark.parametrize("stage", ["select", "augment", "tokenise"])
@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
def test_whatever_stage_skips_everything_the_worker_gives_up_within_1000_samples(stage, shuffle):
    read = []

    def items():
        for item in stream_of(itertools.count(), lambda number: False):
            read.append(item)
            yield item

    processor = Picky(stage)
    if stage == "tokenise":
        processor.stage = lambda name, row: {**row, "captions": ["bad"], "image": torch.zeros(1)}
    mix = partial(shuffled, size=500, initial=100, rng=random.Random(0)) if shuffle else None
    tally = Tally(PLAIN_MEMBERS, SkipLimit(10**9, 1.0))
    with pytest.raises(RuntimeError, match="1000 samples in a row: not one sample can be used"):
        next(batches(items(), processor, picky_tokenizer, 8, tally, mix))
    assert len(read) <= 1000 + 500 + 64 + 8


def test_skips_count_against_the_fraction_also_while_no_batch_comes_out():
    """The trainer sees counts with batches only, so the worker looks at its own."""
    tally = Tally(PLAIN_MEMBERS, SkipLimit(epoch_samples=100, fraction=0.2))
    items = stream_of(itertools.count(), lambda number: number < 40)
    with pytest.raises(
        RuntimeError, match=r"more than --max-skipped-fraction 0.2\): \d+ x refused"
    ):
        for _ in batches(items, Picky("augment"), picky_tokenizer, 64, tally):
            pass


def test_a_stage_that_has_used_a_sample_goes_on_through_many_bad_ones():
    """Drawn with replacement, the same bad shards may come up many times in a row."""
    streak = Streak(Tally(PLAIN_MEMBERS, SkipLimit(10**9, 1.0)))
    streak.end()
    for _ in range(99_999):
        streak.add("reason")
    with pytest.raises(RuntimeError, match="100000 samples in a row"):
        streak.add("reason")


def test_half_of_the_samples_bad_in_two_stages_does_not_stop_a_worker():
    """As many as are skipped before the shuffle buffer has been filled."""
    processor = Picky("select")
    items = stream_of(range(20_000), lambda number: number % 3 == 0)
    mix = partial(shuffled, size=5000, initial=1000, rng=random.Random(0))
    tally = Tally(PLAIN_MEMBERS, SkipLimit(10**9, 1.0))
    made = [batch for batch, _ in batches(items, processor, picky_tokenizer, 8, tally, mix)]
    keys = [int(key) for batch in made for key in batch.uids]
    assert len(set(keys)) == len(keys) == 20_000 // 3 // 8 * 8 and keys != sorted(keys)
    assert tally.skipped.total() == 20_000 - len(range(0, 20_000, 3))


def test_shards_that_cannot_be_read_are_counted_and_stop_a_stream_that_finds_no_other(tmp_path):
    good = write_shard(tmp_path / "0.tar", [(uid(0), reinforced_sample(0))])
    missing = str(tmp_path / "missing.tar")
    urls = [{"url": missing}, {"url": str(good)}, *[{"url": missing}] * MAX_UNREADABLE_SHARDS]
    found = stream(iter(urls), USED_MEMBERS.__contains__)
    with pytest.raises(RuntimeError, match=r"10 shards in a row .*missing.tar: FileNotFoundError"):
        items = [item for item in iter(lambda: next(found), None)]
    items = list(itertools.islice(stream(iter(urls), USED_MEMBERS.__contains__), 5))
    assert [item.skipped is None for item in items] == [False, True, False, False, False]
    assert items[0].skipped.url == missing and "FileNotFoundError" in items[0].skipped.message
