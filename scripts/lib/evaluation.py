"""Zero-shot evaluation: DataComp's 38 data sets, published results, and files of results.

The data sets and their main metrics are those of DataComp's evaluation
(https://github.com/mlfoundations/datacomp, tasklist.yml). The average of 38 is the mean of the main
metrics. DataComp also evaluates FairFace and UTKFace, which have no main metric.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .models import find_run

RESULTS = "results.jsonl"
ACCURACY, RECALL = "acc1", "mean_per_class_recall"
RETRIEVAL = "mean_recall@1"  # of the image for a caption, and of a caption for the image
F1 = "F1-macro_all"
WORST_REGION, WORST_GROUP, WORST_TOP5 = "acc_worst_region", "acc_wg", "acc_top5_wg"
JACCARD = "jaccard_score_10-12"  # of the instances with 10 and 12 images


class DataSet(NamedTuple):
    """A data set for evaluation.

    Attributes:
        name: for people.
        metric: the main metric.
        repo: data set repository of the Hub.
    """

    name: str
    metric: str
    repo: str


def _datacomp(key: str, name: str, metric: str = ACCURACY, repo: str = "") -> tuple[str, DataSet]:
    return key, DataSet(name, metric, repo or f"djghosh/wds_{flatten(key)}_test")


def flatten(key: str) -> str:
    """A data set's name in the names of folders and repositories."""
    return key.removeprefix("fairness/").replace("/", "-")


IMAGENET, WINOGAVIL = "imagenet1k", "misc/winogavil"
DATACOMP38 = dict(
    (
        _datacomp("vtab/caltech101", "Caltech-101", RECALL),
        _datacomp("cifar10", "CIFAR-10"),
        _datacomp("vtab/cifar100", "CIFAR-100"),
        _datacomp("vtab/clevr_count_all", "CLEVR Counts"),
        _datacomp("vtab/clevr_closest_object_distance", "CLEVR Distance"),
        _datacomp("country211", "Country211"),
        _datacomp("vtab/dtd", "Describable Textures"),
        _datacomp("vtab/eurosat", "EuroSAT"),
        _datacomp("fgvc_aircraft", "FGVC Aircraft", RECALL),
        _datacomp("food101", "Food-101"),
        _datacomp("gtsrb", "GTSRB"),
        _datacomp(IMAGENET, "ImageNet-1k"),
        _datacomp("imagenet_sketch", "ImageNet Sketch"),
        _datacomp("imagenetv2", "ImageNet v2"),
        _datacomp("imagenet-a", "ImageNet-A"),
        _datacomp("imagenet-o", "ImageNet-O"),
        _datacomp("imagenet-r", "ImageNet-R"),
        _datacomp("vtab/kitti_closest_vehicle_distance", "KITTI Vehicle Distance"),
        _datacomp("mnist", "MNIST"),
        _datacomp("objectnet", "ObjectNet"),
        _datacomp("vtab/flowers", "Oxford Flowers-102", RECALL),
        _datacomp("vtab/pets", "Oxford-IIIT Pet", RECALL),
        _datacomp("voc2007", "Pascal VOC 2007"),
        _datacomp("vtab/pcam", "PatchCamelyon"),
        _datacomp("renderedsst2", "Rendered SST2"),
        _datacomp("vtab/resisc45", "RESISC45"),
        _datacomp("cars", "Stanford Cars"),
        _datacomp("stl10", "STL-10"),
        _datacomp("sun397", "SUN397"),
        _datacomp("vtab/svhn", "SVHN"),
        _datacomp("flickr30k", "Flickr30k (1k test)", RETRIEVAL, "clip-benchmark/wds_flickr30k"),
        _datacomp(
            "mscoco_captions", "MSCOCO (5k test)", RETRIEVAL, "clip-benchmark/wds_mscoco_captions"
        ),
        _datacomp(WINOGAVIL, "WinoGAViL", JACCARD, "nlphuji/winogavil"),
        _datacomp("wilds/iwildcam", "iWildCam", F1),
        _datacomp("wilds/camelyon17", "Camelyon17"),
        _datacomp("wilds/fmow", "FMoW", WORST_REGION),
        _datacomp("fairness/dollar_street", "Dollar Street", WORST_TOP5),
        _datacomp("fairness/geode", "GeoDE", WORST_GROUP),
    )
)
SUITES = {
    "imagenet": [IMAGENET],
    "retrieval": ["flickr30k", "mscoco_captions"],
    "datacomp38": list(DATACOMP38),
}
# The groups of the worst-group metrics: a column of the metadata, <key>.npy. The worst region of
# FMoW includes "Other", of 4 images, as in DataComp's code: it is 0 for many models.
GROUP_COLUMN = {WORST_REGION: 0, WORST_GROUP: 0, WORST_TOP5: 0}


