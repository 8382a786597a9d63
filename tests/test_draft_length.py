"""The number of drafts of a step: decoding stays exact as long as it depends on e and the drafts
before, and the paper's lossy use of CLP does not."""

import itertools
import json
import random

import pytest
import torch
from helpers import FLAGS, LOOK_BACK, call, run, three
from test_cp_head import (chi_square_model, counting_model, enumerated, expected_texts, tiny_model,
                          total_variation)

from decode import Greedy, Sampling, Stats, generate, generate_oracle
from decoders.coupled import Coupled
from decoders.draft_length import (CLP, agreement, at_most, collect, confident, fit, fixed,
                                   generate_unverified, promising, repetition)
from model import BadInput


def random_clp(model, cost=0.2, scale=3.0):
    """A CLP of random weights, as wide as what the head sees."""
    width = model.split(model.hidden(torch.tensor([[0]])))[1].size(-1)
    clp = CLP(width, model.config.n_future, cost)
    clp.linear.double()
    torch.nn.init.normal_(clp.linear.weight, std=scale)
    return clp


def certain_clp(model, L):
    """A CLP that is sure of L drafts, whatever it sees."""
    clp = random_clp(model, scale=0.0)
    clp.linear.bias.data.zero_()[L] = 50.0
    return clp


def by_prefix(head):
    """Ends the drafts by chance, but always alike after the same tokens."""
    def draft(*args):
        x, q = head.draft(*args)
        ends = [random.Random(str(x[0, : k + 1].tolist())).random() < 0.4 for k in range(x.size(1))]
        k = ends.index(True) + 1 if True in ends else len(ends)
        return x[:, :k], None if q is None else q[:, :k]

    return draft


def scripted(head, lengths):
    """These numbers of drafts, step after step."""
    lengths = itertools.cycle(lengths)
    return lambda *args: at_most(head, next(lengths), *args)


POLICIES = {"none": lambda model: fixed(model.head, 0), "one": lambda model: fixed(model.head, 1),
            "confident": lambda model: confident(model.head, 0.6),
            "clp": lambda model: promising(model.head, random_clp(model)),
            "prefix": lambda model: by_prefix(model.head)}
policies = pytest.mark.parametrize("policy", POLICIES)


@policies
@three
def test_decoding_is_exact_whatever_chooses_the_length(policy, variant, monkeypatch):
    """Every path of the real decoder, to 1e-12, on random models; with those policies that look at
    something, steps of more than one length occur."""
    check_exact(policy, 3, monkeypatch, **variant)


@pytest.mark.slow
@policies
@pytest.mark.parametrize("head, target, rank", [
    ("cp", "marginal", 1), ("chain", "lm_head", 2), ("recurrent", "lm_head", 1), ("gloeckle", "lm_head", 1)])
def test_longer_windows_are_exact_whatever_chooses_the_length(policy, head, target, rank, monkeypatch):
    check_exact(policy, 4, monkeypatch, head=head, target=target, rank=rank)


def check_exact(policy, n, monkeypatch, **config):
    """Of texts of n tokens."""
    lengths = set()
    for seed in range(2):
        model = tiny_model(seed, vocab_size=2, n_future=n, n_layer=1, **config)
        draft = POLICIES[policy](model)

        def noted(*args):
            x, q = draft(*args)
            lengths.add(x.size(1))
            return x, q

        texts = enumerated(lambda choose: generate(model, [0, 1], n, draft=noted), monkeypatch)
        assert total_variation(texts, expected_texts(model, [0, 1], n)) < 1e-12
    of_policy = {"none": {0}, "one": {1}}
    assert lengths == of_policy.get(policy, lengths) and (policy in of_policy or len(lengths) > 1)


@pytest.mark.parametrize("options", [dict(temperature=0.7), dict(top_k=2)], ids=str)
@pytest.mark.parametrize("policy", ["confident", "prefix"])
def test_cut_windows_are_exact_under_warping(policy, options, monkeypatch):
    """The walk draws them, and confident looks at rows without the temperature."""
    model = tiny_model(vocab_size=3, n_future=3, n_layer=1)
    draft = POLICIES[policy](model)
    texts = enumerated(lambda choose: generate(model, [0, 1], 3, draft=draft, sampler=Sampling(**options)),
                       monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], 3, **options)) < 1e-12


