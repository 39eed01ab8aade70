"""Exactly the wanted shards are downloaded, each byte once, and never a wrong or partial one."""

import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import download_shards
import pytest
from hub_server import PIECE, hub_server

ROOT = Path(__file__).parents[1]
FACE = ROOT / "scripts" / "download_datacompdr12m.sh"
CAPTIONS, FP32, BF16 = (
    "mlfoundations/DataComp-12M",
    "apple/DataCompDR-12M",
    "apple/DataCompDR-12M-bf16",
)
ONE_B = "apple/DataCompDR-1B"
SIZE = 20 * PIECE + 17  # of a shard here
TOKEN = "hf_SecretTokenThatNobodyMaySee"


def write_repo(folder, repo, names, size=SIZE, card="---\nlicense: apple-amlr\n---\nA card.\n"):
    """A repository's folder: shards of bytes that tell the repository and the shard, and a card."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = hashlib.sha256(f"{repo} {name}".encode()).digest()
        path.write_bytes((seed * (size // 32 + 1))[:size])
    (folder / "README.md").write_text(card)
    return folder


class Place:
    """The repositories on the test's Hub, and where the script brings them."""

    def __init__(self, folder):
        self.folder = folder
        self.captions, self.reinforcements, self.one_b = (
            folder / name for name in ("captions", "dr", "1b")
        )
        names = [f"{number:08d}.tar" for number in range(6)]
        self.repos = {
            repo: write_repo(folder / "hub" / repo, repo, names) for repo in (CAPTIONS, FP32)
        }
        (self.repos[CAPTIONS] / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
        (self.repos[FP32] / "manifest.jsonl").write_text('{"shard": "00000000.tar"}\n')
        for stray in ("stray.bin", "stray.tar", "nested/README.md", "nested/00000000.tar"):
            (self.repos[FP32] / stray).parent.mkdir(exist_ok=True)
            (self.repos[FP32] / stray).write_bytes(b"not asked for")

    def add(self, repo, names, **keywords):
        self.repos[repo] = write_repo(self.folder / "hub" / repo, repo, names, **keywords)

    def environment(self, endpoint, **variables):
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return {
            **clean,
            "PYTHON": sys.executable,
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(self.folder / "hf"),
            "DATACOMP12M_PATH": str(self.captions),
            "DATACOMPDR12M_NOIMG_PATH": str(self.reinforcements),
            "DATACOMPDR1B_NOIMG_PATH": str(self.one_b),
            **variables,
        }

    def run(self, hub, *arguments, **variables):
        command = ["bash", str(FACE), *arguments]
        environment = self.environment(getattr(hub, "url", hub), **variables)
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    def start(self, hub, *arguments, **variables):
        """A run of its own process group, so that its end can be that of a terminal's."""
        return subprocess.Popen(
            ["bash", str(FACE), *arguments],
            env=self.environment(hub.url, **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def same(self, folder, repo):
        """Whether every file in the folder is the repository's, byte for byte."""
        return all(
            data == (self.repos[repo] / name).read_bytes()
            for name, data in list_downloaded(folder).items()
        )


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def list_downloaded(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and ".download" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def partials(folder):
    return {path: path.stat().st_size for path in folder.rglob("*.partial")}


def half_way(folder):
    """Whether a shard has begun to come and is far from its end."""
    return any(0 < size < SIZE // 2 for size in partials(folder).values())


def bytes_in(*folders):
    return sum(len(data) for folder in folders for data in list_downloaded(folder).values())


def until(condition, process):
    for _ in range(3000):
        if condition() or process.poll() is not None:
            break
        time.sleep(0.01)
    assert condition()


def one_line(run, *said):
    """The run failed with one line that says this."""
    assert run.returncode == 1, run.stdout + run.stderr
    assert len(run.stderr.strip().splitlines()) == 1, run.stderr
    for words in said:
        assert words in run.stderr


# what is brought


def test_range_brings_exactly_these_shards_and_the_descriptions_byte_for_byte(place):
    with hub_server(place.repos) as hub:
        run = place.run(hub, "--shards", "1-3")
    assert run.returncode == 0, run.stderr
    shards = [f"{number:08d}.tar" for number in (1, 2, 3)]
    assert sorted(list_downloaded(place.captions)) == [*shards, "README.md"] and place.same(
        place.captions, CAPTIONS
    )
    assert sorted(list_downloaded(place.reinforcements)) == [*shards, "README.md", "manifest.jsonl"]
    assert place.same(place.reinforcements, FP32) and not partials(place.folder)


def test_without_a_range_all_shards_are_brought(place):
    with hub_server(place.repos) as hub:
        assert place.run(hub).returncode == 0
    for folder, repo in ((place.captions, CAPTIONS), (place.reinforcements, FP32)):
        assert len(list_downloaded(folder)) >= 7 and place.same(folder, repo)


def test_files_bytes_and_licences_are_said_before_anything_comes(place):
    with hub_server(place.repos) as hub:
        run = place.run(hub, "--shards", "0-3", "--dry-run")
        assert run.returncode == 0 and hub.sent() == 0
    assert (
        f"{CAPTIONS}: licence cc-by-4.0" in run.stdout
        and f"{FP32}: licence apple-amlr" in run.stdout
    )
    assert (
        f"{hub.url}/datasets/{FP32}" in run.stdout
        and "images have licences of their own" in run.stdout
    )
    assert "5 files, 5.24MB to download" in run.stdout and "6 files" in run.stdout
    assert not place.captions.exists() and not place.reinforcements.exists()


def test_card_without_a_licence_is_said(place):
    place.add(FP32, ["00000000.tar"], card="No licence here.\n")
    with hub_server(place.repos) as hub:
        run = place.run(hub, "--shards", "0", "--dry-run")
    assert f"{FP32}: its card names no licence; read {hub.url}/datasets/{FP32}" in run.stdout


def test_bf16_comes_in_the_place_of_fp32_and_never_among_it(place):
    place.add(BF16, [f"{number:08d}.tar" for number in range(6)], size=SIZE // 2)
    with hub_server(place.repos) as hub:
        assert place.run(hub, "--bf16", "--shards", "0-1").returncode == 0
        assert place.same(place.reinforcements, BF16) and not hub.sent(f"{FP32}/00000000.tar")
        before = list_downloaded(place.reinforcements)
        for shards in ("0-1", "2-3"):
            one_line(place.run(hub, "--shards", shards), str(place.reinforcements), BF16, FP32)
        assert list_downloaded(place.reinforcements) == before


def test_1b_brings_running_numbers_from_its_folders(place):
    names = [
        f"{number // 1000:02d}/{number % 1000:08d}.tar"
        for number in (0, 998, 999, 1000, 1001, 65000, 65535)
    ]
    place.add(ONE_B, names, size=1000)
    with hub_server(place.repos) as hub:
        run = place.run(hub, "--1b", "--shards", "998-1001")
        assert run.returncode == 0, run.stderr
        assert sorted(list_downloaded(place.one_b)) == [*sorted(names[1:5]), "README.md"]
        listed = {
            request.path.rpartition("/")[2] for request in hub.requests if "/tree/" in request.path
        }
        assert {"00", "01"} <= listed and "65" not in listed
        assert place.run(hub, "--1b").returncode == 0
    assert sorted(list_downloaded(place.one_b)) == [*sorted(names), "README.md"] and place.same(
        place.one_b, ONE_B
    )
    assert not place.captions.exists()


# what is brought again


def test_second_run_transfers_nothing(place):
    with hub_server(place.repos) as hub:
        assert place.run(hub, "--shards", "0-1").returncode == 0
        sent = hub.sent()
        run = place.run(hub, "--shards", "0-1")
        assert run.returncode == 0 and "nothing was downloaded" in run.stdout
        assert hub.sent() == sent == bytes_in(place.captions, place.reinforcements)


def test_larger_range_brings_only_the_further_shards(place):
    with hub_server(place.repos) as hub:
        assert place.run(hub, "--shards", "0-1").returncode == 0
        (place.captions / "00000000.tar").unlink()
        run = place.run(hub, "--shards", "0-2")
        assert run.returncode == 0 and "2 files, 2.62MB to download" in run.stdout
        assert hub.sent("00000000.tar") == 3 * SIZE and hub.sent("00000001.tar") == 2 * SIZE


@pytest.mark.parametrize("redirect", [False, True])
def test_broken_transfer_goes_on_where_it_broke(place, redirect):
    with hub_server(place.repos, break_once="00000001.tar", redirect=redirect) as hub:
        run = place.run(hub, "--shards", "0-1")
        assert run.returncode == 0, run.stderr
        assert "00000001.tar: no answer" in run.stderr and "trying again" in run.stderr
        first, second, *_ = (
            request for request in hub.gets("00000001.tar") if request.range or request.sent < SIZE
        )
        assert hub.sent("00000001.tar") == 2 * SIZE  # of two repositories
        assert (first.range, second.range) == (None, f"bytes={first.sent}-")
    assert place.same(place.captions, CAPTIONS) and place.same(place.reinforcements, FP32)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_run_is_run_again_and_brings_only_what_is_missing(place, how):
    with hub_server(place.repos, slow=0.05) as hub:
        process = place.start(hub, "--shards", "0-3", WORKERS="3")
        until(lambda: list(place.captions.glob("*.tar")) and half_way(place.folder), process)
        os.killpg(process.pid, how)
        _, errors = process.communicate(timeout=30)
    assert process.returncode != 0 and "Traceback" not in errors
    if how == signal.SIGINT:
        assert process.returncode == 1 and "interrupted; run it again to go on" in errors
    for folder, repo in ((place.captions, CAPTIONS), (place.reinforcements, FP32)):
        assert place.same(folder, repo)
    there = bytes_in(place.captions, place.reinforcements)
    cut_off = sum(partials(place.folder).values())
    with hub_server(place.repos) as hub:
        assert place.run(hub, "--shards", "0-3").returncode == 0
        assert (
            hub.sent() == bytes_in(place.captions, place.reinforcements) - there - cut_off
            and cut_off > 0
        )
    assert place.same(place.captions, CAPTIONS) and place.same(place.reinforcements, FP32)
    assert not partials(place.folder)


def test_two_runs_at_once_share_the_work(place):
    with hub_server(place.repos, slow=0.02) as hub:
        runs = [place.start(hub, "--shards", "0-3", WORKERS="2") for _ in range(2)]
        files = 0
        for process in runs:
            said, errors = process.communicate(timeout=100)
            assert process.returncode == 0, errors
            files += sum(map(int, re.findall(r"^downloaded (\d+) files", said, re.MULTILINE)))
        assert files == len(list_downloaded(place.captions)) + len(
            list_downloaded(place.reinforcements)
        ), "each counts its own"
        assert Counter(request.path for request in hub.gets(".tar")).most_common(1)[0][1] == 1
        assert hub.sent(".tar") == 8 * SIZE
    assert place.same(place.captions, CAPTIONS) and place.same(place.reinforcements, FP32)


def test_partial_file_with_other_bytes_is_found_out_and_brought_anew(place):
    with hub_server(place.repos, slow=0.05) as hub:
        process = place.start(hub, "--shards", "0", WORKERS="1")
        until(lambda: max(partials(place.captions).values(), default=0) > 1000, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    (partial,) = partials(place.captions)
    partial.write_bytes(b"!" + partial.read_bytes()[1:])
    with hub_server(place.repos) as hub:
        run = place.run(hub, "--shards", "0")
    assert run.returncode == 0 and "SHA-256" in run.stderr
    assert place.same(place.captions, CAPTIONS) and "00000000.tar" in list_downloaded(
        place.captions
    )


def test_answer_that_does_not_end_is_ended_soon_after_the_files_size(place, monkeypatch):
    listed = download_shards.File(
        CAPTIONS, "main", "00000000.tar", 1000, "0" * 64, True, place.captions
    )
    download_shards.prepare_folders([listed])
    come = []
    with hub_server(place.repos) as hub:  # whose file has SIZE bytes
        url = f"{hub.url}/datasets/{CAPTIONS}/resolve/main/00000000.tar"
        monkeypatch.setattr(download_shards, "hf_hub_url", lambda *_, **__: url)
        download_shards.stream(listed, come.append, threading.Event())
        assert 1000 < sum(come) < SIZE // 2
        with pytest.raises(download_shards.HubError, match="not what the Hub lists"):
            download_shards.check(listed, come.append)
    assert sum(come) == 0 and not partials(place.captions)


# what is refused


def test_shards_that_a_data_set_lacks_are_named_before_anything_comes(place):
    (place.repos[FP32] / "00000004.tar").unlink()
    with hub_server(place.repos) as hub:
        one_line(
            place.run(hub, "--shards", "3-7"),
            CAPTIONS,
            "00000006.tar, 00000007.tar (2 of 5",
            "nothing was",
        )
        one_line(place.run(hub, "--shards", "3-5"), FP32, "00000004.tar (1 of 3")
        assert hub.sent() == 0
    assert not place.captions.exists()


def test_shard_of_another_size_is_never_overwritten(place):
    place.captions.mkdir()
    (place.captions / "00000001.tar").write_bytes(b"mine")
    with hub_server(place.repos) as hub:
        one_line(
            place.run(hub, "--shards", "0-1"), "00000001.tar has 4 bytes", str(SIZE), "remove it"
        )
        assert hub.sent() == 0
    assert list_downloaded(place.captions) == {"00000001.tar": b"mine"}


def test_disk_that_is_too_small_is_refused_before_anything_comes(place):
    """On a tmpfs of 3 MB, where this user may mount one."""
    place.captions.mkdir()
    mount = f"mount -t tmpfs -o size=3m tmpfs {shlex.quote(str(place.captions))}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no mounting here")
    with hub_server(place.repos) as hub:
        for shards, status in (("0-3", 1), ("0-1", 0)):
            command = f"{mount} && bash {FACE} --shards {shards}; echo status $?; "
            command += f"find {place.captions} -name '*.tar'"
            run = subprocess.run(
                ["unshare", "-rm", "sh", "-c", command],
                env=place.environment(hub.url),
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert f"status {status}" in run.stdout, run.stderr
            if status:
                assert (
                    hub.sent() == 0
                    and "5.24MB are to be downloaded" in run.stderr
                    and "3.15MB free" in run.stderr
                )
                assert len(run.stderr.strip().splitlines()) == 1 and ".tar" not in run.stdout
            else:
                assert run.stdout.count(".tar") == 2


def test_disk_that_fills_up_fails_with_one_line_and_nothing_half(place):
    """A limit of file size stands in for a disk that was not full when it was checked."""
    command = f"ulimit -f 600; exec bash {FACE} --shards 0"
    with hub_server(place.repos) as hub:
        run = subprocess.run(
            ["bash", "-c", command],
            env=place.environment(hub.url),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert run.returncode == 1 and "Traceback" not in run.stderr
        assert "00000000.tar: writing: File too large. Run it again to go on" in run.stderr
        assert not list(place.captions.glob("*.tar"))
        assert place.run(hub, "--shards", "0").returncode == 0
    assert place.same(place.captions, CAPTIONS)


# the network and the token


def test_token_is_sent_to_the_hub_alone_and_never_shown(place):
    with hub_server(place.repos, token=TOKEN, redirect=True, break_once="00000000.tar") as hub:
        run = place.run(hub, "--shards", "0", HF_TOKEN=TOKEN)
        assert run.returncode == 0 and TOKEN not in run.stdout + run.stderr, run.stderr
        asked, redirected = (
            [r for r in hub.requests if r.path.startswith("/cdn/") is cdn] for cdn in (False, True)
        )
        assert redirected and not any("authorization" in request.headers for request in redirected)
        files = [request for request in asked if "/datasets/" in request.path]
        assert {request.headers.get("authorization") for request in files} == {f"Bearer {TOKEN}"}
    assert place.same(place.reinforcements, FP32)
    held = (path for path in place.folder.rglob("*") if path.is_file())
    assert not any(TOKEN.encode() in path.read_bytes() for path in held)


def test_token_that_was_logged_in_with_is_found_in_hf_home(place):
    (place.folder / "hf").mkdir()
    (place.folder / "hf" / "token").write_text(TOKEN)
    with hub_server(place.repos, token=TOKEN) as hub:
        assert place.run(hub, "--shards", "0").returncode == 0


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, "without a token (401): set HF_TOKEN"),
        ("hf_AnotherSecret", "may not read mlfoundations/DataComp-12M (401): set another one"),
        ("hf_Another\x01Secret", "HF_TOKEN contains a space"),
    ],
)
def test_missing_or_wrong_token_is_one_line_without_it(place, token, said):
    with hub_server(place.repos, token=TOKEN) as hub:
        run = place.run(hub, "--shards", "0", **({"HF_TOKEN": token} if token else {}))
    one_line(run, said)
    assert "hf_Another" not in run.stdout + run.stderr and not place.captions.exists()


def test_gated_data_set_says_where_to_accept_its_terms(place):
    with hub_server(place.repos, gated=[FP32]) as hub:
        run = place.run(hub, "--shards", "0", WORKERS="1", HF_TOKEN=TOKEN)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert f"accept its terms on {hub.url}/datasets/{FP32}" in run.stderr


def test_absent_data_set_is_one_line(place):
    with hub_server({CAPTIONS: place.repos[CAPTIONS]}) as hub:
        one_line(place.run(hub, "--shards", "0"), f"no data set {FP32}", "404")
        assert hub.sent() == 0


def test_no_network_is_one_line(place):
    with hub_server(place.repos) as hub:
        pass  # its port answers no more
    one_line(place.run(hub, "--shards", "0"), "no answer from 127.0.0.1", "check the network")
    one_line(place.run("hub", "--shards", "0"), "HF_ENDPOINT is no URL")
    one_line(place.run(hub, "--shards", "0", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE")
    assert not place.captions.exists()


def test_network_that_goes_away_gives_up_with_one_line_and_keeps_what_came(place):
    with hub_server(place.repos, slow=0.05) as hub:
        process = place.start(hub, "--shards", "0", "--tries", "1", WORKERS="1")
        until(lambda: max(partials(place.captions).values(), default=0) > 1000, process)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors
    assert "files are missing" in errors and "Run it again to go on" in errors
    assert partials(place.captions)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shards", "3-1"], "such as 0-3"),
        (["--shards", "{0..3}"], "such as 0-3"),
        (["--shards", "99999999999"], "such as 0-3"),
        (["--workers", "0"], "1 or more"),
        (["--repo", "one-word", "folder"], "such as apple/DataCompDR-12M"),
        (["--repo", FP32, "captions"], "folder of its own"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit) as refused:
        download_shards.main(["--repo", CAPTIONS, "captions", *arguments])
    assert refused.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_bf16_of_1b_is_refused(place):
    one_line(place.run("unused", "--bf16", "--1b"), "remove --bf16 or --1b")


def test_help_names_the_settings_and_the_options(place):
    run = place.run("unused", "--help")
    assert run.returncode == 0
    for said in ("DATACOMP12M_PATH", "--bf16", "--1b", "--shards", "--dry-run"):
        assert said in run.stdout
