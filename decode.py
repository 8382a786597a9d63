"""Three decoders with one distribution: exact self-speculation, plain decoding, the oracle.

    generate         drafts n - 1 tokens from the model's head, and verifies them with one forward
                     pass of n tokens (arXiv 2410.17765, 2403.10444)
    generate_plain   one token per forward pass, with a KV cache
    generate_oracle  no cache, no speculation; obviously right. All else is tested against it.

All three yield token ids one by one, for one text. A sampler says how: `Sampling` draws, `Greedy`
takes the argmax.

Read `verify`, `speculative_step`, `speculative_blocks`. A window is drafted by `CPHead.draft` of
model.py. The accept rule is `verify` alone.
"""

from dataclasses import dataclass, field
from functools import partial
from numbers import Real

import torch
from torch.nn import functional as F

from model import BadInput, whole, widen

# -----------------------------------------------------------------------------
# from logits to probabilities to a token


def warp(logits, temperature=1.0, top_k=None, top_p=None):
    """Logits (..., V) -> the probabilities (..., V) that are drawn from, in float32 or wider.

    The only such function: targets p, drafts q and plain decoding all use it, or they would not be
    comparable. top_k keeps the k largest (all that tie with the k-th), top_p the smallest set of
    probability >= top_p among those.
    """
    logits = widen(logits)
    if temperature != 1:
        logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    p = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        sorted_p, order = p.sort(dim=-1, descending=True)
        before = sorted_p.cumsum(-1) - sorted_p  # probability of all that is more likely
        out = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, order, before >= top_p)
        p = p.masked_fill(out, 0.0)
        p = p / p.sum(-1, keepdim=True)
    return p


def categorical(p, uniform=torch.rand, wide=torch.float64):
    """One token from each row of probabilities, which need no normalisation: (..., V) -> (...).

    Inverse transform sampling, without a sync. uniform gives random numbers in [0, 1), as
    torch.rand does. wide is the type of the sums: float64 (except on mps, which has none), so that
    rounding neither quantises the tail nor lets a token of probability 0 through.
    """
    wide = torch.float32 if p.device.type == "mps" else wide
    cdf = p.cumsum(-1, dtype=wide)
    u = uniform((*p.shape[:-1], 1), dtype=wide, device=p.device)
    x = torch.searchsorted(cdf, u * cdf[..., -1:], right=True)  # the first whose cdf is above u
    return x.clamp_max(p.size(-1) - 1).squeeze(-1)  # where rounding or NaN leaves none, the last


def bernoulli(p, uniform=torch.rand):
    """True with probability p, elementwise; False where p is NaN, 0 / 0."""
    return uniform(p.shape, dtype=p.dtype, device=p.device) < p


# -----------------------------------------------------------------------------
# verification: exact for any q, as long as q is what the drafts were drawn from


def verify(p, q, drafted, uniform=torch.rand):
    """Accept a prefix of the drafts and draw the token after it, so that every token follows p.

    This is block verification (arXiv 2403.10444). drafted (..., k) were drawn from the rows q
    (..., k, V); p (..., k + 1, V) are the target's rows for the same places and the one after them,
    of one text or of several. Returns how many drafts are accepted (..., 1), and the token after
    them (..., 1). Where p or q is NaN, it gives some token: the caller must look.

    i or more drafts are kept with probability keep[i]:

        keep = [1]
        for p_i, q_i, y_i in zip(p, q, drafted):
            keep.append(min(1, keep[-1] * p_i[y_i] / q_i[y_i]))                                 (4)

    After i kept drafts, token x comes out of the next draft and is kept with probability min(keep_i
    p(x), q(x)). What that lacks of keep_i p(x) is the residual, max(keep_i p(x) - q(x), 0), so the
    token is drawn from the residual where no further draft is kept. That must happen with
    probability m_i, the residual's sum. So each place i has a coin that says yes with probability
    m_i / (m_i + 1 - keep_i). The last place that says yes wins: its i drafts are accepted.
    docs/exactness.md has the proof.
    """
    keep = keep_probability(p, q, drafted)  # (..., k + 1), the loop above in closed form
    q = F.pad(q, (0, 0, 0, 1))  # 0 in the place after the last draft: nothing was drafted there
    rest = residual(keep.unsqueeze(-1), p, q)  # (..., k + 1, V)
    m = rest.sum(-1)  # (..., k + 1)
    coins = bernoulli(m / (m + 1 - keep), uniform)
    n_accepted = coins.cumsum(-1).argmax(-1, keepdim=True)  # (..., 1), the last yes, or 0
    rest = rest.add(p, alpha=1e-30)  # a row that rounding left empty becomes p
    rest = rest.take_along_dim(n_accepted.unsqueeze(-1), -2)  # (..., 1, V)
    return n_accepted, categorical(rest, uniform)


