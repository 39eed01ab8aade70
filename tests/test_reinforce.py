"""reinforce.py stores the teachers' embeddings of the captions and of the augmented images."""

import gzip
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from conftest import ROOT, environment, run
from lib.captions import KEY, read_captions
from lib.config import read_config
from lib.shards import ShardError
from lib.teachers import Teacher
from shards import AUGMENTATION, encode, picture, read_samples, uid, write_shard

from dr.params import register_model
from dr.sample import augmentation_parameters, caption, decode_image, embeddings, synthetic_captions
from dr.transforms import compose_from_config

pytestmark = pytest.mark.slow

MODEL = ROOT / "tests" / "data" / "tiny_vit.json"
SAMPLES, SHARDS = 5, 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Image-caption shards, synthetic captions, two teachers of random weights, their config."""
    folder = tmp_path_factory.mktemp("reinforce")
    lines = []
    for shard in range(SHARDS):
        samples = []
        for seed in range(shard * SAMPLES, (shard + 1) * SAMPLES):
            samples.append(
                (uid(seed), {"jpg": encode(picture(seed)), "txt": f"picture {seed}".encode()})
            )
            lines.append(
                {"uid": uid(seed), "syn_text": [f"other words {n} for {seed}" for n in range(3)]}
            )
        write_shard(folder / "plain" / f"{shard:08d}.tar", samples)
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = open_clip.create_model(register_model(str(MODEL))).state_dict()
        prefix = "module." if seed else ""  # as a run of several processes saves it
        torch.save(
            {"epoch": 1, "state_dict": {prefix + k: v for k, v in state.items()}},
            folder / f"teacher-{seed}.pt",
        )
    config = {
        "model_name": f"{MODEL},{MODEL}",
        "pretrained": f"{folder}/teacher-0.pt,{folder}/teacher-1.pt",
        "num_samples": 4,
        "reinforce": {"image_augmentation": AUGMENTATION},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def reinforce(world, output, *options, ranks=1, shards="{00000000..00000002}.tar"):
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        if ranks > 1
        else []
    )
    command = [sys.executable, *torchrun, ROOT / "scripts" / "reinforce.py"]
    command += [
        "--input",
        f"{world}/plain/{shards}",
        "--output",
        output,
        "--config",
        world / "config.json",
    ]
    return run(
        [*command, "--synthetic-captions", world / "captions.jsonl", *options], env=environment()
    )


@torch.inference_mode()
def embed(world, images, captions):
    """An independent look: OpenCLIP's own validation normalisation and calls."""
    parts = []
    for seed in (0, 1):
        model = open_clip.create_model(register_model(str(MODEL))).eval()
        state = torch.load(world / f"teacher-{seed}.pt", weights_only=True)["state_dict"]
        model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
        text = model.encode_text(open_clip.get_tokenizer("tiny_vit")(captions))
        parts.append(
            [torch.nn.functional.normalize(x, dim=1) for x in (model.encode_image(images), text)]
        )
    return [torch.cat(both, dim=1) for both in zip(*parts, strict=True)]


@pytest.mark.parametrize("stored_as", ["npz", "safetensors", "pth.gz"])
def test_stored_rows_are_the_teachers_embeddings_of_exactly_those_images_and_captions(
    world, tmp_path, stored_as
):
    done = reinforce(world, tmp_path, "--format", stored_as, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    compose = compose_from_config(AUGMENTATION)
    tolerance = 1e-5 if stored_as == "npz" else 4e-3  # bfloat16 has 8 bits
    for shard in range(SHARDS):
        plain = read_samples(world / "plain" / f"{shard:08d}.tar")
        made = read_samples(tmp_path / f"{shard:08d}.tar")
        assert list(made) == list(plain)
        for key, members in made.items():
            assert set(members) == {"syn.json", "paug.json", stored_as, "json"}
            sample = {**plain[key], **members}
            sha256 = hashlib.sha256(plain[key]["jpg"]).hexdigest()
            assert json.loads(members["json"]) == {"uid": key, "sha256": sha256}
            img = decode_image(sample)
            stored_params = augmentation_parameters(sample)
            assert len({json.dumps(params) for params in stored_params}) == 4
            images = torch.stack(
                [compose.reapply(img, compose.decompress(p))[0] for p in stored_params]
            )
            expected = embed(world, images, [caption(sample), *synthetic_captions(sample)])
            for name, rows in zip(("image_emb", "text_emb"), expected, strict=True):
                found = embeddings(sample)[name]
                assert found.dtype == (torch.float32 if stored_as == "npz" else torch.bfloat16)
                torch.testing.assert_close(found.float(), rows, rtol=0, atol=tolerance)
                norms = found.float().unflatten(1, (2, 16)).norm(dim=2)
                torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-2)


