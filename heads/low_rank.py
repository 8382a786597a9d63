"""A CP head whose components differ in a few directions: a rank that costs less."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model import CPHead, widen


class Head(CPHead):
    """One full map per offset, and k numbers per component in directions that all share:

        h_a^(s) = M^(s) e + U c_a^(s),     c_a^(s) = A_a^(s) e + b_a^(s)   (k,)                  (7)
        W h_a^(s) = W M^(s) e + (W U) c_a^(s)

    It is not in the paper. The products with W are those of one component, and k / C of one for
    each component: V (C + r k) per offset, where full maps need V r C.
    """

    k = 16

    def __init__(self, config):
        super().__init__(replace(config, rank=1))  # M^(s) (n, 1, C, C)
        n, r, k, C = config.n_future, config.rank, self.k, config.n_embd
        self.rank, self.router = r, nn.Linear(C, r) if r > 1 else None
        self.directions = nn.Parameter(torch.randn(C, k) / k**0.5)  # U
        self.within = nn.Parameter(0.02 * torch.randn(n, r, k, C))  # A_a^(s)
        self.bias = nn.Parameter(torch.zeros(n, r, k))  # b_a^(s)
        self.kept = None  # in decoding: which weights, and their W U

    def parts(self, e, offsets=slice(None)):
        """M^(s) e (..., n', C) and c_a^(s) (..., n', r, k) of a slice of the offsets."""
        A, b = self.within[offsets], self.bias[offsets]
        c = F.linear(e, A.flatten(0, 2), b.flatten()).unflatten(-1, b.shape)
        return super().vectors(e, offsets).squeeze(-2), c

    def vectors(self, e, offsets=slice(None)):
        h, c = self.parts(e, offsets)
        return h.unsqueeze(-2) + F.linear(c, self.directions)

    def all_logits(self, e, offsets, unembed):
        h, c = self.parts(e, offsets)
        own = widen(F.linear(c, self.WU(getattr(self, "draft_rows", unembed))))  # few_tokens'
        own += self.logits(h, unembed).unsqueeze(-2)  # in place: a third array of r x V costs time
        return own

    def WU(self, unembed):
        """W U (V, k). In decoding on a CPU it is kept until somebody writes into W or U.

        (Who writes behind torch's back, through `.data`, gets drafts of an older W U: they are
        accepted less, and the text is exact, as q is what they were drawn from.)
        """
        recorded = torch.compiler.is_compiling() or unembed.is_cuda  # steps that are replayed
        rounded = torch.is_autocast_enabled(unembed.device.type)
        if torch.is_grad_enabled() or recorded or rounded:
            return unembed @ self.directions
        weights = [(x.data_ptr(), x.shape, x._version) for x in (unembed, self.directions)]
        kept = self.kept  # another thread may set it at any time
        if kept is None or kept[0] != weights:
            kept = self.kept = weights, unembed @ self.directions
        return kept[1]

    def log_marginal(self, e, unembed):
        self.kept = None  # the target is never of older weights
        return super().log_marginal(e, unembed)

    def gold_log_probs(self, e, gold, unembed):
        """As `gold_log_prob` of model.py, in chunks that the backward pass computes again."""
        def chunk(h, c, y, unembed, WU):
            logits = self.logits(h, unembed).unsqueeze(1) + widen(F.linear(c, WU))  # (N', r, V)
            y = y.unsqueeze(1).expand(logits.shape[:2])
            return -F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)

        h, c = self.parts(e)  # (N, n, C), (N, n, r, k)
        most = 2**17 if e.device.type == "cpu" else 2**26  # logits: what a CPU's cache holds
        n_rows = max(32, most // (self.rank * len(unembed)))  # few rows are slow to multiply
        rows = (x.flatten(0, 1).split(n_rows) for x in (h, c, gold))
        recompute = partial(checkpoint, chunk, use_reentrant=False, preserve_rng_state=False)
        WU = unembed @ self.directions
        log_p = torch.cat([recompute(*part, unembed, WU) for part in zip(*rows)])
        return log_p.view(*gold.shape, self.rank)
