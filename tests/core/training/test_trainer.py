"""EfxTrainer: resuming past torn checkpoints, structure, extra columns, metrics (see also test_trainer_saving.py)."""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
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

from hf_efx.core.training.arguments import EfxArguments
from hf_efx.core.training.trainer import EfxTrainer, EfxTrainerMixin

REPOSITORY = Path(__file__).parents[3]


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


def read_card(folder):
    return ModelCard.load(folder / "README.md")


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


@pytest.fixture(scope="module")
def low_rank_run(tmp_path_factory):
    from hf_efx.core.model.adapter import get_efx_model
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
    from hf_efx.core.model.adapter import get_efx_model
    from hf_efx.low_rank.config import LowRankConfig

    shutil.copytree(low_rank_run[0], tmp_path / "run")
    model = get_efx_model(gpt2(seed=1), LowRankConfig(rank=2, only_if_smaller=False))
    parameters = {name: id(value) for name, value in model.named_parameters()}
    trainer = trainer_for(tmp_path / "run", model)
    trainer.train(str(tmp_path / "run/checkpoint-4"))
    assert {name: id(value) for name, value in model.named_parameters()} == parameters
    assert_same(weights(model), low_rank_run[1])


def test_another_structure_is_refused(low_rank_run, run):
    from hf_efx.core.model.adapter import get_efx_model
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
    given = set()
    trainer.model.register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True)
    trainer.train()
    assert len(trainer.ids) == 12 == len(set(trainer.ids)) and set(trainer.ids) <= set(range(100, 116))
    assert_same(weights(trainer.model), finished[1])
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(dataset()).predictions.shape == (16, 8, 16)
    assert {"input_ids", "labels"} <= given and not {"example_id", "unknown"} & given


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
    assert "hf_efx" in read_card(tmp_path).data.tags  # trl writes its card with each checkpoint
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


def test_every_logged_name_is_documented(tmp_path):
    from hf_efx.low_rank.arguments import LowRankArguments
    from hf_efx.low_rank.config import LowRankConfig
    from hf_efx.low_rank.trainer import LowRankTrainer

    options = {"log_factor_metrics": True, "include_num_input_tokens_seen": "all", "eval_strategy": "steps"}
    trainer = LowRankTrainer(
        gpt2(),
        arguments(tmp_path, cls=LowRankArguments, **options),
        train_dataset=rows(),
        eval_dataset=rows(4),
        low_rank_config=LowRankConfig(rank=2, only_if_smaller=False),
    )
    trainer.train()
    names = set().union(*trainer.state.log_history)
    page = (REPOSITORY / "docs/metrics.md").read_text()
    assert "low_rank/stable_rank" in names
    assert not [name for name in sorted(names) if f"| `{name}` |" not in page]


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
