"""The quickstart's data set: content of its folders, the same every time, and no leaks."""

import hashlib
import io
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from quickstart import data as quickstart_data
from shards import read_shard

pytestmark = pytest.mark.slow

SCRIPT = Path(quickstart_data.__file__)
LIMIT, HELD_OUT, SHARDS, SIZE = 60, 20, 2, 32
NAMES = [f"{number:08d}.tar" for number in range(SHARDS)]


def make(output, *options):
    command = [sys.executable, SCRIPT, "--output", output, "--limit", LIMIT, "--held-out", HELD_OUT]
    command += ["--shards", SHARDS, "--size", SIZE, *options]
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    )


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def samples(path):
    """A shard as [(key, {extension: bytes})]; fails if a sample's members are not adjacent."""
    found = []
    for name, data in read_shard(path):
        key, _, extension = name.partition(".")
        if not found or found[-1][0] != key:
            found.append((key, {}))
        found[-1][1][extension] = data
    assert len({key for key, _ in found}) == len(found)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    output = tmp_path_factory.mktemp("quickstart") / "datasets"
    make(output)
    return output


@pytest.fixture(scope="module")
def captions(data):
    return {name: samples(data / "DataComp-12M" / name) for name in NAMES}


@pytest.fixture(scope="module")
def noisy_data(tmp_path_factory):
    output = tmp_path_factory.mktemp("quickstart") / "datasets"
    make(output, "--caption-noise", 0.6)
    return output


@pytest.fixture(scope="module")
def images(data):
    return {name: samples(data / "DataComp-12M-images" / name) for name in NAMES}


@pytest.fixture(scope="module")
def held_out(data):
    return samples(data / "held_out" / "00000000.tar")


def training_names():
    return {codes: name for codes, (name, _) in quickstart_data.named_images().items()}


