#!/bin/sh
# One optimizer step of GPT-2 124M at B=4 T=64 against a checkout of llm.c, same threads, alternating runs.
#
#   dev/bench/vs_llmc.sh DIR [--turns 5] [--threads N] [--build build/cpu]
#
# DIR stays as it is: the build happens in a copy, by llm.c's own Makefile (-Ofast -march=native -fopenmp). CC chooses
# the compiler, PYTHON the interpreter (numpy is all it needs).
set -eu

if [ $# -lt 1 ] || [ ! -f "$1/train_gpt2.c" ]; then
    echo "usage: dev/bench/vs_llmc.sh DIR [options], where DIR holds llm.c's train_gpt2.c" >&2
    exit 2
fi
llmc=$1
shift
root=$(cd "$(dirname "$0")/../.." && pwd)

copy=$(mktemp -d "${TMPDIR:-/tmp}/longhand_llmc_XXXXXX")
trap 'rm -rf "$copy"' EXIT
trap 'exit 1' INT TERM
cp -r "$llmc/Makefile" "$llmc/train_gpt2.c" "$llmc/llmc" "$copy"
make -C "$copy" train_gpt2 >"$copy/log" 2>&1 || { cat "$copy/log" >&2; exit 1; }
# Without OpenMP llm.c would run on one core, and the ratio would flatter us.
grep -q 'OpenMP found' "$copy/log" || { echo "llm.c's Makefile found no OpenMP; install it, or set CC=gcc" >&2; exit 1; }
grep -- -Ofast "$copy/log" | head -1

make -C "$root" -s cpu
make -C "$root" -s cpu PRECISION=bf16

if [ -z "${PYTHON:-}" ]; then
    PYTHON=$root/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
"$PYTHON" "$root/dev/bench/side_by_side.py" --llmc "$copy/train_gpt2" "$@"
