"""Train a GPT with a CP multi-token head.

    python train.py --preset toy          synthetic stories, minutes on a laptop CPU
    python train.py --preset laptop       real text on a CPU
    python train.py --preset tinystories  one GPU, a model of the paper's size

Every field of TrainConfig is a flag (--rank 4, --n_embd 128, --no-bias). Writes out_dir/ckpt.pt, which holds all
that sample.py and bench_speculative.py need, and out_dir/log.jsonl, one JSON object per line.
"""

import argparse
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import GPT, GPTConfig


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    # where
    data_dir: str = flag("data/text", "folder that prepare_tinystories.py wrote")
    out_dir: str = flag("out/text", "folder for the checkpoint and the log")
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; auto takes cuda, then mps, then cpu")
    dtype: str = flag("auto", "float32, bfloat16 or float16; auto is bfloat16 (else float16) on cuda, else float32")
    compile: bool = flag(False, "torch.compile the loss (needs a C++ compiler)")
    seed: int = flag(1337, "seed of the initial weights, the batches and dropout")
    init_from: str = flag("", "checkpoint to start from, ours or nanoGPT's; its trunk keeps its shape")
    freeze_trunk: bool = flag(False, "train the head alone")
    # model
    block_size: int = flag(256, "context length in tokens")
    n_layer: int = flag(6, "transformer blocks")
    n_head: int = flag(6, "attention heads")
    n_embd: int = flag(192, "width of the trunk")
    dropout: float = flag(0.0, "dropout probability")
    bias: bool = flag(False, "biases in the trunk's Linears and LayerNorms")
    n_future: int = flag(4, "n, tokens predicted at once; 1 is plain nanoGPT")
    rank: int = flag(4, "r, components of the CP head; 1 is independent heads")
    factors: str = flag("reduced", "reduced: a map per factor before the shared unembedding; full: an unembedding each")
    target: str = flag("marginal", "next-token law: marginal of the CP head (the paper) or the trunk's lm_head")
    # loss and optimizer
    joint_weight: float = flag(1.0, "weight of the joint loss beside the next-token loss when target is lm_head")
    balance_weight: float = flag(0.05, "weight of the load-balancing loss")
    joint_share: float = flag(1.0, "share of the positions, drawn anew every step, on which the head is trained")
    batch_size: int = flag(16, "windows per forward pass")
    grad_accum: int = flag(1, "forward passes per step")
    lr: float = flag(1e-3, "peak learning rate")
    min_lr: float = flag(1e-4, "learning rate at the end of the cosine")
    warmup: float = flag(0.05, "share of the run over which the learning rate rises")
    weight_decay: float = flag(0.1, "AdamW's, on the trunk's matrices and embeddings")
    beta2: float = flag(0.99, "AdamW's")
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 is off")
    max_iters: int = flag(1000, "steps")
    max_seconds: float = flag(0.0, "time limit; 0 is none. The learning rate decays by the limit that is nearer")
    # reports
    eval_interval: int = flag(250, "steps between evaluations, each of which writes the checkpoint")
    eval_windows: int = flag(64, "validation windows, always the same ones")
    log_interval: int = flag(10, "steps between lines of the log")


PRESETS = {
    "toy": TrainConfig(
        data_dir="data/toy", out_dir="out/toy", block_size=128, n_layer=10, n_head=4, n_embd=64, n_future=8, rank=8,
        target="lm_head", joint_weight=0.5, joint_share=0.25, batch_size=8, lr=4e-3, min_lr=1e-4, max_iters=2000,
        max_seconds=230, eval_interval=400,
    ),
    "laptop": TrainConfig(
        data_dir="data/text", out_dir="out/laptop", block_size=256, n_layer=8, n_head=6, n_embd=192, n_future=4,
        rank=4, target="lm_head", joint_weight=0.5, joint_share=0.25, batch_size=8, lr=2e-3, min_lr=1e-4,
        max_iters=2000,
    ),
    "tinystories": TrainConfig(
        data_dir="data/tinystories", out_dir="out/tinystories", block_size=256, n_layer=8, n_head=8, n_embd=512,
        n_future=4, rank=4, joint_share=0.125, batch_size=64, grad_accum=4, lr=1e-3, max_iters=20000,
        eval_interval=1000,
    ),
}


def parse_args():
    """--preset, then every field of TrainConfig as a flag that overrides it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="laptop", help="where the defaults come from (laptop)")
    known = argparse.ArgumentParser(add_help=False)  # --help has to wait until all flags are there
    known.add_argument("--preset", default="laptop")
    preset = PRESETS.get(known.parse_known_args()[0].preset, PRESETS["laptop"])
    for f in fields(TrainConfig):
        text = f"{f.metadata['help']} ({getattr(preset, f.name)})"
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument(f"--{f.name}", default=getattr(preset, f.name), help=text, **kind)
    args = vars(parser.parse_args())
    args.pop("preset")
    return TrainConfig(**args)


# -----------------------------------------------------------------------------
# device and data


def pick_device(name):
    """The torch.device of a --device flag; auto is cuda, then mps, then cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(name)