def take_back(head):
    """Wrong: throws the last draft away where the head gave it less than half."""
    def draft(*args):
        x, q = head.draft(*args)
        k = x.size(1) - (q[0, -1, x[0, -1]] < 0.5).long().item()
        return x[:, :k], q[:, :k]

    return draft


@pytest.mark.parametrize("head", ["cp", "chain"])
def test_enumeration_rejects_a_length_that_looks_at_the_draft_it_throws_away(head, monkeypatch):
    model = chi_square_model(head)
    wrong = take_back(model.head)
    texts = enumerated(lambda choose: generate(model, [0, 1], 3, draft=wrong), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], 3)) > 0.01


@policies
@pytest.mark.parametrize("seed", range(4))
def test_greedy_and_coupled_texts_are_the_oracles(policy, seed):
    """Token for token, at every length of the text, past the block; Coupled counts the drafts that
    were drawn."""
    model = tiny_model(seed, vocab_size=7, n_token=6, n_future=2 + seed, block_size=9, rank=1 + seed % 2,
                       head=("cp", "chain", "recurrent", "cp")[seed])
    for sampler in (Greedy, lambda: Coupled(seed)):
        expected = list(generate_oracle(model, [3, 1], 25, sampler=sampler()))
        for length in range(26):
            text = generate(model, [3, 1], length, sampler=sampler(), draft=POLICIES[policy](model))
            assert list(text) == expected[:length]


@pytest.mark.parametrize("rank", [1, 2])
def test_every_sequence_of_lengths_writes_the_same_text_and_is_counted(rank):
    """With right heads a step of k drafts writes k + 1 tokens: 3 steps of all 64 kinds; and with
    random ones the text is the oracle's."""
    right, model = counting_model(7, 4, "marginal", rank), tiny_model(3, n_future=4, rank=rank, vocab_size=9)
    expected = list(generate_oracle(model, [1], 16, sampler=Greedy()))
    for lengths in itertools.product(range(4), repeat=3):
        stats, n_tokens, draft = Stats(), 1 + sum(lengths) + 3, scripted(right.head, lengths)
        text = list(generate(right, [3], n_tokens, sampler=Greedy(), stats=stats, draft=draft))
        assert text == [(4 + i) % 7 for i in range(n_tokens)] and stats.steps == 3
        steps = [[*range(1, k + 1), "bonus" if k else "plain"] for k in lengths]
        assert stats.origins == ["plain", *itertools.chain(*steps)]
        draft = scripted(model.head, lengths)
        assert list(generate(model, [1], 16, sampler=Greedy(), draft=draft)) == expected


@pytest.mark.parametrize("sampler", [Sampling(), Sampling(0.7), Greedy()])
def test_each_policy_makes_the_drafts_that_it_says(sampler):
    """fixed and CLP ask the head for no more than they keep; confident cuts after the first place
    where the product of the rows' largest probabilities is below its threshold."""
    model = tiny_model(n_future=6, rank=2)
    e, x1, asked = torch.ones(1, 8).double(), torch.tensor([1]), []
    draw = model.head.draft

    def noted(e, x1, n_drafts, *rest):
        asked.append(n_drafts)
        return draw(e, x1, n_drafts, *rest)

    model.head.draft = noted
    for policy, expected in ((fixed(model.head, 3), 3), (promising(model.head, certain_clp(model, 2)), 2),
                             (fixed(model.head, 9), 5)):
        with torch.no_grad():
            x, q = policy(e, x1, 5, sampler, model.unembed)
        assert asked.pop() == x.size(1) == expected and (q is None or q.size(1) == expected)
    lengths = set()
    for threshold in (0.0, 0.01, 0.05, 0.1, 0.2, 0.4, 1.0):
        with torch.no_grad():
            torch.manual_seed(0)
            whole, _ = draw(e, x1, 5, sampler, model.unembed)
            torch.manual_seed(0)
            x, q = confident(model.head, threshold)(e, x1, 5, sampler, model.unembed)
            tokens = torch.cat((x1[None], whole[:, :-1]), 1)
            chance, k = 1.0, 0
            for row in model.head.rows(e, tokens, model.unembed)[0]:
                chance, k = chance * row.exp().max().item(), k + 1
                if chance < threshold:
                    break
        assert torch.equal(x, whole[:, :k]) and (q is None or q.size(1) == k)
        lengths.add(k)
    assert {1, 5} < lengths


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


