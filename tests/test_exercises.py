"""The graders of course/exercises.md. Each is run on the answer in course/exercises.py (skipped while that is still
to be written), on a reference, which is the repository's own function where there is one, and on wrong answers, which it
must reject.

Nothing here is random from run to run, but what an answer itself draws.
"""

import ast
import copy
import functools
import itertools
import json
import math
import random
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_cp_head as shared
import torch
from test_cp_head import SAD_CRIED, SHE_LOST, tiny_model, total_variation
from torch.nn import functional as F

import decode
import model as repository
from course import exercises
from decode import Sampling, Stats, generate, speculative_step
from heads import chain, full
from model import CPHead, GPTConfig

# -----------------------------------------------------------------------------
# how answers are graded

GRADERS = {}


class Broken(AssertionError):
    """A property that an answer lacks, in one line."""


def require(condition, claim):
    __tracebackhide__ = True
    if not condition:
        raise Broken(claim)


def close(found, expected, claim, atol=1e-12):
    __tracebackhide__ = True
    require(found is not None, f"{claim}: the answer returns None")
    found, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (found, expected))
    require(found.shape == expected.shape, f"{claim}: the shape is {tuple(found.shape)}, not {tuple(expected.shape)}")
    wrong = ~((found == expected) | ((found - expected).abs() <= atol))  # NaN is wrong, -inf may be right
    if wrong.any():
        raise Broken(f"{claim}: {found[wrong][0].item():.6g} should be {expected[wrong][0].item():.6g}, to {atol:g}")


@contextmanager
def shows(claim):
    """Where a test of test_cp_head.py fails, the claim does."""
    try:
        yield
    except AssertionError as e:
        raise Broken(claim) from e


def exercise(reference, *wrong):
    """Makes a test of a grader: on the answer of its name in course/exercises.py, the reference, and wrong answers."""
    def decorate(grade):
        name = grade.__name__.removeprefix("test_")
        answers = [pytest.param("yours", id="yours"), pytest.param(reference, id="reference"),
                   *(pytest.param(f, id=f"wrong-{f.__name__}") for f in wrong)]

        @pytest.mark.parametrize("answer", answers)
        @functools.wraps(grade)
        def test(answer, **fixtures):
            if answer in wrong:
                with pytest.raises(Broken):
                    grade(answer, **fixtures)
            elif answer == "yours":
                try:
                    grade(getattr(exercises, name), **fixtures)
                except NotImplementedError as e:
                    if e.args:  # torch's own have a message
                        raise
                    pytest.skip(f"course/exercises.py: {name} is still to be written")
            else:
                grade(answer, **fixtures)

        GRADERS[name] = test
        return test
    return decorate


def test_every_exercise_has_a_grader_and_a_place_in_the_document():
    tree = ast.parse(Path(exercises.__file__).read_text(encoding="utf-8"))
    public = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    text = (Path(__file__).parents[1] / "course/exercises.md").read_text(encoding="utf-8")
    assert set(GRADERS) <= set(public) and all(f"`{name}" in text for name in GRADERS) and len(GRADERS) == 15


def test_an_answer_is_skipped_only_while_it_is_not_written(monkeypatch):
    """Guards a course that skips, or passes, whatever its student writes."""
    def unwritten(keep, p, q):
        raise NotImplementedError

    def unsupported(keep, p, q):
        raise NotImplementedError("torch has no such kernel")

    def outcome(answer):
        monkeypatch.setattr(exercises, "residual", answer)
        try:
            return GRADERS["residual"]("yours")
        except (pytest.skip.Exception, Exception) as e:  # a skip would skip this test
            return type(e)

    assert outcome(unwritten) is pytest.skip.Exception and outcome(unsupported) is NotImplementedError
    assert outcome(shared.residual_p) is Broken and outcome(decode.residual) is None


# -----------------------------------------------------------------------------
# 1. the joint


def sums_probabilities(log_w, log_p):
    return (log_w.unsqueeze(1) + log_p.cumsum(1)).exp().sum(-1).log()


def mixes_at_each_offset(log_w, log_p):
    return torch.logsumexp(log_w.unsqueeze(1) + log_p, -1).cumsum(1)


