"""A CP head that knows the token that is known: the joint of x_2, ..., x_n given x_1."""

from dataclasses import replace

import torch
import torch.nn as nn
from torch.nn import functional as F

from model import BadInput, CPHead, gold_log_prob


class Given:
    """The components of a CP head (the class beside this one) at a state that has seen x_1:

        z = e + V_2 gelu(V_1 [norm(e); norm(W[x_1])])                                            (8)
        P(x_1, ..., x_n | e) = p(x_1 | e) sum_a w_a(z) prod_{s>1} P_a^(s)(x_s | z)

    It is not in the paper. When a window is drafted, x_1 is drawn already, by the trunk's own LM
    head, p; but the trunk has not seen it. norm is a LayerNorm without weights. V_2 starts at 0.
    """

    def __init__(self, config):
        if config.target != "lm_head":
            raise BadInput(f"--head {config.head} needs --target lm_head; --head cp has both")
        super().__init__(replace(config, n_future=config.n_future - 1))  # offsets 2..n
        C = config.n_embd
        self.fc1 = nn.Linear(2 * C, 2 * C, bias=False)  # V_1
        self.fc2 = nn.Linear(2 * C, C, bias=False)  # V_2
        nn.init.zeros_(self.fc2.weight)

    def given(self, e, x1, unembed):
        """z: e (..., C), x1 (...) -> (..., C)."""
        row = F.embedding(x1, unembed)
        x = torch.cat((F.layer_norm(e, e.shape[-1:]), F.layer_norm(row, row.shape[-1:])), dim=-1)
        return e + self.fc2(F.gelu(self.fc1(x)))

    def log_weights(self, e, x1=None, unembed=None):
        """log w(z); of the state e alone where it is z already."""
        return super().log_weights(e if x1 is None else self.given(e, x1, unembed))

    def log_joint(self, e, gold, unembed):
        x1 = gold[:, 0]
        z = self.given(e, x1, unembed)
        first = gold_log_prob(e, unembed, x1).unsqueeze(1)  # (N, 1)
        return torch.cat((first, first + super().log_joint(z, gold[:, 1:], unembed)), 1)

    def rows(self, e, tokens, unembed):
        z = self.given(e, tokens[:, 0], unembed)
        first = super().log_marginal(z, unembed).unsqueeze(1)  # (N, 1, V), of x_2
        if tokens.size(1) == 1:
            return first
        return torch.cat((first, super().rows(z, tokens[:, 1:], unembed)), 1)

    def log_marginal(self, e, unembed):
        return self.logits(e, unembed).log_softmax(-1)

    def draft(self, e, x1, n_drafts, sampler, unembed):
        z = self.given(e, x1, unembed)
        logits = self.all_logits(z, slice(n_drafts), unembed)  # (B, k, r, V)
        if self.rank == 1:
            return sampler.draw(logits.squeeze(2))
        return self.window(super().log_weights(z), logits.softmax(-1), x1, sampler)


class Head(Given, CPHead):
    pass
