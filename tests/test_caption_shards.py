"""Caption shards hold the metadata's captions in the reinforcements' order, for any memory."""

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import caption_shards
import duckdb
import pytest
from shards import encode, picture, read_shard, read_tars, write_shard

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "caption_shards.py"
NAMES = ("00/00000000.tar", "00/00000001.tar", "01/00000000.tar")


def uid_of(number):
    return f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}"


def reinforcement(uid):
    return uid, {
        "syn.json": b'{"syn_text": ["a"]}',
        "paug.json": b'{"param_aug": []}',
        "npz": b"embeddings",
    }


def write_metadata(path, rows, types="VARCHAR, VARCHAR", columns=("uid", "text")):
    """A parquet file of ``(uid, text)`` rows, with further columns around them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = types.split(", ")
    with duckdb.connect() as database:
        database.execute(
            f"CREATE TABLE t (url VARCHAR, {columns[0]} {kinds[0]}, width INT, "
            f"{columns[1]} {kinds[1]})"
        )
        if rows:
            database.executemany(
                "INSERT INTO t VALUES ('https://example.org/', $1, 3, $2)",
                [list(row) for row in rows],
            )
        database.execute(f"COPY t TO '{path}' (FORMAT parquet)")
    return path


class Folders:
    def __init__(self, folder):
        self.metadata, self.shards, self.output = (
            folder / name for name in ("metadata", "dr", "captions")
        )

    def write(self, shards):
        """Reinforcement shards: ``{name: [uid, …]}``."""
        for name, uids in shards.items():
            write_shard(self.shards / name, [reinforcement(uid) for uid in uids])

    def write_three(self, samples=30):
        """Three shards; their captions in two metadata files, among others, in reverse order."""
        names = iter(range(3 * samples))
        self.write({name: [uid_of(next(names)) for _ in range(samples)] for name in NAMES})
        rows = [(uid_of(number), f"caption {number}") for number in reversed(range(4 * samples))]
        write_metadata(self.metadata / "a.parquet", rows[: samples // 2])
        write_metadata(self.metadata / "more" / "b.parquet", rows[samples // 2 :])

    def arguments(self, *more):
        sources = ("--metadata", self.metadata, "--shards-of", self.shards, "--output", self.output)
        return [
            str(argument) for argument in (*sources, "--memory", "200MB", "--threads", 1, *more)
        ]

    def run(self, *more):
        """In this process; the report."""
        caption_shards.main(self.arguments(*more))
        return self.report()

    def command(self, *more):
        return [sys.executable, str(SCRIPT), *self.arguments(*more)]

    def run_failing(self, *more, expected=""):
        """In a process; it must end with one line that has ``expected`` and no traceback."""
        done = subprocess.run(self.command(*more), capture_output=True, text=True, timeout=120)
        assert done.returncode == 1, done.stderr
        lines = [
            line
            for line in done.stderr.replace("\r", "\n").splitlines()
            if line.strip() and "|" not in line
        ]
        assert len(lines) == 1 and expected in lines[0], done.stderr
        return lines[0]

    def report(self):
        return json.loads((self.output / "caption_report.json").read_text())

    def captions(self, name="00/00000000.tar"):
        """``[(uid, caption), …]``"""
        members = read_shard(self.output / name)
        assert all(member.endswith(".txt") for member, _ in members)
        return [(member.removesuffix(".txt"), data.decode()) for member, data in members]


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path)


def leftovers(folder):
    return [
        path.name
        for path in folder.rglob("*")
        if path.suffix == ".partial" or path.name.startswith(("part", "sp"))
    ]


# what the shards hold


def test_captions_stand_in_shards_of_the_same_names_in_the_order_of_the_reinforcements(folders):
    folders.write_three()
    report = folders.run()
    for shard, name in enumerate(NAMES):
        numbers = range(shard * 30, shard * 30 + 30)
        assert folders.captions(name) == [
            (uid_of(number), f"caption {number}") for number in numbers
        ]
    assert report["samples"] == 90 and report["counts"] == {} and report["shards"] == {"written": 3}
    assert report["metadata_rows"] == 120 and leftovers(folders.output) == []


def test_join_takes_them_as_its_captions(folders, tmp_path):
    folders.write_three(3)
    folders.run()
    number = 0
    for name in NAMES:
        samples = []
        for key in range(3):
            about = {"uid": uid_of(number), "status": "success"}
            samples.append(
                (f"{key:09d}", {"jpg": encode(picture(number)), "json": json.dumps(about).encode()})
            )
            number += 1
        write_shard(tmp_path / "images" / name, samples)
    environment = {
        **os.environ,
        "DATACOMP1B_PATH": str(folders.output),
        "DATACOMP1B_IMAGES_PATH": str(tmp_path / "images"),
        "DATACOMPDR1B_NOIMG_PATH": str(folders.shards),
        "DATACOMPDR1B_PATH": str(tmp_path / "joined"),
        "PYTHON": sys.executable,
        "WORKERS": "1",
    }
    script = ["bash", str(ROOT / "scripts" / "join_datacompdr1b.sh")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "joined" / "join_report.json").read_text())["samples"] == 9
    joined = dict(read_shard(tmp_path / "joined" / "01" / "00000000.tar"))
    for number in range(6, 9):
        assert joined[f"{uid_of(number)}.txt"] == f"caption {number}".encode()
        assert (
            joined[f"{uid_of(number)}.jpg"] == encode(picture(number))
            and f"{uid_of(number)}.npz" in joined
        )


def test_what_has_no_caption_is_left_out_and_counted(folders):
    folders.write({"0.tar": [uid_of(number) for number in range(6)]})
    texts = ["zero", None, "", " \n\u3000", "four"]
    write_metadata(
        folders.metadata / "a.parquet", [(uid_of(n), text) for n, text in enumerate(texts)]
    )
    report = folders.run()
    assert folders.captions("0.tar") == [(uid_of(0), "zero"), (uid_of(4), "four")]
    assert report["counts"] == {"without: not in the metadata": 1, "without: an empty caption": 3}


@pytest.mark.parametrize("first", ["a", "b"])
def test_of_several_rows_of_a_uid_the_first_caption_in_byte_order_is_taken_wherever_it_stands(
    folders, first
):
    folders.write({"0.tar": [uid_of(0), uid_of(1)]})
    second = "b" if first == "a" else "a"
    write_metadata(
        folders.metadata / f"{first}.parquet",
        [(uid_of(0), "m"), (uid_of(0), None), (uid_of(1), "é")],
    )
    write_metadata(
        folders.metadata / f"{second}.parquet",
        [(uid_of(0), "B"), (uid_of(0), " "), (uid_of(1), "z")],
    )
    report = folders.run()
    assert folders.captions("0.tar") == [(uid_of(0), "B"), (uid_of(1), "z")]
    assert report["counts"] == {"duplicates in the metadata": 4}


def test_uids_match_in_either_case_and_are_spelled_as_in_the_reinforcements(folders):
    ours = [
        uid_of(1).upper(),
        uid_of(2),
        uid_of(3),
        "000000017",
        "Kitten",
        "kitten",
        "it's-no-hex-at-all",
    ]
    theirs = [uid_of(1), uid_of(2).upper(), f"{uid_of(3)[:8]}-{uid_of(3)[8:]}", *ours[3:]]
    folders.write({"0.tar": ours})
    write_metadata(
        folders.metadata / "a.parquet", [(uid, f"of {number}") for number, uid in enumerate(theirs)]
    )
    assert folders.run()["counts"] == {}
    assert folders.captions("0.tar") == [(uid, f"of {number}") for number, uid in enumerate(ours)]


def test_uids_are_those_that_the_join_reads_from_the_json(folders):
    samples = [
        ("000000001", {**reinforcement("")[1], "json": json.dumps({"uid": uid_of(7)}).encode()})
    ]
    write_shard(folders.shards / "0.tar", samples)
    write_metadata(folders.metadata / "a.parquet", [(uid_of(7), "seven"), ("000000001", "one")])
    folders.run()
    assert folders.captions("0.tar") == [(uid_of(7), "seven")]


def test_captions_come_as_they_are_unless_too_long_or_not_utf8(folders):
    texts = [
        "two\nlines\r\n",
        "a\0b",
        "日本語 🙂",
        " spaced ",
        "x" * caption_shards.MAX_CAPTION,
        "é" * caption_shards.MAX_CAPTION,
        "bad##",
    ]
    folders.write({"0.tar": [uid_of(number) for number in range(len(texts))]})
    path = write_metadata(
        folders.metadata / "a.parquet", [(uid_of(n), text) for n, text in enumerate(texts)]
    )
    with duckdb.connect() as database:
        database.execute(
            f"COPY (FROM '{path}') TO '{path}' (FORMAT parquet, COMPRESSION uncompressed)"
        )
    assert b"bad##" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"bad##", b"bad\xff\xfe"))
    report = folders.run()
    expected = [*texts[:5], "é" * caption_shards.CUT_CAPTION, "bad??"]
    assert [text for _, text in folders.captions("0.tar")] == expected
    assert report["counts"] == {"long captions cut": 1}


def test_captions_without_the_mark_of_text_and_uids_as_numbers_do_as_well(folders):
    folders.write({"0.tar": [uid_of(0)]})
    write_metadata(folders.metadata / "a.parquet", [(uid_of(0), b"caption")], types="UUID, BLOB")
    folders.run()
    assert folders.captions("0.tar") == [(uid_of(0), "caption")]


def test_same_bytes_whatever_the_memory_the_parts_and_the_threads(folders, tmp_path):
    folders.write_three()
    folders.run()
    expected = read_tars(folders.output)
    for number, options in enumerate(
        (["--part", 30, "--threads", 2], ["--part", 1], ["--memory", "1GB"])
    ):
        folders.output = tmp_path / f"again{number}"
        folders.run(*options)
        assert read_tars(folders.output) == expected


def test_patterns_and_names_choose_files_and_shards(folders):
    folders.write_three()
    folders.run(
        "--metadata",
        folders.metadata / "**" / "*.parquet",
        "--shards",
        "00/{00000001..00000001}.tar",
    )
    assert list(read_tars(folders.output)) == ["00/00000001.tar"]
    folders.run("--shards-of", f"{folders.shards}/{{01/00000000,00/00000000}}.tar")
    assert list(read_tars(folders.output)) == list(NAMES)


# a large set


def test_linked_folders_are_followed_and_files_are_read_once(folders, tmp_path):
    folders.write_three()
    expected = folders.run()["samples"]
    (folders.metadata / "more").rename(tmp_path / "elsewhere")
    (folders.metadata / "more").symlink_to(tmp_path / "elsewhere")
    (folders.metadata / "a again.parquet").symlink_to(folders.metadata / "a.parquet")
    report = folders.run()
    assert report["samples"] == expected and "duplicates in the metadata" not in report["counts"]
    (folders.metadata / "loop").symlink_to(folders.metadata)
    pattern = ["--metadata", f"{folders.metadata}/**/*.parquet"]
    assert folders.run(*pattern)["samples"] == expected
    folders.run_failing(expected="loop is a link to")


@pytest.mark.slow
def test_join_of_more_than_the_memory_spills_and_stays_within_it(folders):
    samples, shards, memory = 800_000, 10, 200 * 10**6
    folders.metadata.mkdir()
    (folders.output / ".captions").mkdir(parents=True)
    # of 256 bytes
    caption = "array_to_string(list_transform(range(8), lambda k: md5((i * 8 + k)::VARCHAR)), '')"
    with duckdb.connect() as database:
        for half in range(2):
            rows = f"SELECT md5(i::VARCHAR) AS uid, {caption} AS text "
            rows += f"FROM range({half}, {samples}, 2) t(i)"
            path = folders.metadata / f"{half}.parquet"
            database.execute(f"COPY ({rows}) TO '{path}' (FORMAT parquet, ROW_GROUP_SIZE 20480)")
        for shard in range(shards):
            path = caption_shards.work_path(folders.output, f"{shard}.tar", "uids.parquet")
            uids = f"SELECT md5(i::VARCHAR) AS uid FROM range({shard}, {samples}, {shards}) t(i)"
            database.execute(f"COPY ({uids}) TO '{path}' (FORMAT parquet)")
    code = f"""if True:
        import caption_shards, json, pathlib, types
        output = pathlib.Path({str(folders.output)!r})
        args = types.SimpleNamespace(memory={memory}, threads=1, output=output, work=output)
        names = [f"{{shard}}.tar" for shard in range({shards})]
        part = [{{"shard": name, "samples": {samples // shards}}} for name in names]
        files = caption_shards.find_metadata({str(folders.metadata)!r})
        report = {{"spilled_bytes": 0}}
        caption_shards.look_up_group(output / "part", part, files, {samples}, args, report)
        print(json.dumps({{**report, "peak_bytes": caption_shards.measure_peak_memory()}}))
    """
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["spilled_bytes"] > memory / 2
    assert told["peak_bytes"] < 2 * memory, (
        "the memory, and what Python and DuckDB's code take beside it"
    )
    with duckdb.connect() as database:
        number = f"(place % {2**32}) * {shards} + (place >> 32)"
        right = f"text = {caption.replace('i * 8', f'({number}) * 8')} AND NOT cut"
        ascending = "coalesce(place > lag(place) OVER (ORDER BY file_row_number), true)"
        query = f"SELECT count(*), bool_and({right}), bool_and(ascending) "
        query += f"FROM (SELECT *, {ascending} AS ascending"
        found = database.execute(f"{query} FROM read_parquet('{folders.output}/part'))").fetchone()
    assert found == (samples, True, True)


def test_more_shards_than_files_may_be_open(folders):
    folders.write({f"{number}.tar": [uid_of(number)] for number in range(100)})
    write_metadata(
        folders.metadata / "a.parquet", [(uid_of(number), "text") for number in range(100)]
    )

    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))

    done = subprocess.run(
        folders.command(), preexec_fn=limit, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert folders.report()["samples"] == 100


# again


def test_finished_shards_are_skipped_and_those_of_other_sources_made_again(folders):
    folders.write_three()
    folders.run()
    before = {path: path.stat().st_mtime_ns for path in folders.output.rglob("*.tar")}
    report = folders.run("--part", 7)
    assert (
        report["shards"] == {"already there": 3}
        and report["samples"] == 90
        and "join" not in report["seconds"]
    )
    assert before == {path: path.stat().st_mtime_ns for path in folders.output.rglob("*.tar")}

    folders.write({NAMES[1]: [uid_of(2), uid_of(1)]})  # one shard has changed
    assert folders.run()["shards"] == {"already there": 2, "written": 1}
    assert folders.captions(NAMES[1]) == [(uid_of(2), "caption 2"), (uid_of(1), "caption 1")]

    write_metadata(folders.metadata / "c.parquet", [(uid_of(1), "a better caption")])
    assert folders.run()["shards"] == {"written": 3}
    assert folders.captions(NAMES[1])[1] == (uid_of(1), "a better caption")

    (folders.output / NAMES[2]).write_bytes(b"")
    assert folders.run()["shards"] == {"already there": 2, "written": 1}


def wait_for(there, process):
    while not there():
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.002)


def many(folders):
    """Shards enough that a run can be caught at work."""
    folders.write(
        {f"{shard:03d}.tar": [uid_of(100 * shard + n) for n in range(100)] for shard in range(40)}
    )
    folders.metadata.mkdir()
    with duckdb.connect() as database:
        rows = [(uid_of(number), f"caption {number}") for number in range(4000)]
        values = [[uid for uid, _ in rows], [text for _, text in rows]]
        path = folders.metadata / "a.parquet"
        query = "SELECT unnest($1) AS uid, unnest($2) AS text"
        database.execute(f"COPY ({query}) TO '{path}' (FORMAT parquet)", values)


@pytest.mark.slow
def test_killed_at_any_stage_and_run_again_gives_the_same_bytes(folders, tmp_path):
    many(folders)
    folders.run()
    expected = read_tars(folders.output)
    folders.output = tmp_path / "again"
    stages = ("*.uids.parquet", "part-*.parquet", "020.tar.json")
    for pattern in stages:
        with subprocess.Popen(
            folders.command("--part", 1500), stderr=subprocess.DEVNULL
        ) as process:
            wait_for(
                lambda pattern=pattern: any((folders.output / ".captions").rglob(pattern)), process
            )
            process.kill()
    done = {path.name: path.stat().st_mtime_ns for path in folders.output.glob("*.tar")}
    assert 20 <= len(done) < 40
    report = folders.run("--part", 1500)
    assert report["shards"]["already there"] >= 20 and report["samples"] == 4000
    assert read_tars(folders.output) == expected and leftovers(folders.output) == []


def test_joined_part_is_kept_for_the_next_run(folders):
    many(folders)
    with subprocess.Popen(folders.command(), stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: (folders.output / "001.tar").exists(), process)
        process.kill()
    report = folders.run()
    assert report["shards"]["written"] < 40 and "join" not in report["seconds"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sign", [".captions/039.tar.uids.parquet", ".captions/work/.part-*.partial", "001.tar"]
)
def test_interrupted_run_says_what_to_do(folders, sign):
    many(folders)
    with duckdb.connect() as database:  # so that the join takes a moment
        more = "SELECT md5(i::VARCHAR) AS uid, uid AS text FROM range(2_000_000) t(i)"
        database.execute(f"COPY ({more}) TO '{folders.metadata}/b.parquet' (FORMAT parquet)")
    with subprocess.Popen(folders.command(), stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: any(folders.output.glob(sign)), process)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and errors.strip().endswith(
        "interrupted; run it again to go on"
    ), errors
    assert "Traceback" not in errors
    assert folders.run()["samples"] == 4000 and leftovers(folders.output) == []


def test_an_interrupted_construction_prints_no_traceback():
    code = """
from lib.report import run_command
class Bar:
    def __init__(self):
        raise KeyboardInterrupt
    def __del__(self):
        self.position
run_command(Bar)
"""
    folder = Path(caption_shards.__file__).parent
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr == "interrupted; run it again to go on\n"


def test_one_run_at_a_time_in_a_folder_for_temporary_files(folders, tmp_path):
    folders.write_three()
    (tmp_path / "temp" / "work").mkdir(parents=True)
    with open(tmp_path / "temp" / "work" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folders.run_failing(
            "--temp", tmp_path / "temp", expected="give this one a --temp of its own"
        )
        folders.run("--temp", tmp_path / "other")
    assert folders.report()["samples"] == 90


# bad input


def test_truncated_metadata_is_one_line_and_loses_nothing(folders):
    folders.write_three()
    folders.run("--shards", NAMES[0])
    before = read_tars(folders.output)
    whole = (folders.metadata / "a.parquet").read_bytes()
    (folders.metadata / "a.parquet").write_bytes(whole[: len(whole) // 2])
    folders.run_failing(
        expected=f"{folders.metadata / 'a.parquet'} can't be read, download it again: "
    )
    assert read_tars(folders.output) == before
    (folders.metadata / "a.parquet").write_bytes(whole)
    assert folders.run()["samples"] == 90


def test_metadata_damaged_inside_is_one_line_that_names_the_file(folders):
    folders.write_three()
    path = folders.metadata / "a.parquet"
    with duckdb.connect() as database:
        query = (
            "SELECT md5(i::VARCHAR) AS uid, md5((i + 1)::VARCHAR) AS text FROM range(50000) t(i)"
        )
        database.execute(f"COPY ({query}) TO '{path}' (FORMAT parquet, COMPRESSION zstd)")
    data = bytearray(path.read_bytes())
    data[len(data) // 4 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
    path.write_bytes(data)
    assert str(path) in folders.run_failing(expected="DuckDB: ")


@pytest.mark.parametrize(
    ("types", "columns", "expected"),
    [
        (
            "VARCHAR, VARCHAR",
            ("uid", "caption"),
            "has no column text; its columns are url, uid, width, caption",
        ),
        (
            "VARCHAR, VARCHAR",
            ("key", "text"),
            "has no column uid; its columns are url, key, width, text",
        ),
        ("BIGINT, VARCHAR", ("uid", "text"), "its column uid is BIGINT, expected VARCHAR or UUID"),
        ("VARCHAR, VARCHAR[]", ("uid", "text"), "its column text is VARCHAR[], expected VARCHAR"),
    ],
)
def test_metadata_with_other_columns_is_told_with_what_it_has(folders, types, columns, expected):
    folders.write_three()
    write_metadata(folders.metadata / "z.parquet", [], types, columns)
    folders.run_failing(expected=expected)


def test_bad_shards_fail_with_one_line_each_and_the_others_go_on(folders, capsys):
    folders.write_three()
    folders.write({NAMES[1]: [uid_of(1000), uid_of(1001)]})
    whole = (folders.shards / NAMES[2]).read_bytes()
    (folders.shards / NAMES[2]).write_bytes(whole[:3000])
    with pytest.raises(SystemExit, match="2 of 3 shards failed; "):
        folders.run()
    report, errors = folders.report(), capsys.readouterr().err
    assert list(read_tars(folders.output)) == [NAMES[0]] and report["samples"] == 30
    assert "a caption for none of its 2 uids" in report["failed"][NAMES[1]]
    assert "is not a whole tar" in report["failed"][NAMES[2]]
    assert all(f"{name}: failed: {error}" in errors for name, error in report["failed"].items())
    (folders.shards / NAMES[2]).write_bytes(whole)
    folders.write({NAMES[1]: [uid_of(1)]})
    assert folders.run()["shards"] == {"already there": 1, "written": 2}
    assert leftovers(folders.output) == []


def test_full_disk_fails_the_shard_and_leaves_nothing_half(folders):
    folders.write_three(300)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    done = subprocess.run(
        folders.command(), preexec_fn=limit, capture_output=True, text=True, timeout=120
    )
    assert (
        done.returncode == 1
        and "3 of 3 shards failed" in done.stderr
        and "File too large" in done.stderr
    )
    assert read_tars(folders.output) == {}
    assert folders.run()["samples"] == 900 and leftovers(folders.output) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--metadata", "nowhere"], "no parquet files there"),
        (["--shards-of", "nowhere"], "no such folder"),
        (["--memory", "much"], "expected a number and MB, GB or TB"),
        (["--memory", "1MB"], "at least 200MB"),
        (["--threads", "0"], "at least 1"),
        (["--part", "-1"], "at least 1"),
        (["--shards", "../{0..1}.tar"], "without '..'"),
        (["--output", "a[b]"], "choose another"),
    ],
)
def test_wrong_options_are_refused(folders, options, expected, capsys):
    folders.write_three(1)
    with pytest.raises(SystemExit) as stopped:
        folders.run(*options)
    assert expected in str(stopped.value) + capsys.readouterr().err
    assert read_tars(folders.output) == {}


def test_output_over_the_reinforcements_is_refused(folders):
    folders.write_three(1)
    for output in (folders.shards, folders.shards / "captions"):
        with pytest.raises(SystemExit, match="choose another folder"):
            folders.run("--output", output)


def test_without_duckdb_one_line_says_what_to_install(folders, tmp_path, monkeypatch):
    folders.write_three(1)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "duckdb.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    folders.run_failing(expected="pip install 'duckdb>=2'")
    assert subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True).returncode == 0


def test_benchmark_prints_the_table_and_leaves_nothing(tmp_path):
    script = ROOT / "scripts" / "benchmarks" / "captions.py"
    options = [
        "--rows",
        3000,
        "--samples",
        2000,
        "--folder",
        tmp_path,
        "--memory",
        "200MB",
        "--threads",
        1,
    ]
    command = [sys.executable, script, *options]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.splitlines()[0].split() == ["captions", "2,000"]
        and list(tmp_path.iterdir()) == []
    )
