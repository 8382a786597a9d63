"""The head and the decoders, to be read beside model.py and decode.py: what is claimed, and how it
is shown.

The head is checked in float64 against equation (1) written out. That decoding is exact has three
kinds of proof:

    enumeration   runs the real decoder through every outcome of its random choices and adds up their probabilities:
                  equal to the target's distribution to 1e-12
    chi-square    the same with real random numbers, over thousands of texts
    greedy        token for token the text of the oracle, over many random models

The first two must also REJECT decoders that are wrong on purpose, as real projects and papers were.

The tests run over all heads but the baselines: a head of your own is checked as soon as its
file is there.
"""

import itertools
import math
from collections import Counter, defaultdict

import pytest
import torch
from torch.nn import functional as F

import decode
from decode import (Greedy, Sampling, Stats, generate, generate_oracle, generate_plain, make_sampler, verify, warp,
                    window_start)
from model import GPT, GPTConfig, balance_loss, head_class, joint_log_probs, new_model, words

# -----------------------------------------------------------------------------
# models and equation (1), written out


def tiny_model(seed=0, scale=2.0, **config):
    """A random float64 model whose distributions are sharp enough to tell right from wrong."""
    torch.manual_seed(seed)
    defaults = dict(block_size=8, vocab_size=5, n_layer=2, n_head=2, n_embd=8, n_future=3, rank=2)
    model = new_model(GPTConfig(**{**defaults, **config})).double().eval()
    for p in model.parameters():
        p.data += 0.02 * scale * torch.randn_like(p)
        if p.dim() > 1:
            p.data *= scale
    return model


HEADS = ("cp", *words("head"))
MASKS = ("mask", "mask_linear")  # of the target lm_head alone
VARIANTS = [dict(head=head, target=target) for target in ("marginal", "lm_head") for head in HEADS
            if target == "lm_head" or head not in MASKS]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()))
heads = pytest.mark.parametrize("head", HEADS)
WRITTEN_OUT = ("cp", "full", "chain")  # those of the formula in joint_table
written_out = pytest.mark.parametrize("head", WRITTEN_OUT)


