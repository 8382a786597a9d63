"""Trees of drafts: what is in them, and that the text is the target's whatever is."""

import itertools
from functools import partial

import pytest
import torch
from helpers import LOOK_BACK, a_model, some_prompts, three
from test_cp_head import GIVEN, SMALL, counting_model, enumerated, expected_texts, tiny_model, total_variation

from decode import Greedy, Sampling, Stats, generate, generate_oracle
from decoders import draft_tree as tree
from decoders.coupled import Coupled
from decoders.draft_tree import TreeCache, draft_tree
from decoders.draft_tree import generate as generate_tree
from heads.few_tokens import few_tokens
from model import BadInput, head_class

TREES = [head for head in LOOK_BACK if head not in GIVEN]

# -----------------------------------------------------------------------------
# what is in a tree


def paths(found):
    """The path to each node but the root, as tokens."""
    return [tuple(found.tokens[row].tolist()[1:]) for row in found.above[1:]]


def state_of(model):
    """What the head sees after some tokens, (1, C)."""
    return model.split(model.hidden(torch.tensor([[1, 2, 0]])))[1][:, -1].detach()


def row_after(model, e, path):
    """log q (V,) of what follows a path, its first token the text's last one."""
    tokens = torch.tensor([path])
    return model.head.rows(e, tokens, model.unembed)[0, -1].log_softmax(-1)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("head", TREES)
def test_a_tree_holds_the_most_probable_paths(head, rank, monkeypatch):
    """With beams enough for all paths: exactly those that a loop over all of them finds; and the
    nodes are in order. The rows that it keeps are those of the head along each path."""
    monkeypatch.setattr(tree, "BEAMS", 40)
    model = tiny_model(head=head, rank=rank, n_future=4, target="lm_head", n_token=4)
    e, token = state_of(model), torch.tensor([2])
    with torch.no_grad():
        scores, rows = {(): 0.0}, {}
        for path in itertools.chain(*(itertools.product(range(4), repeat=d) for d in (1, 2, 3))):
            if path[:-1] not in rows:
                rows[path[:-1]] = row_after(model, e, (2, *path[:-1]))
            scores[path] = scores[path[:-1]] + rows[path[:-1]][path[-1]].item()
        best = sorted(scores, key=scores.get, reverse=True)
        for n_nodes in (1, 2, 7, 20):
            found = draft_tree(model, e, token, n_nodes, 3)
            assert {(), *paths(found)} == set(best[: n_nodes + 1]) and len(found.tokens) == n_nodes + 1
            lengths = [len(path) for path in paths(found)]
            assert found.depth.tolist() == [0, *lengths] and lengths == sorted(lengths)
            assert [paths(found)[i - 1][:-1] for i in range(1, n_nodes + 1)] == [
                () if p == 0 else paths(found)[p - 1] for p in found.parent[1:].tolist()]
            for path, i in zip([(), *paths(found)], found.row.tolist()):
                if len(path) < len(found.rows):
                    torch.testing.assert_close(torch.cat(found.rows)[i], rows[path], rtol=0, atol=1e-6)


def test_a_certain_child_comes_after_its_parent():
    """Where a token has probability 1, its score ties with its parent's."""
    model = counting_model(7, 5, "marginal")
    model.head.maps.data *= 30
    for n_nodes in range(1, 5):
        found = draft_tree(model, torch.eye(7, dtype=torch.float64)[3:4], torch.tensor([4]), n_nodes, 4)
        assert found.tokens.tolist() == [(4 + i) % 7 for i in range(n_nodes + 1)]
        assert found.parent.tolist() == [0, *range(n_nodes)]


@pytest.mark.parametrize("head", TREES)
def test_a_tree_of_one_path_is_a_chain_of_drafts(head, monkeypatch):
    """One beam, as many nodes as offsets: the steps of greedy speculative decoding."""
    monkeypatch.setattr(tree, "BEAMS", 1)
    model, stats, expected = tiny_model(head=head, target="lm_head", n_future=4, block_size=30), Stats(), Stats()
    list(generate(model, [1, 2], 70, sampler=Greedy(), stats=expected))
    list(generate_tree(model, [1, 2], 70, 3, sampler=Greedy(), stats=stats))
    assert stats == expected and stats.tokens_per_step > 1


# -----------------------------------------------------------------------------
# the texts


