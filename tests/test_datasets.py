"""--dataset NAME: one table of data sets, which all commands use, from the Hub to the joined shards."""

import hashlib
import json
import re
import shutil
import sys

import download_images
import download_shards
import join_shards
import pytest
import verify_shards
from conftest import ROOT, environment, run
from hub_server import hub_server
from lib.config import read_config
from lib.datasets import DATASETS, REINFORCED
from shards import dfndr_sample, encode, picture, read_samples, uid, write_shard

import hf_dataset_example
from dr.sample import embeddings

COCO, CONTEXT = "syn_text_dfn_mscoco38k", "syn_text_dfn_context77"
NAME = "00000000.tar"


def reinforcement(seed, *lost, originals=1):
    """A sample of DFNDR as its reinforcement shards may hold it, without an image."""
    members = dfndr_sample(seed, {COCO: 3, CONTEXT: 2}, originals=originals, unit=True)
    sha256 = hashlib.sha256(members["jpg"]).hexdigest()
    about = {"uid": uid(seed), "sha256": sha256, **json.loads(members.get("json", b"{}"))}
    members |= {"json": json.dumps(about).encode(), "url.txt": b"http://127.0.0.1:9/"}
    return uid(seed), {name: data for name, data in members.items() if name not in ("jpg", *lost)}


def image(number, seed):
    """A sample as img2dataset writes it."""
    jpeg = dfndr_sample(seed, {COCO: 1})["jpg"]
    about = {"uid": uid(seed), "status": "success", "sha256": hashlib.sha256(jpeg).hexdigest()}
    return f"{number:09d}", {"jpg": jpeg, "json": json.dumps(about).encode()}


class Folders:
    """The folders of DFNDR-12M, by their settings."""

    def __init__(self, folder):
        self.captions, self.images, self.reinforcements, self.output = (
            folder / name for name in ("captions", "images", "noimage", "joined")
        )

    def settings(self):
        return {
            "DFNDR12M_IMAGES_PATH": str(self.images),
            "DFNDR12M_NOIMG_PATH": str(self.reinforcements),
            "DFNDR12M_PATH": str(self.output),
        }

    def write(self, *reinforcements):
        write_shard(self.reinforcements / NAME, reinforcements)
        seeds = [int(key, 16) for key, _ in reinforcements]
        write_shard(self.images / NAME, [image(n, seed) for n, seed in enumerate(seeds)])


@pytest.fixture
def folders(tmp_path, monkeypatch):
    folders = Folders(tmp_path)
    for setting, path in folders.settings().items():
        monkeypatch.setenv(setting, path)
    return folders


def test_the_table_names_configs_that_exist_and_the_documentation_names_the_data_sets():
    docs = (ROOT / "docs" / "data.md").read_text()
    for name, dataset in DATASETS.items():
        assert f"`{name}`" in docs and f"`{dataset.repository}`" in docs, name
    for name in REINFORCED:
        read_config(DATASETS[name].config_path)
    assert {DATASETS[name].licence for name in DATASETS if name.startswith("dfndr")} == {
        "CC-BY-NC-ND"
    }


@pytest.mark.parametrize(
    ("main", "accepted"),
    [
        (download_shards.main, list(DATASETS)),
        (download_images.main, list(DATASETS)),
        (join_shards.main, REINFORCED),
        (verify_shards.main, REINFORCED),
    ],
)
def test_help_lists_the_data_sets_and_the_settings_of_their_folders(main, accepted, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in told.splitlines() if line.strip()}
    for name in accepted:
        assert rows[name][0] == DATASETS[name].repository, name
    assert ("datacomp12m" in rows) == ("datacomp12m" in accepted)
    assert rows["datacompdr1b"][1] == "65,536" and rows["dfndr2b"][1:3] == ["unknown", "unknown"]
    assert rows["dfndr12m"][-1] == "CC-BY-NC-ND"
    assert any(setting.startswith("DFNDR2B_") for setting in rows)


def test_bf16_sets_share_the_folders_and_the_config_of_their_float32_set():
    for name in ("datacompdr12m", "dfndr12m"):
        one, other = DATASETS[name], DATASETS[f"{name}-bf16"]
        assert (one.shard_folder.setting, one.joined.setting, one.config) == (
            other.shard_folder.setting,
            other.joined.setting,
            other.config,
        )


