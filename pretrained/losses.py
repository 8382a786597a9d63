"""What a head on a frozen trunk is trained on: how far its rows are from the trunk's own."""

import math

import torch
from torch.nn import functional as F

from heads.few_tokens import FewTokens
from model import balance_loss, widen


def cross_entropy_of_rows(log_p, log_q, of_gold):
    return -(log_p.exp() * log_q).sum(-1)


def cross_entropy_of_text(log_p, log_q, of_gold):
    return -of_gold


# What the draft's rows log q (..., K) learn from at each place (...): the target's whole row log p
# (..., K), or its text, of whose tokens of_gold is log q.
TEACHERS = {"kl": cross_entropy_of_rows, "text": cross_entropy_of_text}


def loss_on_states(model, teacher, states, gold, log_z, joint_weight=1.0, balance_weight=0.0,
                   joint_share=1.0):
    """How far the head's rows q are from the target's p, where the text goes: states (B, n, C), gold
    and log_z (B, n), see `States.at`.

    The trunk is frozen, so there is no other loss to weigh this one against, and joint_weight and
    joint_share change nothing. Parts as in GPT.loss, where joint and offset count only tokens
    that can be drafted, and
        accept (n - 1,)  sum_x min(p, q), the chance that a draft at offset s = 2..n is accepted
                         by itself, at temperature 1
        per_step         1 + the sum of their products: tokens per step, about
    """
    head, W, e, real = model.head, model.unembed, states[:, 0], gold.clamp_min(0)
    # K of the rows are of tokens that can be drafted, and inside says which of gold are among them
    rows, (place, inside) = W, (real, gold >= 0)
    bias = own_bias = model.lm_head.bias  # of the target; no draft sees it
    if isinstance(head, FewTokens):
        rows, (place, inside) = head.draft_rows, head.places(gold)
        own_bias = None if bias is None else bias[head.draft_ids]
    log_q = head.rows(e, real[:, :-1], W)  # (B, n - 1, K)
    with torch.no_grad():
        log_p = widen(F.linear(states[:, 1:], rows, own_bias)) - log_z[:, 1:, None]  # (B, n - 1, K)
    # an offset counts within the text, and where the tokens before it could be drafted
    drafted = F.pad(inside[:, 1:-1].long().cumprod(1), (1, 0), value=1)
    counts = drafted * (gold[:, 1:] >= 0)  # (B, n - 1)

    def mean(x):  # by offset
        return (x * counts).sum(0) / counts.sum(0).clamp_min(1)

    of_gold = log_q.gather(-1, place[:, 1:, None]).squeeze(-1) * inside[:, 1:]  # (B, n - 1)
    # a later offset is reached less often, and weighs less
    loss = TEACHERS[teacher](log_p, log_q, of_gold)  # (B, n - 1)
    weights = counts * 0.6 ** torch.arange(loss.size(1), dtype=loss.dtype, device=loss.device)
    loss = (loss * weights).sum() / weights.sum().clamp_min(1e-9)
    log_w = head.log_weights(e, real[:, 0], W)
    balance = balance_loss(log_w)
    with torch.no_grad():
        accept = torch.minimum(log_p, log_q).exp().sum(-1)
        first = (W[real[:, 0]] * e).sum(-1) + (0 if bias is None else bias[real[:, 0]])  # (B,)
        first = (log_z[:, 0] - first).mean()
        parts = dict(next=first, joint=-mean(of_gold).mean(),
                     offset=torch.cat((first[None], -mean(of_gold))), balance=balance,
                     usage=log_w.exp().mean(0), accept=mean(accept),
                     per_step=1 + (accept * counts).cumprod(1).sum(1).mean())
    return loss + balance_weight * balance, {name: x.detach() for name, x in parts.items()}


def loss_on_frozen_trunk(model, teacher, idx, gold, joint_weight=1.0, balance_weight=0.0,
                         joint_share=1.0):
    """`loss_on_states` of a head on a GPT of ours, whose states are computed in each step: idx
    (B, T), gold (B, T, n), joint_share as in GPT.loss; joint_weight changes nothing."""
    n = model.config.n_future
    with torch.no_grad():
        hidden = model.hidden(idx)  # (B, T, C)
        log_z = model.target_logits(hidden).logsumexp(-1)  # (B, T)
    gold = gold[:, : gold.size(1) - n + 1]
    windows = hidden.unfold(1, n, 1).transpose(2, 3), gold, log_z.unfold(1, n, 1)
    states, gold, log_z = (x.flatten(0, 1) for x in windows)  # (N, n, C), (N, n), (N, n)
    some = torch.randperm(len(gold), device=gold.device)[: math.ceil(joint_share * len(gold))]
    return loss_on_states(model, teacher, states[some], gold[some], log_z[some], joint_weight,
                          balance_weight)
