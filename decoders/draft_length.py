"""How many tokens to draft at a step, with any head, and what it gains to choose that number.

    python -m decoders.draft_length --out_dir out/toy

A policy is the drafter of generate_speculative. `Fixed`, `Confident` and `CLP` are lossless;
`generate_unverified` is not, and says so. The script fits CLP to the model's own texts after every
other prompt, and measures after the other half. The last line of stdout is one JSON object.
"""

import json
import math
import statistics
from functools import partial
from itertools import zip_longest

import torch
from torch.nn import functional as F

from bench_speculative import Bench, Mode, describe, distinct, print_card, print_table
from common import ArgumentParser, number, run_script
from decode import (Greedy, Sampling, draft, draw_next, generate_speculative, speculative_step,
                    window_ids)
from model import BadInput, widen
from sample import add_model_flags, fast_kernels, load, prompt_ids


class Fixed:
    """k drafts at every step, if there is room. Other policies override most or stops.

    most(e), e (1, C), says how many drafts to make at most; stops(row, x), as in `draft`, ends them. That
    is exact, for whether a draft is made depends on nothing but e and the drafts before it, so that
    q = 0 in its place is a row like any other. A decision must not look at the draft that it would
    throw away: the drafts that stay would not be drawn from q.
    """

    stops = None  # without it, independent heads draw all of their drafts at once

    def __init__(self, k):
        if not isinstance(k, int) or k < 0:
            raise BadInput(f"the number of drafts must be a whole number of at least 0, not {k!r}")
        self.k = k

    def most(self, e):
        return self.k

    def __call__(self, model, e, token, n_drafts, sampler):
        n_drafts = min(n_drafts, self.most(e))
        if not n_drafts:  # a plain step: the head has nothing to compute
            return token.unsqueeze(1), e.new_zeros(1, 1, model.config.n_token)
        return draft(model, e, token, n_drafts, sampler, self.stops)


class Confident(Fixed):
    """Stops when prod_s max_x q_s(x), the chance that the head gives its likeliest drafts, is below
    the threshold, 0..1. Temperature is left out. On a GPU every draft waits for the device."""

    def __init__(self, threshold):
        if not 0 <= threshold <= 1:
            raise BadInput(f"threshold must be at least 0 and at most 1, not {threshold}")
        self.threshold = threshold

    def most(self, e):
        self.chance = 1.0  # at the start of a step
        return math.inf

    def stops(self, row, x):
        self.chance *= row.softmax(-1).max().item()
        return self.chance < self.threshold


class CLP(Fixed):
    """Drafts as many tokens as promise most per second (arXiv 2606.10935 has the predictor).

    One linear layer tells how many drafts will hold: P(L | e) = softmax(A e + b), L = 0..n - 1. A
    step with k drafts is expected to yield 1 + sum_{i=1..k} P(L >= i) tokens, and takes as long as
    1 + cost k steps without any. The caller measures cost, at least 0; `fit` learns A and b.
    """

    def __init__(self, n_embd, n_future, cost):
        self.linear, self.cost = torch.nn.Linear(n_embd, n_future), cost

    def log_probs(self, e):
        """log P(L | e): e (..., C) -> (..., n)."""
        return self.linear(e.to(self.linear.weight)).log_softmax(-1)

    def most(self, e):
        at_least = self.log_probs(e[0]).exp().flip(-1).cumsum(-1).flip(-1)  # P(L >= k); k = 0 is the 1
        k = torch.arange(len(at_least), device=e.device)
        return (at_least.cumsum(-1) / (1 + self.cost * k)).argmax().item()


