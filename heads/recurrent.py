"""A mixture of recurrences: a draft looks at all that were drafted before it."""

from dataclasses import replace

import torch
import torch.nn as nn
from torch.nn import functional as F

from heads.sequential import Sequential


class Head(Sequential):
    """A CP head whose components are recurrent: they see all tokens between t and their own.

        h_a^(1) = M_a e
        h_a^(s) = h_a^(s-1) + W3 gelu(W2 gelu(W1 [norm(h_a^(s-1)); norm(W[x_{t+s-1}])])),  s > 1 (6)

    It is not in the paper; r = 1 is after NextLat (arXiv 2511.05963), and akin to ReDrafter
    (2403.09919) and Hydra (2402.05109). One MLP serves all offsets and components. W3 starts at 0,
    where every offset is the first one.
    """

    def __init__(self, config):
        super().__init__(replace(config, n_future=1))  # maps M_a (1, r, C, C), of the first offset
        C = config.n_embd
        self.fc1 = nn.Linear(2 * C, 2 * C, bias=False)
        self.fc2 = nn.Linear(2 * C, 2 * C, bias=False)
        self.fc3 = nn.Linear(2 * C, C, bias=False)
        nn.init.zeros_(self.fc3.weight)

    def start(self, e):
        return (self.vectors(e)[:, 0],)  # (B, r, C)

    def advance(self, state, s, row):
        h, = state
        if s == 1:
            return h, state
        row = F.layer_norm(row, row.shape[-1:]).unsqueeze(1).expand_as(h)
        x = torch.cat((F.layer_norm(h, h.shape[-1:]), row), dim=-1)  # (B, r, 2 C)
        h = h + self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))
        return h, (h,)
