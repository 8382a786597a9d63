"""More than one text at once: texts of different lengths share drafts, pass and verification.

    python -m decoders.batched --out_dir out/toy --batch_sizes 1 4 16

generate_plain_batch and generate_batch do for B prompts what generate_plain and generate of
decode.py do for one. Every row has its own length in the cache, and its own positions, acceptance
and roll-back. It leaves the batch when its text ends.

As a script, this continues the checkpoint's prompts with both decoders in turn, round after round.
Speeds are medians over the rounds, and a speed-up is the median of the rounds' own ratios. The last
line of stdout is one JSON object.
"""

import itertools
import json
import statistics
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from bench_speculative import hardware, speedups, timed
from common import ArgumentParser, number, run_script
from decode import (Sampling, Stats, all_finite, check_call, check_finite, draw_next, make_sampler,
                    stop_ids, until_end, window_ids)
from decoders.coupled import Coupled
from model import BadInput
from sample import add_model_flags, fast_kernels, load

# -----------------------------------------------------------------------------
# one forward pass over rows of different lengths


class RowCache:
    """Keys and values of B texts, and how many of them are valid, a list of B.

    A pass with T tokens for each row writes the places l, ..., l + T - 1 of its row, after `begin`.
    The lengths stay what they were: the caller says how many of the T are kept. What is stale after
    them is masked, and finite. Attention calls `append` in model.py, `update` in transformers.
    """

    def __init__(self, B, room):
        self.length, self.room, self.kv = [0] * B, room, []

    def lengths(self):
        """On the device, (B,)."""
        return torch.tensor(self.length, device=self.device)

    def begin(self, T, device, rows=slice(None)):
        """Say where the next pass writes T tokens for each of some rows: -> places (B', T)."""
        self.rows, self.device = rows, device
        self.index = torch.arange(len(self.length), device=device)[rows].unsqueeze(1)
        self.places = self.lengths()[rows].unsqueeze(1) + torch.arange(T, device=device)
        self.reach = self.look_at(T)
        return self.places

    def look_at(self, T):
        """How many places a pass looks at, with T tokens for each of `rows`: up to the longest."""
        return max(self.length[self.rows]) + T

    def append(self, layer, kv):
        """Write kv (2, B', nh, T, hs) at the places: -> (2, B', nh, reach, hs)."""
        if layer == len(self.kv):  # the first pass says how large they are
            _, _, nh, _, hs = kv.shape
            self.kv.append(kv.new_zeros(2, len(self.length), nh, self.room, hs))
        own = self.kv[layer]
        own[:, self.index, :, self.places] = kv.permute(1, 3, 0, 2, 4)
        return own[:, self.rows, :, : self.reach]

    def update(self, keys, values, layer, *unused, **options):
        """`append`, as attention in transformers calls it."""
        return self.append(layer, torch.stack((keys, values))).unbind()

    def get_seq_length(self, *unused):
        return max(self.length[self.rows])

    def keep(self, rows):
        """Drop all rows but these."""
        self.length = [self.length[row] for row in rows]
        self.kv = [kv[:, rows] for kv in self.kv]


def hidden_of_rows(model, x, cache, rows=slice(None)):
    """`GPT.hidden` of tokens x (B', T) that follow those of some rows of a RowCache: (B', T, C)."""
    places = cache.begin(x.size(1), x.device, rows)
    return model.hidden(x, cache, places, mask_of(visible(places, cache.reach), model.dtype))


def visible(places, n):
    """Whether a token at places (B, T) sees the places 0..n - 1 of its row, those up to its own:
    (B, 1, T, n)."""
    return (torch.arange(n, device=places.device) <= places.unsqueeze(-1)).unsqueeze(1)


def mask_of(seen, dtype):
    """What attention adds, once for all layers: 0 where a token is seen, else almost -inf."""
    return seen.to(dtype).sub(1).mul(torch.finfo(dtype).max)


def fill(model, cache, row, window):
    """Compute a row's cache from its window (1, T), by itself, without padding: -> (1, T, C)."""
    cache.length[row] = 0
    hidden = hidden_of_rows(model, window, cache, slice(row, row + 1))
    cache.length[row] = window.size(1)
    return hidden


