"""train.py's parts: windows, learning rate, optimizer, accumulation, the clock; and the ways to
train once for real."""

import itertools
import json
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

import train as trainer
from common import compiled
from model import GPT, BadInput

CPU = torch.device("cpu")


def windows(tmp_path, n_tokens, **config):
    np.arange(n_tokens, dtype=np.uint16).tofile(tmp_path / "x.bin")
    cfg = trainer.TrainConfig(block_size=6, n_future=3, **config)
    return trainer.Windows(tmp_path / "x.bin", cfg, CPU)


def tiny_run(batches=(), **config):
    cfg = trainer.TrainConfig(**{**dict(n_layer=1, n_head=2, n_embd=8, block_size=6, n_future=3, joint_share=1.0,
                                        target="marginal", balance_weight=0.0), **config})
    torch.manual_seed(0)
    return trainer.Run(cfg, GPT(trainer.model_config(cfg, 5)), {}, CPU, batches=iter(batches))


def test_every_position_has_its_full_window(tmp_path):
    """gold[b, t, s - 1] is the token s places after idx[b, t], for every t, the last ones
    included."""
    data = windows(tmp_path, 50, batch_size=32)
    idx, gold = next(data.random(torch.Generator().manual_seed(0)))
    assert torch.equal(gold, idx.unsqueeze(-1) + torch.arange(1, 4)) and idx.shape == (32, 6)
    assert data.n_starts == 42 and windows(tmp_path, 9).at([0])[1][0, -1].tolist() == [6, 7, 8]
    with pytest.raises(BadInput, match="holds 8 tokens"):
        windows(tmp_path, 8)


def test_validation_windows_do_not_depend_on_the_batch_size(tmp_path):
    once, twice = (torch.cat([idx for idx, _ in windows(tmp_path, 500, batch_size=size).fixed(10)]) for size in (10, 3))
    assert torch.equal(once, twice) and once[0, 0] == 0 and once[-1, -1] == 496


def test_learning_rate_rises_then_falls_to_its_minimum():
    cfg = trainer.TrainConfig(lr=1.0, min_lr=0.1, warmup=0.1)
    rates = [trainer.learning_rate(i / 100, cfg) for i in range(101)]
    assert rates[10] == max(rates) == pytest.approx(1.0) and rates[100] == pytest.approx(0.1) and 0 < rates[0] < 0.05
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_optimizer_decays_the_trunks_matrices_only():
    """Norms, biases and the head, whose maps start at the identity and not at 0, are not
    decayed."""
    run = tiny_run(bias=True, head="chain")
    decayed, rest = (group["params"] for group in run.optimizer.param_groups)
    names = {id(p): name for name, p in run.model.named_parameters()}
    assert {names[id(p)].rsplit(".", 2)[-2] for p in decayed} == {"wte", "wpe", "c_attn", "c_proj", "c_fc"}
    assert {names[id(p)] for p in rest} | {names[id(p)] for p in decayed} == set(names.values())


def test_accumulated_gradients_are_those_of_one_large_batch(monkeypatch):
    """2 batches of 4 windows step like 1 batch of 8; clipping bounds the norm. Guards a missing 1 /
    grad_accum."""
    tokens = torch.randint(5, (8, 9), generator=torch.Generator().manual_seed(0))
    idx, gold = tokens[:, :6], tokens[:, 1:].unfold(1, 3, 1)
    monkeypatch.setattr(trainer, "learning_rate", lambda progress, cfg: 1.0)
    steps = {}
    for accum, clip in ((1, 0.0), (2, 0.0), (2, 1e-3)):
        run = tiny_run(zip(idx.chunk(accum), gold.chunk(accum)), grad_accum=accum, grad_clip=clip)
        run.optimizer = torch.optim.SGD(run.model.parameters(), lr=1.0)
        before = [p.detach().clone() for p in run.model.parameters()]
        trainer.optimizer_step(run, run.model.loss)
        steps[accum, clip] = torch.cat([(a - b.detach()).flatten() for a, b in zip(before, run.model.parameters())])
    torch.testing.assert_close(steps[1, 0.0], steps[2, 0.0], rtol=0, atol=1e-6)
    assert steps[2, 1e-3].norm().item() == pytest.approx(1e-3, rel=1e-2) and steps[1, 0.0].norm() > 0.1


def test_the_default_settings_are_the_laptop_preset():
    assert trainer.PRESETS["laptop"] == trainer.TrainConfig()
    assert all(preset.max_seconds == 0 for preset in trainer.PRESETS.values())  # a schedule that no clock changes


