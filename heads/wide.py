"""Independent heads with the parameters of a mixture: is it the rank that helps, or the size?"""

from dataclasses import replace

import torch
import torch.nn as nn
from torch.nn import functional as F

from model import CPHead


class Head(CPHead):
    """h^(s) = M^(s) e + B^(s) gelu(A^(s) e)

    One component, whatever --rank r says: r gives the MLP its width (r - 1) C / 2, so A^(s) and
    B^(s) have as many parameters as the CP head's other r - 1 maps. B starts at 0, where this is
    the CP head of rank 1.
    """

    def __init__(self, config):
        super().__init__(replace(config, rank=1))
        n, C = config.n_future, config.n_embd
        width = (config.rank - 1) * C // 2
        self.up = nn.Parameter(torch.randn(n, width, C) / C**0.5)  # A^(s)
        self.down = nn.Parameter(torch.zeros(n, C, width))  # B^(s)

    def vectors(self, e, offsets=slice(None)):
        A, B = self.up[offsets], self.down[offsets]
        inner = F.gelu(F.linear(e, A.flatten(0, 1))).unflatten(-1, A.shape[:2])  # (..., n', width)
        outer = torch.einsum("...nw,ncw->...nc", inner, B)
        return super().vectors(e, offsets) + outer.unsqueeze(-2)