def keep_probability(p, q, drafted):
    """keep_i of (4), i = 0..k, without a loop: -> (..., k + 1).

    log keep is a walk from 0 with steps log p / q, which is held down at 0: so it is the walk minus
    its running maximum. A draft that p likes better than q does makes up for the one before it.
    """
    y = drafted.unsqueeze(-1)
    ratio = (p[..., :-1, :].gather(-1, y) / q.gather(-1, y)).squeeze(-1)  # (..., k)
    ratio = ratio.nan_to_num(0.0, posinf=0.0)  # q(y) = 0: it was never drawn, and is never kept
    path = F.pad(ratio.log().cumsum(-1), (1, 0))  # (..., k + 1), from 0
    return (path - path.cummax(-1).values).exp()


def residual(keep, p, q):
    """max(keep p - q, 0) (..., k + 1, V): what the next draft leaves the next token lacking."""
    return (keep * p - q).relu()


# -----------------------------------------------------------------------------
# samplers


class Sampler:
    """How tokens are chosen. One of your own is a subclass with two methods:

        draw(logits)    a token for each row of logits (..., V): tokens (...), and the probabilities
                        (..., V) that they were drawn from, or None where its verify asks for none
        verify(logits, q, drafted)
                        how many drafts (..., k) are kept, and the token after them, (..., 1) both;
                        logits (..., k + 1, V) of the target, q (..., k, V) of the draft

    plain: draw takes rows as they are, so a whole window may be drawn at once, by `Sampling.pick`.
    Else the drafts are drawn one after another, by draw.
    """

    plain, generator = False, None


class Sampling(Sampler):
    """Draws from softmax(logits / temperature), cut to top_k tokens or the top_p share: see `warp`.

    temperature 1e-6..1e6 (0 is `Greedy`), top_k >= 1, top_p in (0, 1]; generator: a torch.Generator
    on the model's device, or None for torch's own.
    """

    def __init__(self, temperature=1.0, top_k=None, top_p=None, generator=None):
        if not isinstance(temperature, Real) or not 1e-6 <= temperature <= 1e6:
            raise BadInput("temperature must be 0, which is greedy, or from 1e-6 to 1e6, "
                           f"not {temperature!r}")
        if top_k is not None:
            whole("top_k", top_k, 1)
        if top_p is not None and not (isinstance(top_p, Real) and 0 < top_p <= 1):
            raise BadInput(f"top_p must be above 0 and at most 1, not {top_p!r}")
        if not isinstance(generator, (torch.Generator, type(None))):
            raise BadInput(f"generator must be a torch.Generator or None, not {generator!r}")
        self.warp = partial(warp, temperature=temperature, top_k=top_k, top_p=top_p)
        self.generator, self.uniform = generator, partial(torch.rand, generator=generator)
        nothing_cut = temperature == 1 and top_k is None and top_p in (None, 1)
        self.plain = type(self) is Sampling and nothing_cut  # a subclass may draw otherwise

    def pick(self, p):
        """A token from each row of probabilities p (..., V) -> (...)."""
        return categorical(p, self.uniform)

    def draw(self, logits):
        """A token for each row of logits (..., V): tokens (...), and the rows they came from."""
        p = self.warp(logits)
        return self.pick(p), p

    def verify(self, logits, q, drafted):
        return verify(self.warp(logits), q, drafted, self.uniform)


