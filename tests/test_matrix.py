"""What every method must do on every architecture: each test here runs on each row of tests/matrix.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import dispatch_model
from matrix import ROWS, Row, cast, logits, perturb, training_step
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D
from two_processes import losses

from hf_efx import EfxConfig, EfxTrainer, get_efx_model, merge_and_unload, unload
from hf_efx.core.model.adapter import efx_record


@pytest.fixture(params=ROWS, ids=lambda row: row.id, scope="module")
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


@pytest.fixture(scope="module")
def saved(row: Row, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the row's efx checkpoint."""
    folder = tmp_path_factory.mktemp("efx")
    row.build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(row: Row) -> torch.Tensor:
    """What the row's model makes of the row's batch."""
    return logits(row.build(), row)


def gradients(model: Any, row: Row) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**cast(row, next(model.parameters()).dtype)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_state(model: Any, other: Any) -> None:
    """The same keys with the same bits."""
    state, expected = model.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Whether a is b up to `tolerance` of b's largest value."""
    return (a - b).abs().max().item() <= tolerance * b.abs().max().item()


# --- in memory


def test_every_trainable_parameter_moves_and_no_frozen_one(row: Row) -> None:
    model = row.build().double()
    names = [name for name, p in model.named_parameters()]
    frozen = {names[1], next(name for name in names if name.endswith("factor_v") or name == names[-1])}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    with training_step(model):
        gradients(model, row)
    optimizer.step()
    still = {name for name, p in model.named_parameters() if (p - before[name]).abs().max() < 1e-14}
    expected = {name for name in names if name.endswith(row.architecture.unmoved or "-")}
    assert still == frozen | expected


def test_it_is_the_same_object_and_its_dense_twin_is_untouched(row: Row) -> None:
    config = row.architecture.config()
    dense, twin = (type(row.architecture.build())(config) for _ in range(2))
    assert get_efx_model(dense, row.config()) is dense
    assert efx_record(dense) is not None
    assert efx_record(twin) is None and not hasattr(config, "quantization_config")


def test_unload_leaves_what_changes_the_skeleton(row: Row) -> None:
    model = row.build()
    expected = logits(model, row)
    assert unload(model) is model
    assert (efx_record(model) is not None) == row.changes_skeleton
    assert torch.equal(logits(model, row), expected)


def test_merge_gives_the_dense_model_with_the_same_outputs(row: Row, tmp_path: Path) -> None:
    model, dense = row.build(), row.architecture.build()
    expected = logits(model, row)
    assert merge_and_unload(model) is model
    assert close(logits(model, row), expected)
    assert set(model.state_dict()) == set(dense.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]
    logits(dense, row)  # a classifier notes its problem_type in the config when it first sees labels
    assert model.config.to_dict() == dense.config.to_dict()
    for folder, each in (("merged", model), ("dense", dense)):
        each.save_pretrained(tmp_path / folder)
    merged_file, dense_file = (load_file(tmp_path / f / "model.safetensors") for f in ("merged", "dense"))
    assert {k: v.shape for k, v in merged_file.items()} == {k: v.shape for k, v in dense_file.items()}
    assert torch.equal(logits(row.architecture.auto.from_pretrained(tmp_path / "merged"), row), logits(model, row))


def test_two_configs_compose_in_either_order_and_overlap_is_refused(row: Row) -> None:
    first, second = (row.config(target_modules=part) for part in row.architecture.parts)
    model = get_efx_model(row.architecture.build(), [first, second])
    reverse = get_efx_model(row.architecture.build(), [second, first])
    one_by_one = get_efx_model(get_efx_model(row.architecture.build(), first), second)
    modules = [set(entry["modules"]) for entry in efx_record(model)["methods"]]  # pyright: ignore
    assert modules == [set(entry["modules"]) for entry in reversed(efx_record(reverse)["methods"])]  # pyright: ignore
    assert modules[0] and modules[1] and not modules[0] & modules[1]
    assert_same_state(model, reverse)
    assert_same_state(model, one_by_one)
    assert efx_record(model) == efx_record(one_by_one)
    expected = logits(model, row)
    assert close(logits(merge_and_unload(model), row), expected)

    dense = row.architecture.build()
    with pytest.raises(ValueError, match=rf"already taken by the {row.method} config"):
        get_efx_model(dense, [row.config(), second])
    assert_same_state(dense, row.architecture.build())
    assert efx_record(dense) is None


# --- while loading


def test_saved_checkpoint_loads_with_plain_auto_class(row: Row, saved: Path) -> None:
    model, loaded = row.build(), row.architecture.auto.from_pretrained(saved)
    assert_same_state(loaded, model)
    assert torch.equal(logits(loaded, row), logits(model, row))
    assert efx_record(loaded) == json.loads(json.dumps(efx_record(model)))
    assert not hasattr(loaded, "hf_quantizer") and not getattr(loaded, "is_quantized", False)
    assert not loaded.training


