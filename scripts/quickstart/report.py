"""Say what the quickstart's runs came to: a table on the terminal, results.json and two pictures.

    python scripts/quickstart_report.py quickstart --config quickstart/reinforce.json

Reads, of the folder that it is given,
    logs/<run>/checkpoints/results.jsonl     OpenCLIP's evaluations on the held-out pictures
    logs/<run>/params.txt, out.log           the run's settings, and how many samples an epoch really had
    datasets/DataCompDR-12M/shards/*.tar     joined samples, for the sheet
    timings.json                             {step: seconds}, if there is one
and writes there results.json, learning_curves.png and augmentations.png. What is missing is named and left out; any
further run under logs/ gets its line too. It evaluates nothing itself, and compares one seed with one seed.
"""

import argparse
import ast
import json
import math
import os
import platform
import re
import sys
import textwrap
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # dr/, where the project is not installed

PLAIN, REINFORCED = "student-plain", "student-reinforced"
RUNS = ("teacher-0", "teacher-1", PLAIN, REINFORCED)
METRICS = ("image_to_text_R@1", "image_to_text_R@5", "text_to_image_R@1", "text_to_image_R@5")
PANELS = (("image_to_text_R@1", "image to text"), ("text_to_image_R@1", "text to image"))
SETTINGS = (
    *("model", "lr", "beta1", "beta2", "wd", "warmup", "grad_clip_norm", "precision", "seed"),
    *("epochs", "train_num_samples", "batch_size", "accum_freq", "world_size", "workers"),
    *(
        "dataset_resampled",
        "aug_cfg",
        "dataset_reinforcement",
        "dataset_reinforcement_mix_synthetic",
    ),
    *(
        "dataset_reinforcement_mix_synthetic_ratio",
        "distill_loss_weights",
        "distill_teacher_dimension",
    ),
    *("distill_average_after_softmax", "distill_logit_scale"),
)
PACKAGES = ("torch", "torchvision", "open_clip_torch", "webdataset", "numpy", "pillow", "timm")
COLORS = {REINFORCED: "#d1601f", PLAIN: "#2a6fb0"}
OTHER_COLORS = ("#3a8a5c", "#8b5aa8", "#a8842c", "#b04a6f")
GREY = "#888888"
SHEET_SAMPLES = 5
SHEET_AUGMENTATIONS = 6
CAPTIONS_WIDTH = 3.2  # in pictures


def note(text):
    print(f"quickstart_report.py: {text}", file=sys.stderr)


# reading


def read_evaluations(path):
    """{epoch: metrics} of a results.jsonl; a later line replaces an earlier one of its epoch (a resumed run)."""
    evaluations = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            metrics = json.loads(line)
            evaluations[int(metrics["epoch"])] = {
                name: float(metrics[name]) for name in (*METRICS, "num_samples")
            }
        except (
            ValueError,
            KeyError,
            TypeError,
        ) as error:  # a line half-written when the run was killed
            note(f"{path}, line {number} left out: {type(error).__name__}: {error}")
    return dict(sorted(evaluations.items()))


