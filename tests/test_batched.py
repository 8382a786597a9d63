"""More than one text at once: each row is the text that it would be by itself."""

from functools import partial

import pytest
import torch
from helpers import LOOK_BACK, a_model, some_prompts, three
from test_cp_head import (SMALL, chi_square_model, counting_model, enumerated, expected_texts,
                          tiny_model, total_variation)

import decode
from decode import Greedy, Sampling, Stats, generate_oracle, generate_plain
from decoders import batched
from decoders.batched import generate_batch, generate_plain_batch, measure
from decoders.coupled import Coupled
from model import BadInput

DECODERS = (generate_plain_batch, generate_batch)
decoders = pytest.mark.parametrize("decoder", DECODERS)


def greedy(model, prompts, length, **options):
    return [list(generate_oracle(model, prompt, length, sampler=Greedy(), **options)) for prompt in prompts]


# -----------------------------------------------------------------------------
# token for token


@pytest.mark.parametrize("seed", range(12))
def test_greedy_rows_are_the_oracles_texts(seed):
    """Temperature 0, float64, past the block, of prompts whose windows move at different times;
    with a stop token the rows end at different times, and inside an accepted block."""
    model = a_model(seed, block_size=5 + 2 * seed)
    prompts, length = some_prompts(seed, model.config.block_size), 2 * model.config.block_size + 5
    expected = greedy(model, prompts, length)
    stop = expected[0][length // 2]
    stopped = greedy(model, prompts, length, stop_token=stop)
    assert min(map(len, stopped)) < length
    for decoder in DECODERS:
        write = partial(decoder, model, samplers=Greedy())
        assert write(prompts, length) == expected
        assert write(prompts, length, stop_token=stop) == stopped
        assert write(prompts[::-1], 3) == [text[:3] for text in expected[::-1]]
        assert write(prompts, 0) == [[]] * 6 and write([], 3) == []


@decoders
@pytest.mark.parametrize("seed", range(6))
def test_a_row_does_not_depend_on_the_others(decoder, seed):
    """With a generator of its own, a row is the text of the decoder for one: whoever else is in the
    batch, in whatever order, and also where each row's sampler is another one; when drafting,
    before the block is full."""
    single = generate_plain if decoder is generate_plain_batch else decode.generate
    model = a_model(seed)
    prompts = some_prompts(seed, model.config.block_size)
    small = model
    if decoder is generate_batch:
        model = a_model(seed, block_size=64)
    options = [{}, dict(temperature=0.7), dict(top_k=2), dict(top_p=0.8), {}, dict(temperature=1.5)]

    def samplers(order):
        return [Sampling(**options[i], generator=torch.Generator().manual_seed(i)) for i in order]

    expected = [list(single(model, prompt, 30, sampler=sampler))
                for prompt, sampler in zip(prompts, samplers(range(6)))]
    for order in ([0, 1, 2, 3, 4, 5], [5, 2, 0], [3], [1, 4, 3, 0, 2]):
        texts = decoder(model, [prompts[i] for i in order], 30, samplers=samplers(order))
        assert texts == [expected[i] for i in order]
    coupled = decoder(small, prompts, 30, samplers=[Coupled(i) for i in range(6)])
    assert coupled == [list(generate_oracle(small, prompt, 30, sampler=Coupled(i))) for i, prompt in enumerate(prompts)]


@decoders
@pytest.mark.parametrize("seed", range(6))
def test_attention_meets_nothing_stale(decoder, seed, monkeypatch):
    """A huge number in all that is in the cache after a row's length, that is drafts that were
    rolled back, and the rest of a window that moved, changes nothing."""
    model, stale = a_model(seed, block_size=24), []
    prompts, hidden_of_rows = some_prompts(seed, model.config.block_size), batched.hidden_of_rows
    expected = greedy(model, prompts, 40)

    def spoiled(model, x, cache, rows=slice(None)):
        for row, length in enumerate(cache.length):
            for kv in cache.kv:
                rest = kv[:, row, :, length:]
                stale.append(((rest != 0) & (rest != 1e30)).sum().item())
                rest.fill_(1e30)
        return hidden_of_rows(model, x, cache, rows)

    monkeypatch.setattr(batched, "hidden_of_rows", spoiled)
    assert decoder(model, prompts, 40, samplers=Greedy()) == expected
    assert sum(stale) > 0


def see_stale(places, n):
    """Every row sees what is after its own length, as far as the longest row goes."""
    return torch.ones(*places.shape, n, dtype=torch.bool).tril(n - places.size(1)).unsqueeze(1)


def places_of_the_longest(self):
    """All rows go on where the longest one does, as if it were one length for all."""
    return torch.full((len(self.length),), max(self.length))


def without_roll_back(model, cache, rows, n_drafts, draft, add, step=batched.step):
    """All drafts stay in the cache."""
    before = list(cache.length)
    step(model, cache, rows, n_drafts, draft, add)
    n = model.config.n_future
    cache.length = [min(length + n, cache.room - n) for length in before]


WRONG = {"stale": (batched, "visible", see_stale), "places": (batched.RowCache, "lengths", places_of_the_longest),
         "roll-back": (batched, "step", without_roll_back)}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_batches_write_other_texts(name, monkeypatch):
    """Negative controls: rows that see what is stale, have one length, or are not rolled back."""
    prompts, wrong = [[1], [1, 2, 3, 4, 5, 6], [7, 8, 3]], 0
    for seed in range(4):
        model = tiny_model(seed, block_size=64, vocab_size=11, target="lm_head")
        expected = greedy(model, prompts, 30)
        assert generate_batch(model, prompts, 30, samplers=Greedy()) == expected
        with monkeypatch.context() as patch:
            patch.setattr(*WRONG[name])
            wrong += generate_batch(model, prompts, 30, samplers=Greedy()) != expected
    assert wrong > 1


@pytest.mark.parametrize("head", LOOK_BACK)
@pytest.mark.parametrize("rank", [1, 2])
def test_drafts_of_a_batch_come_from_the_rows_of_each_text(head, rank):
    """The conditionals of three texts at once, along different drafts, are those of each by itself;
    and so are the drafts, where each has its own generator, one draw or token by token."""
    model = tiny_model(head=head, rank=rank, n_future=4, target="lm_head")
    e = model.split(model.hidden(torch.tensor([[1, 2], [3, 0], [2, 4]])))[1][:, -1].detach()
    x, W = torch.tensor([[0, 3, 1], [4, 4, 2], [1, 2, 0]]), model.unembed.detach()
    together = model.head.rows(e, x, W)
    expected = torch.cat([model.head.rows(e[i : i + 1], x[i : i + 1], W) for i in range(3)])
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-12)
    assert (expected[0] - expected[1]).abs().max() > 1e-3

    def own(i):
        return Sampling(generator=torch.Generator().manual_seed(i), temperature=(1.0, 0.7, 1.0)[i])

    apart = [model.head.draft(e[i : i + 1], x[i : i + 1, 0], 3, own(i), W) for i in range(3)]
    rows = batched.EachItsOwn([own(i) for i in range(3)])
    for found, parts in zip(rows.draft(model.head.draft, e, x[:, 0], 3, rows, W), zip(*apart)):
        torch.testing.assert_close(found, torch.cat(parts), rtol=0, atol=1e-12)


