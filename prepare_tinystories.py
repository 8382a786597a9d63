"""Turn text into train.bin, val.bin (uint16 token ids) and meta.json (the tokenizer and what was
counted).

    python prepare_tinystories.py                      fetches TinyStories (2.2 GB; or --max_mb 100)
    python prepare_tinystories.py --toy                seeded synthetic stories of known entropy
    python prepare_tinystories.py --input stories.txt  your own text: files, or folders of files

In a text, <|endoftext|> separates documents; a file without it is one document. Each document is
followed by the <|endoftext|> token. Documents, not tokens, are split into train and val, so no
story is in both.
"""

import hashlib
import json
import math
import os
import random
import re
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from common import (ArgumentParser, any_path, any_seed, locked, number, progress_bar, replacing,
                    run_script)
from model import BadInput
from tokenizer import EOT, PATTERN, SEGMENT, TOKENIZERS, load_tokenizer, segments

VAL_SHARE = 0.05
TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"
# its licence is CDLA-Sharing-1.0
COUNTED = 2**26  # bytes of text that are enough to choose the tokenizer's pieces


# -----------------------------------------------------------------------------
# the toy: stories from a small probabilistic grammar

PEOPLE = [name.split() for name in ("Lily she her", "Tom he his", "Mia she her", "Ben he his",
                                    "Anna she her", "Max he his", "Sue she her", "Sam he his")]
PLACES = [place.split(": ") for place in (
    "park: under the old tree", "beach: beside the blue sea", "farm: behind the red barn",
    "forest: near the deep cave", "lake: along the wooden bridge",
    "garden: between the tall flowers", "school: against the white wall",
    "castle: below the stone tower")]
THINGS = "ball kite book drum doll boat train crown".split()
SLOTS = {
    "LOOKS": "red little shiny big funny soft green huge".split(),
    "SAW": "saw found spotted noticed wanted liked bought got".split(),
    "WHEN": ["one day", "after lunch", "before dinner", "last summer", "every Sunday", "at noon",
             "with friends", "by bus"],
    "HOW": "slowly happily quickly quietly gently proudly loudly bravely".split(),
    "KIN": "mom dad sister brother friend teacher grandma cousin".split(),
    "BECAME": ["happy and smiled", "sad and cried", "tired and slept", "angry and shouted",
               "scared and hid", "hungry and ate", "curious and looked", "silly and danced"],
    "PUT": ["in the big box", "on the round table", "under the warm bed", "behind the kitchen door",
            "inside a brown bag", "beside her mother's chair", "over the garden gate",
            "at grandpa's front step"],
    "ANIMALS": ["dog said woof woof", "cat said meow meow", "duck said quack quack",
                "cow said moo moo", "bird said tweet tweet", "pig said oink oink",
                "sheep said baa baa", "frog said ribbit ribbit"],
    "FOOD": ["bread and butter", "cake and cream", "rice and beans", "soup and toast",
             "milk and honey", "fish and chips", "eggs and ham", "nuts and berries"],
}
EVENTS = [  # {his} and {he} agree with the hero; {thing}, {look} and {spot} are the story's own
    "{he} {HOW} put the {thing} {PUT} .",
    "{he} was {BECAME} {HOW} .",
    "{name} and {his} {KIN} {HOW} had {FOOD} .",
    "a {LOOKS} {ANIMALS} {spot} .",
    "{his} {KIN} {HOW} asked for the {look} {thing} .",
    "then {name} was {BECAME} {spot} .",
]
N_EVENTS = 5


def toy_story(rng):
    """One story and its surprisal in bits.

    A name brings its pronoun, a place its spot, and they come back later, so a model has to look
    far back. A phrase like "sad and cried" is ONE choice that fixes several tokens: no product of
    independent heads can say "sad and cried or tired and slept" without also saying "sad and
    slept".
    """
    bits = 0.0

    def pick(options):  # k-th with probability ~ 1/k, like words: greedy decoding has a best choice
        nonlocal bits
        weights = [1 / (k + 1) for k in range(len(options))]
        k = rng.choices(range(len(options)), weights)[0]
        bits -= math.log2(weights[k] / sum(weights))
        return options[k]

    name, he, his = pick(PEOPLE)
    place, spot = pick(PLACES)
    look, thing = pick(SLOTS["LOOKS"]), pick(THINGS)
    memory = dict(name=name, he=he, his=his, thing=thing, look=look, spot=spot)

    def fill(template):
        fields = {slot: pick(SLOTS[slot]) for slot in re.findall(r"{([A-Z]+)}", template)}
        sentence = template.format(**memory, **fields).replace(" .", ".")
        return sentence[0].upper() + sentence[1:]

    sentences = [fill(f"{name} went to the {place} {{WHEN}} ."),
                 fill(f"{he} {{SAW}} a {look} {thing} {spot} .")]
    sentences += [fill(pick(EVENTS)) for _ in range(N_EVENTS)]
    return " ".join(sentences), bits


