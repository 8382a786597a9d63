"""Train a GPT with a CP multi-token head.

    python train.py --preset toy          synthetic stories, minutes on a laptop CPU
    python train.py --preset laptop       real text on a CPU
    python train.py --preset tinystories  one GPU, a model of the paper's size
    python train.py --preset toy --resume go on after an interruption, as if there had been none
    python train.py --benchmark           what a head costs: a table over rank, n and vocabulary

Every field of TrainConfig is a flag (--rank 4, --n_embd 128, --no-bias). Writes out_dir/ckpt.pt, which holds all
that sample.py, bench_speculative.py and --resume need, and with it out_dir/log.jsonl, one JSON object per line.
"""

import argparse
import json
import math
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import ArgumentParser, load_model, number, pick_device, replacing, run_script
from model import GPT, GPTConfig


def flag(default, text, check=None):
    """A field of TrainConfig: its help text, and what argparse checks it by, a function or the choices there are."""
    return field(default=default, metadata={"help": text, "check": check})


count, amount, share = number(int, 1, 10**6), number(float, 0), number(float, 0, 1, above=True)


@dataclass(frozen=True)
class TrainConfig:
    # where
    data_dir: str = flag("data/text", "folder that prepare_tinystories.py wrote")
    out_dir: str = flag("out/text", "folder for the checkpoint and the log")
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; auto takes cuda, then mps, then cpu")
    dtype: str = flag("auto", "float32, bfloat16 or float16; auto is bfloat16 (else float16) on cuda, else float32",
                      ("auto", "float32", "bfloat16", "float16"))
    compile: bool = flag(False, "torch.compile the loss (needs a C++ compiler)")
    seed: int = flag(1337, "seed of the initial weights, the batches and dropout", number(int, 0, 2**63 - 1))
    init_from: str = flag("", "checkpoint to start from, ours or nanoGPT's; its trunk keeps its shape")
    fresh_head: bool = flag(False, "leave the head of init_from out even if it fits: to compare heads on one trunk")
    freeze_trunk: bool = flag(False, "train the head alone")
    # model
    block_size: int = flag(256, "context length in tokens", count)
    n_layer: int = flag(6, "transformer blocks", count)
    n_head: int = flag(6, "attention heads", count)
    n_embd: int = flag(192, "width of the trunk", count)
    dropout: float = flag(0.0, "dropout probability", number(float, 0, 0.99))
    bias: bool = flag(False, "biases in the trunk's Linears and LayerNorms")
    n_future: int = flag(4, "n, tokens predicted at once; 1 is plain nanoGPT", count)
    rank: int = flag(4, "r, components of the CP head; 1 is independent heads", count)
    factors: str = flag("reduced", "reduced: a map per factor before the shared unembedding; full: an unembedding each",
                        ("reduced", "full"))
    context: str = flag("none", "what a factor sees beside the trunk: none (the paper), or previous, the token before "
                        "its own", ("none", "previous"))
    target: str = flag("marginal", "next-token law: marginal of the CP head (the paper) or the trunk's lm_head",
                       ("marginal", "lm_head"))
    # loss and optimizer
    joint_weight: float = flag(1.0, "weight of the joint loss beside the next-token loss if target is lm_head", amount)
    balance_weight: float = flag(0.05, "weight of the load-balancing loss", amount)
    joint_share: float = flag(1.0, "share of the positions, drawn anew every step, on which the head is trained", share)
    sample_component: bool = flag(False, "train one component for each position, drawn from its posterior, not all: "
                                  "cheaper where the rank is large")
    batch_size: int = flag(16, "windows per forward pass", count)
    grad_accum: int = flag(1, "forward passes per step", count)
    lr: float = flag(1e-3, "peak learning rate", amount)
    min_lr: float = flag(1e-4, "learning rate at the end of the cosine", amount)
    warmup: float = flag(0.05, "share of the run over which the learning rate rises", number(float, 0, 0.99))
    weight_decay: float = flag(0.1, "AdamW's, on the trunk's matrices and embeddings", amount)
    beta2: float = flag(0.99, "AdamW's", number(float, 0, 0.99999))
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 is off", amount)
    max_iters: int = flag(1000, "steps", number(int, 1, 10**9))
    max_seconds: float = flag(0.0, "time limit; 0 is none. The learning rate decays by the nearer limit", amount)
    # reports
    eval_interval: int = flag(250, "steps between evaluations, each of which writes the checkpoint", count)
    eval_windows: int = flag(64, "validation windows, always the same ones", count)
    log_interval: int = flag(10, "steps between lines of the log", count)


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


