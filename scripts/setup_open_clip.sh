#!/usr/bin/env bash
# Leaves OpenCLIP at its pinned commit, patched, in open_clip/, ready for
#     cd open_clip && bash configs/run_datacompdr12m.sh
#
#     bash scripts/setup_open_clip.sh [--source auto|git|pypi] [--dest DIR] [--force]
#
#   --source git    the pinned commit from $OPEN_CLIP_REPO, without its notebooks and pictures
#            pypi   the same trainer from two wheels, for where GitHub can't be reached (a few files of open_clip/, none
#                   of which the patch touches, are five weeks newer)
#            auto   git, or pypi where the repository does not answer within 30 s (default)
#   --dest DIR      where to (default: open_clip/ at this repository's root)
#   --force         replace DIR whatever is in it; what was there is kept as DIR.old-<time>
#
# Does what one would type by hand: check out, `git apply open_clip.patch`, `cp -r configs .`, `cp -r dr src/training`.
# Before patching, the six files that the training depends on are compared with the pinned commit's.
#
# Run it again at any time. A tree that is right is left alone; one made from an older open_clip.patch, configs/ or dr/
# is brought up to date in place, without the network; logs/ and other files of yours are not touched. A tree in which
# you edited, or added to src/ or configs/, is refused unless --force.
#
# Needs git >= 2.25, and for pypi a Python with pip. Leaves nothing outside DIR; what it left in DIR is listed in
# DIR/.git/dr-setup/manifest.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
SOURCE=${SOURCE:-auto}
DEST=${DEST:-$ROOT/open_clip}
OPEN_CLIP_REPO=${OPEN_CLIP_REPO:-https://github.com/mlfoundations/open_clip.git}      # or a path of this machine
OPEN_CLIP_COMMIT=${OPEN_CLIP_COMMIT:-cf86ee7ec4658845f640858ecd34d0f15588271a}         # the six ids below hold anyway
PYTHON=${PYTHON:-${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}}                              # only pypi needs it
PYTHON=${PYTHON:-python3}
WHEELS=(open_clip_torch==2.26.1:open_clip open_clip_torch==2.24.0:training)            # what to take from which
WHEELS_TAG=open_clip_wheels                                                            # marks a tree made of wheels
REACH_SECONDS=${REACH_SECONDS:-30}
PINNED_BLOBS="\
86b44862f46ef483665d555da33c3a5c1c499416 src/open_clip/factory.py
5beaab1c32ae2a826261c337b47548adf77b53de src/open_clip/loss.py
07b9fee961d211eeb0c60c0fbd595a3a0ba12518 src/training/data.py
c3d19302d97c8c24166322922eab75a76c68b33f src/training/params.py
a48a3459390ea986b56a46a720ae2921e9f9c3d3 src/training/train.py
94496999f4ced80927499ebdb26dfed19d77bbc1 src/training/main.py"

say() { echo "setup_open_clip: $*"; }
fail() { echo "setup_open_clip: error: $*" >&2; exit 1; }

force=
while [ $# -gt 0 ]; do
    case $1 in
        --source) SOURCE=${2:?--source needs auto, git or pypi}; shift 2 ;;
        --dest) DEST=${2:?--dest needs a folder}; shift 2 ;;
        --force) force=yes; shift ;;
        -h | --help) sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) fail "found '$1', expected --source, --dest, --force or --help" ;;
    esac
done
case $SOURCE in auto | git | pypi) ;; *) fail "found --source $SOURCE, expected auto, git or pypi" ;; esac
for part in open_clip.patch configs dr; do
    [ -e "$ROOT/$part" ] || fail "$ROOT/$part is missing; restore it (git checkout -- $part) and run this again"
done

# Everything is built in $work and moved into place when it is whole, so an interrupted run leaves nothing half-made.
DEST=$(realpath -m "$DEST")
[ ! -d "$OPEN_CLIP_REPO" ] || OPEN_CLIP_REPO=$(realpath "$OPEN_CLIP_REPO")
mkdir -p "$(dirname "$DEST")"
work=$(mktemp -d "$DEST.tmp-XXXXXX")
trap 'rm -rf "$work"' EXIT
new=$work/tree
manifest=$DEST/.git/dr-setup/manifest
or_force="--force (the tree will be kept as $(basename "$DEST").old-<time>)"
export LC_ALL=C GIT_TERMINAL_PROMPT=0
export GIT_CEILING_DIRECTORIES=$work # in $new, git must not take the repository around it for its own
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE

