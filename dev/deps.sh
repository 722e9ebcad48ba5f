#!/usr/bin/env bash
# Unpacks the header-only packages (doctest, CLI11, nlohmann-json, xxhash) into DIR, without root and without installing
# anything; `make cuda DEPS=DIR` then builds on a machine that has no apt.
#   dev/deps.sh DIR
set -euo pipefail
dir=${1:?usage: dev/deps.sh DIR}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download doctest-dev libcli11-dev nlohmann-json3-dev libxxhash-dev >/dev/null
for package in *.deb; do dpkg -x "$package" unpacked; done
cp -r unpacked/usr/include/. "$dir"
# Some packages keep a folder of their own for doctest.h; the sources say <doctest/doctest.h>.
for header in doctest/doctest.h CLI/CLI.hpp nlohmann/json.hpp xxhash.h; do
    [[ -e $dir/$header ]] || {
        echo "deps.sh: $dir/$header is missing after unpacking" >&2
        exit 1
    }
done
echo "deps.sh: $(du -sh "$dir" | cut -f1) in $dir"
