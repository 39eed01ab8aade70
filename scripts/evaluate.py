"""Evaluate checkpoints zero-shot with LAION's clip-benchmark, next to published models.

    bash scripts/evaluate.sh logs/NAME/checkpoints/epoch_20.pt --model ViT-B-16 --suite datacomp38

The script measures each data set of the suite with clip-benchmark's zero-shot classifier or
retrieval, in float32, and reports DataComp's main metric of the data set with a standard error. The
average of 38 is the mean of these metrics over DataComp's 38 data sets.

Suites are imagenet, retrieval (Flickr30k and MSCOCO) and datacomp38, or names of data sets as
clip-benchmark has them, separated by commas, such as cifar10,vtab/dtd. The data sets are in
WebDataset form: test/0.tar, test/1.tar, …, test/nshards.txt, and classnames.txt with
zeroshot_classification_templates.txt, or for retrieval dataset_type.txt with the word retrieval.
--data is a folder that contains one folder for each data set, such as wds_vtab-dtd_test, as
DataComp's download script makes it. Without --data, the data sets are downloaded from the Hub into
its cache (HF_HOME).

The script writes to evaluation/ in the folder of the run:

    results.jsonl   a line for each checkpoint and data set, in clip-benchmark's format
    accuracy.png    accuracy against parameters, next to published models; of several checkpoints
                    also the learning curve

A second run skips the results in results.jsonl. Images are decoded as clip-benchmark decodes them.
Nothing in a data set is unpickled.
"""

import argparse
import io
import math
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from lib.evaluation import (
    ACCURACY,
    DATACOMP38,
    F1,
    GROUP_COLUMN,
    IMAGENET,
    JACCARD,
    PUBLISHED,
    RECALL,
    RETRIEVAL,
    SUITES,
    WINOGAVIL,
    WORST_TOP5,
    append_result,
    average,
    find_data_set,
    find_results,
    flatten,
    format_results,
    format_score,
    read_results,
)
from lib.models import LoadedModel, ModelError, find_run, load_model
from lib.publish import hash_file, publish
from lib.report import check_least, describe_error, printable, run_command
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dr.sample import IMAGE_FORMATS, IMAGE_MEMBERS, MAX_PIXELS, first_member
from dr.tar import Members, read_samples

CLASSIFICATION, RETRIEVAL_TASK = "zeroshot_classification", "zeroshot_retrieval"
READ_MEMBERS = (*IMAGE_MEMBERS, "txt", "cls", "npy")
CLASSES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
OURS = "#d1601f"
# Families of published models in the figure: colour, and where the names of the models are.
FAMILIES = {
    "MobileCLIP-": ("#2a6fb0", "left", "top"),
    "MobileCLIP2-": ("#3a8a5c", "right", "bottom"),
    "ViT-B/16 on DataCompDR-12M": ("#8b5aa8", "left", "top"),
}
REPLICATES = 200  # of the bootstrap
WINOGAVIL_REVISION = "refs/convert/parquet"  # the Hub's own conversion

Metrics = dict[str, Any]


class EvaluationError(Exception):
    """Why a data set cannot be evaluated, in a line for people."""


class Predictions(NamedTuple):
    """Predictions for the N images of a classification data set.

    Attributes:
        labels: ``[N]``.
        predicted: ``[N]``, the best class.
        top5: ``[N]``, whether the label is among the best five.
        groups: ``[N, M]``, the metadata; M is 0 where there are none.
    """

    labels: np.ndarray
    predicted: np.ndarray
    top5: np.ndarray
    groups: np.ndarray


# --- data sets ------------------------------------------------------------------------------------
def find_folder(key: str, data: Path) -> Path | None:
    """A data set's folder below --data."""
    flat = flatten(key)
    names = (f"wds_{flat}_test", f"wds_{flat}", flat)
    return next((data / name for name in names if (data / name).is_dir()), None)