def pass_of_rows(model, cache, e, token, n_drafts, sampler, draft):
    """The step of decode.py for B texts, up to where it waits for the device; draft None is plain
    decoding.

    e (B, C) is the state that the head drafts from, token (B,) the last one of each text. Returns
    the hidden states (B, k + 1, C) of token and the k drafts, and (B, k + 3): how many drafts are
    accepted; whether all was finite; the drafts; the token after the accepted ones.
    """
    x, q = token.unsqueeze(1), e.new_zeros(len(e), 0, model.config.n_token)
    if n_drafts:
        drafted, q = draft(model.split(e)[1], token, n_drafts, sampler, model.unembed)
        x = torch.cat((x, drafted), 1)  # (B, k + 1)
    hidden = hidden_of_rows(model, x, cache)
    logits = model.target_logits(hidden)  # (B, k + 1, n_token)
    if draft is None:
        tokens = sampler.draw(logits[:, 0])[0].unsqueeze(1)
        n_accepted = torch.zeros_like(tokens)
    else:
        n_accepted, tokens = sampler.verify(logits, q, x[:, 1:])  # (B, 1), (B, 1)
    return hidden, torch.cat((n_accepted, all_finite(logits, q), x[:, 1:], tokens), 1)


# -----------------------------------------------------------------------------
# rows with samplers of their own


class EachItsOwn:
    """A sampler made of one for each row."""

    def __init__(self, samplers):
        self.samplers, self.plain = samplers, all(sampler.plain for sampler in samplers)

    def pick(self, p):
        return torch.cat([own.pick(part) for own, part in zip(self.samplers, p.split(1))])

    def draw(self, logits):
        found = [own.draw(part) for own, part in zip(self.samplers, logits.split(1))]
        rows = [F.one_hot(tokens, logits.size(-1)).to(logits.dtype) if row is None else row
                for tokens, row in found]  # where nobody looks at q
        return torch.cat([tokens for tokens, _ in found]), torch.cat(rows)

    def verify(self, logits, q, drafted):
        parts = zip(self.samplers, logits.split(1), q.split(1), drafted.split(1))
        found = [own.verify(*part) for own, *part in parts]
        return tuple(map(torch.cat, zip(*found)))

    def draft(self, draft, e, x1, n_drafts, sampler, unembed):
        """Rows that draw a window at once, and those that go token by token, each as by itself."""
        order, found = [], []
        for plain in (True, False):
            rows = [i for i, own in enumerate(self.samplers) if own.plain == plain]
            if rows:
                own = EachItsOwn([self.samplers[i] for i in rows])
                found.append(draft(e[rows], x1[rows], n_drafts, own, unembed))
                order += rows
        back = torch.tensor(order, device=e.device).argsort()
        return tuple(torch.cat(parts)[back] for parts in zip(*found))


def own_samplers(samplers, B):
    """A sampler for each of B rows, from one or from a list of B."""
    samplers = list(samplers) if isinstance(samplers, (list, tuple)) else [samplers] * B
    if len(samplers) != B:
        raise BadInput(f"{B} prompts need {B} samplers, or one for all, not {len(samplers)}")
    coupled = [id(sampler) for sampler in samplers if isinstance(sampler, Coupled)]
    if len(set(coupled)) < len(coupled):
        raise BadInput("a Coupled sampler serves one text: give every row one of its own")
    return samplers


# -----------------------------------------------------------------------------
# the decoders


@dataclass
class Row:
    """One text, and what its next step needs: see `speculative_step` of decode.py."""

    tokens: list  # the prompt and the text
    sampler: object
    left: int  # how many tokens may follow
    e: torch.Tensor = None  # (1, C)
    token: torch.Tensor = None  # (1,)


