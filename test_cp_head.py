"""The model: trunk, CP head, losses. Everything is checked in float64 against brute force."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from model import GPT, CPHead, GPTConfig, KVCache, balance_loss, draw_component, joint_log_probs


def tiny_model(seed=0, scale=2.0, **config):
    """A random float64 model whose distributions are sharp enough to tell right from wrong."""
    torch.manual_seed(seed)
    defaults = dict(block_size=8, vocab_size=5, n_layer=2, n_head=2, n_embd=8, n_future=3, rank=2)
    model = GPT(GPTConfig(**{**defaults, **config})).double().eval()
    for p in model.parameters():
        p.data += 0.02 * scale * torch.randn_like(p)
        if p.dim() > 1:
            p.data *= scale
    return model


HEADS = [("reduced", "none"), ("full", "none"), ("reduced", "previous")]
VARIANTS = [dict(factors=f, context=c, target=t) for t in ("marginal", "lm_head") for f, c in HEADS]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()))
heads = pytest.mark.parametrize("factors,context", HEADS)


def joint_table(model, e):
    """Equation (1) written out: P(x_1, ..., x_n) for every combination of tokens, (V,) * n."""
    head, W, r, n = model.cp_head, model.lm_head.weight, model.config.rank, model.config.n_future
    w = torch.softmax(head.mix(e), -1)
    table = 0
    for a in range(r):
        term = w[a]
        for s in range(n):
            A = head.factors[s, a]
            logits = W @ (A @ e) if model.config.factors == "reduced" else A @ e
            if s > 0 and model.config.context == "previous":  # a row for each previous token, equation (4)
                G, U = head.gate[s - 1], head.out
                norm = (W - W.mean(1, keepdim=True)) / (W.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
                logits = torch.stack([logits + W @ U @ (x * (G @ e)) for x in norm])
            term = term.unsqueeze(-1) * torch.softmax(logits, -1)
        table = table + term
    return table


# -----------------------------------------------------------------------------
# the head


@variants
def test_joint_sums_to_one_and_factors_match_the_formula(variant):
    """cp_factors gives the w and P of equation (1), and their joint is a distribution over V^n windows."""
    model = tiny_model(**variant)
    e = torch.randn(8, dtype=torch.float64)
    table = joint_table(model, e)
    assert table.sum().item() == pytest.approx(1, abs=1e-12)
    log_w, factor = model.cp_factors(e)
    for window in itertools.product(range(5), repeat=3):
        x = torch.tensor(window).split(1)
        log_p = [factor(s, x[s - 2] if s > 1 else None).log_softmax(-1) for s in (1, 2, 3)]  # (r, V) each
        terms = log_w + sum(row[:, x_s].squeeze(-1) for row, x_s in zip(log_p, x))
        assert terms.exp().sum().item() == pytest.approx(table[window].item(), abs=1e-12)


@variants
def test_target_is_the_marginal_of_the_joint_or_the_lm_head(variant):
    """target "marginal" is the joint summed over x_2..x_n; target "lm_head" is the trunk's own softmax."""
    model = tiny_model(**variant)
    e = torch.randn(8, dtype=torch.float64)
    marginal = variant["target"] == "marginal"
    expected = joint_table(model, e).sum((1, 2)) if marginal else torch.softmax(model.lm_head(e), -1)
    torch.testing.assert_close(model.target_logits(e).softmax(-1), expected, rtol=0, atol=1e-12)


