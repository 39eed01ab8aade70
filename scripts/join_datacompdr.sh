# shellcheck shell=bash
# Sourced by join_datacompdr12m.sh and join_datacompdr1b.sh: starts scripts/join_shards.py on a data set of DataCompDR.
#
# Expects ROOT, and CAPTIONS, IMAGES, REINFORCEMENTS, OUTPUT: the names of the variables that hold the four folders.

SHARDS=${SHARDS:-}          # brace pattern of names; empty: every shard that the folder of reinforcements holds
WORKERS=${WORKERS:-}        # processes; empty: one for each core, up to 8
IMAGES_UNALIGNED=${IMAGES_UNALIGNED:-}  # 1: the image shards have other names or boundaries; an index finds each uid
PYTHON=${PYTHON:-${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}}
[ -n "$PYTHON" ] || [ ! -x "$ROOT/.venv/bin/python" ] || PYTHON=$ROOT/.venv/bin/python     # made by quickstart.sh or test.sh
PYTHON=${PYTHON:-python3}

need() { # need VARIABLE HINT: the folder that VARIABLE names must be there, or HINT says how to get it
    [ -d "${!1}" ] || { echo "$(basename "$0" .sh): error: no folder ${!1} ($1): $2 brings it, or set $1" >&2; exit 1; }
}

join() { # join OPTION …
    case " $* " in
        *" -h "* | *" --help "*)
            sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "$0"
            printf '\nOptions, beside --source, --output, --shards and --workers, which are set above:\n\n'
            exec "$PYTHON" "$ROOT/scripts/join_shards.py" --help ;;
        *" --report "*) exec "$PYTHON" "$ROOT/scripts/join_shards.py" --output "${!OUTPUT}" --report ;;
    esac
    need "$REINFORCEMENTS" "$REINFORCEMENTS_FROM"
    # shellcheck disable=SC2153  # IMAGES is set by the script that sources this one
    need "$IMAGES" scripts/download_images.sh
    local images=--source captions=()
    [ -z "$IMAGES_UNALIGNED" ] || images=--unaligned-source
    if [ -n "${!CAPTIONS}" ]; then # empty: the captions are those that came with the images
        need "$CAPTIONS" "$CAPTIONS_FROM"
        captions=(--source "${!CAPTIONS}")
    fi
    # of a member that two sources hold the first one's is taken: captions stay those that were embedded
    exec "$PYTHON" "$ROOT/scripts/join_shards.py" \
        ${captions[@]+"${captions[@]}"} "$images" "${!IMAGES}" --source "${!REINFORCEMENTS}" --output "${!OUTPUT}" \
        ${SHARDS:+--shards "$SHARDS"} ${WORKERS:+--workers "$WORKERS"} "$@"
}