class Greedy(Sampler):
    """Temperature 0: a row's token is its argmax, and a draft is kept if it is the argmax.

    `verify` would do the same to one-hot rows, more slowly.
    """

    def draw(self, logits):
        return logits.argmax(-1), None  # its `verify` asks for no rows

    def verify(self, logits, q, drafted):
        return keep_equal(logits.argmax(-1), drafted)


def keep_equal(tokens, drafted):
    """Keep the drafts (..., k) up to the first that is not the target's own token (..., k + 1)."""
    n_accepted = (tokens[..., :-1] == drafted).cumprod(-1).sum(-1, keepdim=True)
    return n_accepted, tokens.gather(-1, n_accepted)


def make_sampler(temperature=1.0, top_k=None, top_p=None, generator=None):
    """Greedy at temperature 0, else Sampling."""
    sampling = Sampling(1.0 if temperature == 0 else temperature, top_k, top_p, generator)
    return Greedy() if temperature == 0 else sampling


# -----------------------------------------------------------------------------
# the speculative step


def speculative_step(model, cache, e, token, n_drafts, sampler, draft):
    """One forward pass of the trunk, 1..n_drafts + 1 new tokens.

    The state: token x_1 (1,), the last one that was emitted, which the trunk has not seen yet;
    cache, everything before it; e (1, C), the hidden state of the token before it. Returns e and
    token of the next step, the new tokens, a list, and the number of drafts.
    """
    x, q = token.unsqueeze(1), e.new_zeros(1, 0, model.config.n_token)  # at a block's end no draft
    if n_drafts:
        seen = model.split(e)[1]  # what the head looks at
        drafted, q = draft(seen, token, n_drafts, sampler, model.unembed)  # (1, k), (1, k, V)
        x = torch.cat((x, drafted), 1)  # (1, k + 1)
    length = cache.length
    hidden = model.hidden(x, cache)  # (1, k + 1, C), of x_1..x_{k+1}
    logits = model.target_logits(hidden)  # (1, k + 1, n_token), of what follows each of them
    n_accepted, token = sampler.verify(logits, q, x[:, 1:])  # (1, 1), (1, 1)
    # the one time that a step waits for the device
    k, finite, *new = torch.cat((n_accepted, all_finite(logits, q), x[:, 1:], token), 1)[0].tolist()
    check_finite(finite)
    new = [*new[:k], new[-1]]
    cache.length = length + len(new)  # x_1 and the accepted drafts; the others are rolled back
    return hidden[:, k], token[0], new, x.size(1) - 1  # place 0 is x_1's, place k the last token's


def all_finite(logits, q=None):
    """Of a text's numbers (B, T, V), without waiting for a GPU: (B, 1), 0 where not all are finite,
    2 where rows of q do not sum to 1, else 1."""
    sums = logits.new_zeros(len(logits), 0) if q is None else q.sum(-1)  # (B, k)
    finite = (logits.sum((1, 2)) + sums.sum(1)).isfinite()
    return (finite * (1 + ((sums - 1).abs() > 1e-3).any(1))).unsqueeze(1)


def check_finite(finite):
    """BadInput where `all_finite` says no: else tokens would be drawn from NaN all the same, or
    from other rows than the target's."""
    if finite == 2:
        raise BadInput("rows q of the draft do not sum to 1: no token was drawn from them")
    if not finite:
        raise BadInput("the model gives NaN or infinite logits: its weights are damaged, or "
                       "overflow in half precision; try --dtype float32")


# -----------------------------------------------------------------------------
# the decoders


def generate(model, prompt, max_new_tokens, *, draft=None, **options):
    """Self-speculative decoding, 1..n tokens per forward pass. Options: see `stream`.

    draft: what drafts in the place of `CPHead.draft`, of the same signature.
    """
    if model.head is None:
        raise BadInput("n_future = 1: there is no head to draft from; use generate_plain")
    blocks = partial(speculative_blocks, draft=draft or model.head.draft)
    return stream(blocks, model, prompt, max_new_tokens, **options)