# -----------------------------------------------------------------------------
# the distribution


def product(model, prompts, length):
    """P of the texts of all rows, one after another: they are independent."""
    joint = {(): 1.0}
    for prompt in prompts:
        own = expected_texts(model, prompt, length)
        joint = {a + b: p * q for a, p in joint.items() for b, q in own.items()}
    return joint


@three
@decoders
@pytest.mark.parametrize("shared", [True, False])
def test_all_rows_together_are_exact_by_enumeration(decoder, variant, shared, monkeypatch):
    """Every random outcome of two rows of different lengths: total variation to the product of both
    rows' distributions below 1e-12."""
    model, prompts = tiny_model(**variant, vocab_size=2, n_future=2, n_layer=1), [[0], [1, 0, 1]]

    def run(choose):
        samplers = Sampling() if shared else [Sampling(), Sampling()]
        return sum(decoder(model, prompts, 2, samplers=samplers), [])

    assert total_variation(enumerated(run, monkeypatch), product(model, prompts, 2)) < 1e-12


@three
@pytest.mark.parametrize("config", [SMALL[0], pytest.param(SMALL[1], marks=pytest.mark.slow), SMALL[2],
                                    SMALL[0] | dict(block_size=3, n_token=2)],
                         ids=["V3n2", "V2n3", "V2n3r1", "past the block"])
def test_every_row_is_exact_by_enumeration(config, variant, monkeypatch):
    """Each row through several steps, rejections and bonus draws, while the others are greedy."""
    exact_rows(tiny_model(**variant, **config), 4 if "block_size" in config else 3, monkeypatch)


