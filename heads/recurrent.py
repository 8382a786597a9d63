"""Components that see all tokens of the draft."""

import torch
import torch.nn as nn
from torch.nn import functional as F

from model import CPHead


class Head(CPHead):
    """A CP head whose components are recurrent: they see all tokens between t and their own.

        h_a^(1) = M_a e
        h_a^(s) = h_a^(s-1) + W3 gelu(W2 gelu(W1 [norm(h_a^(s-1)); norm(W[x_{t+s-1}])])),   s > 1      (5)

    It is not in the paper; r = 1 is after NextLat (arXiv 2511.05963), and akin to ReDrafter
    (2403.09919) and Hydra (2402.05109). One MLP serves all offsets and components. W3 starts at 0,
    where every offset is the first one.
    """

    sees_drafts = True

    def __init__(self, config):
        super().__init__(config)
        C = config.n_embd
        self.fc1 = nn.Linear(2 * C, 2 * C, bias=False)
        self.fc2 = nn.Linear(2 * C, 2 * C, bias=False)
        self.fc3 = nn.Linear(2 * C, C, bias=False)
        nn.init.zeros_(self.fc3.weight)

    @staticmethod
    def new_maps(config):
        """M_a (1, r, C, C): the identity and noise."""
        C = config.n_embd
        return torch.eye(C) + 0.02 * torch.randn(1, config.rank, C, C)

    def step(self, h, row):
        """(5): h (..., r, C) of one offset, row (..., C) of W, the token's -> h of the next one."""
        row = F.layer_norm(row, row.shape[-1:]).unsqueeze(-2).expand_as(h)
        x = torch.cat((F.layer_norm(h, h.shape[-1:]), row), dim=-1)
        return h + self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))

    def vectors_along(self, e, gold, unembed):
        h = [self.vectors(e)[:, 0]]  # (N, r, C)
        for row in F.embedding(gold[:, :-1], unembed).unbind(1):
            h.append(self.step(h[-1], row))
        return torch.stack(h, dim=1)

    def start(self, e, unembed):
        return {"h": self.vectors(e)[:, 0], "unembed": unembed}

    def rows(self, state, s, x):
        if s > 1:  # to be asked for in order: the state moves along
            state["h"] = self.step(state["h"], state["unembed"].index_select(0, x))
        return self.unembed(state["h"], state["unembed"]).log_softmax(-1)
