#!/usr/bin/env python3
"""Does an exported HuggingFace directory compute in transformers what the trainer computes?

    python -m venv VENV && VENV/bin/pip install -r dev/requirements-golden.txt
    ./train_pythia --eval logits --init runs/long --prompt-tokens 1,2,3 > logits.txt
    VENV/bin/python scripts/check_hf.py DIR --tokens 1,2,3 --logits logits.txt         # compare with the trainer's
    VENV/bin/python scripts/check_hf.py DIR --tokens tokens.npy --save logits.npy      # write transformers' own
    VENV/bin/python scripts/check_hf.py DIR --tokens 1,2,3 --texts texts.json --tokenizer data/tokenizer.json

tokens.npy is (B,T) or (T) whole numbers, logits.npy (B,T,V) or (T,V) numbers, or a .txt file of (T,V). The model runs
in fp32 with its weights widened, one sequence at a time. It must load without a missing, unexpected or misshaped tensor
and hold T tokens. texts.json is a list of texts: AutoTokenizer must give them the ids that data/prepare.py gives, every
special token an id that the model has, and a padded batch of them must continue as each of them does alone. Exits 1 if
anything is off, 2 on bad input. Needs torch and transformers; scripts/test_transformers.py runs it where it can install
them.
"""

import argparse
import json
import os
import sys

import golden_packages  # noqa: F401
import numpy as np
import torch
import transformers

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data"))
import vocabulary  # noqa: E402

# On the norm of the difference over that of the logits. Four random layers at 4,096 tokens, against float64 throughout:
# 7e-7 for GPT-2, 8e-7 to 3.4e-6 for GPT-NeoX, whose angles are fp32 in transformers and the worse the farther out.
BOUND, BOUND_PER_POSITION = 1e-5, 5e-9
NEW_TOKENS = 8  # that continue a text
CHUNK = 1024  # positions whose logits are in memory at once


class Refused(Exception):
    """One line for the user; exit code 2."""


def read_array(path: str, kinds: str, axes: int) -> np.ndarray:
    try:
        text = path.endswith(".txt")
        made = np.loadtxt(path, np.float32, ndmin=2) if text else np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: cannot be read as {'numbers' if text else '.npy'} ({error})") from error
    if made.dtype.kind not in kinds or made.ndim not in (axes - 1, axes) or not made.size:
        raise Refused(f"{path}: {made.dtype} of shape {made.shape} is not what is compared")
    return made if made.ndim == axes else made[None]


def load(folder: str, T: int):
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        written = json.load(file)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True, local_files_only=True
    )
    faults = {key: value for key, value in info.items() if value}
    context = written.get("longhand", {}).get("context", model.config.max_position_embeddings)
    print(f"{folder}: {type(model).__name__}, context {context:,}, {sum(p.numel() for p in model.parameters()):,} "
          f"parameters, {faults or 'every tensor in its place'}")
    if T > context:
        raise Refused(f"{folder}: its context is {context:,} and the tokens are {T:,}")
    return model.eval(), not faults


@torch.no_grad()
def check_texts(model, folder: str, texts: list[str], tokenizer_json: str, eot_text: str) -> bool:
    """Says what is off."""
    faults = []
    ours = vocabulary.load(tokenizer_json, eot_text)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    V = model.config.vocab_size
    for text, ids in zip(texts, ours.encode(texts)):
        read = theirs(text)["input_ids"]
        if read != ids:
            faults.append(f"{text!r} is {read}, and {ids} by data/prepare.py")
        elif theirs.decode(read) != ours.decode(ids).decode():
            faults.append(f"{text!r} comes back as {theirs.decode(read)!r}")
    ends = {theirs.eos_token_id, theirs.bos_token_id, model.config.eos_token_id, model.config.bos_token_id,
            model.generation_config.eos_token_id, model.generation_config.bos_token_id, ours.eot}
    if len(ends) > 1:
        faults.append(f"the end of text is {' and '.join(map(str, ends))}")
    if beyond := {token: index for token, index in theirs.get_vocab().items() if index >= V}:
        faults.append(f"tokens beyond the model's {V}: {beyond}")

    if theirs.pad_token is None:  # as its users do
        theirs.pad_token = theirs.eos_token
    theirs.padding_side = "left"
    longest = model.config.max_position_embeddings - NEW_TOKENS
    texts = [text for text in texts if len(ours.encode([text])[0]) <= longest]
    padded = theirs(texts, padding=True, return_tensors="pt")
    if extra := set(padded) - {"input_ids", "attention_mask"}:
        faults.append(f"the tokenizer makes {', '.join(sorted(extra))} too, and the model was trained without")

    def continued(inputs):
        made = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False,
                              max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=theirs.pad_token_id)
        return made[:, -NEW_TOKENS:].tolist()

    for text, made in zip(texts, continued(padded)):
        alone = continued(theirs(text, return_tensors="pt"))[0]
        if alone != made:
            faults.append(f"{text!r} goes on with {made} in a padded batch, and with {alone} alone")
    for fault in faults:
        print(f"{folder}: {fault}")
    print(f"{type(theirs).__name__}: {len(texts)} texts and their continuations, {len(faults)} faults")
    return not faults