def toy_entropy():
    """The entropy of a toy story in bits: by the chain rule, a sum over its choices."""
    def entropy(n):
        weights = np.array([1 / (k + 1) for k in range(n)])
        p = weights / weights.sum()
        return float(-(p * np.log2(p)).sum()), p

    def slots(template):
        return sum(entropy(len(SLOTS[slot]))[0] for slot in re.findall(r"{([A-Z]+)}", template))

    h_event, p_event = entropy(len(EVENTS))
    one_event = h_event + sum(p * slots(template) for p, template in zip(p_event, EVENTS))
    start = [len(options) for options in (
        PEOPLE, PLACES, SLOTS["LOOKS"], THINGS, SLOTS["WHEN"], SLOTS["SAW"])]
    return sum(entropy(n)[0] for n in start) + N_EVENTS * one_event


# -----------------------------------------------------------------------------
# reading: a text of any size, one document at a time


def text_files(paths):
    """The utf-8 files among `paths` and in the folders there, each once, in a fixed order, and how
    many were skipped.

    In folders, hidden files and those that are not utf-8 are left out; a file that was named must
    be utf-8.
    """
    files, skipped = {}, 0  # by what they lead to: none may be in both train and val
    for named in map(Path, paths):
        if not (named.is_file() or named.is_dir()):
            raise BadInput(f"{named}: neither a plain file nor a folder." if named.exists() else
                           f"{named}: no such file or folder.")
        for file in visible_files(named) if named.is_dir() else [named]:
            why = no_text(file)
            if why and file == named:
                raise BadInput(f"{file} {why}; convert it first.")
            if why:
                skipped += 1
            else:
                files.setdefault(file.resolve(), file)
    files = list(files.values())
    if next(documents(files), None) is None:
        raise BadInput(f"There is no text in {' '.join(map(str, paths))}.")
    return files, skipped


