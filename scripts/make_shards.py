"""Make image-caption shards from a folder of images and captions, or from a table.

    python scripts/make_shards.py --input images --output datasets/mine/pairs
    python scripts/make_shards.py --input images.csv --image-column file --output …

--input is a folder of images (jpg, jpeg, png or webp, also in folders below it), each with its
caption in a text file of the same name (`dog.jpg` and `dog.txt`); or a table (csv, tsv or parquet)
with a row for each image. The table's --image-column has paths, relative to the table's folder or
to --images; in a parquet file it may also have the bytes of the images, or objects with `bytes`,
as Hugging Face's `datasets` writes them. Parquet files need DuckDB (pip install 'duckdb>=2').

A shard has --samples samples, in the order of the paths or of the rows: `<uid>.jpg` (or png, webp),
`<uid>.txt`, and `<uid>.json` with uid, sha256 of the image, and source. The uid is that of the
--uid-column, or 32 digits of a hash of the path below --input, or of the row's number.

Each image is decoded. With --max-side, larger images are scaled down and stored as JPEG; all
others are stored as they are. The script skips these, and lists them in `bad_images.jsonl`:
images that are unreadable, of another format, or of over 67 megapixels or 256 MB; missing, blank
and unreadable captions, and those of over 1 MB; uids that cannot be file names, or come twice in a
shard. A shard without usable samples is not written, and the exit status is 1.

A shard gets its name when it is complete, so the command can be run again: finished shards are
skipped. Several machines can share the shards by --task-index and --task-count. The same input
gives the same bytes. If the input has changed meanwhile, the script refuses to go on.

The script downloads nothing: for addresses of images use scripts/download_images.sh.
"""

import argparse
import csv
import functools
import hashlib
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lib.pool import run_all
from lib.publish import publish, publish_json, remove_leftovers
from lib.report import check_least, format_table, printable, run_command
from lib.shards import MAX_NAME, ShardError, find_files, parse_uid
from lib.tar_writer import write_tar
from lib.tasks import add_task_options, check_task, select_share
from PIL import Image
from tqdm import tqdm

from dr.sample import IMAGE_FORMATS, BadSample, decode_image
from dr.tar import IMAGE_MEMBERS, MAX_MEMBER

try:
    import duckdb
except ImportError:
    duckdb = None  # type: ignore[assignment]

SETTINGS, BAD_IMAGES = "make_shards.json", "bad_images.jsonl"
MAX_TEXT = 1 << 20  # bytes of a caption
MAX_FIELD = 1 << 26  # characters of a field of a table
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: of cameras
JPEG_QUALITY = 95
TABLES = {".csv": ",", ".tsv": "\t", ".parquet": ""}  # and what separates their fields


class Row(NamedTuple):
    """An image and its caption.

    Attributes:
        source: for messages, and for the uid if there is none.
        image: its path, or its bytes; None: it is missing.
        caption: its text, or the path of a text file; None: it is missing.
        uid: as given; None: none was given.
    """

    source: str
    image: Path | bytes | None
    caption: Path | str | None
    uid: object = None


class Part(NamedTuple):
    """The rows of a shard: listed, or a range of a parquet file's."""

    number: int
    rows: Sequence[Row] | range

    @property
    def name(self) -> str:
        return f"{self.number:08d}.tar"


# --- rows -----------------------------------------------------------------------------------------
def list_folder(folder: Path, output: Path) -> tuple[list[Row], str]:
    """A row for each file below a folder that is not a text, and a hash of names and sizes.

    Files of the output, which may be below the folder, do not count.
    """
    names, digest = find_files(folder, ""), hashlib.sha256()
    rows = []
    for name in names:
        path = folder / name
        if path.resolve().is_relative_to(output.resolve()):
            continue
        digest.update(f"{name}\0{path.stat().st_size}\0".encode("utf-8", "surrogateescape"))
        if path.suffix.lower() != ".txt":
            text = path.with_suffix(".txt")
            rows.append(Row(name, path, text if text.exists() else None))
    return rows, digest.hexdigest()


