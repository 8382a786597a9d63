"""Draft trees: several candidates for each place, and one forward pass over all of them.

    python sample.py --out_dir out/smollm2 --mode draft_tree
    python -m decoders.draft_tree --out_dir out/smollm2 --nodes 8        measures

Where a forward pass takes its time to read the weights, 9 tokens cost hardly more than 6. So a step
may verify more than one draft: here the n_nodes paths that are most probable by the head's joint,
equation (1), grown by beam search. Trees of drafts are from SpecInfer (arXiv 2305.09781) and Medusa
(2401.10774), their choice by probability is from EAGLE-2 (2406.16858).

Every token follows the target, whatever the tree: for each node the next token is drawn from the
target's own distribution there, and the text goes along the draws for as long as they are in the
tree. At temperature 0 that is all one can do. At others some nodes get one more child, a *leaf*,
which is drawn from what the head gives all tokens but the node's children. It is kept by `verify`
of decode.py, which takes a draft that the target might have drawn, and not only one that it did
draw.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F

import bench_speculative
from bench_speculative import Mode
from common import number, run_script
from decode import Sampling, all_finite, check_finite, draw_next, stream, verify, window_ids
from decoders.batched import RowCache, check_head, fill, mask_of
from decoders.coupled import Coupled
from heads.circuits import Circuit
from heads.conditional import Given
from heads.few_tokens import FewTokens
from heads.sequential import Prefixes, Sequential
from model import BadInput

BEAMS = 8  # paths that the search goes on with, after each token
LEAVES = 0.5  # of the nodes, at temperatures above 0
STOPS_EARLY = ("cpu",)  # where the search asks whether it may end; a GPU would wait for the answer

# -----------------------------------------------------------------------------
# what the head makes of prefixes that share their beginnings


class Apart:
    """`Prefixes` of a head whose factors do not see the drafts: the rows of all offsets are
    computed once, and each prefix has its own posterior over the components."""

    def __init__(self, head, e, unembed, depth):
        self.head, self.log_w = head, head.log_weights(e)  # (1, r)
        self.log_T = head.log_T(e) if isinstance(head, Circuit) else None
        self.P = head.all_logits(e, slice(depth + 1), unembed)[0].softmax(-1)  # (k + 1, r, V)
        self.seen = self.log_w.new_zeros(1, 0, self.log_w.size(1))  # log P_a^(s)(x_s) (B, s, r)

    def row(self, x):
        """Tokens x (B,) stand at the next place: -> log q (B, V) of what follows."""
        s = self.seen.size(1)
        seen = self.head.log_along(self.P[s].expand(len(x), -1, -1), x)  # (B, r)
        self.seen = torch.cat((self.seen, seen.unsqueeze(1)), 1)
        if self.log_T is None:
            log_b = self.log_w + self.seen.sum(1)
        else:
            log_b = self.head.prefix(self.log_w, self.log_T, self.seen)
        return (log_b.softmax(-1) @ self.P[s + 1]).log()

    def follow(self, rows):
        """Go on with these of the prefixes."""
        self.seen = self.seen[rows]


class Alike:
    """The same at rank 1: a row is that of its offset, whatever the prefix."""

    def __init__(self, head, e, unembed, depth):
        tokens = torch.zeros(1, depth, dtype=torch.long, device=e.device)
        self.rows = iter(head.rows(e, tokens, unembed).unbind(1))  # of (1, V)

    def row(self, x):
        return next(self.rows).expand(len(x), -1)

    def follow(self, rows):
        pass


class Few:
    """Rows of all tokens, of a head that drafts some of them alone: see `FewTokens`."""

    def __init__(self, head, prefixes, V):
        self.head, self.prefixes, self.V = head, prefixes, V

    def row(self, x):
        return self.head.whole(self.prefixes.row(self.head.numbered(x)), self.V, -torch.inf)

    def follow(self, rows):
        self.prefixes.follow(rows)


def prefixes_of(head, e, unembed, depth):
    """What gives the rows of a tree of this depth at e (1, C)."""
    if isinstance(head, Sequential):
        prefixes = Prefixes(head, e, unembed)
    else:
        prefixes = (Alike if head.rank == 1 else Apart)(head, e, unembed, depth)
    return Few(head, prefixes, len(unembed)) if isinstance(head, FewTokens) else prefixes


# -----------------------------------------------------------------------------
# trees


class Tree(NamedTuple):
    """N tokens, of which the first is the text's last one. A parent comes before its children."""

    tokens: torch.Tensor  # (N,)
    parent: torch.Tensor  # (N,), the node before it; the first one's is itself
    above: torch.Tensor  # (N, N), whether the column is on the path to the row, itself included
    score: torch.Tensor = None  # (N,), log of the head's joint
    rows: list = ()  # for each depth that was searched, log q of what follows (beams, n_token)
    row: torch.Tensor = None  # (N,), where a node's own row is among all of them, if it is

    @property
    def depth(self):
        return self.above.sum(1) - 1

    def children(self, nodes):
        """Whether the column is a child of nodes (M,): -> (M, N). The first one is nobody's."""
        is_child = self.parent == nodes.unsqueeze(1)
        is_child[:, 0] = False
        return is_child


