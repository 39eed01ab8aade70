"""make_shards.py makes image-caption shards from a folder or a table, and lists bad images."""

import csv
import hashlib
import io
import json

import duckdb
import make_shards
import pytest
from PIL import Image
from shards import encode, picture, read_samples, uid

from dr.sample import caption, decode_image

PICTURES = 7


def encode_as(img, kind):
    stream = io.BytesIO()
    img.save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def pictures(tmp_path):
    """A folder of pictures of three formats, in two folders, with captions."""
    folder = tmp_path / "pictures"
    for n in range(PICTURES):
        kind, suffix = (("JPEG", "jpg"), ("PNG", "PNG"), ("WEBP", "webp"))[n % 3]
        path = folder / ("a" if n < 4 else "b") / f"{n}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_as(picture(n), kind))
        path.with_suffix(".txt").write_text(f" picture {n}\n")
    return folder


def make(source, output, *options):
    given = ["--input", source, "--output", output, "--samples", 3, "--workers", 1, *options]
    make_shards.main([str(argument) for argument in given])


def read_all(output):
    return {path.name: read_samples(path) for path in sorted(output.glob("*.tar"))}


def read_bad(output):
    lines = (output / "bad_images.jsonl").read_text().splitlines()
    return {entry["source"]: entry["reason"] for entry in map(json.loads, lines)}


def test_pictures_are_stored_as_they_are_with_their_captions_in_the_order_of_paths(
    pictures, tmp_path
):
    make(pictures, tmp_path / "out")
    shards = read_all(tmp_path / "out")
    assert [len(samples) for samples in shards.values()] == [3, 3, 1]
    samples = [item for shard in shards.values() for item in shard.items()]
    for n, (key, members) in enumerate(samples):
        extension = ("jpg", "png", "webp")[n % 3]
        path = next(pictures.glob(f"*/{n}.*[gGp]"))
        assert set(members) == {extension, "txt", "json"}
        assert members[extension] == path.read_bytes() and caption(members) == f"picture {n}"
        source = path.relative_to(pictures).as_posix()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert json.loads(members["json"]) == {"uid": key, "sha256": digest, "source": source}
        assert key == hashlib.sha256(source.encode()).hexdigest()[:32]
    assert read_bad(tmp_path / "out") == {}


