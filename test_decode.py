"""The decoders: every fast path has exactly the oracle's law.

Three kinds of proof. Enumeration: `exact_law` runs the real decoder through every possible outcome of its random
choices and adds up their probabilities, in float64, to 1e-12. Chi-square: many runs with real random numbers, on the
seam that enumeration replaces. Greedy equality: token for token, over many random models. The first two must also
REJECT decoders that are wrong on purpose: the chi-square test all six, enumeration the five that come to an end.
"""

import itertools
from collections import Counter, defaultdict
from functools import partial
from unittest import mock

import pytest
import torch

import decode
from decode import Stats, draw, generate, generate_cached, generate_speculative, verify, warp, window_start
from test_cp_head import VARIANTS, joint_table, tiny_model, variants

# -----------------------------------------------------------------------------
# tools


def exact_law(run, monkeypatch):
    """The distribution of run(choose)'s result over all random outcomes, as a dict, by depth-first enumeration.

    choose(p) picks an index with the probabilities p; `draw` and `coin`, the two sources of randomness in decode.py,
    are made to call it. A path of choices is followed by replaying it and branching at its end.
    """
    law, todo = defaultdict(float), [[]]
    path, weight = [], 1.0

    def choose(p):
        nonlocal weight
        p = (p / p.sum()).tolist()
        if len(path) == len(prefix):
            first, *others = [k for k, p_k in enumerate(p) if p_k > 1e-14]  # less comes of rounding
            todo.extend(path + [k] for k in others)
            prefix.append(first)
        path.append(prefix[len(path)])
        weight *= p[path[-1]]
        return path[-1]

    def all_draws(p, generator):
        return torch.tensor([choose(row) for row in p.reshape(-1, p.size(-1))]).view(p.shape[:-1])

    def all_coins(p, generator):
        flips = [bool(choose(torch.stack((1 - p_k, p_k)))) for p_k in p.nan_to_num(0).clamp(max=1).flatten()]
        return torch.tensor(flips, dtype=torch.bool).view(p.shape)

    with monkeypatch.context() as patch:
        patch.setattr(decode, "draw", all_draws)
        patch.setattr(decode, "coin", all_coins)
        while todo:
            prefix, path, weight = todo.pop(), [], 1.0
            law[tuple(run(choose))] += weight
    return law


def oracle_law(model, prompt, length, **warp_options):
    """P(text) of every text of that length: the product of the next-token probabilities, from full forward passes."""
    law = {(): 1.0}
    for _ in range(length):
        longer = {}
        for text, p in law.items():
            window = (prompt + list(text))[window_start(len(prompt) + len(text), model.config.block_size) :]
            rows = warp(model(torch.tensor([window]))[0, -1], n_token=model.config.n_token, **warp_options)
            longer |= {text + (x,): p * p_x for x, p_x in enumerate(rows.tolist())}
        law = longer
    return law


def total_variation(a, b):
    return sum(abs(a.get(x, 0) - b.get(x, 0)) for x in {*a, *b}) / 2


def chi_square_p_value(samples, law):
    """How likely counts this far from the law are. Cells with fewer than 5 expected counts are pooled."""
    counts, N = Counter(samples), len(samples)
    cells = [(counts[x], N * p) for x, p in law.items() if N * p >= 5]
    pooled = (N - sum(c for c, _ in cells), N - sum(e for _, e in cells))
    cells += [pooled] if pooled[1] >= 1 else []
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    half = torch.tensor([len(cells) - 1, statistic], dtype=torch.float64) / 2
    return torch.special.gammaincc(*half).item()


# -----------------------------------------------------------------------------
# decoders that are wrong; four of them are bugs of real projects or papers


def argmax_draft(model, e, token, to_probs, generator):
    """Drafts the most probable token but verifies as if it had been drawn from q (jaymody/speculative-sampling #3)."""
    log_b, factor = model.cp_factors(e)
    log_p, x, drafted, q = factor(1, None).log_softmax(-1), token, [], []
    for s in range(2, model.config.n_future + 1):
        log_b, log_p = log_b + log_p[:, x].squeeze(-1), factor(s, x).log_softmax(-1)
        q.append(to_probs((log_b.softmax(0) @ log_p.exp()).log()))
        x = q[-1].argmax(-1, keepdim=True)
        drafted.append(x)
    return torch.cat(drafted), torch.stack((*q, torch.zeros_like(q[0])))


