"""A course: twelve exercises on CP multi-token prediction and exact decoding.

Start with exercises.md beside this file. Each function here is yours to write; import what you
need.

    python -m pytest tests/test_exercises.py -k joint      grades one of them
    python -m pytest tests/test_exercises.py -rs           all, and what is still to be written

Shapes use the field's names: N positions, n offsets, r components, V tokens, C channels, k drafts.
"""

from model import CPHead

# 1. The joint


def joint_log_probs(log_w, log_p):
    """log P of the first 1, 2, ..., n tokens of each window, equation (1).

    log_w (N, r); log_p (N, n, r) = log P_a^(s) of the window's own tokens -> (N, n).
    """
    raise NotImplementedError


# 2. Why a rank?


def floor_by_hand(phrases):
    """Bits per phrase that the best independent heads pay, by a formula.

    phrases: a list of tuples of n words each, all as probable -> a number.
    """
    raise NotImplementedError


def floor_by_training(phrases):
    """Bits per phrase that trained independent heads pay: a small GPT with rank=1 -> a number."""
    raise NotImplementedError


# 3. The rows that drafts are judged by


def conditional(log_w, log_p, x):
    """q(.) = P(x_{k+1} = . | x_1, ..., x_k) of equation (3), in probabilities.

    log_w (r,); log_p (n, r, V), the row of every factor; x (k,), 0 < k < n -> (V,).
    """
    raise NotImplementedError


# 4. What the drafts leave p lacking


def residual(keep, p, q):
    """The residual of each place, not normalised.

    keep (k + 1, 1); p, q (k + 1, V), of which q[k] is 0, as nothing is drafted there -> (k + 1, V).
    """
    raise NotImplementedError


# 5. Verification


def verify_one(p, q, drafted, coin, draw):
    """Keep the one draft or correct it, so that every token follows p.

    p (2, V): the target's rows for the draft's place and for the one after it. q (1, V): the row
    that drafted (1,) was drawn from. All that is random goes through coin(probability) -> bool and
    draw(row) -> int; row (V,) need not sum to 1. Returns how many drafts are kept, and the token
    after them.
    """
    raise NotImplementedError


def verify_block(p, q, drafted, coin, draw):
    """The same for k drafts, by block verification: p (k + 1, V), q (k, V), drafted (k,)."""
    raise NotImplementedError


# 6. Which decoder is wrong?


def find_lossless(decoders, expected):
    """The index of the one decoder whose texts have the expected distribution.

    decoders: a list of three functions, decoder(N) -> N texts, each a tuple of token ids. expected:
    {text: probability} of every text.
    """
    raise NotImplementedError


# 7. A collapse


def balance_loss(log_w):
    """The load-balancing loss r * sum_a f_a m_a: (N, r) -> a scalar with a gradient.

    f_a is the share of the positions whose largest weight is a, m_a the mean weight of a.
    """
    raise NotImplementedError


def collapse():
    """(seed, weight): `learned` of test_cp_head.py, on SAD_CRIED with rank=2, collapses from this
    seed with balance_weight=0, and does not with balance_weight=weight."""
    raise NotImplementedError


# 8. Rolling back the cache


def feed_drafts(model, cache, x, n_kept):
    """One forward pass over x_1 and the drafts after it, of which the first n_kept are then kept.

    cache holds all before x_1; x (k + 1,). Returns the hidden states (n_kept + 1, C) of x_1 and the
    kept drafts, and leaves the cache as if nothing else had been fed.
    """
    raise NotImplementedError


# 9. A draft that looks at the one before it


def chain_row(W, M, G, U, e, x):
    """log P_a^(s)(. | x_{t+s-1} = x), s > 1, of the chain head:

        softmax(W h),    h = M e + U (norm(W[x]) * G e)                                         (5)

    norm is torch's F.layer_norm without weights (eps = 1e-5), * goes element by element. W (V, C);
    M, G, U (C, C); e (C,); x an int -> (V,).
    """
    raise NotImplementedError


# 10. When is it slower?


def predicted_speedup(plain_ms, step_ms, acceptance):
    """How many times as fast as plain decoding, without running either.

    plain_ms: milliseconds of a plain step; step_ms: of a speculative one, all included; acceptance:
    by offset, the share of the drafts that are accepted where all before them were.
    """
    raise NotImplementedError


# 11. A head of your own


class MyHead(CPHead):
    """Say here what it is, in a formula. CPHead's docstring says what to override: `vectors`."""

    def __init__(self, config):
        raise NotImplementedError


# 12. A rule that looks better


def lossy_verify(p, q, drafted, coin, draw):
    """Like verify_block, but keeps more drafts, and so writes texts of another distribution."""
    raise NotImplementedError