@torch.no_grad()
def collect(model, prompts, n_tokens, sampler, stop_token=None):
    """Data for `fit`: the model's own texts, n_tokens after each prompt or as many as fit a block.

    For each token, which sampler draws: the state before it, as the head sees it, (N, C), and how
    many of the n - 1 likeliest drafts after it are the model's own greedy continuation, (N,).
    """
    if model.head is None:
        raise BadInput("n_future = 1: there is no head to draft from")
    if not getattr(model.head, "quadratic", True):
        raise BadInput("linear decoding has no masks after every token to learn from")
    model = model.head.carrier(model)
    n, states, labels = model.config.n_future, [], []
    for prompt in prompts:
        cache = model.new_cache()
        before = model.hidden(window_ids(list(prompt), model), cache)[0]
        token, end = draw_next(model, before[-1:], sampler), cache.length + n_tokens
        while cache.length < min(end, model.config.block_size - n + 1) and token != stop_token:
            length = cache.length
            states.append(model.head.see(before, cache)[-1])
            before, _, new, _ = speculative_step(model, cache, before, token, n - 1, Greedy())
            labels.append(len(new) - 1)
            cache.length, before = length + 1, before[:1]  # only the token itself stays
            token = draw_next(model, before, sampler)
    if not states:
        raise BadInput(f"no prompt leaves room for {n} tokens in the block, or nothing was written")
    return torch.stack(states), torch.tensor(labels, device=model.device)


