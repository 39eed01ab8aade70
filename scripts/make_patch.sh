#!/usr/bin/env bash
# Write open_clip.patch from an edited OpenCLIP tree, or open_clip_v3.patch from one of release 3.3.
#
#     bash scripts/make_patch.sh [--check] [TREE …]
#
#   TREE       default: open_clip/ at this repository's root
#   --check    write nothing; exit 1 if a patch differs from the changes in its tree
#
# The script compares the tree's tracked files with the unpatched commit or, in a tree made from
# PyPI packages, with their files. The patch is the same for both kinds of tree and for any git
# settings.
# It does not cover configs/ and dr/: edit those at the repository's root, not in the tree. The
# script works on trees made by scripts/setup_open_clip.sh, and on trees made with the commands in
# docs/training.md.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
WHEELS_TAG=open_clip_wheels # marks the unpatched commit of a tree made from PyPI packages

# shellcheck source-path=SCRIPTDIR source=open_clip_versions.sh
source "$ROOT/scripts/open_clip_versions.sh"

say() { echo "make_patch: $*"; }
fail() { echo "make_patch: error: $*" >&2; exit 1; }

check=
trees=()
while [ $# -gt 0 ]; do
    case $1 in
        --check) check=yes ;;
        -h | --help) sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        -*) fail "found '$1', expected --check, --help or a folder" ;;
        *) trees+=("$1") ;;
    esac
    shift
done
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE

make_patch() ( # make_patch TREE: write the tree's changes to the patch of its version, or check it
    tree=$1
    [ -d "$tree/.git" ] || fail "$tree is not an OpenCLIP tree (it has no .git folder); make one" \
        "with scripts/setup_open_clip.sh"
    version=$(open_clip_version "$tree")
    use_open_clip "${version:-pinned}"

    base=$WHEELS_TAG
    git -C "$tree" rev-parse -q --verify "$base" >/dev/null || base=$OPEN_CLIP_COMMIT
    git -C "$tree" rev-parse -q --verify "$base^{commit}" >/dev/null ||
        fail "$tree has no commit $base; check out that commit there, or make a tree with" \
            "scripts/setup_open_clip.sh"

    # Every option that changes the text is spelled out, so that the user's git settings do not.
    # Full ids, as the length of short ones depends on the tree.
    new=$(mktemp "$ROOT/$PATCH.tmp-XXXXXX")
    trap 'rm -f "$new"' EXIT
    git -C "$tree" -c core.quotePath=true -c diff.suppressBlankEmpty=false diff --no-color \
        --no-ext-diff --no-textconv --no-renames --full-index --unified=3 --inter-hunk-context=0 \
        --diff-algorithm=myers --indent-heuristic --src-prefix=a/ --dst-prefix=b/ -O/dev/null \
        --no-relative "$base" -- . ':!configs' ":!src/$TRAINER/dr" >"$new"
    [ -s "$new" ] || fail "$tree has no changes against $base; apply $PATCH there first" \
        "(scripts/setup_open_clip.sh)"

    stat=$(git -C "$tree" apply --numstat "$new") # added, removed, path
    lines=$(awk '{n += $1 + $2} END {print n}' <<<"$stat")
    say "$lines changed lines (added + removed) in $(wc -l <<<"$stat") files"
    elsewhere=$(awk -v own="^src/$TRAINER/" '$3 !~ own {print $3}' <<<"$stat" | paste -sd ' ' -)
    [ -z "$elsewhere" ] || say "note: changed outside src/$TRAINER/: $elsewhere"
    untracked=$(git -C "$tree" ls-files --others --exclude-standard -- src ":!src/$TRAINER/dr")
    [ -z "$untracked" ] || say "note: the patch does not include the files that git does not" \
        "track (git add -N includes them): $(paste -sd ' ' - <<<"$untracked")"

    if cmp -s "$new" "$ROOT/$PATCH"; then
        say "$PATCH is what the tree has"
    elif [ -n "$check" ]; then
        diff -u "$ROOT/$PATCH" "$new" >&2 || true
        fail "$PATCH is not what $tree has (see above: - the patch, + the tree); if the tree is" \
            "right, run scripts/make_patch.sh, else scripts/setup_open_clip.sh"
    else
        chmod 644 "$new"
        mv "$new" "$ROOT/$PATCH"
        say "wrote $ROOT/$PATCH"
    fi
)

[ ${#trees[@]} -gt 0 ] || trees=("$ROOT/open_clip")
for tree in "${trees[@]}"; do
    make_patch "$tree"
done
