"""Which sample comes when: each position once in a pass, whoever takes it, and whatever becomes of
the layout."""

import itertools
import random
from collections import Counter

import pytest
from sampling_coverage import iterate_positions
from shards import AUGMENTATION, reinforced_sample

from dr import sampling
from dr.sample import select
from dr.sampling import (
    ScheduledChoice,
    ShardOrder,
    count_positions,
    layouts_to_keep,
    pieces_of_stream,
    slice_pieces,
    split_evenly,
)
from dr.transforms import compose_from_config


@pytest.mark.parametrize("total", [1, 5, 17, 100])
@pytest.mark.parametrize("streams", [1, 3, 7, 20])
def test_parts_are_whole_and_over_all_passes_nobody_gets_more_than_one_more(total, streams):
    sums = [0] * streams
    for pass_ in range(50):
        parts = [split_evenly(total, streams, stream, pass_) for stream in range(streams)]
        assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])] and parts[
            -1
        ][1] == total
        sums = [so_far + stop - start for so_far, (start, stop) in zip(sums, parts, strict=True)]
        assert max(sums) - min(sums) <= 1


def take(seed, total, layouts):
    """Streams that come and go: how often each (pass, position) was taken, and up to which pass all
    is taken.

    Each layout is (streams, a function that says how many each takes), the run goes on from the
    cursors of the last.
    """
    taken, previous, cursors = Counter(), [], None
    for streams, how_many in layouts:
        if cursors is None or len(cursors) != streams:
            previous = [*layouts_to_keep(previous, cursors), cursors] if cursors else []
            cursors = [(min(cursors)[0] if cursors else 0, 0)] * streams
        for stream, cursor in enumerate(cursors):
            for pass_, position, after in itertools.islice(
                iterate_positions(seed, total, previous, streams, stream, cursor), how_many()
            ):
                taken[pass_, position] += 1
                cursors[stream] = after
    return taken, min(cursors)[0]


@pytest.mark.parametrize("seed", range(150))
def test_no_position_comes_twice_in_a_pass_or_is_lost_on_any_chain_of_layouts(seed, monkeypatch):
    monkeypatch.setattr(sampling, "WINDOW", 7)
    rng = random.Random(seed)
    total = rng.randrange(1, 60)
    layouts = [
        (rng.randrange(1, 9), lambda: rng.randrange(0, 40)) for _ in range(rng.randrange(1, 6))
    ]
    last = layouts[-1][0]
    taken, _ = take(seed, total, [*layouts, (last, lambda: 1), (last, lambda: 3 * total + 3)])
    assert set(taken.values()) == {1}
    passes = Counter(pass_ for pass_, _ in taken)
    done = next(pass_ for pass_ in itertools.count() if passes[pass_] < total)
    assert done >= 1
    assert all(0 <= position < total for _, position in taken)


def test_passes_that_all_streams_have_left_need_no_history():
    assert layouts_to_keep([[(0, 3), (1, 2)]], [(1, 9), (2, 0)]) == [[(0, 3), (1, 2)]]
    assert layouts_to_keep([[(0, 3), (1, 2)]], [(2, 0), (2, 0)]) == []


def test_a_pass_over_a_billion_samples_is_a_few_windows_for_a_stream():
    pieces = pieces_of_stream(1_280_000_000, [], 3, 512, 511)
    assert count_positions(pieces) == 2_500_000 and len(pieces) == 500
    assert next(iterate_positions(0, 1_280_000_000, [], 512, 511, (3, 2_499_999)))[2] == (
        3,
        2_500_000,
    )


def test_cutting_pieces_equals_cutting_what_they_stand_for():
    pieces = [(0, 10, 2, 7), (10, 20, 0, 10), (30, 32, 1, 2)]
    whole = [(first, at) for first, _, low, high in pieces for at in range(low, high)]
    for start, stop in itertools.combinations(range(18), 2):
        found = [
            (first, at)
            for first, _, low, high in slice_pieces(pieces, start, stop)
            for at in range(low, high)
        ]
        assert found == whole[start:stop]


def test_shards_and_windows_are_shuffled_by_seed_and_pass():
    sizes = [3, 0, 5, 1]
    orders = {}
    for seed, pass_ in itertools.product(range(2), range(12)):
        order = ShardOrder(seed, pass_, sizes)
        located = [order.locate(position) for position in range(9)]
        assert sorted(located) == [
            (shard, place) for shard, size in enumerate(sizes) for place in range(size)
        ]
        assert [shard for shard, _ in itertools.groupby(located, lambda found: found[0])] == [
            shard for shard in order.shards if sizes[shard]
        ]  # a shard's samples stand together
        orders[seed, pass_] = [
            position
            for _, position, _ in itertools.islice(
                iterate_positions(seed, 9, [], 1, 0, (pass_, 0)), 9
            )
        ]
        assert sorted(orders[seed, pass_]) == list(range(9))
    assert len(set(map(tuple, orders.values()))) > 20


def test_over_thirty_passes_each_augmentation_comes_once_and_over_five_each_caption():
    sample = {**reinforced_sample(7, augmentations=30, captions=5), "__key__": "key"}
    compose = compose_from_config(AUGMENTATION)
    augmentations, captions = [], []
    for pass_ in range(60):
        selected = select(sample, compose, ScheduledChoice(0, pass_))
        assert (
            select(sample, compose, ScheduledChoice(0, pass_))["captions"] == selected["captions"]
        )  # nothing but seed, pass and key decide
        augmentations.append(round((selected["image_emb"][0].item() - 7) * 64))
        captions.append(int(selected["captions"][1].split()[1]))
    for first in (0, 30):
        assert sorted(augmentations[first : first + 30]) == list(range(30))
    for first in range(0, 60, 5):
        assert sorted(captions[first : first + 5]) == [1, 2, 3, 4, 5]
    assert augmentations[:30] != augmentations[30:] and augmentations[:30] != sorted(
        augmentations[:30]
    )
    others = [
        select({**sample, "__key__": "other"}, compose, ScheduledChoice(0, pass_))["captions"]
        for pass_ in range(30)
    ]
    assert [int(texts[1].split()[1]) for texts in others] != captions[:30]


def mix(pass_, key):
    return ScheduledChoice(0, pass_).generator(key, "mix").random()


def test_mixing_takes_the_synthetic_caption_with_its_probability_in_each_pass():
    synthetic = sum(mix(pass_, f"{key}") < 0.25 for pass_ in range(40) for key in range(50))
    assert 420 <= synthetic <= 580
    sample = {**reinforced_sample(7), "__key__": "key"}
    compose = compose_from_config(AUGMENTATION)
    for pass_ in range(20):
        (text,) = select(sample, compose, ScheduledChoice(0, pass_), mix_ratio=0.25)["captions"]
        which = (
            1 + ScheduledChoice(0, pass_).choose("key", "caption", 3)
            if mix(pass_, "key") < 0.25
            else 0
        )
        assert text == f"caption {which} of 7"