def takes_out_the_maximum(log_w, log_p):
    log_terms = log_w.unsqueeze(1) + log_p.cumsum(1)
    highest = log_terms.amax(-1, keepdim=True)  # -inf where all are: -inf + inf is NaN
    return ((log_terms - highest).exp().sum(-1, keepdim=True).log() + highest).squeeze(-1)


@exercise(repository.joint_log_probs, sums_probabilities, mixes_at_each_offset, takes_out_the_maximum)
def test_joint_log_probs(answer):
    """exp of it is the sum over the components of weight times product, however small, and 0, too."""
    def written_out(log_w, log_p):
        return torch.stack([(log_w.exp() * log_p[:, : k + 1].exp().prod(1)).sum(-1).log() for k in range(4)], dim=1)

    torch.manual_seed(0)
    log_w, log_p = torch.randn(5, 3).double().log_softmax(-1), torch.randn(5, 4, 3).double() - 3
    expected = written_out(log_w, log_p)
    close(answer(log_w, log_p), expected, "P of the first k tokens is sum_a w_a prod_{s<=k} P_a^(s)")
    far = answer(log_w, log_p - 300)
    close(far, expected - 300 * torch.arange(1, 5), "log P is right where the product underflows", atol=1e-9)
    log_p[:, 1, 0] = log_p[0, 2] = -math.inf
    close(answer(log_w, log_p), written_out(log_w, log_p), "a component that rules a window out counts as 0")


# -----------------------------------------------------------------------------
# 2. why a rank?

THREE = [("old", "dog"), ("old", "cat"), ("new", "cat")]
learned = functools.lru_cache(lambda phrases, rank=1, weight=0.05, seed=0: shared.learned(
    phrases, rank=rank, balance_weight=weight, seed=seed))


def sum_of_entropies(phrases):
    counts = (Counter(words).values() for words in zip(*phrases))
    return sum(-c / len(phrases) * math.log2(c / len(phrases)) for by_word in counts for c in by_word)


def choice_of_a_phrase(phrases):
    return math.log2(len(phrases))


def number_of_words(phrases):
    return sum(math.log2(len(set(words))) for words in zip(*phrases))


@exercise(sum_of_entropies, choice_of_a_phrase, number_of_words)
def test_floor_by_hand(answer):
    """What no choice of independent heads can go below, and the best of them reaches."""
    claim = "independent heads pay for the marginal of each offset"
    for phrases, bits in ((SAD_CRIED, 2), (SHE_LOST, 2), (THREE, 2 * math.log2(3) - 4 / 3)):
        close(answer(phrases), bits, f"{claim}, {phrases}", atol=1e-5)


def trained_independent(phrases):
    return learned(tuple(phrases))[0]


def trained_in_nats(phrases):
    return learned(tuple(phrases))[0] * math.log(2)


def trained_mixture(phrases):
    return learned(tuple(phrases), rank=2)[0]


@exercise(trained_independent, trained_in_nats, trained_mixture)
def test_floor_by_training(answer):
    """Training ends at the floor, in bits per phrase."""
    for phrases in (SAD_CRIED, THREE):
        close(answer(phrases), sum_of_entropies(phrases), f"training ends at the floor by hand, {phrases}", atol=0.02)


# -----------------------------------------------------------------------------
# 3. the rows that drafts are judged by


def conditional(log_w, log_p, x):
    n, r, V = log_p.shape
    head = full.Head(GPTConfig(vocab_size=V, n_embd=1, n_head=1, n_future=n, rank=r, head="full")).double()
    head.router.weight.data.zero_()
    head.router.bias.data, head.maps.data = log_w, log_p.unsqueeze(-1)
    return head.rows(log_p.new_ones(1, 1), x.unsqueeze(0), log_p.new_zeros(V, 1))[0, -1].exp()


def mixes_by_the_router(log_w, log_p, x):
    return log_w.exp() @ log_p[len(x)].exp()


def forgets_the_router(log_w, log_p, x):
    return conditional(torch.zeros_like(log_w), log_p, x)


