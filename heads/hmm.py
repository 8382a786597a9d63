"""A baseline: a hidden Markov model of the window."""

import torch

from heads.circuits import Transitions, move
from model import CPHead


class Head(CPHead):
    """A mixture whose component moves along the window, a hidden Markov model (MTPC, arXiv 2511.11346).

        P(x_1, ..., x_n | e) = sum_{a_1..a_n} w_{a_1} P_{a_1}^(1)(x_1) prod_{s>1} T^(s)(a_{s-1}, a_s) P_{a_s}^(s)(x_s)

    It starts as the CP head, whose component stays.
    """

    def __init__(self, config):
        super().__init__(config)
        self.transitions = Transitions(self.n_transitions(config.n_future), config.rank, config.n_embd)

    def n_transitions(self, n):
        return n - 1

    def log_joint(self, e, gold, unembed):
        return torch.logsumexp(self.prefixes(e, self.gold_log_probs(e, gold, unembed)), dim=-1)

    def prefixes(self, e, seen):
        log_b, log_T, out = self.log_weights(e), self.transitions(e).unbind(-3), []
        for s in range(seen.size(1)):
            log_b = log_b + seen[:, s]
            if s < len(log_T):  # after the window's last token, there is no next one
                log_b = move(log_b, log_T[s])
            out.append(log_b)
        return torch.stack(out, dim=1)

    def start(self, e, unembed):
        return super().start(e, unembed), self.transitions(e).unbind(-3)

    def rows(self, state, s, x):
        return super().rows(state[0], s, x)

    def prefix(self, state, s, log_b, seen):
        return move(log_b + seen, state[1][s - 1])
