"""Every image that exists is downloaded under its uid; the others have a reason; runs resume.

The first test that starts scripts/download_images.sh makes .venv-img2dataset, in a minute or two.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import join_shards
import numpy as np
import pytest
from conftest import environment, run
from image_server import serving
from lib.http import bounded_opener
from PIL import Image
from shards import encode, picture, read_samples, uid, write_shard

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "download_images.sh"
INSTALLING = 1200  # seconds that a run may take, the first one's installation included
QUICK = ("--processes", 1, "--threads", 8, "--timeout", 2, "--retries", 0)
NAMES = ("downloaded", "dead", "changed (sha256 differs)", "refused", "undecodable")


class Folders:
    """Captions with URLs, reinforcements with the sha256, and where the images go."""

    def __init__(self, folder):
        self.captions, self.reinforcements, self.images = (
            folder / name for name in ("captions", "dr", "images")
        )

    def write(self, name, samples):
        """Write a shard of ``(seed, URL, embedded bytes)`` to captions and reinforcements."""
        captions, reinforcements = [], []
        for seed, url, image in samples:
            sha256 = hashlib.sha256(image).hexdigest()
            captions.append(
                (uid(seed), {"url.txt": url.encode(), "txt": f"caption {seed}".encode()})
            )
            reinforced = {
                "url.txt": url.encode(),
                "syn.json": b"{}",
                "paug.json": b"{}",
                "npz": b"embeddings",
            }
            reinforced["json"] = json.dumps({"uid": uid(seed), "sha256": sha256}).encode()
            reinforcements.append((uid(seed), reinforced))
        write_shard(self.captions / name, captions)
        write_shard(self.reinforcements / name, reinforcements)

    def command(self, *options):
        return [str(part) for part in ("bash", SCRIPT, *QUICK, *options)]

    def environment(self, one_b=False):
        paths = {"DATACOMP12M_PATH": self.captions, "DATACOMPDR12M_NOIMG_PATH": self.reinforcements}
        paths = {"DATACOMPDR1B_NOIMG_PATH": self.reinforcements} if one_b else paths
        paths["DATACOMP1B_IMAGES_PATH" if one_b else "DATACOMP12M_IMAGES_PATH"] = self.images
        return environment(
            no_proxy="127.0.0.1", **{name: str(path) for name, path in paths.items()}
        )

    def download(self, *options, **keywords):
        one_b = "--1b" in options
        return run(
            self.command(*options), timeout=INSTALLING, env=self.environment(one_b), **keywords
        )

    def downloaded(self, name):
        return read_samples(self.images / name)

    def tars(self):
        visible = (path.relative_to(self.images).as_posix() for path in self.images.rglob("*.tar"))
        return sorted(name for name in visible if not name.startswith("."))

    def report(self):
        return json.loads((self.images / "download_report.json").read_text())

    def outcomes(self):
        """{shard: {uid: (outcome, error_message)}}, read by an interpreter that has pyarrow."""
        own = (
            Path(os.environ.get("IMG2DATASET_VENV", ROOT / ".venv-img2dataset")) / "bin" / "python"
        )
        python = os.environ.get("IMG2DATASET_PYTHON") or (own if own.exists() else sys.executable)
        code = "import json, sys; from pyarrow.parquet import read_table\n"
        code += "print(json.dumps([read_table(path).to_pylist() for path in sys.argv[1:]]))"
        done = run(
            [
                python,
                "-c",
                code,
                *((self.images / name).with_suffix(".parquet") for name in self.tars()),
            ]
        )
        return {
            name: {row["uid"]: (row["outcome"], row["error_message"]) for row in rows}
            for name, rows in zip(self.tars(), json.loads(done.stdout), strict=True)
        }


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path)


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


# one run over all that can happen to an image: shards 5 to 7 of 4 to 8, of different lengths


class Web(Folders):
    """What is asked for, by what becomes of it, and what came."""

    def __init__(self, folder, server):
        super().__init__(folder)
        self.plain = encode(picture(0))
        self.big = encode(picture(1, height=600, width=900))
        alpha = Image.new("RGBA", (40, 30), (200, 0, 0, 0))
        alpha.paste((0, 0, 200, 255), (0, 0, 20, 30))
        self.alpha = encode(alpha, "PNG")
        self.secret = folder / "secret.jpg"
        self.secret.write_bytes(self.plain)
        self.ftp = socket.create_server(("127.0.0.1", 0))
        ftp = f"ftp://127.0.0.1:{self.ftp.getsockname()[1]}/a.jpg"

        def redirect(path, to):
            return server.add(path, status=302, headers={"Location": to})

        def page(path, body=self.plain, **keywords):
            return server.add(path, body, **keywords)

        bomb = encode(Image.new("1", (17_000, 17_000)), "PNG")  # 36 KB
        html = b"<html><body>This picture has moved</body></html>"
        self.samples = {  # seed: (outcome, words of the error, URL, what was embedded)
            0: ("downloaded", None, page("/plain"), self.plain),
            1: ("downloaded", None, page("/big", self.big), self.big),
            2: ("downloaded", None, page("/alpha", self.alpha), self.alpha),
            3: ("downloaded", None, redirect("/moved", page("/new")), self.plain),
            4: (
                "downloaded",
                None,
                page("/a%20%E7%8B%97%2B").replace("%20%E7%8B%97", " 狗"),
                self.plain,
            ),
            10: ("downloaded", None, page("/spaces") + " \n", self.plain),
            11: ("dead", "404", server.url("/missing"), self.plain),
            12: ("dead", "500", page("/broken", status=500), self.plain),
            13: ("dead", "timed out", page("/slow", slow=True), self.plain),
            14: ("dead", "IncompleteRead", page("/cut", self.big, cut=1000), self.big),
            15: (
                "dead",
                "resolution|known|resolve|address",
                "http://no-such-host.invalid/a.jpg",
                self.plain,
            ),
            16: ("changed", "hash mismatch", page("/other", encode(picture(9))), self.plain),
            17: ("undecodable", "pixels", page("/bomb", bomb), bomb),
            20: (
                "undecodable",
                "decod",
                page("/html", html, headers={"Content-Type": "text/html"}),
                self.plain,
            ),
            21: (
                "refused",
                "X-Robots-Tag",
                page("/noai", headers={"X-Robots-Tag": "noai"}),
                self.plain,
            ),
            22: ("refused", "403", page("/forbidden", status=403), self.plain),
            23: ("refused", "429", page("/busy", status=429), self.plain),
            24: ("refused", "unknown url type", self.secret.as_uri(), self.plain),
            25: ("refused", "unknown url type", ftp, self.plain),
            26: ("refused", "not allowed", redirect("/to-file", self.secret.as_uri()), self.plain),
            27: ("refused", "unknown url type", redirect("/to-ftp", ftp), self.plain),
            28: ("refused", "unknown url type", "data:image/png;base64,AAAA", self.plain),
            29: ("downloaded", None, server.url("/plain"), self.plain),
        }
        self.shard_of = {seed: f"{5 + seed // 10:08d}.tar" for seed in self.samples}
        for name in sorted(set(self.shard_of.values())):
            self.write(name, [(seed, *self.samples[seed][2:]) for seed in self.seeds(name)])
        for name in ("00000004.tar", "00000008.tar"):
            self.write(name, [(90, server.url("/not-asked-for"), self.plain)])
        captions = read_samples(self.captions / "00000005.tar")
        write_shard(
            self.captions / "00000005.tar", [*captions.items(), (uid(80), {"txt": b"no URL"})]
        )

    def seeds(self, name, *outcomes):
        here = [seed for seed in self.samples if self.shard_of[seed] == name]
        return [seed for seed in here if not outcomes or self.samples[seed][0] in outcomes]


@pytest.fixture(scope="module")
def web(tmp_path_factory, server):
    web = Web(tmp_path_factory.mktemp("web"), server)
    web.done = web.download("--shards", "5-7")
    assert web.done.returncode == 0, web.done.stderr
    web.found = web.outcomes()
    return web


def test_image_shards_have_the_names_and_the_samples_of_the_shards_asked_for(web, server):
    assert web.tars() == ["00000005.tar", "00000006.tar", "00000007.tar"]
    for name in web.tars():
        assert list(web.downloaded(name)) == [uid(seed) for seed in web.seeds(name, "downloaded")]
        assert list(web.found[name]) == [uid(seed) for seed in web.seeds(name)]
    assert server.hits["/not-asked-for"] == 0


def test_every_sample_has_its_outcome_and_the_reason(web):
    for seed, (outcome, words, url, _) in web.samples.items():
        found, error = web.found[web.shard_of[seed]][uid(seed)]
        assert found == outcome, (url, found, error)
        assert error is None if words is None else re.search(words, error), (url, found, error)


def test_nothing_but_http_is_opened(web):
    web.ftp.settimeout(0)
    with pytest.raises(BlockingIOError):
        web.ftp.accept()  # neither the URL nor the redirect led here
    found = web.found["00000007.tar"]
    assert (
        found[uid(24)][0] == found[uid(26)][0] == "refused"
    )  # though the file is the very picture


@pytest.mark.parametrize(
    "bounds, words", [((1000, 10), "more than 1000 bytes"), ((10**6, -1), "not at its end after")]
)
def test_answers_are_bounded_in_bytes_and_seconds(server, bounds, words):
    url = server.add("/long", bytes(100_000))
    assert len(bounded_opener(10**6, 10).open(url, timeout=10).read()) == 100_000
    with pytest.raises((ValueError, TimeoutError), match=words):
        bounded_opener(*bounds).open(url, timeout=10).read()


def test_url_that_drips_is_given_up_in_its_headers_and_over_redirects(server):
    opener = bounded_opener(10**6, 1)
    endless = server.add("/drip", drip=300)
    last = server.add("/drip/0", b"there", drip=6)  # alone it is in time
    assert opener.open(last, timeout=10).read() == b"there"
    for i in range(1, 4):
        last = server.add(f"/drip/{i}", status=302, headers={"Location": last}, drip=6)
    for url in (endless, last):
        with pytest.raises(TimeoutError):
            opener.open(url, timeout=10).read()


def test_json_carries_uid_and_the_sha256_of_the_bytes_as_downloaded(web):
    for seed in (0, 1, 2):
        about = json.loads(web.downloaded("00000005.tar")[uid(seed)]["json"])
        assert (
            about["uid"] == uid(seed)
            and about["status"] == "success"
            and about["url"] == web.samples[seed][2]
        )
        assert about["sha256"] == hashlib.sha256(web.samples[seed][3]).hexdigest()


def test_images_are_jpegs_of_at_most_512_pixels_and_small_ones_are_not_enlarged(web):
    images = {
        seed: Image.open(io.BytesIO(web.downloaded("00000005.tar")[uid(seed)]["jpg"]))
        for seed in (0, 1, 2)
    }
    assert {seed: (img.format, img.size) for seed, img in images.items()} == {
        0: ("JPEG", (48, 40)),
        1: ("JPEG", (512, 341)),
        2: ("JPEG", (40, 30)),
    }
    expected = np.asarray(Image.open(io.BytesIO(web.big)).resize((512, 341), Image.BOX), int)
    assert np.abs(np.asarray(images[1], int) - expected).mean() < 3
    assert np.asarray(images[2])[:, 25:].min() > 240  # transparent becomes white


def test_table_and_report_count_every_sample_and_say_where_they_are_listed(web):
    counts = Counter(outcome for outcome, *_ in web.samples.values())
    report = web.report()
    assert (
        report["outcomes"] == counts
        and report["samples"] == len(web.samples)
        and report["shards"] == 3
    )
    assert report["without_url"] == 1 and report["unverified"] == 0 and report["failed"] == {}
    lines = web.done.stdout.splitlines()
    for name in NAMES:
        (line,) = [line for line in lines if line.startswith(f"{name}  ")]
        assert str(counts[name.split(" (")[0]]) in line.split()
    assert any("<shard>.parquet" in line and str(web.images) in line for line in lines)
    assert len(lines) <= 8  # what img2dataset prints is in its log
    assert "Sharding file" in (web.images / "img2dataset.log").read_text()


def test_join_takes_the_image_shards(web, tmp_path):
    folders = (web.captions, web.images, web.reinforcements)
    sources = [option for folder in folders for option in ("--source", str(folder))]
    join_shards.main(
        [
            *sources,
            "--output",
            str(tmp_path),
            "--shards",
            "{00000005..00000007}.tar",
            "--verify-hash",
        ]
    )
    for name in web.tars():
        joined = read_samples(tmp_path / name)
        assert list(joined) == [uid(seed) for seed in web.seeds(name, "downloaded")]
        for seed in web.seeds(name, "downloaded"):
            assert joined[uid(seed)]["txt"] == f"caption {seed}".encode()
            assert joined[uid(seed)]["jpg"] == web.downloaded(name)[uid(seed)]["jpg"]
    report = json.loads((tmp_path / "join_report.json").read_text())
    assert "a changed image (sha256)" not in report["left_out"] and report["unverified"] == 0


def test_nothing_is_fetched_again_and_nothing_left_over(web, server):
    before, hits = (
        {path: path.stat().st_mtime_ns for path in web.images.glob("0*")},
        Counter(server.hits),
    )
    again = web.download("--shards", "{00000005..00000007}.tar")
    assert again.returncode == 0 and again.stdout == web.done.stdout
    assert {
        path: path.stat().st_mtime_ns for path in web.images.glob("0*")
    } == before and server.hits == hits
    assert not any((web.images / ".img2dataset").iterdir())
    assert not [path for path in web.images.rglob("*") if "partial" in path.name]


# interrupted


def processes_of(folders):
    """The processes that were started with these folders in their environment."""
    found, mark = [], f"DATACOMP12M_IMAGES_PATH={folders.images}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            found += [path.parent.name] if mark in path.read_bytes().split(b"\0") else []
    return found


def wait_for(condition, seconds=120):
    for _ in range(10 * seconds):
        if condition():
            return True
        time.sleep(0.1)
    return False


def test_killed_download_is_run_again_with_the_result_of_an_uninterrupted_one(folders):
    with serving() as server:  # it is released by this test
        kill_and_run_again(folders, server)


def kill_and_run_again(folders, server):
    body = encode(picture(3))
    fast = [(i, server.add(f"/fast/{i}", body), body) for i in range(3)]
    slow = [(10 + i, server.add(f"/gate/{i}", body, slow=True), body) for i in range(2)]
    folders.write("00000000.tar", fast)
    folders.write("00000001.tar", slow)

    def interrupt(number, when):
        command = [*folders.command(), "--timeout", "60"]
        process = subprocess.Popen(
            command, env=folders.environment(), stderr=subprocess.PIPE, text=True
        )
        try:
            assert wait_for(when), "it got nowhere"
            process.send_signal(number)
            return process.wait(30), process.stderr.read()
        finally:
            process.kill()

    # img2dataset has finished shard 0, which may not have its name yet, and is at shard 1
    status, _ = interrupt(
        signal.SIGKILL,
        lambda: server.hits["/gate/0"] and list(folders.images.rglob("00000000_stats.json")),
    )
    assert status == -signal.SIGKILL
    assert wait_for(lambda: not processes_of(folders), 30), "img2dataset outlives the script"

    server.hits.clear()
    status, said = interrupt(signal.SIGINT, lambda: server.hits["/gate/0"])
    assert status == 1 and said.strip().splitlines()[-1] == "interrupted; run it again to go on"
    assert wait_for(lambda: not processes_of(folders))
    assert folders.tars() == ["00000000.tar"] and list(folders.downloaded("00000000.tar")) == [
        uid(i) for i in range(3)
    ]

    server.released.set()
    done = folders.download()
    assert done.returncode == 0, done.stderr
    assert not [path for path in server.hits if path.startswith("/fast/")], (
        "a finished shard was fetched again"
    )
    assert not any((folders.images / ".img2dataset").iterdir())
    assert folders.report()["outcomes"]["downloaded"] == 5

    interrupted = [(folders.images / name).read_bytes() for name in folders.tars()]
    folders.images = folders.images.parent / "uninterrupted"
    assert folders.download().returncode == 0
    assert [(folders.images / name).read_bytes() for name in folders.tars()] == interrupted


# DataCompDR-1B, and shards that fail


def test_a_data_set_by_name_takes_the_urls_from_whichever_shards_have_them(folders, server):
    data = encode(picture(3))
    folders.write("00000000.tar", [(3, server.add("/by-name", data), data)])
    write_shard(folders.captions / "00000000.tar", [(uid(3), {"txt": b"a caption"})])
    settings = {
        "DFNDR12M_CAPTIONS_PATH": folders.captions,
        "DFNDR12M_NOIMG_PATH": folders.reinforcements,
        "DFNDR12M_IMAGES_PATH": folders.images,
    }
    environ = environment(no_proxy="127.0.0.1", **{k: str(v) for k, v in settings.items()})
    done = run(folders.command("--dataset", "dfndr12m"), timeout=INSTALLING, env=environ)
    assert done.returncode == 0, done.stderr
    assert folders.downloaded("00000000.tar")[uid(3)]["jpg"]
    assert folders.report()["unverified"] == 0


def test_shards_of_1b_get_their_folders_and_a_bad_one_fails_alone(folders, server):
    body = encode(picture(4))
    page = server.add("/flaky", body, first_status=503)
    folders.write("01/00000001.tar", [(1, page, body)])
    folders.write(
        "01/00000003.tar",
        [(3, server.add("/three", body), body), (4, server.url("/three"), b"another")],
    )
    folders.write("01/00000004.tar", [(5, server.url("/gone"), body)])
    damaged = folders.reinforcements / "01" / "00000000.tar"
    damaged.write_bytes((damaged.parent / "00000001.tar").read_bytes()[:1000])
    write_shard(damaged.with_name("00000002.tar"), [(uid(2), {"txt": b"without a URL"})])

    done = folders.download("--1b", "--shards", "1000-1004", "--retries", 1)
    failed = folders.report()["failed"]
    assert (
        done.returncode == 1
        and "2 of 5 shards failed" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert "not a whole tar" in failed["01/00000000.tar"] and "url.txt" in failed["01/00000002.tar"]
    assert folders.tars() == ["01/00000001.tar", "01/00000003.tar", "01/00000004.tar"]
    assert (
        folders.downloaded("01/00000004.tar") == {}
    )  # all its URLs are dead: it is finished, and empty
    assert list(folders.downloaded("01/00000001.tar")) == [uid(1)]  # by the second try
    assert list(folders.downloaded("01/00000003.tar")) == [uid(3)]
    assert folders.outcomes()["01/00000003.tar"][uid(4)] == ("changed", "hash mismatch")


def test_a_shard_that_could_not_be_written_whole_is_not_taken_for_finished(folders, server):
    noise = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    )
    body = encode(noise)
    folders.write("00000000.tar", [(i, server.add("/noise", body), body) for i in range(8)])
    # a file may have 1 MiB, as if the disk were full
    command = f"ulimit -f 1024; exec {' '.join(folders.command())}"
    done = run(["bash", "-c", command], timeout=INSTALLING, env=folders.environment())
    assert done.returncode == 1 and "00000000.tar: failed: img2dataset" in done.stderr, done.stderr
    assert folders.tars() == []
    assert folders.download("--no-verify-hash").returncode == 0
    assert len(folders.downloaded("00000000.tar")) == 8
    assert folders.report()["unverified"] == 8


def test_finished_downloads_are_kept_until_the_shard_can_be_written(folders, server):
    body = encode(picture(5))
    folders.write("00000000.tar", [(i, server.add(f"/kept/{i}", body), body) for i in range(3)])
    obstacle = folders.images / "00000000.tar"
    obstacle.mkdir(parents=True)  # as a full disk would be, but at once
    for _ in range(2):  # img2dataset done, and then what a run finds that another has left
        done = folders.download()
        last = done.stderr.splitlines()[-1]
        assert (
            done.returncode == 1 and last.startswith(f"error: {obstacle}: ") and "make room" in last
        ), done.stderr
        assert "Traceback" not in done.stderr
    obstacle.rmdir()
    assert folders.download().returncode == 0
    assert list(folders.downloaded("00000000.tar")) == [uid(i) for i in range(3)]
    assert {server.hits[f"/kept/{i}"] for i in range(3)} == {1}, "they were fetched again"
    assert not any((folders.images / ".img2dataset").iterdir())


def test_strange_metadata_costs_no_other_sample(folders, server):
    body = encode(picture(6))
    url = server.add("/strange", body).encode()

    def sample(key, about):
        return key, {"url.txt": url, "json": about}

    about = {"sha256": hashlib.sha256(body).hexdigest()}
    samples = [sample(uid(i), json.dumps({"uid": uid(i), **about}).encode()) for i in range(2)]
    samples.append(sample(uid(2), b'{"sha256": "\\ud800"}'))
    samples[0][1]["url.txt"] = b"\xef\xbb\xbf " + url + b"\r\n"  # a byte order mark
    bad = [sample("a", b'{"uid": "\\ud800"}'), sample("b", b"["), sample("c", b"[" * 200_000)]
    bad += [(uid(4), {"url.txt": url + b"\xff"}), (uid(5), {"url.txt": b" \n"})]
    write_shard(folders.captions / "00000000.tar", [*samples, *bad, (uid(3), {"txt": b"no URL"})])
    left = folders.images / ".img2dataset" / "new-left"
    left.mkdir(parents=True)  # by a run that was killed at its beginning, long ago
    os.utime(left, (0, 0))
    done = folders.download()
    assert done.returncode == 0, done.stderr
    assert list(folders.downloaded("00000000.tar")) == [uid(i) for i in range(3)]
    report = folders.report()
    assert [report[count] for count in ("samples", "unverified", "unusable", "without_url")] == [
        3,
        1,
        4,
        2,
    ]
    assert re.search(r"^without a URL in the shard +2 ", done.stdout, re.MULTILINE)
    assert re.search(r"^unusable in the shard .* 4 ", done.stdout, re.MULTILINE)
    assert not any((folders.images / ".img2dataset").iterdir())

    # what img2dataset itself made isn't taken for this script's
    write_shard(folders.images / "00000007.tar", [])
    (folders.images / "00000007_stats.json").write_text(
        '{"count": 3, "successes": 3, "duration": 1.5}'
    )
    done = folders.download()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "00000007.tar is not of this script" in done.stderr.splitlines()[-1]
        and "choose another --output" in done.stderr
    )


# bad input


@pytest.mark.parametrize(
    "options, line",
    [
        (("--shards", "0-3"), "--shards 0-3: 3 of these 4 are in"),
        (("--shards", "3-1"), "--shards 3-1: the first is greater than the last"),
        (("--shards", "{0..1}"), "found 0"),
        (("--shards", "../{00000000..00000001}.tar"), "found ../00000000.tar"),
        (("--shards", "{00000002..00000003}.tar"), "00000003.tar is not in"),
        (("--processes", "0"), "--processes 0: expected at least 1"),
        (("--distributor", "smoke"), "invalid choice: 'smoke'"),
        (("--distributor", "ray"), "no ray for"),
        (("--shards", "2"), "1 of 1 shards are not in"),
        (
            ("--output", "captions/images"),
            "--output captions/images is the folder of --input or inside it",
        ),
        (("--reinforcements", "nowhere"), "--reinforcements nowhere: no such folder"),
    ],
)
def test_bad_options_get_one_line(folders, options, line):
    for number in range(2):
        folders.write(f"{number:08d}.tar", [(number, "http://127.0.0.1:9/", b"")])
    write_shard(folders.captions / "00000002.tar", [(uid(2), {"url.txt": b"http://127.0.0.1:9/"})])
    done = run(
        ["bash", SCRIPT, *options],
        timeout=INSTALLING,
        env=folders.environment(),
        cwd=folders.captions.parent,
    )
    assert done.returncode != 0 and line in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr and not folders.images.exists()


def test_missing_folder_and_help_need_no_img2dataset(folders, tmp_path):
    missing = folders.download()
    assert missing.returncode == 1 and missing.stderr.splitlines()[-1].startswith(
        f"error: no folder {folders.captions} (DATACOMP12M_PATH): "
        "run `bash scripts/download_datacompdr12m.sh"
    )
    told = run(["bash", SCRIPT, "--help"], env=environment(IMG2DATASET_VENV=str(tmp_path / "venv")))
    assert (
        told.returncode == 0 and "--shards A-B" in told.stdout and not (tmp_path / "venv").exists()
    )


def test_without_img2dataset_the_python_script_says_how_to_get_it(folders):
    command = [
        sys.executable,
        ROOT / "scripts" / "download_images.py",
        "--input",
        ".",
        "--output",
        folders.images,
    ]
    done = run(command, env=environment())
    if done.returncode == 1 and "img2dataset" not in done.stderr:
        pytest.skip("img2dataset can be imported here")
    assert "scripts/download_images.sh, which makes an environment with img2dataset" in done.stderr
