"""train.py's parts: windows, learning rate, optimizer, accumulation, the clock; and the ways to
train once for real."""

import json
import math
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import CPU, RunOfFive, can_compile, eight_windows, tiny_run, windows
from test_cp_head import tiny_model
from torch.nn.parallel import DistributedDataParallel

import train as trainer
from model import BadInput, words


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
    run = tiny_run(bias=True, head="chain", weight_decay=0.3)
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.3, 0.0]
    decayed, rest = (group["params"] for group in run.optimizer.param_groups)
    names = {id(p): name for name, p in run.model.named_parameters()}
    assert {names[id(p)].rsplit(".", 2)[-2] for p in decayed} == {"wte", "wpe", "c_attn", "c_proj", "c_fc"}
    assert {names[id(p)] for p in rest} | {names[id(p)] for p in decayed} == set(names.values())


def test_accumulated_gradients_are_those_of_one_large_batch(monkeypatch):
    """2 batches of 4 windows step like 1 batch of 8; clipping bounds the norm. Guards a missing 1 /
    grad_accum."""
    idx, gold = eight_windows()
    monkeypatch.setattr(trainer, "learning_rate", lambda progress, cfg: 1.0)
    steps = {}
    for accum, clip in ((1, 0.0), (2, 0.0), (2, 1e-3)):
        run = tiny_run(zip(idx.chunk(accum), gold.chunk(accum)), grad_accum=accum, grad_clip=clip)
        run.model.double()
        run.optimizer = torch.optim.SGD(run.model.parameters(), lr=1.0)
        before = [p.detach().clone() for p in run.model.parameters()]
        trainer.optimizer_step(run)
        steps[accum, clip] = torch.cat([(a - b.detach()).flatten() for a, b in zip(before, run.model.parameters())])
    torch.testing.assert_close(steps[1, 0.0], steps[2, 0.0], rtol=0, atol=1e-12)
    # clip_grad_norm_ divides by the norm and 1e-6
    norm, clipped = steps[1, 0.0].norm().item(), steps[2, 1e-3].norm().item()
    assert norm > 0.1 and clipped == pytest.approx(1e-3, rel=1e-6 / norm + 1e-9)


def test_the_default_settings_are_the_laptop_preset():
    assert trainer.PRESETS["laptop"] == trainer.TrainConfig()
    assert all(preset.max_seconds == 0 for preset in trainer.PRESETS.values())  # a schedule that no clock changes


def test_tinystories_preset_has_the_papers_size():
    """About 56M parameters, head included."""
    run = SimpleNamespace(cfg=trainer.PRESETS["tinystories"], meta={"vocab_size": 50257})
    with torch.device("meta"):
        assert 53e6 < sum(trainer.Run.build(run).n_params()) < 59e6


# -----------------------------------------------------------------------------
# the model as nanoGPT's convention has it, so that torch's DistributedDataParallel can wrap it


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_model_called_is_its_logits_or_its_loss():
    """model(idx), the logits of the target after each token; model(idx, gold), the loss and its parts, with the
    weights that it was given."""
    model, (idx, gold) = tiny_model(target="lm_head", n_token=4), eight_windows()
    assert torch.equal(model(idx), model.target_logits(model.hidden(idx))) and model(idx).shape == (8, 6, 4)
    torch.testing.assert_close(model(idx), model.transformer.ln_f(run_blocks(model, idx)) @ model.lm_head.weight[:4].T,
                               rtol=0, atol=1e-12)
    for weights in ({}, dict(joint_weight=0.3, balance_weight=0.2)):
        (called, parts), (loss, same) = model(idx, gold, **weights), model.loss(idx, gold, **weights)
        assert torch.equal(called, loss) and all(torch.equal(part, same[name]) for name, part in parts.items())
    assert called != model(idx, gold)[0]


def run_blocks(model, idx):
    x = model.transformer.wte(idx) + model.transformer.wpe.weight[: idx.size(1)]
    for block in model.transformer.h:
        x = block(x)
    return x


