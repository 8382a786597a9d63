"""What a head costs in training: the table that `python train.py --benchmark` prints.

    python train.py --benchmark --n_embd 384 --batch_size 2 --joint_share 1

Steps of train.py's own loop on random tokens, shapes and dtype from its flags, for the ranks, n and vocabularies below.
Every model runs in a process of its own, which tells its peak memory, and in turn with the same trunk without a head
(n = 1), step by step: "x n = 1" is the median of the ratios. A vocabulary's first row is nanoGPT's algorithm.
"""

import itertools
import json
import multiprocessing
import signal
import statistics
import sys
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path

import torch
from torch.nn import functional as F

from bench_speculative import hardware, timed
from common import pick_device
from model import GPT
from train import Run, autocast_context, model_config, optimizer_step, pick_dtype, stop_signals

VOCABULARIES, FUTURES, RANKS = (4096, 50257), (4, 8), (1, 2, 4, 8, 16)
PEAK = {"A100": 312e12, "H100 80GB HBM3": 989e12, "H200": 989e12}  # FLOP/s in bfloat16, dense, as NVIDIA states them


def nanogpt_loss(model, idx, targets, *unused):
    """What nanoGPT computes with the same weights (without dropout): q, k, v turned one by one, all logits at once."""
    B, T = idx.shape
    tr, n_head = model.transformer, model.config.n_head
    x = tr.drop(tr.wte(idx) + tr.wpe(torch.arange(T, device=idx.device)))
    for block in tr.h:
        qkv = block.attn.c_attn(block.ln_1(x)).chunk(3, dim=2)
        q, k, v = (part.view(B, T, n_head, -1).transpose(1, 2) for part in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + block.attn.c_proj(y.transpose(1, 2).contiguous().view(B, T, -1))
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
    loss = F.cross_entropy(model.lm_head(tr.ln_f(x)).flatten(0, 1), targets[..., 0].flatten())
    return loss, {}


def peak_bytes(device):
    """The most memory that this process has held so far on the device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # Linux; getrusage would begin with the parent's peak
    if device.type != "cpu" or not status.exists():
        return None
    return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])


def flops(c, cfg):
    """Of forward and backward pass for a batch: 6 per weight of a matrix product and token that goes through it, and
    attention's. What a chunk of the head computes again is not counted; of the positions, those that the head sees."""
    trunk = c.n_layer * (12 * c.n_embd**2 + 2 * c.n_embd * c.block_size)
    if c.n_future == 1 or c.target == "lm_head":
        trunk += c.vocab_size * c.n_embd
    head = 0
    if c.n_future > 1:
        passes = 1 / 3 + 1 / c.rank if cfg.sample_component and c.rank > 1 else 1  # 2 of 6 for all, 6 for one
        head += c.n_future * c.rank * c.n_embd * c.vocab_size * passes
        head += c.n_future * c.rank * c.n_embd**2 * (c.factors == "reduced")
        head += 2 * (c.n_future - 1) * c.n_embd**2 * (c.context == "previous")
    return 6 * cfg.batch_size * cfg.block_size * (trunk + cfg.joint_share * head)


def stepper(cfg, vocab_size, device, dtype, loss=None):
    """(model, a function that does one step of train.py's loop on random tokens)."""
    torch.manual_seed(cfg.seed)
    model = GPT(model_config(cfg, vocab_size)).to(device)
    run, tokens = Run(cfg, {}, model, device, dtype), (cfg.batch_size, cfg.block_size + cfg.n_future)
    text = torch.randint(vocab_size, tokens, device=device)
    batches = itertools.repeat((text[:, : cfg.block_size], text[:, 1:].unfold(1, cfg.n_future, 1)))
    loss_function = partial(loss, model) if loss else model.loss
    return model, lambda: optimizer_step(run, loss_function, batches, autocast_context(device, dtype))


def measure(cfg, vocab_size, device_name, loss=None, rounds=5):
    """One row, a dict; to be called in a fresh process.

    seconds of a step; ratio, to a step with n = 1; bytes at the peak, of weights, gradients, AdamW's state and all that
    a step holds, beyond what PyTorch itself takes (None where the system does not tell); parameters; FLOP/s.
    """
    device = torch.device(device_name)
    dtype = pick_dtype(cfg.dtype, device)
    tiny = replace(cfg, n_layer=1, n_head=1, n_embd=8, block_size=8, batch_size=1, grad_accum=1)
    stepper(tiny, 64, device, dtype, loss)[1]()  # loads what PyTorch loads at its first use
    before = peak_bytes(device)
    model, step = stepper(cfg, vocab_size, device, dtype, loss)
    for _ in range(3):  # AdamW's state exists from the second step on
        step()
    peak = peak_bytes(device)
    plain = stepper(replace(cfg, n_future=1, rank=1), vocab_size, device, dtype)[1]
    plain()
    pairs = [(timed(plain, device)[0], timed(step, device)[0]) for _ in range(rounds)]
    seconds = statistics.median(own for _, own in pairs)
    trunk, head = model.n_params()
    return {"vocab_size": vocab_size, "n_future": cfg.n_future, "rank": cfg.rank, "seconds": seconds,
            "ratio": statistics.median(own / plain for plain, own in pairs), "bytes": peak and peak - before,
            "trunk_parameters": trunk, "head_parameters": head,
            "flops_per_second": cfg.grad_accum * flops(model.config, cfg) / seconds}


def cells(cfg):
    """(algorithm, TrainConfig, vocabulary) of every row."""
    for V in VOCABULARIES:
        for algorithm in ("nanoGPT", "ours"):
            yield algorithm, replace(cfg, n_future=1, rank=1), V
        for n, r in itertools.product(FUTURES, RANKS):
            yield "ours", replace(cfg, n_future=n, rank=r), V


def block_signals(block, *signals):
    """Let signals (Ctrl-C and SIGTERM) wait, or not any more; a process that starts meanwhile inherits it."""
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        how = signal.SIG_BLOCK if block else signal.SIG_UNBLOCK
        signal.pthread_sigmask(how, signals or {signal.SIGINT, signal.SIGTERM})


def answer(sender, args):
    """In the fresh process: send measure(*args), or None where the memory does not suffice."""
    block_signals(False, signal.SIGTERM)  # what a daemon is ended with
    try:
        row = measure(*args)
    except RuntimeError as e:  # torch.OutOfMemoryError is one
        if "memory" not in str(e):
            raise
        row = None
    sender.send(row)


def measure_apart(*args):
    """measure(*args) in a fresh process; None where the memory does not suffice."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(sender, args), daemon=True)
    resource_tracker.ensure_running()  # start would begin with this, which lets signals through again
    with stop_signals() as caught:  # they wait until it has started
        block_signals(True)  # which it inherits: Ctrl-C is ours alone, as a daemon ends when we do
        process.start()
        block_signals(False)
    for number in caught:
        signal.raise_signal(number)
    sender.close()
    try:
        row = receiver.recv()
        process.join()
        return row
    except EOFError:
        process.join()
        if process.exitcode == -9:  # SIGKILL, which is what a system out of memory sends
            return None
        sys.exit(f"--benchmark: a measurement ended with exit code {process.exitcode}.")


def benchmark(cfg):
    """Print the table, row by row, and one JSON object with all of it."""
    try:
        [model_config(cell, V) for _, cell, V in cells(cfg)]
    except ValueError as e:
        sys.exit(f"{e}.")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # in order, with the process apart
    device = pick_device(cfg.device)
    dtype, name = str(pick_dtype(cfg.dtype, device)).removeprefix("torch."), hardware(device)
    peak = next((most for gpu, most in PEAK.items() if gpu in name and dtype == "bfloat16"), None)
    print(f"{name}, {device}, {dtype}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads; "
          f"n_layer {cfg.n_layer}, n_embd {cfg.n_embd}, {cfg.batch_size} x {cfg.block_size} tokens, "
          f"joint_share {cfg.joint_share}, sample_component {cfg.sample_component}, factors {cfg.factors}, "
          f"context {cfg.context}, target {cfg.target}\n"
          "x n = 1: a step over one of ours without a head, taken in turn, median; MiB: peak, with weights, gradients\n"
          "and AdamW's state; GFLOP/s: of the matrix products that training needs, without what gets computed again")
    print(f"\n{'':8}      V   n   r  head, M  ms/step  x n = 1     MiB  GFLOP/s" + "   MFU" * bool(peak))
    rows = []
    for algorithm, cell, V in cells(cfg):
        start = f"{algorithm:8} {V:6} {cell.n_future:3} {cell.rank:3}"
        row = measure_apart(cell, V, str(device), nanogpt_loss if algorithm == "nanoGPT" else None)
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
