"""What a head costs in training: the table that `python train.py --benchmark` prints.

    python train.py --benchmark --n_embd 384 --batch_size 2 --joint_share 1

Steps of train.py's own loop on random tokens, shapes and dtype from its flags, for ranks, n and vocabularies below. Every
model runs in a process of its own, which tells its peak memory, and in turn with the same trunk without a head (n = 1),
step by step: "x n = 1" is the median of the ratios. The first row is nanoGPT's algorithm in the place of ours for n = 1.
"""

import itertools
import json
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import asdict, replace
from multiprocessing import get_context

import torch
from torch.nn import functional as F

from bench_speculative import hardware, timed
from common import pick_device
from model import GPT, GPTConfig
from train import Run, optimizer_step, pick_dtype

VOCABULARIES, FUTURES, RANKS = (4096, 50257), (4, 8), (1, 2, 4, 8, 16)
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # FLOP/s in bfloat16 without sparsity, as NVIDIA states them


def nanogpt_loss(model, idx, targets, *unused):
    """What nanoGPT computes with the same weights: q, k, v split and turned one by one, all logits in one piece."""
    B, T = idx.shape
    tr, n_head = model.transformer, model.config.n_head
    x = tr.drop(tr.wte(idx) + tr.wpe(torch.arange(T, device=idx.device)))
    for block in tr.h:
        q, k, v = (part.view(B, T, n_head, -1).transpose(1, 2) for part in block.attn.c_attn(block.ln_1(x)).chunk(3, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + block.attn.c_proj(y.transpose(1, 2).contiguous().view(B, T, -1))
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
    loss = F.cross_entropy(model.lm_head(tr.ln_f(x)).flatten(0, 1), targets[..., 0].flatten())
    return loss, {}


def peak_bytes(device):
    """The most memory that this process has held so far; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def flops(config, cfg):
    """Of forward and backward pass for a batch, 6 per weight and token, as nanoGPT counts; what a chunk of the head
    computes again is not counted, only the positions that it sees are."""
    c, tokens = config, cfg.batch_size * cfg.block_size
    trunk = c.n_layer * (12 * c.n_embd**2 + 2 * c.n_embd * c.block_size)
    if c.n_future == 1 or c.target == "lm_head":
        trunk += c.vocab_size * c.n_embd
    head = c.n_future * c.rank * c.n_embd * (c.n_embd + c.vocab_size) if c.n_future > 1 else 0
    return 6 * tokens * (trunk + cfg.joint_share * head)


def model_config(cfg, vocab_size):
    shape = {name: getattr(cfg, name) for name in asdict(GPTConfig()) if hasattr(cfg, name)}
    return GPTConfig(**{**shape, "vocab_size": vocab_size, "rank": cfg.rank if cfg.n_future > 1 else 1})


def stepper(cfg, vocab_size, device, dtype, loss=None):
    """(model, a function that does one step of train.py's loop on random tokens)."""
    torch.manual_seed(cfg.seed)
    model = GPT(model_config(cfg, vocab_size)).to(device)
    run, tokens = Run(cfg, {}, model, device, dtype), (cfg.batch_size, cfg.block_size + cfg.n_future)
    text = torch.randint(vocab_size, tokens, device=device)
    batches = itertools.repeat((text[:, : cfg.block_size], text[:, 1:].unfold(1, cfg.n_future, 1)))
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    function = (lambda *args: loss(model, *args)) if loss else model.loss
    return model, lambda: optimizer_step(run, function, batches, autocast)


def measure(cfg, vocab_size, device_name, loss=None, rounds=5):
    """One cell, in a process of its own: a dict of seconds, ratio (to n = 1), bytes, parameters, FLOP/s."""
    device = torch.device(device_name)
    dtype, before = pick_dtype(cfg.dtype, device), peak_bytes(device)
    model, step = stepper(cfg, vocab_size, device, dtype, loss)
    step()
    peak = peak_bytes(device)
    plain = stepper(replace(cfg, n_future=1, target="lm_head"), vocab_size, device, dtype)[1]
    plain()
    pairs = [(timed(plain, device)[0], timed(step, device)[0]) for _ in range(rounds)]
    seconds = statistics.median(own for _, own in pairs)
    return {"vocab_size": vocab_size, "n_future": cfg.n_future, "rank": model.config.rank, "seconds": seconds,
            "ratio": statistics.median(own / plain for plain, own in pairs),
            "bytes": peak and peak - (before if device.type == "cpu" else 0), "head_parameters": model.n_params()[1],
            "flops_per_second": cfg.grad_accum * flops(model.config, cfg) / seconds}


def cells(cfg):
    """(algorithm, TrainConfig, vocabulary) of every row."""
    for V in VOCABULARIES:
        yield "nanoGPT", replace(cfg, n_future=1), V
        yield "ours", replace(cfg, n_future=1), V
        for n, r in itertools.product(FUTURES, RANKS):
            yield "ours", replace(cfg, n_future=n, rank=r), V


def try_to_measure(*args):
    """measure(*args) in a fresh process; None where there is not enough memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, *args).result()
        except BrokenProcessPool:  # a system out of memory kills
            return None
        except RuntimeError as e:  # torch.OutOfMemoryError among them
            if "memory" not in str(e):
                raise
            return None


def benchmark(cfg):
    """Print the table, row by row, and one JSON object with all of it."""
    try:
        [model_config(cell, V) for _, cell, V in cells(cfg)]
    except ValueError as e:
        sys.exit(f"{e}.")
    device = pick_device(cfg.device)
    dtype, name = str(pick_dtype(cfg.dtype, device)).removeprefix("torch."), hardware(device)
    peak = next((flops for gpu, flops in PEAK.items() if gpu in name and dtype == "bfloat16"), None)
    print(f"{name}, {device}, {dtype}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads; n_layer "
          f"{cfg.n_layer}, n_embd {cfg.n_embd}, {cfg.batch_size} x {cfg.block_size} tokens, joint_share {cfg.joint_share}, "
          f"factors {cfg.factors}, context {cfg.context}")
    print(f"\n{'':8}      V   n   r  head, M  ms/step  x n = 1     MiB  GFLOP/s" + "   MFU" * bool(peak))
    rows = []
    for algorithm, cell, V in cells(cfg):
        start = f"{algorithm:8} {V:6} {cell.n_future:3} {cell.rank if cell.n_future > 1 else 1:3}"
        row = try_to_measure(cell, V, str(device), nanogpt_loss if algorithm == "nanoGPT" else None)
        if row is None:
            print(f"{start}  not enough memory")
            continue
        rows.append({"algorithm": algorithm, **row})
        mib = f"{row['bytes'] / 2**20:7.0f}" if row["bytes"] else "      -"
        mfu = f" {row['flops_per_second'] / peak:5.1%}" if peak else ""
        print(f"{start} {row['head_parameters'] / 1e6:8.2f} {1e3 * row['seconds']:8.1f} {row['ratio']:7.2f}x {mib} "
              f"{row['flops_per_second'] / 1e9:8.0f}{mfu}", flush=True)
    print(json.dumps({"hardware": name, "device": str(device), "dtype": dtype, "torch": torch.__version__,
                      "train_config": asdict(cfg), "rows": rows}))
