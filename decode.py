"""Three decoders with one distribution: the oracle, plain decoding, exact self-speculation.

    generate              no cache, no speculation; obviously right. All else is tested against it.
    generate_cached       the same with a KV cache: one token per forward pass.
    generate_speculative  drafts n - 1 tokens from the model's head, and verifies them with one
                          forward pass of n tokens (arXiv 2410.17765, 2403.10444).

All three yield token ids one by one, at batch size 1. A sampler says how: `Sampling` draws,
`Greedy` takes the argmax; decoders/coupled.py has another one. Every sampler has the same two methods,
draw and verify.

Reading order: `draft`, `verify`, `speculative_step`. The accept rule is `verify` and what it calls.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch.nn import functional as F

from model import BadInput, widen

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


def uniform(shape, dtype, device, generator):
    """Random numbers in [0, 1): from a torch.Generator, from torch's own if it is None, or from
    what has them ready, the Noise of decoders/captured.py."""
    if hasattr(generator, "take"):
        return generator.take(shape)
    return torch.rand(shape, generator=generator, dtype=dtype, device=device)


def categorical(p, generator, wide=torch.float64):
    """One token from each row of probabilities, which need no normalisation: (..., V) -> (...).

    Inverse transform sampling, without a sync. wide is the type of the sums: float64 (except on mps,
    which has none), so that rounding neither quantises the tail nor lets a token of probability 0
    through.
    """
    wide = torch.float32 if p.device.type == "mps" else wide
    cdf = p.cumsum(-1, dtype=wide)
    u = uniform((*p.shape[:-1], 1), wide, p.device, generator)
    # the first token whose cdf is above u; without the last cdf, even a row of NaN gives one of 0..V-1
    return torch.searchsorted(cdf[..., :-1].contiguous(), u * cdf[..., -1:], right=True).squeeze(-1)


def bernoulli(p, generator):
    """True with probability p, elementwise; False where p is NaN, 0 / 0."""
    return uniform(p.shape, p.dtype, p.device, generator) < p


# -----------------------------------------------------------------------------
# verification: exact for any q, as long as q is what the drafts were drawn from


def verify(p, q, drafted, generator):
    """Accept a prefix of the drafts and draw the token after it, so that every token follows p.

    This is block verification (arXiv 2403.10444).

    drafted (..., k) were drawn from the first k rows of q; p, q (..., k + 1, V) are the target's and
    the draft's rows for the same places, of one text or of several. The last row of q is 0: it is
    the place after the drafts, where nothing was drafted. Returns how many drafts are accepted
    (..., 1), which is BAD where p or q is not finite, and the token after them (..., 1).

    i or more drafts are kept with probability keep[i]:

        keep = [1]
        for p_i, q_i, y_i in zip(p, q, drafted):
            keep.append(min(1, keep[-1] * p_i[y_i] / q_i[y_i]))                                     (3)

    After i kept drafts, token x comes out of the next draft and is kept with probability min(keep_i
    p(x), q(x)). What that lacks of keep_i p(x) is the residual, max(keep_i p(x) - q(x), 0), so the
    token is drawn from the residual where no further draft is kept. That must happen with
    probability m_i, the residual's sum. It does if of all places whose coin shows heads, with
    probability m_i / (m_i + 1 - keep_i), the last one counts. docs/exactness.md has the proof.
    """
    keep = keep_probability(p, q, drafted)  # (..., k + 1, 1), the loop above in closed form
    rest = residual(keep, p, q)  # (..., k + 1, V)
    m = rest.sum(-1, keepdim=True)  # (..., k + 1, 1), NaN where p or q is
    heads = bernoulli(m / (m + 1 - keep), generator)  # the first one changes nothing
    n_heads = heads.cumsum(-2)
    n_accepted = (n_heads < n_heads[..., -1:, :]).sum(-2)  # (..., 1): places before the last heads
    rest, p = (x.take_along_dim(n_accepted.unsqueeze(-1), -2) for x in (rest, p))  # (..., 1, V)
    rest = rest.add(p, alpha=1e-30)  # the next token's; a row that rounding left empty becomes p
    return bad_unless_finite(n_accepted, m), categorical(rest, generator)


def keep_probability(p, q, drafted):
    """keep_i of (3), i = 0..k, without a loop: p, q (..., k + 1, V), drafted (..., k) -> (..., k + 1, 1).

    log keep is a walk from 0 with steps log p / q, which is held down at 0: so it is the walk minus
    its running maximum. A draft that p likes better than q does makes up for the one before it.
    """
    y = drafted.unsqueeze(-1)
    steps = (p[..., :-1, :].gather(-1, y) / q[..., :-1, :].gather(-1, y)).log()  # (..., k, 1)
    # p(y) = 0: never kept. Not -inf, of which tril on mps and torch 2.6 makes NaN
    steps = steps.nan_to_num(-1e30, posinf=-1e30, neginf=-1e30)
    walk = F.pad(steps, (0, 0, 1, 0)).cumsum(-2)  # (..., k + 1, 1), from 0
    walks = walk.mT.expand(*walk.shape[:-1], -1)  # (..., k + 1, k + 1), the same in each row
    highest = walks.tril().amax(-1, keepdim=True)  # tril's zeros are the start
    return (walk - highest).exp()


def residual(keep, p, q):
    """max(keep p - q, 0) (..., k + 1, V): what the next draft alone leaves the next token lacking."""
    return (keep * p - q).relu()


# -----------------------------------------------------------------------------
# samplers: two methods, draw and verify


class Sampling:
    """Draws from softmax(logits / temperature), cut to top_k tokens or the top_p share: see `warp`.

    temperature 1e-6..1e6 (0 is `Greedy`), top_k >= 1, top_p in (0, 1]; generator: a torch.Generator
    on the model's device, or None for torch's own.
    """

    def __init__(self, temperature=1.0, top_k=None, top_p=None, generator=None):
        if not 1e-6 <= temperature <= 1e6:
            raise BadInput("temperature must be 0, which is greedy, or from 1e-6 to 1e6, "
                           f"not {temperature}")
        if top_k is not None and not top_k >= 1:
            raise BadInput(f"top_k must be at least 1, not {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise BadInput(f"top_p must be above 0 and at most 1, not {top_p}")
        self.warp = partial(warp, temperature=temperature, top_k=top_k, top_p=top_p)
        self.generator = generator

    def draw(self, logits):
        """A token for each row of logits (..., V): tokens (...), and the rows they came from."""
        p = self.warp(logits)
        return categorical(p, self.generator), p

    def verify(self, logits, q, drafted):
        """logits (..., k + 1, V) of the target, q of the draft, drafted (..., k): see `verify`."""
        return verify(self.warp(logits), q, drafted, self.generator)


class Greedy:
    """Temperature 0: a row's token is its argmax, and a draft is kept if it is the argmax.

    `verify` would do the same to one-hot rows, more slowly.
    """

    generator = None  # nothing is random

    def draw(self, logits):
        return logits.argmax(-1), logits

    def verify(self, logits, q, drafted):
        return keep_equal(logits.argmax(-1), drafted)


def keep_equal(tokens, drafted):
    """Keep the drafts (..., k) up to the first that is not the target's own token, of (..., k + 1)."""
    n_accepted = (tokens[..., :-1] == drafted).cumprod(-1).sum(-1, keepdim=True)
    return n_accepted, tokens.gather(-1, n_accepted)


