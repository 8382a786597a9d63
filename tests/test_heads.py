"""What single heads claim beside equation (1), which test_cp_head.py checks of all of them: where they
start, which states of the trunk they look at, and drafts of some of the tokens alone."""

import itertools

import pytest
import torch
from test_cp_head import (CIRCUITS, FACTORS, SMALL, a_state, close, enumerated, expected_texts, gelu, norm,
                          tiny_model, total_variation, weights)

from decode import Greedy, Sampling, generate, generate_oracle, generate_plain
from decoders.coupled import Coupled
from heads.few_tokens import few_tokens
from model import BadInput, GPTConfig, head_class, new_model

# -----------------------------------------------------------------------------
# where they start


@pytest.mark.parametrize("head", CIRCUITS)
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_moving_components_start_as_the_cp_head(head, n):
    """To 1e-6, with the weights of a CP head, for windows that do not halve evenly, too."""
    model, cp = tiny_model(head=head, n_future=n), tiny_model(head="cp", n_future=n)
    own = {name: torch.full_like(tensor, 1e-7) if name.endswith("mix") else tensor
           for name, tensor in model.state_dict().items() if "transitions" in name}
    model.load_state_dict(cp.state_dict() | own)
    e, gold, W = torch.randn(6, 8).double(), torch.randint(5, (6, n)), cp.lm_head.weight
    close(*(m.head.log_joint(e, gold, W) for m in (model, cp)), atol=1e-6)
    close(*(m.head.rows(e, gold[:, :-1], W) for m in (model, cp)), atol=1e-6)
    fresh = head_class(head)(GPTConfig(vocab_size=5, n_embd=8, n_head=1, n_future=n, rank=2, head=head))
    if n == 2 and head == "tree_circuit":  # its one node has nowhere to go
        assert fresh.transitions is None
        return
    assert fresh.transitions.mix.max().item() < 1e-6  # and it can leave its start
    fresh.log_joint(torch.randn(6, 8), gold, torch.randn(5, 8)).sum().backward()
    assert fresh.transitions.mix.grad.abs().min() > 0


def test_the_wide_head_begins_as_independent_heads_and_has_the_parameters_of_a_mixture():
    """It is compared with a mixture of equal size; only the router and an odd half differ."""
    wide, cp = (head_class(head)(GPTConfig(vocab_size=5, n_embd=8, n_head=1, n_future=3, rank=5, head=head))
                for head in ("wide", "cp"))
    numbers = [sum(p.numel() for name, p in head.named_parameters() if "router" not in name)
               for head in (wide, cp)]
    assert numbers[0] == numbers[1] and wide.rank == 1
    e = torch.randn(4, 8)
    close(wide.vectors(e), torch.einsum("nrij,bj->bnri", wide.maps, e), atol=1e-5)  # B = 0
    close(wide.vectors(e)[:, 1:2], wide.vectors(e, slice(1, 2)), atol=1e-6)


def test_the_wide_head_is_independent_heads_at_rank_1():
    wide, cp = tiny_model(head="wide", rank=1), tiny_model(head="cp", rank=1)
    wide.load_state_dict(cp.state_dict(), strict=False)
    e, gold, W = torch.randn(6, 8).double(), torch.randint(5, (6, 3)), cp.lm_head.weight
    assert torch.equal(wide.head.log_joint(e, gold, W), cp.head.log_joint(e, gold, W))


def test_medusa_starts_as_the_lm_head():
    """Every offset gives the trunk's own next-token logits."""
    model = new_model(GPTConfig(vocab_size=5, n_embd=8, n_head=1, n_layer=1, n_future=3, head="medusa"))
    e, x = torch.randn(6, 8), torch.randint(5, (6, 2))
    close(model.head.rows(e, x, model.unembed)[:, 1], model.lm_head(e).log_softmax(-1), atol=1e-6)


# -----------------------------------------------------------------------------
# heads that look into the trunk


