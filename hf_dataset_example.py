"""What a reinforced sample is: read one of DataCompDR-12M, augment its picture as stored, find the embeddings of it.

    python hf_dataset_example.py                              # the first sample, from the Hugging Face Hub
    python hf_dataset_example.py --output sheet.png           # and a picture of all that is stored with it
    python hf_dataset_example.py --shard datasets/DataCompDR-12M/shards/00000000.tar --index 3

Needs `pip install -e .` and, without --shard, the network: a few hundred KB of a shard are read, and one picture from
its own address. Where a link is dead or its picture has changed, that is said and the next sample tried. The teachers
and the augmentation are those of --config; for the quickstart's shards that is quickstart/reinforce.json.

Leaves nothing but --output. Leaves out: joining and training, which read whole shards (README), and captions in scripts
that Pillow's own font lacks; the sheet has boxes in their place, the terminal prints them.
"""

import argparse
import contextlib
import functools
import hashlib
import http.client
import json
import random
import signal
import string
import sys
import tarfile
import unicodedata
import urllib.parse
import urllib.request
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from urllib.request import (
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    ProxyHandler,
    UnknownHandler,
)

import open_clip
import torch
from huggingface_hub import HfFileSystem
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from dr.params import register_model
from dr.sample import (
    IMAGE_MEMBERS,
    MAX_INFLATED,
    REINFORCED_MEMBERS,
    BadSample,
    augmentation_parameters,
    caption,
    decode_image,
    embeddings,
    missing,
    synthetic_captions,
)
from dr.transforms import RAND_AUGMENT_OPS, Compose, compose_from_config

ROOT = Path(__file__).resolve().parent
REPOSITORY = "apple/DataCompDR-12M"
SHARD = "00000000.tar"
PICTURE = {"an image": IMAGE_MEMBERS}
STORED = {
    name: REINFORCED_MEMBERS[name]
    for name in ("synthetic captions", "augmentation parameters", "embeddings")
}

READ_AHEAD = 2**18  # bytes asked of the Hub at a time; a sample has about 230 KB
TIMEOUT = (
    10  # seconds that a picture's server may be silent; for the whole picture three times as long
)
MAX_IMAGE = 2**25  # bytes of a picture as downloaded
USER_AGENT = "Mozilla/5.0 (compatible; clip-dataset-reinforcement/0.1; +https://huggingface.co/datasets/apple/DataCompDR-12M)"
HTTP_ONLY = (
    *(ProxyHandler, HTTPHandler, HTTPSHandler, HTTPRedirectHandler, UnknownHandler),
    *(urllib.request.HTTPErrorProcessor, urllib.request.HTTPDefaultErrorHandler),
)


# --- 1. a shard is a tar; the members of one sample stand next to each other and share a key -------------------------


def read_samples(stream) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield ``(key, {extension: bytes})`` of a tar's samples, reading no further than the sample that is asked for."""
    current, sample = None, {}
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            key, _, extension = member.name.removeprefix("./").partition(".")
            if key != current:
                if sample:
                    yield current, sample
                current, sample = key, {}
            if member.isfile() and member.size <= MAX_INFLATED:
                sample[extension.lower()] = tar.extractfile(member).read()
    if sample:
        yield current, sample