def takes_any_row(sampler):
    """Whether a sampler draws by what a row says alone, and so from a row of some tokens, too: Greedy
    and Sampling do. Others may know tokens by their place among all."""
    return type(sampler) is Greedy or type(sampler) is Sampling and draws_from_warp(sampler)


def draws_from_warp(sampler):
    """Whether a sampler's `warp` is the one of this file with settings, and not one of its own."""
    return getattr(getattr(sampler, "warp", None), "func", None) is warp


def make_sampler(temperature=1.0, top_k=None, top_p=None, generator=None):
    """Greedy at temperature 0, else Sampling."""
    sampling = Sampling(1.0 if temperature == 0 else temperature, top_k, top_p, generator)
    return Greedy() if temperature == 0 else sampling


# -----------------------------------------------------------------------------
# the speculative step


def draft(model, e, token, n_drafts, sampler, stops=None):
    """Draw x_2, ..., x_{k+1} from the head's joint at e, given x_1 = token; k = n_drafts.

    Each x_s is drawn from its row q_s = P(x_s | x_1..x_{s-1}, e), the exact conditional of equation
    (1). token (B,) and e (B, C) are of B texts; e is the hidden state of the token before x_1.
    Returns x_1..x_{k+1} (B, k + 1) and q (B, k + 1, n_token), see `verify`. x_s is the last draft
    if stops(log q_s (B, n_token or K) up to a constant, [x_1, ..., x_s]).
    """
    nothing = e.new_zeros(len(e), 1, model.config.n_token)  # q's row for the place after the drafts
    if model.head.rank == 1 and not model.head.sees_drafts and stops is None:
        # independent heads: one draw for all of them, which is measurably faster
        logits = model.head.logits(e, model.lm_head.weight, slice(1, n_drafts + 1))  # (B, k, 1, V)
        drafted, q = draw_drafts(model, logits[:, :, 0], sampler)  # (B, k), (B, k, n_token)
        return torch.cat((token.unsqueeze(1), drafted), 1), torch.cat((q, nothing), 1)
    conditionals, x, q = model.conditionals(e), [token], []
    for _ in range(n_drafts):
        row = conditionals.row(x[-1])[:, : model.config.n_token]  # (B, n_token or K)
        x_s, q_s = draw_drafts(model, row, sampler)  # (B,), (B, n_token)
        x.append(x_s)
        q.append(q_s.unsqueeze(1))
        if stops is not None and stops(row, x):
            break
    return torch.stack(x, 1), torch.cat((*q, nothing), 1)


