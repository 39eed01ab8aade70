# shellcheck shell=bash
# Sourced by setup_open_clip.sh and make_patch.sh: the versions of OpenCLIP that have a patch.
#
# use_open_clip VERSION: set what is particular to `pinned` (the commit of May 2024 on which the
# published recipes are defined) or `3.3` (release 3.3.0 of February 2026), and fail for others.
#
#   OPEN_CLIP_COMMIT  the unpatched commit
#   TRAINER           package of the trainer in src/
#   PATCH             the patch at this repository's root
#   WHEELS            where PyPI has the same files, as wheel:package
#   BLOBS             git's ids of the files that the patch changes or that dr/ depends on
#
# open_clip_version TREE: print the version of the tree, or nothing if there is none.
#
# shellcheck disable=SC2034  # used by the scripts that source this file

use_open_clip() {
    case $1 in
        pinned)
            OPEN_CLIP_COMMIT=${OPEN_CLIP_COMMIT:-cf86ee7ec4658845f640858ecd34d0f15588271a}
            TRAINER=training
            PATCH=open_clip.patch
            WHEELS=(open_clip_torch==2.26.1:open_clip open_clip_torch==2.24.0:training)
            BLOBS="\
86b44862f46ef483665d555da33c3a5c1c499416 src/open_clip/factory.py
5beaab1c32ae2a826261c337b47548adf77b53de src/open_clip/loss.py
07b9fee961d211eeb0c60c0fbd595a3a0ba12518 src/training/data.py
c3d19302d97c8c24166322922eab75a76c68b33f src/training/params.py
a48a3459390ea986b56a46a720ae2921e9f9c3d3 src/training/train.py
94496999f4ced80927499ebdb26dfed19d77bbc1 src/training/main.py"
            ;;
        3.3)
            OPEN_CLIP_COMMIT=${OPEN_CLIP_COMMIT:-30573618fc375b12f094ef64cb3a1391cf611c45} # v3.3.0
            TRAINER=open_clip_train
            PATCH=open_clip_v3.patch
            WHEELS=(open_clip_torch==3.3.0:open_clip open_clip_torch==3.3.0:open_clip_train)
            BLOBS="\
971354b3964fc77ceefbdda445c2141096fe94e7 src/open_clip/factory.py
722e77a7c2e34a9342f110455a73171b4e8bcbb7 src/open_clip/loss.py
07b9fee961d211eeb0c60c0fbd595a3a0ba12518 src/open_clip_train/data.py
1fdc2b28dfd00fd83c2bc6b564d8cc5fe60cc66a src/open_clip_train/params.py
d842820f6a5995fd91254ed54699360273a13177 src/open_clip_train/train.py
715631c18b34491a7f9fe6d99922ec4f3643913d src/open_clip_train/main.py"
            ;;
        *) return 1 ;;
    esac
}

open_clip_version() {
    [ ! -d "$1/src/open_clip_train" ] || echo 3.3
    [ ! -d "$1/src/training" ] || echo pinned
}