def test_bytes_do_not_depend_on_workers_and_finished_shards_are_skipped(world, tmp_path):
    assert reinforce(world, tmp_path / "a").returncode == 0
    assert reinforce(world, tmp_path / "b", "--workers", "2").returncode == 0
    names = [f"{shard:08d}.tar" for shard in range(SHARDS)]
    assert [(tmp_path / "a" / n).read_bytes() for n in names] == [
        (tmp_path / "b" / n).read_bytes() for n in names
    ]
    (tmp_path / "a" / names[1]).unlink()
    times = [(tmp_path / "a" / name).stat().st_mtime_ns for name in (names[0], names[2])]
    done = reinforce(world, tmp_path / "a")
    assert "1 shards reinforced, 5 samples" in done.stdout
    assert times == [(tmp_path / "a" / name).stat().st_mtime_ns for name in (names[0], names[2])]
    assert (tmp_path / "a" / names[1]).read_bytes() == (tmp_path / "b" / names[1]).read_bytes()


def test_shards_made_in_another_way_are_not_mixed_in(world, tmp_path):
    assert reinforce(world, tmp_path, shards="00000000.tar").returncode == 0
    done = reinforce(world, tmp_path, "--seed", "1")
    assert (
        done.returncode == 1
        and "made with other settings" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "00000001.tar").exists()


def test_samples_that_lack_something_are_left_out_and_counted(world, tmp_path):
    whole = {"jpg": encode(picture(0)), "txt": b"picture"}
    samples = [
        (uid(0), whole),
        (uid(1), {"txt": b"picture"}),
        (uid(2), {**whole, "jpg": b"gone"}),
        (uid(900), whole),
        (
            "00007",
            {**whole, "json": json.dumps({"uid": uid(3), "sha256": "as downloaded"}).encode()},
        ),
        (uid(4), {**whole, "json": b'{"texts": ["picture", "another"]}'}),
    ]
    write_shard(world / "plain" / "odd.tar", samples)
    done = reinforce(world, tmp_path, shards="odd.tar")
    assert done.returncode == 0
    made = read_samples(tmp_path / "odd.tar")
    assert list(made) == [uid(0), uid(3), uid(4)]
    several = {**dict(samples)[uid(4)], "syn.json": made[uid(4)]["syn.json"]}
    several["npz"] = made[uid(4)]["npz"]
    captions = ["picture", "another", *synthetic_captions(several)]
    _, expected = embed(world, torch.zeros(1, 3, 32, 32), captions)
    torch.testing.assert_close(embeddings(several)["text_emb"], expected, rtol=0, atol=1e-5)
    assert json.loads(made[uid(3)]["json"])["sha256"] == "as downloaded"
    for reason in ("1 lacks an image", "1 undecodable image", "1 no synthetic captions"):
        assert reason in done.stdout


def test_missing_shards_are_told_before_anything_is_done(world, tmp_path):
    done = reinforce(world, tmp_path / "out", shards="{00000000..00000009}.tar")
    assert (
        done.returncode == 1 and "7 of 10 shards" in done.stderr and "00000003.tar" in done.stderr
    )