def multiplies_probabilities(log_w, log_p, x):
    b = log_w.exp()
    for s, token in enumerate(x):
        b = b * log_p[s, :, token].exp()
    return b / b.sum() @ log_p[len(x)].exp()


def stops_at_x_1(log_w, log_p, x):
    return (log_w + log_p[0, :, x[0]]).softmax(-1) @ log_p[len(x)].exp()


@exercise(conditional, mixes_by_the_router, forgets_the_router, multiplies_probabilities, stops_at_x_1)
def test_conditional(answer):
    """The joint, with the drafts so far held fixed, over its sum."""
    model, e = tiny_model(rank=3), shared.a_state()
    table, W = shared.joint_table(model, e).detach(), model.lm_head.weight
    head = model.head
    log_w, log_p = head.log_weights(e).detach(), head.logits(head.vectors(e), W).log_softmax(-1).detach()
    for x1 in range(5):
        given = table[x1].sum(-1)
        close(answer(log_w, log_p, torch.tensor([x1])), given / given.sum(), f"q is P(x_2 | x_1 = {x1})")
        for x2 in range(5):
            given, x = table[x1, x2], torch.tensor([x1, x2])
            close(answer(log_w, log_p, x), given / given.sum(), f"q is P(x_3 | x_1 = {x1}, x_2 = {x2})")
            small = torch.cat((log_p[:2] - 500, log_p[2:]))
            close(answer(log_w, small, x), given / given.sum(), "q is right where the drafts' probability underflows")


# -----------------------------------------------------------------------------
# 4. what the drafts leave p lacking


@exercise(decode.residual, shared.residual_p, shared.residual_without_keep)
def test_residual(answer):
    """What a kept draft brings of token x, min(keep p(x), q(x)), and the residual make keep p(x)."""
    torch.manual_seed(0)
    p, q = torch.randn(2, 4, 5).double().softmax(-1)
    keep = torch.rand(4, 1).double()
    q[-1] = 0  # nothing was drafted there
    close(answer(keep, p, q), keep * p - torch.minimum(keep * p, q), "min(keep p, q) + residual = keep p")


# -----------------------------------------------------------------------------
# 5. verification


def as_verify(answer):
    """An answer in the form of decode.verify, whose coins and draws `enumerated` goes through."""
    def draw(row):
        require(row.shape[-1:] == row.shape and row.sum() > 0, "draw needs one row (V,) that does not sum to 0")
        return decode.categorical(row, None).item()

    def coin(probability):
        probability = torch.as_tensor(probability, dtype=torch.float64).view(1)
        return decode.bernoulli(probability, None).item()

    def verify(p, q, drafted, uniform=None):
        n_kept, token = answer(p, q, drafted, coin, draw)
        require(0 <= n_kept <= len(drafted), "the number of kept drafts is from 0 to k")
        return torch.tensor([int(n_kept)]), torch.tensor([int(token)])

    return verify


def check_exact(kind, p, q, monkeypatch):
    distance = total_variation(shared.verified(p, q, monkeypatch), shared.joint_of(p))
    require(distance < 1e-12, f"every token follows p, rows {kind}: the total variation is {distance:.3g}")


def n_kept(p, q, monkeypatch):
    """The distribution of the number of kept drafts, by enumeration."""
    return shared.enumerated(lambda choose: [shared.draft_and_verify(p, q, choose)[1]], monkeypatch)


def repository_verify(p, q, drafted, coin, draw):
    return [x.item() for x in decode.verify(p, q, drafted)]


def verify_with(part, wrong):
    """decode.verify with one of its parts replaced by a wrong one of test_cp_head.py."""
    def answer(p, q, drafted, coin, draw):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode, part, wrong)
            return repository_verify(p, q, drafted, coin, draw)

    answer.__name__ = wrong.__name__
    return answer


residual_p = verify_with("residual", shared.residual_p)
residual_without_keep = verify_with("residual", shared.residual_without_keep)


def never_keeps(p, q, drafted, coin, draw):
    return 0, draw(p[0])


def keeps_what_p_likes(p, q, drafted, coin, draw):
    y = drafted[0]
    return (1, draw(p[1])) if p[0, y] >= q[0, y] else (0, draw((p[0] - q[0]).relu()))


