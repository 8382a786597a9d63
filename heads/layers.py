"""A baseline: the recurrent head, which also sees lower layers of the trunk."""

from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F

from heads.gloeckle import need_lm_head
from heads.recurrent import Head as RecurrentHead


class Head(RecurrentHead):
    """A recurrent head that also sees the trunk after a quarter and after a half of its layers, as EAGLE-3
    (arXiv 2503.01840) sees a low, a middle and a high one.

        e' = e + L [norm(low); norm(middle)]

    is in the place of e. L starts at 0, where this is the recurrent head.
    """

    reads_trunk = True

    def __init__(self, config):
        need_lm_head(config)
        super().__init__(config)
        self.layers = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)  # L
        nn.init.zeros_(self.layers.weight)
        self.outputs = [None, None]  # of the two layers in the trunk's last pass, (B, T, C)

    def attach(self, model):
        blocks = model.transformer.h
        for i, share in enumerate((4, 2)):
            block = blocks[max(1, len(blocks) // share) - 1]
            block.register_forward_hook(partial(self.keep, i))
        return self

    def keep(self, i, block, inputs, output):
        self.outputs[i] = output

    def see(self, e, cache=None):
        # of a pass whose last tokens were rejected, e has the first states
        low, middle = (x[:, : e.size(-2)].reshape(e.shape) for x in self.outputs)
        x = torch.cat([F.layer_norm(x, x.shape[-1:]) for x in (low, middle)], dim=-1)
        return e + self.layers(x)
