"""The texts that a pretrained model wrote, its hidden states beside them, and batches of both."""

import json
import math
import os
from pathlib import Path

import numpy as np
import torch

from common import Batches, check_folder, replacing
from model import BadInput

FILES = {"tokens": np.uint32, "states": np.uint16, "log_z": np.float32}  # states: bfloat16's bits
READ_BY = {"read_by": "pretrained.train"}  # so that train.py can say whose folder it is


class Texts:
    """The texts in a data folder, one after another: tokens, hidden states and logsumexps.

    meta.json counts the texts that are whole. What an interrupted writer left after them goes.
    """

    def __init__(self, folder, meta):
        self.folder, self.meta = Path(folder), meta

    def path(self, name):
        return self.folder / f"{name}.bin"

    def shape(self, name):
        """Of what meta.json counts in a file: (N,), or (N, C) of states."""
        n = sum(self.meta["lengths"])
        return (n, self.meta["n_embd"]) if name == "states" else (n,)

    def size(self, name):
        """The same in bytes."""
        return np.dtype(FILES[name]).itemsize * math.prod(self.shape(name))

    def read(self, name):
        """What meta.json counts in a file, memory-mapped; a writer may be at work after that."""
        return np.memmap(self.path(name), dtype=FILES[name], mode="r", shape=self.shape(name))

    def cut(self):
        """Leave only what meta.json counts."""
        for name in FILES:
            with open(self.path(name), "ab") as file:
                if file.tell() < self.size(name):
                    raise BadInput(f"{self.path(name)} is shorter than meta.json says; take "
                                   "another --data_dir, or remove this one")
                file.truncate(self.size(name))

    def append(self, texts):
        """Write what `answer` returned."""
        for name, parts in zip(FILES, zip(*texts)):
            whole = torch.cat(parts)
            if name == "states":
                whole = whole.bfloat16().view(torch.int16)
            with open(self.path(name), "ab") as file:
                file.write(whole.numpy().astype(FILES[name]).tobytes())
                file.flush()
                os.fsync(file.fileno())
        self.meta["lengths"] += [len(tokens) for tokens, *_ in texts]
        self.write_meta()

    def write_meta(self):
        with replacing(self.folder / "meta.json") as file:
            file.write(json.dumps(self.meta).encode())


def open_texts(folder, settings):
    """The Texts in a folder, new ones or, where the settings are the same, those that are there."""
    path = folder / "meta.json"
    if not path.exists():
        if any(folder.glob("*.bin")):
            raise BadInput(f"{folder} holds other data; take another --data_dir")
        texts = Texts(folder, {**READ_BY, **settings, "lengths": []})
        texts.write_meta()
    else:
        meta = json.loads(path.read_text(encoding="utf-8"))
        was = {name: settings[name] for name in ("ends", "dtype")} | meta  # these two came later
        other = [name for name, value in settings.items() if was.get(name) != value]
        if other:
            raise BadInput(f"{folder} holds texts of other settings ({', '.join(other)}); take "
                           "another --data_dir")
        texts = Texts(folder, meta)
    texts.cut()
    return texts


def read_texts(folder):
    """The meta of a folder that pretrained.generate wrote, None of another one; BadInput where
    there is no data, or where texts are not whole."""
    path = Path(folder) / "meta.json"
    check_folder(folder)
    if not path.exists():
        raise BadInput(f"There is no data in {folder}; write some: python -m pretrained.generate "
                       f"--data_dir {folder} ..., or for a model of train.py: "
                       f"python prepare_tinystories.py --data_dir {folder} ...")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if "trunk" not in meta:
            return None
        texts = Texts(folder, meta)
        good = (sum(meta["lengths"]) > 0 and isinstance(meta["trunk"]["name"], str)
                and (meta["chat"] in (True, False) or isinstance(meta["chat"], str))
                and len(meta["prompts"]) == len(meta["kinds"]) > 0
                and all(isinstance(text, str) for text in (*meta["prompts"], *meta["kinds"]))
                and all(texts.path(name).stat().st_size >= texts.size(name) for name in FILES))
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        good = False
    if not good:
        raise BadInput(f"{folder} holds no whole texts of pretrained.generate; run it again, or "
                       "take another --data_dir")
    return meta


class States(Batches):
    """Batches of a head's training: places in the texts, and the states that are stored there.

    Every 32nd text is for validation.
    """

    def __init__(self, meta, cfg, split, device):
        texts, self.n, self.device = Texts(cfg.data_dir, meta), cfg.n_future, device
        self.positions = self.batch_size = cfg.batch_size
        self.tokens, self.states, self.log_z = map(texts.read, FILES)
        lengths = np.array(meta["lengths"])
        ends = lengths.cumsum()
        self.end = np.repeat(ends, lengths)  # of each place's text
        is_val = np.arange(len(lengths)) % 32 == 0
        places = np.arange(len(self.tokens))
        own = np.repeat(is_val == (split == "val"), lengths)
        self.text = self.tokens[own]
        self.places = places[own & (self.end - places > 1)]
        self.n_starts = len(self.places)
        if not self.n_starts:
            raise BadInput(f"{cfg.data_dir} holds too few texts, {len(lengths)}; a larger "
                           "--num_texts of pretrained.generate writes more of them")

    def at(self, starts):
        """At some of the places t: the states (B, n, C) e_t, ..., e_{t+n-1}, the tokens (B, n)
        x_{t+1}, ..., x_{t+n}, -1 after the text's end, and log_z (B, n), the logsumexp of W e."""
        places = self.places[starts]
        i = places[:, None] + np.arange(self.n)
        inside = i < self.end[places][:, None]
        i = np.minimum(i, len(self.tokens) - 1)
        states = torch.from_numpy(self.states[i].view(np.int16)).view(torch.bfloat16).float()
        gold = torch.from_numpy(np.where(inside, self.tokens[i].astype(np.int64), -1))
        log_z = torch.from_numpy(self.log_z[i])
        return tuple(x.to(self.device) for x in (states, gold, log_z))

    def counts(self, vocab_size):
        """How often each token comes in the texts."""
        return np.bincount(self.text, minlength=vocab_size)
