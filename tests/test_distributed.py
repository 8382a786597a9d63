"""train.py as several processes, with gloo on a CPU: one run, whatever happens to one of them."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import ANY

import pytest
from helpers import assert_same_run, call, eight_windows, tiny_run, windows
import torch
from torch.nn.parallel import DistributedDataParallel

import train as trainer
from model import BadInput

ROOT = Path(__file__).parent.parent
SMALL = ("--preset toy --n_layer 1 --n_head 2 --n_embd 16 --block_size 32 --batch_size 4 --rank 2 --n_future 3 "
         "--max_iters 24 --eval_interval 8 --eval_windows 4 --log_interval 2 --joint_share 1 --device cpu")
FOR_EVER = (f"{SMALL} --max_iters 1000000 --eval_interval 1 --dropout 0.1 --joint_share 0.5 "
            "--warmup 0 --lr 1e-3 --min_lr 1e-3")  # one rate at any length

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home, before = tmp_path_factory.mktemp("home"), os.getcwd()
    os.chdir(home)
    assert call("prepare", "--toy --stories 120") == (0, "")
    os.chdir(before)
    return home


def start_ranks(what, n=2):
    """The processes that torchrun would start, by fork, as importing torch takes seconds: their ids. Each trains with
    the flags `what`, or calls it. What they say goes to the files error0, error1, ... The process that calls this must
    have computed nothing yet: threads do not survive a fork."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(n))
    ranks = []
    for rank in range(n):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            os.environ["RANK"] = str(rank)
            trainer.RANK, trainer.RANKS, trainer.LOCAL_RANK = rank, n, rank
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(f"error{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            code, message = call("train", what) if isinstance(what, str) else what()
            names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
            if code == 0 and isinstance(what, str) and any("gloo" in name for name in names):
                code, message = 99, "threads of the process group are left, and may abort Python"
            print(message, file=sys.stderr, flush=True)
            os._exit(code)
    return ranks


def ended(ranks):
    """The exit codes, or minus the signal, of ranks that end by themselves, and the last line of each. Ranks that wait
    for one another are killed after a minute."""
    timer = threading.Timer(60, lambda: [os.kill(pid, signal.SIGKILL) for pid in ranks])
    timer.start()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in reversed(ranks)][::-1]
    timer.cancel()
    errors = [Path(f"error{rank}").read_text() for rank in range(len(ranks))]
    assert "Traceback" not in "".join(errors)
    return codes, [error.strip().rpartition("\n")[2] for error in errors]


def steps_of(path):
    return torch.load(path, weights_only=True)["iter_num"] if Path(path).exists() else 0


def wait_for_steps(path, more_than=0):
    end = time.monotonic() + 120
    while steps_of(path) <= more_than:
        assert time.monotonic() < end
        time.sleep(0.02)


def run_alone(function, cwd):
    """Call a function of this file in a process of its own."""
    folders = [str(ROOT), str(ROOT / "tests")]
    code = f"import sys; sys.path[:0] = {folders}; import test_distributed; test_distributed.{function.__name__}()"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("accum", [1, 2])