def visible_files(folder):
    """The files in a folder and in the folders there, but for hidden ones, in order."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not any(
        part.startswith(".") for part in p.relative_to(folder).parts))


def no_text(file):
    """Why a file is no utf-8 text; None where it is."""
    try:
        nul = any("\0" in chunk for chunk in chunks(file))
    except UnicodeDecodeError:
        return "is not utf-8 text"
    return "holds NUL characters, as UTF-16 and binary files do" if nul else None


def chunks(path, size=2**22):
    """The text of a file in parts of whole lines, a few MB each; its newlines as they are."""
    with open(path, encoding="utf-8-sig", newline="") as file:  # -sig: Windows puts a mark first
        while lines := file.readlines(size):
            yield "".join(lines)


def documents(files):
    """The documents of files, one by one; no more than one of them and a chunk is in memory."""
    for file in files:
        parts = []  # of the document that has not ended yet; EOT is in one line, so in one chunk
        for chunk in chunks(file):
            first, *rest = chunk.split(EOT)
            parts.append(first)
            if rest:
                yield from (text.strip() for text in ("".join(parts), *rest[:-1]) if text.strip())
                parts = [rest[-1]]
        text = "".join(parts).strip()
        if text:
            yield text


def split_documents(read, seed):
    """Two functions that yield the train and the val documents of read(), which yields them all.

    val is a random VAL_SHARE of the documents; a single document is cut in two, at a line's end if
    one is near.
    """
    n = sum(1 for _ in read())
    if n == 1:
        text = next(read())
        cut = int(len(text) * (1 - VAL_SHARE))
        cut = text.find("\n", cut, (cut + len(text)) // 2) + 1 or cut
        return lambda: iter([text[:cut]]), lambda: iter([text[cut:]])
    val = set(random.Random(seed).sample(range(n), max(1, round(n * VAL_SHARE))))
    return (lambda: (text for i, text in enumerate(read()) if i not in val),
            lambda: (text for i, text in enumerate(read()) if i in val))


# -----------------------------------------------------------------------------
# the download, over a connection that may break: an attempt goes on where the last stopped

BROKEN = requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError


def download(url, path, max_bytes=None, timeout=30, retries=5):
    """Fetch url into the file path unless that exists, and return path as a pathlib.Path.

    Until it is whole, it is path.part, and path.part.version says of which version it is a part, so
    no part is continued with another version. requests does the work: proxies, redirects,
    certificates, and waiting for a busy server.

    max_bytes: take only so many bytes from the beginning. timeout: seconds to wait for a connection
    and for each read. retries: how many attempts in a row may bring nothing new. BadInput where the
    network or the server fails for good; what has come by then stays, and the next call goes on.
    """
    path = Path(path)
    part, failures, most = path.with_name(path.name + ".part"), 0, 0
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    session = requests.Session()
    busy = Retry(total=retries, connect=0, read=0, backoff_factor=0.5,
                 status_forcelist=(429, 500, 502, 503, 504), respect_retry_after_header=False)
    session.mount(url.split("://")[0] + "://", HTTPAdapter(max_retries=busy))
    while True:
        try:
            attempt(session, url, part, max_bytes or sys.maxsize, timeout)
            break
        except requests.exceptions.SSLError as e:
            raise failure(url, short(e)) from None
        except BROKEN as e:
            size = part.stat().st_size if part.exists() else 0
            failures, most = (0, size) if size > most else (failures + 1, most)
            if failures > retries:
                raise BadInput(f"Could not download {url}: {short(e)}. The part is kept: run again "
                               "to go on, or get it elsewhere and pass it with --input.") from None
            print(f"{path.name}: {short(e)}; trying again", file=sys.stderr)
            time.sleep(min(2**failures, 30) / 2)
        except requests.RequestException as e:
            raise failure(url, short(e)) from None
    os.replace(part, path)
    version_of(part).unlink(missing_ok=True)
    return path


def attempt(session, url, part, limit, timeout):
    """Append what part lacks, up to `limit` bytes in all; returns when it is whole."""
    version = version_of(part)
    size = part.stat().st_size if part.exists() and version.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # lengths and ranges count the file's own bytes
    if size:  # If-Range: of another version, all of it comes, with status 200
        headers |= {"Range": f"bytes={min(size, limit) - 1}-", "If-Range": version.read_text()}
    with session.get(url, headers=headers, stream=True, timeout=timeout) as response:
        if response.status_code not in (200, 206):
            raise failure(url, f"the server answered HTTP {response.status_code}")
        if "text/html" in response.headers.get("Content-Type", ""):
            raise failure(url, "the server sent an HTML page, not a text (is there a login?)")
        etag = response.headers.get("ETag", "")  # a weak one, W/"...", is no good for If-Range
        now = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
        start = min(size, limit) - 1 if response.status_code == 206 else 0
        if start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise failure(url, "the server sent another part of the file than asked for")
        version.write_text(now) if now else version.unlink(missing_ok=True)
        length = response.headers.get("Content-Length")
        whole = min(start + int(length) if length else sys.maxsize, limit)
        size = write_body(response, part, start, whole)
    if size < whole < sys.maxsize:
        raise requests.ConnectionError(f"the connection broke after {size:,} of {whole:,} bytes")


def write_body(response, part, start, whole):
    """Write the body to part, from byte start to byte whole at most; returns where it ends."""
    size = dict(unit="B", unit_scale=True, total=whole if whole < sys.maxsize else None)
    with (open(part, "r+b" if start else "wb") as file,
          progress_bar(desc=part.stem, initial=start, **size) as bar):
        file.seek(start)
        for chunk in response.iter_content(1 << 16):
            bar.update(file.write(chunk[: whole - file.tell()]))
            if file.tell() >= whole:
                break
        file.truncate()
        return file.tell()


def version_of(part):
    """The file that says of which version part is: an ETag, or the date of its last change."""
    return part.with_name(part.name + ".version")


def short(error):
    """An exception of requests in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def failure(url, why):
    return BadInput(f"Could not download {url}: {why}. Check the address, or download the file "
                    "yourself and pass it with --input.")


