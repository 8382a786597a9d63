"""More than one text at once: texts of different lengths share a forward pass, and nothing else.

    python batched.py --out_dir out/toy --batch_sizes 1 4 16

generate_cached_batch and generate_speculative_batch do for B prompts what generate_cached and
generate_speculative of decode.py do for one. Every row has its own length in the cache, and its own
positions, drafts, acceptance and roll-back. It leaves the batch when its text ends.

As a script, this continues the checkpoint's prompts with both decoders in turn, round after round.
Speeds are medians over the rounds, and a speed-up is the median of the rounds' own ratios. The last
line of stdout is one JSON object.
"""

import itertools
import json
import statistics
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch.nn.functional import pad

from bench_speculative import hardware, speedups, timed
from common import ArgumentParser, number, run_script
from decode import (Coupled, Sampling, Stats, check_call, check_finite, draft, draw_next,
                    make_sampler, until_end, window_ids)
from model import BadInput, KVCache
from sample import add_model_flags, fast_kernels, load, prompt_ids

# -----------------------------------------------------------------------------
# one forward pass over rows of different lengths


class RowCache(KVCache):
    """A KVCache with a length for each row, a list of B.

    A pass has T = width tokens for each row, of which the last ones may be padding. It writes the
    places l, ..., l + T - 1 of the row, and then l grows by 1 or more. So the next pass overwrites
    all that this one left stale, and later places are 0: attention meets no stale number, not even
    with weight 0. There is room after the block for its padding.
    """

    def __init__(self, config, B, width, dtype, device):
        room = replace(config, block_size=config.block_size + width - 1)
        super().__init__(room, B, dtype, device)
        self.length, self.width = [0] * B, width
        self.steps = torch.arange(width, device=device)

    def begin(self):
        """Say where the next pass writes: places (B, T)."""
        self.places = torch.tensor(self.length, device=self.steps.device).unsqueeze(1) + self.steps
        return self.places

    def append(self, layer, kv):
        """Write kv (2, B, nh, T, hs) at the places: -> (2, B, nh, longest + T, hs)."""
        rows = torch.arange(len(self.length), device=kv.device).unsqueeze(1)
        self.kv[layer][:, rows, :, self.places] = kv.permute(1, 3, 0, 2, 4)
        return self.kv[layer].narrow(3, 0, max(self.length) + self.width)

    def put(self, row, cache):
        """Take over a KVCache of one text."""
        self.length[row] = cache.length
        for own, kv in zip(self.kv, cache.kv):
            own[:, row] = 0  # what a longer text left there
            own[:, row, :, : cache.length] = kv[:, 0, :, : cache.length]

    def keep(self, rows):
        """Drop all rows but these."""
        self.length = [self.length[row] for row in rows]
        self.kv = [kv[:, rows] for kv in self.kv]


def hidden_of_rows(model, x, cache):
    """`GPT.hidden` of the tokens x (B, T) that follow those in a RowCache: -> (B, T, C).

    The lengths stay what they were.
    """
    trunk, last, places = model.transformer, model.config.block_size - 1, cache.begin()
    h = trunk.wte(x) + trunk.wpe(places.clamp_max(last))  # padding may be after the last place
    return model.through_blocks(h, cache, visible(places, max(cache.length) + cache.width))


def visible(places, n):
    """Whether a token at places (B, T) sees the places 0..n - 1 of its row, those up to its own:
    (B, 1, T, n)."""
    return (torch.arange(n, device=places.device) <= places.unsqueeze(-1)).unsqueeze(1)


# -----------------------------------------------------------------------------
# the decoders


@dataclass
class Row:
    """One text, and what the next step needs: see `speculative_step` of decode.py."""

    tokens: list  # the prompt and the text
    sampler: object
    left: int  # how many tokens may follow
    text: list = field(default_factory=list)
    token: torch.Tensor = None  # (1,), the last one, which the trunk has not seen
    hidden: torch.Tensor = None  # (T, C), of the tokens before it, which the head has not seen


class Batch:
    """The rows that go on, and their cache. Arguments: see `generate_cached_batch`."""

    def __init__(self, model, prompts, max_new_tokens, samplers, stop_token, stats, width):
        if hasattr(model, "lm"):
            raise BadInput("the cache of a trunk of transformers has one length for all rows; "
                           "decode one text at a time")
        for prompt in prompts:
            check_call(model, prompt)
        samplers = own_samplers(samplers or Sampling(), len(prompts))
        self.model, self.stop_token, self.stats = model, stop_token, stats
        self.rows = [Row(list(prompt), sampler, max_new_tokens)
                     for prompt, sampler in zip(prompts, samplers)]
        self.cache = RowCache(model.config, len(prompts), width, model.dtype, model.device)

    @torch.inference_mode()
    def write(self, step):
        """The texts; step(batch) gives every row its next tokens."""
        everyone, block_size = self.rows, self.model.config.block_size
        self.drop_ended()
        for i, row in enumerate(self.rows):
            self.fill(i, window_ids(row.tokens, self.model))
            row.token = draw_next(self.model, row.hidden[-1:], row.sampler)
            self.add(row, row.token.tolist(), None)
        while self.drop_ended():
            for i, row in enumerate(self.rows):
                if self.cache.length[i] == block_size:  # the next window but its pending token
                    self.fill(i, window_ids(row.tokens, self.model)[:, :-1])
            step(self)
        return [row.text for row in everyone]

    def drop_ended(self):
        """Let the rows go whose text has ended; returns those that are left."""
        going = [i for i, row in enumerate(self.rows) if row.left > 0]
        if len(going) < len(self.rows):
            self.rows = [self.rows[i] for i in going]
            self.cache.keep(going)
        return self.rows

    def fill(self, i, window):
        """Compute a row's cache from its window (1, T), by itself and so without padding."""
        cache = self.model.new_cache()
        self.rows[i].hidden = self.model.hidden(window, cache)[0]
        self.cache.put(i, cache)

    def add(self, row, new, n_drafts):
        """Give a row its new tokens, of n_drafts drafts."""
        row.tokens += new
        block, row.left = until_end(new, row.left, self.stop_token)
        row.text += block
        if self.stats is not None:
            self.stats.count(len(new), len(block), n_drafts)


