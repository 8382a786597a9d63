"""A mixture of Markov chains: factors that also see the token before their own."""

import torch
import torch.nn as nn
from torch.nn import functional as F

from model import CPHead


class Head(CPHead):
    """A CP head whose factors also see the token before their own: a mixture of Markov chains.

        h_a^(s) = M_a^(s) e + U (norm(W[x_{t+s-1}]) * G^(s) e),   s > 1                             (4)

    It is not in the paper. * goes element by element, and norm is a LayerNorm without weights. In
    the logits the term is a table of token pairs of rank C, whose C parts are weighted by what e
    says. U starts at 0, where this is the CP head.
    """

    sees_drafts = True
    extends, added = "cp", ("gate", "out")

    def __init__(self, config):
        super().__init__(config)
        n, C = config.n_future, config.n_embd
        self.gate = nn.Parameter(torch.randn(n - 1, C, C) / C**0.5)  # G^(s), s = 2..n
        self.out = nn.Parameter(torch.zeros(C, C))  # U, which all offsets and components share

    def gates(self, e):
        """G^(s) e, s = 2..n: e (..., C) -> (..., n - 1, C)."""
        return F.linear(e, self.gate.flatten(0, 1)).view(*e.shape[:-1], *self.gate.shape[:2])

    def term(self, row, gate):
        """The second term of (4): row (..., C) of W, the token's; gate (..., C), G^(s) e."""
        return F.linear(F.layer_norm(row, row.shape[-1:]) * gate, self.out)

    def vectors_along(self, e, gold, unembed):
        term = self.term(F.embedding(gold[:, :-1], unembed), self.gates(e))  # (N, n - 1, C)
        return self.vectors(e) + F.pad(term, (0, 0, 1, 0)).unsqueeze(2)  # 0 where s = 1

    def start(self, e, unembed):
        return self.vectors(e).unbind(1), self.gates(e).unbind(1), unembed

    def rows(self, state, s, x):
        h, gates, unembed = state
        h_s = h[s - 1]  # (B, r, C)
        if s > 1:
            h_s = h_s + self.term(unembed.index_select(0, x), gates[s - 2]).unsqueeze(1)
        return self.unembed(h_s, unembed).log_softmax(-1)
