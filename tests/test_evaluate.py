"""Evaluations give clip-benchmark's numbers and DataComp's metrics, and survive interruptions."""

import io
import json
import math
import re
import sys
from collections import Counter

import duckdb
import evaluate
import numpy as np
import open_clip
import pytest
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from conftest import ROOT, environment, run
from hub_server import hub_server
from lib import evaluation
from lib.evaluation import DATACOMP38
from lib.models import load_model
from shards import encode, picture, write_shard
from sklearn.metrics import balanced_accuracy_score, f1_score
from torch.utils.data import DataLoader

pytestmark = [pytest.mark.slow, pytest.mark.extended]

MODEL = ROOT / "tests" / "data" / "tiny_vit.json"
CLASSES, IMAGES = 6, 40


def npy(row):
    stream = io.BytesIO()
    np.save(stream, np.array(row))
    return stream.getvalue()


def write_set(folder, samples, shards=1, **texts):
    """A data set in clip-benchmark's form; ``texts`` are the files next to ``test/``."""
    for number in range(shards):
        write_shard(folder / "test" / f"{number}.tar", samples[number::shards])
    (folder / "test" / "nshards.txt").write_text(f"{shards}\n")
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def write_classification(folder, metadata=None, shards=2):
    samples = []
    for seed in range(IMAGES):
        members = {"jpg": encode(picture(seed)), "cls": str(seed % CLASSES).encode()}
        if metadata:
            members["npy"] = npy(metadata(seed))
        samples.append((f"s{seed:07d}", members))
    return write_set(
        folder,
        samples,
        shards,
        classnames="".join(f"thing {index}\n" for index in range(CLASSES)),
        zeroshot_classification_templates="a photo of a {c}\na drawing of a {c}\n",
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_classification(folder / "wds_cifar10_test")
    write_classification(folder / "wds_wilds-fmow_test", lambda seed: [seed % 3, 2016, 0])
    pairs = [
        (f"s{seed}", {"jpg": encode(picture(seed)), "txt": f"one {seed}\ntwo {seed}".encode()})
        for seed in range(12)
    ]
    write_set(folder / "wds_flickr30k", pairs, dataset_type="retrieval\n")
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    folder.mkdir()
    open_clip.add_model_config(MODEL)
    paths = [folder / "epoch_1.pt", folder / "epoch_2.pt"]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        torch.save({"state_dict": open_clip.create_model("tiny_vit").state_dict()}, path)
    return paths


@pytest.fixture(scope="module")
def model(checkpoints):
    return load_model(str(MODEL), str(checkpoints[0]), torch.device("cpu"))


def command(*checkpoints, data, suite, output):
    options = {"--model": MODEL, "--data": data, "--suite": suite, "--output": output}
    options |= {"--workers": 0}
    given = [part for pair in options.items() if pair[1] is not None for part in pair]
    return [str(part) for part in (*checkpoints, *given)]


def load_with_clip_benchmark(name, folder, model, task):
    dataset = build_dataset(
        f"wds/{name}", root=str(folder), transform=model.make_transform(), download=False, task=task
    )
    return dataset, DataLoader(dataset.batched(7), batch_size=None, num_workers=0)


def test_a_classification_set_gives_clip_benchmarks_own_predictions(model, data):
    """Its metrics of them do not run: `accuracy` fails with NumPy 2.4."""
    folder = data / "wds_cifar10_test"
    dataset, loader = load_with_clip_benchmark("cifar10", folder, model, "zeroshot_classification")
    classifier = zeroshot_classification.zero_shot_classifier(
        model.model, model.tokenizer, dataset.classes, dataset.templates, "cpu", amp=False
    )
    logits, labels = zeroshot_classification.run_classification(
        model.model, classifier, loader, "cpu", amp=False
    )
    best = logits.topk(5, dim=1).indices
    accuracy = (best[:, 0] == labels).double().mean().item()
    expected = {
        "acc1": accuracy,
        "acc5": (best == labels[:, None]).any(dim=1).double().mean().item(),
        "mean_per_class_recall": balanced_accuracy_score(labels, best[:, 0]),
        "main_metric": accuracy,
        "main_metric_stderr": math.sqrt(accuracy * (1 - accuracy) / IMAGES),
    }
    found = evaluate.evaluate(model, "cifar10", folder, "cpu", batch_size=16, workers=2)
    assert found["samples"] == len(labels) == IMAGES and found["metric_name"] == "acc1"
    for name, value in expected.items():
        assert found["metrics"][name] == pytest.approx(value), name


def test_a_retrieval_set_gives_clip_benchmarks_own_numbers(model, data):
    folder = data / "wds_flickr30k"
    _, loader = load_with_clip_benchmark("flickr30k", folder, model, "zeroshot_retrieval")
    expected = zeroshot_retrieval.evaluate(
        model.model, loader, model.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    found = evaluate.evaluate(model, "flickr30k", folder, "cpu", batch_size=5, workers=0)
    for name, value in expected.items():
        assert found["metrics"][name] == pytest.approx(value)
    both = expected["image_retrieval_recall@1"] + expected["text_retrieval_recall@1"]
    assert found["metrics"]["main_metric"] == pytest.approx(both / 2)
    assert (found["samples"], found["task"]) == (12, "zeroshot_retrieval")


def make_predictions(number=500, classes=7):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, classes, number)
    predicted = np.where(generator.random(number) < 0.6, labels, generator.integers(0, 9, number))
    groups = generator.integers(0, 3, (number, 1))
    top5 = (predicted == labels) | (generator.random(number) < 0.5)
    return evaluate.Predictions(labels, predicted, top5, groups)


def test_the_main_metrics_are_those_of_sklearn_and_of_groups():
    found = make_predictions()
    hits = found.labels == found.predicted
    groups = found.groups[:, 0]
    expected = {
        "acc1": hits.mean(),
        "mean_per_class_recall": balanced_accuracy_score(found.labels, found.predicted),
        "F1-macro_all": f1_score(
            found.labels, found.predicted, average="macro", labels=np.unique(found.labels)
        ),
        "acc_worst_region": min(hits[groups == group].mean() for group in range(3)),
        "acc_wg": min(hits[groups == group].mean() for group in range(3)),
        "acc_top5_wg": min(found.top5[groups == group].mean() for group in range(3)),
    }
    assert set(expected) == {data_set.metric for data_set in DATACOMP38.values()} - {
        "mean_recall@1",
        "jaccard_score_10-12",
    }
    for metric, value in expected.items():
        assert evaluate.measure_metric(metric, found)[0] == pytest.approx(value), metric


def test_the_bootstrap_gives_the_binomial_error_where_there_is_one_group():
    found = make_predictions()
    one_group = found._replace(groups=np.zeros((len(found.labels), 1)))
    _, binomial = evaluate.measure_metric("acc1", found)
    _, bootstrap = evaluate.measure_metric("acc_wg", one_group)
    assert bootstrap == pytest.approx(binomial, rel=0.15)


def test_the_worst_group_is_read_from_the_metadata(model, data):
    folder = data / "wds_wilds-fmow_test"
    found = evaluate.evaluate(model, "wilds/fmow", folder, "cpu", batch_size=16, workers=2)
    plain = evaluate.evaluate(model, "cifar10", folder, "cpu", batch_size=IMAGES, workers=0)
    assert found["metrics"]["acc1"] == plain["metrics"]["acc1"]
    assert found["metric_name"] == "acc_worst_region"
    assert found["metrics"]["main_metric"] <= found["metrics"]["acc1"]
    with pytest.raises(evaluate.EvaluationError, match=r"no metadata \(npy\)"):
        evaluate.evaluate(model, "wilds/fmow", data / "wds_cifar10_test", "cpu", 16, 0)


def test_winogavil_is_the_jaccard_index_of_the_large_instances(model, tmp_path):
    """A cue whose only candidates are associations scores 1; small instances do not count."""
    rows = [
        ("Apple", [f"p{n}" for n in range(10)], [f"p{n}" for n in range(10)]),
        ("tree", [f"p{n}" for n in range(5)], ["p0"]),
    ]
    con = duckdb.connect()
    con.execute(
        "create table t (cue text, candidates text[], associations text[],"
        " candidate_images struct(bytes blob, path text)[])"
    )
    for cue, candidates, associations in rows:
        images = [{"bytes": encode(picture(seed)), "path": ""} for seed, _ in enumerate(candidates)]
        con.execute("insert into t values (?, ?, ?, ?)", [cue, candidates, associations, images])
    con.execute(f"copy t to '{tmp_path}/test.parquet'")
    found = evaluate.evaluate(model, "misc/winogavil", tmp_path, "cpu", 16, 0)
    assert found["metrics"]["main_metric"] == 1.0 and found["samples"] == 2
    assert found["metrics"]["avg_jaccard_score"] in (0.5, 1.0)


def test_the_average_is_over_datacomps_38_data_sets():
    assert len(DATACOMP38) == 38
    metrics = Counter(data_set.metric for data_set in DATACOMP38.values())
    assert metrics == {
        "acc1": 27,
        "mean_per_class_recall": 4,
        "mean_recall@1": 2,
        "jaccard_score_10-12": 1,
        "F1-macro_all": 1,
        "acc_worst_region": 1,
        "acc_top5_wg": 1,
        "acc_wg": 1,
    }
    results = {
        key: {"metrics": {"main_metric": number / 38, "main_metric_stderr": 0.38}}
        for number, key in enumerate(DATACOMP38)
    }
    mean, error = evaluation.average(results, DATACOMP38)
    assert mean == pytest.approx(37 / 2 / 38) and error == pytest.approx(0.38 / math.sqrt(38))
    del results["cars"]
    assert evaluation.average(results, DATACOMP38) is None


def test_checkpoints_of_a_run_give_a_table_and_a_figure_and_nothing_is_evaluated_twice(
    checkpoints, data, tmp_path, capsys, monkeypatch
):
    given = {"data": data, "suite": "wds/cifar10,flickr30k", "output": tmp_path}
    evaluate.main(command(*checkpoints, **given))
    first = capsys.readouterr().out
    results = tmp_path / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["pretrained"], line["dataset"]) for line in lines] == [
        (str(checkpoint), f"wds/{key}")
        for checkpoint in checkpoints
        for key in ("cifar10", "flickr30k")
    ]
    fields = {"dataset", "model", "pretrained", "task", "metrics", "language"}  # clip-benchmark's
    assert all(fields <= set(line) and line["model"] == "tiny_vit" for line in lines)
    for checkpoint in checkpoints:
        assert f"{checkpoint.parents[1].name}/{checkpoint.stem}" in first
    assert "MobileCLIP2-S4" in first and "needs 36 more data sets" in first
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")

    torn = results.read_text()[:-40]  # the last line of a run that was killed
    results.write_text(torn)
    evaluate.main(command(*checkpoints, **given))
    again = results.read_text()
    assert again.startswith(torn + "\n") and len(again.splitlines()) == 5
    assert {**json.loads(again.splitlines()[-1])} == lines[-1]

    monkeypatch.setattr(evaluate, "evaluate", None)  # whatever calls it fails
    evaluate.main(command(*checkpoints, **given))
    assert capsys.readouterr().out.count(f"is in {results}") == 3 + 4
    config = json.loads(MODEL.read_text()) | {"quick_gelu": True}
    (tmp_path / "tiny_vit.json").write_text(json.dumps(config))
    arguments = command(*checkpoints, **given)
    arguments[arguments.index(str(MODEL))] = str(tmp_path / "tiny_vit.json")
    with pytest.raises(TypeError):  # of another model with the same names, nothing is taken
        evaluate.main(arguments)


