"""More than one text at once: texts of different lengths share drafts, pass and verification.

    python -m decoders.batched --out_dir out/toy --batch_sizes 1 4 16

generate_cached_batch and generate_speculative_batch do for B prompts what generate_cached and
generate_speculative of decode.py do for one. Every row has its own length in the cache, and its own
positions, acceptance and roll-back. It leaves the batch when its text ends.

As a script, this continues the checkpoint's prompts with both decoders in turn, round after round.
Speeds are medians over the rounds, and a speed-up is the median of the rounds' own ratios. The last
line of stdout is one JSON object.
"""

import itertools
import json
import statistics
from dataclasses import dataclass, field
from functools import partial

import torch

from bench_speculative import hardware, speedups, timed
from common import ArgumentParser, number, run_script
from decode import (Sampling, Stats, bad_unless_finite, check_accepted, check_call, draft, draw_next,
                    make_sampler, until_end, window_ids)
from decoders.coupled import Coupled
from model import BadInput, KVCache
from sample import add_model_flags, fast_kernels, load, prompt_ids

# -----------------------------------------------------------------------------
# one forward pass over rows of different lengths


class RowCache:
    """Keys and values of B texts, and how many of them are valid, a list of B.

    A pass with T tokens for each row writes the places l, ..., l + T - 1 of its row. What is stale
    after them is masked, and finite. Attention calls `append` in model.py, `update` in transformers.
    """

    def __init__(self, B, room):
        self.length, self.room, self.kv = [0] * B, room, []

    def put(self, row, cache):
        """Take over the cache of one text."""
        parts = keys_and_values(cache)  # (2, nh, l, hs) of each layer
        if not self.kv:
            B = len(self.length)
            self.kv = [x.new_zeros(2, B, x.size(1), self.room, x.size(3)) for x in parts]
        for own, part in zip(self.kv, parts):
            own[:, row, :, : cache.length] = part
        self.length[row] = cache.length

    def lengths(self):
        """On the device, (B,)."""
        return torch.tensor(self.length, device=self.kv[0].device)

    def reach(self, T):
        """How many places the next pass looks at, which has T tokens for each row."""
        return max(self.length) + T

    def begin(self, T):
        """Say where the next pass writes: places (B, T)."""
        first = self.lengths().unsqueeze(1)
        self.rows = torch.arange(len(first), device=first.device).unsqueeze(1)
        self.places = first + torch.arange(T, device=first.device)
        return self.places

    def append(self, layer, kv):
        """Write kv (2, B, nh, T, hs) at the places: -> (2, B, nh, reach(T), hs)."""
        self.kv[layer][:, self.rows, :, self.places] = kv.permute(1, 3, 0, 2, 4)
        return self.kv[layer].narrow(3, 0, self.reach(kv.size(3)))

    def update(self, keys, values, layer, *unused, **options):
        """`append`, as attention in transformers calls it."""
        return self.append(layer, torch.stack((keys, values))).unbind()

    def get_seq_length(self, *unused):
        return max(self.length)

    def keep(self, rows):
        """Drop all rows but these."""
        self.length = [self.length[row] for row in rows]
        self.kv = [kv[:, rows] for kv in self.kv]


def keys_and_values(cache):
    """The keys and values of one text, (2, nh, l, hs) of each layer: of a KVCache, or of a Cache of
    pretrained/."""
    if isinstance(cache, KVCache):
        return [kv[:, 0, :, : cache.length] for kv in cache.kv]
    return [torch.stack((layer.keys[0], layer.values[0])) for layer in cache.past.layers]


def hidden_of_rows(model, x, cache):
    """`GPT.hidden` of the tokens x (B, T) that follow those in a RowCache: -> (B, T, C).

    The lengths stay what they were.
    """
    places = cache.begin(x.size(1))
    return hidden_at(model, x, cache, places, visible(places, cache.reach(x.size(1))))


def hidden_at(model, x, cache, places, seen):
    """`hidden_of_rows` of tokens at places (B, T) of their texts, which see those of a RowCache that
    seen (B, 1, T, reach) says, after its `begin`."""
    # once for all layers: attention adds 0, or a number near -inf
    bias = seen.to(model.dtype).sub(1).mul(torch.finfo(model.dtype).max)
    if hasattr(model, "lm"):
        out = model.pass_over(x, cache, attention_mask=bias, position_ids=places)
        return out.last_hidden_state
    trunk = model.transformer
    return model.through_blocks(trunk.wte(x) + trunk.wpe(places), cache, bias)


