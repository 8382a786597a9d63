"""Masks that the trunk itself turns into drafts (arXiv 2507.11851): what mask.py and mask_linear.py
share."""

import math
from dataclasses import replace

import torch
import torch.nn as nn
from torch.nn import functional as F

from heads.sequential import Sequential
from model import GPT, BadInput, KVCache, gold_log_prob, widen


class MaskHead(Sequential):
    """n - 1 learned masks after a token, whose states in the trunk predict what comes after the
    next token ("Your LLM knows the future", arXiv 2507.11851).

        P^(1) = softmax(W e),    P^(s) = softmax(W MLP([norm(W[x_{t+s-1}]); z_{s-1}])),   s > 1

    z_j is the state of the j-th mask after token t, at the place t + j. A mask sees the tokens up
    to t, and the masks before it in its group; nothing else sees it. At masks alone, the trunk's
    linear layers are y = W x + B A x, of rank r (--rank; there is one component), which leaves the
    states of tokens as they are, to the bit in a pass of the same shape. B starts at 0. z_j also
    learns to be the state that predicts the same token, see `Model.loss`. norm, a LayerNorm without
    weights, is not in the paper.

    The state that this head looks at is [e; z_1; ...; z_{n-1}] (..., n C). quadratic: a step of
    decoding feeds masks after every token; else after the last one alone, and the step after a
    rejection drafts nothing. BadInput for the target "marginal".
    """

    quadratic = True

    def __init__(self, config):
        if config.target != "lm_head":
            raise BadInput(f"--head {config.head} needs --target lm_head")
        nn.Module.__init__(self)
        n, r, C = config.n_future, config.rank, config.n_embd
        self.rank, self.router = 1, None
        self.maps = nn.Parameter(0.02 * torch.randn(n - 1, C))  # the masks' embeddings
        sizes = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)] * config.n_layer  # as in `Model.block`
        self.A = nn.ParameterList(torch.randn(r, old) / old**0.5 for old, new in sizes)
        self.B = nn.ParameterList(torch.zeros(new, r) for old, new in sizes)
        self.mlp = nn.Sequential(nn.Linear(2 * C, C), nn.SiLU(), nn.LayerNorm(C),
                                 nn.Linear(C, C), nn.SiLU(), nn.LayerNorm(C))

    def start(self, e):
        return e.unflatten(-1, (len(self.maps) + 1, -1)).unbind(-2)  # e, z_1, ..., each (B, C)

    def advance(self, state, s, row):
        if s == 1:
            return state[0].unsqueeze(1), state
        h = self.mlp(torch.cat((F.layer_norm(row, row.shape[-1:]), state[s - 1]), dim=-1))
        return h.unsqueeze(1), state  # (B, 1, C)

    def draft(self, e, x1, n_drafts, sampler, unembed):
        C = self.maps.size(1)
        if not self.quadratic and not e[:, C:].any():  # this token had no masks
            return x1.new_zeros(len(e), 0), widen(e.new_zeros(len(e), 0, len(unembed)))
        return super().draft(e, x1, n_drafts, sampler, unembed)


class Kept:
    """A cache for `Model.loss`: the keys and values (2, B, nh, T, hs) that a pass over texts leaves
    in every layer, with their gradients. Masks see them, and are needed in their own pass alone."""

    def __init__(self):
        self.kv, self.length = [], 0

    def append(self, layer, kv):
        if self.length:
            return torch.cat((self.kv[layer], kv), dim=3)
        self.kv.append(kv)
        return kv


