"""The decoders' parts: warp, the draws, verification in floating point, samplers, windows,
statistics, bad calls."""

import copy
import itertools
import math
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from test_cp_head import HEADS, MASKS, chi_square_p_value, close, counting_model, heads, tiny_model

import decode
from decode import (Greedy, Sampling, Stats, categorical, generate, generate_oracle, generate_plain,
                    keep_probability, make_sampler, verify, warp, window_ids, window_start)
from decoders import batched, captured, coupled, draft_tree
from decoders.coupled import Coupled
from decoders.draft_length import collect, fit, generate_unverified
from model import BadInput, GPTConfig

DECODERS = (generate_oracle, generate_plain, generate)
MODES = [*DECODERS, *(mode.generate for mode in (batched, captured, coupled, draft_tree))]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(generator):
    """What `categorical` and `verify` draw by."""
    return partial(torch.rand, generator=generator)


# -----------------------------------------------------------------------------
# warp and the draws


def test_warp_matches_its_definition():
    """Temperature, top-k and top-p against a slow loop."""
    torch.manual_seed(0)
    logits = torch.randn(7, 10, dtype=torch.float64)
    for temperature, top_k, top_p in itertools.product((0.5, 1.0, 2.0), (None, 1, 3, 20), (None, 0.1, 0.6, 1.0)):
        for row, p in zip(logits, warp(logits, temperature, top_k, top_p)):
            order = sorted(range(10), key=lambda i: -row[i])[: top_k or 10]
            weights = {i: torch.exp(row[i] / temperature).item() for i in order}
            total, kept, mass = sum(weights.values()), {}, 0.0
            for i in order:
                if top_p is not None and mass >= top_p:
                    break
                kept[i] = weights[i]
                mass += weights[i] / total
            expected = torch.tensor([kept.get(i, 0.0) / sum(kept.values()) for i in range(10)], dtype=torch.float64)
            torch.testing.assert_close(p, expected, rtol=0, atol=1e-12)


def test_warp_widens_half_precision():
    assert warp(torch.randn(5).bfloat16()).dtype == torch.float32
    assert warp(torch.randn(5).double()).dtype == torch.float64


def test_draws_follow_the_row_and_never_take_a_zero():
    """Chi-square of 200,000 draws; tokens of probability 0 at the beginning, inside and at the end
    never come out. Chance of a false alarm: 1e-9."""
    p = torch.tensor([0.0, 0.1, 0.0, 0.5, 0.15, 0.25, 0.0])
    tokens = categorical(3 * p.expand(200_000, 7), numbers(seeded())).tolist()
    assert {0, 2, 6}.isdisjoint(tokens)
    assert chi_square_p_value(tokens, dict(enumerate(p.tolist()))) > 1e-9


def test_a_random_number_of_0_takes_no_token_of_probability_0():
    """torch.rand may give exactly 0, too seldom for any chi-square."""
    def zeros(shape, dtype, device):
        return torch.zeros(shape, dtype=dtype)

    assert categorical(torch.tensor([0.0, 0.0, 1.0, 0.0]), zeros).item() == 2


def test_of_equal_logits_the_first_is_drawn_and_the_first_is_kept():
    logits = torch.tensor([[[1.0, 3.0, 3.0], [2.0, 0.0, 2.0]]])
    tokens, _ = Greedy().draw(logits)
    n_accepted, token = Greedy().verify(logits, None, tokens[:, :1])
    assert (tokens.tolist(), n_accepted.tolist(), token.tolist()) == ([[1, 0]], [[1]], [[0]])


def test_an_unlikely_token_can_be_drawn():
    """Sums in float64 see a token of 1e-9 after half of the mass."""
    p = torch.tensor([0.5, 1e-9, 0.5])
    u = (0.5 + 0.5e-9) / (1 + 1e-9)
    assert categorical(p, lambda *args, dtype, **options: torch.tensor([u], dtype=dtype)) == 1