def joint_table(model, e):
    """P(x_1, ..., x_n) of every combination of tokens, (V,) * n, padding included, by the formula."""
    head, W, r, n = model.head, model.lm_head.weight, model.config.rank, model.config.n_future
    if model.config.head == "recurrent":
        return joint_of_recurrence(model, e)
    if model.config.head not in WRITTEN_OUT:
        return joint_of_rows(model, e)
    w = torch.softmax(head.router(e), -1)
    table = 0
    for a in range(r):
        term = w[a]
        for s in range(n):
            A = head.maps[s, a]
            logits = A @ e if model.config.head == "full" else W @ (A @ e)
            if s > 0 and model.config.head == "chain":  # a row for each previous token, equation (4)
                G, U = head.gate[s - 1], head.out
                norm = (W - W.mean(1, keepdim=True)) / (W.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
                logits = torch.stack([logits + W @ U @ (x * (G @ e)) for x in norm])
            term = term.unsqueeze(-1) * torch.softmax(logits, -1)
        table = table + term
    return table


def joint_of_recurrence(model, e):
    """The same of a recurrent head, equation (5), window by window."""
    head, W, V, table = model.head, model.lm_head.weight, model.config.vocab_size, []

    def norm(x):
        return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()

    def gelu(x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    for window in itertools.product(range(V), repeat=model.config.n_future):
        total, w = 0, torch.softmax(head.router(e), -1)
        for a in range(model.config.rank):
            h, term = head.maps[0, a] @ e, w[a]
            for s, x in enumerate(window):
                if s > 0:
                    z = torch.cat((norm(h), norm(W[window[s - 1]])))
                    h = h + head.fc3.weight @ gelu(head.fc2.weight @ gelu(head.fc1.weight @ z))
                term = term * torch.softmax(W @ h, -1)[x]
            total = total + term
        table.append(total)
    return torch.stack(table).view((V,) * model.config.n_future)


def joint_of_rows(model, e):
    """The same of a head whose formula is not written out here: its own rows, multiplied."""
    n, V, table = model.config.n_future, model.config.vocab_size, []
    for window in itertools.product(range(V), repeat=n):
        state, log_p = model.head.start(e[None], model.lm_head.weight), model.head.log_weights(e)
        for s, x in enumerate(window, 1):
            previous = torch.tensor([window[s - 2]]) if s > 1 else None
            log_p = log_p + model.head.rows(state, s, previous)[0, :, x]
        table.append(log_p.exp().sum())
    return torch.stack(table).view((V,) * n)


def a_state(model=None):
    """Some hidden state e; of a model, one as its head sees it, which may look at those before it."""
    if model is None:
        return torch.randn(8, dtype=torch.float64)
    return model.head.see(model.hidden(torch.randint(3, (1, 3)))[0])[-1].detach()


# -----------------------------------------------------------------------------
# the head


@variants
@pytest.mark.parametrize("rank", [1, 2])
def test_log_joint_is_equation_1_and_sums_to_one(variant, rank):
    """log P of the first 1, 2 and 3 tokens of every window, as training computes it."""
    model = tiny_model(rank=rank, **variant)
    e = a_state()
    table = joint_table(model, e)
    windows = torch.tensor(list(itertools.product(range(5), repeat=3)))
    joint = model.head.log_joint(e.expand(len(windows), -1), windows, model.lm_head.weight).exp()
    assert table.sum().item() == pytest.approx(1, abs=1e-12)
    for k in (1, 2, 3):
        marginal = table.sum(tuple(range(k, 3))) if k < 3 else table
        torch.testing.assert_close(joint[:, k - 1], marginal[tuple(windows[:, :k].T)], rtol=0, atol=1e-12)


@variants
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("n_token", [5, 3])
def test_conditionals_are_those_of_equation_1(variant, rank, n_token):
    """q_s = P(x_s | x_1..x_{s-1}) over the real tokens, whatever mass a component has on padding
    ids (n_token = 3). Guards a normalisation of each component by itself, which would forget how
    much of it is padding."""
    model = tiny_model(rank=rank, n_token=n_token, **variant)
    e = a_state()
    table = joint_table(model, e)
    for x1, x2 in itertools.product(range(n_token), repeat=2):
        conditionals = model.conditionals(e[None])
        for given, x in ((table[x1].sum(1), x1), (table[x1, x2], x2)):
            q, given = conditionals.next(torch.tensor([x])).softmax(-1), given[:n_token]
            torch.testing.assert_close(q[0], given / given.sum(), rtol=0, atol=1e-12)


@heads
@pytest.mark.parametrize("rank", [1, 2])
def test_the_methods_of_a_head_agree(head, rank):
    """Every row of log P_a^(s) sums to 1 over all ids, whatever the rank, and is what training sees;
    the marginal is the joint's own first step; and where no row depends on the drafts, the logits
    that independent heads draw from at once are those rows."""
    model = tiny_model(head=head, rank=rank)
    e, W, window = a_state(), model.lm_head.weight, torch.tensor([[1, 4, 2]])
    state, gold = model.head.start(e[None], W), model.head.gold_log_probs(e[None], window, W)[0]  # (n, r)
    for s, x in enumerate(window[0].tolist(), 1):
        rows = model.head.rows(state, s, window[0, s - 2 : s - 1] if s > 1 else None)[0]
        assert rows.exp().sum(-1).tolist() == pytest.approx([1.0] * model.head.rank, abs=1e-12)
        torch.testing.assert_close(rows[:, x], gold[s - 1], rtol=0, atol=1e-12)
        if not model.head.sees_drafts:
            logits = model.head.logits(e, W, slice(s - 1, s))[0]
            torch.testing.assert_close(rows, logits.log_softmax(-1), rtol=0, atol=1e-12)
    first = model.head.log_joint(e.expand(5, -1), torch.arange(5)[:, None].expand(-1, 3), W)[:, 0]
    torch.testing.assert_close(model.head.log_marginal(e, W), first, rtol=0, atol=1e-12)


@variants
def test_target_is_the_marginal_of_the_joint_or_the_lm_head(variant):
    """target "marginal" is the joint summed over x_2..x_n; target "lm_head" is the trunk's own
    softmax."""
    model = tiny_model(**variant)
    e = a_state()
    marginal = variant["target"] == "marginal"
    expected = joint_table(model, e).sum((1, 2)) if marginal else torch.softmax(model.lm_head(e), -1)
    torch.testing.assert_close(model.target_logits(e).softmax(-1), expected, rtol=0, atol=1e-12)


@variants
def test_loss_and_its_gradient_equal_brute_force(variant):
    """-log P of each window, read off the full table, has the value and the gradient of GPT.loss,
    and so do its parts: the bug guarded is a chunked or recomputed loss that drops a term (the
    router's, say)."""
    model, marginal = tiny_model(**variant).train(), variant["target"] == "marginal"
    idx, gold = torch.randint(5, (2, 4)), torch.randint(5, (2, 4, 3))
    loss, parts = model.loss(idx, gold, joint_weight=0.7, balance_weight=0.3)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    hidden = model.hidden(idx)
    tables = torch.stack([joint_table(model, e) for e in hidden.flatten(0, 1)])  # (N, V, V, V)
    x = gold.flatten(0, 1).T
    n = torch.arange(len(tables))
    first, second = tables.sum((2, 3))[n, x[0]], tables.sum(3)[n, x[0], x[1]]
    joint = -tables[n, x[0], x[1], x[2]].log().mean() / 3
    w = torch.softmax(model.head.router(hidden.flatten(0, 1)), -1)
    balance = 2 * sum((w.argmax(-1) == a).double().mean() * w[:, a].mean() for a in range(2))
    cross_entropy = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), x[0])
    expected = joint + 0.3 * balance if marginal else cross_entropy + 0.7 * joint + 0.3 * balance
    expected_grads = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)

    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    for a, b in zip(grads, expected_grads):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    torch.testing.assert_close(parts["joint"], joint.detach())
    torch.testing.assert_close(parts["next"], (-first.log().mean() if marginal else cross_entropy).detach())
    offsets = torch.stack((-first.log().mean(), (first / second).log().mean())).detach()
    torch.testing.assert_close(parts["offset"][:2], offsets)
    assert parts["offset"].mean().item() == pytest.approx(joint.item(), abs=1e-12)
    torch.testing.assert_close(parts["balance"], balance.detach())