class Model(GPT):
    """A GPT whose passes carry masks. Its states are [e; z_1; ...; z_{n-1}] (B, T, n C), where z is
    0 after tokens that had no masks. In the first pass over a text only the last token has some,
    since nothing of it is rolled back. In a later one each of its tokens may become the last."""

    def new_cache(self, B=1):
        """Its rows after the text are for the masks of a pass: stale as soon as it ends."""
        n = self.config.n_future
        config = replace(self.config, block_size=self.config.block_size + n * (n - 1))
        return KVCache(config, B, self.dtype, self.device)

    def hidden(self, idx, cache=None, places=None, mask=None):
        if places is not None:
            raise BadInput(f"head {self.config.head} has masks at places of its own, so it takes "
                           "one text at a time, in its order; take --mode speculative or plain")
        return super().hidden(idx, cache)

    def through_blocks(self, x, cache, mask):
        if isinstance(cache, Kept):  # tokens alone: `loss` says where the masks are
            return super().through_blocks(x, cache, mask)
        (B, T, _), n, past = x.shape, self.config.n_future, 0 if cache is None else cache.length
        G = min(T, n) if self.head.quadratic and past else 1  # tokens that have masks
        after = torch.arange(past + T - G, past + T, device=x.device).expand(B, G)
        e, z = self.carry(x, after, cache)
        z = F.pad(z.flatten(2), (0, 0, T - G, 0))  # (B, T, (n - 1) C)
        return torch.cat((e, z), dim=-1)

    def split(self, hidden):
        return hidden[..., : self.config.n_embd], hidden

    def carry(self, x, after, cache):
        """One pass over embedded tokens x (B, T, C), or none, and masks after those at the places
        after (B, G): -> states (B, T, C) of the tokens, (B, G, n - 1, C) of the masks."""
        (B, T, _), G, m = x.shape, after.size(1), self.config.n_future - 1
        past = 0 if cache is None else cache.length
        steps = torch.arange(1, m + 1, device=x.device)
        # masks past the block's end, of which decoding uses none, share its last place
        places = (after.unsqueeze(-1) + steps).clamp_max(self.config.block_size - 1)  # (B, G, m)
        masks = self.head.maps + self.transformer.wpe(places)  # (B, G, m, C)
        x = torch.cat((x, self.transformer.drop(masks.flatten(1, 2))), dim=1)  # (B, T + G m, C)
        own = torch.arange(past + T, device=x.device)  # the tokens' places
        last = torch.cat((own[past:].expand(B, T), after.repeat_interleave(m, 1)), dim=1)
        tokens = own <= last.unsqueeze(-1)  # (B, T + G m, past + T), which tokens are seen
        group = torch.ones(m, m, device=x.device).tril()
        group = F.pad(torch.block_diag(*G * [group]), (0, 0, T, 0)).bool()  # (T + G m, G m), masks
        seen = torch.cat((tokens, group.expand(B, -1, -1)), dim=-1).unsqueeze(1)
        for layer in range(self.config.n_layer):
            x = self.block(x, T, layer, cache, seen)
        x = self.transformer.ln_f(x)
        return x[:, :T], x[:, T:].unflatten(1, (G, m))

    def block(self, x, T, layer, cache, mask):
        """`Block.forward`, whose four linear layers add B A x after the T tokens, at the masks."""
        block, dropout = self.transformer.h[layer], self.config.dropout if self.training else 0.0

        def linear(i, module, x):
            A, B = self.head.A[4 * layer + i], self.head.B[4 * layer + i]
            y = module(x)
            return torch.cat((y[:, :T], y[:, T:] + F.linear(F.linear(x[:, T:], A), B)), dim=1)

        qkv = linear(0, block.attn.c_attn, block.ln_1(x)).unflatten(-1, (3, self.config.n_head, -1))
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, nh, T + G m, hs)
        q, kv = qkv[0], qkv[1:]
        k, v = kv if cache is None else cache.append(layer, kv)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2).flatten(2)
        x = x + F.dropout(linear(1, block.attn.c_proj, y), dropout)
        inner = F.gelu(linear(2, block.mlp.c_fc, block.ln_2(x)))
        return x + F.dropout(linear(3, block.mlp.c_proj, inner), dropout)

    def loss(self, idx, gold, joint_weight=1.0, balance_weight=0.0, joint_share=1.0):
        """`GPT.loss`, of which the joint has one more term, the latent consistency of the paper:
        the mean of (z_j - e_{t+j})^2, where e_{t+j} is the state that predicts the same token. It
        has the weight of the joint. joint_share of each text's tokens have masks.
        """
        (B, T), n, W = idx.shape, self.config.n_future, self.lm_head.weight
        kept = Kept()
        e = self.hidden(idx, kept)  # (B, T, C)
        after = torch.arange(T, device=e.device).expand(B, T)  # (B, G), here all
        if joint_share < 1:
            G = math.ceil(joint_share * T)
            after = torch.rand(B, T, device=e.device).argsort(1)[:, :G]
        # groups do not see each other, so a few at a time need less memory
        parts = after.split(max(T // (n - 1), 1), dim=1)
        z = [self.carry(e[:, :0], part, kept)[1] for part in parts]
        z = torch.cat(z, dim=1)  # (B, G, n - 1, C)
        texts = torch.arange(B, device=e.device).unsqueeze(1)
        seen = torch.cat((e[texts, after].unsqueeze(2), z), dim=2).flatten(0, 1).flatten(1)
        joint = self.head.log_joint(seen, gold[texts, after].flatten(0, 1), W)  # (B G, n)
        joint_loss = -joint[:, -1].mean() / n

        same = after.unsqueeze(-1) + torch.arange(1, n, device=e.device)  # (B, G, n - 1), t + j
        target = e[texts.unsqueeze(-1), same.clamp_max(T - 1)].detach()
        error = (target - z).square().mean(-1) * (same < T)
        latent = error.sum() / (same < T).sum().clamp_min(1)

        next_loss = -gold_log_prob(e.flatten(0, 1), W, gold[..., 0].flatten()).mean()
        balance = next_loss.new_ones(())  # there is one component
        loss = next_loss + joint_weight * (joint_loss + latent) + balance_weight * balance
        offset = -joint.mean(0).diff(prepend=joint.new_zeros(1))
        parts = dict(next=next_loss, joint=joint_loss, offset=offset, balance=balance,
                     usage=next_loss.new_ones(1))
        return loss, {name: part.detach() for name, part in parts.items()}
