"""Read one reinforced sample, select the parts that a training step uses, and print them.

    python hf_dataset_example.py                       # the first sample, from the Hugging Face Hub
    python hf_dataset_example.py --output sample.png   # also draw everything stored with it
    python hf_dataset_example.py --dataset dfndr12m    # another data set of the Hub
    python hf_dataset_example.py --shard datasets/DataCompDR-12M/shards/00000000.tar --index 3

The script needs `pip install -e .`. Without --shard it transfers a few hundred KB of a shard, and
downloads one image from its own URL. A sample whose link is dead is skipped, and the next one is
tried.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from huggingface_hub import HfFileSystem
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent / "scripts"))
from lib.datasets import DATASETS, add_dataset_option
from lib.draw_sample import describe_parameters, draw_sample, label_captions
from lib.http_image import fetch_image
from lib.hub import HubShard
from lib.reinforcement import describe_originals, read_reinforcement
from lib.report import printable, run_command

from dr import sample
from dr.tar import read_samples
from dr.transforms import Compose

DEFAULT = "datacompdr12m"
READ_AHEAD = 2**18  # bytes of the shard to transfer at a time; a sample has about 230 KB
WANTED = sample.USED_MEMBERS | {"url.txt", "json"}


def read_shard(shard: Path | HubShard) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield key and ``{extension: bytes}`` of the samples of a file, or of a shard on the Hub."""
    try:
        if isinstance(shard, Path):
            stream = open(shard, "rb")  # noqa: SIM115  (closed below)
        else:
            stream = HfFileSystem().open(
                f"datasets/{shard.repository}/{shard.path}", block_size=READ_AHEAD
            )
        with stream:
            yield from read_samples(stream, WANTED.__contains__)
    except Exception as error:  # of the tar, the Hub, or the HTTP library below it
        found = printable(f"{type(error).__name__}: {error}", 300)
        hint = "" if isinstance(shard, Path) else "; without a network, read a file with --shard"
        name = shard if isinstance(shard, Path) else shard.repository
        raise SystemExit(f"error: cannot read the shard {name}: {found}{hint}") from None


def choose(
    members: dict[str, bytes], compose: Compose, augmentation: int | None = None, seed: int = 0
) -> dict:
    """Apply one of the A stored augmentations, and choose one of the S synthetic captions, of all
    lists if there are several. The original caption is the first.

    Returns:
        Their numbers, the caption and the augmentation's parameters; the augmented ``image``, float
        ``[3, H, W]``; and the embeddings of exactly these, ``[ΣD_k]`` in the precision stored.
    """
    parameters = sample.augmentation_parameters(members)
    captions = sample.synthetic_captions(members)
    rng = random.Random(seed)
    a, s = rng.randrange(len(parameters)), rng.randrange(len(captions))
    a = a if augmentation is None else augmentation
    if a >= len(parameters):
        raise SystemExit(f"error: --augmentation {a}: this sample has {len(parameters)}, from 0")
    original = sample.decode_image(members)
    try:
        params = compose.decompress(parameters[a])
        image, _ = compose.reapply(original, params)
    except ValueError as error:
        raise sample.BadSample("augmentation parameters", error) from error
    stored = sample.embeddings(members)  # image_emb [A, ΣD_k], text_emb [C + S, ΣD_k]
    row = sample.count_originals(members) + s
    return {
        "augmentation": a,
        "synthetic": s,
        "synthetic_row": row,
        "syn_caption": captions[s],
        "params": params,
        "image": image,
        "image_emb": stored["image_emb"][a],
        "text_emb": stored["text_emb"][0],  # of the original caption; the synthetic ones follow
        "syn_text_emb": stored["text_emb"][row],
    }


