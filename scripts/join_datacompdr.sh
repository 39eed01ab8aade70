# shellcheck shell=bash
# Start scripts/join_shards.py on a data set of DataCompDR. Sourced by join_datacompdr12m.sh and
# join_datacompdr1b.sh.
#
# Expects ROOT, and in CAPTIONS, IMAGES, REINFORCEMENTS and OUTPUT the names of the variables that
# hold the four folders.

SHARDS=${SHARDS:-}   # brace pattern of names; empty: all shards of the reinforcements
WORKERS=${WORKERS:-} # processes; empty: one for each core, up to 8
# 1: the image shards have other names, or are split at other samples; an index finds each uid.
IMAGES_UNALIGNED=${IMAGES_UNALIGNED:-}
PYTHON=${PYTHON:-${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}}
# .venv is made by quickstart.sh and test.sh.
[ -n "$PYTHON" ] || [ ! -x "$ROOT/.venv/bin/python" ] || PYTHON=$ROOT/.venv/bin/python
PYTHON=${PYTHON:-python3}

need() { # need VARIABLE SCRIPT: exit if the folder in VARIABLE does not exist; SCRIPT makes it
    [ -d "${!1}" ] && return
    echo "$(basename "$0" .sh): error: no folder ${!1} ($1): run $2, or set $1" >&2
    exit 1
}

join() { # join OPTION …
    case " $* " in
        *" -h "* | *" --help "*)
            sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "$0"
            printf '\nFurther options (the script sets --source, --output, --shards, --workers):\n\n'
            exec "$PYTHON" "$ROOT/scripts/join_shards.py" --help ;;
        *" --report "*) exec "$PYTHON" "$ROOT/scripts/join_shards.py" --output "${!OUTPUT}" --report ;;
    esac
    need "$REINFORCEMENTS" "$REINFORCEMENTS_FROM"
    # shellcheck disable=SC2153  # IMAGES is set by the script that sources this one
    need "$IMAGES" scripts/download_images.sh
    local images=--source captions=()
    [ -z "$IMAGES_UNALIGNED" ] || images=--unaligned-source
    if [ -n "${!CAPTIONS}" ]; then # empty: the image shards hold the captions
        need "$CAPTIONS" "$CAPTIONS_FROM"
        captions=(--source "${!CAPTIONS}")
    fi
    # The first source's member is used: the captions must be those that were embedded.
    exec "$PYTHON" "$ROOT/scripts/join_shards.py" \
        ${captions[@]+"${captions[@]}"} "$images" "${!IMAGES}" --source "${!REINFORCEMENTS}" \
        --output "${!OUTPUT}" ${SHARDS:+--shards "$SHARDS"} ${WORKERS:+--workers "$WORKERS"} "$@"
}
