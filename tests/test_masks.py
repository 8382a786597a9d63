"""The heads of masks: its states are those of one causal pass over a prefix and its masks, its rows are the
conditionals of a joint distribution, and both ways of decoding with it are exact."""

import itertools
from collections import defaultdict
from types import SimpleNamespace

import pytest
import test_cp_head as shared
import torch
from test_cp_head import enumerated, expected_texts, tiny_model, total_variation
from torch.nn import functional as F

import decode
from decode import Greedy, Sampling, Stats, generate, generate_speculative
from decoders.coupled import Coupled
from decoders.draft_length import collect
from heads.masks import Carrier, Text
from model import GPT, BadInput, GPTConfig, door

both_ways = pytest.mark.parametrize("quadratic", [True, False], ids=["quadratic", "linear"])


def mask_model(seed=0, quadratic=True, **config):
    model = tiny_model(seed, head="mask", target="lm_head", **config)
    model.head.quadratic = quadratic
    return model


def norm(x, weight=1.0, bias=0.0):
    var, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def states(model, prefix):
    """e of the last token of prefix, and z_1..z_{n-1} of the masks after it, (n, C): one causal pass over both,
    without a cache, from the definition of GPT-2, and y = W x + b + g B A x with g = 1 at the masks."""
    head, T, n = model.head, len(prefix), model.config.n_future
    places = torch.arange(T + n - 1).clamp(max=model.config.block_size - 1)
    x = torch.cat((model.transformer.wte.weight[prefix], head.maps)) + model.transformer.wpe.weight[places]
    gate = (torch.arange(T + n - 1) >= T).double()[:, None]
    lora = zip(head.A, head.B)

    def linear(layer, x):
        A, B = next(lora)
        return x @ layer.weight.T + layer.bias + gate * (x @ A.T @ B.T)

    for block in model.transformer.h:
        q, k, v = linear(block.attn.c_attn, norm(x, block.ln_1.weight, block.ln_1.bias)).chunk(3, -1)
        heads = []
        for qh, kh, vh in zip(*(t.chunk(model.config.n_head, -1) for t in (q, k, v))):
            a = (qh @ kh.T / qh.size(-1) ** 0.5).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), float("-inf"))
            heads.append(a.softmax(-1) @ vh)
        x = x + linear(block.attn.c_proj, torch.cat(heads, -1))
        inner = linear(block.mlp.c_fc, norm(x, block.ln_2.weight, block.ln_2.bias))
        x = x + linear(block.mlp.c_proj, F.gelu(inner))
    return norm(x, model.transformer.ln_f.weight, model.transformer.ln_f.bias)[T - 1 :]


def log_rows(model, e, window):
    """log P^(s), s = 1..n, along a window, by the formula: e (n, C) -> n times (V,)."""
    W, mlp = model.lm_head.weight, model.head.mlp

    def silu_norm(i, x):
        x = x @ mlp[i].weight.T + mlp[i].bias
        return norm(x * torch.sigmoid(x), mlp[i + 2].weight, mlp[i + 2].bias)

    h = [e[0]] + [silu_norm(3, silu_norm(0, torch.cat((norm(W[x]), z)))) for x, z in zip(window, e[1:])]
    return [(W @ h_s).log_softmax(-1) for h_s in h]


def close(a, b, atol=1e-11):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# -----------------------------------------------------------------------------
# the trunk with masks in it


def test_states_of_a_text_are_those_of_each_prefix_with_its_masks():
    """All positions at once or some of them in any order, more groups than one pass takes: so no group sees another
    or the future, and the pass over kept keys and values is the one without them. Guards another text's states where
    the texts have unequal numbers of positions."""
    model = mask_model(block_size=7)
    idx = torch.randint(5, (3, 7))
    expected = torch.stack([states(model, idx[b, : t + 1]).flatten() for b in range(3) for t in range(7)])
    for some in (slice(None), torch.tensor([20, 3, 4, 9, 0, 5, 6]), torch.tensor([13])):
        text = Text(model)
        seen = model.head.see(model.hidden(idx, text), text)
        assert len(seen) == 21
        close(seen.flatten(0, 1)[some], expected[some])


