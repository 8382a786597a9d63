"""The number of drafts of a step: decoding stays exact as long as it depends on e and the drafts before, and the
paper's lossy use of CLP does not."""

import itertools
import json
import random

import pytest
import torch
from test_cp_head import chi_square_model, counting_model, enumerated, expected_texts, tiny_model, total_variation
from test_robustness import as_a_script_finds_it, call  # noqa: F401  (a fixture for this file, too)
from test_scripts import SMALL, run

from decode import Greedy, Sampling, Stats, draft, generate, generate_speculative
from decoders.coupled import Coupled
from decoders.draft_length import CLP, Confident, Fixed, agreement, collect, fit, generate_unverified, repetition
from model import BadInput


def random_clp(model, cost=0.2, scale=3.0):
    """A CLP of random weights, as wide as what the head sees."""
    width = model.head.see(torch.zeros(1, model.config.n_embd).double()).size(-1)
    clp = CLP(width, model.config.n_future, cost)
    clp.linear.double()
    torch.nn.init.normal_(clp.linear.weight, std=scale)
    return clp


def certain_clp(model, L):
    """A CLP that is sure of L drafts, whatever it sees."""
    clp = random_clp(model, scale=0.0)
    clp.linear.bias.data.zero_()[L] = 50.0
    return clp


class ByPrefix(Fixed):
    """Ends the drafts by chance, but always alike after the same tokens."""

    def stops(self, row, x):
        return random.Random(str(torch.cat(x).tolist())).random() < 0.4


class Scripted(Fixed):
    """These numbers of drafts, step after step."""

    def __init__(self, lengths):
        self.lengths = itertools.cycle(lengths)

    def most(self, e):
        return next(self.lengths)


POLICIES = {"none": lambda model: Fixed(0), "one": lambda model: Fixed(1), "confident": lambda model: Confident(0.7),
            "clp": random_clp, "prefix": lambda model: ByPrefix(9)}
policies = pytest.mark.parametrize("policy", POLICIES)


@policies
@pytest.mark.parametrize("head, target", [("cp", "marginal"), ("recurrent", "marginal"),
                                          ("gloeckle", "lm_head")])
@pytest.mark.parametrize("rank", [1, 2])
def test_decoding_is_exact_whatever_chooses_the_length(policy, head, target, rank, monkeypatch):
    """Every path of the real decoder, to 1e-12, on random models; with those policies that look at something, steps
    of more than one length occur."""
    seen = set()
    for seed in range(2):
        model = tiny_model(seed, vocab_size=2, n_future=4, n_layer=1, head=head, target=target, rank=rank)
        drafter = POLICIES[policy](model)

        def noted(*args):
            x, q = drafter(*args)
            seen.add(x.size(1) - 1)
            return x, q

        texts = enumerated(lambda choose: generate_speculative(model, [0, 1], 4, drafter=noted), monkeypatch)
        assert total_variation(texts, expected_texts(model, [0, 1], 4)) < 1e-12
    assert seen == {0} if policy == "none" else seen == {1} if policy == "one" else len(seen) > 1


def take_back(model, e, token, n_drafts, sampler):
    """Wrong: throws the last draft away where the head gave it less than half."""
    x, q = draft(model, e, token, n_drafts, sampler)
    if n_drafts and q[0, -2, x[0, -1]] < 0.5:
        return x[:, :-1], torch.cat((q[:, :-2], q[:, -1:]), 1)
    return x, q


@pytest.mark.parametrize("head", ["cp", "chain", "recurrent"])
def test_enumeration_rejects_a_length_that_looks_at_the_draft_it_throws_away(head, monkeypatch):
    model = chi_square_model(head)
    texts = enumerated(lambda choose: generate_speculative(model, [0, 1], 3, drafter=take_back), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], 3)) > 0.01


