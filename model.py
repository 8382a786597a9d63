"""A GPT that predicts its next n tokens at once, as a rank-r CP decomposition of their joint distribution.

The trunk is GPT-2 with nanoGPT's parameter names and shapes: a checkpoint of nanoGPT's train.py loads
strictly and gives the same logits. On top sits the CP head (arXiv 2410.17765), a mixture of r experts,
each of which is a product of n softmax heads on the same hidden state e of position t:

    P(x_{t+1}, ..., x_{t+n} | x_{<=t}) = sum_a w_a(e) * prod_s P_a^(s)(x_{t+s} | e)                    (1)

With context "previous", which is not the paper's, each factor also sees the token before its own,
P_a^(s)(x_{t+s} | x_{t+s-1}, e): a mixture of Markov chains. See `CPHead.previous_term`, equation (4).

Shapes use the field's names: B batch, T time, C = n_embd, V = vocab_size, n = n_future, r = rank.
Probabilities are computed in float32 or wider, whatever the dtype of the model.
"""

import math
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    # the trunk, as in nanoGPT
    block_size: int = 1024
    vocab_size: int = 50304  # rows of the embedding: the tokenizer's size, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    # the head
    n_future: int = 1  # n, tokens predicted at once; 1 is plain nanoGPT without a head
    rank: int = 1  # r, components of the mixture; 1 is independent heads
    factors: str = "reduced"  # P_a^(s): "reduced" softmax(W M_a^(s) e), W the LM head; "full" softmax(W_a^(s) e)
    context: str = "none"  # what P_a^(s) sees beside e: "none" (the paper); "previous" the token before its own, too
    target: str = "marginal"  # next-token law: "marginal" sum_a w_a P_a^(1) (the paper); "lm_head" the trunk's own
    n_token: int = 0  # ids below this are real tokens, the rest is padding; 0 means all of them

    def __post_init__(self):
        self.n_token = self.n_token or self.vocab_size
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_future", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.block_size < 2:
            raise ValueError("block_size must be at least 2")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if not 0 < self.n_token <= self.vocab_size:
            raise ValueError(f"n_token {self.n_token} is not in 1..vocab_size {self.vocab_size}")
        if self.factors not in ("full", "reduced"):
            raise ValueError(f"factors must be full or reduced, not {self.factors!r}")
        if self.context not in ("none", "previous"):
            raise ValueError(f"context must be none or previous, not {self.context!r}")
        if self.context == "previous" and self.factors != "reduced":
            raise ValueError("context = previous needs factors = reduced")
        if self.target not in ("marginal", "lm_head"):
            raise ValueError(f"target must be marginal or lm_head, not {self.target!r}")


def fp32(x):
    """x in float32 at least: half precision is widened, float64 stays float64."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# -----------------------------------------------------------------------------
# the trunk


class KVCache:
    """Keys and values of every layer, preallocated, and how many positions of them are valid.

    Rolling back to m positions is `cache.length = m`: the rows behind are stale, have no weight and get overwritten.
    A speculative step writes n rows wherever it starts, so the buffer is n - 1 rows longer than the block.

    length is an int, and attention reads the valid rows alone. It may also be a tensor (1,) on the device: then all
    shapes are fixed, attention goes over the whole buffer with a mask, and a step can be captured or compiled.
    """

    def __init__(self, config, B, dtype, device):
        rows = config.block_size + config.n_future - 1
        shape = (2, B, config.n_head, rows, config.n_embd // config.n_head)
        self.kv = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.length = 0

    def append(self, layer, kv):
        """Write kv (2, B, nh, T, hs) behind a layer's valid rows; returns all of them (2, B, nh, length + T, hs)."""
        T = kv.size(3)
        if isinstance(self.length, torch.Tensor):
            return self.kv[layer].index_copy_(3, self.length + torch.arange(T, device=kv.device), kv)
        self.kv[layer].narrow(3, self.length, T).copy_(kv)
        return self.kv[layer].narrow(3, 0, self.length + T)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x, layer, cache, mask):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q, kv = qkv[0], qkv[1:]  # (B, nh, T, hs), (2, B, nh, T, hs)
        k, v = kv if cache is None else cache.append(layer, kv)
        # `is_causal` lines q up with the FIRST keys, so it is right only without a past; the mask covers the rest
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=T > 1 and mask is None, dropout_p=self.dropout if self.training else 0.0
        )
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout) if self.training else y


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.c_proj(F.gelu(self.c_fc(x)))
        return F.dropout(x, self.dropout) if self.training else x


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, layer=0, cache=None, mask=None):
        x = x + self.attn(self.ln_1(x), layer, cache, mask)
        return x + self.mlp(self.ln_2(x))