def download_tinystories(data_dir, max_mb=None):
    """TinyStoriesV2-GPT4's train and valid files, or their first max_mb MB."""
    files = []
    for split in ("train", "valid"):
        name = f"TinyStoriesV2-GPT4-{split}"
        part = f"-first{max_mb}MB" if max_mb else ""
        files.append(download(f"{TINYSTORIES}{name}.txt", data_dir / f"{name}{part}.txt",
                              max_mb and max_mb * 10**6))
        if max_mb:
            drop_cut_story(files[-1])
        if next(documents(files[-1:]), None) is None:
            raise BadInput(f"There is no text in {files[-1]}.")
    return files


def drop_cut_story(path):
    """Cut a file after its last <|endoftext|>: its last story may be half a story."""
    with open(path, "r+b") as file:
        tail = max(0, path.stat().st_size - 2**20)  # no story is as long as that
        file.seek(tail)
        end = file.read().rfind(EOT.encode())
        if end >= 0:
            file.truncate(tail + end + len(EOT))


# -----------------------------------------------------------------------------
# encoding and writing


def batches(documents, size=16 * SEGMENT):
    """Lists of (segment, whether a document ends there), of about `size` characters each."""
    batch, n = [], 0
    for text in documents:
        *parts, last = segments(text)
        for part, ends in [*((part, False) for part in parts), (last, True)]:
            batch.append((part, ends))
            n += len(part)
            if n >= size:
                yield batch
                batch, n = [], 0
    if batch:
        yield batch


def encode_all(enc, documents, file, name):
    """Write all documents, each followed by <|endoftext|>, to a binary file as uint16; returns what
    meta.json says.

    tiktoken's threads run side by side, so all cores work.
    """
    counts, sha256 = {"documents": 0, "tokens": 0, "bytes": 0}, hashlib.sha256()
    with progress_bar(desc=f"encoding {name}", unit="B", unit_scale=True, disable=None) as bar:
        for batch in batches(documents):
            n_bytes = sum(len(text.encode()) for text, _ in batch)
            texts, n_threads = [text for text, _ in batch], os.cpu_count() or 1
            encoded = enc.encode_ordinary_batch(texts, num_threads=n_threads)
            ids = [np.array(ids + [enc.eot_token] * ends, dtype=np.uint16)
                   for ids, (_, ends) in zip(encoded, batch)]
            data = np.concatenate(ids).tobytes()
            file.write(data)
            sha256.update(data)
            counts["documents"] += sum(ends for _, ends in batch)
            counts["tokens"] += len(data) // 2
            counts["bytes"] += n_bytes
            bar.update(n_bytes)
    if not counts["documents"]:
        raise BadInput(f"There is no document for {name}.bin; take more text.")
    return {**counts, "sha256": sha256.hexdigest()}


