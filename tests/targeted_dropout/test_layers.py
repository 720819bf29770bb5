"""Targeted dropout on models: what is dropped in a step, what stays as it was, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import ARCHITECTURES, perturb
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from hf_efx import (
    Block,
    LowRankConfig,
    SliceOutConfig,
    TargetedDropoutConfig,
    default_targets,
    get_efx_model,
    prune,
    step_context,
    unload,
)
from hf_efx.targeted_dropout.layers import TargetedMember, droppings_of

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
GPT2 = BY_NAME["gpt2"]
BLOCKS = [Block("mlp", ["0"], ["2"])]


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3))


def inputs(rows: int = 64) -> torch.Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(1))


def gradients(model: Any, batch: Any, step: int = 0, micro_step: int = 0) -> dict[str, torch.Tensor]:
    """Of one training step's micro-batch."""
    context: Any = step_context(model)
    model.train()
    model.zero_grad()
    context.begin_step(step)
    for _ in range(micro_step):
        context.next_micro_step()
    loss = model(**batch).loss if isinstance(batch, dict) else model(batch).square().mean()
    loss.backward()
    context.end_step()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_every_architecture_drops_in_training_steps_alone(name: str, granularity: str) -> None:
    architecture = BY_NAME[name]
    model = perturb(architecture.build())
    dense, batch = copy.deepcopy(model), architecture.batch()
    get_efx_model(model, TargetedDropoutConfig(granularity=granularity, targeting=0.5, rate=0.9))
    assert list(model.state_dict()) == list(dense.state_dict())
    for one in (model, dense):
        one.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, dense(**batch).logits)
    before = copy.deepcopy(model.state_dict())
    found = gradients(model, batch)
    zero = {key: float((value == 0).float().mean()) for key, value in found.items() if value.dim() > 1}
    assert any(0.3 < share < 0.6 for share in zero.values())
    parameters = {key for key, _ in model.named_parameters()}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key in parameters)
    context: Any = step_context(model)
    model.eval()
    context.begin_step(1)  # a model that evaluates within a step
    with torch.no_grad():
        dense.load_state_dict(model.state_dict())
        assert torch.equal(model(**batch).logits, dense(**batch).logits)


def test_exactly_the_weakest_of_each_column_are_dropped() -> None:
    model = perturb(GPT2.build())
    get_efx_model(model, TargetedDropoutConfig(targeting=0.75, rate=1.0))
    found = gradients(model, GPT2.batch())
    name = "transformer.h.0.mlp.c_fc.weight"
    weight = model.get_parameter(name)
    weak = weight.abs() <= weight.abs().kthvalue(24, dim=0).values  # of 32 inputs
    assert torch.equal(found[name] == 0, weak) and (weak.sum(0) == 24).all()
    pruned = copy.deepcopy(model)
    prune(pruned, 0.75)
    assert torch.equal(pruned.get_parameter(name) == 0, weak)  # one criterion for both


@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_gradients_are_those_of_the_pruned_dense_model(granularity: Any) -> None:
    """At rate 1 the candidates are dropped for certain: the step is that of the model pruned by the same share."""
    model = perturb(GPT2.build()).double()
    dense, batch = copy.deepcopy(model), GPT2.batch()
    prune(dense, 0.5, granularity)
    dense.train()
    loss = dense(**batch).loss
    loss.backward()
    get_efx_model(model, TargetedDropoutConfig(granularity=granularity, targeting=0.5, rate=1.0))
    found = gradients(model, batch)
    for name, parameter in dense.named_parameters():
        where = parameter != 0
        expected: Any = parameter.grad
        torch.testing.assert_close(found[name][where], expected[where], rtol=1e-6, atol=1e-10, msg=name)
    zero = found["transformer.h.1.mlp.c_fc.weight"] == 0
    if granularity == "unit":
        columns = zero.all(0)
        assert columns.sum() == 64 and torch.equal(zero.any(0), columns)
        assert torch.equal(found["transformer.h.1.mlp.c_fc.bias"] == 0, columns)
        assert torch.equal((found["transformer.h.1.mlp.c_proj.weight"] == 0).all(1), columns)


def test_conv1d_drops_as_the_transposed_linear() -> None:
    torch.manual_seed(0)
    models: Any = nn.Sequential(nn.Linear(16, 24)), nn.Sequential(Conv1D(24, 16))
    models[1][0].weight.data = models[0][0].weight.data.t().clone()
    models[1][0].bias.data = models[0][0].bias.data.clone()
    x = torch.randn(4, 16)
    config = TargetedDropoutConfig(rate=1.0, target_modules=["0"])
    linear, conv = (gradients(get_efx_model(model, config), x) for model in models)
    torch.testing.assert_close(linear["0.weight"], conv["0.weight"].t())


