"""Steps of fixed shapes: the same texts as step by step, on a GPU also when a graph replays them."""

import copy
import itertools
import pickle
from functools import partial

import pytest
import torch
from test_batched import a_model, some_prompts
from test_cp_head import (HEADS, SMALL, VARIANTS, chi_square_model, chi_square_p_value, counting_model, enumerated,
                          expected_texts, tiny_model, total_variation, variants)

from decode import Greedy, Sampling, Stats, generate, generate_speculative
from decoders import batched, captured
from decoders.captured import FixedCache, Steps, generate_cached_captured
from decoders.captured import generate as generate_speculative_captured
from decoders.coupled import Coupled
from model import BadInput, head_class

DECODERS = (generate_cached_captured, generate_speculative_captured)
decoders = pytest.mark.parametrize("decoder", DECODERS)
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


# -----------------------------------------------------------------------------
# token for token


@pytest.mark.parametrize("smallest", [2, 256])
@pytest.mark.parametrize("seed", range(8))
def test_greedy_texts_are_the_oracles(seed, smallest, monkeypatch):
    """Temperature 0, float64, past the block, and with a cache that has to grow; a stop token ends the text inside a
    block."""
    monkeypatch.setattr(captured, "SMALLEST", smallest)
    model = a_model(seed, block_size=5 + 2 * seed)
    length = 2 * model.config.block_size + 5
    for prompt in some_prompts(seed, model.config.block_size):
        expected = list(generate(model, prompt, length, sampler=Greedy()))
        stop = expected[length // 2]
        stopped = expected[: expected.index(stop) + 1]
        for decoder in DECODERS:
            write = partial(decoder, model, prompt, sampler=Greedy())
            assert list(write(length)) == expected and list(write(length, stop_token=stop)) == stopped
            assert list(write(3)) == expected[:3] and list(write(0)) == []


@pytest.mark.parametrize("head", [head for head in HEADS if not head_class(head).reads_trunk])
def test_steps_accept_what_they_do_one_by_one(head):
    """The same drafts: as many tokens per step, at every offset."""
    model, stats, expected = tiny_model(head=head, target="lm_head", block_size=40), Stats(), Stats()
    for prompt in ([1], [2, 3]):
        list(generate_speculative(model, prompt, 60, sampler=Greedy(), stats=expected))
        list(generate_speculative_captured(model, prompt, 60, sampler=Greedy(), stats=stats))
    assert stats == expected and stats.tokens_per_step > 1


@decoders
def test_texts_at_the_same_time_do_not_meet(decoder):
    """Two texts of one model in turn, and a third that is abandoned, before and after others have used their steps."""
    model, prompts = a_model(3, block_size=20), ([1, 2], [3], [4, 5, 6])
    expected = [list(generate(model, prompt, 30, sampler=Greedy())) for prompt in prompts]
    for _ in range(2):
        first, second, third = (decoder(model, prompt, 30, sampler=Greedy()) for prompt in prompts)
        assert list(itertools.islice(third, 7)) == expected[2][:7]
        pairs = list(zip(first, second))
        assert [list(text) for text in zip(*pairs)] == expected[:2]
        del third
    (steps,) = {len(pool) for pool in model.recorded.values()}
    assert 1 < steps <= 3  # they are used again


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


def test_options_of_a_sampler_do_not_meet():
    """top_k = 1 is greedy, whatever was asked for before; of many kinds of steps the last are kept."""
    model = a_model(5, block_size=12)
    expected = list(generate(model, [1], 20, sampler=Greedy()))
    for decoder, i in itertools.product(DECODERS, range(12)):
        list(decoder(model, [1], 20, sampler=Sampling(1 + i / 100)))
        assert list(decoder(model, [1], 20, sampler=Sampling(1 + i / 100, top_k=1))) == expected
    assert len(model.recorded) == captured.KEPT


@decoders
def test_functions_of_ones_own_do_not_meet(decoder, monkeypatch):
    """In a sampler's `warp`, each forbids another token; in the place of `verify`, a rule that takes no draft."""
    model = a_model(5, block_size=12)
    for banned in (0, 3, 7):
        sampler = Sampling(generator=torch.Generator().manual_seed(0))
        sampler.warp = lambda logits, x=banned: logits.softmax(-1) * (torch.arange(9) != x)
        assert banned not in list(decoder(model, [1], 60, sampler=sampler))
    monkeypatch.setattr(Greedy, "draw", lambda self, logits: (logits.argmin(-1), logits))
    assert list(decoder(model, [1], 5, sampler=Greedy()))[0] == model(torch.tensor([[1]]))[0, -1].argmin()


@decoders
def test_recordings_go_with_the_weights_and_stay_out_of_copies(decoder):
    model = a_model(5, block_size=12)
    for _ in range(3):
        list(decoder(model, [1], 9, sampler=Greedy()))
        assert len(model.recorded) == 1
        twin = pickle.loads(pickle.dumps(model))
        assert twin.recorded == copy.deepcopy(model).recorded == {}
        model.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=True)
    text = decoder(model, [1], 9, sampler=Greedy())
    next(text), next(text)
    model.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=True)
    list(decoder(model, [1], 9, sampler=Greedy()))
    list(text)  # whose steps are not kept
    assert [len(pool) for pool in model.recorded.values()] == [1]