@torch.inference_mode()
def write(model, draft, prompts, max_new_tokens, samplers, stop_token, stats):
    """The texts after all prompts; draft None is plain decoding."""
    samplers = own_samplers(Sampling() if samplers is None else samplers, len(prompts))
    for prompt, own in zip(prompts, samplers):
        check_call(model, prompt, max_new_tokens, own)
    stops = stop_ids(model, stop_token)
    everyone = [Row(list(prompt), own, max_new_tokens) for prompt, own in zip(prompts, samplers)]
    rows, n, block_size = everyone, model.config.n_future, model.config.block_size
    room = max(map(len, prompts), default=0) + max_new_tokens + n  # drafts may go past a text's end
    cache = RowCache(len(rows), min(room, block_size))

    def add(row, new, n_drafts):
        block, row.left = until_end(new, row.left, stops)
        row.tokens += block
        if stats is not None:
            stats.count(len(new), len(block), n_drafts)

    for i, row in enumerate(rows if max_new_tokens > 0 else ()):
        hidden, new = fill(model, cache, i, window_ids(row.tokens, model)), []
        row.e, row.token = hidden[:, -1], draw_next(model, hidden, row.sampler, new)
        add(row, new, None)
    while True:
        going = [i for i, row in enumerate(rows) if row.left > 0]
        if not going:
            return [row.tokens[len(prompt) :] for row, prompt in zip(everyone, prompts)]
        if len(going) < len(rows):  # the others' texts have ended
            rows = [rows[i] for i in going]
            cache.keep(going)
        for i, row in enumerate(rows):
            if cache.length[i] == block_size:  # the next window but its pending token
                row.e = fill(model, cache, i, window_ids(row.tokens, model)[:, :-1])[:, -1]
        # all rows make as many drafts: no more than the longest one has room for
        n_drafts = min(n - 1, block_size - max(cache.length) - 1) if draft else 0
        step(model, cache, rows, n_drafts, draft, add)


def step(model, cache, rows, n_drafts, draft, add):
    """The new tokens of a pass for each row, and its state after them."""
    sampler = rows[0].sampler  # one for all is faster than one for each
    if any(row.sampler is not sampler for row in rows):
        sampler = EachItsOwn([row.sampler for row in rows])
        draft = draft and partial(sampler.draft, draft)
    e, token = (torch.cat(parts) for parts in zip(*((row.e, row.token) for row in rows)))
    hidden, found = pass_of_rows(model, cache, e, token, n_drafts, sampler, draft)
    for i, (row, (k, finite, *new)) in enumerate(zip(rows, found.tolist())):
        check_finite(finite)
        cache.length[i] += k + 1  # x_1 and the accepted drafts; the others are rolled back
        row.e, row.token = hidden[i, k : k + 1], found[i, -1:]
        add(row, [*new[:k], new[-1]], found.size(1) - 3)


def check_head(model):
    if model.head is None:
        raise BadInput("n_future = 1: there is no head to draft from; decode plainly")


def generate_plain_batch(model, prompts, max_new_tokens, *, samplers=None, stop_token=None,
                         stats=None):
    """Plain decoding of B prompts, lists of ids, one token of each per forward pass: -> B texts.

    samplers: one that all rows draw from in turn, or a list of B; with a generator of its own, a
    row's text depends on the others by rounding alone. stop_token: as in `stream`, of all rows.
    stats: a Stats to count in; a step counts once for each row. BadInput as in `stream`.
    """
    with torch.autocast(model.device.type, enabled=False):  # as in `stream`
        return write(model, None, prompts, max_new_tokens, samplers, stop_token, stats)


def generate_batch(model, prompts, max_new_tokens, *, samplers=None, stop_token=None, stats=None):
    """Self-speculative decoding (arXiv 2410.17765) of B prompts, 1..n tokens of each per forward
    pass.

    Arguments and result: see `generate_plain_batch`. When one row is about to fill its block, all
    make fewer drafts, and random numbers go to other places of their texts.
    """
    check_head(model)
    with torch.autocast(model.device.type, enabled=False):  # as in `stream`
        return write(model, model.head.draft, prompts, max_new_tokens, samplers, stop_token, stats)


def generate(model, prompt, max_new_tokens, *, sampler=None, **options):
    """generate_batch of one prompt, in the form of decode.py's decoders; all is written at once."""
    texts = generate_batch(model, [prompt], max_new_tokens, samplers=sampler, **options)
    return (token for token in texts[0])