def test_gloeckles_layers_are_transformer_layers_on_the_states():
    """norm(layer(e_1, ..., e_t)) with the layer written out; fresh layers change nothing."""
    model = tiny_model(head="gloeckle")
    hidden, C = model.hidden(torch.randint(5, (1, 6)))[0], 8
    e, seen = hidden[:, :C], hidden[:, C:].unflatten(-1, (3, C))

    def full_norm(x, ln):
        return norm(x) * ln.weight + ln.bias

    for s, layer in enumerate(model.head.layers):
        qkv = full_norm(e, layer.ln_1) @ layer.attn.c_attn.weight.T + layer.attn.c_attn.bias
        found = []
        for q, k, v in zip(*(part.chunk(2, -1) for part in qkv.chunk(3, -1))):
            scores = (q @ k.T / 2).masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
            found.append(scores.softmax(-1) @ v)
        x = e + torch.cat(found, -1) @ layer.attn.c_proj.weight.T + layer.attn.c_proj.bias
        inner = gelu(full_norm(x, layer.ln_2) @ layer.mlp.c_fc.weight.T + layer.mlp.c_fc.bias)
        x = x + inner @ layer.mlp.c_proj.weight.T + layer.mlp.c_proj.bias
        close(seen[:, s], norm(x) * model.head.maps[s])
    fresh = new_model(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_embd=8, n_head=1, n_future=3,
                                head="gloeckle"))
    hidden = fresh.hidden(torch.randint(5, (2, 6))).unflatten(-1, (4, 8))
    close(hidden[..., 1:, :], norm(hidden[..., :1, :]).expand(-1, -1, 3, -1), atol=1e-5)


@pytest.mark.parametrize("head", ["gloeckle", "layers"])
def test_states_are_those_of_what_is_accepted_and_of_nothing_else(head):
    """In decoding they come in parts, after one another and after a roll-back: as all at once. And
    no state looks ahead."""
    model = tiny_model(head=head, n_layer=4)
    idx = torch.randint(5, (1, 8))
    whole = model.hidden(idx)
    for b in range(1, 8):
        close(model.hidden(idx[:, :b]), whole[:, :b])
    cache = model.new_cache()
    seen = [model.hidden(idx[:, :3], cache)]
    model.hidden(torch.randint(5, (1, 4)), cache)  # drafts that are all rejected
    cache.length = 3
    seen += [model.hidden(idx[:, 3:4], cache), model.hidden(idx[:, 4:], cache)]
    close(torch.cat(seen, 1), whole)


def test_layers_sees_the_trunks_layers():
    """The outputs of the layers at a quarter and at a half, by hand; fresh, it is the recurrent head."""
    model = tiny_model(head="layers", n_layer=4)
    idx, outputs = torch.randint(5, (2, 6)), []
    x = model.transformer.wte(idx) + model.transformer.wpe.weight[:6]
    for block in model.transformer.h:
        outputs.append(x := block(x))
    e = model.transformer.ln_f(x)
    close(model.hidden(idx), torch.cat((e, outputs[0], outputs[1]), -1))
    mixed = e + torch.cat((norm(outputs[0]), norm(outputs[1])), -1) @ model.head.layers.weight.T
    close(model.head.mix(model.hidden(idx)), mixed)
    fresh = new_model(GPTConfig(block_size=8, vocab_size=5, n_layer=2, n_head=2, n_embd=8, n_future=3,
                                head="layers"))
    hidden = fresh.hidden(idx)
    assert torch.equal(fresh.head.mix(hidden), fresh.split(hidden)[0])


# -----------------------------------------------------------------------------
# components that differ in few directions


def test_what_low_rank_keeps_is_of_the_weights_as_they_are():
    """In decoding W U is computed once, and anew after whoever writes into W or U: an optimizer, a
    checkpoint, a cast. In training it has its gradient."""
    model = tiny_model(head="low_rank", target="lm_head")
    e, head, found = a_state(model)[None], model.head, []

    def right():
        with torch.inference_mode():
            logits = head.all_logits(e, slice(None), model.unembed)
            close(logits, head.logits(head.vectors(e), model.unembed))
            found.append(head.kept[1])
            head.all_logits(e, slice(None), model.unembed)
            return head.kept[1] is found[-1]

    assert right() and right() and found[0] is found[1]
    for weight in (head.directions, model.lm_head.weight):
        with torch.no_grad():
            weight.mul_(2)
        assert right()
    other = tiny_model(seed=1, head="low_rank", target="lm_head")
    model.load_state_dict(other.state_dict())
    assert right() and len({id(x) for x in found}) == 4
    head.all_logits(e, slice(None), model.unembed).sum().backward()
    assert head.directions.grad.abs().max() > 0


