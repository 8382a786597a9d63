"""A mixture of Markov chains: a draft looks at the one before it."""

import torch
import torch.nn as nn
from torch.nn import functional as F

from heads.sequential import Sequential


class Head(Sequential):
    """A CP head whose factors also see the token before their own.

        h_a^(s) = M_a^(s) e + U (norm(W[x_{t+s-1}]) * G^(s) e),   s > 1                          (5)

    It is not in the paper. * goes element by element, and norm is a LayerNorm without weights. In
    the logits the term is a table of token pairs of rank C, whose C parts are weighted by what e
    says. U starts at 0, where this is the CP head.
    """

    def __init__(self, config):
        super().__init__(config)
        n, C = config.n_future, config.n_embd
        self.gate = nn.Parameter(torch.randn(n - 1, C, C) / C**0.5)  # G^(s), s = 2..n
        self.out = nn.Parameter(torch.zeros(C, C))  # U, which all offsets and components share

    def start(self, e):
        gates = F.linear(e, self.gate.flatten(0, 1)).unflatten(-1, self.gate.shape[:2])
        return self.vectors(e), gates  # (B, n, r, C), (B, n - 1, C)

    def advance(self, state, s, row):
        h, gates = state
        if s == 1:
            return h[:, 0], state
        term = F.linear(F.layer_norm(row, row.shape[-1:]) * gates[:, s - 2], self.out)  # (B, C)
        return h[:, s - 1] + term.unsqueeze(1), state