@heads
def test_gradcheck_of_the_joint_loss(head):
    """Finite differences agree with the recomputed backward pass, for the hidden state, router,
    maps and W."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=4, n_embd=3, n_head=1, n_future=3, rank=2, head=head, target="lm_head")
    module = head_class(head)(config).double()
    gold, names = torch.randint(4, (5, 3)), [name for name, _ in module.named_parameters()]
    # what functional_call runs, on parameters that vary
    module.forward = lambda e, W: module.log_joint(module.see(e), gold, W)

    def loss(e, W, *params):
        return torch.func.functional_call(module, dict(zip(names, params)), (e, W)).sum()

    params = [p.detach() + 0.3 * torch.randn(p.shape) for p in module.parameters()]
    inputs = [x.double().requires_grad_() for x in (torch.randn(5, 3), torch.randn(4, 3), *params)]
    inputs[1].requires_grad_(head != "full")  # full has no use for W
    assert torch.autograd.gradcheck(loss, inputs)


def test_rank_one_is_independent_heads():
    """r = 1: the joint loss is the mean of n cross-entropies, and the router gets no gradient."""
    model = tiny_model(rank=1)
    idx, gold = torch.randint(5, (2, 4)), torch.randint(5, (2, 4, 3))
    loss, _ = model.loss(idx, gold)
    e = model.hidden(idx).flatten(0, 1)
    logits = [model.lm_head(e @ model.head.maps[s, 0].T) for s in range(3)]
    torch.testing.assert_close(loss, sum(F.cross_entropy(logits[s], gold[..., s].flatten()) for s in range(3)) / 3,
                               rtol=0, atol=1e-12)
    loss.backward()
    assert model.head.router.weight.grad.abs().max() < 1e-15


def test_n_future_one_is_plain_gpt():
    """n = 1: no head, no further parameter, and the loss is the cross-entropy of the logits."""
    model = tiny_model(n_future=1)
    assert model.head is None and model.n_params()[1] == 0
    idx, gold = torch.randint(5, (2, 4)), torch.randint(5, (2, 4, 1))
    loss, parts = model.loss(idx, gold)
    torch.testing.assert_close(loss, F.cross_entropy(model(idx).flatten(0, 1), gold.flatten()), rtol=0, atol=1e-12)
    torch.testing.assert_close(parts["next"], loss.detach())


def test_joint_share_trains_on_a_part_and_is_unbiased():
    """Averaged over many draws, the loss on a share of the positions is the loss on all of them
    (false alarm: the tolerance is over 6 standard errors). The balance loss, a product of two batch
    means, would be larger on a share, so it sees all positions at any share: equal to the bit."""
    model = tiny_model()
    idx, gold = torch.randint(5, (4, 8)), torch.randint(5, (4, 8, 3))
    with torch.no_grad():
        full, full_parts = model.loss(idx, gold, balance_weight=0.5)
        losses, parts = zip(*(model.loss(idx, gold, balance_weight=0.5, joint_share=0.25) for _ in range(100)))
    losses = torch.stack(losses)
    assert 0 < abs(losses.mean().item() - full.item()) < 6 * losses.std().item() / 10
    assert all(torch.equal(p["balance"], full_parts["balance"]) for p in parts)
    assert len({p["joint"].item() for p in parts}) > 90


@written_out
def test_factors_share_no_storage(head):
    """Changing one map changes that factor's probabilities alone. Guards [Block()] * n (Medusa PR
    133)."""
    model = tiny_model(head=head)
    e, x = a_state(), torch.tensor([1])

    def rows():
        state = model.head.start(e[None], model.lm_head.weight)
        return torch.stack([model.head.rows(state, s, x)[0] for s in (1, 2, 3)])

    before = rows()
    with torch.no_grad():
        model.head.maps[1, 0] += torch.randn_like(model.head.maps[1, 0])
    assert (rows() != before).any(-1).tolist() == [[False, False], [True, False], [False, False]]


@heads
def test_components_start_apart(head):
    """At equal components the router's gradient is exactly 0, whatever a position asks for; at our
    start it is not. The negative control makes the maps equal."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=16, n_future=3, rank=3, head=head)
    model = GPT(config).double()
    idx, gold = torch.randint(16, (4, 8)), torch.randint(16, (4, 8, 3))
    model.loss(idx, gold)[0].backward()
    assert model.head.router.weight.grad.abs().max().item() > 1e-7
    if head in WRITTEN_OUT:
        with torch.no_grad():
            model.head.maps.copy_(model.head.maps[:, :1].expand_as(model.head.maps).clone())
        model.zero_grad()
        model.loss(idx, gold)[0].backward()
        assert model.head.router.weight.grad.abs().max().item() < 1e-15


