"""The trunk, the cache, checkpoints, and how the loss is computed: in chunks, and wide enough."""

import pytest
import torch
from test_cp_head import OURS, a_state, heads, tiny_model, variants
from torch.utils._python_dispatch import TorchDispatchMode

from common import from_checkpoint
from model import GPT, BadInput, GPTConfig, head_class

# -----------------------------------------------------------------------------
# the trunk


def nanogpt_logits(state, idx, n_layer, n_head):
    """nanoGPT's forward pass from its definition, on a plain dict of tensors: pre-norm, exact GELU,
    tied head."""
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
    """A checkpoint in the layout of nanoGPT's train.py (names, shapes, compiled prefix) loads and
    matches; with a head put on top, target "lm_head" leaves the model as it was, bit for bit."""
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
        plain = from_checkpoint(ckpt).eval()
        headed = from_checkpoint(ckpt, n_future=4, rank=2, target="lm_head").eval()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(plain(idx[None])[0], nanogpt_logits(state, idx, L, nh), rtol=0, atol=1e-10)
    assert torch.equal(headed(idx[None]), plain(idx[None]))
    assert plain.lm_head.weight is plain.transformer.wte.weight


def test_residual_projections_start_small():
    """nanoGPT's initialisation: std 0.02, and 0.02 / sqrt(2 n_layer) for what writes into the
    residual stream."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=512, n_layer=8, n_head=2, n_embd=64))
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / 4, rel=0.05), name
        elif p.dim() == 2 and "wpe" not in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name


def test_padding_ids_have_no_logit():
    """target_logits has a column for every real token and none for padding."""
    for target in ("marginal", "lm_head"):
        model = tiny_model(n_token=3, target=target)
        assert model(torch.tensor([[1, 2]])).shape == (1, 2, 3)


# -----------------------------------------------------------------------------
# the cache


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_cached_forward_equals_uncached(k):
    """k new tokens after a cache have the hidden states of the full forward pass. Guards SDPA's
    is_causal, which is aligned to the upper left corner when there are fewer queries than keys."""
    model = tiny_model(n_future=5)
    idx, cache = torch.randint(5, (1, 8)), model.new_cache()
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
            cache = model.new_cache()
            model.hidden(tokens[:, :past], cache)
            results.append(model.hidden(tokens[:, past:], cache))
        assert torch.equal(results[0][:, : 5 - past], results[1][:, : 5 - past])


def test_stale_cache_rows_are_never_read():
    """After a rollback, NaN in the rows after the length changes nothing; length 0 included."""
    model = tiny_model()
    idx = torch.randint(5, (1, 8))
    for length in (0, 1, 4):
        cache = model.new_cache()
        model.hidden(idx, cache)
        cache.length = length
        for kv in cache.kv:
            kv[:, :, :, length:] = float("nan")
        new = model.hidden(idx[:, length:], cache)
        torch.testing.assert_close(new, model.hidden(idx)[:, length:], rtol=0, atol=1e-12)


def test_more_tokens_than_the_block_are_refused():
    """At once, and after a cache: no position is made up for them."""
    model = tiny_model()
    cache = model.new_cache()
    model.hidden(torch.randint(5, (1, 6)), cache)
    for idx, past in ((torch.randint(5, (1, 9)), None), (torch.randint(5, (1, 3)), cache)):
        with pytest.raises(ValueError, match="9 tokens do not fit block_size 8"):
            model.hidden(idx, past)


# -----------------------------------------------------------------------------
# checkpoints and configuration


@variants
def test_checkpoint_round_trip(variant):
    """What to_checkpoint gives, from_checkpoint reads: same config, same bits."""
    model = tiny_model(**variant).float()
    other = from_checkpoint(model.to_checkpoint()).eval()
    idx = torch.randint(5, (1, 6))
    assert other.config == model.config and torch.equal(other(idx), model(idx))
    for name, p in other.head.named_parameters():
        assert torch.equal(p, model.head.get_parameter(name)), name


def test_foreign_state_does_not_load():
    """Strict means strict: a missing or a superfluous tensor is an error, not a silently random
    weight; also where a head that extends the checkpoint's is asked for."""
    ckpt = tiny_model().to_checkpoint()
    state = dict(ckpt["model"])
    for changes in ({}, dict(head="chain"), dict(target="lm_head")):
        for name in ("transformer.h.0.mlp.c_fc.weight", "head.maps", "head.router.weight"):
            with pytest.raises(BadInput, match=name):
                from_checkpoint({**ckpt, "model": {k: v for k, v in state.items() if k != name}}, **changes)
        with pytest.raises(BadInput, match="extra"):
            from_checkpoint({**ckpt, "model": {**state, "head.extra": torch.zeros(1)}}, **changes)


