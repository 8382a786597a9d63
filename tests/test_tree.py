"""Trees of drafts: what is in them, and that the text is the target's whatever is."""

import itertools
from functools import partial

import pytest
import torch
from test_batched import a_model, some_prompts
from test_cp_head import SMALL, counting_model, enumerated, expected_texts, tiny_model, total_variation, variants

import tree
from decode import Coupled, Greedy, Sampling, Stats, generate, generate_speculative
from model import HEADS, BadInput
from tree import TreeCache, draft_tree, generate_tree

LOOK_BACK = [head for head in HEADS if not HEADS[head].reads_trunk]


# -----------------------------------------------------------------------------
# what is in a tree


def paths(found):
    """The path to each node but the root, as tokens."""
    return [tuple(found.tokens[row].tolist()[1:]) for row in found.above[1:]]


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("head", LOOK_BACK)
@pytest.mark.parametrize("draft_vocab", [0, 3])
def test_a_tree_holds_the_most_probable_paths(draft_vocab, head, rank, monkeypatch):
    """With beams enough for all paths: exactly those that a loop over all of them finds; and the nodes are in order."""
    if draft_vocab and head == "full":
        pytest.skip("its unembeddings are its own")
    monkeypatch.setattr(tree, "BEAMS", 40)
    model = tiny_model(head=head, rank=rank, n_future=4, target="lm_head", draft_vocab=draft_vocab, n_token=4)
    if draft_vocab:
        model.head.choose_drafts(torch.tensor([0, 2, 3]), model.lm_head.weight.data)
    e, token = torch.randn(1, 8, dtype=torch.float64), torch.tensor([2])
    with torch.no_grad():
        scores, tokens = {(): 0.0}, [0, 2, 3] if draft_vocab else range(4)
        for path in itertools.chain(*(itertools.product(tokens, repeat=d) for d in (1, 2, 3))):
            conditionals = model.conditionals(e)
            rows = [conditionals.next(torch.tensor([x])) for x in (2, *path[:-1])]
            scores[path] = scores[path[:-1]] + rows[-1][0].log_softmax(-1)[path[-1]].item()
        best = sorted(scores, key=scores.get, reverse=True)
        for n_nodes in (1, 2, 7, 20):
            found = draft_tree(model, e, token, n_nodes, 3)
            assert {(), *paths(found)} == set(best[: n_nodes + 1]) and len(found.tokens) == n_nodes + 1
            lengths = [len(path) for path in paths(found)]
            assert found.depth.tolist() == [0, *lengths] and lengths == sorted(lengths)
            assert [paths(found)[i - 1][:-1] for i in range(1, n_nodes + 1)] == [
                () if p == 0 else paths(found)[p - 1] for p in found.parent[1:].tolist()]


def test_a_certain_child_comes_after_its_parent():
    """Where a token has probability 1, its score ties with its parent's."""
    model = counting_model(7, 5, "marginal")
    model.head.maps.data *= 30
    for n_nodes in range(1, 5):
        found = draft_tree(model, torch.eye(7, dtype=torch.float64)[3:4], torch.tensor([4]), n_nodes, 4)
        assert found.tokens.tolist() == [(4 + i) % 7 for i in range(n_nodes + 1)]
        assert found.parent.tolist() == [0, *range(n_nodes)]


