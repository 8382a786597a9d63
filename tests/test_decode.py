"""The decoders' parts: warp, the draws, verification in floating point, samplers, windows,
statistics, bad calls."""

import itertools
import math
from collections import Counter

import pytest
import torch
from torch.nn import functional as F
from test_cp_head import chi_square_p_value, heads, tiny_model

import decode
from decode import (Greedy, Sampling, Stats, categorical, draft, generate, generate_cached,
                    generate_speculative, keep_probability, make_sampler, verify, warp, window_start)
from decoders import coupled
from decoders.coupled import Coupled
from model import BadInput

DECODERS = (generate, generate_cached, generate_speculative)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


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
    tokens = categorical(3 * p.expand(200_000, 7), seeded()).tolist()
    assert {0, 2, 6}.isdisjoint(tokens)
    assert chi_square_p_value(tokens, dict(enumerate(p.tolist()))) > 1e-9


def test_draws_stay_in_the_vocabulary():
    """Whatever the row holds: NaN, infinity, nothing. No row at all gives no token."""
    for value in (float("nan"), float("inf"), 0.0):
        assert 0 <= categorical(torch.full((1, 5), value), seeded()).item() < 5
    assert categorical(torch.empty(0, 5), seeded()).shape == (0,)


# -----------------------------------------------------------------------------
# verification in floating point


def test_verify_follows_p_with_real_random_numbers():
    """20,000 verifications, chi-square on the first token and on the bonus. Chance of a false
    alarm: 1e-9."""
    generator = seeded()
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]), torch.tensor([[0.6, 0.1, 0.3], [0.0, 0.0, 0.0]])
    first, bonus = [], []
    for _ in range(20_000):
        drafted = categorical(q[:1], generator)
        n_accepted, token = verify(p, q, drafted, generator)
        first.append((drafted if n_accepted else token).item())
        bonus += token.tolist() if n_accepted else []
    assert chi_square_p_value(first, dict(enumerate(p[0].tolist()))) > 1e-9
    assert chi_square_p_value(bonus, dict(enumerate(p[1].tolist()))) > 1e-9


def test_verify_never_draws_from_an_empty_row(monkeypatch):
    """p = q leaves no residual, and all drafts are kept. Where rounding lets a coin fail all the
    same, the token is drawn from p: from an empty row it would be the last id, of probability 0."""
    p, drafted = torch.tensor([[0.3, 0.7, 0.0], [0.6, 0.4, 0.0]]), torch.tensor([1])
    q = torch.stack((p[0], torch.zeros(3)))
    for seed in range(20):
        n_accepted, token = verify(p, q, drafted, seeded(seed))
        assert n_accepted.item() == 1 and token.item() in (0, 1)
    monkeypatch.setattr(decode, "bernoulli", lambda p, generator: torch.zeros_like(p, dtype=torch.bool))
    assert {verify(p, q, drafted, seeded(seed))[1].item() for seed in range(20)} == {0, 1}


def test_verify_survives_tiny_probabilities():
    """p / q may overflow, and then meet a 0: no NaN, and nothing of probability 0 comes out. A
    ratio of 1e6 makes up for one of 1e-6, and no more than that."""
    p = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    q = torch.tensor([[1.0, 0.0], [1e-40, 1.0], [0.0, 0.0]])
    assert keep_probability(p, q, torch.tensor([0, 0])).flatten().tolist() == [1.0, 0.0, 0.0]
    assert keep_probability(p[1:], q[1:], torch.tensor([0])).isfinite().all()  # the overflow alone
    assert not decode.bernoulli(torch.full((9,), torch.nan), None).any()
    n_accepted, token = verify(p, q, torch.tensor([0, 0]), seeded())
    assert (n_accepted.item(), token.item()) == (0, 1)
    rare = torch.tensor([1e-6, 1 - 1e-6])
    keep = keep_probability(torch.stack((rare, 1 - rare, rare)), torch.stack((1 - rare, rare, rare * 0)),
                            torch.tensor([0, 0]))
    assert keep.flatten().tolist() == pytest.approx([1.0, 1e-6, 1.0])


