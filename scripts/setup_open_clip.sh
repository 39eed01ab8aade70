#!/usr/bin/env bash
# Make open_clip/: OpenCLIP with the patch of its version, configs/ and dr/ applied.
#
#     bash scripts/setup_open_clip.sh [--open-clip pinned|3.3] [--source auto|git|pypi] [--dest DIR]
#                                     [--force]
#
#   --open-clip pinned  the commit of May 2024 on which the published recipes are defined; with
#                       open_clip.patch
#               3.3     release 3.3.0; with open_clip_v3.patch. docs/training.md compares the two.
#                       Default: $OPEN_CLIP_VERSION, else the version that DIR has, else pinned
#   --source git    fetch the commit from $OPEN_CLIP_REPO, without notebooks and images
#            pypi   take the files from PyPI, for machines that do not reach GitHub. 3.3: from
#                   open_clip_torch 3.3.0, the same files. pinned: src/open_clip/ from
#                   open_clip_torch 2.26.1 and src/training/ from 2.24.0. The trainer is the same;
#                   a few files of src/open_clip/ are five weeks newer, and the patch changes none
#                   of them
#            auto   git, or pypi if the repository does not answer within 30 s (default)
#   --dest DIR      where to make it (default: open_clip/ at this repository's root)
#   --force         replace DIR, whatever is in it; its old content is kept as DIR.old-<time>
#
# The changes are committed in the tree's own git repository, on top of the unpatched commit. Run
# the script again at any time: a tree that is up to date is not touched; one made with an older
# patch, configs/ or dr/ is brought up to date in place, without the network, and logs/
# and other files of yours stay. A tree with your edits, or with files that you added to src/ or
# configs/, is refused without --force; `git status` in the tree shows them.
#
# The script needs git >= 2.25, and for pypi a Python with pip (PYTHON sets it). It writes nothing
# outside DIR. OPEN_CLIP_REPO (default: OpenCLIP on GitHub) can also be the path of a local clone.
set -euo pipefail
shopt -s inherit_errexit

# --- settings -------------------------------------------------------------------------------------
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
OPEN_CLIP_VERSION=${OPEN_CLIP_VERSION:-}
SOURCE=${SOURCE:-auto}
DEST=${DEST:-$ROOT/open_clip}
OPEN_CLIP_REPO=${OPEN_CLIP_REPO:-https://github.com/mlfoundations/open_clip.git} # or a local path
REACH_SECONDS=${REACH_SECONDS:-30}
PYTHON=${PYTHON:-${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}} # used by pypi only
PYTHON=${PYTHON:-python3}
WHEELS_TAG=open_clip_wheels # marks the unpatched commit of a tree made from PyPI packages
ME=setup_open_clip          # author of the commits made here

# shellcheck source-path=SCRIPTDIR source=open_clip_versions.sh
source "$ROOT/scripts/open_clip_versions.sh"
say() { echo "setup_open_clip: $*"; }
fail() { echo "setup_open_clip: error: $*" >&2; exit 1; }

force=
while [ $# -gt 0 ]; do
    case $1 in
        --open-clip) OPEN_CLIP_VERSION=${2:?--open-clip needs pinned or 3.3}; shift 2 ;;
        --source) SOURCE=${2:?--source needs auto, git or pypi}; shift 2 ;;
        --dest) DEST=${2:?--dest needs a folder}; shift 2 ;;
        --force) force=yes; shift ;;
        -h | --help) sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) fail "found '$1', expected --open-clip, --source, --dest, --force or --help" ;;
    esac
done
[[ $SOURCE =~ ^(auto|git|pypi)$ ]] || fail "found --source $SOURCE, expected auto, git or pypi"

DEST=$(realpath -m "$DEST")
present=$(open_clip_version "$DEST")
OPEN_CLIP_VERSION=${OPEN_CLIP_VERSION:-${present:-pinned}}
use_open_clip "$OPEN_CLIP_VERSION" ||
    fail "found --open-clip $OPEN_CLIP_VERSION, expected pinned or 3.3"

# A new tree is built in $work and moved into place when it is complete.
[ ! -d "$OPEN_CLIP_REPO" ] || OPEN_CLIP_REPO=$(realpath "$OPEN_CLIP_REPO")
mkdir -p "$(dirname "$DEST")"
work=$(mktemp -d "$DEST.tmp-XXXXXX")
trap 'rm -rf "$work"' EXIT
or_force="or use --force (the tree will be kept as $(basename "$DEST").old-<time>)"
export LC_ALL=C GIT_TERMINAL_PROMPT=0
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE

