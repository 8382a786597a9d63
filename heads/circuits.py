"""What the heads share whose component moves along the window: probabilistic circuits (MTPC, arXiv
2511.11346)."""

import torch
import torch.nn as nn

from model import widen


class Transitions(nn.Module):
    """Distributions of the next component given one: m matrices (r, r) with rows that sum to 1, made from e.

        T = (1 - l) I + l softmax(A e),    l = min(|p|, 1)

    p starts at almost 0, where T is the identity (MTPC, arXiv 2511.11346, found that it needs this).
    """

    def __init__(self, m, rank, n_embd):
        super().__init__()
        self.rank = rank
        self.rows = nn.Linear(n_embd, m * rank * rank)
        self.mix = nn.Parameter(torch.full((m, 1, 1), 1e-7))

    def forward(self, e):
        """log T: e (..., C) -> (..., m, r, r), of component a (row) and the next one."""
        S = widen(self.rows(e)).unflatten(-1, (-1, self.rank, self.rank)).softmax(-1)
        mix = self.mix.abs().clamp_max(1)
        identity = torch.eye(self.rank, dtype=S.dtype, device=S.device)
        return ((1 - mix) * identity + mix * S).log()


def move(log_b, log_T):
    """log sum_a b_a T(a, a'): log_b (..., r), log_T (..., r, r) -> (..., r)."""
    return torch.logsumexp(log_b.unsqueeze(-1) + log_T, dim=-2)