CHANGEABLE = ("data_dir", "out_dir", "device", "max_iters", "max_seconds", "eval_interval", "eval_windows",
              "log_interval")  # what --resume may be given beside the checkpoint's own settings

BENCHMARKED = ("device", "dtype", "seed", "block_size", "n_layer", "n_head", "n_embd", "bias", "factors", "context",
               "target", "joint_share", "sample_component", "batch_size", "grad_accum")  # what --benchmark may be given


def parse_args():
    """--preset, --resume, --benchmark, and every field of TrainConfig as a flag that overrides the preset's:
    (TrainConfig, resume or not, benchmark or not, flags)."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="laptop", help="where the defaults come from (laptop)")
    parser.add_argument("--resume", action="store_true",
                        help="go on with the checkpoint in out_dir and its settings; of the flags, only "
                             f"{', '.join(CHANGEABLE)} may differ")
    parser.add_argument("--benchmark", action="store_true",
                        help="train nothing, but time steps over rank, n and vocabulary; takes the flags "
                             f"{', '.join(BENCHMARKED)}")
    known = ArgumentParser(None, add_help=False)  # --help has to wait until all flags are there
    known.add_argument("--preset", default="laptop")
    preset = PRESETS.get(known.parse_known_args()[0].preset, PRESETS["laptop"])
    for f in fields(TrainConfig):
        text = f"{f.metadata['help']} ({getattr(preset, f.name)})"
        check = f.metadata["check"]
        how = ({"action": argparse.BooleanOptionalAction} if f.type is bool else
               {"choices": check} if isinstance(check, tuple) else {"type": check or f.type})
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **how)
    given = vars(parser.parse_args())
    given.pop("preset")
    resume, benchmark = given.pop("resume"), given.pop("benchmark")
    meaningless = [name for name in given if name not in BENCHMARKED] + ["resume"] * resume
    if benchmark and meaningless:
        parser.error(f"argument --{meaningless[0]}: means nothing to --benchmark")
    return replace(preset, **given), resume, benchmark, given


# -----------------------------------------------------------------------------
# dtype and data


def pick_dtype(name, device):
    if name == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if bf16 else "float16" if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def read_meta(data_dir):
    """data_dir/meta.json, after a look at whether train.bin and val.bin are the files that it speaks of."""
    path = Path(data_dir) / "meta.json"
    again = f"python prepare_tinystories.py --data_dir {data_dir} ..."
    if not path.exists():
        sys.exit(f"There is no data in {data_dir}; write some: {again}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        sizes = {name: 2 * meta["splits"][name]["tokens"] for name in ("train", "val")}
        meta["tokenizer"], meta["vocab_size"], meta["bytes_per_token"]
    except (ValueError, KeyError, TypeError):
        sys.exit(f"{path} is not a meta file of prepare_tinystories.py, or it is damaged; write it anew: {again}")
    for name, size in sizes.items():
        file = path.with_name(f"{name}.bin")
        if not file.exists() or file.stat().st_size != size:
            sys.exit(f"{file} is not the file of {size:,} bytes that {path} speaks of; write both anew: {again}")
    return meta


class Windows:
    """Windows of block_size tokens and the n_future tokens behind each of them, out of a .bin file."""

    def __init__(self, path, cfg, device):
        self.data = np.memmap(path, dtype=np.uint16, mode="r")
        self.T, self.n, self.batch_size, self.device = cfg.block_size, cfg.n_future, cfg.batch_size, device
        self.n_starts = len(self.data) - self.T - self.n + 1
        if self.n_starts < 1:
            sys.exit(f"{path} holds {len(self.data)} tokens, fewer than block_size + n_future = {self.T + self.n}; "
                     "take more text or a smaller --block_size.")

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


def autocast_context(device, dtype):
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()


def model_config(cfg, n_token):
    """The GPTConfig of a fresh model: the fields that cfg shares with it, the vocabulary padded to a multiple of 64.
    ValueError where the shapes, or the loss that cfg asks for, do not fit."""
    if cfg.sample_component and cfg.factors != "reduced":
        raise ValueError("sample_component needs factors = reduced")
    shared = {f.name: getattr(cfg, f.name) for f in fields(GPTConfig) if hasattr(cfg, f.name)}
    return GPTConfig(**shared, vocab_size=-(-n_token // 64) * 64, n_token=n_token)


def build_model(cfg, meta):
    """A fresh model, or the trunk of --init_from with the head that cfg asks for."""
    head = dict(n_future=cfg.n_future, rank=cfg.rank, factors=cfg.factors, context=cfg.context, target=cfg.target,
                dropout=cfg.dropout)
    if cfg.fresh_head and not cfg.init_from:
        sys.exit("--fresh_head leaves the head of a checkpoint out; name the checkpoint with --init_from.")
    try:
        config = model_config(cfg, meta["vocab_size"])
    except ValueError as e:
        sys.exit(f"{e}.")
    if not cfg.init_from:
        return GPT(config)
    model, ckpt = load_model(cfg.init_from, cfg.fresh_head, **head, n_token=meta["vocab_size"])
    check_tokenizer(ckpt, meta, cfg.init_from)
    kept = [name.removeprefix("cp_head.") for name, tensor in model.state_dict().items()
            if name.startswith("cp_head.") and name in ckpt["model"] and torch.equal(tensor, ckpt["model"][name])]
    print(f"from {cfg.init_from}: the trunk and, of the head, {', '.join(kept) or 'nothing'}")
    return model


def check_tokenizer(ckpt, meta, path):
    """A checkpoint of ours must know the data's tokens under the same ids; nanoGPT's holds no tokenizer to compare."""
    if "meta" in ckpt and ckpt["meta"]["tokenizer"] != meta["tokenizer"]:
        sys.exit(f"{path} was trained with another tokenizer ({ckpt['meta']['tokenizer']['name']}) than the data's "
                 f"({meta['tokenizer']['name']}); take --data_dir with the data it was trained on, or train anew.")


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
def evaluate(model, val, cfg, autocast):
    """The parts of the loss (see GPT.loss), averaged over the fixed validation windows."""
    model.eval()
    totals, n_windows = {}, 0
    for idx, targets in val.fixed(cfg.eval_windows):
        with autocast:
            parts = model.loss(idx, targets)[1]
        for name, part in parts.items():
            totals[name] = totals.get(name, 0) + part.cpu().double() * len(idx)
        n_windows += len(idx)
    model.train()
    return {name: (total / n_windows).tolist() for name, total in totals.items()}


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
# the state of a run


class Run:
    """All that changes while training: what a checkpoint holds, so that --resume goes on as if nothing had happened."""

    def __init__(self, cfg, meta, model, device, dtype):
        self.cfg, self.meta, self.model, self.device = cfg, meta, model, device
        self.optimizer = build_optimizer(model, cfg, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.windows = torch.Generator().manual_seed(cfg.seed)  # draws the training windows
        self.iter_num, self.seconds, self.log = 0, 0.0, []
        self.is_new = True  # until its first checkpoint

    @property
    def progress(self):
        """The share of the run that is done, by steps or by time, whichever is further."""
        by_time = self.seconds / self.cfg.max_seconds if self.cfg.max_seconds else 0.0
        return max(self.iter_num / self.cfg.max_iters, by_time)

    def random_states(self):
        """The generators: the windows', and those of dropout, joint_share and sample_component, the device's too."""
        backend = getattr(torch, self.device.type)  # torch.cuda, torch.mps, torch.cpu
        rest = {} if self.device.type == "cpu" else {self.device.type: backend.get_rng_state()}
        return {"windows": self.windows.get_state(), "cpu": torch.get_rng_state(), **rest}

    def save(self):
        """Write ckpt.pt and log.jsonl. What an earlier run left is kept as ckpt.old.pt; its log is in there, too."""
        stop_if_diverged(self, sum(p.detach().sum() for p in self.model.parameters()).item())
        path = Path(self.cfg.out_dir) / "ckpt.pt"
        if self.is_new and path.exists():
            with replacing(path.with_name("ckpt.old.pt")) as file, open(path, "rb") as old:
                shutil.copyfileobj(old, file)
        self.is_new = False
        with replacing(path) as file:
            torch.save({**self.model.checkpoint(), "train_config": asdict(self.cfg), "meta": self.meta,
                        "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                        "random": self.random_states(), "iter_num": self.iter_num, "seconds": self.seconds,
                        "log": self.log}, file)
        with replacing(path.with_name("log.jsonl")) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in self.log)

    def restore(self, ckpt):
        """Take over all that `save` wrote but the model, which is loaded by then."""
        self.is_new = False
        self.optimizer.load_state_dict(ckpt["optimizer"])
        if ckpt["scaler"]:
            self.scaler.load_state_dict(ckpt["scaler"])
        self.iter_num, self.seconds, self.log = ckpt["iter_num"], ckpt["seconds"], ckpt["log"]
        self.windows.set_state(ckpt["random"]["windows"])
        torch.set_rng_state(ckpt["random"]["cpu"])
        if self.device.type != "cpu" and self.device.type in ckpt["random"]:
            getattr(torch, self.device.type).set_rng_state(ckpt["random"][self.device.type])


def resume_config(path, given):
    """(model, TrainConfig, checkpoint) to go on from: the checkpoint's settings, with the flags that may differ."""
    model, ckpt = load_model(path)
    try:
        old = TrainConfig(**ckpt["train_config"])
        ckpt["meta"]["tokenizer"], ckpt["meta"]["splits"]
    except (KeyError, TypeError):
        sys.exit(f"{path} holds no state of training to go on from; --init_from {path} starts a new run with its "
                 "weights.")
    for name, value in given.items():
        if name not in CHANGEABLE and value != getattr(old, name):
            flag = f"--no-{name}" if value is False else f"--{name}"
            sys.exit(f"--resume goes on with {name} = {getattr(old, name)}, not {value}; leave {flag} away, or start a "
                     "new run without --resume.")
    kept = {name: value for name, value in given.items() if name in CHANGEABLE}
    return model, replace(old, **{**kept, "out_dir": str(Path(path).parent)}), ckpt


