"""A GPT that predicts its next n tokens at once, as a rank-r CP decomposition of their joint.

The trunk is GPT-2 with nanoGPT's parameter names and shapes: a checkpoint of nanoGPT's train.py
loads strictly and gives the same logits. On top sits a head. The CP head (arXiv 2410.17765) is a
mixture of r experts, each of which is a product of n softmax factors on the same hidden state e of
position t:

    P(x_{t+1}, ..., x_{t+n} | x_{<=t}) = sum_a w_a(e) * prod_s P_a^(s)(x_{t+s} | e)             (1)

Read `GPT.loss` first, then `CPHead`. The other heads are in heads/: --head names a file there.

Shapes use the field's names: B batch, T time, N = B * T, C = n_embd, V = vocab_size, n = n_future,
r = rank. An offset s = 1..n counts the tokens from position t on. Log-probabilities are float32 or
wider, whatever the model is.
"""

import importlib
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class BadInput(ValueError):
    """What a user, a file or a setting got wrong, in one line.

    A script prints that line and ends; a bug is another exception and keeps its traceback.
    """


# -----------------------------------------------------------------------------
# the door: files in folders, by a word of the user's or of a checkpoint's

ROOT = Path(__file__).resolve().parent
FOLDERS = {"head": "heads", "mode": "decoders", "trunk": "pretrained"}


def words(kind):
    """The words that open a door of a kind: names of files with a class Head or a function generate."""
    what = {"head": "\nclass Head(", "mode": "\ndef generate("}.get(kind, "")
    return sorted(path.stem for path in (ROOT / FOLDERS[kind]).glob("*.py")
                  if what in path.read_text(encoding="utf-8") and path.stem != "__init__")


def door(kind, word):
    """The module behind a word of the user's or of a checkpoint's: a file that is there, and nothing else."""
    if word not in words(kind):
        raise BadInput(f"{kind} must be one of {', '.join(words(kind))}, not {word!r}")
    return importlib.import_module(f"{FOLDERS[kind]}.{word}")


def head_class(name):
    """CPHead for "cp", else the class Head of the file of that name."""
    return CPHead if name == "cp" else door("head", name).Head


# -----------------------------------------------------------------------------
# the configuration