def prior_component_draft(model, e, token, to_probs, generator):
    """Draws one component from w, and the drafts from it, but verifies against the rows of the posterior."""
    log_b, factor = model.cp_factors(e)
    a = decode.draw(log_b.exp().unsqueeze(0), generator)
    log_p, x, drafted, q = factor(1, None).log_softmax(-1), token, [], []
    for s in range(2, model.config.n_future + 1):
        log_b, log_p = log_b + log_p[:, x].squeeze(-1), factor(s, x).log_softmax(-1)
        q.append(to_probs((log_b.softmax(0) @ log_p.exp()).log()))
        x = decode.draw(log_p.exp()[a], generator)
        drafted.append(x)
    return torch.cat(drafted), torch.stack((*q, torch.zeros_like(q[0])))


def blind_rows_draft(model, e, token, to_probs, generator, draft=decode.draft):
    """Drafts see the token before them, but are verified as if all of them had seen x_1: wrong where they did not."""
    drafted, q = draft(model, e, token, to_probs, generator)
    log_b, factor = model.cp_factors(e)
    log_p, blind = factor(1, None).log_softmax(-1), []
    for s, x in enumerate((token, *drafted[:-1].split(1)), 2):
        log_b, log_p = log_b + log_p[:, x].squeeze(-1), factor(s, token).log_softmax(-1)
        blind.append(to_probs((log_b.softmax(0) @ log_p.exp()).log()))
    return drafted, torch.stack((*blind, q[-1]))


def missing_from_p(k, p, q):
    """Redraws from p after a rejection (Medusa's nucleus path)."""
    return k * p


def missing_without_k(k, p, q):
    """Redraws from max(p - q, 0), the residual of token by token verification, behind kept drafts, too."""
    return (p - q).relu()


def step_without_residual(model, cache, e, token, max_drafts, to_probs, generator):
    """Drops the draw after a rejection and drafts anew from the accepted prefix (as one published algorithm reads)."""
    drafted, q = decode.draft(model, e, token, to_probs, generator)
    tokens = torch.cat((token, drafted))
    hidden = model.hidden(tokens.unsqueeze(0), cache)[0]
    p = to_probs(model.target_logits(hidden))
    x = drafted.unsqueeze(-1)
    kept = decode.coin(p[:-1].gather(-1, x) / q[:-1].gather(-1, x), generator)
    k = kept.long().cumprod(0).sum().item()
    if k == len(drafted):
        bonus = decode.draw(p[-1:], generator)
        return hidden[-1], bonus, torch.cat((torch.tensor([k]), drafted, bonus))
    if k == 0:
        return step_without_residual(model, rolled_back(cache, len(tokens)), e, token, max_drafts, to_probs, generator)
    # the last accepted draft becomes the pending token: it is emitted now, and its predecessor's state drafts next
    return hidden[k - 1], tokens[k : k + 1], torch.cat((torch.tensor([k - 1]), drafted, tokens[k : k + 1]))


def rolled_back(cache, T):
    cache.length -= T
    return cache


WRONG = {"argmax_draft": ("draft", argmax_draft), "prior_component": ("draft", prior_component_draft),
         "missing_from_p": ("missing", missing_from_p), "missing_without_k": ("missing", missing_without_k),
         "no_residual": ("speculative_step", step_without_residual), "blind_rows": ("draft", blind_rows_draft)}


# -----------------------------------------------------------------------------
# warp and draw


def test_warp_matches_its_definition():
    """Temperature, top-k and top-p against a slow loop; padded ids have no column; temperature 0 leaves the logits."""
    torch.manual_seed(0)
    logits = torch.randn(7, 12, dtype=torch.float64)
    for temperature, top_k, top_p in itertools.product((0.5, 1.0, 2.0), (None, 1, 3, 20), (None, 0.1, 0.6, 1.0)):
        got = warp(logits, temperature, top_k, top_p, n_token=10)
        for row, p in zip(logits[:, :10], got):
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
    assert torch.equal(warp(logits, 0, n_token=10), logits[:, :10])


def test_warp_widens_half_precision():
    assert warp(torch.randn(5).bfloat16()).dtype == torch.float32
    assert warp(torch.randn(5).double()).dtype == torch.float64


def test_draw_follows_the_row_and_never_takes_a_zero():
    """Chi-square of 200,000 draws; tokens of probability 0 at the beginning, inside and at the end never come out.
    Chance of a false alarm: 1e-9."""
    p = torch.tensor([0.0, 0.1, 0.0, 0.5, 0.15, 0.25, 0.0])
    tokens = draw(3 * p.expand(200_000, 7), torch.Generator().manual_seed(0)).tolist()
    assert {0, 2, 6}.isdisjoint(tokens)
    assert chi_square_p_value(tokens, dict(enumerate(p.tolist()))) > 1e-9


# -----------------------------------------------------------------------------
# verify