def pick_dtype(name, device):
    if name == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if bf16 else "float16" if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


class Windows:
    """Windows of block_size tokens and the n_future tokens behind each of them, out of a .bin file."""

    def __init__(self, path, cfg, device):
        self.data = np.memmap(path, dtype=np.uint16, mode="r")
        self.T, self.n, self.batch_size, self.device = cfg.block_size, cfg.n_future, cfg.batch_size, device
        self.n_starts = len(self.data) - self.T - self.n + 1
        if self.n_starts < 1:
            sys.exit(f"{path} holds {len(self.data)} tokens, fewer than block_size + n_future = {self.T + self.n}.")

    def at(self, starts):
        """idx (B, T) and targets (B, T, n), targets[b, t, s - 1] the token s places after idx[b, t]."""
        tokens = np.stack([self.data[i : i + self.T + self.n] for i in starts]).astype(np.int64)
        tokens = torch.from_numpy(tokens)
        if self.device.type == "cuda":
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
        else:
            tokens = tokens.to(self.device)
        return tokens[:, : self.T], tokens[:, 1:].unfold(1, self.n, 1)

    def random(self, generator):
        """Batches of random windows, for ever."""
        while True:
            yield self.at(torch.randint(self.n_starts, (self.batch_size,), generator=generator).tolist())

    def fixed(self, n_windows):
        """Batches of n_windows evenly spaced windows: the same ones at any batch size."""
        starts = np.linspace(0, self.n_starts - 1, n_windows).astype(int)
        for i in range(0, n_windows, self.batch_size):
            yield self.at(starts[i : i + self.batch_size])


# -----------------------------------------------------------------------------
# the parts of the loop


def build_model(cfg, meta):
    """A fresh model, or the trunk of --init_from with the head that cfg asks for."""
    head = dict(n_future=cfg.n_future, rank=cfg.rank, factors=cfg.factors, target=cfg.target, dropout=cfg.dropout)
    if cfg.init_from:
        ckpt = torch.load(cfg.init_from, map_location="cpu", weights_only=True)
        model = GPT.from_checkpoint(ckpt, **head, n_token=meta["vocab_size"])
    else:
        model = GPT(GPTConfig(
            block_size=cfg.block_size, n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, bias=cfg.bias,
            vocab_size=-(-meta["vocab_size"] // 64) * 64, n_token=meta["vocab_size"], **head,
        ))
    if cfg.freeze_trunk:
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith("cp_head."))
    return model


def build_optimizer(model, cfg, device):
    """AdamW. Decays the trunk's matrices and embeddings; the head's maps start at the identity, not at 0."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decay = [p for name, p in trained.items() if p.dim() >= 2 and not name.startswith("cp_head.")]
    rest = [p for name, p in trained.items() if p.dim() < 2 or name.startswith("cp_head.")]
    groups = [{"params": decay, "weight_decay": cfg.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), fused=device.type == "cuda")


def learning_rate(progress, cfg):
    """Linear warm-up, then a cosine from lr to min_lr; progress in [0, 1] is the share of the run that is done."""
    if progress < cfg.warmup:
        return cfg.lr * (progress + 1e-3) / (cfg.warmup + 1e-3)
    x = (progress - cfg.warmup) / (1 - cfg.warmup)
    return cfg.min_lr + 0.5 * (cfg.lr - cfg.min_lr) * (1 + math.cos(math.pi * min(x, 1.0)))


@torch.no_grad()
def evaluate(model, val, cfg, context):
    """The parts of the loss (see GPT.loss), averaged over the fixed validation windows."""
    model.eval()
    totals, n_windows = {}, 0
    for idx, targets in val.fixed(cfg.eval_windows):
        with context:
            parts = model.loss(idx, targets)[1]
        for name, part in parts.items():
            totals[name] = totals.get(name, 0) + part.cpu().double() * len(idx)
        n_windows += len(idx)
    model.train()
    return {name: (total / n_windows).tolist() for name, total in totals.items()}


def save(model, cfg, meta, iter_num, val, path):
    """Write the checkpoint under a temporary name, then rename it."""
    ckpt = {**model.checkpoint(), "train_config": asdict(cfg), "meta": meta, "iter_num": iter_num, "val": val}
    tmp = path.with_name(path.name + ".tmp")
    torch.save(ckpt, tmp)
    os.replace(tmp, path)


def report(val, meta):
    """The table at the end of a run."""
    bits = 1 / math.log(2)
    per_byte = val["next"] * bits / meta["bytes_per_token"]
    print("\nvalidation            nats/token  bits/token")
    print(f"next-token loss       {val['next']:10.4f}  {val['next'] * bits:10.4f}   = {per_byte:.4f} bits per byte")
    if "entropy_bits_per_token" in meta:
        entropy = meta["entropy_bits_per_token"]
        print(f"entropy of the text   {entropy / bits:10.4f}  {entropy:10.4f}   (of the grammar: the lower bound)")
    if "usage" not in val:
        return
    print(f"joint loss per token  {val['joint']:10.4f}  {val['joint'] * bits:10.4f}")
    for s, loss in enumerate(val["offset"], 1):
        note = "   given the true tokens before it in the window" if s == 2 else ""
        print(f"  offset {s:<2}           {loss:10.4f}  {loss * bits:10.4f}{note}")
    print("component usage       " + " ".join(f"{w:.3f}" for w in val["usage"]) + f"   balance {val['balance']:.3f}")


# -----------------------------------------------------------------------------
# the loop


def optimizer_step(model, loss_function, batches, optimizer, scaler, context, cfg):
    """One step on cfg.grad_accum batches; returns the last one's loss and its parts."""
    for _ in range(cfg.grad_accum):
        idx, targets = next(batches)
        with context:
            loss, parts = loss_function(idx, targets, cfg.joint_weight, cfg.balance_weight, cfg.joint_share)
        scaler.scale(loss / cfg.grad_accum).backward()
    if cfg.grad_clip:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, parts