def test_loaded_checkpoint_saves_again_and_merges(row: Row, saved: Path, tmp_path: Path) -> None:
    loaded = row.architecture.auto.from_pretrained(saved)
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((saved / "config.json").read_text())
    merged = merge_and_unload(loaded)
    assert_same_state(merged, merge_and_unload(row.build()))


def test_sharded_checkpoint_loads(row: Row, tmp_path: Path) -> None:
    model = row.build()
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_state(row.architecture.auto.from_pretrained(tmp_path), model)


def test_base_model_loads_from_the_checkpoint_of_the_whole(row: Row, saved: Path) -> None:
    if row.architecture.name == "t5":
        pytest.skip("T5ForConditionalGeneration has no head beside T5Model's parts")
    whole = row.architecture.auto.from_pretrained(saved)
    base_class = type(whole.base_model)
    loaded = base_class.from_pretrained(saved)
    shared = loaded.state_dict()
    expected = whole.base_model.state_dict()
    assert {k for k in shared if k in expected} >= {k for k in expected if "factor_v" in k}
    for key, value in expected.items():
        assert torch.equal(shared[key], value), key


def test_dense_checkpoint_becomes_an_efx_model_while_it_loads(row: Row, tmp_path: Path) -> None:
    dense = perturb(row.architecture.build())
    dense.save_pretrained(tmp_path / "dense")
    auto = row.architecture.auto
    loaded = auto.from_pretrained(tmp_path / "dense", quantization_config=EfxConfig([row.config()]))
    assert_same_state(loaded, get_efx_model(dense, row.config()))
    assert not hasattr(loaded, "hf_quantizer") and not getattr(loaded, "is_quantized", False)
    loaded.save_pretrained(tmp_path / "efx")
    assert_same_state(auto.from_pretrained(tmp_path / "efx"), loaded)
    assert loaded.half().dtype == torch.float16  # a model that stays quantised refuses this


# --- through peft


def peft_model(row: Row, **fields: Any) -> peft.PeftModel:
    return peft.get_peft_model(row.architecture.build(), row.config(**fields))


def test_peft_trains_saves_loads_disables_and_merges(row: Row, tmp_path: Path) -> None:
    if not row.by_peft:
        with pytest.raises(ValueError, match="get_efx_model"):
            peft_model(row)
        return
    model = peft_model(row)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".low_rank_" in name), name
    dense = logits(row.architecture.build(), row)
    grads = gradients(model, row)
    assert grads and all(g.abs().max() > 0 for g in grads.values())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    trained = logits(model, row)
    with model.disable_adapter():
        assert torch.equal(logits(model, row), dense)
    assert not close(trained, dense)

    model.save_pretrained(tmp_path)
    kept = load_file(tmp_path / "adapter_model.safetensors")
    assert kept.keys() and all("low_rank_" in key for key in kept)
    loaded = peft.PeftModel.from_pretrained(row.architecture.build(), tmp_path)
    assert torch.equal(logits(loaded, row), trained)
    assert not any(p.requires_grad for p in loaded.parameters())
    merged = loaded.merge_and_unload()
    assert close(logits(merged, row), trained)
    assert list(merged.state_dict()) == list(row.architecture.build().state_dict())
    assert_same_state(model.unload(), row.architecture.build())