def test_shards_are_downloaded_whatever_their_layout_and_counted_by_their_paths(tmp_path):
    hub_folder, folder = tmp_path / "hub", tmp_path / "noimage"
    names = [f"shards/{folder}/{number:05d}.tar" for folder in "01" for number in range(2)]
    for number, name in enumerate([*names, "shards/notes.tar"]):
        (hub_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (hub_folder / name).write_bytes(bytes([number]) * 1000)
    (hub_folder / "README.md").write_text("No licence is named.\n")
    command = [sys.executable, ROOT / "scripts" / "download_shards.py", "--dataset", "dfndr12m"]
    with hub_server({"apple/DFNDR-12M": hub_folder}) as hub:
        environ = environment(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
        environ["DFNDR12M_NOIMG_PATH"] = str(folder)
        done = run([*command, "--shards", "1-2"], env=environ)
        assert done.returncode == 0, done.stderr
        assert "its card names no licence, it was published under CC-BY-NC-ND" in done.stdout
        beyond = run([*command, "--shards", "4"], env=environ)
    assert beyond.returncode == 1 and "has 4 shards, and --shards names number 4" in beyond.stderr
    tars = {path.relative_to(folder).as_posix() for path in folder.rglob("*.tar")}
    assert tars == {"shards/0/00001.tar", "shards/1/00000.tar"}
    assert all((folder / name).read_bytes() == (hub_folder / name).read_bytes() for name in tars)


def test_the_join_takes_captions_from_the_reinforcement_shards_and_training_can_read_the_result(
    folders, tmp_path, capsys
):
    folders.write(reinforcement(0), reinforcement(1, originals=3))
    join_shards.main(["--dataset", "dfndr12m", "--workers", "1"])
    joined = read_samples(folders.output / NAME)
    assert joined[uid(0)]["txt"] == b"caption 0 0 of 0"
    about = json.loads(joined[uid(1)]["json"])  # of the image, with the captions added
    assert about["status"] == "success" and about["texts"] == [
        f"caption 0 {c} of 1" for c in range(3)
    ]
    rows = embeddings(joined[uid(1)])["text_emb"]
    assert len(rows) == 3 + 3 + 2

    join_shards.main(["--dataset", "dfndr12m", "--workers", "1", "--recheck"])
    assert "shards already there" in capsys.readouterr().out

    report = tmp_path / "report.json"
    options = ["--teacher-dimension", "6", "6", "--workers", "1", "--report", str(report)]
    verify_shards.main(["--dataset", "dfndr12m", *options])
    told = capsys.readouterr().out
    lists = f"5 synthetic captions (3 under {COCO}, 2 under {CONTEXT}), embeddings 12 wide, float32"
    assert f"1 with 4 augmentations, {lists}" in told
    assert f"1 with 4 augmentations, 3 original and {lists}" in told
    layouts = json.loads(report.read_text())["layouts"]
    assert [layout["original_captions"] for layout in layouts] == [1, 3]
    assert all(layout["lists"] == {COCO: 3, CONTEXT: 2} for layout in layouts)


def test_captions_from_a_folder_of_their_own_come_first(folders, monkeypatch):
    folders.write(reinforcement(0))
    write_shard(folders.captions / NAME, [(uid(0), {"txt": b"another caption"})])
    monkeypatch.setenv("DFNDR12M_CAPTIONS_PATH", str(folders.captions))
    join_shards.main(["--dataset", "dfndr12m", "--workers", "1"])
    assert read_samples(folders.output / NAME)[uid(0)]["txt"] == b"another caption"


def test_the_join_says_which_part_no_shard_has_and_which_folder_is_missing(folders, monkeypatch):
    folders.write(reinforcement(0, "txt"))
    message = r"no source contains captions \(txt\): .*DFNDR12M_CAPTIONS_PATH"
    with pytest.raises(SystemExit, match=message):
        join_shards.main(["--dataset", "dfndr12m", "--workers", "1"])
    monkeypatch.setenv("DFNDR12M_CAPTIONS_PATH", "nowhere")
    with pytest.raises(SystemExit, match=r"no folder nowhere \(DFNDR12M_CAPTIONS_PATH\): make it"):
        join_shards.main(["--dataset", "dfndr12m", "--workers", "1"])
    shutil.rmtree(folders.images)
    with pytest.raises(
        SystemExit, match=r"DFNDR12M_IMAGES_PATH\): .*download_images.sh --dataset dfndr12m"
    ):
        join_shards.main(["--dataset", "dfndr12m", "--workers", "1"])
    shutil.rmtree(folders.reinforcements)
    with pytest.raises(SystemExit, match=r"NOIMG_PATH\): .*download_shards.py --dataset dfndr12m"):
        join_shards.main(["--dataset", "dfndr12m", "--workers", "1"])


def test_verify_takes_config_and_shards_from_the_data_set_and_options_replace_them():
    args = verify_shards.parse_arguments(["--dataset", "dfndr2b"])
    assert args.config.name == "dfndr2b.json" and args.shards[0].endswith("datasets/DFNDR-2B")
    args = verify_shards.parse_arguments(["x.tar", "--dataset", "dfndr2b", "--config", "mine.json"])
    assert str(args.config) == "mine.json" and args.shards == ["x.tar"]
    assert verify_shards.parse_arguments(["x.tar"]).config.name == "datacompdr12m.json"


def test_urls_are_looked_for_in_captions_and_reinforcements(folders, monkeypatch):
    dataset = DATASETS["dfndr12m"]
    folders.write(reinforcement(0))
    assert dataset.find_urls() == (folders.reinforcements, None)
    write_shard(folders.captions / NAME, [(uid(0), {"txt": b"a caption"})])
    monkeypatch.setenv("DFNDR12M_CAPTIONS_PATH", str(folders.captions))
    assert dataset.find_urls() == (folders.captions, folders.reinforcements)


def test_the_images_script_checks_name_and_folder_before_it_installs_anything(tmp_path):
    environ = environment(IMG2DATASET_VENV=str(tmp_path / "venv"), DFNDR2B_NOIMG_PATH="nowhere")
    script = ["bash", ROOT / "scripts" / "download_images.sh"]
    for options, told in (
        (
            ["--dataset", "dfndr2b"],
            "no folder nowhere (DFNDR2B_NOIMG_PATH): run `python scripts/download_shards.py",
        ),
        (["--dataset=dfndr3b"], "--dataset dfndr3b: expected one of datacomp12m, "),
        (["--dataset"], "--dataset: expected the name of a data set"),
    ):
        done = run([*script, *options], env=environ)
        assert done.returncode == 1 and done.stderr.startswith("error: ")
        assert told in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "venv").exists()


def test_the_example_shows_a_sample_with_several_lists_and_originals(tmp_path, capsys):
    members = dfndr_sample(0, {COCO: 3, CONTEXT: 2}, originals=2, unit=True)
    members["jpg"] = encode(picture(0))
    shard = write_shard(tmp_path / NAME, [(uid(0), members)])
    options = ["--dataset", "dfndr12m", "--teacher-dimension", "6", "6"]
    sheet = tmp_path / "sheet.png"
    for seed in range(8):
        arguments = ["--shard", str(shard), *options, "--seed", str(seed)]
        hf_dataset_example.main([*arguments, *(["--output", str(sheet)] if not seed else [])])
        told = capsys.readouterr().out
        assert (
            "row 0 of 7: of original caption 0" in told
            and "teacher 1: ViT-L-14, dfn2b_s39b" in told
        )
        row, number, label, key = re.search(
            r"row (\d) of 7: of synthetic caption (\d) \((list \d, \d): (\w+)\)", told
        ).groups()
        assert int(row) == 2 + int(number)
        which, entry = re.findall(r"\d", label)
        assert key == (COCO, CONTEXT)[int(which) - 1]
        assert f"caption {which} {entry} of 0" in told
    assert sheet.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (join_shards.main, ["--dataset", "datacomp12m"]),
        (join_shards.main, ["--workers", "1"]),
        (join_shards.main, ["--images-unaligned", "--source", ".", "--output", "x"]),
        (verify_shards.main, ["--dataset", "nonsense"]),
        (verify_shards.main, []),
        (download_images.main, ["--input", "."]),
        (hf_dataset_example.main, ["--bf16", "--dataset", "dfndr12m"]),
    ],
)
def test_wrong_options_are_refused_with_the_names_that_are_expected(main, arguments, capsys):
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2 and "--dataset" in capsys.readouterr().err.splitlines()[-1]
