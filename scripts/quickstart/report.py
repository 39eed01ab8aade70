"""Report the quickstart's results: a table and sentences, results.json and two images.

    python scripts/quickstart/report.py quickstart --config quickstart/reinforce.json

The script reads from the given folder

    logs/<run>/checkpoints/results.jsonl     OpenCLIP's evaluations on the held-out images
    logs/<run>/params.txt, out.log           the run's settings, and the samples in an epoch
    datasets/quickstart_data.json            how many captions were replaced
    datasets/DataCompDR-12M/shards/*.tar     joined samples, to draw
    timings.txt                              step and seconds, a line each

and writes results.json, learning_curves.png and augmentations.png there. Missing parts are reported
and skipped; any further run under logs/ gets a row too.

It does not evaluate models itself. It compares one seed with one seed: a standard error is that of
two proportions of the held-out images, and a difference of up to two is within the noise.
"""

import argparse
import json
import math
import os
import platform
import re
import sys
import textwrap
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/
from lib.draw_sample import draw_sample, fold_accents, stack
from lib.models import read_params
from lib.reinforcement import read_reinforcement
from lib.report import printable

from dr.tar import read_samples

# The students, as the legend names them, and the colours of their curves; scripts/quickstart.sh
# trains them.
BASELINE, SYNTHETIC = "student-baseline", "student-synthetic"
DISTILLED, REINFORCED = "student-teachers", "student-reinforced"
STUDENTS = {
    BASELINE: ("baseline", "#2a6fb0"),
    SYNTHETIC: ("synthetic captions, no teachers", "#3a8a5c"),
    DISTILLED: ("teachers only", "#8b5aa8"),
    REINFORCED: ("reinforced: both", "#d1601f"),
}
# What is compared: from one student to another, and what makes the difference.
STEPS = (
    (BASELINE, SYNTHETIC, "Synthetic captions alone change the baseline's R@1 by"),
    (BASELINE, DISTILLED, "Distillation alone changes the baseline's R@1 by"),
    (SYNTHETIC, REINFORCED, "Distillation on top of synthetic captions changes R@1 by"),
    (DISTILLED, REINFORCED, "The contrastive loss on top of distillation changes R@1 by"),
    (BASELINE, REINFORCED, "Reinforcement, which is both, changes the baseline's R@1 by"),
)
TEACHERS = ("teacher-0", "teacher-1")
OTHER_COLORS = ("#a8842c", "#b04a6f", "#4a9aa8", "#666666")
GREY = "#888888"

METRICS = ("image_to_text_R@1", "image_to_text_R@5", "text_to_image_R@1", "text_to_image_R@5")
PANELS = (("image_to_text_R@1", "image to text"), ("text_to_image_R@1", "text to image"))
SETTINGS = (
    *("model", "lr", "beta1", "beta2", "wd", "warmup", "grad_clip_norm", "precision", "seed"),
    *("epochs", "train_num_samples", "batch_size", "accum_freq", "world_size", "workers"),
    *("dataset_resampled", "aug_cfg", "dataset_reinforcement"),
    *("dataset_reinforcement_mix_synthetic", "dataset_reinforcement_mix_synthetic_ratio"),
    *("distill_loss_weights", "distill_teacher_dimension"),
    *("distill_average_after_softmax", "distill_logit_scale"),
)
PACKAGES = ("torch", "torchvision", "open_clip_torch", "webdataset", "numpy", "pillow", "timm")
DRAWN_NOISE = ("another language", "file name")  # a sample of each kind is drawn

Runs = dict[str, dict[str, Any]]  # by name: settings, curve (metrics by epoch), final


def note(text: str) -> None:
    print(f"report: {text}", file=sys.stderr)


# --- reading --------------------------------------------------------------------------------------
def read_evaluations(path: Path) -> dict[int, dict[str, float]]:
    """``{epoch: metrics}`` of a results.jsonl; of an epoch the last line counts."""
    evaluations = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            metrics = json.loads(line)
            values = {name: float(metrics[name]) for name in (*METRICS, "num_samples")}
            evaluations[int(metrics["epoch"])] = values
        except (ValueError, KeyError, TypeError) as error:  # a line cut off when the run was killed
            note(f"{path}, line {number} skipped: {type(error).__name__}: {error}")
    return dict(sorted(evaluations.items()))


