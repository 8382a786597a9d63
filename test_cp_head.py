"""The head and the decoders, to be read beside model.py and decode.py: what is claimed, and how it
is shown.

Every head is checked in float64 against equation (1) written out, never against itself. That
decoding is exact has three kinds of proof:

    enumeration   runs the real decoder through every outcome of its random choices and adds up
                  their probabilities: equal to the target's distribution to 1e-12
    chi-square    the same with real random numbers, over thousands of texts
    greedy        token for token the text of the oracle, over many random models

The first two must also REJECT decoders that are wrong on purpose, as real projects and papers were.

The tests run over all heads: a head of your own is checked as soon as its file is there. Write the
formula of its factors into `FACTORS`, or its methods are only compared with one another.
"""

import itertools
import math
import subprocess
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import decode
from decode import (Greedy, Sampling, Stats, generate, generate_oracle, generate_plain,
                    make_sampler, verify, warp, window_start)
from decoders.coupled import Coupled
from heads.sequential import Sequential
from model import ROOT, GPT, GPTConfig, balance_loss, head_class, joint_log_probs, new_model, words

# -----------------------------------------------------------------------------
# models


def tiny_model(seed=0, scale=2.0, **config):
    """A random float64 model whose distributions are sharp enough to tell right from wrong."""
    torch.manual_seed(seed)
    defaults = dict(block_size=8, vocab_size=5, n_layer=2, n_head=2, n_embd=8, n_future=3, rank=2)
    model = new_model(GPTConfig(**{**defaults, **config})).double().eval()
    for name, p in model.named_parameters():
        p.data += 0.02 * scale * torch.randn_like(p)
        if p.dim() > 1:
            p.data *= scale
        if name.endswith("transitions.mix"):
            p.data.uniform_(0.3, 0.9)  # components that do move
    return model


HEADS = ("cp", *words("head"))
MASKS = ("mask", "mask_linear")  # of the target lm_head alone, and so are
GIVEN = ("conditional", "conditional_low_rank")  # the joint of the others given x_1
CIRCUITS = ("hmm", "tree_circuit")  # their component moves along the window
VARIANTS = [dict(head=head, target=target) for target in ("marginal", "lm_head") for head in HEADS
            if target == "lm_head" or head not in MASKS + GIVEN]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()))
heads = pytest.mark.parametrize("head", HEADS)
slow = pytest.mark.slow  # python -m pytest --all


def target_of(head):
    return "lm_head" if head in MASKS + GIVEN else "marginal"


def a_state(model=None):
    """Some hidden state e; of a model, one as its head sees it, which may be wider."""
    if model is None:
        return torch.randn(8, dtype=torch.float64)
    return model.split(model.hidden(torch.randint(3, (1, 3))))[1][0, -1].detach()


# -----------------------------------------------------------------------------
# equation (1) of every head, written out. In FACTORS, f(head, e, s, a, x, W) are the logits of
# P_a^(s + 1) (V,), s = 0..n - 1, given the tokens x before it; W (V, C) are the rows of the tokens


def norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def silu(x):
    return x / (1 + torch.exp(-x))


def cp(head, e, s, a, x, W):
    return W @ (head.maps[s, a] @ e)


def full(head, e, s, a, x, W):
    return (head.maps[s, a] @ e)[: len(W)]


def chain(head, e, s, a, x, W):  # equation (5)
    h = head.maps[s, a] @ e
    return W @ (h + head.out @ (norm(W[x[-1]]) * (head.gate[s - 1] @ e)) if s else h)


def recurrent(head, e, s, a, x, W):  # equation (6)
    h = head.maps[0, a] @ e
    for token in x:
        z = torch.cat((norm(h), norm(W[token])))
        h = h + head.fc3.weight @ gelu(head.fc2.weight @ gelu(head.fc1.weight @ z))
    return W @ h


def mixed(head, e):
    """e' of the head layers."""
    e, low, middle = e.view(3, -1)
    return e + head.layers.weight @ torch.cat((norm(low), norm(middle)))


def layers(head, e, s, a, x, W):
    return recurrent(head, mixed(head, e), s, a, x, W)


def wide(head, e, s, a, x, W):
    return W @ (head.maps[s, 0] @ e + head.down[s] @ gelu(head.up[s] @ e))


def medusa(head, e, s, a, x, W):
    h = e + silu(head.block[s] @ e + head.bias[s])
    return (W + head.maps[s, : len(W)]) @ h


def low_rank(head, e, s, a, x, W):  # equation (7)
    c = head.within[s, a] @ e + head.bias[s, a]
    return W @ (head.maps[s, 0] @ e + head.directions @ c)


def given(head, e, row):
    """z of equation (8), with the row W[x_1]."""
    return e + head.fc2.weight @ gelu(head.fc1.weight @ torch.cat((norm(e), norm(row))))


def conditional(head, e, s, a, x, W, component=cp):
    return component(head, given(head, e, W[x[0]]), s - 1, a, x, W) if s else W @ e


def gloeckle(head, e, s, a, x, W):  # tests/test_heads.py has the layers that e comes from
    return W @ e.view(len(head.maps), -1)[s]


def mask(head, e, s, a, x, W):  # tests/test_masks.py has the pass that e comes from
    h = e.view(len(head.maps) + 1, -1)[s]
    if s == 0:
        return W @ h
    first, _, norm_1, second, _, norm_2 = head.mlp
    h = silu(first.weight @ torch.cat((norm(W[x[-1]]), h)) + first.bias)
    h = silu(second.weight @ (norm(h) * norm_1.weight + norm_1.bias) + second.bias)
    return W @ (norm(h) * norm_2.weight + norm_2.bias)


FACTORS = dict(cp=cp, low_rank=low_rank, conditional=conditional,
               conditional_low_rank=partial(conditional, component=low_rank), full=full, chain=chain, recurrent=recurrent, layers=layers, wide=wide,
               medusa=medusa, gloeckle=gloeckle, hmm=cp, tree_circuit=cp, mask=mask,
               mask_linear=mask)
LOOKS_BACK = dict(chain=1, mask=1, mask_linear=1, recurrent=99, layers=99, conditional=99,
                  conditional_low_rank=99)  # at so many tokens


