"""Three decoders with one law: the oracle, the fastest plain path, and exact self-speculation.

    generate              no cache, no speculation; obviously right. Everything else is tested against it.
    generate_cached       the same with a KV cache: one token per forward pass.
    generate_speculative  drafts n - 1 tokens from the CP head and verifies them with one forward pass of n
                          tokens (arXiv 2410.17765 for the head, 2403.10444 for the accept rule).

All three yield token ids one by one, at batch size 1, and draw from the same distribution; at temperature 0
they yield the same tokens. All randomness passes through `draw` and `coin` and one torch.Generator, or through what
stands in its place: `Greedy` at temperature 0, and a `Coupling`, with which they yield the same tokens at any other.
"""

from dataclasses import dataclass, field
from functools import partial

import torch

from model import KVCache, fp32

# -----------------------------------------------------------------------------
# from logits to probabilities to a token


def warp(logits, temperature=1.0, top_k=None, top_p=None, n_token=None):
    """Logits (..., V) -> the probabilities (..., n_token) that are drawn from, in float32 or wider.

    The only such function: targets p, drafts q and plain decoding all use it, or they would not be comparable.
    At temperature 0 the logits stay what they are, for `Greedy`, which takes their argmax: see `chooser`. top_k keeps
    the k largest (all that tie with the k-th), top_p the smallest set of probability >= top_p among those.
    Columns from n_token on are padding, not tokens, and are cut off.
    """
    logits = fp32(logits)[..., :n_token]
    if temperature == 0:
        return logits
    if temperature != 1:
        logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    p = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        sorted_p, order = p.sort(dim=-1, descending=True)
        before = sorted_p.cumsum(-1) - sorted_p  # probability of all that is more likely
        p = p.masked_fill(torch.zeros_like(p, dtype=torch.bool).scatter_(-1, order, before >= top_p), 0.0)
        p = p / p.sum(-1, keepdim=True)
    return p


def draw(p, generator):
    """One token from each row of probabilities: (..., V) -> (...). Rows need not be normalised.

    Inverse transform sampling, without a sync. The sums are in float64 (except on mps, which has none), so that
    rounding neither quantises the tail nor lets a token of probability 0 through.
    """
    if isinstance(generator, Greedy):
        return generator.draw(p)
    wide = torch.float32 if p.device.type == "mps" else torch.float64
    cdf = p.cumsum(-1, dtype=wide)
    u = torch.rand(*p.shape[:-1], 1, generator=generator, dtype=wide, device=p.device) * cdf[..., -1:]
    return torch.searchsorted(cdf, u, right=True).squeeze(-1)  # the first token whose cdf is above u


def coin(p, generator):
    """True with probability p, elementwise; False where p is NaN, 0 / 0."""
    return torch.rand(p.shape, generator=generator, dtype=p.dtype, device=p.device) < p


class Greedy:
    """In place of a torch.Generator where nothing is random: a row's token is its argmax. Rows may be logits."""

    def draw(self, p):
        """p (..., V) -> (...)."""
        return p.argmax(-1)

    def verify(self, p, q, drafted):
        """Like `verify`: keeps the drafts up to the first that is not the token of its row, or whose row of q is 0."""
        tokens = self.draw(p)
        kept = (tokens[:-1] == drafted) & q[:-1].any(-1)
        n_accepted = kept.cumprod(0).sum(0, keepdim=True)
        return n_accepted, tokens.index_select(0, n_accepted)


class Coupling(Greedy):
    """Greedy with random numbers that belong to the place in the text (Gumbel coupling).

    The token at place t is argmax_x p(x) / E_t(x), where the exponential noise E_t depends on the seed and on t alone.
    That is a draw from p, so the text is a function of the seed and of the model's law, whatever was drafted: all
    decoders write the same one. A draft is kept where it is that token, which happens less often than `verify` allows.
    One object serves one text.
    """

    def __init__(self, seed, device="cpu"):
        self.seed, self.place, self.generator = seed, 0, torch.Generator(device)

    def draw(self, p):
        """The tokens at the places from self.place on: p (T, V) -> (T,)."""
        tokens = []
        for t, row in enumerate(p, self.place):
            self.generator.manual_seed((1_000_003 * self.seed + t) % 2**63)
            noise = torch.empty_like(row, dtype=torch.float64).exponential_(generator=self.generator)
            tokens.append((row / noise).argmax(-1, keepdim=True))
        self.place += len(p)
        return torch.cat(tokens)

    def verify(self, p, q, drafted):
        first = self.place = self.place - len(drafted)  # that of the first draft: they were drawn with self, too
        n_accepted, token = super().verify(p, q, drafted)
        self.place = first + n_accepted.item() + 1
        return n_accepted, token