WRAPPED = [("cp", 1, "marginal"), ("cp", 1, "lm_head"), ("cp", 4, "marginal"), ("cp", 4, "lm_head"),
           *((head, rank, "lm_head") for head in words("head") for rank in (1, 4))]


@pytest.mark.parametrize("freeze", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("head,rank,target", WRAPPED, ids=lambda x: str(x))
def test_every_head_trains_within_distributed_data_parallel(head, rank, target, freeze, one_rank):
    """Which raises in the second step if a parameter took no part in the first: it looks for none, as that costs time.
    Every parameter has a gradient, and the step of a model without it is the same."""
    idx, gold = eight_windows()
    steps = []
    for wrap in (True, False):
        run = tiny_run([(idx, gold)] * 3, head=head, rank=rank, target=target, balance_weight=0.05)
        if freeze:
            for name, p in run.model.named_parameters():
                p.requires_grad_(name.startswith("head."))
        if wrap:
            run.net = DistributedDataParallel(run.net)
            run.net(idx, gold)[0].backward()
            assert all(p.grad is not None for p in run.model.parameters() if p.requires_grad)
            run.optimizer.zero_grad()
        torch.manual_seed(1)  # masks draw the order of their places
        for _ in range(3):
            trainer.optimizer_step(run)
        steps.append(run.model.state_dict())
    assert all(torch.equal(tensor, steps[1][name]) for name, tensor in steps[0].items())


def test_a_parameter_without_a_part_is_an_error(one_rank):
    """Negative control of the test above."""
    run = tiny_run([eight_windows()] * 2)
    run.model.head.idle = torch.nn.Parameter(torch.zeros(3))
    run.net = DistributedDataParallel(run.net)
    trainer.optimizer_step(run)
    with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
        trainer.optimizer_step(run)


def test_gradients_travel_once_in_a_step(one_rank, monkeypatch):
    """Of three batches, only the last one's backward pass sends them."""
    idx, gold = eight_windows()
    run, sent = tiny_run([(idx, gold)] * 3, grad_accum=3), []
    run.net = DistributedDataParallel(run.net)

    def hook(state, bucket):
        sent.extend(bucket.parameters())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    run.net.register_comm_hook(None, hook)
    monkeypatch.setattr(trainer, "RANKS", 2)
    trainer.optimizer_step(run)
    assert sorted(map(id, sent)) == sorted(map(id, run.model.parameters()))


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
        small = dict(data_dir=".", n_layer=1, n_head=2, n_embd=16, block_size=16, n_future=3, batch_size=4,
                     max_iters=6, eval_interval=6, eval_windows=4, log_interval=1, device="cpu", seed=0)
        run = RunOfFive(trainer.TrainConfig(**{**small, **config}), {})
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
    # a half has 11 bits: 40 roundings of 5e-4, all of them the same way
    assert run.log[-1]["val"]["joint"] == pytest.approx(reference.log[-1]["val"]["joint"], rel=0.02)
    assert torch.load("out/laptop/ckpt.pt", weights_only=True)["scaler"] == {}  # the reference's, which came last


def test_auto_is_float32_on_a_cpu(data):
    """What half precision gains there is another machine's and another day's: nothing is tried."""
    assert trainer.pick_dtype("auto", CPU) == torch.float32 and isinstance(data().autocast, nullcontext)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["cp", "chain"])
def test_compiled_training_is_the_same(data, head):
    """--compile, for real: the losses of every step are those of the eager run, to rounding. (On all positions: compiled
    code may draw its share of them with other random numbers.)"""
    if not can_compile():
        pytest.skip("no C++ compiler, or a torch that compiles wrong gradients")
    fast, eager = (data(compile=c, head=head, joint_share=1.0) for c in (True, False))
    for a, b in zip(fast.log, eager.log):
        for name in {"loss", "joint"} & a.keys():  # six steps of roundings of 6e-8
            assert a[name] == pytest.approx(b[name], rel=1e-3)


