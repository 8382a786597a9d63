"""Train a GPT with a multi-token head.

    python train.py --preset toy          synthetic stories, minutes on a laptop CPU
    python train.py                       real text on a CPU: the preset laptop
    python train.py --preset tinystories  one GPU, a model of the paper's size
    python train.py --preset toy --resume go on after an interruption, as if there had been none
    torchrun --standalone --nproc_per_node=2 train.py ...   two processes, each with its batches

Every field of TrainConfig is a flag (--rank 4, --n_embd 128, --no-bias). Writes out_dir/ckpt.pt,
which holds all that sample.py, bench_speculative.py and --resume need, and with it
out_dir/log.jsonl, one JSON object per line.
"""

import argparse
import json
import math
import os
import re
import shutil
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

# before torch: it says how threads wait
from common import (ArgumentParser, Batches, any_path, any_seed, check_tokenizer, check_writable,
                    load_model, locked, number, padded, pick_device, progress_bar, read_checkpoint,
                    read_meta, replacing, run_script, stop_signals)
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from model import BadInput, GPTConfig, new_model, words


def flag(default, text, check=None):
    """A field of TrainConfig: its help text, and what checks it, a function or the choices."""
    return field(default=default, metadata={"help": text, "check": check})


count, amount, share = number(int, 1, 10**6), number(float, 0), number(float, 0, 1, above=True)


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run. The defaults are the preset laptop."""

    # where
    data_dir: str = flag("data/text", "folder that prepare_tinystories.py wrote", any_path)
    out_dir: str = flag("out/laptop", "folder for the checkpoint and the log", any_path)
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; auto takes cuda, then mps, then cpu")
    dtype: str = flag("auto", "auto is bfloat16 (else float16) on cuda, else float32",
                      ("auto", "float32", "bfloat16", "float16"))
    compile: bool = flag(False, "torch.compile the model (needs a C++ compiler)")
    seed: int = flag(1337, "seed of the initial weights, the batches and dropout", any_seed)
    init_from: str = flag("", "checkpoint to start from, ours or nanoGPT's", any_path)
    fresh_head: bool = flag(False, "leave the head of init_from out, to compare heads on one trunk")
    freeze_trunk: bool = flag(False, "train the head alone")
    # model
    block_size: int = flag(256, "context length in tokens", count)
    n_layer: int = flag(8, "transformer blocks", count)
    n_head: int = flag(6, "attention heads", count)
    n_embd: int = flag(192, "width of the trunk", count)
    dropout: float = flag(0.0, "dropout probability", number(float, 0, 0.99))
    bias: bool = flag(False, "biases in the trunk's Linears and LayerNorms")
    head: str = flag("cp", "the head: cp, the paper's, or the name of another one's file",
                     ("cp", *words("head")))
    n_future: int = flag(4, "n, tokens predicted at once; 1 is plain nanoGPT", count)
    rank: int = flag(4, "r, components of the head's mixture; 1 is independent heads", count)
    target: str = flag("lm_head", "p(next token): lm_head, the trunk's, or marginal, the head's",
                       ("marginal", "lm_head"))
    # loss and optimizer
    joint_weight: float = flag(0.5, "weight of the joint loss if target is lm_head", amount)
    balance_weight: float = flag(0.05, "weight of the load-balancing loss", amount)
    joint_share: float = flag(0.25, "share of the positions that a step trains the joint on", share)
    batch_size: int = flag(8, "windows per forward pass", count)
    grad_accum: int = flag(1, "forward passes per step", count)
    lr: float = flag(2e-3, "peak learning rate", amount)
    min_lr: float = flag(1e-4, "learning rate at the end of the cosine", amount)
    warmup: float = flag(0.05, "share of the run in which the rate rises", number(float, 0, 0.99))
    weight_decay: float = flag(0.1, "AdamW's, on the trunk's matrices and embeddings", amount)
    beta2: float = flag(0.99, "AdamW's", number(float, 0, 0.99999))
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 is off", amount)
    max_iters: int = flag(2000, "steps", number(int, 1, 10**9))
    max_seconds: float = flag(0.0, "time limit, by which the rate decays, too; 0 is none", amount)
    # reports
    eval_interval: int = flag(250, "steps between evaluations, which write the checkpoint", count)
    eval_windows: int = flag(64, "validation windows, always the same ones", count)
    log_interval: int = flag(10, "steps between lines of the log", count)


PRESETS = {
    "laptop": TrainConfig(),
    "toy": TrainConfig(
        data_dir="data/toy", out_dir="out/toy", block_size=128, n_layer=6, n_head=4, n_embd=128,
        head="conditional_low_rank", n_future=8, rank=8, joint_share=0.125, batch_size=4,
        max_iters=1000, eval_interval=500,
    ),
    "tinystories": TrainConfig(
        data_dir="data/tinystories", out_dir="out/tinystories", n_head=8, n_embd=512,
        target="marginal", joint_share=0.125, batch_size=64, grad_accum=4, lr=1e-3, max_iters=20000,
        eval_interval=1000,
    ),
}


# -----------------------------------------------------------------------------
# the loop


def train(run):
    """Train run to its end, or until a signal: the step that it interrupts is saved."""
    cfg = run.cfg
    bar = progress_bar(total=cfg.max_iters, initial=run.iter_num, disable=RANK > 0)
    with stop_signals(patient=RANKS > 1) as signals, bar:
        while run.progress < 1:
            loss, parts = optimizer_step(run)
            run.count_step()
            run.seconds, stop = agree(run.seconds, signals)
            if run.iter_num % cfg.log_interval == 0 and RANK == 0:
                bar.set_postfix(run.log_step(loss, parts), refresh=False)
            if stop:
                run.save()  # before anything is evaluated or printed: the terminal may be gone
            if run.progress >= 1 or run.iter_num % cfg.eval_interval == 0:
                if RANK == 0:
                    val = evaluate(run)
                    run.log.append({"iter": run.iter_num, "seconds": run.seconds, "val": val})
                run.save()
                bar.clear()
                if RANK == 0:
                    print(f"step {run.iter_num}: validation next {val['next']:.4f}, "
                          f"joint {val['joint']:.4f} nats/token")
            if stop:
                break
            bar.update()


def optimizer_step(run):
    """One step on cfg.grad_accum batches; returns the last one's loss and its parts."""
    cfg, optimizer, scaler = run.cfg, run.optimizer, run.scaler
    weights = {key: getattr(cfg, key) for key in ("joint_weight", "balance_weight", "joint_share")}
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(run.progress, cfg)
    for i in range(cfg.grad_accum):
        batch = next(run.batches)  # idx (B, T), gold (B, T, n)
        last = i == cfg.grad_accum - 1  # only then do several processes average their gradients
        with nullcontext() if last or RANKS == 1 else run.net.no_sync():
            with run.autocast:
                loss, parts = run.net(*batch, **weights)
            scaler.scale(loss / cfg.grad_accum).backward()
    if cfg.grad_clip:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), cfg.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, parts


