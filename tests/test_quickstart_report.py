"""The quickstart's report says what the numbers say; its progress is short, its logs are whole."""

import math
import sys

import pytest
from conftest import ROOT, run
from quickstart import report

N = 400  # held-out images


def make_run(curve, samples=26880, num_samples=N):
    """A run whose R@1 after equal intervals are those of ``curve``: pairs, or one for both."""
    points = []
    for number, recall in enumerate(curve, 1):
        image_to_text, text_to_image = recall if isinstance(recall, tuple) else (recall, recall)
        points.append(
            {
                "image_to_text_R@1": image_to_text,
                "text_to_image_R@1": text_to_image,
                "samples_seen": samples * number // len(curve),
                "num_samples": num_samples,
            }
        )
    return {"final": points[-1], "curve": points}


def compare(before, after):
    runs = {"student-baseline": make_run([before]), "student-reinforced": make_run([after])}
    return report.compare(runs, "student-baseline", "student-reinforced", "It changes R@1 by")


def test_a_step_is_reported_with_its_standard_error():
    step = compare((0.043, 0.05), (0.42, 0.428))
    error = 100 * math.sqrt((0.043 * 0.957 + 0.42 * 0.58) / N)
    assert step["image_to_text_R@1"]["error"] == pytest.approx(error)
    assert step["sentence"] == (
        f"It changes R@1 by +37.7 points image to text (standard error {error:.1f}) "
        "and +37.8 points text to image (standard error 2.7)."
    )


@pytest.mark.parametrize(
    ("before", "after", "within"),
    [(0.50, 0.532, True), (0.50, 0.60, False), (0.60, 0.50, False), (0.0, 0.0, True)],
)
def test_a_difference_of_up_to_two_standard_errors_is_within_the_noise(before, after, within):
    step = compare(before, after)
    assert ("within the noise" in step["sentence"]) == within
    assert step["text_to_image_R@1"]["within_noise"] == within
    assert step["text_to_image_R@1"]["points"] == pytest.approx(100 * (after - before))


def test_a_comparison_at_unequal_samples_seen_or_without_a_student_says_so():
    runs = {
        "student-baseline": make_run([0.1]),
        "student-reinforced": make_run([0.5], samples=1000),
    }
    step = report.compare(runs, "student-baseline", "student-reinforced", "It changes R@1 by")
    assert "NOT at equal samples seen (26,880 and 1,000)" in step["sentence"]
    step = report.compare(runs, "student-baseline", "student-teachers", "It changes R@1 by")
    assert step["sentence"] == "It changes R@1 by: not known, there is no student-teachers."


def compare_samples(baseline, reinforced):
    curves = {"student-baseline": baseline, "student-reinforced": reinforced}
    return report.compare_samples({name: make_run(curve) for name, curve in curves.items()})


def test_fewer_samples_are_read_from_the_first_checkpoint_from_which_on_the_curve_stays_above():
    baseline = [(0.01, 0.02), (0.02, 0.03), (0.03, 0.04), (0.04, 0.05)]
    reinforced = [(0.05, 0.01), (0.03, 0.04), (0.2, 0.2), (0.4, 0.4)]  # dips below 4 % once
    found = compare_samples(baseline, reinforced)
    assert found["image_to_text_R@1"]["samples_seen"] == 3 * 26880 // 4
    assert found["sentence"] == (
        "The reinforced student reaches the baseline's final R@1 with at least 1.3 times fewer "
        "samples image to text (4.0 %) and with at least 1.3 times fewer samples text to image "
        "(5.0 %)."
    )


def test_past_the_baseline_at_its_first_checkpoint_it_needs_more_than_n_times_fewer():
    found = compare_samples([0.01, 0.02, 0.03, 0.04], [0.05, 0.1, 0.2, 0.4])
    assert found["sentence"].count("with more than 4.0 times fewer samples") == 2
    assert "noise" not in found["sentence"]


def test_never_only_at_the_end_and_within_the_noise_are_said():
    found = compare_samples([(0.3, 0.5), (0.5, 0.5)], [(0.2, 0.2), (0.4, 0.52)])
    assert found["image_to_text_R@1"] is None
    assert "not at all image to text (50.0 %)" in found["sentence"]
    assert (
        "with no fewer samples text to image (50.0 %, but ends within the noise of it)"
        in found["sentence"]
    )


def test_what_is_simulated_is_said_and_nothing_where_no_caption_was_replaced():
    data = {"training": 3309, "replaced_captions": {"file name": 400, "another language": 1600}}
    assert "2,000 of the students' 3,309 captions (60 %) were replaced" in report.describe_data(
        data
    )
    data["replaced_captions"] = {"file name": 0}
    assert report.describe_data(data).startswith("All captions are clean")


PROGRESS = ROOT / "scripts" / "quickstart" / "progress.py"
TRAINER = """
import sys
for epoch in (0, 1):
    print(f"x | INFO | Train Epoch: {epoch} [ 64/128 (50%)] Data (t): 0.1")
    print(f"x | INFO | Eval Epoch: {epoch + 1} image_to_text_R@1: 0.1250\\ttext_to_image_R@1: 0.2500")
sys.stderr.write("\\rbar 10%|\\rbar 100%|")
sys.exit(STATUS)
"""


def run_step(tmp_path, status):
    program = TRAINER.replace("STATUS", str(status)).replace("\\\\", "\\")
    command = [sys.executable, PROGRESS, "--samples", 256, "[1/2] teacher", tmp_path / "log"]
    return run([*command, sys.executable, "-c", program])


def test_a_step_prints_one_line_and_its_log_has_the_whole_output(tmp_path):
    done = run_step(tmp_path, 0)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[1/2] teacher 0 s, R@1 12.5 / 25.0 %\n"
    log = (tmp_path / "log").read_text().splitlines()
    assert len(log) == 5 and log[-1] == "bar 100%|"


def test_a_step_that_fails_prints_the_end_of_its_log(tmp_path):
    done = run_step(tmp_path, 3)
    assert done.returncode == 1
    assert "Train Epoch: 1 [ 64/128" in done.stderr
    assert f"error: the step failed, see {tmp_path / 'log'}" in done.stderr
    assert "failed after" in done.stdout
