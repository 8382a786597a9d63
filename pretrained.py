"""A causal language model of Hugging Face transformers as the trunk of a head.

    python pretrained.py generate --init_from HuggingFaceTB/SmolLM2-135M-Instruct --data_dir data/own
    python train.py --preset pretrained --data_dir data/own --out_dir out/own
    python bench_speculative.py --out_dir out/own

`generate` lets the model answer prompts, those of prompts.py or yours, and keeps its hidden states
beside its text: the trunk is frozen, so the head trains over the states, at its own cost alone.
An interrupted `generate` goes on by the same command. --init_from names a model of the hub, a
folder, or a .gguf file. A checkpoint then holds the head, and the name and the hash of the trunk.
Needs transformers, and for a .gguf file gguf and accelerate.

`Pretrained` is the adapter: all that decode.py and a head need of a trunk. `Pretrained.loss` is
what the head is trained on.
"""

import functools
import hashlib
import inspect
import itertools
import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

from common import (ArgumentParser, Batches, any_path, any_seed, bfloat16_is_faster,
                    import_transformers, locked, number, pick_device, progress_bar, replacing,
                    run_script)
from decode import categorical
from model import (GPT, HEAD_FIELDS, HEADS, NO_PLACE, BadInput, CPHead, GPTConfig, balance_loss,
                   widen)
from prompts import FRAMES, HELD_OUT, SHARES, read_prompts

# -----------------------------------------------------------------------------
# the files of a model


NEEDS = ("A pretrained model", "transformers, for a .gguf file also gguf and accelerate")


def find_model(name):
    """(folder, .gguf file in it or None) of a folder, a .gguf file, or a model of the hub, which is
    downloaded where need be."""
    path = Path(name)
    if path.is_dir():
        return path, None
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, path.name
    if path.exists() or path.suffix == ".gguf" or name[:1] in "./" or name.count("/") > 1:
        raise BadInput(f"{name} is no folder here, no .gguf file and no name of the hub, as owner/model")
    import_transformers(*NEEDS)
    import huggingface_hub  # comes with transformers

    plain = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=plain))
        if not any(folder.glob("*.safetensors")):
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=[*plain, "*.bin"]))
    except Exception as e:  # of the network, the hub, a bad name: many kinds
        why = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise BadInput(f"{name} is no folder here, and the hub does not give it ({why}); without a "
                       "network, name the folder of a copy") from None
    return folder, None


def sha256(*paths):
    """Of the bytes of files, one after another."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while part := file.read(2**20):
                total.update(part)
    return total.hexdigest()


def fingerprint(folder, gguf):
    """The hash of a model's weights."""
    files = [folder / gguf] if gguf else sorted(folder.glob("*.safetensors"))
    files = files or sorted(folder.glob("*.bin"))
    if not files or not (gguf or (folder / "config.json").exists()):
        raise BadInput(f"{folder} holds no model: config.json and *.safetensors or *.bin, or name the "
                       ".gguf file in it")
    return sha256(*files)


def check_memory(transformers, config, dtype, name):
    """BadInput where a model is larger than the memory that is free, as far as Linux tells."""
    try:
        free = [line for line in open("/proc/meminfo") if line.startswith("MemAvailable")]
        free = int(free[0].split()[1]) * 1024
    except (OSError, IndexError):
        return
    with torch.device("meta"):
        lm = transformers.AutoModelForCausalLM.from_config(config)
    need = sum(p.numel() for p in lm.parameters()) * dtype.itemsize
    if need > 0.9 * free:
        raise BadInput(f"{name} needs {need / 1e9:.1f} GB for its weights in {str(dtype)[6:]}, and "
                       f"{free / 1e9:.1f} GB are free; take a smaller model, or --dtype bfloat16")