def own_factor(head, e, s, a, x, W):
    """Of a head that is not in FACTORS: its own vectors. So its methods are compared with one another,
    and nobody knows whether they are what its formula says."""
    tokens = torch.tensor([[0] * (s - len(x)) + [int(x_j) for x_j in x]], dtype=torch.long)
    return head.logits(head.vectors_along(e[None], tokens, W)[0, s, a], W)


def test_every_head_of_the_repository_has_its_formula_here():
    """Two wrong formulas once passed, as a head's methods were only compared with one another."""
    listed = subprocess.run(["git", "ls-files", "heads/*.py"], cwd=ROOT, capture_output=True, text=True)
    assert {Path(path).stem for path in listed.stdout.split()} & set(HEADS) <= set(FACTORS)


def weights(model, e, x1):
    """w_a (r,), of which one kind of heads looks at x_1."""
    router = model.head.router
    if router is None:
        return e.new_ones(1)
    e = mixed(model.head, e) if model.config.head == "layers" else e
    e = given(model.head, e, model.lm_head.weight[x1]) if model.config.head in GIVEN else e
    return torch.softmax(router.weight @ e + router.bias, -1)


def paths(model, e, V):
    """The components of the offsets 1..n, and their probability given each x_1: one for all, but in
    circuits."""
    head, n = model.config.head, model.config.n_future
    w = torch.stack([weights(model, e, x1) for x1 in range(V)], -1)  # (r, V)
    r = len(w)
    if head in CIRCUITS and (n > 2 or head == "hmm"):
        parts = model.head.transitions
        S = torch.softmax((parts.rows.weight @ e + parts.rows.bias).view(-1, r, r), -1)
        mix = parts.mix.abs().clamp_max(1)
        T = (1 - mix) * torch.eye(r, dtype=e.dtype) + mix * S  # (m, r, r)
    for a in itertools.product(range(r), repeat=n):
        if head == "hmm":
            yield a, w[a[0]] * math.prod(T[s][a[s], a[s + 1]] for s in range(n - 1))
        elif head == "tree_circuit" and n > 2:  # n = 3 or 4: offsets 1 and 2, and the others
            if a[0] == a[1] and len(set(a[2:])) == 1:  # which come from any component of the root
                yield a, sum(w[c] * T[0][c, a[0]] * T[1][c, a[2]] for c in range(r))
        elif len(set(a)) == 1:
            yield a, w[a[0]]


def joint_table(model, e, W=None):
    """P(x_1, ..., x_n) of all windows, (V,) * n: of all ids, or of those of the rows W."""
    W = model.lm_head.weight if W is None else W
    n, V, head = model.config.n_future, len(W), model.config.head
    looks_back = LOOKS_BACK.get(head, 99 if isinstance(model.head, Sequential) else 0)

    def factor(s, a):  # P_a^(s + 1) after each prefix: (V,) * s + (V,), with 1 for what it ignores
        seen = min(s, looks_back)
        rows = [torch.softmax(FACTORS.get(head, own_factor)(model.head, e, s, a, x, W), -1)
                for x in itertools.product(range(V), repeat=seen)]
        return torch.stack(rows).view((1,) * (s - seen) + (V,) * (seen + 1))

    P = [[factor(s, a) for a in range(model.head.rank)] for s in range(n)]
    table = 0
    for a, probability in paths(model, e, V):  # (V,)
        probability = probability * P[0][a[0]]
        for s in range(1, n):
            probability = probability.unsqueeze(-1) * P[s][a[s]]
        table = table + probability
    return table


# -----------------------------------------------------------------------------
# the head


@heads
@pytest.mark.parametrize("rank,n,n_token", [(1, 3, 4), (2, 3, 3), (3, 3, 3), (2, 4, 4), (3, 2, 3)])
@torch.no_grad()
def test_a_head_is_equation_1(head, rank, n, n_token):
    """The joint, as training computes it, over all ids, padding included; and its conditionals and
    its first step, over all ids or over the real tokens. Guards a factor that is another one's, or
    that lacks a part."""
    model = tiny_model(head=head, rank=rank, target=target_of(head), n_future=n, n_token=n_token,
                       vocab_size=4)
    e, W = a_state(model), model.lm_head.weight
    table = joint_table(model, e)
    assert table.sum().item() == pytest.approx(1, abs=1e-12)
    windows = torch.tensor(list(itertools.product(range(4), repeat=n)))
    joint = model.head.log_joint(e.expand(len(windows), -1), windows, W).exp()
    for k in range(1, n + 1):
        marginal = table.sum(tuple(range(k, n))) if k < n else table
        close(joint[:, k - 1], marginal[tuple(windows[:, :k].T)])
    for W, table in ((W, table), (model.unembed, joint_table(model, e, model.unembed))):
        if head not in MASKS:  # whose target it never is
            close(model.head.log_marginal(e, W).exp(), table.sum(tuple(range(1, n))))
        windows = torch.tensor(list(itertools.product(range(len(W)), repeat=n - 1)))
        rows = model.head.rows(e.expand(len(windows), -1), windows, W).exp()
        for s in range(1, n):
            given = table.sum(tuple(range(s + 1, n))) if s < n - 1 else table
            given = given / given.sum(-1, keepdim=True)
            close(rows[:, s - 1], given[tuple(windows[:, :s].T)])


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@variants
def test_target_is_the_marginal_of_the_joint_or_the_lm_head(variant):
    """target "marginal" is the joint summed over x_2..x_n, over the real tokens; target "lm_head"
    is the trunk's own softmax."""
    model = tiny_model(**variant, n_token=4)
    hidden = model.hidden(torch.randint(4, (1, 3)))[0, -1]
    expected = torch.softmax(model.lm_head(hidden[:8]), -1)
    if variant["target"] == "marginal":
        expected = joint_table(model, model.split(hidden)[1]).sum((1, 2))
    close(model.target_logits(hidden).softmax(-1), expected[:4] / expected[:4].sum())


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v["head"] not in MASKS],
                         ids=lambda v: "-".join(v.values()))