@exercise(repository_verify, residual_p, never_keeps, keeps_what_p_likes)
def test_verify_one(answer, monkeypatch):
    """By enumeration, the token and the one after it follow p, and the draft is kept as often as that allows."""
    monkeypatch.setattr(shared, "verify", as_verify(answer))
    for kind in ("random", "equal", "greedy", "flat"):
        for seed in range(3):
            p, q = shared.random_distributions(kind, seed, n=2)
            check_exact(kind, p, q, monkeypatch)
            close(n_kept(p, q, monkeypatch)[1,], torch.minimum(p[0], q[0]).sum(),
                  f"a draft is kept with probability sum_x min(p(x), q(x)), rows {kind}")


def one_by_one(p, q, drafted, coin, draw):
    for i, y in enumerate(drafted):
        if not coin(p[i, y] / q[i, y]):
            return i, draw((p[i] - q[i]).relu())
    return len(drafted), draw(p[-1])


@exercise(repository_verify, residual_without_keep, one_by_one)
def test_verify_block(answer, monkeypatch):
    """By enumeration, every token follows p, and i or more drafts are kept with probability keep_i."""
    monkeypatch.setattr(shared, "verify", as_verify(answer))
    for kind in ("random", "equal", "greedy", "zeros", "flat", "deep"):
        p, q = shared.random_distributions(kind, 0)
        check_exact(kind, p, q, monkeypatch)
    for kind in ("random", "flat", "zeros", "deep"):
        with shows(f"i or more drafts are kept with probability keep_i, rows {kind}"):
            shared.test_drafts_are_kept_as_often_as_the_recurrence_says(kind, monkeypatch)


# -----------------------------------------------------------------------------
# 6. which decoder is wrong?


@functools.lru_cache
@torch.no_grad()
def texts_of(wrong):
    """The distribution of the texts that begin with the real decoder's first step, with a bug of
    test_cp_head.py or None, and go on with the target: (texts, probabilities)."""
    model = shared.chi_square_model("full")
    with pytest.MonkeyPatch.context() as patch:
        draft = shared.wrong_draft(wrong, model, patch) if wrong else None
        texts, _ = shared.first_steps(model, patch, draft)
    return list(texts), list(texts.values())


def black_box(wrong, seed):
    """Such a decoder: N texts at a time, quickly, as its distribution is known."""
    dice = random.Random(seed)  # the same on every machine
    return lambda N: dice.choices(*texts_of(wrong), k=N)


def by_chi_square(decoders, expected, N=4000):
    p_values = [shared.chi_square_p_value(decoder(N), expected) for decoder in decoders]
    return p_values.index(max(p_values))


def by_thirty_texts(decoders, expected):
    return by_chi_square(decoders, expected, N=30)


def by_the_first_token(decoders, expected):
    first = Counter()
    for text, p in expected.items():
        first[text[:1]] += p
    return by_chi_square([lambda N, d=d: [text[:1] for text in d(N)] for d in decoders], first)


@exercise(by_chi_square, by_thirty_texts, by_the_first_token)
def test_find_lossless(answer):
    """Names the lossless decoder, wherever it stands, among bugs that move few texts.

    The texts are the same in every run. With other seeds, too, the largest chi-square p-value of
    4,000 texts would be the lossless one's: the statistics of the least bug and of none are ten
    standard deviations apart. Chance of a false alarm: below 1e-9.
    """
    with torch.no_grad():
        expected = shared.expected_texts(shared.chi_square_model("full"), [0, 1], 3)
    for bugs in (("argmax_draft", "prior_component"), ("residual_p", "residual_without_keep")):
        for place in range(3):
            names = [*bugs[:place], None, *bugs[place:]]
            found = answer([black_box(name, seed) for seed, name in enumerate(names)], expected)
            require(found == place, f"of {names}, the lossless decoder is None, not the one at {found}")


# -----------------------------------------------------------------------------
# 7. a collapse


def squares_the_means(log_w):
    return log_w.size(-1) * log_w.exp().mean(0).square().sum()


def balances_every_position(log_w):
    return log_w.size(-1) * (log_w.exp() ** 2).sum(-1).mean()