def download(key: str) -> Path:
    """Download a data set from the Hub into its cache, or find it there."""
    from huggingface_hub import snapshot_download

    options = {"revision": WINOGAVIL_REVISION} if key == WINOGAVIL else {}
    repo = find_data_set(key).repo
    try:
        return Path(snapshot_download(repo, repo_type="dataset", **options))
    except Exception as error:  # the Hub's or the network's
        line = printable(describe_error(error), 300)
        raise EvaluationError(
            f"{key} can't be downloaded from the Hub ({repo}): {line}. What is evaluated is kept: "
            "run the command again, or give --data, a folder that has it"
        ) from None


def read_lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError:
        raise EvaluationError(
            f"{path} is missing: expected a data set in WebDataset form"
        ) from None


class WebDataset(IterableDataset):
    """The samples of a data set in clip-benchmark's WebDataset form.

    Args:
        folder: with ``test/nshards.txt`` and the shards.
        transform: from a PIL image to ``[3, H, W]``.
    """

    def __init__(self, folder: Path, transform: Any) -> None:
        self.transform = transform
        kind = folder / "dataset_type.txt"
        self.is_retrieval = kind.exists() and read_lines(kind)[:1] == ["retrieval"]
        text = " ".join(read_lines(folder / "test" / "nshards.txt"))
        if not text.isdecimal() or not int(text):
            raise EvaluationError(f"{folder}/test/nshards.txt: expected a number, found {text!r}")
        self.shards = [folder / "test" / f"{number}.tar" for number in range(int(text))]
        absent = [shard for shard in self.shards if not shard.is_file()]
        if absent:
            raise EvaluationError(
                f"{len(absent)} of {len(self.shards)} shards are missing, the first is {absent[0]}"
            )

    def __iter__(self) -> Iterator[tuple[torch.Tensor, Any]]:
        """Yield images with captions, or with a row of the label and the metadata."""
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for shard in self.shards[first::step]:
            with open(str(shard), "rb") as file:
                try:
                    for key, members in read_samples(file, READ_MEMBERS.__contains__, whole=True):
                        yield self.decode(key, members)
                except (tarfile.TarError, OSError, ValueError) as error:
                    raise EvaluationError(f"{shard}: {printable(error, 400)}") from None

    def count(self) -> int:
        """The number of samples."""
        number = 0
        for shard in self.shards:
            with open(str(shard), "rb") as file:
                try:
                    number += sum(1 for _ in read_samples(file, lambda extension: False))
                except tarfile.TarError as error:
                    raise EvaluationError(f"{shard}: {printable(error, 400)}") from None
        return number

    def decode(self, key: str, members: Members[bytes]) -> tuple[torch.Tensor, Any]:
        if not any(name in members for name in IMAGE_MEMBERS):
            raise ValueError(f"sample {key!r} has no image")
        image = self.transform(decode_rgb(first_member(members, IMAGE_MEMBERS)[1]))
        wanted = "txt" if self.is_retrieval else "cls"
        if wanted not in members:
            raise ValueError(f"sample {key!r} has no {wanted}")
        if self.is_retrieval:
            return image, members["txt"].decode().splitlines()
        stored = io.BytesIO(members["npy"]) if "npy" in members else None
        metadata = np.load(stored, allow_pickle=False).ravel() if stored else np.empty(0)
        return image, torch.tensor([int(members["cls"]), *metadata.tolist()], dtype=torch.float64)


def decode_rgb(data: bytes) -> Image.Image:
    """An image as clip-benchmark decodes it: transparency is dropped, not composited."""
    try:
        img = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        if img.width * img.height > MAX_PIXELS:
            raise ValueError(f"{img.width}x{img.height}, at most {MAX_PIXELS} pixels are taken")
        return img.convert("RGB")
    except Exception as error:  # Pillow raises nearly anything on a broken file
        raise ValueError(f"undecodable image: {error}") from error


def stack_samples(batch: list[tuple[torch.Tensor, Any]]) -> tuple[torch.Tensor, Any]:
    images, targets = zip(*batch, strict=True)
    if isinstance(targets[0], torch.Tensor):
        return torch.stack(images), torch.stack(targets)
    return torch.stack(images), list(targets)