def draft_tree(model, e, token, n_nodes, depth):
    """The n_nodes paths of up to depth tokens after token (1,) that are most probable by the head's
    joint at e (1, C), of those that a beam search comes by: -> Tree."""
    prefixes = prefixes_of(model.head, e, model.unembed, depth) if depth else None
    size = 1 + depth * BEAMS
    above = torch.zeros(size, size, dtype=torch.bool, device=e.device)
    beam = last = token.new_zeros(1)  # the one path so far, which ends at node 0
    x, score = token, e.new_zeros(1, dtype=torch.float32)
    found, rows, n = [(x, score, last)], [], 1
    above[0, 0] = True
    for _ in range(depth):
        if e.device.type in STOPS_EARLY and n > n_nodes + 1:
            known = torch.cat([scores for _, scores, _ in found])
            if score.max() <= known.topk(n_nodes + 1).values[-1]:
                break  # no path is more probable than its beginning
        prefixes.follow(beam)
        log_q = prefixes.row(x).log_softmax(-1)  # (beams, n_token)
        rows.append(log_q)
        best, ids = log_q.topk(min(BEAMS, log_q.size(1)))
        total = (score.unsqueeze(1) + best).flatten().nan_to_num(nan=-torch.inf)
        score, index = total.topk(min(BEAMS, len(total)))
        beam, x = index // best.size(1), ids.flatten()[index]
        parent, last = last[beam], torch.arange(n, n + len(x), device=e.device)
        above[last] = above[parent]
        above[last, last] = True
        found.append((x, score, parent))
        n += len(x)
    tokens, scores, parents = (torch.cat(parts) for parts in zip(*found))
    # no node is more probable than its parent, which wins where they tie
    chosen = scores.sort(descending=True, stable=True).indices[: n_nodes + 1].sort().values
    new = torch.zeros_like(tokens).scatter_(0, chosen, torch.arange(len(chosen), device=e.device))
    above = above[chosen][:, chosen]
    return Tree(tokens[chosen], new[parents[chosen]], above, scores[chosen], rows, chosen)


def without(rows, tokens, out, value):
    """rows (M, V) with this value at those of the tokens (N,) that are out (M, N)."""
    hits = torch.zeros_like(rows).scatter_add(1, tokens.expand(len(rows), -1), out.to(rows.dtype))
    return rows.masked_fill(hits > 0, value)