def test_chain_with_a_zero_term_is_the_cp_head():
    """U = 0, the start of training: equation (4) is that of the paper, to the bit, in float32 and
    in every direction: loss, gradients and, at this size, rows. Guards a term that has another
    effect than U's, like a norm of the sum."""
    cp = tiny_model(n_future=4).float()
    chain = from_checkpoint(cp.to_checkpoint(), head="chain").eval()
    idx, gold, e = torch.randint(5, (2, 8)), torch.randint(5, (2, 8, 4)), torch.randn(8)
    losses = [model.loss(idx, gold, balance_weight=0.1)[0] for model in (cp, chain)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for name, p in cp.named_parameters():
        assert torch.equal(p.grad, chain.get_parameter(name).grad), name
    states = [model.head.start(e[None], model.lm_head.weight) for model in (cp, chain)]
    for s, x in itertools.product((1, 2, 3, 4), range(5)):
        rows = [model.head.rows(state, s, torch.tensor([x])) for model, state in zip((cp, chain), states)]
        torch.testing.assert_close(*rows, rtol=0, atol=1e-6)  # other matrix shapes
    assert (chain.head.out.grad != 0).any()  # and it can leave its start


# -----------------------------------------------------------------------------
# what a head can learn, and what the balance loss is for

SAD_CRIED = [("sad", "cried"), ("happy", "smiled")]
SHE_LOST = [("she", "lost", "hers"), ("he", "lost", "his")]


def learned(phrases, head="cp", rank=1, balance_weight=0.05, seed=0):
    """Train on a text that goes on with one of the phrases, as probable as the other: bits per
    phrase, and usage."""
    torch.manual_seed(seed)
    words = sorted(set(sum(phrases, ())))
    gold = torch.tensor([[words.index(word) for word in phrase] for phrase in phrases]).unsqueeze(1)  # (B, T = 1, n)
    idx = torch.zeros(len(phrases), 1, dtype=torch.long)
    model = GPT(GPTConfig(block_size=2, vocab_size=len(words), n_layer=1, n_head=1, n_embd=16, head=head, rank=rank,
                          n_future=gold.size(-1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(300):
        loss, parts = model.loss(idx, gold, balance_weight=balance_weight)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return gold.size(-1) * parts["joint"].item() / math.log(2), parts["usage"]


@pytest.mark.parametrize("phrases,head,rank,bits", [
    (SAD_CRIED, "cp", 1, 2),  # two marginals, half and half: a product knows nothing of what its other factors drew
    (SAD_CRIED, "cp", 2, 1),  # a component for each phrase
    (SAD_CRIED, "full", 2, 1),
    (SAD_CRIED, "chain", 1, 1),  # the word before says it
    (SHE_LOST, "chain", 1, 2),  # here it does not: both have "lost" before the last word
    (SHE_LOST, "chain", 2, 1),  # and the components remember who lost it
    (SHE_LOST, "recurrent", 1, 1),  # as does a state
])
def test_learned_bits(phrases, head, rank, bits):
    """The phrase is a choice of 1 bit. What a head cannot say costs it a second one; 300 steps take
    each to its floor."""
    assert learned(phrases, head, rank)[0] == pytest.approx(bits, abs=0.02)


def test_balance_loss_prevents_a_collapse_that_happens_without_it():
    """Without it, from most starts, one component takes both phrases and stays at 2 bits; with it,
    from the same starts, each component gets one. Here 8 of 10 starts collapse, and none of the
    four does with a weight of 0.05."""
    without, balanced = ([learned(SAD_CRIED, rank=2, balance_weight=weight, seed=seed) for seed in range(1, 5)]
                         for weight in (0.0, 0.05))
    assert sum(bits > 1.9 and usage.min() < 0.01 for bits, usage in without) >= 2
    assert all(bits < 1.02 and usage.min() > 0.4 for bits, usage in balanced)


def test_balance_loss_extremes():
    """1 when the components share the work, r when one does it all, whatever the single positions
    do."""
    sharp = 40.0 * torch.eye(4, dtype=torch.float64)
    assert balance_loss(F.log_softmax(sharp, -1)).item() == pytest.approx(1)  # each position its own component
    assert balance_loss(torch.full((6, 4), 0.25, dtype=torch.float64).log()).item() == pytest.approx(1)
    assert balance_loss(F.log_softmax(sharp[:1].expand(6, 4), -1)).item() == pytest.approx(4)


def test_balance_loss_pulls_towards_balance():
    """A gradient step on the balance loss alone takes weight from the overused component."""
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    balance_loss(F.log_softmax(logits, -1)).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1] < 0).all()


def test_equation_1_of_the_readme():
    """joint_log_probs of a mixture that holds one phrase in each component: half for each, nothing
    for the others."""
    windows = torch.tensor(list(itertools.product((0, 1), repeat=2)))
    log_p = torch.eye(2)[windows].log()  # (4, n, r): component a is sure of word a at both offsets
    joint = joint_log_probs(torch.tensor([0.5, 0.5]).log().expand(4, -1), log_p)[:, -1].exp()
    assert joint.tolist() == [0.5, 0.0, 0.0, 0.5]


# -----------------------------------------------------------------------------
# how exactness is shown


def enumerated(run, monkeypatch):
    """The distribution of run(choose)'s result over all random outcomes, as a dict, by depth-first
    enumeration.

    choose(p) picks an index with the probabilities p; `categorical` and `bernoulli`, the two
    sources of randomness in decode.py, are made to call it. A path of choices is followed by
    replaying it and branching at its end.
    """
    result, todo = defaultdict(float), [[]]
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

    def all_draws(p, uniform):
        return torch.tensor([choose(row) for row in p.reshape(-1, p.size(-1))], dtype=torch.long).view(p.shape[:-1])

    def all_coins(p, uniform):
        flips = [bool(choose(torch.stack((1 - p_k, p_k)))) for p_k in p.nan_to_num(0).clamp(max=1).flatten()]
        return torch.tensor(flips, dtype=torch.bool).view(p.shape)

    with monkeypatch.context() as patch:
        patch.setattr(decode, "categorical", all_draws)
        patch.setattr(decode, "bernoulli", all_coins)
        while todo:
            prefix, path, weight = todo.pop(), [], 1.0
            result[tuple(run(choose))] += weight
    return result


def expected_texts(model, prompt, length, **warp_options):
    """P(text) of every text of that length: the product of the next-token probabilities, from full
    forward passes."""
    texts = {(): 1.0}
    for _ in range(length):
        longer = {}
        for text, p in texts.items():
            window = (prompt + list(text))[window_start(len(prompt) + len(text), model.config.block_size) :]
            rows = warp(model(torch.tensor([window]))[0, -1], **warp_options)
            longer |= {text + (x,): p * p_x for x, p_x in enumerate(rows.tolist())}
        texts = longer
    return texts


def total_variation(a, b):
    return sum(abs(a.get(x, 0) - b.get(x, 0)) for x in {*a, *b}) / 2


def chi_square_p_value(samples, expected):
    """How likely counts this far from the expected ones are. Cells with fewer than 5 expected
    counts are pooled."""
    counts, N = Counter(samples), len(samples)
    cells = [(counts[x], N * p) for x, p in expected.items() if N * p >= 5]
    pooled = (N - sum(c for c, _ in cells), N - sum(e for _, e in cells))
    cells += [pooled] if pooled[1] >= 1 else []
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    half = torch.tensor([len(cells) - 1, statistic], dtype=torch.float64) / 2
    return torch.special.gammaincc(*half).item()


# -----------------------------------------------------------------------------
# verify


def random_distributions(kind, seed, V=3, n=3, scale=2.0):
    """A target over n tokens and a draft over n - 1, given those before: p[k], q[k] of shape (V,) *
    (k + 1)."""
    torch.manual_seed(seed)
    if kind == "flat":  # four tokens that nobody is sure of: the residual has several tokens, whatever the rule
        V, scale = 4, 1.0
    if kind == "deep":
        V, n = 2, 5
    p = [torch.softmax(scale * torch.randn((V,) * (k + 1), dtype=torch.float64), -1) for k in range(n)]
    q = [torch.softmax(scale * torch.randn((V,) * (k + 1), dtype=torch.float64), -1) for k in range(n - 1)]
    if kind == "equal":
        q = p[:-1]
    if kind == "greedy":
        p, q = ([F.one_hot(t.argmax(-1), V).double() for t in ts] for ts in (p, q))
    if kind == "zeros":  # supports that overlap in part
        p[0][0], q[0][1], p[1][..., 2] = 0, 0, 0
        p, q = ([t / t.sum(-1, keepdim=True) for t in ts] for ts in (p, q))
    if kind == "no second draft":
        q[1] = torch.zeros_like(q[1])
    return p, q


def rows_along(p, q, drafted):
    """The rows of p and q for the places of a draft, each given the drafts before it: (n, V) both,
    q's last all 0."""
    rows_p, rows_q = (torch.stack([t[tuple(drafted[:k])] for k, t in enumerate(ts)]) for ts in (p, q))
    return rows_p, torch.cat((rows_q, torch.zeros_like(rows_p[:1])))


def draft_and_verify(p, q, choose):
    """n - 1 drafts from q, how many of them verify accepts, and the token after those."""
    drafted = []
    for t in q:
        row = t[tuple(drafted)]
        drafted.append(choose(row) if row.sum() else 0)
    n_accepted, token = verify(*rows_along(p, q, drafted), torch.tensor(drafted), None)
    return drafted, n_accepted.item(), token.item()


def verified(p, q, monkeypatch):
    """The exact distribution of n tokens if n - 1 are drafted from q and verified, and what is
    missing comes from p."""
    def run(choose):
        drafted, n_accepted, token = draft_and_verify(p, q, choose)
        text = [*drafted[:n_accepted], token]
        while len(text) < len(p):
            text.append(choose(p[len(text)][tuple(text)]))
        return text

    return enumerated(run, monkeypatch)


def joint_of(p):
    joint = p[0]
    for t in p[1:]:
        joint = joint.unsqueeze(-1) * t
    return {x: joint[x].item() for x in itertools.product(range(len(p[0])), repeat=len(p))}


@pytest.mark.parametrize("kind", ["random", "equal", "greedy", "zeros", "no second draft", "flat", "deep"])
def test_verify_is_exact_by_enumeration(kind, monkeypatch):
    """Whatever q is, what verify lets through and draws has the distribution p, to 1e-12: guards a
    wrong residual (softmax of it, transformers PR 28508; redrawn from p, Medusa), one-hot rows
    (litgpt), and rows without a draft."""
    for seed in range(2 if kind in ("flat", "deep") else 5):
        p, q = random_distributions(kind, seed)
        assert total_variation(verified(p, q, monkeypatch), joint_of(p)) < 1e-12


def residual_p(keep, p, q):
    """Redraws from p after a rejection (Medusa's nucleus path)."""
    return keep * p


def residual_without_keep(keep, p, q):
    """Redraws from max(p - q, 0), the residual of token by token verification, after kept drafts,
    too."""
    return (p - q).relu()


def keep_one_by_one(p, q, drafted):
    """As if every draft was judged by its own min(1, p / q), but with the coins of block
    verification."""
    y = drafted.unsqueeze(-1)
    ratio = torch.where(q[:-1].gather(-1, y) > 0, p[:-1].gather(-1, y) / q[:-1].gather(-1, y), 0.0)
    return torch.cat((torch.ones(1, 1), ratio.clamp(max=1).cumprod(0)))


RULES = [("residual", residual_p), ("residual", residual_without_keep), ("keep_probability", keep_one_by_one)]


@pytest.mark.parametrize("name,wrong", RULES, ids=lambda x: getattr(x, "__name__", ""))
def test_verify_enumeration_rejects_a_wrong_rule(name, wrong, monkeypatch):
    """Negative controls: the same check sees a correction drawn from p, the residual max(p - q, 0)
    of token by token verification, and that rule's keep probabilities."""
    p, q = random_distributions("flat", 0)
    monkeypatch.setattr(decode, name, wrong)
    assert total_variation(verified(p, q, monkeypatch), joint_of(p)) > 0.005


def keep_loop(p, q, drafted):
    """The recurrence (3) as verify's docstring has it."""
    keep = [1.0]
    for p_i, q_i, y_i in zip(p, q, drafted):
        keep.append(min(1.0, keep[-1] * (p_i[y_i] / q_i[y_i]).item()) if q_i[y_i] > 0 else 0.0)
    return keep


@pytest.mark.parametrize("kind", ["random", "flat", "zeros", "deep"])
def test_drafts_are_kept_as_often_as_the_recurrence_says(kind, monkeypatch):
    """P(i or more drafts are accepted | the first i) = keep_i of (3): an accept rule that is exact
    but stingy would pass every other test. On average it keeps more than judging the drafts one by
    one."""
    p, q = random_distributions(kind, 0)
    expected, gain = [defaultdict(float) for _ in p], 0.0  # [i]: P(the first i drafts, and i or more are accepted)
    for drafted in itertools.product(range(len(p[0])), repeat=len(q)):
        rows_p, rows_q = rows_along(p, q, drafted)
        weight = rows_q[:-1].gather(-1, torch.tensor(drafted).unsqueeze(-1)).prod().item()
        keep, one_by_one = keep_loop(rows_p, rows_q, drafted), keep_one_by_one(rows_p, rows_q, torch.tensor(drafted))
        assert decode.keep_probability(rows_p, rows_q, torch.tensor(drafted)).flatten().tolist() == pytest.approx(keep)
        for i, keep_i in enumerate(keep):
            expected[i][drafted[:i]] += weight * keep_i
        gain += weight * (sum(keep) - one_by_one.sum().item())

    def run(choose):
        drafted, n_accepted, _ = draft_and_verify(p, q, choose)
        return [n_accepted, *drafted]

    outcomes = enumerated(run, monkeypatch)
    for i in range(1, len(p)):
        found = defaultdict(float)
        for (n_accepted, *drafted), probability in outcomes.items():
            found[tuple(drafted[:i])] += probability * (n_accepted >= i)
        assert total_variation(found, expected[i]) < 1e-12
    assert gain > 0.001


def test_greedy_keeps_what_the_argmax_keeps():
    """Every draft of two tokens: kept up to the first that is not its row's argmax, whose token
    follows. On one-hot rows block verification does the same; and without a draft both give the
    first row's token."""
    torch.manual_seed(0)
    logits = torch.randn(3, 4)  # (k + 1, V)
    best, one_hot = logits.argmax(-1).tolist(), F.one_hot(logits.argmax(-1), 4).float()
    for drafted in itertools.product(range(4), repeat=2):
        n_kept = 0 if drafted[0] != best[0] else 1 if drafted[1] != best[1] else 2
        for offered in (2, 1, 0):
            x = torch.tensor(drafted[:offered], dtype=torch.long)
            q = torch.cat((F.one_hot(x, 4).float(), torch.zeros(1, 4)))
            expected = ([min(n_kept, offered)], [best[min(n_kept, offered)]])
            for n_accepted, token in (Greedy().verify(logits[: offered + 1], q, x),
                                      verify(one_hot[: offered + 1], q, x, None)):
                assert (n_accepted.tolist(), token.tolist()) == expected


# -----------------------------------------------------------------------------
# decoders that are wrong; five of them are bugs of real projects or papers


def posterior_rows(model, e, x, sampler):
    """The rows q that `draft` would draw from along given tokens x_1, x_2, ..., each (1,); see
    Conditionals."""
    conditionals = model.conditionals(e)
    return [sampler.warp(conditionals.next(x_s)) for x_s in x]


def argmax_draft(model, e, token, n_drafts, sampler):
    """Drafts the most probable token but verifies as if it had been drawn from q
    (jaymody/speculative-sampling #3)."""
    conditionals, x, q = model.conditionals(e), [token], []
    for _ in range(n_drafts):
        q.append(sampler.warp(conditionals.next(x[-1])))
        x.append(q[-1].argmax(-1))
    return torch.stack(x, 1), torch.stack((*q, torch.zeros_like(q[0])), 1)


def prior_component_draft(model, e, token, n_drafts, sampler):
    """Draws one component from w, and the drafts from it, but verifies against the rows of the
    posterior."""
    a = decode.categorical(model.head.log_weights(e).exp(), sampler.generator)  # (1,)
    state, x = model.head.start(e, model.lm_head.weight), [token]
    for s in range(2, n_drafts + 2):
        x.append(decode.categorical(model.head.rows(state, s, x[-1])[0, a].exp(), sampler.generator))
    q = posterior_rows(model, e, x[:-1], sampler)
    return torch.stack(x, 1), torch.stack((*q, torch.zeros_like(q[0])), 1)


def blind_rows_draft(model, e, token, n_drafts, sampler):
    """Drafts see the token before them, but are verified as if all of them had seen x_1: wrong
    where they did not."""
    x, q = draft(model, e, token, n_drafts, sampler)
    state, log_b = model.head.start(e, model.lm_head.weight), model.head.log_weights(e)
    log_p, blind = model.head.rows(state, 1, None), []
    for s, x_s in enumerate(x[0, :-1].split(1), 2):
        log_b, log_p = log_b + log_p[..., x_s].squeeze(-1), model.head.rows(state, s, token)
        blind.append(sampler.warp((log_b.softmax(-1) @ log_p[0].exp()).log()))
    return x, torch.stack((*blind, q[:, -1]), 1)


def step_without_residual(model, cache, before, token, n_drafts, sampler, lap=None, drafter=None):
    """Drops the draw after a rejection and drafts anew from the accepted prefix (as one published
    algorithm reads)."""
    length = cache.length
    x, q = (found[0] for found in decode.draft(model, before[-1:], token, n_drafts, sampler))
    hidden = model.hidden(x.unsqueeze(0), cache)[0]
    p, y = sampler.warp(model.target_logits(hidden)), x[1:].unsqueeze(-1)
    kept = decode.bernoulli(p[:-1].gather(-1, y) / q[:-1].gather(-1, y), sampler.generator)
    k = kept.long().cumprod(0).sum().item()
    if k == n_drafts:
        bonus = decode.categorical(p[-1:], sampler.generator)
        return hidden, bonus, [*x[1:].tolist(), bonus.item()], k
    cache.length = length + k
    if k == 0:
        return step_without_residual(model, cache, before, token, n_drafts, sampler)
    # the last accepted draft becomes the pending token: it is emitted now, and its predecessor's
    # state drafts next
    return hidden[:k], x[k : k + 1], x[1 : k + 1].tolist(), n_drafts


WRONG = {"argmax_draft": ("draft", argmax_draft), "prior_component": ("draft", prior_component_draft),
         "residual_p": ("residual", residual_p), "residual_without_keep": ("residual", residual_without_keep),
         "no_residual": ("speculative_step", step_without_residual), "blind_rows": ("draft", blind_rows_draft)}


# -----------------------------------------------------------------------------
# the decoders: their distribution

SMALL = [dict(vocab_size=3, n_future=2, n_layer=1), dict(vocab_size=2, n_future=3, n_layer=1),
         dict(vocab_size=2, n_future=3, n_layer=1, rank=1)]


@variants
def test_drafts_follow_the_joint_and_their_rows_are_its_conditionals(variant, monkeypatch):
    """What `draft` draws is the joint's conditional given x_1, and what it returns as q is what it
    drew from."""
    model = tiny_model(**variant, vocab_size=3)
    e, rows = a_state(), {}
    table = joint_table(model, e).detach()

    def run(choose):
        x, q = (found[0] for found in decode.draft(model, e[None], torch.tensor([1]), 2, Sampling()))
        rows[tuple(x[1:].tolist())] = q
        return x[1:].tolist()

    with torch.no_grad():
        drafts = enumerated(run, monkeypatch)
    given = table[1] / table[1].sum()
    assert total_variation(drafts, {x: given[x].item() for x in itertools.product(range(3), repeat=2)}) < 1e-12
    for (x2, _), q in rows.items():
        torch.testing.assert_close(q[0], given.sum(1), rtol=0, atol=1e-12)
        torch.testing.assert_close(q[1], given[x2] / given[x2].sum(), rtol=0, atol=1e-12)
        assert not q[2].any()


@variants
@pytest.mark.parametrize("config", SMALL, ids=["V3n2", "V2n3", "V2n3r1"])
def test_speculative_decoding_is_exact_by_enumeration(config, variant, monkeypatch):
    """Every path of the real decoder through 3 tokens, that is through several steps, rejections
    and bonus draws: total variation to the autoregressive distribution below 1e-12."""
    model = tiny_model(**variant, **config)
    texts = enumerated(lambda choose: generate(model, [0, 1], 3), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], 3)) < 1e-12


