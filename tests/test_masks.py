"""The heads of masks: their states are those of one causal pass over a prefix and its masks, and both
ways of decoding with them are exact. test_cp_head.py has their formula, their drafts and more texts."""

import itertools
from collections import defaultdict
from functools import partial

import pytest
import test_cp_head as shared
import torch
from test_cp_head import enumerated, expected_texts, norm, tiny_model, total_variation
from torch.nn import functional as F

import decode
from decode import Greedy, Stats, generate, generate_oracle
from decoders.coupled import Coupled
from decoders.draft_length import collect
from heads.masks import Kept
from model import BadInput, GPTConfig, new_model
from pretrained.adapter import check_last_states

both_ways = pytest.mark.parametrize("quadratic", [True, False], ids=["quadratic", "linear"])


def mask_model(seed=0, quadratic=True, **config):
    head = "mask" if quadratic else "mask_linear"
    return tiny_model(seed, head=head, target="lm_head", **config)


def layer_norm(x, layer):
    return norm(x) * layer.weight + layer.bias


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
        q, k, v = linear(block.attn.c_attn, layer_norm(x, block.ln_1)).chunk(3, -1)
        heads = []
        for qh, kh, vh in zip(*(t.chunk(model.config.n_head, -1) for t in (q, k, v))):
            a = (qh @ kh.T / qh.size(-1) ** 0.5).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), float("-inf"))
            heads.append(a.softmax(-1) @ vh)
        x = x + linear(block.attn.c_proj, torch.cat(heads, -1))
        inner = linear(block.mlp.c_fc, layer_norm(x, block.ln_2))
        x = x + linear(block.mlp.c_proj, F.gelu(inner))
    return layer_norm(x, model.transformer.ln_f)[T - 1 :]


def log_rows(model, e, window):
    """log P^(s), s = 1..n, along a window, by the formula: e (n, C) -> n times (V,)."""
    return [shared.mask(model.head, e.flatten(), s, 0, window[:s], model.lm_head.weight).log_softmax(-1)
            for s in range(len(e))]


def close(a, b, atol=1e-11):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# -----------------------------------------------------------------------------
# the trunk with masks in it


def test_states_of_a_text_are_those_of_each_prefix_with_its_masks():
    """Masks after places of a text in any order, more groups than one pass takes: so no group sees
    another or the future, and the pass over kept keys and values is the one without them. Another
    text's states are another's."""
    model = mask_model(block_size=7)
    idx = torch.randint(5, (3, 7))
    expected = torch.stack([states(model, idx[b, : t + 1]) for b in range(3) for t in range(7)])
    expected = expected.view(3, 7, 3, 8)  # (B, T, n, C)
    for G in (7, 3, 1):
        kept, after = Kept(), torch.rand(3, 7).argsort(1)[:, :G]
        e = model.hidden(idx, kept)
        z = model.carry(e[:, :0], after, kept)[1]
        close(e, expected[:, :, 0])
        close(z, expected[torch.arange(3)[:, None], after][:, :, 1:])


@both_ways
def test_states_in_decoding_are_those_of_the_prefix_after_every_step(quadratic):
    """What each draft starts from, after rejections, full acceptance and a new window. Guards the masks of a token
    that was rejected, an off-by-one in the group, and stale keys: all stay lossless, so no test of exactness sees
    them. A linear step drafts nothing after a rejection, and only then; a quadratic one always can."""
    found = defaultdict(int)

    def checked(head, e, x1, n_drafts, sampler, unembed):
        window = decode.window_ids(tokens, model)[0, :-1].tolist()
        room = model.config.block_size - len(window) - 1
        was_rejected = bool(steps) and steps[-1][0] <= steps[-1][1]
        fresh = quadratic or not was_rejected or len(window) < cut[0]
        drafted, q = head.draft(e, x1, n_drafts, sampler, unembed)
        assert drafted.size(1) == (min(2, room) if fresh else 0)
        if fresh:
            close(e.view(3, -1), states(model, window))
        cut[0] = len(window)
        found[drafted.size(1), was_rejected] += 1
        return drafted, q

    with torch.inference_mode():
        for seed in range(9):
            model, tokens, steps, cut = mask_model(seed, quadratic, block_size=9), [1, 0, 3], [], [0]
            blocks = decode.speculative_blocks(model, tokens, Coupled(seed), partial(checked, model.head))
            next(blocks)
            while len(tokens) < 40:
                new, n_drafts = next(blocks)
                steps.append((len(new), n_drafts))
    assert found[2, False] > 5 and found[2 if quadratic else 0, True] > 5
    assert found[1, True] + found[1, False] > 0


