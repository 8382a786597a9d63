"""A GPT that predicts its next n tokens at once, as a rank-r CP decomposition of their joint.

The trunk is GPT-2 with nanoGPT's parameter names and shapes: a checkpoint of nanoGPT's train.py
loads strictly and gives the same logits. On top sits a head. The CP head (arXiv 2410.17765) is a
mixture of r experts, each of which is a product of n softmax factors on the same hidden state e of
position t:

    P(x_{t+1}, ..., x_{t+n} | x_{<=t}) = sum_a w_a(e) * prod_s P_a^(s)(x_{t+s} | e)             (1)

Read `CPHead` first, then `GPT.loss`. Other heads are files of their own, see `door`.

Shapes use the field's names: B batch, T time, N = B * T, C = n_embd, V = vocab_size, n = n_future,
r = rank, k drafts. An offset s = 1..n counts the tokens from position t on. Log-probabilities are
float32 or wider, whatever the model is.
"""

import importlib
import math
import re
from dataclasses import asdict, dataclass
from functools import partial
from numbers import Integral
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class BadInput(ValueError):
    """What a user, a file or a setting got wrong, in one line.

    A script prints that line and ends; a bug is another exception and keeps its traceback.
    """


@dataclass
class GPTConfig:
    # the trunk, as in nanoGPT
    block_size: int = 1024
    vocab_size: int = 50304  # rows of the embedding: the tokenizer's size, padded for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    # the head
    head: str = "cp"  # "cp" is CPHead; another word opens a file, see `door`
    n_future: int = 1  # n, tokens predicted at once; 1 is plain nanoGPT without a head
    rank: int = 1  # r, components of the mixture; 1 is independent heads
    target: str = "marginal"  # p(next token): "marginal", sum_a w_a P_a^(1); "lm_head", the trunk's
    n_token: int = 0  # ids below this are real tokens, the rest is padding; 0 means all of them

    def __post_init__(self):
        self.n_token = self.n_token or self.vocab_size
        counts = ("vocab_size", "n_layer", "n_head", "n_embd", "n_future", "rank", "n_token")
        for name, least in [("block_size", 2), *((name, 1) for name in counts)]:
            setattr(self, name, whole(name, getattr(self, name), least))
        if self.n_embd % self.n_head:
            raise BadInput(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise BadInput(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        if not isinstance(self.bias, bool):  # any text would be true
            raise BadInput(f"bias must be True or False, not {self.bias!r}")
        if self.n_token > self.vocab_size:
            raise BadInput(f"n_token {self.n_token} is more than vocab_size {self.vocab_size}")
        if self.target not in ("marginal", "lm_head"):
            raise BadInput(f"target must be marginal or lm_head, not {self.target!r}")
        head_class(self.head)


def whole(name, value, least):
    """value as an int; BadInput unless it is whole. To Python, True is 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise BadInput(f"{name} must be a whole number of at least {least}, not {value!r}")
    return int(value)


def widen(x):
    """x in float32 at least: half precision is widened, float64 stays float64."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# -----------------------------------------------------------------------------
# doors: what a word of the user's or of a checkpoint's opens

ROOT = Path(__file__).resolve().parent
FOLDERS = {"head": "heads", "mode": "decoders", "trunk": "pretrained"}
OPENS = {"head": r"^class Head\b", "mode": r"^def generate\(", "trunk": r"^def load\("}


def words(kind):
    """The words of a kind: the names of the files that define what the door opens."""
    files = [f for f in (ROOT / FOLDERS[kind]).glob("*.py") if f.stem.isidentifier()]
    return sorted(f.stem for f in files
                  if re.search(OPENS[kind], f.read_text("utf-8", errors="replace"), re.MULTILINE))


def door(kind, word):
    """The module behind a word: --head chain is the file chain.py with a class Head in it.

    Only files that are there can be named: a checkpoint's word imports nothing else.
    """
    if word not in words(kind):
        there = ["cp"] * (kind == "head") + words(kind)
        raise BadInput(f"{kind} must be one of {', '.join(there)}, not {word!r}")
    return importlib.import_module(f"{FOLDERS[kind]}.{word}")


def head_class(name):
    return CPHead if name == "cp" else door("head", name).Head


def new_model(config):
    """The model of a config: a GPT, or the class Model of a head that looks into the trunk."""
    found = {} if config.head == "cp" or config.n_future == 1 else vars(door("head", config.head))
    return found.get("Model", GPT)(config)


# -----------------------------------------------------------------------------
# the trunk


class KVCache:
    """Keys and values of every layer, preallocated, and how many positions of them are valid.

    Rolling back to m positions is `cache.length = m`: later rows are stale, attention never reads
    them, and the next tokens overwrite them.
    """

    def __init__(self, config, B, dtype, device):
        shape = (2, B, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.kv = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.length = 0

    def append(self, layer, kv):
        """Write kv (2, B, nh, T, hs) after a layer's valid rows: -> (2, B, nh, length + T, hs)."""
        T = kv.size(3)
        self.kv[layer].narrow(3, self.length, T).copy_(kv)
        return self.kv[layer].narrow(3, 0, self.length + T)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x, layer, cache, mask):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q, kv = qkv[0], qkv[1:]  # (B, nh, T, hs), (2, B, nh, T, hs)
        k, v = kv if cache is None else cache.append(layer, kv)
        # is_causal lines q up with the FIRST keys, so it is right only where there is no past
        dropout, is_causal = self.dropout if self.training else 0.0, T > 1 and mask is None
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
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
# the head


class CPHead(nn.Module):
    """The CP head of the paper, reduced: P_a^(s) = softmax(W M_a^(s) e), with the trunk's W.

    A head is three methods: `log_joint` is what it learns by, `rows` are the exact conditionals of
    its joint along given tokens, `draft` draws a window. A head of your own is a file with a class
    Head(CPHead), and --head finds it by the file's name. A simple one overrides `vectors` alone
    (and __init__, for parameters of its own). test_cp_head.py runs over all heads.

    The components must not start as copies of one another: where they agree, the router has no
    gradient, so nothing would ever part them.
    """

    def __init__(self, config):
        super().__init__()
        n, r, C = config.n_future, config.rank, config.n_embd
        self.rank = r
        self.router = nn.Linear(C, r) if r > 1 else None  # w = softmax(router(e))
        self.maps = nn.Parameter(torch.eye(C) + 0.02 * torch.randn(n, r, C, C))  # M_a^(s)

    def log_weights(self, e, x1=None, unembed=None):
        """log w: e (..., C) -> (..., r). Here they look at e alone; a head may ask for x_1 (...)."""
        if self.router is None:  # one component has it all
            return widen(e.new_zeros(*e.shape[:-1], 1))
        return F.log_softmax(widen(self.router(e)), dim=-1)

    def vectors(self, e, offsets=slice(None)):
        """h_a^(s) = M_a^(s) e of a slice of the offsets 1..n: e (..., C) -> (..., n', r, C)."""
        M = self.maps[offsets]  # (n', r, C, C)
        return F.linear(e, M.flatten(0, 2)).view(*e.shape[:-1], *M.shape[:3])

    def logits(self, h, unembed):
        """W h_a^(s): h (..., C), unembed W (V, C) -> (..., V)."""
        # contiguous: of a slice, torch would copy W for each row
        return widen(F.linear(h.contiguous(), unembed))

    def all_logits(self, e, offsets, unembed):
        """Those of all factors at a slice of the offsets: e (..., C) -> (..., n', r, V)."""
        return self.logits(self.vectors(e, offsets), unembed)

    def log_joint(self, e, gold, unembed):
        """log P of the first 1, 2, ..., n gold tokens, (1): e (N, C), gold (N, n) -> (N, n)."""
        log_p = self.gold_log_probs(e, gold, unembed)  # (N, n, r)
        return joint_log_probs(self.log_weights(e), log_p)

    def gold_log_probs(self, e, gold, unembed):
        """log P_a^(s) of the gold tokens alone: e (N, C), gold (N, n) -> (N, n, r)."""
        h = self.vectors_along(e, gold[:, :-1], unembed)  # (N, n, r, C)
        return gold_log_prob(h, unembed, gold.unsqueeze(-1))

    def vectors_along(self, e, tokens, unembed):
        """h_a^(s), s = 1..k + 1, given tokens x_1..x_k (N, k): (N, k + 1, r, C).

        Here they look at e alone.
        """
        return self.vectors(e, slice(tokens.size(1) + 1))

    def rows(self, e, tokens, unembed):
        """log P(x_{s+1} = . | x_1, ..., x_s), s = 1..k, the exact conditionals of (1):
        e (N, C), tokens x_1..x_k (N, k) -> (N, k, V)."""
        log_P = self.logits(self.vectors_along(e, tokens, unembed), unembed).log_softmax(-1)
        if self.rank == 1:  # (N, k + 1, 1, V)
            return log_P[:, 1:, 0]
        seen = self.along(log_P[:, :-1], tokens)  # (N, k, r)
        log_b = (self.log_weights(e).unsqueeze(1) + seen.cumsum(1)).log_softmax(-1)  # (N, k, r)
        return torch.logsumexp(log_b.unsqueeze(-1) + log_P[:, 1:], dim=2)

    def log_marginal(self, e, unembed):
        """log sum_a w_a P_a^(1), the target "marginal": e (..., C) -> (..., V)."""
        log_P = self.all_logits(e, slice(1), unembed).log_softmax(-1)  # (..., 1, r, V)
        return torch.logsumexp(self.log_weights(e).unsqueeze(-1) + log_P.squeeze(-3), dim=-2)

    def draft(self, e, x1, n_drafts, sampler, unembed):
        """Draw x_2, ..., x_{k+1} from the joint at e, given x_1; k = n_drafts >= 1.

        e (B, C) and x1 (B,) of B texts -> the drafts (B, k), and the rows q (B, k, V) they were
        drawn from, or None where the sampler does not look at them. A head may draft fewer than k.

            b_a ~ w_a * P_a^(1)(x_1)         which component does x_1 point to?                 (2)
            a ~ b,   x_s ~ P_a^(s)           one draw, and one more for all tokens of the window
            b_a^(s) ~ b_a * prod_{2<=j<s} P_a^(j)(x_j),   q_s = sum_a b_a^(s) P_a^(s)           (3)

        So the drafts are a sample of the mixture, and q_s its exact conditional along that sample.
        """
        if self.rank == 1:  # independent heads: b says nothing
            return sampler.draw(self.all_logits(e, slice(1, n_drafts + 1), unembed).squeeze(2))
        P = self.all_logits(e, slice(n_drafts + 1), unembed).softmax(-1)  # (B, k + 1, r, V)
        log_b = self.log_weights(e) + self.log_along(P[:, 0], x1)  # (B, r), (2)
        return self.window(log_b, P[:, 1:], x1, sampler)

    def window(self, log_b, P, x1, sampler):
        """The drafts and q of `draft`: log b (B, r) given x_1, and P_a^(s) of them (B, k, r, V)."""
        if not sampler.plain:  # warping a row does not commute with the mixture
            return walk(Mixture(self, log_b, P).row, x1, P.size(1), sampler)
        a = sampler.pick(log_b.softmax(-1))  # (B,)
        x = sampler.pick(P[torch.arange(len(a), device=a.device), :, a])  # (B, k), from (B, k, V)
        seen = F.pad(self.log_along(P, x), (0, 0, 1, -1))  # (B, k, r): 0, then of the drafts before
        b = (log_b.unsqueeze(1) + seen.cumsum(1)).softmax(-1)  # (B, k, r)
        return x, (b.unsqueeze(2) @ P).squeeze(2)  # (3)

    def along(self, P, x):
        """The columns of tokens x (...) in P (..., r, V) -> (..., r)."""
        index = x.unsqueeze(-1).unsqueeze(-1).expand(*P.shape[:-1], 1)
        return P.gather(-1, index).squeeze(-1)

    def log_along(self, P, x):
        """Their logs, and finite: a token that no component has points to none of them."""
        return self.along(P, x).clamp_min(1e-30).log()


class Mixture:
    """The rows q_s of (3) one after another, along tokens that are told one by one.

    What has the size r x V is computed before: P (B, k, r, V), and log b (B, r), which knows x_1.
    """

    def __init__(self, head, log_b, P):
        self.head, self.log_b = head, log_b
        self.P, self.P_x = [*P.unbind(1)], None  # of the places to come, of x_s: (B, r, V)

    def row(self, x):
        """x_s (B,) -> log q_{s+1} (B, V), for s = 1, 2, ..., k."""
        if self.P_x is not None:  # else x is x_1
            self.log_b = self.log_b + self.head.log_along(self.P_x, x)  # (B, r)
        self.P_x = self.P.pop(0)
        return torch.bmm(self.log_b.softmax(-1).unsqueeze(1), self.P_x).squeeze(1).log()


def walk(row, x1, n_drafts, sampler):
    """`CPHead.draft` token by token, for samplers that change a row before they draw from it, and
    for heads whose rows depend on the drafts: row(x_s) -> log q_{s+1} (B, V), up to a constant."""
    x, q = [x1], []
    for _ in range(n_drafts):
        x_s, q_s = sampler.draw(row(x[-1]))  # (B,), (B, V)
        x.append(x_s)
        q.append(q_s)
    return torch.stack(x[1:], 1), None if q[0] is None else torch.stack(q, 1)


# -----------------------------------------------------------------------------
# the parts of the loss


def joint_log_probs(log_w, log_p):
    """log P of the first 1, 2, ..., n tokens, (1): log_w (N, r), log_p (N, n, r) -> (N, n)."""
    return torch.logsumexp(log_w.unsqueeze(1) + log_p.cumsum(1), dim=-1)


def balance_loss(log_w):
    """Load balancing, r * sum_a f_a m_a (Switch Transformers, arXiv 2101.03961): (N, r) -> scalar.

    f_a is the share of positions whose largest weight is a (no gradient), m_a the mean weight over
    the batch. It is 1 when the components share the work, and r when one does it all. It looks at
    the batch mean: every single position stays free to choose one component.
    """
    w, r = log_w.exp(), log_w.size(-1)
    f = F.one_hot(w.argmax(-1), r).to(w.dtype).mean(0)
    return r * (f * w.mean(0)).sum()


def gold_log_prob(h, weight, y):
    """log softmax(weight h)[y]: h (N, ..., C), weight (V, C), y that expands to (N, ...).

    Goes through the rows in chunks, whose logits the backward pass computes again instead of
    keeping them. A chunk has no more rows than there are positions N (256 at least), so memory
    holds at most the logits of plain training, and never the (B, T, n, r, V) of all factors.
    """
    def chunk(x, weight, y):
        return -F.cross_entropy(widen(F.linear(x, weight)), y, reduction="none")

    # fits a CPU's cache; fills a GPU, which is slow at many small chunks
    least, most = (0, 2**20) if h.device.type == "cpu" else (2**24, 2**27)  # logits
    n_rows = max(256, least // len(weight), min(len(h), most // len(weight)))
    recompute = partial(checkpoint, chunk, use_reentrant=False, preserve_rng_state=False)
    shape = h.shape[:-1]
    pieces = zip(h.flatten(0, -2).split(n_rows), y.expand(shape).flatten().split(n_rows))
    return torch.cat([recompute(x_i, weight, y_i) for x_i, y_i in pieces]).view(shape)


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
        for name, p in self.named_parameters():  # as GPT-2 scales residual projections
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
        self.head = head_class(config.head)(config) if config.n_future > 1 else None

    @staticmethod
    def _init_weights(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def device(self):
        return self.lm_head.weight.device

    @property
    def dtype(self):
        return self.lm_head.weight.dtype

    @property
    def unembed(self):
        """The rows of W of real tokens, (n_token, C), over which drafts are softmaxes."""
        return self.lm_head.weight[: self.config.n_token]

    def new_cache(self, B=1):
        return KVCache(self.config, B, self.dtype, self.device)

    def hidden(self, idx, cache=None, places=None, mask=None):
        """The hidden states after the final norm: idx (B, T) -> (B, T, C), or wider where the head
        looks further into the trunk, see `split`.

        With a KVCache, idx continues the tokens that are in it, and cache.length grows by T. places
        (B, T) and an additive mask (B, 1, T, ...) are for texts of different lengths, whose cache
        counts for itself.
        """
        T, past = idx.size(1), 0 if cache is None else cache.length
        own = places is None
        if own:
            if past + T > self.config.block_size:
                size = self.config.block_size
                raise ValueError(f"{past + T} tokens do not fit block_size {size}")
            places = slice(past, past + T)
            if past and T > 1:  # a token sees the past and the new ones up to itself
                mask = torch.full((T, past + T), -math.inf, dtype=self.dtype, device=idx.device)
                mask = mask.triu_(past + 1)
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[places]
        x = self.transformer.drop(x) if self.training else x
        x = self.through_blocks(x, cache, mask)
        if own and cache is not None:
            cache.length = past + T
        return x

    def through_blocks(self, x, cache, mask):
        """Embedded tokens x (B, T, C) through all blocks and the final norm."""
        for layer, block in enumerate(self.transformer.h):
            x = block(x, layer, cache, mask)
        return self.transformer.ln_f(x)

    def split(self, hidden):
        """What the target looks at, (..., C), and what the head does: here the same."""
        return hidden, hidden

    def target_logits(self, hidden):
        """log p(next token), up to a constant, of the target: hidden (..., C) -> (..., n_token)."""
        e, seen = self.split(hidden)
        if self.head is None or self.config.target == "lm_head":
            logits = self.lm_head(e)
        else:
            logits = self.head.log_marginal(seen, self.lm_head.weight)
        return widen(logits)[..., : self.config.n_token]

    def forward(self, idx, gold=None, **weights):
        """As in nanoGPT: logits of the next token (B, T, n_token), or with gold the `loss`."""
        if gold is None:
            return self.target_logits(self.hidden(idx))
        return self.loss(idx, gold, **weights)

    def loss(self, idx, gold, joint_weight=1.0, balance_weight=0.0, joint_share=1.0):
        """The training loss and its parts, in nats.

        idx (B, T); gold (B, T, n): gold[b, t, s - 1] is the token s places after idx[b, t].
            target "marginal": joint + balance_weight * balance
            target "lm_head":  next + joint_weight * joint + balance_weight * balance
        joint_share < 1: the joint sees that share of the positions, drawn anew every time, at that
        share of its cost. The loss stays unbiased, and neighbouring windows share n - 1 of their
        tokens anyway.

        Returns the loss and a dict of detached parts: next (next-token loss of the target), joint
        (-log P of the window, per token), offset (n,) (-log P(x_{t+s} | x_{t+1..t+s-1}); its mean
        is joint), balance (see balance_loss), usage (r,) (mean weight of each component).
        """
        e, seen = self.split(self.hidden(idx).flatten(0, 1))  # (N, C) each
        gold, W = gold.flatten(0, 1), self.lm_head.weight  # (N, n), (V, C)
        if self.head is None:
            loss = F.cross_entropy(widen(self.lm_head(e)), gold[:, 0])
            return loss, dict(next=loss.detach(), joint=loss.detach(), offset=loss.detach()[None])

        log_w = self.head.log_weights(seen, gold[:, 0], W)  # (N, r)
        balance = balance_loss(log_w)
        some = slice(None)  # positions that the joint sees
        if joint_share < 1:
            some = torch.randperm(len(e), device=e.device)[: math.ceil(joint_share * len(e))]
        joint = self.head.log_joint(seen[some], gold[some], W)  # (positions, n)
        joint_loss = -joint[:, -1].mean() / self.config.n_future
        offset = -joint.detach().mean(0).diff(prepend=joint.new_zeros(1))  # -log P(x_s | x_<s)

        if self.config.target == "lm_head":
            next_loss = -gold_log_prob(e, W, gold[:, 0]).mean()
            loss = next_loss + joint_weight * joint_loss + balance_weight * balance
        else:
            next_loss = offset[0]
            loss = joint_loss + balance_weight * balance
        parts = dict(next=next_loss, joint=joint_loss, offset=offset, balance=balance,
                     usage=log_w.exp().mean(0))
        return loss, {name: part.detach() for name, part in parts.items()}

    def n_params(self):
        """Parameters of the trunk (embeddings included, the tied one counted once), of the head."""
        head = sum(p.numel() for p in self.head.parameters()) if self.head else 0
        return sum(p.numel() for p in self.parameters()) - head, head

    def to_checkpoint(self):
        """Plain tensors and plain Python, in nanoGPT's layout; common.py reads it."""
        return {"model": self.state_dict(), "model_args": asdict(self.config)}