@pytest.mark.parametrize("head", [head for head in HEADS if head != "full"])
@pytest.mark.parametrize("config", [dict(vocab_size=3, n_future=2, draft_vocab=2),
                                    dict(vocab_size=3, n_future=2, draft_vocab=2, rank=1),
                                    dict(vocab_size=2, n_future=3, draft_vocab=1)], ids=["V3n2", "V3n2r1", "V2n3"])
def test_speculative_decoding_is_exact_with_a_draft_vocabulary(config, head, monkeypatch):
    """The head drafts some of the tokens alone, and the target writes all of them, with their own
    probabilities, also after a token that the head cannot draft."""
    model = tiny_model(head=head, target="lm_head", n_layer=1, **config)
    with torch.no_grad():
        model.head.choose_drafts(torch.arange(1, config["draft_vocab"] + 1).flip(0) % config["vocab_size"],
                                 model.lm_head.weight)
    texts = enumerated(lambda choose: generate(model, [0, 1], 3), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], 3)) < 1e-12


@heads
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("draft_vocab", [0, 2])
def test_rows_along_the_gold_tokens_are_those_that_drafts_are_drawn_from(head, rank, draft_vocab):
    """log_conditionals, of training, and Conditionals, of decoding, over every window; a token that
    cannot be drafted is in no row, and tells nothing of the component."""
    if head == "full" and draft_vocab:
        return  # refused: see GPTConfig
    model = tiny_model(head=head, rank=rank, target="lm_head", vocab_size=4, draft_vocab=draft_vocab)
    W, e, ids = model.lm_head.weight.detach(), a_state(model), torch.tensor([1, 3])
    if draft_vocab:
        model.head.choose_drafts(ids, W)
    for window in itertools.product(range(4), repeat=3):
        along = model.head.log_conditionals(e[None], torch.tensor([window]), W)[0]  # (n - 1, V or K)
        conditionals = model.conditionals(e[None])
        for row, x in zip(along, window):
            q = conditionals.next(torch.tensor([x])).softmax(-1)[0]
            expected = torch.zeros(4, dtype=torch.float64).index_copy(0, ids, row.exp()) if draft_vocab else row.exp()
            torch.testing.assert_close(q, expected, rtol=0, atol=1e-12)


