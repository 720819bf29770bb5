"""EfxTrainer: resuming past torn checkpoints, failing writes, Ctrl-C, structure, extra columns, metrics."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    default_data_collator,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_efx.core.arguments import EfxArguments
from hf_efx.core.checkpoints import CheckpointWriteError, last_complete_checkpoint
from hf_efx.core.trainer import EfxTrainer, EfxTrainerMixin

REPOSITORY = Path(__file__).parents[2]


def gpt2(seed=0):
    """A model with dropout, so that a resumed run needs the random state as well."""
    config = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def rows(number=16):
    ids = torch.randint(0, 16, (number, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder, cls=EfxArguments, **options):
    defaults = {
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return cls(str(folder), **(defaults | options))


def trainer_for(folder, model=None, cls=EfxTrainer, callbacks=(), **options):
    model = gpt2() if model is None else model
    return cls(model, arguments(folder, **options), train_dataset=rows(), callbacks=list(callbacks))


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run's folder, with checkpoints 2, 4 and 6, and its last weights."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = trainer_for(folder)
    trainer.train()
    return folder, weights(trainer.model)


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def tear(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def test_without_options_it_is_the_plain_trainer(finished, tmp_path):
    plain = trainer_for(tmp_path, cls=Trainer)
    plain.train()
    assert_same(weights(plain.model), finished[1])


# ---- Resuming


@pytest.mark.parametrize("torn", [(), ("checkpoint-6",), ("checkpoint-6", "checkpoint-4")])
def test_resume_passes_over_torn_checkpoints(run, finished, torn, caplog):
    for name in torn:
        tear(run / name)
    trainer = trainer_for(run, gpt2(seed=1))
    trainer.train(resume_from_checkpoint=True)
    assert_same(weights(trainer.model), finished[1])
    assert trainer._initial_global_step == 6 - 2 * len(torn)
    for name in torn:
        assert f"Passing over the torn checkpoint {run / name}: model.safetensors has" in caplog.text
    assert caplog.text.count("Passing over") == len(torn)


def test_resume_from_a_named_checkpoint(run, finished):
    trainer = trainer_for(run, gpt2(seed=1))
    trainer.train(run / "checkpoint-2")
    assert trainer._initial_global_step == 2
    assert_same(weights(trainer.model), finished[1])


def test_a_named_torn_checkpoint_raises_before_any_work(run):
    tear(run / "checkpoint-4")
    trainer = trainer_for(run, gpt2(seed=1))
    before = weights(trainer.model)
    with pytest.raises(ValueError, match="resume_from_checkpoint='.*-4' is no complete checkpoint: model.safetensors"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert_same(weights(trainer.model), before)
    assert trainer.state.global_step == 0 and trainer.optimizer is None


def test_nothing_to_resume_from_is_transformers_error(tmp_path):
    messages = []
    for cls in (Trainer, EfxTrainer):
        with pytest.raises(ValueError) as caught:
            trainer_for(tmp_path, cls=cls).train(resume_from_checkpoint=True)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and str(tmp_path) in messages[0]


def test_only_torn_checkpoints_are_nothing_to_resume_from(run):
    for step in (2, 4, 6):
        tear(run / f"checkpoint-{step}")
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trainer_for(run).train(resume_from_checkpoint=True)


def test_false_and_none_start_anew(run, finished):
    for resume in (False, None):
        trainer = trainer_for(run)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer._initial_global_step == 0
        assert_same(weights(trainer.model), finished[1])


def test_processes_agree_on_the_oldest_choice(run, monkeypatch):
    """Another process, whose file system lacks checkpoint 6, answers 4."""
    trainer = trainer_for(run)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    monkeypatch.setattr(trainer.accelerator, "gather", lambda step: torch.cat([step, torch.tensor([4])]))
    assert trainer._resume_point(True) == str(run / "checkpoint-4")
    monkeypatch.setattr(trainer.accelerator, "gather", lambda step: torch.cat([step, torch.tensor([-1])]))
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trainer._resume_point(True)


# ---- Structure


@pytest.fixture(scope="module")
def low_rank_run(tmp_path_factory):
    from hf_efx.core.adapter import get_efx_model
    from hf_efx.low_rank.config import LowRankConfig

    folder = tmp_path_factory.mktemp("low_rank")
    trainer = trainer_for(folder, get_efx_model(gpt2(), LowRankConfig(rank=2, only_if_smaller=False)))
    trainer.train()
    return folder, weights(trainer.model)


@pytest.mark.parametrize("by", ["model", "model_init"])
def test_resume_restores_the_checkpoints_structure(low_rank_run, tmp_path, by):
    folder, expected = low_rank_run
    shutil.copytree(folder, tmp_path / "run")
    tear(tmp_path / "run/checkpoint-6")
    if by == "model":
        trainer = trainer_for(tmp_path / "run", gpt2(seed=1))
    else:
        trainer = EfxTrainer(
            args=arguments(tmp_path / "run"), train_dataset=rows(), model_init=lambda: gpt2(seed=1)
        )
    assert not any("factor_v" in name for name in trainer.model.state_dict())
    trainer.train(resume_from_checkpoint=True)
    assert_same(weights(trainer.model), expected)
    assert trainer._resume_from is None


def test_resume_with_the_same_structure_leaves_it(low_rank_run, tmp_path):
    from hf_efx.core.adapter import get_efx_model
    from hf_efx.low_rank.config import LowRankConfig

    shutil.copytree(low_rank_run[0], tmp_path / "run")
    model = get_efx_model(gpt2(seed=1), LowRankConfig(rank=2, only_if_smaller=False))
    parameters = {name: id(value) for name, value in model.named_parameters()}
    trainer = trainer_for(tmp_path / "run", model)
    trainer.train(str(tmp_path / "run/checkpoint-4"))
    assert {name: id(value) for name, value in model.named_parameters()} == parameters
    assert_same(weights(model), low_rank_run[1])


def test_another_structure_is_refused(low_rank_run, run):
    from hf_efx.core.adapter import get_efx_model
    from hf_efx.low_rank.config import LowRankConfig

    other = get_efx_model(gpt2(), LowRankConfig(rank=3, only_if_smaller=False))
    before = weights(other)
    for folder, saved in [(low_rank_run[0], "low_rank"), (run, "no method")]:
        with pytest.raises(ValueError, match=f"was saved with {saved}, but the model has low_rank in another"):
            trainer_for(run, other).train(str(folder / "checkpoint-4"))
    assert_same(weights(other), before)


def test_an_optimizer_of_the_old_structure_is_refused(low_rank_run, tmp_path):
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = EfxTrainer(model, arguments(tmp_path), train_dataset=rows(), optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="Resume with a new Trainer that is given no optimizer"):
        trainer.train(str(low_rank_run[0] / "checkpoint-4"))
    assert_same(weights(model), weights(gpt2()))


# ---- Saving


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
import resource, signal
from test_trainer import *

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
print("unharmed")
"""