@variants
def test_loss_and_its_gradient_equal_brute_force(variant):
    """-log P of each window, read off the full table, has the value and the gradient of GPT.loss, and so do its
    parts: the bug guarded is a chunked or recomputed loss that drops a term (the weights', say)."""
    model, marginal = tiny_model(**variant).train(), variant["target"] == "marginal"
    idx, targets = torch.randint(5, (2, 4)), torch.randint(5, (2, 4, 3))
    loss, parts = model.loss(idx, targets, joint_weight=0.7, balance_weight=0.3)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    hidden = model.hidden(idx)
    tables = torch.stack([joint_table(model, e) for e in hidden.flatten(0, 1)])  # (N, V, V, V)
    x = targets.flatten(0, 1).T
    n = torch.arange(len(tables))
    first, second = tables.sum((2, 3))[n, x[0]], tables.sum(3)[n, x[0], x[1]]
    joint = -tables[n, x[0], x[1], x[2]].log().mean() / 3
    w = torch.softmax(model.cp_head.mix(hidden.flatten(0, 1)), -1)
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
def test_gradcheck_of_the_joint_loss(factors, context):
    """Finite differences agree with the recomputed backward pass, for the hidden state, w, the factors and W."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=4, n_embd=3, n_head=1, n_future=3, rank=2, factors=factors, context=context)
    head = CPHead(config).double()
    targets, names = torch.randint(4, (5, 3)), [name for name, _ in head.named_parameters()]

    # functional_call runs head.forward on the given parameters, so that gradcheck can vary them
    head.forward = lambda e, unembed: joint_log_probs(head.log_weights(e), head.gold_log_probs(e, targets, unembed))

    def loss(e, unembed, *params):
        return torch.func.functional_call(head, dict(zip(names, params)), (e, unembed)).sum()

    params = [p.detach() + 0.3 * torch.randn(p.shape) for p in head.parameters()]
    inputs = [torch.randn(5, 3), torch.randn(4, 3), *params]
    inputs = [x.double().requires_grad_() for x in inputs]
    if factors == "full":
        inputs[1].requires_grad_(False)
    assert torch.autograd.gradcheck(loss, inputs)


def test_joint_share_is_unbiased_and_trains_on_a_part():
    """Averaged over many draws, the loss on a share of the positions is the loss on all of them (false alarm: the
    tolerance is over 6 standard errors)."""
    model = tiny_model()
    idx, targets = torch.randint(5, (4, 8)), torch.randint(5, (4, 8, 3))
    with torch.no_grad():
        full = model.loss(idx, targets)[0].item()
        parts = torch.stack([model.loss(idx, targets, joint_share=0.25)[0] for _ in range(100)])
    assert 0 < abs(parts.mean().item() - full) < 6 * parts.std().item() / 10


@pytest.mark.parametrize("context", ["none", "previous"])
@pytest.mark.parametrize("target", ["marginal", "lm_head"])
def test_sampled_component_has_the_loss_and_on_average_the_gradient(context, target, monkeypatch):
    """Summed over all that could be drawn, each with its probability, the gradients of sample_component are those of
    the full loss; so are the loss, its parts and the gradient of the weights at every draw. Guards a draw from w
    instead of the posterior, whose gradient the same check must tell apart."""
    model = tiny_model(rank=3, context=context, target=target)
    idx, targets = torch.randint(5, (1, 2)), torch.randint(5, (1, 2, 3))
    options = dict(joint_weight=0.7, balance_weight=0.3)

    def loss_and_gradient(**more):
        loss, parts = model.loss(idx, targets, **options, **more)
        names, params = zip(*model.named_parameters())
        gradient = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        parts["of the weights"] = gradient[names.index("cp_head.mix.weight")]
        return parts, torch.cat([loss.detach().view(1), *(g.flatten() for g in gradient)])

    parts, full = loss_and_gradient()

    def mean(posterior_of):
        """The mean over all draws of loss and gradient, if the posterior (N, r) is taken to be posterior_of it."""
        total = 0
        for drawn in itertools.product(range(3), repeat=2):  # a component for each of the two positions
            chance = []

            def choose(posterior):
                chance.append(posterior_of(posterior)[torch.arange(2), torch.tensor(drawn)].prod())
                return torch.tensor(drawn).unsqueeze(-1)

            monkeypatch.setattr("model.draw_component", choose)
            parts_drawn, gradient = loss_and_gradient(sample_component=True)
            for name, part in parts.items():
                torch.testing.assert_close(parts_drawn[name], part, rtol=0, atol=1e-12)
            total += chance[0] * gradient
        return total

    torch.testing.assert_close(mean(lambda p: p), full, rtol=0, atol=1e-12)
    w = model.cp_head.log_weights(model.hidden(idx)[0]).detach().exp()
    assert (mean(lambda p: w) - full).abs().max() > 1e-4


def test_component_is_drawn_in_proportion():
    """100,000 draws from one row: each share within 6 standard errors, and nothing of probability 0."""
    torch.manual_seed(0)
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    share = torch.bincount(draw_component(p.expand(100_000, 4)).flatten(), minlength=4) / 100_000
    assert ((share - p).abs() <= 6 * (p * (1 - p) / 100_000).sqrt()).all()


def test_sampled_component_of_full_factors_is_refused():
    model = tiny_model(factors="full")
    with pytest.raises(ValueError, match="sample_component needs factors = reduced"):
        model.loss(torch.randint(5, (1, 2)), torch.randint(5, (1, 2, 3)), sample_component=True)


def test_rank_one_is_independent_heads():
    """r = 1: the joint loss is the mean of n cross-entropies, and the weights get no gradient."""
    model = tiny_model(rank=1)
    idx, targets = torch.randint(5, (2, 4)), torch.randint(5, (2, 4, 3))
    loss, _ = model.loss(idx, targets)
    e = model.hidden(idx).flatten(0, 1)
    logits = [model.lm_head(e @ model.cp_head.factors[s, 0].T) for s in range(3)]
    heads = [F.cross_entropy(logits[s], targets[..., s].flatten()) for s in range(3)]
    torch.testing.assert_close(loss, sum(heads) / 3, rtol=0, atol=1e-12)
    loss.backward()
    assert model.cp_head.mix.weight.grad.abs().max() < 1e-15


def test_n_future_one_is_plain_gpt():
    """n = 1: no head, no further parameter, and the loss is the cross-entropy of the logits."""
    model = tiny_model(n_future=1)
    assert model.cp_head is None and model.n_params()[1] == 0
    idx, targets = torch.randint(5, (2, 4)), torch.randint(5, (2, 4, 1))
    loss, parts = model.loss(idx, targets)
    torch.testing.assert_close(loss, F.cross_entropy(model(idx).flatten(0, 1), targets.flatten()), rtol=0, atol=1e-12)
    torch.testing.assert_close(parts["next"], loss.detach())


def test_balance_loss_extremes():
    """1 when the components share the work, r when one does it all, whatever the single positions do."""
    sharp = 40.0 * torch.eye(4, dtype=torch.float64)
    assert balance_loss(F.log_softmax(sharp, -1)).item() == pytest.approx(1)  # each position its own component
    assert balance_loss(torch.full((6, 4), 0.25, dtype=torch.float64).log()).item() == pytest.approx(1)
    assert balance_loss(F.log_softmax(sharp[:1].expand(6, 4), -1)).item() == pytest.approx(4)


def test_balance_loss_pulls_towards_balance():
    """A gradient step on the balance loss alone takes weight from the overused component."""
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    balance_loss(F.log_softmax(logits, -1)).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1] < 0).all()


@pytest.mark.parametrize("factors", ["reduced", "full"])
def test_heads_share_no_storage(factors):
    """Changing one factor changes that factor's probabilities alone. Guards [Block()] * n (Medusa PR 133)."""
    model = tiny_model(factors=factors)
    e = torch.randn(8, dtype=torch.float64)

    def logits():
        _, factor = model.cp_factors(e)
        return torch.stack([factor(s, None) for s in (1, 2, 3)])

    before = logits()
    with torch.no_grad():
        model.cp_head.factors[1, 0] += torch.randn_like(model.cp_head.factors[1, 0])
    changed = (logits() != before).any(-1)
    assert changed.tolist() == [[False, False], [True, False], [False, False]]