def chooser(model, generator, temperature=1.0, top_k=None, top_p=None):
    """(to_probs, generator) for the decoders: what makes a row of p or q out of logits, and what draws from it. At
    temperature 0 these are rows of logits and Greedy, which belong together."""
    to_probs = partial(warp, temperature=temperature, top_k=top_k, top_p=top_p, n_token=model.config.n_token)
    return to_probs, Greedy() if temperature == 0 else generator


# -----------------------------------------------------------------------------
# verification: exact for any q, as long as q is what the drafts were drawn from


def keep_probability(p, q, drafted):
    """k_i, the probability that the first i drafts are kept, i = 0..n - 1: p, q (n, V), drafted (n - 1,) -> (n, 1).

    k_0 = 1, k_i = min(1, k_{i-1} p(x) / q(x)) with x the i-th draft: one that p likes better than q does makes up for
    the one before it. So log k is a walk with steps log p / q, held down at 0: the walk minus its running maximum.
    """
    x = drafted.unsqueeze(-1)
    steps = (p.gather(-1, x) / q.gather(-1, x)).log()  # (n - 1, 1)
    # p(x) = 0, and q(x) = 0, where there is no draft to keep: not -inf, of which tril on mps and torch 2.6 makes NaN
    steps = steps.nan_to_num(-1e30, posinf=-1e30, neginf=-1e30)
    walk = steps.T.expand(len(p), -1).tril(-1).cumsum(1)  # (n, n - 1), row i: i steps, and then it stands still
    return (walk[:, -1:] - walk.amax(1, keepdim=True).relu()).exp()  # relu: the walk begins at 0


def missing(k, p, q):
    """max(k_i p - q, 0): what the next token behind i kept drafts still lacks, if the draft alone yields it. (n, V)"""
    return (k * p - q).relu()


def verify(p, q, drafted, generator):
    """Accept a prefix of the drafts and draw the token behind it, so that every token follows p (arXiv 2403.10444).

    drafted (n - 1,) were drawn from the rows of q (n, V); p (n, V) are the target's rows for the same places. An
    all-zero row of q says "nothing was drafted here": it is never accepted, and the token in its place is drawn from
    p. The last row is always such a one: it is the place behind the drafts, where the bonus token goes.
    Returns how many drafts are accepted (1,) and the token behind them (1,).

    Behind i kept drafts, token x comes out of the next draft and is kept with probability min(k_i p(x), q(x)). What is
    missing to k_i p(x) is max(k_i p(x) - q(x), 0), so the token is drawn from that where no further draft is accepted.
    That happens as often as it must, m = sum max(k_i p - q, 0), if i drafts are accepted with probability m / (m + 1 -
    k_i) where no more of them are. README.md has the proof.
    """
    if isinstance(generator, Greedy):
        return generator.verify(p, q, drafted)
    k = keep_probability(p, q, drafted)  # (n, 1)
    rest = missing(k, p, q)
    m = rest.sum(-1, keepdim=True)  # (n, 1)
    heads = coin(m / (m + 1 - k), generator)  # (n, 1); what the first one shows changes nothing
    n_heads = heads.cumsum(0)
    n_accepted = (n_heads < n_heads[-1]).sum(0)  # (1,), the last of the heads: so many places come before it, or 0
    rest = rest.add(p, alpha=1e-30).index_select(0, n_accepted)  # for a row that rounding left empty, which becomes p
    return n_accepted, draw(rest, generator)


# -----------------------------------------------------------------------------
# the speculative step