@contextmanager
def stop_signals():
    """A list that is empty until Ctrl-C or SIGTERM, which ends the run after its step; a second one does at once."""
    caught, before = [], {}

    def note(number, frame):
        caught.append(number)
        restore()

    def restore():
        for s, handler in before.items():
            signal.signal(s, handler)

    for s in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(s) not in (signal.SIG_IGN, None):  # a shell's background job is not to hear of Ctrl-C
            before[s] = signal.signal(s, note)
    try:
        yield caught
    finally:
        restore()


# -----------------------------------------------------------------------------
# the loop


def optimizer_step(run, loss_function, batches, autocast):
    """One step on cfg.grad_accum batches; returns the last one's loss and its parts."""
    cfg, optimizer, scaler = run.cfg, run.optimizer, run.scaler
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(run.progress, cfg)
    for _ in range(cfg.grad_accum):
        idx, targets = next(batches)
        with autocast:
            loss, parts = loss_function(idx, targets, cfg.joint_weight, cfg.balance_weight, cfg.joint_share,
                                        cfg.sample_component)
        scaler.scale(loss / cfg.grad_accum).backward()
    if cfg.grad_clip:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), cfg.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, parts


def set_up(cfg, resume, given):
    """(Run, its training batches, its validation data, the autocast context), new or from the checkpoint."""
    torch.manual_seed(cfg.seed)
    torch.set_flush_denormal(True)  # a lost component's posterior times a small probability: x86 is slow at these
    model, ckpt = None, None
    if resume:
        path = Path(cfg.out_dir) / "ckpt.pt"
        model, cfg, ckpt = resume_config(path, given)
    device, meta = pick_device(cfg.device), read_meta(cfg.data_dir)
    dtype = pick_dtype(cfg.dtype, device)
    model = (model or build_model(cfg, meta)).to(device)
    if cfg.freeze_trunk:
        if model.cp_head is None:
            sys.exit("--freeze_trunk trains the head alone, and n_future = 1 has none; take a larger --n_future.")
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith("cp_head."))
    # --init_from brings its own block_size, n_layer, ...: what is built is what gets used, logged and saved
    cfg = replace(cfg, **{f.name: getattr(model.config, f.name) for f in fields(cfg) if hasattr(model.config, f.name)})
    run = Run(cfg, meta, model, device, dtype)
    if resume:
        check_tokenizer(ckpt, meta, path)
        if ckpt["meta"]["splits"] != meta["splits"]:
            sys.exit(f"The data in {cfg.data_dir} is not what {path} was trained on; --init_from starts a new run.")
        try:
            run.restore(ckpt)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as e:
            sys.exit(f"{path} holds no state of training that fits ({type(e).__name__}); --init_from {path} starts a "
                     "new run with its weights.")
    batches = Windows(Path(cfg.data_dir) / "train.bin", cfg, device).random(run.windows)
    val_data = Windows(Path(cfg.data_dir) / "val.bin", cfg, device)
    Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    trunk, head = model.n_params()
    print(f"device {device}, {str(dtype).removeprefix('torch.')}; trunk {trunk / 1e6:.2f}M and head {head / 1e6:.2f}M "
          f"parameters; {cfg.batch_size * cfg.grad_accum * cfg.block_size:,} tokens per step; n = {cfg.n_future}"
          + (f", r = {cfg.rank}, context {cfg.context}" if model.cp_head else ""))
    return run, batches, val_data, autocast_context(device, dtype)


