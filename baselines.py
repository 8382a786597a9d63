"""Known alternatives to the CP head, as heads of the registry, all verified alike and so all lossless.

Importing this file adds them to model.py's HEADS; common.py does. To understand the CP head, nobody
needs it.
"""

from dataclasses import replace
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F

from model import (HEADS, BadInput, Block, CPHead, KVCache, RecurrentHead, causal_mask, gold_log_prob,
                   widen)


class WideHead(CPHead):
    """Independent heads with the parameters of a mixture: is it the rank that helps, or the size?

        h^(s) = M^(s) e + B^(s) gelu(A^(s) e)

    One component, whatever --rank r says: r gives the MLP its width (r - 1) C / 2, so A^(s) and
    B^(s) have as many parameters as the CP head's other r - 1 maps. B starts at 0, where this is the
    CP head of rank 1.
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


class MedusaHead(CPHead):
    """Medusa's heads (arXiv 2401.10774): a residual block and an unembedding for each offset.

        P^(s) = softmax((W + D^(s)) (e + silu(A^(s) e + b^(s))))

    One component, whatever --rank says. A, b and D start at 0, where every unembedding is the trunk's.
    """

    def __init__(self, config):
        super().__init__(replace(config, rank=1))
        n, C = config.n_future, config.n_embd
        self.block = nn.Parameter(torch.zeros(n, C, C))  # A^(s)
        self.bias = nn.Parameter(torch.zeros(n, C))  # b^(s)

    @staticmethod
    def new_maps(config):
        """D^(s) (n, V or K, C)."""
        return torch.zeros(config.n_future, config.draft_vocab or config.vocab_size, config.n_embd)

    def vectors(self, e, offsets=slice(None)):
        A, b = self.block[offsets], self.bias[offsets]
        block = F.linear(e, A.flatten(0, 1)).unflatten(-1, b.shape) + b  # (..., n', C)
        return (e.unsqueeze(-2) + F.silu(block)).unsqueeze(-2)

    def logits(self, e, unembed, offsets=slice(None)):
        h, W = self.vectors(e, offsets), self.drafted_rows(unembed)  # (..., n', 1, C), n' may be 0
        return widen(F.linear(h, W) + torch.einsum("...nrc,nvc->...nrv", h, self.maps[offsets]))

    def log_conditionals(self, e, gold, unembed):
        return self.logits(e, unembed, slice(1, None))[:, :, 0].log_softmax(-1)

    def gold_log_probs(self, e, gold, unembed):
        W, y = self.drafted_rows(unembed), self.places(gold)
        h = self.vectors(e)[:, :, 0].unbind(1)  # n times (N, C)
        log_p = [gold_log_prob(x, W + D, y_s, len(e)) for x, D, y_s in zip(h, self.maps.unbind(), y.unbind(1))]
        return torch.stack(log_p, dim=1).unsqueeze(-1)


def need_lm_head(config):
    """For heads whose first factor is not one of e alone, as the target "marginal" is."""
    if config.target == "marginal":
        raise BadInput(f"--head {config.head} reads more of the trunk than its last state, so it needs "
                       "--target lm_head")


class GloeckleHead(CPHead):
    """Gloeckle et al.'s heads (arXiv 2404.19737): a transformer layer for each offset, on the trunk's states.

        P^(s) = softmax(W norm(layer^(s)(e_1, ..., e_t)))

    One component, whatever --rank says. The layers begin as the identity: c_proj starts at 0. Here they
    take the states after the trunk's final norm, theirs before it. To have a model with as many
    parameters as one without these heads, take n - 1 layers off the trunk (--n_layer).
    """

    reads_trunk = True

    def __init__(self, config):
        need_lm_head(config)
        super().__init__(replace(config, rank=1))
        self.config = replace(config, n_layer=config.n_future)  # of the cache
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_future))
        for layer in self.layers:
            for p in (*layer.attn.c_proj.parameters(), *layer.mlp.c_proj.parameters()):
                nn.init.zeros_(p)

    @staticmethod
    def new_maps(config):
        """The norms' weights (n, C)."""
        return torch.ones(config.n_future, config.n_embd)

    def see(self, e, cache=None):
        """norm(layer^(s)(e)) of all offsets, in one vector: e (..., T, C) -> (..., T, n C)."""
        x, own, past = e.view(-1, *e.shape[-2:]), None, 0
        if cache is not None:  # the layers' own keys go along with the trunk's
            if not hasattr(cache, "own"):
                cache.own = KVCache(self.config, len(x), e.dtype, e.device)
            own, past = cache.own, cache.length - e.size(-2)
            own.length = past
        mask = causal_mask(x, past)
        x = torch.cat([F.layer_norm(layer(x, s, own, mask), x.shape[-1:], weight)
                       for s, (layer, weight) in enumerate(zip(self.layers, self.maps))], dim=-1)
        return x.view(*e.shape[:-1], -1)

    def log_weights(self, e):
        return widen(e.new_zeros(*e.shape[:-1], 1))

    def vectors(self, e, offsets=slice(None)):
        return e.unflatten(-1, self.maps.shape)[..., offsets, :].unsqueeze(-2)


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