def draft(model, e, token, to_probs, generator):
    """Draw x_2, ..., x_n from the CP joint at e given x_1 = token: -> drafted (n - 1,), q (n, V), see `verify`.

    The drafted prefix says which component it came from: with b_a ~ w_a prod_{j<s} P_a^(j)(x_j), the row
    q_s = sum_a b_a P_a^(s) is the exact conditional of equation (1), and x_s is drawn from just that row. Where the
    factors see their previous token, P_a^(j)(x_j) is P_a^(j)(x_j | x_{j-1}), and all else stays.
    e (C,) is the hidden state of the token before x_1.
    """
    mixed = model.config.rank > 1  # else there is no component to find out, and the factor itself is the row
    if not mixed and not model.cp_head.sees_previous:  # independent heads: one draw for all of them
        q = to_probs(model.cp_head.logits(e, model.lm_head.weight, slice(1, None)).squeeze(1))  # (n - 1, n_token)
        return draw(q, generator), torch.cat((q, torch.zeros_like(q[:1])))
    log_w, factor = model.cp_factors(e)  # (r,), P_a^(s)
    log_b, log_p, x, drafted, q = log_w.unsqueeze(-1), factor(1, None) if mixed else None, token, [], []
    for s in range(2, model.config.n_future + 1):
        before, log_p = log_p, factor(s, x)  # (r, V)
        log_q = log_p
        if mixed:
            log_b = log_b + before.index_select(-1, x)  # (r, 1)
            log_q = (log_b.softmax(0).T @ log_p.exp()).log()
        q.append(to_probs(log_q))  # (1, n_token)
        x = draw(q[-1], generator)  # (1,)
        drafted.append(x)
    return torch.cat(drafted), torch.cat((*q, torch.zeros_like(q[0])))


def speculative_step(model, cache, e, token, max_drafts, to_probs, generator):
    """One forward pass of the trunk, 1..n new tokens: tensors of fixed shapes in and out, and no sync with the host.

    The state: token (1,), the last one that was emitted, which the trunk has not seen yet; e (C,), the hidden state of
    the token before it; cache, everything before it. max_drafts: how many drafts may be accepted at most.
    Returns e and token for the next step, and block (n + 1,): the number k of accepted drafts, the n - 1 drafts, and
    the token behind the accepted ones. New are the first k drafts and that token; the caller sets cache.length to
    what it was plus k + 1, which rolls back the rejected ones. to_probs, generator: see `chooser`.
    If cache.length is a tensor, so can that sum be: then all shapes inside are fixed, too, and steps can follow one
    another without the host.
    """
    drafted, q = draft(model, e, token, to_probs, generator)
    if max_drafts < len(drafted):
        q[max_drafts:] = 0
    hidden = model.hidden(torch.cat((token, drafted)).unsqueeze(0), cache)[0]  # (n, C)
    n_accepted, token = verify(to_probs(model.target_logits(hidden)), q, drafted, generator)
    e = hidden.index_select(0, n_accepted)[0]  # row 0 is x_1, so this is the last accepted token's
    return e, token, torch.cat((n_accepted, drafted, token))


# -----------------------------------------------------------------------------
# the decoders


