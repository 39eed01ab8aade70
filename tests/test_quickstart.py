"""The quickstart's whole path, small: from packages to a table."""

import json
import os
import re
import sys
import textwrap

import pytest
from conftest import ROOT, run

pytestmark = pytest.mark.slow


@pytest.mark.extended
def test_the_fast_quickstart_walks_the_whole_path_and_may_be_run_again(pinned_tree, tmp_path):
    environ = {
        **os.environ,
        "OPEN_CLIP": str(pinned_tree),
        "WORK": str(tmp_path),
        "PYTHON": sys.executable,
        "NUM_PROCESSES": "1",  # saves the time that another process takes to start
    }
    if sys.prefix != sys.base_prefix:
        environ["VIRTUAL_ENV"] = sys.prefix
    done = run(["bash", ROOT / "scripts" / "quickstart.sh", "--fast"], env=environ, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    work = tmp_path / "fast"
    results = json.loads((work / "results.json").read_text())
    students = ["student-baseline", "student-synthetic", "student-teachers", "student-reinforced"]
    assert list(results["runs"]) == ["teacher-0", "teacher-1", *students]
    baseline, *reinforced = (results["runs"][name] for name in students)
    assert baseline["final"]["samples_seen"] == 64
    for student in reinforced:
        assert student["final"]["samples_seen"] == 64
        assert len(student["curve"]) == len(baseline["curve"]) == 2
        different = {
            name
            for name, value in baseline["settings"].items()
            if value != student["settings"][name] and name != "distill_loss_weights"
        }
        assert different == {
            "dataset_reinforcement",
            "distill_teacher_dimension",
            "distill_average_after_softmax",
            "distill_logit_scale",
        }
    weights = [student["settings"]["distill_loss_weights"] for student in reinforced]
    assert weights == [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    for run_ in results["runs"].values():
        assert run_["final"]["num_samples"] == 20
    for name in ("learning_curves.png", "augmentations.png"):
        assert (work / name).read_bytes().startswith(b"\x89PNG")
    assert "student-reinforced" in done.stdout and "R@5" in done.stdout
    assert all(len(line) <= 100 for line in done.stdout.replace(str(work), "").splitlines())
    assert (
        "Train Epoch" not in done.stdout and "Train Epoch" in (work / "teacher-0.log").read_text()
    )
    assert results["data"]["settings"]["caption_noise"] == 0.6
    assert 0 < sum(results["data"]["replaced_captions"].values()) < 96
    joined = json.loads(
        (work / "datasets" / "DataCompDR-12M" / "shards" / "sizes.json").read_text()
    )
    assert sum(joined.values()) == 96

    # The reinforced student is evaluated and exported, and the printed lines of Python load it.
    (line,) = (work / "logs" / "student-reinforced" / "evaluation" / "results.jsonl").open()
    assert json.loads(line)["dataset"] == "wds/held_out" and json.loads(line)["samples"] == 20
    assert {"open_clip_config.json", "image_encoder.onnx", "README.md"} <= {
        path.name for path in (work / "model").iterdir()
    }
    assert re.search(r"^ONNX .* 16/16$", done.stdout, re.MULTILINE)
    snippet = re.search(
        r"^  import open_clip\n.*?^  print.*?$", done.stdout, re.DOTALL | re.MULTILINE
    )
    ranked = run([sys.executable, "-c", textwrap.dedent(snippet[0])], cwd=tmp_path)
    assert ranked.returncode == 0 and "a photo of a dog" in ranked.stdout, ranked.stderr

    last = work / "logs" / "student-baseline" / "checkpoints" / "epoch_2.pt"
    trained = last.stat().st_mtime_ns
    again = run(["bash", ROOT / "scripts" / "quickstart.sh", "--fast"], env=environ, timeout=600)
    assert again.returncode == 0, again.stderr[-3000:]
    assert last.stat().st_mtime_ns == trained

    command = ["bash", ROOT / "scripts" / "quickstart.sh", "--fast", "--caption-noise", "0.3"]
    other = run(command, env=environ, timeout=600)
    assert other.returncode == 1 and "was made with other settings" in other.stderr


@pytest.mark.parametrize("value", ["2", "-0.5", "much", ""])
def test_a_caption_noise_that_is_no_probability_is_refused_before_anything_is_made(value, tmp_path):
    command = ["bash", ROOT / "scripts" / "quickstart.sh", "--caption-noise", value]
    done = run(command, env={**os.environ, "WORK": str(tmp_path / "work")})
    assert done.returncode == 1 and "expected a probability from 0 to 1" in done.stderr
    assert not (tmp_path / "work").exists()
