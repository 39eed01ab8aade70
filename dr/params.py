"""The command-line options that the patch adds to the trainer, and the rules for them."""

import json
import os
import re
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

import fsspec
import open_clip
import torch

from .files import is_url
from .transforms import Compose, compose_from_config
from .weights import follow_weights, register_model

# Whether the options break a rule, and what to say then.
Rule = tuple[bool, str]

SYN_TEXT_KEYS = r"^syn_text.*$"
OPTIONS_OF_REINFORCEMENT = (
    "dataset_reinforcement_config",
    "dataset_reinforcement_mix_synthetic",
    "dataset_reinforcement_mix_synthetic_ratio",
    "dataset_reinforcement_syn_text_key_regex",
    "dataset_reinforcement_filter_image_size",
    "dataset_reinforcement_sample_sequential",
    "distill_loss_weights",
    "distill_teacher_dimension",
    "distill_average_after_softmax",
    "distill_logit_scale",
    "distill_logit_bias",
)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options to OpenCLIP's parser."""
    group = parser.add_argument_group("dataset reinforcement")
    group.add_argument(
        "--dataset-reinforcement",
        action="store_true",
        help="Load image and text embeddings and synthetic captions from the training shards.",
    )
    group.add_argument(
        "--dataset-reinforcement-config",
        metavar="FILE",
        help="JSON file that describes how the data set was reinforced, for example "
        "configs/datacompdr12m.json.",
    )
    group.add_argument(
        "--dataset-reinforcement-mix-synthetic",
        action="store_true",
        help="Train on one caption for each image instead of two: a synthetic one with the "
        "probability --dataset-reinforcement-mix-synthetic-ratio, otherwise the original.",
    )
    group.add_argument(
        "--dataset-reinforcement-mix-synthetic-ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="Probability of a synthetic caption with --dataset-reinforcement-mix-synthetic.",
    )
    group.add_argument(
        "--dataset-reinforcement-syn-text-key-regex",
        default=SYN_TEXT_KEYS,
        metavar="REGEX",
        help="Use only the lists of synthetic captions whose key in syn.json matches. DataCompDR "
        "has one list, syn_text; DFNDR, the data set of MobileCLIP2, has one for each captioning "
        "model. Default: %(default)s, all lists.",
    )
    group.add_argument(
        "--dataset-reinforcement-filter-image-size",
        type=int,
        default=0,
        metavar="N",
        help="Skip images whose shorter side is under N pixels. They count as bad samples. "
        "0: no limit.",
    )
    group.add_argument(
        "--dataset-reinforcement-sample-sequential",
        action="store_true",
        help="With replacement: choose the augmentation and the caption by the number of the "
        "epoch, modulo their count, instead of randomly. No effect with "
        "--dataset-without-replacement, which uses each of them once before it repeats one.",
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
        help="Width of each teacher's block in the stored embeddings. -1: one teacher, whose "
        "embeddings have the whole width.",
    )
    group.add_argument(
        "--distill-average-after-softmax",
        action="store_true",
        help="Average the teachers' distributions instead of adding their logits.",
    )
    group.add_argument(
        "--distill-logit-scale",
        type=float,
        nargs="+",
        metavar="S",
        help="Logit scale of the teachers: one for all, or one for each. The DataCompDR recipes "
        "use 100.",
    )

    group.add_argument(
        "--distill-logit-bias",
        type=float,
        nargs="+",
        metavar="B",
        help="Logit bias of teachers with a sigmoid loss (SigLIP). It is refused: a bias makes no "
        "difference to the softmax of the distillation loss.",
    )

    group = parser.add_argument_group("weights to start from")
    group.add_argument(
        "--ignore-pretrained-statistics",
        action="store_true",
        help="Do not use the normalisation statistics and the interpolation that the weights of "
        "--pretrained FILE were trained with. Instead use --image-mean, --image-std and "
        "--image-interpolation, or the defaults of the model.",
    )

    group = parser.add_argument_group("sampling and resuming")
    group.add_argument(
        "--dataset-without-replacement",
        action="store_true",
        help="Train in passes over all samples of all shards, each sample once in a pass.",
    )
    group.add_argument(
        "--total-steps",
        type=int,
        metavar="N",
        help="End the run, and the schedule of the learning rate, after exactly N optimizer steps: "
        "epochs have the steps of --train-num-samples, and the last one the rest. Default: as "
        "OpenCLIP, which rounds an epoch up to whole batches for each data loading worker.",
    )
    group.add_argument(
        "--save-every-n-steps",
        type=int,
        default=0,
        metavar="N",
        help="Write a checkpoint after every N optimizer steps of an epoch, from which --resume "
        "latest continues. 0: no checkpoints within epochs.",
    )
    group.add_argument(
        "--keep-last-k",
        type=int,
        default=2,
        metavar="K",
        help="Number of checkpoints within epochs to keep.",
    )
    group.add_argument(
        "--max-skipped-fraction",
        type=float,
        metavar="F",
        help="Stop when more than this fraction of an epoch's samples cannot be used. Default: 0.1 "
        "with --dataset-reinforcement or --dataset-without-replacement, otherwise 1, no limit.",
    )


