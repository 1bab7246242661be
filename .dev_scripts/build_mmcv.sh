#!/usr/bin/env bash
# Install the pinned mmcv with its compiled operators into an environment that already has torch; beside
# onedl-mmengine it is the pinned onedl-mmcv.
#
#   .dev_scripts/build_mmcv.sh [PYTHON]     PYTHON: the environment's interpreter (default: python)
#
#   MAX_JOBS  compiler processes (default: by cores and memory)
#   CFLAGS    the compiler's options (default: -g0 -O2; without debug symbols it takes a third of the time)
#
# It is compiled once per machine and kept as a wheel in
#   ${XDG_CACHE_HOME:-~/.cache}/vheat_mm/wheels/py<version>-torch<version>-<cpu|cuXXX>-<arch>/
# An interrupted build leaves no wheel; a second build at the same time waits for the first.
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
PY="$(command -v "${1:-python}")" || { echo "mmcv: no '${1:-python}' here" >&2; exit 1; }
CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/vheat_mm"
PINS="$HERE/../requirements/mmcv.txt"
"$PY" -c 'import importlib.metadata as m; m.version("onedl-mmengine")' 2>/dev/null && PINS="$HERE/../requirements/onedl.txt"
MMCV="$(grep -E '^(onedl-)?mmcv==' "$PINS")"
NAME="${MMCV%%==*}"

die() { printf 'mmcv: %s\n' "$@" >&2; exit 1; }
pip() { "$PY" -m pip --disable-pip-version-check "$@"; }

# CUDA operators need torch's CUDA build and nvcc; without both the CPU operators are built.
probe="$("$PY" - "$(uname -m)" <<'PY'
import shutil, sys
import torch
from torch.utils.cpp_extension import CUDA_HOME
cuda = torch.version.cuda
with_cuda = bool(cuda and torch.cuda.is_available() and (CUDA_HOME or shutil.which('nvcc')))
kind = 'cu' + cuda.replace('.', '') if cuda else 'cpu'
if cuda and not with_cuda:
    kind += '_cpuops'
python, torch_version = '%d%d' % sys.version_info[:2], torch.__version__.split('+')[0]
print(f'py{python}-torch{torch_version}-{kind}-{sys.argv[1]}', int(with_cuda))
PY
)" || die "torch does not import in $PY; install it first"
read -r key cuda <<<"$probe"
WHEELS="$CACHE/wheels/$key"
LOG="$CACHE/mmcv-build-$key.log"
mkdir -p "$WHEELS"

cached_wheel() {
    local wheel
    for wheel in "$WHEELS/${NAME//-/_}-${MMCV#*==}"-*.whl; do
        [[ -f $wheel ]] || return 1
        if "$PY" -m zipfile -t "$wheel" >/dev/null 2>&1; then
            echo "$wheel"
            return 0
        fi
        rm -f "$wheel"
    done
    return 1
}

find_compiler() {
    local compiler
    compiler="$(command -v "${CXX:-g++}" || command -v clang++ || command -v c++)" ||
        die "no C++ compiler (g++, clang++), and the operators must be compiled." \
            "On Debian and Ubuntu: apt install g++; on Fedora: dnf install gcc-c++"
    [[ -f $("$PY" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h ]] ||
        die "Python.h is missing; on Debian and Ubuntu: apt install python3-dev"
    echo "$compiler"
}

default_jobs() { # one translation unit with torch's headers takes up to 2 GB
    "$PY" -c 'import os, psutil
print(max(1, min(os.cpu_count() or 1, psutil.virtual_memory().total // 2**31)))'
}

# Shows ninja's [n/m]: one line that counts on a terminal, some twenty lines elsewhere.
show_progress() {
    local tty=0
    [[ -t 1 ]] && tty=1
    awk -v tty="$tty" '
        match($0, /\[[0-9]+\/[0-9]+\]/) {
            split(substr($0, RSTART + 1, RLENGTH - 2), at, "/")
            if (at[1] == shown) next
            shown = at[1]
            if (tty) { printf "\r      compiling mmcv [%d/%d]   ", at[1], at[2]; open = 1 }
            else if (at[1] == 1 || at[1] == at[2] || at[1] % int(at[2] / 20 + 1) == 0)
                printf "      compiling mmcv [%d/%d]\n", at[1], at[2]
            fflush()
        }
        END { if (open) printf "\n" }'
}

compile() {
    local compiler jobs settings
    compiler="$(find_compiler)" || exit 1
    # setuptools 81 removed pkg_resources, which mmcv's set-up imports.
    pip install -qq ninja psutil wheel 'setuptools<81'
    jobs="${MAX_JOBS:-$(default_jobs)}"
    build="$(mktemp -d "$WHEELS/build.XXXXXX")" # beside its target: the move is then one rename
    trap 'rm -rf "$build"' EXIT
    echo "      compiling $MMCV once, several minutes, $jobs jobs; log: $LOG"
    settings=(MMCV_WITH_OPS=1 MAX_JOBS="$jobs" CXX="$compiler" CFLAGS="${CFLAGS--g0 -O2}" FORCE_CUDA="$cuda" TMPDIR="$build"
        PATH="$(dirname "$PY"):$PATH")
    [[ $cuda == 1 ]] || settings+=(CUDA_VISIBLE_DEVICES=)
    # Not isolated: an isolated build sees no torch and makes an mmcv without operators.
    env "${settings[@]}" "$PY" -m pip --disable-pip-version-check wheel -v --no-build-isolation \
        --no-deps --no-cache-dir --no-binary "$NAME" -w "$build/out" "$MMCV" 2>&1 |
        tee "$LOG" | show_progress || {
        tail -n 25 "$LOG" >&2
        die "$MMCV did not compile; above is the end of $LOG"
    }
    mv "$build"/out/*.whl "$WHEELS/"
    rm -f "$LOG"
}

if ! wheel="$(cached_wheel)"; then
    exec 9>"$WHEELS/.lock"
    "$PY" "$HERE/lock.py" 9 "the mmcv wheel"
    if ! wheel="$(cached_wheel)"; then # not made by the build we waited for
        rm -rf "$WHEELS"/build.*       # left by a killed build; the lock keeps others out
        compile
        wheel="$(cached_wheel)" || die "the wheel just built in $WHEELS is not readable"
    fi
fi
echo "      $wheel"
pip install -qq --no-deps --force-reinstall "$wheel"
"$PY" -c 'import mmcv.ops' ||
    die "the compiled operators do not load; remove $wheel and run this again"
