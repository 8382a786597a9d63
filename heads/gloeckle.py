"""Gloeckle et al.'s heads (arXiv 2404.19737): a transformer layer for each offset, on the trunk."""

from dataclasses import replace

import torch
import torch.nn as nn
from torch.nn import functional as F

from model import GPT, Block, CPHead, KVCache


class Head(CPHead):
    """P^(s) = softmax(W norm(layer^(s)(e_1, ..., e_t)))

    One component, whatever --rank says. The layers begin as the identity: c_proj starts at 0. Here
    they take the states after the trunk's final norm, theirs before it. To have a model with as
    many parameters as one without these heads, take n - 1 layers off the trunk (--n_layer). The
    state that this head looks at is that of all layers, norm(layer^(s)(e)), in a vector (..., n C).
    """

    def __init__(self, config):
        nn.Module.__init__(self)
        self.rank, self.router = 1, None
        self.maps = nn.Parameter(torch.ones(config.n_future, config.n_embd))  # the norms' weights
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_future))
        for layer in self.layers:
            for p in (*layer.attn.c_proj.parameters(), *layer.mlp.c_proj.parameters()):
                nn.init.zeros_(p)

    def vectors(self, e, offsets=slice(None)):
        return e.unflatten(-1, self.maps.shape)[..., offsets, :].unsqueeze(-2)


class Model(GPT):
    """A GPT whose passes go on through the head's layers, which are n more layers of the cache."""

    def new_cache(self, B=1):
        n_layer = self.config.n_layer + self.config.n_future
        return KVCache(replace(self.config, n_layer=n_layer), B, self.dtype, self.device)

    def through_blocks(self, x, cache, mask):
        e = super().through_blocks(x, cache, mask)
        found = [e]
        for s, (layer, weight) in enumerate(zip(self.head.layers, self.head.maps)):
            h = layer(e, self.config.n_layer + s, cache, mask)
            found.append(F.layer_norm(h, h.shape[-1:], weight))
        return torch.cat(found, dim=-1)  # (B, T, C + n C)

    def split(self, hidden):
        C = self.config.n_embd
        return hidden[..., :C], hidden[..., C:]