def list_text_table(path: Path, args: argparse.Namespace) -> list[Row]:
    """The rows of a csv or tsv file; exits with a line if it lacks a column."""
    csv.field_size_limit(MAX_FIELD)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=TABLES[path.suffix.lower()])
            check_columns(path, reader.fieldnames or (), args)
            return [make_row(path, number, row, args) for number, row in enumerate(reader)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise SystemExit(f"error: {path} cannot be read as a table: {error}") from None


def check_columns(path: Path, found: Sequence[str], args: argparse.Namespace) -> None:
    for column in filter(None, (args.image_column, args.caption_column, args.uid_column)):
        if column not in found:
            raise SystemExit(
                f"error: {path} has no column {column}; its columns are {', '.join(found)}"
            )


def make_row(path: Path, number: int, fields: dict[str, Any], args: argparse.Namespace) -> Row:
    """A row of a table, from its fields by column."""
    image, caption = fields[args.image_column], fields[args.caption_column]
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str):
        image = (args.images or path.parent) / image if image else None
    uid = fields[args.uid_column] if args.uid_column else None
    return Row(f"{path.name}, row {number}", image, caption, uid)


def connect() -> Any:
    if duckdb is None:
        raise SystemExit("error: parquet files need DuckDB: pip install 'duckdb>=2'")
    return duckdb.connect(config={"threads": 1})


def count_parquet_rows(path: Path, args: argparse.Namespace) -> int:
    """How many rows a parquet file has; exits with a line if it cannot be used."""
    database = connect()
    try:
        described = database.execute("DESCRIBE FROM read_parquet($1)", [str(path)]).fetchall()
        check_columns(path, [column for column, *_ in described], args)
        query = "SELECT num_rows FROM parquet_file_metadata($1)"
        return database.execute(query, [str(path)]).fetchone()[0]
    except duckdb.Error as error:
        line = str(error).partition("\n")[0]
        raise SystemExit(f"error: {path} cannot be read: {line}") from None


def read_parquet_rows(path: Path, rows: range, args: argparse.Namespace) -> Iterator[Row]:
    columns = [c for c in (args.image_column, args.caption_column, args.uid_column) if c]
    names = ", ".join('"' + column.replace('"', '""') + '"' for column in columns)
    query = (
        f"SELECT file_row_number, {names} FROM read_parquet($1, file_row_number=true) "
        "WHERE file_row_number BETWEEN $2 AND $3 ORDER BY file_row_number"
    )
    result = connect().execute(query, [str(path), rows.start, rows.stop - 1])
    while found := result.fetchmany(64):
        for number, *values in found:
            yield make_row(path, number, dict(zip(columns, values, strict=True)), args)


# --- samples --------------------------------------------------------------------------------------
def check_size(data: bytes, limit: int, kind: str) -> None:
    if len(data) > limit:
        raise BadSample(f"{kind} of over {limit} bytes")


def read_bounded(path: Path, limit: int, kind: str) -> bytes:
    """The bytes of a file; raises BadSample if it cannot be read, or has too many."""
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise BadSample(f"unreadable {kind}", error) from error
    check_size(data, limit, kind)
    return data


def read_caption(caption: Path | str | None) -> str:
    """The text of a caption; raises BadSample if it is missing, blank or unreadable."""
    if isinstance(caption, Path):
        try:
            caption = read_bounded(caption, MAX_TEXT, "caption").decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSample("a caption that is not UTF-8", error) from error
    if not isinstance(caption, str) or not caption.strip():
        raise BadSample("no caption", "it is missing or blank")
    check_size(caption.encode("utf-8", "surrogatepass"), MAX_TEXT, "caption")
    return caption.strip()