# -----------------------------------------------------------------------------
# the CP head


class CPHead(nn.Module):
    """The weights w_a and the factors P_a^(s) of equation (1).

    The components must not start as copies of one another: at equal factors the gradient of w vanishes and the
    factors' gradients agree, so noise on w alone would never break the symmetry.
    """

    def __init__(self, config):
        super().__init__()
        n, r, C = config.n_future, config.rank, config.n_embd
        self.reduced, self.sees_previous = config.factors == "reduced", config.context == "previous"
        self.mix = nn.Linear(C, r)
        if self.reduced:  # M_a^(s), a C x C map in front of the shared unembedding: the identity and noise
            self.factors = nn.Parameter(torch.eye(C) + 0.02 * torch.randn(n, r, C, C))
        else:  # W_a^(s), an unembedding of its own
            self.factors = nn.Parameter(0.02 * torch.randn(n, r, config.vocab_size, C))
        if self.sees_previous:  # G^(s), s = 2..n, and U of equation (4); U = 0 is the head without context
            self.gate = nn.Parameter(torch.randn(n - 1, C, C) / C**0.5)
            self.out = nn.Parameter(torch.zeros(C, C))

    def log_weights(self, e):
        """log w: e (..., C) -> (..., r)."""
        return F.log_softmax(fp32(self.mix(e)), dim=-1)

    def vectors(self, e, positions=slice(None)):
        """M_a^(s) e or W_a^(s) e of a slice of positions: e (..., C) -> (..., n', r, C or V)."""
        A = self.factors[positions]  # (n', r, C or V, C)
        return F.linear(e, A.flatten(0, 2)).view(*e.shape[:-1], *A.shape[:3])

    def logits(self, e, unembed, positions=slice(None)):
        """log P_a^(s), up to a constant, of a slice of positions, without context: e (..., C) -> (..., n', r, V)."""
        h = self.vectors(e, positions)
        return fp32(F.linear(h, unembed) if self.reduced else h)  # the shared unembedding W

    def gold_log_probs(self, e, targets, unembed):
        """log P_a^(s) of the gold tokens alone: e (N, C), targets (N, n) -> (N, n, r)."""
        if self.reduced:
            return gold_log_probs_of(self.vectors_along(e, targets, unembed), targets, unembed)
        n, r = self.factors.shape[:2]
        factors = self.factors.flatten(0, 1).unbind()  # unbind, not indexing: its backward fills one gradient
        gold = [gold_log_prob(e, factors[s * r + a], targets[:, s], len(e)) for s in range(n) for a in range(r)]
        return torch.stack(gold, dim=-1).unflatten(-1, (n, r))

    def vectors_along(self, e, targets, unembed):
        """h_a^(s), what W turns into logits, along the gold tokens: e (N, C), targets (N, n) -> (N, n, r, C)."""
        h = self.vectors(e)
        if self.sees_previous:
            term = self.previous_term(F.embedding(targets[:, :-1], unembed), self.gates(e))  # (N, n - 1, C)
            h = h + F.pad(term, (0, 0, 1, 0)).unsqueeze(2)  # (N, n, 1, C), 0 where s = 1
        return h

    def sampled_joint(self, log_w, e, targets, unembed):
        """joint_log_probs of log_w (N, r) and gold_log_probs, (N, n), at less cost for the same gradient on average.

        With c the component that a window came from,

            d log P(x_1..x_n) = sum_a P(c = a | x_1..x_n) d(log w_a + sum_s log P_a^(s)(x_s)),                   (6)

        the weights get the whole sum, and the factors, e and W that of one c for each position, drawn from the
        posterior. Only the last column, the joint of the whole window, has a gradient. Reduced factors only.
        """
        if not self.reduced:
            raise ValueError("sample_component needs factors = reduced")
        h = self.vectors_along(e, targets, unembed)
        with torch.no_grad():  # W detached, or autocast would keep a copy of it without a gradient for what follows
            gold = gold_log_probs_of(h, targets, unembed.detach())
            joint = joint_log_probs(log_w, gold)
            posterior = (log_w + gold.sum(1)).softmax(-1)  # (N, r)
            c = draw_component(posterior)
        h_c = h.gather(2, c[:, None, :, None].expand(-1, h.size(1), 1, h.size(3)))  # (N, n, 1, C)
        surrogate = (posterior * log_w).sum(-1) + gold_log_probs_of(h_c, targets, unembed).sum((1, 2))
        joint[:, -1] += surrogate - surrogate.detach()
        return joint

    def gates(self, e):
        """G^(s) e of equation (4), s = 2..n: e (..., C) -> (..., n - 1, C)."""
        return F.linear(e, self.gate.flatten(0, 1)).view(*e.shape[:-1], *self.gate.shape[:2])

    def previous_term(self, row, gate):
        """What the token before adds to every component's vector in front of the unembedding W:

            h_a^(s) = M_a^(s) e + U (norm(W[x_{s-1}]) * G^(s) e)                                               (4)

        In the logits that is a table of token pairs of rank C, whose C parts are weighted by what e says.
        row (..., C), the rows W[x_{s-1}]; gate (..., C), theirs of `gates` -> (..., C).
        """
        return F.linear(F.layer_norm(row, row.shape[-1:]) * gate, self.out)


