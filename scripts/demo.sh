#!/usr/bin/env bash
# A small GPT-2 on a real text, from nothing to samples in about three minutes on two cores:
# text -> tokenizer and shards -> training at context 1024 -> loss.png. `make demo` runs it; `make demo TEXT=my.txt`
# takes another text. Everything lands in demo/.
set -euo pipefail
cd "$(dirname "$0")/.."
text=${1:-}
minutes=${MINUTES:-3}

mkdir -p demo
if [[ -z $text ]]; then
    # The King James Bible as Debian ships it: 31,102 verses, 4.4 MB, public domain.
    text=demo/bible.txt
    [[ -s $text ]] || { bible -f Gen1:1-Rev22:21 >"$text.part" && mv "$text.part" "$text"; }
fi
[[ -s $text ]] || { echo "demo: $text: no such text" >&2; exit 2; }

echo "== tokens: a byte-level BPE of 2048 trained on $text"
rm -rf demo/data demo/run
.venv/bin/python data/prepare.py "$text" --out demo/data --train-tokenizer 2048 --val-fraction 0.05