@policies
@pytest.mark.parametrize("seed", range(4))
def test_greedy_and_coupled_texts_are_the_oracles(policy, seed):
    """Token for token, at every length of the text, past the block; Coupled counts the drafts that were drawn."""
    model = tiny_model(seed, vocab_size=7, n_token=6, n_future=2 + seed, block_size=9, rank=1 + seed % 2,
                       head=("cp", "chain", "recurrent", "cp")[seed])
    for sampler in (Greedy, lambda: Coupled(seed)):
        expected = list(generate(model, [3, 1], 25, sampler=sampler()))
        for length in range(26):
            text = generate_speculative(model, [3, 1], length, sampler=sampler(), drafter=POLICIES[policy](model))
            assert list(text) == expected[:length]


@pytest.mark.parametrize("rank", [1, 2])
def test_every_sequence_of_lengths_writes_the_same_text_and_is_counted(rank):
    """With right heads a step of k drafts writes k + 1 tokens: 3 steps of all 64 kinds; and with random ones the text
    is the oracle's."""
    right, model = counting_model(7, 4, "marginal", rank), tiny_model(3, n_future=4, rank=rank, vocab_size=9)
    expected = list(generate(model, [1], 16, sampler=Greedy()))
    for lengths in itertools.product(range(4), repeat=3):
        stats, n_tokens, drafter = Stats(), 1 + sum(lengths) + 3, Scripted(lengths)
        text = list(generate_speculative(right, [3], n_tokens, sampler=Greedy(), stats=stats, drafter=drafter))
        assert text == [(4 + i) % 7 for i in range(n_tokens)] and stats.steps == 3
        steps = [[*range(1, k + 1), "bonus" if k else "plain"] for k in lengths]
        assert stats.origins == ["plain", *itertools.chain(*steps)]
        assert list(generate_speculative(model, [1], 16, sampler=Greedy(), drafter=Scripted(lengths))) == expected


def test_independent_heads_draw_at_once_unless_a_draft_may_be_the_last(monkeypatch):
    """A length that is known before keeps the one draw; one that is not draws no draft after the last one."""
    model, sampler, calls = tiny_model(rank=1, n_future=5), Sampling(), []
    draw = sampler.draw
    sampler.draw = lambda logits: calls.append(logits.size(-2)) or draw(logits)
    for policy, expected in ((Fixed(3), [3]), (certain_clp(model, 2), [2]), (Confident(1.0), [1]),
                             (Confident(0), [1] * 4)):
        calls.clear()
        with torch.no_grad():
            x, q = policy(model, torch.ones(1, 8).double(), torch.tensor([1]), 4, sampler)
        assert calls == expected and x.size(1) == q.size(1) == sum(expected) + 1 and not q[0, -1].any()


def test_confident_stops_by_the_product_of_the_largest_probabilities():
    """Rows of 0.8 at most: 0.8, 0.64, 0.512; each step begins anew."""
    policy, row = Confident(0.6), torch.tensor([[0.1, 0.8, 0.1]]).log() + 3
    for _ in range(2):
        assert policy.most(None) > 99
        assert [policy.stops(row, None) for _ in range(3)] == [False, False, True]


@pytest.mark.parametrize("cost", [0.0, 0.1, 0.5, 2.0])
def test_clp_drafts_what_promises_most_tokens_per_cost(cost):
    """Against the expectation of min(L, k), summed over L."""
    chosen = set()
    for seed in range(20):
        model = tiny_model(seed, n_future=5)
        clp, e = random_clp(model, cost), torch.randn(8).double()
        with torch.no_grad():
            p, k = clp.log_probs(e).exp().tolist(), clp.most(e[None])
        gain = [sum(p_L * (1 + min(L, k)) for L, p_L in enumerate(p)) / (1 + cost * k) for k in range(5)]
        assert k == gain.index(max(gain))
        chosen.add(k)
    assert chosen == {4} if cost == 0 else chosen == {0} if cost > 1 else len(chosen) > 1