def generate_plain(model, prompt, max_new_tokens, **options):
    """Plain decoding with a KV cache, one token per forward pass. Options: see `stream`."""
    return stream(plain_blocks, model, prompt, max_new_tokens, **options)


def generate_oracle(model, prompt, max_new_tokens, **options):
    """The oracle: one forward pass over the whole window for every token. Options: see `stream`."""
    return stream(oracle_blocks, model, prompt, max_new_tokens, **options)


def stream(blocks, model, prompt, max_new_tokens, *, sampler=None, stop_token=None, stats=None):
    """What all decoders share: yields up to max_new_tokens ids that continue prompt, a list of ids.

    sampler: `Sampling` (the default, at temperature 1), `Greedy` or one of your own, see `Sampler`.
    stop_token: the id that ends the text, or a set, list or tuple of such ids; it is yielded.
    stats: a Stats to count in. BadInput for a model in training mode and for a prompt or a
    stop_token that is not of the model's ids, at the call. Within torch.autocast the text is what
    it is without: the model's own type says how to compute.

    blocks(model, tokens, sampler) yields (new tokens, number of drafts or None for the prefill) for
    ever. `until_end` is the one place where text ends, so no decoder can overshoot or miss a stop
    token inside a block.
    """
    sampler = Sampling() if sampler is None else sampler
    check_call(model, prompt, max_new_tokens, sampler)
    stops = stop_ids(model, stop_token)
    steps = blocks(model, list(prompt), sampler)
    own_type = torch.autocast(model.device.type, enabled=False)  # drafts come from q, not rounded
    return yield_tokens(steps, own_type, max_new_tokens, stops, stats)


@torch.inference_mode()
def yield_tokens(steps, own_type, left, stops, stats):
    while left > 0:
        with own_type:  # around a step, not around yield, when the caller's code runs
            new, n_drafts = next(steps)
        block, left = until_end(new, left, stops)
        if stats is not None:
            stats.count(len(new), len(block), n_drafts)
        yield from block


def check_call(model, prompt, max_new_tokens, sampler):
    """BadInput unless the model is in evaluation mode, and the others are what `stream` says."""
    if model.training:
        raise BadInput("call model.eval() first: dropout would change the distribution")
    n_token = model.config.n_token
    is_list = isinstance(prompt, (list, tuple)) and len(prompt)
    if not is_list or not all(whole("an id of a prompt", x, 0) < n_token for x in prompt):
        raise BadInput(f"a prompt must be a non-empty list of ids below {n_token}")
    whole("max_new_tokens", max_new_tokens, 0)
    if not isinstance(sampler, Sampler):
        raise BadInput(f"a sampler is an object of decode.Sampler or a subclass, not {sampler!r}")


def stop_ids(model, stop_token):
    """The set of ids that end a text: of None, an id, or a set, list or tuple of ids. BadInput for
    anything else: it would never end one."""
    several = isinstance(stop_token, (set, frozenset, list, tuple))
    ids = stop_token if several else [] if stop_token is None else [stop_token]
    n_token = model.config.n_token
    # type and not isinstance: True is no id
    if not all(type(x) is int and 0 <= x < n_token for x in ids):
        raise BadInput(f"a stop_token is an id below {n_token}, a set or list of such ids, or "
                       f"None, not {stop_token!r}")
    return frozenset(ids)


def until_end(new, left, stops):
    """The part of a step's new tokens that belongs to the text, and how many may follow it."""
    block = new[:left]
    for i, x in enumerate(block):
        if x in stops:
            return block[: i + 1], 0
    return block, left - len(block)


