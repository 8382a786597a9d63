"""The trunk, the cache, checkpoints, and how the loss is computed: in chunks, and wide enough."""

import pytest
import torch
from helpers import eight_windows
from test_cp_head import GIVEN, HEADS, MASKS, close, heads, target_of, tiny_model, variants
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from common import from_checkpoint
from decode import Sampling
from model import GPT, BadInput, GPTConfig, gold_log_prob, new_model

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


@heads
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_cached_forward_equals_uncached(head, k):
    """k new tokens after a cache have the hidden states of the full forward pass. Guards SDPA's
    is_causal, which is aligned to the upper left corner when there are fewer queries than keys."""
    model = tiny_model(n_future=5, head=head, target=target_of(head))
    idx, cache = torch.randint(5, (1, 8)), model.new_cache()
    pieces = [model.hidden(piece, cache) for piece in idx.split(k, dim=1)]
    found, whole = (of_tokens(model, x) for x in (torch.cat(pieces, 1), model.hidden(idx)))
    close(found, whole)


def of_tokens(model, hidden):
    """The states without those of masks, which belong to a pass: tests/test_masks.py."""
    return model.split(hidden)[0] if model.config.head in MASKS else hidden


@heads
def test_no_look_into_the_future(head):
    """Changing a token changes nothing before it, with and without a cache."""
    model = tiny_model(head=head, target=target_of(head))
    idx = torch.randint(4, (1, 8))
    other = idx.clone()
    other[0, 5] = 4
    found = [of_tokens(model, model.hidden(tokens)) for tokens in (idx, other)]
    assert torch.equal(found[0][:, :5], found[1][:, :5])
    assert not torch.equal(found[0][:, 5:], found[1][:, 5:])
    for past in (1, 3):
        results = []
        for tokens in (idx, other):
            cache = model.new_cache()
            model.hidden(tokens[:, :past], cache)
            results.append(of_tokens(model, model.hidden(tokens[:, past:], cache)))
        assert torch.equal(results[0][:, : 5 - past], results[1][:, : 5 - past])


@heads
def test_stale_cache_rows_are_never_read(head):
    """After a rollback, NaN in the rows after the length changes nothing; length 0 included."""
    model = tiny_model(head=head, target=target_of(head))
    idx = torch.randint(5, (1, 8))
    for length in (0, 1, 4):
        cache = model.new_cache()
        model.hidden(idx, cache)
        cache.length = length
        for kv in cache.kv:
            kv[:, :, :, length:] = float("nan")
        new = model.hidden(idx[:, length:], cache)
        assert new.isfinite().all()
        close(of_tokens(model, new), of_tokens(model, model.hidden(idx))[:, length:])


