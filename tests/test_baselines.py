"""The baselines among the heads: each is a joint distribution, its rows are the conditionals, and decoding with it is
exact, by the very tests of the CP head."""

import itertools

import pytest
import test_cp_head as shared
import torch
from test_cp_head import BASELINES, tiny_model

from decode import Greedy, generate, generate_speculative
from model import GPT, BadInput, GPTConfig, head_class

baselines = pytest.mark.parametrize("head", BASELINES)
with_targets = pytest.mark.parametrize("head, target", [
    (head, target) for head in BASELINES for target in ("marginal", "lm_head")
    if target == "lm_head" or not head_class(head).reads_trunk])


def log_T(head, e, edge):
    """A transition matrix of hmm or tree, by its formula."""
    S = head.transitions.rows(e).view(-1, head.rank, head.rank)[edge].softmax(-1)
    mix = min(abs(head.transitions.mix[edge].item()), 1)
    return ((1 - mix) * torch.eye(head.rank, dtype=e.dtype) + mix * S).log()


def joint_by_paths(model, e):
    """The joint of four tokens of hmm or tree: a sum over all components of all offsets."""
    head, W, r = model.head, model.lm_head.weight, model.config.rank
    log_p = torch.stack([(W @ (head.maps[s] @ e).T).T.log_softmax(-1) for s in range(4)])  # (n, r, V)
    w, T = head.log_weights(e), [log_T(head, e, edge) for edge in range(len(head.transitions.mix))]
    table = torch.zeros((model.config.vocab_size,) * 4, dtype=e.dtype)
    for a in itertools.product(range(r), repeat=4):
        if model.config.head == "hmm":
            log_path = w[a[0]] + T[0][a[0], a[1]] + T[1][a[1], a[2]] + T[2][a[2], a[3]]
        else:  # the components of a half are one, and it comes from any of the root
            if a[0] != a[1] or a[2] != a[3]:
                continue
            log_path = torch.logsumexp(w + T[0][:, a[0]] + T[1][:, a[2]], 0)
        rows = [log_p[s, a[s]] for s in range(4)]
        table += torch.einsum("i,j,k,l->ijkl", *(row.exp() for row in rows)) * log_path.exp()
    return table