HEAD_FIELDS = ("head", "n_future", "rank", "draft_vocab")  # of GPTConfig: which head it is


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
    head: str = "cp"  # "cp", or a file in heads/
    n_future: int = 1  # n, tokens predicted at once; 1 is plain nanoGPT without a head
    rank: int = 1  # r, components of the mixture; 1 is independent heads
    target: str = "marginal"  # p(next token): "marginal", sum_a w_a P_a^(1); "lm_head", the trunk's
    n_token: int = 0  # ids below this are real tokens, the rest is padding; 0 means all of them
    draft_vocab: int = 0  # K, how many tokens the head can draft; 0 means all of them

    def __post_init__(self):
        self.n_token = self.n_token or self.vocab_size
        whole = ("vocab_size", "n_layer", "n_head", "n_embd", "n_future", "rank", "n_token")
        for name, least in [("block_size", 2), *((name, 1) for name in whole)]:
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise BadInput(f"{name} must be a whole number of at least {least}, not {value!r}")
        if self.n_embd % self.n_head:
            raise BadInput(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise BadInput(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        if self.n_token > self.vocab_size:
            raise BadInput(f"n_token {self.n_token} is more than vocab_size {self.vocab_size}")
        heads = ("cp", *words("head"))
        if self.head not in heads:
            raise BadInput(f"head must be one of {', '.join(heads)}, not {self.head!r}")
        if self.target not in ("marginal", "lm_head"):
            raise BadInput(f"target must be marginal or lm_head, not {self.target!r}")
        K = self.draft_vocab
        if not isinstance(K, int) or not 0 <= K <= self.n_token:
            raise BadInput(f"draft_vocab must be a whole number from 0 to {self.n_token}, the tokens that "
                           f"there are, not {K!r}")
        if K and (self.target != "lm_head" or self.head == "full"):
            raise BadInput("draft_vocab needs target lm_head, as the marginal gives every token a "
                           "probability, and another head than full, whose unembeddings are its own")


def widen(x):
    """x in float32 at least: half precision is widened, float64 stays float64."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


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


def causal_mask(x, past):
    """A token of x (B, T, C) sees the past and the new ones up to itself: 0, else -inf, (T, past + T).
    None where is_causal says the same, or where there is nothing to hide."""
    T = x.size(1)
    if not past or T == 1:
        return None
    mask = torch.full((T, past + T), -math.inf, dtype=x.dtype, device=x.device)
    return mask.triu_(past + 1)


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
        # is_causal lines q up with the FIRST keys, so it is right only without a past: else the mask
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
# the heads

NO_PLACE = -100  # of a token that cannot be drafted; F.cross_entropy ignores it


class CPHead(nn.Module):
    """The CP head of the paper, reduced: P_a^(s) = softmax(W M_a^(s) e), with the trunk's W.

    A head of your own is a subclass named Head, in a file of heads/, which overrides what differs:

        vectors        h_a^(s), which W turns into logits, from e alone, for the offsets asked for:
                       with __init__ and new_maps, all that an MLP in the place of M changes
        new_maps       what the maps M start as
        vectors_along  h_a^(s) in training, where it may also see the gold tokens before x_{t+s}
        start, rows    the same in decoding, one offset after another; then set sees_drafts

    At s = 1 there are no such tokens: log_marginal, the target "marginal", is from vectors alone.
    test_cp_head.py runs over the heads and says where these methods do not agree.

    The components must not start as copies of one another: where they agree, the router has no
    gradient, and nothing but its own noise parts them.

    With draft_vocab = K, the head drafts K tokens alone (FR-Spec, arXiv 2502.14856): it keeps their
    rows of W, which must be frozen, and its rows have K places. See `choose_drafts`.
    """

    sees_drafts = False  # whether P_a^(s) depends on the tokens between t and t + s
    reads_trunk = False  # whether `see` needs more of the trunk than some of its last states
    extends, added = None, ()  # the head that a trained one can become this by adding parameters
    text = None  # the cache in which GPT.loss lets a head's own positions through: see heads/masks.py

    def __init__(self, config):
        super().__init__()
        self.rank = config.rank
        self.router = nn.Linear(config.n_embd, config.rank)  # w = softmax(router(e))
        self.maps = nn.Parameter(self.new_maps(config))
        K, C = config.draft_vocab, config.n_embd
        self.register_buffer("draft_ids", torch.zeros(K, dtype=torch.long) if K else None)
        self.register_buffer("draft_rows", torch.zeros(K, C) if K else None)

    @staticmethod
    def new_maps(config):
        """M_a^(s) (n, r, C, C): the identity and noise."""
        C = config.n_embd
        return torch.eye(C) + 0.02 * torch.randn(config.n_future, config.rank, C, C)

    @staticmethod
    def carrier(model):
        """The model that decodes with this head: another one if its passes carry more than tokens."""
        return model

    def attach(self, model):
        """The head, put on a GPT. For heads that look into its trunk."""
        return self

    def see(self, e, cache=None):
        """What the head drafts from, given the hidden states e (..., T, C) of T tokens, which are the
        last ones in cache: here these themselves, but a head may have layers of its own."""
        return e

    def log_weights(self, e):
        """log w: e (..., C) -> (..., r)."""
        return F.log_softmax(widen(self.router(e)), dim=-1)

    def vectors(self, e, offsets=slice(None)):
        """h_a^(s) = M_a^(s) e of a slice of the offsets 1..n: e (..., C) -> (..., n', r, C)."""
        M = self.maps[offsets]  # (n', r, C, C)
        return F.linear(e, M.flatten(0, 2)).view(*e.shape[:-1], *M.shape[:3])

    def logits(self, e, unembed, offsets=slice(None)):
        """W h_a^(s): e (..., C), unembed W (V, C) -> (..., n', r, V)."""
        return self.unembed(self.vectors(e, offsets), unembed)

    def unembed(self, h, unembed):
        """W h, of the tokens that can be drafted: h (..., C) -> (..., V), or (..., K)."""
        # contiguous: of a slice, torch would copy W for each row
        return widen(F.linear(h.contiguous(), self.drafted_rows(unembed)))

    # training: all positions at once, along the gold tokens

    def log_conditionals(self, e, gold, unembed):
        """The rows (2) along the gold tokens, log P(x_s | x_1..x_{s-1}) of all tokens that can be
        drafted, s = 2..n: e (N, C), gold (N, n) -> (N, n - 1, V or K)."""
        h = self.vectors_along(e, gold, unembed)  # (N, n, r, C)
        if self.rank == 1:
            return self.unembed(h[:, 1:, 0], unembed).log_softmax(-1)
        log_p = self.unembed(h, unembed).log_softmax(-1)  # (N, n, r, V)
        seen = self.of_tokens(log_p[:, :-1], gold[:, :-1])  # (N, n - 1, r)
        log_b = self.prefixes(e, seen)  # (N, n - 1, r)
        return torch.logsumexp(log_b.log_softmax(-1).unsqueeze(-1) + log_p[:, 1:], dim=2)

    def prefixes(self, e, seen):
        """log P(x_1, ..., x_s and the component of x_{s+1} is a), s = 1..k, given e: a component keeps
        to the window. e (N, C), seen (N, k, r) = log P_a^(s)(x_s) -> (N, k, r)."""
        return self.log_weights(e).unsqueeze(1) + seen.cumsum(1)

    def log_joint(self, e, gold, unembed):
        """log P of the first 1, 2, ..., n gold tokens, (1): e (N, C), gold (N, n) -> (N, n)."""
        return joint_log_probs(self.log_weights(e), self.gold_log_probs(e, gold, unembed))

    def gold_log_probs(self, e, gold, unembed):
        """log P_a^(s) of the gold tokens alone: e (N, C), gold (N, n) -> (N, n, r)."""
        h = self.vectors_along(e, gold, unembed)  # (N, n, r, C)
        y = self.places(gold).unsqueeze(-1).expand(h.shape[:-1])
        W = self.drafted_rows(unembed)
        return gold_log_prob(h.flatten(0, -2), W, y.flatten(), len(e)).view(y.shape)

    def vectors_along(self, e, gold, unembed):
        """h_a^(s) given the gold tokens before x_{t+s}: e (N, C), gold (N, n) -> (N, n, r, C)."""
        return self.vectors(e)

    # decoding: hidden states e (B, C) of B texts, one offset after another; see `Conditionals`

    def start(self, e, unembed):
        """What `rows` needs at e: tensors with a row for each text, W itself, or tuples, lists and
        dicts of them. Here every row (B, n, r, V), as none depends on the drafts."""
        return self.logits(e, unembed).log_softmax(-1)

    def rows(self, state, s, x):
        """log P_a^(s) of all tokens given x (B,) = x_{t+s-1}: (B, r, V), each row normalised."""
        return state[:, s - 1]

    def prefix(self, state, s, log_b, seen):
        """`prefixes` in decoding, from that of s - 1, log_b (B, r), and seen (B, r): -> (B, r)."""
        return log_b + seen

    # the draft vocabulary

    def choose_drafts(self, ids, unembed):
        """Draft these ids (K,) from now on; unembed W (V, C) must not change after that."""
        self.draft_ids.copy_(ids.sort().values)
        self.draft_rows.copy_(unembed[self.draft_ids])

    def drafted_rows(self, unembed):
        """The rows of W (V, C) of the tokens that can be drafted: all of them, or (K, C)."""
        return unembed if self.draft_ids is None else self.draft_rows

    def places(self, x):
        """Where the tokens x stand in the rows; NO_PLACE where they cannot be drafted."""
        if self.draft_ids is None:
            return x
        place = torch.searchsorted(self.draft_ids, x.contiguous()).clamp_max(len(self.draft_ids) - 1)
        return torch.where(self.draft_ids[place] == x, place, NO_PLACE)

    def tokens_at(self, places):
        """The tokens that stand at places of the rows: undoes `places`."""
        return places if self.draft_ids is None else self.draft_ids[places]

    def of_tokens(self, log_p, x):
        """log P_a^(s) of tokens x (...) in rows (..., r, V or K) -> (..., r). A token that cannot be
        drafted says nothing of the component: 0 for all of them."""
        place = self.places(x)[..., None, None].expand(*log_p.shape[:-1], 1)
        if self.draft_ids is None:
            return log_p.gather(-1, place).squeeze(-1)
        seen = log_p.gather(-1, place.clamp_min(0)).masked_fill(place == NO_PLACE, 0.0)
        return seen.squeeze(-1)

    def all_tokens(self, rows, n_token):
        """Rows of logits (..., V or K) -> (..., n_token): -inf where a token cannot be drafted."""
        if self.draft_ids is None:
            return rows.narrow(-1, 0, n_token)
        whole = rows.new_full((*rows.shape[:-1], n_token), -math.inf)
        return whole.index_copy_(-1, self.draft_ids, rows)

    def log_marginal(self, e, unembed):
        """log sum_a w_a P_a^(1), the target "marginal": e (..., C) -> (..., V)."""
        log_p = self.logits(e, unembed, slice(0, 1)).squeeze(-3).log_softmax(-1)  # (..., r, V)
        return torch.logsumexp(self.log_weights(e).unsqueeze(-1) + log_p, dim=-2)


class Conditionals:
    """The rows that drafts are drawn from: log P(x_s | x_1, ..., x_{s-1}, e), one after another, for
    the states e (B, C) of B texts.

    The tokens so far say which component they came from, and the row is the exact conditional of
    equation (1):

        b_a ~ w_a * prod_{j<s} P_a^(j)(x_j),     q_s = sum_a b_a P_a^(s)                            (2)
    """

    def __init__(self, head, e, unembed, n_token):
        self.head, self.unembed, self.n_token, self.s = head, unembed, n_token, 1
        self.state = head.start(e, unembed)
        if head.rank > 1:
            self.log_b = head.log_weights(e)  # (B, r), up to a constant
            self.log_p = head.rows(self.state, 1, None)  # (B, r, V)

    def next(self, x):
        """Tokens x (B,) stand at offset s: -> log q_{s+1} (B, n_token), up to a constant."""
        return self.head.all_tokens(self.row(x), self.n_token)

    def row(self, x):
        """The same of the tokens that can be drafted: -> (B, V or K)."""
        self.s += 1
        if self.head.rank == 1:  # one component: its row is the conditional
            return self.head.rows(self.state, self.s, x).squeeze(1)
        seen = self.head.of_tokens(self.log_p, x)  # (B, r)
        self.log_b = self.head.prefix(self.state, self.s - 1, self.log_b, seen)
        self.log_p = self.head.rows(self.state, self.s, x)
        q = (self.log_b.softmax(-1).unsqueeze(1) @ self.log_p.exp()).squeeze(1)  # (B, V)
        # tiny: where all real tokens underflow next to the padding, the row is uniform and not NaN
        return q.clamp_min(torch.finfo(q.dtype).tiny).log()

    def follow(self, rows):
        """Go on with these of the B texts (B',), some of them several times or not at all."""
        def of(state):  # what a head keeps: tensors with a row for each text, and W
            if torch.is_tensor(state):
                return state if state is self.unembed else state[rows]
            if isinstance(state, dict):
                return {name: of(part) for name, part in state.items()}
            return type(state)(map(of, state))

        self.state = of(self.state)
        if self.head.rank > 1:
            self.log_b, self.log_p = self.log_b[rows], self.log_p[rows]


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


def gold_log_prob(x, weight, y, n_positions):
    """log softmax(weight x)[y] of many rows: x (M, C), weight (V, C), y (M,) -> (M,).

    Goes through the rows in chunks, whose logits the backward pass computes again instead of
    keeping them. A chunk has no more rows than there are positions (256 at least), so memory holds
    at most the logits of plain training, and never the (B, T, n, r, V) of all factors. 0 where y is
    NO_PLACE.
    """
    def chunk(x, weight, y):
        return -F.cross_entropy(widen(F.linear(x, weight)), y, reduction="none")

    # fits a CPU's cache; fills a GPU, which is slow at many small chunks
    least, most = (0, 2**20) if x.device.type == "cpu" else (2**24, 2**27)  # logits
    rows = max(256, least // len(weight), min(n_positions, most // len(weight)))
    recompute = partial(checkpoint, chunk, use_reentrant=False, preserve_rng_state=False)
    pieces = zip(x.split(rows), y.split(rows))
    return torch.cat([recompute(x_i, weight, y_i) for x_i, y_i in pieces])


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
        self.head = head_class(config.head)(config).attach(self) if config.n_future > 1 else None

    @staticmethod
    def _init_weights(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    @property
    def device(self):
        return self.lm_head.weight.device

    @property
    def dtype(self):
        return self.lm_head.weight.dtype

    def new_cache(self, B=1):
        return KVCache(self.config, B, self.dtype, self.device)

    def hidden(self, idx, cache=None):
        """The hidden states after the final norm: idx (B, T) -> (B, T, C).

        With a KVCache, idx continues the tokens that are in it, and cache.length grows by T.
        """
        T, past = idx.size(1), cache.length if cache is not None else 0
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens do not fit block_size {self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[past : past + T]
        x = self.transformer.drop(x) if self.training else x
        x = self.through_blocks(x, cache, causal_mask(x, past))
        if cache is not None:
            cache.length = past + T
        return x

    def through_blocks(self, x, cache, mask):
        """Embedded tokens x (B, T, C) through all blocks and the final norm."""
        for layer, block in enumerate(self.transformer.h):
            x = block(x, layer, cache, mask)
        return self.transformer.ln_f(x)

    def target_logits(self, e):
        """log p(next token), up to a constant, of the target: e (..., C) -> (..., n_token)."""
        if self.head is None or self.config.target == "lm_head":
            logits = self.lm_head(e)
        else:
            logits = self.head.log_marginal(e, self.lm_head.weight)
        return widen(logits)[..., : self.config.n_token]

    def conditionals(self, e):
        """The conditionals of the head's joint at hidden states e (B, C)."""
        return Conditionals(self.head, e, self.lm_head.weight, self.config.n_token)

    def forward(self, idx):
        """Next-token logits at every position: idx (B, T) -> (B, T, n_token)."""
        return self.target_logits(self.hidden(idx))

    def loss(self, idx, gold, joint_weight=1.0, balance_weight=0.0, joint_share=1.0):
        """The training loss and its parts, in nats.

        idx (B, T); gold (B, T, n): gold[b, t, s - 1] is the token s places after idx[b, t].
            target "marginal": joint + balance_weight * balance
            target "lm_head":  next + joint_weight * joint + balance_weight * balance (and a loss of
                               the head's own beside joint, if it has one: see heads/masks.py)
        joint_share < 1: the joint sees that share of the positions, drawn anew every time, at that
        share of its cost. The loss stays unbiased, and neighbouring windows share n - 1 of their
        tokens anyway.

        Returns the loss and a dict of detached parts: next (next-token loss of the target), joint
        (-log P of the window, per token), offset (n,) (-log P(x_{t+s} | x_{t+1..t+s-1}); its mean
        is joint), balance (see balance_loss), usage (r,) (mean weight of each component).
        """
        text = self.head.text(self) if self.head and self.head.text else None
        hidden = self.hidden(idx, text)  # (B, T, C)
        e = hidden.flatten(0, 1)  # (N, C)
        gold, W = gold.flatten(0, 1), self.lm_head.weight  # (N, n), (V, C)
        if self.head is None:
            loss = F.cross_entropy(widen(self.lm_head(e)), gold[:, 0])
            return loss, dict(next=loss.detach(), joint=loss.detach(), offset=loss.detach()[None])

        seen = self.head.see(hidden, text).flatten(0, 1)  # e, if the head has no layers of its own
        log_w = self.head.log_weights(seen)  # (N, r)
        balance = balance_loss(log_w)
        some = slice(None)
        if joint_share < 1:
            some = torch.randperm(len(e), device=e.device)[: math.ceil(joint_share * len(e))]
        joint = self.head.log_joint(seen[some], gold[some], W)  # (positions, n)
        joint_loss = -joint[:, -1].mean() / self.config.n_future
        offset = -joint.detach().mean(0).diff(prepend=joint.new_zeros(1))  # -log P(x_s | x_<s)

        if self.config.target == "lm_head":
            next_loss = -gold_log_prob(e, W, gold[:, 0], len(e)).mean()
            own = 0.0 if text is None else text.loss
            loss = next_loss + joint_weight * (joint_loss + own) + balance_weight * balance
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

    # checkpoints

    def to_checkpoint(self):
        """Plain tensors and plain Python, in nanoGPT's layout; common.py reads it."""
        return {"model": self.state_dict(), "model_args": asdict(self.config)}