def read_params(path):
    """The trainer's settings, of its params.txt."""
    params = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(": ")
        try:
            params[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            params[name] = value
    return params


def samples_of_an_epoch(folder, params):
    """As logged, since the trainer rounds --train-num-samples up to whole batches for each worker; None if unknown."""
    log = folder / "out.log"
    logged = (
        re.findall(r"Train Epoch: \d+ \[ *\d+/(\d+) ", log.read_text(errors="replace"))
        if log.exists()
        else []
    )
    return int(logged[-1]) if logged else params.get("train_num_samples")


def read_run(folder):
    """A run's settings and learning curve, or None (and a note) if it was never evaluated."""
    path = folder / "checkpoints" / "results.jsonl"
    evaluations = read_evaluations(path) if path.exists() else {}
    if not evaluations:
        note(f"no evaluation of {folder.name} ({path} is missing or empty)")
        return None
    params = read_params(folder / "params.txt")
    per_epoch = samples_of_an_epoch(folder, params)
    if per_epoch is None:
        note(f"{folder.name}: neither out.log nor params.txt says how many samples an epoch has")
    curve = [
        {
            "epoch": epoch,
            "samples_seen": None if per_epoch is None else epoch * per_epoch,
            **metrics,
        }
        for epoch, metrics in evaluations.items()
    ]
    return {
        "settings": {name: params[name] for name in SETTINGS if name in params},
        "final": curve[-1],
        "curve": curve,
    }


def read_runs(logs):
    """{name: run}, the expected ones first."""
    found = sorted(path.name for path in logs.iterdir() if path.is_dir()) if logs.exists() else []
    names = [*RUNS, *(name for name in found if name not in RUNS)]
    runs = {name: read_run(logs / name) for name in names}
    return {name: run for name, run in runs.items() if run}


def read_json(path):
    return json.loads(path.read_text()) if path.exists() else None


# telling


def percent(value, digits=1):
    return f"{100 * value:.{digits}f} %"


def count(value):
    return "?" if value is None else f"{value:,}"


def chance(num_samples):
    """Expected metrics of a model that guesses."""
    return {name: min(1.0, int(name.rpartition("@")[2]) / num_samples) for name in METRICS}


def table(runs, num_samples):
    """The lines of the table."""
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


def comparison(runs):
    """Reinforced against plain in one paragraph, as it is."""
    if PLAIN not in runs or REINFORCED not in runs:
        return f"No comparison: it takes {PLAIN} and {REINFORCED}."
    plain, reinforced = runs[PLAIN]["final"], runs[REINFORCED]["final"]
    said = []
    for metric, direction in PANELS:
        a, b, n = plain[metric], reinforced[metric], plain["num_samples"]
        error = 100 * math.sqrt(
            (a * (1 - a) + b * (1 - b)) / n
        )  # of a difference of two proportions
        points = 100 * (b - a)
        verdict = "ahead" if points > 0 else "behind" if points < 0 else "level"
        doubt = ", which is within the noise" if abs(points) < 2 * error else ""
        said.append(
            f"{direction} R@1 {percent(b)} reinforced, {percent(a)} plain: "
            f"{verdict} by {abs(points):.1f} points (standard error {error:.1f}){doubt}"
        )
    seen = plain["samples_seen"], reinforced["samples_seen"]
    after = f"After {count(seen[0])} samples seen each"
    if seen[0] != seen[1] or None in seen:
        after = f"NOT at equal samples seen (plain {count(seen[0])}, reinforced {count(seen[1])})"
    return f"{after}, one seed each: {'; '.join(said)}."


def versions():
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


# pictures


def plot_curves(runs, num_samples, path):
    """R@1 on the held-out pictures against samples seen: a curve for each student, a level for each teacher."""
    curves = {name: run for name, run in runs.items() if not name.startswith("teacher")}
    curves = {name: run for name, run in curves.items() if run["final"]["samples_seen"] is not None}
    others = iter(OTHER_COLORS * len(curves))
    colors = {name: COLORS.get(name) or next(others) for name in curves}
    figure, axes = plt.subplots(
        1, len(PANELS), figsize=(10, 4.2), sharey=True, layout="constrained"
    )
    for axis, (metric, direction) in zip(axes, PANELS, strict=True):
        for name, run in curves.items():
            seen = [point["samples_seen"] for point in run["curve"]]
            values = [100 * point[metric] for point in run["curve"]]
            axis.plot(
                seen, values, color=colors[name], linewidth=2, marker="o", markersize=4, label=name
            )
        for name, run in runs.items():
            if name.startswith("teacher"):
                label = f"{name}, after {count(run['final']['samples_seen'])} samples"
                dashes = (0, (6, 2)) if name == "teacher-0" else (0, (2, 2))
                axis.axhline(
                    100 * run["final"][metric],
                    color=GREY,
                    linewidth=1,
                    linestyle=dashes,
                    label=label,
                )
        axis.axhline(100 * chance(num_samples)[metric], color=GREY, linewidth=0.8, label="chance")
        axis.set_title(
            f"{direction}, {int(num_samples)} held-out pictures", loc="left", fontsize=11
        )
        axis.set_xlabel("samples seen")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("recall at 1 [%]")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def read_samples(shards, number):
    """The first `number` samples of the joined shards, one after another from each: {extension: bytes}."""
    import webdataset as wds

    samples = []
    for shard in shards[:number]:
        for sample in wds.WebDataset(str(shard), shardshuffle=False):
            samples.append(sample)
            if len(samples) % math.ceil(number / len(shards[:number])) == 0:
                break
    return samples[:number]


def draw_sheet(shards, config, path):
    """A row for each of some samples: the picture, the picture under its stored augmentations, and its captions."""
    from dr import sample as reinforcement
    from dr.transforms import compose_from_config

    steps = config["reinforce"]["image_augmentation"]
    compose = compose_from_config(
        {name: step for name, step in steps.items() if name != "normalize"}
    )  # to be looked at
    samples = read_samples(shards, SHEET_SAMPLES)
    ratios = [1] * (SHEET_AUGMENTATIONS + 1) + [CAPTIONS_WIDTH]
    figure, axes = plt.subplots(
        len(samples),
        len(ratios),
        figsize=(1.35 * sum(ratios), 1.4 * len(samples) + 0.3),
        squeeze=False,
        layout="constrained",
        width_ratios=ratios,
    )
    for row, sample in zip(axes, samples, strict=True):
        picture = reinforcement.decode_image(sample)
        stored = reinforcement.augmentation_parameters(sample)
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color="#cccccc", visible=axis is not row[-1])
        row[-1].set_box_aspect(1 / CAPTIONS_WIDTH)
        row[0].imshow(picture)
        for axis, params in zip(row[1:-1], stored, strict=False):
            tensor, _ = compose.reapply(picture, compose.decompress(params))
            axis.imshow(tensor.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
        caption = textwrap.fill(reinforcement.caption(sample), 55)
        synthetic = "\n".join(
            textwrap.shorten(text, 70, placeholder=" …")
            for text in reinforcement.synthetic_captions(sample)
        )
        lines = caption.count("\n") + 1
        row[-1].text(
            0, 0.98, caption, fontsize=9, fontweight="bold", va="top", transform=row[-1].transAxes
        )
        row[-1].text(
            0, 0.98 - 0.16 * lines, synthetic, fontsize=8, va="top", transform=row[-1].transAxes
        )
    figure.get_layout_engine().set(h_pad=0.08)
    axes[0][0].set_title("picture", fontsize=9, loc="left")
    axes[0][1].set_title("its stored augmentations, applied again", fontsize=9, loc="left")
    axes[0][-1].set_title("caption, synthetic captions", fontsize=9, loc="left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="the quickstart's folder")
    parser.add_argument(
        "--config", type=Path, help="reinforcement config of the joined shards, for the sheet"
    )
    args = parser.parse_args()

    folder = args.folder
    runs = read_runs(folder / "logs")
    results = {
        "runs": runs,
        "data": read_json(folder / "datasets" / "quickstart_data.json"),
        "reinforcement": read_json(args.config) if args.config else None,
        "versions": versions(),
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(terse=True)},
        "seconds": read_json(folder / "timings.json"),
    }
    lines = ["No run was evaluated."]
    if runs:
        sizes = {run["final"]["num_samples"] for run in runs.values()}
        if len(sizes) > 1:
            note(
                f"the runs were evaluated on different numbers of pictures: {sorted(sizes)}; chance is for the most"
            )
        num_samples = max(sizes)
        results |= {
            "held_out": int(num_samples),
            "chance": chance(num_samples),
            "comparison": comparison(runs),
        }
        plot_curves(runs, num_samples, folder / "learning_curves.png")
        lines = [*table(runs, num_samples), "", *textwrap.wrap(results["comparison"], 100)]
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    print("\n".join(lines) + "\n", flush=True)

    shards = sorted((folder / "datasets" / "DataCompDR-12M" / "shards").glob("*.tar"))
    if shards and args.config and args.config.exists():
        draw_sheet(shards, json.loads(args.config.read_text()), folder / "augmentations.png")
    else:
        note("no augmentations.png: it takes joined shards and --config")
    made = [
        name
        for name in ("results.json", "learning_curves.png", "augmentations.png")
        if (folder / name).exists()
    ]
    print(f"{folder}: {', '.join(made)}")


if __name__ == "__main__":
    main()