def test_a_coin_of_probability_0_never_says_yes():
    assert not decode.bernoulli(torch.zeros(3), lambda *args, **options: torch.zeros(3)).any()


def test_top_p_stops_where_the_share_is_reached_exactly():
    p = warp(torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log(), top_p=0.5)
    assert p.tolist() == [1, 0, 0, 0]


def test_draws_stay_in_the_vocabulary():
    """Whatever the row holds: NaN, infinity, nothing. No row at all gives no token."""
    for value in (float("nan"), float("inf"), 0.0):
        assert 0 <= categorical(torch.full((1, 5), value)).item() < 5
    assert categorical(torch.empty(0, 5)).shape == (0,)


# -----------------------------------------------------------------------------
# verification in floating point


def test_verify_follows_p_with_real_random_numbers():
    """20,000 verifications, chi-square on the first token and on the bonus. Chance of a false
    alarm: 1e-9."""
    uniform = numbers(seeded())
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]), torch.tensor([[0.6, 0.1, 0.3]])
    first, bonus = [], []
    for _ in range(20_000):
        drafted = categorical(q, uniform)
        n_accepted, token = verify(p, q, drafted, uniform)
        first.append((drafted if n_accepted else token).item())
        bonus += token.tolist() if n_accepted else []
    assert chi_square_p_value(first, dict(enumerate(p[0].tolist()))) > 1e-9
    assert chi_square_p_value(bonus, dict(enumerate(p[1].tolist()))) > 1e-9


def test_verify_never_draws_from_an_empty_row(monkeypatch):
    """p = q leaves no residual, and all drafts are kept. Where rounding lets a coin fail all the
    same, the token is drawn from p: from an empty row it would be the last id, of probability 0."""
    p, drafted = torch.tensor([[0.3, 0.7, 0.0], [0.6, 0.4, 0.0]]), torch.tensor([1])
    q = p[:1]
    for seed in range(20):
        n_accepted, token = verify(p, q, drafted, numbers(seeded(seed)))
        assert n_accepted.item() == 1 and token.item() in (0, 1)
    monkeypatch.setattr(decode, "bernoulli", lambda p, uniform: torch.zeros_like(p, dtype=torch.bool))
    assert {verify(p, q, drafted, numbers(seeded(seed)))[1].item() for seed in range(20)} == {0, 1}


def test_verify_survives_tiny_probabilities():
    """p / q may overflow, and then meet a 0: no NaN, and nothing of probability 0 comes out. A
    ratio of 1e6 makes up for one of 1e-6, and no more than that."""
    p = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    q = torch.tensor([[1.0, 0.0], [1e-40, 1.0]])
    assert keep_probability(p, q, torch.tensor([0, 0])).flatten().tolist() == [1.0, 0.0, 0.0]
    assert keep_probability(p[1:], q[1:], torch.tensor([0])).isfinite().all()  # the overflow alone
    assert not decode.bernoulli(torch.full((9,), torch.nan)).any()
    n_accepted, token = verify(p, q, torch.tensor([0, 0]))
    assert (n_accepted.item(), token.item()) == (0, 1)
    rare = torch.tensor([1e-6, 1 - 1e-6])
    keep = keep_probability(torch.stack((rare, 1 - rare, rare)), torch.stack((1 - rare, rare)),
                            torch.tensor([0, 0]))
    assert keep.flatten().tolist() == pytest.approx([1.0, 1e-6, 1.0])


@heads
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("sampler", [Sampling, partial(Sampling, 0.7), Greedy])
def test_drafts_are_tokens_whatever_the_padding_has(sampler, rank, head):
    """A head that gives all its mass to ids that are no tokens drafts tokens all the same, from
    rows of q that sum to 1 without them."""
    model = tiny_model(rank=rank, head=head, vocab_size=6, n_token=4, target="lm_head").float()
    with torch.no_grad():
        if head == "full":
            model.head.maps[:, :, 4:] = 1000 * torch.ones(8)
        model.lm_head.weight[4:] = 1000 * torch.ones(8)
        e = model.split(model.hidden(torch.tensor([[1, 2]]), model.new_cache()))[1][:, -1]
        x, q = model.head.draft(e, torch.tensor([1]), 2, sampler(), model.unembed)
    assert (x < 4).all() and x.shape == (1, 2)
    if q is not None:
        assert q.shape == (1, 2, 4)
        torch.testing.assert_close(q.sum(-1), torch.ones(1, 2))


