#!/usr/bin/env bash
# Create the Python environment of this clone in .venv; `make install` calls it.
#
#   scripts/bootstrap.sh            create .venv, or return at once if it is up to date
#   MUOMNI_VENV=DIR ...             use the environment in DIR as is; nothing is installed into it
#   MUOMNI_PYTHON=PROGRAM ...       create .venv with this interpreter
#   MUOMNI_INSTALLER=pip ...        install with pip even if uv is on the PATH
#
# Every failure is one sentence that names the remedy. The stamp is written last, so an interrupted
# installation starts over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=.venv
readonly stamp=$venv/.stamp
readonly marker=$venv/.made-by-bootstrap # distinguishes our unfinished folder from a user's own
readonly oldest_driver=580               # for CUDA 13, which the torch of requirements/lock.txt is built for
readonly num_free_gb_needed=12           # 6.6 GB once installed, plus downloads meanwhile

die() {
    echo "bootstrap: $*" >&2
    exit 1
}

say() { echo "bootstrap: $*"; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

# Print the first Python >= 3.10 that can create environments.
find_python() {
    local python old_enough=""
    for python in ${MUOMNI_PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        is_new_enough "$python" || continue
        old_enough=$python
        if "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            echo "$python"
            return
        fi
    done
    [ -z "$old_enough" ] ||
        die "$old_enough has no venv module; install it, for example with: apt-get install python3-venv"
    if [ -n "${MUOMNI_PYTHON:-}" ]; then
        die "MUOMNI_PYTHON=$MUOMNI_PYTHON is not Python 3.10 or newer; choose another interpreter"
    fi
    die "no Python 3.10 or newer found; install one, for example with: apt-get install python3 python3-venv"
}

# DeepSpeed compiles its shared-memory op when ranks first start on CPU.
check_compiler() {
    local compiler=${CXX:-c++}
    $compiler -x c++ -fsyntax-only - >/dev/null 2>&1 <<<'#include <vector>' ||
        die "no working C++ compiler ($compiler); install one, for example with: apt-get install g++"
}

check_disk() {
    local num_free_kb
    num_free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
    [ "$num_free_kb" -ge $((num_free_gb_needed * 1000 * 1000)) ] ||
        die "$PWD has $((num_free_kb / 1000 / 1000)) GB of free disk space, but the installation needs $num_free_gb_needed GB; free some, or move the clone to another disk"
}

# The content of an up-to-date stamp: the location (scripts in bin/ contain that path) and the sources.
fingerprint() {
    echo "$PWD"
    cat pyproject.toml requirements/lock.txt | sha256sum
}

use_existing() {
    local python=$MUOMNI_VENV/bin/python
    [ -x "$python" ] || die "MUOMNI_VENV=$MUOMNI_VENV is not a virtual environment: bin/python is missing"
    "$python" - <<'PYTHON' || exit 1
import importlib.util
import sys

needed = "torch torchvision torchaudio deepspeed webdataset sentencepiece mlflow sqlalchemy yaml jiwer"
needed += " soundfile pydantic safetensors PIL numpy tqdm psutil pyarrow fsspec aiohttp braceexpand simplejpeg"
needed += " imagesize filelock shtab s3fs huggingface_hub tensorboard pytest xdist hypothesis moto build codespell_lib"
needed += " pyright ruff transformers open_clip mkdocs material pocketsphinx"
missing = [name for name in needed.split() if importlib.util.find_spec(name) is None]
if missing:
    print(
        f"bootstrap: MUOMNI_VENV={sys.prefix} lacks {', '.join(missing)}; install them with: "
        f"{sys.executable} -m pip install -e '.[dev]' -c requirements/lock.txt",
        file=sys.stderr,
    )
    sys.exit(1)
PYTHON
}

install_packages() {
    if [ "${MUOMNI_INSTALLER:-uv}" != pip ] && command -v uv >/dev/null; then
        uv pip install --python "$venv/bin/python" "$@"
    else
        "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@"
    fi
}

# Cached in the home folder, so the first training run does not wait for it. Without the Python
# headers, ranks communicate through gloo alone: slower, but correct.
compile_op() {
    if ! "$venv/bin/python" -c 'import os, sys, sysconfig
sys.exit(not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")))'; then
        say "[3/3] Python.h is missing, so gradient exchange between ranks will be slightly slower; to fix that: apt-get install python3-dev"
        return
    fi
    say "[3/3] compiling DeepSpeed's shared-memory op (about a minute, once)"
    DS_ACCELERATOR=cpu PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -c \
        'from deepspeed.comm.torch import build_shm_op; build_shm_op()' >"$venv/compile.log" 2>&1 || {
        tail -n 20 "$venv/compile.log" >&2
        die "DeepSpeed's shared-memory op did not compile; the log is $venv/compile.log"
    }
}

# Training would refuse to start; the driver may be updated later, so this is no error.
warn_of_old_driver() {
    local driver
    command -v nvidia-smi >/dev/null || return 0
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || return 0
    [[ $driver =~ ^([0-9]+)\. ]] || return 0
    [ "${BASH_REMATCH[1]}" -ge "$oldest_driver" ] ||
        say "driver $driver is older than $oldest_driver, so the locked torch (CUDA 13) cannot use the GPUs; update the driver, or install a torch build for CUDA 12 into $venv, as pytorch.org describes"
}

install() {
    local python
    python=$(find_python)
    check_compiler
    if [ -e "$venv" ] && [ ! -e "$marker" ]; then
        die "$PWD/$venv exists but was not created by this script; remove it, or set MUOMNI_VENV=$PWD/$venv to use it"
    fi
    if [ ! -e "$stamp" ] || [ "$(head -n 1 "$stamp")" != "$PWD" ]; then
        rm -rf "$venv"
        check_disk
        say "[1/3] creating $venv with $("$python" --version)"
        mkdir "$venv"
        touch "$marker"
        "$python" -m venv "$venv" || die "$python -m venv $venv failed; see the messages above"
    fi
    rm -f "$stamp"
    say "[2/3] installing the versions of requirements/lock.txt (minutes; several GB)"
    install_packages --editable '.[dev]' --constraint requirements/lock.txt ||
        die "the packages could not be installed; see the messages above, then run the command again"
    compile_op
    warn_of_old_driver
    fingerprint >"$stamp"
    say "done: $PWD/$venv"
}

if [ -n "${MUOMNI_VENV:-}" ]; then
    use_existing
elif [ "$(cat "$stamp" 2>/dev/null)" != "$(fingerprint)" ]; then
    # One at a time, in case `make test` and `make quickstart` start together.
    exec 9>.venv.lock
    flock 9
    [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ] || install
fi