def test_states_of_tokens_are_the_trunks_to_the_bit():
    """With B as it is and with B = 0, in training and in decoding, whatever the masks are; the masks'
    own states do change."""
    model, cp = mask_model(), tiny_model(head="cp", target="lm_head")
    cp.load_state_dict({name: p for name, p in model.state_dict().items() if name[:4] != "head"},
                       strict=False)
    idx = torch.randint(5, (2, 8))
    plain = cp.hidden(idx)
    assert torch.equal(model.hidden(idx, Kept()), plain)
    passes = []
    for scale in (1, 0):
        for B in model.head.B:
            B.data *= scale
        assert all(B.abs().min() > 0 for B in model.head.B) or not scale
        cache = model.new_cache()
        with torch.no_grad():
            hidden = torch.cat([model.hidden(idx[:1, :3], cache), model.hidden(idx[:1, 3:6], cache)], 1)
        passes.append((*hidden.split((8, 16), -1), [kv[:, :, :, :6] for kv in cache.kv]))
    (with_lora, z, kv), (without, other_z, other_kv) = passes
    assert torch.equal(with_lora, without) and all(map(torch.equal, kv, other_kv))
    assert not (z[:, 2:] == other_z[:, 2:]).any() and not z[:, :2].any()  # the prompt's last has masks
    close(with_lora, plain[:1, :6], atol=1e-13)  # a pass of another shape rounds otherwise


# -----------------------------------------------------------------------------
# the loss


def test_loss_and_its_gradient_equal_brute_force():
    """Position by position, from each prefix alone: cross-entropy, joint, and the latent consistency, which gives the
    states of tokens no gradient and leaves out places after the text."""
    model = mask_model(block_size=5).train()
    idx, gold = torch.randint(5, (2, 5)), torch.randint(5, (2, 5, 3))
    loss, parts = model.loss(idx, gold, joint_weight=0.7)
    parameters = list(model.parameters())
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
    fc = model.transformer.h[0].mlp.c_fc
    fc.register_forward_hook(lambda module, inputs, y: rows.append(y.shape[:-1].numel()))
    with torch.no_grad():
        full = model.loss(idx, gold)[0].item()
        assert sum(rows) == 4 * 16 * (1 + 2)
        rows.clear()
        losses = torch.stack([model.loss(idx, gold, joint_share=0.25)[0] for _ in range(100)])
    assert sum(rows) == 100 * 4 * (16 + 2 * 4)
    assert 0 < abs(losses.mean().item() - full) < 6 * losses.std().item() / 10


def test_training_on_a_frozen_trunk_makes_drafts_that_are_accepted():
    """A text whose next token needs two tokens before it. The trunk learns it; then what --freeze_trunk trains, the
    head alone, lowers its loss, the trunk stays as it was, and most drafts are accepted."""
    torch.manual_seed(0)
    text = torch.tensor([0, 0, 1, 0, 2, 1, 1, 2, 2] * 9)
    idx, gold = text[:64].unfold(0, 16, 4), text[1:].unfold(0, 3, 1)[:64].unfold(0, 16, 4).transpose(1, 2)
    model = new_model(GPTConfig(block_size=16, vocab_size=3, n_layer=2, n_head=2, n_embd=32, n_future=3,
                                rank=4, head="mask", target="lm_head"))

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
        list(generate(model.eval(), text[:4].tolist(), 60, sampler=Greedy(), stats=stats))
        assert stats.tokens_per_step > 1.6


