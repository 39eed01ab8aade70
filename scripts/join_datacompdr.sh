# shellcheck shell=bash
# Sourced by join_datacompdr12m.sh and join_datacompdr1b.sh: starts scripts/join_shards.py on a data
# set of DataCompDR.
#
# Expects ROOT.

SHARDS=${SHARDS:-}   # brace pattern of names; empty: all shards of the reinforcements
WORKERS=${WORKERS:-} # processes; empty: one for each core, up to 8
# 1: the image shards have other names, or are split at other samples; an index finds each uid.
IMAGES_UNALIGNED=${IMAGES_UNALIGNED:-}
PYTHON=${PYTHON:-${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}}
# .venv is made by quickstart.sh and test.sh.
[ -n "$PYTHON" ] || [ ! -x "$ROOT/.venv/bin/python" ] || PYTHON=$ROOT/.venv/bin/python
PYTHON=${PYTHON:-python3}

join() { # join DATASET OPTION …
    local dataset=$1
    shift
    case " $* " in
        *" -h "* | *" --help "*)
            sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "$0"
            printf '\nFurther options (the script sets --dataset, --shards, --workers):\n\n'
            exec "$PYTHON" "$ROOT/scripts/join_shards.py" --help ;;
    esac
    exec "$PYTHON" "$ROOT/scripts/join_shards.py" --dataset "$dataset" \
        ${IMAGES_UNALIGNED:+--images-unaligned} ${SHARDS:+--shards "$SHARDS"} \
        ${WORKERS:+--workers "$WORKERS"} "$@"
}
