"""The command-line options of dataset reinforcement, and the checks that need no data."""

import json
import os
import re
from argparse import ArgumentParser, Namespace

import open_clip

from .transforms import compose_from_config


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options to OpenCLIP's parser."""
    group = parser.add_argument_group("dataset reinforcement")
    group.add_argument(
        "--dataset-reinforcement",
        default=False,
        action="store_true",
        help="Load image and text embeddings and synthetic captions from the training shards.",
    )
    group.add_argument(
        "--dataset-reinforcement-config",
        default=None,
        metavar="FILE",
        help="JSON file that says how the reinforcements were made, configs/datacompdr12m.json for one.",
    )
    group.add_argument(
        "--dataset-reinforcement-mix-synthetic",
        default=False,
        action="store_true",
        help="One caption for each image instead of two: the synthetic one with a probability of "
        "--dataset-reinforcement-mix-synthetic-ratio, else the original.",
    )
    group.add_argument(
        "--dataset-reinforcement-mix-synthetic-ratio", type=float, default=0.0, metavar="R"
    )
    group.add_argument(
        "--distill-loss-weights",
        type=float,
        nargs=2,
        default=[1.0, 1.0],
        metavar=("W0", "W1"),
        help="Weights of the contrastive and of the distillation loss.",
    )
    group.add_argument(
        "--distill-teacher-dimension",
        type=int,
        nargs="+",
        default=[-1],
        metavar="D",
        help="Width of each teacher's block in the stored embeddings; -1: one teacher, as wide as they are.",
    )
    group.add_argument(
        "--distill-average-after-softmax",
        default=False,
        action="store_true",
        help="Average the teachers' distributions instead of adding up their logits.",
    )
    group.add_argument(
        "--distill-logit-scale",
        type=float,
        nargs="+",
        default=None,
        metavar="S",
        help="The teachers' logit scale: one for all, or one for each. 100 in both published recipes.",
    )

    group = parser.add_argument_group("sampling and resuming")
    group.add_argument(
        "--dataset-without-replacement",
        default=False,
        action="store_true",
        help="Train in passes over all samples of all shards, each sample once in a pass.",
    )
    group.add_argument(
        "--save-every-n-steps",
        type=int,
        default=0,
        metavar="N",
        help="Write a checkpoint after every N optimiser steps of an epoch, from which --resume latest goes on.",
    )
    group.add_argument(
        "--keep-last-k",
        type=int,
        default=2,
        metavar="K",
        help="How many checkpoints within epochs are kept.",
    )
    group.add_argument(
        "--max-skipped-fraction",
        type=float,
        default=None,
        metavar="F",
        help="Stop when more than this part of an epoch's samples can't be used. Default: 0.1 with "
        "--dataset-reinforcement or --dataset-without-replacement, else no limit.",
    )


def prepare_args(args: Namespace, parser: ArgumentParser) -> None:
    """Refuse options that contradict each other, and make a model of ``--model FILE.json`` known to OpenCLIP.

    Exits with status 2 and one line that names both sides.
    """
    try:
        args.model = register_model(args.model)
    except FileNotFoundError as error:
        parser.exit(2, f"error: --model: {error}\n")
    found = _sampling_contradiction(args) or _contradiction(args, parser)
    if found:
        parser.exit(2, f"error: {found}\n")
    if args.max_skipped_fraction is None:
        args.max_skipped_fraction = (
            0.1 if args.dataset_reinforcement or args.dataset_without_replacement else 1.0
        )


def register_model(name: str) -> str:
    """Make a model config file known to OpenCLIP; returns the model's name. Other names are returned as they are.

    Raises:
        FileNotFoundError: ``name`` ends in .json, and there is no such file.
    """
    if not name.endswith(".json"):
        return name
    if not os.path.isfile(name):
        raise FileNotFoundError(f"there is no model config file {name}")
    open_clip.add_model_config(name)
    return os.path.splitext(os.path.basename(name))[0]


