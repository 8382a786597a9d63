"""What a head costs in training: a table over vocabulary, n and rank.

    python -m experiments.bench_training --n_layer 6 --n_embd 384 --block_size 64 --batch_size 1 \\
        --joint_share 1

Steps of train.py's own loop on random tokens, with shapes and dtype from its flags. Every model is
measured in a process of its own, which tells its peak memory, and in turn with the same trunk
without a head (n = 1), step by step: "x n = 1" is the median of the ratios. A vocabulary's first
row is nanoGPT's algorithm. The last line of stdout is a JSON object.
"""

import argparse
import itertools
import json
import signal
import statistics
import subprocess
import sys
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import model
from bench_speculative import hardware, timed
from common import ArgumentParser, Batches, padded, pick_device, run_script
from heads import conditional, full, masks, medusa
from model import ROOT, BadInput, GPTConfig, new_model, widen
from train import Run, TrainConfig, add_flags, count, optimizer_step, pick_dtype

FLAGS = ("device", "dtype", "seed", "block_size", "n_layer", "n_head", "n_embd", "bias", "head",
         "target", "joint_share", "batch_size", "grad_accum")
PEAK = {"A100": 312e12, "H100 80GB HBM3": 989e12, "H200": 989e12}  # bfloat16, dense, says NVIDIA