@heads
@pytest.mark.parametrize("rank", [1, 2])
def test_drafts_are_tokens_whatever_the_padding_has(rank, head):
    """A head that gives all its mass to ids that are no tokens costs speed alone: rows of q sum to
    1 without them."""
    model = tiny_model(rank=rank, head=head, vocab_size=6, n_token=4).float()
    with torch.no_grad():
        if head == "full":
            model.head.maps[:, :, 4:] = 1000 * torch.ones(8)
        model.lm_head.weight[4:] = 1000 * torch.ones(8)
        x, q = decode.draft(model, torch.ones(1, 8), torch.tensor([1]), 2, Sampling(generator=seeded()))
    assert (x < 4).all() and x[0, 0] == 1 and q.shape == (1, 3, 4)
    torch.testing.assert_close(q.sum(-1), torch.tensor([[1.0, 1.0, 0.0]]))


# -----------------------------------------------------------------------------
# what is not finite, and other bad calls


def test_nan_and_infinite_logits_are_refused_by_every_decoder_and_sampler():
    """One NaN in the trunk, or weights that overflow in half precision: BadInput, a ValueError, that
    names the cause and float32. Guards token 0 for ever, and an id outside the vocabulary."""
    damaged = tiny_model(target="lm_head")
    damaged.transformer.h[0].mlp.c_fc.weight.data[0, 0] = float("nan")
    overflowing = tiny_model(target="lm_head").half()
    overflowing.transformer.ln_f.weight.data.fill_(6e4)
    for model, decoder in itertools.product((damaged, overflowing), DECODERS):
        for sampler in (Greedy(), Sampling(generator=seeded()), Coupled(0)):
            with pytest.raises(ValueError, match="NaN or infinite logits.*float32"):
                list(decoder(model, [1, 2], 5, sampler=sampler))


@heads
@pytest.mark.parametrize("rank", [1, 2])
def test_a_head_that_gives_nan_never_changes_a_text(head, rank):
    """Samplers that compare tokens write the target's text all the same; one that needs q
    refuses."""
    model = tiny_model(target="lm_head", head=head, rank=rank)
    expected = [list(generate(model, [1, 2], 12, sampler=sampler)) for sampler in (Greedy(), Coupled(3))]
    model.head.maps.data.fill_(float("nan"))
    assert [list(generate_speculative(model, [1, 2], 12, sampler=s)) for s in (Greedy(), Coupled(3))] == expected
    with pytest.raises(BadInput, match="NaN or infinite"):
        list(generate_speculative(model, [1, 2], 12, sampler=Sampling(generator=seeded())))


@pytest.mark.parametrize("rank", [1, 2])
def test_drafts_are_drawn_by_the_samplers_own_rule(rank):
    """Where only some tokens can be drafted, a short row gives Sampling the same rows as a whole one, and Coupled
    draws with the noise of the tokens themselves; a sampler of one's own gets whole rows."""
    model = tiny_model(head="recurrent", rank=rank, target="lm_head", n_future=2, draft_vocab=3, vocab_size=7)
    model.head.choose_drafts(torch.tensor([1, 4, 6]), model.lm_head.weight.data)
    e, token = torch.randn(1, 8, dtype=torch.float64), torch.tensor([2])
    row = model.conditionals(e).next(token)  # (1, 7)

    class Own(Sampling):
        def draw(self, logits):
            assert logits.shape == (1, 7)
            return logits.argmax(-1), logits.softmax(-1)

    warped = Sampling()
    warped.warp = lambda logits: F.one_hot(logits.argmax(-1), 7).to(logits.dtype)

    for seed in range(20):
        (_, drafted), q = (x[0] for x in draft(model, e, token, 1, Coupled(seed)))
        assert drafted == Coupled(seed).draw(row)[0]
        torch.testing.assert_close(q[0], row.softmax(-1)[0])
        for sampler in (Sampling(0.7, top_k=2, generator=seeded(seed)), Sampling(top_p=0.5, generator=seeded(seed))):
            (_, drafted), q = (x[0] for x in draft(model, e, token, 1, sampler))
            torch.testing.assert_close(q[0], sampler.warp(row)[0])
            assert q[0, drafted] > 0
    for sampler in (Own(), warped, Greedy()):
        assert draft(model, e, token, 1, sampler)[0].tolist() == [[2, row.argmax().item()]]