def train(cfg):
    torch.manual_seed(cfg.seed)
    torch.set_flush_denormal(True)  # a lost component's posterior times a small probability: x86 is slow at these
    device, data_dir, out_dir = pick_device(cfg.device), Path(cfg.data_dir), Path(cfg.out_dir)
    dtype = pick_dtype(cfg.dtype, device)
    if not (data_dir / "meta.json").exists():
        sys.exit(f"There is no data in {data_dir}; write some: python prepare_tinystories.py --data_dir {data_dir} ...")
    meta = json.loads((data_dir / "meta.json").read_text(encoding="utf-8"))
    model = build_model(cfg, meta).to(device)
    # --init_from brings its own block_size, n_layer, ...: what is built is what gets used, logged and saved
    cfg = replace(cfg, **{f.name: getattr(model.config, f.name) for f in fields(cfg) if hasattr(model.config, f.name)})
    batches = Windows(data_dir / "train.bin", cfg, device).random(torch.Generator().manual_seed(cfg.seed))
    val_data = Windows(data_dir / "val.bin", cfg, device)
    optimizer = build_optimizer(model, cfg, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    context = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    loss_function = torch.compile(model.loss) if cfg.compile else model.loss
    trunk, head = model.n_params()
    tokens_per_iter = cfg.batch_size * cfg.grad_accum * cfg.block_size
    print(f"device {device}, {str(dtype).removeprefix('torch.')}; trunk {trunk / 1e6:.2f}M and head {head / 1e6:.2f}M "
          f"parameters; {tokens_per_iter:,} tokens per step; n = {cfg.n_future}, r = {cfg.rank}")

    out_dir.mkdir(parents=True, exist_ok=True)
    iter_num, seconds, start = 0, 0.0, None
    with open(out_dir / "log.jsonl", "w", encoding="utf-8") as log, tqdm(total=cfg.max_iters, mininterval=1.0) as bar:
        while True:
            progress = max(iter_num / cfg.max_iters, seconds / cfg.max_seconds if cfg.max_seconds else 0.0)
            if progress >= 1 or (iter_num and iter_num % cfg.eval_interval == 0):
                val = evaluate(model, val_data, cfg, context)
                save(model, cfg, meta, iter_num, val, out_dir / "ckpt.pt")
                print(json.dumps({"iter": iter_num, "seconds": seconds, "val": val}), file=log, flush=True)
                bar.write(f"step {iter_num}: validation next {val['next']:.4f}, joint {val['joint']:.4f} nats/token")
            if progress >= 1:
                break
            lr = learning_rate(progress, cfg)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, parts = optimizer_step(model, loss_function, batches, optimizer, scaler, context, cfg)
            # The clock starts after the first step, which may compile; a run that stays well within max_seconds does
            # not depend on the machine's speed.
            start = start or time.monotonic()
            seconds = time.monotonic() - start
            iter_num += 1
            bar.update()
            if iter_num % cfg.log_interval == 0:
                speed = (iter_num - 1) * tokens_per_iter / max(seconds, 1e-9)
                line = {"iter": iter_num, "seconds": seconds, "lr": lr, "loss": loss.item(), "tokens_per_second": speed}
                print(json.dumps(line | {name: part.tolist() for name, part in parts.items()}), file=log)
                bar.set_postfix(loss=f"{line['loss']:.3f}", tok_s=f"{speed:,.0f}")
    report(val, meta)
    print(f"\nwrote {out_dir / 'ckpt.pt'} after {iter_num} steps, {seconds:.0f} s")


if __name__ == "__main__":
    train(parse_args())
