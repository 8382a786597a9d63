"""A baseline: a binary tree over the offsets of the window."""

import torch

from heads.circuits import move
from heads.hmm import Head as HMMHead
from model import CPHead


class Head(HMMHead):
    """A mixture whose component depends on those of the halves that its offset is in, a binary tree (MTPC,
    arXiv 2511.11346).

    The root chooses a component for the window by w; it goes to each half by a transition, and so on
    down to pairs of offsets (or one, where a half is odd). It starts as the CP head, whose component is
    the same everywhere.
    """

    def n_transitions(self, n):
        self.root, n_edges = self.branch(1, n, 0)
        return max(n_edges, 1)

    def branch(self, first, last, n_edges):
        """A node of the offsets first..last: (first, last, [(edge, child), ...]), and the number of edges
        so far."""
        children = []
        if last - first > 1:
            middle = (first + last) // 2
            for part in ((first, middle), (middle + 1, last)):
                edge, n_edges = n_edges, n_edges + 1
                child, n_edges = self.branch(*part, n_edges)
                children.append((edge, child))
        return (first, last, children), n_edges

    def below(self, node, log_T, seen):
        """log P(the tokens of a node's offsets that are seen | its component): (..., r)."""
        first, last, children = node
        if not children:
            return seen[..., first - 1 : last, :].sum(-2)
        return sum(self.through(edge, child, log_T, seen) for edge, child in children
                   if child[0] <= seen.size(-2))

    def through(self, edge, child, log_T, seen):
        """`below` of a child, given the component of its parent: (..., r)."""
        return torch.logsumexp(log_T[edge] + self.below(child, log_T, seen).unsqueeze(-2), dim=-1)

    def descend(self, node, log_b, log_T, seen):
        """log P(all that is seen, the component of the next offset): log_b (..., r) is that of the node
        and what is seen outside of it."""
        s = min(seen.size(-2) + 1, self.root[1])  # the next one; after the last, the last
        while node[2]:
            (left, before), (right, after) = node[2]
            if s > before[1]:  # the left half is all seen, and of the right half comes the next one
                log_b = log_b + self.through(left, before, log_T, seen)
                edge, node = right, after
            else:
                edge, node = left, before
            log_b = move(log_b, log_T[edge])
        return log_b + self.below(node, log_T, seen)

    def prefixes(self, e, seen):
        log_w, log_T = self.log_weights(e), self.transitions(e).unbind(-3)
        return torch.stack([self.descend(self.root, log_w, log_T, seen[:, :k])
                            for k in range(1, seen.size(1) + 1)], dim=1)

    def log_marginal(self, e, unembed):
        log_w, log_T = self.log_weights(e), self.transitions(e).unbind(-3)
        log_b = self.descend(self.root, log_w, log_T, log_w.unsqueeze(-2)[..., :0, :])
        log_p = self.logits(e, unembed, slice(0, 1)).squeeze(-3).log_softmax(-1)  # (..., r, V)
        return torch.logsumexp(log_b.unsqueeze(-1) + log_p, dim=-2)

    def start(self, e, unembed):
        return CPHead.start(self, e, unembed), self.transitions(e).unbind(-3), self.log_weights(e), []

    def prefix(self, state, s, log_b, seen):
        _, log_T, log_w, tokens = state
        tokens.append(seen)
        return self.descend(self.root, log_w, log_T, torch.stack(tokens, dim=-2))