def test_sizes_json_counts_the_samples_of_every_shard(data, captions, images, held_out):
    for folder, shards in (
        (data / "DataComp-12M", captions),
        (data / "DataComp-12M-clean", captions),
        (data / "DataComp-12M-images", images),
    ):
        assert sorted(path.name for path in folder.iterdir()) == [*NAMES, "sizes.json"]
        counts = {name: len(shard) for name, shard in shards.items()}
        assert (
            json.loads((folder / "sizes.json").read_text())
            == counts
            == dict.fromkeys(NAMES, LIMIT // SHARDS)
        )
    assert json.loads((data / "held_out" / "sizes.json").read_text()) == {
        "00000000.tar": len(held_out)
    }
    assert len(held_out) == HELD_OUT


def test_caption_shards_are_keyed_by_uid_and_hold_no_image(captions):
    for shard in captions.values():
        for key, members in shard:
            assert re.fullmatch(r"[0-9a-f]{32}", key)
            assert list(members) == ["txt", "url.txt", "json"]
            assert json.loads(members["json"])["uid"] == key
            assert members["url.txt"].startswith(b"https://openmoji.org/")


def test_image_shards_are_what_img2dataset_writes(captions, images):
    for number, name in enumerate(NAMES):
        assert [key for key, _ in images[name]] == [
            f"{number:05d}{i:04d}" for i in range(len(images[name]))
        ]
        for key, members in images[name]:
            assert list(members) == ["jpg", "json"]
            about = json.loads(members["json"])
            assert about["key"] == key
            assert about["status"] == "success"
            assert about["error_message"] is None
            assert about["sha256"] == hashlib.sha256(members["jpg"]).hexdigest()
            image = Image.open(io.BytesIO(members["jpg"]))
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert image.size == (SIZE, SIZE) == (about["width"], about["height"])
        uids = [json.loads(members["json"])["uid"] for _, members in images[name]]
        assert uids == [key for key, _ in captions[name]]


def test_captions_are_unique_over_training_and_held_out(captions, held_out):
    everything = [
        members["txt"] for shard in (*captions.values(), held_out) for _, members in shard
    ]
    assert len(set(everything)) == len(everything) == LIMIT + HELD_OUT


def test_held_out_pictures_are_in_no_training_shard(images, held_out):
    training = [members for shard in images.values() for _, members in shard]
    assert not {key for key, _ in held_out} & {
        json.loads(members["json"])["uid"] for members in training
    }
    assert not {members["jpg"] for _, members in held_out} & {
        members["jpg"] for members in training
    }
    for key, members in held_out:
        assert list(members) == ["jpg", "txt", "json"]
        assert json.loads(members["json"])["uid"] == key


def test_every_training_picture_has_five_synthetic_captions(data, captions):
    lines = [
        json.loads(line) for line in (data / "synthetic_captions.jsonl").read_text().splitlines()
    ]
    originals = {
        key: members["txt"].decode() for shard in captions.values() for key, members in shard
    }
    assert sorted(line["uid"] for line in lines) == sorted(originals)
    for line in lines:
        assert len(set(line["syn_text"])) == 5
        assert originals[line["uid"]] not in line["syn_text"]


def test_synthetic_captions_say_the_skin_tones_and_genders_of_the_caption():
    for codes, (name, aliases) in quickstart_data.named_images().items():
        _, tones = quickstart_data.split_tones(name)
        for caption in quickstart_data.synthetic_captions(name, codes, aliases, 0):
            assert not tones or " and ".join(tones) in caption
            assert quickstart_data.find_genders(caption.lower()) == quickstart_data.find_genders(
                name.lower()
            ), (name, caption)


def test_a_second_run_leaves_the_same_bytes(data, tmp_path):
    make(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(data)


def test_a_complete_data_set_is_left_alone_and_other_settings_replace_it(data, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    assert "already complete" in make(data).stdout
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before

    (tmp_path / "DataComp-12M").mkdir()
    (tmp_path / "DataComp-12M" / "00000007.tar").write_bytes(b"of a run with more shards")
    assert "already complete" not in make(tmp_path, "--seed", 1).stdout
    assert sorted(path.name for path in (tmp_path / "DataComp-12M").glob("*.tar")) == NAMES
    assert (tmp_path / "synthetic_captions.jsonl").read_bytes() != (
        data / "synthetic_captions.jsonl"
    ).read_bytes()


def test_without_caption_noise_every_caption_is_the_images_name(data):
    names = training_names()
    captions = {
        quickstart_data.make_uid(codes): quickstart_data.make_caption(name, codes)
        for codes, name in names.items()
    }
    assert contents(data / "DataComp-12M") == contents(data / "DataComp-12M-clean")
    for name in NAMES:
        for key, members in samples(data / "DataComp-12M" / name):
            assert members["txt"].decode() == captions[key]
            assert sorted(json.loads(members["json"])) == ["sha256", "uid", "url"]


def test_caption_noise_changes_captions_of_training_images_and_nothing_else(data, noisy_data):
    changed = {
        path for path, content in contents(noisy_data).items() if content != contents(data)[path]
    }
    assert changed == {*(f"DataComp-12M/{name}" for name in NAMES), "quickstart_data.json"}
    kinds = Counter()
    for name in NAMES:
        clean = dict(samples(noisy_data / "DataComp-12M-clean" / name))
        noisy = dict(samples(noisy_data / "DataComp-12M" / name))
        assert list(noisy) == list(clean)
        for key, members in noisy.items():
            record = json.loads(members["json"])
            kind = record.pop("caption_noise", None)
            kinds[kind] += 1
            assert record == json.loads(clean[key]["json"])
            assert (members["txt"] == clean[key]["txt"]) == (kind is None)
    del kinds[None]
    counted = json.loads((noisy_data / "quickstart_data.json").read_text())["replaced_captions"]
    assert {kind: number for kind, number in counted.items() if number} == kinds
    assert 0.4 * LIMIT < kinds.total() < 0.8 * LIMIT


def clean_captions():
    names = training_names()
    held_out = set(quickstart_data.hold_out(names, 400, seed=0))
    return {
        codes: quickstart_data.make_caption(name, codes)
        for codes, name in names.items()
        if codes not in held_out
    }


def test_the_kinds_of_caption_noise_have_the_shares_of_the_documentation():
    captions = clean_captions()
    replaced = quickstart_data.replace_captions(captions, 0.6, seed=0)
    kinds = Counter(kind for _, kind in replaced.values())
    deviation = 4 * (0.25 * len(captions)) ** 0.5  # four standard deviations at most
    assert abs(len(replaced) - 0.6 * len(captions)) < deviation
    shares = {
        "another language": 0.45,
        "file name": 0.2,
        "generic phrase": 0.2,
        "another image's caption": 0.15,
    }
    assert set(kinds) == set(shares)
    for kind, share in shares.items():
        assert abs(kinds[kind] - share * len(replaced)) < deviation, kind


def test_a_replaced_caption_is_a_text_of_its_kind():
    captions = clean_captions()
    translations = quickstart_data.translated_names()
    replaced = quickstart_data.replace_captions(captions, 1.0, seed=0)
    assert set(replaced) == set(captions)
    for codes, (text, kind) in replaced.items():
        assert text != captions[codes]
        if kind == "another language":
            assert text in translations[codes] and not set(":_") & set(text)
        elif kind == "file name":
            assert re.fullmatch(r"\S.*\.(jpe?g|JPG|png|webp|gif)", text)
        elif kind == "generic phrase":
            assert text in quickstart_data.GENERIC_PHRASES
        else:  # of a training image: held-out captions are in no training shard
            assert text in captions.values()


def test_a_higher_probability_replaces_more_captions_and_keeps_those_that_were_replaced():
    captions = clean_captions()
    few = quickstart_data.replace_captions(captions, 0.3, seed=0)
    many = quickstart_data.replace_captions(captions, 0.6, seed=0)
    assert len(few) < len(many) and few.items() <= many.items()
    assert few == quickstart_data.replace_captions(captions, 0.3, seed=0)
    assert few != quickstart_data.replace_captions(captions, 0.3, seed=1)
    assert quickstart_data.replace_captions(captions, 0, seed=0) == {}


@pytest.mark.parametrize("value", ["-0.1", "1.5", "nan"])
def test_a_caption_noise_that_is_no_probability_is_an_error(value, tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as failed:
        make(tmp_path, f"--caption-noise={value}")
    assert "expected a probability from 0 to 1" in failed.value.stderr
    assert not list(tmp_path.iterdir())


def test_both_parts_of_a_held_out_combination_stay_in_training():
    names = training_names()
    held_out = quickstart_data.hold_out(names, 400, seed=0)
    assert len(set(held_out)) == 400
    parts = {codes: quickstart_data.split_tones(name) for codes, name in names.items()}
    training = [parts[codes] for codes in set(names) - set(held_out)]
    subjects = Counter(subject for subject, tones in training if tones)
    skin_tones = Counter(tones for _, tones in training)
    gone = Counter(parts[codes][0] for codes in held_out)
    assert max(gone.values()) <= quickstart_data.PER_SUBJECT
    for codes in held_out:
        subject, tones = parts[codes]
        assert tones
        assert (subject, tones) not in training
        assert subjects[subject] >= quickstart_data.KEEP_SUBJECT
        assert skin_tones[tones] >= quickstart_data.KEEP_TONES


def test_what_is_held_out_depends_on_the_seed_alone():
    names = training_names()
    assert quickstart_data.hold_out(names, 50, seed=0) == quickstart_data.hold_out(
        names, 50, seed=0
    )
    assert quickstart_data.hold_out(names, 50, seed=0) != quickstart_data.hold_out(
        names, 50, seed=1
    )


def test_asking_to_hold_out_too_much_is_an_error_that_says_how_much_there_is():
    names = {str(i): f"cook {tone} skin tone" for i, tone in enumerate(("light", "medium", "dark"))}
    with pytest.raises(SystemExit, match="--held-out 1 is more than the 0"):
        quickstart_data.hold_out(names, 1, seed=0)


def test_of_pictures_that_look_the_same_one_is_kept():
    names = {"1": "man cook", "2": "cook", "3": "cook dark skin tone"}
    drawn = {"1": (b"", "same"), "2": (b"", "same"), "3": (b"", "other")}
    assert quickstart_data.drop_duplicates(names, drawn) == {
        "2": "cook",
        "3": "cook dark skin tone",
    }


@pytest.mark.parametrize(
    ("name", "codes", "caption"),
    [
        (
            "woman firefighter medium skin tone",
            "1F469-1F3FD-200D-1F692",
            "woman firefighter, medium skin tone",
        ),
        (
            "man medium-dark skin tone red hair",
            "1F468-1F3FE-200D-1F9B0",
            "man with red hair, medium-dark skin tone",
        ),
        (
            "kiss woman man dark skin tone light skin tone",
            "1F469-1F3FF-200D-2764-FE0F-200D-1F48B-200D-1F468-1F3FB",
            "kiss: woman and man, dark skin tone and light skin tone",
        ),
        ("Chad", "1F1F9-1F1E9", "flag of Chad"),
        ("AB button (blood type)", "1F18E", "AB button (blood type)"),
        ("Wales", "1F3F4-E0067-E0062-E0077-E006C-E0073-E007F", "flag of Wales"),
    ],
)
def test_names_become_captions(name, codes, caption):
    assert quickstart_data.make_caption(name, codes) == caption