# -----------------------------------------------------------------------------
# what is not finite, and other bad calls


def test_nan_and_infinite_logits_are_refused_by_every_decoder_and_sampler():
    """One NaN in the trunk, or weights that overflow in half precision: BadInput, a ValueError,
    that names the cause and float32. Guards token 0 for ever, and an id outside the vocabulary."""
    damaged = tiny_model(target="lm_head")
    damaged.transformer.h[0].mlp.c_fc.weight.data[0, 0] = float("nan")
    overflowing = tiny_model(target="lm_head").half()
    overflowing.transformer.ln_f.weight.data.fill_(6e4)
    for model, decoder in itertools.product((damaged, overflowing), DECODERS):
        for sampler in (Greedy(), Sampling(generator=seeded()), Coupled(0)):
            with pytest.raises(ValueError, match="NaN or infinite logits.*float32"):
                list(decoder(model, [1, 2], 5, sampler=sampler))


@pytest.mark.parametrize("head", [head for head in HEADS if head not in MASKS])  # theirs are in the pass
@pytest.mark.parametrize("rank", [1, 2])
def test_a_head_that_gives_nan_never_changes_a_text(head, rank):
    """Samplers that compare tokens write the target's text all the same; one that needs q
    refuses."""
    model = tiny_model(target="lm_head", head=head, rank=rank)
    expected = [list(generate_oracle(model, [1, 2], 12, sampler=sampler)) for sampler in (Greedy(), Coupled(3))]
    model.head.maps.data.fill_(float("nan"))
    assert [list(generate(model, [1, 2], 12, sampler=s)) for s in (Greedy(), Coupled(3))] == expected
    with pytest.raises(BadInput, match="NaN or infinite"):
        list(generate(model, [1, 2], 12, sampler=Sampling(generator=seeded())))


@pytest.mark.parametrize("head", ["cp", "chain", "hmm"])
@pytest.mark.parametrize("rank", [1, 2])
def test_drafts_are_drawn_by_the_samplers_own_rule(rank, head):
    """Every sampler that is not plain gets the whole row of a draft, P(. | the drafts before), and
    q is what it says it drew from: also a subclass, one with a `warp` of its own, and Coupled."""
    class Own(Sampling):
        def draw(self, logits):
            return logits.argmax(-1), logits.softmax(-1)

    warped = Sampling(0.9)
    warped.warp = lambda logits: F.one_hot(logits.argmax(-1), 7).to(logits.dtype)
    model = tiny_model(head=head, rank=rank, target="lm_head", vocab_size=7)
    e, x1, W = torch.randn(1, 8, dtype=torch.float64), torch.tensor([2]), model.unembed.detach()
    with torch.no_grad():
        for sampler in (Own(), warped, Greedy()):
            x, _ = model.head.draft(e, x1, 2, sampler, W)
            rows = model.head.rows(e, torch.tensor([[2, x[0, 0]]]), W)
            assert x.tolist() == rows.argmax(-1).tolist()
        for seed in range(20):
            x, q = model.head.draft(e, x1, 2, Coupled(seed), W)
            again = Coupled(seed)
            rows = model.head.rows(e, torch.tensor([[2, x[0, 0]]]), W)
            assert q is None and torch.equal(again.draw(rows)[0], x)
            for sampler in (Sampling(0.7, 2, generator=seeded(seed)), Sampling(top_p=0.5, generator=seeded(seed))):
                x, q = model.head.draft(e, x1, 2, sampler, W)
                rows = model.head.rows(e, torch.tensor([[2, x[0, 0]]]), W)
                torch.testing.assert_close(q, sampler.warp(rows))
                assert (q.gather(-1, x.unsqueeze(-1)) > 0).all()