def test_a_data_set_comes_from_the_hub_and_one_that_it_lacks_is_one_line(
    checkpoints, data, tmp_path
):
    given = {"data": None, "suite": "cifar10,cars", "output": tmp_path / "output"}
    with hub_server({"djghosh/wds_cifar10_test": data / "wds_cifar10_test"}) as hub:
        environ = environment(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"))
        script = ROOT / "scripts" / "evaluate.py"
        done = run([sys.executable, script, *command(checkpoints[0], **given)], env=environ)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last.startswith("error: cars can't be downloaded from the Hub (djghosh/wds_cars_test): ")
    assert "What is evaluated is kept" in last
    lines = (tmp_path / "output" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["dataset"] for line in lines] == ["wds/cifar10"]


def test_a_data_set_that_is_not_there_is_named_before_anything_is_evaluated(
    checkpoints, data, tmp_path
):
    given = {"data": data, "suite": "cifar10,vtab/dtd", "output": tmp_path / "output"}
    with pytest.raises(evaluate.EvaluationError, match="lacks 1 of 2 data sets: vtab/dtd"):
        evaluate.main(command(checkpoints[0], **given))
    assert not (tmp_path / "output").exists()


def test_a_torn_shard_is_one_line_and_what_is_evaluated_is_kept(checkpoints, data, tmp_path):
    write_classification(tmp_path / "wds_cars_test")
    shard = tmp_path / "wds_cars_test" / "test" / "1.tar"
    shard.write_bytes(shard.read_bytes()[:-15000])
    (tmp_path / "wds_cifar10_test").symlink_to(data / "wds_cifar10_test")
    given = {"data": tmp_path, "suite": "cifar10,cars", "output": tmp_path / "output"}
    with pytest.raises(evaluate.EvaluationError, match=re.escape(f"cars: {shard}: ")) as error:
        evaluate.main([*command(checkpoints[0], **given), "--workers", "2"])
    assert "\n" not in str(error.value)
    assert len((tmp_path / "output" / "results.jsonl").read_text().splitlines()) == 1


def test_the_scripts_help_has_every_option_and_installs_nothing(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_arguments(["--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    done = run(["bash", ROOT / "scripts" / "evaluate.sh", "--help"], env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0 and options <= set(re.findall(r"--[a-z-]+", done.stdout))
    assert "installing" not in done.stdout


def test_labels_beyond_the_classes_are_refused(model, tmp_path):
    folder = write_classification(tmp_path / "set")
    (folder / "classnames.txt").write_text("one\ntwo\n")
    with pytest.raises(evaluate.EvaluationError, match=r"labels are 0 to 5, but .* 2 classes"):
        evaluate.evaluate(model, "mine", folder, "cpu", batch_size=16, workers=0)