def random_laws(kind, seed, V=3, n=3, scale=2.0):
    """A target over n tokens and a draft law over n - 1, given those before: p[k], q[k] of shape (V,) * (k + 1)."""
    torch.manual_seed(seed)
    if kind == "flat":  # four tokens that nobody is sure of: what is missing has several tokens, whatever the rule
        V, scale = 4, 1.0
    if kind == "deep":
        V, n = 2, 5
    p = [torch.softmax(scale * torch.randn((V,) * (k + 1), dtype=torch.float64), -1) for k in range(n)]
    q = [torch.softmax(scale * torch.randn((V,) * (k + 1), dtype=torch.float64), -1) for k in range(n - 1)]
    if kind == "equal":
        q = p[:-1]
    if kind == "greedy":
        p, q = ([torch.nn.functional.one_hot(t.argmax(-1), V).double() for t in law] for law in (p, q))
    if kind == "zeros":  # supports that overlap in part
        p[0][0], q[0][1], p[1][..., 2] = 0, 0, 0
        p, q = ([t / t.sum(-1, keepdim=True) for t in law] for law in (p, q))
    if kind == "no second draft":
        q[1] = torch.zeros_like(q[1])
    return p, q


def rows_along(p, q, drafted):
    """The rows of p and q for the places of a draft, each given the drafts before it: (n, V) both, q's last all 0."""
    rows_p, rows_q = (torch.stack([t[tuple(drafted[:k])] for k, t in enumerate(law)]) for law in (p, q))
    return rows_p, torch.cat((rows_q, torch.zeros_like(rows_p[:1])))


def draft_and_verify(p, q, choose):
    """n - 1 drafts from q, how many of them verify accepts, and the token behind those."""
    drafted = []
    for t in q:
        row = t[tuple(drafted)]
        drafted.append(choose(row) if row.sum() else 0)
    n_accepted, token = verify(*rows_along(p, q, drafted), torch.tensor(drafted), None)
    return drafted, n_accepted.item(), token.item()


def verified_law(p, q, monkeypatch):
    """The exact law of n tokens when n - 1 are drafted from q and verified, and what is missing is drawn from p."""
    def run(choose):
        drafted, n_accepted, token = draft_and_verify(p, q, choose)
        text = [*drafted[:n_accepted], token]
        while len(text) < len(p):
            text.append(choose(p[len(text)][tuple(text)]))
        return text

    return exact_law(run, monkeypatch)


def law_of(p):
    joint = p[0]
    for t in p[1:]:
        joint = joint.unsqueeze(-1) * t
    return {x: joint[x].item() for x in itertools.product(range(len(p[0])), repeat=len(p))}


@pytest.mark.parametrize("kind", ["random", "equal", "greedy", "zeros", "no second draft", "flat", "deep"])
def test_verify_is_exact_by_enumeration(kind, monkeypatch):
    """Whatever q is, what verify lets through and draws has the law p, to 1e-12: guards a wrong residual (softmax of
    it, transformers PR 28508; redrawn from p, Medusa), one-hot rows (litgpt), and rows without a draft."""
    for seed in range(2 if kind in ("flat", "deep") else 5):
        p, q = random_laws(kind, seed)
        assert total_variation(verified_law(p, q, monkeypatch), law_of(p)) < 1e-12


def token_keep_probability(p, q, drafted):
    """As if every draft was judged by its own min(1, p / q), but with the coins of block verification."""
    x = drafted.unsqueeze(-1)
    ratio = torch.where(q[:-1].gather(-1, x) > 0, p[:-1].gather(-1, x) / q[:-1].gather(-1, x), 0.0)
    return torch.cat((torch.ones(1, 1), ratio.clamp(max=1).cumprod(0)))


RULES = [("missing", missing_from_p), ("missing", missing_without_k), ("keep_probability", token_keep_probability)]


@pytest.mark.parametrize("name,wrong", RULES, ids=lambda x: getattr(x, "__name__", ""))
def test_verify_enumeration_rejects_a_wrong_rule(name, wrong, monkeypatch):
    """Negative controls: the same check sees a correction drawn from p, the residual max(p - q, 0) of token by token
    verification, and that rule's keep probabilities."""
    p, q = random_laws("flat", 0)
    monkeypatch.setattr(decode, name, wrong)
    assert total_variation(verified_law(p, q, monkeypatch), law_of(p)) > 0.005


