"""Keyed dropout masks: their rates, their independence, and that they depend on their own row alone."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from hf_efx.core.scoring.keyed_dropout import KeyedDropout, row_keys

RATE, ROWS, LENGTH, WIDTH = 0.1, 64, 32, 256


class Sites(nn.Module):
    """Three dropouts of ones [rows, length, width], or of what is given."""

    def forward(self, x):
        return torch.stack([F.dropout(x, RATE) for _ in range(3)])


def keys(seed=0, ids=None, sample=0):
    ids = torch.arange(ROWS) if ids is None else ids
    return row_keys(seed, ids, torch.full_like(ids, sample))


def run(model, x, rows, masks: Any = "position", padding=None):
    with KeyedDropout(model, masks) as keyed:
        keyed.set_rows(rows, padding)
        return model(x)


def dropped(rows, masks="position"):
    """[sites, rows, length, width]"""
    return (run(Sites(), torch.ones(len(rows), LENGTH, WIDTH), rows, masks) == 0).double()


def test_rates_pass_a_chi_square_at_every_site():
    for site in dropped(keys()):
        for counts, n in ((site.sum((1, 2)), LENGTH * WIDTH), (site.sum((0, 1)), ROWS * LENGTH)):
            chi = ((counts - n * RATE) ** 2 / (n * RATE * (1 - RATE))).sum()
            degrees = len(counts)
            assert abs(chi - degrees) < 5 * math.sqrt(2 * degrees)
        assert abs(site.mean() - RATE) < 5 * math.sqrt(RATE * (1 - RATE) / site.numel())


def test_masks_are_uncorrelated():
    masks, others = dropped(keys()), dropped(keys(sample=1))
    pairs = {
        "rows": (masks[:, 1:], masks[:, :-1]),
        "samples": (masks, others),
        "seeds": (masks, dropped(keys(seed=1))),
        "positions": (masks[:, :, 1:], masks[:, :, :-1]),
        "sites": (masks[1:], masks[:-1]),
        "channels": (masks[..., 1:], masks[..., :-1]),
        "rows and positions": (masks[:, 1:, :-1], masks[:, :-1, 1:]),
    }
    for name, (one, other) in pairs.items():
        product = ((one - RATE) * (other - RATE)).mean() / (RATE * (1 - RATE))
        assert abs(product) < 5 / math.sqrt(one.numel()), name


def test_a_row_s_mask_is_its_own():
    whole, order = dropped(keys()), torch.randperm(ROWS)
    assert torch.equal(dropped(keys()[order[:5]]), whole[:, order[:5]])


def test_masks_by_sequence_are_shared_by_positions_alone():
    masks = dropped(keys(), "sequence")
    assert torch.equal(masks, masks[:, :, :1].expand_as(masks))
    assert not torch.equal(masks[:, 0], masks[:, 1]) and not torch.equal(masks[0], masks[1])


def test_positions_count_from_the_first_token():
    x, shift = torch.ones(2, 6, WIDTH), 2
    whole = run(Sites(), x, keys()[:2])
    moved = run(Sites(), x, keys()[:2], padding=torch.tensor([shift, 0]))
    assert torch.equal(moved[:, 0, shift:], whole[:, 0, :-shift]) and torch.equal(moved[:, 1], whole[:, 1])


class Attention(nn.Module):
    """torch's attention with dropout on, or the same written out."""

    def __init__(self, written_out):
        super().__init__()
        self.written_out = written_out

    def forward(self, x):
        query = x.unflatten(-1, (4, 8)).transpose(1, 2)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        if not self.written_out:
            return F.scaled_dot_product_attention(query, query, query, mask, RATE)
        weights = (query @ query.mT / math.sqrt(8)).masked_fill(~mask, -torch.inf).softmax(-1)
        return F.dropout(weights, RATE) @ query


def test_attention_s_dropout_is_reached():
    x = torch.randn(3, 5, 32, dtype=torch.float64)
    one, other = (run(Attention(written_out), x, keys()[:3]) for written_out in (False, True))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(one, run(Attention(True), x, keys()[3:6]))


def test_whole_channels_and_modules():
    model = nn.Sequential(nn.Dropout2d(0.5), nn.Dropout(1.0, inplace=True))
    out = run(model[:1], torch.ones(4, 16, 3, 3), keys()[:4])
    assert torch.equal(out, out[:, :, :1, :1].expand_as(out)) and set(out.unique().tolist()) == {0, 2}
    assert not run(model, torch.ones(4, 16, 3, 3), keys()[:4]).any()


class Nothing(nn.Module):
    def forward(self, x):
        return x


def test_draws_follow_the_probabilities():
    rows = row_keys(0, torch.arange(20000), torch.zeros(20000, dtype=torch.int64))
    probs = torch.tensor([0.0, 0.2, 0.5, 0.0, 0.3, 0.0])
    with KeyedDropout(Nothing()) as keyed:
        keyed.set_rows(rows)
        drawn = torch.multinomial(probs.expand(20000, -1), 1)[:, 0]
    counts = torch.bincount(drawn, minlength=6).double()
    assert (counts[probs == 0] == 0).all()
    expected = probs[probs > 0] * 20000
    assert ((counts[probs > 0] - expected) ** 2 / expected).sum() < 20  # chi-square of 2 degrees


class Odd(nn.Module):
    def __init__(self, drop):
        super().__init__()
        self.drop = drop

    def forward(self, x):
        return self.drop(x)


@pytest.mark.parametrize(
    "drop", [lambda x: F.dropout(x[:, 0, :3].mT.contiguous()), lambda x: F.alpha_dropout(x, 0.1, True)]
)
def test_what_cannot_be_keyed_is_refused(drop):
    with pytest.raises(ValueError, match="can't be keyed"):
        run(Odd(drop), torch.ones(2, 4, 8), keys()[:2])
    assert run(Odd(lambda x: F.alpha_dropout(x, 0.1)), torch.ones(2, 4), keys()[:2]).all()


def test_models_and_calls_out_of_reach_are_refused():
    model = Odd(nn.Dropout(0.1))
    with KeyedDropout(model) as keyed, pytest.raises(ValueError, match="outside the forward of Odd"):
        keyed.set_rows(keys()[:2])
        model.drop(torch.ones(2, 4))
    config = transformers.XLNetConfig(vocab_size=8, d_model=8, n_layer=1, n_head=2, d_inner=8)
    with pytest.raises(ValueError, match="XLNetModel doesn't keep rows first"):
        KeyedDropout(transformers.XLNetModel(config))


def test_nothing_is_left_behind():
    model, state = Sites(), torch.get_rng_state()
    with pytest.raises(RuntimeError), KeyedDropout(model) as keyed:
        keyed.set_rows(keys())
        model(torch.ones(ROWS, 2, 2))
        raise RuntimeError
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="masks='row'"):
        KeyedDropout(model, "row")  # pyright: ignore[reportArgumentType]