WARPS = [dict(temperature=0.7), dict(top_k=2), dict(top_p=0.6), dict(temperature=1.3, top_p=0.8)]


@pytest.mark.parametrize("options", WARPS, ids=str)
def test_speculative_decoding_is_exact_under_warping(options, monkeypatch):
    """Temperature, top-k and top-p apply to p and q alike (transformers #47932: ratio on un-warped
    logits)."""
    model = tiny_model(**SMALL[0])
    texts = enumerated(lambda choose: generate(model, [0, 1], 3, sampler=Sampling(**options)), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], 3, **options)) < 1e-12


@heads
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("n_token,length", [(3, 4), (2, 5)])
def test_speculative_decoding_is_exact_past_the_block(n_token, length, rank, head, monkeypatch):
    """Block of 3: drafts get clamped, to none, too, and the window moves inside the text. With
    n_token = 2, one id of three is padding: it has a share in the factors, and none in the text."""
    model = tiny_model(**SMALL[0] | dict(rank=rank, head=head), block_size=3, n_token=n_token)
    texts = enumerated(lambda choose: generate(model, [0, 1], length), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], length)) < 1e-12


def test_other_decoders_by_enumeration(monkeypatch):
    """The oracle's and the cached decoder's texts: the product of next-token probabilities, padded
    ids left out."""
    model = tiny_model(**SMALL[0], block_size=3, n_token=2)
    for decoder in (generate_oracle, generate_plain):
        texts = enumerated(lambda choose: decoder(model, [0, 1], 5), monkeypatch)
        assert total_variation(texts, expected_texts(model, [0, 1], 5)) < 1e-12