class HubTokenizer:
    """A tokenizer of transformers: what is used here of a tiktoken.Encoding, and chat prompts."""

    def __init__(self, tokenizer, n_vocab):
        self.tokenizer, self.n_vocab = tokenizer, n_vocab
        self.eot_token = tokenizer.eos_token_id
        self.has_chat = bool(tokenizer.chat_template)

    def sha256(self):
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(repr((vocabulary, self.tokenizer.chat_template)).encode()).hexdigest()

    def prompt_ids(self, text, chat):
        """The ids that a text begins with, or, with chat, that a model's answer to it begins after."""
        if chat and not self.has_chat:
            raise BadInput("this model has no chat template; leave --chat away.")
        if chat:
            message = [{"role": "user", "content": text}]
            return list(self.tokenizer.apply_chat_template(message, add_generation_prompt=True,
                                                           return_dict=True)["input_ids"])
        ids = self.tokenizer(text)["input_ids"]
        first = self.tokenizer.bos_token_id
        return ids or [self.eot_token if first is None else first]

    def open_message(self, frame):
        """The ids of a user's message that is not finished yet."""
        message = [{"role": "user", "content": frame}]
        text = self.tokenizer.apply_chat_template(message, tokenize=False)
        text = text[: text.index(frame) + len(frame)]
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, tokens):
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def text_pieces(self):
        """A function from the next token to the text that it completes."""
        from tokenizers.decoders import DecodeStream

        stream, backend = DecodeStream(skip_special_tokens=True), self.tokenizer._tokenizer
        return lambda token: stream.step(backend, token) or ""


# -----------------------------------------------------------------------------
# the adapter


class Cache:
    """The cache of a model of transformers, with a length that can be set back."""

    past = None

    @property
    def length(self):
        return self.past.get_seq_length() if self.past is not None else 0

    @length.setter
    def length(self, length):
        if length == 0:
            self.past = None
        elif length < self.length:
            self.past.crop(length - self.length)  # a negative number is what to take away


def linear_weight(module):
    """W (out, in) of a linear layer, the transposed one of transformers' GPT-2 included; else None."""
    if type(module).__name__ == "Conv1D":
        return module.weight.T
    return module.weight if type(module) is nn.Linear else None


class PackedLinear(nn.Module):
    """A linear layer for decoding on a CPU, its W in the order in which oneDNN reads it.

    oneDNN or MKL would bring W into such an order in every pass, and with few rows this takes longer
    than their product. It gives the same numbers to rounding, has no gradient, and keeps W only where
    it is asked to.
    """

    def __init__(self, W, bias=None, keep=None):
        super().__init__()
        # for passes of about 8 rows
        packed = torch.ops.mkldnn._reorder_linear_weight(W.detach().contiguous(), 8)
        if keep is not None:
            self.weight, self.packed = keep, packed
        else:
            self.packed = nn.Parameter(packed, requires_grad=False)  # so that it counts as W did
        self.bias = bias

    def forward(self, x):
        return self.times(x, self.bias)

    def times(self, x, bias=None):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")

    def __reduce__(self):  # torch cannot copy packed weights
        return PackedLinear, (self.packed.to_dense(), self.bias, getattr(self, "weight", None))


def packed_unembed(rows, h, unembed):
    """`CPHead.unembed` by a PackedLinear, of whose bias the head knows nothing."""
    return widen(rows.times(h.contiguous()))