def test_loss_and_its_gradient_equal_brute_force(variant):
    """-log P of each window, read off the full table, has the value and the gradient of GPT.loss,
    and so do its parts: the bug guarded is a chunked or recomputed loss that drops a term (the
    router's, say). That of masks has one more term, see tests/test_masks.py."""
    model, marginal = tiny_model(**variant).train(), variant["target"] == "marginal"
    idx, gold = torch.randint(5, (2, 4)), torch.randint(5, (2, 4, 3))
    loss, parts = model(idx, gold, joint_weight=0.7, balance_weight=0.3)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    e, seen = model.split(model.hidden(idx).flatten(0, 1))  # (N, C) each
    tables = torch.stack([joint_table(model, state) for state in seen])  # (N, V, V, V)
    x, n = gold.flatten(0, 1).T, torch.arange(8)
    first, second = tables.sum((2, 3))[n, x[0]], tables.sum(3)[n, x[0], x[1]]
    joint = -tables[n, x[0], x[1], x[2]].log().mean() / 3
    w = torch.stack([weights(model, *given_x1) for given_x1 in zip(seen, x[0])])  # (N, r)
    r = w.size(1)
    balance = r * sum((w.argmax(-1) == a).double().mean() * w[:, a].mean() for a in range(r))
    cross_entropy = F.cross_entropy(model.lm_head(e), x[0])
    expected = (joint if marginal else cross_entropy + 0.7 * joint) + 0.3 * balance
    expected_grads = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)

    close(loss, expected)
    for p, a, b in zip(model.parameters(), grads, expected_grads):
        close(*(torch.zeros_like(p) if x is None else x for x in (a, b)), atol=1e-10)
    close(parts["joint"], joint.detach())
    close(parts["next"], (-first.log().mean() if marginal else cross_entropy).detach())
    offsets = torch.stack((-first.log().mean(), (first / second).log().mean())).detach()
    close(parts["offset"][:2], offsets)
    assert parts["offset"].mean().item() == pytest.approx(joint.item(), abs=1e-12)
    close(parts["balance"], balance.detach())
    close(parts["usage"], w.mean(0).detach())


@pytest.mark.parametrize("head", [head for head in HEADS if head not in MASKS])
def test_gradcheck_of_the_joint_loss(head):
    """Finite differences agree with the recomputed backward pass, for the hidden state, router,
    maps and W."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=4, n_embd=3, n_head=1, n_layer=1, n_future=3, rank=2, head=head,
                       target=target_of(head))
    module = head_class(head)(config).double()
    # what comes before the state is the model's matter
    params = {name: p for name, p in module.named_parameters() if head != "gloeckle"}
    gold, C = torch.randint(4, (5, 3)), 9 if head in ("gloeckle", "layers") else 3
    module.forward = module.log_joint  # what functional_call runs, on parameters that vary

    def loss(e, W, *values):
        values = dict(zip(params, values))
        return torch.func.functional_call(module, values, (e, gold, W)).sum()

    values = [p.detach() + 0.3 * torch.randn(p.shape) for p in params.values()]
    inputs = [x.double().requires_grad_() for x in (torch.randn(5, C), torch.randn(4, 3), *values)]
    inputs[1].requires_grad_(head != "full")  # full has no use for W
    assert torch.autograd.gradcheck(loss, inputs)


def test_rank_one_is_independent_heads():
    """r = 1: the joint loss is the mean of n cross-entropies, and there is no router to train."""
    model = tiny_model(rank=1)
    idx, gold = torch.randint(5, (2, 4)), torch.randint(5, (2, 4, 3))
    loss, _ = model.loss(idx, gold)
    e = model.hidden(idx).flatten(0, 1)
    logits = [model.lm_head(e @ model.head.maps[s, 0].T) for s in range(3)]
    close(loss, sum(F.cross_entropy(logits[s], gold[..., s].flatten()) for s in range(3)) / 3)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters()) and model.head.router is None


def test_n_future_one_is_plain_gpt():
    """n = 1: no head, no further parameter, and the loss is the cross-entropy of the logits."""
    model = tiny_model(n_future=1)
    assert model.head is None and model.n_params()[1] == 0
    idx, gold = torch.randint(5, (2, 4)), torch.randint(5, (2, 4, 1))
    loss, parts = model.loss(idx, gold)
    close(loss, F.cross_entropy(model(idx).flatten(0, 1), gold.flatten()))
    close(parts["next"], loss.detach())


def test_joint_share_trains_on_a_part_and_is_unbiased():
    """Averaged over many draws, the loss on a share of the positions is the loss on all of them
    (false alarm: the tolerance is over 6 standard errors). The balance loss, a product of two batch
    means, would be larger on a share, so it sees all positions at any share: equal to the bit."""
    model = tiny_model()
    idx, gold = torch.randint(5, (4, 8)), torch.randint(5, (4, 8, 3))
    with torch.no_grad():
        full, full_parts = model.loss(idx, gold, balance_weight=0.5)
        losses, parts = zip(*(model.loss(idx, gold, balance_weight=0.5, joint_share=0.25)
                              for _ in range(100)))
    losses = torch.stack(losses)
    assert 0 < abs(losses.mean().item() - full.item()) < 6 * losses.std().item() / 10
    assert all(torch.equal(p["balance"], full_parts["balance"]) for p in parts)
    assert len({p["joint"].item() for p in parts}) > 90


@pytest.mark.parametrize("head", ["cp", "full", "chain", "hmm", "tree_circuit"])
def test_factors_share_no_storage(head):
    """Changing one map changes that factor's probabilities alone. Guards [Block()] * n (Medusa PR
    133)."""
    model = tiny_model(head=head)
    e, x = a_state().expand(5, -1), torch.arange(5)[:, None].expand(-1, 3)
    before = model.head.gold_log_probs(e, x, model.lm_head.weight)  # (V, n, r)
    with torch.no_grad():
        model.head.maps[1, 0] += torch.randn_like(model.head.maps[1, 0])
    after = model.head.gold_log_probs(e, x, model.lm_head.weight)
    assert (after != before).any(0).tolist() == [[False, False], [True, False], [False, False]]


@pytest.mark.parametrize("head", ["cp", "low_rank", *GIVEN, "full", "chain", "recurrent", "layers",
                                  *CIRCUITS])
def test_components_start_apart(head):
    """At equal components the router's gradient is exactly 0, whatever a position asks for; at our
    start it is not. The negative control makes the maps equal."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=16, n_future=3,
                       rank=3, head=head, target=target_of(head))
    model = new_model(config).double()
    idx, gold = torch.randint(16, (4, 8)), torch.randint(16, (4, 8, 3))
    model.loss(idx, gold)[0].backward()
    assert model.head.router.weight.grad.abs().max().item() > 1e-7
    maps = model.head.within if "low_rank" in head else model.head.maps
    with torch.no_grad():
        maps.copy_(maps[:, :1].expand_as(maps).clone())
    model.zero_grad()
    model.loss(idx, gold)[0].backward()
    assert model.head.router.weight.grad.abs().max().item() < 1e-15