def nanogpt_loss(model, idx, gold, **unused):
    """nanoGPT's algorithm, without dropout: q, k, v turned one by one, all logits at once."""
    B, T = idx.shape
    tr, n_head = model.transformer, model.config.n_head
    x = tr.drop(tr.wte(idx) + tr.wpe(torch.arange(T, device=idx.device)))
    for block in tr.h:
        qkv = block.attn.c_attn(block.ln_1(x)).chunk(3, dim=2)
        q, k, v = (part.view(B, T, n_head, -1).transpose(1, 2) for part in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + block.attn.c_proj(y.transpose(1, 2).contiguous().view(B, T, -1))
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
    loss = F.cross_entropy(model.lm_head(tr.ln_f(x)).flatten(0, 1), gold[..., 0].flatten())
    return loss, {}


def all_logits(h, weight, y):
    """`gold_log_prob` of model.py with the logits of all rows, which the backward pass keeps."""
    shape = h.shape[:-1]
    logits = widen(F.linear(h.flatten(0, -2), weight))
    return -F.cross_entropy(logits, y.expand(shape).flatten(), reduction="none").view(shape)


class OneBatch(Batches):
    """The same windows of random tokens, for ever."""

    def __init__(self, cfg, vocab_size, device):
        shape = cfg.batch_size, cfg.block_size + cfg.n_future
        text = torch.randint(vocab_size, shape, device=device)
        self.batch = text[:, : cfg.block_size], text[:, 1:].unfold(1, cfg.n_future, 1)

    def random(self, generator, rank=0, ranks=1):
        return itertools.repeat(self.batch)


class RandomRun(Run):
    """A run without data."""

    def __init__(self, cfg, vocab_size):
        self.vocab_size = vocab_size
        super().__init__(cfg, {})

    def read_meta(self, cfg, ckpt):
        return {}

    def read_data(self, split):
        return OneBatch(self.cfg, self.vocab_size, self.device)

    def build(self):
        return new_model(model_config(self.cfg, self.vocab_size))


def model_config(cfg, vocab_size):
    """The GPTConfig of a fresh model."""
    shared = {f.name: getattr(cfg, f.name) for f in fields(GPTConfig) if hasattr(cfg, f.name)}
    return GPTConfig(**shared, vocab_size=padded(vocab_size), n_token=vocab_size)


def stepper(cfg, vocab_size, nanogpt=False):
    """(Run, a function that does one step of train.py's loop on random tokens)."""
    run = RandomRun(cfg, vocab_size)
    if nanogpt:
        run.net = partial(nanogpt_loss, run.model)
    return run, partial(optimizer_step, run)


def peak_bytes(device):
    """The most memory that this process has held on the device; None if nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # Linux; getrusage would begin with the parent's peak
    if device.type != "cpu" or not status.exists():
        return None
    return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])


def measure(cfg, vocab_size, nanogpt, at_once=False, rounds=5):
    """One row, a dict; to be called in a fresh process. at_once: with `all_logits`.

    seconds of a step; ratio, to a step with n = 1; bytes at the peak, of weights, gradients,
    AdamW's state and all that a step holds, beyond what PyTorch itself takes; flops that a step's
    matrix products take, those included that the backward pass computes again.
    """
    device = torch.device(cfg.device)
    if at_once:
        for module in (model, conditional, full, masks, medusa):
            module.gold_log_prob = all_logits
    tiny = replace(cfg, n_layer=1, n_head=1, n_embd=8, block_size=8, batch_size=1, grad_accum=1)
    stepper(tiny, 64, nanogpt)[1]()  # loads what PyTorch loads at its first use
    before = peak_bytes(device)
    run, step = stepper(cfg, vocab_size, nanogpt)
    for _ in range(3):  # AdamW's state exists from the second step on
        step()
    peak = peak_bytes(device)
    with FlopCounterMode(display=False) as counter:
        step()
    _, plain = stepper(replace(cfg, n_future=1, rank=1), vocab_size)
    plain()
    pairs = [(timed(plain, device)[0], timed(step, device)[0]) for _ in range(rounds)]
    trunk, head = run.model.n_params()
    return {"seconds": statistics.median(own for _, own in pairs),
            "ratio": statistics.median(own / plain for plain, own in pairs),
            "flops": counter.get_total_flops(), "bytes": peak and peak - before,
            "trunk_parameters": trunk, "head_parameters": head}


def measure_apart(*args):
    """measure(*args) in a fresh process; None where the memory does not suffice."""
    command = [sys.executable, "-m", "experiments.bench_training", "--row", json.dumps(args)]
    # in a session of its own: a Ctrl-C comes here alone, and run kills the process then
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                             start_new_session=True)
    if process.returncode == 0:
        return json.loads(process.stdout.splitlines()[-1])
    if process.returncode == -9:  # SIGKILL, which is what a system out of memory sends
        return None
    raise BadInput(f"a measurement ended with exit code {process.returncode}.")


def row_process(text):
    """The other end of measure_apart: print the row that the JSON text asks for."""
    cfg, *args = json.loads(text)
    try:
        row = measure(TrainConfig(**cfg), *args)
    except RuntimeError as e:  # torch.OutOfMemoryError is one
        if "memory" not in str(e):
            raise
        row = None
    print(json.dumps(row))


def benchmark(cfg, cells):
    """Print a row for each (V, n, r, nanogpt, at_once) of cells, and one JSON object with all."""
    for V, n, r, *_ in cells:
        with torch.device("meta"):  # BadInput now, not in the other process
            new_model(model_config(replace(cfg, n_future=n, rank=r), V))
    device = pick_device(cfg.device)
    dtype, name = str(pick_dtype(cfg.dtype, device)).removeprefix("torch."), hardware(device)
    peak = next((most for gpu, most in PEAK.items() if gpu in name and dtype == "bfloat16"), None)
    print(f"{name}, {device}, {dtype}, torch {torch.__version__}, {torch.get_num_threads()} CPU "
          f"threads; n_layer {cfg.n_layer}, n_embd {cfg.n_embd}, "
          f"{cfg.batch_size} x {cfg.block_size} tokens, joint_share {cfg.joint_share}, "
          f"head {cfg.head}, target {cfg.target}\n"
          "x n = 1: a step over one of ours without a head, taken in turn, median; MiB: peak,\n"
          "with weights, gradients and AdamW's state; GFLOP/s: of the matrix products, those\n"
          "included that the backward pass computes again\n")
    columns = "     V   n   r  head, M  ms/step  x n = 1     MiB  GFLOP/s"
    print(" " * 9 + columns + "  of peak" * bool(peak))
    rows = []
    for V, n, r, nanogpt, at_once in cells:
        cell = replace(cfg, n_future=n, rank=r, device=str(device))
        row = measure_apart(asdict(cell), V, nanogpt, at_once)
        start = f"{'nanoGPT' if nanogpt else 'at once' if at_once else 'ours':8} {V:6} {n:3} {r:3}"
        if row is None:
            print(f"{start}  not enough memory")
            continue
        rows.append({"nanogpt": nanogpt, "at_once": at_once, "vocab_size": V, "n_future": n,
                     "rank": r, **row})
        mib = f"{row['bytes'] / 2**20:7.0f}" if row["bytes"] else "      -"
        speed = row["flops"] / row["seconds"]
        print(f"{start} {row['head_parameters'] / 1e6:8.2f} {1e3 * row['seconds']:8.1f} "
              f"{row['ratio']:7.2f}x {mib} {speed / 1e9:8.0f}"
              + (f"  {speed / peak:7.1%}" if peak else ""), flush=True)
    print(json.dumps({"hardware": name, "device": str(device), "dtype": dtype,
                      "torch": torch.__version__, "train_config": asdict(cfg), "rows": rows}))


def main():
    parser = ArgumentParser(__doc__)
    add_flags(parser, TrainConfig, FLAGS)
    for flag, values, text in (("--vocab_sizes", [4096, 50257], "vocabularies"),
                               ("--futures", [4, 8], "values of n"),
                               ("--ranks", [1, 2, 4, 8, 16], "ranks")):
        parser.add_argument(flag, nargs="+", type=count, default=values,
                            help=f"{text} ({' '.join(map(str, values))})")
    parser.add_argument("--all_logits", action="store_true",
                        help="measure each head also with the logits of all its rows at once")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # JSON, from measure_apart
    args = parser.parse_args()
    if args.row:
        return row_process(args.row)
    # kills the row, too
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    cfg = replace(TrainConfig(), **{name: getattr(args, name) for name in FLAGS if name in args})
    cells = []
    for V in args.vocab_sizes:
        cells += [(V, 1, 1, True, False), (V, 1, 1, False, False)]
        cells += [(V, n, r, False, at_once) for n in args.futures for r in args.ranks
                  for at_once in (False, True)[: 1 + args.all_logits]]
    benchmark(cfg, cells)


if __name__ == "__main__":
    run_script(main)