def prepare_args(args: Namespace, parser: ArgumentParser) -> None:
    """Check the options, and register the model of ``--model FILE.json`` with OpenCLIP.

    Exits with status 2 and one line if the options break a rule.
    """
    try:
        args.model = register_model(args.model)
    except FileNotFoundError as error:
        parser.exit(2, f"error: --model: {error}\n")
    for is_broken, message in list_rules(args, parser):
        if is_broken:
            parser.exit(2, f"error: {message}\n")
    if mismatch := follow_weights(args):
        parser.exit(2, f"error: {mismatch}\n")
    if "timm" in getattr(args, "opt", ""):  # OpenCLIP 3.3 has defaults for its own AdamW only
        args.eps = 1e-8 if args.eps is None else args.eps
        if args.beta1 is None and args.beta2 is not None:  # as in the run scripts
            args.beta1 = 0.9
    if args.max_skipped_fraction is None:
        limited = args.dataset_reinforcement or args.dataset_without_replacement
        args.max_skipped_fraction = 0.1 if limited else 1.0


def list_rules(args: Namespace, parser: ArgumentParser) -> Iterator[Rule]:
    """The rules in the order in which they are checked; a rule may rely on those before it."""
    yield from _value_rules(args)
    if args.dataset_without_replacement:
        yield from _conflicts(
            "--dataset-without-replacement",
            [
                (args.dataset_resampled, "--dataset-resampled, which samples with replacement"),
                (
                    args.train_data_upsampling_factors is not None,
                    "--train-data-upsampling-factors",
                ),
                (
                    any(map(_is_stream, (args.train_data or "").split("::"))),
                    f"--train-data {args.train_data}: streams can't be read at any place",
                ),
                *_needs_tars(args),
            ],
        )
        yield from _store_rules(args)
    if args.save_every_n_steps:
        yield from _conflicts("--save-every-n-steps", _needs_tars(args))
    if args.total_steps:
        yield from _conflicts("--total-steps", _needs_tars(args))
    yield from _copy_rules(args)
    if args.dataset_reinforcement:
        yield from _reinforcement_rules(args)
    else:
        for option in OPTIONS_OF_REINFORCEMENT:
            yield (
                getattr(args, option) != parser.get_default(option),
                f"--{option.replace('_', '-')} was given without --dataset-reinforcement, which it "
                "needs",
            )


def _conflicts(option: str, others: list[Rule]) -> Iterator[Rule]:
    for given, name in others:
        yield given, f"{option} does not go with {name}: remove one of them"


def _is_stream(shards: str) -> bool:
    """Whether shards are read by a program or by HTTP, in order only."""
    scheme = re.match(r"(\w+):(//)?", shards)
    return scheme is not None and (scheme[2] is None or scheme[1] in ("http", "https"))


def _store_rules(args: Namespace) -> Iterator[Rule]:
    for shards in (args.train_data or "").split("::"):
        if is_url(shards):
            try:
                fsspec.get_filesystem_class(shards.partition("://")[0])
            except (ValueError, ImportError) as error:
                yield True, f"--train-data {shards}: {error}"


def _needs_tars(args: Namespace) -> list[Rule]:
    data = args.train_data or ""
    guessed = args.dataset_type == "auto"
    return [
        (args.horovod, "--horovod"),
        (not guessed and args.dataset_type != "webdataset", f"--dataset-type {args.dataset_type}"),
        (
            guessed and bool(data) and not data.endswith(".tar"),
            f"--train-data {data}, which is not a tar",
        ),
    ]


def _copy_rules(args: Namespace) -> Iterator[Rule]:
    """Options that copy a folder must not write into that folder."""
    logs = os.path.realpath(args.logs)
    tree = os.path.realpath(os.path.join(os.path.dirname(__file__), "..", "..", ".."))
    inside = os.path.relpath(logs, tree).split(os.sep)
    ignored = {"log", "logs", "wandb", ".."}  # what --copy-codebase does not copy
    yield (
        args.copy_codebase and not ignored.intersection(inside),
        f"--copy-codebase copies {tree}, and --logs {args.logs} is inside it: choose another "
        "folder for --logs, or one named logs/",
    )
    with_aws = bool(args.remote_sync) and args.remote_sync_protocol == "s3"
    yield (
        with_aws and shutil.which("aws") is None,
        f"--remote-sync {args.remote_sync}: --remote-sync-protocol s3 needs the AWS command line "
        "(aws), which is not installed: install it, or use --remote-sync-protocol fsspec",
    )
    target = (args.remote_sync or "").removeprefix("file://")
    is_local = bool(target) and "://" not in target
    target = os.path.realpath(target)
    yield (
        is_local and os.path.commonpath([logs, target]) == logs,
        f"--remote-sync {args.remote_sync} is inside --logs {args.logs}, which it copies: choose "
        "another folder",
    )


