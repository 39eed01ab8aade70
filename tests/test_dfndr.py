"""Samples with several lists of synthetic captions: what is chosen from them belongs together."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from shards import (
    AUGMENTATION,
    dfndr_sample,
    read_samples,
    stored_embeddings,
    uid,
    write_shard,
)

from dr.sample import BadSample, ReinforcedProcessor, embeddings, select, synthetic_captions
from dr.sampling import EpochChoice, RandomChoice, ScheduledChoice
from dr.transforms import compose_from_config

COMPOSE = compose_from_config(AUGMENTATION)
COCO, CONTEXT = "syn_text_dfn_mscoco38k", "syn_text_dfn_context77"
LAYOUTS = {
    "one list in text_emb": ({"syn_text": 3}, {"in_text_emb": ["syn_text"]}),
    "one list of its own": ({"syn_text": 3}, {}),
    "a list with another name in text_emb": ({COCO: 3}, {"in_text_emb": [COCO]}),
    "two lists": ({COCO: 3, CONTEXT: 3}, {}),
    "two lists of other lengths": ({COCO: 5, CONTEXT: 2}, {}),
    "two lists, the second in text_emb": ({COCO: 2, "syn_text": 4}, {"in_text_emb": ["syn_text"]}),
    "several originals": ({COCO: 3, CONTEXT: 2}, {"originals": 3}),
    "several originals, list in text_emb": (
        {"syn_text": 2},
        {"originals": 3, "in_text_emb": ["syn_text"]},
    ),
}


def check_belongs(sample, selected, seed):
    """Check that rows, captions and parameters carry the same numbers; return those."""
    stored = json.loads(sample["paug.json"])["param_aug"]
    kind, augmentation, owner = selected["image_emb"][:3].tolist()
    assert (kind, owner) == (9, seed)
    assert COMPOSE.compress(selected["params"]) == stored[int(augmentation)]
    rows = [tuple(map(int, row[:3].tolist())) for row in selected["text_emb"].float()]
    assert selected["captions"] == [f"caption {k} {s} of {owner}" for k, s, owner in rows]
    assert all(owner == seed for _, _, owner in rows)
    return int(augmentation), *rows


@pytest.mark.parametrize("bf16", [False, True], ids=["npz", "pth.gz"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_row_caption_and_list_belong_together(layout, bf16):
    lists, how = LAYOUTS[layout]
    sample = dfndr_sample(7, lists, bf16=bf16, **how)
    seen = Counter()
    for _ in range(40 * sum(lists.values()) * how.get("originals", 1)):
        _, original, synthetic = check_belongs(sample, select(sample, COMPOSE, RandomChoice()), 7)
        assert original[0] == 0 and synthetic[0] > 0
        seen[original[:2]] += 1
        seen[synthetic[:2]] += 1
    expected = {(k, s) for k, count in enumerate(lists.values(), 1) for s in range(count)}
    expected |= {(0, c) for c in range(how.get("originals", 1))}
    assert set(seen) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_embeddings_come_in_the_order_of_the_captions(layout):
    lists, how = LAYOUTS[layout]
    sample = dfndr_sample(7, lists, **how)
    rows = [tuple(map(int, row[:2])) for row in embeddings(sample)["text_emb"].tolist()]
    originals = how.get("originals", 1)
    assert rows[:originals] == [(0, c) for c in range(originals)]
    captions = synthetic_captions(sample)
    assert [f"caption {k} {s} of 7" for k, s in rows[originals:]] == captions


def test_a_list_is_chosen_before_its_captions():
    sample, seen = dfndr_sample(7, {COCO: 5, CONTEXT: 1}), Counter()
    for _ in range(1000):
        _, _, (k, _, _) = check_belongs(sample, select(sample, COMPOSE, RandomChoice()), 7)
        seen[k] += 1
    assert 420 < seen[1] < 580  # half, not five sixths


def test_a_regular_expression_chooses_the_lists():
    sample = dfndr_sample(7, {COCO: 3, CONTEXT: 2})
    for regex, lists in (
        ("^syn_text_dfn_mscoco38k$", {1}),
        ("context", {2}),
        ("^syn_text", {1, 2}),
    ):
        processor = ReinforcedProcessor(COMPOSE, None, list_keys=re.compile(regex))
        rows = [
            check_belongs(sample, processor.select(sample, RandomChoice()), 7) for _ in range(60)
        ]
        assert {synthetic[0] for _, _, synthetic in rows} == lists


def test_without_replacement_each_caption_of_lists_of_one_length_comes_once():
    sample = dfndr_sample(7, {COCO: 3, CONTEXT: 3}, originals=2)
    for start in (0, 6):
        selected = [
            check_belongs(sample, select(sample, COMPOSE, ScheduledChoice(1, pass_)), 7)
            for pass_ in range(start, start + 6)
        ]
        assert len({synthetic for _, _, synthetic in selected}) == 6
        assert Counter(original[1] for _, original, _ in selected) == {0: 3, 1: 3}


@pytest.mark.parametrize("lists", [{"syn_text": 5}, {COCO: 2, CONTEXT: 4}], ids=["one", "two"])
def test_sequential_choice_goes_by_the_epoch(lists):
    sample, seen = dfndr_sample(7, lists), set()
    for epoch in range(100):
        selected = check_belongs(sample, select(sample, COMPOSE, EpochChoice(epoch)), 7)
        augmentation, _, (k, s, _) = selected
        assert augmentation == epoch % 4
        assert s == epoch % list(lists.values())[k - 1]
        seen.add((k, s))
    assert len(seen) == sum(lists.values())


def broken(lists, **arrays):
    sample = dfndr_sample(7, lists)
    counts = {"image_emb": 4, "text_emb": 1} | {f"{key}_emb": n for key, n in lists.items()}
    counts |= arrays
    sample["npz"] = stored_embeddings(
        **{name: torch.ones(count, 12) for name, count in counts.items() if count is not None}
    )
    return sample


BOTH = {COCO: 3, CONTEXT: 2}
BROKEN = {
    "no array of a list": (
        broken(BOTH, **{f"{CONTEXT}_emb": None}),
        f"lacks embeddings of synthetic captions: no {CONTEXT}_emb for 3 under {COCO}, "
        f"2 under {CONTEXT}; found image_emb, text_emb, {COCO}_emb",
    ),
    "another number of rows": (
        broken(BOTH, **{f"{CONTEXT}_emb": 3}),
        f"row counts disagree: {CONTEXT}_emb has 3 rows for 2 captions",
    ),
    "no array, other rows of text_emb": (
        broken(BOTH, text_emb=5, **{f"{CONTEXT}_emb": None}),
        f"row counts disagree: text_emb has 5 rows for 1 original captions and 3 under {COCO}, "
        f"2 under {CONTEXT}",
    ),
    "rows of two lists in text_emb": (
        broken(BOTH, text_emb=6),
        f"row counts disagree: text_emb has 6 rows for 1 original captions and 3 under {COCO}, "
        f"2 under {CONTEXT}",
    ),
    "no list": (
        {**dfndr_sample(7, BOTH), "syn.json": b'{"captions": ["a"]}'},
        "unreadable syn.json: expected a key syn_text, or keys that start with it; found captions",
    ),
    "an empty list": (
        {**dfndr_sample(7, BOTH), "syn.json": json.dumps({COCO: ["a"], CONTEXT: []}).encode()},
        f"unreadable syn.json: expected a list of captions under {CONTEXT}",
    ),
    "texts that is no list": (
        {**dfndr_sample(7, BOTH), "json": json.dumps({"uid": uid(7), "texts": "a"}).encode()},
        "unreadable json: expected a list of captions under texts",
    ),
}


@pytest.mark.parametrize(("sample", "message"), BROKEN.values(), ids=BROKEN)
def test_a_message_names_what_was_found(sample, message):
    with pytest.raises(BadSample) as error:
        select(sample, COMPOSE, RandomChoice())
    assert str(error.value) == message


def test_a_regular_expression_that_matches_nothing_names_the_keys():
    with pytest.raises(
        BadSample, match=f"mscoco40k matches no key of syn.json; found {COCO}, {CONTEXT}"
    ):
        select(dfndr_sample(7, BOTH), COMPOSE, RandomChoice(), list_keys=re.compile("mscoco40k"))


def test_small_images_are_skipped_by_their_shorter_side():
    sample = dfndr_sample(7, BOTH)  # its image has 48 x 40 pixels
    for min_side, kept in ((0, True), (40, True), (41, False)):
        processor = ReinforcedProcessor(COMPOSE, None, min_side=min_side)
        row = processor.select(sample, RandomChoice())
        if kept:
            processor.augment(row, RandomChoice())
        else:
            with pytest.raises(BadSample, match="small image: 48x40, under 41 pixels"):
                processor.augment(row, RandomChoice())


def test_the_join_converts_the_embeddings_of_all_lists_to_bf16(tmp_path):
    sample = dfndr_sample(7, BOTH)
    write_shard(tmp_path / "in" / "00000000.tar", [(uid(7), sample)])
    script = Path(__file__).parents[1] / "scripts" / "join_shards.py"
    command = [sys.executable, script, "--source", tmp_path / "in", "--output", tmp_path / "out"]
    subprocess.run([*map(str, command), "--embeddings", "bf16"], check=True)
    joined = read_samples(tmp_path / "out" / "00000000.tar")[uid(7)]
    assert "safetensors" in joined and "npz" not in joined
    before, after = embeddings(sample), embeddings(joined)
    for name, rows in before.items():
        assert after[name].dtype == torch.bfloat16 and torch.equal(after[name], rows.bfloat16())