def window_start(t, block_size):
    """The first token that the prediction of token t may see: it sees tokens window_start(t) .. t - 1.

    0 as long as t tokens fit the block. Past that, sliding by one would renumber every position and void the
    cache at every token, so the window moves by half a block at a time. A function of t alone, so that all
    decoders agree.
    """
    stride = block_size // 2
    return max(0, -(-(t - block_size) // stride)) * stride


@dataclass
class Stats:
    """What a decoder did, after its prefill (the first forward pass and the token that it yields)."""

    steps: int = 0  # forward passes
    tokens: int = 0  # tokens that they yielded
    offered: list = field(default_factory=list)  # [k]: steps that had draft k and accepted all before it
    accepted: list = field(default_factory=list)  # [k]: steps that accepted draft k
    histogram: list = field(default_factory=list)  # [k]: steps that yielded k tokens
    origins: list = field(default_factory=list)  # of every token, the prefill's included: see `count`

    def count(self, n_new, n_yielded, n_drafts):
        """A step that found n_new tokens with n_drafts drafts at hand; the end of the text may have cut some off.

        The last of the n_new is no draft: it corrects a rejected one, is the bonus behind n_drafts accepted ones, or
        was drawn plainly where there were none. n_drafts None is the prefill, which counts as no step.
        origins get the position k = 1, 2, ... of an accepted draft, or "corrected", "bonus" or "plain".
        """
        last = "plain" if not n_drafts else "bonus" if n_new > n_drafts else "corrected"
        self.origins += [*range(1, n_new), last][:n_yielded]
        if n_drafts is None:
            return
        self.steps += 1
        self.tokens += n_yielded
        for per_position, size in ((self.offered, n_drafts), (self.accepted, n_drafts), (self.histogram, n_drafts + 2)):
            per_position.extend([0] * (size - len(per_position)))
        self.histogram[n_yielded] += 1
        for k in range(min(n_new, n_drafts)):
            self.offered[k] += 1
            self.accepted[k] += k < n_new - 1  # the last new token is no draft

    @property
    def tokens_per_step(self):
        return self.tokens / self.steps if self.steps else float("nan")

    @property
    def acceptance(self):
        """Share of the drafts at each position that were accepted, given that all before them were."""
        return [a / o if o else float("nan") for a, o in zip(self.accepted, self.offered)]


@torch.inference_mode()
def run(blocks, model, prompt, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, stop_token=None,
        generator=None, stats=None):
    """What all decoders share; yields up to max_new_tokens token ids that continue prompt, a non-empty list of ids.

    temperature >= 0 (0 is greedy), top_k >= 1, top_p in (0, 1]: see `warp`. stop_token: the id that ends the text;
    it is yielded. generator: a torch.Generator on the model's device, or a new Coupling. stats: a Stats to count in.

    blocks(model, tokens, to_probs, generator) yields (new tokens, number of drafts or None for the prefill) for
    ever. This is the one place where text ends, so no decoder can overshoot or miss a stop token inside a block.
    """
    if model.training:
        raise ValueError("call model.eval() first: dropout would change the distribution")
    if not prompt or not all(isinstance(token, int) for token in prompt):
        raise ValueError("the prompt must be a non-empty list of token ids (batch size is 1)")
    stream = blocks(model, list(prompt), *chooser(model, generator, temperature, top_k, top_p))
    left = max_new_tokens
    while left > 0:
        new, n_drafts = next(stream)
        block = new[:left]
        if stop_token in block:
            block = block[: block.index(stop_token) + 1]
            left = 0
        left -= len(block)
        if stats is not None:
            stats.count(len(new), len(block), n_drafts)
        yield from block


def generate(model, prompt, max_new_tokens, **options):
    """The oracle: no cache, no speculation, one forward pass over the whole window per token. Options: see `run`."""
    return run(oracle_blocks, model, prompt, max_new_tokens, **options)


def generate_cached(model, prompt, max_new_tokens, **options):
    """Plain decoding with a KV cache, one token per forward pass. Same law as generate. Options: see `run`."""
    return run(cached_blocks, model, prompt, max_new_tokens, **options)


def generate_speculative(model, prompt, max_new_tokens, **options):
    """Self-speculative decoding, 1..n tokens per forward pass. Same law as generate. Options: see `run`."""
    if model.cp_head is None:
        raise ValueError("n_future = 1: there is no head to draft from; use generate_cached")
    return run(speculative_blocks, model, prompt, max_new_tokens, **options)


def oracle_blocks(model, tokens, to_probs, generator):
    while True:
        hidden = model.hidden(window_ids(tokens, model))
        tokens.append(draw(to_probs(model.target_logits(hidden[0, -1:])), generator).item())
        yield tokens[-1:], 0


def cached_blocks(model, tokens, to_probs, generator):
    cache, n_drafts = new_cache(model), None
    new = window_ids(tokens, model)
    while True:
        hidden = model.hidden(new, cache)
        token = draw(to_probs(model.target_logits(hidden[0, -1:])), generator)  # (1,)
        tokens.append(token.item())
        yield tokens[-1:], n_drafts
        n_drafts, new = 0, token.unsqueeze(0)
        if cache.length == model.config.block_size:  # the block is full: start over with the next window
            cache.length, new = 0, window_ids(tokens, model)


def speculative_blocks(model, tokens, to_probs, generator):
    cache, block_size = new_cache(model), model.config.block_size
    e = model.hidden(window_ids(tokens, model), cache)[0, -1]  # (C,)
    token = draw(to_probs(model.target_logits(e.unsqueeze(0))), generator)  # (1,)
    tokens.append(token.item())
    yield tokens[-1:], None
    while True:
        if cache.length == block_size:  # start over with the next window, all of it but the pending token
            cache.length = 0
            e = model.hidden(window_ids(tokens, model)[:, :-1], cache)[0, -1]
        length = cache.length
        # a draft needs its predecessor inside the block, so that its window is the one of its own index
        n_drafts = min(model.config.n_future - 1, block_size - length - 1)
        e, token, block = speculative_step(model, cache, e, token, n_drafts, to_probs, generator)
        n_accepted, *drafted, last = block.tolist()  # the step's only sync
        new = drafted[:n_accepted] + [last]
        cache.length = length + len(new)
        tokens += new
        yield new, n_drafts


def window_ids(tokens, model):
    """The tokens that the prediction of the next one sees, as a batch of one, (1, T), on the model's device."""
    start = window_start(len(tokens), model.config.block_size)
    return torch.tensor([tokens[start:]], device=model.lm_head.weight.device)


def new_cache(model):
    weight = model.lm_head.weight
    return KVCache(model.config, 1, weight.dtype, weight.device)