def test_a_damaged_shard_is_never_finished_and_the_others_go_on(world, tmp_path):
    """Of two ranks, one has only damaged shards: it waits for the other."""
    whole = (world / "plain" / "00000000.tar").read_bytes()
    hole = bytearray(whole + bytes(2 << 20))
    at = whole.index(uid(2).encode() + b".jpg")
    hole[at:] = bytes(len(hole) - at)
    damaged = {
        "cut in a header": whole[: at + 100],
        "cut in a member": whole[: at + 700],
        "cut between members": whole[:at],
        "a hole": bytes(hole),
        "two tars": whole * 2,
        "empty": b"",
        "a web page": b"<html>404</html>" * 1000,
    }
    folder = world / "damaged"
    folder.mkdir(exist_ok=True)
    for number, data in enumerate(damaged.values()):
        (folder / f"{2 * number:08d}.tar").write_bytes(data)
        (folder / f"{2 * number + 1:08d}.tar").write_bytes(whole)
    shards = f"../damaged/{{00000000..{2 * len(damaged) - 1:08d}}}.tar"
    done = reinforce(world, tmp_path, ranks=2, shards=shards)
    assert done.returncode == 1
    made = sorted(path.name for path in tmp_path.glob("*.tar"))
    assert made == [f"{2 * number + 1:08d}.tar" for number in range(len(damaged))]
    for number, name in enumerate(damaged):
        said = f"damaged/{2 * number:08d}.tar: failed: not a whole tar: "
        assert done.stderr.count(said) == 1, name
    assert "rank 0: 7 of 7 shards failed, the first is" in done.stderr
    assert "rank 1: 7 shards reinforced, 35 samples" in done.stdout
    assert not list(tmp_path.glob(".*.partial"))
    assert done.stderr.count("Traceback") == 1  # torchrun's own
    again = reinforce(world, tmp_path, "--workers", "2", shards=shards)  # the other way to read
    assert again.returncode == 1 and "7 of 7 shards failed" in again.stderr
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == made


def test_a_shard_of_which_nothing_is_left_fails(world, tmp_path):
    write_shard(world / "plain" / "none.tar", [(uid(900), {"jpg": b"", "txt": b"picture"})])
    write_shard(world / "plain" / "nothing.tar", [])
    done = reinforce(world, tmp_path, shards="{none,nothing,00000000}.tar")
    assert done.returncode == 1 and list(tmp_path.glob("*.tar")) == [tmp_path / "00000000.tar"]
    assert "none.tar: failed: no sample would be left: 1 no synthetic captions" in done.stderr
    assert "nothing.tar: failed: no sample would be left: the shard is empty" in done.stderr
    assert "1 shards reinforced, 5 samples; skipped: 1 no synthetic captions" in done.stdout


def test_the_output_folder_is_not_the_inputs(world):
    done = reinforce(world, world / "plain")
    assert done.returncode == 1 and "is the folder of --input" in done.stderr
    assert not (world / "plain" / "reinforce.json").exists()


# --- what a person hands in -----------------------------------------------------------------------
def good_lines():
    return [json.dumps({"uid": uid(n), "syn_text": [f"a {n}", f"b {n}"]}) for n in range(3)]


def test_captions_files_are_read_however_they_were_written(tmp_path):
    """Blank lines, byte order marks, gzip, numbers as uids, repeated lines, and blank captions."""
    lines, expected = good_lines(), {uid(n): {KEY: [f"a {n}", f"b {n}"]} for n in range(3)}
    mark = "\ufeff"
    for content in (
        "\n".join(lines),
        "\n\n \t\n".join([*lines, ""]),
        "\r\n".join([mark + lines[0], lines[1], mark + lines[2], mark, lines[1], ""]),
        "\n".join(line.replace('"uid"', '"score": 0.3, "uid"') for line in lines),
        "\n".join(line.replace('"b ', '"  ", "", "b ') for line in lines),
    ):
        for path in (tmp_path / "captions.jsonl", tmp_path / "captions.jsonl.gz"):
            data = content.encode()
            path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
            captions, blank = read_captions(path)
            assert captions == expected and blank == content.count('"  ", ""') * 2
    (tmp_path / "number.jsonl").write_text(
        '{"uid": 17, "syn_text": []}\n{"uid": "18", "syn_text": [" "]}'
    )
    assert read_captions(tmp_path / "number.jsonl") == (
        {"17": {KEY: []}, "18": {KEY: []}},
        1,
    )


