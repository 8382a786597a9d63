"""A data folder of nanoGPT as one of ours.

    python -m pretrained.nanogpt nanoGPT/data/shakespeare_char --output data/shakespeare
    python train.py --data_dir data/shakespeare --init_from nanoGPT/out-shakespeare-char/ckpt.pt \\
        --freeze_trunk --n_future 8 --head chain --rank 1 --out_dir out/shakespeare

The folder has train.bin, val.bin, and for a vocabulary of characters meta.pkl, which is read
without running what it may hold. Without meta.pkl the tokens are GPT-2's. Its files stay as they
are; the ids are copied. nanoGPT's checkpoints need no conversion: --init_from takes them.
"""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np

from common import ArgumentParser, any_path, check_folder, locked, replacing, run_script
from model import BadInput
from tokenizer import EOT, gpt2_tokenizer, load_tokenizer

N_PROMPT = 16  # tokens of each of the eight prompts


def read_characters(path):
    """The description of the tokenizer in a meta.pkl of nanoGPT, {"itos": {0: "a", ...}, ...}."""
    class Plain(pickle.Unpickler):  # dicts, lists, strings, numbers: one of more could run code
        def find_class(self, module, name):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    try:
        with open(path, "rb") as file:
            itos = Plain(file).load()["itos"]
        characters = [itos[i] for i in range(len(itos))]
        tokens = [character.encode().decode("latin-1") for character in characters]
        if not 0 < len(tokens) == len(set(tokens)):
            raise ValueError("its characters are none, or not different ones")
    except (OSError, MemoryError):
        raise
    except Exception as e:  # pickle raises many kinds for a file that is none
        raise BadInput(f"{path} is not the meta.pkl of a character vocabulary, or it is damaged "
                       f"({e}); nothing in it was run.") from None
    return {"name": f"characters{len(tokens)}", "pattern": None, "tokens": tokens}


def read_ids(path, description, n_vocab):
    """The ids in a .bin file, memory-mapped; BadInput where they are not the tokenizer's."""
    size = path.stat().st_size
    good = size >= 2 * N_PROMPT and size % 2 == 0
    ids = np.memmap(path, dtype=np.uint16, mode="r") if good else []
    if not good or ids.max() >= n_vocab:
        raise BadInput(f"{path} is no data of nanoGPT, {N_PROMPT} or more ids of "
                       f"{description['name']}, two bytes each; write it anew.")
    return ids


def convert(folder, output):
    """Write train.bin, val.bin and meta.json in the folder output; the prompts are eight pieces of
    the validation text. Returns the meta."""
    path = folder / "meta.pkl"
    description = read_characters(path) if path.exists() else gpt2_tokenizer()
    enc = load_tokenizer(description)
    names = ("train.bin", "val.bin")
    train, val = (read_ids(folder / name, description, enc.n_vocab) for name in names)
    starts = np.linspace(0, len(val) - N_PROMPT, 8).astype(int)
    prompts = [enc.decode(val[i : i + N_PROMPT].tolist()) for i in starts]
    lengths = np.array([len(token) for token in [*description["tokens"], EOT]])  # in bytes
    meta = {"source": f"nanoGPT's {folder.resolve().name}", "vocab_size": enc.n_vocab,
            "tokenizer": description, "prompts": prompts,
            "bytes_per_token": float(lengths[val[: 2**20]].mean()), "splits": {}}
    with replacing(*(output / name for name in (*names, "meta.json"))) as (*bins, meta_file):
        for name, ids, file in zip(("train", "val"), (train, val), bins):
            total = hashlib.sha256()
            for start in range(0, len(ids), 2**24):  # a text may be larger than memory
                part = ids[start : start + 2**24].tobytes()
                file.write(part)
                total.update(part)
            meta["splits"][name] = {"tokens": len(ids), "sha256": total.hexdigest()}
        meta_file.write(json.dumps(meta).encode())
    return meta


# -----------------------------------------------------------------------------


def parse_args():
    parser = ArgumentParser(__doc__)
    parser.add_argument("folder", type=any_path, metavar="DATA_DIR", help="nanoGPT's folder")
    parser.add_argument("--output", type=any_path, required=True, metavar="DIR",
                        help="folder to write train.bin, val.bin and meta.json in")
    return parser.parse_args()


def main():
    args = parse_args()
    folder, output = Path(args.folder), Path(args.output)
    check_folder(folder)
    for path in (folder / "train.bin", folder / "val.bin"):
        if not path.exists():
            raise BadInput(f"There is no {path}; name a data folder of nanoGPT, with train.bin and "
                           "val.bin")
    for name in ("train.bin", "val.bin", "meta.json", "meta.pkl"):
        if (output / name).exists():
            raise BadInput(f"{output} holds {name}, and nothing is written over; take another "
                           "--output")
    with locked(output):
        meta = convert(folder, output)
    counts = ", ".join(f"{part['tokens']:,} in {name}" for name, part in meta["splits"].items())
    print(f"wrote {output}: {counts}; {meta['vocab_size']:,} tokens of {meta['tokenizer']['name']}")


if __name__ == "__main__":
    run_script(main)
