"""A baseline: Gloeckle et al.'s heads."""

from dataclasses import replace

import torch
import torch.nn as nn
from torch.nn import functional as F

from model import BadInput, Block, CPHead, KVCache, causal_mask, widen


def need_lm_head(config):
    """For heads whose first factor is not one of e alone, as the target "marginal" is."""
    if config.target == "marginal":
        raise BadInput(f"--head {config.head} reads more of the trunk than its last state, so it needs "
                       "--target lm_head")


class Head(CPHead):
    """Gloeckle et al.'s heads (arXiv 2404.19737): a transformer layer for each offset, on the trunk's states.

        P^(s) = softmax(W norm(layer^(s)(e_1, ..., e_t)))

    One component, whatever --rank says. The layers begin as the identity: c_proj starts at 0. Here they
    take the states after the trunk's final norm, theirs before it. To have a model with as many
    parameters as one without these heads, take n - 1 layers off the trunk (--n_layer).
    """

    reads_trunk = True

    def __init__(self, config):
        need_lm_head(config)
        super().__init__(replace(config, rank=1))
        self.config = replace(config, n_layer=config.n_future)  # of the cache
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_future))
        for layer in self.layers:
            for p in (*layer.attn.c_proj.parameters(), *layer.mlp.c_proj.parameters()):
                nn.init.zeros_(p)

    @staticmethod
    def new_maps(config):
        """The norms' weights (n, C)."""
        return torch.ones(config.n_future, config.n_embd)

    def see(self, e, cache=None):
        """norm(layer^(s)(e)) of all offsets, in one vector: e (..., T, C) -> (..., T, n C)."""
        x, own, past = e.view(-1, *e.shape[-2:]), None, 0
        if cache is not None:  # the layers' own keys go along with the trunk's
            if not hasattr(cache, "own"):
                cache.own = KVCache(self.config, len(x), e.dtype, e.device)
            own, past = cache.own, cache.length - e.size(-2)
            own.length = past
        mask = causal_mask(x, past)
        x = torch.cat([F.layer_norm(layer(x, s, own, mask), x.shape[-1:], weight)
                       for s, (layer, weight) in enumerate(zip(self.layers, self.maps))], dim=-1)
        return x.view(*e.shape[:-1], -1)

    def log_weights(self, e):
        return widen(e.new_zeros(*e.shape[:-1], 1))

    def vectors(self, e, offsets=slice(None)):
        return e.unflatten(-1, self.maps.shape)[..., offsets, :].unsqueeze(-2)