def test_chain_with_a_zero_term_is_the_cp_head():
    """U = 0, the start of training: equation (5) is that of the paper, to the bit, in float32 and
    in every direction: loss, gradients and, at this size, rows. Guards a term that has another
    effect than U's, like a norm of the sum."""
    cp, chain = (tiny_model(n_future=4, head=head).float() for head in ("cp", "chain"))
    chain.load_state_dict(cp.state_dict(), strict=False)
    torch.nn.init.zeros_(chain.head.out)
    idx, gold, e = torch.randint(5, (2, 8)), torch.randint(5, (2, 8, 4)), torch.randn(5, 8)
    losses = [model.loss(idx, gold, balance_weight=0.1)[0] for model in (cp, chain)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for name, p in cp.named_parameters():
        assert torch.equal(p.grad, chain.get_parameter(name).grad), name
    x = torch.randint(5, (5, 3))
    rows = [model.head.rows(e, x, model.lm_head.weight) for model in (cp, chain)]
    close(*rows, atol=1e-6)  # other matrix shapes
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
    gold = torch.tensor([[[words.index(x) for x in phrase]] for phrase in phrases])  # (B, 1, n)
    idx = torch.zeros(len(phrases), 1, dtype=torch.long)
    model = GPT(GPTConfig(block_size=2, vocab_size=len(words), n_layer=1, n_head=1, n_embd=16,
                          head=head, rank=rank, n_future=gold.size(-1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(300):
        loss, parts = model.loss(idx, gold, balance_weight=balance_weight)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return gold.size(-1) * parts["joint"].item() / math.log(2), parts["usage"]


@pytest.mark.parametrize("phrases,head,rank,bits", [
    (SAD_CRIED, "cp", 1, 2),  # two marginals: a factor knows nothing of what the other one drew
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
    without, balanced = ([learned(SAD_CRIED, rank=2, balance_weight=weight, seed=seed)
                          for seed in range(1, 5)] for weight in (0.0, 0.05))
    assert sum(bits > 1.9 and usage.min() < 0.01 for bits, usage in without) >= 2
    assert all(bits < 1.02 and usage.min() > 0.4 for bits, usage in balanced)


def test_balance_loss_extremes():
    """1 when the components share the work, r when one does it all, whatever the single positions
    do."""
    sharp = 40.0 * torch.eye(4, dtype=torch.float64)
    equal = torch.full((6, 4), 0.25, dtype=torch.float64).log()
    assert balance_loss(F.log_softmax(sharp, -1)).item() == pytest.approx(1)  # one position each
    assert balance_loss(equal).item() == pytest.approx(1)
    assert balance_loss(F.log_softmax(sharp[:1].expand(6, 4), -1)).item() == pytest.approx(4)


def test_balance_loss_pulls_towards_balance():
    """A gradient step on the balance loss alone takes weight from the overused component."""
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.5, 0.0]]).double().requires_grad_()
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
        draws = [choose(row) for row in p.reshape(-1, p.size(-1))]
        return torch.tensor(draws, dtype=torch.long).view(p.shape[:-1])

    def all_coins(p, uniform):
        p = p.nan_to_num(0).clamp(max=1)
        flips = [bool(choose(torch.stack((1 - p_k, p_k)))) for p_k in p.flatten()]
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
            start = window_start(len(prompt) + len(text), model.config.block_size)
            window = (prompt + list(text))[start:]
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
    if kind == "flat":  # nobody is sure: the residual has several tokens, whatever the rule
        V, scale = 4, 1.0
    if kind == "deep":
        V, n = 2, 5
    if kind == "no draft":
        n = 1
    p, q = ([torch.softmax(scale * torch.randn((V,) * (k + 1), dtype=torch.float64), -1)
             for k in range(places)] for places in (n, n - 1))
    if kind == "equal":
        q = p[:-1]
    if kind == "greedy":
        p, q = ([F.one_hot(t.argmax(-1), V).double() for t in ts] for ts in (p, q))
    if kind == "zeros":  # supports that overlap in part
        p[0][0], q[0][1], p[1][..., 2] = 0, 0, 0
        p, q = ([t / t.sum(-1, keepdim=True) for t in ts] for ts in (p, q))
    return p, q


def rows_along(p, q, drafted):
    """The rows at the places of a draft, given the drafts before them: p (n, V), q (n - 1, V)."""
    rows = [[t[tuple(drafted[:k])] for k, t in enumerate(ts)] for ts in (p, q)]
    return torch.stack(rows[0]), torch.stack([*rows[1], rows[0][0]])[:-1]


def draft_and_verify(p, q, choose):
    """n - 1 drafts from q, how many of them verify accepts, and the token after those."""
    drafted = []
    for t in q:
        drafted.append(choose(t[tuple(drafted)]))
    x = torch.tensor(drafted, dtype=torch.long)
    n_accepted, token = verify(*rows_along(p, q, drafted), x, None)
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


@pytest.mark.parametrize("kind", ["random", "equal", "greedy", "zeros", "no draft", "flat", "deep"])
def test_verify_is_exact_by_enumeration(kind, monkeypatch):
    """Whatever q is, what verify lets through and draws has the distribution p, to 1e-12: guards a
    wrong residual (softmax of it, transformers PR 28508; redrawn from p, Medusa), one-hot rows
    (litgpt), and a step without a draft."""
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
    p, q = p[:-1].gather(-1, y).squeeze(-1), q.gather(-1, y).squeeze(-1)  # (k,)
    return torch.cat((torch.ones(1), torch.where(q > 0, p / q, 0.0).clamp(max=1).cumprod(0)))


RULES = [("residual", residual_p), ("residual", residual_without_keep),
         ("keep_probability", keep_one_by_one)]


@pytest.mark.parametrize("name,wrong", RULES, ids=lambda x: getattr(x, "__name__", ""))
def test_verify_enumeration_rejects_a_wrong_rule(name, wrong, monkeypatch):
    """Negative controls: the same check sees a correction drawn from p, the residual max(p - q, 0)
    of token by token verification, and that rule's keep probabilities."""
    p, q = random_distributions("flat", 0)
    monkeypatch.setattr(decode, name, wrong)
    assert total_variation(verified(p, q, monkeypatch), joint_of(p)) > 0.005


def keep_loop(p, q, drafted):
    """The recurrence (4) as verify's docstring has it."""
    keep = [1.0]
    for p_i, q_i, y_i in zip(p, q, drafted):
        keep.append(min(1.0, keep[-1] * (p_i[y_i] / q_i[y_i]).item()) if q_i[y_i] > 0 else 0.0)
    return keep


@pytest.mark.parametrize("kind", ["random", "flat", "zeros", "deep"])
def test_drafts_are_kept_as_often_as_the_recurrence_says(kind, monkeypatch):
    """P(i or more drafts are accepted | the first i) = keep_i of (4): an accept rule that is exact
    but stingy would pass every other test. On average it keeps more than judging the drafts one by
    one."""
    p, q = random_distributions(kind, 0)
    expected = [defaultdict(float) for _ in p]  # [i]: P(the first i drafts, and i or more accepted)
    gain = 0.0
    for drafted in itertools.product(range(len(p[0])), repeat=len(q)):
        rows_p, rows_q = rows_along(p, q, drafted)
        x = torch.tensor(drafted)
        weight = rows_q.gather(-1, x.unsqueeze(-1)).prod().item()
        keep, one_by_one = keep_loop(rows_p, rows_q, drafted), keep_one_by_one(rows_p, rows_q, x)
        assert decode.keep_probability(rows_p, rows_q, x).tolist() == pytest.approx(keep)
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
            q = F.one_hot(x, 4).float()
            expected = ([min(n_kept, offered)], [best[min(n_kept, offered)]])
            for n_accepted, token in (Greedy().verify(logits[: offered + 1], None, x),
                                      verify(one_hot[: offered + 1], q, x)):
                assert (n_accepted.tolist(), token.tolist()) == expected


# -----------------------------------------------------------------------------
# a window's drafts: the distribution of all their outcomes, and the rows q

SAMPLERS = dict(plain=dict(), temperature=dict(temperature=0.7), top_k=dict(top_k=2),
                top_p=dict(top_p=0.6))
samplers = pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)


def row_after(table, x):
    """P(. | x) of a joint (V,) * n, of the token after the tokens x."""
    row = table[tuple(x)]
    row = row.sum(tuple(range(1, row.dim()))) if row.dim() > 1 else row
    return row / row.sum()


@heads
@pytest.mark.parametrize("rank,name", [(1, "plain"), (2, "plain"), (3, "plain"), (1, "temperature"),
                                       (2, "temperature"), (3, "top_k"), (2, "top_p")])
@torch.no_grad()
def test_drafts_follow_the_joint_and_q_are_the_rows_they_came_from(head, rank, name, monkeypatch):
    """All outcomes of a draft, by enumeration: x_2 and x_3 have the joint's distribution given x_1,
    warped token by token, and q is that conditional along them, to 1e-12. An id of four is padding:
    components leave it out. Both ways to draft: at once (plain), and the walk."""
    model = tiny_model(head=head, rank=rank, target=target_of(head), vocab_size=4, n_token=3)
    options, e, rows = SAMPLERS[name], a_state(model), {}
    sampler = Sampling(**options)
    table = joint_table(model, e, model.unembed)

    def run(choose):
        x, q = model.head.draft(e[None], torch.tensor([1]), 2, sampler, model.unembed)
        rows[tuple(x[0].tolist())] = q[0]
        return x[0].tolist()

    drafts, expected = enumerated(run, monkeypatch), {}
    for x2, x3 in itertools.product(range(3), repeat=2):
        given = [warp(row_after(table, x).log(), **options) for x in ((1,), (1, x2))]
        expected[x2, x3] = (given[0][x2] * given[1][x3]).item()
        if (x2, x3) in rows:
            close(rows[x2, x3], torch.stack(given))
    assert total_variation(drafts, expected) < 1e-12


@heads
@samplers
@torch.no_grad()
def test_texts_draft_beside_one_another(head, options):
    """Drafts of several texts at once: q is each text's own, along its own drafts."""
    model = tiny_model(head=head, target=target_of(head))
    e, x1 = torch.stack([a_state(model) for _ in range(3)]), torch.tensor([4, 0, 2])
    sampler = Sampling(**options, generator=torch.Generator().manual_seed(0))
    x, q = model.head.draft(e, x1, 2, sampler, model.unembed)
    for state, first, drafted, rows in zip(e, x1, x, q):
        table, window = joint_table(model, state), [first.item(), *drafted.tolist()]
        for s in (1, 2):
            close(rows[s - 1], warp(row_after(table, window[:s]).log(), **options))


def loop_draft(model, e, x1, n_drafts, sampler):
    """Drafts of a mixture one by one, with a row of V tokens for each, over its factors written
    out: the posterior of the component, its mixture of rows, a draw, the next token."""
    factor, head, W = FACTORS.get(model.config.head, own_factor), model.head, model.unembed
    log_b, window = weights(model, e, x1).log(), [x1]
    for s in range(n_drafts + 1):
        log_P = torch.stack([factor(head, e, s, a, window[:s], W).log_softmax(-1)
                             for a in range(head.rank)])  # (r, V)
        if s:
            row = torch.logsumexp(log_b.log_softmax(-1).unsqueeze(-1) + log_P, dim=0)
            window.append(sampler.draw(row[None])[0].item())
        log_b = log_b + log_P[:, window[s]]
    return window[1:]


@pytest.mark.parametrize("make", [
    partial(Sampling, 0.7), partial(Sampling, top_k=3), partial(Sampling, top_p=0.8), Greedy,
    Coupled], ids=["temperature", "top_k", "top_p", "greedy", "coupled"])
@pytest.mark.parametrize("head", [head for head in HEADS if head not in CIRCUITS])
@torch.no_grad()
def test_the_walk_drafts_what_the_loop_drafts(head, make):
    """Token for token, with the same random numbers."""
    for seed in range(6):
        model = tiny_model(seed, head=head, rank=1 + seed % 3, target=target_of(head), n_future=6,
                           vocab_size=11, n_token=9)
        e, x1 = a_state(model), seed % 9
        torch.manual_seed(seed)
        expected = loop_draft(model, e, x1, 5, make(**dict(seed=seed) if make is Coupled else {}))
        torch.manual_seed(seed)
        sampler = make(**dict(seed=seed) if make is Coupled else {})
        x, _ = model.head.draft(e[None], torch.tensor([x1]), 5, sampler, model.unembed)
        assert x[0].tolist() == expected


@heads
@pytest.mark.parametrize("options", [dict(), dict(temperature=0.7)], ids=["plain", "walk"])
@torch.no_grad()
def test_q_is_finite_where_the_joint_underflows(head, options):
    """float32, and logits so far apart that a token which no component expects has probability 0 in
    all of them: nothing is known of the component then, and q still sums to 1."""
    model = tiny_model(head=head, target=target_of(head), vocab_size=11, n_future=6, rank=3).float()
    W, sampler = 1e4 * model.unembed, Sampling(**options)
    for seed in range(10):
        torch.manual_seed(seed)
        e = torch.stack([a_state(model) for _ in range(11)])
        x, q = model.head.draft(e, torch.arange(11), 5, sampler, W)  # each first token
        assert q.isfinite().all() and 0 <= x.min() and x.max() < 11
        close(q.sum(-1), torch.ones(11, 5), atol=1e-5)
        assert (q.gather(-1, x.unsqueeze(-1)) > 0).all()


# -----------------------------------------------------------------------------
# decoders that are wrong; most of them are bugs of real projects or papers. Drafts that are wrong
# have the arguments of a head's own `draft`, after the head


def argmax_draft(head, e, x1, n_drafts, sampler, unembed):
    """Drafts the most probable token but verifies as if it had been drawn from q
    (jaymody/speculative-sampling #3)."""
    x, q = x1.unsqueeze(1), []
    for _ in range(n_drafts):
        q.append(sampler.warp(head.rows(e, x, unembed)[:, -1]))
        x = torch.cat((x, q[-1].argmax(-1, keepdim=True)), 1)
    return x[:, 1:], torch.stack(q, 1)


def one_component(head, e, x1, n_drafts, unembed, log_b):
    """A component a ~ b, and the drafts from it: the drafts x (1, k) and the factors' rows P
    (1, k, r, V) along them."""
    a, x = decode.categorical(log_b.softmax(-1), torch.rand), x1.unsqueeze(1)
    for _ in range(n_drafts):
        P = head.logits(head.vectors_along(e, x, unembed), unembed).softmax(-1)  # (1, s, r, V)
        x = torch.cat((x, decode.categorical(P[:, -1, a[0]], torch.rand).unsqueeze(1)), 1)
    return x[:, 1:], P[:, 1:]


def posterior(head, e, x1, unembed):
    """log b (1, r), up to a constant: what x_1 says of the component."""
    P = head.logits(head.vectors_along(e, x1[:, None], unembed), unembed).softmax(-1)
    return head.log_weights(e) + P[:, 0, :, x1[0]].log()


def prior_component(head, e, x1, n_drafts, sampler, unembed):
    """Draws the component from w, without x_1, but verifies against the rows of the posterior."""
    x, _ = one_component(head, e, x1, n_drafts, unembed, head.log_weights(e))
    seen = torch.cat((x1.unsqueeze(1), x[:, :-1]), 1)
    return x, head.rows(e, seen, unembed).exp()


def own_row_first(head, e, x1, n_drafts, sampler, unembed):
    """q is the drawn component's own row in the first place, and the mixture's afterwards."""
    log_b = posterior(head, e, x1, unembed)
    a = decode.categorical(log_b.softmax(-1), torch.rand)
    only = torch.full_like(log_b, -math.inf).index_fill(1, a, 0.0)
    x, P = one_component(head, e, x1, n_drafts, unembed, only)
    q = head.rows(e, torch.cat((x1.unsqueeze(1), x[:, :-1]), 1), unembed).exp()
    return x, torch.cat((P[:, 0, a], q[:, 1:]), 1)


def stale_posterior(head, e, x1, n_drafts, sampler, unembed):
    """b is never updated along the drafts."""
    log_b = posterior(head, e, x1, unembed)
    x, P = one_component(head, e, x1, n_drafts, unembed, log_b)
    return x, (log_b.softmax(-1) @ P).squeeze(2)


def blind_rows(head, e, x1, n_drafts, sampler, unembed):
    """Drafts see the token before them, but are verified as if all of them had seen x_1: wrong
    where they did not."""
    x, q = head.draft(e, x1, n_drafts, sampler, unembed)
    return x, head.rows(e, x1.unsqueeze(1).expand(-1, n_drafts), unembed).exp()


def step_without_residual(model, cache, e, token, n_drafts, sampler, draft):
    """Drops the draw after a rejection and drafts anew from the accepted prefix (as one published
    algorithm reads)."""
    length = cache.length
    drafted, q = draft(e, token, n_drafts, sampler, model.unembed)
    x = torch.cat((token.unsqueeze(1), drafted), 1)
    hidden = model.hidden(x, cache)
    p, y = sampler.warp(model.target_logits(hidden)), drafted.unsqueeze(-1)
    kept = decode.bernoulli(p[:, :-1].gather(-1, y) / q.gather(-1, y), sampler.uniform)
    k = kept.long().flatten().cumprod(0).sum().item()
    if k == n_drafts:
        bonus = decode.categorical(p[:, -1], sampler.uniform)
        return hidden[:, k], bonus, [*drafted[0].tolist(), bonus.item()], k
    cache.length = length + k
    if k == 0:
        return step_without_residual(model, cache, e, token, n_drafts, sampler, draft)
    # the last accepted draft becomes the pending token: it is emitted now, and its predecessor's
    # state drafts next
    return hidden[:, k - 1], drafted[:, k - 1], drafted[0, :k].tolist(), n_drafts


DRAFTS = dict(argmax_draft=argmax_draft, prior_component=prior_component, blind_rows=blind_rows,
              own_row_first=own_row_first, stale_posterior=stale_posterior)
PATCHES = dict(residual_p=("residual", residual_p),
               residual_without_keep=("residual", residual_without_keep),
               no_residual=("speculative_step", step_without_residual))
WRONG = (*DRAFTS, *PATCHES)


def wrong_draft(name, model, monkeypatch):
    """Makes decode.py wrong, or returns a draft that is."""
    if name in PATCHES:
        monkeypatch.setattr(decode, *PATCHES[name])
        return None
    return partial(DRAFTS[name], model.head)


# -----------------------------------------------------------------------------
# the decoders: their distribution

SMALL = [dict(vocab_size=3, n_future=2, n_layer=1), dict(vocab_size=2, n_future=3, n_layer=1),
         dict(vocab_size=2, n_future=3, n_layer=1, rank=1)]


@pytest.mark.parametrize("config,variant", [
    pytest.param(config, v, id=f"{name}-{'-'.join(v.values())}",
                 marks=slow if (name, v["head"]) == ("V2n3", "tree_circuit") else ())  # 20 x as long
    for name, config in zip(("V3n2", "V2n3", "V2n3r1"), SMALL) for v in VARIANTS])
def test_speculative_decoding_is_exact_by_enumeration(config, variant, monkeypatch):
    """Every path of the real decoder through 3 tokens, that is through several steps, rejections
    and bonus draws: total variation to the autoregressive distribution below 1e-12."""
    model = tiny_model(**config, **variant)
    texts = enumerated(lambda choose: generate(model, [0, 1], 3), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], 3)) < 1e-12


