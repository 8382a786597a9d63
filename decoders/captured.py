"""One text, in steps of fixed shapes, which a GPU records once as a CUDA graph and then replays.

    python sample.py --out_dir out/tinystories --mode captured
    python -m decoders.captured --out_dir out/tinystories [--compile]     measures

A small model's step is hundreds of short kernels, and Python takes longer to ask for each of them
than a GPU to run it. So everything that a step reads, or leaves for the next one, has a fixed place
on the device, the number of tokens so far included: no part of a step waits for another, and one
call replays them all. On a CPU there is nothing to record, and the same steps run one by one.

The texts have the distribution of those of decode.py, from other random numbers.
"""

import copy
import math
from functools import partial

import torch

import bench_speculative
from bench_speculative import Mode
from common import run_script
from decode import Greedy, Sampling, check_finite, draw_next, stream, window_ids
from decoders.batched import RowCache, check_head, fill, pass_of_rows
from model import BadInput
from train import check_compiler

SMALLEST = 256  # places of a cache; a longer text gets twice as many
# random numbers that a step may take for each place: a component, a token, a coin, the next token
NUMBERS = 4


class FixedCache(RowCache):
    """A RowCache of one text whose length is on the device, too, and of which every pass looks at
    all places: those past the length are masked. replay: what does a step with all its drafts, once
    it is recorded."""

    def __init__(self, room, device):
        super().__init__(1, room)
        self.on_device, self.replay = torch.zeros(1, dtype=torch.long, device=device), None

    def lengths(self):
        return self.on_device

    def look_at(self, T):
        return self.room  # whatever the length: torch.compile would compile anew for each


class Captured:
    """Decodes text after text with one model and one sampler, in steps that are recorded once.

    sampler: Sampling (the default, at temperature 1) or Greedy, whose rule no recording can change.
    speculative: whether the head drafts. compile: whether torch.compile joins the operations of a
    step to fewer and larger ones, some 15 s at first.

    A recording keeps to the weights' places, to the sampler's rule and to the code as they were.
    New values in the same places count. Whoever replaces tensors, a rule or functions makes a new
    object. One text at a time: where another one has begun, BadInput.
    """

    def __init__(self, model, sampler=None, speculative=True, compile=False):
        sampler = Sampling() if sampler is None else sampler
        if type(sampler) not in (Greedy, Sampling):
            raise BadInput("captured steps draw by Sampling or Greedy, not by "
                           f"{type(sampler).__name__}, whose random numbers or state they do not "
                           "know; take --mode speculative")
        if speculative:
            check_head(model)
        if compile:
            check_compiler(model.device)
        self.model, self.compile = model, compile
        self.draft = model.head.draft if speculative else None
        self.most = model.config.n_future - 1 if speculative else 0
        self.sampler, self.generator = copy.copy(sampler), sampler.generator
        self.sampler.uniform = self.take  # a generator's numbers cannot be drawn within a recording
        wide = torch.float32 if model.device.type == "mps" else torch.float64
        self.numbers = torch.zeros(NUMBERS * (self.most + 1), dtype=wide, device=model.device)
        self.token, self.e = None, None  # the state before a step, as in `speculative_step`
        self.caches, self.n_texts = {}, 0

    def generate(self, prompt, max_new_tokens, *, generator=None, **options):
        """A text, as the decoders of decode.py yield it. generator: in the place of the sampler's.
        Options: see `stream`, but for the sampler."""
        own = Sampling(generator=generator).generator or self.generator  # BadInput for a seed
        blocks = partial(self.blocks, generator=own)
        return stream(blocks, self.model, prompt, max_new_tokens, **options)

    def blocks(self, model, tokens, unused, generator):
        self.n_texts += 1
        own, block_size = self.n_texts, model.config.block_size
        cache, hidden = self.begin(window_ids(tokens, model))
        self.draw_numbers(generator)
        token = draw_next(model, hidden, self.sampler, tokens)
        self.token = token.clone() if self.token is None else self.token.copy_(token)
        yield tokens[-1:], None
        while True:
            if own != self.n_texts:
                raise BadInput("another text has begun in the same Captured, which holds one")
            # at a block's end, or where the text needs more room: anew, but for the pending token
            if cache.length[0] + (self.most if cache.room < block_size else 0) >= cache.room:
                cache, _ = self.begin(window_ids(tokens, model)[:, :-1])
            n_drafts = min(self.most, cache.room - cache.length[0] - 1)
            new = self.run(cache, n_drafts, generator)
            tokens += new
            yield new, n_drafts

    def begin(self, window):
        """Compute the cache and e of a window (1, T): -> a cache with room for more, (1, T, C)."""
        T = window.size(1)
        room = min(self.model.config.block_size, max(SMALLEST, 2 ** (T + self.most).bit_length()))
        cache = self.caches.setdefault(room, FixedCache(room, self.model.device))
        for kv in cache.kv:
            kv.zero_()  # what is masked must be finite
        cache.on_device.zero_()
        hidden = fill(self.model, cache, 0, window)
        cache.on_device.fill_(T)
        e = hidden[:, -1]
        self.e = e.clone() if self.e is None else self.e.copy_(e)
        return cache, hidden

    def draw_numbers(self, generator):
        """All random numbers of a step, before it."""
        if isinstance(self.sampler, Sampling):
            self.numbers.uniform_(generator=generator)
        self.used = 0

    def take(self, shape, dtype, device):
        """In the place of torch.rand: the next numbers of `draw_numbers`."""
        first, self.used = self.used, self.used + math.prod(shape)
        if self.used > len(self.numbers):
            raise BadInput(f"a captured step has {NUMBERS} random numbers for each place, and this "
                           "head wants more; take --mode speculative")
        return self.numbers[first : self.used].view(shape)

    def run(self, cache, n_drafts, generator):
        """A step, recorded if it has all its drafts: its 1..n_drafts + 1 tokens, a list."""
        self.draw_numbers(generator)
        if n_drafts < self.most:  # at a block's end
            found = self.step(cache, n_drafts)
        else:
            cache.replay = cache.replay or self.record(cache)
            found = cache.replay()
        k, finite, *new = found[0].tolist()  # the one time that a step waits
        check_finite(finite)
        cache.length[0] += k + 1
        return [*new[:k], new[-1]]

    def step(self, cache, n_drafts):
        """`pass_of_rows`, and the state after it. Nothing here waits."""
        self.used = 0
        hidden, found = pass_of_rows(self.model, cache, self.e, self.token, n_drafts, self.sampler,
                                     self.draft)
        k = found[0, :1]  # (1,), the accepted drafts
        self.token.copy_(found[0, -1:])
        self.e.copy_(hidden[0].index_select(0, k))  # row 0 is x_1's, row k the last token's
        cache.on_device += k + 1  # x_1 and the accepted drafts; the others are rolled back
        return found

    def record(self, cache):
        """A function that does what step(cache, most) does."""
        step, device = partial(self.step, cache, self.most), self.model.device
        if self.compile:
            torch._dynamo.config.cache_size_limit = 256  # of step, for all caches: 8 are soon spent
            step = torch.compile(step, dynamic=False)
        if device.type != "cuda":
            return step
        state = self.token, self.e, cache.on_device
        before = [x.clone() for x in state]
        graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        with torch.cuda.device(device):
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):  # what libraries do when first called cannot be recorded
                    step()
                    for x, old in zip(state, before):
                        x.copy_(old)
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(graph, stream=aside):
                found = step()

        def replay():
            graph.replay()
            return found

        return replay