def likeliest(model, e, x1, k):
    """The head's argmax drafts at e (C,), one by one along its rows."""
    x = [x1]
    for _ in range(k):
        x.append(model.head.rows(e[None], torch.tensor([x]), model.unembed)[0, -1].argmax().item())
    return x[1:]


@pytest.mark.parametrize("head", LOOK_BACK)
@pytest.mark.parametrize("sampler", [Greedy, lambda: Coupled(5)], ids=["greedy", "sampled"])
def test_labels_and_states_by_brute_force(head, sampler):
    """Each token of the text: the head's argmax drafts, one by one, beside the oracle's greedy
    continuation; and the state from a pass over all tokens before."""
    model, labels_seen = tiny_model(head=head, target="lm_head", vocab_size=3, n_future=4, block_size=16), set()
    for prompt in ([0, 1], [2], [1, 1, 0]):
        states, labels = collect(model, [prompt], 11, sampler())
        data = iter(zip(states, labels.tolist(), strict=True))
        text = prompt + list(generate_oracle(model, prompt, 12, sampler=sampler()))
        for t in range(len(prompt), min(len(prompt) + 11, 16 - 4 + 1)):  # t tokens are before it, and n follow
            e = model.split(model.hidden(torch.tensor([text[:t]]))[0, -1])[1]
            state, label = next(data)
            torch.testing.assert_close(state, e, rtol=0, atol=1e-12)
            oracle = list(generate_oracle(model, text[: t + 1], 3, sampler=Greedy()))
            drafts = likeliest(model, e, text[t], 3)
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
    """Greedy: each step L argmax drafts, and one token of the model's own; below tau the text is
    the model's."""
    model, prompt = tiny_model(3, n_future=4, rank=rank, block_size=32, vocab_size=9, target="lm_head"), [2]
    tokens = prompt + list(generate_oracle(model, prompt, 1, sampler=Greedy()))
    for _ in range(4):
        tokens += likeliest(model, model.hidden(torch.tensor([tokens[:-1]]))[0, -1], tokens[-1], 2)
        tokens += generate_oracle(model, tokens, 1, sampler=Greedy())
    stats, expected, clp = Stats(), tokens[1:], certain_clp(model, 2)
    lossy = list(generate_unverified(model, prompt, 13, clp, 0.9, sampler=Greedy(), stats=stats))
    assert lossy == expected and stats.tokens_per_step == 3
    plain = list(generate_oracle(model, prompt, 13, sampler=Greedy()))
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
    (lambda model, clp: fixed(model.head, -1), "whole number of at least 0, not -1"),
    (lambda model, clp: fixed(model.head, 1.5), "not 1.5"),
    (lambda model, clp: confident(model.head, 1.5), "threshold must be at least 0 and at most 1, not 1.5"),
    (lambda model, clp: confident(model.head, float("nan")), "not nan"),
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
    """All modes in one JSON object; the lossless ones write the text of plain decoding. What cannot
    be is one line."""
    run(tmp_path, "prepare_tinystories.py", "--toy", "--stories", 300)
    run(tmp_path, "train.py", "--preset", "toy", "--rank", 2, *FLAGS)
    out = run(tmp_path, "decoders.draft_length", "--rounds", 5, "--max_new_tokens", 8, "--fit_texts", 1, "--lengths", 2, 7,
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
