"""The benches: their arithmetic, their clocks, other people's decoders, and the cost of
training."""

import copy
import json
import sys
from functools import partial

import pytest
import torch
from helpers import run
from test_cp_head import HEADS, heads, tiny_model
from torch.utils.checkpoint import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import bench_speculative
import model as model_py
from bench_speculative import Bench, Laps, Mode, distinct, print_card, print_table, timed
from common import from_checkpoint
from decode import Greedy, Sampling, Stats, generate, generate_plain, make_sampler
from decoders.coupled import Coupled
from experiments import bench_training
from experiments.peers import add_beside, add_captured, add_transformers, add_trees, check_same_target, to_transformers
from heads import conditional, full, masks, medusa
from model import BadInput, head_class
from train import TrainConfig


def test_arithmetic():
    """Speed-up: the median of the rounds' ratios. Bound, equation (5): the same over the forward
    passes alone. A step's time: that of all forward passes, the three rounds' prefills among
    them."""
    def rounds(seconds, trunk=0.0):
        parts = dict(trunk=5 * trunk, target=0.5, draft=0.25, verify=0.15, rest=9.0)
        return {"seconds": seconds, "tokens": 5, "texts": [[1, 2, 3, 4, 5]], "parts": parts}

    found = {"plain": [rounds(s) for s in (5.0, 10.0, 20.0)], "speculative": [rounds(2.5, t) for t in (0.1, 0.1, 0.3)]}
    bench = Bench(tiny_model(target="lm_head"), [[1]], 5, 0)  # in three rounds 15 tokens, out of 10 forward passes
    plain = bench.row("plain", 0.0, found, Stats(12, 12))
    fast = bench.row("speculative", 0.0, found, Stats(7, 12, offered=[2, 0], accepted=[1, 0]))
    assert (plain["speedup"], plain["bound"], plain["tokens_per_second"]) == (1.0, None, 0.5)
    assert fast["speedup"] == 4.0 and fast["speedup_range"] == [2.0, 8.0] and fast["bound"] == pytest.approx(10)
    assert fast["acceptance"] == [0.5, None] and fast["tokens_per_second"] == 2.0 and fast["tokens_per_step"] == 12 / 7
    assert fast["step_ms"] == pytest.approx(750)
    assert fast["parts_ms"] == pytest.approx({"draft": 75, "trunk": 150, "target": 150, "verify": 45, "rest": 330})