def draw_drafts(model, rows, sampler):
    """Draw from rows of logits of the tokens that can be drafted (..., V or K): tokens (...), and q
    (..., n_token) that they came from."""
    head, n_token = model.head, model.config.n_token
    if head.draft_ids is None or not takes_any_row(sampler):
        return sampler.draw(head.all_tokens(rows, n_token))
    places, q = sampler.draw(rows)  # of K tokens it takes a tenth of the time
    whole = q.new_zeros(*q.shape[:-1], n_token)
    return head.tokens_at(places), whole.index_copy_(-1, head.draft_ids, q)


def speculative_step(model, cache, before, token, n_drafts, sampler, lap=lambda part: None,
                     drafter=None):
    """One forward pass of the trunk, 1..n_drafts + 1 new tokens.

    The state: token (1,), the last one that was emitted, which the trunk has not seen yet; cache,
    everything before it; before (T, C), the hidden states of the last of it, which the head has not
    seen yet. Returns both for the next step, the new tokens, a list, and the number of drafts.
    lap(part) is called at the end of each part, "rest" being what came before the step.
    """
    lap("rest")
    length = cache.length
    e = model.head.see(before, cache)[-1:]  # (1, C), of the token before x_1
    x, q = (drafter or draft)(model, e, token, n_drafts, sampler)  # (1, k + 1), (1, k + 1, n_token)
    lap("draft")
    hidden = model.hidden(x, cache)[0]  # (k + 1, C), of x_1..x_{k+1}
    lap("trunk")
    logits = model.target_logits(hidden)  # (k + 1, n_token), of what follows each of them
    lap("target")
    n_accepted, token = sampler.verify(logits, q[0], x[0, 1:])
    lap("verify")
    n_accepted = bad_unless_finite(n_accepted, logits)
    k, *new = torch.cat((n_accepted, x[0, 1:], token)).tolist()  # the one time that a step waits
    check_accepted(k)
    new = [*new[:k], new[-1]]
    cache.length = length + len(new)  # x_1 and the accepted drafts; the others are rolled back
    return hidden[: k + 1], token, new, x.size(1) - 1  # row 0 is x_1's, row k the last token's


BAD = -1  # what stands for the number of accepted drafts where a number is NaN or infinite


def bad_unless_finite(n_accepted, x):
    """n_accepted (..., 1), or BAD for a text with a NaN or infinite number in x (..., k + 1, V): else
    it would be drawn from all the same. Without waiting for a GPU; see `check_accepted`."""
    return torch.where(x.sum((-2, -1)).isfinite().unsqueeze(-1), n_accepted, BAD)


def check_accepted(n_accepted):
    """BadInput if a number of accepted drafts is BAD."""
    if n_accepted == BAD:
        raise BadInput("the model gives NaN or infinite logits: its weights are damaged, or overflow in "
                       "half precision; try --dtype float32")


# -----------------------------------------------------------------------------
# the decoders


def generate(model, prompt, max_new_tokens, **options):
    """The oracle: one forward pass over the whole window for every token. Options: see `stream`."""
    return stream(oracle_blocks, model, prompt, max_new_tokens, **options)


def generate_cached(model, prompt, max_new_tokens, **options):
    """Plain decoding with a KV cache, one token per forward pass. Options: see `stream`."""
    return stream(cached_blocks, model, prompt, max_new_tokens, **options)


def generate_speculative(model, prompt, max_new_tokens, lap=lambda part: None, drafter=None,
                         **options):
    """Self-speculative decoding, 1..n tokens per forward pass. Options: see `stream`.

    lap: see `speculative_step`; the prefill has parts trunk and target. drafter: decoders/draft_length.py.
    """
    if model.head is None:
        raise BadInput("n_future = 1: there is no head to draft from; use generate_cached")
    blocks = partial(speculative_blocks, lap=lap, drafter=drafter)
    return stream(blocks, model, prompt, max_new_tokens, **options)