def test_two_ranks_are_one_process_that_accumulates_twice_as_often(accum, home, monkeypatch):
    """torchrun's two ranks with --grad_accum 1 or 2, and one process with 2 or 4, see the same windows: losses and
    weights agree to 1e-5. Guards gradients that are each rank's own, and ranks that see the same windows."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py",
               *SMALL.split(), "--grad_accum", str(accum), "--out_dir", f"out/two{accum}"]
    result = subprocess.run(command, cwd=home, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("step 8: validation") == result.stdout.count(f"wrote out/two{accum}/ckpt.pt") == 1
    assert "Traceback" not in result.stderr and "24/24" in result.stderr
    monkeypatch.chdir(home)
    assert call("train", f"{SMALL} --grad_accum {2 * accum} --out_dir out/one{accum}") == (0, "")
    two, one = (torch.load(f"out/{name}{accum}/ckpt.pt", weights_only=True) for name in ("two", "one"))
    for name, tensor in one["model"].items():
        torch.testing.assert_close(two["model"][name], tensor, rtol=0, atol=1e-5)
    losses = [[line["val"]["next"] for line in run["log"] if "val" in line] for run in (two, one)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0][-1] < losses[0][0]
    assert torch.equal(two["random"]["windows"], one["random"]["windows"])


def kill_and_interrupt():
    as_a_script = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    ranks = start_ranks(f"{FOR_EVER} --out_dir out/broken")
    wait_for_steps("out/broken/ckpt.pt")
    os.kill(ranks[1], signal.SIGKILL)
    codes, lines = ended(ranks)
    assert codes == [1, -signal.SIGKILL] and lines[0].startswith("Another process of this run has ended"), lines

    for how, rank, times in ((signal.SIGINT, 1, 2), (signal.SIGTERM, 0, 1)):
        before = steps_of("out/broken/ckpt.pt")
        ranks = start_ranks("--resume --out_dir out/broken")
        wait_for_steps("out/broken/ckpt.pt", before)
        for _ in range(times):
            os.kill(ranks[rank], how)
            time.sleep(0.01)
        codes, lines = ended(ranks)
        reached = steps_of("out/broken/ckpt.pt")
        assert codes == [130, 130] and lines[0].startswith(f"stopped after step {reached}, which is saved"), lines
        assert lines[1] in ("", "interrupted") and reached > before > 0

    for args in ("--resume --out_dir out/broken", f"{FOR_EVER} --out_dir out/whole"):
        assert ended(start_ranks(f"{args} --max_iters {reached + 2}")) == ([0, 0], ANY)
    signal.signal(signal.SIGINT, as_a_script)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_killed_rank_and_ctrl_c_lose_nothing(home, monkeypatch):
    """A rank that is killed ends the others in one line, and the checkpoint is whole. Ctrl-C and SIGTERM save
    their step on all ranks, also where they reach one alone in time, and Ctrl-C where it comes twice, from the terminal
    and from torchrun. Resumed after all of these, the run is the one that nobody disturbed, with each rank's own
    dropout and share of the positions; as one process it cannot go on."""
    run_alone(kill_and_interrupt, home)
    monkeypatch.chdir(home)
    assert_same_run("out/broken/ckpt.pt", "out/whole/ckpt.pt")
    broken, whole = (torch.load(f"out/{name}/ckpt.pt", weights_only=True) for name in ("broken", "whole"))
    (own,), (other,) = broken["random_of_others"], whole["random_of_others"]
    assert all(torch.equal(own[name], other[name]) for name in ("windows", "cpu"))
    first = whole["random"]
    assert torch.equal(own["windows"], first["windows"]) and not torch.equal(own["cpu"], first["cpu"])
    code, message = call("train", "--resume --out_dir out/broken")
    assert code == 1 and "as many processes as before, 2, not 1" in message


def begin_without_data():
    ranks = start_ranks(f"{SMALL} --data_dir nowhere")
    os.waitpid(ranks[0], 0)
    os.kill(ranks[1], signal.SIGTERM)  # as torchrun does then
    assert os.waitstatus_to_exitcode(os.waitpid(ranks[1], 0)[1]) == -signal.SIGTERM
    assert [len(Path(f"error{rank}").read_text().splitlines()) for rank in range(2)] == [1, 0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_what_is_wrong_is_said_once(home):
    run_alone(begin_without_data, home)


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
    assert ended(start_ranks(one_rank_of_a_plain_step)) == ([0, 0], ANY)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_gradients_are_the_mean_over_all_ranks_and_batches(home):
    """AdamW hardly sees a factor, so this is gradient descent: each of two ranks with two batches steps as one process
    does with those four. Both begin with rank 0's weights, whatever their own were."""
    run_alone(two_ranks_make_a_plain_step, home)
    expected = one_plain_step()
    for rank in range(2):
        for name, tensor in torch.load(home / f"weights{rank}.pt", weights_only=True).items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
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