@pytest.mark.parametrize("options", [
    dict(temperature=float("nan")), dict(temperature=-1.0), dict(temperature=1e-300), dict(temperature=1e300),
    dict(top_p=0.0), dict(top_p=-0.5), dict(top_p=float("nan")), dict(top_p=1.5), dict(top_k=0),
    dict(temperature=0, top_p=0.0), dict(temperature="1"), dict(temperature=None), dict(top_k=3.0), dict(top_k="3"),
    dict(top_k=True), dict(top_p="0.5"), dict(generator=0), dict(generator=1337), dict(temperature=0, generator=0)],
    ids=str)
def test_samplers_refuse_what_is_no_setting(options):
    with pytest.raises(ValueError, match=[*options][-1]):
        make_sampler(**options)


BAD_CALLS = [
    (dict(prompt=None), "prompt"), (dict(prompt="12"), "prompt"), (dict(prompt=[True, False]), "prompt"),
    (dict(prompt=[1.0]), "prompt"), (dict(prompt=[5]), "prompt"), (dict(prompt={1: 2}), "prompt"),
    *((dict(max_new_tokens=n), "max_new_tokens must be a whole number") for n in (1.5, 3.0, "10", None, -1, True, [3])),
    *((dict(sampler=sampler), "sampler|Sampling") for sampler in (Greedy, Sampling, "greedy", 0, 0.7))]
ALL = dict(oracle=generate_oracle, plain=generate_plain, speculative=generate, batched=batched.generate,
           captured=captured.generate, draft_tree=draft_tree.generate, coupled=coupled.generate,
           unverified=partial(generate_unverified, clp=None, tau=0.5))


@pytest.mark.parametrize("decoder", ALL)
def test_a_wrong_argument_is_a_value_error_at_the_call(decoder):
    """Not at the first token, nor one of torch's or Python's from deep within; and nothing is
    changed: a sampler's class once lost its verify."""
    model, before = tiny_model(), [(one.draw, one.verify) for one in (Greedy, Sampling)]
    for change, message in BAD_CALLS:
        with pytest.raises(ValueError, match=message):
            ALL[decoder](**{"model": model, "prompt": [1, 2], "max_new_tokens": 3, **change})
    assert [(one.draw, one.verify) for one in (Greedy, Sampling)] == before
    with pytest.raises(ValueError, match="eval"):
        ALL[decoder](model.train(), [1, 2], 3)


def test_whole_numbers_of_numpy_are_whole_numbers():
    model, prompt, options = tiny_model(), np.array([1, 2]), dict(top_k=np.int64(3), temperature=np.float32(0.5))
    texts = [list(decoder(model, list(prompt), np.int64(4), sampler=Sampling(**options))) for decoder in DECODERS]
    assert [len(text) for text in texts] == [4, 4, 4] and type(texts[0][0]) is int


@pytest.mark.parametrize("name,value", [
    ("bias", "no"), ("bias", None), ("bias", 0), ("n_layer", True), ("n_future", 2.0), ("rank", "4"),
    ("n_token", True), ("target", True), ("head", None)])
def test_a_config_refuses_what_is_no_setting(name, value):
    with pytest.raises(BadInput, match=name):
        GPTConfig(**{name: value})


