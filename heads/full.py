"""The CP head of the paper, with an unembedding for every factor."""

import torch

from model import CPHead, gold_log_prob, widen


class Head(CPHead):
    """The CP head with an unembedding of its own for every factor: P_a^(s) = softmax(W_a^(s) e).

    n * r * V * C parameters, so it is for small vocabularies. Its vectors are the logits already.
    """

    @staticmethod
    def new_maps(config):
        """W_a^(s) (n, r, V, C)."""
        return 0.02 * torch.randn(config.n_future, config.rank, config.vocab_size, config.n_embd)

    def unembed(self, h, unembed):
        return widen(h)

    def gold_log_probs(self, e, gold, unembed):
        n, r = self.maps.shape[:2]
        maps = self.maps.flatten(0, 1).unbind()  # not indexing: unbind's backward is one gradient
        log_p = [gold_log_prob(e, maps[s * r + a], gold[:, s], len(e))
                 for s in range(n) for a in range(r)]
        return torch.stack(log_p, dim=-1).unflatten(-1, (n, r))