def speculative_blocks(model, tokens, sampler, draft):
    cache, block_size = model.new_cache(), model.config.block_size
    hidden = model.hidden(window_ids(tokens, model), cache)
    token, e = draw_next(model, hidden, sampler, tokens), hidden[:, -1]
    yield tokens[-1:], None
    while True:
        if cache.length == block_size:  # start over with the next window but its pending token
            cache.length = 0
            e = model.hidden(window_ids(tokens, model)[:, :-1], cache)[:, -1]
        n_drafts = min(model.config.n_future - 1, block_size - cache.length - 1)
        e, token, new, n_drafts = speculative_step(model, cache, e, token, n_drafts, sampler, draft)
        tokens += new
        yield new, n_drafts


def plain_blocks(model, tokens, sampler):
    cache, new, n_drafts = model.new_cache(), window_ids(tokens, model), None
    while True:
        token = draw_next(model, model.hidden(new, cache), sampler, tokens)
        yield tokens[-1:], n_drafts
        new, n_drafts = token.unsqueeze(0), 0
        if cache.length == model.config.block_size:  # it is full: start over with the next window
            cache.length, new = 0, window_ids(tokens, model)


def oracle_blocks(model, tokens, sampler):
    while True:
        draw_next(model, model.hidden(window_ids(tokens, model)), sampler, tokens)
        yield tokens[-1:], 0


def draw_next(model, hidden, sampler, tokens):
    """Add the token after the last of the hidden states (1, T, C) to the list tokens: -> (1,)."""
    logits = model.target_logits(hidden[:, -1:])  # (1, 1, n_token)
    token = sampler.draw(logits[:, 0])[0]
    finite, x = torch.cat((all_finite(logits)[0], token)).tolist()
    check_finite(finite)
    tokens.append(x)
    return token


def window_start(t, block_size):
    """The first token that the prediction of token t sees; the last one is t - 1.

    0 as long as t tokens fit the block. After that, sliding by one would renumber every position
    and void the cache at every token, so the window moves by half a block at a time. A function of
    t alone, so that all decoders agree.
    """
    stride = block_size // 2
    return max(0, -(-(t - block_size) // stride)) * stride


def window_ids(tokens, model):
    """The tokens that the prediction of the next one sees, as a batch of one, (1, T)."""
    start = window_start(len(tokens), model.config.block_size)
    return torch.tensor([tokens[start:]], device=model.device)


# -----------------------------------------------------------------------------
# statistics


@dataclass
class Stats:
    """What a decoder did, after its prefill (the first forward pass and the token it yields)."""

    steps: int = 0  # forward passes
    tokens: int = 0  # tokens that they yielded
    offered: list = field(default_factory=list)  # [k]: steps that kept all drafts before draft k
    accepted: list = field(default_factory=list)  # [k]: steps that accepted draft k
    histogram: list = field(default_factory=list)  # [k]: steps that yielded k tokens
    origins: list = field(default_factory=list)  # of every token, the prefill's too: see `count`

    def count(self, n_new, n_yielded, n_drafts):
        """A step found n_new tokens with n_drafts drafts; n_yielded of them are in the text.

        The last of the n_new is no draft: it corrects a rejected one, is the bonus after n_drafts
        accepted ones, or was drawn plainly where there were none. n_drafts None is the prefill,
        which counts as no step. origins get the offset k = 1, 2, ... of an accepted draft, or
        "corrected", "bonus" or "plain".
        """
        last = "plain" if not n_drafts else "bonus" if n_new > n_drafts else "corrected"
        self.origins += [*range(1, n_new), last][:n_yielded]
        if n_drafts is None:
            return
        self.steps += 1
        self.tokens += n_yielded
        for counts, size in ((self.offered, n_drafts), (self.accepted, n_drafts),
                             (self.histogram, n_drafts + 2)):
            counts.extend([0] * (size - len(counts)))
        self.histogram[n_yielded] += 1
        for k in range(min(n_new, n_drafts)):
            self.offered[k] += 1
            self.accepted[k] += k < n_new - 1  # the last new token is no draft

    @property
    def tokens_per_step(self):
        return self.tokens / self.steps if self.steps else float("nan")

    @property
    def acceptance(self):
        """Share of the drafts at each offset that were accepted, where all before them were."""
        return [a / o if o else float("nan") for a, o in zip(self.accepted, self.offered)]