def test_zero_term_is_the_head_without_context():
    """U = 0, the start of training: equation (4) is that of the paper, to the bit, in float32 and in every direction:
    loss, gradients and, at this size, draft rows, which come out of other matrix products. Guards a term that has
    another effect than U's, like a norm of the sum."""
    plain = tiny_model(n_future=4).float()
    seeing = GPT.from_checkpoint(plain.checkpoint(), context="previous").eval()
    idx, targets, e = torch.randint(5, (2, 8)), torch.randint(5, (2, 8, 4)), torch.randn(8)
    losses = [model.loss(idx, targets, balance_weight=0.1)[0] for model in (plain, seeing)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for name, p in plain.named_parameters():
        assert torch.equal(p.grad, seeing.get_parameter(name).grad), name
    (log_w, P), (log_w_seeing, P_seeing) = plain.cp_factors(e), seeing.cp_factors(e)
    assert torch.equal(log_w, log_w_seeing)
    for s, x in itertools.product((1, 2, 3, 4), range(5)):
        assert torch.equal(P(s, None), P_seeing(s, torch.tensor([x])))
    assert (seeing.cp_head.out.grad != 0).any()  # and it can leave its start


def test_head_without_context_extends_and_a_head_with_it_shrinks():
    """from_checkpoint keeps all of the head that both have, the mixture included, and adds or drops the rest; with
    fresh_head, or another rank, nothing of it is kept."""
    plain = tiny_model().float()
    seeing = GPT.from_checkpoint(plain.checkpoint(), context="previous")
    for p in seeing.cp_head.parameters():
        torch.nn.init.normal_(p)
    back = GPT.from_checkpoint(seeing.checkpoint(), context="none")
    assert back.config == plain.config
    for name, p in back.cp_head.named_parameters():
        assert torch.equal(p, seeing.cp_head.get_parameter(name)), name
    for options in (dict(fresh_head=True), dict(rank=3), dict(rank=3, context="none")):
        other = GPT.from_checkpoint(seeing.checkpoint(), **options)
        assert not torch.equal(other.cp_head.factors[:, :1], seeing.cp_head.factors[:, :1])
        assert other.config.context == "none" or not other.cp_head.out.any()
        assert torch.equal(other.lm_head.weight, seeing.lm_head.weight)
    for name in ("cp_head.factors", "cp_head.mix.weight"):  # strict all the same
        state = {k: v for k, v in plain.state_dict().items() if k != name}
        with pytest.raises(RuntimeError, match=name):
            GPT.from_checkpoint({**plain.checkpoint(), "model": state}, context="previous")
    with pytest.raises(RuntimeError, match="cp_head.extra"):
        state = {**seeing.state_dict(), "cp_head.extra": torch.zeros(1)}
        GPT.from_checkpoint({**seeing.checkpoint(), "model": state}, context="none")
    headless = GPT.from_checkpoint(seeing.checkpoint(), n_future=1, rank=1)
    grown = GPT.from_checkpoint(headless.checkpoint(), fresh_head=True, n_future=3, context="previous")
    assert grown.cp_head.sees_previous


def test_one_component_that_sees_its_previous_token_is_sure_where_no_product_can_be():
    """A cycle of V tokens that starts anywhere: x_1 is uniform, x_2 = x_1 + 1. Without x_1 a factor has 1/V for it at
    best; equation (4) can be sure of it with rank 1."""
    V = 6
    model = tiny_model(vocab_size=V, n_embd=V, n_head=1, n_future=2, rank=1, context="previous")
    eye, head = torch.eye(V, dtype=torch.float64), model.cp_head
    with torch.no_grad():
        model.lm_head.weight.copy_(eye)
        head.factors.zero_()
        head.gate[0] = 1.0
        head.out.copy_(40 * eye.roll(1, 0))
    _, factor = model.cp_factors(torch.full((V,), 1 / V, dtype=torch.float64))
    for x in range(V):
        assert factor(1, None).softmax(-1)[0, x].item() == pytest.approx(1 / V)
        assert factor(2, torch.tensor([x])).softmax(-1)[0, (x + 1) % V] > 0.999


@pytest.mark.parametrize("factors", ["reduced", "full"])
def test_components_start_apart(factors):
    """At equal components the weights' gradient is exactly 0 and training cannot part them; at our start it is not."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=16, n_future=3, rank=3, factors=factors)
    model = GPT(config).double()
    idx, targets = torch.randint(16, (4, 8)), torch.randint(16, (4, 8, 3))
    model.loss(idx, targets)[0].backward()
    apart = model.cp_head.mix.weight.grad.abs().max().item()
    with torch.no_grad():
        model.cp_head.factors.copy_(model.cp_head.factors[:, :1].expand_as(model.cp_head.factors).clone())
    model.zero_grad()
    model.loss(idx, targets)[0].backward()
    assert model.cp_head.mix.weight.grad.abs().max().item() < 1e-15 < 1e-7 < apart


def test_low_precision_models_have_float32_probabilities():
    """A bfloat16 model computes its log-probabilities in float32; a float64 one keeps float64."""
    bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64
    for dtype, expected in ((bf16, fp32), (fp32, fp32), (fp64, fp64)):
        for rank in (1, 2):
            model, x = tiny_model(context="previous", rank=rank).to(dtype), torch.tensor([1])
            e = torch.randn(8, dtype=dtype)
            log_w, factor = model.cp_factors(e)
            assert {t.dtype for t in (log_w, factor(1, None), factor(2, x), model.target_logits(e))} == {expected}


# -----------------------------------------------------------------------------
# the trunk


def nanogpt_logits(state, idx, n_layer, n_head):
    """nanoGPT's forward pass from its definition, on a plain dict of tensors: pre-norm, exact GELU, tied head."""
    def norm(x, name):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-5).sqrt() * state[name + ".weight"] + state.get(name + ".bias", 0)

    def linear(x, name):
        return x @ state[name + ".weight"].T + state.get(name + ".bias", 0)

    T = len(idx)
    x = state["transformer.wte.weight"][idx] + state["transformer.wpe.weight"][:T]
    for i in range(n_layer):
        h = f"transformer.h.{i}"
        q, k, v = linear(norm(x, h + ".ln_1"), h + ".attn.c_attn").chunk(3, -1)
        heads = []
        for qh, kh, vh in zip(*(t.chunk(n_head, -1) for t in (q, k, v))):
            att = (qh @ kh.T / qh.size(-1) ** 0.5).masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
            heads.append(att.softmax(-1) @ vh)
        x = x + linear(torch.cat(heads, -1), h + ".attn.c_proj")
        m = linear(norm(x, h + ".ln_2"), h + ".mlp.c_fc")
        x = x + linear(m * 0.5 * (1 + torch.erf(m / 2**0.5)), h + ".mlp.c_proj")
    return norm(x, "transformer.ln_f") @ state["lm_head.weight"].T


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_checkpoint_loads_strictly_and_gives_its_logits(bias):
    """A checkpoint in the layout of nanoGPT's train.py (names, shapes, compiled prefix) loads and matches; with a head
    put on top, target "lm_head" leaves the model as it was, bit for bit."""
    V, C, L, nh, T = 24, 16, 2, 4, 10
    shapes = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (T, C), "transformer.ln_f.weight": (C,)}
    for i in range(L):
        h = f"transformer.h.{i}."
        shapes |= {h + "ln_1.weight": (C,), h + "attn.c_attn.weight": (3 * C, C), h + "attn.c_proj.weight": (C, C),
                   h + "ln_2.weight": (C,), h + "mlp.c_fc.weight": (4 * C, C), h + "mlp.c_proj.weight": (C, 4 * C)}
    if bias:
        shapes |= {name[:-6] + "bias": shape[:1] for name, shape in shapes.items() if ".w" not in name[:-7]}
    torch.manual_seed(0)
    state = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    args = dict(n_layer=L, n_head=nh, n_embd=C, block_size=T, bias=bias, vocab_size=V, dropout=0.0)
    ckpt = {"model": {"_orig_mod." + k: v for k, v in state.items()}, "model_args": args, "iter_num": 0, "config": {}}

    idx = torch.randint(V, (T,))
    torch.set_default_dtype(torch.float64)
    try:
        plain = GPT.from_checkpoint(ckpt).eval()
        headed = GPT.from_checkpoint(ckpt, n_future=4, rank=2, target="lm_head").eval()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(plain(idx[None])[0], nanogpt_logits(state, idx, L, nh), rtol=0, atol=1e-10)
    assert torch.equal(headed(idx[None]), plain(idx[None]))
    assert plain.lm_head.weight is plain.transformer.wte.weight


