"""What several tests share: patched OpenCLIP trees, such a tree unpatched, and an old webdataset."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# `scripts/test.sh -m extended` installs clip-benchmark.
collect_ignore = [] if importlib.util.find_spec("clip_benchmark") else ["test_evaluate.py"]


def environment(tree=None, *more_paths, **variables):
    """This process's environment with a tree's sources (and others before them) on PYTHONPATH.

    TRAINER is the name of the tree's trainer package.
    """
    if tree:
        variables = {"TRAINER": trainer(tree), **variables}
    paths = [str(path) for path in (*more_paths, *([tree / "src"] if tree else []))]
    return {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def trainer(tree):
    """The name of the trainer package, which depends on OpenCLIP's version."""
    return next(name for name in ("training", "open_clip_train") if (tree / "src" / name).is_dir())


def run(command, timeout=300, **kwargs):
    """Run a command to its end and return it; output as text."""
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=timeout, **kwargs
    )


def make_tree(version, folder):
    """Make a patched tree, from $OPEN_CLIP_REPO where that is set, else from the wheels."""
    source = "git" if os.environ.get("OPEN_CLIP_REPO") else "pypi"
    options = ["--open-clip", version, "--source", source, "--dest", folder / "open_clip"]
    done = run(["bash", ROOT / "scripts" / "setup_open_clip.sh", *options], env=environment())
    assert done.returncode == 0, done.stderr
    return folder / "open_clip"


@pytest.fixture(scope="session")
def pinned_tree(tmp_path_factory):
    """A patched tree of the pinned commit, for what does not depend on OpenCLIP's version."""
    return make_tree("pinned", tmp_path_factory.mktemp("pinned"))


@pytest.fixture(scope="session")
def release_tree(tmp_path_factory):
    """A patched tree of release 3.3."""
    return make_tree("3.3", tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="session", params=["pinned_tree", "release_tree"], ids=["pinned", "3.3"])
def tree(request):
    """A patched tree. Each test that uses it runs on both versions of OpenCLIP."""
    return request.getfixturevalue(request.param)


EXTENDED = pytest.param("release_tree", marks=pytest.mark.extended)


@pytest.fixture(scope="session", params=["pinned_tree", EXTENDED], ids=["pinned", "3.3"])
def tree_extended(request):
    """As ``tree``, but the tests on release 3.3 belong to the extended tier."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def unpatched_tree(tree_extended, tmp_path_factory):
    dest = tmp_path_factory.mktemp("unpatched")
    shutil.copytree(
        tree_extended / "src", dest / "src", ignore=shutil.ignore_patterns("dr", "__pycache__")
    )
    patch = "open_clip.patch" if trainer(tree_extended) == "training" else "open_clip_v3.patch"
    subprocess.run(["git", "apply", "--reverse", ROOT / patch], check=True, cwd=dest)
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