def own_samplers(samplers, B):
    """A sampler for each of B rows, from one or from a list of B."""
    samplers = list(samplers) if isinstance(samplers, (list, tuple)) else [samplers] * B
    if len(samplers) != B:
        raise BadInput(f"{B} prompts need {B} samplers, or one for all, not {len(samplers)}")
    coupled = [id(sampler) for sampler in samplers if isinstance(sampler, Coupled)]
    if len(set(coupled)) < len(coupled):
        raise BadInput("a Coupled sampler serves one text: give every row one of its own")
    return samplers


def plain_step(batch):
    """One token for each row."""
    x = torch.stack([row.token for row in batch.rows])  # (B, 1)
    hidden = hidden_of_rows(batch.model, x, batch.cache)
    logits = batch.model.target_logits(hidden[:, 0])  # (B, n_token)
    check_finite(logits)
    samplers = [row.sampler for row in batch.rows]
    if all(sampler is samplers[0] for sampler in samplers):  # one draw for all of them is faster
        tokens = samplers[0].draw(logits)[0]
    else:
        tokens = torch.cat([s.draw(row)[0] for s, row in zip(samplers, logits.split(1))])
    for i, (row, token) in enumerate(zip(batch.rows, tokens.tolist())):
        batch.cache.length[i] += 1
        row.token = tokens[i : i + 1]
        batch.add(row, [token], 0)


def speculative_step(batch):
    """1..n tokens for each row: the step of decode.py, whose forward pass the rows share."""
    model, cache, drafts = batch.model, batch.cache, []
    for row, length in zip(batch.rows, cache.length):
        n_drafts = min(model.config.n_future - 1, model.config.block_size - length - 1)
        e = model.head.see(row.hidden)[-1]  # (C,), of the token before x_1
        drafts.append(draft(model, e, row.token, n_drafts, row.sampler))
    x = torch.stack([pad(x, (0, cache.width - len(x))) for x, _ in drafts])  # (B, T)
    hidden = hidden_of_rows(model, x, cache)
    hidden = [h[: len(x)] for h, (x, _) in zip(hidden, drafts)]  # B times (k + 1, C): no padding
    logits = model.target_logits(torch.cat(hidden))
    check_finite(logits)
    logits = logits.split([len(h) for h in hidden])
    verified = [row.sampler.verify(row_logits, q, x[1:])
                for row, row_logits, (x, q) in zip(batch.rows, logits, drafts)]
    n_accepted, tokens = (torch.cat(part).tolist() for part in zip(*verified))
    for i, (row, k, ids) in enumerate(zip(batch.rows, n_accepted, x.tolist())):
        cache.length[i] += k + 1  # x_1 and the accepted drafts; the others are rolled back
        row.hidden, row.token = hidden[i][: k + 1], verified[i][1]
        batch.add(row, [*ids[1 : k + 1], tokens[i]], len(hidden[i]) - 1)


def generate_cached_batch(model, prompts, max_new_tokens, *, samplers=None, stop_token=None,
                          stats=None):
    """Plain decoding of B prompts, lists of ids, one token of each per forward pass: -> B texts.

    samplers: one that all rows draw from in turn, or a list of B; with a generator of its own, a
    row's text depends on the others by rounding alone. stop_token: the id that ends a text, and is in it.
    stats: a Stats to count in; a step counts once for each row. BadInput as in `stream`.
    """
    batch = Batch(model, prompts, max_new_tokens, samplers, stop_token, stats, 1)
    return batch.write(plain_step)


def generate_speculative_batch(model, prompts, max_new_tokens, *, samplers=None, stop_token=None,
                               stats=None):
    """Self-speculative decoding (arXiv 2410.17765) of B prompts, 1..n tokens of each per forward
    pass. Arguments and result: see `generate_cached_batch`.
    """
    if model.head is None:
        raise BadInput("n_future = 1: there is no head to draft from; use generate_cached_batch")
    if model.head.reads_trunk:
        raise BadInput(f"head {model.config.head} reads the trunk through a cache with one length "
                       "for all rows; decode one text at a time")
    batch = Batch(model, prompts, max_new_tokens, samplers, stop_token, stats,
                  model.config.n_future)
    return batch.write(speculative_step)


# -----------------------------------------------------------------------------
# the measurement

DECODERS = {"plain": generate_cached_batch, "speculative": generate_speculative_batch}


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
    prompts = [prompt_ids(enc, texts[i % len(texts)]) for i in range(max(args.batch_sizes))]
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