def first_step(model, prompt, length, choose, sampler, draft=None):
    """A text of the real decoder's first step alone: what is missing after it comes from the
    target, by choose, which ends sooner than all steps do."""
    tokens = list(prompt)
    with torch.inference_mode():
        blocks = decode.speculative_blocks(model, tokens, sampler, draft or model.head.draft)
        next(blocks), next(blocks)
    while len(tokens) < len(prompt) + length:
        tokens.append(choose(sampler.warp(model(torch.tensor([tokens]))[0, -1])))
    return tokens[len(prompt) : len(prompt) + length]


WARPS = [dict(temperature=0.7), dict(top_k=2), dict(top_p=0.6), dict(temperature=1.3, top_p=0.8)]


@pytest.mark.parametrize("options", WARPS, ids=str)
def test_speculative_decoding_is_exact_under_warping(options, monkeypatch):
    """Temperature, top-k and top-p apply to p and q alike (transformers #47932: ratio on un-warped
    logits)."""
    model = tiny_model(**SMALL[0])
    sampler = Sampling(**options)
    texts = enumerated(lambda choose: generate(model, [0, 1], 3, sampler=sampler), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], 3, **options)) < 1e-12


@pytest.mark.parametrize("i,head", [*enumerate(HEADS)], ids=HEADS)
@torch.no_grad()
def test_a_step_of_any_head_is_exact_under_warping(i, head, monkeypatch):
    """One step of two drafts, at ranks 1 to 3, with an id of four that is padding."""
    model = tiny_model(head=head, target=target_of(head), rank=3 - i % 3, vocab_size=4, n_token=3,
                       n_layer=1)
    options, sampler = WARPS[i % 4], Sampling(**WARPS[i % 4])
    texts = enumerated(lambda choose: first_step(model, [1], 3, choose, sampler), monkeypatch)
    assert total_variation(texts, expected_texts(model, [1], 3, **options)) < 1e-12


