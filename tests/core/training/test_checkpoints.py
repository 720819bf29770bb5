"""Whole and torn checkpoint folders, as a plain Trainer writes them."""

import errno
import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_efx.core.training.checkpoints import (
    CheckpointWriteError,
    explain_incomplete,
    explained_write_errors,
    last_complete_checkpoint,
)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def train(folder, model, **options):
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    if not hasattr(model, "config"):
        data = [{"x": torch.ones(2)}] * 4
    args = TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    Trainer(model, args, train_dataset=data).train()
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(tmp_path_factory.mktemp("plain"), gpt2())


@pytest.fixture
def run(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "run")
    return tmp_path / "run"


def cut(file, keep):
    """Keeps a share of a file's bytes, as a full disk or a kill does."""
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])


def test_what_the_trainer_writes_is_whole(plain):
    assert explain_incomplete(plain / "checkpoint-2") is None
    assert explain_incomplete(str(plain / "checkpoint-4")) is None
    assert last_complete_checkpoint(plain) == str(plain / "checkpoint-4")


FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
]


def test_the_list_of_files_is_what_the_trainer_writes(plain):
    assert sorted(p.name for p in (plain / "checkpoint-4").iterdir()) == FILES


@pytest.mark.parametrize("keep", [0, 0.0003, 0.5, 0.99])
@pytest.mark.parametrize("name", FILES)
def test_any_file_cut_anywhere_is_found(run, name, keep, caplog):
    cut(run / "checkpoint-4" / name, keep)
    reason = explain_incomplete(run / "checkpoint-4")
    assert reason is not None and name in reason
    assert last_complete_checkpoint(run) == str(run / "checkpoint-2")
    assert "checkpoint-4" in caplog.text and reason in caplog.text
    assert get_last_checkpoint(str(run)) == str(run / "checkpoint-4")  # what is guarded against


@pytest.mark.parametrize(
    "missing, reason",
    [
        ("trainer_state.json", "trainer_state.json, which is written last, is missing"),
        ("model.safetensors", "no weights"),
        ("scheduler.pt", "scheduler.pt is missing beside optimizer.pt"),
        ("rng_state.pth", "rng_state"),
    ],
)
def test_missing_files(run, missing, reason):
    (run / "checkpoint-4" / missing).unlink()
    assert reason in (explain_incomplete(run / "checkpoint-4") or "")


def test_bytes_too_many_and_a_foreign_header(run):
    weights = run / "checkpoint-4/model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original + b"x")
    assert "its header promises" in (explain_incomplete(run / "checkpoint-4") or "")
    weights.write_bytes(b"\xff" * len(original))
    assert "cut within its header" in (explain_incomplete(run / "checkpoint-4") or "")
    weights.write_bytes((8).to_bytes(8, "little") + b"[1, 2 ] ")
    assert "broken header" in (explain_incomplete(run / "checkpoint-4") or "")
    weights.write_bytes(original)
    assert explain_incomplete(run / "checkpoint-4") is None


def test_shards(run):
    folder = run / "checkpoint-4"
    gpt2().save_pretrained(folder, max_shard_size="2KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and explain_incomplete(folder) is None
    content = shards[-1].read_bytes()
    shards[-1].unlink()
    assert f"the shard {shards[-1].name}, which model.safetensors.index.json" in (explain_incomplete(folder) or "")
    shards[-1].write_bytes(content[:-4])
    assert f"{shards[-1].name} has" in (explain_incomplete(folder) or "")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json names no shards" in (explain_incomplete(folder) or "")


def test_without_optimizer(tmp_path):
    run = train(tmp_path, gpt2(), save_only_model=True)
    assert not (run / "checkpoint-4/optimizer.pt").exists() and explain_incomplete(run / "checkpoint-4") is None
    cut(run / "checkpoint-4/model.safetensors", 0.9)
    assert last_complete_checkpoint(run) == str(run / "checkpoint-2")


def test_module_without_config(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 1)

        def forward(self, x):
            return {"loss": self.linear(x).sum()}

    run = train(tmp_path, Net())
    assert not (run / "checkpoint-4/config.json").exists() and explain_incomplete(run / "checkpoint-4") is None


# peft 0.21 asks models for the name that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_adapters(tmp_path):
    from peft import LoraConfig, get_peft_model

    # fan_in_fan_out is what GPT-2's Conv1D needs; peft would set it with a warning.
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    run = train(tmp_path, get_peft_model(gpt2(), config))
    folder = run / "checkpoint-4"
    assert explain_incomplete(folder) is None and not (folder / "model.safetensors").exists()
    # Several adapters lie in sub-folders.
    (folder / "second").mkdir()
    (folder / "adapter_model.safetensors").rename(folder / "second/adapter_model.safetensors")
    assert explain_incomplete(folder) is None
    cut(folder / "second/adapter_model.safetensors", 0.5)
    assert (explain_incomplete(folder) or "").startswith("second/adapter_model.safetensors is cut within its header")
    assert last_complete_checkpoint(run) == str(run / "checkpoint-2")


def test_newest_is_by_number_and_other_names_are_left_alone(run):
    (run / "checkpoint-4").rename(run / "checkpoint-10")
    for name in ("checkpoint-11-old", "checkpoint-", "tmp-checkpoint-12"):
        (run / name).mkdir()
    (run / "checkpoint-13").write_text("a file")
    assert last_complete_checkpoint(run) == str(run / "checkpoint-10")


def test_none(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "missing") is None
    assert explain_incomplete(tmp_path / "missing") == f"{tmp_path / 'missing'} is no folder"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
)
def test_write_errors_are_explained(error):
    message = "step 12 under output_dir='runs/a' failed.*resume_from_checkpoint=True"
    with pytest.raises(OSError, match=message) as caught:
        with explained_write_errors("output_dir", "runs/a", 12):
            with explained_write_errors("output_dir", "runs/a/checkpoint-12", 12):
                raise error
    assert isinstance(caught.value, CheckpointWriteError) and caught.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("Some tensors share memory"), ValueError("x"), KeyboardInterrupt()])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught:
        with explained_write_errors("output_dir", "runs/a", 12):
            raise error
    assert caught.value is error


def test_nothing_is_changed_by_looking(run):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    last_complete_checkpoint(run)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    assert json.loads((run / "checkpoint-4/trainer_state.json").read_text())["global_step"] == 4
    assert load_file(run / "checkpoint-4/model.safetensors")
