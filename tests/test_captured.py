"""Steps of fixed shapes: the same texts as step by step, on a GPU also when a graph replays
them."""

import itertools
from functools import partial

import pytest
import torch
from helpers import LOOK_BACK, a_model, some_prompts, three
from test_cp_head import (SMALL, chi_square_model, chi_square_p_value, counting_model, enumerated,
                          expected_texts, tiny_model, total_variation)

import decode
from decode import Greedy, Sampling, Stats, generate_oracle
from decoders import batched, captured
from decoders.captured import Captured, generate
from decoders.coupled import Coupled
from model import BadInput


def generate_plain(model, prompt, max_new_tokens, *, sampler=None, compile=False, **options):
    return Captured(model, sampler, False, compile).generate(prompt, max_new_tokens, **options)


DECODERS = (generate_plain, generate)
decoders = pytest.mark.parametrize("decoder", DECODERS)
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


# -----------------------------------------------------------------------------
# token for token


@pytest.mark.parametrize("smallest", [2, 256])
@pytest.mark.parametrize("seed", range(8))
def test_greedy_texts_are_the_oracles(seed, smallest, monkeypatch):
    """Temperature 0, float64, past the block, and with a cache that has to grow; a stop token ends
    the text inside a block."""
    monkeypatch.setattr(captured, "SMALLEST", smallest)
    model = a_model(seed, block_size=5 + 2 * seed)
    length = 2 * model.config.block_size + 5
    for prompt in some_prompts(seed, model.config.block_size):
        expected = list(generate_oracle(model, prompt, length, sampler=Greedy()))
        stop = expected[length // 2]
        stopped = expected[: expected.index(stop) + 1]
        for decoder in DECODERS:
            write = partial(decoder, model, prompt, sampler=Greedy())
            assert list(write(length)) == expected and list(write(length, stop_token=stop)) == stopped
            assert list(write(3)) == expected[:3] and list(write(0)) == []


@pytest.mark.parametrize("head", LOOK_BACK)
def test_steps_accept_what_they_do_one_by_one(head):
    """The same drafts: as many tokens per step, at every offset."""
    model, stats, expected = tiny_model(head=head, target="lm_head", block_size=40), Stats(), Stats()
    for prompt in ([1], [2, 3]):
        list(decode.generate(model, prompt, 60, sampler=Greedy(), stats=expected))
        list(generate(model, prompt, 60, sampler=Greedy(), stats=stats))
    assert stats == expected and stats.tokens_per_step > 1


@pytest.mark.parametrize("speculative", [False, True])
def test_texts_of_one_object_do_not_meet(speculative):
    """One after another, shorter and longer; a text that goes on after another has begun is
    refused, and the other one is right. Two objects write at the same time."""
    model, prompts = a_model(3, block_size=20), ([1, 2], [3], [4, 5, 6])
    expected = [list(generate_oracle(model, prompt, 30, sampler=Greedy())) for prompt in prompts]
    steps, other = (Captured(model, Greedy(), speculative) for _ in range(2))
    for _ in range(2):
        for prompt, text in zip(prompts, expected):
            assert list(steps.generate(prompt, 30)) == text
    first, second = steps.generate(prompts[0], 30), steps.generate(prompts[1], 30)
    assert list(itertools.islice(first, 7)) == expected[0][:7] and next(second) == expected[1][0]
    with pytest.raises(BadInput, match="another text has begun"):
        list(first)
    pairs = list(zip(second, itertools.islice(other.generate(prompts[2], 30), 1, None)))
    assert [list(text) for text in zip(*pairs)] == [expected[1][1:], expected[2][1:]]


@decoders
def test_a_text_is_a_function_of_the_seed(decoder):
    """Also when other texts came before; the same generator gives another text next."""
    model = a_model(4, block_size=12)

    def two_texts():
        sampler = Sampling(generator=torch.Generator().manual_seed(5))
        return [list(decoder(model, [1, 2], 40, sampler=sampler)) for _ in range(2)]

    first = two_texts()
    assert first[0] != first[1]
    list(decoder(model, [3], 9))  # without a generator: torch's own
    assert two_texts() == first
    torch.manual_seed(0)
    text = list(decoder(model, [1], 20))
    assert list(decoder(model, [1], 20)) != text
    torch.manual_seed(0)
    assert list(decoder(model, [1], 20)) == text


@decoders
def test_a_text_keeps_to_its_samplers_rule(decoder, monkeypatch):
    """top_k = 1 is greedy; a `warp` of one's own forbids tokens; another `draw` is what is drawn
    by."""
    model = a_model(5, block_size=12)
    expected = list(generate_oracle(model, [1], 20, sampler=Greedy()))
    assert list(decoder(model, [1], 20, sampler=Sampling(1.3, top_k=1))) == expected
    for banned in (0, 3, 7):
        sampler = Sampling(0.9, generator=torch.Generator().manual_seed(0))
        sampler.warp = lambda logits, x=banned: logits.masked_fill(torch.arange(9) == x, -1e30).softmax(-1)
        assert banned not in list(decoder(model, [1], 60, sampler=sampler))
    monkeypatch.setattr(Greedy, "draw", lambda self, logits: (logits.argmin(-1), None))
    assert list(decoder(model, [1], 5, sampler=Greedy()))[0] == model(torch.tensor([[1]]))[0, -1].argmin()


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])
def test_new_values_in_the_same_places_count(speculative, device):
    """A recording reads the weights anew: after a step of training, the text is the new model's."""
    model = tiny_model(head="chain", n_future=3, block_size=12, vocab_size=11, n_token=9).to(device)
    steps = Captured(model, Greedy(), speculative)
    for _ in range(2):
        assert list(steps.generate([1], 30)) == list(generate_oracle(model, [1], 30, sampler=Greedy()))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)