@pytest.mark.parametrize("options", [
    dict(temperature=float("nan")), dict(temperature=-1.0), dict(temperature=1e-300), dict(temperature=1e300),
    dict(top_p=0.0), dict(top_p=-0.5), dict(top_p=float("nan")), dict(top_p=1.5), dict(top_k=0),
    dict(temperature=0, top_p=0.0)], ids=str)
def test_samplers_refuse_what_is_no_setting(options):
    with pytest.raises(ValueError, match=[*options][-1]):
        make_sampler(**options)


def test_bad_calls_are_refused():
    model = tiny_model(n_token=4)
    for prompt in ([], [[1, 2]], torch.tensor([[1]]), [4], [-1]):
        with pytest.raises(ValueError, match="prompt"):
            list(generate_cached(model, prompt, 1))
    with pytest.raises(ValueError, match="n_future = 1"):
        generate_speculative(tiny_model(n_future=1), [1], 1)
    with pytest.raises(ValueError, match="eval"):
        list(generate(model.train(), [1], 1))


# -----------------------------------------------------------------------------
# windows, seeds, statistics, laps


def test_window_is_a_function_of_the_position():
    """It holds every token until the block is full, then between half a block and a block, and
    never moves back."""
    for block_size in range(2, 12):
        starts = [window_start(t, block_size) for t in range(1, 60)]
        assert starts == sorted(starts) and starts[:block_size] == [0] * block_size
        for t, start in enumerate(starts, 1):
            assert 1 <= t - start <= block_size
            assert start == 0 or t - start > block_size - block_size // 2 - 1


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
    text = list(generate_speculative(model, [1], 200, sampler=Sampling(generator=seeded()), stats=stats))
    assert len(text) == 200 and stats.tokens == 199  # the prefill's token is not a step's
    assert stats.steps == sum(stats.histogram) and stats.tokens == sum(k * h for k, h in enumerate(stats.histogram))
    assert all(0 <= a <= o for a, o in zip(stats.accepted, stats.offered)) and stats.offered[1] <= stats.accepted[0]
    assert 1 < stats.tokens_per_step < 4
    origins = Counter(stats.origins)  # the last step may be cut off; at the block's end a step drafts fewer or none
    assert len(stats.origins) == 200 and 0 <= sum(stats.accepted) - sum(origins[k] for k in (1, 2, 3)) < 4
    assert all(0 <= stats.accepted[k - 1] - origins[k] <= 1 for k in (1, 2, 3)) and origins["corrected"] > 5
    assert 0 <= stats.steps - (origins["corrected"] + origins["bonus"] + origins["plain"] - 1) <= 1
    assert math.isnan(Stats().tokens_per_step)


def test_laps_name_the_parts_of_every_step_in_order():
    """Prefill, then steps; a window that moves on is computed anew. The text does not depend on who
    listens."""
    model, stats, laps = tiny_model(block_size=8), Stats(), []
    text = list(generate_speculative(model, [1], 20, sampler=Greedy(), stats=stats, lap=laps.append))
    assert text == list(generate_speculative(model, [1], 20, sampler=Greedy()))
    step = ["rest", "draft", "trunk", "target", "verify"]
    assert laps[:8] == ["rest", "trunk", "target", *step]
    counts, moves = Counter(laps), laps.count("trunk") - laps.count("target")
    assert moves > 0 and counts["draft"] == counts["verify"] == stats.steps == counts["target"] - 1
    assert counts["rest"] == stats.steps + 1 + moves


def test_the_mode_coupled_takes_its_seed_from_a_generator():
    """And all else from the sampler: its text is that of a Coupled with this seed, in any decoder."""
    model, options, seed = tiny_model(), dict(temperature=0.7, top_k=4), torch.Generator().manual_seed(5)
    drawn = torch.randint(2**32, (), generator=torch.Generator().manual_seed(5)).item()
    expected = list(generate_cached(model, [1, 2], 12, sampler=Coupled(drawn, **options)))
    found = [list(coupled.generate(model, [1, 2], 12, sampler=sampler)) for sampler in
             (Sampling(**options, generator=seed), Sampling(**options, generator=seed), Coupled(drawn, **options), Greedy())]
    assert found[0] == found[2] == expected != found[1]
    assert found[3] == list(generate(model, [1, 2], 12, sampler=Greedy()))