def can_pack(dtype):
    """Whether oneDNN has products in this type for this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


class Pretrained(GPT):
    """A causal language model of transformers under a head. Its weights are frozen.

    source: what a checkpoint says of the trunk, {name, sha256, tokenizer}.
    """

    teacher = "kl"  # one of TEACHERS, which `loss` uses
    takes_rows = False  # whether batched.py knows that it takes texts of different lengths

    def __init__(self, lm, config, source):
        nn.Module.__init__(self)
        self.config, self.source = config, source
        self.lm = lm.requires_grad_(False)
        self.lm_head = lm.get_output_embeddings()
        self.head = HEADS[config.head](config) if config.n_future > 1 else None
        if config.draft_vocab and self.head:  # rows of the trunk's W, and so of its type
            self.head.draft_rows = self.head.draft_rows.to(self.dtype)
        parameters = inspect.signature(lm.base_model.forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"  # its older name

    def new_cache(self, B=1):
        return Cache()

    def hidden(self, idx, cache=None, **options):
        if cache is None:
            return self.lm.base_model(idx, use_cache=False, **options).last_hidden_state
        out = self.pass_over(idx, cache.past, **options)
        cache.past = out[self.cache_name]
        return out.last_hidden_state

    def pass_over(self, idx, past, **options):
        """What the trunk of transformers returns for idx (B, T) after its own cache, past."""
        return self.lm.base_model(idx, use_cache=True, **{self.cache_name: past}, **options)

    def loss(self, states, gold, log_z, joint_weight=1.0, balance_weight=0.0, joint_share=1.0):
        """How far the head's rows q are from the target's p, where the text goes; see `States.at`.

        The trunk is frozen, so there is no other loss to weigh this one against, and joint_weight
        and joint_share change nothing. Parts as in GPT.loss, of which joint and offset are of the
        tokens that can be drafted alone, and
            accept (n - 1,)  sum_x min(p, q), the chance that a draft at offset s = 2..n is accepted
                             by itself, at temperature 1
            per_step         1 + the sum of their products: tokens per step, about
        """
        W, e = self.lm_head.weight, states[:, 0]
        real, place = gold.clamp_min(0), self.head.places(gold)
        log_q = self.head.log_conditionals(e, real, W)  # (B, n - 1, K)
        with torch.no_grad():
            log_p = CPHead.unembed(self.head, states[:, 1:], W) - log_z[:, 1:, None]  # (B, n - 1, K)
        # an offset counts within the text, and where the tokens before it could be drafted
        drafted = F.pad((place[:, 1:-1] != NO_PLACE).cumprod(1), (1, 0), value=1)
        counts = drafted * (gold[:, 1:] >= 0)  # (B, n - 1)

        def mean(x):  # by offset
            return (x * counts).sum(0) / counts.sum(0).clamp_min(1)

        is_gold = place[:, 1:, None].clamp_min(0)
        of_gold = log_q.gather(-1, is_gold).squeeze(-1) * (place[:, 1:] != NO_PLACE)  # (B, n - 1)
        # a later offset is reached less often, and weighs less
        loss = TEACHERS[self.teacher](log_p, log_q, of_gold)  # (B, n - 1)
        if self.teacher == "nextlat":  # arXiv 2511.05963: the drafting state is the trunk's next one
            h = self.head.vectors_along(e, real, W)[:, 1:, 0]  # (B, n - 1, C)
            loss = loss + F.smooth_l1_loss(h, states[:, 1:], reduction="none").mean(-1)
        weights = counts * 0.6 ** torch.arange(loss.size(1), dtype=loss.dtype, device=loss.device)
        loss = (loss * weights).sum() / weights.sum().clamp_min(1e-9)
        log_w = self.head.log_weights(e)
        balance = balance_loss(log_w)
        with torch.no_grad():
            accept = torch.minimum(log_p, log_q).exp().sum(-1)
            first = log_z[:, 0] - (W[real[:, 0]] * e).sum(-1)
            parts = dict(next=first.mean(), joint=-mean(of_gold).mean(),
                         offset=torch.cat((first.mean()[None], -mean(of_gold))), balance=balance,
                         usage=log_w.exp().mean(0), accept=mean(accept),
                         per_step=1 + (accept * counts).cumprod(1).sum(1).mean())
        return loss + balance_weight * balance, {name: x.detach() for name, x in parts.items()}

    def close(self, a, b):
        """Whether two results differ by rounding alone."""
        limit = 1e-3 if self.dtype in (torch.float32, torch.float64) else 0.1
        return ((a - b).norm() < limit * b.norm()).item()

    @torch.inference_mode()
    def check(self, name):
        """BadInput unless hidden, its cache, rolling back, and the LM head do what a decoder needs."""
        idx = torch.arange(3, 11, device=self.device).unsqueeze(0) % self.config.vocab_size
        try:
            hidden = self.hidden(idx)
        except AttributeError:  # its trunk is not what its LM head is on
            raise BadInput(f"{name} gives no hidden states, which a head drafts from") from None
        if not self.close(widen(self.lm_head(hidden)), widen(self.lm(idx, use_cache=False).logits)):
            raise BadInput(f"{name}: its logits are not its LM head of its last hidden state (they are "
                           "scaled or capped), which a head needs")
        try:
            cache = self.new_cache()
            first = self.hidden(idx[:, :4], cache)
            self.hidden(idx[:, :3], cache)  # a draft that is rejected
            cache.length = 4
            same = self.close(torch.cat((first, self.hidden(idx[:, 4:], cache)), 1), hidden)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            same = None  # no cache at all, or one that refuses
        emulated = self.dtype == torch.bfloat16 and self.device.type == "cpu" and not can_pack(self.dtype)
        if same is False and emulated:
            raise BadInput(f"{name} gives other states token by token than at once: this CPU has no "
                           "products in bfloat16, and rounds too much; take --dtype float32")
        if not same:
            raise BadInput(f"{name} has no cache that can be rolled back, or does not read from left to "
                           "right, so its drafts could not be verified; take a plain transformer decoder")

    def pack(self):
        """Decode from now on, with every linear layer a PackedLinear, and so the rows of W that drafts
        are unembedded with, where oneDNN has products for this CPU and type. The weights must not
        change after that."""
        if not (self.device.type == "cpu" and can_pack(self.dtype)):
            return
        packed = {}  # by the layer: the LM head is in here twice
        for parent in list(self.modules()):
            for name, child in list(parent.named_children()):
                if linear_weight(child) is not None:
                    if child not in packed:  # the head needs the LM head's W
                        keep = child.weight if child is self.lm_head else None
                        packed[child] = PackedLinear(linear_weight(child), child.bias, keep)
                    setattr(parent, name, packed[child])
        if self.head is not None and type(self.head).unembed is CPHead.unembed:
            rows = self.lm_head if self.head.draft_ids is None else PackedLinear(self.head.draft_rows)
            self.head.unembed = functools.partial(packed_unembed, rows)

    def load_head(self, state, path):
        """Take over the head of a checkpoint's tensors; BadInput where it does not fit."""
        head = {name.removeprefix("head."): tensor for name, tensor in state.items()}
        try:
            self.head.load_state_dict(head)
        except RuntimeError as e:  # torch's list of what is missing, superfluous or of another shape
            raise BadInput(f"{path} holds no head that fits: {' '.join(str(e).split())[:300]}") from None

    def to_checkpoint(self):
        state = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        return {"model": state, "model_args": asdict(self.config), "trunk": self.source}