def test_low_rank_keeps_nothing_that_autocast_has_rounded():
    """A pass of the model within autocast, and then a text without it."""
    model = tiny_model(head="low_rank", target="lm_head").float()
    e = a_state(model)[None]
    with torch.inference_mode():
        expected = model.head.all_logits(e, slice(None), model.unembed)
        model.head.kept = None
        with torch.autocast("cpu", torch.bfloat16):
            model.head.all_logits(e, slice(None), model.unembed)
        assert torch.equal(model.head.all_logits(e, slice(None), model.unembed), expected)


def test_the_target_is_never_of_older_weights():
    """Written behind torch's back, where no draft can tell."""
    model = tiny_model(head="low_rank")
    idx = torch.tensor([[1, 2]])
    with torch.inference_mode():
        before = model(idx)
        model.head.directions.data.mul_(3)
        after = model(idx)
    close(after, new_target(model, idx))
    assert (after - before).abs().max() > 1e-3


def new_target(model, idx):
    copy = tiny_model(head="low_rank")
    copy.load_state_dict(model.state_dict())
    return copy(idx).detach()


# -----------------------------------------------------------------------------
# a draft vocabulary

FEW = ("cp", "medusa", "chain", "recurrent", "low_rank")
few = pytest.mark.parametrize("head", FEW)


def few_model(head, ids, seed=0, **config):
    """A tiny model whose head drafts these ids alone."""
    model = tiny_model(seed, head=head, target="lm_head", **config)
    model.head = few_tokens(head_class(head), len(ids))(model.config).double()
    for p in model.head.parameters():
        p.data += 0.3 * torch.randn_like(p)
    with torch.no_grad():
        model.head.choose_drafts(torch.tensor(ids), model.unembed)
    return model.eval()


def few_factors(model, e, window):
    """P_a^(s) of the K tokens for all offsets, given the window, by the formula: (n, r, K)."""
    head, name = model.head, model.config.head
    ids, W = head.draft_ids, model.unembed
    if name == "medusa":  # its own rows are K
        ids, W = slice(None), W[ids]
    logits = [[FACTORS[name](head, e, s, a, window[:s], W)[ids] for a in range(head.rank)]
              for s in range(model.config.n_future)]
    return torch.stack([torch.stack(rows) for rows in logits]).softmax(-1)


@few
@pytest.mark.parametrize("rank", [1, 3])
@torch.no_grad()
def test_few_tokens_by_the_formula(head, rank):
    """Joint and rows along every window: a token that cannot be drafted is in no row, counts as 0 in
    the joint, and tells nothing of the component."""
    ids = [1, 3]
    model = few_model(head, ids[::-1], rank=rank, vocab_size=4)
    e, W = a_state(model), model.unembed
    for window in itertools.product(range(4), repeat=3):
        P, b, joint, rows = few_factors(model, e, window), weights(model, e, window[0]), [], []
        for s, x in enumerate(window):
            if s:
                rows.append((b / b.sum()) @ P[s])
            b = b * P[s, :, ids.index(x)] if x in ids else b
            joint.append(b.sum())
        gold = torch.tensor([window])
        close(model.head.log_joint(e[None], gold, W)[0].exp(), torch.stack(joint))
        close(model.head.rows(e[None], gold[:, :-1], W)[0].exp(), torch.stack(rows))


@few
@pytest.mark.parametrize("config", [*SMALL[:2], SMALL[0] | dict(rank=1)], ids=["V3n2", "V2n3", "V3n2r1"])
@pytest.mark.parametrize("options", [dict(), dict(temperature=0.7)], ids=["plain", "walk"])
def test_decoding_is_exact_with_few_tokens(config, head, options, monkeypatch):
    """The target writes all of the tokens, with their own probabilities, also after a token that the
    head cannot draft."""
    model = few_model(head, [2, 1] if config["vocab_size"] == 3 else [1], **config)
    sampler = Sampling(**options)
    texts = enumerated(lambda choose: generate(model, [0, 1], 3, sampler=sampler), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], 3, **options)) < 1e-12