@torch.no_grad()
def check(args) -> int:
    if args.tokens.endswith(".npy"):
        tokens = read_array(args.tokens, "iu", 2)  # (B,T)
    else:
        tokens = np.array([[int(word) for word in args.tokens.split(",")]])
    B, T = tokens.shape
    model, whole = load(args.dir, T)
    V = model.config.vocab_size
    if tokens.min() < 0 or tokens.max() >= V:
        raise Refused(f"{args.tokens}: a token outside 0 to {V - 1}")
    theirs = read_array(args.logits, "f", 3) if args.logits else None
    if theirs is not None and theirs.shape != (B, T, V):
        raise Refused(f"{args.logits}: {theirs.shape} numbers, but tokens and model make it {(B, T, V)}")
    saved = np.lib.format.open_memmap(args.save, "w+", np.float32, (B, T, V)) if args.save else None
    square = difference = worst = 0.0
    where = (0, 0, 0)
    for b in range(B):
        ids = torch.from_numpy(tokens[b].astype(np.int64))[None]
        hidden = model.base_model(ids, use_cache=False).last_hidden_state  # (1,T,C)
        for t in range(0, T, CHUNK):
            logits = model.get_output_embeddings()(hidden[:, t : t + CHUNK])[0].double().numpy()  # (CHUNK,V)
            if saved is not None:
                saved[b, t : t + CHUNK] = logits
            if theirs is None:
                continue
            apart = np.abs(theirs[b, t : t + CHUNK].astype(np.float64) - logits)
            apart[np.isnan(apart)] = np.inf
            square += float((logits**2).sum())
            difference += float((apart**2).sum())
            if apart.max() > worst:
                worst = float(apart.max())
                row, token = np.unravel_index(int(apart.argmax()), apart.shape)
                where = (b, t + int(row), int(token))
    if theirs is not None:
        relative = (difference / square) ** 0.5 if square else float("inf")
        bound = args.bound if args.bound is not None else BOUND + BOUND_PER_POSITION * T
        good = relative <= bound  # false for NaN
        print(f"{B} x {T} x {V} logits: largest difference {worst:.3g} at (sequence, position, token) {where}, "
              f"relative error {relative:.3g}, {'within' if good else 'ABOVE'} the bound {bound:.3g}")
        whole = whole and good
    if args.texts:
        with open(args.texts, encoding="utf-8") as file:
            whole = check_texts(model, args.dir, json.load(file), args.tokenizer, args.eot_token) and whole
    return 0 if whole else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", metavar="DIR", help="HuggingFace directory, from convert_hf.py --back for instance")
    parser.add_argument(
        "--tokens", metavar="FILE.npy", required=True, help="(B,T) or (T) token ids, or a list such as 1,2,3"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--logits", metavar="FILE", help="(B,T,V) or (T,V), the trainer's, to compare with")
    what.add_argument("--save", metavar="FILE.npy", help="write transformers' logits, (B,T,V) fp32")
    parser.add_argument("--texts", metavar="FILE.json", help="a list of texts to encode, pad and continue")
    parser.add_argument("--tokenizer", metavar="FILE.json", help="with --texts: the tokenizer that data/prepare.py used")
    parser.add_argument("--eot-token", metavar="TEXT", default=vocabulary.EOT_TEXT, help="with --texts: its end of text")
    parser.add_argument(
        "--bound",
        type=float,
        metavar="X",
        help=f"on the norm of the difference over that of the logits ({BOUND:g} + {BOUND_PER_POSITION:g} T)",
    )
    try:
        args = parser.parse_args()
        if not (args.logits or args.save or args.texts) or bool(args.texts) != bool(args.tokenizer):
            parser.error("give --logits, --save, or --texts with --tokenizer")
        return check(args)
    except (Refused, vocabulary.InputError, OSError, ValueError) as error:
        print(f"check_hf.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
