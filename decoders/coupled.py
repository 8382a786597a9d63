"""Random numbers that belong to the place in the text: all decoders write the same one."""

import torch

import decode
from decode import Greedy, Sampling, keep_equal
from model import BadInput, whole


class Coupled(Sampling):
    """Sampling with random numbers that belong to the place in the text (Gumbel coupling).

    The token at place t is argmax_x p(x) / E_t(x), where the exponential noise E_t depends on the
    seed and on t alone. That is a draw from p, so the text is a function of the seed and the model,
    whatever was drafted: all decoders write the same one. A draft is kept where it is that token,
    which happens less often than `verify` allows. One object serves one text. seed: below 2**32.
    """

    def __init__(self, seed, temperature=1.0, top_k=None, top_p=None, device="cpu"):
        if whole("seed", seed, 0) >= 2**32:
            raise BadInput(f"seed must be below 2**32, not {seed}")
        super().__init__(temperature, top_k, top_p, torch.Generator(device))
        self.seed, self.place = seed, 0
        self.verified = 1  # the text's first token comes from draw, all others from verify

    def draw(self, logits):
        p = self.warp(logits)
        tokens = torch.empty(p.shape[:-1], dtype=torch.long, device=p.device)
        for i, row in enumerate(p.flatten(0, -2)):  # the places from self.place on
            self.generator.manual_seed((1_000_003 * self.seed + self.place + i) % 2**32)
            noise = torch.empty_like(row, dtype=torch.float64)
            tokens.view(-1)[i] = (row / noise.exponential_(generator=self.generator)).argmax()
        self.place += tokens.numel()
        return tokens, None  # `verify` asks for no rows

    def verify(self, logits, q, drafted):
        self.place = self.verified  # of the first draft; others may have been drawn and thrown away
        n_accepted, token = keep_equal(self.draw(logits)[0], drafted)
        self.place = self.verified = self.verified + n_accepted.item() + 1
        return n_accepted, token


def generate(model, prompt, max_new_tokens, *, sampler=None, **options):
    """`generate` of decode.py with the settings of a Sampling, whose generator gives the seed of a
    Coupled. Options: see `stream` there."""
    sampler = Sampling() if sampler is None else sampler
    if type(sampler) not in (Sampling, Greedy, Coupled):
        raise BadInput(f"coupled texts are of Sampling's settings, not of {type(sampler).__name__}'s; "
                       "take --mode speculative")
    if type(sampler) is Sampling:
        seed = torch.randint(2**32, (), generator=sampler.generator, device=model.device).item()
        sampler = Coupled(seed, **sampler.warp.keywords, device=model.device)
    return decode.generate(model, prompt, max_new_tokens, sampler=sampler, **options)
