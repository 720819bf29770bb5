"""prune: which weights go, by hand and against torch's own pruning, what is refused, and zeros that stay."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from matrix import ARCHITECTURES, perturb
from torch import nn
from torch.nn.utils import prune as torch_prune
from transformers import AutoModelForCausalLM, GPT2Model, Trainer, TrainingArguments, default_data_collator

from hf_efx import Block, EfxTrainer, LowRankConfig, default_targets, get_efx_model, merge_and_unload, unload
from hf_efx.core.model.pruned import is_held
from hf_efx.core.model.record import efx_record
from hf_efx.targeted_dropout.pruning import prune

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
BLOCKS = (Block("mlp", ("0",), ("2",)), Block("mlp", ("2",), ("4",)))


def gpt2() -> Any:
    return perturb(BY_NAME["gpt2"].build())


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- which weights


def test_the_smallest_of_each_column_go_by_hand() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    first: Any = model[0]
    first.weight.data = torch.tensor([[0.1, -0.4, 0.2, 0.3], [-4.0, 1.0, 1.0, -1.0]])
    report = prune(model, 0.5)
    assert first.weight.tolist() == [[0.0, pytest.approx(-0.4), 0.0, pytest.approx(0.3)], [-4.0, 0.0, 0.0, -1.0]]
    assert [(row.name, row.kept, row.total) for row in report.layers] == [("0", 4, 8)]
    assert report.sparsity == 0.5 and report.parameters == 16 and "50.0% of the weights pruned" in str(report)
    json.dumps(report.to_dict())


def test_a_column_is_an_output_unit_in_conv1d_too() -> None:
    model = gpt2()
    prune(model, 0.75)
    weight = model.transformer.h[0].mlp.c_fc.weight  # [in 32, out 128]
    assert (weight.count_nonzero(0) == 8).all() and not (weight.count_nonzero(1) == 32).all()


def test_layer_and_global_scope_give_torch_s_masks() -> None:
    for scope in ("layer", "global"):
        ours, theirs = mlp(), mlp()
        layers: Any = [theirs[0], theirs[2]]
        prune(ours, 0.3, scope=scope)
        if scope == "layer":
            for layer in layers:
                torch_prune.l1_unstructured(layer, "weight", int(0.3 * layer.weight.numel()))
        else:
            torch_prune.global_unstructured(
                [(layer, "weight") for layer in layers], torch_prune.L1Unstructured, amount=int(0.3 * 128)
            )
        for i in (0, 2):
            assert torch.equal(ours[i].weight, theirs[i].weight), (scope, i)  # pyright: ignore


def test_units_are_torch_s_structured_columns_and_what_hangs_on_them() -> None:
    model, theirs = mlp(), mlp()
    torch_prune.ln_structured(theirs[0], "weight", 4, n=2, dim=0)
    gone = theirs[0].weight.count_nonzero(1) == 0  # pyright: ignore
    prune(model, 0.5, "unit", blocks=BLOCKS[:1])
    fc1, fc2 = model[0], model[2]
    assert gone.sum() == 4 and torch.equal(fc1.weight, theirs[0].weight)  # pyright: ignore
    assert torch.equal(fc1.bias == 0, gone)  # pyright: ignore
    assert torch.equal((fc2.weight == 0).all(0), gone) and (fc2.bias != 0).all()  # pyright: ignore
    # Without blocks a plain module's units are its own output columns; what reads them isn't known.
    own = mlp()
    assert [row.name for row in prune(own, 0.5, "unit").layers] == ["0", "2"]
    assert torch.equal(own[0].weight, theirs[0].weight) and (own[2].weight == 0).all(1).sum() == 3  # pyright: ignore


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_every_architecture_to_the_count_and_only_once(name: str, granularity: Any) -> None:
    model = perturb(BY_NAME[name].build())
    before = weights(model)
    report = prune(model, 0.5, granularity)
    assert report.layers and abs(report.sparsity - 0.5) <= 1 / min(row.total for row in report.layers)
    if granularity == "weight":
        assert [row.name for row in report.layers] == default_targets(model)
    after = weights(model)
    zero = {key for key, value in after.items() if (value == 0).any() and value.is_floating_point()}
    assert zero and all(torch.equal(after[k], v) for k, v in before.items() if k not in zero)
    assert all(torch.equal(value[value != 0], before[key][value != 0]) for key, value in after.items())
    again = prune(model, 0.5, granularity)
    assert again == report and all(torch.equal(after[key], value) for key, value in model.state_dict().items())


def test_units_of_a_resnet_leave_no_trace_of_their_channels() -> None:
    model = perturb(BY_NAME["resnet"].build())
    prune(model, 0.5, "unit")
    x = BY_NAME["resnet"].batch()["pixel_values"]
    seen: list[torch.Tensor] = []
    layer = model.resnet.encoder.stages[1].layers[1].layer
    layer[1].convolution.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x)
    gone = (layer[0].convolution.weight == 0).flatten(1).all(1)
    assert gone.sum() == 8 and (seen[0][:, gone] == 0).all() and (seen[0][:, ~gone] != 0).any()


def test_ties_are_cut_exactly() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)).bfloat16()
    nn.init.constant_(model[0].weight, 0.5)  # pyright: ignore
    prune(model, 0.4)
    assert (model[0].weight == 0).sum(1).tolist() == [3, 3, 3, 3]  # pyright: ignore


def test_targets_are_chosen_and_heads_left_alone() -> None:
    model = gpt2()
    report = prune(model, 0.5, target_modules=["c_fc"], exclude_modules=["h.0.mlp.c_fc"])
    assert [row.name for row in report.layers] == ["transformer.h.1.mlp.c_fc"]
    report = prune(model, 0.5, "unit", target_modules=["c_fc"])
    assert [row.name for row in report.layers] == [f"transformer.h.{i}.mlp.c_fc" for i in (0, 1)]
    assert (model.transformer.wte.weight != 0).all()


# --- what is refused, the model unharmed


def uneven() -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(1e-3)  # pyright: ignore
    return model


def with_nan() -> nn.Module:
    model = mlp()
    model[2].weight.data[0, 0] = float("nan")  # pyright: ignore
    return model


def quantised() -> Any:
    model = gpt2()
    config = type("FakeQuantisation", (), {"quant_method": "bitsandbytes"})
    model.hf_quantizer = type("FakeQuantizer", (), {"quantization_config": config})()
    return model


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "all": (mlp, {"fraction": 1.0}, r"fraction=1.0: expected a share from 0 to below 1"),
    "negative": (mlp, {"fraction": -0.1}, r"fraction=-0.1: expected"),
    "nothing": (mlp, {"fraction": 0.05}, r"fraction=0.05 with scope='column' prunes nothing.*Raise"),
    "granularity": (mlp, {"granularity": "row"}, r"granularity='row': expected one of weight, unit"),
    "scope": (mlp, {"scope": "model"}, r"scope='model': expected one of column, layer, global"),
    "scope of units": (mlp, {"scope": "model", "granularity": "unit"}, r"scope='model'"),
    "layer emptied": (uneven, {"scope": "global", "fraction": 0.6}, r"would empty '2'.*48 weights.*scope='layer'"),
    "NaN": (with_nan, {}, r"2.weight.*NaN"),
    "NaN units": (with_nan, {"granularity": "unit"}, r"2.*NaN"),
    "NaN globally": (with_nan, {"scope": "global"}, r"2.weight.*NaN"),
    "no module": (gpt2, {"target_modules": ["q_proj"]}, r"target_modules=\['q_proj'\].*matches no module"),
    "no unit": (
        gpt2,
        {"target_modules": ["q_proj"], "granularity": "unit"},
        r"target_modules=\['q_proj'\].*no units of GPT2LMHeadModel.*attn.c_attn",
    ),
    "tied": (gpt2, {"target_modules": ["lm_head"]}, r"'lm_head'.*tied \(lm_head.weight, transformer.wte"),
    "quantised": (quantised, {}, r"quantised \(bitsandbytes\).*prune, then quantise"),
    "lora": (
        lambda: peft.get_peft_model(gpt2(), peft.LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True)),
        {},
        r"carries a peft adapter.*merge it first",
    ),
    "factorised": (
        lambda: get_efx_model(gpt2(), LowRankConfig(rank=2, target_modules=["c_fc"])),
        {"target_modules": ["c_fc"]},
        r"c_fc' can't be changed, since it is already factorised",
    ),
    "factorised units": (
        lambda: get_efx_model(gpt2(), LowRankConfig(rank=2)),
        {"granularity": "unit"},
        r"isn't one plain matrix.*merge_and_unload",
    ),
    "blocks of weights": (mlp, {"blocks": BLOCKS}, r"blocks describe units: pass granularity='unit'"),
    "block that isn't there": (
        mlp,
        {"blocks": [Block("mlp", ("up",), ("down",))], "granularity": "unit"},
        r"blocks has .*no module of Sequential",
    ),
    "meta": (lambda: mlp().to("meta"), {}, r"'0.weight' is sharded or on the meta device"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_and_the_model_unharmed(case: str) -> None:
    make, options, words = REFUSED[case]
    model = make()
    state, record = weights(model), copy.deepcopy(efx_record(model))
    with pytest.raises(ValueError, match=f"(?s){words}"):
        prune(model, **{"fraction": 0.5, **options})
    assert efx_record(model) == record and not any(map(is_held, model.modules()))
    for name, value in model.state_dict().items():
        assert value.is_meta or torch.equal(value.nan_to_num(7.0), state[name].nan_to_num(7.0)), name


# --- zeros that stay


def pruned_gpt2(granularity: Any = "weight") -> Any:
    model = gpt2()
    prune(model, 0.5, granularity)
    return model


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value == 0 for name, value in model.named_parameters() if (value == 0).any()}


def three_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(3):
        batch = BY_NAME["gpt2"].batch()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**settings, **changes})


def data() -> Dataset:
    return Dataset.from_dict({name: value.tolist() for name, value in BY_NAME["gpt2"].batch(8).items()})


def run(trainer: type[Trainer], model: Any, folder: Path, resume: Any = None, **changes: Any) -> Any:
    done = trainer(model, arguments(folder, **changes), train_dataset=data(), data_collator=default_data_collator)
    done.train(resume_from_checkpoint=resume)
    return done.model


def test_the_record_names_modules_and_what_hangs_on_their_units() -> None:
    record: Any = efx_record(pruned_gpt2())
    assert record["methods"] == [] and set(record["pruned"]) == set(default_targets(gpt2()))
    assert not any(record["pruned"].values())
    record = efx_record(pruned_gpt2("unit"))
    assert record["pruned"]["transformer.h.0.mlp.c_fc"] == {"bias": True}
    assert record["pruned"]["transformer.h.0.mlp.c_proj"] == {}
    resnet = BY_NAME["resnet"].build()
    prune(resnet, 0.5, "unit")
    follows = [spec for spec in resnet.config.efx["pruned"].values() if "follows" in spec]
    assert follows and all(spec["follows"].endswith("0.convolution") for spec in follows)


@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_an_optimizer_with_momentum_refills_nothing(granularity: Any) -> None:
    # Its state is from before pruning: momentum and decay would move what has no gradient.
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    three_steps(model, optimizer)
    prune(model, 0.5, granularity)
    before, state = zeros(model), weights(model)
    three_steps(model, optimizer)
    torch.testing.assert_close(zeros(model), before)
    moved = [name for name, value in model.named_parameters() if not torch.equal(value, state[name])]
    assert set(before) <= set(moved)  # the other weights train on
    # Given up, they move.
    prune(model, 0)
    assert efx_record(model) is None
    three_steps(model, optimizer)
    assert len(zeros(model)) < len(before)


def test_a_unit_s_own_zero_bias_trains_and_a_norm_s_stays() -> None:
    model = perturb(BY_NAME["resnet"].build()).train()
    prune(model, 0.5, "unit")
    bias = model.resnet.encoder.stages[1].layers[1].layer[0].normalization.bias
    gone = bias == 0
    with torch.no_grad():
        bias.zero_()  # also those that are in use
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(**BY_NAME["resnet"].batch()).loss.backward()
    optimizer.step()
    assert gone.sum() == 8 and (bias[gone] == 0).all() and (bias[~gone] != 0).all()


@pytest.mark.parametrize("way", ["get_efx_model", "EfxTrainer"])
def test_saved_loaded_tuned_and_saved_again(way: str, tmp_path: Path, run_python: Callable[..., str]) -> None:
    model = pruned_gpt2("unit")
    model.save_pretrained(tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    before = zeros(loaded)
    if way == "get_efx_model":
        tuned = run(Trainer, get_efx_model(loaded), tmp_path / "run")
    else:
        tuned = run(EfxTrainer, loaded, tmp_path / "run")
    merge_and_unload(unload(tuned))
    tuned.save_pretrained(tmp_path / "tuned")
    after = zeros(tuned)
    assert before.keys() == after.keys() and all(torch.equal(after[name], mask) for name, mask in before.items())
    assert not torch.equal(tuned.transformer.h[0].mlp.c_fc.weight, model.transformer.h[0].mlp.c_fc.weight)
    tokens = BY_NAME["gpt2"].batch()["input_ids"]
    with torch.no_grad():
        expected = tuned.eval()(tokens).logits
    torch.save(tokens, tmp_path / "tokens.pt")
    printed = run_python(
        """
        import sys, torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/tuned")
        assert not any(name.split(".")[0] == "hf_efx" for name in sys.modules)
        torch.save(model(torch.load(sys.argv[1] + "/tokens.pt")).logits, sys.argv[1] + "/logits.pt")
        print(sum(int((p == 0).sum()) for p in model.parameters()), "pruned" in model.config.efx)
        """,
        args=[tmp_path],
    )
    assert printed.split() == [str(sum(int(mask.sum()) for mask in after.values())), "True"]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_a_loaded_model_that_nobody_holds_is_refilled(tmp_path: Path) -> None:
    pruned_gpt2().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)  # flagged, not held
    assert zeros(loaded)
    three_steps(loaded, torch.optim.AdamW(loaded.parameters(), lr=1e-2))
    assert not zeros(loaded)


def test_a_resumed_run_takes_the_flag_from_its_checkpoint(tmp_path: Path) -> None:
    model = pruned_gpt2()
    before = zeros(model)
    run(EfxTrainer, model, tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    resumed = run(EfxTrainer, gpt2(), tmp_path, resume=True, max_steps=4)  # a dense model is given
    assert efx_record(resumed) == efx_record(model)
    torch.testing.assert_close(zeros(resumed), before)


def test_sharded_training_is_refused(tmp_path: Path) -> None:
    trainer = EfxTrainer(pruned_gpt2(), arguments(tmp_path), train_dataset=data(), data_collator=default_data_collator)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match=r"is pruned.*FSDP and DeepSpeed.*prune\(model, 0\)"):
        trainer.train()


def test_the_base_model_alone_is_held_too(tmp_path: Path) -> None:
    pruned_gpt2().save_pretrained(tmp_path)
    base = get_efx_model(GPT2Model.from_pretrained(tmp_path))
    assert is_held(base.h[0].mlp.c_fc)  # pyright: ignore


def test_a_plain_module_is_held_as_well() -> None:
    model = mlp()
    prune(model, 0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before = zeros(model)
    for _ in range(3):
        model(torch.randn(4, 10)).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(zeros(model), before)


def test_a_lora_trains_on_top_but_is_not_merged_into_zeros() -> None:
    model = peft.get_peft_model(pruned_gpt2(), peft.LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True))
    with pytest.raises(ValueError, match=r"c_fc' can't be merged, since that layer is pruned.*prune\(model, 0\)"):
        model.merge_and_unload()  # pyright: ignore[reportCallIssue]


def test_a_pruned_layer_is_not_factorised() -> None:
    model = pruned_gpt2()
    with pytest.raises(ValueError, match=r"LowRankConfig: module .*c_attn' is pruned.*prune\(model, 0\)"):
        get_efx_model(model, LowRankConfig(rank=2))
    assert efx_record(model)["methods"] == []  # pyright: ignore


def test_a_malformed_flag_is_refused() -> None:
    model = gpt2()
    for wrong in ([], {"transformer.h.0.mlp.c_fc": {"mask": 1}}):
        model.config.efx = {"format_version": 1, "methods": [], "pruned": wrong}
        with pytest.raises(ValueError, match="config.efx has pruned="):
            get_efx_model(model)
