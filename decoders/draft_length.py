"""How many tokens to draft at a step, with any head, and what it gains to choose that number.

    python -m decoders.draft_length --out_dir out/toy

A policy is what `generate` takes as draft=. `fixed`, `confident` and `promising` are lossless;
`generate_unverified` is not, and says so. The script fits CLP to the model's own texts after every
other prompt, and measures after the other half. The last line of stdout is one JSON object.
"""

import copy
import statistics
from functools import partial
from itertools import zip_longest

import torch
from torch.nn import functional as F

import bench_speculative
from bench_speculative import Mode, distinct
from common import number, run_script
from decode import Greedy, Sampling, check_call, draw_next, generate, stop_ids, window_ids
from model import BadInput, whole, widen
from sample import fast_kernels

# -----------------------------------------------------------------------------
# policies: functions in the place of `CPHead.draft`. That is exact, for whether a draft is kept
# depends on nothing but e, the drafts before it and the row that it was drawn from. A policy that
# looks at a draft and throws it away is wrong: the drafts that stay would not be drawn from q.


def at_most(head, most, e, x1, n_drafts, sampler, unembed):
    """`CPHead.draft` of one text, of at most so many drafts."""
    n_drafts = min(n_drafts, most)
    if n_drafts == 0:  # a plain step: the head has nothing to compute
        return x1.new_zeros(1, 0), widen(e.new_zeros(1, 0, len(unembed)))
    return head.draft(e, x1, n_drafts, sampler, unembed)


def fixed(head, k):
    """k drafts at every step, if there is room."""
    return partial(at_most, head, whole("the number of drafts", k, 0))


def confident(head, threshold):
    """Draws a window, and cuts it after the first draft s where prod_{j<=s} max_x q_j(x), the
    chance that the head gives its likeliest drafts, is below the threshold, 0..1. Temperature is
    left out. On a GPU every step waits for the device once more."""
    if not 0 <= threshold <= 1:
        raise BadInput(f"threshold must be at least 0 and at most 1, not {threshold}")

    def draft(e, x1, n_drafts, sampler, unembed):
        drafted, q = head.draft(e, x1, n_drafts, sampler, unembed)
        before = torch.cat((x1.unsqueeze(1), drafted[:, :-1]), 1)  # (1, k)
        rows = q if sampler.plain else head.rows(e, before, unembed).exp()  # (1, k, V)
        chance = rows.amax(-1).cumprod(-1)  # (1, k)
        k = 1 + (chance >= threshold).sum().item()
        return drafted[:, :k], None if q is None else q[:, :k]

    return draft


def promising(head, clp):
    """As many drafts as promise most tokens per second, see `CLP`."""
    return lambda e, *rest: at_most(head, clp.most(e), e, *rest)


class CLP:
    """Tells how many drafts will hold, by one linear layer (arXiv 2606.10935 has the predictor):
    P(L | e) = softmax(A e + b), L = 0..n - 1.

    A step with k drafts is expected to yield 1 + sum_{i=1..k} P(L >= i) tokens, and takes as long
    as 1 + cost k steps without any. The caller measures cost, at least 0; `fit` learns A and b.
    """

    def __init__(self, width, n_future, cost):
        self.linear, self.cost = torch.nn.Linear(width, n_future), cost

    def log_probs(self, e):
        """log P(L | e), e as the head sees it: (..., width) -> (..., n)."""
        return self.linear(e.to(self.linear.weight)).log_softmax(-1)

    def most(self, e):
        """The k of most tokens per second: e (1, width)."""
        p = self.log_probs(e[0]).exp()  # (n,)
        at_least = p.flip(-1).cumsum(-1).flip(-1)  # P(L >= k); k = 0 is the 1
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
    n, block_size, states, labels = model.config.n_future, model.config.block_size, [], []
    stops = stop_ids(model, stop_token)
    for prompt in prompts:
        cache = model.new_cache()
        hidden = model.hidden(window_ids(list(prompt), model), cache)
        token, end = draw_next(model, hidden, sampler, []), cache.length + n_tokens
        while cache.length < min(end, block_size - n + 1) and token.item() not in stops:
            e, length = model.split(hidden[:, -1])[1], cache.length  # (1, C)
            drafted, _ = model.head.draft(e, token, n - 1, Greedy(), model.unembed)
            if drafted.size(1) < n - 1:
                raise BadInput(f"head {model.config.head} does not draft after every token, which "
                               "CLP learns from")
            hidden = model.hidden(torch.cat((token.unsqueeze(1), drafted), 1), cache)  # (1, n, C)
            label, _ = Greedy().verify(model.target_logits(hidden), None, drafted)
            states.append(e[0])
            labels.append(label.item())
            cache.length, hidden = length + 1, hidden[:, :1]  # only the token itself stays
            token = draw_next(model, hidden, sampler, [])
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
    sampler = Sampling() if sampler is None else sampler
    check_call(model, prompt, max_new_tokens, sampler)  # of a class, the copy would be itself

    def draft(e, *rest):
        log_p, L = clp.log_probs(e[0]).max(-1)
        return at_most(model.head, L.item() if log_p.exp() >= tau else 0, e, *rest)

    def keep_all(logits, q, drafted):
        n_accepted = torch.full((1, 1), drafted.size(1), device=drafted.device)
        return n_accepted, lossy.draw(logits[:, -1])[0].unsqueeze(1)

    lossy = copy.copy(sampler)
    lossy.verify = keep_all
    return generate(model, prompt, max_new_tokens, draft=draft, sampler=lossy, **options)


