"""What test files share: scripts that are called in this process or in a fork, runs of training
without files, models and prompts for the decoders."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from test_cp_head import GIVEN, tiny_model

import common
import train as trainer
from common import Batches
from model import ROOT, BadInput

CPU = torch.device("cpu")

# -----------------------------------------------------------------------------
# scripts

SHORT = {"prepare": "prepare_tinystories", "bench": "bench_speculative",
         "plot": "experiments.plots", "training": "experiments.bench_training"}
# a training of less than a second
FLAGS = ["--n_layer", 1, "--n_head", 2, "--n_embd", 16, "--block_size", 32, "--batch_size", 4,
         "--max_iters", 12, "--eval_interval", 4, "--eval_windows", 4, "--log_interval", 2,
         "--dropout", 0.1, "--device", "cpu"]
TOY = " ".join(map(str, ["--preset toy --head cp --rank 2", *FLAGS]))  # that of the fixture `toy`


def start(script, args):
    """Run a script as its __main__ does."""
    argv = [f"{script}.py", *(args.split() if isinstance(args, str) else map(str, args))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        common.run_script(importlib.import_module(SHORT.get(script, script)).main)


def call(script, args):
    """(exit code, the line on stderr) of a script that is run in this process: importing torch
    takes seconds."""
    try:
        start(script, args)
    except SystemExit as e:  # a text is what Python prints, with code 1
        return (e.code, "") if isinstance(e.code, int) else (1, e.code)
    return 0, ""


def run(cwd, script, *args):
    """The stdout of a script that must succeed, in this process."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.chdir(cwd)
        assert call(script.removesuffix(".py"), args) == (0, ""), out.getvalue()
    return out.getvalue()


def contents(home):
    """What every file of a folder holds, but for locks."""
    return {path: path.read_bytes() for path in home.rglob("*")
            if path.is_file() and path.name != ".lock"}


def stamps(home):
    """When every file of a folder was written, and its size; the folders; no locks."""
    return {path: path.is_file() and (path.stat().st_mtime_ns, path.stat().st_size)
            for path in home.rglob("*") if path.name != ".lock"}


def without_times(log):
    times = ("seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in times} for line in log]


def assert_same_run(path, other):
    """Two checkpoints agree bit by bit in weights, optimizer, generators and log."""
    a, b = (torch.load(p, weights_only=True) for p in (path, other))
    assert a["iter_num"] == b["iter_num"]
    assert without_times(a["log"]) == without_times(b["log"])
    states = [{**c["model"], **c["random"],
               **{f"{i}.{k}": v for i, s in c["optimizer"]["state"].items() for k, v in s.items()}}
              for c in (a, b)]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 40
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


def steps_of(path):
    """How far the run of a checkpoint is; 0 where there is none."""
    return torch.load(path, weights_only=True)["iter_num"] if os.path.exists(path) else 0


def wait_until(condition):
    """Two minutes are for a machine that is busy with other work; here it takes a second."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# -----------------------------------------------------------------------------
# scripts in processes of their own, by fork, as importing torch takes seconds


def fork(function, *args, out=os.devnull, err=os.devnull):
    """The id of a process that calls a function, and what it says goes to two files. The process
    that calls this must have computed nothing yet: threads do not survive a fork."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        for fd, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        function(*args)
        code = 0
    except SystemExit as e:  # a text is what Python prints, with code 1
        code = e.code if isinstance(e.code, int) else print(e.code, file=sys.stderr) or 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_code(child):
    """Of a process, when it has ended; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_a_fork(function, *args):
    """(exit code, stdout, stderr) of a function that is called in a process of its own."""
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        return exit_code(fork(function, *args, out=out.name, err=err.name)), out.read(), err.read()


class Forks:
    """A process that has imported what tests need and computes nothing: it forks those that do."""

    def __init__(self):
        paths = [str(ROOT), str(ROOT / "tests")]
        code = f"import sys; sys.path[:0] = {paths}; import helpers; helpers.Forks.serve()"
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, start_new_session=True)

    def __call__(self, cwd, function, *args):
        """(exit code, stdout, stderr) of a function of a module, in cwd and with the environment
        of now; args are plain."""
        order = [str(cwd), dict(os.environ), function.__module__, function.__name__, *args]
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def end(self):
        """With all that a test which failed has left at work."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @staticmethod
    def serve():
        def work(cwd, environment, module, name, *args):
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(environment)
            getattr(importlib.import_module(module), name)(*args)

        signal.signal(signal.SIGINT, signal.default_int_handler)  # also in a background job
        importlib.import_module("torch._dynamo")  # as the first optimizer would, for each fork
        for order in sys.stdin:
            print(json.dumps(in_a_fork(work, *json.loads(order))), flush=True)


# -----------------------------------------------------------------------------
# training without files


def windows(tmp_path, n_tokens, **config):
    """Windows of the tokens 0, 1, 2, ..."""
    np.arange(n_tokens, dtype=np.uint16).tofile(tmp_path / "x.bin")
    cfg = trainer.TrainConfig(block_size=6, n_future=3, **config)
    return trainer.Windows(tmp_path / "x.bin", cfg, CPU)


class RunOfFive(trainer.Run):
    """A run on windows of five tokens, of which no meta.json speaks."""

    def read_meta(self, cfg, ckpt):
        return {"vocab_size": 5}


class RunWithoutData(RunOfFive):
    def read_data(self, split):
        return Batches()


def tiny_run(batches=(), **config):
    small = dict(n_layer=1, n_head=2, n_embd=8, block_size=6, n_future=3, joint_share=1.0,
                 target="marginal", balance_weight=0.0, device="cpu", seed=0)
    run = RunWithoutData(trainer.TrainConfig(**{**small, **config}), {})
    run.batches = iter(batches)
    return run


def eight_windows():
    """idx (8, 6), gold (8, 6, 3)."""
    tokens = torch.randint(5, (8, 9), generator=torch.Generator().manual_seed(0))
    return tokens[:, :6], tokens[:, 1:].unfold(1, 3, 1)


def can_compile():
    try:
        trainer.compiled(torch.nn.Identity(), CPU)
        return True
    except BadInput:
        return False


# -----------------------------------------------------------------------------
# decoders

# one that draws a window at once, one that sees its drafts, one whose component moves
THREE = [dict(head="cp", target="marginal"), dict(head="chain", target="lm_head"),
         dict(head="hmm", target="lm_head")]
three = pytest.mark.parametrize("variant", THREE, ids=lambda v: v["head"])
# all heads that draft from states alone, those with a Model of their own included
LOOK_BACK = ["cp", "chain", "full", "gloeckle", "hmm", "layers", "medusa", "recurrent",
             "tree_circuit", "wide", "low_rank", *GIVEN]


def a_model(seed, block_size=None):
    head = LOOK_BACK[seed % len(LOOK_BACK)]
    marginal = head in ("cp", "chain", "hmm", "recurrent") and seed % 2
    return tiny_model(seed, n_future=2 + seed % 4, rank=1 + seed % 3,
                      block_size=block_size or 5 + seed, vocab_size=11, n_token=9, head=head,
                      target="marginal" if marginal else "lm_head")


def some_prompts(seed, block_size):
    """Six prompts of different lengths: one token, a full block, one more, and longer."""
    rng = torch.Generator().manual_seed(seed)
    lengths = (3, 1, block_size, block_size + 1, block_size - 1, 2 * block_size + 3)
    return [torch.randint(9, (T,), generator=rng).tolist() for T in lengths]