def has_no_gradient(log_w):
    return repository.balance_loss(log_w.detach())


@exercise(repository.balance_loss, squares_the_means, balances_every_position, has_no_gradient)
def test_balance_loss(answer, monkeypatch):
    """1 when the components share the work, r when one does it all, and it pulls towards sharing."""
    monkeypatch.setattr(shared, "balance_loss", answer)
    with shows("it is 1 where the work is shared, even if each position has one component, and r where one does all"):
        shared.test_balance_loss_extremes()
    torch.manual_seed(0)
    log_w = torch.randn(6, 3).double().log_softmax(-1).requires_grad_()
    f = (log_w.argmax(-1, keepdim=True) == torch.arange(3)).double().mean(0)
    found = answer(log_w)
    close(found, 3 * (f * log_w.exp().mean(0)).sum(), "it is r * sum_a f_a m_a", atol=1e-6)
    require(found.requires_grad, "it has a gradient, through the mean weights m_a")
    with shows("a step on it takes weight from the component that is used too much"):
        shared.test_balance_loss_pulls_towards_balance()


def first_collapse():
    return next(seed for seed in range(10) if learned(tuple(SAD_CRIED), 2, 0.0, seed)[0] > 1.9), 0.05


def stops_too_weakly():
    return first_collapse()[0], 1e-6


def starts_well():
    return next(seed for seed in range(40) if learned(tuple(SAD_CRIED), 2, 0.0, seed)[0] < 1.1), 0.05


@exercise(first_collapse, stops_too_weakly, starts_well)
def test_collapse(answer):
    """From one start, one component takes both phrases without the balance loss, and with it each gets one."""
    seed, weight = answer()
    require(weight > 0, "the weight that stops the collapse is above 0")
    bits, usage = learned(tuple(SAD_CRIED), 2, 0.0, seed)
    require(bits > 1.9 and usage.min() < 0.01,
            f"without balance, seed {seed} collapses: it has {bits:.2f} bits, usage {usage.tolist()}")
    bits, usage = learned(tuple(SAD_CRIED), 2, weight, seed)
    require(bits < 1.02 and usage.min() > 0.4,
            f"with weight {weight}, seed {seed} does not: it has {bits:.2f} bits, usage {usage.tolist()}")


# -----------------------------------------------------------------------------
# 8. rolling back the cache


def step_that_keeps(model, cache, x, n_kept):
    """decode.speculative_step, with a head that drafts x and a sampler that keeps n_kept."""
    found, hidden = [], model.hidden
    sampler = SimpleNamespace(verify=lambda logits, q, drafted: (torch.tensor([[n_kept]]), x[None, :1]))
    model.hidden = lambda *args: found.append(hidden(*args)) or found[-1]
    speculative_step(model, cache, x.new_zeros(1, 8).double(), x[:1], len(x) - 1, sampler,
                     lambda e, x1, n_drafts, sampler, unembed: (x[None, 1:], None))
    model.hidden = hidden
    return found[0][0, : n_kept + 1]


def keeps_all(model, cache, x, n_kept):
    return model.hidden(x[None], cache)[0, : n_kept + 1]


def forgets_x_1(model, cache, x, n_kept):
    length, hidden = cache.length, keeps_all(model, cache, x, n_kept)
    cache.length = length + n_kept
    return hidden


def feeds_twice(model, cache, x, n_kept):
    length = cache.length
    keeps_all(model, cache, x, n_kept)
    cache.length = length
    return model.hidden(x[None, : n_kept + 1], cache)[0]


def feeds_a_copy(model, cache, x, n_kept):
    hidden = keeps_all(model, copy.deepcopy(cache), x, n_kept)
    cache.length += n_kept + 1
    return hidden


