"""One text, in steps of fixed shapes, which a GPU records once as a CUDA graph and then replays.

    python bench_speculative.py --out_dir out/tinystories --captured

A small model's step is hundreds of short kernels, and Python takes longer to ask for each of them
than a GPU to run it. So everything that a step reads, or leaves for the next one, has a fixed place
on the device, the number of tokens so far included: no part of a step waits for another, and one
call replays them all. On a CPU there is nothing to record, and the same steps run one by one.

generate_cached_captured and generate take the arguments of generate_cached and generate_speculative
in decode.py, and write texts of the same distribution, from other random
numbers. A text keeps to its sampler as it was at its beginning. A recording keeps to the code as it
was: if you replace a function while Python runs, call model.recorded.clear().
"""

import copy
import functools
import math
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch

from common import compiler_errors
from decode import (Greedy, Sampling, check_accepted, draws_from_warp, next_window, prefill,
                    stream)
from decoders.batched import RowCache, check_head, check_rows, plain_pass, speculative_pass
from model import BadInput

SMALLEST = 256  # places of a cache; a longer text gets twice as many


class FixedCache(RowCache):
    """A RowCache of one text whose length is on the device, too, and of which every pass looks at all
    places: those past the length are masked."""

    def __init__(self, room, device):
        super().__init__(1, room)
        self.on_device = torch.zeros(1, dtype=torch.long, device=device)

    def put(self, row, cache):
        for kv in self.kv:
            kv.zero_()  # what is masked must be finite
        super().put(row, cache)
        self.on_device.fill_(cache.length)

    def lengths(self):
        return self.on_device

    def reach(self, T):
        return self.room


class Noise:
    """A torch.Generator's place in a sampler: random numbers that were drawn before the step."""

    def __init__(self, size, device):
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.numbers, self.used = torch.zeros(size, dtype=wide, device=device), 0

    def draw(self, generator):
        self.numbers.uniform_(generator=generator)

    def take(self, shape):
        first, self.used = self.used, self.used + math.prod(shape)
        return self.numbers[first : self.used].view(shape)


class Kind(NamedTuple):
    """What the steps are."""

    one_pass: callable  # plain_pass or speculative_pass of decoders/batched.py
    most: int  # how many drafts they make
    compile: bool  # whether torch.compile joins their operations to fewer and larger ones


class Steps:
    """The steps of one text after another, by one model and sampler, with room for so many tokens.

    The state before a step, as in `speculative_step` of decode.py: token (1,), e (1, C), the cache.
    """

    def __init__(self, model, sampler, kind, room):
        self.model, self.kind, self.sampler = model, kind, copy.copy(sampler)
        self.cache, self.token, self.e = FixedCache(room, model.device), None, None
        self.replay, self.generator = None, None
        # a draft takes one number, `verify` one for each place and one for the token
        self.noise = Noise(2 * (kind.most + 1), model.device)
        if not isinstance(sampler, Greedy):
            self.sampler.generator = self.noise

    def begin(self, cache, hidden, token, generator):
        """Take over a text: cache, hidden (T, C), token (1,), and the generator of its draws."""
        self.cache.put(0, cache)
        if self.token is None:
            self.token, self.e = token.clone(), hidden[-1:].clone()
        self.token.copy_(token)
        self.e.copy_(hidden[-1:])
        self.generator = generator

    def step(self, n_drafts):
        """-> (1, n_drafts + 2), as of `speculative_pass`, and the state after it. Nothing here waits."""
        self.noise.used = 0
        one_pass = self.kind.one_pass
        e = self.e if one_pass is plain_pass else self.model.head.see(self.e)
        hidden, new = one_pass(self.model, self.cache, e, self.token, n_drafts, self.sampler)
        k = new[0, :1].clamp_min(0)  # (1,), the accepted drafts
        self.token.copy_(new[0, -1:])
        self.e.copy_(hidden[0].index_select(0, k))  # row 0 is x_1's, row k the last token's
        self.cache.on_device += k + 1  # x_1 and the accepted drafts; the others are rolled back
        return new

    def run(self, n_drafts):
        """A step, recorded if it has all its drafts: its 1..n_drafts + 1 tokens, a list."""
        if not isinstance(self.sampler, Greedy):
            self.noise.draw(self.generator)
        if n_drafts < self.kind.most:  # at a block's end
            new = self.step(n_drafts)
        else:
            self.replay = self.replay or self.record()
            new = self.replay()
        k, *ids = new[0].tolist()  # the one time that a step waits
        check_accepted(k)
        self.cache.length[0] += k + 1
        return [*ids[:k], ids[-1]]

    def record(self):
        """A function that does what step(most) does."""
        step, device = partial(self.step, self.kind.most), self.model.device
        if self.kind.compile:
            torch._dynamo.config.cache_size_limit = 256  # of step, for all Steps: 8 are soon spent
            step = torch.compile(step, dynamic=False)
        if device.type != "cuda":
            return step
        state = self.token, self.e, self.cache.on_device
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
                new = step()

        def replay():
            graph.replay()
            return new

        return replay


