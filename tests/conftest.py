"""What several tests share: a patched OpenCLIP tree, the same tree unpatched, and an old
webdataset."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def environment(tree=None, *more_paths, **variables):
    """This process's environment with a tree's sources (and others before them) on PYTHONPATH."""
    paths = [str(path) for path in (*more_paths, *([tree / "src"] if tree else []))]
    return {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def run(command, timeout=300, **kwargs):
    """Run a command to its end and return it; output as text."""
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=timeout, **kwargs
    )


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A patched tree, from $OPEN_CLIP_REPO where that is set, else from the wheels."""
    dest = tmp_path_factory.mktemp("tree") / "open_clip"
    source = "git" if os.environ.get("OPEN_CLIP_REPO") else "pypi"
    done = run(
        ["bash", ROOT / "scripts" / "setup_open_clip.sh", "--source", source, "--dest", dest],
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return dest


@pytest.fixture(scope="session")
def unpatched_tree(tree, tmp_path_factory):
    dest = tmp_path_factory.mktemp("unpatched")
    shutil.copytree(tree / "src", dest / "src", ignore=shutil.ignore_patterns("dr", "__pycache__"))
    subprocess.run(["git", "apply", "--reverse", ROOT / "open_clip.patch"], check=True, cwd=dest)
    return dest


@pytest.fixture(scope="session")
def old_webdataset(tmp_path_factory):
    """A folder with webdataset 0.2.86, the last that the unpatched trainer works with."""
    folder = tmp_path_factory.mktemp("webdataset")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        folder,
        "webdataset==0.2.86",
    ]
    done = run(command)
    assert done.returncode == 0, done.stderr
    return folder