@few
@torch.no_grad()
def test_what_few_tokens_draft_are_tokens_and_whole_rows(head):
    """Several texts at once, some after a token that cannot be drafted."""
    model = few_model(head, [6, 2, 3], vocab_size=9, n_token=8, n_future=5)
    e, x1 = torch.stack([a_state(model) for _ in range(4)]), torch.tensor([3, 0, 7, 6])
    for sampler in (Sampling(), Sampling(0.7), Sampling(top_k=2), Coupled(0), Greedy()):
        x, q = model.head.draft(e, x1, 4, sampler, model.unembed)
        assert x.shape == (4, 4) and set(x.flatten().tolist()) <= {2, 3, 6}
        if type(sampler) is not Sampling:
            assert q is None  # these look at no rows
            continue
        expected = model.head.rows(e, torch.cat((x1[:, None], x[:, :-1]), 1), model.unembed)
        whole = torch.zeros(4, 4, 8).double().index_copy(-1, torch.tensor([2, 3, 6]), sampler.warp(expected))
        close(q, whole)


@few
@pytest.mark.parametrize("seed", range(3))
def test_texts_with_few_tokens_are_the_oracles(head, seed):
    """Greedy, and with noise that belongs to the tokens, past the block."""
    model = few_model(head, [8, 0, 3, 5], seed, vocab_size=11, n_token=9, n_future=4, block_size=9,
                      rank=1 + seed)
    for sampler in (Greedy, lambda: Coupled(seed)):
        texts = [list(decoder(model, [3, 1], 30, sampler=sampler()))
                 for decoder in (generate_oracle, generate_plain, generate)]
        assert texts[0] == texts[1] == texts[2]


@few
def test_few_tokens_are_different_ones_before_they_are_chosen(head, monkeypatch):
    """Also of a head that nobody has told which: ids that are there twice would be drafted twice as
    often as q says."""
    model = tiny_model(head=head, target="lm_head", vocab_size=3, n_future=2)
    model.head = few_tokens(head_class(head), 2)(model.config).double().eval()
    texts = enumerated(lambda choose: generate(model, [0, 1], 3, sampler=Sampling()), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], 3)) < 1e-12


def test_ids_that_are_there_twice_are_refused_wherever_they_come_from():
    """A list, a checkpoint, a write into the buffer."""
    model = few_model("chain", [1, 3, 4])
    for ids in ([0, 0, 1], torch.tensor([2, 2, 3]), [1.2, 1.7, 3.0], [[0, 1, 2]], [True, False, True], []):
        with pytest.raises(BadInput, match="drafts 3 of 5 tokens"):
            model.head.choose_drafts(ids, model.unembed)
    with torch.no_grad():
        model.head.choose_drafts([4, 0, 2], model.unembed)
    assert model.head.draft_ids.tolist() == [0, 2, 4]
    for ids in ([1, 1, 2], [3, 2, 1], [2, 3, 5], [-1, 0, 1]):
        other = few_model("chain", [1, 3, 4])
        with pytest.raises(RuntimeError, match="draft_ids are not 3 ids, sorted, each once"):
            other.head.load_state_dict({**model.head.state_dict(), "draft_ids": torch.tensor(ids)})
    model.head.draft_ids[:2] = 0
    with pytest.raises(BadInput, match="rows q of the draft do not sum to 1"):
        list(generate(model, [1, 2], 5))


def test_few_tokens_learn_and_refuse():
    """Gradients reach the head and not the rows of W that it keeps; ids must be K different ones."""
    model = few_model("chain", [1, 3])
    loss, _ = model.loss(torch.randint(5, (2, 4)), torch.randint(5, (2, 4, 3)))
    loss.backward()
    assert model.head.maps.grad.abs().max() > 0 and not model.head.draft_rows.requires_grad
    for ids in ([1, 1], [1, 2, 3], [0], [1, 5]):
        with pytest.raises(BadInput, match="drafts 2 of 5 tokens"):
            model.head.choose_drafts(torch.tensor(ids), model.unembed)
    for K in (0, 6, True, 2.0, "2"):
        with pytest.raises(BadInput, match="1 to 5 tokens"):
            few_tokens(head_class("cp"), K)(model.config)
    with pytest.raises(BadInput, match="take no draft vocabulary"):
        few_tokens(head_class("conditional"), 2)
