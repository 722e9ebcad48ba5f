#!/usr/bin/env bash
# A small GPT-2 on a real text, from nothing to samples in about three minutes on two cores:
# text -> tokenizer and shards -> training at context 1024 -> loss.png. `make demo` runs it; `make demo TEXT=my.txt`
# takes another text. Everything lands in demo/.
set -euo pipefail
cd "$(dirname "$0")/.."
text=${1:-}
split=()

mkdir -p demo
if [[ -z $text ]]; then
    # The King James Bible as Debian ships it: 31,102 verses, 4.4 MB, public domain. A chapter is a document.
    text=demo/bible.txt
    bible -f Gen1:1-Rev22:21 | awk -F: 'chapter && chapter != $1 { print "" } { chapter = $1; print }' >"$text.part"
    mv "$text.part" "$text"
    split=(--split-on $'\n\n')
fi
[[ -s $text ]] || { echo "demo: $text: no such text" >&2; exit 2; }

echo "== tokens: a byte-level BPE of 2048 tokens, trained on $text"
# Beside the last demo, which stays if this text will not do.
.venv/bin/python data/prepare.py "$text" --out demo/new_tokens --force --train-tokenizer 2048 "${split[@]}"
rm -rf demo/tokens demo/run
mv demo/new_tokens demo/tokens

echo
echo "== training: 4 layers, width 192, context 1024"
./train_gpt2 --model 4,192,3 --tokenizer demo/tokens/tokenizer.bin \
    --train 'demo/tokens/train_*.bin' --val 'demo/tokens/val_*.bin' --context 1024 --batch 1 \
    --steps 1300 --lr 3e-3 --warmup 50 --val-every 100 --val-tokens 32768 \
    --sample-every 325 --sample-tokens 120 --save-every 650 --out demo/run

.venv/bin/python scripts/plot_loss.py demo/run -o demo/loss.png
echo
echo "== all of it is in demo/:"
echo "  demo/loss.png             train and validation loss against tokens"
echo "  demo/run/log.jsonl        every step, validation and sample"
echo "  demo/run/step_*/          the model; model.bin is an llm.c weights file"
echo "  demo/tokens/              token shards and the tokenizer"
echo "go on: .venv/bin/python scripts/generate.py demo/run 'In the beginning'"