@torch.inference_mode()
def stream(blocks, model, prompt, max_new_tokens, *, sampler=None, stop_token=None, stats=None):
    """What all decoders share: yields up to max_new_tokens ids that continue prompt, a list of ids.

    sampler: `Sampling` (the default, at temperature 1), `Greedy` or another. stop_token: the id that
    ends the text; it is yielded. stats: a Stats to count in.

    blocks(model, tokens, sampler) yields (new tokens, number of drafts or None for the prefill) for
    ever. `until_end` is the one place where text ends, so no decoder can overshoot or miss a stop
    token inside a block.
    """
    check_call(model, prompt)
    sampler = Sampling() if sampler is None else sampler
    steps, left = blocks(model, list(prompt), sampler), max_new_tokens
    while left > 0:
        new, n_drafts = next(steps)
        block, left = until_end(new, left, stop_token)
        if stats is not None:
            stats.count(len(new), len(block), n_drafts)
        yield from block


def check_call(model, prompt):
    """BadInput unless the model is in evaluation mode, and prompt a list of its ids."""
    if model.training:
        raise BadInput("call model.eval() first: dropout would change the distribution")
    n_token = model.config.n_token
    is_list = isinstance(prompt, (list, tuple)) and len(prompt)
    if not is_list or not all(isinstance(x, int) and 0 <= x < n_token for x in prompt):
        raise BadInput(f"a prompt must be a non-empty list of ids below {n_token}; "
                       "decoders/batched.py takes a list of prompts")


def until_end(new, left, stop_token):
    """Those of a step's new tokens that are in the text, which has room for `left`, and the room
    after them."""
    block = new[:left]
    if stop_token in block:
        return block[: block.index(stop_token) + 1], 0
    return block, left - len(block)


def oracle_blocks(model, tokens, sampler):
    while True:
        hidden = model.hidden(window_ids(tokens, model))[0]
        token = draw_next(model, hidden[-1:], sampler)
        tokens.append(token.item())
        yield tokens[-1:], 0


def cached_blocks(model, tokens, sampler):
    cache, new, n_drafts = model.new_cache(), window_ids(tokens, model), None
    while True:
        hidden = model.hidden(new, cache)[0]
        token = draw_next(model, hidden[-1:], sampler)
        tokens.append(token.item())
        yield tokens[-1:], n_drafts
        new, n_drafts = token.unsqueeze(0), 0
        if cache.length == model.config.block_size:  # it is full: start over with the next window
            cache.length, new = 0, window_ids(tokens, model)


def speculative_blocks(model, tokens, sampler, lap, drafter=None):
    model = model.head.carrier(model)
    cache, block_size = model.new_cache(), model.config.block_size
    lap("rest")
    hidden = model.hidden(window_ids(tokens, model), cache)[0]
    lap("trunk")
    token = draw_next(model, hidden[-1:], sampler)  # (1,)
    lap("target")
    tokens.append(token.item())
    yield tokens[-1:], None
    while True:
        if cache.length == block_size:  # start over with the next window but its pending token
            cache.length = 0
            lap("rest")
            hidden = model.hidden(window_ids(tokens, model)[:, :-1], cache)[0]
            lap("trunk")
        n_drafts = getattr(cache, "n_drafts", model.config.n_future - 1)
        n_drafts = min(n_drafts, block_size - cache.length - 1)
        hidden, token, new, n_drafts = speculative_step(
            model, cache, hidden, token, n_drafts, sampler, lap, drafter)
        tokens += new
        yield new, n_drafts


def draw_next(model, hidden, sampler):
    """One token (1,) from the target, given the last hidden state (1, C)."""
    logits = model.target_logits(hidden)
    check_accepted(bad_unless_finite(logits.new_zeros(1), logits))
    return sampler.draw(logits)[0]


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


def prefill(model, tokens, sampler):
    """The cache and the hidden states (T, C) of the window of tokens, and the token (1,) after it,
    which is added to them."""
    cache = model.new_cache()
    hidden = model.hidden(window_ids(tokens, model), cache)[0]
    token = draw_next(model, hidden[-1:], sampler)
    tokens.append(token.item())
    return cache, hidden, token


def next_window(model, tokens):
    """The cache and the hidden states (T, C) of the window of all tokens but the last, which is
    pending."""
    cache = model.new_cache()
    return cache, model.hidden(window_ids(tokens, model)[:, :-1], cache)[0]


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
        """Share of the drafts at each offset that were accepted, given that all before them were."""
        return [a / o if o else float("nan") for a, o in zip(self.accepted, self.offered)]