# -----------------------------------------------------------------------------
# the measurement

DECODERS = {"plain": generate_plain_batch, "speculative": generate_batch}


def measure(model, prompts, n_tokens, temperature, n_rounds, seed):
    """A row of the table: how fast both decoders continue the prompts."""
    rounds, stats = {name: [] for name in DECODERS}, {name: Stats() for name in DECODERS}
    for i in range(n_rounds + 1):
        for name, decoder in DECODERS.items():
            generator = torch.Generator(model.device).manual_seed(seed + i)
            sampler = make_sampler(temperature, generator=generator)
            decode = partial(decoder, model, prompts, n_tokens, samplers=sampler, stats=stats[name])
            seconds, texts = timed(decode, model.device)
            tokens = sum(map(len, texts))
            rounds[name].append({"seconds": seconds, "tokens": tokens, "texts": texts})
    same = rounds["plain"][0]["texts"] == rounds["speculative"][0]["texts"]
    plain, fast = (own[1:] for own in rounds.values())  # the first round warms up
    ratios = speedups(plain, [r["seconds"] / r["tokens"] for r in fast])
    return {"batch_size": len(prompts), "temperature": temperature,
            "plain": tokens_per_second(plain), "speculative": tokens_per_second(fast),
            "speedup": statistics.median(ratios), "speedup_range": [min(ratios), max(ratios)],
            "tokens_per_step": stats["speculative"].tokens_per_step,
            "same_texts": None if temperature else same}


def tokens_per_second(rounds):
    """The median of the rounds, all rows together."""
    return statistics.median(r["tokens"] / r["seconds"] for r in rounds)


def print_row(row):
    spread = "{:.2f}..{:.2f}".format(*row["speedup_range"])
    same = {None: "", True: "same texts", False: "texts part"}[row["same_texts"]]
    print(f"{row['batch_size']:5} {row['temperature']:4.1f} {row['plain']:9.0f} "
          f"{row['speculative']:11.0f} {row['speedup']:7.2f}x {spread:>12} "
          f"{row['tokens_per_step']:8.2f}  {same}".rstrip())


def parse_args():
    parser = ArgumentParser(__doc__)
    add_model_flags(parser)
    parser.add_argument("--batch_sizes", type=number(int, 1, 4096), nargs="+", default=[1, 4, 16],
                        metavar="B", help="texts at once (1 4 16); prompts come again if need be")
    parser.add_argument("--max_new_tokens", type=number(int, 2, 10**6), default=64,
                        help="tokens per prompt (64)")
    parser.add_argument("--rounds", type=number(int, 5), default=7,
                        help="interleaved rounds, at least 5: the median of fewer is noise (7)")
    parser.add_argument("--threads", type=number(int, 1, 1024),
                        help="CPU threads (torch's default)")
    return parser.parse_args()


def main():
    args = parse_args()
    torch.set_flush_denormal(True)  # probabilities below 1e-38 are 0; x86 would be slow at them
    model, enc, ckpt = load(args.out_dir, args.device, args.dtype)
    texts, rows = ckpt["meta"]["prompts"], []
    prompts = [enc.prompt_ids(texts[i % len(texts)]) for i in range(max(args.batch_sizes))]
    torch.set_num_threads(args.threads or torch.get_num_threads())
    card = {"out_dir": args.out_dir, "hardware": hardware(model.device), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "max_new_tokens": args.max_new_tokens,
            "rounds": args.rounds, "seed": args.seed}
    with fast_kernels(model):
        for temperature, B in itertools.product((0.0, 1.0), args.batch_sizes):
            rows.append(measure(model, prompts[:B], args.max_new_tokens, temperature, args.rounds,
                                args.seed))
            if len(rows) == 1:  # now it is sure that the model decodes several texts
                print("tokens per second of all rows together\n"
                      "batch temp     plain speculative speed-up        range tok/step")
            print_row(rows[-1])
    print(json.dumps({"card": card, "rows": rows}), flush=True)


if __name__ == "__main__":
    run_script(main)