# --- metrics --------------------------------------------------------------------------------------
def divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """``part / whole`` where ``whole`` is positive; other elements are left out."""
    return part[whole > 0] / whole[whole > 0]


def compute_metric(metric: str, found: Predictions, weights: np.ndarray) -> float:
    """A main metric of DataComp.

    Args:
        metric: its name.
        found: the predictions.
        weights: ``[N]``, of the images; 1 for each, or how often the bootstrap drew it.
    """
    hits = weights * (found.top5 if metric == WORST_TOP5 else found.labels == found.predicted)
    if metric == ACCURACY:
        return float(hits.sum() / weights.sum())
    if metric in GROUP_COLUMN:
        groups = found.groups[:, GROUP_COLUMN[metric]].astype(int)
        return float(divide(np.bincount(groups, hits), np.bincount(groups, weights)).min())
    classes = 1 + max(found.labels.max(), found.predicted.max())
    right = np.bincount(found.labels, hits, classes)
    support = np.bincount(found.labels, weights, classes)
    if metric == RECALL:
        return float(divide(right, support).mean())
    assert metric == F1
    chosen = np.bincount(found.predicted, weights, classes)
    # of the classes that occur, as in WILDS
    return float((2 * right[support > 0] / (support + chosen)[support > 0]).mean())


def measure_metric(metric: str, found: Predictions) -> tuple[float, float]:
    """A main metric and its standard error: binomial for accuracy, else by the bootstrap."""
    number = len(found.labels)
    value = compute_metric(metric, found, np.ones(number))
    if metric == ACCURACY:
        return value, math.sqrt(value * (1 - value) / number)
    generator = np.random.default_rng(0)
    drawn = (
        np.bincount(generator.integers(0, number, number), minlength=number).astype(float)
        for _ in range(REPLICATES)
    )
    return value, float(np.std([compute_metric(metric, found, weights) for weights in drawn]))


def evaluate_classification(
    model: LoadedModel, loader: DataLoader, folder: Path, metric: str, device: str
) -> tuple[Metrics, int]:
    """The metrics of a classification data set, and the number of its images."""
    classes, templates = read_lines(folder / CLASSES), read_lines(folder / TEMPLATES)
    classifier = zeroshot_classification.zero_shot_classifier(
        model.model, model.tokenizer, classes, templates, device, amp=False
    )
    logits, rows = zeroshot_classification.run_classification(
        model.model, classifier, loader, device, amp=False
    )
    labels = rows[:, 0].long()
    if labels.min() < 0 or labels.max() >= len(classes):
        raise EvaluationError(
            f"{folder}: labels are {int(labels.min())} to {int(labels.max())}, but {CLASSES} has "
            f"{len(classes)} classes"
        )
    best = logits.topk(min(5, len(classes)), dim=1).indices
    found = Predictions(
        labels.numpy(),
        best[:, 0].numpy(),
        (best == labels[:, None]).any(dim=1).numpy(),
        rows[:, 1:].numpy(),
    )
    if metric in GROUP_COLUMN and not found.groups.shape[1]:
        raise EvaluationError(f"{folder}: its samples have no metadata (npy), which {metric} needs")
    value, error = measure_metric(metric, found)
    metrics = {
        "acc1": compute_metric(ACCURACY, found, np.ones(len(labels))),
        "acc5": float(found.top5.mean()) if len(classes) >= 5 else None,
        "mean_per_class_recall": compute_metric(RECALL, found, np.ones(len(labels))),
    }
    return metrics | {metric: value, "main_metric": value, "main_metric_stderr": error}, len(labels)


def evaluate_retrieval(model: LoadedModel, loader: DataLoader, number: int, device: str) -> Metrics:
    """The metrics of a retrieval data set of ``number`` images."""
    ks = [k for k in (1, 5, 10) if k <= number]
    metrics = zeroshot_retrieval.evaluate(
        model.model, loader, model.tokenizer, device, amp=False, recall_k_list=ks
    )
    both = [metrics[f"{kind}_retrieval_recall@1"] for kind in ("image", "text")]
    value = sum(both) / 2
    # The captions of an image are not independent: both directions have as many as images.
    error = math.sqrt(sum(recall * (1 - recall) / number for recall in both)) / 2
    return metrics | {RETRIEVAL: value, "main_metric": value, "main_metric_stderr": error}


