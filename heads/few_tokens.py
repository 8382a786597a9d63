"""Heads that draft some of the tokens alone: a draft vocabulary (FR-Spec, arXiv 2502.14856)."""

from dataclasses import replace

import torch
from torch.nn import functional as F

from decode import Greedy, Sampling
from heads.conditional import Given
from heads.sequential import Sequential
from model import BadInput, gold_log_prob


def few_tokens(Head, K):
    """The class of a Head (cp, low_rank, medusa, chain, ...) whose factors are softmaxes over K
    tokens.

    With a vocabulary of tens of thousands the products with W are most of what a draft costs, and a
    few thousand tokens are most of any text. `choose_drafts` says which, before anything else.
    """
    if issubclass(Head, Given):
        raise BadInput("a head that is given x_1 drafts all tokens: take no draft vocabulary with it")
    return type(f"Few{Head.__name__}", (FewTokens, Head), {"K": K})


class FewTokens:
    """P_a^(s) = softmax(W_K h_a^(s)), with the rows W_K of the K tokens.

    The target writes all tokens, with their own probabilities. One that is not among the K is never
    drafted; in a window it says nothing of the component, and its log-probability counts as 0.
    """

    def __init__(self, config):
        if type(self.K) is not int or not 1 <= self.K <= config.n_token:  # True is no number
            raise BadInput(f"a head can draft 1 to {config.n_token} tokens, not {self.K!r}")
        super().__init__(replace(config, vocab_size=self.K, n_token=self.K))
        self.V = config.n_token
        self.register_buffer("draft_ids", torch.arange(self.K))  # different ones, and sorted
        self.register_buffer("draft_rows", torch.zeros(self.K, config.n_embd))  # W_K

    def choose_drafts(self, ids, unembed):
        """Draft these ids (K,) from now on; unembed W (V, C) must not change after that."""
        ids = torch.as_tensor(ids).sort().values
        if not self.can_draft(ids):
            raise BadInput(f"the head drafts {self.K} of {self.V} tokens: give it as many ids, "
                           "each once")
        self.draft_ids.copy_(ids)
        self.draft_rows.copy_(unembed[self.draft_ids])

    def can_draft(self, ids):
        """Whether they are K ids, sorted, each once: of one that is there twice, q would have half
        of the probability that it is drawn with."""
        return (ids.shape == (self.K,) and ids.dtype in (torch.int32, torch.int64)
                and 0 <= ids[0] and ids[-1] < self.V and bool((ids.diff() > 0).all()))

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if not self.can_draft(self.draft_ids):
            rest[-1].append(f"{prefix}draft_ids are not {self.K} ids, sorted, each once")

    def places(self, tokens):
        """Which of the K tokens (...) are: -> places (...), and whether they are among them."""
        place = torch.searchsorted(self.draft_ids, tokens.contiguous()).clamp_max(self.K - 1)
        return place, self.draft_ids[place] == tokens

    def numbered(self, tokens):
        """Tokens (...) in the numbers of this head: 0..K - 1, or K + its id for any other token."""
        place, inside = self.places(tokens)
        return torch.where(inside, place, self.K + tokens)

    def embed(self, x, unembed):
        """Heads that see the tokens before their own see all of them, in these numbers."""
        tokens = torch.where(x < self.K, self.draft_ids[x.clamp_max(self.K - 1)], x - self.K)
        return F.embedding(tokens, unembed)

    def logits(self, h, unembed):
        return super().logits(h, self.draft_rows)

    def along(self, P, x):
        inside = (x < self.K)[..., None]
        return super().along(P, x.clamp_max(self.K - 1)) * inside

    def gold_log_probs(self, e, gold, unembed):
        place, inside = self.places(gold)
        if isinstance(self, Sequential):
            h = self.vectors_along(e, self.numbered(gold[:, :-1]), unembed)  # (N, n, r, C)
            log_p = gold_log_prob(h, self.draft_rows, place.unsqueeze(-1))
        else:
            log_p = super().gold_log_probs(e, place, self.draft_rows)
        return log_p.masked_fill(~inside.unsqueeze(-1), 0.0)

    def rows(self, e, tokens, unembed):
        """As in `CPHead`, over the K tokens: -> (N, k, K)."""
        return super().rows(e, self.numbered(tokens), unembed)

    def draft(self, e, x1, n_drafts, sampler, unembed):
        """As in `CPHead`: the drafts (B, k) are tokens, and q (B, k, V) is of all of them."""
        few = sampler
        if type(sampler) not in (Sampling, Greedy):
            few = WholeRows(self, sampler, len(unembed))
        x, q = super().draft(e, self.numbered(x1), n_drafts, few, unembed)
        return self.draft_ids[x], None if q is None else self.whole(q, len(unembed), 0.0)

    def whole(self, rows, V, value):
        """rows (..., K) as rows of V tokens, with the value for all others."""
        found = rows.new_full((*rows.shape[:-1], V), value)
        return found.index_copy_(-1, self.draft_ids, rows)


class WholeRows:
    """A sampler that sees rows of all tokens, where a head draws from rows of K: its random numbers
    may belong to tokens, as those of decoders/coupled.py do."""

    plain = False

    def __init__(self, head, sampler, V):
        self.head, self.sampler, self.V = head, sampler, V

    def draw(self, logits):
        tokens, q = self.sampler.draw(self.head.whole(logits, self.V, float("-inf")))
        return self.head.places(tokens)[0], None if q is None else q[..., self.head.draft_ids]