def test_states_of_texts_side_by_side():
    """places and a mask, with which a cache counts for itself: the states of each text alone."""
    for head in ("cp", "gloeckle", "layers"):
        model = tiny_model(head=head)
        idx, places = torch.randint(5, (2, 4)), torch.tensor([[0, 1, 2, 3], [3, 0, 1, 2]])
        mask = torch.full((2, 1, 4, 4), float("-inf"), dtype=torch.float64)
        mask[0, 0] = torch.full((4, 4), float("-inf")).triu(1)
        mask[1, 0, 0, 0] = 0.0  # a text of three tokens, after one that it does not see
        mask[1, 0, 1:, 1:] = torch.full((3, 3), float("-inf")).triu(1)
        hidden = model.hidden(idx, None, places, mask)
        close(hidden[0], model.hidden(idx[:1])[0])
        close(hidden[1, 1:], model.hidden(idx[1:, 1:])[0])


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
    weight."""
    ckpt = tiny_model().to_checkpoint()
    state = dict(ckpt["model"])
    for changes in ({}, dict(target="lm_head")):
        for name in ("transformer.h.0.mlp.c_fc.weight", "head.maps", "head.router.weight"):
            with pytest.raises(BadInput, match=name):
                from_checkpoint({**ckpt, "model": {k: v for k, v in state.items() if k != name}}, **changes)
        with pytest.raises(BadInput, match="extra"):
            from_checkpoint({**ckpt, "model": {**state, "head.extra": torch.zeros(1)}}, **changes)


def test_another_head_is_a_fresh_one_on_the_same_trunk():
    """With another head, n or r, or with fresh_head; another target keeps the head."""
    cp = tiny_model().float()
    kept = from_checkpoint(cp.to_checkpoint(), target="lm_head")
    assert all(torch.equal(p, cp.head.get_parameter(name)) for name, p in kept.head.named_parameters())
    for changes in (dict(fresh_head=True), dict(rank=3), dict(n_future=4),
                    *(dict(head=head, target="lm_head") for head in HEADS if head != "cp")):
        other = from_checkpoint(cp.to_checkpoint(), **changes)
        assert other.config.head == changes.get("head", "cp") and type(other) is type(new_model(other.config))
        assert all(torch.equal(p, cp.get_parameter(name)) for name, p in other.named_parameters()
                   if not name.startswith("head."))
        new = dict(other.head.named_parameters())
        assert not any(new[name].shape == p.shape and torch.equal(new[name], p)
                       for name, p in cp.head.named_parameters() if name in new)
    headless = from_checkpoint(cp.to_checkpoint(), n_future=1, rank=1)
    assert headless.head is None and torch.equal(headless.lm_head.weight, cp.lm_head.weight)
    grown = from_checkpoint(headless.to_checkpoint(), n_future=3, head="chain")
    assert torch.equal(grown.lm_head.weight, cp.lm_head.weight)


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


def test_bad_config_is_refused():
    for bad in (dict(n_embd=10, n_head=3), dict(n_future=0), dict(rank=0), dict(head="tucker"), dict(target="x"),
                dict(n_embd="wide"), dict(n_layer=2.5), dict(block_size=1), dict(vocab_size=5, n_token=6)):
        with pytest.raises(BadInput, match=[*bad][0].replace("vocab_size", "n_token")):
            GPTConfig(**bad)


# -----------------------------------------------------------------------------
# how the loss is computed


@heads
def test_low_precision_models_have_float32_probabilities(head):
    """A bfloat16 model computes its log-probabilities in float32; a float64 one keeps float64."""
    bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64
    for dtype, expected in ((bf16, fp32), (fp32, fp32), (fp64, fp64)):
        model, x = tiny_model(head=head, target=target_of(head)).to(dtype), torch.tensor([[1, 2, 3]])
        hidden, W = model.hidden(x), model.lm_head.weight
        e = model.split(hidden)[1][:, -1]  # (1, C)
        q = [model.head.draft(e, x[:, 0], 2, sampler, W)[1] for sampler in (Sampling(), Sampling(0.7))]
        rows = (model.head.rows(e, x[:, :2], W), model.head.log_weights(e), model.target_logits(hidden),
                model.head.log_joint(e, x, W), *q)
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

    N, V, n = 300, 700, 3  # 300 * n * r rows in chunks of 300
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=V, n_embd=4, n_head=1, n_layer=1, n_future=n, rank=2, head=head,
                       target=target_of(head))
    model = new_model(config).double()
    e = torch.randn(N, WIDTH.get(head, 1) * 4, dtype=torch.float64, requires_grad=True)
    W = torch.randn(V, 4, dtype=torch.float64)
    gold = torch.randint(V, (N, n - (head in GIVEN)))  # whose first factor is the trunk's
    with Watch():
        log_p = model.head.gold_log_probs(e, gold, W)
        log_p.sum().backward()
    with torch.no_grad():
        if head == "medusa":
            logits = model.head.own_logits(e, W, slice(n)).unsqueeze(2)
        else:
            logits = model.head.logits(model.head.vectors_along(e, gold[:, :-1], W), W)  # (N, n, r, V)
    y = gold[:, :, None, None].expand(*logits.shape[:-1], 1)
    close(log_p, logits.log_softmax(-1).gather(-1, y).squeeze(-1))
    assert 30 * V <= largest < 3 * N * V < logits.numel() + 1


WIDTH = dict(gloeckle=3, layers=3, mask=3, mask_linear=3)  # of a state, for n = 3, in C


def test_the_forward_pass_keeps_no_logits():
    """They are computed again: what autograd keeps is less than the logits of one offset."""
    kept, N, V = [], 300, 700
    h = torch.randn(N, 3, 2, 4, requires_grad=True)
    W, y = torch.randn(V, 4, requires_grad=True), torch.randint(V, (N, 3, 1))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x,
                                                  lambda x: x):
        gold_log_prob(h, W, y)
    assert 0 < sum(kept) < N * V


def test_the_loss_of_a_half_precision_model_is_float32():
    h, W, y = torch.randn(50, 8).bfloat16(), torch.randn(5, 8).bfloat16(), torch.randint(5, (50,))
    assert gold_log_prob(h, W, y).dtype == torch.float32


def test_a_share_sees_one_position_at_least_and_usage_sees_all():
    model, (idx, gold) = tiny_model(target="lm_head"), eight_windows()
    assert model.loss(idx[:1], gold[:1], joint_share=0.01)[0].isfinite()
    full, part = (model.loss(idx, gold, joint_share=share)[1]["usage"] for share in (1.0, 0.25))
    assert torch.equal(full, part)


def test_all_four_dropouts_act_in_training_and_none_later(monkeypatch):
    """In attention, after it, after the MLP and after the embedding. Of 2,560 numbers at least, half
    vanish: a tenth away from that are ten standard deviations, which is below 1e-20."""
    model = tiny_model(dropout=0.5, n_embd=32).train()
    block, x = model.transformer.h[0], torch.randn(20, 4, 32, dtype=torch.float64)
    rates, attention = [], F.scaled_dot_product_attention

    def noted(q, k, v, mask, dropout, is_causal):
        rates.append(dropout)
        return attention(q, k, v, mask, 0.0, is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    monkeypatch.setattr(model, "through_blocks", lambda x, cache, mask: x)
    for share in (0.5, 0.0):
        idx = torch.randint(5, (80, 8))
        for out in (block.attn(x, 0, None, None), block.mlp(x), model.hidden(idx)):
            assert (out == 0).double().mean().item() == pytest.approx(share, abs=0.1)
        assert rates.pop() == share
        model.eval()


def test_biases_start_at_0():
    model = new_model(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=4))
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert biases and not any(p.any() for p in biases)