def test_a_head_that_extends_another_keeps_what_both_have():
    """cp becomes chain and chain becomes cp with the same router and maps; with fresh_head, or
    another shape, nothing of the head is kept, and the trunk always is."""
    cp = tiny_model().float()
    chain = from_checkpoint(cp.to_checkpoint(), head="chain")
    assert not chain.head.out.any() and torch.equal(chain.head.maps, cp.head.maps)
    for p in chain.head.parameters():
        torch.nn.init.normal_(p)
    back = from_checkpoint(chain.to_checkpoint(), head="cp")
    assert back.config == cp.config
    for name, p in back.head.named_parameters():
        assert torch.equal(p, chain.head.get_parameter(name)), name
    for options in (dict(fresh_head=True), dict(rank=3), dict(rank=3, head="cp"), dict(head="full"), dict(n_future=4)):
        other = from_checkpoint(chain.to_checkpoint(), **options)
        assert not torch.equal(other.head.router.weight[:2], chain.head.router.weight)
        assert torch.equal(other.lm_head.weight, chain.lm_head.weight)
    headless = from_checkpoint(chain.to_checkpoint(), n_future=1, rank=1)
    assert headless.head is None and torch.equal(headless.lm_head.weight, chain.lm_head.weight)
    grown = from_checkpoint(headless.to_checkpoint(), n_future=3, head="chain")
    assert type(grown.head) is head_class("chain") and torch.equal(grown.lm_head.weight, chain.lm_head.weight)


@pytest.mark.parametrize("changes", [dict(fresh_head=True), dict(fresh_head=True, head="cp"), dict(rank=3),
                                     dict(head="full"), dict(n_future=1)], ids=str)
def test_a_fresh_head_needs_nothing_of_the_old_one(changes):
    """A head that is damaged, or whose class is gone, can be replaced: the trunk is kept."""
    ckpt = tiny_model(head="chain").to_checkpoint()
    state = {name: tensor for name, tensor in ckpt["model"].items() if name != "head.maps"}
    trunk = state["lm_head.weight"].float()
    model = from_checkpoint({**ckpt, "model": state}, **changes)
    assert torch.equal(model.lm_head.weight, trunk)
    gone = {**ckpt["model_args"], "head": "a head that was renamed"}
    model = from_checkpoint({"model": state, "model_args": gone}, **{"head": "cp", **changes})
    assert torch.equal(model.lm_head.weight, trunk)
    with pytest.raises(BadInput, match="head must be one of"):
        from_checkpoint({"model": state, "model_args": gone})


def test_maps_are_not_taken_for_unembeddings():
    """Where V = C, the maps of cp and the unembeddings of full have one shape; they are other things."""
    cp = tiny_model(vocab_size=8)
    full = from_checkpoint(cp.to_checkpoint(), head="full")
    assert full.head.maps.shape == cp.head.maps.shape
    assert not torch.equal(full.head.maps.double(), cp.head.maps)


def test_bad_config_is_refused():
    for bad in (dict(n_embd=10, n_head=3), dict(n_future=0), dict(rank=0), dict(head="tucker"), dict(target="x"),
                dict(n_embd="wide"), dict(n_layer=2.5), dict(block_size=1), dict(vocab_size=5, n_token=6)):
        with pytest.raises(BadInput, match=[*bad][0].replace("vocab_size", "n_token")):
            GPTConfig(**bad)


# -----------------------------------------------------------------------------
# how the loss is computed


def test_low_precision_models_have_float32_probabilities():
    """A bfloat16 model computes its log-probabilities in float32; a float64 one keeps float64."""
    bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64
    for dtype, expected in ((bf16, fp32), (fp32, fp32), (fp64, fp64)):
        for head in OURS:
            model, x, e = tiny_model(head=head).to(dtype), torch.tensor([1]), a_state().to(dtype)
            conditionals, W = model.conditionals(e[None]), model.lm_head.weight
            rows = (conditionals.next(x), conditionals.log_p, conditionals.log_b, model.target_logits(e),
                    model.head.log_joint(e[None], torch.tensor([[1, 2, 3]]), W))
            assert {row.dtype for row in rows} == {expected}


@heads
def test_loss_goes_through_logits_in_chunks(head):
    """With more rows than a chunk holds, an uneven last chunk included: the value is that of brute
    force, and no tensor of the forward or backward pass is as large as the logits of all factors,
    or even of three positions' worth."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    N, V, n, r = 300, 700, 3, 2  # 300 * 3 * 2 rows in chunks of 300
    torch.manual_seed(0)
    module = head_class(head)(GPTConfig(vocab_size=V, n_embd=4, n_head=1, n_future=n, rank=r, head=head)).double()
    e, W = torch.randn(N, 4, dtype=torch.float64, requires_grad=True), torch.randn(V, 4, dtype=torch.float64)
    gold = torch.randint(V, (N, n))
    with Watch():
        log_p = module.gold_log_probs(e, gold, W)
        log_p.sum().backward()
    with torch.no_grad():
        logits = module.logits(e, W) if head == "full" else module.vectors_along(e, gold, W) @ W.T
    expected = logits.log_softmax(-1).gather(-1, gold[:, :, None, None].expand(N, n, r, 1)).squeeze(-1)
    torch.testing.assert_close(log_p, expected, rtol=0, atol=1e-12)
    assert N * V <= largest < 3 * N * V < n * r * N * V