@exercise(step_that_keeps, keeps_all, forgets_x_1, feeds_twice, feeds_a_copy)
@torch.no_grad()
def test_feed_drafts(answer):
    """After any number of kept drafts, the text goes on as if it had been fed from its beginning."""
    model = tiny_model(block_size=10, n_future=4)
    passes, hidden_of = [], model.hidden
    model.hidden = lambda idx, cache=None: passes.append(idx) or hidden_of(idx, cache)
    before, x, after = torch.tensor([1, 4, 0]), torch.tensor([2, 2, 3, 1]), torch.tensor([4, 0])
    for n_kept in range(4):
        cache, text = model.new_cache(), torch.cat((before, x[: n_kept + 1], after))
        whole = hidden_of(text[None])[0, 3:]
        hidden_of(before[None], cache)
        passes.clear()
        found = answer(model, cache, x, n_kept)
        claim = f"of 3 drafts, {n_kept} kept"
        require(len(passes) == 1, f"{claim}: there is one forward pass, not {len(passes)}")
        close(found, whole[: n_kept + 1], f"{claim}: the hidden states are those of x_1 and the kept drafts")
        close(cache.length, 4 + n_kept, f"{claim}: the cache has the prompt's 3 tokens, x_1 and the kept drafts")
        close(hidden_of(after[None], cache)[0], whole[n_kept + 1 :], f"{claim}: the text goes on as without a cache")


# -----------------------------------------------------------------------------
# 9. a draft that looks at the one before it


def chain_row(W, M, G, U, e, x):
    V, C = W.shape
    head = chain.Head(GPTConfig(vocab_size=V, n_embd=C, n_head=1, n_future=2, head="chain")).double()
    head.maps.data[1, 0], head.gate.data[0], head.out.data = M, G, U
    return head.rows(e[None], torch.tensor([[x]]), W)[0, 0]


def forgets_the_norm(W, M, G, U, e, x):
    return (W @ (M @ e + U @ (W[x] * (G @ e)))).log_softmax(-1)


def forgets_the_gate(W, M, G, U, e, x):
    return (W @ (M @ e + U @ torch.layer_norm(W[x], W[x].shape))).log_softmax(-1)


def norms_the_product(W, M, G, U, e, x):
    return (W @ (M @ e + U @ torch.layer_norm(W[x] * (G @ e), e.shape))).log_softmax(-1)


@exercise(chain_row, forgets_the_norm, forgets_the_gate, norms_the_product)
def test_chain_row(answer):
    """Equation (5), as test_cp_head.py has it written out, after every token."""
    model = tiny_model(head="chain", rank=1, n_future=2)
    e, head, W = shared.a_state(), model.head, model.lm_head.weight.detach()
    table = shared.joint_table(model, e)
    M, G, U = head.maps[1, 0].detach(), head.gate[0].detach(), head.out.detach()
    for x, given in enumerate(table):
        close(answer(W, M, G, U, e, x), (given / given.sum()).log(), f"the row after token {x} is equation (5)")


# -----------------------------------------------------------------------------
# 10. when is it slower?


def predicted_speedup(plain_ms, step_ms, acceptance):
    reached = torch.tensor(acceptance, dtype=torch.float64).cumprod(0)
    return (1 + reached.sum().item()) * plain_ms / step_ms


