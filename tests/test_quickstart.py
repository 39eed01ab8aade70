"""The quickstart's whole path, small: from packages to a table."""

import json
import os
import sys

import pytest
from conftest import ROOT, run

pytestmark = pytest.mark.slow


def test_the_fast_quickstart_walks_the_whole_path_and_may_be_run_again(tree, tmp_path):
    environ = {
        **os.environ,
        "OPEN_CLIP": str(tree),
        "WORK": str(tmp_path),
        "PYTHON": sys.executable,
    }
    if sys.prefix != sys.base_prefix:
        environ["VIRTUAL_ENV"] = sys.prefix
    done = run(["bash", ROOT / "scripts" / "quickstart.sh", "--fast"], env=environ, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    work = tmp_path / "fast"
    results = json.loads((work / "results.json").read_text())
    assert list(results["runs"]) == [
        "teacher-0",
        "teacher-1",
        "student-plain",
        "student-reinforced",
    ]
    plain, reinforced = (results["runs"][f"student-{name}"] for name in ("plain", "reinforced"))
    assert plain["final"]["samples_seen"] == reinforced["final"]["samples_seen"] > 0
    assert len(plain["curve"]) == len(reinforced["curve"]) == 2
    different = {n for n, value in plain["settings"].items() if value != reinforced["settings"][n]}
    assert different == {
        *(
            "dataset_reinforcement",
            "distill_teacher_dimension",
            "distill_average_after_softmax",
            "distill_logit_scale",
        )
    }
    for run_ in results["runs"].values():
        assert run_["final"]["num_samples"] == 20
    for name in ("learning_curves.png", "augmentations.png"):
        assert (work / name).read_bytes().startswith(b"\x89PNG")
    assert "student-reinforced" in done.stdout and "R@5" in done.stdout
    joined = json.loads(
        (work / "datasets" / "DataCompDR-12M" / "shards" / "sizes.json").read_text()
    )
    assert sum(joined.values()) == 96

    trained = (work / "logs" / "student-plain" / "checkpoints" / "epoch_2.pt").stat().st_mtime_ns
    again = run(["bash", ROOT / "scripts" / "quickstart.sh", "--fast"], env=environ, timeout=600)
    assert again.returncode == 0, again.stderr[-3000:]
    assert (
        work / "logs" / "student-plain" / "checkpoints" / "epoch_2.pt"
    ).stat().st_mtime_ns == trained