def print_sample(
    title: str, members: dict, chosen: dict, cosines: Tensor, teachers: list[str]
) -> None:
    """Print the chosen tensors, captions and each teacher's cosines, ``[K, C + S, A]``."""
    a, row = chosen["augmentation"], chosen["synthetic_row"]
    texts, augmentations = cosines.shape[1:]
    originals, lists = describe_originals(members), sample.read_caption_lists(members)
    labels = label_captions(len(originals), lists)
    original = "the original caption" if len(originals) == 1 else "original caption 0"
    synthetic = f"synthetic caption {chosen['synthetic']}"
    if len(lists) > 1:
        keys = [key for key, captions in lists.items() for _ in captions]
        synthetic += f" ({labels[row]}: {printable(keys[chosen['synthetic']])})"
    width, height = sample.decode_image(members).size
    steps = "; ".join(describe_parameters(chosen["params"]))
    print(f"{title}\n")
    for name, text in {
        "image": f"{width}x{height} image, augmentation {a} of {augmentations}: {steps}",
        "image_emb": f"row {a} of {augmentations}: of that augmentation",
        "text_emb": f"row 0 of {texts}: of {original}",
        "syn_text_emb": f"row {row} of {texts}: of {synthetic}",
    }.items():
        dtype = str(chosen[name].dtype).removeprefix("torch.")
        print(f"{name:13} {list(chosen[name].shape)!s:14} {dtype:9} {text}")
    print(f"\n{'caption':13} {printable(originals[0], 1000)}")
    print(f"{'syn_caption':13} {printable(chosen['syn_caption'], 1000)}\n")
    for teacher, texts in zip(teachers, cosines[:, :, a].tolist(), strict=True):
        print(f"{teacher}: cosine with caption {texts[0]:.3f}, with syn_caption {texts[row]:.3f}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    text = "data set to read from the Hub, with --shard only its config"
    add_dataset_option(parser, f"{text}; default {DEFAULT}")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--bf16", action="store_true", help=f"as --dataset {DEFAULT}-bf16")
    source.add_argument(
        "--shard", type=Path, help="local shard to read instead of the Hub, joined or not"
    )
    add("--index", type=int, default=0, help="first sample to try; default 0")
    add("--tries", type=int, default=10, help="samples to try; default 10")
    add("--augmentation", type=int, help="number of the augmentation; default: random")
    add("--seed", type=int, default=0, help="seed of the random choices; default 0")
    add(
        "--output",
        type=Path,
        metavar="FILE.png",
        help="also draw everything stored with the sample",
    )
    text = "config that the set was reinforced with; default: that of the data set"
    add("--config", type=Path, help=text)
    text = "width of each teacher's embeddings; default: of the teachers of --config"
    add("--teacher-dimension", type=int, nargs="+", metavar="D", help=text)
    args = parser.parse_args(arguments)
    if args.bf16 and args.dataset:
        parser.error("--bf16 and --dataset: expected one of them")
    args.dataset = args.dataset or (f"{DEFAULT}-bf16" if args.bf16 else DEFAULT)
    args.config = args.config or DATASETS[args.dataset].config_path
    if min(args.index, args.augmentation or 0) < 0:
        parser.error("expected --index and --augmentation of 0 or more")
    if args.tries < 1 or min(args.teacher_dimension or [1]) < 1:
        parser.error("expected --tries and --teacher-dimension of 1 or more")
    if args.output and (args.output.suffix != ".png" or not args.output.absolute().parent.is_dir()):
        parser.error(f"--output {args.output}: expected a .png in a folder that exists")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    reinforcement = read_reinforcement(args.config, args.teacher_dimension)
    dataset = DATASETS[args.dataset]
    shard = args.shard or HubShard.first_of(dataset)
    name = args.shard or dataset.repository
    number = None
    samples = islice(enumerate(read_shard(shard)), args.index, args.index + args.tries)
    for number, (key, members) in samples:
        try:
            cosines = reinforcement.cosines(members)
            if sample.missing(members, {"an image": sample.IMAGE_MEMBERS}):
                members["jpg"] = fetch_image(members)
            chosen = choose(members, reinforcement.compose, args.augmentation, args.seed)
            title = f"{name}, sample {number}: {printable(key, 80)}"
            if args.output:
                marked = chosen["augmentation"], chosen["synthetic"]
                draw_sample(title, members, reinforcement, *marked).save(args.output)
            print_sample(title, members, chosen, cosines, reinforcement.teachers)
            if args.output:
                print(f"\n{args.output}: everything stored with the sample")
            return
        except sample.BadSample as error:
            print(f"sample {number} skipped: {printable(error, 400)}", file=sys.stderr)
    if number is None:
        raise SystemExit(f"error: {name} has no sample {args.index}: give a smaller --index")
    raise SystemExit(f"error: samples {args.index} to {number} cannot be used: give more --tries")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for captions beyond the terminal's letters
    run_command(main)