def generate(model, prompt, max_new_tokens, *, sampler=None, compile=False, **options):
    """Self-speculative decoding (arXiv 2410.17765), 1..n tokens per step, recorded for this text.
    Options: see `Captured`, and `stream` of decode.py."""
    return Captured(model, sampler, compile=compile).generate(prompt, max_new_tokens, **options)


# -----------------------------------------------------------------------------
# the measurement


def kept(speculative, compile):
    """A decoder for the bench, which records the steps of each temperature once."""
    recorded = {}

    def decode(model, prompt, max_new_tokens, *, sampler, **options):
        if type(sampler) not in recorded:  # Greedy, or Sampling at temperature 1
            recorded[type(sampler)] = Captured(model, sampler, speculative, compile)
        steps = recorded[type(sampler)]
        return steps.generate(prompt, max_new_tokens, generator=sampler.generator, **options)

    return decode


def add_flags(parser):
    parser.add_argument("--compile", action="store_true",
                        help="also in steps that torch.compile has compiled, some 15 s for each "
                             "decoder, temperature and size of the cache (needs a C++ compiler)")


def add_modes(bench, args):
    """Both decoders in steps of fixed shapes, which are compared with each other."""
    for compile in (False, True)[: 1 + args.compile]:
        how = "compiled" if compile else "captured"
        bench.modes[f"plain, {how}"] = Mode(kept(False, compile), bench.model)
        bench.modes[f"speculative, {how}"] = Mode(kept(True, compile), bench.model, True,
                                                  base=f"plain, {how}", has_parts=False)


def main():
    bench_speculative.main(__doc__, add_flags, add_modes)


if __name__ == "__main__":
    run_script(main)