def repetition(texts):
    """The share of 3-grams that the text already had: its mean over the texts."""
    return statistics.mean(1 - distinct([text], 3) for text in texts)


def agreement(texts, expected):
    """The share of tokens that are as expected, and the mean number before the first other one."""
    same = [[a == b for a, b in zip_longest(*pair)] for pair in zip(texts, expected)]
    first = [row.index(False) if False in row else len(row) for row in same]
    return sum(map(sum, same)) / sum(map(len, same)), statistics.mean(first)


# -----------------------------------------------------------------------------
# the measurement


def speculative(bench, policy):
    return Mode(partial(generate, draft=policy), bench.model, True)


def cost_of_a_draft(bench, temperature, n_rounds):
    """c: a step with n - 1 drafts takes as long as 1 + c (n - 1) steps without any."""
    bench.modes["none"] = speculative(bench, fixed(bench.model.head, 0))
    ms = {row["mode"]: row.get("step_ms") for row in bench.rows(temperature, n_rounds)[0]}
    del bench.modes["none"]
    return max(ms["speculative"] / ms["none"] - 1, 0) / (bench.model.config.n_future - 1)


def rows_of(clp, costs, rows, temperature, n_rounds):
    """`Bench.rows`, and what is lost: see `repetition` and `agreement`."""
    clp.cost = costs[temperature]
    found, texts = rows(temperature, n_rounds)
    for row in found:
        row["repetition"] = repetition(texts[row["mode"]])
        if temperature == 0:
            row["agreement"] = agreement(texts[row["mode"]], texts["plain"])
    return found, texts


def add_flags(parser):
    several = partial(parser.add_argument, nargs="+", metavar="X")
    chance = number(float, 0, 1, above=True)
    several("--lengths", type=number(int, 0), default=[1, 3], help="numbers of drafts (1 3)")
    several("--thresholds", type=chance, default=[0.1, 0.3, 0.6], help="of confident (0.1 0.3 0.6)")
    several("--taus", type=chance, default=[0.5, 0.9], help="of the lossy mode (0.5 0.9)")
    parser.add_argument("--fit_texts", type=number(int, 1), default=8,
                        help="texts per prompt that CLP learns from (8)")


def add_modes(bench, args):
    """The policies; half of the prompts are for CLP to learn from."""
    model, head = bench.model, bench.model.head
    if len(bench.prompts) < 2:
        raise BadInput(f"{args.out_dir} has one prompt: there is none to learn CLP from")
    learn, bench.prompts = bench.prompts[::2], bench.prompts[1::2]
    bench.kinds = {"all": bench.prompts}
    args.threads = args.threads or bench.best_threads()
    torch.set_num_threads(args.threads)
    sampler = Sampling(generator=torch.Generator(model.device).manual_seed(args.seed))
    options = bench.n_tokens, sampler, bench.stop_token
    with fast_kernels(model):
        clp = fit(*collect(model, learn * args.fit_texts, *options), model.config.n_future)
        states, labels = collect(model, bench.prompts, *options)
    share = labels.bincount() / len(labels)
    costs = {t: cost_of_a_draft(bench, t, args.rounds) for t in (0.0, 1.0)}  # by temperature
    # nats, after prompts that it did not learn from
    bench.about |= {"clp_loss": F.nll_loss(clp.log_probs(states), labels).item(),
                    "clp_loss_of_a_constant": torch.special.entr(share).sum().item(),
                    "cost_of_a_draft": [*costs.values()]}
    policies = {f"fixed {k}": fixed(head, k) for k in args.lengths if k < model.config.n_future - 1}
    policies |= {f"confident {x:g}": confident(head, x) for x in args.thresholds}
    policies["CLP"] = promising(head, clp)
    bench.modes |= {name: speculative(bench, policy) for name, policy in policies.items()}
    for tau in args.taus:
        lossy = partial(generate_unverified, clp=clp, tau=tau)
        bench.modes[f"LOSSY {tau:g}"] = Mode(lossy, model, True, has_parts=False)
    bench.rows = partial(rows_of, clp, costs, bench.rows)


def main():
    bench_speculative.main(__doc__, add_flags, add_modes)


if __name__ == "__main__":
    run_script(main)
