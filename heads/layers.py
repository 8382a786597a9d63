"""A recurrent head that also sees the trunk after a quarter and after a half of its layers, as
EAGLE-3 (arXiv 2503.01840) sees a low, a middle and a high one."""

import torch
import torch.nn as nn
from torch.nn import functional as F

from heads import recurrent
from model import GPT


class Head(recurrent.Head):
    """e' = e + L [norm(low); norm(middle)] is in the place of e. L starts at 0, where this is the
    recurrent head. The state that it looks at is [e; low; middle] (..., 3 C)."""

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)  # L
        nn.init.zeros_(self.layers.weight)

    def mix(self, states):
        e, *others = states.chunk(3, dim=-1)
        x = torch.cat([F.layer_norm(x, x.shape[-1:]) for x in others], dim=-1)
        return e + self.layers(x)

    def log_weights(self, e, x1=None, unembed=None):
        return super().log_weights(self.mix(e))

    def vectors(self, e, offsets=slice(None)):
        return super().vectors(self.mix(e), offsets)


class Model(GPT):
    """A GPT whose states are [e; low; middle]."""

    def through_blocks(self, x, cache, mask):
        blocks = self.transformer.h
        low, middle = (max(1, len(blocks) // share) - 1 for share in (4, 2))
        kept = {}
        for layer, block in enumerate(blocks):
            x = block(x, layer, cache, mask)
            kept[layer] = x
        return torch.cat((self.transformer.ln_f(x), kept[low], kept[middle]), dim=-1)

    def split(self, hidden):
        return hidden[..., : self.config.n_embd], hidden