def test_tinystories_preset_has_the_papers_size():
    """About 56M parameters, head included."""
    with torch.device("meta"):
        assert 53e6 < sum(GPT(trainer.model_config(trainer.PRESETS["tinystories"], 50257)).n_params()) < 59e6


# -----------------------------------------------------------------------------
# the loop, in this process


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder with windows to train on, and in it a function that trains a small model there."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        rng.integers(0, 5, 4000).astype(np.uint16).tofile(f"{split}.bin")

    def train(**config):
        cfg = trainer.TrainConfig(**{**dict(data_dir=".", n_layer=1, n_head=2, n_embd=16, block_size=16, n_future=3,
                                            batch_size=4, max_iters=6, eval_interval=6, eval_windows=4, log_interval=1,
                                            device="cpu"), **config})
        torch.manual_seed(0)
        run = trainer.Run(cfg, GPT(trainer.model_config(cfg, 5)), {"vocab_size": 5}, CPU,
                          val=trainer.read_data(cfg, {}, "val", CPU))
        trainer.train(run)
        assert run.progress == 1
        return run

    return train


def test_half_precision_trains_with_a_scaled_loss(data):
    """--dtype float16: the loss is scaled, the gradients are unscaled before they are clipped, and
    the scale is saved."""
    run, reference = data(dtype="float16"), data(dtype="float32")
    assert isinstance(run.autocast, torch.autocast) and isinstance(reference.autocast, nullcontext)
    assert run.scaler.is_enabled() and run.scaler.get_scale() > 1
    assert run.log[-1]["val"]["joint"] == pytest.approx(reference.log[-1]["val"]["joint"], rel=0.02)
    assert torch.load("out/laptop/ckpt.pt", weights_only=True)["scaler"] == {}  # the reference's, which came last


def test_bfloat16_is_taken_where_a_trial_finds_it_faster(data, monkeypatch):
    """By a clock that makes the second of each pair of trials as fast as it says; nothing is drawn from the
    generator, and no gradient is left."""
    run, state = data(), torch.get_rng_state()
    monkeypatch.setattr(trainer, "bfloat16_is_faster", lambda device: True)
    for seconds, expected in ((0.7, "bfloat16"), (0.9, "float32")):
        clock = itertools.accumulate(itertools.cycle((1.0, 0.0, seconds, 0.0)))
        times = itertools.chain([0.0], clock)
        monkeypatch.setattr(trainer.time, "perf_counter", lambda times=times: next(times))
        assert trainer.faster_dtype(run) == expected
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in run.model.parameters())
    monkeypatch.setattr(trainer, "bfloat16_is_faster", lambda device: False)
    assert trainer.faster_dtype(run) == "float32"


def can_compile():
    try:
        return bool(compiled(abs, CPU))
    except BadInput:
        return False


@pytest.mark.parametrize("head", ["cp", "chain"])
def test_compiled_training_is_the_same(data, head):
    """--compile, for real: the losses of every step are those of the eager run, to rounding. (On all positions: compiled
    code may draw its share of them with other random numbers.)"""
    if not can_compile():
        pytest.skip("no C++ compiler, or a torch that compiles wrong gradients")
    fast, eager = (data(compile=c, head=head, joint_share=1.0) for c in (True, False))
    for a, b in zip(fast.log, eager.log):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3) and a["joint"] == pytest.approx(b["joint"], rel=1e-3)


def test_a_torch_that_compiles_wrong_gradients_is_refused(monkeypatch):
    """In one line, before anything is trained: torch 2.6 forgets repeated ids in an embedding's gradient on a CPU."""
    monkeypatch.setattr(torch, "compile", lambda function: lambda W, idx: function(W, idx[:1]))
    with pytest.raises(BadInput, match="--compile gives wrong gradients here .torch"):
        compiled(abs, CPU)


def test_training_works_off_the_main_thread(data):
    """As in a notebook or a server, where Python lets no signal handler be set."""
    runs = []
    thread = threading.Thread(target=lambda: runs.append(data()))
    thread.start()
    thread.join()
    assert runs and runs[0].iter_num == 6


def test_the_log_has_every_loss_apart(data):
    data()
    log = [json.loads(line) for line in Path("out/laptop/log.jsonl").read_text().splitlines()]
    assert {"loss", "next", "joint", "balance", "offset", "usage", "lr", "tokens_per_second"} <= set(log[0])
    assert [line["iter"] for line in log] == [1, 2, 3, 4, 5, 6, 6] and "val" in log[-1]