def test_another_generator_draws_another_text():
    """generate's own, in the place of the sampler's."""
    model = a_model(4, block_size=12)
    steps = Captured(model, Sampling(generator=torch.Generator().manual_seed(5)))
    text = list(steps.generate([1, 2], 40))
    texts = [list(steps.generate([1, 2], 40, generator=torch.Generator().manual_seed(i))) for i in (5, 6)]
    assert texts[0] == text != texts[1]


@pytest.mark.parametrize("speculative", [True, False])
def test_a_step_is_compiled_once_for_all_lengths(speculative, monkeypatch):
    """A number that the step sees, and that changes from step to step, would compile each of them anew."""
    graphs, compile = [], torch.compile
    monkeypatch.setattr(captured, "check_compiler", lambda device: None)
    monkeypatch.setattr(torch, "compile", partial(compile, backend=lambda graph, inputs: graphs.append(graph) or graph))
    model = tiny_model(n_future=3, rank=2, target="lm_head", block_size=64)
    steps = Captured(model, Greedy(), speculative, compile=True)
    for prompt in ([1, 2], [3, 4, 1]):
        assert list(steps.generate(prompt, 40)) == list(generate_oracle(model, prompt, 40, sampler=Greedy()))
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own
def test_a_compiled_text_is_the_oracles(monkeypatch):
    """Greedy in float64, past the block, with a cache that grows; and draws that are a function of
    the seed."""
    try:
        captured.check_compiler(torch.device("cpu"))
    except BadInput:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(captured, "SMALLEST", 16)
    model = tiny_model(head="chain", target="lm_head", n_future=3, block_size=24)
    expected = list(generate_oracle(model, [1, 2], 40, sampler=Greedy()))
    for decoder in DECODERS:
        write = partial(decoder, model, [1, 2], 40, compile=True)
        assert list(write(sampler=Greedy())) == expected
    texts = [list(write(sampler=Sampling(generator=torch.Generator().manual_seed(seed)))) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    eager = Sampling(generator=torch.Generator().manual_seed(0))
    assert list(decoder(model, [1, 2], 40, sampler=eager)) == texts[0]


# -----------------------------------------------------------------------------
# the distribution


@three
@pytest.mark.parametrize("config", [*SMALL, SMALL[0] | dict(block_size=3, n_token=2)],
                         ids=["V3n2", "V2n3", "V2n3r1", "past the block"])
def test_the_distribution_is_the_targets(config, variant, monkeypatch):
    """Float64, over all random outcomes: to 1e-12."""
    model = tiny_model(**variant, **config)
    length = 4 if "block_size" in config else 3
    for decoder in DECODERS:
        texts = enumerated(lambda choose: decoder(model, [0, 1], length, sampler=Sampling()), monkeypatch)
        assert total_variation(texts, expected_texts(model, [0, 1], length)) < 1e-12


@pytest.mark.parametrize("speculative", [False, True])
def test_draws_follow_the_target(speculative):
    """Chi-square of 2,000 texts with real random numbers. Chance of a false alarm: 1e-9."""
    model = chi_square_model("full")
    steps = Captured(model, Sampling(generator=torch.Generator().manual_seed(1)), speculative)
    texts = [tuple(steps.generate([0, 1], 3)) for _ in range(2000)]
    assert chi_square_p_value(texts, expected_texts(model, [0, 1], 3)) > 1e-9


def step_without_roll_back(steps, cache, n_drafts, step=Captured.step):
    found = step(steps, cache, n_drafts)
    cache.on_device += n_drafts - found[0, :1]
    return found


def see_all(places, n):
    return torch.ones(*places.shape, n, dtype=torch.bool).unsqueeze(1)


def begin_a_length_less(steps, window, begin=Captured.begin):
    cache, hidden = begin(steps, window)
    cache.on_device -= 1
    return cache, hidden


WRONG = {"roll-back": (Captured, "step", step_without_roll_back), "mask": (batched, "visible", see_all),
         "length": (Captured, "begin", begin_a_length_less)}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_steps_are_caught(name, monkeypatch):
    """No roll-back of the drafts, no mask, a wrong place: the enumeration of
    `test_the_distribution_is_the_targets` fails. (Chain's texts are those that end soonest.)"""
    model = chi_square_model("chain")
    monkeypatch.setattr(*WRONG[name])
    write = partial(generate, model, [0, 1], 3)
    texts = enumerated(lambda choose: write(), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], 3)) > 0.01