def read_epoch_samples(folder: Path, params: dict[str, Any]) -> int | None:
    """Samples in an epoch as logged: the trainer rounds --train-num-samples up to whole batches."""
    log = folder / "out.log"
    text = log.read_text(errors="replace") if log.exists() else ""
    logged = re.findall(r"Train Epoch: \d+ \[ *\d+/(\d+) ", text)
    return int(logged[-1]) if logged else params.get("train_num_samples")


def read_run(folder: Path) -> dict[str, Any] | None:
    """A run's settings and learning curve; None, and a note, if it was never evaluated."""
    path = folder / "checkpoints" / "results.jsonl"
    evaluations = read_evaluations(path) if path.exists() else {}
    if not evaluations:
        note(f"no evaluation of {folder.name} ({path} is missing or empty)")
        return None
    params = read_params(folder / "params.txt")
    epoch_samples = read_epoch_samples(folder, params)
    if epoch_samples is None:
        note(f"{folder.name}: neither out.log nor params.txt has the number of samples in an epoch")
    curve = []
    for epoch, metrics in evaluations.items():
        seen = None if epoch_samples is None else epoch * epoch_samples
        curve.append({"epoch": epoch, "samples_seen": seen, **metrics})
    settings = {name: params[name] for name in SETTINGS if name in params}
    return {"settings": settings, "final": curve[-1], "curve": curve}


def read_runs(logs: Path) -> Runs:
    """The runs under ``logs``, the expected ones first."""
    expected = [*TEACHERS, *STUDENTS]
    found = sorted(path.name for path in logs.iterdir() if path.is_dir()) if logs.exists() else []
    names = [*expected, *(name for name in found if name not in expected)]
    runs = {name: read_run(logs / name) for name in names}
    return {name: run for name, run in runs.items() if run}


def read_timings(path: Path) -> dict[str, int]:
    """``{step: seconds}``. Run again, a finished step takes no time: its longest time counts."""
    seconds: dict[str, int] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        step, _, took = line.partition("\t")
        seconds[step] = max(int(took), seconds.get(step, 0))
    return seconds


def read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def read_versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


# --- the table and the comparison -----------------------------------------------------------------
def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def chance(num_samples: float) -> dict[str, float]:
    """Expected metrics of a model that guesses."""
    return {name: min(1.0, int(name.rpartition("@")[2]) / num_samples) for name in METRICS}


def format_table(runs: Runs, num_samples: float) -> list[str]:
    rows = [
        (name, count(run["final"]["samples_seen"]), run["final"], 1) for name, run in runs.items()
    ]
    rows.append(("chance", "", chance(num_samples), 2))
    width = max(len(name) for name, *_ in rows)
    lines = [
        f"{'':{width}}  {'':>12}   image to text      text to image",
        f"{'run':{width}}  {'samples seen':>12}  {'R@1':>7}  {'R@5':>7}  {'R@1':>7}  {'R@5':>7}",
    ]
    for name, seen, metrics, digits in rows:
        recalls = "  ".join(f"{percent(metrics[metric], digits):>7}" for metric in METRICS)
        lines.append(f"{name:{width}}  {seen:>12}  {recalls}")
    return lines


def describe_data(data: dict[str, Any] | None) -> str:
    """What is simulated, in a sentence."""
    replaced = sum((data or {}).get("replaced_captions", {}).values())
    if not data or not replaced:
        return "All captions are clean: no caption noise was simulated."
    return (
        f"{replaced:,} of the students' {data['training']:,} captions "
        f"({percent(replaced / data['training'], 0)}) were replaced by what captions of web images "
        "look like; the teachers and the evaluation have clean captions."
    )


def compare_recall(a: float, b: float, num_samples: float) -> dict[str, Any]:
    """The difference of two recalls in points, and its standard error."""
    error = 100 * math.sqrt((a * (1 - a) + b * (1 - b)) / num_samples)
    points = 100 * (b - a)
    return {"points": points, "error": error, "within_noise": abs(points) <= 2 * error}