def visible(places, n):
    """Whether a token at places (B, T) sees the places 0..n - 1 of its row, those up to its own:
    (B, 1, T, n)."""
    return (torch.arange(n, device=places.device) <= places.unsqueeze(-1)).unsqueeze(1)


@torch.inference_mode()
def check_rows(model):
    """BadInput unless the model takes texts of different lengths in one pass. Ours does; one of
    transformers is tried once."""
    if getattr(model, "takes_rows", True):
        return
    idx = torch.arange(3, 11, device=model.device).unsqueeze(0) % model.config.vocab_size
    lengths, cache = (6, 1), RowCache(2, 8)
    try:
        expected = [model.hidden(idx[:, : length + 2])[0, -2:] for length in lengths]
        for row, length in enumerate(lengths):
            single = model.new_cache()
            model.hidden(idx[:, :length], single)
            cache.put(row, single)
        x = torch.cat([idx[:, length : length + 2] for length in lengths])
        same = all(map(model.close, hidden_of_rows(model, x, cache), expected))
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
        same = False  # it asks more of a cache, or has another kind of mask
    config = model.lm.config.get_text_config()
    # of some, a long text changes the angles of the others' places, or ends their window
    rope = str([getattr(config, name, "") for name in ("rope_parameters", "rope_scaling")])
    window = getattr(config, "window_size", None) or getattr(config, "attention_chunk_size", None)
    if not same or window or "longrope" in rope or "dynamic" in rope:
        raise BadInput(f"{model.source.get('name')} cannot take texts of different lengths in one "
                       "pass, which batches, captured steps and trees are made of; decode one text at "
                       "a time, speculatively or plainly")
    model.takes_rows = True


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

    def __init__(self, model, prompts, max_new_tokens, samplers, stop_token, stats):
        for prompt in prompts:
            check_call(model, prompt)
        check_rows(model)
        samplers = own_samplers(Sampling() if samplers is None else samplers, len(prompts))
        self.model, self.stop_token, self.stats = model, stop_token, stats
        self.rows = [Row(list(prompt), sampler, max_new_tokens)
                     for prompt, sampler in zip(prompts, samplers)]
        # a step's drafts may go past the text's end
        room = max(map(len, prompts), default=0) + max_new_tokens + model.config.n_future
        self.cache = RowCache(len(prompts), min(room, model.config.block_size))

    @property
    def sampler(self):
        """One sampler for all rows that are left, which is faster if they share theirs."""
        samplers = [row.sampler for row in self.rows]
        shared = all(sampler is samplers[0] for sampler in samplers)
        return samplers[0] if shared else EachItsOwn(samplers)

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


class EachItsOwn:
    """The two methods of a sampler, for rows that have one each."""

    def __init__(self, samplers):
        self.samplers = samplers

    def draw(self, logits):
        return self.of_all("draw", logits)

    def verify(self, logits, q, drafted):
        return self.of_all("verify", logits, q, drafted)

    def of_all(self, method, *args):
        """Call it for each row with its part of the arguments: two tensors with a row for each."""
        parts = zip(*(arg.split(1) for arg in args))
        found = [getattr(own, method)(*part) for own, part in zip(self.samplers, parts)]
        return tuple(map(torch.cat, zip(*found)))


def own_samplers(samplers, B):
    """A sampler for each of B rows, from one or from a list of B."""
    samplers = list(samplers) if isinstance(samplers, (list, tuple)) else [samplers] * B
    if len(samplers) != B:
        raise BadInput(f"{B} prompts need {B} samplers, or one for all, not {len(samplers)}")
    coupled = [id(sampler) for sampler in samplers if isinstance(sampler, Coupled)]
    if len(set(coupled)) < len(coupled):
        raise BadInput("a Coupled sampler serves one text: give every row one of its own")
    return samplers


def plain_pass(model, cache, e, token, n_drafts, sampler):
    """`speculative_pass` without drafts."""
    hidden = hidden_of_rows(model, token.unsqueeze(1), cache)  # (B, 1, C)
    logits = model.target_logits(hidden)  # (B, 1, n_token)
    tokens = sampler.draw(logits[:, 0])[0].unsqueeze(1)
    return hidden, torch.cat((bad_unless_finite(torch.zeros_like(tokens), logits), tokens), 1)