@pytest.mark.parametrize("head", ["cp", "chain", "recurrent", "gloeckle", "layers"])
@pytest.mark.parametrize("sampler", [Greedy, lambda: Coupled(5)], ids=["greedy", "sampled"])
def test_labels_and_states_by_brute_force(head, sampler):
    """Each token of the text: the head's argmax drafts, one by one, beside the oracle's greedy continuation; and the
    state from a pass over all tokens before."""
    model, labels_seen = tiny_model(head=head, target="lm_head", vocab_size=3, n_future=4, block_size=16), set()
    for prompt in ([0, 1], [2], [1, 1, 0]):
        states, labels = collect(model, [prompt], 11, sampler())
        data = iter(zip(states, labels.tolist(), strict=True))
        text = prompt + list(generate(model, prompt, 12, sampler=sampler()))
        for t in range(len(prompt), min(len(prompt) + 11, 16 - 4 + 1)):  # t tokens are before it, and n follow
            e = model.head.see(model.hidden(torch.tensor([text[:t]]))[0])[-1]
            state, label = next(data)
            torch.testing.assert_close(state, e, rtol=0, atol=1e-12)
            oracle = list(generate(model, text[: t + 1], 3, sampler=Greedy()))
            conditionals, x, drafts = model.conditionals(e[None]), torch.tensor(text[t : t + 1]), []
            for _ in range(3):
                x = conditionals.next(x).argmax(-1)
                drafts.append(x.item())
            same = [a == b for a, b in zip(drafts, oracle)] + [False]
            assert label == same.index(False)
            labels_seen.add(label)
        assert next(data, None) is None
        assert torch.equal(collect(model, [prompt] * 2, 12, Greedy())[0].view(2, -1)[0],
                           collect(model, [prompt], 12, Greedy())[0].flatten())
    assert len(labels_seen) > 1


def test_collect_ends_at_a_stop_token():
    model = counting_model(7, 3, "marginal")
    states, labels = collect(model, [[3]], 20, Greedy(), stop_token=0)
    assert len(states) == 3 and labels.tolist() == [2, 2, 2]  # 4, 5 and 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fit_finds_the_frequencies(dtype):
    """Of states of two kinds: the shares of their labels. The fit is the same each time."""
    states = torch.eye(2, dtype=dtype).repeat_interleave(20, 0)
    labels = torch.tensor([0] * 15 + [2] * 5 + [1] * 10 + [2] * 10)
    clp, again = fit(states, labels, 3), fit(states, labels, 3)
    p = clp.log_probs(torch.eye(2, dtype=dtype)).exp()
    expected = torch.tensor([[0.75, 0, 0.25], [0, 0.5, 0.5]], dtype=p.dtype)
    torch.testing.assert_close(p, expected, rtol=0, atol=0.06)
    assert torch.equal(clp.linear.weight, again.linear.weight)


@pytest.mark.parametrize("rank", [1, 2])
def test_the_lossy_mode_writes_what_the_head_drafts(rank):
    """Greedy: each step L argmax drafts, and one token of the model's own; below tau the text is the model's."""
    model, prompt = tiny_model(3, n_future=4, rank=rank, block_size=32, vocab_size=9, target="lm_head"), [2]
    tokens = prompt + list(generate(model, prompt, 1, sampler=Greedy()))
    for _ in range(4):
        e, x = model.hidden(torch.tensor([tokens[:-1]]))[0, -1], torch.tensor(tokens[-1:])
        conditionals = model.conditionals(e[None])
        for _ in range(2):
            x = conditionals.next(x).argmax(-1)
            tokens.append(x.item())
        tokens += generate(model, tokens, 1, sampler=Greedy())
    stats, expected, clp = Stats(), tokens[1:], certain_clp(model, 2)
    lossy = list(generate_unverified(model, prompt, 13, clp, 0.9, sampler=Greedy(), stats=stats))
    assert lossy == expected and stats.tokens_per_step == 3
    plain = list(generate(model, prompt, 13, sampler=Greedy()))
    assert lossy != plain  # it is lossy here
    clp.linear.bias.data.zero_()  # sure of nothing
    assert list(generate_unverified(model, prompt, 13, clp, 0.9, sampler=Greedy())) == plain