def changed_in_place(model):
    for p in model.parameters():
        p.mul_(1.5)


def changed_tensors(model):
    for p in model.parameters():
        p.data = 1.5 * p.data


def changed_head(model):
    model.config.n_future = 4
    model.head = head_class(model.config.head)(model.config).to(model.device, model.dtype)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])
@pytest.mark.parametrize("change", [changed_in_place, changed_tensors, changed_head, lambda model: model.float(),
                                    lambda model: model.cpu()], ids="in_place tensors head dtype device".split())
def test_what_has_changed_is_recorded_anew(change, device):
    """Weights that others took the place of, another head, another type: the next text is the model's own."""
    model = tiny_model(**VARIANTS[3], n_future=3, block_size=12, vocab_size=11, n_token=9).to(device)
    for decoder in DECODERS:
        assert list(decoder(model, [1], 30, sampler=Greedy())) == list(generate(model, [1], 30, sampler=Greedy()))
    with torch.no_grad():
        change(model)
    for decoder in DECODERS:
        assert list(decoder(model, [1], 30, sampler=Greedy())) == list(generate(model, [1], 30, sampler=Greedy()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own
def test_a_compiled_text_is_the_oracles(monkeypatch):
    """Greedy in float64, past the block, with a cache that grows; and draws that are a function of the seed."""
    try:
        captured.check_compiler(torch.device("cpu"))
    except BadInput:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(captured, "SMALLEST", 16)
    model = tiny_model(head="chain", target="lm_head", n_future=3, block_size=24)
    expected = list(generate(model, [1, 2], 40, sampler=Greedy()))
    for decoder in DECODERS:
        write = partial(decoder, model, [1, 2], 40, compile=True)
        assert list(write(sampler=Greedy())) == expected
    texts = [list(write(sampler=Sampling(generator=torch.Generator().manual_seed(seed)))) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    eager = Sampling(generator=torch.Generator().manual_seed(0))
    assert list(decoder(model, [1, 2], 40, sampler=eager)) == texts[0]


# -----------------------------------------------------------------------------
# the distribution


@variants
@pytest.mark.parametrize("config", [*SMALL, SMALL[0] | dict(block_size=3, n_token=2)],
                         ids=["V3n2", "V2n3", "V2n3r1", "past the block"])
def test_the_distribution_is_the_targets(config, variant, monkeypatch):
    """Float64, over all random outcomes: to 1e-12."""
    model = tiny_model(**variant, **config)
    length = 4 if "block_size" in config else 3
    for decoder in DECODERS:
        texts = enumerated(lambda choose: decoder(model, [0, 1], length, sampler=Sampling()), monkeypatch)
        assert total_variation(texts, expected_texts(model, [0, 1], length)) < 1e-12


def step_without_roll_back(steps, n_drafts, step=Steps.step):
    new = step(steps, n_drafts)
    steps.cache.on_device += n_drafts - new[0, :1]
    return new


def see_all(places, n):
    return torch.ones(*places.shape, n, dtype=torch.bool).unsqueeze(1)


def put_a_length_less(cache, row, other, put=FixedCache.put):
    put(cache, row, other)
    cache.on_device -= 1


WRONG = {"roll-back": (Steps, "step", step_without_roll_back), "mask": (batched, "visible", see_all),
         "length": (FixedCache, "put", put_a_length_less)}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_steps_are_caught(name, monkeypatch):
    """No roll-back of the drafts, no mask, a wrong place: the enumeration of the last test fails."""
    model = chi_square_model("full")
    monkeypatch.setattr(*WRONG[name])
    write = partial(generate_speculative_captured, model, [0, 1], 3)
    texts = enumerated(lambda choose: write(), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], 3)) > 0.01


def test_the_state_of_the_last_token_is_kept():
    """A head that knows the text has all its drafts accepted: from any other state it would not."""
    model, stats = counting_model(7, 5, "marginal"), Stats()
    text = list(generate_speculative_captured(model, [3], 41, sampler=Greedy(), stats=stats))
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
        generate_speculative_captured(tiny_model(n_future=1), [1], 3)
    with pytest.raises(BadInput, match="head gloeckle reads the trunk"):
        generate_speculative_captured(tiny_model(head="gloeckle", target="lm_head"), [1], 3)


@decoders
def test_nan_is_refused_and_leaves_nothing(decoder):
    """A position that no prompt reaches is NaN; once it is mended, the next text is right."""
    model = tiny_model(target="lm_head")
    expected, good = list(generate(model, [1], 8, sampler=Greedy())), model.transformer.wpe.weight[5].clone()
    model.transformer.wpe.weight.data[5] = float("nan")
    for sampler in (Greedy(), Sampling(generator=torch.Generator().manual_seed(0))):
        with pytest.raises(BadInput, match="NaN or infinite logits"):
            list(decoder(model, [1], 8, sampler=sampler))
    model.transformer.wpe.weight.data[5] = good
    assert list(decoder(model, [1], 8, sampler=Greedy())) == expected


# -----------------------------------------------------------------------------
# replayed


@on_cuda
@variants
def test_a_replayed_greedy_text_is_the_oracles(variant):
    """Float64, past the block, twice: recorded and replayed."""
    model = tiny_model(**variant, n_future=4, block_size=20).cuda()
    for decoder, prompt in itertools.product(DECODERS, ([1], [2, 3, 1], [4, 4, 4, 1])):
        expected = list(generate(model, prompt, 60, sampler=Greedy()))
        for _ in range(2):
            assert list(decoder(model, prompt, 60, sampler=Greedy())) == expected
    assert all(steps.replay for kept in model.recorded.values() for steps in kept)


@on_cuda
@decoders
def test_replayed_draws_follow_the_target(decoder):
    """Chi-square of 3,000 texts of 3 tokens, each drawn by a replay with random numbers of its own; the same seed gives
    the same text, recorded or replayed. Chance of a false alarm: 1e-9."""
    model = chi_square_model("full")
    expected = expected_texts(model, [0, 1], 3)
    model = model.cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    sampler = Sampling(generator=generator)
    texts = [tuple(decoder(model, [0, 1], 3, sampler=sampler)) for _ in range(3000)]
    assert chi_square_p_value(texts, expected) > 1e-9
    generator.manual_seed(0)
    assert [tuple(decoder(model, [0, 1], 3, sampler=sampler)) for _ in range(20)] == texts[:20]