def learning_rate(progress, cfg):
    """Linear warm-up, then a cosine from lr to min_lr; progress in [0, 1]: the share done."""
    if progress < cfg.warmup:
        return cfg.lr * (progress + 1e-3) / (cfg.warmup + 1e-3)
    x = (progress - cfg.warmup) / (1 - cfg.warmup)
    return cfg.min_lr + 0.5 * (cfg.lr - cfg.min_lr) * (1 + math.cos(math.pi * min(x, 1.0)))


@torch.no_grad()
def evaluate(run):
    """The parts of the loss (see GPT.loss), averaged over the fixed validation windows."""
    run.model.eval()
    totals, n_windows = {}, 0
    for batch in run.val.fixed(run.cfg.eval_windows):
        with run.autocast:
            parts = run.model(*batch)[1]
        for name, part in parts.items():
            totals[name] = totals.get(name, 0) + part.cpu().double() * len(batch[0])
        n_windows += len(batch[0])
    run.model.train()
    return {name: (total / n_windows).tolist() for name, total in totals.items()}


# -----------------------------------------------------------------------------
# several processes, which torchrun starts: rank 0 evaluates, prints and writes

RANK, RANKS, LOCAL_RANK = (int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone
                           for name, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


@contextmanager
def rank_0_first():
    """Run a block on rank 0, then on the others: what is wrong is said once, not RANKS times."""
    if RANK == 0:
        yield
    if RANKS > 1:
        n_gpus = torch.cuda.device_count()
        if n_gpus:
            torch.cuda.set_device(LOCAL_RANK % n_gpus)
        # imported later, by DistributedDataParallel, it would keep the group as a default argument,
        # and the group's threads would outlive Python, which then aborts now and again
        from torch.distributed.nn import functional  # noqa: F401
        dist.init_process_group("cpu:gloo,cuda:nccl" if n_gpus else "gloo")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
        yield


def agree(seconds, signals):
    """The most seconds of any rank, and whether any has got a signal: all end at the same step."""
    both = torch.tensor([seconds, len(signals)], dtype=torch.float64)
    if RANKS > 1:
        dist.all_reduce(both, dist.ReduceOp.MAX)
    return both[0].item(), both[1].item() > 0


def of_all_ranks(x):
    """The list of every rank's x."""
    found = [x] * RANKS
    if RANKS > 1:
        dist.all_gather_object(found, x)
    return found


@contextmanager
def peers(out_dir):
    """Within the block, a rank that is gone ends the others in one line."""
    try:
        yield
    except RuntimeError as e:
        gone = "by peer|Connection (closed|reset)|ncclRemoteError|was aborted|[Tt]imed out"
        if RANKS == 1 or not re.search(gone, str(e)):
            raise
        raise BadInput(f"Another process of this run has ended; what {out_dir} holds is whole, and "
                       "--resume goes on from there.") from None


# -----------------------------------------------------------------------------
# the data


class Windows(Batches):
    """Windows of block_size tokens of a .bin file, and the n_future tokens after each of them."""

    def __init__(self, path, cfg, device):
        self.data = np.memmap(path, dtype=np.uint16, mode="r")
        self.T, self.n = cfg.block_size, cfg.n_future
        self.batch_size, self.device = cfg.batch_size, device
        self.positions = cfg.batch_size * cfg.block_size  # of a batch
        self.n_starts = len(self.data) - self.T - self.n + 1
        if self.n_starts < 1:
            raise BadInput(f"{path} holds {len(self.data)} tokens, less than block_size + n_future "
                           f"= {self.T + self.n}; take more text or a smaller --block_size.")

    def at(self, starts):
        """idx (B, T), gold (B, T, n): gold[b, t, s - 1] is the token s places after idx[b, t]."""
        tokens = np.stack([self.data[i : i + self.T + self.n] for i in starts]).astype(np.int64)
        tokens = torch.from_numpy(tokens)
        if self.device.type == "cuda":
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
        else:
            tokens = tokens.to(self.device)
        return tokens[:, : self.T], tokens[:, 1:].unfold(1, self.n, 1)


# -----------------------------------------------------------------------------
# the state of a run

CHANGEABLE = ("data_dir", "out_dir", "device", "max_iters", "max_seconds", "eval_interval",
              "eval_windows", "log_interval")  # what --resume may be given; the rest is saved
SAVED = ("train_config", "meta", "optimizer", "scaler", "random", "random_of_others", "iter_num",
         "seconds", "log")


class Run:
    """All that changes while training, and what a checkpoint holds for --resume to go on from.

    Another script's run overrides the methods that say what it is made of: read_meta, read_data,
    build and load; and report.
    """

    Config, presets, script = TrainConfig, PRESETS, "train.py"

    def __init__(self, cfg, given, ckpt=None):
        """A run from its beginning, or from a checkpoint that `resumed` has looked at. given: the
        flags that the user gave, as a dict."""
        self.device, self.given = pick_device(cfg.device), given
        torch.manual_seed(cfg.seed)
        self.cfg, self.meta = cfg, self.read_meta(cfg, ckpt)
        self.model = self.load(ckpt) if ckpt else self.build()  # build may fill self.cfg in
        self.model.to(self.device).train()
        self.prepare()
        self.val, self.batches = self.read_data("val"), self.read_data("train").random(
            self.windows, RANK, RANKS)
        self.iter_num, self.seconds, self.log = 0, 0.0, []
        self.is_new = ckpt is None  # until its first checkpoint
        self.start = self.clock = None  # after the first step: (iter_num, seconds), and the time
        if ckpt:
            self.restore(ckpt)
        elif RANK > 0:
            torch.manual_seed(cfg.seed + RANK)  # dropout and joint_share of its own

    def prepare(self):
        """What the loop needs beside model and data."""
        cfg, dtype = self.cfg, pick_dtype(self.cfg.dtype, self.device)
        half = dtype != torch.float32
        self.autocast = torch.autocast(self.device.type, dtype) if half else nullcontext()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.windows = torch.Generator().manual_seed(cfg.seed)  # draws the training windows
        if cfg.freeze_trunk:
            for name, p in self.model.named_parameters():
                p.requires_grad_(name.startswith("head."))
        self.optimizer = build_optimizer(self.model, cfg, self.device)
        self.net = compiled(self.model, self.device) if cfg.compile else self.model

    # what it is made of

    def read_meta(self, cfg, ckpt):
        """What data_dir says of its data; BadInput where a checkpoint was trained on other data."""
        meta = read_meta(cfg.data_dir)
        if ckpt:
            path = Path(cfg.out_dir) / "ckpt.pt"
            check_tokenizer(ckpt, meta, path)
            if ckpt["meta"]["splits"] != meta["splits"]:
                raise BadInput(f"The data in {cfg.data_dir} is not what {path} was trained on; "
                               "--init_from starts a new run.")
        return meta

    def read_data(self, split):
        """The batches of "train" or "val"."""
        return Windows(Path(self.cfg.data_dir) / f"{split}.bin", self.cfg, self.device)

    def build(self):
        """The model of a new run: a fresh one, or the trunk of --init_from."""
        cfg, n_token = self.cfg, self.meta["vocab_size"]
        if cfg.freeze_trunk and cfg.n_future == 1:
            raise BadInput("--freeze_trunk trains the head alone, and n_future = 1 has none; take "
                           "a larger --n_future.")
        for name in ("freeze_trunk", "fresh_head"):
            if getattr(cfg, name) and not cfg.init_from:
                raise BadInput(f"--{name} needs a trunk that is trained: name its checkpoint with "
                               "--init_from.")
        shared = {f.name: getattr(cfg, f.name) for f in fields(GPTConfig) if hasattr(cfg, f.name)}
        config = GPTConfig(**shared, vocab_size=padded(n_token), n_token=n_token)
        if not cfg.init_from:
            return new_model(config)
        ckpt = read_checkpoint(cfg.init_from)
        check_tokenizer(ckpt, self.meta, cfg.init_from)
        changes = ("head", "n_future", "rank", "target", "dropout", "n_token")
        model = load_model(ckpt, cfg.init_from, cfg.fresh_head,
                           **{name: getattr(config, name) for name in changes})
        for name in ("block_size", "n_layer", "n_head", "n_embd", "bias"):
            own = getattr(model.config, name)
            if self.given.get(name, own) != own:
                raise BadInput(f"--init_from {cfg.init_from} has {name} = {own}, not "
                               f"{self.given[name]}; leave {as_flag(name, self.given[name])} away.")
        kept = not cfg.fresh_head and all(ckpt["model_args"].get(name) == getattr(config, name)
                                          for name in ("head", "n_future", "rank"))
        print(f"from {cfg.init_from}: the trunk {'and its head' if kept else 'with a fresh head'}"
              + ("; the trunk stays frozen" if cfg.freeze_trunk else
                 f"; all of it trains, with a rate of up to {cfg.lr:g} (--lr, --freeze_trunk)"))
        # what is built is what gets saved
        built = {name: value for name, value in asdict(model.config).items() if hasattr(cfg, name)}
        self.cfg = replace(cfg, **built)
        return model

    def load(self, ckpt):
        """The model of a checkpoint that is gone on with."""
        return load_model(ckpt, Path(self.cfg.out_dir) / "ckpt.pt")

    def report(self, val):
        """Print the table at the end of a run."""
        report(val, self.meta)

    # progress

    @property
    def progress(self):
        """The share of the run that is done, by steps or by time, whichever is further."""
        by_time = self.seconds / self.cfg.max_seconds if self.cfg.max_seconds else 0.0
        return max(self.iter_num / self.cfg.max_iters, by_time)

    @property
    def tokens_per_step(self):
        return self.val.positions * self.cfg.grad_accum * RANKS

    def count_step(self):
        """The clock starts after the first step of this process, which may compile."""
        self.iter_num += 1
        now = time.monotonic()
        if self.start:
            self.seconds += now - self.clock
        self.start, self.clock = self.start or (self.iter_num, self.seconds), now

    def log_step(self, loss, parts):
        """Append a training step to the log; returns what the bar shows."""
        steps, seconds = self.iter_num - self.start[0], self.seconds - self.start[1]
        speed = steps * self.tokens_per_step / max(seconds, 1e-9)
        self.log.append({"iter": self.iter_num, "seconds": self.seconds, "loss": loss.item(),
                         "lr": self.optimizer.param_groups[0]["lr"], "tokens_per_second": speed,
                         **{name: part.tolist() for name, part in parts.items()}})
        self.stop_if_diverged(loss.item())
        return {"loss": f"{loss.item():.3f}", "tok_s": f"{speed:,.0f}"}

    def stop_if_diverged(self, value):
        """A run that cannot recover must not overwrite a checkpoint that is still good."""
        if not math.isfinite(value):
            raise BadInput(f"Training has diverged: the loss or the weights are {value} at step "
                           f"{self.iter_num}. Start again with a lower --lr; what "
                           f"{self.cfg.out_dir} holds is as it was.")

    # checkpoints

    def save(self):
        """Write ckpt.pt and log.jsonl. What another run left there is kept, as ckpt.old.pt.

        All ranks must call it.
        """
        random, *others = of_all_ranks(self.random_states())
        if RANK > 0:
            return
        self.stop_if_diverged(sum(p.detach().sum() for p in self.model.parameters()).item())
        path = Path(self.cfg.out_dir) / "ckpt.pt"
        if self.is_new and path.exists():
            with replacing(path.with_name("ckpt.old.pt")) as file, open(path, "rb") as old:
                shutil.copyfileobj(old, file)
        self.is_new = False
        with replacing(path) as file:
            torch.save({**self.model.to_checkpoint(), "meta": self.meta,
                        "train_config": asdict(self.cfg), "iter_num": self.iter_num,
                        "seconds": self.seconds, "log": self.log, "random": random,
                        "random_of_others": others, "optimizer": self.optimizer.state_dict(),
                        "scaler": self.scaler.state_dict()}, file)
        with replacing(path.with_name("log.jsonl")) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in self.log)

    @classmethod
    def resumed(cls, out_dir, given):
        """The Run that out_dir/ckpt.pt holds, with its settings but for flags that may differ."""
        path = Path(out_dir) / "ckpt.pt"
        ckpt = read_checkpoint(path, cls.script)
        known, settings = set(asdict(cls.Config())), ckpt.get("train_config")
        if any(name not in ckpt for name in SAVED) or not isinstance(settings, dict) or (
                set(settings) != known):
            raise BadInput(f"{path} holds no state of training to go on from; --init_from {path} "
                           "starts a new run with its weights.")
        old = cls.Config(**settings)
        for name, value in given.items():
            if name not in CHANGEABLE and value != (own := getattr(old, name)):
                raise BadInput(f"--resume goes on with {name} = {own}, not {value}; leave "
                               f"{as_flag(name, value)} away, or start a new run without --resume.")
        kept = {name: value for name, value in given.items() if name in CHANGEABLE}
        return cls(replace(old, **{**kept, "out_dir": out_dir}), given, ckpt)

    def restore(self, ckpt):
        """Take over all that `save` wrote but the model, which is loaded by then."""
        try:
            self.optimizer.load_state_dict(ckpt["optimizer"])
        except (KeyError, TypeError, ValueError) as e:  # of other groups or shapes
            raise BadInput(f"The optimizer's state does not fit the model ({e}); --init_from "
                           "starts a new run with the weights.") from None
        if ckpt["scaler"]:
            self.scaler.load_state_dict(ckpt["scaler"])
        self.iter_num, self.seconds, self.log = ckpt["iter_num"], ckpt["seconds"], ckpt["log"]
        states = [ckpt["random"], *ckpt["random_of_others"]]
        if len(states) != RANKS:
            raise BadInput(f"--resume goes on with as many processes as before, {len(states)}, not "
                           f"{RANKS}; see torchrun's --nproc_per_node.")
        self.windows.set_state(states[RANK]["windows"])
        torch.set_rng_state(states[RANK]["cpu"])
        if self.device.type != "cpu" and self.device.type in states[RANK]:
            getattr(torch, self.device.type).set_rng_state(states[RANK][self.device.type])

    def random_states(self):
        """The generators: the windows', and those of dropout and joint_share, the device's too."""
        states = {"windows": self.windows.get_state(), "cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            states[self.device.type] = getattr(torch, self.device.type).get_rng_state()
        return states


def build_optimizer(model, cfg, device):
    """AdamW; it decays the trunk's matrices, and nothing of the head: 0 is no neutral map."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decay = [p for name, p in trained.items() if p.dim() >= 2 and not name.startswith("head.")]
    rest = [p for name, p in trained.items() if p.dim() < 2 or name.startswith("head.")]
    groups = [{"params": decay, "weight_decay": cfg.weight_decay},
              {"params": rest, "weight_decay": 0.0}]
    betas, fused = (0.9, cfg.beta2), device.type == "cuda"
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=betas, fused=fused)


def pick_dtype(name, device):
    """The torch.dtype of a --dtype flag."""
    if name == "auto":
        cuda = device.type == "cuda"
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if bf16 else "float16" if cuda else "float32"
    return getattr(torch, name)


def compiled(model, device):
    if device.type == "cpu" and torch.__version__.startswith("2.6"):
        raise BadInput("--compile gives wrong gradients on a CPU in torch 2.6. Take a newer torch, "
                       "or train without --compile.")
    check_compiler(device)
    return torch.compile(model)


def check_compiler(device):
    """BadInput where nothing can be compiled."""
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except Exception as e:  # of a compiler, a linker, Triton: torch raises many kinds
        raise BadInput(f"--compile does not work here ({type(e).__name__}); it needs a C++ "
                       "compiler, on a GPU also Triton. Leave --compile away.") from None


def check_own(folder):
    """BadInput for a folder with a checkpoint or a log that train.py did not write: a new run would
    write over the log, and a second one over the checkpoint that the first one kept."""
    there = [folder / name for name in ("ckpt.pt", "log.jsonl") if (folder / name).exists()]
    with suppress(BadInput):
        if not there or "train_config" in read_checkpoint(folder / "ckpt.pt"):
            return
    raise BadInput(f"{there[0]} is not of train.py, or it is damaged; take another --out_dir, or "
                   "move it away")


# -----------------------------------------------------------------------------
# what is printed, and the flags


def describe(run):
    """What is trained, on what, in one line."""
    model, (trunk, head) = run.model, run.model.n_params()
    dtype = str(pick_dtype(run.cfg.dtype, run.device)).removeprefix("torch.")
    config = model.config
    kind = f", r = {model.head.rank}, head {config.head}, target {config.target}" if head else ""
    return (f"device {run.device}, {dtype}; trunk {trunk / 1e6:.2f}M and head {head / 1e6:.2f}M "
            f"parameters; {run.tokens_per_step:,} tokens per step; n = {config.n_future}{kind}")


def report(val, meta):
    """The table at the end of a run."""
    def line(name, nats, note=""):
        print(f"{name:20}  {nats:10.4f}  {nats / math.log(2):10.4f}   {note}".rstrip())

    print("\nvalidation            nats/token  bits/token")
    if "bytes_per_token" in meta:
        per_byte = val["next"] / math.log(2) / meta["bytes_per_token"]
        line("next-token loss", val["next"], f"= {per_byte:.4f} bits per byte")
    if "entropy_bits_per_token" in meta:
        entropy = meta["entropy_bits_per_token"] * math.log(2)
        line("entropy of the text", entropy, "(of the grammar: the lower bound)")
    if "usage" not in val:
        return
    line("joint loss per token", val["joint"])
    for s, loss in enumerate(val["offset"], 1):
        line(f"  offset {s}", loss, "given the true tokens before it in the window" * (s == 2))
    usage = " ".join(f"{w:.3f}" for w in val["usage"])
    print(f"component usage       {usage}   balance {val['balance']:.3f}")


def as_flag(name, value):
    """What the user typed to set a field of TrainConfig to a value."""
    return f"--no-{name}" if value is False else f"--{name}"


def add_flags(parser, Config, names=None):
    """Fields of a config as flags, all or those in names; one that is not given has no entry."""
    for f in fields(Config):
        if names and f.name not in names:
            continue
        check, text = f.metadata["check"], f"{f.metadata['help']} ({f.default})"
        how = ({"action": argparse.BooleanOptionalAction} if f.type is bool else
               {"choices": check} if isinstance(check, tuple) else {"type": check or f.type})
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **how)


def parse_args(Run, description):
    """--preset, --resume, and every field of Run.Config as a flag that overrides the preset's."""
    first = next(iter(Run.presets))
    text = f"{description}\nThe defaults below are those of TrainConfig. In the presets differ:\n"
    for name, preset in Run.presets.items():
        other = [f"{f.name}={getattr(preset, f.name)}" for f in fields(preset)
                 if getattr(preset, f.name) != f.default]
        text += f"{name}: {' '.join(other)}\n" if other else ""
    parser = ArgumentParser(text)
    parser.add_argument("--preset", choices=Run.presets, default=first,
                        help=f"where the defaults come from ({first})")
    parser.add_argument("--resume", action="store_true",
                        help="go on with the checkpoint in out_dir and its settings; of the flags, "
                             f"only {', '.join(CHANGEABLE)} may differ")
    add_flags(parser, Run.Config)
    return parser.parse_args()


def main(Run=Run, description=__doc__):
    args = parse_args(Run, description)
    given = {f.name: getattr(args, f.name) for f in fields(Run.Config) if f.name in args}
    cfg = replace(Run.presets[args.preset], **given)
    torch.set_flush_denormal(True)  # x86 is slow at numbers below 1e-38, as of a lost component
    with locked(cfg.out_dir) if RANK == 0 else nullcontext(), peers(cfg.out_dir):
        with rank_0_first():
            if RANK == 0:
                check_writable(Path(cfg.out_dir) / "ckpt.pt")  # which may be a link to another disk
                if not args.resume:
                    check_own(Path(cfg.out_dir))
            run = Run.resumed(cfg.out_dir, given) if args.resume else Run(cfg, given)
        if RANKS > 1:  # all begin with rank 0's weights, and gradients are means over the ranks
            run.net = DistributedDataParallel(run.net)
        first = run.iter_num
        print(describe(run))
        train(run)
        if RANKS > 1:  # what holds the group goes first: its threads must end before Python does
            run.net = run.model
            dist.destroy_process_group()
        if run.progress < 1:
            if RANK == 0:
                ranks = f"torchrun --standalone --nproc_per_node={RANKS}"
                print(f"\nstopped after step {run.iter_num}, which is saved; to go on: "
                      f"{'python' if RANKS == 1 else ranks} {run.script} --resume "
                      f"--out_dir {cfg.out_dir}", file=sys.stderr)
            sys.exit(130)
    if RANK > 0:
        return
    for line in [line for line in run.log if "val" in line][-1:]:
        run.report(line["val"])
    if run.iter_num == first:
        print(f"\nThis run was complete after {first} steps and {run.seconds:.0f} s (--max_iters "
              f"{run.cfg.max_iters}, --max_seconds {run.cfg.max_seconds:g}); larger ones train on.")
    else:
        print(f"\nwrote {cfg.out_dir}/ckpt.pt after {run.iter_num} steps, {run.seconds:.0f} s")


if __name__ == "__main__":
    run_script(main)
