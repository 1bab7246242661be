#!/usr/bin/env bash
# Make the development environment: a virtual environment with the pinned stack, mmcv with compiled
# operators, and this project in editable form.
#
#   .dev_scripts/setup_env.sh [VENV]        default: .venv in the repository
#
#   PYTHON    interpreter to build on, 3.10 or newer (default: python3)
#   MAX_JOBS  compiler processes for mmcv (default: by cores and memory)
#
# Safe to interrupt and to run twice at once: a file lock lets one set-up at a time touch VENV, and
# the stamp that calls VENV ready is written last. pip's own settings (index, proxy, find-links) are
# obeyed, so that is where a CPU-only torch or a mirror is chosen.
set -euo pipefail

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-python3}"
VENV="${1:-$REPO/.venv}"
CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/vheat_mm"
SECONDS=0

step() { printf '[%s/6] %s\n' "$1" "$2"; }
die() { printf 'set-up: %s\n' "$@" >&2; exit 1; }
python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

# ---- what is there, what is wanted --------------------------------------------------------------
command -v "$PYTHON" >/dev/null || die "no '$PYTHON' here; name one with PYTHON=/path/to/python3.11"
found="$(python_version "$PYTHON")" ||
    die "'$PYTHON' does not start; name a working one with PYTHON=/path/to/python3.11"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "Python 3.10 or newer is needed and '$PYTHON' is $found; try PYTHON=python3.11"

mkdir -p "$(dirname "$VENV")" "$CACHE/locks"
VENV="$(cd "$(dirname "$VENV")" && pwd)/$(basename "$VENV")"
STAMP="$VENV/.vheat_mm-ready"
UNFINISHED="$VENV/.vheat_mm-unfinished"
# The repository's path is part of it because the editable install points there.
want="$("$PYTHON" - "$REPO" "$found" <<'PY'
import hashlib, pathlib, sys
repo = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(repr(sys.argv[1:]).encode())
for path in [*sorted(repo.glob('requirements/*.txt')), repo / 'setup.py', repo / 'pyproject.toml']:
    digest.update(path.name.encode() + path.read_bytes())
print(digest.hexdigest())
PY
)"
stop_if_ready() {
    if [[ -f $STAMP && $(<"$STAMP") == "$want" ]] && python_version "$VENV/bin/python" >/dev/null; then
        echo "environment ready: $VENV"
        exit 0
    fi
}
stop_if_ready
exec 8>"$CACHE/locks/$(cksum <<<"$VENV" | tr -d ' ')"
"$PYTHON" "$REPO/.dev_scripts/lock.py" 8 "$VENV"
stop_if_ready # made by the set-up we waited for

# ---- virtual environment ------------------------------------------------------------------------
step 1 "Python $found -> $VENV"
if [[ -f $UNFINISHED ]]; then
    echo "      an earlier set-up was interrupted: starting afresh"
    rm -rf "$VENV"
elif [[ -e $VENV ]]; then
    [[ -f $VENV/pyvenv.cfg ]] ||
        die "$VENV exists and is no virtual environment; move it away or choose another: VENV=DIR"
    has="$(python_version "$VENV/bin/python")" || has="broken"
    [[ $has == "$found" ]] ||
        die "$VENV is on Python $has, '$PYTHON' is $found; remove it or choose another: VENV=DIR"
fi
mkdir -p "$VENV"
touch "$UNFINISHED"
rm -f "$STAMP"
if [[ ! -f $VENV/pyvenv.cfg ]] && ! log="$("$PYTHON" -m venv "$VENV" 2>&1)"; then
    echo "$log" >&2
    die "no virtual environment could be made; on Debian and Ubuntu: apt install python$found-venv"
fi
PY="$VENV/bin/python"
pip() { "$PY" -m pip --disable-pip-version-check "$@"; }

# ---- packages -----------------------------------------------------------------------------------
step 2 "pinned packages (requirements/pinned.txt; torch is the large one)"
pip install -qq -r "$REPO/requirements/pinned.txt"

step 3 "OpenMMLab packages (requirements/openmmlab.txt)"
if "$PY" -c 'import importlib.metadata as m; m.version("opencv-python")' 2>/dev/null; then
    # Both wheels own the same cv2 folder, so removing one breaks the other: put headless back.
    pip uninstall -qq -y opencv-python opencv-python-headless
    pip install -qq -r "$REPO/requirements/pinned.txt"
fi
pip install -qq --no-deps -r "$REPO/requirements/openmmlab.txt"

step 4 "mmcv with compiled operators (requirements/mmcv.txt)"
"$REPO/.dev_scripts/build_mmcv.sh" "$PY"

step 5 "libraries beside the stack, for tests (requirements/interop.txt)"
interop="$VENV/interop" content="$(cksum <"$REPO/requirements/interop.txt")"
if [[ ! -f $interop/.ready || $(<"$interop/.ready") != "$content" ]]; then
    rm -rf "$interop" # in a target folder, pip replaces nothing
    pip install -qq --no-deps --target "$interop" -r "$REPO/requirements/interop.txt"
    echo "$content" >"$interop/.ready"
fi

step 6 "vheat_mm, editable"
pip install -qq --no-deps --no-build-isolation -e "$REPO"

echo "$want" >"$STAMP"
rm -f "$UNFINISHED"
printf 'environment ready in %d min %02d s: %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$VENV"
