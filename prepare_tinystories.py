"""Turn text into train.bin, val.bin (uint16 token ids) and meta.json (the tokenizer and what was counted).

    python prepare_tinystories.py --toy                    seeded synthetic stories of known entropy, no download
    python prepare_tinystories.py --input stories.txt      your own text: files, or folders of files

In a text, <|endoftext|> separates documents; a file without it is one document. Each document is followed by the
<|endoftext|> token. Documents, not tokens, are split into train and val, so no story is in both.
"""

import argparse
import codecs
import hashlib
import json
import math
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import tiktoken

EOT = "<|endoftext|>"
VAL_SHARE = 0.05
# Pieces: words with the space in front, digits, punctuation (ASCII's and U+2010-205E), spaces; every character is in
# one of these classes. No \w: Python's re, which counts pieces, and tiktoken's regex, which encodes, disagree on it.
PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?[^\s\d!-/:-@\[-`{-~\u2010-\u205e]+| ?\d+"
           r"| ?[!-/:-@\[-`{-~\u2010-\u205e]+|\s+(?!\S)|\s+")


# -----------------------------------------------------------------------------
# the tokenizer: a tiktoken.Encoding that meta.json describes in full


def build_tokenizer(documents, vocab_size):
    """The 256 bytes, the most frequent whole pieces of the documents, and <|endoftext|>: at most vocab_size ids.

    tiktoken looks a whole piece up before it merges bytes, so any text round-trips and no BPE training is needed.
    257 is bytes. A small corpus has fewer pieces than asked for. Returns the description that `load_tokenizer` reads.
    """
    if vocab_size < 257:
        sys.exit(f"--vocab_size {vocab_size} is too small: 256 bytes and {EOT} need 257.")
    counts = Counter(piece for text in documents for piece in re.findall(PATTERN, text))
    pieces = sorted((p for p in counts if len(p.encode()) > 1), key=lambda p: (-counts[p], p))[: vocab_size - 257]
    tokens = [bytes([b]) for b in range(256)] + [p.encode() for p in pieces]
    return {"name": f"pieces{len(tokens) + 1}", "pattern": PATTERN, "tokens": [t.decode("latin-1") for t in tokens]}


def gpt2_tokenizer():
    """GPT-2's BPE, described like any other, so that only this step needs tiktoken's files."""
    enc = tiktoken.get_encoding("gpt2")
    tokens = [enc.decode_single_token_bytes(i).decode("latin-1") for i in range(enc.eot_token)]
    return {"name": "gpt2", "pattern": enc._pat_str, "tokens": tokens}


def load_tokenizer(description):
    """The tiktoken.Encoding of a description {name, pattern, tokens}; tokens are byte strings written as latin-1.

    Ids are the places in that list; <|endoftext|> comes last and is `eot_token`. Encode text with encode_ordinary,
    which takes the words "<|endoftext|>" in it for plain text.
    """
    ranks = {token.encode("latin-1"): i for i, token in enumerate(description["tokens"])}
    return tiktoken.Encoding(
        description["name"], pat_str=description["pattern"], mergeable_ranks=ranks, special_tokens={EOT: len(ranks)}
    )


class TextStream:
    """Token ids in, printable text out: holds back the bytes of a character until it is complete."""

    def __init__(self, enc):
        self.enc = enc
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token):
        return self.decoder.decode(self.enc.decode_single_token_bytes(token))

    def end(self):
        return self.decoder.decode(b"", final=True)


# -----------------------------------------------------------------------------
# the toy: stories from a small probabilistic grammar

PEOPLE = [name.split() for name in ("Lily she her", "Tom he his", "Mia she her", "Ben he his",
                                    "Anna she her", "Max he his", "Sue she her", "Sam he his")]
PLACES = [place.split(": ") for place in (
    "park: under the old tree", "beach: beside the blue sea", "farm: behind the red barn", "forest: near the deep cave",
    "lake: along the wooden bridge", "garden: between the tall flowers", "school: against the white wall",
    "castle: below the stone tower")]
THINGS = "ball kite book drum doll boat train crown".split()
LOOKS = "red little shiny big funny soft green huge".split()
SAW = "saw found spotted noticed wanted liked bought got".split()
WHEN = ["one day", "after lunch", "before dinner", "last summer", "every Sunday", "at noon", "with friends", "by bus"]
HOW = "slowly happily quickly quietly gently proudly loudly bravely".split()
KIN = "mom dad sister brother friend teacher grandma cousin".split()
BECAME = ["happy and smiled", "sad and cried", "tired and slept", "angry and shouted",
          "scared and hid", "hungry and ate", "curious and looked", "silly and danced"]
PUT = ["in the big box", "on the round table", "under the warm bed", "behind the kitchen door",
       "inside a brown bag", "beside her mother's chair", "over the garden gate", "at grandpa's front step"]
ANIMALS = ["dog said woof woof", "cat said meow meow", "duck said quack quack", "cow said moo moo",
           "bird said tweet tweet", "pig said oink oink", "sheep said baa baa", "frog said ribbit ribbit"]
FOOD = ["bread and butter", "cake and cream", "rice and beans", "soup and toast",
        "milk and honey", "fish and chips", "eggs and ham", "nuts and berries"]
EVENTS = [  # {his} and {he} agree with the hero; {thing}, {look} and {spot} are the ones that the story began with
    "{he} {HOW} put the {thing} {PUT} .",
    "{he} was {BECAME} {HOW} .",
    "{name} and {his} {KIN} {HOW} had {FOOD} .",
    "a {LOOKS} {ANIMALS} {spot} .",
    "{his} {KIN} {HOW} asked for the {look} {thing} .",
    "then {name} was {BECAME} {spot} .",
]
SLOTS = {"SAW": SAW, "WHEN": WHEN, "HOW": HOW, "KIN": KIN, "BECAME": BECAME, "PUT": PUT, "ANIMALS": ANIMALS,
         "FOOD": FOOD, "LOOKS": LOOKS}
N_EVENTS = 5


class Chooser:
    """Makes choices and adds up their surprisal, -log2 of the probability of what was chosen, in bits."""

    def __init__(self, rng):
        self.rng = rng
        self.bits = 0.0

    def pick(self, options):
        """The k-th option has probability ~ 1/k, like words of a language: greedy decoding has a best choice."""
        weights = [1 / (k + 1) for k in range(len(options))]
        k = self.rng.choices(range(len(options)), weights)[0]
        self.bits -= math.log2(weights[k] / sum(weights))
        return options[k]


def toy_story(rng):
    """One story and its surprisal in bits.

    A name brings its pronoun, a place its spot, and they come back later, so a model has to look far behind. A
    phrase like "sad and cried" is ONE choice that fixes several tokens: no product of independent heads can say
    "sad and cried or tired and slept" without also saying "sad and slept".
    """
    chooser = Chooser(rng)
    name, he, his = chooser.pick(PEOPLE)
    place, spot = chooser.pick(PLACES)
    look, thing = chooser.pick(LOOKS), chooser.pick(THINGS)
    memory = dict(name=name, he=he, his=his, thing=thing, look=look, spot=spot)

    def fill(template):
        fields = {slot: chooser.pick(SLOTS[slot]) for slot in re.findall(r"{([A-Z]+)}", template)}
        sentence = template.format(**memory, **fields).replace(" .", ".")
        return sentence[0].upper() + sentence[1:]

    sentences = [fill(f"{name} went to the {place} {{WHEN}} ."), fill(f"{he} {{SAW}} a {look} {thing} {spot} .")]
    sentences += [fill(chooser.pick(EVENTS)) for _ in range(N_EVENTS)]
    return " ".join(sentences), chooser.bits


def toy_entropy():
    """The exact entropy of a toy story in bits: by the chain rule, the expected sum over its choices."""
    def entropy(n):
        weights = np.array([1 / (k + 1) for k in range(n)])
        p = weights / weights.sum()
        return float(-(p * np.log2(p)).sum()), p

    def slots(template):
        return sum(entropy(len(SLOTS[slot]))[0] for slot in re.findall(r"{([A-Z]+)}", template))

    h_event, p_event = entropy(len(EVENTS))
    one_event = h_event + sum(p * slots(template) for p, template in zip(p_event, EVENTS))
    start = [len(options) for options in (PEOPLE, PLACES, LOOKS, THINGS, WHEN, SAW)]
    return sum(entropy(n)[0] for n in start) + N_EVENTS * one_event


# -----------------------------------------------------------------------------
# reading, splitting, writing


def read_documents(paths):
    """The documents of files and folders, in a fixed order, and how many files of the folders were not utf-8."""
    documents, skipped = [], 0
    for path in map(Path, paths):
        if not path.exists():
            sys.exit(f"{path}: no such file or folder.")
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                if file == path:
                    sys.exit(f"{file} is not utf-8 text; convert it first.")
                skipped += 1
                continue
            documents += [part.strip() for part in text.split(EOT) if part.strip()]
    return documents, skipped


def split_documents(documents, seed):
    """(train, val) documents, val a random VAL_SHARE of them; a single document is cut in two at a line's end."""
    if len(documents) == 1:
        text = documents[0]
        cut = text.find("\n", int(len(text) * (1 - VAL_SHARE))) + 1 or int(len(text) * (1 - VAL_SHARE))
        return [text[:cut]], [text[cut:]]
    n_val = max(1, round(len(documents) * VAL_SHARE))
    val = set(random.Random(seed).sample(range(len(documents)), n_val))
    return [d for i, d in enumerate(documents) if i not in val], [documents[i] for i in sorted(val)]


def encode(enc, documents):
    """All documents, each followed by <|endoftext|>, as one uint16 array."""
    out = []
    for start in range(0, len(documents), 4096):
        for ids in enc.encode_ordinary_batch(documents[start : start + 4096], num_threads=os.cpu_count() or 1):
            out.append(np.array([*ids, enc.eot_token], dtype=np.uint16))
    return np.concatenate(out)


def write(path, data):
    """Write bytes under a temporary name, then rename: the file is the old one or the new one, never half of it."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_bytes(data)
    os.replace(tmp, path)


def bench_prompts(documents, n=8):
    """Beginnings of n documents, for the bench to continue; of few documents, beginnings of their parts."""
    parts = -(-n // len(documents))
    texts = [text[i * len(text) // parts :] for text in documents[:n] for i in range(parts)]
    return ["".join(re.findall(PATTERN, text[:100])[:4])[:24] for text in texts[:n]]


def prepare(train, val, description, data_dir, **about):
    """Encode both lists of documents and write train.bin, val.bin and, last, meta.json; returns the meta."""
    enc = load_tokenizer(description)
    meta = {**about, "vocab_size": enc.n_vocab, "tokenizer": description, "prompts": bench_prompts(val), "splits": {}}
    data_dir.mkdir(parents=True, exist_ok=True)
    for name, documents in (("train", train), ("val", val)):
        ids = encode(enc, documents)
        write(data_dir / f"{name}.bin", ids.tobytes())
        meta["splits"][name] = {
            "documents": len(documents), "tokens": len(ids), "bytes": sum(len(text.encode()) for text in documents),
            "sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
        }
    # tokens include one <|endoftext|> per document, bytes are those of the text alone
    meta["bytes_per_token"] = meta["splits"]["val"]["bytes"] / meta["splits"]["val"]["tokens"]
    if "entropy_bits_per_story" in meta:
        stories, tokens = (sum(split[key] for split in meta["splits"].values()) for key in ("documents", "tokens"))
        meta["entropy_bits_per_token"] = meta["entropy_bits_per_story"] * stories / tokens
    write(data_dir / "meta.json", json.dumps(meta).encode())
    return meta


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--toy", action="store_true", help="synthetic stories from the grammar in this file")
    source.add_argument("--input", nargs="+", metavar="PATH", help="text files, or folders of text files, in utf-8")
    parser.add_argument("--data_dir", type=Path, help="where to write (default: data/toy or data/text)")
    parser.add_argument("--tokenizer", choices=["pieces", "gpt2"], default="pieces",
                        help="pieces: bytes and the corpus's frequent whole pieces, offline; gpt2: GPT-2's BPE")
    parser.add_argument("--vocab_size", type=int, default=2048, help="size of the pieces tokenizer; 257 is bytes")
    parser.add_argument("--stories", type=int, default=20000, help="stories that --toy writes")
    parser.add_argument("--seed", type=int, default=1337, help="seed of the toy's stories and of the split")
    args = parser.parse_args()

    about = {"seed": args.seed}
    if args.toy:
        rng = random.Random(args.seed)
        documents, bits = map(list, zip(*(toy_story(rng) for _ in range(args.stories))))
        about |= {"source": f"toy grammar, {args.stories} stories", "entropy_bits_per_story": toy_entropy()}
    else:
        documents, skipped = read_documents(args.input)
        if skipped:
            print(f"skipped {skipped} files that are not utf-8")
        if not documents:
            sys.exit(f"There is no text in {' '.join(args.input)}.")
        about["source"] = " ".join(Path(path).resolve().name for path in args.input)
    train, val = split_documents(documents, args.seed)
    description = gpt2_tokenizer() if args.tokenizer == "gpt2" else build_tokenizer(train, args.vocab_size)
    data_dir = args.data_dir or Path("data/toy" if args.toy else "data/text")
    meta = prepare(train, val, description, data_dir, **about)
    for split, counts in meta["splits"].items():
        print(f"{split:5}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, {counts['bytes']:,} bytes")
    print(f"tokenizer: {meta['vocab_size']:,} ids, {meta['bytes_per_token']:.2f} bytes per token")
    if args.toy:
        per_story, per_token = meta["entropy_bits_per_story"], meta["entropy_bits_per_token"]
        print(f"entropy of the grammar: {per_story:.2f} bits per story (surprisal of these: {np.mean(bits):.2f}), "
              f"{per_token:.3f} bits = {per_token * math.log(2):.3f} nats per token")
    print(f"wrote {data_dir}: train.bin, val.bin, meta.json")


if __name__ == "__main__":
    main()