@pytest.mark.parametrize("n_nodes", [1, 5, 30])
@pytest.mark.parametrize("seed", range(8))
def test_greedy_texts_are_the_oracles(seed, n_nodes):
    """Temperature 0, float64, past the block; a stop token ends the text inside a path."""
    model = a_model(seed, block_size=5 + 2 * seed)
    length = 2 * model.config.block_size + 5
    for prompt in some_prompts(seed, model.config.block_size):
        expected = list(generate_oracle(model, prompt, length, sampler=Greedy()))
        stop = expected[length // 2]
        n_nodes = min(n_nodes, tree.BEAMS * (model.config.n_future - 1))
        write = partial(generate_tree, model, prompt, n_nodes=n_nodes, sampler=Greedy())
        assert list(write(max_new_tokens=length)) == expected and list(write(max_new_tokens=0)) == []
        assert list(write(max_new_tokens=length, stop_token=stop)) == expected[: expected.index(stop) + 1]


def test_a_long_text_makes_its_cache_grow():
    """And a tree that is larger than the cache."""
    model = tiny_model(target="lm_head", n_future=20, block_size=400)
    expected = list(generate_oracle(model, [1, 2], 300, sampler=Greedy()))
    for n_nodes in (8, 150):
        assert list(generate_tree(model, [1, 2], 300, n_nodes, sampler=Greedy())) == expected


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("head", TREES)
def test_a_head_that_gives_nan_never_changes_a_text(head, rank):
    model = tiny_model(target="lm_head", head=head, rank=rank, n_future=4)
    expected = list(generate_oracle(model, [1, 2], 12, sampler=Greedy()))
    model.head.maps.data.fill_(float("nan"))
    assert list(generate_tree(model, [1, 2], 12, 15, sampler=Greedy())) == expected


def test_drafts_are_counted_along_the_path():
    """A text that leaves the tree at a node without children has a bonus there, and nothing was
    rejected."""
    model, stats = counting_model(7, 5, "marginal"), Stats()
    text = list(generate_tree(model, [3], 31, 2, sampler=Greedy(), stats=stats))
    assert text == [(4 + i) % 7 for i in range(31)] and stats.tokens_per_step == 3
    assert stats.offered == stats.accepted == [10, 10] and stats.origins[1:] == 10 * [1, 2, "bonus"]


@three
@pytest.mark.parametrize("config,n_nodes,length", [
    (SMALL[0], 1, 3), (SMALL[0], 2, 2), (SMALL[1], 3, 2), (SMALL[2], 1, 3), (SMALL[2], 3, 2),
    (SMALL[0] | dict(block_size=3, n_token=2), 2, 3)], ids=str)
def test_the_distribution_is_the_targets(config, n_nodes, length, variant, monkeypatch):
    """Float64, over all random outcomes, those of nodes that the text does not reach included: to
    1e-12."""
    model = tiny_model(**variant, **config)
    assert distance(model, n_nodes, length, monkeypatch) < 1e-12


@pytest.fixture(params=[("cpu",), ()], ids=["stops early", "searches on"])
def half_are_leaves(request, monkeypatch):
    """Also where the search does not stop early, as on a GPU."""
    monkeypatch.setattr(tree, "LEAVES", 0.5)
    monkeypatch.setattr(tree, "STOPS_EARLY", request.param)


@three
def test_the_distribution_is_the_targets_with_leaves(variant, monkeypatch):
    """The same where half of the nodes are drawn."""
    monkeypatch.setattr(tree, "LEAVES", 0.5)
    assert distance(tiny_model(**variant, **SMALL[0]), 2, 2, monkeypatch) < 1e-12


@pytest.mark.parametrize("config,n_nodes", [(SMALL[1], 2), (SMALL[2], 4)], ids=str)
def test_texts_go_on_after_leaves(config, n_nodes, half_are_leaves, monkeypatch):
    """Of the root, and in the second case of its child, too."""
    assert distance(tiny_model(target="lm_head", **config), n_nodes, 3, monkeypatch) < 1e-12


@pytest.mark.parametrize("options", [
    dict(temperature=0.5), dict(top_k=2), dict(top_p=0.6), dict(temperature=2.0, top_k=2, top_p=0.9)], ids=str)
def test_leaves_follow_the_samplers_settings(options, half_are_leaves, monkeypatch):
    model = tiny_model(target="lm_head", **SMALL[0])
    assert distance(model, 2, 2, monkeypatch, **options) < 1e-12


def test_leaves_are_tokens_whatever_the_padding_has(half_are_leaves, monkeypatch):
    model = tiny_model(target="lm_head", **SMALL[0] | dict(vocab_size=5, n_token=3))
    assert distance(model, 2, 2, monkeypatch) < 1e-12


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("head", ["cp", "chain", "recurrent", "medusa"])
def test_heads_of_few_tokens_have_trees(head, rank, monkeypatch):
    """Of a draft vocabulary the nodes are tokens of it, and the text is the target's: by
    enumeration, with leaves, and token for token."""
    monkeypatch.setattr(tree, "LEAVES", 0.5)
    model = tiny_model(target="lm_head", head=head, **SMALL[0] | dict(rank=rank))
    few = few_tokens(head_class(head), 2)(model.config).double().eval()
    model.head = few.requires_grad_(False)
    for p in few.parameters():
        p += 0.5 * torch.randn_like(p)
    few.choose_drafts(torch.tensor([2, 0]), model.unembed.detach())
    found = draft_tree(model, state_of(model), torch.tensor([1]), 2, 1)
    assert sorted(found.tokens.tolist()[1:]) == [0, 2]
    assert distance(model, 2, 2, monkeypatch) < 1e-12
    expected = list(generate_oracle(model, [0, 1], 20, sampler=Greedy()))
    assert list(generate_tree(model, [0, 1], 20, 4, sampler=Greedy())) == expected


def distance(model, n_nodes, length, monkeypatch, **options):
    """Total variation between the distribution of texts and the target's, over all random
    outcomes."""
    write = partial(generate_tree, model, [0, 1], length, n_nodes)
    texts = enumerated(lambda choose: write(sampler=Sampling(**options)), monkeypatch)
    return total_variation(texts, expected_texts(model, [0, 1], length, **options))


def test_leaves_of_a_head_that_gives_nan_change_no_distribution(half_are_leaves, monkeypatch):
    model = tiny_model(target="lm_head", **SMALL[0])
    model.head.maps.data.fill_(float("nan"))
    assert distance(model, 2, 2, monkeypatch) < 1e-12


def test_a_sampler_of_ones_own_gets_no_leaves():
    """Its rule is its own, and so may be what its draws return."""
    class Argmax(Sampling):
        def draw(self, logits):
            return logits.argmax(-1), logits

    model = tiny_model(target="lm_head", n_future=4)
    expected = list(generate_oracle(model, [1, 2], 20, sampler=Greedy()))
    assert list(generate_tree(model, [1, 2], 20, 8, sampler=Argmax())) == expected


def test_a_leaf_that_is_certain_is_kept_and_counted(monkeypatch):
    monkeypatch.setattr(tree, "LEAVES", 1.0)
    model, stats = counting_model(7, 5, "marginal"), Stats()
    model.head.maps.data *= 30  # which leaves no doubt of the next token
    text = list(generate_tree(model, [3], 21, 1, sampler=Sampling(), stats=stats))
    assert text == [(4 + i) % 7 for i in range(21)] and stats.origins[1:] == 10 * [1, "bonus"]


def q_of_all_tokens(grown, *args, add=tree.add_leaves):
    """The draw is from what the children leave, and q says that it is from the whole row."""
    found, q = add(grown, *args)
    return found, torch.cat(grown.rows)[grown.row[found.parent[-len(q) :]]].softmax(-1)


def leaves_see_no_drafts(*args, add=tree.add_leaves):
    found, q = add(*args)
    found.above[-len(q) :, 1 : -len(q)] = False
    return found, q


def children_count_twice(rows, tokens, out, value, without=tree.without):
    return without(rows, tokens, out & (value != 0), value)


def every_leaf_is_kept(p, q, drafted, uniform, verify=tree.verify):
    kept, after = verify(p, q, drafted, uniform)
    return torch.ones_like(kept), after


def the_bonus_is_of_the_row_before(p, q, drafted, uniform, verify=tree.verify):
    return verify(p[:, :1].expand_as(p), q, drafted, uniform)


WRONG_LEAVES = {"q": ("add_leaves", q_of_all_tokens), "rest": ("without", children_count_twice),
                "mask": ("add_leaves", leaves_see_no_drafts), "verify": ("verify", every_leaf_is_kept),
                "bonus": ("verify", the_bonus_is_of_the_row_before)}


@pytest.mark.parametrize("name", WRONG_LEAVES)
def test_wrong_leaves_are_caught(name, monkeypatch):
    """A q that the leaf was not drawn from, a target that still has the other children, a leaf that
    sees no draft above it, no verification at all, and the wrong row after a leaf."""
    monkeypatch.setattr(tree, "LEAVES", 0.5)
    config, n_nodes, length = (SMALL[0], 2, 2) if name in ("q", "rest", "verify") else (SMALL[2], 4, 3)
    model = tiny_model(target="lm_head", **config)
    assert distance(model, n_nodes, length, monkeypatch) < 1e-12
    wrong, function = WRONG_LEAVES[name]
    monkeypatch.setattr(tree, wrong, function)
    assert distance(model, n_nodes, length, monkeypatch) > 1e-3


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("head", TREES)
def test_leaves_are_drawn_from_what_their_nodes_children_leave(head, rank):
    """q is the head's row without the other children; the nodes are those where most is left, one
    leaf for each."""
    model = tiny_model(head=head, rank=rank, n_future=4, target="lm_head", n_token=5)
    e, token = state_of(model), torch.tensor([2])
    with torch.no_grad():
        grown = draft_tree(model, e, token, 6, 3)
        found, q = tree.add_leaves(grown, 3, Sampling())
    nodes, lost = found.parent[7:].tolist(), {}
    for node in range(7):
        path = [2, *paths(found)[node - 1]] if node else [2]
        if len(path) > len(grown.rows):
            continue  # its row is not known
        with torch.no_grad():
            rows = [row_after(model, e, path[: i + 1]).exp() for i in range(len(path))]
        reached = torch.stack([row[x] for row, x in zip(rows, path[1:])]).prod() if len(path) > 1 else 1.0
        row = rows[-1].clone()
        row[[x for x, v in zip(grown.tokens[1:].tolist(), grown.parent[1:].tolist()) if v == node]] = 0
        lost[node] = (reached * row.sum()).item()
        if node in nodes:
            torch.testing.assert_close(q[nodes.index(node)], row / row.sum(), check_dtype=False)
            assert row[found.tokens[7 + nodes.index(node)]] > 0
    assert len(nodes) == min(3, len(grown.rows)) and set(nodes) == set(sorted(lost, key=lost.get)[-len(nodes) :])
    assert [path[:-1] for path in paths(found)[6:]] == [paths(found)[v - 1] if v else () for v in nodes]


def a_path_too_far(cache, path, keep=TreeCache.keep_path):
    keep(cache, path + (torch.arange(len(path)) > 0).long())


def all_are_seen(seen, dtype):
    return torch.zeros(seen.shape, dtype=dtype)


def parents_are_grandparents(*args, make=draft_tree):
    found = make(*args)
    return found._replace(parent=found.parent[found.parent])


WRONG = {"cache": (TreeCache, "keep_path", a_path_too_far), "mask": (tree, "mask_of", all_are_seen),
         "parent": (tree, "draft_tree", parents_are_grandparents)}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_trees_are_caught(name, monkeypatch):
    """The wrong rows in the cache, a node that sees another path, a draw from the wrong node:
    greedy texts part."""
    model = tiny_model(target="lm_head", n_future=4, block_size=40)
    expected = [list(generate_oracle(model, [x], 38, sampler=Greedy())) for x in range(5)]
    write = partial(generate_tree, model, max_new_tokens=38, sampler=Greedy())
    assert [list(write([x])) for x in range(5)] == expected
    monkeypatch.setattr(*WRONG[name])
    assert [list(write([x])) for x in range(5)] != expected


# -----------------------------------------------------------------------------
# bad calls


def test_what_a_tree_cannot_do_is_refused():
    model = tiny_model(target="lm_head")
    with pytest.raises(BadInput, match="Coupled.*nodes of a tree share places"):
        generate_tree(model, [1], 3, sampler=Coupled(0))
    for n_nodes in (0, -5, 17):
        with pytest.raises(BadInput, match=f"from 1 to 16 drafts here, 8 for each offset of the head, not {n_nodes}"):
            generate_tree(model, [1], 3, n_nodes)
    with pytest.raises(BadInput, match="n_future = 1"):
        generate_tree(tiny_model(n_future=1), [1], 3)
    with pytest.raises(BadInput, match="masks at places of its own"):
        list(generate_tree(tiny_model(head="mask", target="lm_head"), [1], 3))
    with pytest.raises(BadInput, match="another state for each token"):
        generate_tree(tiny_model(head="conditional", target="lm_head"), [1], 3)
    model.transformer.wpe.weight.data[5] = float("nan")
    with pytest.raises(BadInput, match="NaN or infinite logits"):
        list(generate_tree(model, [1], 8, sampler=Greedy()))