@pytest.mark.slow
def test_finished_shards_stay_and_tasks_processes_and_kills_give_the_same_bytes(pictures, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    (pictures / "a" / "1.txt").unlink()
    make(pictures, one)
    expected = {path.name: path.read_bytes() for path in one.glob("*.tar")}
    for task, workers in ((1, 2), (0, 1)):
        options = ("--task-index", task, "--task-count", 2, "--workers", workers)
        make(pictures, many, *options)
    (many / "00000001.tar").unlink()
    (many / ".00000001.tar.0123abcd.partial").write_bytes(b"cut")
    times = (many / "00000000.tar").stat().st_mtime_ns
    make(pictures, many)
    assert {path.name: path.read_bytes() for path in many.glob("*.tar")} == expected
    assert not list(many.glob(".*.partial"))
    assert (many / "00000000.tar").stat().st_mtime_ns == times
    assert read_bad(many) == read_bad(one) == {"a/1.PNG": "no caption"}
    (pictures / "new.jpg").write_bytes(encode(picture(8)))
    with pytest.raises(SystemExit, match=r"made with another stamp \(see .*choose another folder"):
        make(pictures, many)


def test_what_cannot_be_used_is_skipped_listed_and_counted(pictures, tmp_path, capsys):
    bad = {
        "blank": (encode(picture(0)), b" \n", "jpg", "no caption"),
        "cut": (encode(picture(0))[:200], b"x", "jpg", "undecodable image"),
        "gif": (encode_as(picture(0), "GIF"), b"x", "gif", "another format"),
        "hidden_gif": (encode_as(picture(0), "GIF"), b"x", "jpg", "undecodable image"),
        "latin": (encode(picture(0)), b"\xe9", "jpg", "a caption that is not UTF-8"),
        "long": (encode(picture(0)), b"x" * (2**20 + 1), "jpg", "caption of over 1048576 bytes"),
        "large": (encode_as(Image.new("1", (9000, 9000)), "PNG"), b"x", "png", "oversized image"),
    }
    (pictures / "c").mkdir()
    for name, (image, text, suffix, _) in bad.items():
        (pictures / "c" / f"{name}.{suffix}").write_bytes(image)
        (pictures / "c" / f"{name}.txt").write_bytes(text)
    (pictures / "c" / "alone.jpg").write_bytes(encode(picture(0)))
    with pytest.raises(SystemExit, match="2 of 5 shards were not written"):  # nothing is left
        make(pictures, tmp_path / "out")
    expected = {f"c/{name}.{suffix}": why for name, (_, _, suffix, why) in bad.items()}
    assert read_bad(tmp_path / "out") == {"c/alone.jpg": "no caption", **expected}
    assert sum(map(len, read_all(tmp_path / "out").values())) == PICTURES
    said = capsys.readouterr()
    assert "skipped: undecodable image" in said.out
    assert "failed: none of its 3 images can be used" in said.err


def test_two_pictures_in_one_file_and_an_output_below_the_input(pictures, tmp_path):
    stream = io.BytesIO()
    picture(8).save(stream, "MPO", save_all=True, append_images=[picture(9)])
    (pictures / "b" / "camera.jpg").write_bytes(stream.getvalue())
    (pictures / "b" / "camera.txt").write_text("camera")
    for _ in range(2):  # the second run finds the first one's shards below its input
        make(pictures, pictures / "out", "--samples", 100)
        (samples,) = read_all(pictures / "out").values()
        assert len(samples) == PICTURES + 1 and read_bad(pictures / "out") == {}
    *_, last = samples.values()
    assert last["jpg"] == stream.getvalue()


def test_large_pictures_are_scaled_down(pictures, tmp_path):
    (pictures / "large.png").write_bytes(encode_as(picture(9, 300, 150), "PNG"))
    (pictures / "large.txt").write_text("large")
    make(pictures, tmp_path / "out", "--max-side", 60, "--samples", 100)
    samples = read_all(tmp_path / "out")["00000000.tar"].values()
    sizes = [decode_image(members).size for members in samples]
    assert sizes == [(48, 40)] * PICTURES + [(30, 60)]
    *_, large = samples
    assert json.loads(large["json"])["sha256"] == hashlib.sha256(large["jpg"]).hexdigest()


def test_tables_give_the_same_samples_as_their_pictures(pictures, tmp_path):
    paths = sorted(path for path in pictures.rglob("*") if path.suffix in (".jpg", ".PNG", ".webp"))
    rows = [(path, f"caption, {n}", uid(n)) for n, path in enumerate(paths)]
    with open(tmp_path / "t.CSV", "w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file)
        table.writerow(["file", "text", "id"])
        table.writerows((path.relative_to(pictures), text, key) for path, text, key in rows)
        table.writerow(["a/gone.jpg", "gone", "x"])
        table.writerow(["a/0.jpg", "dotted", "x.y"])
        table.writerow(["a/0.jpg", "long" * 2**20, "z"])
    database = duckdb.connect()
    database.execute("CREATE TABLE bytes (file BLOB, text VARCHAR, id VARCHAR)")
    for path, text, key in rows:
        database.execute("INSERT INTO bytes VALUES ($1, $2, $3)", [path.read_bytes(), text, key])
    database.execute("INSERT INTO bytes VALUES (NULL, 'gone', 'x'), ('broken', 'x', 'y')")
    long = [rows[0][0].read_bytes(), "long" * 2**20]
    database.execute("INSERT INTO bytes VALUES ($1, $2, 'z')", long)
    database.execute(f"COPY bytes TO '{tmp_path / 'bytes.parquet'}'")
    columns = "struct_pack(bytes := file, path := 'x') AS file, text, id FROM bytes"
    database.execute(f"COPY (SELECT {columns}) TO '{tmp_path / 'datasets.parquet'}'")
    options = ["--image-column", "file", "--caption-column", "text", "--uid-column", "id"]
    made = []
    for name in ("t.CSV", "bytes.parquet", "datasets.parquet"):
        more = ["--images", pictures] if name == "t.CSV" else []
        output = tmp_path / f"out-{name}"
        make(tmp_path / name, output, "--samples", 5, *options, *more)
        shards = read_all(output)
        assert [list(samples) for samples in shards.values()] == [
            [key for *_, key in rows[:5]],
            [key for *_, key in rows[5:]],
        ]
        made.append([m for samples in shards.values() for m in samples.values()])
        assert set(read_bad(output)) == {f"{name}, row {row}" for row in (7, 8, 9)}
        assert read_bad(output)[f"{name}, row 9"] == "caption of over 1048576 bytes"
    for n, (path, text, _) in enumerate(rows):
        for samples in made:
            assert path.read_bytes() in samples[n].values() and caption(samples[n]) == text
    with pytest.raises(SystemExit, match="has no column image; its columns are file, text, id"):
        make(tmp_path / "t.CSV", tmp_path / "other")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(SystemExit, match=r"broken\.parquet cannot be read"):
        make(tmp_path / "broken.parquet", tmp_path / "other")
    with pytest.raises(SystemExit, match="expected a folder of images, or a table"):
        make(tmp_path / "none", tmp_path / "other")
    assert not (tmp_path / "other").exists()