@both_ways
def test_states_in_decoding_are_those_of_the_prefix_after_every_step(quadratic, monkeypatch):
    """What each draft starts from, after rejections, full acceptance and a new window. Guards the masks of a token
    that was rejected, an off-by-one in the group, and stale keys: all stay lossless, so no test of exactness sees
    them. A linear step drafts nothing after a rejection, and only then; a quadratic one always can."""
    found, draft = defaultdict(int), decode.draft

    def checked(model, e, token, n_drafts, sampler):
        window = decode.window_ids(tokens, model)[0, :-1].tolist()
        room = model.config.block_size - len(window) - 1
        was_rejected = bool(steps) and steps[-1][0] <= steps[-1][1]
        fresh = quadratic or not was_rejected or len(window) < cut[0]
        assert n_drafts == (min(2, room) if fresh else 0)
        if n_drafts:
            close(e.view(3, -1), states(model, window))
        cut[0] = len(window)
        found[n_drafts, was_rejected] += 1
        return draft(model, e, token, n_drafts, sampler)

    monkeypatch.setattr(decode, "draft", checked)
    with torch.inference_mode():
        for seed in range(6):
            model, tokens, steps, cut = mask_model(seed, quadratic, block_size=9), [1, 0, 3], [], [0]
            blocks = decode.speculative_blocks(model, tokens, Coupled(seed), lap=lambda part: None)
            next(blocks)
            while len(tokens) < 40:
                new, n_drafts = next(blocks)
                steps.append((len(new), n_drafts))
    assert found[2, False] > 5 and found[2 if quadratic else 0, True] > 5 and found[1, True] + found[1, False] > 0


def test_states_of_tokens_are_the_trunks_to_the_bit():
    """With B as it is and with B = 0, in training and in decoding, whatever the masks are; the masks' own states do
    change. After a pass, the trunk is as it was."""
    model = mask_model()
    idx = torch.randint(5, (2, 8))
    plain = model.hidden(idx)
    text = Text(model)
    hidden = model.hidden(idx, text)
    trained = model.head.see(hidden, text)[:]
    assert torch.equal(hidden, plain) and torch.equal(trained.view(2, 8, 3, 8)[:, :, 0], plain)
    passes = []
    for scale in (1, 0):
        for B in model.head.B:
            B.data *= scale
        assert all(B.abs().min() > 0 for B in model.head.B) or not scale
        carrier = Carrier(model)
        cache = carrier.new_cache()
        with torch.no_grad():
            hidden = [carrier.hidden(idx[:1, :3], cache), carrier.hidden(idx[:1, 3:6], cache)]
        passes.append((torch.cat(hidden, 1), cache.z, [kv[:, :, :, :6] for kv in cache.kv]))
    (with_lora, z, kv), (without, other_z, other_kv) = passes
    assert torch.equal(with_lora, without) and all(map(torch.equal, kv, other_kv))
    assert not (z == other_z).any()
    close(with_lora, plain[:1, :6], atol=1e-13)  # a pass of another shape rounds otherwise
    assert torch.equal(model.hidden(idx), plain) and not any(m._forward_hooks for m in model.modules())


# -----------------------------------------------------------------------------
# the joint, and the loss


def test_it_is_a_joint_distribution_and_its_rows_are_the_conditionals():
    """Over all windows at V = 3, n = 3: the joint is the formula's, sums to 1, and the rows that drafts are drawn
    from are its conditionals."""
    model = mask_model(vocab_size=3)
    e, W = torch.randn(3, 8, dtype=torch.float64), model.lm_head.weight
    windows = torch.tensor(list(itertools.product(range(3), repeat=3)))
    joint = model.head.log_joint(e.flatten().expand(27, -1), windows, W)
    assert joint[:, -1].exp().sum().item() == pytest.approx(1, abs=1e-12)
    for window, log_p in zip(windows, joint):
        rows = log_rows(model, e, window)
        close(log_p, torch.stack([row[x] for row, x in zip(rows, window)]).cumsum(0))
        conditionals = model.conditionals(e.flatten()[None])
        for row, x in zip(rows[1:], window):
            close(conditionals.next(x[None])[0], row)


@pytest.mark.parametrize("draft_vocab", [0, 2])
def test_rows_along_the_gold_tokens_are_those_that_drafts_are_drawn_from(draft_vocab, monkeypatch):
    monkeypatch.setattr(shared, "a_state", lambda head: torch.randn(24, dtype=torch.float64))
    shared.test_rows_along_the_gold_tokens_are_those_that_drafts_are_drawn_from("mask", 2, draft_vocab)


def test_loss_and_its_gradient_equal_brute_force():
    """Position by position, from each prefix alone: cross-entropy, joint, and the latent consistency, which gives the
    states of tokens no gradient and leaves out places after the text."""
    model = mask_model(block_size=5).train()
    idx, gold = torch.randint(5, (2, 5)), torch.randint(5, (2, 5, 3))
    loss, parts = model.loss(idx, gold, joint_weight=0.7)
    parameters = [p for name, p in model.named_parameters() if "router" not in name]
    grads = torch.autograd.grad(loss, parameters)

    first, joint, errors = [], [], []
    for b, t in itertools.product(range(2), range(5)):
        z = states(model, idx[b, : t + 1])
        rows = log_rows(model, z, gold[b, t])
        first.append(-rows[0][gold[b, t, 0]])
        joint.append(-sum(row[x] for row, x in zip(rows, gold[b, t])) / 3)
        errors += [(states(model, idx[b, : t + 1 + j])[0].detach() - z[j]) ** 2 for j in (1, 2) if t + j < 5]
    first, joint, error = (torch.stack(x).mean() for x in (first, joint, errors))
    expected = first + 0.7 * (joint + error)
    close(loss, expected)
    close(parts["joint"], joint.detach())
    for a, b in zip(grads, torch.autograd.grad(expected, parameters)):
        close(a, b, atol=1e-10)