WRONG_LINES = {
    b'{"uid": "1", "syn_text": "dog"}': "field syn_text: expected a list of captions, found text",
    b'{"uid": "1", "syn_text": null}': "field syn_text: expected a list of captions, found null",
    b'{"uid": "1", "syn_text": {"a": 1}}': "syn_text: expected a list of captions, found an object",
    b'{"uid": "1", "syn_text": ["a", 7]}': "syn_text: expected text, entry 1 is a whole number",
    b'{"uid": "1", "syn_text": [["a"]]}': "field syn_text: expected text, entry 0 is a list",
    b'{"uid": "1", "syn_text": ["\\ud800"]}': "field syn_text: entry 0 is not valid Unicode",
    b'{"uid": "1"}': "field syn_text: missing",
    b'{"key": "1", "syn_text": ["a"]}': "field uid: missing",
    b'{"uid": null, "syn_text": ["a"]}': "field uid: a uid that is null",
    b'{"uid": true, "syn_text": ["a"]}': "field uid: a uid that is true or false",
    b'{"uid": 1.5, "syn_text": ["a"]}': "field uid: a uid that is a number with a point",
    b'{"uid": "a/b", "syn_text": ["a"]}': "field uid: a uid that can't be a file name",
    b'["1", ["a"]]': "expected an object with uid and syn_text, found a list",
    b'"1"': "expected an object with uid and syn_text, found text",
    b"uid,syn_text": "not JSON",
    b'{"uid": "1", "syn_text": ["a"]': "not JSON",
    b"[" * 200_000: "not JSON",
    '{"uid": "1", "syn_text": ["é"]}'.encode("latin-1"): "not UTF-8",
    '{"uid": "1", "syn_text": ["a"]}'.encode("utf-16"): "not UTF-8",
    json.dumps({"uid": uid(0), "syn_text": ["other"]}).encode(): "has other captions in a line",
}