@pytest.mark.parametrize("i,head", [*enumerate(HEADS)], ids=HEADS)
def test_speculative_decoding_is_exact_past_the_block(i, head, monkeypatch):
    """Block of 3: drafts get clamped, to none, too, and the window moves inside the text. One id of
    three is padding: it has a share in the factors, and none in the text."""
    model = tiny_model(**SMALL[0] | dict(rank=1 + i % 2, head=head), block_size=3, n_token=2,
                       target=("lm_head", target_of(head))[i // 2 % 2])
    texts = enumerated(lambda choose: generate(model, [0, 1], 5), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], 5)) < 1e-12


@pytest.mark.parametrize("target", ["marginal", "lm_head"])
@pytest.mark.parametrize("head,rank", [("cp", 2), ("cp", 3), ("full", 2), ("full", 3), ("hmm", 2),
                                       pytest.param("tree_circuit", 2, marks=slow)])
def test_windows_of_one_draw_are_exact_past_the_block(head, rank, target, monkeypatch):
    """The same for those that draw a window at once, with two drafts, which the block's end clamps
    to one and to none."""
    model = tiny_model(head=head, rank=rank, target=target, vocab_size=3, n_token=2, n_future=3,
                       n_layer=1, block_size=4)
    texts = enumerated(lambda choose: generate(model, [0, 1], 4), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], 4)) < 1e-12