def test_foreign_state_does_not_load():
    """Strict means strict: a missing or a superfluous tensor is an error, not a silently random weight."""
    ckpt = tiny_model().checkpoint()
    state = dict(ckpt["model"])
    for name in ("transformer.h.0.mlp.c_fc.weight", "cp_head.factors", "cp_head.mix.weight"):
        with pytest.raises(RuntimeError, match=name):
            GPT.from_checkpoint({**ckpt, "model": {k: v for k, v in state.items() if k != name}})
    with pytest.raises(RuntimeError, match="extra"):
        GPT.from_checkpoint({**ckpt, "model": {**state, "extra": torch.zeros(1)}})


@variants
def test_checkpoint_round_trip(variant):
    """What GPT.checkpoint writes, from_checkpoint reads: same config, same bits."""
    model = tiny_model(**variant).float()
    other = GPT.from_checkpoint(model.checkpoint()).eval()
    idx = torch.randint(5, (1, 6))
    assert other.config == model.config and torch.equal(other(idx), model(idx))
    assert torch.equal(other.cp_head.factors, model.cp_head.factors)


def test_residual_projections_start_small():
    """nanoGPT's initialisation: std 0.02, and 0.02 / sqrt(2 n_layer) for what writes into the residual stream."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=512, n_layer=8, n_head=2, n_embd=64))
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / 4, rel=0.05), name
        elif p.dim() == 2 and "wpe" not in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name


@pytest.mark.parametrize("factors", ["reduced", "full"])
def test_loss_goes_through_logits_in_chunks(factors):
    """With more rows than a chunk holds, an uneven last chunk included: the value is that of brute force, and no tensor
    of the forward or backward pass is as large as the logits of all factors, or even of three positions' worth."""
    from torch.utils._python_dispatch import TorchDispatchMode
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    N, V = 300, 700  # 300 * 3 * 2 rows in chunks of 300
    torch.manual_seed(0)
    head = CPHead(GPTConfig(vocab_size=V, n_embd=4, n_head=1, n_future=3, rank=2, factors=factors)).double()
    e, W = torch.randn(N, 4, dtype=torch.float64, requires_grad=True), torch.randn(V, 4, dtype=torch.float64)
    targets = torch.randint(V, (N, 3))
    with Watch():
        gold = head.gold_log_probs(e, targets, W)
        gold.sum().backward()
    log_p = head.logits(e, W, slice(None)).log_softmax(-1)
    expected = log_p.gather(-1, targets[:, :, None, None].expand(N, 3, 2, 1)).squeeze(-1)
    torch.testing.assert_close(gold, expected, rtol=0, atol=1e-12)
    assert N * V <= largest < 3 * N * V < head.factors.shape[0] * head.factors.shape[1] * N * V