def read_image(image: Path | bytes | None, max_side: int) -> tuple[str, bytes]:
    """Extension and bytes of an image, scaled down to ``max_side`` pixels unless that is 0.

    Raises:
        BadSample: it is missing, of another format, or cannot be decoded.
    """
    if image is None:
        raise BadSample("no image", "the field is empty")
    if isinstance(image, Path):
        if image.suffix.lower().removeprefix(".") not in IMAGE_MEMBERS:
            raise BadSample("another format", f"expected {', '.join(IMAGE_MEMBERS)}")
        image = read_bounded(image, MAX_MEMBER, "image")
    check_size(image, MAX_MEMBER, "image")
    img = decode_image({"jpg": image})  # whatever its format is
    if max_side and max(img.size) > max_side:
        img.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
        stream = io.BytesIO()
        img.save(stream, "JPEG", quality=JPEG_QUALITY)
        return "jpg", stream.getvalue()
    with Image.open(io.BytesIO(image), formats=IMAGE_FORMATS) as opened:
        return EXTENSIONS[str(opened.format)], image


def make_sample(row: Row, max_side: int) -> tuple[str, dict[str, bytes]]:
    """Uid and members of a row's sample; raises BadSample if it cannot be used."""
    digest = hashlib.sha256(row.source.encode("utf-8", "surrogateescape")).hexdigest()
    try:
        uid = digest[:32] if row.uid is None else parse_uid(row.uid)
    except ValueError as error:
        raise BadSample(str(error)) from error
    if len(os.fsencode(f"{uid}.paug.json")) > MAX_NAME:
        raise BadSample(f"a name of over {MAX_NAME} bytes")
    extension, image = read_image(row.image, max_side)
    caption = read_caption(row.caption)
    about = {"uid": uid, "sha256": hashlib.sha256(image).hexdigest(), "source": row.source}
    return uid, {extension: image, "txt": caption.encode(), "json": json.dumps(about).encode()}


def record_path(output: Path, name: str) -> Path:
    """The file of a shard's bad images."""
    return output / ".made" / f"{name}.json"


def make_shard(part: Part, args: argparse.Namespace) -> dict[str, Any]:
    """Write a shard unless it is finished; returns its name, and how many samples were written."""
    path = args.output / part.name
    if path.exists():
        return {"shard": part.name, "rows": len(part.rows), "written": 0, "failed": None}
    rows: Iterable[Row]
    if isinstance(part.rows, range):
        rows = read_parquet_rows(args.input, part.rows, args)
    else:
        rows = part.rows
    bad, seen = [], set[str]()

    def make_samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for row in rows:
            try:
                uid, members = make_sample(row, args.max_side)
                if uid in seen:
                    raise BadSample("a uid twice in one shard", uid)
            except BadSample as error:
                found = {"reason": error.reason, "detail": printable(error, 400)}
                bad.append({"source": row.source, **found})
                continue
            seen.add(uid)
            yield uid, members

    def write(file: BinaryIO) -> int:
        written = write_tar(file, make_samples())
        publish_json(record_path(args.output, part.name), bad)
        if not written:
            raise ShardError(f"none of its {len(part.rows)} images can be used")
        return written

    remove_leftovers(path)
    result = {"shard": part.name, "rows": len(part.rows), "written": 0, "failed": None}
    try:
        return {**result, "written": publish(path, write)}
    except ShardError as error:
        return {**result, "failed": str(error)}


# --- the command ----------------------------------------------------------------------------------
def split_input(args: argparse.Namespace) -> tuple[list[Part], Any]:
    """The parts of the input, one for each shard, and what changes when the input does."""
    suffix = args.input.suffix.lower()
    listed: Sequence[Row] | range
    stamp: Any
    if args.input.is_dir():
        listed, stamp = list_folder(args.input, args.output)
    elif not args.input.is_file() or suffix not in TABLES:
        raise SystemExit(
            f"error: --input {args.input}: expected a folder of images, or a table "
            f"({', '.join(TABLES)})"
        )
    else:
        about = args.input.stat()
        stamp = [about.st_size, about.st_mtime_ns]
        if suffix == ".parquet":
            listed = range(count_parquet_rows(args.input, args))
        else:
            listed = list_text_table(args.input, args)
    starts = range(0, len(listed), args.samples)
    if not starts:
        raise SystemExit(f"error: --input {args.input} has no images")
    parts = [Part(n, listed[start : start + args.samples]) for n, start in enumerate(starts)]
    return parts, stamp