@pytest.mark.parametrize("line", WRONG_LINES, ids=WRONG_LINES.values())
def test_a_wrong_line_is_named_with_its_file_number_and_field(line, tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_bytes(b"\n".join([good_lines()[0].encode(), b"", line, b""]))
    with pytest.raises(ShardError) as error:
        read_captions(path)
    found = str(error.value)
    assert found.startswith(f"{path}, line 3: ") and WRONG_LINES[line] in found
    assert "\n" not in found


def test_a_file_that_is_damaged_or_has_no_captions_is_one_line(tmp_path):
    for content, said in (
        (b"", "has no captions"),
        (b"\n\n", "has no captions"),
        (gzip.compress("\n".join(good_lines() * 33).encode())[:-20], "damaged gzip"),
    ):
        (tmp_path / "captions.jsonl").write_bytes(content)
        with pytest.raises(ShardError, match=said):
            read_captions(tmp_path / "captions.jsonl")


def test_samples_without_a_usable_caption_are_skipped_and_counted_not_stored(world, tmp_path):
    """And the uid of a sample may be a number, in the json, in the captions, or in both."""
    whole = {"jpg": encode(picture(0)), "txt": b"picture"}
    samples = [(uid(n), whole) for n in range(3)]
    samples += [(f"00{n}", {**whole, "json": b'{"uid": %d}' % n}) for n in (17, 18)]
    samples.append(("00000", {**whole, "json": b'{"uid": null}'}))
    samples.append(("00001", {**whole, "json": b'{"uid": "../up"}'}))
    samples.append(("x" * 99, whole))
    samples.append(("./19", whole))
    samples.append(("photo.1", whole))
    samples.append((uid(0), {**whole, "txt": b"again"}))
    write_shard(world / "plain" / "usable.tar", samples)
    lines = [(uid(0), ["a", " ", "b"]), (uid(1), []), (uid(2), ["", "\n"])]
    lines += [(17, ["c"]), ("18", ["d"]), ("19", ["e"]), ("photo", ["f"])]
    captions = tmp_path / "captions.jsonl"
    captions.write_text("\n".join(json.dumps({"uid": u, "syn_text": s}) for u, s in lines))
    options = ("--synthetic-captions", captions)
    done = reinforce(world, tmp_path / "out", *options, shards="usable.tar")
    assert done.returncode == 0, done.stderr
    made = read_samples(tmp_path / "out" / "usable.tar")
    stored = {key: json.loads(members["syn.json"])["syn_text"] for key, members in made.items()}
    assert stored == {uid(0): ["a", "b"], "17": ["c"], "18": ["d"], "19": ["e"]}
    for reason in (
        "2 no usable synthetic caption",
        "1 a uid that is null",
        "1 a uid that can't be a file name",
        "1 a name of over 100 bytes",
        "1 a uid twice in one shard",
        "1 lacks an image",
    ):
        assert reason in done.stdout
    assert "'photo.1.jpg', read as key 'photo' and extension '1.jpg'" in done.stderr
    assert "the key ends at the first dot of the file name" in done.stderr
    assert "3 captions are blank" in done.stderr


AUGMENTATION_FAULTS = {
    '{"random_resized_crop": 5}': "random_resized_crop: expected an object",
    '{"random_resized_crop": {"size": "224"}}': "size: expected pixels",
    '{"random_resized_crop": {"size": 0}}': "size: expected pixels",
    '{"random_resized_crop": {"size": 9, "scale": 0.5}}': "scale: expected two numbers",
    '{"random_resized_crop": {"size": 9, "interpolation": 3}}': "interpolation: expected one of",
    '{"rand_augment": {"enable": "false"}}': "enable: expected true or false",
    '{"rand_augment": {"num_ops": "2"}}': "num_ops: expected a whole number",
    '{"rand_augment": {"p": 2}}': "p: expected a probability",
    '{"to_tensor": {}, "normalize": {"mean": 0.5, "std": [1]}}': "mean: expected a list",
    "[]": "reinforce.image_augmentation: expected an object, found a list",
}
CONFIG_FAULTS = {
    '{"model_name": ["a", "b"]}': "model_name: expected names separated by commas, as text, found",
    '{"pretrained": null}': "pretrained: expected names separated by commas, as text, found null",
    '{"pretrained": "a"}': "model_name has 2 entries and pretrained 1",
    '{"pretrained": "a,"}': "has an empty name",
    '{"num_samples": "4"}': "num_samples: expected a whole number of 1 or more, found '4'",
    '{"num_samples": 0}': "num_samples: expected a whole number of 1 or more, found 0",
    '{"num_samples": true}': "num_samples: expected a whole number of 1 or more, found True",
    '{"num_samples": 2.5}': "num_samples: expected a whole number of 1 or more, found 2.5",
    '{"reinforce": []}': "reinforce: expected an object, found a list",
    '{"reinforce": {}}': "there is no field reinforce.image_augmentation",
    **{
        f'{{"reinforce": {{"image_augmentation": {text}}}}}': said
        for text, said in AUGMENTATION_FAULTS.items()
    },
}


@pytest.mark.parametrize("changes", CONFIG_FAULTS)
def test_each_field_of_a_config_is_checked_when_it_is_read(world, tmp_path, changes):
    path = tmp_path / "config.json"
    config = json.loads((world / "config.json").read_text())
    path.write_text(json.dumps({**config, **json.loads(changes)}))
    with pytest.raises(SystemExit) as error:
        read_config(path)
    said = str(error.value)
    assert CONFIG_FAULTS[changes] in said and str(path) in said and "\n" not in said


def test_a_config_may_begin_with_a_mark_and_lack_what_a_command_does_not_need(world, tmp_path):
    path = tmp_path / "config.json"
    config = json.loads((world / "config.json").read_text())
    path.write_text("\ufeff" + json.dumps(config), encoding="utf-8")
    assert [len(pair) for pair in read_config(path).teachers] == [2, 2]
    for field in ("model_name", "pretrained", "num_samples"):
        path.write_text(json.dumps({name: config[name] for name in config if name != field}))
        said = "has 0 entries" if field == "model_name" else None
        said = said or (
            "pretrained 0" if field == "pretrained" else "there is no field num_samples"
        )
        with pytest.raises(SystemExit, match=said):
            read_config(path).need("num_samples")
    for content in ("[]", "{", "\ud800", ""):
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        with pytest.raises(SystemExit, match="is no reinforcement config"):
            read_config(path)


# --- teachers' weights ----------------------------------------------------------------------------
def teacher(path, model=MODEL):
    return Teacher(str(model), str(path), torch.device("cpu"), "fp32")


def test_teachers_are_loaded_from_every_kind_of_checkpoint(world, tmp_path):
    state = torch.load(world / "teacher-0.pt", weights_only=True)["state_dict"]
    rate = np.float64(1e-3)  # as OpenCLIP's trainer stores it
    optimizer = {"state": {}, "param_groups": [{"lr": rate}]}
    kinds = {
        "bare.pt": state,
        "module.pt": {f"module.{name}": rows for name, rows in state.items()},
        "trainer.pt": {"epoch": 3, "state_dict": state, "optimizer": optimizer, "dr": {"step": 0}},
        "ddp.pt": {"state_dict": {f"module.{n}": rows for n, rows in state.items()}, "name": "x"},
    }
    for name, content in kinds.items():
        torch.save(content, tmp_path / name)
    contiguous = {name: rows.contiguous() for name, rows in state.items()}
    safetensors.torch.save_file(contiguous, tmp_path / "weights.safetensors")
    images, captions = torch.rand(2, 3, 32, 32), ["a", "b"]
    expected = teacher(world / "teacher-0.pt").embed(images, captions)
    for name in (*kinds, "weights.safetensors"):
        found = teacher(tmp_path / name).embed(images, captions)
        assert all(map(torch.equal, found, expected)), name


def test_a_file_without_the_models_weights_is_one_line_that_names_both(world, tmp_path):
    state = torch.load(world / "teacher-0.pt", weights_only=True)["state_dict"]
    first, *others = state
    contents = {
        "cut.pt": (world / "teacher-0.pt").read_bytes()[:5000],
        "page.pt": b"<html>404</html>",
        "empty.pt": b"",
        "list.pt": [1, 2],
        "optimizer.pt": {"optimizer": {"state": {}}, "epoch": 1},
        "pickle.pt": {"state_dict": Path("x")},
        "cut.safetensors": b"\x40\0\0\0\0\0\0\0{",
        "lacks.pt": {name: state[name] for name in others},
        "more.pt": {**state, "visual.extra": torch.zeros(1), "visual.more": torch.zeros(1)},
        "shape.pt": {**state, first: torch.zeros(7, 7)},
    }
    said = {
        "lacks.pt": f"lacks {first}",
        "more.pt": "has an unexpected visual.extra and 1 more",
        "shape.pt": f"its {first} is [7, 7], expected {list(state[first].shape)}",
    }
    for name, content in contents.items():
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(SystemExit) as error:
            teacher(path)
        line = str(error.value)
        assert line.startswith(f"error: the teacher {MODEL} {path} can't be loaded: {path} is ")
        expected = f"a checkpoint of another model than {MODEL}: " if name in said else "no check"
        assert expected + said.get(name, "") in line and "\n" not in line, line
    for name, content, line in (
        ("list.json", "[]", "is no model config: expected an object with embed_dim"),
        ("text.json", "{", "is no model config: "),
        ("none.json", None, "there is no model config file"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(SystemExit, match=line):
            try:
                teacher(world / "teacher-0.pt", tmp_path / name)
            finally:  # OpenCLIP reads the files given so far again
                (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(SystemExit, match="teacher ViT-B-32 no-such-tag can't be loaded"):
        Teacher("ViT-B-32", "no-such-tag", torch.device("cpu"), "fp32")