KEPT = 16  # kinds of Steps that a model keeps


class Recorded(dict):
    """The Steps that a model keeps, by kind, for as long as its tensors are in these places. Neither
    pickle nor copy takes them along."""

    places = None

    def __reduce__(self):
        return Recorded, ()


def rule_of(sampler):
    """What a sampler draws by, as a key."""
    warp = getattr(sampler, "warp", None)
    return (type(sampler), type(sampler).draw, type(sampler).verify,
            tuple(warp.keywords.items()) if draws_from_warp(sampler) else warp)


@contextmanager
def borrowed_steps(model, sampler, kind, room):
    """Steps that no other text is using. The model keeps the last ones, as recording takes a while."""
    tensors = [*model.parameters(), *model.buffers()]
    places = [x.data_ptr() if x.layout == torch.strided else id(x) for x in tensors]
    kept = vars(model).setdefault("recorded", Recorded())
    if kept.places != places:  # weights have been replaced: a recording would read the old ones
        kept.clear()
        kept.places = places
    key = id(model), model.config.target, rule_of(sampler), kind, room
    pool = kept.pop(key, [])
    steps = pool.pop() if pool else Steps(model, sampler, kind, room)
    steps.tensors = [x.detach() for x in tensors]  # so that nothing else gets their places
    kept[key] = pool  # the last one
    while len(kept) > KEPT:
        del kept[next(iter(kept))]
    try:
        yield steps
    finally:
        if kept.places == places:
            kept.setdefault(key, []).append(steps)


def captured_blocks(model, tokens, sampler, kind):
    """See `stream` of decode.py."""
    block_size = model.config.block_size
    cache, hidden, token = prefill(model, tokens, sampler)
    yield tokens[-1:], None
    while True:
        if cache.length == block_size:
            cache, hidden = next_window(model, tokens)
        room = min(block_size, max(SMALLEST, 2 ** (cache.length + kind.most).bit_length()))
        with borrowed_steps(model, sampler, kind, room) as steps:
            steps.begin(cache, hidden, token, sampler.generator)
            length = steps.cache.length  # a list of one
            # up to the block's end, or to where a text needs more room
            while length[0] < block_size and (room == block_size or length[0] + kind.most < room):
                n_drafts = min(kind.most, room - length[0] - 1)
                new = steps.run(n_drafts)
                tokens += new
                yield new, n_drafts
            token = steps.token.clone()
        cache, hidden = next_window(model, tokens)


@functools.cache
def check_compiler(device):
    """BadInput where torch.compile does not work."""
    with compiler_errors():
        torch.compile(torch.neg)(torch.ones(8, device=device))


def check_captured(model, sampler, compile):
    """BadInput for what cannot be recorded, or compiled."""
    if type(sampler) not in (Greedy, Sampling):
        raise BadInput(f"captured steps draw by Sampling or Greedy, not by {type(sampler).__name__}, whose "
                       "random numbers or state they do not know; take generate_speculative, or --mode "
                       "speculative")
    check_rows(model)
    if compile and any(hasattr(module, "packed") for module in model.modules()):
        raise BadInput("--compile knows nothing of packed layers, which a pretrained model has on a CPU; "
                       "leave it away")
    if compile:
        check_compiler(model.device)


def generate_cached_captured(model, prompt, max_new_tokens, *, sampler=None, compile=False, **options):
    """Plain decoding, one token per step. compile: see `Kind`, some 15 s at first. Options: see
    `stream` of decode.py."""
    sampler = Sampling() if sampler is None else sampler
    check_captured(model, sampler, compile)
    blocks = partial(captured_blocks, kind=Kind(plain_pass, 0, compile))
    return stream(blocks, model, prompt, max_new_tokens, sampler=sampler, **options)


def generate(model, prompt, max_new_tokens, *, sampler=None, compile=False, **options):
    """Self-speculative decoding (arXiv 2410.17765), 1..n tokens per step. Options: see
    `generate_cached_captured`."""
    sampler = Sampling() if sampler is None else sampler
    check_head(model)
    check_captured(model, sampler, compile)
    blocks = partial(captured_blocks, kind=Kind(speculative_pass, model.config.n_future - 1, compile))
    return stream(blocks, model, prompt, max_new_tokens, sampler=sampler, **options)


DECODERS = generate_cached_captured, generate