@torch.inference_mode()
def evaluate_winogavil(model: LoadedModel, folder: Path, device: str) -> tuple[Metrics, int]:
    """The Jaccard index of WinoGAViL, from the Hub's Parquet files of its test split."""
    import duckdb

    files = sorted(str(path) for path in folder.rglob("*.parquet"))
    if not files:
        raise EvaluationError(f"{folder} has no Parquet file of WinoGAViL")
    transform = model.make_transform()
    scores = []
    columns = "cue, candidates, associations, candidate_images"
    cursor = duckdb.connect().execute(f"select {columns} from read_parquet(?)", [files])
    while row := cursor.fetchone():
        cue, candidates, associations, encoded = row
        images = torch.stack([transform(decode_rgb(image["bytes"])) for image in encoded])
        article = "An" if cue[:1].lower() in "aeiou" else "A"
        tokens = model.tokenizer([f"{article} {cue.lower()}"]).to(device)
        embeddings = model.model.encode_image(images.to(device), normalize=True)
        similarity = (embeddings @ model.model.encode_text(tokens, normalize=True).T)[:, 0]
        right = {index for index, name in enumerate(candidates) if name in associations}
        chosen = set(similarity.topk(len(right)).indices.tolist())
        scores.append((len(candidates), len(right & chosen) / len(right | chosen)))
    hard = np.array([score for size, score in scores if size >= 10])
    if not len(hard):
        raise EvaluationError(f"{folder} has no instance of WinoGAViL with 10 or 12 images")
    value, error = float(hard.mean()), float(hard.std() / math.sqrt(len(hard)))
    every = float(np.mean([score for _, score in scores]))
    metrics = {"avg_jaccard_score": every, JACCARD: value}
    return metrics | {"main_metric": value, "main_metric_stderr": error}, len(scores)


def evaluate(
    model: LoadedModel, key: str, folder: Path, device: str, batch_size: int, workers: int
) -> dict[str, Any]:
    """Evaluate a model on a data set; returns the fields of its line that depend on the data."""
    if key == WINOGAVIL:
        metrics, number = evaluate_winogavil(model, folder, device)
        return {"task": "winogavil", "metrics": metrics, "metric_name": JACCARD, "samples": number}
    dataset = WebDataset(folder, model.make_transform())
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=min(workers, len(dataset.shards)),
        collate_fn=stack_samples,
    )
    if dataset.is_retrieval:
        number = dataset.count()
        metric, metrics = RETRIEVAL, evaluate_retrieval(model, loader, number, device)
    else:
        metric = find_data_set(key).metric or ACCURACY
        metrics, number = evaluate_classification(model, loader, folder, metric, device)
    task = RETRIEVAL_TASK if dataset.is_retrieval else CLASSIFICATION
    return {"task": task, "metrics": metrics, "metric_name": metric, "samples": number}


# --- report ---------------------------------------------------------------------------------------
class Evaluated(NamedTuple):
    """A checkpoint and its results.

    Attributes:
        name: of the checkpoint, for people.
        parameters: in millions.
        results: by data set.
    """

    name: str
    parameters: float
    results: dict[str, dict[str, Any]]