def fit(states, labels, n_future, cost=0.0, steps=300):
    """The CLP of least cross-entropy: states (N, C), labels (N,) in 0..n_future - 1."""
    clp = CLP(states.size(-1), n_future, cost)
    clp.linear.to(states.device, widen(states).dtype)
    for p in clp.linear.parameters():
        torch.nn.init.zeros_(p)  # it is convex
    optimizer = torch.optim.AdamW(clp.linear.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.nll_loss(clp.log_probs(states), labels).backward()
        optimizer.step()
    return clp


# -----------------------------------------------------------------------------
# the paper's own use of CLP, which is lossy


def generate_unverified(model, prompt, max_new_tokens, clp, tau, *, sampler=None, **options):
    """NOT LOSSLESS: it writes unverified drafts, which CHANGES THE DISTRIBUTION (arXiv 2606.10935).

    A step keeps all of L = argmax P(L | e) drafts if that P is at least tau, which is in (0, 1];
    else it is a plain one. clp: see `fit`. Options: see `stream`.
    """
    if not 0 < tau <= 1:
        raise BadInput(f"tau must be above 0 and at most 1, not {tau}")
    unverified = Unverified(clp, tau, sampler or Sampling())
    return generate_speculative(model, prompt, max_new_tokens, drafter=unverified,
                                sampler=unverified, **options)


class Unverified(Fixed):
    """Drafter and sampler of `generate_unverified`, and of nothing else."""

    def __init__(self, clp, tau, sampler):
        self.clp, self.tau, self.draw = clp, tau, sampler.draw

    def most(self, e):
        log_p, L = self.clp.log_probs(e[0]).max(-1)
        return L.item() if log_p.exp() >= self.tau else 0

    def verify(self, logits, q, drafted):
        return torch.tensor([len(drafted)], device=logits.device), self.draw(logits[-1:])[0]


def repetition(texts):
    """The share of 3-grams that the text already had: its mean over the texts."""
    return statistics.mean(1 - distinct([text], 3) for text in texts)


def agreement(texts, expected):
    """The share of tokens that are as expected, and the mean number before the first other one."""
    same = [[a == b for a, b in zip_longest(*pair)] for pair in zip(texts, expected)]
    first = [row.index(False) if False in row else len(row) for row in same]
    return sum(map(sum, same)) / sum(map(len, same)), statistics.mean(first)


# -----------------------------------------------------------------------------


def speculative(bench, policy):
    return Mode(partial(generate_speculative, drafter=policy), bench.model, True)


def cost_of_a_draft(bench, temperature, n_rounds):
    """c: a step with n - 1 drafts takes as long as 1 + c (n - 1) steps without any."""
    bench.modes["none"] = speculative(bench, Fixed(0))
    ms = {row["mode"]: row.get("step_ms") for row in bench.rows(temperature, n_rounds)[0]}
    del bench.modes["none"]
    return max(ms["speculative"] / ms["none"] - 1, 0) / (bench.model.config.n_future - 1)


def add_modes(bench, clp, args):
    policies = {f"fixed {k}": Fixed(k) for k in args.lengths if k < bench.model.config.n_future - 1}
    policies |= {f"confident {x:g}": Confident(x) for x in args.thresholds} | {"CLP": clp}
    bench.modes |= {name: speculative(bench, policy) for name, policy in policies.items()}
    for tau in args.taus:
        lossy = partial(generate_unverified, clp=clp, tau=tau)
        bench.modes[f"LOSSY {tau:g}"] = Mode(lossy, bench.model, True)


def parse_args():
    parser = ArgumentParser(__doc__)
    add_model_flags(parser)
    one, several = parser.add_argument, partial(parser.add_argument, nargs="+", metavar="X")
    chance, count = number(float, 0, 1, above=True), number(int, 1)
    several("--lengths", type=number(int, 0), default=[1, 3], help="numbers of drafts (1 3)")
    several("--thresholds", type=chance, default=[0.1, 0.3, 0.6], help="of Confident (0.1 0.3 0.6)")
    several("--taus", type=chance, default=[0.5, 0.9], help="of the lossy mode (0.5 0.9)")
    one("--rounds", type=count, default=5, help="interleaved rounds (5)")
    one("--max_new_tokens", type=number(int, 2), default=64, help="tokens per prompt (64)")
    one("--fit_texts", type=count, default=8, help="texts per prompt that CLP learns from (8)")
    one("--threads", type=number(int, 1, 1024), default=1, help="CPU threads (1)")
    return parser.parse_args()


def main():
    args = parse_args()
    torch.set_flush_denormal(True)  # as bench_speculative.py
    torch.set_num_threads(args.threads)
    model, enc, ckpt = load(args.out_dir, args.device, args.dtype)
    chat = ckpt["meta"].get("chat", False)
    prompts = [prompt_ids(enc, text, chat) for text in ckpt["meta"]["prompts"]]
    if len(prompts) < 2:
        raise BadInput(f"{args.out_dir} has one prompt: there is none to learn CLP from")
    stop_token = enc.eot_token if chat else None
    bench = Bench(model, prompts[1::2], args.max_new_tokens, args.seed, stop_token=stop_token)
    sampler = Sampling(generator=torch.Generator(model.device).manual_seed(args.seed))
    options = args.max_new_tokens, sampler, stop_token
    with fast_kernels(model):
        clp = fit(*collect(model, prompts[::2] * args.fit_texts, *options), model.config.n_future)
        states, labels = collect(model, bench.prompts, *options)
    share = labels.bincount() / len(labels)
    costs = [cost_of_a_draft(bench, temperature, args.rounds) for temperature in (0.0, 1.0)]
    card = describe(bench, args) | {
        "clp_loss": F.nll_loss(clp.log_probs(states), labels).item(),  # nats, after new prompts
        "clp_loss_of_a_constant": torch.special.entr(share).sum().item(), "cost_of_a_draft": costs}
    print_card(card, bench)
    add_modes(bench, clp, args)
    rows = []
    for temperature, clp.cost in zip((0.0, 1.0), costs):
        own, texts = bench.rows(temperature, args.rounds)
        for row in own:
            row["repetition"] = repetition(texts[row["mode"]])
            if temperature == 0:
                row["agreement"] = agreement(texts[row["mode"]], texts["plain"])
        rows += own
    print_table(rows)
    print("\ntemperature, 3-grams that repeat, tokens of plain decoding's greedy text, up to where")
    for row in rows:
        same = "{:.2f} {:.1f}".format(*row["agreement"]) if "agreement" in row else ""
        print(f"{row['mode']:14} {row['temperature']:.1f} {row['repetition']:.3f} {same}".rstrip())
    print(json.dumps({"card": card, "rows": rows}), flush=True)


if __name__ == "__main__":
    run_script(main)