def test_peft_holds_several_adapters(row: Row, tmp_path: Path) -> None:
    if not row.by_peft:
        pytest.skip("refused by peft, see the test before")
    model = peft_model(row)
    first = logits(model, row)
    model.add_adapter("second", row.config(rank=0.5))
    assert torch.equal(logits(model, row), first)
    moving = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moving and all(name.endswith(".default") for name in moving)
    model.set_adapter("second")
    second = logits(model, row)
    dense = logits(row.architecture.build(), row)
    assert (second - dense).norm() < (first - dense).norm()  # the higher rank keeps more of the dense weights
    assert all(name.endswith(".second") for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(row.architecture.build(), tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    assert torch.equal(logits(again, row), first)
    again.set_adapter("second")
    assert torch.equal(logits(again, row), second)
    again.merge_adapter()
    assert close(logits(again, row), second)
    again.unmerge_adapter()
    assert torch.equal(logits(again, row), second)
    again.set_adapter("default")
    again.delete_adapter("second")
    assert torch.equal(logits(again, row), first)


def test_lora_goes_on_top(row: Row, tmp_path: Path) -> None:
    base = row.build()
    expected = logits(base, row)
    transposed = any(isinstance(m, Conv1D) for m in base.modules())
    options = {"r": 2, "init_lora_weights": False, "fan_in_fan_out": transposed}
    lora = peft.LoraConfig(target_modules=row.architecture.lora_targets, **options)
    model = peft.get_peft_model(base, lora)
    model.eval()  # a batch norm's averages stay with the base model, not with the adapter
    grads = gradients(model, row)
    assert grads and all("lora_" in name and g.abs().max() > 0 for name, g in grads.items())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    trained = logits(model, row)
    assert not close(trained, expected)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(row.build(), tmp_path)
    assert torch.equal(logits(loaded, row), trained)
    if row.changes_skeleton:
        state = {k: v.clone() for k, v in loaded.state_dict().items()}
        for merge in (loaded.merge_and_unload, loaded.merge_adapter):
            with pytest.raises(ValueError, match="factorised.*can't|can't be merged, since that layer is factorised"):
                merge()
        assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
    assert torch.equal(logits(loaded, row), trained)
    assert torch.equal(logits(loaded.unload(), row), expected)


# --- what a model goes through


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(row: Row, saved: Path, expected: torch.Tensor, dtype: torch.dtype) -> None:
    model = get_efx_model(row.architecture.build().to(dtype), row.config())
    assert {p.dtype for p in model.parameters()} == {dtype}
    # The factors are those of the rounded weights, found in float32: close to what full precision finds.
    full = logits(get_efx_model(row.architecture.build(), row.config()), row)
    assert close(logits(model, row).float(), full, 0.05)
    with training_step(model):
        model(**cast(row, dtype)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    loaded = row.architecture.auto.from_pretrained(saved, dtype=dtype)
    assert close(logits(loaded, row).float(), expected, 0.05)
    assert {p.dtype for p in loaded.parameters()} >= {dtype}
    merged = merge_and_unload(loaded)
    assert close(logits(merged, row).float(), expected, 0.05)


def test_meta_model_takes_the_structure_and_then_values(row: Row) -> None:
    model = row.build()
    with torch.device("meta"):
        empty = type(model)(row.architecture.config())
    get_efx_model(empty, row.config())
    assert all(p.is_meta for p in empty.parameters())
    assert efx_record(empty) == efx_record(model)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert all(not p.is_meta for p in empty.parameters())
    merged = merge_and_unload(_meta(row))
    assert {k: v.shape for k, v in merged.state_dict().items()} == {
        k: v.shape for k, v in row.architecture.build().state_dict().items()
    }


def _meta(row: Row) -> Any:
    with torch.device("meta"):
        model = type(row.architecture.build())(row.architecture.config())
    return get_efx_model(model, row.config())


def test_device_map_is_left_alone(row: Row, saved: Path, expected: torch.Tensor) -> None:
    dense = dispatch_model(row.architecture.build(), {"": "cpu"}, force_hooks=True)
    hooked = {name for name, m in dense.named_modules() if hasattr(m, "_hf_hook")}
    assert hooked
    model = perturb(get_efx_model(dense, row.config()))
    assert torch.equal(logits(model, row), expected)
    assert {name for name, m in model.named_modules() if hasattr(m, "_hf_hook")} == hooked
    assert model.hf_device_map == {"": "cpu"}
    assert close(logits(merge_and_unload(model), row), expected)
    assert {name for name, m in model.named_modules() if hasattr(m, "_hf_hook")} == hooked
    assert model.hf_device_map == {"": "cpu"}
    loaded = row.architecture.auto.from_pretrained(saved, device_map="cpu")
    assert torch.equal(logits(loaded, row), expected)


def test_gradient_checkpointing_gives_the_same_gradients(row: Row) -> None:
    if not row.architecture.checkpointing:
        assert not row.build().supports_gradient_checkpointing
        pytest.skip("transformers doesn't checkpoint this architecture")
    plain, checkpointed = row.build().train(), row.build().train()
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    assert checkpointed.is_activation_checkpointing
    with training_step(plain), training_step(checkpointed):
        expected, grads = gradients(plain, row), gradients(checkpointed, row)
    assert grads.keys() == expected.keys()
    assert all((grads[name] - g).norm() <= 1e-5 * g.norm() + 1e-7 for name, g in expected.items())


def _trainer(make: Callable[..., Trainer], model: Any, row: Row, folder: Path) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        save_steps=1,
        logging_steps=1,
        learning_rate=1e-2,
        weight_decay=0.1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    batch = row.architecture.batch(8)
    data = [{name: values[i] for name, values in batch.items()} for i in range(8)]
    callbacks = [] if make is EfxTrainer else row.callbacks()
    return make(model, arguments, train_dataset=data, callbacks=callbacks)


def test_trainer_resumes_with_the_same_trace(row: Row, tmp_path: Path) -> None:
    """From the checkpoint of the first step, which falls between two renewals of targeted dropout's candidates."""
    whole = _trainer(Trainer, row.build(), row, tmp_path)
    whole.train()
    assert len(losses(whole)) == 2
    checkpoint = str(tmp_path / "checkpoint-1")
    resumed = [_trainer(EfxTrainer, row.architecture.build(), row, tmp_path)]  # a dense model, rebuilt to match
    if row.changes_skeleton or not row.architecture.renamed_on_save:
        resumed.append(_trainer(Trainer, row.build(seed=1), row, tmp_path))
    for trainer in resumed:
        trainer.train(checkpoint)
        assert losses(trainer) == losses(whole)
        assert_same_state(trainer.model, whole.model)