def format_report(evaluated: Sequence[Evaluated]) -> str:
    """Tables: the data sets, and the checkpoints next to the published models."""
    lines = []
    for checkpoint in evaluated:
        lines += [checkpoint.name, ""]
        rows = format_results(checkpoint.results)
        width = max(len(name) for name, *_ in rows)
        lines += [f"  {name:<{width}}  {metric:<22}{score:>16}" for name, metric, score in rows]
        lines.append("")
    ours = []
    for checkpoint in evaluated:
        imagenet = average(checkpoint.results, [IMAGENET])
        of_38 = average(checkpoint.results, DATACOMP38)
        scores = [format_score(*score) if score else "–" for score in (imagenet, of_38)]
        ours.append((checkpoint.name, checkpoint.parameters, *scores))
    theirs = [
        (model.name, model.parameters, f"{model.imagenet}", f"{model.average or '–'}")
        for model in PUBLISHED
    ]
    width = max(len(name) for name, *_ in (*ours, *theirs))
    lines.append(f"{'model':<{width}}{'parameters':>13}{'ImageNet-1k':>16}{'average of 38':>16}")
    for name, parameters, imagenet, of_38 in (*ours, *theirs):
        lines.append(f"{name:<{width}}{parameters:>11.1f} M{imagenet:>16}{of_38:>16}")
    missing = max(len(DATACOMP38.keys() - checkpoint.results) for checkpoint in evaluated)
    if missing:
        lines.append(f"\nThe average of 38 needs {missing} more data sets: --suite datacomp38")
    return "\n".join(lines)


def draw_published(axis: Any, index: int) -> None:
    """Draw the published models, a curve for each family.

    Args:
        axis: Matplotlib's.
        index: of the result in :class:`Published`.
    """
    for family, (color, horizontal, vertical) in FAMILIES.items():
        models = [
            model
            for model in PUBLISHED
            if model.name.startswith(family) and model[index] is not None
        ]
        if not models:
            continue
        models.sort(key=lambda model: model.parameters)
        sizes, values = zip(*((model.parameters, model[index]) for model in models), strict=True)
        label = family.rstrip("-")
        axis.plot(sizes, values, color=color, marker="o", markersize=5, linewidth=1, label=label)
        for model in models:
            is_largest = len(models) > 1 and model == models[-1]
            side = "left" if is_largest else horizontal  # the last two have nearly the same size
            place = (model.parameters, model[index])
            name = model.name.removeprefix(family)
            axis.annotate(name, place, fontsize=8, color=color, ha=side, va=vertical)
    axis.legend(frameon=False, fontsize=8, loc="lower right")