@pytest.mark.parametrize("tau, lossy", [(0.9, False), (0.3, True)])
def test_the_lossy_mode_changes_the_distribution(tau, lossy, monkeypatch):
    """Unless CLP is never sure enough: P(L | e) = 1/3, 1/3, 1/3 and a little more for L = 2."""
    model = chi_square_model("cp")
    clp = random_clp(model, scale=0.0)
    clp.linear.bias.data.zero_()[2] = 0.01
    texts = enumerated(lambda choose: generate_unverified(model, [0, 1], 3, clp, tau), monkeypatch)
    distance = total_variation(texts, expected_texts(model, [0, 1], 3))
    assert distance > 0.01 if lossy else distance < 1e-12


def test_repetition_and_agreement_of_known_texts():
    assert repetition([[1, 2, 3, 4, 5]]) == 0 and repetition([[7] * 12]) == pytest.approx(0.9)
    assert repetition([[1, 2, 1, 2, 1, 2], [1, 2, 3]]) == pytest.approx(0.25)  # two of four 3-grams; none of one
    assert agreement([[1, 2, 3, 4]], [[1, 2, 3, 4]]) == (1, 4)
    assert agreement([[1, 2, 9, 4], [9, 2, 3, 4]], [[1, 2, 3, 4], [1, 2, 3, 4]]) == (0.75, 1)
    assert agreement([[1, 2]], [[1, 2, 3, 4]]) == (0.5, 2)  # one that ended


@pytest.mark.parametrize("wrong, words", [
    (lambda model, clp: Fixed(-1), "whole number of at least 0, not -1"),
    (lambda model, clp: Fixed(1.5), "not 1.5"),
    (lambda model, clp: Confident(1.5), "threshold must be at least 0 and at most 1, not 1.5"),
    (lambda model, clp: Confident(float("nan")), "not nan"),
    (lambda model, clp: generate_unverified(model, [1], 2, clp, 0), "tau must be above 0"),
    (lambda model, clp: generate_unverified(model, [1], 2, clp, 1.1), "at most 1, not 1.1"),
    (lambda model, clp: generate_unverified(tiny_model(n_future=1), [1], 2, clp, 0.5), "no head to draft from"),
    (lambda model, clp: collect(tiny_model(n_future=1), [[1]], 2, Greedy()), "no head to draft from"),
    (lambda model, clp: collect(model, [[1] * 6], 2, Greedy()), "no prompt leaves room for 3 tokens"),
    (lambda model, clp: collect(model, [], 2, Greedy()), "no prompt"),
])
def test_bad_input_is_named(wrong, words):
    model = tiny_model()
    with pytest.raises(BadInput, match=words):
        wrong(model, certain_clp(model, 1))


def test_the_script_end_to_end(tmp_path, monkeypatch, capsys):
    """All modes in one JSON object; the lossless ones write the text of plain decoding. What cannot be is one line."""
    run(tmp_path, "prepare_tinystories.py", "--toy", "--stories", 300)
    run(tmp_path, "train.py", "--preset", "toy", "--rank", 2, *SMALL)
    out = run(tmp_path, "decoders.draft_length", "--rounds", 1, "--max_new_tokens", 8, "--fit_texts", 1, "--lengths", 2, 7,
              "--thresholds", 0.2, "--taus", 0.1)
    result = json.loads(out.splitlines()[-1])
    names = ["plain", "speculative", "fixed 2", "confident 0.2", "CLP", "LOSSY 0.1"]
    assert [(row["mode"], row["temperature"]) for row in result["rows"]] == [(x, t) for t in (0.0, 1.0) for x in names]
    for row in result["rows"][:5]:
        assert row["agreement"] == [1.0, 8] and 0 <= row["repetition"] < 1 and row["tokens_per_step"] >= 1
    assert len(result["card"]["cost_of_a_draft"]) == 2 and result["card"]["clp_loss"] > 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    for flags, words in (("--taus 0", "above 0"), ("--out_dir no", "no checkpoint")):
        code, message = call("decoders.draft_length", flags)
        message += capsys.readouterr().err
        assert code and words in message and len(message.splitlines()) == 1
    path = tmp_path / "out/toy/ckpt.pt"
    ckpt = torch.load(path, weights_only=True)
    ckpt["meta"]["prompts"] = ckpt["meta"]["prompts"][:1]
    torch.save(ckpt, path)
    assert "one prompt" in call("decoders.draft_length", "")[1]