def test_rows_that_the_drafts_were_not_drawn_from_are_refused():
    """A head, a sampler or a draft= of somebody else's whose q is no distribution would change the
    text's: with the unnormalised rows here by far. In every row of a batch, whatever the others'
    samplers are."""
    class Own(Sampling):
        def draw(self, logits):
            tokens, q = super().draw(logits)
            return tokens, 0.9 * q

    model = tiny_model()
    for decoder in (generate, batched.generate):
        with pytest.raises(BadInput, match="rows q of the draft do not sum to 1"):
            list(decoder(model, [1, 2], 5, sampler=Own()))
    for samplers in ([Greedy(), Sampling(), Coupled(0)], [Greedy(), Own(), Coupled(0)]):
        def write():
            return batched.generate_batch(model, [[1], [2], [3]], 5, samplers=samplers)
        if type(samplers[1]) is Own:
            with pytest.raises(BadInput, match="rows q of the draft do not sum to 1"):
                write()
        else:
            assert [len(text) for text in write()] == [5, 5, 5]
    with pytest.raises(BadInput, match="rows q of the draft do not sum to 1"):
        list(generate(model, [1, 2], 5, draft=lambda *args: (model.head.draft(*args)[0], torch.zeros(1, 2, 5))))


def test_bad_calls_are_refused():
    model = tiny_model(n_token=4)
    for prompt in ([], [[1, 2]], torch.tensor([[1]]), [4], [-1]):
        with pytest.raises(ValueError, match="prompt"):
            list(generate_plain(model, prompt, 1))
    with pytest.raises(ValueError, match="n_future = 1"):
        generate(tiny_model(n_future=1), [1], 1)
    with pytest.raises(ValueError, match="eval"):
        list(generate_oracle(model.train(), [1], 1))


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "1", None, True])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(BadInput, match="seed must be"):
        Coupled(seed)


def test_a_captured_text_takes_no_seed_for_a_generator():
    """0 was ignored silently."""
    steps = captured.Captured(tiny_model())
    for generator in (0, 1337, "cpu"):
        with pytest.raises(BadInput, match="generator must be a torch.Generator"):
            steps.generate([1], 3, generator=generator)


# -----------------------------------------------------------------------------
# texts beside one another, and what stands around a call


@heads
def test_texts_of_one_model_do_not_meet(head):
    """Two generators in turn, a pass of the model between two tokens, and texts in other threads:
    each text is what it is alone. What a text needs is in its own cache, and nothing hangs on the
    model or its layers."""
    model = tiny_model(head=head, target="lm_head", block_size=16)
    prompts = [[1, 2, x] for x in range(3)]
    expected = [list(generate_oracle(model, prompt, 24, sampler=Greedy())) for prompt in prompts]
    going, found = [generate(model, prompt, 24, sampler=Greedy()) for prompt in prompts], [[], [], []]
    for _ in range(24):
        for text, one in zip(found, going):
            text.append(next(one))
            with torch.no_grad():
                model(torch.tensor([[4, 3, 2, 1]]))
    assert found == expected
    with ThreadPoolExecutor(4) as threads:
        write = partial(generate, model, max_new_tokens=24, sampler=Greedy())
        found = list(threads.map(lambda prompt: list(write(prompt)), 4 * prompts))
    assert found == 4 * expected


@heads
def test_a_model_can_be_copied_after_training_and_after_decoding(head):
    """No tensor of a pass, with its graph, is left in it."""
    model = tiny_model(head=head, target="lm_head")
    model.loss(torch.randint(5, (2, 4)), torch.randint(5, (2, 4, 3)))[0].backward()
    expected = list(generate(model, [1, 2], 12, sampler=Greedy()))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(generate(copied, [1, 2], 12, sampler=Greedy())) == expected


@pytest.mark.parametrize("head", [head for head in HEADS if head not in MASKS])
def test_autocast_changes_no_text(head):
    """Around the call, around the tokens, or around both: rounded rows are not what the drafts were
    drawn from, and a cache would hold two types."""
    model = tiny_model(head=head, target="lm_head", block_size=64).float()
    rounded = partial(torch.autocast, "cpu", torch.bfloat16)
    decoders = {name: decoder for name, decoder in ALL.items() if name != "unverified"
                and not (name == "draft_tree" and head.startswith("conditional"))}
    for sampler, (name, decoder) in itertools.product((Sampling, Greedy), decoders.items()):
        def write(calls, steps):
            own = sampler(generator=seeded(3)) if sampler is Sampling else Greedy()
            torch.manual_seed(0)
            with calls():
                text = decoder(model, [1, 2], 16, sampler=own)
            with steps():
                return list(text)

        expected = write(nullcontext, nullcontext)
        for around in ((rounded, rounded), (rounded, nullcontext), (nullcontext, rounded)):
            assert write(*around) == expected, name
        text = decoder(model, [1, 2], 16, sampler=Greedy())
        next(text)
        assert not torch.is_autocast_enabled("cpu")  # between two tokens it is the caller's
        with rounded():
            next(text)
            assert torch.is_autocast_enabled("cpu")