def draw_component(p):
    """One of each row, in proportion to p: (N, r) -> (N, 1). Unlike torch.multinomial it neither waits for a GPU nor
    stops at a NaN, of which train.py has more to say."""
    return (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)


def gold_log_probs_of(h, targets, unembed):
    """log softmax(W h)[gold token] for each position and component: h (N, n, r, C), targets (N, n) -> (N, n, r)."""
    y = targets.unsqueeze(-1).expand(h.shape[:-1])
    return gold_log_prob(h.flatten(0, -2), unembed, y.flatten(), len(h)).view(y.shape)


def gold_log_prob(x, weight, y, n_positions):
    """log softmax(weight x)[y] of many rows: x (N, C), weight (V, C), y (N,) -> (N,).

    Goes through the rows in chunks, whose logits the backward pass computes again instead of keeping them. A chunk
    has no more rows than there are positions (256 at least), so memory holds at most the logits of plain training,
    and never the (B, T, n, r, V) of all factors.
    """
    def chunk(x, weight, y):
        return -F.cross_entropy(fp32(F.linear(x, weight)), y, reduction="none")

    n_logits = 2**20 if x.device.type == "cpu" else 2**27  # what fits a CPU's cache; what fills a GPU
    rows = max(256, min(n_positions, n_logits // len(weight)))
    return torch.cat([recompute(chunk, x_i, weight, y_i) for x_i, y_i in zip(x.split(rows), y.split(rows))])


def recompute(function, *args):
    """function(*args), keeping its inputs for the backward pass instead of what it computes on the way."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def joint_log_probs(log_w, gold):
    """log P of the first 1, 2, ..., n tokens of a window, equation (1): log_w (N, r), gold (N, n, r) -> (N, n)."""
    return torch.logsumexp(log_w.unsqueeze(1) + gold.cumsum(1), dim=-1)


def balance_loss(log_w):
    """Load balancing as in Switch Transformers (arXiv 2101.03961): r * sum_a f_a m_a, log_w (N, r) -> scalar.

    f_a is the share of positions whose largest weight is a (no gradient), m_a the mean weight over the batch.
    1 when the components share the work, r when one does it all. It looks at the batch mean: every single
    position stays free to choose one component.
    """
    w, r = log_w.exp(), log_w.size(-1)
    f = F.one_hot(w.argmax(-1), r).to(w.dtype).mean(0)
    return r * (f * w.mean(0)).sum()


# -----------------------------------------------------------------------------
# the model


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied
        self.apply(self._init_weights)
        for name, p in self.named_parameters():  # GPT-2: residual projections are scaled by the depth
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
        self.cp_head = CPHead(config) if config.n_future > 1 else None

    @staticmethod
    def _init_weights(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def hidden(self, idx, cache=None):
        """The hidden states after the final norm: idx (B, T) -> (B, T, C).

        With a KVCache, idx continues the cache.length tokens that are in it, and cache.length grows by T. Rows
        past block_size - 1 have no position embedding; a fixed-size step may compute them and must not use them.
        """
        T, past = idx.size(1), cache.length if cache is not None else 0
        if cache is None and T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit block_size {self.config.block_size}")
        pos = torch.arange(T, device=idx.device) + past
        x = self.transformer.wte(idx) + self.transformer.wpe(pos.clamp(max=self.config.block_size - 1))
        x = self.transformer.drop(x) if self.training else x
        mask = None  # else (T, keys), 0 or -inf: token i of the new ones sees the past and the new ones up to itself
        if isinstance(past, torch.Tensor):
            keys = torch.arange(cache.kv[0].size(3), device=idx.device)
            mask = torch.zeros(T, len(keys), dtype=x.dtype, device=idx.device)
            mask = mask.masked_fill(keys > pos.unsqueeze(-1), float("-inf"))
        elif past and T > 1:
            mask = torch.full((T, past + T), float("-inf"), dtype=x.dtype, device=idx.device).triu_(past + 1)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, layer, cache, mask)
        if cache is not None:
            cache.length = past + T
        return self.transformer.ln_f(x)

    def target_logits(self, e):
        """The model's own next-token law, which decoding must reproduce, up to a constant: e (..., C) -> (..., V)."""
        if self.cp_head is None or self.config.target == "lm_head":
            return fp32(self.lm_head(e))
        log_w = self.cp_head.log_weights(e).unsqueeze(-1)  # (..., r, 1)
        log_p = self.cp_head.logits(e, self.lm_head.weight, slice(0, 1)).squeeze(-3).log_softmax(-1)  # (..., r, V)
        return torch.logsumexp(log_w + log_p, dim=-2)  # log sum_a w_a P_a^(1)

    def cp_factors(self, e):
        """All of equation (1) at one hidden state: e (C,) -> log w (r,) and a function factor.

        factor(s, previous) is log P_a^(s) (r, n_token), s = 1..n, given the token x_{s-1} = previous (1,), which has no
        effect at s = 1 and without context. With r = 1, where no factors are mixed, (1, V), up to a constant.
        """
        head, W = self.cp_head, self.lm_head.weight
        log_w = head.log_weights(e) if self.config.rank > 1 else fp32(e.new_zeros(1))  # w = 1

        def log_probs(logits):  # without the padding: if it had all the mass, nothing would be left to draw from
            return logits[..., : self.config.n_token].log_softmax(-1) if self.config.rank > 1 else logits

        if not head.sees_previous:
            log_p = log_probs(head.logits(e, W)).unbind()
            return log_w, lambda s, previous: log_p[s - 1]
        h, gates = head.vectors(e).unbind(), head.gates(e).unbind()

        def factor(s, previous):
            h_s = h[s - 1]  # (r, C)
            if s > 1:
                h_s = h_s + head.previous_term(W.index_select(0, previous), gates[s - 2])
            return log_probs(fp32(F.linear(h_s, W)))

        return log_w, factor

    def forward(self, idx):
        """Next-token logits at every position: idx (B, T) -> (B, T, V)."""
        return self.target_logits(self.hidden(idx))

    def loss(self, idx, targets, joint_weight=1.0, balance_weight=0.0, joint_share=1.0, sample_component=False):
        """The training loss and its parts, in nats.

        idx (B, T); targets (B, T, n): targets[b, t, s - 1] is the token s places after idx[b, t].
        target "marginal": joint + balance_weight * balance
        target "lm_head":  next + joint_weight * joint + balance_weight * balance
        joint_share < 1: the head sees that share of the positions, drawn anew every time, at that share of its cost.
        The loss stays unbiased, and neighbouring windows share n - 1 of their tokens anyway.
        sample_component: train one component of each position's, see CPHead.sampled_joint.
        Returns the loss and a dict of detached parts: next (next-token loss of the target law), joint (-log P of
        the window, per token), offset (n,) (-log P(x_{t+s} | x_{t+1..t+s-1}); its mean is joint), balance (see
        balance_loss), usage (r,) (mean weight of each component).
        """
        e = self.hidden(idx).flatten(0, 1)  # (N, C), N = B * T
        targets, unembed = targets.flatten(0, 1), self.lm_head.weight
        if self.cp_head is None:
            loss = F.cross_entropy(fp32(self.lm_head(e)), targets[:, 0])
            return loss, dict(next=loss.detach(), joint=loss.detach(), offset=loss.detach()[None])
        if self.config.target == "lm_head":
            next_loss = -gold_log_prob(e, unembed, targets[:, 0], len(e)).mean()
        if joint_share < 1:
            some = torch.randperm(len(e), device=e.device)[: math.ceil(joint_share * len(e))]
            e, targets = e[some], targets[some]
        log_w = self.cp_head.log_weights(e)  # (N, r)
        if sample_component and self.config.rank > 1:
            joint = self.cp_head.sampled_joint(log_w, e, targets, unembed)  # (N, n)
        else:
            joint = joint_log_probs(log_w, self.cp_head.gold_log_probs(e, targets, unembed))
        joint_loss, balance = -joint[:, -1].mean() / self.config.n_future, balance_loss(log_w)
        offset = -joint.detach().mean(0).diff(prepend=joint.new_zeros(1))  # chain rule: log P(x_s | x_<s)
        if self.config.target == "lm_head":
            loss = next_loss + joint_weight * joint_loss + balance_weight * balance
        else:
            loss, next_loss = joint_loss + balance_weight * balance, offset[0]
        parts = dict(next=next_loss, joint=joint_loss, offset=offset, balance=balance, usage=log_w.exp().mean(0))
        return loss, {name: part.detach() for name, part in parts.items()}

    def n_params(self):
        """Parameters of the trunk (embeddings included, the tied unembedding counted once) and of the head."""
        head = sum(p.numel() for p in self.cp_head.parameters()) if self.cp_head else 0
        return sum(p.numel() for p in self.parameters()) - head, head

    def checkpoint(self):
        """Plain tensors and plain Python, in nanoGPT's layout: what from_checkpoint needs."""
        return {"model": self.state_dict(), "model_args": asdict(self.config)}

    @classmethod
    def from_checkpoint(cls, ckpt, fresh_head=False, **head):
        """The model of a checkpoint dict, ours or one of nanoGPT's train.py, loaded strictly.

        `head` overrides fields of GPTConfig (n_future, rank, factors, context, target, dropout, n_token). Where they
        ask for another head than the checkpoint's, or with fresh_head, that one is left out and a fresh one is put on
        the trunk. If only the context is another, the rest of the head stays: with "previous" the new part is 0 yet.
        """
        known = {f.name for f in fields(GPTConfig)}
        old = GPTConfig(**{k: v for k, v in ckpt["model_args"].items() if k in known})
        config = replace(old, **head)
        # nanoGPT saves a compiled model's names with a prefix, and old versions saved the causal mask
        state = {k.removeprefix("_orig_mod."): v for k, v in ckpt["model"].items() if not k.endswith(".attn.bias")}
        model = cls(config)
        fresh = {k: v for k, v in model.state_dict().items() if k.startswith("cp_head.")}
        if fresh_head or any(getattr(old, k) != getattr(config, k) for k in ("n_future", "rank", "factors")):
            state = {k: v for k, v in state.items() if not k.startswith("cp_head.")} | fresh
        elif old.context != config.context:  # add or drop just what the context needs
            needs = ("cp_head.gate", "cp_head.out")
            state = {k: v for k, v in state.items() if k not in needs} | {k: fresh[k] for k in needs if k in fresh}
        model.load_state_dict(state)
        return model