def test_other_decoders_by_enumeration(monkeypatch):
    """The oracle's and the plain decoder's texts: the product of next-token probabilities, padded
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


def torn_model():
    """Components that agree on x_1, and on later tokens ever less: so what the drafts before a
    token say of the component counts most."""
    model = tiny_model(vocab_size=3, n_future=3, n_layer=1, target="lm_head", head="full")
    model.head.maps.data *= torch.tensor([1, 20, 60])[:, None, None, None]
    return model


def model_for(wrong):
    if wrong in ("own_row_first", "stale_posterior"):
        return torn_model()
    # rows can be blind only where drafts see the token before them
    return chi_square_model("chain" if wrong == "blind_rows" else "full")


def first_steps(model, monkeypatch, draft=None):
    """The distribution of texts of three tokens, and that of the target."""
    texts = enumerated(lambda choose: first_step(model, [0, 1], 3, choose, Sampling(), draft),
                       monkeypatch)
    return texts, expected_texts(model, [0, 1], 3)


CAUGHT = [(name, None) for name in WRONG if name != "no_residual"]  # whose enumeration never ends
CAUGHT += [(name, "chain") for name in ("argmax_draft", "residual_p", "residual_without_keep")]


@pytest.mark.parametrize("name,head", CAUGHT)
@torch.no_grad()
def test_enumeration_rejects_wrong_decoders(name, head, monkeypatch):
    """Negative controls: each bug moves the distribution by more than 1 % on the model that the
    chi-square test uses, in the first step alone; and the right decoder does not."""
    model = chi_square_model(head) if head else model_for(name)
    assert total_variation(*first_steps(model, monkeypatch)) < 1e-12
    draft = wrong_draft(name, model, monkeypatch)
    assert total_variation(*first_steps(model, monkeypatch, draft)) > 0.01


LENGTH, N_SAMPLES = 3, 4000


def sampled(decoder, model):
    sampler = Sampling(generator=torch.Generator().manual_seed(1))
    return [tuple(decoder(model, [0, 1], LENGTH, sampler=sampler)) for _ in range(N_SAMPLES)]


FULL, CHAIN = partial(chi_square_model, "full"), partial(chi_square_model, "chain")


@pytest.mark.parametrize("decoder,make", [
    (generate_plain, FULL), (generate, FULL), (generate, CHAIN),
    (generate, partial(chi_square_model, "conditional_low_rank"))],
    ids=["plain", "full", "chain", "conditional"])
def test_sampled_texts_follow_the_target(decoder, make):
    """Chi-square of 4,000 texts of 3 tokens, with real random numbers, which no enumeration sees.
    Chance of a false alarm: 1e-9."""
    model = make()
    assert chi_square_p_value(sampled(decoder, model), expected_texts(model, [0, 1], LENGTH)) > 1e-9


@pytest.mark.parametrize("name", ["no_residual", "stale_posterior"])
def test_chi_square_rejects_wrong_decoders(name, monkeypatch):
    """Negative controls: the same test, with as many texts, rejects the one whose enumeration never
    ends, and the wrong walk."""
    model = model_for(name)
    decoder = partial(generate, draft=wrong_draft(name, model, monkeypatch))
    assert chi_square_p_value(sampled(decoder, model), expected_texts(model, [0, 1], LENGTH)) < 1e-9


def test_coupled_texts_follow_the_target(monkeypatch):
    """A text per seed: chi-square of 2,000 of them. Chance of a false alarm: 1e-9. Guards noise
    that repeats itself from place to place, which the same check must reject, or from seed to
    seed."""
    model = chi_square_model("chain")
    expected = expected_texts(model, [0, 1], LENGTH)
    texts = [tuple(generate(model, [0, 1], LENGTH, sampler=Coupled(s))) for s in range(2000)]
    assert chi_square_p_value(texts, expected) > 1e-9
    frozen = property(lambda self: 0, lambda self, place: None)
    monkeypatch.setattr(Coupled, "place", frozen, raising=False)
    texts = [tuple(generate_oracle(model, [0, 1], LENGTH, sampler=Coupled(s)))
             for s in range(2000)]
    assert chi_square_p_value(texts, expected) < 1e-9


# -----------------------------------------------------------------------------
# the decoders: token for token


@pytest.mark.parametrize("seed", range(24))
def test_greedy_texts_are_the_oracles(seed):
    """Temperature 0, float64: token for token over random models, ranks, n, prompts, and lengths 0,
    1, 2, n, n + 1 and past the block. Guards the first token lost between prefill and loop (litgpt
    #2307) and every off-by-one."""
    rng = torch.Generator().manual_seed(seed)
    n, rank, block_size = (int(torch.randint(low, high, (), generator=rng))
                           for low, high in ((2, 6), (1, 5), (2, 14)))
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
    model = tiny_model(seed, n_future=2 + seed % 4, rank=1 + seed % 3, block_size=9, vocab_size=11,
                       n_token=9, **VARIANTS[(2 * seed + seed // 6) % len(VARIANTS)])
    options = dict(temperature=(0.5, 1.0, 2.0)[seed % 3], top_k=(None, 4)[seed % 2],
                   top_p=(None, 0.9)[seed // 6])
    texts = [list(decoder(model, [3, 1], 40, sampler=Coupled(s, **options)))
             for s in (seed, seed + 1) for decoder in (generate_oracle, generate_plain, generate)]
    assert texts[0] == texts[1] == texts[2] != texts[3] == texts[4] == texts[5]


def counting_model(V, n, target, rank=2, block_size=64):
    """Token t is always followed by t + 1 mod V, and the head knows: P_a^(s) is certain of t + s.

    The residual stream carries the one-hot embedding of the last token alone (attention and MLP
    write nothing).
    """
    model = tiny_model(vocab_size=V, n_embd=V, n_head=1, n_layer=1, n_future=n, rank=rank,
                       head="full", target=target, block_size=block_size, bias=False)
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
@pytest.mark.parametrize("decoder", [generate_oracle, generate_plain, generate])
def test_text_ends_at_the_stop_token_wherever_it_falls(decoder, stop):
    """In any place of an accepted block, and as the very first token; what comes after it is
    neither yielded nor counted (transformers #47912). Of several such tokens the first one counts."""
    stats, model = Stats(), counting_model(7, 5, "marginal")
    stop_token = {stop, 3}  # which comes last
    text = list(decoder(model, [3], 30, sampler=Greedy(), stop_token=stop_token, stats=stats))
    assert list(decoder(model, [3], 30, sampler=Greedy(), stop_token=stop)) == text
    assert text == [(4 + i) % 7 for i in range((stop - 4) % 7 + 1)] and text[-1] == stop
    assert stats.tokens == len(text) - (decoder is not generate_oracle)
