"""The benchmarks print their tables, small: the figures are not judged here."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "data" / "tiny_vit.json"


def table(name, *arguments):
    command = [sys.executable, ROOT / "scripts" / "benchmarks" / f"{name}.py", *arguments]
    done = subprocess.run(
        [*map(str, command), "--runs", "1"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"torch \d.*\nseed 0; median of 1", done.stdout)
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in done.stdout.splitlines()
        if line[:1] == "|"
    ]


@pytest.mark.extended
def test_this_loader_and_the_plain_way_side_by_side_in_both_formats():
    rows = table("loader", "--samples", "4", "--batches", "1", "--shuffle", "64", "--profile")
    variants = [row[:2] for row in rows if len(row) > 2]
    ways = ("plain", "this loader", "this loader, passes", "floor")
    kinds = ("fp32 npz", "bf16 pth.gz", "bf16 safetensors")
    expected = [[kind, way] for kind in kinds for way in ways]
    assert [row for row in variants if row in expected] == expected
    read, reads, sent = (
        {row[1]: float(row[at]) for row in rows if row[0] == "fp32 npz" and len(row) > 7}
        for at in (7, 8, 9)
    )
    assert sent["this loader"] == sent["this loader, passes"] < 0.3 * sent["plain"]
    # The target of random access; all others read whole shards.
    assert read["this loader, passes"] <= 100 < 250 < min(read["plain"], read["this loader"])
    assert reads["this loader, passes"] <= 6
    assert [row[0] for row in rows].count("read tars") == 3


def test_loss_and_formula_agree_in_the_table():
    rows = table("loss", "--size", "8x32")
    assert [row[2] for row in rows[2:]] == ["formula", "dr/loss.py", "matrix products"] * 2
    for formula, ours in (rows[2:4], rows[5:7]):
        assert (
            float(ours[7]) == pytest.approx(float(formula[7]), rel=1e-5) and float(ours[8]) < 1e-4
        )


def test_share_of_flops_of_the_loss_grows_with_the_global_batch():
    rows = table("loss", "--flops", "--model", TINY)
    shares = {row[0]: float(row[4].removesuffix(" %")) for row in rows[2:]}
    assert 0 < shares["12M"] < shares["1B"] < 100


def test_step_reinforced_and_plain_side_by_side():
    rows = table("step", "--model", TINY, "--batch", "4", "--precision", "fp32")
    assert [row[0] for row in rows[2:]] == ["baseline, 2 captions", "reinforced"]
