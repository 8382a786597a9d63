"""The CP head of the paper's runs from scratch, with an unembedding for every factor."""

import torch
import torch.nn as nn

from model import CPHead, gold_log_prob, widen


class Head(CPHead):
    """P_a^(s) = softmax(W_a^(s) e): n * r * V * C parameters, so it is for small vocabularies.

    Its vectors are the logits already.
    """

    def __init__(self, config):
        nn.Module.__init__(self)
        n, r, V, C = config.n_future, config.rank, config.vocab_size, config.n_embd
        self.rank, self.router = r, nn.Linear(C, r) if r > 1 else None
        self.maps = nn.Parameter(0.02 * torch.randn(n, r, V, C))  # W_a^(s)

    def logits(self, h, unembed):
        return widen(h)[..., : len(unembed)]

    def gold_log_probs(self, e, gold, unembed):
        n, r = self.maps.shape[:2]
        maps = self.maps.flatten(0, 1).unbind()  # not indexing: unbind's backward is one gradient
        log_p = [gold_log_prob(e, maps[s * r + a], gold[:, s]) for s in range(n) for a in range(r)]
        return torch.stack(log_p, dim=-1).unflatten(-1, (n, r))