def log_step(run, loss, parts, speed):
    """Append a training step to the log; returns what the bar shows."""
    parts = {name: part.tolist() for name, part in parts.items()}
    lr = run.optimizer.param_groups[0]["lr"]
    run.log.append({"iter": run.iter_num, "seconds": run.seconds, "lr": lr, "loss": loss.item(),
                    "tokens_per_second": speed, **parts})
    stop_if_diverged(run, loss.item())
    return {"loss": f"{loss.item():.3f}", "tok_s": f"{speed:,.0f}"}


def log_validation(run, val_data, autocast):
    """Evaluate, append it to the log, write the checkpoint; returns what to print."""
    val = evaluate(run.model, val_data, run.cfg, autocast)
    run.log.append({"iter": run.iter_num, "seconds": run.seconds, "val": val})
    run.save()
    return f"step {run.iter_num}: validation next {val['next']:.4f}, joint {val['joint']:.4f} nats/token"


def stop_if_diverged(run, value):
    """A run that cannot recover must not overwrite a checkpoint that is still good."""
    if not math.isfinite(value):
        sys.exit(f"Training has diverged: the loss or the weights are {value} at step {run.iter_num}. Start again with "
                 f"a lower --lr; what was saved in {run.cfg.out_dir} before is as it was.")


def train(cfg, resume=False, given={}):
    run, batches, val_data, autocast = set_up(cfg, resume, given)
    cfg, first, start = run.cfg, run.iter_num, None
    loss_function = torch.compile(run.model.loss) if cfg.compile else run.model.loss
    with stop_signals() as stop, tqdm(total=cfg.max_iters, initial=first, mininterval=1.0) as bar:
        while run.progress < 1 and not stop:
            try:
                loss, parts = optimizer_step(run, loss_function, batches, autocast)
            except Exception as e:
                if not cfg.compile or run.iter_num > first:
                    raise
                sys.exit(f"--compile failed ({type(e).__name__}); it needs a C++ compiler, on a GPU also Triton. "
                         "Train without --compile.")
            # The clock starts after the first step, which may compile; a run that stays well within max_seconds does
            # not depend on the machine's speed.
            now = time.monotonic()
            start = start or (now, run.seconds)
            run.seconds = start[1] + now - start[0]
            run.iter_num += 1
            bar.update()
            if run.iter_num % cfg.log_interval == 0:
                tokens = (run.iter_num - first - 1) * cfg.batch_size * cfg.grad_accum * cfg.block_size
                bar.set_postfix(log_step(run, loss, parts, tokens / max(now - start[0], 1e-9)), refresh=False)
            if run.progress >= 1 or run.iter_num % cfg.eval_interval == 0:
                bar.write(log_validation(run, val_data, autocast))
    if stop and run.progress < 1:
        run.save()
        print(f"\nstopped after step {run.iter_num}, which is saved; to go on: python train.py --resume --out_dir "
              f"{cfg.out_dir}", file=sys.stderr)
        sys.exit(130)
    for line in [line for line in run.log if "val" in line][-1:]:
        report(line["val"], run.meta)
    if run.iter_num == first:
        print(f"\nThis run was complete after {first} steps and {run.seconds:.0f} s (--max_iters {cfg.max_iters}, "
              f"--max_seconds {cfg.max_seconds:g}); larger ones train on.")
    else:
        print(f"\nwrote {Path(cfg.out_dir) / 'ckpt.pt'} after {run.iter_num} steps, {run.seconds:.0f} s")


def main():
    cfg, resume, benchmark, given = parse_args()
    if benchmark:
        import bench_training

        bench_training.benchmark(cfg)
    else:
        train(cfg, resume, given)


if __name__ == "__main__":
    run_script(main)