def open_shard(shard: Path | str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a local file, or of the first shard of a repository on the Hub.

    A shard on the Hub has 2.8 GB; of it READ_AHEAD bytes at a time are transferred, as they are needed.
    """
    try:
        if isinstance(shard, Path):
            stream = open(shard, "rb")  # noqa: SIM115, closed below
        else:
            stream = HfFileSystem().open(f"datasets/{shard}/{SHARD}", block_size=READ_AHEAD)
        with stream:
            yield from read_samples(stream)
    except (
        Exception
    ) as error:  # of the files, the tar, huggingface_hub, or the HTTP library below it
        hint = (
            ""
            if isinstance(shard, Path)
            else "; is there a network? --shard FILE reads a local shard"
        )
        found = printable(f"{type(error).__name__}: {error}", 300)
        raise SystemExit(f"error: can't read the shard {shard}: {found}{hint}") from None


# --- 2. there is no picture in DataCompDR, only its address and the sha256 of what the teachers saw -------------------


@contextlib.contextmanager
def at_most(seconds: float):
    """Raise TimeoutError when the block takes longer: a socket's own timeout begins anew with every byte."""

    def end(*_):
        raise TimeoutError(f"not there after {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fetch_image(sample: dict[str, bytes]) -> bytes:
    """The picture's bytes from its address, the very ones that were embedded.

    Raises:
        BadSample: the link is dead, or leads to something else by now; crop boxes and embeddings don't fit that.
    """
    try:
        url = sample["url.txt"].decode().strip()
        expected = json.loads(sample["json"])["sha256"]
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise BadSample(
            "no picture, and no address (url.txt) with sha256 (json) to fetch it", error
        ) from error
    opener = (
        urllib.request.OpenerDirector()
    )  # urlopen would follow a stranger's address to file: and ftp: as well
    for handler in HTTP_ONLY:
        opener.add_handler(handler())
    data = b""
    try:
        address = urllib.parse.quote(
            url, safe=string.punctuation
        )  # some have spaces, or letters beyond ASCII
        request = urllib.request.Request(address, headers={"User-Agent": USER_AGENT})
        with at_most(3 * TIMEOUT), opener.open(request, timeout=TIMEOUT) as response:
            while chunk := response.read1(2**16):
                data += chunk
                if len(data) > MAX_IMAGE:
                    raise OSError(f"over {MAX_IMAGE} bytes")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise BadSample("dead link", f"{url}: {str(error) or type(error).__name__}") from error
    if (found := hashlib.sha256(data).hexdigest()) != expected:
        raise BadSample(
            "changed picture", f"{url}: sha256 {found[:8]}…, embedded was {str(expected)[:8]}…"
        )
    return data


# --- 3. one augmentation, one synthetic caption, and the rows that belong to them -------------------------------------


def choose(
    sample: dict[str, bytes], compose: Compose, augmentation: int | None = None, seed: int = 0
) -> dict:
    """Apply a stored augmentation again, and take its row and those of the captions.

    Args:
        sample: members by extension, the picture among them.
        compose: the augmentation that the stored parameters are for.
        augmentation: which one; None: drawn.
        seed: of what is drawn.

    Returns:
        All that the sample has: ``picture`` (PIL), ``parameters`` (A of them), the original ``caption`` (None where the
        shard has none), the synthetic ``captions`` (S), the ``stored`` embeddings. Which were chosen: ``augmentation``
        of A, ``synthetic`` of S. And what training takes of them: ``image`` float32 ``[3, H, W]``, ``image_emb``,
        ``text_emb`` and ``syn_text_emb`` ``[ΣD_k]``, as precise as they are stored.
    """
    picture, stored = decode_image(sample), embeddings(sample)
    parameters, captions = augmentation_parameters(sample), synthetic_captions(sample)
    for name, rows in ("image_emb", len(parameters)), ("text_emb", 1 + len(captions)):
        if len(stored[name]) != rows:
            raise BadSample(
                "row counts disagree", f"{name} has {len(stored[name])} rows, expected {rows}"
            )
    rng = random.Random(seed)
    drawn, synthetic = rng.randrange(len(parameters)), rng.randrange(len(captions))
    augmentation = drawn if augmentation is None else augmentation
    if augmentation >= len(parameters):
        raise SystemExit(
            f"error: --augmentation {augmentation}: this sample has {len(parameters)}, counted from 0"
        )
    try:
        parameters = [compose.decompress(compressed) for compressed in parameters]
        image, _ = compose.reapply(picture, parameters[augmentation])
    except ValueError as error:
        raise BadSample(
            "augmentation parameters", f"{error}; --config says what they are for"
        ) from error
    return {
        "picture": picture,
        "augmentation": augmentation,
        "synthetic": synthetic,
        "parameters": parameters,
        "caption": caption(sample) if "txt" in sample else None,
        "captions": captions,
        "stored": stored,
        "image": image,
        "image_emb": stored["image_emb"][augmentation],
        "text_emb": stored["text_emb"][
            0
        ],  # the original caption has the first row, the synthetic ones follow
        "syn_text_emb": stored["text_emb"][1 + synthetic],
    }


def cosines(image_emb: Tensor, text_emb: Tensor, widths: list[int]) -> Tensor:
    """Each teacher's similarity of captions and augmentations.

    Args:
        image_emb: ``[A, ΣD_k]``, the teachers' blocks side by side, each of unit length by itself.
        text_emb: ``[captions, ΣD_k]``, likewise.
        widths: the K widths D_k.

    Returns:
        ``[K, captions, A]``.
    """
    blocks = [emb.float().split(widths, dim=1) for emb in (image_emb, text_emb)]
    lengths = torch.cat([block.norm(dim=1) for emb in blocks for block in emb])
    if not ((lengths - 1).abs() < 0.02).all():  # bfloat16 is good for 0.004
        raise BadSample(
            f"blocks of {' and '.join(map(str, widths))} are not of unit length",
            f"found {lengths.min():.3f} to {lengths.max():.3f}; --teacher-dimension says how wide they are",
        )
    return torch.stack([texts @ images.T for images, texts in zip(*blocks, strict=True)])


# --- 4. in words ------------------------------------------------------------------------------------------------------


def printable(text: str, length: int = 1000) -> str:
    """A stranger's text in one line, without what a terminal would obey."""
    line = " ".join(text[: 4 * length].split())
    line = "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line
    )
    return line if len(line) <= length else line[: length - 1] + "…"


def in_words(params: dict) -> list[str]:
    """An augmentation's parameters, a line for each step."""
    units = dict.fromkeys(("Identity", "AutoContrast", "Equalize"), "")
    units |= {"Posterize": "{:.0f} bits", "Solarize": "from {:.0f}", "Rotate": "{:+.0f}°"}
    units |= dict.fromkeys(("TranslateX", "TranslateY"), "{:+.0f} px")
    lines = []
    for name, value in params.items():
        if name == "random_resized_crop":
            top, left, height, width = value
            lines.append(f"{width}x{height} at {left}, {top}")
        elif name == "rand_augment":
            ops = [(RAND_AUGMENT_OPS[op][0], magnitude) for op, magnitude in value or ()]
            lines += [
                f"{op} {units.get(op, '{:+.2f}').format(magnitude)}".strip()
                for op, magnitude in ops
            ]
        elif value not in (None, False):
            lines.append(f"{name} {value}" if value is not True else name)
    return lines


NO_CAPTION = "(the original caption: not in this shard, but in that of DataComp-12M)"


def tell(name: str, chosen: dict, similarity: Tensor, teachers: list[str]) -> None:
    """Print what the sample is."""
    a, s, count = chosen["augmentation"], chosen["synthetic"], len(chosen["captions"])
    original = printable(chosen["caption"] or NO_CAPTION)
    words = {
        "image": f"{chosen['picture'].width}x{chosen['picture'].height} picture, augmentation {a} of "
        f"{len(chosen['parameters'])}: {'; '.join(in_words(chosen['parameters'][a]))}",
        "image_emb": f"row {a} of {len(chosen['parameters'])}: what the teachers made of that augmentation",
        "text_emb": f"row 0 of {1 + count}: of the original caption",
        "syn_text_emb": f"row {1 + s} of {1 + count}: of synthetic caption {s}",
    }
    print(f"{name}\n")
    for field, said in words.items():
        tensor = chosen[field]
        print(
            f"{field:13} {list(tensor.shape)!s:14} {str(tensor.dtype).removeprefix('torch.'):9} {said}"
        )
    print(f"\n{'caption':13} {original}\n{'syn_caption':13} {printable(chosen['captions'][s])}\n")
    for teacher, of_captions in zip(teachers, similarity[:, :, a], strict=True):
        print(
            f"{teacher}: cosine with the caption {of_captions[0]:.3f}, the synthetic one {of_captions[1 + s]:.3f}"
        )


# --- 5. and as a picture: --output ------------------------------------------------------------------------------------

WIDTH, MARGIN = 1600, 40
COLUMNS, SIDE = 10, 144  # of augmentations
MOST_AUGMENTATIONS, MOST_CAPTIONS = 30, 10  # that are drawn
ORIGINAL = 300  # pixels of the original's longer side
LABELS, ROW = 420, 32  # of a similarity map
INK, GREY, LINE, CHOSEN = "#1f2328", "#6a737d", "#d0d7de", "#d1601f"
COLD, HOT = (244, 248, 252), (8, 64, 129)  # the lowest and the highest similarity

font_of = functools.cache(ImageFont.load_default)  # of a size in pixels


def write(
    draw, at, text: str, size: int, fill=INK, anchor: str = "la", width: float = WIDTH
) -> None:
    """One line of text, cut to ``width`` pixels. Pillow's font has no accents, and of the dashes only one."""
    text = unicodedata.normalize(
        "NFKD", printable(text, 300).translate(str.maketrans("–—−×", "---x"))
    )
    font, text = font_of(size), "".join(c for c in text if not unicodedata.combining(c))
    while font.getlength(text) > width and len(text) > 1:
        text = text[:-2].rstrip() + "…"
    draw.text(at, text, fill, font, anchor)


def draw_sheet(
    name: str, chosen: dict, similarity: Tensor, teachers: list[str], compose: Compose
) -> Image.Image:
    """The original, its augmentations as a student sees them, and each teacher's similarity of them and the captions.

    What was chosen is framed.
    """
    parameters = chosen["parameters"][:MOST_AUGMENTATIONS]
    captions = [chosen["caption"] or NO_CAPTION, *chosen["captions"]][:MOST_CAPTIONS]
    rows_chosen = (0, 1 + chosen["synthetic"])
    try:
        views = [
            to_pil_image(compose.reapply(chosen["picture"], params)[0]) for params in parameters
        ]
    except ValueError as error:
        raise BadSample("augmentation parameters", error) from error
    lines = max(len(in_words(params)) for params in parameters)
    grid_row = SIDE + 20 * lines + 26
    top_of_grid = MARGIN + max(ORIGINAL + 30, 118 + 34 * len(captions)) + 76
    top_of_maps = top_of_grid + grid_row * -(-len(views) // COLUMNS) + 20
    map_height = 76 + ROW * len(captions) + 26
    sheet = Image.new(
        "RGB", (WIDTH, top_of_maps + map_height * len(teachers) + MARGIN - 26), "white"
    )
    draw = ImageDraw.Draw(sheet)

    # the original and its captions
    picture = ImageOps.contain(chosen["picture"], (ORIGINAL, ORIGINAL), Image.Resampling.BICUBIC)
    sheet.paste(picture, (MARGIN, MARGIN))
    draw.rectangle(
        [MARGIN - 1, MARGIN - 1, MARGIN + picture.width, MARGIN + picture.height], outline=LINE
    )
    size = f"the original, {chosen['picture'].width}x{chosen['picture'].height}"
    write(draw, (MARGIN, MARGIN + picture.height + 8), size, 17, GREY)
    x, y = MARGIN + ORIGINAL + 44, MARGIN
    write(draw, (x, y), "One reinforced sample", 38)
    write(draw, (x, y + 52), name, 18, GREY, width=WIDTH - MARGIN - x)
    for row, text in enumerate(captions):
        at = y + 104 + 34 * row + (14 if row else 0)
        color = CHOSEN if row in rows_chosen else GREY
        write(draw, (x, at), "caption" if row == 0 else f"synthetic {row - 1}", 19, color)
        write(draw, (x + 130, at), text, 22 if row == 0 else 19, width=WIDTH - MARGIN - x - 130)

    # the augmentations
    title = f"{len(chosen['parameters'])} augmentations, of which only the parameters are stored"
    write(draw, (MARGIN, top_of_grid - 40), title, 22)
    said = "crop (width x height at left, top), then RandAugment's operations"
    write(draw, (WIDTH - MARGIN, top_of_grid - 36), said, 17, GREY, "ra")
    for number, (view, params) in enumerate(zip(views, parameters, strict=True)):
        x = MARGIN + number % COLUMNS * (WIDTH - 2 * MARGIN - SIDE) // (COLUMNS - 1)
        y = top_of_grid + number // COLUMNS * grid_row
        sheet.paste(view.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (x, y))
        color = CHOSEN if number == chosen["augmentation"] else INK
        if number == chosen["augmentation"]:
            draw.rectangle([x - 3, y - 3, x + SIDE + 2, y + SIDE + 2], outline=CHOSEN, width=4)
        else:
            draw.rectangle([x, y, x + SIDE - 1, y + SIDE - 1], outline=LINE)
        draw.rectangle([x, y, x + 28, y + 22], fill=color)
        write(draw, (x + 14, y + 11), str(number), 15, "white", "mm")
        for line, text in enumerate(in_words(params)):
            write(draw, (x, y + SIDE + 7 + 20 * line), text, 15, GREY, width=SIDE)

    # what the teachers make of them
    cell = min((WIDTH - 2 * MARGIN - LABELS) / len(views), 64)
    for number, (teacher, table) in enumerate(zip(teachers, similarity, strict=True)):
        table = table[: len(captions), : len(views)]
        low, high = table.min().item(), table.max().item()
        y = top_of_maps + number * map_height
        write(draw, (MARGIN, y), teacher, 22, width=WIDTH - 2 * MARGIN - 700)
        said = f"cosine similarity of captions and augmentations, {low:.2f} (light) to {high:.2f} (dark)"
        write(draw, (WIDTH - MARGIN, y + 4), said, 17, GREY, "ra")
        left, top = MARGIN + LABELS, y + 64
        for column in range(len(views)):
            color = CHOSEN if column == chosen["augmentation"] else GREY
            write(draw, (left + cell * (column + 0.5), top - 8), str(column), 14, color, "ms")
        for row, text in enumerate(captions):
            color = CHOSEN if row in rows_chosen else INK
            write(
                draw, (left - 12, top + ROW * (row + 0.5)), text, 16, color, "rm", width=LABELS - 12
            )
            for column, value in enumerate(table[row].tolist()):
                heat = (value - low) / (high - low) if high > low else 0.5
                color = tuple(
                    round(cold + heat * (hot - cold)) for cold, hot in zip(COLD, HOT, strict=True)
                )
                box = [
                    left + cell * column,
                    top + ROW * row,
                    left + cell * (column + 1) - 2,
                    top + ROW * (row + 1) - 2,
                ]
                draw.rectangle(box, fill=color)
                middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
                digits = f"{value:.2f}".replace("0.", ".", 1)
                write(draw, middle, digits, 14, "white" if heat > 0.5 else INK, "mm")
                if column == chosen["augmentation"] and row in rows_chosen:
                    draw.rectangle(box, outline=CHOSEN, width=3)
    return sheet


# --- all of it --------------------------------------------------------------------------------------------------------


def at_least(lowest: int):
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(
                f"found {text}, expected a number of at least {lowest}"
            )
        return int(text)

    return number


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--bf16", action="store_true", help=f"read {REPOSITORY}-bf16, with embeddings in bfloat16"
    )
    source.add_argument(
        "--shard",
        type=Path,
        metavar="FILE",
        help="read this shard, joined or not, not one of the Hub",
    )
    parser.add_argument(
        "--index", type=at_least(0), default=0, help="first sample to try (default %(default)s)"
    )
    parser.add_argument(
        "--tries", type=at_least(1), default=10, help="samples to try (default %(default)s)"
    )
    parser.add_argument("--augmentation", type=at_least(0), help="which one (default: drawn)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of what is drawn (default %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.png", help="draw all that is stored with the sample"
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "configs" / "datacompdr12m.json",
        metavar="FILE",
        help="how the set was reinforced (default: configs/datacompdr12m.json)",
    )
    parser.add_argument(
        "--teacher-dimension",
        type=at_least(1),
        nargs="+",
        metavar="D",
        help="width of each teacher's block of an embedding (default: of the config's teachers)",
    )
    args = parser.parse_args(arguments)
    if args.output and (args.output.suffix != ".png" or not args.output.absolute().parent.is_dir()):
        parser.error(
            f"--output: found {args.output}, expected a name that ends in .png in a folder that is there"
        )
    return args


def teacher_dimensions(names: list[str], where: Path) -> list[int]:
    """The widths D_k of the models that a config names, as OpenCLIP's model configs have them."""
    try:
        return [open_clip.get_model_config(register_model(name))["embed_dim"] for name in names]
    except (OSError, KeyError, TypeError):
        raise SystemExit(
            f"error: --config {where} names models that OpenCLIP doesn't know; say with --teacher-dimension how wide "
            "their embeddings are"
        ) from None


def main(arguments=None) -> None:
    args = parse_arguments(arguments)
    try:
        config = json.loads(args.config.read_text())
        steps = config["reinforce"]["image_augmentation"]
        compose = compose_from_config(steps)
        to_look_at = compose_from_config(
            {step: steps[step] for step in steps if step != "normalize"}
        )
        models = zip(config["model_name"].split(","), config["pretrained"].split(","), strict=True)
        models = [
            (Path(name).name.removesuffix(".json"), Path(weights).name) for name, weights in models
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SystemExit(
            f"error: --config {args.config} can't be used: {type(error).__name__}: {error}"
        ) from None
    widths = args.teacher_dimension or teacher_dimensions(
        config["model_name"].split(","), args.config
    )
    if len(widths) != len(models):
        given = " ".join(map(str, widths))
        raise SystemExit(
            f"error: --teacher-dimension {given} doesn't fit: the config has {len(models)} teachers"
        )
    teachers = [f"teacher {k}: {name}, {weights}" for k, (name, weights) in enumerate(models)]
    shard = args.shard or (f"{REPOSITORY}-bf16" if args.bf16 else REPOSITORY)

    number = None
    for number, (key, sample) in islice(
        enumerate(open_shard(shard)), args.index, args.index + args.tries
    ):
        try:
            for lack in missing(sample, STORED):
                raise BadSample(lack)
            stored = [embeddings(sample)[name] for name in ("image_emb", "text_emb")]
            if {sum(widths)} != {emb.shape[1] for emb in stored}:
                raise SystemExit(
                    f"error: {stored[0].shape[1]} and {stored[1].shape[1]} numbers in an embedding, and the teachers' "
                    f"widths are {' and '.join(map(str, widths))}: the set was made with another --config, or "
                    "--teacher-dimension has to say how wide they are"
                )
            similarity = cosines(*stored, widths)
            if missing(sample, PICTURE):
                sample["jpg"] = fetch_image(sample)  # Pillow looks at the bytes, not at this name
            chosen = choose(sample, compose, args.augmentation, args.seed)
            name = f"{shard}, sample {number}: {printable(key, 80)}"
            if args.output:
                sheet = draw_sheet(name, chosen, similarity, teachers, to_look_at)
            break
        except BadSample as error:
            print(f"sample {number} is left out: {printable(str(error), 400)}", file=sys.stderr)
    else:
        if number is None:
            raise SystemExit(f"error: {shard} has no sample {args.index}: choose a smaller --index")
        raise SystemExit(
            f"error: samples {args.index} to {number} can't be used: try more (--tries) or others (--index)"
        )

    tell(name, chosen, similarity, teachers)
    if args.output:
        sheet.save(args.output)
        print(f"\n{args.output}: all of it as a picture")


if __name__ == "__main__":
    sys.stdout.reconfigure(
        errors="backslashreplace"
    )  # a caption may have letters that this terminal has not
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
    except OSError as error:
        raise SystemExit(f"error: {error}") from None
