"""Mixtures whose component moves along the window: what hmm.py and tree_circuit.py share (MTPC,
arXiv 2511.11346)."""

import torch
import torch.nn as nn

from model import CPHead, walk, widen


class Transitions(nn.Module):
    """Distributions of the next component given one, from e: m matrices (r, r) whose rows sum to 1.

        T = (1 - l) I + l softmax(A e),    l = min(|p|, 1)

    p starts at almost 0, where T is the identity (MTPC found that it needs this).
    """

    def __init__(self, m, rank, n_embd):
        super().__init__()
        self.rank = rank
        self.rows = nn.Linear(n_embd, m * rank * rank)
        self.mix = nn.Parameter(torch.full((m, 1, 1), 1e-7))

    def forward(self, e):
        """log T: e (..., C) -> m times (..., r, r), of component a (row) and the next one."""
        S = widen(self.rows(e)).unflatten(-1, (-1, self.rank, self.rank)).softmax(-1)
        mix = self.mix.abs().clamp_max(1)
        identity = torch.eye(self.rank, dtype=S.dtype, device=S.device)
        T = (1 - mix) * identity + mix * S
        return T.clamp_min(1e-30).log().unbind(-3)  # finite, and so is its gradient


def move(log_b, log_T):
    """log sum_a b_a T(a, a'): log_b (..., r), log_T (..., r, r) -> (..., r)."""
    return torch.logsumexp(log_b.unsqueeze(-1) + log_T, dim=-2)


class Circuit(CPHead):
    """A mixture whose component may be another at every offset. A circuit says how components go
    on, given log w (B, r), the transitions log T, and the tokens' log P_a^(s)(x_s), seen (B, k, r):

        prefix(log_w, log_T, seen)
            log P(x_1, ..., x_k and the component of x_{k+1} is a): (B, r)
        path(log_w, log_T, seen, k, pick)
            components of the k places after x_1, drawn given x_1: (B, k)
    """

    def log_T(self, e):
        return self.transitions(e) if self.transitions else ()  # one node has none

    def prefixes(self, log_w, log_T, seen):
        """`prefix` of the first 1, 2, ..., k tokens: (B, k, r)."""
        return torch.stack([self.prefix(log_w, log_T, seen[:, :k])
                            for k in range(1, seen.size(1) + 1)], dim=1)

    def log_joint(self, e, gold, unembed):
        seen = self.gold_log_probs(e, gold, unembed)
        return self.prefixes(self.log_weights(e), self.log_T(e), seen).logsumexp(-1)

    def rows(self, e, tokens, unembed):
        log_P = self.logits(self.vectors_along(e, tokens, unembed), unembed).log_softmax(-1)
        seen = self.along(log_P[:, :-1], tokens)  # (N, k, r)
        log_b = self.prefixes(self.log_weights(e), self.log_T(e), seen).log_softmax(-1)
        return torch.logsumexp(log_b.unsqueeze(-1) + log_P[:, 1:], dim=2)

    def draft(self, e, x1, n_drafts, sampler, unembed):
        """The path of components first, r numbers at a time; then all tokens at once, or one by one
        where the sampler warps rows."""
        P = self.all_logits(e, slice(n_drafts + 1), unembed).softmax(-1)  # (B, k + 1, r, V)
        log_w, log_T = self.log_weights(e), self.log_T(e)
        if not sampler.plain:
            return walk(Moving(self, log_w, log_T, P).row, x1, n_drafts, sampler)
        seen, P = self.log_along(P[:, :1], x1.unsqueeze(1)), P[:, 1:]  # (B, 1, r)
        a = self.path(log_w, log_T, seen, n_drafts, sampler.pick)  # (B, k)
        x = sampler.pick(P.take_along_dim(a[..., None, None], 2).squeeze(2))  # (B, k)
        seen = torch.cat((seen, self.log_along(P, x)[:, :-1]), 1)  # (B, k, r)
        b = self.prefixes(log_w, log_T, seen).softmax(-1)
        return x, (b.unsqueeze(2) @ P).squeeze(2)


class Moving:
    """`Mixture` of model.py with a component that moves."""

    def __init__(self, head, log_w, log_T, P):
        self.head, self.log_w, self.log_T, self.P = head, log_w, log_T, P
        self.seen = log_w.new_zeros(len(log_w), 0, log_w.size(1))  # log P_a^(s)(x_s) (B, s, r)

    def row(self, x):
        s = self.seen.size(1)
        seen = self.head.log_along(self.P[:, s], x).unsqueeze(1)  # (B, 1, r)
        self.seen = torch.cat((self.seen, seen), 1)
        b = self.head.prefix(self.log_w, self.log_T, self.seen).softmax(-1)
        return torch.bmm(b.unsqueeze(1), self.P[:, s + 1]).squeeze(1).log()