def test_the_document_says_how_good_the_prediction_is():
    ratios, root = [], Path(__file__).parents[1]
    for path in sorted((root / "results" / "laptop").glob("bench-*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))["bench"]["rows"]
        plain = {row["temperature"]: 1e3 / row["tokens_per_second"] for row in rows if row["mode"] == "plain"}
        ratios += [predicted_speedup(plain[row["temperature"]], row["step_ms"], [a or 0 for a in row["acceptance"]])
                   / row["speedup"] for row in rows if "parts_ms" in row]  # neither trees nor compiled steps
    text = " ".join((root / "course" / "exercises.md").read_text(encoding="utf-8").split())
    assert (f"In the {len(ratios)} speculative rows of `results/laptop` the prediction is {min(ratios):.2f} to "
            f"{max(ratios):.2f} times") in text, (len(ratios), min(ratios), max(ratios))


def forgets_the_drafts_before(plain_ms, step_ms, acceptance):
    return (1 + sum(acceptance)) * plain_ms / step_ms


def forgets_the_last_token(plain_ms, step_ms, acceptance):
    return predicted_speedup(plain_ms, step_ms, acceptance) - plain_ms / step_ms


@exercise(predicted_speedup, forgets_the_drafts_before, forgets_the_last_token)
def test_predicted_speedup(answer):
    """Tokens per step, as the real decoder counts them, over a step's cost in plain steps."""
    all_kept, none_kept = answer(2.0, 4.0, [1.0] * 7), answer(2.0, 3.0, [0.0] * 7)
    close(all_kept, 4, "8 tokens in each step, which costs 2 plain ones, are 4 times as fast", atol=1e-5)
    close(none_kept, 2 / 3, "drafts that are never kept make it slower, 2 / 3", atol=1e-5)
    stats, sampler = Stats(), Sampling(generator=torch.Generator().manual_seed(0))
    model = tiny_model(n_future=4, block_size=128, scale=3.0, target="lm_head")
    list(generate(model, [0, 1], 100, sampler=sampler, stats=stats))
    require(0 < min(stats.acceptance), "the grader's own model accepts drafts at every offset")
    close(answer(1.0, 1.0, stats.acceptance), 1 + sum(stats.accepted) / stats.steps,
          "at equal costs, it is the number of tokens per step that the real decoder has", atol=1e-5)


# -----------------------------------------------------------------------------
# 11. a head of your own


class WithAnMLP(CPHead):
    """h_a^(s) = M_a^(s) e + B_a^(s) gelu(A e)"""

    def __init__(self, config):
        super().__init__(config)
        self.up = torch.nn.Linear(config.n_embd, config.n_embd)
        self.down = torch.nn.Parameter(torch.zeros_like(self.maps))

    def vectors(self, e, offsets=slice(None)):
        return super().vectors(e, offsets) + torch.einsum("...c,nrdc->...nrd", F.gelu(self.up(e)), self.down[offsets])


class NothingNew(CPHead):
    pass


class DecodesWithoutItsTerm(chain.Head):
    draft = CPHead.draft


class SaysSharperRows(WithAnMLP):
    def rows(self, e, tokens, unembed):
        return (2 * super().rows(e, tokens, unembed)).log_softmax(-1)


class DraftsFromThePrior(WithAnMLP):
    def draft(self, *args):
        return shared.prior_component(self, *args)


class ForgetsTheDrafts(WithAnMLP):
    def draft(self, *args):
        return shared.stale_posterior(self, *args)


class MixesAtEachOffset(WithAnMLP):
    def log_joint(self, e, gold, unembed):
        return mixes_at_each_offset(self.log_weights(e), self.gold_log_probs(e, gold, unembed))


def says_something_new(rank):
    """Whether MyHead's joint is not that of the CP head with the same parameters."""
    mine, cp = tiny_model(head="mine", rank=rank), tiny_model(rank=rank)
    own, plain = mine.state_dict(), cp.state_dict()
    if any(name not in own or own[name].shape != tensor.shape for name, tensor in plain.items()):
        return True
    cp.load_state_dict({name: own[name] for name in plain})
    e, gold, W = torch.randn(4, 8).double(), torch.randint(5, (4, 3)), cp.lm_head.weight
    return not torch.allclose(*(m.head.log_joint(e, gold, W) for m in (mine, cp)), atol=1e-6)


@torch.no_grad()
def check_joint(head, e, W):
    """Every window of 3 of 5 tokens: its joint by (1), what it sums to, and the rows along it."""
    windows = torch.tensor(list(itertools.product(range(5), repeat=3)))
    many = e.expand(len(windows), -1)
    joint = head.log_joint(many, windows, W).exp()  # (125, 3)
    close(joint[:, -1].sum(), 1, "the joint sums to 1")
    for k in (1, 2):
        rest = joint[:, -1].view(5**k, -1).sum(1).repeat_interleave(5 ** (3 - k))
        close(joint[:, k - 1], rest, f"the joint of the first {k} is the sum over the tokens after them")
    mixture = repository.joint_log_probs(head.log_weights(many), head.gold_log_probs(many, windows, W)).exp()
    close(joint, mixture, "the joint is equation (1): one component for the whole window")
    rows = head.rows(many, windows[:, :2], W).exp()  # (125, 2, 5)
    for k in (1, 2):
        along = rows[:, k - 1].gather(-1, windows[:, k : k + 1]).squeeze(-1)
        close(along, joint[:, k] / joint[:, k - 1], f"the rows are the joint's conditionals, after {k} tokens")
    close(head.log_marginal(e, W).exp(), joint[::25, 0], "the marginal is the joint of the first token")
    return joint[:, -1].view(5, 5, 5)


@torch.no_grad()
def check_drafts(head, e, W, joint, sampler, monkeypatch):
    """By enumeration, the drafts' distribution, and the rows that come with them."""
    for x1 in range(5):
        def run(choose):
            x, q = head.draft(e[None], torch.tensor([x1]), 2, sampler, W)
            along = torch.cat((torch.tensor([[x1]]), x[:, :1]), 1)
            close(q, sampler.warp(head.rows(e[None], along, W)), "q of the drafts are the joint's rows along them")
            return x[0].tolist()

        found = shared.enumerated(run, monkeypatch)
        first = sampler.warp((joint[x1].sum(1) / joint[x1].sum()).log())
        expected = {(x, y): (first[x] * sampler.warp(joint[x1, x].log())[y]).item()
                    for x, y in itertools.product(range(5), repeat=2)}
        distance = total_variation(found, expected)
        require(distance < 1e-12, f"the drafts after x_1 = {x1} follow the joint: the total variation is {distance:.3g}")


@exercise(WithAnMLP, NothingNew, DecodesWithoutItsTerm, SaysSharperRows, DraftsFromThePrior, ForgetsTheDrafts,
          MixesAtEachOffset)
def test_MyHead(answer, monkeypatch):
    """What every head of the repository has to be: a joint, its rows in training and in decoding, exact texts."""
    require(issubclass(answer, CPHead), "MyHead is a subclass of CPHead")
    monkeypatch.setitem(sys.modules, "heads.mine", SimpleNamespace(Head=answer))
    monkeypatch.setattr(repository, "words", lambda kind, words=repository.words: [*words(kind), "mine"])
    require(any(says_something_new(rank) for rank in (1, 2)), "MyHead says something else than CPHead, at rank 1 or 2")
    for rank in (1, 2):
        model = tiny_model(head="mine", rank=rank)
        e, W = shared.a_state(), model.lm_head.weight
        joint = check_joint(model.head, e, W)
        for sampler in (Sampling(), Sampling(temperature=0.7)):  # all at once, and one by one
            check_drafts(model.head, e, W, joint, sampler, monkeypatch)
    for target, config in itertools.product(("marginal", "lm_head"), shared.SMALL):
        with torch.no_grad():
            model = tiny_model(head="mine", target=target, **config)
            texts = shared.enumerated(lambda choose: generate(model, [0, 1], 3), monkeypatch)
            distance = total_variation(texts, shared.expected_texts(model, [0, 1], 3))
        require(distance < 1e-12, f"target {target}: decoding with MyHead is exact by enumeration, {config}")


# -----------------------------------------------------------------------------
# 12. a rule that looks better


def keeps_everything(p, q, drafted, coin, draw):
    return len(drafted), draw(p[-1])


def keeps_a_bit_more(p, q, drafted, coin, draw):
    return (keeps_everything if coin(1e-3) else repository_verify)(p, q, drafted, coin, draw)


@exercise(keeps_everything, repository_verify, one_by_one, keeps_a_bit_more)
def test_lossy_verify(answer, monkeypatch):
    """It keeps more drafts than verify, and enumeration sees what it costs: the texts are others than p's."""
    p, q = shared.random_distributions("flat", 0)

    def mean_kept(rule):
        monkeypatch.setattr(shared, "verify", as_verify(rule))
        return sum(k * probability for (k,), probability in n_kept(p, q, monkeypatch).items())

    lossless, lossy = mean_kept(repository_verify), mean_kept(answer)
    require(lossy > lossless + 1e-9, f"it keeps more drafts than verify's {lossless:.3f}: it keeps {lossy:.3f}")
    distance = total_variation(shared.verified(p, q, monkeypatch), shared.joint_of(p))
    require(distance > 0.01, f"it moves the distribution by more than 0.01: the total variation is {distance:.3g}")