# -----------------------------------------------------------------------------
# decoding


@both_ways
def test_decoding_is_exact_by_enumeration(quadratic, monkeypatch):
    """Two drafts out of three tokens; test_cp_head.py has fewer of either."""
    model = mask_model(quadratic=quadratic, vocab_size=3, n_layer=1)
    texts = enumerated(lambda choose: generate(model, [0, 1], 3), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], 3)) < 1e-12


@both_ways
@pytest.mark.parametrize("n_token", [3, 2])
def test_decoding_is_exact_past_the_block_with_padding(n_token, quadratic, monkeypatch):
    """Block of 4: drafts get clamped, to none, too, and the window moves inside the text."""
    model = mask_model(quadratic=quadratic, vocab_size=3, n_layer=1, block_size=4, n_token=n_token)
    texts = enumerated(lambda choose: generate(model, [0, 1], 5), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], 5)) < 1e-12


def argmax_draft(head, e, x1, n_drafts, sampler, unembed):
    """That of test_cp_head.py, where there is something to draft."""
    drafted, q = head.draft(e, x1, n_drafts, sampler, unembed)
    return shared.argmax_draft(head, e, x1, n_drafts, sampler, unembed) if drafted.size(1) else (drafted, q)


@both_ways
def test_enumeration_rejects_a_wrong_decoder(quadratic, monkeypatch):
    model = mask_model(quadratic=quadratic, vocab_size=3, n_layer=1)
    wrong = partial(argmax_draft, model.head)
    texts = enumerated(lambda choose: generate(model, [0, 1], 2, draft=wrong), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], 2)) > 0.01


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
            expected = list(generate_oracle(model, prompt, 3 * block_size, sampler=sampler()))
            for length in (1, n, n + 1, 3 * block_size):
                assert list(generate(model, prompt, length, sampler=sampler())) == expected[:length]


def test_quadratic_accepts_no_less_than_linear_from_an_equal_prefix():
    """Step by step over the same text: as much where linear decoding has masks, and no less where it has none; there
    it is more, more than 5 times."""
    equal, more = 0, 0
    for seed in range(8):
        steps = []
        for quadratic in (True, False):
            model, tokens = mask_model(seed, quadratic, block_size=64), [1, 2]
            with torch.inference_mode():
                blocks = decode.speculative_blocks(model, tokens, Coupled(seed), model.head.draft)
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
        fc = model.transformer.h[0].mlp.c_fc
        fc.register_forward_hook(lambda module, inputs, y: rows.append(y.size(1)))
        stats = Stats()
        list(generate(model, [1, 2, 3], 20, sampler=Greedy(), stats=stats))
        assert len(rows) == stats.steps + 1 and rows[0] == 3 + 2
        assert set(rows[1:]) <= {most, 3} and most in rows[1:]


def test_bad_input():
    """The target is the trunk's; and a pass over several texts would need places for their masks."""
    for head in ("mask", "mask_linear"):
        with pytest.raises(BadInput, match=f"--head {head} needs --target lm_head"):
            tiny_model(head=head)
        model, idx = tiny_model(head=head, target="lm_head"), torch.tensor([[1, 2]])
        with pytest.raises(BadInput, match="one text at a time"):
            model.hidden(idx, None, torch.tensor([[0, 1]]), torch.zeros(1, 1, 2, 2).double())
        with pytest.raises(BadInput, match=f"head {head} looks further into the trunk"):
            check_last_states(head)  # of a pretrained model


def test_the_states_that_clp_learns_from_are_those_of_each_prefix():
    model, text = mask_model(block_size=16), [0, 1]
    with torch.inference_mode():
        seen, _ = collect(model, [text], 6, Greedy())
    text = text + list(generate_oracle(model, text, 6, sampler=Greedy()))
    assert len(seen) == 6
    for i, e in enumerate(seen):
        close(e.view(3, -1), states(model, text[: 2 + i]))
    with pytest.raises(BadInput, match="does not draft after every token"):
        collect(mask_model(quadratic=False, block_size=16), [[0, 1]], 6, Greedy())
