"""A pruned model stays pruned: under optimizers, Trainers, copies and adapters, and where it is saved and loaded."""

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from matrix import ARCHITECTURES, perturb
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Model, Trainer, TrainingArguments, default_data_collator

from hf_efx import EfxTrainer, LowRankConfig, default_targets, get_efx_model, merge_and_unload, prune, unload
from hf_efx.core.model.pruned import is_held
from hf_efx.core.model.record import efx_record

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def gpt2(seed: int = 0) -> Any:
    return perturb(BY_NAME["gpt2"].build(seed))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


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
def test_saved_loaded_tuned_and_saved_again(way: str, tmp_path: Path) -> None:
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
    after = zeros(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned"))
    assert before.keys() == after.keys() and all(torch.equal(after[name], mask) for name, mask in before.items())
    assert not torch.equal(tuned.transformer.h[0].mlp.c_fc.weight, model.transformer.h[0].mlp.c_fc.weight)


def test_a_loaded_model_that_nobody_holds_is_refilled(tmp_path: Path) -> None:
    pruned_gpt2().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    three_steps(loaded, torch.optim.AdamW(loaded.parameters(), lr=1e-2))
    assert not zeros(loaded)


def test_copies_of_a_pruned_model_keep_their_zeros_under_a_plain_trainer(tmp_path: Path) -> None:
    model = pruned_gpt2("unit")
    before = zeros(model)
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "model_init": None,
    }
    for name, one in copies.items():
        parts: dict[str, Any] = {"model": one} if one is not None else {"model_init": lambda: copy.deepcopy(model)}
        trainer = Trainer(args=arguments(tmp_path), train_dataset=data(), data_collator=default_data_collator, **parts)
        trainer.train()
        assert trainer.model is not model
        torch.testing.assert_close(zeros(trainer.model), before, msg=name)  # pyright: ignore[reportArgumentType]


def test_a_resized_head_keeps_its_zeros_as_far_as_it_was() -> None:
    model = perturb(BY_NAME["llama"].build())
    prune(model, 0.5, target_modules=["lm_head"])
    before = model.lm_head.weight == 0
    rows = len(before)
    model.resize_token_embeddings(rows + 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(**BY_NAME["llama"].batch()).loss.backward()
    optimizer.step()
    assert torch.equal(model.lm_head.weight[:rows] == 0, before) and before.float().mean() == 0.5


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
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
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


@pytest.mark.parametrize("way", ["get_efx_model", "put on", "prune", "EfxTrainer"])
def test_a_flag_whose_zeros_are_gone_is_dropped(way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, first = pruned_gpt2(), "transformer.h.0.mlp.c_fc"
    dense = {name: value for name, value in gpt2().state_dict().items() if not name.startswith(first)}
    model.load_state_dict(dense, strict=False)  # all but one layer
    if way == "get_efx_model":
        get_efx_model(model)
    elif way == "put on":
        get_efx_model(model, LowRankConfig(rank=2, exclude_modules=[first]))
    elif way == "prune":
        prune(model, 0.5, target_modules=[first])
    else:
        run(EfxTrainer, model, tmp_path, max_steps=1)
    assert list(efx_record(model)["pruned"]) == [first]  # pyright: ignore
    assert "h.0.attn.c_attn and 6 more are pruned, but no weight there is zero" in caplog.text
    assert is_held(model.get_submodule(first)) and not is_held(model.transformer.h[1].mlp.c_fc)


def test_without_any_zero_nothing_of_the_flag_stays(tmp_path: Path) -> None:
    model = pruned_gpt2()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-3  # a hand-written step
    model.save_pretrained(tmp_path)
    loaded = get_efx_model(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert efx_record(loaded) is None
    adapter = peft.LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True, init_lora_weights="pissa")
    assert efx_record(peft.get_peft_model(model, adapter).merge_and_unload())  # pyright: ignore[reportCallIssue]


def test_a_malformed_flag_is_refused() -> None:
    model = gpt2()
    for wrong in ([], {"transformer.h.0.mlp.c_fc": {"mask": 1}}):
        model.config.efx = {"format_version": 1, "methods": [], "pruned": wrong}
        with pytest.raises(ValueError, match="config.efx has pruned="):
            get_efx_model(model)