@pytest.mark.parametrize("kind", ["random", "flat", "zeros", "deep"])
def test_drafts_are_kept_as_often_as_the_recurrence_says(kind, monkeypatch):
    """P(i or more drafts are accepted | the first i) = k_i, k_i = min(1, k_{i-1} p / q): an accept rule that is exact
    but stingy would pass every other test. On average it keeps no fewer than judging the drafts one by one."""
    p, q = random_laws(kind, 0)
    expected, gain = [defaultdict(float) for _ in p], 0.0  # [i]: P(the first i drafts, and i or more are accepted)
    for drafted in itertools.product(range(len(p[0])), repeat=len(q)):
        rows_p, rows_q = rows_along(p, q, drafted)
        weight = rows_q[:-1].gather(-1, torch.tensor(drafted).unsqueeze(-1)).prod().item()
        k, one_by_one = [1.0], [1.0]
        for i, x in enumerate(drafted):
            ratio = (rows_p[i, x] / rows_q[i, x]).item() if rows_q[i, x] > 0 else 0.0
            k.append(min(1.0, k[-1] * ratio))
            one_by_one.append(one_by_one[-1] * min(1.0, ratio))
        assert decode.keep_probability(rows_p, rows_q, torch.tensor(drafted)).flatten().tolist() == pytest.approx(k)
        for i, k_i in enumerate(k):
            expected[i][drafted[:i]] += weight * k_i
        gain += weight * (sum(k) - sum(one_by_one))

    def run(choose):
        drafted, n_accepted, _ = draft_and_verify(p, q, choose)
        return [n_accepted, *drafted]

    outcomes = exact_law(run, monkeypatch)
    for i in range(1, len(p)):
        law = defaultdict(float)
        for (n_accepted, *drafted), probability in outcomes.items():
            law[tuple(drafted[:i])] += probability * (n_accepted >= i)
        assert total_variation(law, expected[i]) < 1e-12
    assert gain > 0.001


def test_greedy_verification_keeps_what_the_argmax_keeps():
    """Every draft of two tokens: kept up to the first that is not its row's argmax, whose token follows; a row of
    zeros, where nothing was drafted, keeps nothing. On one-hot rows block verification does the same."""
    torch.manual_seed(0)
    logits = torch.randn(3, 4)  # (n, V)
    best, one_hot = logits.argmax(-1).tolist(), torch.nn.functional.one_hot(logits.argmax(-1), 4).float()
    for drafted in itertools.product(range(4), repeat=2):
        n_kept = 0 if drafted[0] != best[0] else 1 if drafted[1] != best[1] else 2
        x = torch.tensor(drafted)
        q = torch.nn.functional.one_hot(torch.cat((x, x[:1])), 4).float()
        for offered in (2, 1, 0):
            q[offered:] = 0
            expected = (min(n_kept, offered), best[min(n_kept, offered)])
            for p, generator in ((logits, decode.Greedy()), (one_hot, None)):
                n_accepted, token = verify(p, q, x, generator)
                assert (n_accepted.tolist(), token.tolist()) == ([expected[0]], [expected[1]])


