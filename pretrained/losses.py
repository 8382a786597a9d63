"""What a head on a frozen trunk is trained on: how far its rows are from the trunk's own."""

import math

import torch
from torch.nn import functional as F

from model import NO_PLACE, CPHead, balance_loss, widen

# The loss of the draft's rows log q (..., K) at each place (...), by what they learn from: the target's
# whole row log p (..., K), or its text, of whose tokens of_gold is log q.
TEACHERS = {
    "kl": lambda log_p, log_q, of_gold: -(log_p.exp() * log_q).sum(-1),
    # -log sum_x min(p, q), arXiv 2602.23881: the sum is the chance that the draft is accepted
    "lk": lambda log_p, log_q, of_gold: -torch.minimum(log_p, log_q).logsumexp(-1),
    "text": lambda log_p, log_q, of_gold: -of_gold,
}
TEACHERS["nextlat"] = TEACHERS["kl"]  # and a term of the states, for recurrent heads


def loss_on_states(model, states, gold, log_z, joint_weight=1.0, balance_weight=0.0, joint_share=1.0):
    """How far the head's rows q are from the target's p, where the text goes; see `States.at`.

    The trunk is frozen, so there is no other loss to weigh this one against, and joint_weight
    and joint_share change nothing. Parts as in GPT.loss, of which joint and offset are of the
    tokens that can be drafted alone, and
        accept (n - 1,)  sum_x min(p, q), the chance that a draft at offset s = 2..n is accepted
                         by itself, at temperature 1
        per_step         1 + the sum of their products: tokens per step, about
    """
    W, e = model.lm_head.weight, states[:, 0]
    real, place = gold.clamp_min(0), model.head.places(gold)
    log_q = model.head.log_conditionals(e, real, W)  # (B, n - 1, K)
    with torch.no_grad():
        log_p = CPHead.unembed(model.head, states[:, 1:], W) - log_z[:, 1:, None]  # (B, n - 1, K)
    # an offset counts within the text, and where the tokens before it could be drafted
    drafted = F.pad((place[:, 1:-1] != NO_PLACE).cumprod(1), (1, 0), value=1)
    counts = drafted * (gold[:, 1:] >= 0)  # (B, n - 1)

    def mean(x):  # by offset
        return (x * counts).sum(0) / counts.sum(0).clamp_min(1)

    is_gold = place[:, 1:, None].clamp_min(0)
    of_gold = log_q.gather(-1, is_gold).squeeze(-1) * (place[:, 1:] != NO_PLACE)  # (B, n - 1)
    # a later offset is reached less often, and weighs less
    loss = TEACHERS[model.teacher](log_p, log_q, of_gold)  # (B, n - 1)
    if model.teacher == "nextlat":  # arXiv 2511.05963: the drafting state is the trunk's next one
        h = model.head.vectors_along(e, real, W)[:, 1:, 0]  # (B, n - 1, C)
        loss = loss + F.smooth_l1_loss(h, states[:, 1:], reduction="none").mean(-1)
    weights = counts * 0.6 ** torch.arange(loss.size(1), dtype=loss.dtype, device=loss.device)
    loss = (loss * weights).sum() / weights.sum().clamp_min(1e-9)
    log_w = model.head.log_weights(e)
    balance = balance_loss(log_w)
    with torch.no_grad():
        accept = torch.minimum(log_p, log_q).exp().sum(-1)
        first = log_z[:, 0] - (W[real[:, 0]] * e).sum(-1)
        parts = dict(next=first.mean(), joint=-mean(of_gold).mean(),
                     offset=torch.cat((first.mean()[None], -mean(of_gold))), balance=balance,
                     usage=log_w.exp().mean(0), accept=mean(accept),
                     per_step=1 + (accept * counts).cumprod(1).sum(1).mean())
    return loss + balance_weight * balance, {name: x.detach() for name, x in parts.items()}


def loss_on_frozen_trunk(model, idx, gold, joint_weight=1.0, balance_weight=0.0, joint_share=1.0):
    """loss_on_states for a head on a GPT of ours, which is frozen: its states are computed in each step.
    idx (B, T), gold (B, T, n), joint_share as in GPT.loss; joint_weight changes nothing."""
    n = model.config.n_future
    with torch.no_grad():
        hidden = model.hidden(idx)  # (B, T, C)
        log_z = widen(model.lm_head(hidden)).logsumexp(-1)  # (B, T)
    gold = gold[:, : gold.size(1) - n + 1]
    windows = hidden.unfold(1, n, 1).transpose(2, 3), gold, log_z.unfold(1, n, 1)
    states, gold, log_z = (x.flatten(0, 1) for x in windows)  # (N, n, C), (N, n), (N, n)
    some = torch.randperm(len(gold), device=gold.device)[: math.ceil(joint_share * len(gold))]
    return loss_on_states(model, states[some], gold[some], log_z[some], joint_weight, balance_weight)
