"""Heads whose factors see the tokens of the window before their own: drafts come one by one."""

import torch
from torch.nn import functional as F

from model import CPHead, walk


class Sequential(CPHead):
    """A CP head whose h_a^(s) depends on x_1, ..., x_{s-1}. A head overrides two methods:

        start(e)                -> what the window begins with, a tuple of tensors (B, ...)
        advance(state, s, row)  -> h_a^(s) (B, r, C) and the state after it; row (B, C) of W is
                                   that of the token before, None where s = 1
    """

    def embed(self, x, unembed):
        """The rows of W of tokens x (...) -> (..., C)."""
        return F.embedding(x, unembed)

    def vectors_along(self, e, tokens, unembed):
        h, state = self.advance(self.start(e), 1, None)
        found = [h]
        for s, x in enumerate(tokens.unbind(1), 2):
            h, state = self.advance(state, s, self.embed(x, unembed))
            found.append(h)
        return torch.stack(found, 1)  # (N, k + 1, r, C)

    def draft(self, e, x1, n_drafts, sampler, unembed):
        return walk(Prefixes(self, e, unembed).row, x1, n_drafts, sampler)


class Prefixes:
    """B prefixes of windows at states e (B, C), and the row of what follows each of them.

    The tokens so far say which component they came from:

        b_a ~ w_a * prod_{j<s} P_a^(j)(x_j),     q_s = sum_a b_a P_a^(s)
    """

    def __init__(self, head, e, unembed):
        self.head, self.unembed, self.s = head, unembed, 1
        h, self.state = head.advance(head.start(e), 1, None)
        if head.rank > 1:
            self.log_b = head.log_weights(e)  # (B, r), up to a constant
            self.P = head.logits(h, unembed).softmax(-1)  # (B, r, V), of the place s

    def row(self, x):
        """Tokens x (B,) stand at the place s: -> log q_{s+1} (B, V), up to a constant."""
        self.s += 1
        row = self.head.embed(x, self.unembed)  # (B, C)
        h, self.state = self.head.advance(self.state, self.s, row)
        logits = self.head.logits(h, self.unembed)  # (B, r, V)
        if self.head.rank == 1:
            return logits.squeeze(1)
        self.log_b = self.log_b + self.head.log_along(self.P, x)
        self.P = logits.softmax(-1)
        return torch.bmm(self.log_b.softmax(-1).unsqueeze(1), self.P).squeeze(1).log()

    def follow(self, rows):
        """Go on with these of the B prefixes (B',), some of them several times or not at all."""
        self.state = tuple(part[rows] for part in self.state)
        if self.head.rank > 1:
            self.log_b, self.P = self.log_b[rows], self.P[rows]