def add_leaves(tree, n_leaves, sampler):
    """One more child for the n_leaves nodes where the head finds it most probable that the text
    comes there and leaves the tree: -> the Tree with them at its end, and q (n_leaves, n_token).

    A leaf is drawn from q, its node's row without the other children. Which nodes have one does
    not depend on the leaves that are drawn, nor do the other nodes: else they would not be drawn
    from q.
    """
    chance, searched = tree.score.exp(), len(tree.rows)
    lost = chance - (tree.children(torch.arange(len(chance), device=chance.device)) * chance).sum(1)
    # nodes of this depth have no row, and get no leaf; above one there are as many that have
    lost = lost.where(tree.depth < searched, -1.0)
    node = lost.topk(min(n_leaves, searched, len(lost))).indices  # (M,)
    rows = torch.cat(tree.rows)[tree.row[node]].nan_to_num(0.0)  # of NaN, any q will do
    rows = without(rows, tree.tokens, tree.children(node), -1e30)
    drafted, q = sampler.draw(rows)  # (M,), (M, n_token)
    itself = torch.eye(len(node), device=node.device).bool()
    above = torch.cat((F.pad(tree.above, (0, len(node))), torch.cat((tree.above[node], itself), 1)))
    return Tree(torch.cat((tree.tokens, drafted)), torch.cat((tree.parent, node)), above), q


def judge_leaves(drawn, p, tree, q, uniform):
    """Let leaves be accepted: what follows each node (N,), and whether the leaves are kept (M,).

    drawn (N,) from p (N, n_token) says whether the text goes on with another child. If not, the
    next token is to follow p without these, against which `verify` judges the leaf.
    """
    first = len(drawn) - len(q)  # of the leaves
    node, drafted = tree.parent[first:], tree.tokens[first:]
    others = tree.children(node)[:, :first]  # (M, N - M)
    rest = without(p[node], tree.tokens[:first], others, 0.0)  # (M, n_token)
    rest = rest / rest.sum(-1, keepdim=True).clamp_min(1e-30)
    p = torch.stack((rest, p[first:]), 1)  # (M, 2, n_token)
    kept, after = verify(p, q.unsqueeze(1), drafted.unsqueeze(1), uniform)
    after = after.squeeze(1)
    to_other = (others & (tree.tokens[:first] == drawn[node].unsqueeze(1))).any(1)
    kept = (kept.squeeze(1) == 1) & ~to_other
    follows = drawn[node].where(to_other, drafted.where(kept, after))
    return torch.cat((drawn[:first].index_copy(0, node, follows), after)), kept


# -----------------------------------------------------------------------------
# the decoder


class TreeCache(RowCache):
    """A RowCache of one text, whose passes have the nodes of a tree in the place of a sequence."""

    def keep_path(self, path):
        """Of the last pass keep the tokens with these indices (L,), one after another."""
        first = self.length[0]
        self.length[0] += len(path)
        for kv in self.kv:
            kv[:, :, :, first : self.length[0]] = kv.index_select(3, first + path)


def hidden_of_tree(model, tree, cache):
    """The states of a tree's nodes, of which each sees the text and the path to it: -> (N, C)."""
    x, past = tree.tokens.unsqueeze(0), cache.length[0]
    cache.begin(x.size(1), x.device)
    seen = torch.cat((tree.above.new_ones(x.size(1), past), tree.above), 1)  # (N, past + N)
    places = past + tree.depth.unsqueeze(0)  # in the text: nodes of one depth share one
    return model.hidden(x, cache, places, mask_of(seen[None, None], model.dtype))[0]