# The loss of the draft's rows log q (..., K) at each place (...), by what they learn from: the target's
# whole row log p (..., K), or its text, of whose tokens of_gold is log q.
TEACHERS = {
    "kl": lambda log_p, log_q, of_gold: -(log_p.exp() * log_q).sum(-1),
    # -log sum_x min(p, q), arXiv 2602.23881: the sum is the chance that the draft is accepted
    "lk": lambda log_p, log_q, of_gold: -torch.minimum(log_p, log_q).logsumexp(-1),
    "text": lambda log_p, log_q, of_gold: -of_gold,
}
TEACHERS["nextlat"] = TEACHERS["kl"]  # and a term of the states, for recurrent heads


def loss_on_frozen_trunk(model, idx, gold, joint_weight=1.0, balance_weight=0.0, joint_share=1.0):
    """Pretrained.loss for a head on a GPT of ours, which is frozen: its states are computed in each step.
    idx (B, T), gold (B, T, n), joint_share as in GPT.loss; joint_weight changes nothing."""
    n = model.config.n_future
    with torch.no_grad():
        hidden = model.hidden(idx)  # (B, T, C)
        log_z = widen(model.lm_head(hidden)).logsumexp(-1)  # (B, T)
    gold = gold[:, : gold.size(1) - n + 1]
    windows = hidden.unfold(1, n, 1).transpose(2, 3), gold, log_z.unfold(1, n, 1)
    states, gold, log_z = (x.flatten(0, 1) for x in windows)  # (N, n, C), (N, n), (N, n)
    some = torch.randperm(len(gold), device=gold.device)[: math.ceil(joint_share * len(gold))]
    return Pretrained.loss(model, states[some], gold[some], log_z[some], joint_weight, balance_weight)


@functools.cache
def load_lm(name, device, dtype):
    """(model of transformers, HubTokenizer, {name, sha256, tokenizer}); BadInput where it cannot be
    had. Heads beside one another share their trunk.
    """
    folder, gguf = find_model(name)
    source = {"name": str(name), "sha256": fingerprint(folder, gguf)}
    transformers, options = import_transformers(*NEEDS), {"gguf_file": gguf} if gguf else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        if not gguf:
            check_memory(transformers, config, dtype, name)
        elif hasattr(transformers, "GgufConfig"):  # newer versions would compute on packed weights
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    except (BadInput, MemoryError):
        raise
    except Exception as e:  # of a file, a class, a missing package: many kinds
        why = " ".join(str(e).split())[:200]
        raise BadInput(f"{name} cannot be loaded as a causal language model ({why})") from None
    enc = HubTokenizer(tokenizer, lm.get_output_embeddings().weight.size(0))
    return lm.to(device).eval(), enc, {**source, "tokenizer": enc.sha256()}