def test_verify_follows_p_with_real_random_numbers():
    """20,000 verifications, chi-square on the first token and on the bonus. Chance of a false alarm: 1e-9."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]), torch.tensor([[0.6, 0.1, 0.3], [0.0, 0.0, 0.0]])
    first, bonus = [], []
    for _ in range(20_000):
        drafted = draw(q[:1], generator)
        n_accepted, token = verify(p, q, drafted, generator)
        first.append((drafted if n_accepted else token).item())
        bonus += token.tolist() if n_accepted else []
    assert chi_square_p_value(first, dict(enumerate(p[0].tolist()))) > 1e-9
    assert chi_square_p_value(bonus, dict(enumerate(p[1].tolist()))) > 1e-9


def test_verify_never_draws_from_an_empty_row(monkeypatch):
    """p = q leaves nothing to correct, and all drafts are kept. Where rounding lets a coin fail all the same, the token
    is drawn from p: from an empty row it would be the id V, which is none."""
    p, drafted = torch.tensor([[0.3, 0.7, 0.0], [0.6, 0.4, 0.0]]), torch.tensor([1])
    q = torch.stack((p[0], torch.zeros(3)))
    for seed in range(20):
        n_accepted, token = verify(p, q, drafted, torch.Generator().manual_seed(seed))
        assert n_accepted.item() == 1 and token.item() in (0, 1)
    monkeypatch.setattr(decode, "coin", lambda p, generator: torch.zeros_like(p, dtype=torch.bool))
    tokens = [verify(p, q, drafted, torch.Generator().manual_seed(seed))[1].item() for seed in range(20)]
    assert set(tokens) == {0, 1}


def test_verify_survives_tiny_probabilities():
    """p / q may overflow, and then meet a 0: no NaN, and nothing of probability 0 comes out. A ratio of 1e6 makes up
    for one of 1e-6, and no more than that."""
    p = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    q = torch.tensor([[1.0, 0.0], [1e-40, 1.0], [0.0, 0.0]])
    k = decode.keep_probability(p, q, torch.tensor([0, 0]))
    assert k.flatten().tolist() == [1.0, 0.0, 0.0]
    assert decode.keep_probability(p[1:], q[1:], torch.tensor([0])).isfinite().all()  # the overflow alone
    assert not decode.coin(torch.full((9,), torch.nan), None).any()
    n_accepted, token = verify(p, q, torch.tensor([0, 0]), torch.Generator().manual_seed(0))
    assert (n_accepted.item(), token.item()) == (0, 1)
    rare = torch.tensor([1e-6, 1 - 1e-6])
    k = decode.keep_probability(torch.stack((rare, 1 - rare, rare)), torch.stack((1 - rare, rare, rare * 0)),
                                torch.tensor([0, 0]))
    assert k.flatten().tolist() == pytest.approx([1.0, 1e-6, 1.0])


# -----------------------------------------------------------------------------
# the draft


@variants
def test_draft_rows_are_the_conditionals_of_the_joint(variant, monkeypatch):
    """q_s is P(x_s | x_1..x_{s-1}) of equation (1), and the drafts' law is the joint's conditional given x_1."""
    model = tiny_model(**variant, vocab_size=3)
    e = torch.randn(8, dtype=torch.float64)
    table, rows = joint_table(model, e).detach(), {}

    def run(choose):
        drafted, q = decode.draft(model, e, torch.tensor([1]), warp, None)
        rows[tuple(drafted.tolist())] = q
        return drafted.tolist()

    with torch.no_grad():
        law = exact_law(run, monkeypatch)
    given = table[1] / table[1].sum()
    assert total_variation(law, {x: given[x].item() for x in itertools.product(range(3), repeat=2)}) < 1e-12
    for (x2, _), q in rows.items():
        torch.testing.assert_close(q[0], given.sum(1), rtol=0, atol=1e-12)
        torch.testing.assert_close(q[1], given[x2] / given[x2].sum(), rtol=0, atol=1e-12)
        assert not q[2].any()


@pytest.mark.parametrize("rank", [1, 2])
def test_drafts_are_tokens_whatever_the_padding_has(rank):
    """A head that gives all its mass to ids that are no tokens costs speed alone: rows of q sum to 1 without them."""
    model = tiny_model(rank=rank, factors="full", vocab_size=6, n_token=4).float()
    with torch.no_grad():
        model.cp_head.factors[:, :, 4:] = 1000 * torch.ones(8)
        drafted, q = decode.draft(model, torch.ones(8), torch.tensor([1]), partial(warp, n_token=4),
                                  torch.Generator().manual_seed(0))
    assert (drafted < 4).all() and q.shape == (3, 4)
    torch.testing.assert_close(q.sum(-1), torch.tensor([1.0, 1.0, 0.0]))


# -----------------------------------------------------------------------------
# the decoders, exactly

CONTEXTS = ["none", "previous"]
SMALL = [dict(vocab_size=3, n_future=2, n_layer=1), dict(vocab_size=2, n_future=3, n_layer=1),
         dict(vocab_size=2, n_future=3, n_layer=1, rank=1)]


@variants
@pytest.mark.parametrize("config", SMALL, ids=["V3n2", "V2n3", "V2n3r1"])
def test_speculative_law_is_the_oracle_law_by_enumeration(config, variant, monkeypatch):
    """Every path of the real decoder through 3 tokens, that is through several steps, rejections and bonus draws: total
    variation to the autoregressive law below 1e-12."""
    model = tiny_model(**variant, **config)
    law = exact_law(lambda choose: generate_speculative(model, [0, 1], 3), monkeypatch)
    assert total_variation(law, oracle_law(model, [0, 1], 3)) < 1e-12


WARPS = [dict(temperature=0.7), dict(top_k=2), dict(top_p=0.6), dict(temperature=1.3, top_p=0.8)]


@pytest.mark.parametrize("options", WARPS, ids=str)
def test_speculative_law_is_exact_under_warping(options, monkeypatch):
    """Temperature, top-k and top-p apply to p and q alike (transformers #47932: ratio on un-warped logits)."""
    model = tiny_model(**SMALL[0])
    law = exact_law(lambda choose: generate_speculative(model, [0, 1], 3, **options), monkeypatch)
    assert total_variation(law, oracle_law(model, [0, 1], 3, **options)) < 1e-12


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("n_token,length", [(3, 4), (2, 5)])
def test_speculative_law_is_exact_past_the_block(n_token, length, rank, context, monkeypatch):
    """Block of 3: drafts get clamped and the window moves inside the text. With n_token = 2, one id of three is
    padding: it has a share in the factors, and none in the text."""
    model = tiny_model(**SMALL[0] | dict(rank=rank, context=context), block_size=3, n_token=n_token)
    law = exact_law(lambda choose: generate_speculative(model, [0, 1], length), monkeypatch)
    assert total_variation(law, oracle_law(model, [0, 1], length)) < 1e-12


def test_other_decoders_by_enumeration(monkeypatch):
    """The oracle's and the cached decoder's law is the product of next-token probabilities, padded ids left out."""
    model = tiny_model(**SMALL[0], block_size=3, n_token=2)
    for decoder in (generate, generate_cached):
        law = exact_law(lambda choose: decoder(model, [0, 1], 5), monkeypatch)
        assert total_variation(law, oracle_law(model, [0, 1], 5)) < 1e-12


FINITE = [(name, context) for name in WRONG for context in CONTEXTS if name != "no_residual"]  # enumeration ends
FINITE.remove(("blind_rows", "none"))  # rows can be blind only where drafts see their previous token


@pytest.mark.parametrize("name,context", FINITE)
def test_enumeration_rejects_wrong_decoders(name, context, monkeypatch):
    """Negative controls: each bug moves the law by more than 1 % on the very model that the chi-square test uses."""
    model = chi_square_model(context)
    monkeypatch.setattr(decode, *WRONG[name])
    length = 3 if name in ("blind_rows", "missing_without_k") else 2  # their first wrong row is the third token's
    law = exact_law(lambda choose: generate_speculative(model, [0, 1], length), monkeypatch)
    assert total_variation(law, oracle_law(model, [0, 1], length)) > 0.01


def chi_square_model(context):
    """Two components that differ and a target that neither of them matches: plenty of rejections."""
    model = tiny_model(vocab_size=3, n_future=3, n_layer=1, rank=2, target="lm_head", context=context,
                       factors="full" if context == "none" else "reduced")
    model.cp_head.factors.data *= 10
    if context == "previous":
        model.cp_head.out.data *= 5
    return model


def sampled(decoder, model, length, N):
    generator = torch.Generator().manual_seed(1)
    return [tuple(decoder(model, [0, 1], length, generator=generator)) for _ in range(N)]


LENGTH, N_SAMPLES = 3, 4000


@pytest.mark.parametrize("decoder,context", [(generate, "none"), (generate_cached, "none"),
                                             (generate_speculative, "none"), (generate_speculative, "previous")])
def test_sampled_texts_follow_the_oracle_law(decoder, context):
    """Chi-square of 4,000 texts of 3 tokens, with real random numbers. Chance of a false alarm: 1e-9."""
    model = chi_square_model(context)
    assert chi_square_p_value(sampled(decoder, model, LENGTH, N_SAMPLES), oracle_law(model, [0, 1], LENGTH)) > 1e-9


@pytest.mark.parametrize("name", WRONG)
def test_chi_square_rejects_wrong_decoders(name, monkeypatch):
    """Negative controls: the same test, with the same number of texts, rejects all six wrong decoders."""
    model = chi_square_model("previous" if name == "blind_rows" else "none")
    monkeypatch.setattr(decode, *WRONG[name])
    samples = sampled(generate_speculative, model, LENGTH, N_SAMPLES)
    assert chi_square_p_value(samples, oracle_law(model, [0, 1], LENGTH)) < 1e-9


# -----------------------------------------------------------------------------
# the decoders, greedily


@pytest.mark.parametrize("seed", range(24))
def test_greedy_texts_are_the_oracles(seed):
    """Temperature 0, float64: token for token over random models, ranks, n, prompts, and lengths 0, 1, 2, n, n + 1 and
    past the block. Guards the first token lost between prefill and loop (litgpt #2307) and every off-by-one."""
    rng = torch.Generator().manual_seed(seed)
    n, rank, block_size = (int(torch.randint(*lohi, (), generator=rng)) for lohi in ((2, 6), (1, 5), (2, 14)))
    model = tiny_model(seed, n_future=n, rank=rank, block_size=block_size, vocab_size=11, n_token=9,
                       **VARIANTS[seed % len(VARIANTS)])
    for T in (1, 2, block_size - 1 or 1, block_size, block_size + 1, 2 * block_size + 3):
        prompt = torch.randint(9, (T,), generator=rng).tolist()
        expected = list(generate(model, prompt, 3 * block_size, temperature=0))
        assert len(expected) == 3 * block_size
        for decoder in (generate_cached, generate_speculative):
            for length in (0, 1, 2, n, n + 1, 3 * block_size):
                assert list(decoder(model, prompt, length, temperature=0)) == expected[:length]


@pytest.mark.parametrize("seed", range(12))
def test_coupled_texts_are_the_same_whatever_decodes(seed):
    """With a Coupling all decoders write one text at any temperature, token for token, past the block and with a head
    that drafts badly; another seed writes another."""
    model = tiny_model(seed, n_future=2 + seed % 4, rank=1 + seed % 3, block_size=9, vocab_size=11, n_token=9,
                       **VARIANTS[seed % len(VARIANTS)])
    options = dict(temperature=(0.5, 1.0, 2.0)[seed % 3], top_k=(None, 4)[seed % 2], top_p=(None, 0.9)[seed // 6])
    texts = [list(decoder(model, [3, 1], 40, generator=decode.Coupling(s), **options))
             for s in (seed, seed + 1) for decoder in (generate, generate_cached, generate_speculative)]
    assert texts[0] == texts[1] == texts[2] != texts[3] == texts[4] == texts[5]


def test_coupled_texts_follow_the_oracle_law():
    """A text per seed: chi-square of 4,000 of them. Chance of a false alarm: 1e-9. Guards noise that repeats itself
    from place to place or from seed to seed."""
    model = chi_square_model("previous")
    texts = [tuple(generate_speculative(model, [0, 1], LENGTH, generator=decode.Coupling(s))) for s in range(N_SAMPLES)]
    assert chi_square_p_value(texts, oracle_law(model, [0, 1], LENGTH)) > 1e-9
    frozen = mock.patch.object(decode.Coupling, "place", property(lambda self: 0, lambda self, place: None),
                               create=True)
    with frozen:  # negative control: the same noise at every place
        texts = [tuple(generate(model, [0, 1], LENGTH, generator=decode.Coupling(s))) for s in range(N_SAMPLES)]
    assert chi_square_p_value(texts, oracle_law(model, [0, 1], LENGTH)) < 1e-9


def test_window_is_a_function_of_the_position():
    """It holds every token until the block is full, then between half a block and a block, and never moves back."""
    for block_size in range(2, 12):
        starts = [window_start(t, block_size) for t in range(1, 60)]
        assert starts == sorted(starts) and starts[:block_size] == [0] * block_size
        for t, start in enumerate(starts, 1):
            assert 1 <= t - start <= block_size
            assert start == 0 or t - start > block_size - block_size // 2 - 1


# -----------------------------------------------------------------------------
# heads that are right by construction


def counting_model(V, n, target, rank=2, block_size=64):
    """Token t is always followed by t + 1 mod V, and the head knows: P_a^(s) is certain of t + s.

    The residual stream carries the one-hot embedding of the last token alone (attention and MLP write nothing).
    """
    model = tiny_model(vocab_size=V, n_embd=V, n_head=1, n_layer=1, n_future=n, rank=rank, factors="full",
                       target=target, block_size=block_size, bias=False)
    eye = torch.eye(V, dtype=torch.float64)
    with torch.no_grad():
        model.transformer.wte.weight = torch.nn.Parameter(eye)
        model.transformer.wpe.weight.zero_()
        model.lm_head.weight = torch.nn.Parameter(30 * eye.roll(1, 0))
        for block in model.transformer.h:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        model.transformer.ln_f.weight.fill_(1)
        for s in range(n):
            model.cp_head.factors[s] = 30 * eye.roll(s + 1, 0)
    return model


@pytest.mark.parametrize("target", ["marginal", "lm_head"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_right_heads_are_always_accepted(target, temperature):
    """Every step yields n tokens. Guards an off-by-one in the hidden state that the draft starts from: that stays
    lossless, so no test of exactness can see it."""
    for n in (2, 3, 5):
        stats, model = Stats(), counting_model(7, n, target)
        generator = torch.Generator().manual_seed(0)
        options = dict(temperature=temperature, stats=stats, generator=generator)
        text = list(generate_speculative(model, [3], 1 + 5 * n, **options))
        assert text == [(4 + i) % 7 for i in range(1 + 5 * n)]
        assert stats.tokens_per_step == n and stats.acceptance == [1.0] * (n - 1)
        assert stats.histogram == [0] * n + [5]
        assert stats.origins == ["plain"] + 5 * [*range(1, n), "bonus"]


@pytest.mark.parametrize("stop", range(7))
@pytest.mark.parametrize("decoder", [generate, generate_cached, generate_speculative])
def test_text_ends_at_the_stop_token_wherever_it_falls(decoder, stop):
    """In any place of an accepted block, and as the very first token; what is behind it is neither yielded nor counted
    (transformers #47912)."""
    stats = Stats()
    text = list(decoder(counting_model(7, 5, "marginal"), [3], 30, temperature=0, stop_token=stop, stats=stats))
    assert text == [(4 + i) % 7 for i in range((stop - 4) % 7 + 1)] and text[-1] == stop
    assert stats.tokens == len(text) - (decoder is not generate)


def test_statistics_add_up():
    """Over a random text: histogram, tokens, steps and acceptance tell the same story, the overshoot cut off."""
    model, stats = tiny_model(n_future=4, rank=3, block_size=16), Stats()
    text = list(generate_speculative(model, [1], 200, generator=torch.Generator().manual_seed(0), stats=stats))
    assert len(text) == 200 and stats.tokens == 199  # the prefill's token is not a step's
    assert stats.steps == sum(stats.histogram) and stats.tokens == sum(k * h for k, h in enumerate(stats.histogram))
    assert all(0 <= a <= o for a, o in zip(stats.accepted, stats.offered)) and stats.offered[1] <= stats.accepted[0]
    assert 1 < stats.tokens_per_step < 4
    origins = Counter(stats.origins)  # the last step may be cut off; at the block's end a step drafts fewer or none
    assert len(stats.origins) == 200 and 0 <= sum(stats.accepted) - sum(origins[k] for k in (1, 2, 3)) < 4
    assert all(0 <= stats.accepted[k - 1] - origins[k] <= 1 for k in (1, 2, 3)) and origins["corrected"] > 5
    assert 0 <= stats.steps - (origins["corrected"] + origins["bonus"] + origins["plain"] - 1) <= 1


# -----------------------------------------------------------------------------
# how the step is built


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("rank,temperature", [(3, 1.0), (1, 1.0), (3, 0)])
def test_steps_run_without_the_host_and_in_fixed_shapes(rank, temperature, context, monkeypatch):
    """With a tensor for cache.length, twelve steps in a row read nothing back to the host and every operator of every
    step has the shapes of the first one, whatever gets accepted; and the text is the decoder's own for that seed."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
            out = func(*args, **(kwargs or {}))
            shapes[-1].append((func, getattr(out, "shape", None)))
            return out

    def forbidden(*args):
        raise AssertionError("a value was read back to the host")

    model, n_steps, shapes, blocks = tiny_model(n_future=4, rank=rank, block_size=64, context=context), 12, [], []
    seeded = partial(torch.Generator().manual_seed, 0)
    expected = list(generate_speculative(model, [1, 2], 1 + n_steps, temperature=temperature, generator=seeded()))
    cache, (to_probs, generator) = decode.new_cache(model), decode.chooser(model, seeded(), temperature)
    with torch.no_grad():
        e = model.hidden(torch.tensor([[1, 2]]), cache)[0, -1]
        token = draw(to_probs(model.target_logits(e)).unsqueeze(0), generator)
        first, cache.length = token, torch.tensor([2])
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "numpy", "__bool__", "__int__", "__index__"):
                patch.setattr(torch.Tensor, name, forbidden)
            for _ in range(n_steps):
                shapes.append([])
                length = cache.length
                with Record():
                    e, token, block = decode.speculative_step(model, cache, e, token, 3, to_probs, generator)
                    cache.length = length + block[:1] + 1
                blocks.append(block)
    assert all(step == shapes[0] for step in shapes)
    text = first.tolist()
    for k, *drafted, last in (block.tolist() for block in blocks):
        text += drafted[:k] + [last]
    assert (len({block[0].item() for block in blocks}) > 1 or temperature == 0) and text[: len(expected)] == expected


def test_seed_decides_the_text():
    """The same seed gives the same text, another seed (0 included) another one; the global RNG is not touched."""
    model = tiny_model(n_token=5)
    for decoder in (generate, generate_cached, generate_speculative):
        state = torch.get_rng_state()
        a, b, c = (list(decoder(model, [1], 40, generator=torch.Generator().manual_seed(s))) for s in (0, 0, 1))
        assert a == b != c and torch.equal(state, torch.get_rng_state())


def test_bad_calls_are_refused():
    model = tiny_model()
    for prompt in ([], [[1, 2]], torch.tensor([[1]])):
        with pytest.raises(ValueError, match="prompt"):
            list(generate_cached(model, prompt, 1))
    with pytest.raises(ValueError, match="n_future = 1"):
        generate_speculative(tiny_model(n_future=1), [1], 1)
    with pytest.raises(ValueError, match="eval"):
        list(generate(model.train(), [1], 1))