def test_the_state_of_the_last_token_is_kept():
    """A head that knows the text has all its drafts accepted: from any other state it would not."""
    model, stats = counting_model(7, 5, "marginal"), Stats()
    text = list(generate(model, [3], 41, sampler=Greedy(), stats=stats))
    assert text == [(4 + i) % 7 for i in range(41)] and stats.tokens_per_step == 5


# -----------------------------------------------------------------------------
# bad calls


def test_what_cannot_be_recorded_is_refused():
    model = tiny_model(target="lm_head")
    for decoder in DECODERS:
        for sampler in (Coupled(0), type("Own", (Greedy,), {})()):
            with pytest.raises(BadInput, match=f"not by {type(sampler).__name__}"):
                decoder(model, [1], 3, sampler=sampler)
        with pytest.raises(BadInput, match="eval"):
            list(decoder(tiny_model().train(), [1], 3))
    with pytest.raises(BadInput, match="n_future = 1"):
        generate(tiny_model(n_future=1), [1], 3)
    with pytest.raises(BadInput, match="masks at places of its own"):
        list(generate(tiny_model(head="mask", target="lm_head"), [1], 3))


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("sampler", [Greedy, Sampling])
def test_nan_is_refused_and_leaves_nothing(sampler, speculative):
    """A position that no prompt reaches is NaN; once it is mended, the next text is right."""
    model = tiny_model(target="lm_head")
    wpe, steps = model.transformer.wpe.weight, Captured(model, sampler(), speculative)
    torch.manual_seed(0)
    expected, good = list(steps.generate([1], 8)), wpe[5].clone()
    wpe.data[5] = float("nan")
    with pytest.raises(BadInput, match="NaN or infinite logits"):
        list(steps.generate([1], 8))
    wpe.data[5] = good
    torch.manual_seed(0)
    assert list(steps.generate([1], 8)) == expected


# -----------------------------------------------------------------------------
# replayed


@on_cuda
@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("head", LOOK_BACK)
def test_a_replayed_greedy_text_is_the_oracles(head, speculative):
    """Float64, past the block, twice: recorded and replayed."""
    model = tiny_model(head=head, target="lm_head", n_future=4, block_size=20).cuda()
    steps = Captured(model, Greedy(), speculative)
    for prompt in ([1], [2, 3, 1], [4, 4, 4, 1]):
        expected = list(generate_oracle(model, prompt, 60, sampler=Greedy()))
        for _ in range(2):
            assert list(steps.generate(prompt, 60)) == expected
    assert all(cache.replay for cache in steps.caches.values())


@on_cuda
@pytest.mark.parametrize("speculative", [False, True])
def test_replayed_draws_follow_the_target(speculative):
    """Chi-square of 3,000 texts of 3 tokens, each drawn by a replay with random numbers of its own;
    the same seed gives the same text, recorded or replayed. Chance of a false alarm: 1e-9."""
    model = chi_square_model("full")
    expected = expected_texts(model, [0, 1], 3)
    generator = torch.Generator("cuda").manual_seed(0)
    steps = Captured(model.cuda(), Sampling(generator=generator), speculative)
    texts = [tuple(steps.generate([0, 1], 3)) for _ in range(3000)]
    assert chi_square_p_value(texts, expected) > 1e-9
    generator.manual_seed(0)
    assert [tuple(steps.generate([0, 1], 3)) for _ in range(20)] == texts[:20]