def speculative_pass(model, cache, e, token, n_drafts, sampler):
    """The step of decode.py for B texts, up to where it waits for the device.

    e (B, C) is the state that the head drafts from, token (B,) the last one of each text. Returns
    the hidden states (B, k + 1, C) of token and the k = n_drafts drafts, and (B, k + 2): how many
    drafts are accepted, or BAD; the drafts; the token after the accepted ones.
    """
    x, q = draft(model, e, token, n_drafts, sampler)  # (B, k + 1), (B, k + 1, n_token)
    hidden = hidden_of_rows(model, x, cache)
    logits = model.target_logits(hidden)  # (B, k + 1, n_token)
    n_accepted, tokens = sampler.verify(logits, q, x[:, 1:])  # (B, 1), (B, 1)
    return hidden, torch.cat((bad_unless_finite(n_accepted, logits), x[:, 1:], tokens), 1)


def plain_step(batch):
    """One token for each row."""
    batch_step(batch, plain_pass, None, 0)


def speculative_step(batch):
    """1..n tokens for each row. All rows make as many drafts: where one is about to fill its block,
    no more than it has room for."""
    room = batch.model.config.block_size - max(batch.cache.length) - 1
    e = torch.cat([batch.model.head.see(row.hidden)[-1:] for row in batch.rows])  # (B, C)
    batch_step(batch, speculative_pass, e, min(batch.model.config.n_future - 1, room))


def batch_step(batch, one_pass, e, n_drafts):
    """Give each row the new tokens of a pass, and its state the place after them."""
    token = torch.cat([row.token for row in batch.rows])
    hidden, new = one_pass(batch.model, batch.cache, e, token, n_drafts, batch.sampler)
    for i, (row, (k, *ids)) in enumerate(zip(batch.rows, new.tolist())):
        check_accepted(k)
        batch.cache.length[i] += k + 1  # x_1 and the accepted drafts; the others are rolled back
        row.hidden, row.token = hidden[i, : k + 1], new[i, -1:]
        batch.add(row, [*ids[:k], ids[-1]], n_drafts)


def check_head(model):
    """BadInput unless the model has a head, and one that drafts from hidden states alone."""
    if model.head is None:
        raise BadInput("n_future = 1: there is no head to draft from; decode plainly")
    if model.head.reads_trunk:
        raise BadInput(f"head {model.config.head} reads the trunk through a cache with one length "
                       "for all rows; decode one text at a time, speculatively or plainly")


def generate_cached_batch(model, prompts, max_new_tokens, *, samplers=None, stop_token=None,
                          stats=None):
    """Plain decoding of B prompts, lists of ids, one token of each per forward pass: -> B texts.

    samplers: one that all rows draw from in turn, or a list of B; with a generator of its own, a
    row's text depends on the others by rounding alone. stop_token: the id that ends a text, and is
    in it. stats: a Stats to count in; a step counts once for each row. BadInput as in `stream`.
    """
    return Batch(model, prompts, max_new_tokens, samplers, stop_token, stats).write(plain_step)


def generate_speculative_batch(model, prompts, max_new_tokens, *, samplers=None, stop_token=None,
                               stats=None):
    """Self-speculative decoding (arXiv 2410.17765) of B prompts, 1..n tokens of each per forward
    pass.

    Arguments and result: see `generate_cached_batch`. When one row is about to fill its
    block, all make fewer drafts, and random numbers go to other places of their texts.
    """
    check_head(model)
    return Batch(model, prompts, max_new_tokens, samplers, stop_token, stats).write(speculative_step)


def generate(model, prompt, max_new_tokens, *, sampler=None, **options):
    """generate_speculative_batch of one prompt, in the form of decode.py's decoders."""
    yield from generate_speculative_batch(model, [prompt], max_new_tokens, samplers=sampler, **options)[0]


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
    texts, chat, rows = ckpt["meta"]["prompts"], ckpt["meta"].get("chat", False), []
    prompts = [prompt_ids(enc, texts[i % len(texts)], chat) for i in range(max(args.batch_sizes))]
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