def bench_prompts(documents, n=8):
    """Beginnings of n documents, for the bench to continue; of few documents, beginnings of their
    parts.

    Whole pieces of 64 characters together at most: two sentences, so that greedy texts do not all
    become one.
    """
    parts = -(-n // len(documents))
    texts = [text[i * len(text) // parts :] for text in documents[:n] for i in range(parts)]
    prompts = []
    for text in texts[:n]:
        pieces = re.findall(PATTERN, text[:65])
        prompts.append("".join(pieces[:-1]) or text[:64])  # the last piece may be cut
    return prompts


def prepare(train, val, description, data_dir, **about):
    """Encode the documents that train() and val() yield into train.bin, val.bin and meta.json;
    returns the meta.

    The old files stay until all three new ones are written; nobody ever finds the tokens of one
    text under the meta of another (see `replacing`).
    """
    enc = load_tokenizer(description)
    prompts = bench_prompts(list(islice(val(), 8)))
    meta = {**about, "vocab_size": enc.n_vocab, "tokenizer": description, "prompts": prompts,
            "splits": {}}
    names = ("train.bin", "val.bin", "meta.json")
    with replacing(*(data_dir / name for name in names)) as (*bins, meta_file):
        for name, read, file in zip(("train", "val"), (train, val), bins):
            meta["splits"][name] = encode_all(enc, read(), file, name)
        # tokens include one <|endoftext|> per document, bytes are those of the text alone
        meta["bytes_per_token"] = meta["splits"]["val"]["bytes"] / meta["splits"]["val"]["tokens"]
        if "entropy_bits_per_story" in meta:
            stories, tokens = (sum(split[key] for split in meta["splits"].values())
                               for key in ("documents", "tokens"))
            meta["entropy_bits_per_token"] = meta["entropy_bits_per_story"] * stories / tokens
        meta_file.write(json.dumps(meta).encode())
    return meta


# -----------------------------------------------------------------------------


def parse_args():
    parser = ArgumentParser(__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--toy", action="store_true", help="synthetic stories from a grammar")
    source.add_argument("--input", nargs="+", action="extend", type=any_path, metavar="PATH",
                        help="text files, or folders of text files, in utf-8")
    parser.add_argument("--data_dir", type=any_path,
                        help="where to write (data/tinystories, data/toy or data/text)")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default="pieces",
                        help="pieces: bytes and frequent whole pieces, offline; gpt2: GPT-2's BPE")
    parser.add_argument("--vocab_size", type=number(int, 257, 2**16), default=2048,
                        help="ids of the pieces tokenizer; 257, bytes and the end of text, is the "
                             "least (2048)")
    parser.add_argument("--max_mb", type=number(int, 1), help="download the first MBs only")
    parser.add_argument("--stories", type=number(int, 2), default=20000,
                        help="stories that --toy writes (20000)")
    parser.add_argument("--seed", type=any_seed, default=1337,
                        help="seed of the toy's stories and of the split (1337)")
    args = parser.parse_args()
    if args.max_mb and (args.toy or args.input):
        parser.error("--max_mb is for the download; --toy and --input have none")
    default = "toy" if args.toy else "text" if args.input else "tinystories"
    args.data_dir = Path(args.data_dir or f"data/{default}")
    return args


def prepare_toy(args):
    rng = random.Random(args.seed)
    stories, bits = zip(*(toy_story(rng) for _ in range(args.stories)))
    train, val = split_documents(lambda: iter(stories), args.seed)
    description = TOKENIZERS[args.tokenizer](train(), args.vocab_size)
    meta = prepare(train, val, description, args.data_dir, seed=args.seed,
                   source=f"toy grammar, {args.stories} stories",
                   entropy_bits_per_story=toy_entropy())
    story, token = meta["entropy_bits_per_story"], meta["entropy_bits_per_token"]
    print(f"entropy of the grammar: {story:.2f} bits per story (surprisal of these: "
          f"{np.mean(bits):.2f}), {token:.3f} bits = {token * math.log(2):.3f} nats per token")
    return meta


def prepare_text(args):
    if args.input:
        files, skipped = text_files(args.input)
        if skipped:
            print(f"skipped {skipped} files that are not utf-8")
        train, val = split_documents(lambda: documents(files), args.seed)
        source = " ".join(Path(path).resolve().name for path in args.input)
    else:
        files = download_tinystories(args.data_dir, args.max_mb)
        train, val = (lambda: documents(files[:1])), (lambda: documents(files[1:]))
        source = " ".join(file.name for file in files)
    size = sum(file.stat().st_size for file in files)
    every = max(1, size // COUNTED)  # of a large text, each k-th document
    description = TOKENIZERS[args.tokenizer](islice(train(), 0, None, every), args.vocab_size)
    return prepare(train, val, description, args.data_dir, seed=args.seed, source=source)


def check_own(folder):
    """BadInput unless folder is new or empty, or holds what this script left there, also when it
    was interrupted: its meta.json, its downloads, or the .lock of `locked`."""
    there = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    meta = folder / "meta.json"
    ours = ".lock" in there or all(name.startswith("TinyStoriesV2-GPT4-") for name in there)
    if meta.exists():
        text = meta.read_text(encoding="utf-8", errors="replace")
        ours = '"splits"' in text and '"tokenizer"' in text
    foreign = [name for name in there if name in ("states.bin", "meta.pkl")]  # whatever else says
    if foreign or not ours:
        raise BadInput(f"{folder} holds {(foreign or there)[0]}, which this script did not write; "
                       "take a new or an empty --data_dir")


def main():
    args = parse_args()
    check_own(args.data_dir)
    with locked(args.data_dir):
        meta = prepare_toy(args) if args.toy else prepare_text(args)
    for split, counts in meta["splits"].items():
        print(f"{split:5}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
              f"{counts['bytes']:,} bytes")
    print(f"tokenizer: {meta['vocab_size']:,} ids, {meta['bytes_per_token']:.2f} bytes per token")
    print(f"wrote {args.data_dir}: train.bin, val.bin, meta.json")


if __name__ == "__main__":
    run_script(main)