def _sampling_contradiction(args: Namespace) -> str | None:
    for option in ("dataset_without_replacement", "save_every_n_steps"):
        if not getattr(args, option):
            continue
        on, data = f"--{option.replace('_', '-')}", args.train_data or ""
        without = option == "dataset_without_replacement"
        for name, given in (
            (
                "--dataset-resampled, which draws with replacement",
                without and args.dataset_resampled,
            ),
            (
                "--train-data-upsampling-factors",
                without and args.train_data_upsampling_factors is not None,
            ),
            (
                f"--train-data {data}: streams can't be read at any place",
                without and re.search(r"(^|::)\w+:", data),
            ),
            ("--horovod", args.horovod),
            (
                f"--dataset-type {args.dataset_type}",
                args.dataset_type not in ("webdataset", "auto"),
            ),
            (
                f"--train-data {data}, which is no tar",
                args.dataset_type == "auto" and data and not data.endswith(".tar"),
            ),
        ):
            if given:
                return f"{on} does not go with {name}: leave out one of them"
    for option, value, right, expected in (
        (
            "--save-every-n-steps",
            args.save_every_n_steps,
            args.save_every_n_steps >= 0,
            "a number of steps, or 0",
        ),
        ("--keep-last-k", args.keep_last_k, args.keep_last_k >= 1, "1 and more"),
        (
            "--max-skipped-fraction",
            args.max_skipped_fraction,
            args.max_skipped_fraction is None or 0.0 <= args.max_skipped_fraction <= 1.0,
            "a fraction, 0 to 1",
        ),
    ):
        if not right:
            return f"{option} {value}: expected {expected}"
    return None


def _contradiction(args: Namespace, parser: ArgumentParser) -> str | None:
    if not args.dataset_reinforcement:
        for option in (
            "dataset_reinforcement_config",
            "dataset_reinforcement_mix_synthetic",
            "dataset_reinforcement_mix_synthetic_ratio",
            "distill_loss_weights",
            "distill_teacher_dimension",
            "distill_average_after_softmax",
            "distill_logit_scale",
        ):
            if getattr(args, option) != parser.get_default(option):
                return f"--{option.replace('_', '-')} was given without --dataset-reinforcement, which it is an option of"
        return None

    on = "--dataset-reinforcement"
    model = open_clip.get_model_config(args.model) or {}
    for name, given in (
        ("--siglip", args.siglip),
        (f"the SigLIP model {args.model}", "init_logit_bias" in model),
        (f"the CoCa model {args.model}", "coca" in args.model.lower() or "multimodal_cfg" in model),
        ("--distill-model (a teacher that runs along)", args.distill_model is not None),
        ("--horovod", args.horovod),
        ("--aug-cfg (the stored augmentations are what the student sees)", bool(args.aug_cfg)),
        (f"--dataset-type {args.dataset_type}", args.dataset_type not in ("webdataset", "auto")),
        (
            f"--train-data {args.train_data}, which is no tar",
            args.dataset_type == "auto"
            and args.train_data
            and not args.train_data.endswith(".tar"),
        ),
    ):
        if given:
            return f"{on} does not go with {name}: leave out one of them"

    path = args.dataset_reinforcement_config
    if path is None:
        return f"{on} needs --dataset-reinforcement-config FILE, configs/datacompdr12m.json for one"
    try:
        with open(path) as file:
            augmentation = json.load(file)["reinforce"]["image_augmentation"]
        compose = compose_from_config(augmentation)
    except OSError as error:
        return f"--dataset-reinforcement-config {path}: {error.strerror}"
    except (KeyError, TypeError) as error:
        return f"--dataset-reinforcement-config {path}: expected an object with reinforce.image_augmentation: {error!r}"
    except ValueError as error:
        return f"--dataset-reinforcement-config {path}: {error}"
    if "random_resized_crop" not in compose.transforms:
        return f"--dataset-reinforcement-config {path}: no random_resized_crop, whose output is sized for the student"

    ratio, mixed = (
        args.dataset_reinforcement_mix_synthetic_ratio,
        args.dataset_reinforcement_mix_synthetic,
    )
    if not 0.0 <= ratio <= 1.0:
        return (
            f"--dataset-reinforcement-mix-synthetic-ratio {ratio}: expected a probability, 0 to 1"
        )
    if ratio and not mixed:
        return (
            f"--dataset-reinforcement-mix-synthetic-ratio {ratio} was given without "
            "--dataset-reinforcement-mix-synthetic, which it is the ratio of"
        )

    weights, scales, dimensions = (
        args.distill_loss_weights,
        args.distill_logit_scale,
        args.distill_teacher_dimension,
    )
    if min(weights) < 0 or max(weights) <= 0:
        return f"--distill-loss-weights {weights[0]} {weights[1]}: expected weights of 0 and more, not both 0"
    if weights[1] and scales is None:
        return f"--distill-loss-weights {weights[0]} {weights[1]} distills, but there is no --distill-logit-scale"
    if dimensions != [-1] and min(dimensions) < 1:
        return f"--distill-teacher-dimension {' '.join(map(str, dimensions))}: expected widths of 1 and more"
    if scales is not None and len(scales) not in (1, len(dimensions)):
        return (
            f"--distill-logit-scale has {len(scales)} values, --distill-teacher-dimension {len(dimensions)}: "
            "give one scale, or one for each teacher"
        )
    return None