def test_bad_config_is_refused():
    for bad in (dict(n_embd=10, n_head=3), dict(n_future=0), dict(rank=0), dict(factors="tucker"), dict(target="x"),
                dict(context="next"), dict(context="previous", factors="full"),
                dict(block_size=1), dict(vocab_size=5, n_token=6)):
        with pytest.raises(ValueError):
            GPTConfig(**bad)


# -----------------------------------------------------------------------------
# the cache


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_cached_forward_equals_uncached(k):
    """k new tokens behind a cache have the hidden states of the full forward pass. Guards SDPA's is_causal, which is
    aligned to the upper left corner when there are fewer queries than keys."""
    model = tiny_model(n_future=5)
    idx = torch.randint(5, (1, 8))
    cache = KVCache(model.config, 1, torch.float64, "cpu")
    pieces = [model.hidden(piece, cache) for piece in idx.split(k, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model.hidden(idx), rtol=0, atol=1e-12)


def test_no_look_into_the_future():
    """Changing a token changes nothing before it, with and without a cache."""
    model = tiny_model()
    idx = torch.randint(4, (1, 8))
    other = idx.clone()
    other[0, 5] = 4
    assert torch.equal(model.hidden(idx)[:, :5], model.hidden(other)[:, :5])
    assert not torch.equal(model.hidden(idx)[:, 5:], model.hidden(other)[:, 5:])
    for past in (1, 3):
        results = []
        for tokens in (idx, other):
            cache = KVCache(model.config, 1, torch.float64, "cpu")
            model.hidden(tokens[:, :past], cache)
            results.append(model.hidden(tokens[:, past:], cache))
        assert torch.equal(results[0][:, : 5 - past], results[1][:, : 5 - past])


def test_stale_cache_rows_are_never_read():
    """After a rollback, NaN in the rows behind the length changes nothing; length 0 included."""
    model = tiny_model()
    idx = torch.randint(5, (1, 8))
    for length in (0, 1, 4):
        cache = KVCache(model.config, 1, torch.float64, "cpu")
        model.hidden(idx, cache)
        cache.length = length
        for kv in cache.kv:
            kv[:, :, :, length:] = float("nan")
        new = model.hidden(idx[:, length:], cache)
        torch.testing.assert_close(new, model.hidden(idx)[:, length:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 3])
def test_cache_of_fixed_shapes_equals_the_other(k):
    """With a tensor for its length, the cache is attended to as a whole behind a mask: same hidden states, and rows
    that are stale (finite, as a model writes them) have no weight."""
    model = tiny_model(n_future=4)
    idx = torch.randint(5, (1, 8))
    cache = KVCache(model.config, 1, torch.float64, "cpu")
    model.hidden(torch.randint(5, (1, 8)), cache)
    cache.length = torch.tensor([0])
    pieces = [model.hidden(piece, cache) for piece in idx.split(k, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model.hidden(idx), rtol=0, atol=1e-12)
    assert cache.length.item() == 8


def test_rows_past_the_block_leave_the_others_alone():
    """A fixed-size step at the end of the block computes rows that have no position; the rows before are right."""
    model = tiny_model(n_future=4)
    idx = torch.randint(5, (1, 10))
    cache = KVCache(model.config, 1, torch.float64, "cpu")
    model.hidden(idx[:, :6], cache)
    new = model.hidden(idx[:, 6:], cache)
    torch.testing.assert_close(new[:, :2], model.hidden(idx[:, :8])[:, 6:], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="block_size"):
        model.hidden(idx)