def lm_config(lm, **head):
    """The GPTConfig of a model of transformers with a head: what decode.py and the head ask for."""
    c, W = lm.config.get_text_config(), lm.get_output_embeddings().weight
    block_size = getattr(c, "max_position_embeddings", None) or 2048
    if window := getattr(c, "sliding_window", None):  # a cache that is full cannot be rolled back
        block_size = min(block_size, window - 1)
    return GPTConfig(block_size=block_size, vocab_size=W.size(0), n_embd=W.size(1),
                     n_layer=1, n_head=1, target="lm_head", **{"n_future": 1, **head})


def load_pretrained(name, device, dtype="auto", known=None, **head):
    """(Pretrained, HubTokenizer): a model, its head fresh or, by default, none.

    known: what a checkpoint or a data folder says of the trunk, which must still be true.
    """
    lm, enc, source = load_lm(name, device, getattr(torch, measured_dtype(dtype, device)))
    for part, what in (("sha256", "weights"), ("tokenizer", "tokenizer")):
        if known is not None and known.get(part) != source[part]:
            raise BadInput(f"{name} has changed: its {what} are not what the head or its text were made "
                           "with. Take that version of it, or write text and train anew.")
    model = Pretrained(lm, lm_config(lm, **head), source)
    model.check(name)
    return model, enc


def measured_dtype(name, device):
    """Of --dtype; auto is bfloat16 where a trial finds it faster."""
    return ("bfloat16" if bfloat16_is_faster(device) else "float32") if name == "auto" else name


def load_checkpoint(ckpt, path, device, dtype):
    """(Pretrained, HubTokenizer) of a checkpoint, which holds the head and names the trunk."""
    source, args = ckpt["trunk"], ckpt["model_args"]
    if not isinstance(source, dict) or not isinstance(source.get("name"), str):
        raise BadInput(f"{path} does not say what its trunk is; train anew")
    head = {name: args.get(name) for name in HEAD_FIELDS}
    try:
        model, enc = load_pretrained(source["name"], device, dtype, source, **head)
    except BadInput as e:
        raise BadInput(f"The trunk of {path}: {e}") from None
    model.load_head(ckpt["model"], path)
    return model, enc


def new_model(cfg, meta, device):
    """For a TrainConfig, which may leave things open, and a data folder's meta: the TrainConfig, and
    the trunk that the folder is of, with a fresh head."""
    if cfg.init_from:
        raise BadInput(f"{cfg.data_dir} holds text and states of {meta['trunk']['name']}, which is the "
                       "trunk; leave --init_from away")
    if cfg.target != "lm_head":
        raise BadInput("a pretrained trunk keeps its own LM head as the target; leave --target away")
    if HEADS[cfg.head].reads_trunk:
        raise BadInput(f"--head {cfg.head} reads more of the trunk than the states that are stored; take "
                       "another --head")
    cfg = replace(cfg, freeze_trunk=True, dtype=measured_dtype(cfg.dtype, device))
    head = {name: getattr(cfg, name) for name in HEAD_FIELDS}
    return cfg, load_pretrained(meta["trunk"]["name"], device, cfg.dtype, meta["trunk"], **head)[0]


# -----------------------------------------------------------------------------
# the model's own text