def test_laps_add_up_by_part(monkeypatch):
    """A part lasts from the lap before it; the first lap only starts the clock."""
    times = iter([1.0, 3.0, 7.0, 8.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    laps = Laps(torch.device("cpu"))
    for part in ("rest", "draft", "trunk", "draft"):
        laps.lap(part)
    assert laps.seconds() == {"draft": 3.0, "trunk": 4.0}


@pytest.mark.parametrize("sampler", [Greedy(), Sampling()], ids=["greedy", "sampled"])
def test_clocks_stand_around_the_four_calls_of_a_step(sampler, monkeypatch):
    """Within the block, and no longer: model, head and sampler are as they were, also after an error."""
    model, laps = tiny_model(n_future=4), Laps(torch.device("cpu"))
    before = [dict(vars(owner)) for owner in (model, model.head, sampler)]
    with pytest.raises(KeyError), laps.around(model, sampler):
        stats = Stats()
        list(generate(model, [1], 4, sampler=sampler, stats=stats))
        parts = [part for part, _ in laps.moments if part != "rest"]
        assert parts[:2] == ["trunk", "target"] and stats.steps > 0  # the prefill's
        assert parts[2:] == stats.steps * ["draft", "trunk", "target", "verify"]
        raise KeyError
    assert [dict(vars(owner)) for owner in (model, model.head, sampler)] == before
    list(generate(model, [1], 4, sampler=sampler))
    assert len([part for part, _ in laps.moments if part != "rest"]) == len(parts)


def test_the_clock_runs_between_two_waits_for_the_device(monkeypatch):
    done = []
    monkeypatch.setattr(bench_speculative, "synchronize", lambda device: done.append("wait"))
    timed(lambda: done.append("work"), torch.device("cpu"))
    assert done == ["wait", "work", "wait"]


def test_the_prefills_token_is_none_of_a_step():
    """Of a kind of prompts: two prompts, ten tokens, so eight of them in four steps."""
    rounds = [{"kinds": {"code": dict(seconds=1.0, tokens=10, steps=4, prompts=2)}}]
    assert Bench.row_of_kind("code", rounds, rounds)["tokens_per_step"] == 2.0


def test_every_mode_is_warmed_up_once_with_the_longest_prompt(monkeypatch):
    bench, calls = Bench(tiny_model(target="lm_head"), [[1], [2, 3]], 4, 0), []
    decode = bench.decode

    def noted(name, temperature, seed, prompts=None, *rest, **options):
        calls.append((name, prompts))
        return decode(name, temperature, seed, prompts, *rest, **options)

    monkeypatch.setattr(bench, "decode", noted)
    bench.rounds(0.0, 2)
    assert calls[:2] == [(name, [[2, 3]]) for name in bench.modes] and len(calls) == 2 + 2 * 2


def test_another_script_adds_its_modes(capsys):
    """A decoder of one's own is a row like the others; its speed-up is over the mode that it names."""
    bench = Bench(tiny_model(target="lm_head"), [[1], [2, 3]], 6, 0)
    bench.modes["mine"] = Mode(generate_plain, bench.model)
    bench.modes["also mine"] = Mode(generate, bench.model, True, base="mine", has_parts=False)
    bench.about["mine"] = "a note"
    rows, texts = bench.rows(0.0, 2)
    assert [row["mode"] for row in rows] == ["plain", "speculative", "mine", "also mine"]
    assert [row.get("over") for row in rows] == [None, None, None, "mine"]
    assert "parts_ms" in rows[1] and "parts_ms" not in rows[3] and rows[3]["step_ms"] > 0
    assert all(bench.first_difference(texts, name) is None for name in texts)
    print_card({"target": "lm_head", **bench.about}, bench)
    print_table(rows)
    out = capsys.readouterr().out
    assert "a note" in out and out.count("its speed-up is over mine") == 2


def test_the_parts_of_a_step_are_less_than_the_whole():
    bench = Bench(tiny_model(block_size=16, n_future=4), [[1], [2, 3]], 12, 0)
    for temperature in (0.0, 1.0):
        rounds, stats = bench.rounds(temperature, 2)
        for r in rounds["speculative"]:
            assert set(r["parts"]) == {"rest", "draft", "trunk", "target", "verify"}
            assert 0 < sum(r["parts"].values()) < r["seconds"] and r["tokens"] == 24
        assert stats["speculative"].steps > 0 and not rounds["plain"][0]["parts"]


def test_distinct_runs():
    """A loop of 8 tokens has 8 different runs however long it is; a text that never repeats itself
    has 1."""
    assert distinct([list(range(8)) * 10]) == 8 / 73 and distinct([list(range(50))]) == 1.0 == distinct([[1]])


def test_it_finds_where_texts_part():
    """The first difference, and the gap of the two top logits there, padded ids left out."""
    model = tiny_model(n_token=4)
    bench = Bench(model, [[1], [2]], 3, 0)
    assert bench.first_difference({"plain": [[0, 1, 2], [3]], "speculative": [[0, 1, 2], [3]]}) is None
    part = bench.first_difference({"plain": [[0, 1, 2], [3, 1, 1]], "speculative": [[0, 1, 2], [3, 2, 1]]})
    logits = model(torch.tensor([[2, 3]]))[0, -1].sort().values
    assert (part["prompt"], part["token"]) == (1, 1) and part["logit_gap"] == (logits[-1] - logits[-2]).item()


# -----------------------------------------------------------------------------
# a step waits for the device once


WAITS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__")
SIZED_BY_DATA = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique",
                 "unique", "repeat_interleave.Tensor")


class Waits(TorchDispatchMode):
    """Counts, within the block, what makes Python wait for a GPU: values that become Python's, and operators whose
    result has a size that depends on values. Of nested ones, the outermost counts."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.n, self.inside = 0, False
        for name in WAITS:
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))

    def counted(self, method):
        def call(*args, **options):
            if self.inside:
                return method(*args, **options)
            self.n, self.inside = self.n + 1, True
            try:
                return method(*args, **options)
            finally:
                self.inside = False

        return call

    def __torch_dispatch__(self, function, types, args=(), options=None):
        name, options = function.name(), options or {}
        places = args[1] if name.startswith(("aten::index.", "aten::index_put")) else ()
        waits = any(x is not None and x.dtype == torch.bool for x in places)  # a mask as index
        waits |= name.startswith(tuple(f"aten::{op}" for op in SIZED_BY_DATA)) and "output_size" not in options
        return (self.counted(function) if waits else function)(*args, **options)


def waits_of(monkeypatch, decoder, model, sampler):
    """(how often a decoder waits, its forward passes) for a text within one window."""
    stats = Stats()
    with monkeypatch.context() as patch, Waits(patch) as waits:
        text = list(decoder(model, [1, 2], 25, sampler=sampler, stats=stats))
    assert len(text) == 25
    return waits.n, stats.steps + 1  # the prefill


@heads
@pytest.mark.parametrize("rank", [1, 2])
def test_a_step_waits_for_the_device_once(head, rank, monkeypatch):
    """For its tokens, whatever head drafts, however they are drawn; mask_linear also looks whether there is anything to
    draft from. Guards a GPU that idles while Python looks at its numbers one by one."""
    model = tiny_model(head=head, rank=rank, target="lm_head", block_size=64, n_future=4)
    for sampler in (Sampling(), Sampling(0.7, top_k=3, top_p=0.9), Greedy()):
        for decoder in (generate, generate_plain):
            n, passes = waits_of(monkeypatch, decoder, model, sampler)
            assert n == passes + (passes - 1 if head == "mask_linear" and decoder is generate else 0)


def test_waits_are_counted(monkeypatch):
    """Negative controls: coupled noise looks at each number that it accepts; and every way to wait that is named."""
    n, passes = waits_of(monkeypatch, generate, tiny_model(block_size=64), Coupled(0))
    assert n == 2 * passes - 1
    x = torch.tensor([1.0])
    ways = (lambda: x.item(), lambda: x.tolist(), lambda: x.cpu(), lambda: bool(x), lambda: int(x), lambda: float(x),
            lambda: [0, 1, 2][x.long()], lambda: x[x > 0], lambda: x.nonzero(), lambda: torch.equal(x, x),
            lambda: 1.0 in x, lambda: x.numpy(), lambda: x.masked_select(x > 0), lambda: torch.unique(x),
            lambda: x.repeat_interleave(torch.tensor([2])))
    for way in ways:
        with monkeypatch.context() as patch, Waits(patch) as waits:
            way()
        assert waits.n >= 1
    with monkeypatch.context() as patch, Waits(patch) as waits:
        x[:1].clamp(0)[torch.zeros(1, dtype=torch.long)].where(x > 0, x)
    assert waits.n == 0


# -----------------------------------------------------------------------------
# other heads and our other decoders


def test_heads_are_timed_side_by_side():
    """--beside: other heads on one trunk in the same rounds, each with its own rows; one line for
    another trunk, a target that is the head's own, and a checkpoint without a head."""
    model = tiny_model(target="lm_head").float()
    other = from_checkpoint(model.to_checkpoint(), rank=3, n_future=5, head="chain").eval()
    model, other = model.double(), other.double()
    bench = Bench(model, [[1, 2]], 12, 0)
    add_beside(bench, {"out/b": other})
    for temperature in (0.0, 1.0):
        rows, texts = bench.rows(temperature, 2)
        assert [row["mode"] for row in rows] == ["plain", "speculative", "speculative, out/b"]
        found = [(row["n_future"], row["rank"], row["head"]) for row in rows[1:]]
        assert found == [(3, 2, "cp"), (5, 3, "chain")] and "rank" not in rows[0]
        assert [len(row["acceptance"]) for row in rows[1:]] == [2, 4]
        assert all(row["bound"] > 0 and row["parts_ms"]["trunk"] > 0 for row in rows[1:])
        if temperature == 0:
            assert bench.first_difference(texts, "speculative, out/b") is None
    print_table(rows)
    check_same_target(model, other, "out/b")
    one_weight = copy.deepcopy(other)
    with torch.no_grad():
        one_weight.transformer.h[0].mlp.c_fc.weight[0, 0] += 1
    for wrong in (one_weight, tiny_model(target="marginal"), tiny_model(target="lm_head", n_future=1),
                  tiny_model(target="lm_head", n_layer=1), tiny_model(target="lm_head", n_head=1),
                  tiny_model(target="lm_head", n_token=4), tiny_model(target="lm_head", bias=not model.config.bias)):
        with pytest.raises(BadInput, match="^--beside: out/b is not another head on the very trunk of --out_dir"):
            check_same_target(model, wrong, "out/b")
    with pytest.raises(BadInput, match="^--beside needs a model with target lm_head: with another,"):
        check_same_target(tiny_model(target="marginal"), other, "out/b")


def test_trees_and_captured_steps_beside_the_others(capsys):
    """A row for every head, compared with the plain decoding that is its like; and the card says so. What some head
    cannot do shows before anything is measured."""
    model = tiny_model(target="lm_head", n_future=4, block_size=40).float()
    other = from_checkpoint(model.to_checkpoint(), rank=3, n_future=5, head="chain").eval().double()
    model = model.double()
    bench = Bench(model, [[1, 2], [3]], 12, 0)
    add_beside(bench, {"out/b": other})
    add_trees(bench, [4])
    add_captured(bench, False)
    rows, texts = bench.rows(0.0, 2)
    heads = ["speculative", "speculative, out/b"]
    assert [row["mode"] for row in rows] == ["plain", *heads, *(f"{head}, tree of 4" for head in heads), "plain, captured",
                                             *(f"{head}, captured" for head in heads)]
    assert [row.get("over") for row in rows] == 6 * [None] + 2 * ["plain, captured"]
    assert all("step_ms" in row and row["bound"] is None for row in rows[3:5] + rows[6:])
    assert all(own == texts["plain"] for own in texts.values())
    rounds = {"plain": [{"seconds": 8.0, "tokens": 1, "parts": {}, "texts": [], "kinds": {}}] * 2}
    rounds |= {mode: [dict(rounds["plain"][0], seconds=x)] * 2 for mode, x in
               (("plain, captured", 4.0), ("speculative, captured", 1.0))}
    assert bench.row("speculative, captured", 0.0, rounds, Stats(1, 1, [], [], [0, 1]))["speedup"] == 4.0
    print_card({"target": "lm_head"}, bench)
    assert "speculative, captured: its speed-up is over plain, captured" in capsys.readouterr().out
    print_table(rows)
    with pytest.raises(BadInput, match="from 1 to 24 drafts"):
        add_trees(bench, [25])


# -----------------------------------------------------------------------------
# other people's decoders


@pytest.mark.parametrize("bias", [True, False])
def test_peers_have_our_weights(bias):
    """transformers' GPT-2 gives our logits, without the padded tokens, and its greedy text is ours,
    with and without its prompt lookup, which may guess past the block. Its sampled texts differ
    from prompt to prompt."""
    pytest.importorskip("transformers")
    model = tiny_model(target="lm_head", vocab_size=12, n_token=9, block_size=32, bias=bias)
    peer, idx = to_transformers(model), torch.randint(9, (2, 10))
    with torch.no_grad():
        torch.testing.assert_close(peer(idx).logits, model(idx), rtol=0, atol=1e-12)
    bench = Bench(model, [[1, 2] * 6, [3]], 20, 0)  # up to the last position of the block
    add_transformers(bench)
    assert list(bench.modes) == ["plain", "speculative", "no_cache", "transformers", "transformers_prompt_lookup"]
    assert bench.about["transformers_kernels"] in ("default", "without oneDNN")
    texts = {mode: bench.decode(mode, 0.0, 0) for mode in bench.modes}
    assert all(bench.first_difference(texts, mode) is None for mode in bench.modes)
    for mode in ("transformers", "transformers_prompt_lookup"):
        sampled = bench.decode(mode, 1.0, 0)
        assert [len(text) for text in sampled] == [20, 20] and sampled != bench.decode(mode, 1.0, 1)
        assert sampled == bench.decode(mode, 1.0, 0)
    rows = {row["mode"]: row for row in bench.rows(1.0, 1)[0]}
    assert rows["transformers"]["tokens_per_step"] is None and rows["transformers"]["speedup"] > 0
    print_table(list(rows.values()))
    json.dumps(list(rows.values()), allow_nan=False)


def test_peers_are_refused_in_one_line(monkeypatch):
    """Without transformers, and for a target that no other decoder knows."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BadInput, match="^--transformers needs it: python -m pip install transformers$"):
        to_transformers(tiny_model(target="lm_head"))
    with pytest.raises(BadInput, match="^--transformers needs a model with target lm_head"):
        to_transformers(tiny_model(target="marginal"))
    with pytest.raises(BadInput, match="window does not move on, so --max_new_tokens must be at most 10"):
        add_transformers(Bench(tiny_model(target="lm_head", block_size=12), [[1], [1, 2]], 11, 0))


# -----------------------------------------------------------------------------
# bench_training.py


def test_nanogpts_algorithm_is_ours_with_one_future_token():
    """The rival in bench_training.py computes the same loss and gradients."""
    model, idx = tiny_model(n_future=1, rank=1), torch.randint(5, (2, 9))
    both = model.loss, partial(bench_training.nanogpt_loss, model)
    losses = [loss(idx[:, :-1], idx[:, 1:, None])[0] for loss in both]
    ours, theirs = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-12)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@heads
def test_every_head_of_the_registry_makes_a_step(head):
    """Random tokens through train.py's own step; the products that torch counts hold those of every
    map."""
    cfg = TrainConfig(block_size=2, n_layer=2, n_head=2, n_embd=16, n_future=3, rank=2, batch_size=4, joint_share=1.0,
                      head=head, device="cpu")
    run, step = bench_training.stepper(cfg, 64)
    with FlopCounterMode(display=False) as counter:
        step()
    V, C = 64, 16  # 8 positions, 6 factors; forward and backward take 6 flops a weight
    assert counter.get_total_flops() > 6 * 8 * 6 * (C * V if head == "full" else C * V + C * C)
    assert type(run.model.head) is head_class(head)


@pytest.mark.parametrize("head", HEADS)
def test_all_logits_at_once_are_the_same_loss(head, monkeypatch):
    """And the same gradients, though no chunk is left."""
    losses, grads = [], []
    for at_once in (False, True):
        if at_once:
            for module in (model_py, conditional, full, medusa, masks):
                monkeypatch.setattr(module, "gold_log_prob", bench_training.all_logits)
        monkeypatch.setattr(model_py, "checkpoint", lambda *args, **options: pytest.fail("a chunk") if at_once else
                            checkpoint(*args, **options))
        model = tiny_model(head=head, target="lm_head").train()
        torch.manual_seed(1)
        loss = model.loss(torch.randint(5, (3, 6)), torch.randint(5, (3, 6, 3)))[0]
        loss.backward()
        losses.append(loss.detach())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


ROWS = ("bench_training.py --device cpu --n_layer 1 --n_embd 256 --n_head 2 --block_size 4 --batch_size 1 "
        "--futures 3 --ranks 2 --vocab_sizes").split()


def in_this_process(cfg, *args):
    return bench_training.measure(TrainConfig(**cfg), *args)


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_row_for_each_cell(apart, monkeypatch, capsys):
    """Small shapes: rows of n = 1 in both algorithms and of the head, with their JSON. In processes of
    their own memory holds 16 bytes per parameter at least, AdamW's state among them, and what does not
    fit into it is said."""
    if not apart:
        monkeypatch.setattr(bench_training, "measure_apart", in_this_process)
    V = 8191 if apart else 63
    monkeypatch.setattr(sys, "argv", [*ROWS, str(V)])
    bench_training.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["nanogpt"], row["n_future"], row["rank"]) for row in rows] == [
        (True, 1, 1), (False, 1, 1), (False, 3, 2)]
    assert all(row["seconds"] > 0 and row["ratio"] > 0 and row["flops"] > 0 for row in rows)
    assert [row["head_parameters"] > 0 for row in rows] == [False, False, True]
    for row in rows:
        assert row["trunk_parameters"] > (V + 1) * 256  # padded, as train.py does
        assert not apart or not row["bytes"] or row["bytes"] > 15 * (row["trunk_parameters"] + row["head_parameters"])
    if apart:
        bench_training.benchmark(TrainConfig(n_embd=256, n_head=2, device="cpu"), [(2**45, 3, 2, False, False)])
        assert "not enough memory" in capsys.readouterr().out


def test_a_bad_cell_is_refused_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*ROWS, "64", "--head", "mask", "--target", "marginal"])
    with pytest.raises(BadInput, match="needs --target lm_head"):
        bench_training.main()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys, "argv", [*ROWS, "64", "--n_head", "3"])
    with pytest.raises(BadInput, match=r"^n_embd 256 is not divisible by n_head 3$"):
        bench_training.main()


# -----------------------------------------------------------------------------
# the flags


def test_temperatures_and_cuts_are_what_the_user_asks_for(toy, monkeypatch):
    """A row for each mode at each temperature, by samplers with the cuts; without temperature 0
    there is no greedy text to compare."""
    made = []

    def noted(*args, **options):
        made.append((args[0], options["top_k"], options["top_p"]))
        return make_sampler(*args, **options)

    monkeypatch.setattr(bench_speculative, "make_sampler", noted)
    out = run(toy, "bench_speculative", "--max_new_tokens", 4, "--rounds", 5, "--threads", 1,
              "--temperatures", 0.7, 1, "--top_p", 0.9)
    found = json.loads(out.splitlines()[-1])
    assert [(row["mode"], row["temperature"]) for row in found["rows"]] == [
        ("plain", 0.7), ("speculative", 0.7), ("plain", 1.0), ("speculative", 1.0)]
    assert set(made) == {(0.7, None, 0.9), (1.0, None, 0.9)}
    assert found["card"]["top_p"] == 0.9 and "top_k" not in found["card"]
    assert "first_difference" not in found["card"] and "temperature 0" not in out