def compare(runs: Runs, first: str, second: str, what: str) -> dict[str, Any]:
    """What a step from one student to another changes, with a sentence."""
    step: dict[str, Any] = {"from": first, "to": second}
    missing = [name for name in (first, second) if name not in runs]
    if missing:
        return {**step, "sentence": f"{what}: not known, there is no {' and no '.join(missing)}."}
    a, b = runs[first]["final"], runs[second]["final"]
    parts = []
    for metric, direction in PANELS:
        change = compare_recall(a[metric], b[metric], a["num_samples"])
        doubt = ", within the noise" if change["within_noise"] else ""
        parts.append(
            f"{change['points']:+.1f} points {direction} "
            f"(standard error {change['error']:.1f}{doubt})"
        )
        step[metric] = change
    seen = a["samples_seen"], b["samples_seen"]
    unequal = ""
    if seen[0] != seen[1] or None in seen:
        unequal = f", NOT at equal samples seen ({count(seen[0])} and {count(seen[1])})"
    return {**step, "sentence": f"{what} {' and '.join(parts)}{unequal}."}


def find_crossing(curve: list[dict[str, Any]], metric: str, level: float) -> dict[str, Any] | None:
    """The first point of a curve from which on it is at a level or above it; None: there is none.

    Read without interpolation: the model may have got there earlier.
    """
    crossing = None
    for point in reversed(curve):
        if point[metric] < level:
            break
        crossing = point
    return crossing


def compare_samples(runs: Runs) -> dict[str, Any]:
    """How many times fewer samples the reinforced student needs for the baseline's recall."""
    if BASELINE not in runs or REINFORCED not in runs:
        return {"sentence": "How many samples it saves is not known: a student is missing."}
    baseline, curve = runs[BASELINE]["final"], runs[REINFORCED]["curve"]
    if None in (baseline["samples_seen"], *(point["samples_seen"] for point in curve)):
        return {"sentence": "How many samples it saves is not known: a log is missing."}
    found: dict[str, Any] = {}
    parts = []
    for metric, direction in PANELS:
        level = baseline[metric]
        crossing = find_crossing(curve, metric, level)
        if crossing is None:
            found[metric] = None
            parts.append(f"not at all {direction} ({percent(level)})")
            continue
        times = baseline["samples_seen"] / crossing["samples_seen"]
        found[metric] = {"samples_seen": crossing["samples_seen"], "times_fewer": times}
        bound = "more than" if crossing is curve[0] else "at least"
        fewer = f"{bound} {times:.1f} times fewer samples"
        if times <= 1:
            fewer = "no fewer samples"
        change = compare_recall(level, curve[-1][metric], baseline["num_samples"])
        doubt = ", but ends within the noise of it" if change["within_noise"] else ""
        parts.append(f"with {fewer} {direction} ({percent(level)}{doubt})")
    sentence = f"The reinforced student reaches the baseline's final R@1 {' and '.join(parts)}."
    return {**found, "sentence": sentence}


# --- images ---------------------------------------------------------------------------------------
def plot_curves(runs: Runs, num_samples: float, path: Path) -> None:
    """Plot R@1 against samples seen: a curve for each student, a level for each teacher."""
    teachers = {name: run for name, run in runs.items() if name.startswith("teacher")}
    others = iter(OTHER_COLORS * len(runs))
    styles = {
        name: STUDENTS.get(name) or (name, next(others)) for name in runs if name not in teachers
    }
    figure, axes = plt.subplots(
        1, len(PANELS), figsize=(10, 4.4), sharey=True, layout="constrained"
    )
    for axis, (metric, direction) in zip(axes, PANELS, strict=True):
        for name, (label, color) in styles.items():
            curve = [point for point in runs[name]["curve"] if point["samples_seen"] is not None]
            seen = [point["samples_seen"] for point in curve]
            values = [100 * point[metric] for point in curve]
            axis.plot(seen, values, color=color, linewidth=2, marker="o", markersize=4, label=label)
        if BASELINE in runs:
            level = 100 * runs[BASELINE]["final"][metric]
            color = STUDENTS[BASELINE][1]
            axis.axhline(level, color=color, linewidth=1, linestyle=":", label="baseline, final")
        for number, (name, run) in enumerate(teachers.items()):
            label = f"{name}, {count(run['final']['samples_seen'])} samples"
            level, dashes = 100 * run["final"][metric], (0, (2, 2) if number else (6, 2))
            axis.axhline(level, color=GREY, linewidth=1, linestyle=dashes, label=label)
        axis.axhline(100 * chance(num_samples)[metric], color=GREY, linewidth=0.8, label="chance")
        title = f"{direction}, {int(num_samples)} held-out images"
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel("samples seen")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
        axis.set_xlim(left=0)
        axis.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("recall at 1 [%]")
    legend = {"loc": "outside lower center", "ncols": 4, "frameon": False, "fontsize": 9}
    figure.legend(*axes[0].get_legend_handles_labels(), **legend)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def read_noise(members: dict[str, bytes]) -> str:
    """The kind of a sample's caption noise; empty: its caption is clean."""
    return json.loads(members["json"]).get("caption_noise", "")