@torch.inference_mode()
def answer(model, prompts, max_new_tokens, temperature, stop_token, generator):
    """Continue prompts, lists of ids, all at once.

    Returns for each prompt its tokens x_1, ..., x_L (L,), the last one being stop_token or the
    max_new_tokens-th; the hidden states e_0, ..., e_{L-1} (L, C) that they were drawn from; and the
    logsumexp (L,) of the logits there.
    """
    B, width, device = len(prompts), max(map(len, prompts)), model.device
    idx = torch.full((B, width), prompts[0][0], device=device)
    mask = torch.zeros_like(idx)  # the padding is on the left, and nothing sees it
    for i, prompt in enumerate(prompts):
        idx[i, width - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[i, width - len(prompt) :] = 1
    places, rows = (mask.cumsum(1) - 1).clamp_min(0), torch.arange(B)
    cache, out = model.new_cache(), []
    for _ in range(max_new_tokens):
        e = model.hidden(idx, cache, attention_mask=mask, position_ids=places)[:, -1]
        logits = widen(model.lm_head(e))
        p = (logits / temperature).softmax(-1)
        # sums in float64 take 15 times as long, for digits that training text does not need
        tokens = categorical(p, generator, torch.float32)
        out.append((rows, tokens.cpu(), e.cpu(), logits.logsumexp(-1).cpu()))
        alive = tokens != stop_token
        if not alive.all():  # texts that have ended make room
            kept = alive.nonzero().flatten()
            if not len(kept):
                break
            cache.past.batch_select_indices(kept)
            rows, mask, places, tokens = rows[kept.cpu()], mask[kept], places[kept], tokens[kept]
        idx = tokens.unsqueeze(1)
        mask, places = F.pad(mask, (0, 1), value=1), places[:, -1:] + 1
    rows, *parts = (torch.cat(column) for column in zip(*out))
    return [tuple(part[rows == i] for part in parts) for i in range(B)]


FILES = {"tokens": np.uint32, "states": np.uint16, "log_z": np.float32}  # states: bfloat16's bits


class Texts:
    """The texts in a data folder: each one's tokens, hidden states and logsumexps, after another.

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
                    raise BadInput(f"{self.path(name)} is shorter than meta.json says; take another "
                                   "--data_dir, or remove this one")
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


def check_texts(folder, meta):
    """meta, if it is what `generate` writes and its files are there; else BadInput."""
    texts = Texts(folder, meta)
    try:
        good = (sum(meta["lengths"]) > 0 and isinstance(meta["trunk"]["name"], str) and meta["chat"] in (True, False)
                and len(meta["prompts"]) == len(meta["kinds"]) > 0
                and all(isinstance(text, str) for text in (*meta["prompts"], *meta["kinds"]))
                and all(texts.path(name).stat().st_size >= texts.size(name) for name in FILES))
    except (KeyError, TypeError, FileNotFoundError):
        good = False
    if not good:
        raise BadInput(f"{folder} holds no whole texts of pretrained.py generate; run it again, or take "
                       "another --data_dir")
    return meta


class States(Batches):
    """Batches of a head's training: places in the texts, and the states that are stored there.

    Every 32nd text is for validation.
    """

    def __init__(self, folder, meta, cfg, split, device):
        texts, self.n, self.device = Texts(folder, meta), cfg.n_future, device
        self.positions = self.batch_size = cfg.batch_size
        self.tokens, self.states, self.log_z = map(texts.read, FILES)
        lengths = np.array(meta["lengths"])
        ends = lengths.cumsum()
        self.end = np.repeat(ends, lengths)  # of each place's text
        is_val = np.arange(len(lengths)) % 32 == 0
        places = np.arange(len(self.tokens))
        chosen = np.repeat(is_val == (split == "val"), lengths) & (self.end - places > 1)
        self.places = places[chosen]
        self.n_starts = len(self.places)
        if not self.n_starts:
            raise BadInput(f"{folder} holds too few texts, {len(lengths)}; pretrained.py generate writes "
                           "more of them with a larger --num_texts")

    def at(self, starts):
        """At some of the places t: the states (B, n, C) e_t, ..., e_{t+n-1}, the tokens (B, n) x_{t+1}, ...,
        x_{t+n}, -1 after the text's end, and log_z (B, n), the logsumexp of W e."""
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
        return np.bincount(self.tokens[self.places], minlength=vocab_size)


def open_texts(folder, settings):
    """The Texts in a folder, new ones or, where the settings are the same, those that are there."""
    path = folder / "meta.json"
    if not path.exists():
        if any(folder.glob("*.bin")):
            raise BadInput(f"{folder} holds other data; take another --data_dir")
        texts = Texts(folder, {**settings, "lengths": []})
        texts.write_meta()
    else:
        meta = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name, value in settings.items() if meta.get(name) != value]
        if other:
            raise BadInput(f"{folder} holds texts of other settings ({', '.join(other)}); take another "
                           "--data_dir")
        texts = Texts(folder, meta)
    texts.cut()
    return texts


def schedule(prompts, shares):
    """Prompts for ever: the kinds by their shares, in turn, and each kind's prompts in order."""
    sources = {kind: itertools.cycle(texts) for kind, texts in prompts.items()}
    turns = [kind for kind in prompts for _ in range(shares.get(kind, 1))]
    for kind in itertools.cycle(turns):
        yield next(sources[kind])


def chosen_kinds(prompts, kinds):
    """{kind: prompts} of the kinds that are asked for; None are all."""
    unknown = sorted(set(kinds or ()) - set(prompts))
    if unknown:
        raise BadInput(f"there are no prompts of the kind {unknown[0]}; there are {', '.join(prompts)}")
    return {kind: texts for kind, texts in prompts.items() if not kinds or kind in kinds}


