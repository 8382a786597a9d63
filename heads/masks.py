"""Masks that the trunk itself turns into drafts (arXiv 2507.11851): what mask.py and mask_linear.py
share."""

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial

import torch
import torch.nn as nn
from torch.nn import functional as F

from heads.gloeckle import need_lm_head
from model import CPHead, KVCache, widen


@cache
def eager(function):
    """torch.compiler.disable, at the first call: it imports the compiler, which takes a second."""
    return torch.compiler.disable(function)


class Text:
    """A cache for `GPT.loss`, of its pass over texts (B, T), and what `see` gives there: text[some]
    takes masks after N' of the B T tokens through the trunk, and has the states (N', n C) that the
    head drafts from. Then `loss` is their latent consistency."""

    def __init__(self, model):
        self.model, self.kv, self.length, self.loss = model, [], 0, 0.0

    def append(self, layer, kv):
        if self.length:  # these are masks, which are needed in this pass alone
            return torch.cat((self.kv[layer], kv), dim=3)
        self.kv.append(kv)
        return kv

    def see(self, hidden):
        self.hidden = hidden  # (B, T, C)
        return self

    def flatten(self, *dims):
        return self

    def __len__(self):
        return self.hidden.size(0) * self.length

    def __getitem__(self, some):
        return eager(Text.take)(self, some)  # its shapes change from draw to draw

    def take(self, some):
        head, (B, T, _), device = self.model.head, self.hidden.shape, self.hidden.device
        m = len(head.maps)
        i = torch.arange(len(self), device=device)[some]
        b, t = i // T, i % T
        slot = F.one_hot(b, B).cumsum(0).gather(1, b[:, None])[:, 0] - 1  # its number in its text
        after = t.new_zeros(B, slot.max() + 1)  # where a text has fewer than others, after token 0
        after[b, slot] = t
        # groups do not see each other, so a few at a time need less memory
        z = [head.carry(self.model, t.new_zeros(B, 0), part, self)[1]
             for part in after.split(max(T // m, 1), dim=1)]
        z = torch.cat(z, dim=1)[b, slot]  # (N', n - 1, C)
        same = t[:, None] + torch.arange(1, m + 1, device=device)  # whose state predicts the same
        error = self.hidden[b[:, None], same.clamp_max(T - 1)].detach() - z
        self.loss = (error.square().mean(-1) * (same < T)).sum() / (same < T).sum().clamp_min(1)
        return torch.cat((self.hidden[b, t, None], z), dim=1).flatten(1)


class MaskCache(KVCache):
    """A cache for decoding, with room for masks after the tokens. z (G, n - 1, C) are the states of
    the masks after the last G tokens of the last pass, of which the first is at the place first."""

    def __init__(self, model):
        n = model.config.n_future
        config = replace(model.config, block_size=model.config.block_size + n * (n - 1))
        super().__init__(config, 1, model.dtype, model.device)

    @property
    def n_drafts(self):
        """How many tokens can be drafted: none, if the last token that is left had no masks."""
        return self.z.size(1) if self.length > self.first else 0

    def see(self, e):
        z = self.z[max(self.length - 1 - self.first, 0)]
        return torch.cat((e[-1:], z)).view(1, -1)


class Carrier:
    """A model whose passes carry masks, for decode.py; else it is the model."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def new_cache(self):
        return MaskCache(self.model)

    def hidden(self, idx, cache):
        end = cache.length + idx.size(1)
        # after every token, or the last one; after the prompt alone, as no token of it is rejected
        first = cache.length if self.head.quadratic and cache.length else end - 1
        after = torch.arange(first, end, device=idx.device).unsqueeze(0)
        hidden, z = self.head.carry(self.model, idx, after, cache)
        cache.length, cache.first, cache.z = end, first, z[0]
        return hidden


class MaskHead(CPHead):
    """n - 1 learned masks after a token, whose states in the trunk predict what comes after the
    next token ("Your LLM knows the future", arXiv 2507.11851).

        P^(1) = softmax(W e),    P^(s) = softmax(W MLP([norm(W[x_{t+s-1}]); z_{s-1}])),   s > 1

    z_j is the state of the j-th mask after token t, at the place t + j. A mask sees the tokens up
    to t, and the masks before it in its group; nothing else sees it. At masks alone, the trunk's
    linear layers are y = W x + B A x, of rank r (--rank; there is one component), which leaves the
    states of tokens as they are, to the bit in a pass of the same shape. B starts at 0. z_j also
    learns to be the state that predicts the same token: (z_j - e_{t+j})^2 has the weight of the
    joint. norm, a LayerNorm without weights, is not in the paper.

    quadratic: a step of decoding feeds masks after every token; else after the last one alone, and
    the step after a rejection drafts nothing. BadInput for the target "marginal". The trunk must be
    model.py's.
    """

    sees_drafts = reads_trunk = quadratic = True
    text, carrier = Text, Carrier

    def __init__(self, config):
        need_lm_head(config)
        super().__init__(replace(config, rank=1))
        C = config.n_embd
        sizes = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)] * config.n_layer  # as in `lora`
        self.A = nn.ParameterList(torch.randn(config.rank, old) / old**0.5 for old, new in sizes)
        self.B = nn.ParameterList(torch.zeros(new, config.rank) for old, new in sizes)
        self.mlp = nn.Sequential(nn.Linear(2 * C, C), nn.SiLU(), nn.LayerNorm(C),
                                 nn.Linear(C, C), nn.SiLU(), nn.LayerNorm(C))

    @staticmethod
    def new_maps(config):
        """The masks' embeddings (n - 1, C)."""
        return 0.02 * torch.randn(config.n_future - 1, config.n_embd)

    @contextmanager
    def lora(self, model, T):
        """In the block, the trunk's linear layers add B A x from the position T on."""
        def add(A, B, linear, inputs, y):
            y[:, T:] += F.linear(F.linear(inputs[0][:, T:], A), B)

        linears = (linear for block in model.transformer.h for linear in
                   (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj))
        with ExitStack() as stack:
            for linear, A, B in zip(linears, self.A, self.B):
                stack.callback(linear.register_forward_hook(partial(add, A, B)).remove)
            yield

    def carry(self, model, idx, after, cache):
        """One pass of the trunk over tokens idx (B, T), or none, and masks after those at the
        places after (B, G): -> states (B, T, C) of the tokens, (B, G, n - 1, C) of the masks."""
        (B, T), G, m, past = idx.shape, after.size(1), len(self.maps), cache.length
        own = torch.arange(past + T, device=idx.device)
        # masks past the block's end, of which decoding uses none, share its last place
        places = after[..., None] + torch.arange(1, m + 1, device=idx.device)  # (B, G, m)
        places = places.clamp_max(model.config.block_size - 1)
        wte, wpe = model.transformer.wte, model.transformer.wpe
        x = torch.cat((wte(idx) + wpe(own[past:]), (self.maps + wpe(places)).flatten(1, 2)), dim=1)
        x = model.transformer.drop(x)
        last = torch.cat((own[past:].expand(B, T), after.repeat_interleave(m, 1)), dim=1)
        tokens = own <= last[..., None]  # (B, T + G m, past + T), which tokens are seen
        group = torch.ones(m, m, device=idx.device).tril()
        masks = F.pad(torch.block_diag(*G * [group]), (0, 0, T, 0)).bool()  # (T + G m, G m), masks
        seen = torch.cat((tokens, masks.expand(B, -1, -1)), dim=-1).unsqueeze(1)
        with self.lora(model, T):
            x = model.through_blocks(x, cache, seen)
        return x[:, :T], x[:, T:].unflatten(1, (G, m))

    def see(self, e, cache=None):
        """The states of a token and of the masks after it, in one vector: (..., n C)."""
        return cache.see(e)

    def log_weights(self, e):
        return widen(self.maps.new_zeros(len(e), 1))

    def vector(self, x, z, unembed):
        """h^(s), s > 1, from the token before its own: x (...), z (..., C) -> (..., C)."""
        row = F.embedding(x, unembed)
        return self.mlp(torch.cat((F.layer_norm(row, row.shape[-1:]), z), dim=-1))

    def vectors_along(self, e, gold, unembed):
        h = e.unflatten(-1, (gold.size(1), -1))  # (N, n, C)
        later = self.vector(gold[:, :-1], h[:, 1:], unembed)  # (N, n - 1, C)
        return torch.cat((h[:, :1], later), dim=1).unsqueeze(2)

    def start(self, e, unembed):
        return e.unflatten(-1, (len(self.maps) + 1, -1)).unbind(1), unembed  # n times (B, C)

    def rows(self, state, s, x):
        h, unembed = state
        h = h[s - 1] if s == 1 else self.vector(x, h[s - 1], unembed)
        return self.unembed(h, unembed).log_softmax(-1).unsqueeze(1)
