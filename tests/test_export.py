"""Exports are the checkpoint's model: in OpenCLIP's layout, as ONNX, and on the Hub."""

import ast
import json
import re
import subprocess
import sys

import export
import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from conftest import ROOT, environment, run
from hub_server import hub_server
from lib.evaluation import append_result, find_results
from lib.models import ModelError, load_model
from lib.publish import hash_file
from PIL import Image
from safetensors.torch import load_file, save_file
from shards import encode, picture, write_shard

MODEL = ROOT / "tests" / "data" / "tiny_vit.json"
OTHER = ROOT / "tests" / "data" / "micro_vit.json"
COMMAND = [sys.executable, ROOT / "scripts" / "export.py"]
MEAN, STD = [0.1, 0.2, 0.3], [0.9, 0.8, 0.7]
TOKEN = "hf_aSecretThatMustNotBeSeen"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint in the folder of a run, as the trainer writes it under DDP."""
    run_folder = tmp_path_factory.mktemp("logs") / "my-run"
    (run_folder / "checkpoints").mkdir(parents=True)
    shard = run_folder.parent / "held_out" / "0.tar"
    pairs = [
        (f"{seed}", {"jpg": encode(picture(seed)), "txt": b"picture number %d" % seed})
        for seed in range(5)
    ]
    write_shard(shard, pairs)
    (run_folder / "params.txt").write_text(
        f"model: tiny_vit\nval_data: {shard}\nlr: 0.001\nimage_mean: {MEAN}\nimage_std: {STD}\n"
        "image_interpolation: bilinear\nremote_sync: s3://key:secret@host\n"
    )
    torch.manual_seed(0)
    state = open_clip.create_model(_register(MODEL)).state_dict()
    content = {"epoch": 1, "state_dict": {f"module.{name}": value for name, value in state.items()}}
    path = run_folder / "checkpoints" / "epoch_1.pt"
    torch.save(content, path)
    return path


def _register(model):
    open_clip.add_model_config(model)
    return model.stem


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """The folder, and what the command printed."""
    folder = tmp_path_factory.mktemp("export") / "model"
    done = run([*COMMAND, checkpoint, "--model", MODEL, "--output", folder, "--onnx"])
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_checkpoint_has_the_preprocessing_of_its_run(checkpoint):
    loaded = load_model(str(MODEL), str(checkpoint), torch.device("cpu"))
    found = loaded.preprocessing
    assert (list(found["mean"]), list(found["std"])) == (MEAN, STD)
    assert found["interpolation"] == "bilinear" and loaded.size == (32, 32)


def test_released_weights_have_the_preprocessing_of_their_name(checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    torch.save(state, tmp_path / "mobileclip_s1.pt")
    loaded = load_model(str(MODEL), str(tmp_path / "mobileclip_s1.pt"), torch.device("cpu"))
    assert tuple(loaded.preprocessing["mean"]) == (0, 0, 0)


@pytest.mark.slow
def test_openclip_loads_the_folder_and_onnxruntime_agrees_for_any_batch(exported, checkpoint):
    import onnxruntime

    folder, _ = exported
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    expected = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[f"module.{name}"])
    images = torch.stack([preprocess(picture(seed)) for seed in range(7)])
    normalised = np.asarray(picture(0).resize((38, 32), Image.BILINEAR)) / 255 - MEAN
    assert images[0].mean() == pytest.approx((normalised / STD).mean(), abs=0.1)
    texts = open_clip.get_tokenizer(f"local-dir:{folder}")([f"caption {n}" for n in range(7)])
    with torch.no_grad():
        reference = model.eval()(images, texts)
    for kind, batch, wanted in (("image", images, reference[0]), ("text", texts, reference[1])):
        session = onnxruntime.InferenceSession(folder / f"{kind}_encoder.onnx")
        for size in (1, 7):
            (found,) = session.run([f"{kind}_embedding"], {kind: batch[:size].numpy()})
            np.testing.assert_allclose(found, wanted[:size], atol=1e-5)
            np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        if kind == "image":
            stored = session.get_modelmeta().custom_metadata_map
            assert stored["mean"] == str(tuple(MEAN)) or stored["mean"] == str(MEAN)


@pytest.mark.slow
def test_half_precision_halves_the_file_and_nearly_keeps_the_embeddings(exported, tmp_path):
    import onnx
    import onnxruntime

    whole, half = exported[0] / "text_encoder.onnx", tmp_path / "half.onnx"
    proto = onnx.load(whole)
    export.halve_weights(proto.graph)
    onnx.checker.check_model(proto)
    onnx.save(proto, half)
    assert half.stat().st_size < 0.52 * whole.stat().st_size
    tokens = {"text": open_clip.get_tokenizer("tiny_vit")(["a dog", "a cat", "a bird"]).numpy()}
    one, other = (onnxruntime.InferenceSession(path).run(None, tokens)[0] for path in (whole, half))
    assert 0 < np.abs(one - other).max() < 1e-2


@pytest.mark.slow
def test_the_table_and_the_record_have_every_format(exported):
    folder, printed = exported
    rows = json.loads((folder / "export.json").read_text())["rows"]
    assert [row["format"] for row in rows] == ["OpenCLIP", "ONNX"]
    for row in rows:
        assert row["largest_difference"] < 1e-4 and row["top1_agreement"] == row["examples"] == 5
        assert row["image_ms"] > 0 and row["text_ms"] > 0
        assert row["bytes"] == sum((folder / name).stat().st_size for name in row["files"])
        assert re.search(rf"^{row['format']} .* MB .* ms .* ms .* 5/5$", printed, re.MULTILINE)
    assert "/held_out/0.tar;" in printed


@pytest.mark.slow
def test_the_printed_snippet_ranks_captions(exported, tmp_path, monkeypatch, capsys):
    _, printed = exported
    picture(3).save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    exec(printed.partition("in Python:\n")[2], {})
    ranked = ast.literal_eval(capsys.readouterr().out)
    assert {caption for _, caption in ranked} == {"a photo of a dog", "a photo of a cat"}
    assert ranked[0][0] >= ranked[1][0]


@pytest.mark.slow
def test_an_export_is_pushed_with_its_card_and_without_the_token(
    exported, checkpoint, tmp_path, monkeypatch, capfd
):
    folder, _ = exported
    metrics = {"main_metric": 0.6173, "main_metric_stderr": 0.0022}
    line = {"dataset": "wds/imagenet1k", "metric_name": "acc1", "metrics": metrics}
    results = find_results(checkpoint)
    config = json.loads((folder / "export.json").read_text())["model_config"]
    line |= {"sha256": hash_file(checkpoint), "model_config": config}
    append_result(results, line)
    append_result(results, line | {"sha256": "of another checkpoint", "dataset": "wds/cars"})
    append_result(results, line | {"model_config": "another", "dataset": "wds/cars"})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(
        huggingface_hub.constants, "HF_HUB_DISABLE_XET", True
    )  # not in the stand-in
    command = [checkpoint, "--model", MODEL, "--output", folder, "--onnx", "--push", "me/my-clip"]
    command += ["--license", "mit", "--data-license", "CC BY 4.0"]
    with hub_server({"me/my-clip": tmp_path / "hub"}, token=TOKEN) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        export.main([str(part) for part in command])
    printed, errors = capfd.readouterr()
    assert "has this export already" in printed  # it is not made again
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "hub").iterdir()} == names
    for name in names:
        assert (tmp_path / "hub" / name).read_bytes() == (folder / name).read_bytes()
        assert f"  {name} " in printed
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "\nlicense: mit\n" in card.partition("\n---\n")[0]
    assert "Licence of the training data: CC BY 4.0" in card and '"hf-hub:me/my-clip"' in card
    assert "| ImageNet-1k | acc1 | 61.73 ± 0.22 |" in card and "Stanford Cars" not in card
    assert "| `--lr` | `0.001` |" in card and "held_out/0.tar" in card
    everything = card + (folder / "export.json").read_text() + printed + errors
    for private in (TOKEN, "secret@host", str(checkpoint.parents[2])):
        assert private not in everything.replace(str(folder), "")


def test_a_push_that_is_refused_is_one_line_and_keeps_the_folder(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text("a card")
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with hub_server({"me/my-clip": tmp_path / "hub"}, token=TOKEN) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        with pytest.raises(export.ExportError, match=r"401.* is complete: log in") as error:
            export.push(folder, "me/my-clip", private=True)
    printed = capsys.readouterr().out
    assert f"uploads to {hub.url}/me/my-clip (private" in printed and "README.md" in printed
    assert "\n" not in str(error.value) and "hf_another" not in str(error.value) + printed
    assert [path.name for path in folder.iterdir()] == ["README.md"]
    with pytest.raises(export.ExportError, match=r"is complete: .* check the network"):
        export.push(folder, "me/my-clip", private=True)  # the server has stopped


def test_a_difference_above_the_tolerance_is_an_error_and_nothing_is_written(
    checkpoint, tmp_path, monkeypatch
):
    """A real fault: the weights on disk are not those of the checkpoint."""
    load = export.load_openclip

    def damage(model, folder):
        weights = load_file(folder / export.WEIGHTS)
        weights["text_projection"] = weights["text_projection"].flip(0)
        from safetensors.torch import save_file

        save_file(weights, folder / export.WEIGHTS)
        return load(model, folder)

    monkeypatch.setattr(export, "load_openclip", damage)
    output = tmp_path / "model"
    with pytest.raises(export.ExportError, match="OpenCLIP differs from the checkpoint by"):
        export.main([str(checkpoint), "--model", str(MODEL), "--output", str(output)])
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_are_never_within_a_tolerance(checkpoint):
    model = load_model(str(MODEL), str(checkpoint), torch.device("cpu"))
    examples = export.read_examples(model, str(checkpoint), None)
    lost = export.Format(
        "lost",
        (),
        export.HALF,
        lambda batch: torch.full((len(batch), 16), torch.nan),
        export.encode_with(export.TextEncoder(model.model)),
    )
    with pytest.raises(export.ExportError, match="lost differs"):
        export.compare(lost, model, examples)


def test_pictures_of_this_repository_stand_in_where_the_run_has_no_data(checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    torch.save(state, tmp_path / "weights.pt")
    model = load_model(str(MODEL), str(tmp_path / "weights.pt"), torch.device("cpu"))
    examples = export.read_examples(model, str(tmp_path / "weights.pt"), None)
    assert examples.source.endswith("docs/sample.png")
    assert len(examples.images) == len(examples.tokens) == len(set(map(str, examples.images))) == 16


def test_a_checkpoint_of_another_model_names_both(checkpoint):
    with pytest.raises(ModelError, match=r"another model \(tiny_vit, .*\) than .*micro_vit"):
        load_model(str(OTHER), str(checkpoint), torch.device("cpu"))


CHANGES = {
    "force_quick_gelu": ({"force_quick_gelu": True}, {"quick_gelu": True}),
    "openai, before 3.0": ({"pretrained": "openai"}, {"quick_gelu": True}),
    "openai": ({"pretrained": "openai", "force_context_length": None}, {}),
    "siglip": ({"siglip": True}, {"init_logit_bias": -10}),
    "force_custom_text": ({"force_custom_text": True}, {"custom_text": True}),
    "force_context_length": ({"force_context_length": 9}, {"text_cfg": {"context_length": 9}}),
}


@pytest.mark.parametrize("options", CHANGES)
def test_what_the_run_changed_in_the_model_is_kept(options, tmp_path):
    params, changed = CHANGES[options]
    config = json.loads(MODEL.read_text())
    expected = {**config, **changed, "text_cfg": config["text_cfg"] | changed.get("text_cfg", {})}
    (tmp_path / "changed.json").write_text(json.dumps(expected))
    open_clip.add_model_config(tmp_path / "changed.json")
    torch.manual_seed(0)
    trained = open_clip.create_model("changed").eval()
    (tmp_path / "checkpoints").mkdir()
    torch.save(trained.state_dict(), tmp_path / "checkpoints" / "epoch_1.pt")
    lines = "".join(f"{name}: {value}\n" for name, value in params.items())
    (tmp_path / "params.txt").write_text(lines)
    checkpoint = str(tmp_path / "checkpoints" / "epoch_1.pt")
    loaded = load_model(str(MODEL), checkpoint, torch.device("cpu"))
    found = loaded.make_config()["model_cfg"]
    assert found == {**expected, "vision_cfg": found["vision_cfg"]}
    tokens = loaded.tokenizer(["a dog"])
    assert tokens.shape[1] == expected["text_cfg"]["context_length"]
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.model.encode_image(images), trained.encode_image(images))
    assert torch.equal(loaded.model.encode_text(tokens), trained.encode_text(tokens))


def test_a_tag_has_the_activation_that_its_weights_need(tmp_path, monkeypatch):
    name, weights = _register(MODEL), tmp_path / "weights.safetensors"
    torch.manual_seed(0)
    trained = open_clip.create_model(name, force_quick_gelu=True).eval()
    save_file(trained.state_dict(), weights)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(weights))
    tags = {"tag": {"hf_hub": "me/tiny/", "quick_gelu": True, "mean": MEAN}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, tags)
    loaded = load_model(name, "tag", torch.device("cpu"))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.model.encode_image(images), trained.encode_image(images))
    assert loaded.make_config()["model_cfg"]["quick_gelu"]


def test_the_resize_mode_of_an_exported_model_is_kept(checkpoint, tmp_path):
    weights = tmp_path / "open_clip_model.safetensors"
    save_file(open_clip.create_model(_register(MODEL)).state_dict(), weights)
    about = {"mean": MEAN, "std": STD, "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": about}))
    loaded = load_model(str(MODEL), str(weights), torch.device("cpu"))
    assert loaded.make_config()["preprocess_cfg"]["resize_mode"] == "squash"


def test_samples_that_lack_something_are_not_compared(checkpoint, tmp_path):
    pair = {"jpg": encode(picture(0)), "txt": b"a picture"}
    bad = [("a", {"jpg": pair["jpg"]}), ("b", {"txt": b"no image"})]
    shard = write_shard(tmp_path / "0.tar", [*bad, ("c", pair)])
    assert export.read_pairs(str(shard))[1] == ["a picture"]
    with pytest.raises(export.ExportError, match="has no sample with an image and a caption"):
        export.read_pairs(str(write_shard(tmp_path / "1.tar", bad)))
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(export.ExportError, match=r"0\.tar is not a whole tar"):
        export.read_pairs(str(shard))


def test_a_torn_checkpoint_is_one_line(checkpoint, tmp_path):
    torn = tmp_path / "torn.pt"
    torn.write_bytes(checkpoint.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"torn\.pt is no checkpoint: ") as error:
        load_model(str(MODEL), str(torn), torch.device("cpu"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fp16"], "--fp16 is for --onnx and --coreml"),
        (["--push", "me/model"], "--push needs --license"),
    ],
)
def test_options_that_lack_something_are_refused(checkpoint, tmp_path, options, message, capsys):
    command = [str(checkpoint), "--model", str(MODEL), "--output", str(tmp_path / "x"), *options]
    with pytest.raises(SystemExit) as stopped:
        export.main(command)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_of_something_else_is_never_touched(checkpoint, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(export.ExportError, match="exists and is not this export"):
        export.main([str(checkpoint), "--model", str(MODEL), "--output", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_core_ml_is_left_out_where_coremltools_is_missing(checkpoint, tmp_path, capsys):
    pytest.importorskip("open_clip")
    if not export.find_missing(["coremltools"]):
        pytest.skip("coremltools is installed")
    output = tmp_path / "model"
    export.main([str(checkpoint), "--model", str(MODEL), "--output", str(output), "--coreml"])
    assert "Core ML was skipped: coremltools is not installed" in capsys.readouterr().out
    assert (output / "open_clip_config.json").is_file()


@pytest.mark.slow
def test_the_pinned_tree_exports_the_same_model(exported, checkpoint, tree, tmp_path):
    output = tmp_path / "model"
    command = [*COMMAND, checkpoint, "--model", MODEL, "--output", output]
    done = subprocess.run(
        [str(part) for part in command], env=environment(tree), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(f / "open_clip_model.safetensors") for f in (output, exported[0]))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