# -----------------------------------------------------------------------------
# windows, seeds, statistics


def test_window_is_a_function_of_the_position():
    """It holds every token until the block is full, then between half a block and a block, and
    never moves back."""
    for block_size in range(2, 12):
        starts = [window_start(t, block_size) for t in range(1, 60)]
        assert starts == sorted(starts) and starts[:block_size] == [0] * block_size
        for t, start in enumerate(starts, 1):
            assert 1 <= t - start <= block_size
            assert start == 0 or t - start > block_size - block_size // 2 - 1


def test_a_draft_starts_from_the_state_before_the_last_token():
    """After rejections and in a new window, too. Another state is lossless, so no test of exactness
    sees it, and where all drafts are accepted there is no other."""
    model, tokens, states = tiny_model(block_size=8, n_future=4), [1, 2], []

    def draft(e, *rest):
        states.append((e, window_ids(tokens, model)[:, :-1]))
        return model.head.draft(e, *rest)

    blocks = decode.speculative_blocks(model, tokens, Sampling(generator=seeded()), draft)
    with torch.no_grad():
        sizes = {len(next(blocks)[0]) for _ in range(60)}
        for e, window in states:
            close(e, model.hidden(window)[:, -1])
    assert sizes == {1, 2, 3, 4} and len(states) > 40


def test_seed_decides_the_text():
    """The same seed gives the same text, another seed (0 included) another one; the global RNG is
    not touched."""
    model = tiny_model(n_token=5)
    for decoder in DECODERS:
        state = torch.get_rng_state()
        a, b, c = (list(decoder(model, [1], 40, sampler=Sampling(generator=seeded(s)))) for s in (0, 0, 1))
        assert a == b != c and torch.equal(state, torch.get_rng_state())


def test_statistics_add_up():
    """Over a random text: histogram, tokens, steps and acceptance tell the same story, the
    overshoot cut off."""
    model, stats = tiny_model(n_future=4, rank=3, block_size=16), Stats()
    text = list(generate(model, [1], 200, sampler=Sampling(generator=seeded()), stats=stats))
    assert len(text) == 200 and stats.tokens == 199  # the prefill's token is not a step's
    assert stats.steps == sum(stats.histogram) and stats.tokens == sum(k * h for k, h in enumerate(stats.histogram))
    assert all(0 <= a <= o for a, o in zip(stats.accepted, stats.offered)) and stats.offered[1] <= stats.accepted[0]
    assert 1 < stats.tokens_per_step < 4
    origins = Counter(stats.origins)  # the last step may be cut off; at the block's end a step drafts fewer or none
    assert len(stats.origins) == 200 and 0 <= sum(stats.accepted) - sum(origins[k] for k in (1, 2, 3)) < 4
    assert all(0 <= stats.accepted[k - 1] - origins[k] <= 1 for k in (1, 2, 3)) and origins["corrected"] > 5
    assert 0 <= stats.steps - (origins["corrected"] + origins["bonus"] + origins["plain"] - 1) <= 1
    assert math.isnan(Stats().tokens_per_step)


def test_no_decoder_but_the_oracle_passes_a_token_twice_through_the_trunk():
    """Guards a baseline of the bench that has lost its cache: its text is the same."""
    def passes(decoder, n_tokens):
        model, sizes = tiny_model(), []
        hidden = model.hidden
        model.hidden = lambda idx, *args: sizes.append(idx.size(1)) or hidden(idx, *args)
        list(decoder(model, [1, 2], n_tokens))
        return sizes

    assert passes(generate_plain, 6) == [2, 1, 1, 1, 1, 1]
    assert passes(generate_oracle, 3) == [2, 3, 4]
    assert set(passes(generate, 3)[1:]) == {3}