@pytest.mark.parametrize("head", LOOK_BACK)
def test_a_tree_of_one_path_is_a_chain_of_drafts(head, monkeypatch):
    """One beam, as many nodes as offsets: the steps of greedy speculative decoding."""
    monkeypatch.setattr(tree, "BEAMS", 1)
    model, stats, expected = tiny_model(head=head, target="lm_head", n_future=4, block_size=30), Stats(), Stats()
    list(generate_speculative(model, [1, 2], 70, sampler=Greedy(), stats=expected))
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
        expected = list(generate(model, prompt, length, sampler=Greedy()))
        stop = expected[length // 2]
        n_nodes = min(n_nodes, tree.BEAMS * (model.config.n_future - 1))
        write = partial(generate_tree, model, prompt, n_nodes=n_nodes, sampler=Greedy())
        assert list(write(max_new_tokens=length)) == expected and list(write(max_new_tokens=0)) == []
        assert list(write(max_new_tokens=length, stop_token=stop)) == expected[: expected.index(stop) + 1]


def test_a_long_text_makes_its_cache_grow():
    """And a tree that is larger than the cache."""
    model = tiny_model(target="lm_head", n_future=20, block_size=400)
    expected = list(generate(model, [1, 2], 300, sampler=Greedy()))
    for n_nodes in (8, 150):
        assert list(generate_tree(model, [1, 2], 300, n_nodes, sampler=Greedy())) == expected


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("head", LOOK_BACK)
def test_a_head_that_gives_nan_never_changes_a_text(head, rank):
    model = tiny_model(target="lm_head", head=head, rank=rank, n_future=4)
    expected = list(generate(model, [1, 2], 12, sampler=Greedy()))
    model.head.maps.data.fill_(float("nan"))
    assert list(generate_tree(model, [1, 2], 12, 15, sampler=Greedy())) == expected


def test_drafts_are_counted_along_the_path():
    """A text that leaves the tree at a leaf has a bonus there, and nothing was rejected."""
    model, stats = counting_model(7, 5, "marginal"), Stats()
    text = list(generate_tree(model, [3], 31, 2, sampler=Greedy(), stats=stats))
    assert text == [(4 + i) % 7 for i in range(31)] and stats.tokens_per_step == 3
    assert stats.offered == stats.accepted == [10, 10] and stats.origins[1:] == 10 * [1, 2, "bonus"]


@variants
@pytest.mark.parametrize("config,n_nodes,length", [
    (SMALL[0], 1, 3), (SMALL[0], 2, 2), (SMALL[1], 3, 2), (SMALL[2], 1, 3), (SMALL[2], 3, 2),
    (SMALL[0] | dict(block_size=3, n_token=2), 2, 3)], ids=str)
def test_the_distribution_is_the_targets(config, n_nodes, length, variant, monkeypatch):
    """Float64, over all random outcomes, those of nodes that the text does not reach included: to 1e-12."""
    model = tiny_model(**variant, **config)
    write = partial(generate_tree, model, [0, 1], length, n_nodes)
    texts = enumerated(lambda choose: write(sampler=Sampling()), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], length)) < 1e-12


def a_path_too_far(cache, path, keep=TreeCache.keep_path):
    keep(cache, path + (torch.arange(len(path)) > 0).long())


def all_are_seen(model, x, cache, places, seen, hidden_at=tree.hidden_at):
    return hidden_at(model, x, cache, places, torch.ones_like(seen))


def parents_are_grandparents(*args, make=draft_tree):
    found = make(*args)
    return found._replace(parent=found.parent[found.parent])


WRONG = {"cache": (TreeCache, "keep_path", a_path_too_far), "mask": (tree, "hidden_at", all_are_seen),
         "parent": (tree, "draft_tree", parents_are_grandparents)}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_trees_are_caught(name, monkeypatch):
    """The wrong rows in the cache, a node that sees another path, a draw from the wrong node: greedy texts part."""
    model = tiny_model(target="lm_head", n_future=4, block_size=40)
    expected = [list(generate(model, [x], 38, sampler=Greedy())) for x in range(5)]
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
    with pytest.raises(BadInput, match="head gloeckle reads the trunk"):
        generate_tree(tiny_model(head="gloeckle", target="lm_head"), [1], 3)
    model.transformer.wpe.weight.data[5] = float("nan")
    with pytest.raises(BadInput, match="NaN or infinite logits"):
        list(generate_tree(model, [1], 8, sampler=Greedy()))
