#!/usr/bin/env bash
# Everything that `make demo` and `make test` need, on a fresh Debian or Ubuntu machine: packages through apt, and a
# Python venv from requirements.txt. Without root it prints the one line to run. Does nothing where all is there.
#   dev/setup.sh build|tools|demo|test      tools: what build has, and the Python tools
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(g++ make libdnnl-dev libcli11-dev nlohmann-json3-dev libxxhash-dev)
case "${1:?build, tools, demo or test}" in
build) ;;
tools) packages+=(python3-venv) ;;
demo) packages+=(python3-venv bible-kjv) ;;
test) packages+=(python3-venv doctest-dev clang-format libboost-context-dev binutils bible-kjv openmpi-bin libopenmpi-dev) ;;
*)
    echo "setup.sh: $1: build, tools, demo or test" >&2
    exit 2
    ;;
esac

missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok installed' || missing+=("$package")
done
if ((${#missing[@]})); then
    if ((EUID != 0)); then
        echo "setup.sh: packages are missing; run: sudo apt-get update && sudo apt-get install -y ${missing[*]}" >&2
        exit 1
    fi
    echo "setup: installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

# The stamp is the requirements themselves, so that a changed pin installs anew.
if [[ $1 != build ]] && ! cmp -s requirements.txt .venv/installed.txt; then
    echo "setup: Python packages into .venv"
    rm -rf .venv
    python3 -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
fi

# Where kernels are assembled, dev/sass.py counts their instructions: 5 MB, unless the toolkit has the disassembler.
if [[ $1 == test ]]; then
    nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null || true)
    if [[ -n $nvcc && ! -x ${nvcc%/nvcc}/nvdisasm ]] && ! ls .venv/lib/python3*/site-packages/nvidia/cu*/bin/nvdisasm >/dev/null 2>&1; then
        .venv/bin/pip install --quiet --disable-pip-version-check nvidia-cuda-nvdisasm==13.5.37 ||
            echo "setup: no nvdisasm from PyPI; instructions will not be counted"
    fi
fi