def test_full_disk(tmp_path, finished):
    torch.save(finished[1], tmp_path / "expected.pt")
    done = python(FULL_DISK, tmp_path, tmp_path / "expected.pt")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0 and out.endswith("unharmed\n"), err


def python(code, *args):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


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
    [message] = [r.getMessage() for r in caplog.records if r.name == "hf_efx.core.trainer"]
    assert message.startswith(f"Interrupted at step {step} of 6.")
    if newest is None:
        assert f"no complete checkpoint in output_dir='{tmp_path}'" in message
        return
    assert f"{tmp_path}/checkpoint-{newest}: go on with train(resume_from_checkpoint=True)" in message
    again = trainer_for(tmp_path, gpt2(seed=1))
    again.train(resume_from_checkpoint=True)
    assert_same(weights(again.model), finished[1])


SIGINT = """
import time
from test_trainer import *

signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite run in the background hands down "ignore"


class Wait(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            print("waiting", flush=True)
            time.sleep(60)


trainer_for(sys.argv[1], callbacks=[Wait()]).train()
"""


def test_a_real_ctrl_c(tmp_path):
    process = python(SIGINT, tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "waiting\n":
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and err.rstrip().endswith("KeyboardInterrupt")
    assert f"Interrupted at step 3 of 6. The newest complete checkpoint is {tmp_path}/checkpoint-2" in err


# ---- Columns and metrics


class Recording:
    """Notes the ids that reach batch selection, and what the model is given."""

    extra_columns = ("example_id",)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.ids = [*getattr(self, "ids", []), *(i for batch in batches for i in batch["example_id"].tolist())]
        return batches, items


class RecordingTrainer(Recording, EfxTrainerMixin, Trainer):
    pass


class RecordingSeq2SeqTrainer(Recording, EfxTrainerMixin, Seq2SeqTrainer):
    pass


def dataset(**columns):
    import datasets

    ids = torch.stack([row["input_ids"] for row in rows()])
    values = {"input_ids": ids.tolist(), "labels": ids.tolist(), "example_id": list(range(100, 116)), **columns}
    return datasets.Dataset.from_dict({**values, "unknown": ["text"] * 16})


def tokenizer():
    vocabulary = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>")


def test_extra_columns_reach_selection_and_not_the_model(tmp_path, finished):
    trainer = RecordingTrainer(
        gpt2(),
        arguments(tmp_path),
        train_dataset=dataset(),
        eval_dataset=dataset(),
        data_collator=default_data_collator,
    )
    trainer.train()
    assert len(trainer.ids) == 12 == len(set(trainer.ids)) and set(trainer.ids) <= set(range(100, 116))
    assert_same(weights(trainer.model), finished[1])
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(dataset()).predictions.shape == (16, 8, 16)


def test_extra_columns_in_seq2seq(tmp_path):
    config = T5Config(
        vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    trainer = RecordingSeq2SeqTrainer(
        T5ForConditionalGeneration(config),
        arguments(tmp_path, cls=Seq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=4),
        train_dataset=dataset(),
        eval_dataset=dataset(),
        data_collator=DataCollatorForSeq2Seq(tokenizer()),
        processing_class=tokenizer(),
    )
    trainer.train()
    assert len(set(trainer.ids)) == 12
    assert trainer.evaluate()["eval_loss"] > 0


def test_over_trls_sft_trainer(tmp_path):
    from trl import SFTConfig, SFTTrainer

    class EfxSFTTrainer(EfxTrainerMixin, SFTTrainer):
        extra_columns = ("example_id",)

    def make():
        options = arguments(tmp_path, cls=SFTConfig, activation_checkpointing=False, bf16=False, max_steps=4)
        return EfxSFTTrainer(gpt2(), options, train_dataset=dataset(), processing_class=tokenizer())

    trainer = make()
    trainer.train()
    assert {"input_ids", "labels", "example_id"} <= set(trainer._signature_columns)
    tear(tmp_path / "checkpoint-4")
    again = make()
    again.train(resume_from_checkpoint=True)
    assert again._initial_global_step == 2
    assert_same(weights(again.model), weights(trainer.model))


class Adding(TrainerCallback):
    """Adds the step's number, and once a figure that the Trainer logs itself."""

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.add_metrics({"efx/step": state.global_step, "loss": 99})
        if state.global_step == 2:
            self.trainer.add_metrics({"efx/once": torch.tensor(7.0)})


def test_metrics_are_averaged_into_the_next_training_log(tmp_path):
    adding = Adding()
    trainer = EfxTrainer(
        gpt2(),
        arguments(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1),
        train_dataset=rows(),
        eval_dataset=rows(4),
        callbacks=[adding],
    )
    adding.trainer = trainer
    trainer.train()
    training = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["efx/step"] for row in training] == [1.5, 3.5]
    assert [row.get("efx/once") for row in training] == [7.0, None]
    assert all(row["loss"] < 99 for row in training)
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert len(evaluations) == 4 and not any("efx/step" in row for row in evaluations)
    assert "efx/step" not in trainer.evaluate()


def test_metrics_without_step_logs_go_into_the_summary(tmp_path):
    adding = Adding()
    adding.trainer = trainer_for(tmp_path, callbacks=[adding], max_steps=3, logging_strategy="no")
    output = adding.trainer.train()
    assert output.metrics["efx/step"] == 2.0 and output.metrics["efx/once"] == 7.0


def test_modules_without_a_config_train_and_resume(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(2, 1)

        def forward(self, x):
            return {"loss": self.linear(x).square().mean()}

    def make():
        data = [{"x": torch.tensor([1.0, float(i)])} for i in range(16)]
        return EfxTrainer(Net(), arguments(tmp_path), train_dataset=data)

    whole = make()
    whole.train()
    again = make()
    again.train(str(tmp_path / "checkpoint-2"))
    assert_same(weights(again.model), weights(whole.model))