def test_the_joint_share_is_what_goes_through_the_trunk():
    """A share of the positions pays for its masks alone, and the loss is that of all positions on average (false
    alarm: over 6 standard errors)."""
    model, rows = mask_model(block_size=16), []
    idx, gold = torch.randint(5, (4, 16)), torch.randint(5, (4, 16, 3))
    model.transformer.h[0].mlp.register_forward_hook(lambda module, inputs, y: rows.append(y.shape[:-1].numel()))
    with torch.no_grad():
        full = model.loss(idx, gold)[0].item()
        assert sum(rows) == 4 * 16 * (1 + 2)
        rows.clear()
        losses = torch.stack([model.loss(idx, gold, joint_share=0.25)[0] for _ in range(100)])
    assert 64 + 2 * 16 <= sum(rows) / 100 < 64 + 2 * 2.5 * 16  # some are for the longest of the four texts
    assert 0 < abs(losses.mean().item() - full) < 6 * losses.std().item() / 10


def test_training_on_a_frozen_trunk_makes_drafts_that_are_accepted():
    """A text whose next token needs two tokens before it. The trunk learns it; then what --freeze_trunk trains, the
    head alone, lowers its loss, the trunk stays as it was, and most drafts are accepted."""
    torch.manual_seed(0)
    text = torch.tensor([0, 0, 1, 0, 2, 1, 1, 2, 2] * 9)
    idx, gold = text[:64].unfold(0, 16, 4), text[1:].unfold(0, 3, 1)[:64].unfold(0, 16, 4).transpose(1, 2)
    model = GPT(GPTConfig(block_size=16, vocab_size=3, n_layer=2, n_head=2, n_embd=32, n_future=3, rank=4, head="mask",
                          target="lm_head"))

    def train(steps, lr, joint_weight):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
        for _ in range(steps):
            loss, parts = model.loss(idx, gold, joint_weight=joint_weight, joint_share=0.5)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return parts

    assert not any(B.any() for B in model.head.B)
    for p in model.head.parameters():
        p.requires_grad_(False)
    before = train(120, 3e-3, 0.0)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("head."))
    trunk = {name: p.clone() for name, p in model.named_parameters() if not name.startswith("head.")}
    after = train(160, 1e-2, 1.0)
    # rounding makes much of 160 steps: 0.3 to 0.65 times over seeds and threads, and from 1.97 tokens per step on
    assert after["offset"][1:].max() < 0.8 * before["offset"][1:].min()
    assert all(torch.equal(model.get_parameter(name), p) for name, p in trunk.items())
    for model.head.quadratic in (True, False):
        stats = Stats()
        list(generate_speculative(model.eval(), text[:4].tolist(), 60, sampler=Greedy(), stats=stats))
        assert stats.tokens_per_step > 1.6


# -----------------------------------------------------------------------------
# decoding


@both_ways
@pytest.mark.parametrize("config", [*shared.SMALL, dict(vocab_size=3, n_future=3, n_layer=1)], ids=str)
def test_decoding_is_exact_by_enumeration(config, quadratic, monkeypatch):
    model = mask_model(quadratic=quadratic, **config)
    texts = enumerated(lambda choose: generate_speculative(model, [0, 1], 3), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], 3)) < 1e-12


@both_ways
@pytest.mark.parametrize("options", [dict(n_token=3), dict(n_token=2), dict(draft_vocab=2)], ids=str)
def test_decoding_is_exact_past_the_block_with_padding_and_a_draft_vocabulary(options, quadratic, monkeypatch):
    """Block of 4: drafts get clamped, to none, too, and the window moves inside the text."""
    model = mask_model(quadratic=quadratic, vocab_size=3, n_layer=1, block_size=4, **options)
    if model.config.draft_vocab:
        with torch.no_grad():
            model.head.choose_drafts(torch.tensor([2, 1]), model.lm_head.weight)
    texts = enumerated(lambda choose: generate_speculative(model, [0, 1], 5), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], 5)) < 1e-12


def argmax_draft(model, e, token, n_drafts, sampler, draft=decode.draft):
    """That of test_cp_head.py, where there is something to draft."""
    return (shared.argmax_draft if n_drafts else draft)(model, e, token, n_drafts, sampler)