def test_a_units_own_layer_drops_column_and_bias() -> None:
    model = get_efx_model(mlp(), TargetedDropoutConfig(granularity="unit", targeting=0.5, rate=1.0))
    found = gradients(model, inputs())
    gone = (found["0.weight"] == 0).all(1)
    assert gone.sum() >= 12 and torch.equal(found["0.bias"] == 0, gone)
    named = TargetedDropoutConfig(granularity="unit", targeting=0.5, rate=1.0, blocks=BLOCKS)
    with_reader = gradients(get_efx_model(mlp(), named), inputs())
    assert (with_reader["2.weight"] == 0).all(0).sum() >= 12 and (with_reader["2.bias"] != 0).any()


def test_plain_dropout_takes_any_weight_and_scales_what_is_kept() -> None:
    model = mlp()
    get_efx_model(model, TargetedDropoutConfig(selection="random", rate=0.5, target_modules=["0"]))
    largest = model[0].weight.abs() > model[0].weight.abs().median()  # pyright: ignore
    assert (gradients(model, inputs())["0.weight"][largest] == 0).any()
    wide = nn.Sequential(nn.Linear(4000, 2, bias=False))
    wide[0].weight.data.fill_(1.0)  # pyright: ignore
    get_efx_model(wide, TargetedDropoutConfig(selection="random", rate=0.75, target_modules=["0"]))
    context: Any = step_context(wide)
    context.begin_step(0)
    assert ((wide(torch.ones(1, 4000)) / 4000 - 1).abs() < 0.15).all()  # the mean is the dense layer's


def test_draws_repeat_by_place_and_differ_between_places() -> None:
    model, x = get_efx_model(mlp(), TargetedDropoutConfig(rate=0.5)), inputs()
    first = gradients(model, x, step=3)
    assert all(torch.equal(value, first[name]) for name, value in gradients(model, x, step=3).items())
    zero = first["0.weight"] == 0
    for step, micro_step in ((4, 0), (3, 1)):
        assert not torch.equal(zero, gradients(model, x, step, micro_step)["0.weight"] == 0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_repeats_the_draw(reentrant: bool) -> None:
    model = get_efx_model(perturb(GPT2.build()).double(), TargetedDropoutConfig(rate=0.66))
    plain = gradients(model, GPT2.batch())
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again = gradients(model, GPT2.batch())
    assert all(torch.allclose(value, again[name], rtol=1e-9, atol=1e-12) for name, value in plain.items())


def test_candidates_are_renewed_every_so_many_steps() -> None:
    model = get_efx_model(mlp(), TargetedDropoutConfig(targeting=0.5, rate=1.0, refresh_every=3))
    x, weak, noise = inputs(), [], torch.Generator().manual_seed(2)
    for step in range(5):
        weak.append(gradients(model, x, step)["0.weight"] == 0)
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(24, 16, generator=noise))  # pyright: ignore
    same = [torch.equal(a, b) for a, b in zip(weak, weak[1:], strict=False)]
    assert same == [True, True, False, True]


def test_a_run_that_begins_elsewhere_has_candidates_of_its_own() -> None:
    model = get_efx_model(mlp(), TargetedDropoutConfig(targeting=0.5, rate=1.0))
    first = gradients(model, inputs(), 3)["0.weight"] == 0
    with torch.no_grad():
        model[0].weight.neg_().add_(1)  # pyright: ignore  # what was weak isn't
    for step, same in ((4, True), (9, False)):  # the next step; another run's first
        assert torch.equal(first, gradients(model, inputs(), step)["0.weight"] == 0) is same


def test_a_ramp_of_candidates_and_rate() -> None:
    model = mlp()
    config = TargetedDropoutConfig(targeting=0.75, rate=1.0, ramp="paper", ramp_steps=100, refresh_every=1)
    get_efx_model(model, config)
    [dropping] = droppings_of(model)
    shares = []
    for step in (0, 50, 100, 120):
        gradients(model, inputs(), step)
        shares.append(float((~dropping.spared["0"]).float().mean()))
        dropping.context.step = step
        assert dropping.dropped_share() == pytest.approx(dropping.factors()[1] * shares[-1], abs=0.05)
    assert shares == [0.0, 11 / 16, 0.75, 0.75]  # floor(.7125 * 16) = 11
    endless = get_efx_model(mlp(), TargetedDropoutConfig(ramp="linear"))
    context: Any = step_context(endless)
    with pytest.raises(ValueError, match="ramp='linear' needs a length"):
        context.begin_step(0)