@pytest.mark.parametrize("vocab_size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("head", ["gloeckle", "layers"])
def test_heads_that_look_into_the_trunk_are_exact_in_batches(head, vocab_size, monkeypatch):
    """Their layers see the past of their own rows alone."""
    exact_rows(tiny_model(head=head, target="lm_head", vocab_size=vocab_size, n_future=3), 3, monkeypatch)


def exact_rows(model, length, monkeypatch):
    prompts = [[0, 1], [1], [0, 0, 1]]
    for i, prompt in enumerate(prompts):
        samplers = [Sampling() if i == k else Greedy() for k in range(3)]
        texts = enumerated(lambda choose: generate_batch(model, prompts, length, samplers=samplers)[i], monkeypatch)
        assert total_variation(texts, expected_texts(model, prompt, length)) < 1e-12


def test_enumeration_rejects_rows_that_see_what_is_stale(monkeypatch):
    """Negative control: the shorter row's distribution moves by more than 1 %."""
    model, prompts = chi_square_model("chain"), [[0, 1], [1, 0, 2, 2]]
    monkeypatch.setattr(batched, "visible", see_stale)
    write = partial(generate_batch, model, prompts, 3, samplers=[Sampling(), Greedy()])
    assert total_variation(enumerated(lambda choose: write()[0], monkeypatch), expected_texts(model, [0, 1], 3)) > 0.01


# -----------------------------------------------------------------------------
# steps, statistics, bad calls


@pytest.mark.parametrize("target", ["marginal", "lm_head"])
def test_right_heads_are_always_accepted_in_every_row(target):
    """Every row's every step yields n tokens: an off-by-one in the state that a row drafts from
    stays lossless."""
    stats, model = Stats(), counting_model(7, 4, target)
    prompts = [[3], [0, 1], [5, 6, 0, 1]]
    texts = generate_batch(model, prompts, 21, samplers=Greedy(), stats=stats)
    assert texts == [[(prompt[-1] + 1 + i) % 7 for i in range(21)] for prompt in prompts]
    assert stats.histogram == [0, 0, 0, 0, 15] and stats.acceptance == [1.0] * 3 and stats.tokens_per_step == 4


@decoders
def test_rows_leave_when_their_text_ends(decoder, monkeypatch):
    """The stop token falls into every place of an accepted block; a pass has the rows that go on,
    and no others."""
    sizes, model, pass_of_rows = [], counting_model(7, 5, "marginal"), batched.pass_of_rows

    def noted(model, cache, e, *args):
        sizes.append(len(e))
        return pass_of_rows(model, cache, e, *args)

    monkeypatch.setattr(batched, "pass_of_rows", noted)
    stats, prompts = Stats(), [[start] for start in range(7)]
    texts = decoder(model, prompts, 30, samplers=Greedy(), stop_token=3, stats=stats)
    assert texts == [[(start + 1 + i) % 7 for i in range((2 - start) % 7 + 1)] for start in range(7)]
    assert sizes == ([6, 5, 4, 3, 2, 1] if decoder is generate_plain_batch else [6, 1])
    assert stats.tokens == sum(map(len, texts)) - 7 and stats.steps == sum(sizes)


def test_bad_calls_are_refused():
    model = tiny_model(target="lm_head", n_token=4)
    for prompts in ([1, 2], [[1], []], [[1], [4]]):
        for decoder in DECODERS:
            with pytest.raises(BadInput, match="prompt must be"):
                decoder(model, prompts, 3)
    with pytest.raises(BadInput, match="2 prompts need 2 samplers, or one for all, not 3"):
        generate_plain_batch(model, [[1], [2]], 3, samplers=[Greedy()] * 3)
    with pytest.raises(BadInput, match="2 prompts need 2 samplers, or one for all, not 0"):
        generate_plain_batch(model, [[1], [2]], 3, samplers=[])
    with pytest.raises(BadInput, match="Coupled sampler serves one text"):
        generate_plain_batch(model, [[1], [2]], 3, samplers=Coupled(0))
    with pytest.raises(BadInput, match="n_future = 1"):
        generate_batch(tiny_model(n_future=1), [[1]], 3)
    with pytest.raises(BadInput, match="masks at places of its own"):
        generate_batch(tiny_model(head="mask", target="lm_head"), [[1]], 3)
    with pytest.raises(BadInput, match="eval"):
        generate_plain_batch(tiny_model().train(), [[1]], 3)
    model.transformer.wpe.weight.data[5] = float("nan")  # which no prompt reaches
    for decoder in DECODERS:
        with pytest.raises(BadInput, match="NaN or infinite logits"):
            decoder(model, [[1], [2, 3]], 8, samplers=Greedy())


@pytest.mark.parametrize("head", LOOK_BACK)
def test_both_decoders_are_measured_alike(head, monkeypatch):
    """By a clock that makes each plain round take 4 s and each speculative one 2 s, but for the
    first round, which does not count; and the greedy texts agree."""
    clock = iter([0.0, 1.0, 10.0, 99.0] + 5 * [0.0, 4.0, 10.0, 12.0])
    monkeypatch.setattr(batched.timed.__globals__["time"], "perf_counter", lambda: next(clock))
    row = measure(tiny_model(head=head, target="lm_head"), [[1], [2, 3]], 20, 0.0, 5, 0)
    assert row["speedup"] == 2.0 and row["speedup_range"] == [2.0, 2.0] and row["same_texts"]
    assert (row["plain"], row["speculative"], row["batch_size"]) == (10.0, 20.0, 2)
    assert row["tokens_per_step"] > 1 or head == "full"  # whose drafts are noise here


def test_one_prompt_is_written_as_by_other_decoders():
    model, stats, other = a_model(0), Stats(), Stats()
    text = list(batched.generate(model, [1, 2], 20, sampler=Greedy(), stats=stats))
    assert text == list(decode.generate(model, [1, 2], 20, sampler=Greedy(), stats=other)) and stats == other