def find_data_set(key: str) -> DataSet:
    """A data set of DataComp, or another one that clip-benchmark has on the Hub."""
    return DATACOMP38.get(key) or DataSet(key, "", f"clip-benchmark/wds_{flatten(key)}")


class Published(NamedTuple):
    """A published model: parameters in millions, and results in percent.

    Attributes:
        name: of the model.
        parameters: of both encoders, in millions; in training, before reparameterization.
        imagenet: zero-shot top-1 accuracy.
        average: of the 38 data sets; None: not published.
    """

    name: str
    parameters: float
    imagenet: float
    average: float | None


# arXiv:2311.17049 and arXiv:2508.20691
PUBLISHED = (
    Published("MobileCLIP-S0", 53.8, 67.8, 58.1),
    Published("MobileCLIP-S1", 85.0, 72.6, 61.3),
    Published("MobileCLIP-S2", 99.2, 74.4, 63.7),
    Published("MobileCLIP-B", 149.8, 76.8, 65.2),
    Published("MobileCLIP2-S0", 74.8, 71.5, 59.7),
    Published("MobileCLIP2-S2", 99.2, 77.2, 64.1),
    Published("MobileCLIP2-B", 149.8, 79.4, 65.8),
    Published("MobileCLIP2-S3", 248.9, 80.7, 66.8),
    Published("MobileCLIP2-L-14", 427.6, 81.9, 67.8),
    Published("MobileCLIP2-S4", 445.4, 81.9, 67.5),
    Published("ViT-B/16 on DataCompDR-12M", 149.6, 61.7, None),
)


# --- results --------------------------------------------------------------------------------------
def find_results(checkpoint: str | Path) -> Path:
    """Where the results of a checkpoint are: in ``evaluation/`` in the folder of its run."""
    return find_run(checkpoint) / "evaluation" / RESULTS


def read_results(path: Path, sha256: str, model_config: str) -> dict[str, dict[str, Any]]:
    """A model's results by data set; a line that was cut off, or is another tool's, is skipped.

    Args:
        path: results.jsonl; it need not exist.
        sha256: of the checkpoint.
        model_config: hash of the model's config.
    """
    results = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            result = json.loads(line)
            key = result["dataset"].removeprefix("wds/")
            float(result["metrics"]["main_metric"])
            if (result["sha256"], result["model_config"]) == (sha256, model_config):
                results[key] = result
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return results


def append_result(path: Path, result: dict[str, Any]) -> None:
    """Append a line of JSON, on a line of its own also after one that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(str(path), "a+b") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(result).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def average(results: dict[str, dict[str, Any]], keys: Iterable[str]) -> tuple[float, float] | None:
    """Mean of the main metrics of data sets and its standard error; None if one is missing."""
    keys = list(keys)
    if not keys or not all(key in results for key in keys):
        return None
    metrics = [results[key]["metrics"] for key in keys]
    mean = sum(metric["main_metric"] for metric in metrics) / len(keys)
    error = math.sqrt(sum(metric["main_metric_stderr"] ** 2 for metric in metrics)) / len(keys)
    return mean, error


def format_score(mean: float, error: float) -> str:
    """'61.73 ± 0.22', in percent."""
    return f"{100 * mean:.2f} ± {100 * error:.2f}"


def format_results(results: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Rows of name, metric and score of a checkpoint's results, and the averages."""
    rows = []
    for key, result in results.items():
        metrics = result["metrics"]
        score = format_score(metrics["main_metric"], metrics["main_metric_stderr"])
        rows.append((find_data_set(key).name, result["metric_name"], score))
    of_38 = average(results, DATACOMP38)
    if of_38:
        rows.append(("average of 38", "main metrics", format_score(*of_38)))
    return rows