LONGEST_MESSAGE = 32  # tokens that finish a frame


def finish(model, enc, frames, generator):
    """The frames as messages of one line, which the model finishes as if it were the user."""
    opened = [enc.open_message(frame) for frame in frames]
    texts = answer(model, opened, LONGEST_MESSAGE, 0.8, enc.eot_token, generator)
    messages = [frame + enc.decode(tokens.tolist()).split("\n")[0]
                for frame, (tokens, *_) in zip(frames, texts)]
    held_out = {message for kind in HELD_OUT.values() for message in kind}
    return [frame if message in held_out else message for frame, message in zip(frames, messages)]


def generate(args):
    training, held_out = (chosen_kinds(prompts, args.kinds) for prompts in
                          (read_prompts(args.prompts) if args.prompts else (FRAMES, HELD_OUT)))
    model, enc = load_pretrained(args.init_from, pick_device(args.device), args.dtype)
    model.pack()
    settings = {
        "trunk": model.source, "chat": enc.has_chat, "vocab_size": enc.n_vocab,
        "n_embd": model.config.n_embd, "temperature": args.temperature, "seed": args.seed,
        "max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size,
        "prompts": [prompt for kind in held_out.values() for prompt in kind],
        "kinds": [kind for kind, prompts in held_out.items() for _ in prompts],
        "training": hashlib.sha256(repr(training).encode()).hexdigest(),
    }
    longest = max(len(enc.prompt_ids(prompt, enc.has_chat)) for kind in training.values() for prompt in kind)
    if longest + LONGEST_MESSAGE + args.max_new_tokens > model.config.block_size:
        raise BadInput(f"The longest prompt, {longest} tokens or more, and --max_new_tokens "
                       f"{args.max_new_tokens} do not fit the model's {model.config.block_size}")
    with locked(args.data_dir) as folder:
        texts = open_texts(folder, settings)
        lengths, prompts = texts.meta["lengths"], schedule(training, SHARES)
        for _ in lengths:
            next(prompts)
        with progress_bar(total=args.num_texts, initial=len(lengths), unit="text") as bar:
            while len(lengths) < args.num_texts:
                generator = torch.Generator(model.device).manual_seed(args.seed + len(lengths))
                batch = list(itertools.islice(prompts, args.batch_size))
                if enc.has_chat and not args.prompts:
                    batch = finish(model, enc, batch, generator)
                batch = [enc.prompt_ids(prompt, enc.has_chat) for prompt in batch]
                texts.append(answer(model, batch, args.max_new_tokens, args.temperature, enc.eot_token,
                                    generator))
                bar.update(args.batch_size)
                bar.set_postfix(tokens=f"{sum(lengths):,}")
    print(f"{args.data_dir}: {len(lengths):,} texts of {model.source['name']}, {sum(lengths):,} tokens")


# -----------------------------------------------------------------------------


def parse_args():
    parser = ArgumentParser(__doc__)
    parser.add_argument("command", choices=["generate"])
    parser.add_argument("--init_from", required=True, type=any_path,
                        help="the model: a name of the hub, a folder or a .gguf file")
    parser.add_argument("--data_dir", default="data/own", type=any_path,
                        help="folder for the texts (data/own)")
    parser.add_argument("--prompts", nargs="+", type=any_path, metavar="FILE",
                        help="files with a prompt per line, each one a kind (those of prompts.py)")
    parser.add_argument("--kinds", nargs="+", metavar="KIND",
                        help="the kinds to write: a head for these alone drafts them better (all)")
    parser.add_argument("--num_texts", type=number(int, 1), default=4096,
                        help="texts to write, in whole batches (4096)")
    parser.add_argument("--max_new_tokens", type=number(int, 2), default=192,
                        help="longest text in tokens (192)")
    parser.add_argument("--temperature", type=number(float, 1e-3, 1e3), default=0.7,
                        help="of the draws (0.7)")
    parser.add_argument("--batch_size", type=number(int, 1), default=96, help="texts at once (96)")
    parser.add_argument("--seed", type=any_seed, default=1337, help="of prompts and draws (1337)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto takes cuda, else cpu")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="auto is bfloat16 where a trial finds it faster (auto)")
    return parser.parse_args()


def main():
    generate(parse_args())


if __name__ == "__main__":
    run_script(main)