def chi_square_model(head):
    """Two components that differ and a target that neither of them matches: plenty of
    rejections."""
    model = tiny_model(vocab_size=3, n_future=3, n_layer=1, rank=2, target="lm_head", head=head)
    model.head.maps.data *= 10
    if head == "chain":
        model.head.out.data *= 5
    return model


FINITE = [(name, head) for name in WRONG for head in ("full", "chain") if name != "no_residual"]  # enumeration ends
FINITE.remove(("blind_rows", "full"))  # rows can be blind only where drafts see their previous token


@pytest.mark.parametrize("name,head", FINITE)
def test_enumeration_rejects_wrong_decoders(name, head, monkeypatch):
    """Negative controls: each bug moves the distribution by more than 1 % on the model that the
    chi-square test uses."""
    model = chi_square_model(head)
    monkeypatch.setattr(decode, *WRONG[name])
    length = 3 if name in ("blind_rows", "residual_without_keep") else 2  # their first wrong row is the third token's
    texts = enumerated(lambda choose: generate(model, [0, 1], length), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], length)) > 0.01


LENGTH, N_SAMPLES = 3, 4000


def sampled(decoder, model):
    sampler = Sampling(generator=torch.Generator().manual_seed(1))
    return [tuple(decoder(model, [0, 1], LENGTH, sampler=sampler)) for _ in range(N_SAMPLES)]


@pytest.mark.parametrize("decoder,head", [(generate, "full"), (generate_plain, "full"),
                                          (generate, "full"), (generate, "chain")])
