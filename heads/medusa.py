"""Medusa's heads (arXiv 2401.10774): a residual block and an unembedding for each offset."""

import torch
import torch.nn as nn
from torch.nn import functional as F

from model import CPHead, gold_log_prob


class Head(CPHead):
    """P^(s) = softmax((W + D^(s)) (e + silu(A^(s) e + b^(s))))

    One component, whatever --rank says. A, b and D start at 0, where every offset is the trunk's
    own prediction.
    """

    def __init__(self, config):
        nn.Module.__init__(self)
        n, C = config.n_future, config.n_embd
        self.rank, self.router = 1, None
        self.maps = nn.Parameter(torch.zeros(n, config.vocab_size, C))  # D^(s)
        self.block = nn.Parameter(torch.zeros(n, C, C))  # A^(s)
        self.bias = nn.Parameter(torch.zeros(n, C))  # b^(s)

    def vectors(self, e, offsets=slice(None)):
        A, b = self.block[offsets], self.bias[offsets]
        block = F.linear(e, A.flatten(0, 1)).unflatten(-1, b.shape) + b  # (..., n', C)
        return (e.unsqueeze(-2) + F.silu(block)).unsqueeze(-2)

    def own_logits(self, e, unembed, offsets):
        """(W + D^(s)) h^(s): e (..., C) -> (..., n', V)."""
        h = self.vectors(e, offsets)  # (..., n', 1, C)
        logits = self.logits(h, unembed).squeeze(-2)  # (..., n', V)
        D = self.maps[offsets, : logits.size(-1)]  # (n', V, C)
        return logits + torch.einsum("...nc,nvc->...nv", h.squeeze(-2), D)

    def gold_log_probs(self, e, gold, unembed):
        h = self.vectors(e)[:, :, 0].unbind(1)  # n times (N, C)
        log_p = [gold_log_prob(x, unembed + D[: len(unembed)], y)
                 for x, D, y in zip(h, self.maps.unbind(), gold.unbind(1))]
        return torch.stack(log_p, dim=1).unsqueeze(-1)

    def rows(self, e, tokens, unembed):
        return self.own_logits(e, unembed, slice(1, tokens.size(1) + 1)).log_softmax(-1)

    def draft(self, e, x1, n_drafts, sampler, unembed):
        return sampler.draw(self.own_logits(e, unembed, slice(1, n_drafts + 1)))

    def log_marginal(self, e, unembed):
        return self.own_logits(e, unembed, slice(1)).squeeze(-2).log_softmax(-1)