@both_ways
def test_enumeration_rejects_a_wrong_decoder(quadratic, monkeypatch):
    model = mask_model(quadratic=quadratic, vocab_size=3, n_layer=1)
    monkeypatch.setattr(decode, "draft", argmax_draft)
    texts = enumerated(lambda choose: generate_speculative(model, [0, 1], 3), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], 3)) > 0.01


@both_ways
def test_sampled_texts_follow_the_target(quadratic, monkeypatch):
    """Chi-square of 1,000 texts of 4 tokens, with real random numbers. Chance of a false alarm: 1e-9. The same check
    rejects argmax drafts."""
    model = mask_model(quadratic=quadratic, vocab_size=3, n_layer=1)
    expected = expected_texts(model, [0, 1], 4)

    def p_value():
        sampler = Sampling(generator=torch.Generator().manual_seed(1))
        texts = [tuple(generate_speculative(model, [0, 1], 4, sampler=sampler)) for _ in range(1000)]
        return shared.chi_square_p_value(texts, expected)

    assert p_value() > 1e-9
    monkeypatch.setattr(decode, "draft", argmax_draft)
    assert p_value() < 1e-9


@both_ways
@pytest.mark.parametrize("seed", range(6))
def test_greedy_and_coupled_texts_are_the_oracles(seed, quadratic):
    """Token for token over random models, n, prompts and lengths, past the block."""
    rng = torch.Generator().manual_seed(seed)
    n, block_size = (int(torch.randint(*lohi, (), generator=rng)) for lohi in ((2, 6), (2, 14)))
    model = mask_model(seed, quadratic, n_future=n, block_size=block_size, vocab_size=11, n_token=9, rank=1 + seed % 3)
    for T in (1, 2, block_size, block_size + 1, 2 * block_size + 3):
        prompt = torch.randint(9, (T,), generator=rng).tolist()
        for sampler in (Greedy, lambda: Coupled(seed)):
            expected = list(generate(model, prompt, 3 * block_size, sampler=sampler()))
            for length in (1, n, n + 1, 3 * block_size):
                assert list(generate_speculative(model, prompt, length, sampler=sampler())) == expected[:length]


def test_quadratic_accepts_no_less_than_linear_from_an_equal_prefix():
    """Step by step over the same text: as much where linear decoding has masks, and no less where it has none; there
    it is more, more than 5 times."""
    equal, more = 0, 0
    for seed in range(8):
        steps = []
        for quadratic in (True, False):
            model, tokens = mask_model(seed, quadratic, block_size=64), [1, 2]
            with torch.inference_mode():
                blocks = decode.speculative_blocks(model, tokens, Coupled(seed), lap=lambda part: None)
                next(blocks)
                steps.append({len(tokens): next(blocks) for _ in range(20)})
        for place in steps[0].keys() & steps[1].keys():
            (new, _), (linear, n_drafts) = (step[place] for step in steps)
            assert len(new) >= len(linear) and (len(new) == len(linear) or n_drafts == 0)
            equal, more = equal + (n_drafts > 0), more + (len(new) > len(linear))
    assert equal > 5 and more > 5


def test_each_step_is_one_pass_of_the_trunk():
    """Linear: n - 1 masks after the drafts. Quadratic: n - 1 after every token that is fed. Both: one pass, and after
    the prompt n - 1."""
    for quadratic, most in ((True, 9), (False, 5)):
        model, rows = mask_model(quadratic=quadratic, block_size=64), []
        model.transformer.h[0].mlp.register_forward_hook(lambda module, inputs, y: rows.append(y.size(1)))
        stats = Stats()
        list(generate_speculative(model, [1, 2, 3], 20, sampler=Greedy(), stats=stats))
        assert len(rows) == stats.steps + 1 and rows[0] == 3 + 2
        assert set(rows[1:]) <= {most, 3} and most in rows[1:]


def test_bad_input():
    with pytest.raises(BadInput, match="needs --target lm_head"):
        tiny_model(head="mask")
    cfg = SimpleNamespace(head="mask", target="lm_head", init_from="", data_dir="data")
    with pytest.raises(BadInput, match="--head mask"):
        door("trunk", "adapter").new_model(cfg, {"trunk": {"name": "a model"}}, torch.device("cpu"))


def test_the_states_that_clp_learns_from_are_those_of_each_prefix():
    model, text = mask_model(block_size=16), [0, 1]
    seen, _ = collect(model, [text], 6, Greedy())
    text = text + list(generate(model, text, 6, sampler=Greedy()))
    assert len(seen) == 6
    for i, e in enumerate(seen):
        close(e.view(3, -1), states(model, text[: 2 + i]))
    model.head.quadratic = False
    with pytest.raises(BadInput, match="no masks after every token"):
        collect(model, [[0, 1]], 6, Greedy())
