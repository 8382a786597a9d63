"""A baseline: Medusa's heads."""

from dataclasses import replace

import torch
import torch.nn as nn
from torch.nn import functional as F

from model import CPHead, gold_log_prob, widen


class Head(CPHead):
    """Medusa's heads (arXiv 2401.10774): a residual block and an unembedding for each offset.

        P^(s) = softmax((W + D^(s)) (e + silu(A^(s) e + b^(s))))

    One component, whatever --rank says. A, b and D start at 0, where every unembedding is the trunk's.
    """

    def __init__(self, config):
        super().__init__(replace(config, rank=1))
        n, C = config.n_future, config.n_embd
        self.block = nn.Parameter(torch.zeros(n, C, C))  # A^(s)
        self.bias = nn.Parameter(torch.zeros(n, C))  # b^(s)

    @staticmethod
    def new_maps(config):
        """D^(s) (n, V or K, C)."""
        return torch.zeros(config.n_future, config.draft_vocab or config.vocab_size, config.n_embd)

    def vectors(self, e, offsets=slice(None)):
        A, b = self.block[offsets], self.bias[offsets]
        block = F.linear(e, A.flatten(0, 1)).unflatten(-1, b.shape) + b  # (..., n', C)
        return (e.unsqueeze(-2) + F.silu(block)).unsqueeze(-2)

    def logits(self, e, unembed, offsets=slice(None)):
        h, W = self.vectors(e, offsets), self.drafted_rows(unembed)  # (..., n', 1, C), n' may be 0
        return widen(F.linear(h, W) + torch.einsum("...nrc,nvc->...nrv", h, self.maps[offsets]))

    def log_conditionals(self, e, gold, unembed):
        return self.logits(e, unembed, slice(1, None))[:, :, 0].log_softmax(-1)

    def gold_log_probs(self, e, gold, unembed):
        W, y = self.drafted_rows(unembed), self.places(gold)
        h = self.vectors(e)[:, :, 0].unbind(1)  # n times (N, C)
        log_p = [gold_log_prob(x, W + D, y_s, len(e)) for x, D, y_s in zip(h, self.maps.unbind(), y.unbind(1))]
        return torch.stack(log_p, dim=1).unsqueeze(-1)