# --- the unpatched tree, in the empty repository of the current folder ----------------------------
from_git() {
    git remote add origin "$OPEN_CLIP_REPO"
    # A local repository may refuse to serve a single commit without its blobs.
    [[ $OPEN_CLIP_REPO != /* && $OPEN_CLIP_REPO != file://* ]] ||
        git config remote.origin.uploadpack "git -c uploadpack.allowFilter=true \
            -c uploadpack.allowAnySHA1InWant=true upload-pack"
    git sparse-checkout init --cone
    git sparse-checkout set src tests configs
    {
        git fetch -q --no-tags --depth 1 --filter=blob:none origin "$OPEN_CLIP_COMMIT" &&
            git checkout -q --detach "$OPEN_CLIP_COMMIT"
    } || fail "could not get commit $OPEN_CLIP_COMMIT from $OPEN_CLIP_REPO (git's message is" \
        "above); set OPEN_CLIP_REPO to another clone of OpenCLIP, or use --source pypi"
}

from_wheels() {
    local wheel package
    mkdir src
    for wheel in "${WHEELS[@]}"; do
        package=${wheel#*:} wheel=${wheel%:*}
        "$PYTHON" -m pip download -qq --disable-pip-version-check --no-deps --only-binary :all: \
            -d "$work/$package" "$wheel" ||
            fail "'$PYTHON -m pip download $wheel' failed (its message is above); set PYTHON to a" \
                "Python that has pip and reaches a package index, or use --source git"
        "$PYTHON" -m zipfile -e "$work/$package"/*.whl "$work/$package"
        mv "$work/$package/$package" src/
    done
    # The lines of OpenCLIP's .gitignore that matter; the wheels do not have it.
    printf '%s\n' __pycache__/ '*.egg-info/' logs/ wandb/ >>.git/info/exclude
    git add -A
    git checkout -q --detach "$(commit "$(git write-tree)" -m "Unpatched, from ${WHEELS[*]}")"
    git update-ref "refs/tags/$WHEELS_TAG" HEAD
}

commit() { # commit TREE OPTION …: print the id of a commit, the same for the same arguments
    GIT_AUTHOR_NAME=$ME GIT_AUTHOR_EMAIL=$ME GIT_AUTHOR_DATE="2024-05-29 00:00 +0000" \
        GIT_COMMITTER_NAME=$ME GIT_COMMITTER_EMAIL=$ME GIT_COMMITTER_DATE="2024-05-29 00:00 +0000" \
        git commit-tree "$@"
}

# --- the patched tree -----------------------------------------------------------------------------
patched_tree() ( # print the id of $base's files with open_clip.patch, configs/ and dr/ applied
    export GIT_INDEX_FILE=$work/index # the tree's own index stays as it is
    mkdir -p "$work/ours/src/$TRAINER"
    cp -r "$ROOT/configs" "$work/ours/"
    cp -r "$ROOT/dr" "$work/ours/src/$TRAINER/"
    find "$work/ours" -name __pycache__ -prune -exec rm -rf {} +
    git read-tree "$base"
    git apply --cached --whitespace=nowarn "$ROOT/$PATCH" ||
        fail "$PATCH does not apply (git's message is above)"
    git -c core.sparseCheckout=false --work-tree="$work/ours" add -f --no-all .
    git write-tree --missing-ok
)

unlike_wanted() { # paths on stdin -> those whose files differ from the tree $wanted
    sort -u | while IFS= read -r path; do
        blob=$(git rev-parse -q --verify "$wanted:$path") || true # or no such file
        [ "$(git hash-object "$path" 2>/dev/null)" = "$blob" ] || echo "$path"
    done
}

adopt() { # commit a tree of an older version of this script, which kept a list of its files instead
    local list=.git/dr-setup/manifest # lines "blob path"
    cut -c 42- "$list" | git hash-object --no-filters --stdin-paths 2>/dev/null |
        paste -d ' ' - <(cut -c 42- "$list") | cmp -s - "$list" ||
        fail "$DEST was made by an older version of this script and has edits of yours; keep" \
            "them, then use --force, and move logs/ from the old tree to the new one"
    git add -f -- src configs
    git update-ref --no-deref HEAD \
        "$(commit "$(git write-tree --missing-ok)" -p "$base" -m "Patched")"
    rm -r .git/dr-setup
}

update() { # bring the tree in the current folder up to date and set $changed, or refuse it
    local blob path found edited
    base=$WHEELS_TAG SOURCE=pypi
    git rev-parse -q --verify "$base" >/dev/null || base=$OPEN_CLIP_COMMIT SOURCE=git
    base=$(git rev-parse -q --verify "$base^{commit}") || fail "$DEST is a git repository that" \
        "does not have commit $OPEN_CLIP_COMMIT; choose another --dest, $or_force"
    while read -r blob path; do
        found=$(git rev-parse -q --verify "$base:$path") || found="no such file"
        [ "$found" = "$blob" ] || fail "$path is not that of commit $OPEN_CLIP_COMMIT: found $found," \
            "expected $blob; check OPEN_CLIP_REPO and OPEN_CLIP_COMMIT, or use another --source"
    done <<<"$BLOBS"
    [ ! -d .git/dr-setup ] || adopt
    [ "$(git rev-parse HEAD)" = "$base" ] || [ "$(git log -1 --format='%P %ce')" = "$base $ME" ] ||
        fail "$DEST is at a commit that this script did not make, '$(git log -1 --format=%s)';" \
            "check out $base there, choose another --dest, $or_force"

    wanted=$(patched_tree)
    edited=$({
        git -c core.quotePath=false diff --name-only --no-renames --diff-filter=d HEAD
        git -c core.quotePath=false ls-files --others --exclude-standard -- src configs
    } | unlike_wanted)
    [ -z "$edited" ] || fail "$DEST has edits of yours, nothing was touched; keep them with" \
        "scripts/make_patch.sh (files of OpenCLIP) or by copying them to configs/ and dr/, then" \
        "run this again, $or_force:"$'\n'"$(sed 's/^/    /; 20{s/.*/    .../;q}' <<<"$edited")"
    changed=$({
        git -c core.quotePath=false diff-tree -r --name-only --no-renames HEAD "$wanted"
        git -c core.quotePath=false ls-files --deleted
    } | unlike_wanted | paste -sd ' ' -)
    git checkout -q --force --detach "$(commit "$wanted" -p "$base" -m "Patched")"
}

if [ -z "$force" ] && [ -n "$(ls -A "$DEST" 2>/dev/null)" ]; then
    [ -d "$DEST/.git" ] || fail "$DEST exists and is not a clone of OpenCLIP (no .git folder in" \
        "it); choose another --dest, $or_force"
    [[ -z $present || $present = "$OPEN_CLIP_VERSION" ]] || fail "$DEST has OpenCLIP ($present)," \
        "not $OPEN_CLIP_VERSION; choose another --dest, $or_force"
    cd "$DEST"
    update
    [ -n "$changed" ] || { say "$DEST (from $SOURCE) is already right, left alone"; exit; }
    say "brought $DEST up to date: $changed"
    exit
fi

if [ "$SOURCE" = auto ]; then
    SOURCE=git
    timeout "$REACH_SECONDS" git ls-remote -q "$OPEN_CLIP_REPO" HEAD >/dev/null 2>"$work/why" || {
        [ -s "$work/why" ] || echo "no answer within $REACH_SECONDS s" >"$work/why"
        say "can't reach $OPEN_CLIP_REPO ($(head -1 "$work/why")): using the wheels" \
            "$(printf '%s\n' "${WHEELS[@]%:*}" | sort -u | paste -sd ' ' -) from PyPI instead"
        SOURCE=pypi
    }
fi
git init -q "$work/tree"
cd "$work/tree"
git config core.autocrlf false
if [ "$SOURCE" = git ]; then from_git; else from_wheels; fi
update
if [ -n "$(ls -A "$DEST" 2>/dev/null)" ]; then
    old=$DEST.old-$(date +%Y%m%d-%H%M%S)
    mv -T "$DEST" "$old"
    say "kept the old content, logs included, as $old"
fi
mv -T "$work/tree" "$DEST"
say "made $DEST (OpenCLIP $OPEN_CLIP_VERSION) from $SOURCE"