def _value_rules(args: Namespace) -> Iterator[Rule]:
    yield (
        args.use_bn_sync and not torch.cuda.is_available(),
        "--use-bn-sync works on GPUs only, and this machine has none: remove it",
    )
    steps, kept, fraction = args.save_every_n_steps, args.keep_last_k, args.max_skipped_fraction
    total = args.total_steps
    weights = args.pretrained or ""
    if weights and not os.path.exists(weights):
        tags = open_clip.list_pretrained_tags_by_model(args.model)
        yield (
            weights.lower() not in [*tags, "openai"],
            f"--pretrained {weights}: there is no such file, and OpenCLIP has no weights of this "
            f"name for {args.model} (it has {', '.join(tags) or 'none'})",
        )
    yield total is not None and total < 1, f"--total-steps {total}: expected 1 or more"
    yield (
        total is not None and args.train_num_samples is None,
        f"--total-steps {total} needs --train-num-samples, the samples of an epoch",
    )
    yield steps < 0, f"--save-every-n-steps {steps}: expected a number of steps, or 0"
    yield kept < 1, f"--keep-last-k {kept}: expected 1 or more"
    yield (
        fraction is not None and not 0.0 <= fraction <= 1.0,
        f"--max-skipped-fraction {fraction}: expected a fraction, 0 to 1",
    )


def _reinforcement_rules(args: Namespace) -> Iterator[Rule]:
    model = open_clip.get_model_config(args.model) or {}
    is_coca = "coca" in args.model.lower() or "multimodal_cfg" in model
    yield from _conflicts(
        "--dataset-reinforcement",
        [
            (args.siglip, "--siglip"),
            ("init_logit_bias" in model, f"the SigLIP model {args.model}"),
            (is_coca, f"the CoCa model {args.model}"),
            (
                args.distill_model is not None,
                "--distill-model (a teacher that runs during training)",
            ),
            (
                bool(args.aug_cfg),
                "--aug-cfg (the student sees the stored augmentations)",
            ),
            *_needs_tars(args),
        ],
    )

    path = args.dataset_reinforcement_config
    yield (
        path is None,
        "--dataset-reinforcement needs --dataset-reinforcement-config FILE, for example "
        "configs/datacompdr12m.json",
    )
    try:
        compose = read_augmentation(path)
    except ValueError as error:
        yield True, f"--dataset-reinforcement-config {path}: {error}"
        return
    yield (
        "random_resized_crop" not in compose.transforms,
        f"--dataset-reinforcement-config {path}: no random_resized_crop, whose output gets the "
        "student's size",
    )

    yield (
        args.distill_logit_bias is not None,
        "--distill-logit-bias is for teachers with a sigmoid loss; the distillation loss is a "
        "softmax, to which a bias makes no difference: remove it",
    )
    regex = args.dataset_reinforcement_syn_text_key_regex
    yield (
        not _is_regex(regex),
        f"--dataset-reinforcement-syn-text-key-regex {regex}: expected a regular expression",
    )
    smallest = args.dataset_reinforcement_filter_image_size
    yield (
        smallest < 0,
        f"--dataset-reinforcement-filter-image-size {smallest}: expected a number of pixels",
    )

    ratio = args.dataset_reinforcement_mix_synthetic_ratio
    option = f"--dataset-reinforcement-mix-synthetic-ratio {ratio}"
    yield not 0.0 <= ratio <= 1.0, f"{option}: expected a probability, 0 to 1"
    yield (
        bool(ratio) and not args.dataset_reinforcement_mix_synthetic,
        f"{option} was given without --dataset-reinforcement-mix-synthetic, which it needs",
    )

    weights, scales = args.distill_loss_weights, args.distill_logit_scale
    option = f"--distill-loss-weights {weights[0]} {weights[1]}"
    yield (
        min(weights) < 0 or max(weights) <= 0,
        f"{option}: expected weights of 0 or more, not both 0",
    )
    yield (
        bool(weights[1]) and scales is None,
        f"{option} distills, but there is no --distill-logit-scale",
    )
    dimensions = args.distill_teacher_dimension
    yield (
        dimensions != [-1] and min(dimensions) < 1,
        f"--distill-teacher-dimension {' '.join(map(str, dimensions))}: expected widths of 1 or "
        "more",
    )
    yield (
        scales is not None and len(scales) not in (1, len(dimensions)),
        f"--distill-logit-scale has {len(scales or [])} values, --distill-teacher-dimension "
        f"{len(dimensions)}: give one scale, or one for each teacher",
    )


def _is_regex(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def read_augmentation(path: str) -> Compose:
    """The augmentation of a reinforcement config.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            augmentation = json.load(file)["reinforce"]["image_augmentation"]
        return compose_from_config(augmentation)
    except OSError as error:
        raise ValueError(error.strerror) from error
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"expected an object with reinforce.image_augmentation: {error!r}"
        ) from error