def tree_step(model, cache, e, token, n_nodes, depth, sampler):
    """One forward pass of the trunk, 1..depth + 1 new tokens. State and result: see
    `speculative_step` of decode.py."""
    n_leaves = min(int(LEAVES * n_nodes), depth) if type(sampler) is Sampling else 0
    tree = draft_tree(model, model.split(e)[1], token, n_nodes - n_leaves, depth)
    if n_leaves:
        tree, q = add_leaves(tree, n_leaves, sampler)
    hidden = hidden_of_tree(model, tree, cache)  # (N, C)
    logits = model.target_logits(hidden)  # (N, n_token)
    drawn, p = sampler.draw(logits)  # (N,), what follows each node, and (N, n_token)
    if n_leaves:
        drawn, leaves = judge_leaves(drawn, p, tree, q, sampler.uniform)
    wrong = drawn[tree.parent] != tree.tokens
    wrong[0] = False
    if n_leaves:
        wrong[-len(q) :] = ~leaves
    kept = ~(tree.above & wrong).any(1)  # (N,): a path, as at most one child is what was drawn
    finite = all_finite(logits.unsqueeze(0))[0].expand_as(drawn)
    # the one time that a step waits
    found = torch.stack((finite, kept, tree.tokens, tree.parent, drawn))
    finite, kept, tokens, parent, after = found.tolist()
    check_finite(finite[0])
    path = [i for i, is_kept in enumerate(kept) if is_kept]
    new = [*(tokens[i] for i in path[1:]), after[path[-1]]]
    n_drafts = depth if path[-1] in parent[1:] else len(new) - 1  # it may have no children
    path = torch.tensor(path, device=token.device)
    cache.keep_path(path)
    return hidden[path[-1:]], drawn[path[-1:]], new, n_drafts


def tree_blocks(model, tokens, sampler, n_nodes, max_new_tokens):
    """See `stream` of decode.py."""
    block_size = model.config.block_size
    # a step may go past the text's end, and has its whole tree in the cache
    room = min(len(tokens) + max_new_tokens + model.config.n_future, block_size) + n_nodes + 1
    cache = TreeCache(1, room)
    hidden = fill(model, cache, 0, window_ids(tokens, model))
    token, e = draw_next(model, hidden, sampler, tokens), hidden[:, -1]
    yield tokens[-1:], None
    while True:
        if cache.length[0] == block_size:  # start over with the next window but its pending token
            e = fill(model, cache, 0, window_ids(tokens, model)[:, :-1])[:, -1]
        depth = min(n_nodes, model.config.n_future - 1, block_size - cache.length[0] - 1)
        e, token, new, n_drafts = tree_step(model, cache, e, token, n_nodes, depth, sampler)
        tokens += new
        yield new, n_drafts


def check_tree(model, n_nodes):
    """BadInput for models and sizes that have no trees."""
    check_head(model)
    if isinstance(model.head, Given):
        raise BadInput(f"head {model.config.head} has another state for each token that a tree "
                       "could begin with; take --mode speculative")
    most = BEAMS * (model.config.n_future - 1)
    if type(n_nodes) is not int or not 1 <= n_nodes <= most:  # True is no number
        raise BadInput(f"a tree has from 1 to {most} drafts here, {BEAMS} for each offset of the "
                       f"head, not {n_nodes!r}")


def generate(model, prompt, max_new_tokens, n_nodes=8, *, sampler=None, **options):
    """Speculative decoding with trees of n_nodes drafts, 1..n tokens per forward pass. Options: see
    `stream` of decode.py."""
    check_tree(model, n_nodes)
    if isinstance(sampler, Coupled):
        raise BadInput("a Coupled sampler has one random number for each place of a text, and the "
                       "nodes of a tree share places; take --mode speculative")
    blocks = partial(tree_blocks, n_nodes=n_nodes, max_new_tokens=max_new_tokens)
    return stream(blocks, model, prompt, max_new_tokens, sampler=sampler, **options)


# -----------------------------------------------------------------------------
# the measurement


def add_flags(parser):
    parser.add_argument("--nodes", type=number(int, 1, 1024), nargs="+", default=[8],
                        metavar="NODES", help="numbers of drafts in a tree (8)")


def add_modes(bench, args):
    for n_nodes in args.nodes:
        check_tree(bench.model, n_nodes)
        decoder = partial(generate, n_nodes=n_nodes)
        bench.modes[f"tree of {n_nodes}"] = Mode(decoder, bench.model, True, has_parts=False)


def main():
    bench_speculative.main(__doc__, add_flags, add_modes)


if __name__ == "__main__":
    run_script(main)
