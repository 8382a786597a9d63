"""A mixture whose component depends on the halves that its offset is in, a binary tree (MTPC, arXiv
2511.11346)."""

import torch

from heads.circuits import Circuit, Transitions, move
from model import widen


class Head(Circuit):
    """The root chooses a component for the window by w. It goes to each half by a transition, and
    so on down to pairs of offsets (or one, where a half is odd). It starts as the CP head, whose
    component is the same everywhere.
    """

    def __init__(self, config):
        super().__init__(config)
        self.root, n_edges = branch(1, config.n_future, 0)
        self.transitions = Transitions(n_edges, config.rank, config.n_embd) if n_edges else None

    def below(self, node, log_T, seen):
        """log P(the tokens of a node's offsets that are seen | its component): (B, r)."""
        first, last, children = node
        if not children:
            return seen[:, first - 1 : last].sum(1)
        return sum(self.through(edge, child, log_T, seen) for edge, child in children
                   if child[0] <= seen.size(1))

    def through(self, edge, child, log_T, seen):
        """`below` of a child, given the component of its parent: (B, r)."""
        return torch.logsumexp(log_T[edge] + self.below(child, log_T, seen).unsqueeze(-2), dim=-1)

    def prefix(self, log_w, log_T, seen):
        node, log_b = self.root, log_w  # log_b is that of the node and what is seen outside of it
        s = min(seen.size(1) + 1, node[1])  # the next offset; after the last, the last
        while node[2]:
            (left, before), (right, after) = node[2]
            if s > before[1]:  # the left half is all seen, and of the right half comes the next one
                log_b = log_b + self.through(left, before, log_T, seen)
                edge, node = right, after
            else:
                edge, node = left, before
            log_b = move(log_b, log_T[edge])
        return log_b + self.below(node, log_T, seen)

    def log_marginal(self, e, unembed):
        shape, e = e.shape[:-1], e.reshape(-1, e.size(-1))
        nothing = widen(e.new_zeros(len(e), 0, self.rank))  # is seen
        log_b = self.prefix(self.log_weights(e), self.log_T(e), nothing)  # (N, r)
        h = self.vectors(e, slice(1)).squeeze(1)  # (N, r, C)
        log_P = self.logits(h, unembed).log_softmax(-1)  # (N, r, V)
        return torch.logsumexp(log_b.unsqueeze(-1) + log_P, dim=1).view(*shape, -1)

    def path(self, log_w, log_T, seen, k, pick):
        """From the root down: a node's component is drawn given its parent's, and x_1 below it."""
        rows, found = torch.arange(len(log_w), device=log_w.device), {}

        def draw(node, log_b):
            first, last, children = node
            if first == 1:  # x_1 is below
                log_b = log_b + self.below(node, log_T, seen)
            a = pick(log_b.softmax(-1))  # (B,)
            for edge, child in children:
                draw(child, log_T[edge][rows, a])
            if not children:
                found.update({s: a for s in range(first, last + 1)})

        draw(self.root, log_w)
        return torch.stack([found[s] for s in range(2, k + 2)], 1)


def branch(first, last, n_edges):
    """A node of the offsets first..last: (first, last, [(edge, child), ...]), and the number of
    edges so far."""
    children = []
    if last - first > 1:
        middle = (first + last) // 2
        for part in ((first, middle), (middle + 1, last)):
            edge, n_edges = n_edges, n_edges + 1
            child, n_edges = branch(*part, n_edges)
            children.append((edge, child))
    return (first, last, children), n_edges