def draw_report(evaluated: Sequence[Evaluated], suite: Sequence[str], path: Path) -> None:
    """Draw accuracy against parameters; of several checkpoints also the learning curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (title, keys, index)
        for title, keys, index in (
            ("ImageNet-1k, zero-shot top-1", [IMAGENET], 2),
            ("average of 38 data sets", list(DATACOMP38), 3),
        )
        if any(average(checkpoint.results, keys) for checkpoint in evaluated)
    ] or [(f"mean of {len(suite)} data sets", list(suite), None)]
    curves = len(evaluated) > 1
    columns = len(panels) + curves
    figure, axes = plt.subplots(
        1, columns, figsize=(5.5 * columns, 4.2), layout="constrained", squeeze=False
    )
    for axis, (title, keys, index) in zip(axes[0], panels, strict=False):
        if index is not None:
            draw_published(axis, index)
        for checkpoint in evaluated:
            if score := average(checkpoint.results, keys):
                mean, error = 100 * score[0], 100 * score[1]
                axis.errorbar(checkpoint.parameters, mean, error, color=OURS, marker="o")
                axis.annotate(checkpoint.name, (checkpoint.parameters, mean), fontsize=8)
        axis.set_xscale("log")
        axis.margins(0.12)
        axis.set_xlabel("parameters of both encoders [millions]")
        axis.set_ylabel("[%]")
        axis.set_title(title, loc="left", fontsize=11)
    if curves:
        axis, (title, keys, _) = axes[0][-1], panels[0]
        points = [(c.name, average(c.results, keys)) for c in evaluated]
        means = [100 * score[0] for _, score in points if score]
        errors = [100 * score[1] for _, score in points if score]
        axis.errorbar(
            [name for name, score in points if score], means, errors, color=OURS, marker="o"
        )
        axis.tick_params(axis="x", rotation=30, labelsize=8)
        axis.set_ylabel("[%]")
        axis.set_title(f"learning curve: {title}", loc="left", fontsize=11)
    publish(path, lambda file: figure.savefig(file, dpi=130, format="png"))
    plt.close(figure)


# --- the command ----------------------------------------------------------------------------------
def parse_suite(text: str) -> list[str]:
    """The data sets of a suite, or those that are named."""
    names = SUITES.get(text) or [
        name.strip().removeprefix("wds/") for name in text.split(",") if name.strip()
    ]
    return list(dict.fromkeys(names))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    text = "weights: checkpoints of a run, a state dict, or safetensors"
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help=text)
    add("--model", required=True, help="OpenCLIP model name, or a model config FILE.json")
    text = f"{', '.join(SUITES)}, or names of data sets with commas; default %(default)s"
    add("--suite", default="imagenet", help=text)
    add("--data", type=Path, metavar="DIR", help="folder of the data sets; default: the Hub")
    text = "folder for the results; default: evaluation/ in the folder of the run"
    add("--output", type=Path, metavar="DIR", help=text)
    add("--batch-size", type=int, default=64, help="images at a time; default %(default)s")
    add("--workers", type=int, default=4, help="processes that decode; default %(default)s")
    text = "cuda or cpu; default: a GPU if there is one"
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help=text)
    args = parser.parse_args(arguments)
    check_least(parser, args, 1, "batch_size")
    check_least(parser, args, 0, "workers")
    args.suite = parse_suite(args.suite)
    if not args.suite:
        parser.error("--suite is empty: expected a suite or names of data sets")
    for checkpoint in args.checkpoints:
        if not os.path.isfile(checkpoint):
            parser.error(f"there is no checkpoint file {checkpoint}")
    return args


def find_folders(args: argparse.Namespace) -> dict[str, Path]:
    """The folders of the data sets below --data; empty without --data."""
    if args.data is None:
        return {}
    found = {key: find_folder(key, args.data) for key in args.suite}
    absent = [key for key, folder in found.items() if folder is None]
    if absent:
        raise EvaluationError(
            f"--data {args.data} lacks {len(absent)} of {len(args.suite)} data sets: "
            f"{', '.join(absent)}. Expected a folder wds_{flatten(absent[0])}_test; without "
            "--data, they are downloaded from the Hub"
        )
    return {key: folder for key, folder in found.items() if folder}


def evaluate_checkpoint(
    args: argparse.Namespace, checkpoint: str, folders: dict[str, Path], path: Path
) -> Evaluated:
    """Evaluate a checkpoint on the data sets that are not in its results."""
    sha256 = hash_file(checkpoint)
    model = load_model(args.model, checkpoint, torch.device(args.device))
    config = model.hash_config()
    parameters = sum(parameter.numel() for parameter in model.model.parameters()) / 1e6
    for key in args.suite:
        if key in read_results(path, sha256, config):
            print(f"{checkpoint} on {key}: is in {path}")
            continue
        print(f"{checkpoint} on {key}", flush=True)
        folder = folders.get(key) or download(key)
        try:
            found = evaluate(model, key, folder, args.device, args.batch_size, args.workers)
        except EvaluationError as error:  # of a worker process, with its traceback
            message = str(error).strip().rpartition("EvaluationError: ")[2]
            raise EvaluationError(f"{key}: {message}") from None
        line = {
            "dataset": f"wds/{key}",
            "model": model.name,
            "pretrained": checkpoint,
            "language": "en",
            "sha256": sha256,
            "model_config": config,
        }
        append_result(path, line | found)
    results = read_results(path, sha256, config)
    name = f"{find_run(checkpoint).name}/{Path(checkpoint).stem}"
    return Evaluated(name, parameters, results)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    folders = find_folders(args)
    default = find_results(args.checkpoints[0])
    path = args.output / default.name if args.output else default
    evaluated = [
        evaluate_checkpoint(args, checkpoint, folders, path) for checkpoint in args.checkpoints
    ]
    print("\n" + format_report(evaluated))
    figure = path.with_name("accuracy.png")
    draw_report(evaluated, args.suite, figure)
    print(f"\n{path}\n{figure}")


if __name__ == "__main__":
    run_command(main, EvaluationError, ModelError)