def test_l1_comes_once_a_step_and_without_dropping() -> None:
    model, x = mlp(), inputs(8)
    plain = copy.deepcopy(model)
    get_efx_model(model, TargetedDropoutConfig(rate=0.0, l1=0.5))
    plain(x).square().mean().backward()
    name = "2.weight"
    parameter = plain.get_parameter(name)
    with_penalty = parameter.grad + 0.5 * parameter.sign()  # pyright: ignore
    assert torch.equal(gradients(model, x)[name], with_penalty)
    context: Any = step_context(model)
    context.begin_step(1)
    for expected in (with_penalty, parameter.grad):  # the step's first micro-batch, and its second
        model.zero_grad()
        model(x).square().mean().backward()
        assert torch.equal(model.get_parameter(name).grad, expected)  # pyright: ignore
        context.next_micro_step()
    context.begin_step(2)
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="l1 under fp16.*bf16=True"):
        model(x)


class Shared(nn.Module):
    """One layer that is called three times, recomputed or not."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.reentrant = nn.Linear(16, 16).double(), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.double().requires_grad_()  # reentrant recomputation asks for it
        for _ in range(3):
            if self.reentrant is None:
                x = self.layer(x).tanh()
            else:
                x = checkpoint(lambda x: self.layer(x).tanh(), x, use_reentrant=self.reentrant)  # pyright: ignore
        return x


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_l1_of_a_shared_layer_comes_once(reentrant: bool | None) -> None:
    model, dense = Shared(reentrant), Shared(None)
    dense(inputs()).square().mean().backward()
    get_efx_model(model, TargetedDropoutConfig(rate=0.0, l1=0.1, target_modules=["layer"]))
    found, weight = gradients(model, inputs())["layer.weight"], dense.layer.weight
    torch.testing.assert_close(found, weight.grad + 0.1 * weight.sign(), rtol=1e-9, atol=1e-12)  # pyright: ignore


def test_what_changed_after_it_was_put_on_is_refused_when_a_step_begins() -> None:
    llama = BY_NAME["llama"].build()
    get_efx_model(llama, TargetedDropoutConfig(target_modules=["lm_head", "gate_proj"]))
    gradients(llama, BY_NAME["llama"].batch())
    llama.resize_token_embeddings(80)
    config = TargetedDropoutConfig(rate=0.5)
    changed = get_efx_model(mlp(), config)
    config.rate = 0.9
    for model, words in ((llama, "'lm_head' was replaced.*resize_token"), (changed, "was changed after.*'rate': 0.9")):
        context: Any = step_context(model)
        with pytest.raises(ValueError, match=f"(?s){words}.*unload"):
            context.begin_step(0)
    unload(llama)
    get_efx_model(llama, TargetedDropoutConfig(target_modules=["lm_head", "gate_proj"]))
    assert (gradients(llama, BY_NAME["llama"].batch())["lm_head.weight"][:64] == 0).any()


def test_sharded_weights_are_refused_whatever_is_dropped() -> None:
    cases: list[dict[str, Any]] = [{}, {"selection": "random"}]
    for fields in cases:
        model = get_efx_model(mlp(), TargetedDropoutConfig(**fields))
        model[0].weight.data = torch.empty(0)  # pyright: ignore
        context: Any = step_context(model)
        with pytest.raises(ValueError, match=r"0.weight is sharded.*DDP"):
            context.begin_step(0)


def test_unload_leaves_nothing_and_a_copy_drops_for_itself() -> None:
    model = get_efx_model(perturb(GPT2.build()), TargetedDropoutConfig(granularity="unit"))
    twin = copy.deepcopy(model)
    assert droppings_of(twin)[0] is not droppings_of(model)[0]
    gradients(twin, GPT2.batch())
    assert not droppings_of(model)[0].spared and droppings_of(twin)[0].spared  # pyright: ignore
    unload(model)
    assert not any(isinstance(m, TargetedMember) for m in model.modules()) and step_context(model) is None
    assert not hasattr(model.config, "efx")


def test_a_saved_model_gets_its_dropout_back(tmp_path: Path) -> None:
    config = TargetedDropoutConfig(granularity="unit", targeting=0.5, target_modules=["c_fc"], refresh_every=7)
    model = get_efx_model(perturb(GPT2.build()), config)
    model.save_pretrained(tmp_path)
    loaded = GPT2.auto.from_pretrained(tmp_path)
    assert not droppings_of(loaded)
    get_efx_model(loaded)
    [back] = droppings_of(loaded)
    assert back.config.method_fields() == config.method_fields()
    assert [(g.name, g.size) for g in back.groups] == [(f"transformer.h.{i}.mlp.c_fc", 128) for i in (0, 1)]
    left, right = gradients(model, GPT2.batch(), 5), gradients(loaded, GPT2.batch(), 5)
    assert all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"granularity": "head"}, "granularity='head': expected one of weight, unit"),
        ({"ramp": "cosine"}, "ramp='cosine': expected one of none, linear, paper"),
        ({"scope": "row"}, "scope='row': expected one of column, layer, global"),
        ({"selection": "largest"}, "selection='largest': expected one of targeted, random"),
        ({"targeting": 1.5}, "targeting=1.5: expected a share from 0 to 1"),
        ({"rate": -0.1}, "rate=-0.1: expected a share from 0 to 1"),
        ({"rate": True}, "rate=True: expected a share"),
        ({"refresh_every": 0}, "refresh_every=0: expected a whole number of 1 or more"),
        ({"ramp_steps": 0}, "ramp_steps=0: expected a whole number"),
        ({"l1": -1.0}, "l1=-1.0: expected a number of 0 or more"),
        ({"l1": 0.1, "granularity": "unit"}, "l1=0.1 acts on weights"),
        ({"rate": 1.0, "selection": "random"}, "rate=1 with selection='random' drops everything"),
        ({"blocks": BLOCKS}, "blocks describe units: set granularity='unit'"),
        ({"blocks": ["0"], "granularity": "unit"}, "blocks has the entry '0': expected a Block"),
        ({"alpha": 0.5}, "unknown key 'alpha'"),
    ],
)
def test_fields_out_of_range(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TargetedDropoutConfig(**fields)


def test_what_a_model_cannot_do_is_refused_and_leaves_it_unchanged(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    before = [type(m) for m in model.modules()]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"targeting": 0.01}, "targeting=0.01 leaves no candidate: rounded down it is none of the 24 weights of a"),
        ({"targeting": 0.01, "granularity": "unit"}, "targeting=0.01 leaves no candidate"),
        ({"target_modules": ["nowhere"]}, "matches no module"),
        ({"granularity": "unit", "blocks": [Block("mlp", ["5"], ["6"])]}, "blocks has .* but no module"),
    ]
    for fields, words in cases:
        with pytest.raises(ValueError, match=words):
            get_efx_model(model, TargetedDropoutConfig(**fields))
    assert [type(m) for m in model.modules()] == before and step_context(model) is None
    with caplog.at_level("WARNING", "hf_efx"):
        get_efx_model(model, TargetedDropoutConfig(targeting=0.05))  # floor(.05 * 16) = 0, floor(.05 * 24) = 1
    assert "leaves no candidate among the 16 weights of a column of 0: it stays dense" in caplog.text


def test_layers_of_other_methods_and_tied_ones_are_refused() -> None:
    tied = GPT2.build()
    with pytest.raises(ValueError, match="lm_head"):
        get_efx_model(tied, TargetedDropoutConfig(target_modules=["lm_head"]))
    slices = SliceOutConfig(rate=0.5, align=2, targets=["mlp"])
    for first in (LowRankConfig(rank=0.25, target_modules=["c_fc"]), slices):
        model = get_efx_model(GPT2.build(), first)
        with pytest.raises(ValueError, match="c_fc"):
            get_efx_model(model, TargetedDropoutConfig(target_modules=["c_fc"]))
        get_efx_model(model, TargetedDropoutConfig(target_modules=["c_attn"]))  # beside each other
    assert "transformer.h.0.mlp.c_fc" in default_targets(GPT2.build())


def test_nan_weights_are_named_at_the_first_step() -> None:
    model = get_efx_model(mlp(), TargetedDropoutConfig())
    model[2].weight.data[0, 0] = float("nan")  # pyright: ignore
    context: Any = step_context(model)
    with pytest.raises(ValueError, match=r"2\.weight: There are NaN magnitudes"):
        context.begin_step(0)


def test_l1_on_frozen_weights_is_refused_at_the_first_step() -> None:
    model = get_efx_model(mlp(), TargetedDropoutConfig(l1=1e-3))
    model[2].weight.requires_grad_(False)  # pyright: ignore
    context: Any = step_context(model)
    with pytest.raises(ValueError, match=r"l1=0.001 can't act on 2.weight, which is frozen .*set l1=0"):
        context.begin_step(0)