# --- where the unpatched files come from; each leaves them in $new -----------------------------------------------

reach_repo() { # or say why not
    timeout "$REACH_SECONDS" git ls-remote -q "$OPEN_CLIP_REPO" HEAD 2>"$work/why" >/dev/null && return
    [ $? -ne 124 ] || echo "no answer within $REACH_SECONDS s" >"$work/why"
    head -1 "$work/why"
    return 1
}

from_git() {
    git init -q "$new"
    git -C "$new" config core.autocrlf false
    git -C "$new" remote add origin "$OPEN_CLIP_REPO"
    case $OPEN_CLIP_REPO in
        /* | file://*) # a local repository may forbid to fetch one commit without its blobs
            git -C "$new" config remote.origin.uploadpack \
                "git -c uploadpack.allowFilter=true -c uploadpack.allowAnySHA1InWant=true upload-pack" ;;
    esac
    git -C "$new" sparse-checkout init --cone
    git -C "$new" sparse-checkout set src tests
    git -C "$new" fetch -q --no-tags --depth 1 --filter=blob:none origin "$OPEN_CLIP_COMMIT" &&
        git -C "$new" checkout -q --detach "$OPEN_CLIP_COMMIT" ||
        fail "could not get commit $OPEN_CLIP_COMMIT from $OPEN_CLIP_REPO (git's message is above);" \
            "set OPEN_CLIP_REPO to another clone of OpenCLIP, or use --source pypi"
}

from_wheels() {
    local wheel package
    for wheel in "${WHEELS[@]}"; do
        package=${wheel#*:} wheel=${wheel%:*}
        "$PYTHON" -m pip download -qq --disable-pip-version-check --no-deps --only-binary :all: \
            -d "$work/$package" "$wheel" ||
            fail "'$PYTHON -m pip download $wheel' failed (its message is above); set PYTHON to a Python that has" \
                "pip and reaches a package index, or use --source git"
        "$PYTHON" -m zipfile -e "$work/$package"/*.whl "$work/$package"
        mkdir -p "$new/src"
        mv "$work/$package/$package" "$new/src/"
    done
    git init -q "$new"
    git -C "$new" config core.autocrlf false
    printf '%s\n' __pycache__/ '*.egg-info/' logs/ wandb/ >>"$new/.git/info/exclude" # OpenCLIP's .gitignore has these
    git -C "$new" add -A
    GIT_AUTHOR_DATE="2024-05-29 00:00 +0000" GIT_COMMITTER_DATE="2024-05-29 00:00 +0000" \
        git -C "$new" -c user.name=setup_open_clip -c user.email=setup_open_clip -c commit.gpgsign=false \
        commit -q --no-verify -m "Unpatched, from ${WHEELS[*]}"
    git -C "$new" -c tag.gpgsign=false tag "$WHEELS_TAG"
}

from_dest() { # the files only, from the tree that is there
    local base=$WHEELS_TAG
    SOURCE=pypi
    if ! git -C "$DEST" rev-parse -q --verify "$base" >/dev/null; then
        base=$OPEN_CLIP_COMMIT SOURCE=git
        git -C "$DEST" rev-list HEAD 2>/dev/null | grep -x "$base" >/dev/null ||
            fail "$DEST is a git repository, but not at commit $base; choose another --dest, or $or_force"
    fi
    mkdir "$new"
    (
        export GIT_INDEX_FILE=$work/index # the tree's own index stays as it is
        cd "$DEST"
        git read-tree "$base"
        git ls-files -z -- src tests ':(glob)*' | git checkout-index -z --stdin --prefix="$new/"
    )
}

# --- from those to the finished tree -----------------------------------------------------------------------------

hash_files() ( # in folder $1, paths on stdin -> sorted "blob path" lines of those that exist
    cd "$1"
    sort -u | while IFS= read -r path; do [ ! -f "$path" ] || echo "$path"; done >"$work/paths"
    git hash-object --no-filters --stdin-paths <"$work/paths" | paste -d ' ' - "$work/paths" | sort
)

patch_tree() { # check, patch and complete $new; list it in $work/expected
    local want path found
    while read -r want path; do
        found=$(git hash-object --no-filters "$new/$path" 2>/dev/null || echo "no such file")
        [ "$found" = "$want" ] || fail "$path is not the pinned commit's: found $found, expected $want;" \
            "check OPEN_CLIP_REPO and OPEN_CLIP_COMMIT, or use another --source"
    done <<<"$PINNED_BLOBS"
    (cd "$new" && git apply "$ROOT/open_clip.patch") 2>"$work/warnings" && [ ! -s "$work/warnings" ] ||
        fail "open_clip.patch does not apply cleanly: $(cat "$work/warnings")"
    cp -r "$ROOT/configs" "$new/"
    cp -r "$ROOT/dr" "$new/src/training/"
    find "$new" -name __pycache__ -prune -exec rm -rf {} +
    (cd "$new" && find . -name .git -prune -o -type f -print | sed 's|^\./||') | hash_files "$new" >"$work/expected"
}

# --- a new tree --------------------------------------------------------------------------------------------------

if [ -n "$force" ] || [ -z "$(ls -A "$DEST" 2>/dev/null)" ]; then
    if [ "$SOURCE" = auto ]; then
        SOURCE=git
        why=$(reach_repo) || { say "can't reach $OPEN_CLIP_REPO ($why): using the two wheels instead"; SOURCE=pypi; }
    fi
    if [ "$SOURCE" = git ]; then from_git; else from_wheels; fi
    patch_tree
    mkdir "$new/.git/dr-setup"
    mv "$work/expected" "$new/.git/dr-setup/manifest"
    if [ -n "$(ls -A "$DEST" 2>/dev/null)" ]; then
        old=$DEST.old-$(date +%Y%m%d-%H%M%S)
        mv -T "$DEST" "$old"
        say "kept what was there, logs included, as $old"
    fi
    mv -T "$new" "$DEST"
    say "made $DEST from $SOURCE"
    exit
fi

# --- a tree that is there ----------------------------------------------------------------------------------------

[ -d "$DEST/.git" ] ||
    fail "$DEST exists and is not a clone of OpenCLIP (no .git folder in it); choose another --dest, or $or_force"
from_dest
patch_tree

if [ -f "$manifest" ]; then cp "$manifest" "$work/left"; else touch "$work/left"; fi # what an earlier run left
{
    cut -c 42- "$work/left" "$work/expected"
    git -C "$DEST" -c core.quotePath=false ls-files --cached --others --exclude-standard -- src configs ':!*/__pycache__/*'
} | hash_files "$DEST" >"$work/found"

sort -u "$work/left" "$work/expected" >"$work/ours"
comm -23 "$work/found" "$work/ours" | cut -c 42- >"$work/edited"
comm -13 "$work/found" "$work/expected" | cut -c 42- | sort >"$work/outdated" # or missing
comm -23 "$work/found" "$work/expected" | cut -c 42- | sort | comm -23 - "$work/outdated" >"$work/gone" # from configs/, dr/
[ -f "$manifest" ] || cat "$work/outdated" >>"$work/edited" # typed by hand: only an exact match surely holds no edits
if [ -s "$work/edited" ]; then
    echo "setup_open_clip: error: $DEST differs from what this script leaves there; nothing was touched. Files:" >&2
    sort -u "$work/edited" | sed -e 's/^/    /' -e '20{s/.*/    .../;q' -e '}' >&2
    fail "keep your edits with scripts/make_patch.sh (what the patch touches) or by copying them to configs/ and dr/," \
        "then run this again; or use $or_force"
fi

mkdir -p "$(dirname "$manifest")"
if [ -s "$work/outdated" ] || [ -s "$work/gone" ]; then
    cp "$work/ours" "$manifest" # until all are moved, both the old and the new files are this script's
    while IFS= read -r path; do rm "$DEST/$path"; done <"$work/gone"
    while IFS= read -r path; do
        mkdir -p "$(dirname "$DEST/$path")"
        mv -fT "$new/$path" "$DEST/$path"
    done <"$work/outdated"
    say "brought $DEST up to date: $(sort -u "$work/outdated" "$work/gone" | paste -sd ' ' -)"
else
    say "$DEST (from $SOURCE) is already right, left alone"
fi
mv "$work/expected" "$manifest"