@pytest.mark.parametrize("decoder", DECODERS)
def test_decoding_keeps_no_graph(decoder):
    class Noting(Greedy):
        def draw(self, logits):
            assert torch.is_inference_mode_enabled() and not logits.requires_grad
            return super().draw(logits)

    assert len(list(decoder(tiny_model(), [1, 2], 6, sampler=Noting()))) == 6


def test_tokens_after_the_end_are_not_counted():
    """Wherever the end falls in a step's tokens, by length or by a stop token."""
    model = counting_model(7, 5, "marginal")
    for length, stop in [*((n, None) for n in range(1, 12)), *((30, x) for x in range(7))]:
        stats = Stats()
        text = list(generate(model, [3], length, sampler=Greedy(), stop_token=stop, stats=stats))
        assert stats.tokens == len(text) - 1 and len(stats.origins) == len(text)


def plain_batch(model, prompt, max_new_tokens, *, sampler, **options):
    return batched.generate_plain_batch(model, [prompt], max_new_tokens, samplers=sampler, **options)[0]


def unverified(model, prompt, max_new_tokens, **options):
    clp = fit(torch.eye(model.config.n_embd).double(), torch.zeros(model.config.n_embd).long(), model.config.n_future)
    return generate_unverified(model, prompt, max_new_tokens, clp, 1.0, **options)  # drafts nothing


@pytest.mark.parametrize("decoder", [*MODES, plain_batch, unverified], ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_text_ends_at_any_of_several_stop_tokens(decoder):
    """The first that comes, given as a set, a list or a tuple; one alone, and none. What could never end a text is one
    ValueError, at the call."""
    model = counting_model(7, 5, "lm_head")
    write = partial(decoder, model, [3], 9, sampler=Greedy())
    for stop_token, length in (({1, 6}, 3), ([1, 6, 6], 3), ((6,), 3), (frozenset({0}), 4), (6, 3), (0, 4), (None, 9),
                               ([], 9), (set(), 9)):
        assert list(write(stop_token=stop_token)) == [(4 + i) % 7 for i in range(length)], stop_token
    for wrong in ("6", "ab", b"6", True, False, 6.0, 7, -1, [6, 7], {"6"}, [True], [[6]], [None], {6: 1}, object(),
                  torch.tensor(6)):
        with pytest.raises(ValueError, match="^a stop_token is an id below 7, a set or list of such ids, or None, not"):
            write(stop_token=wrong)  # nothing is asked for


def test_collect_knows_several_stop_tokens():
    model = counting_model(7, 3, "marginal")
    states, _ = collect(model, [[3]], 20, Greedy(), stop_token={0, 2})
    assert len(states) == 3
    with pytest.raises(ValueError, match="^a stop_token is an id below 7"):
        collect(model, [[3]], 20, Greedy(), stop_token="0")


def test_the_mode_coupled_takes_its_seed_from_a_generator():
    """And all else from the sampler: its text is that of a Coupled with this seed, in any
    decoder."""
    model, options, seed = tiny_model(), dict(temperature=0.7, top_k=4), torch.Generator().manual_seed(5)
    drawn = torch.randint(2**32, (), generator=torch.Generator().manual_seed(5)).item()
    expected = list(generate_plain(model, [1, 2], 12, sampler=Coupled(drawn, **options)))
    found = [list(coupled.generate(model, [1, 2], 12, sampler=sampler)) for sampler in
             (Sampling(**options, generator=seed), Sampling(**options, generator=seed), Coupled(drawn, **options), Greedy())]
    assert found[0] == found[2] == expected != found[1]
    assert found[3] == list(generate_oracle(model, [1, 2], 12, sampler=Greedy()))