class HMMHead(CPHead):
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


class TreeHead(HMMHead):
    """A mixture whose component depends on those of the halves that its offset is in, a binary tree (MTPC,
    arXiv 2511.11346).

    The root chooses a component for the window by w; it goes to each half by a transition, and so on
    down to pairs of offsets (or one, where a half is odd). It starts as the CP head, whose component is
    the same everywhere.
    """

    def n_transitions(self, n):
        self.root, n_edges = self.branch(1, n, 0)
        return max(n_edges, 1)

    def branch(self, first, last, n_edges):
        """A node of the offsets first..last: (first, last, [(edge, child), ...]), and the number of edges
        so far."""
        children = []
        if last - first > 1:
            middle = (first + last) // 2
            for part in ((first, middle), (middle + 1, last)):
                edge, n_edges = n_edges, n_edges + 1
                child, n_edges = self.branch(*part, n_edges)
                children.append((edge, child))
        return (first, last, children), n_edges

    def below(self, node, log_T, seen):
        """log P(the tokens of a node's offsets that are seen | its component): (..., r)."""
        first, last, children = node
        if not children:
            return seen[..., first - 1 : last, :].sum(-2)
        return sum(self.through(edge, child, log_T, seen) for edge, child in children
                   if child[0] <= seen.size(-2))

    def through(self, edge, child, log_T, seen):
        """`below` of a child, given the component of its parent: (..., r)."""
        return torch.logsumexp(log_T[edge] + self.below(child, log_T, seen).unsqueeze(-2), dim=-1)

    def descend(self, node, log_b, log_T, seen):
        """log P(all that is seen, the component of the next offset): log_b (..., r) is that of the node
        and what is seen outside of it."""
        s = min(seen.size(-2) + 1, self.root[1])  # the next one; after the last, the last
        while node[2]:
            (left, before), (right, after) = node[2]
            if s > before[1]:  # the left half is all seen, and of the right half comes the next one
                log_b = log_b + self.through(left, before, log_T, seen)
                edge, node = right, after
            else:
                edge, node = left, before
            log_b = move(log_b, log_T[edge])
        return log_b + self.below(node, log_T, seen)

    def prefixes(self, e, seen):
        log_w, log_T = self.log_weights(e), self.transitions(e).unbind(-3)
        return torch.stack([self.descend(self.root, log_w, log_T, seen[:, :k])
                            for k in range(1, seen.size(1) + 1)], dim=1)

    def log_marginal(self, e, unembed):
        log_w, log_T = self.log_weights(e), self.transitions(e).unbind(-3)
        log_b = self.descend(self.root, log_w, log_T, log_w.unsqueeze(-2)[..., :0, :])
        log_p = self.logits(e, unembed, slice(0, 1)).squeeze(-3).log_softmax(-1)  # (..., r, V)
        return torch.logsumexp(log_b.unsqueeze(-1) + log_p, dim=-2)

    def start(self, e, unembed):
        return CPHead.start(self, e, unembed), self.transitions(e).unbind(-3), self.log_weights(e), []

    def prefix(self, state, s, log_b, seen):
        _, log_T, log_w, tokens = state
        tokens.append(seen)
        return self.descend(self.root, log_w, log_T, torch.stack(tokens, dim=-2))


class LayersHead(RecurrentHead):
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


BASELINES = {"wide": WideHead, "medusa": MedusaHead, "gloeckle": GloeckleHead,
             "layers": LayersHead, "hmm": HMMHead, "tree": TreeHead}
HEADS.update(BASELINES)
