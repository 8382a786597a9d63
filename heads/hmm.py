"""A mixture whose component moves along the window: a hidden Markov model (MTPC, arXiv
2511.11346)."""

import torch

from heads.circuits import Circuit, Transitions, move


class Head(Circuit):
    """A CP head whose component a_s moves from each offset to the next one.

        P(x_1..x_n | e) = sum_{a_1..a_n} w_{a_1} prod_{s>1} T^(s)(a_{s-1}, a_s)
                                                 prod_s P_{a_s}^(s)(x_s)

    It starts as the CP head, whose component stays.
    """

    def __init__(self, config):
        super().__init__(config)
        self.transitions = Transitions(config.n_future - 1, config.rank, config.n_embd)

    def prefix(self, log_w, log_T, seen):
        return self.prefixes(log_w, log_T, seen)[:, -1]

    def prefixes(self, log_w, log_T, seen):
        log_b, found = log_w, []
        for s, log_p in enumerate(seen.unbind(1)):
            log_b = log_b + log_p
            if s < len(log_T):  # after the window's last token there is no next one
                log_b = move(log_b, log_T[s])
            found.append(log_b)
        return torch.stack(found, 1)

    def path(self, log_w, log_T, seen, k, pick):
        a = [pick(self.prefix(log_w, log_T, seen).softmax(-1))]  # (B,), of x_2
        for log_T_s in log_T[1:k]:
            row = log_T_s[torch.arange(len(log_w), device=log_w.device), a[-1]]  # (B, r)
            a.append(pick(row.exp()))
        return torch.stack(a, 1)
