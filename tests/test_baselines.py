"""The heads of baselines.py: each is a joint distribution, its rows are the conditionals, and decoding with it is
exact, by the very tests of the CP head."""

import pytest
import test_cp_head as shared
import torch
from test_cp_head import tiny_model

from baselines import BASELINES
from model import HEADS, GPTConfig

baselines = pytest.mark.parametrize("head", BASELINES)
targets = pytest.mark.parametrize("target", ["marginal", "lm_head"])


@baselines
@targets
@pytest.mark.parametrize("rank", [1, 3])
def test_it_is_a_joint_distribution_and_its_rows_are_the_conditionals(head, target, rank):
    shared.test_log_joint_is_equation_1_and_sums_to_one(dict(head=head, target=target), rank)
    shared.test_conditionals_are_those_of_equation_1(dict(head=head, target=target), rank, n_token=3)
    shared.test_the_methods_of_a_head_agree(head, rank)
    for draft_vocab in (0, 2):
        shared.test_rows_along_the_gold_tokens_are_those_that_drafts_are_drawn_from(head, rank, draft_vocab)


@baselines
def test_gradients(head):
    shared.test_gradcheck_of_the_joint_loss(head)


@baselines
@targets
def test_speculative_decoding_is_exact_by_enumeration(head, target, monkeypatch):
    for config in shared.SMALL:
        shared.test_speculative_decoding_is_exact_by_enumeration(config, dict(head=head, target=target), monkeypatch)


def test_the_wide_head_begins_as_independent_heads_and_has_the_parameters_of_a_mixture():
    """It is compared with a mixture of equal size; only the router's rows and an odd half differ."""
    wide, cp = (HEADS[head](GPTConfig(vocab_size=5, n_embd=8, n_head=1, n_future=3, rank=5, head=head))
                for head in ("wide", "cp"))
    numbers = [sum(p.numel() for name, p in head.named_parameters() if "router" not in name) for head in (wide, cp)]
    assert numbers[0] == numbers[1]
    e = torch.randn(4, 8)
    assert wide.rank == 1 and torch.equal(wide.vectors(e), wide.vectors(e, slice(0, 3)))
    maps = torch.einsum("nrij,bj->bnri", wide.maps, e)
    torch.testing.assert_close(wide.vectors(e), maps)  # B = 0
    with torch.no_grad():
        wide.down.normal_()
    inner = torch.nn.functional.gelu(torch.einsum("nwc,bc->bnw", wide.up, e))
    torch.testing.assert_close(wide.vectors(e)[:, :, 0], maps[:, :, 0] + torch.einsum("ncw,bnw->bnc", wide.down, inner))
    torch.testing.assert_close(wide.vectors(e)[:, 1:2], wide.vectors(e, slice(1, 2)))


def test_the_wide_head_is_independent_heads_at_rank_1():
    model, cp = tiny_model(head="wide", rank=1), tiny_model(head="cp", rank=1)
    model.load_state_dict(cp.state_dict() | {name: tensor for name, tensor in model.state_dict().items()
                                             if name in ("head.up", "head.down")})
    e, gold = torch.randn(6, 8, dtype=torch.float64), torch.randint(5, (6, 3))
    W = cp.lm_head.weight
    assert torch.equal(model.head.log_joint(e, gold, W), cp.head.log_joint(e, gold, W))
