"""train.py as several processes, with gloo on a CPU: one run, whatever happens to one of them."""

import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import (TOY, assert_same_run, call, eight_windows, exit_code, fork, steps_of,
                     tiny_run, wait_until, windows)
from torch.nn.parallel import DistributedDataParallel

import train as trainer
from model import ROOT, BadInput

PLAIN = f"{TOY} --dropout 0 --joint_share 1"
FOR_EVER = (f"{TOY} --max_iters 1000000 --eval_interval 1 --joint_share 0.5 "
            "--warmup 0 --lr 1e-3 --min_lr 1e-3")  # one rate at any length

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


@pytest.fixture(scope="module")
def home(toy, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(toy / "data", home / "data")
    return home


@pytest.fixture
def alone(forks, home):
    """Calls a function of this file in a process of its own, which must end well."""
    def run(function, *args):
        code, _, error = forks(home, function, *args)
        assert code == 0, error

    return run


def free_port():
    """Below those that the system hands out, and far from those of another session of tests."""
    def is_free(port):
        with socket.socket() as here:
            try:
                here.bind(("127.0.0.1", port))
                return True
            except OSError:
                return False

    return next(filter(is_free, range(20_000 + os.getpid() % 10_000, 32_768)))


def wrapped_for_the_first_time(net):
    """What the first DistributedDataParallel of a process imports, Forks has imported before."""
    importlib.import_module("torch.distributed.nn.functional")
    return DistributedDataParallel(net)


def a_rank(what, rank, ranks):
    os.environ["RANK"] = str(rank)
    for name in ("torch.distributed.nn", "torch.distributed.nn.functional"):
        sys.modules.pop(name, None)
    trainer.DistributedDataParallel = wrapped_for_the_first_time
    trainer.RANK, trainer.RANKS, trainer.LOCAL_RANK = rank, ranks, rank
    code, message = call("train", what) if isinstance(what, str) else what()
    if code == 0 and isinstance(what, str):
        names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
        if any("gloo" in name for name in names):
            sys.exit("threads of the process group are left, and may abort Python")
    print(message, file=sys.stderr)
    sys.exit(code)


def start_ranks(what, n=2):
    """The processes that torchrun would start, by fork: their ids. Each trains with the flags
    `what`, or calls it. What they say goes to the files out0, error0, out1, ..."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(n))
    return [fork(a_rank, what, rank, n, out=f"out{rank}", err=f"error{rank}") for rank in range(n)]


def ended(ranks):
    """The exit codes, or minus the signal, of ranks that end by themselves, and the last line of
    each. Ranks that wait for one another are killed after two minutes."""
    timer = threading.Timer(120, lambda: [os.kill(pid, signal.SIGKILL) for pid in ranks])
    timer.start()
    codes = [exit_code(pid) for pid in reversed(ranks)][::-1]
    timer.cancel()
    errors = [Path(f"error{rank}").read_text() for rank in range(len(ranks))]
    assert "Traceback" not in "".join(errors), errors
    return codes, [error.strip().rpartition("\n")[2] for error in errors]


def two_ranks(what):
    codes, lines = ended(start_ranks(what))
    assert codes == [0, 0], lines


def two_ranks_and_one(accum):
    """In float64, so that all differences but rounding's show."""
    torch.set_default_dtype(torch.float64)
    two_ranks(f"{PLAIN} --grad_accum {accum} --out_dir out/two{accum}")
    one = f"{PLAIN} --grad_accum {2 * accum} --out_dir out/one{accum}"
    assert exit_code(fork(a_rank, one, 0, 1, err="error")) == 0, Path("error").read_text()


@pytest.mark.parametrize("accum", [1, 2])
def test_two_ranks_are_one_process_that_accumulates_twice_as_often(accum, alone, home, monkeypatch):
    """Two ranks with --grad_accum 1 or 2, and one process with 2 or 4, see the same windows: losses
    and weights agree. Guards gradients that are each rank's own, and ranks that see the same
    windows, either of which moves weights by the learning rate, 1e-3. Rounding is 1e-16 of a
    gradient: AdamW makes more of it where a gradient is small, but not 1e7 times as much."""
    alone(two_ranks_and_one, accum)
    monkeypatch.chdir(home)
    said = Path("out0").read_text()
    assert said.count("step 8: validation") == said.count(f"wrote out/two{accum}/ckpt.pt") == 1
    assert not Path("out1").read_text() and "12/12" in Path("error0").read_text()
    two, one = (torch.load(f"out/{name}{accum}/ckpt.pt", weights_only=True) for name in ("two", "one"))
    for name, tensor in one["model"].items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(two["model"][name], tensor, rtol=0, atol=1e-9)
    losses = [[line["val"]["next"] for line in run["log"] if "val" in line] for run in (two, one)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-9) and losses[0][-1] < losses[0][0]
    assert torch.equal(two["random"]["windows"], one["random"]["windows"])


@pytest.mark.slow
@pytest.mark.parametrize("accum", [1, 2])
def test_torchrun_starts_these_ranks(accum, alone, home):
    """Its run is that of the forks, bit for bit: a sum of two is the same in any order."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "train.py", *PLAIN.split(), "--grad_accum", str(accum),
               "--out_dir", f"out/torchrun{accum}"]
    result = subprocess.run(command, cwd=home, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("step 8: validation") == result.stdout.count("wrote out/tor") == 1
    assert "Traceback" not in result.stderr and "12/12" in result.stderr
    alone(two_ranks, f"{PLAIN} --grad_accum {accum} --out_dir out/forks{accum}")
    assert_same_run(home / f"out/torchrun{accum}/ckpt.pt", home / f"out/forks{accum}/ckpt.pt")


def kill_and_interrupt():
    """Each signal comes in a step that is known beforehand."""
    step, coming = trainer.optimizer_step, {}

    def interrupted(run):
        for how in coming.get((trainer.RANK, run.iter_num), ()):
            signal.raise_signal(how)
        return step(run)

    trainer.optimizer_step = interrupted
    coming[1, 3] = [signal.SIGKILL]
    check_killed(*ended(start_ranks(f"{FOR_EVER} --eval_interval 2 --out_dir out/broken")))
    assert steps_of("out/broken/ckpt.pt") == 2
    for rank, after, signals in ((1, 4, [signal.SIGINT] * 2), (0, 6, [signal.SIGTERM])):
        coming.clear()
        coming[rank, after] = signals
        check_interrupted(*ended(start_ranks("--resume --out_dir out/broken")))
        assert steps_of("out/broken/ckpt.pt") == after + 1
    coming.clear()
    go_to_the_end(f"{FOR_EVER} --eval_interval 2")


def kill_and_interrupt_at_any_moment():
    """Each signal comes whenever it does."""
    ranks = start_ranks(f"{FOR_EVER} --out_dir out/broken")
    wait_until(lambda: steps_of("out/broken/ckpt.pt"))
    os.kill(ranks[1], signal.SIGKILL)
    check_killed(*ended(ranks))
    for rank, how in ((1, signal.SIGINT), (0, signal.SIGTERM)):
        before = steps_of("out/broken/ckpt.pt")
        ranks = start_ranks("--resume --out_dir out/broken")
        wait_until(lambda: steps_of("out/broken/ckpt.pt") > before)
        os.kill(ranks[rank], how)
        check_interrupted(*ended(ranks))
        assert steps_of("out/broken/ckpt.pt") > before > 0
    go_to_the_end(FOR_EVER)


def check_killed(codes, lines):
    assert codes == [1, -signal.SIGKILL], lines
    assert lines[0].startswith("Another process of this run has ended"), lines


def check_interrupted(codes, lines):
    reached = steps_of("out/broken/ckpt.pt")
    assert codes == [130, 130] and lines[1] == "", lines
    assert lines[0].startswith(f"stopped after step {reached}, which is saved"), lines


def go_to_the_end(flags):
    end = steps_of("out/broken/ckpt.pt") + 2
    for args in ("--resume --out_dir out/broken", f"{flags} --out_dir out/whole"):
        two_ranks(f"{args} --max_iters {end}")


@pytest.mark.parametrize("how", [kill_and_interrupt, pytest.param(kill_and_interrupt_at_any_moment,
                                                                  marks=pytest.mark.slow)])
def test_a_killed_rank_and_ctrl_c_lose_nothing(how, alone, home, monkeypatch):
    """A rank that is killed ends the others in one line, and the checkpoint is whole. Ctrl-C and
    SIGTERM save their step on all ranks, also where they reach one alone in time, and Ctrl-C where
    it comes twice, from the terminal and from torchrun. Resumed after all of these, the run is the
    one that nobody disturbed, with each rank's own dropout and share of the positions; as one
    process it cannot go on."""
    monkeypatch.chdir(home)
    shutil.rmtree("out/broken", ignore_errors=True)
    shutil.rmtree("out/whole", ignore_errors=True)
    alone(how)
    assert_same_run("out/broken/ckpt.pt", "out/whole/ckpt.pt")
    broken, whole = (torch.load(f"out/{name}/ckpt.pt", weights_only=True) for name in ("broken", "whole"))
    (own,), (other,) = broken["random_of_others"], whole["random_of_others"]
    assert all(torch.equal(own[name], other[name]) for name in ("windows", "cpu"))
    first = whole["random"]
    assert torch.equal(own["windows"], first["windows"]) and not torch.equal(own["cpu"], first["cpu"])
    code, message = call("train", "--resume --out_dir out/broken")
    assert code == 1 and "as many processes as before, 2, not 1" in message


def begin_without_data():
    ranks = start_ranks(f"{PLAIN} --data_dir nowhere")
    os.waitpid(ranks[0], 0)
    os.kill(ranks[1], signal.SIGTERM)  # as torchrun does then
    assert exit_code(ranks[1]) == -signal.SIGTERM
    assert [len(Path(f"error{rank}").read_text().splitlines()) for rank in range(2)] == [1, 0]


def test_what_is_wrong_is_said_once(alone):
    alone(begin_without_data)


def test_the_ranks_share_the_batches_of_one_process(tmp_path):
    """Of 3 ranks, rank r has the batches r, r + 3, ...; their generators go on alike."""
    data = windows(tmp_path, 500, batch_size=5)
    generators = [torch.Generator().manual_seed(0) for _ in range(4)]
    one, *ranks = [data.random(generators[0]), *(data.random(g, r, 3) for r, g in enumerate(generators[1:]))]
    for _ in range(4):
        for batches in ranks:
            assert torch.equal(next(batches)[0], next(one)[0])
    assert all(torch.equal(g.get_state(), generators[0].get_state()) for g in generators)


def one_plain_step(i=0, accum=4, wrap=lambda run: None):
    """A step of gradient descent, without clipping, on the batches i, i + 1, ... of eight windows: its weights."""
    batches = list(zip(*(x.chunk(4) for x in eight_windows())))[i::4 // accum]
    run = tiny_run(batches, grad_accum=accum, grad_clip=0.0, warmup=0.0, lr=1.0, seed=i, target="lm_head")
    run.model.double()
    wrap(run)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=1.0)
    trainer.optimizer_step(run)
    return run.model.state_dict()


def one_rank_of_a_plain_step():
    def wrap(run):
        run.net = DistributedDataParallel(run.net)

    trainer.dist.init_process_group("gloo")
    torch.save(one_plain_step(trainer.RANK, 2, wrap), f"weights{trainer.RANK}.pt")
    return 0, ""


def two_ranks_make_a_plain_step():
    two_ranks(one_rank_of_a_plain_step)


def test_gradients_are_the_mean_over_all_ranks_and_batches(alone, home):
    """AdamW hardly sees a factor, so this is gradient descent: each of two ranks with two batches steps as one process
    does with those four. Both begin with rank 0's weights, whatever their own were."""
    alone(two_ranks_make_a_plain_step)
    expected = one_plain_step()
    for rank in range(2):
        for name, tensor in torch.load(home / f"weights{rank}.pt", weights_only=True).items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-12)
    before = tiny_run(target="lm_head").model.state_dict()
    assert max((before[name] - tensor).abs().max() for name, tensor in expected.items()) > 0.1
    assert not torch.equal(tiny_run(seed=1).model.lm_head.weight, before["lm_head.weight"])


def test_only_a_rank_that_is_gone_gets_one_line(monkeypatch):
    """Another error keeps its traceback, and so does every one of a single process."""
    for ranks, words, kind in ((2, "Connection closed by peer", BadInput), (2, "shapes", RuntimeError),
                               (2, "NCCL error: Duplicate GPU detected", RuntimeError),
                               (1, "Connection closed by peer", RuntimeError)):
        monkeypatch.setattr(trainer, "RANKS", ranks)
        with pytest.raises(kind), trainer.peers("out"):
            raise RuntimeError(words)