@pytest.mark.parametrize("head", ["hmm", "tree_circuit"])
@pytest.mark.parametrize("rank", [2, 3])
def test_moving_components_by_all_their_paths(head, rank):
    """Joint and conditionals against the sum over every path, with transitions that matter."""
    model = tiny_model(head=head, rank=rank, n_future=4, vocab_size=3)
    with torch.no_grad():
        model.head.transitions.mix.uniform_(0.3, 0.9)
    e, W = shared.a_state(), model.lm_head.weight
    table = joint_by_paths(model, e)
    assert table.sum().item() == pytest.approx(1, abs=1e-12)
    windows = torch.tensor(list(itertools.product(range(3), repeat=4)))
    joint = model.head.log_joint(e.expand(len(windows), -1), windows, W).exp()
    along = model.head.log_conditionals(e.expand(len(windows), -1), windows, W).exp()
    for i, window in enumerate(windows):
        conditionals, part = model.conditionals(e[None]), table
        for s, x in enumerate(window):
            part = part[x]
            marginal = part.sum()
            assert joint[i, s].item() == pytest.approx(marginal.item(), abs=1e-12)
            if s < 3:
                q = conditionals.next(x[None]).softmax(-1)[0]
                expected = part.flatten(1).sum(1) / marginal if s < 2 else part / marginal
                torch.testing.assert_close(q, expected, rtol=0, atol=1e-11)
                torch.testing.assert_close(along[i, s], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("head", ["hmm", "tree_circuit"])
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_moving_components_start_as_the_cp_head(head, n):
    """To 1e-6, with the weights of a CP head, for windows that do not halve evenly, too."""
    model, cp = tiny_model(head=head, n_future=n), tiny_model(head="cp", n_future=n)
    own = {name: torch.full_like(tensor, 1e-7) if name.endswith("mix") else tensor
           for name, tensor in model.state_dict().items() if "transitions" in name}
    model.load_state_dict(cp.state_dict() | own)
    e, gold, W = torch.randn(6, 8, dtype=torch.float64), torch.randint(5, (6, n)), cp.lm_head.weight
    joints = [m.head.log_joint(e, gold, W) for m in (model, cp)]
    torch.testing.assert_close(*joints, rtol=0, atol=1e-6)
    rows = [m.head.log_conditionals(e, gold, W) for m in (model, cp)]
    torch.testing.assert_close(*rows, rtol=0, atol=1e-6)
    fresh = head_class(head)(GPTConfig(vocab_size=5, n_embd=8, n_head=1, n_future=n, rank=2, head=head))
    assert fresh.transitions.mix.max().item() < 1e-6  # and it can leave its start
    fresh.log_joint(torch.randn(6, 8), gold, torch.randn(5, 8)).sum().backward()
    assert n == 2 and head == "tree_circuit" or fresh.transitions.mix.grad.abs().min() > 0


@with_targets
@pytest.mark.parametrize("rank", [1, 3])
def test_it_is_a_joint_distribution_and_its_rows_are_the_conditionals(head, target, rank):
    """The last row sums to 1 whatever was drafted, and the product of the rows is the joint."""
    model = tiny_model(head=head, target=target, rank=rank, vocab_size=4)
    windows = torch.tensor(list(itertools.product(range(4), repeat=3)))
    e, W = shared.a_state(model), model.lm_head.weight
    joint = model.head.log_joint(e.expand(len(windows), -1), windows, W)
    assert joint[:, -1].exp().sum().item() == pytest.approx(1, abs=1e-12)
    if target == "marginal":
        torch.testing.assert_close(model.head.log_marginal(e, W), joint[:, 0].view(4, 16)[:, 0], rtol=0, atol=1e-12)
    for window, expected in zip(windows, joint):
        conditionals, log_p = model.conditionals(e[None]), joint[:, 0].view(4, 16)[window[0], 0]
        for x, y, own in zip(window, window[1:], expected[1:]):
            log_p = log_p + conditionals.next(x[None]).log_softmax(-1)[0, y]
            assert log_p.item() == pytest.approx(own.item(), abs=1e-10)
    for draft_vocab in (0, 2):
        shared.test_rows_along_the_gold_tokens_are_those_that_drafts_are_drawn_from(head, rank, draft_vocab)


@pytest.mark.parametrize("head", [head for head in BASELINES if head != "layers"])  # which is linear in addition
def test_gradients(head):
    shared.test_gradcheck_of_the_joint_loss(head)


@with_targets
def test_speculative_decoding_is_exact_by_enumeration(head, target, monkeypatch):
    for config in shared.SMALL:
        shared.test_speculative_decoding_is_exact_by_enumeration(config, dict(head=head, target=target), monkeypatch)


@baselines
def test_greedy_texts_are_the_oracles_past_the_block(head):
    """Where the block ends there is room for fewer drafts, and for none."""
    model = tiny_model(head=head, target="lm_head", block_size=5)
    assert list(generate_speculative(model, [1], 30, sampler=Greedy())) == list(generate(model, [1], 30, sampler=Greedy()))


def test_the_wide_head_begins_as_independent_heads_and_has_the_parameters_of_a_mixture():
    """It is compared with a mixture of equal size; only the router's rows and an odd half differ."""
    wide, cp = (head_class(head)(GPTConfig(vocab_size=5, n_embd=8, n_head=1, n_future=3, rank=5, head=head))
                for head in ("wide", "cp"))
    numbers = [sum(p.numel() for name, p in head.named_parameters() if "router" not in name) for head in (wide, cp)]
    assert numbers[0] == numbers[1]
    e = torch.randn(4, 8)
    assert wide.rank == 1 and torch.equal(wide.vectors(e), wide.vectors(e, slice(0, 3)))
    maps = torch.einsum("nrij,bj->bnri", wide.maps, e)
    torch.testing.assert_close(wide.vectors(e), maps)  # B = 0
    with torch.no_grad():
        wide.down.normal_()
    inner = torch.nn.functional.gelu(torch.einsum("nwc,bc->bnw", wide.up, e))
    torch.testing.assert_close(wide.vectors(e)[:, :, 0], maps[:, :, 0] + torch.einsum("ncw,bnw->bnc", wide.down, inner))
    torch.testing.assert_close(wide.vectors(e)[:, 1:2], wide.vectors(e, slice(1, 2)))


def test_the_wide_head_is_independent_heads_at_rank_1():
    model, cp = tiny_model(head="wide", rank=1), tiny_model(head="cp", rank=1)
    model.load_state_dict(cp.state_dict() | {name: tensor for name, tensor in model.state_dict().items()
                                             if name in ("head.up", "head.down")})
    e, gold = torch.randn(6, 8, dtype=torch.float64), torch.randint(5, (6, 3))
    W = cp.lm_head.weight
    assert torch.equal(model.head.log_joint(e, gold, W), cp.head.log_joint(e, gold, W))


def test_layers_of_gloeckle_see_what_is_accepted_and_nothing_else():
    """Decoding: states that come in parts, after one another and after a roll-back, are seen as all at once."""
    model = tiny_model(head="gloeckle", target="lm_head", block_size=8)
    idx = torch.randint(5, (1, 8))
    hidden = model.hidden(idx)
    whole = model.head.see(hidden)
    for b in range(1, 7):  # of the whole text at once: the future is hidden
        torch.testing.assert_close(model.head.see(hidden[:, :b]), whole[:, :b], rtol=0, atol=1e-12)
    cache = model.new_cache()
    seen = [model.head.see(model.hidden(idx[:, :3], cache)[0], cache)]
    model.hidden(torch.randint(5, (1, 4)), cache)  # drafts that are rejected, but for the first place
    cache.length = 3
    seen.append(model.head.see(model.hidden(idx[:, 3:4], cache)[0], cache))
    seen.append(model.head.see(model.hidden(idx[:, 4:], cache)[0], cache))
    torch.testing.assert_close(torch.cat(seen), whole[0], rtol=0, atol=1e-12)


def test_gloeckle_is_its_formula():
    """norm(layer(e)), from the states; and fresh layers change nothing."""
    model = tiny_model(head="gloeckle", target="lm_head")
    hidden, W = model.hidden(torch.randint(5, (2, 6))), model.lm_head.weight
    log_p = model.head.logits(model.head.see(hidden)[1, 4], W)[:, 0].log_softmax(-1)  # (n, V)
    for s, layer in enumerate(model.head.layers):
        x = layer(hidden[1:2, :5])[0, -1]
        norm = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * model.head.maps[s]
        torch.testing.assert_close(log_p[s], (W @ norm).log_softmax(-1), rtol=0, atol=1e-12)
    fresh = head_class("gloeckle")(GPTConfig(vocab_size=5, n_embd=8, n_head=1, n_future=3, head="gloeckle", target="lm_head"))
    e = torch.nn.functional.layer_norm(torch.randn(2, 6, 8), (8,))
    torch.testing.assert_close(fresh.see(e).unflatten(-1, (3, 8)), e.unsqueeze(2).expand(-1, -1, 3, -1), atol=1e-4, rtol=0)


def test_layers_sees_the_trunks_layers():
    """By hand, of a whole text and of the first states of a pass whose last tokens were rejected; fresh, it is
    the recurrent head."""
    model = tiny_model(head="layers", target="lm_head", n_layer=4)
    idx = torch.randint(5, (2, 6))
    hidden, outputs = model.hidden(idx), []
    x = model.transformer.wte(idx) + model.transformer.wpe.weight[:6]
    for block in model.transformer.h:
        outputs.append(x := block(x))

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    expected = hidden + torch.cat((norm(outputs[0]), norm(outputs[1])), -1) @ model.head.layers.weight.T
    torch.testing.assert_close(model.head.see(hidden), expected, rtol=0, atol=1e-12)
    model.hidden(idx[:1])
    torch.testing.assert_close(model.head.see(hidden[0, :4]), expected[0, :4], rtol=0, atol=1e-12)
    fresh = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=2, n_head=2, n_embd=8, n_future=3, head="layers",
                          target="lm_head"))
    hidden = fresh.hidden(idx)
    assert torch.equal(fresh.head.see(hidden), hidden)


@pytest.mark.parametrize("head", ["gloeckle", "layers"])
def test_heads_that_read_the_trunk_refuse_the_marginal(head):
    with pytest.raises(BadInput, match="needs --target lm_head"):
        tiny_model(head=head)