def test_a_torch_that_compiles_wrong_gradients_is_refused(monkeypatch):
    """In one line, before anything is trained: it forgets repeated ids in an embedding's gradient on a CPU."""
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    with pytest.raises(BadInput, match="--compile gives wrong gradients on a CPU in torch 2.6"):
        trainer.compiled(torch.nn.Identity(), CPU)


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


# -----------------------------------------------------------------------------
# what has to arrive: weights of the loss, rates, seeds, the validation text


def test_every_step_follows_its_own_gradient_at_the_rate_of_all_groups(monkeypatch):
    """Guards gradients that pile up, a rate that some parameters never get, and a weight of the loss
    that is not passed on."""
    idx, gold = eight_windows()
    weights = dict(joint_weight=0.3, balance_weight=0.2)
    monkeypatch.setattr(trainer, "learning_rate", lambda progress, cfg: 1.0)
    run = tiny_run([(idx, gold)] * 2, target="lm_head", grad_clip=0.0, **weights)
    run.model.double()
    parameters = list(run.model.parameters())
    run.optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=0.0)
    for _ in range(2):
        before = [p.detach().clone() for p in parameters]
        grads = torch.autograd.grad(run.model.loss(idx, gold, **weights)[0], parameters)
        trainer.optimizer_step(run)
        for p, old, grad in zip(parameters, before, grads):
            torch.testing.assert_close(p.detach(), old - grad, rtol=0, atol=1e-12)


def test_validation_is_the_mean_over_the_windows_of_val_without_dropout(data):
    """Guards a run that validates on its own text, and a last, smaller batch that counts fully."""
    run = data(dropout=0.5, eval_windows=7, batch_size=3)
    assert run.model.training
    run.model.eval()
    one = trainer.Windows("val.bin", trainer.replace(run.cfg, batch_size=1), run.device)
    with torch.no_grad():
        losses = [run.model.loss(*batch)[1] for batch in one.fixed(7)]
    for name in ("next", "joint"):  # float32 sums of 7 numbers, in other orders
        mean = sum(parts[name].item() for parts in losses) / 7
        assert run.log[-1]["val"][name] == pytest.approx(mean, rel=1e-5)


def test_the_seed_decides_weights_and_windows():
    def first(seed):
        run = tiny_run(seed=seed)
        return run.model.lm_head.weight, run.windows.get_state()

    for a, again, other in zip(first(0), first(0), first(1)):
        assert torch.equal(a, again) and not torch.equal(a, other)


def test_settings_reach_the_optimizer_and_the_count_of_tokens(data):
    assert all(group["betas"] == (0.9, 0.5) for group in tiny_run(beta2=0.5).optimizer.param_groups)
    assert data(grad_accum=3).tokens_per_step == 4 * 16 * 3


def test_the_log_has_the_rate_of_each_step(data):
    run = data(lr=1.0, min_lr=0.1, warmup=0.0)
    rates = [line["lr"] for line in run.log if "lr" in line]
    assert rates == pytest.approx([trainer.learning_rate(i / 6, run.cfg) for i in range(6)])


def test_gradients_are_unscaled_before_they_are_clipped(data, monkeypatch):
    """Else a scaled gradient would be clipped to a step that is 65,536 times too small."""
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda *args: norms.append(clip(*args).item()))
    for dtype in ("float16", "float32"):
        data(dtype=dtype, max_iters=1)
    assert norms[0] == pytest.approx(norms[1], rel=0.1)  # half precision has 1e-3


def test_a_loss_that_is_no_number_ends_the_run_at_its_log_line(data, monkeypatch):
    step, steps = trainer.optimizer_step, []

    def diverging(run):
        loss, parts = step(run)
        steps.append(1)
        return loss * float("nan"), parts

    monkeypatch.setattr(trainer, "optimizer_step", diverging)
    with pytest.raises(BadInput, match="diverged"):
        data()
    assert len(steps) == 1


def test_the_report_has_bits_per_byte(capsys):
    trainer.report({"next": 2 * math.log(2)}, {"bytes_per_token": 4})
    assert "= 0.5000 bits per byte" in capsys.readouterr().out