def check_settings(args: argparse.Namespace, stamp: Any) -> None:
    """Record how the shards are made; exits with a line if the folder's were made otherwise."""
    fields = ("input", "images", "image_column", "caption_column", "uid_column")
    settings = {name: getattr(args, name) for name in (*fields, "samples", "max_side")}
    settings = json.loads(json.dumps({**settings, "stamp": stamp}, default=str))
    path = args.output / SETTINGS
    recorded = json.loads(path.read_text()) if path.exists() else settings
    if recorded != settings:
        changed = ", ".join(name for name in settings if recorded.get(name) != settings[name])
        raise SystemExit(
            f"error: the shards in {args.output} were made with another {changed} (see {path}; "
            "stamp: names, sizes and times of the input): choose another folder"
        )
    publish_json(path, settings)


def list_bad_images(output: Path, parts: Sequence[Part]) -> Counter[str]:
    """Write the list of bad images of all shards so far; returns their number by reason."""
    paths = [record_path(output, part.name) for part in parts]
    bad = [entry for path in paths if path.exists() for entry in json.loads(path.read_text())]
    lines = "".join(json.dumps(entry) + "\n" for entry in bad).encode()
    publish(output / BAD_IMAGES, lambda file: file.write(lines))
    return Counter(entry["reason"] for entry in bad)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", required=True, type=Path, help="folder of images, or a table")
    add("--output", required=True, type=Path, help="folder for the shards")
    text = "folder that the table's paths are relative to; default: the table's"
    add("--images", type=Path, help=text)
    text = "column of paths or bytes; default %(default)s"
    add("--image-column", default="image", help=text)
    add("--caption-column", default="caption", help="column of captions; default %(default)s")
    add("--uid-column", help="column of uids; default: none")
    add("--samples", type=int, default=10000, help="samples of a shard; default %(default)s")
    text = "pixels to which the longer side of larger images is scaled down; default: as they are"
    add("--max-side", type=int, default=0, help=text)
    cores, text = min(8, os.cpu_count() or 1), "processes; default: one for each core, up to 8"
    add("--workers", type=int, default=cores, help=text)
    add_task_options(parser)
    args = parser.parse_args(arguments)
    check_task(parser, args)
    check_least(parser, args, 1, "samples", "workers")
    check_least(parser, args, 0, "max_side")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    parts, stamp = split_input(args)
    check_settings(args, stamp)
    own = select_share(parts, args.task_index, args.task_count)
    written, failed = 0, dict[str, str]()
    with tqdm(total=sum(len(part.rows) for part in own), unit=" images") as bar:
        for result in run_all(functools.partial(make_shard, args=args), own, args.workers):
            written += result["written"]
            if result["failed"]:
                failed[result["shard"]] = result["failed"]
                bar.write(f"{result['shard']}: failed: {result['failed']}", file=sys.stderr)
            bar.update(result["rows"])
    bad = list_bad_images(args.output, parts)
    total = sum(len(part.rows) for part in parts)
    rows = [("images", total), ("samples written now", written)]
    print(format_table([*rows, *((f"skipped: {reason}", bad[reason]) for reason in sorted(bad))]))
    if bad:
        print(f"the skipped images are listed in {args.output / BAD_IMAGES}")
    if failed:
        raise SystemExit(f"error: {len(failed)} of {len(own)} shards were not written")


if __name__ == "__main__":
    run_command(main, ShardError)