def choose_samples(shards: list[Path]) -> list[tuple[str, dict[str, bytes]]]:
    """Titles and members of samples to draw: one of each kind of noise, else the first two."""
    first: list[tuple[str, dict[str, bytes]]] = []
    found: dict[str, tuple[str, dict[str, bytes]]] = {}
    for shard in shards:
        with open(shard, "rb") as file:
            for key, members in read_samples(file, lambda extension: True):
                sample = f"{shard.name}: {printable(key)}", members
                first = [*first, sample][: len(DRAWN_NOISE)]
                if fold_accents(members["txt"].decode()).isascii():  # the font has no other letters
                    found.setdefault(read_noise(members), sample)
                if all(kind in found for kind in DRAWN_NOISE):
                    return [found[kind] for kind in DRAWN_NOISE]
    return first


def draw_samples(shards: list[Path], config: Path, path: Path) -> None:
    """Draw samples with a caption that was replaced, one below the other."""
    reinforcement = read_reinforcement(config)
    drawn = []
    for title, members in choose_samples(shards):
        noise = read_noise(members)
        remark = f"(replaced: {noise})" if noise else ""
        drawn.append(draw_sample(title, members, reinforcement, 0, 0, caption_note=remark))
    stack(drawn).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the quickstart's folder")
    parser.add_argument("--config", type=Path, help="how the joined shards were reinforced")
    args = parser.parse_args()

    folder = args.folder
    runs = read_runs(folder / "logs")
    results = {
        "runs": runs,
        "data": read_json(folder / "datasets" / "quickstart_data.json"),
        "reinforcement": read_json(args.config) if args.config else None,
        "versions": read_versions(),
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(terse=True)},
        "seconds": read_timings(folder / "timings.txt"),
    }
    lines = ["No run was evaluated."]
    if runs:
        sizes = {run["final"]["num_samples"] for run in runs.values()}
        num_samples = max(sizes)
        if len(sizes) > 1:
            note(
                f"evaluated on different numbers of images: {sorted(sizes)}; chance is for the most"
            )
        results["held_out"] = int(num_samples)
        results["chance"] = chance(num_samples)
        steps = [compare(runs, *step) for step in STEPS]
        samples = compare_samples(runs)
        findings = [describe_data(results["data"])]
        findings += [part["sentence"] for part in (*steps, samples)]
        results["comparison"] = {"steps": steps, "samples": samples, "findings": findings}
        plot_curves(runs, num_samples, folder / "learning_curves.png")
        lines = [*format_table(runs, num_samples), ""]
        for finding in findings:
            lines += textwrap.wrap(finding, 100, initial_indent="- ", subsequent_indent="  ")
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print("\n".join(lines) + "\n", flush=True)

    shards = sorted((folder / "datasets" / "DataCompDR-12M" / "shards").glob("*.tar"))
    if shards and args.config and args.config.exists():
        draw_samples(shards, args.config, folder / "augmentations.png")
    else:
        note("no augmentations.png: it needs joined shards and --config")
    names = ("results.json", "learning_curves.png", "augmentations.png")
    print(f"{folder}: {', '.join(name for name in names if (folder / name).exists())}")


if __name__ == "__main__":
    main()
