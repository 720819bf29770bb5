"""EfxTrainer: failing writes, Ctrl-C, model cards and pushing."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_trainer import REPOSITORY, assert_same, finished, gpt2, read_card, rows, run, trainer_for, weights
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_efx.core.training.checkpoints import CheckpointWriteError, last_complete_checkpoint

__all__ = ["finished", "run"]  # fixtures, used by name


def test_a_torn_rewrite_of_an_old_checkpoint_is_no_resume_point(run, monkeypatch):
    """Old and new files are each whole, but don't belong together."""
    trainer = trainer_for(run)

    def fail(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", fail)
    with pytest.raises(CheckpointWriteError, match=f"step 2 under output_dir='{run}' failed: .*No space left"):
        trainer.train()
    assert not (run / "checkpoint-2/trainer_state.json").exists()
    shutil.rmtree(run / "checkpoint-4")
    shutil.rmtree(run / "checkpoint-6")
    assert get_last_checkpoint(str(run)) == str(run / "checkpoint-2")
    assert last_complete_checkpoint(run) is None


def test_errors_that_are_no_write_errors_pass(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path)
    error = RuntimeError("CUDA error: device-side assert triggered")

    def fail(folder):
        raise error

    monkeypatch.setattr(trainer, "_save_rng_state", fail)
    with pytest.raises(RuntimeError) as caught:
        trainer.train()
    assert caught.value is error


FULL_DISK = """
import resource, signal, sys, time
from pathlib import Path
import torch
from huggingface_hub import ModelCard
from test_trainer import assert_same, gpt2, rows, trainer_for, weights
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from hf_efx.core.training.checkpoints import last_complete_checkpoint

folder, expected = Path(sys.argv[1]), torch.load(sys.argv[2])
# A write past the limit is then an error, EFBIG, as it is ENOSPC on a full disk.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


class Fill(TrainerCallback):
    def __init__(self, limit):
        self.limit = limit

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            self.weights = weights(kwargs["model"])
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))


# model.safetensors has 6 KB, optimizer.pt 22 KB: the first run fails at the one, the second at the other.
for number, limit in enumerate((3_000, 15_000)):
    run = folder / str(number)
    fill = Fill(limit)
    trainer = trainer_for(run, callbacks=[fill], save_total_limit=1)
    try:
        trainer.train()
    except OSError as error:
        message, cause = str(error), type(error.__cause__).__name__
    assert f"Saving at step 4 under output_dir='{run}' failed" in message, message
    assert "train(resume_from_checkpoint=True)" in message
    assert cause == ("SafetensorError", "RuntimeError")[number], cause
    assert (run / "checkpoint-4/model.safetensors").exists() == (number == 1)
    assert get_last_checkpoint(str(run)) == str(run / "checkpoint-4")
    assert last_complete_checkpoint(run) == str(run / "checkpoint-2")
    if number == 0:
        try:
            trainer.save_model(str(folder / "final"))
        except OSError as error:
            assert f"output_dir='{folder / 'final'}' failed" in str(error), error
        else:
            raise AssertionError("save_model on a full disk said nothing")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert trainer.state.global_step == 4
    assert_same(weights(trainer.model), fill.weights)
    trainer.save_model(str(run / "by_hand"))
    assert_same(weights(GPT2LMHeadModel.from_pretrained(run / "by_hand")), fill.weights)
    again = trainer_for(run, gpt2(seed=1))
    again.train(resume_from_checkpoint=True)
    assert again._initial_global_step == 2
    assert_same(weights(again.model), expected)
print("unharmed", flush=True)
"""


# ---- Ctrl-C


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step, newest", [(1, None), (3, 2), (5, 4)])
def test_interruption_says_how_to_go_on(tmp_path, finished, caplog, step, newest):
    trainer = trainer_for(tmp_path, callbacks=[Interrupt(step)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    [message] = [r.getMessage() for r in caplog.records if r.name == "hf_efx.core.training.trainer"]
    assert message.startswith(f"Interrupted at step {step} of 6.")
    if newest is None:
        assert f"no complete checkpoint in output_dir='{tmp_path}'" in message
        return
    assert f"{tmp_path}/checkpoint-{newest}: go on with train(resume_from_checkpoint=True)" in message
    again = trainer_for(tmp_path, gpt2(seed=1))
    again.train(resume_from_checkpoint=True)
    assert_same(weights(again.model), finished[1])


SIGINT = """
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite run in the background hands down "ignore"


class Wait(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            print("waiting", flush=True)
            time.sleep(60)


trainer_for(folder / "interrupted", callbacks=[Wait()]).train()
"""


# ---- Model card


def test_model_card(tmp_path):
    from hf_efx.core.model.adapter import get_efx_model
    from hf_efx.low_rank.config import LowRankConfig

    model = get_efx_model(gpt2(), LowRankConfig(rank=2, only_if_smaller=False))
    trainer = trainer_for(tmp_path, model, max_steps=2)
    trainer.train()
    loss = trainer.evaluate(rows(4))["eval_loss"]
    trainer.create_model_card("tiny", tags="mine", license="mit", dataset_tags="me/data", dataset_name="data")
    card = read_card(tmp_path)
    assert {"hf_efx", "low_rank", "mine"} <= set(card.data.tags) and card.data.license == "mit"
    [result] = card.data.eval_results
    assert (result.task_type, result.dataset_type, result.metric_type) == ("text-generation", "me/data", "loss")
    assert result.metric_value == loss
    text = str(card)
    assert "import hf_efx" in text and 'GPT2LMHeadModel.from_pretrained("tiny")' in text
    assert "| low_rank.rank | `2` |" in text and "| training_steps | `2` |" in text and "2209.13569" in text


def test_model_card_of_a_plain_model_before_any_evaluation(tmp_path):
    trainer = trainer_for(tmp_path / "plain")
    trainer.create_model_card()
    text = str(read_card(tmp_path / "plain"))
    assert text.count("hf_efx") >= 1 and "import hf_efx" not in text and "# plain" in text
    assert read_card(tmp_path / "plain").data.eval_results is None


def test_model_card_can_be_left_to_the_user(tmp_path):
    (tmp_path / "README.md").write_text("Mine.")
    trainer_for(tmp_path, model_card=False).create_model_card()
    assert (tmp_path / "README.md").read_text() == "Mine."


PUSH = """
options = {"push_to_hub": True, "hub_model_id": "tester/efx-trainer"}
trainer = trainer_for(folder / "pushed", eval_strategy="no", **options)
trainer.eval_dataset = rows(4)
trainer.train()
trainer.evaluate()
trainer.push_to_hub()
assert_same(weights(AutoModelForCausalLM.from_pretrained("tester/efx-trainer")), weights(trainer.model))
card = ModelCard.load("tester/efx-trainer")
assert card.data.model_name == "efx-trainer" and card.data.eval_results[0].metric_type == "loss"
assert 'from_pretrained("tester/efx-trainer")' in str(card)
print("pushed", flush=True)
"""


@pytest.fixture(scope="module")
def other_process(hub, finished, tmp_path_factory):
    """One process that fills its disk, pushes, and is sent Ctrl-C: its folder, output and status."""
    folder = tmp_path_factory.mktemp("process")
    torch.save(finished[1], folder / "expected.pt")
    env = hub.env | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])}
    command = [sys.executable, "-c", FULL_DISK + PUSH + SIGINT, str(folder), str(folder / "expected.pt")]
    process = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if line == "waiting\n":
            process.send_signal(signal.SIGINT)
    return folder, lines, process.communicate(timeout=60)[1], process.returncode


def test_full_disk(other_process):
    _, lines, errors, _ = other_process
    assert "unharmed" in lines, errors


def test_push_to_hub(other_process):
    _, lines, errors, _ = other_process
    assert "pushed" in lines, errors


def test_a_real_ctrl_c(other_process):
    folder, lines, errors, status = other_process
    assert "waiting" in lines and status != 0 and errors.rstrip().endswith("KeyboardInterrupt"), errors
    newest = folder / "interrupted/checkpoint-2"
    assert f"Interrupted at step 3 of 6. The newest complete checkpoint is {newest}" in errors


# peft 0.21 asks models for the name that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_peft_model_keeps_pefts_card(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    trainer = trainer_for(tmp_path, model, max_steps=2)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="adapter")
    assert read_card(tmp_path).data.library_name == "peft"