def test_sampled_texts_follow_the_target(decoder, head):
    """Chi-square of 4,000 texts of 3 tokens, with real random numbers. Chance of a false alarm:
    1e-9."""
    model = chi_square_model(head)
    assert chi_square_p_value(sampled(decoder, model), expected_texts(model, [0, 1], LENGTH)) > 1e-9


@pytest.mark.parametrize("name", WRONG)
def test_chi_square_rejects_wrong_decoders(name, monkeypatch):
    """Negative controls: the same test, with the same number of texts, rejects all six wrong
    decoders."""
    model = chi_square_model("chain" if name == "blind_rows" else "full")
    monkeypatch.setattr(decode, *WRONG[name])
    assert chi_square_p_value(sampled(generate, model), expected_texts(model, [0, 1], LENGTH)) < 1e-9


def test_coupled_texts_follow_the_target(monkeypatch):
    """A text per seed: chi-square of 4,000 of them. Chance of a false alarm: 1e-9. Guards noise
    that repeats itself from place to place, which the same check must reject, or from seed to
    seed."""
    model = chi_square_model("chain")
    expected = expected_texts(model, [0, 1], LENGTH)
    texts = [tuple(generate(model, [0, 1], LENGTH, sampler=Coupled(s))) for s in range(N_SAMPLES)]
    assert chi_square_p_value(texts, expected) > 1e-9
    frozen = property(lambda self: 0, lambda self, place: None)
    monkeypatch.setattr(Coupled, "place", frozen, raising=False)
    texts = [tuple(generate_oracle(model, [0, 1], LENGTH, sampler=Coupled(s))) for s in range(N_SAMPLES)]
    assert chi_square_p_value(texts, expected) < 1e-9


# -----------------------------------------------------------------------------
# the decoders: token for token


@pytest.mark.parametrize("seed", range(24))
def test_greedy_texts_are_the_oracles(seed):
    """Temperature 0, float64: token for token over random models, ranks, n, prompts, and lengths 0,
    1, 2, n, n + 1 and past the block. Guards the first token lost between prefill and loop (litgpt
    #2307) and every off-by-one."""
    rng = torch.Generator().manual_seed(seed)
    n, rank, block_size = (int(torch.randint(*lohi, (), generator=rng)) for lohi in ((2, 6), (1, 5), (2, 14)))
    model = tiny_model(seed, n_future=n, rank=rank, block_size=block_size, vocab_size=11, n_token=9,
                       **VARIANTS[seed % len(VARIANTS)])
    for T in (1, 2, block_size - 1 or 1, block_size, block_size + 1, 2 * block_size + 3):
        prompt = torch.randint(9, (T,), generator=rng).tolist()
        expected = list(generate_oracle(model, prompt, 3 * block_size, sampler=Greedy()))
        assert len(expected) == 3 * block_size
        for decoder in (generate_plain, generate):
            for length in (0, 1, 2, n, n + 1, 3 * block_size):
                assert list(decoder(model, prompt, length, sampler=Greedy())) == expected[:length]


@pytest.mark.parametrize("seed", range(12))
def test_coupled_texts_are_the_same_whatever_decodes(seed):
    """With a Coupled sampler all decoders write one text at any temperature, token for token, past
    the block and with a head that drafts badly; another seed writes another."""
    model = tiny_model(seed, n_future=2 + seed % 4, rank=1 + seed % 3, block_size=9, vocab_size=11, n_token=9,
                       **VARIANTS[seed % len(VARIANTS)])
    options = dict(temperature=(0.5, 1.0, 2.0)[seed % 3], top_k=(None, 4)[seed % 2], top_p=(None, 0.9)[seed // 6])
    texts = [list(decoder(model, [3, 1], 40, sampler=Coupled(s, **options)))
             for s in (seed, seed + 1) for decoder in (generate_oracle, generate_plain, generate)]
    assert texts[0] == texts[1] == texts[2] != texts[3] == texts[4] == texts[5]


def counting_model(V, n, target, rank=2, block_size=64):
    """Token t is always followed by t + 1 mod V, and the head knows: P_a^(s) is certain of t + s.

    The residual stream carries the one-hot embedding of the last token alone (attention and MLP
    write nothing).
    """
    model = tiny_model(vocab_size=V, n_embd=V, n_head=1, n_layer=1, n_future=n, rank=rank, head="full",
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
            model.head.maps[s] = 30 * eye.roll(s + 1, 0)
    return model


@pytest.mark.parametrize("target", ["marginal", "lm_head"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rank", [1, 2])
def test_right_heads_are_always_accepted(target, temperature, rank):
    """Every step yields n tokens. Guards an off-by-one in the hidden state that the draft starts
    from: that stays lossless, so no test of exactness can see it."""
    for n in (2, 3, 5):
        stats, model = Stats(), counting_model(7, n, target, rank)
        sampler = make_sampler(temperature, generator=torch.Generator().manual_seed(0))
        text = list(generate(model, [3], 1 + 5 * n, sampler=sampler, stats=stats))
        assert text == [(4 + i) % 7 for i in range(1 + 5 * n)]
        assert stats.tokens_per_step == n and stats.acceptance == [1.0] * (n - 1)
        assert stats.histogram == [0] * n + [5]
        assert stats.origins == ["plain"] + 5 * [*range(1, n), "bonus"]


@pytest.mark.parametrize("stop", range(7))
@pytest.mark.parametrize("decoder", [generate, generate_plain, generate])
def test_text_ends_at_the_stop_token_wherever_it_falls(decoder, stop):
    """In any place of an accepted block, and as the very first token; what comes after it is
    neither yielded nor counted (transformers #47912)."""
    stats = Stats()
    text = list(decoder(counting_model(7, 5, "marginal"), [3], 30, sampler=Greedy(), stop_token=stop, stats=stats))
    assert text == [(4 + i) % 7 for i in range((stop - 4) % 7 + 1)] and text[-1] == stop
    assert stats.tokens == len(text) - (decoder is not generate)
