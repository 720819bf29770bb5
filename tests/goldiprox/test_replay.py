"""Replay of hand-made sequences: the order, bit-identity with a plain Trainer, resume, and what is refused.

A proxy's own trace: test_trainer.py; two processes: test_two_processes.py.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from two_processes import Kill, losses

from hf_efx.core.data.tables import data_fingerprint
from hf_efx.core.data.text_data import byte_tokenizer
from hf_efx.core.training.arguments import EfxArguments
from hf_efx.goldiprox import GoldiProxMixin, GoldiProxTrainer, ReplayMixin, ReplayTrainer, SelectionSequence
from hf_efx.rho_loss.arguments import RHOLossArguments, RHOLossArgumentsMixin
from hf_efx.rho_loss.trainer import RHOLossTrainer

from .tiny import ROWS, STEPS, arguments, assert_equal_weights, data, draw, model, replay, sequence

PARAMETERS = list(inspect.signature(Trainer).parameters)


def flat(batches: list[list[int]]) -> list[int]:
    return [i for batch in batches for i in batch]


def mean_over_the_step(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


def plain(folder: Path, ids: list[list[int]], dropout: float = 0.0, **options: Any) -> Trainer:
    """The library's own Trainer on the same rows in the same order."""
    ordered = data(seed=None).select([(i - 5) // 3 for i in flat(ids)]).remove_columns("example_id")
    args = arguments(folder, TrainingArguments, train_sampling_strategy="sequential", num_train_epochs=1, **options)
    trainer = Trainer(model(dropout), args, train_dataset=ordered)
    trainer.train()
    return trainer


@pytest.mark.parametrize("accumulation, last", [(1, 8), (1, 3), (2, 8), (4, 8)])
def test_replay_equals_a_plain_trainer_on_the_same_rows(accumulation: int, last: int, tmp_path: Path) -> None:
    ids = draw(last=last)
    split = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    replayed = replay(tmp_path, sequence(ids), lr_scheduler_type="linear", **split)
    replayed.train()
    assert replayed.state.global_step == replayed.state.max_steps == STEPS
    assert_equal_weights(replayed, plain(tmp_path, ids, **split))
    assert replayed.seen == [part.tolist() for step in ids for part in np.array_split(step, accumulation)]
    # The order matters to the weights, or the assertion above would show nothing.
    reverse = replay(tmp_path, sequence(ids[-2::-1] + ids[-1:]), lr_scheduler_type="linear", **split)
    reverse.train()
    with pytest.raises(AssertionError):
        assert_equal_weights(reverse, replayed)


def test_short_step_keeps_its_set_under_accumulation(tmp_path: Path) -> None:
    ids = draw(last=5)
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    runs = [replay(tmp_path, sequence(ids), **options) for options in (split, {})]
    for run in runs:
        run.compute_loss_func = mean_over_the_step  # BERT's own takes the mean of each micro-batch
        run.train()
    replayed, whole = runs
    assert [len(batch) for batch in replayed.seen] == [4] * 10 + [3, 2]
    assert flat(replayed.seen) == flat(ids) == flat(whole.seen)
    # The examples weigh alike in whatever parts they come.
    assert losses(replayed) == pytest.approx(losses(whole), rel=1e-5)  # pyright: ignore


def test_max_steps_below_the_sequence_trains_its_beginning(tmp_path: Path) -> None:
    ids = draw()
    short = replay(tmp_path, sequence(ids), max_steps=4, num_train_epochs=7)
    short.train()
    assert short.state.global_step == 4 and flat(short.seen) == flat(ids[:4])
    assert short.args.max_steps == 4
    whole = replay(tmp_path, sequence(ids), num_train_epochs=7)
    whole.train()
    assert whole.state.global_step == STEPS and flat(whole.seen) == flat(ids)
    assert whole.args.max_steps == -1  # the caller's arguments stay the caller's


def test_order_of_the_rows_and_the_sampler_s_option_do_not_matter(tmp_path: Path) -> None:
    ids = draw()
    first = replay(tmp_path, sequence(ids))
    first.train()
    assert first.train_dataset["example_id"][:] != sorted(first.train_dataset["example_id"][:])
    for rows in (data(seed=None), data().shuffle(seed=5)):
        again = replay(tmp_path, sequence(ids), rows=rows, train_sampling_strategy="sequential", data_seed=9)
        again.train()
        assert_equal_weights(again, first)


def test_any_collator_and_workers_do(tmp_path: Path) -> None:
    ids = draw()
    first = replay(tmp_path, sequence(ids))
    first.train()
    again = replay(tmp_path, sequence(ids), dataloader_num_workers=1, remove_unused_columns=False)
    again.data_collator = lambda rows: Trainer(model(), again.args).data_collator(rows)
    again.train()
    assert_equal_weights(again, first)


# Checkpoints lie at 2 and 4. The kill comes at a step's end, before its checkpoint.
@pytest.mark.parametrize("step", [3, 4, 5])
def test_killed_inside_the_sequence_it_resumes_bit_for_bit(step: int, tmp_path: Path) -> None:
    ids = draw(last=4)
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_strategy": "steps"}

    def run(folder: str) -> Any:
        steps = SelectionSequence.load_from_disk(tmp_path / "sequence")  # a new process would load it
        return replay(tmp_path / folder, steps, model(dropout=0.1), save_steps=2, **options)

    sequence(ids).save_to_disk(tmp_path / "sequence")
    whole = run("whole")
    whole.train()
    killed = run("killed")
    killed.add_callback(Kill(step))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = run("killed")
    resumed.train(resume_from_checkpoint=True)
    assert flat(resumed.seen) == flat(ids[2 if step < 5 else 4 :])
    assert losses(resumed) == losses(whole)
    assert_equal_weights(resumed, whole)


def test_resume_with_another_sequence_is_refused(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    first = replay(tmp_path, sequence(draw()), max_steps=2, **saving)
    first.train()
    other = replay(tmp_path, sequence(draw(seed=1)), **saving)
    words = f"a replay of another sequence .{first.sequence.digest}., but this one's is {other.sequence.digest}"
    with pytest.raises(ValueError, match=words):
        other.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-2" / "replay.json").unlink()
    with pytest.raises(ValueError, match="belongs to no replay"):
        first.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_options_set_on_the_arguments_later_are_checked_before_the_first_step(tmp_path: Path) -> None:
    for name, value, words in (
        ("train_sampling_strategy", "group_by_length", "'group_by_length' would change the order"),
        ("ignore_data_skip", True, "ignore_data_skip=True"),
        ("gradient_accumulation_steps", 2, "is 16 examples a step, but the sequence has 8"),
        ("max_steps", 7, "max_steps=7, but the sequence has 6 steps"),
    ):
        run = replay(tmp_path, sequence(draw()))
        setattr(run.args, name, value)
        with pytest.raises(ValueError, match=words):
            run.train()
        assert run.state.global_step == 0


class OwnSampler(ReplayTrainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # pyright: ignore


class OwnLoader(ReplayTrainer):
    def get_train_dataloader(self) -> Any:
        return Trainer.get_train_dataloader(self)


class OwnBatches(ReplayTrainer):
    def get_batch_samples(self, *args: Any) -> Any:
        batches, count = super().get_batch_samples(*args)
        return [{name: value.flip(0) for name, value in batch.items()} for batch in batches], count


class LoadingTrainer(Trainer):
    def get_train_dataloader(self) -> Any:
        return super().get_train_dataloader()


class Below(ReplayMixin, LoadingTrainer): ...


class Choosing(ReplayMixin, RHOLossTrainer): ...


class Harmless(ReplayTrainer):
    """Hands on what it is given."""

    def get_train_dataloader(self) -> Any:
        return super().get_train_dataloader()

    def get_batch_samples(self, *args: Any) -> Any:
        batches, count = super().get_batch_samples(*args)
        return [*batches], count


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (OwnSampler, "_get_train_sampler of OwnSampler has no place in a replay"),
        (OwnLoader, "get_train_dataloader of OwnLoader gives another loader than the sequence's"),
        (OwnBatches, "get_batch_samples of OwnBatches gives other batches than the sequence's"),
        (Below, "get_train_dataloader of LoadingTrainer has no place in a replay"),
        (Choosing, "Choosing would choose among the examples that were chosen already"),
    ],
)
def test_other_rows_or_another_order_are_refused_before_the_first_step(cls: Any, words: str, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    if cls is Choosing:
        args = arguments(tmp_path, RHOLossArguments, selection="uniform")
    net, steps = model(), sequence(draw())
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=words):
        cls(net, args, train_dataset=data(), sequence=steps).train()
    assert all(torch.equal(one, other) for one, other in zip(before, net.parameters(), strict=True))


def test_overridden_methods_that_hand_on_what_they_get_do(tmp_path: Path) -> None:
    ids = draw()
    first = replay(tmp_path, sequence(ids), max_steps=2)
    first.train()
    again = Harmless(model(), arguments(tmp_path, max_steps=2), train_dataset=data(), sequence=sequence(ids))
    again.train()
    assert_equal_weights(again, first)


def test_data_and_sequence_set_later_are_what_is_trained_on(tmp_path: Path) -> None:
    ids = draw(steps=2)
    run = replay(tmp_path, sequence(draw(seed=1)))
    run.train_dataset = changed_labels()
    with pytest.raises(ValueError, match="selected from another data set"):
        run.train()
    run.train_dataset = data().shuffle(seed=5)
    run.sequence = sequence(ids)
    run.train()
    assert run.state.global_step == 2 and flat(run.seen) == flat(ids)


def test_epochs_that_are_not_read_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for options, warned in (({"num_train_epochs": 7}, 1), ({"num_train_epochs": 7, "max_steps": 1}, 0), ({}, 0)):
        caplog.clear()
        replay(tmp_path, sequence(draw(steps=2)), **options).train()
        assert caplog.text.count("num_train_epochs=7 isn't read in a replay") == warned


def test_named_arguments_and_default_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = ReplayTrainer(model(), train_dataset=data(), sequence=sequence(draw()))  # 8 a step, as in the defaults
    assert isinstance(run.args, EfxArguments)
    for cls in (ReplayTrainer, GoldiProxTrainer):
        names = list(inspect.signature(cls).parameters)
        assert names[: len(PARAMETERS)] == PARAMETERS
    assert set(inspect.signature(GoldiProxTrainer).parameters) - set(PARAMETERS) == {
        "irreducible_losses",
        "scoring_model",
    }


def test_data_without_its_raw_columns_is_checked_by_the_raw_data(tmp_path: Path) -> None:
    raw = data().map(lambda row: {"text": " ".join(map(str, row["input_ids"]))}).remove_columns("input_ids")
    steps = sequence(draw())
    settings = {"fingerprint": steps.settings["data"]["fingerprint"], "columns": ["text"], "rows": ROWS}
    by_text = SelectionSequence.make(steps.dataset, settings)
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match="lacks text: keep the raw columns.*raw_dataset"):
        ReplayTrainer(model(), args, train_dataset=data(), sequence=by_text)
    with pytest.raises(ValueError, match="from another data set"):  # the fingerprint is of other columns
        ReplayTrainer(model(), args, train_dataset=data(), sequence=by_text, raw_dataset=raw)
    settings["fingerprint"] = data_fingerprint(raw, ["text"])
    by_text = SelectionSequence.make(steps.dataset, settings)
    ReplayTrainer(model(), args, train_dataset=data(), sequence=by_text, raw_dataset=raw)
    with pytest.raises(ValueError, match="ids are not among the 40 examples"):  # the training data lost rows
        ReplayTrainer(model(), args, train_dataset=data().select(range(40)), sequence=by_text, raw_dataset=raw)


def test_over_trl_s_sft_trainer(tmp_path: Path) -> None:
    """A proxy's trace, found by the raw text and replayed, where trl tokenizes the data itself."""
    from trl import SFTConfig, SFTTrainer

    class GoldiProxSFTTrainer(GoldiProxMixin, SFTTrainer): ...

    class ReplaySFTTrainer(ReplayMixin, SFTTrainer): ...

    @dataclass
    class SelectingSFTConfig(RHOLossArgumentsMixin, SFTConfig): ...

    texts = ["x" * n + " and more" for n in range(ROWS)]

    def make(trainer: Any, config: Any, options: dict[str, Any], **more: Any) -> Any:
        rows = Dataset.from_dict({"example_id": list(range(ROWS)), "text": texts})
        torch.manual_seed(0)
        net = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=300,
                n_positions=64,
                n_embd=16,
                n_layer=1,
                n_head=2,
                resid_pdrop=0,
                embd_pdrop=0,
                attn_pdrop=0,
            )
        )
        args = arguments(tmp_path, config, activation_checkpointing=False, bf16=False, **options)
        return trainer(net, args, train_dataset=rows, processing_class=byte_tokenizer(), **more)

    live = make(GoldiProxSFTTrainer, SelectingSFTConfig, {"selection": "loss", "selection_ratio": 0.5})
    trace = live.select(4, fingerprint_columns=["text"])
    again = make(ReplaySFTTrainer, SFTConfig, {}, sequence=trace)
    again.train()
    assert_equal_weights(again, live)
    with pytest.raises(ValueError, match="packing=True puts several examples into one row"):
        make(ReplaySFTTrainer, SFTConfig, {"packing": True, "max_length": 32}, sequence=trace)


def changed_labels() -> Dataset:
    return data().map(lambda row: {"labels": (row["labels"] + 1) % 5})


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("too long", {"max_steps": 7}, "max_steps=7, but the sequence has 6 steps"),
    (
        "batch size",
        {"per_device_train_batch_size": 4},
        "=4 x gradient_accumulation_steps=1 .* is 4 examples a step, but the sequence has 8",
    ),
    (
        "by length",
        {"train_sampling_strategy": "group_by_length"},
        "train_sampling_strategy='group_by_length' would change the order",
    ),
    ("rebalanced", {"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy='batch_rebalance'"),
    ("found size", {"auto_find_batch_size": True}, "auto_find_batch_size=True"),
    (
        "short step dropped",
        {"steps": sequence(draw(last=3)), "dataloader_drop_last": True},
        "dataloader_drop_last=True: the sequence has steps of 3 to 8 examples",
    ),
    ("no skipping", {"ignore_data_skip": True}, "ignore_data_skip=True"),
    ("split", {"accelerator_config": {"split_batches": True}}, "accelerator_config: split_batches=True"),
    ("dispatched", {"accelerator_config": {"dispatch_batches": True}}, "accelerator_config: dispatch_batches=True"),
    ("rows lost", {"rows": data().select(range(40))}, "a data set of 48 rows, this one has 40"),
    (
        "other labels",
        {"rows": changed_labels()},
        "selected from another data set: its fingerprint over example_id, input_ids, labels",
    ),
    ("no ids", {"rows": data().remove_columns("example_id")}, "train_dataset has no column 'example_id'"),
    ("stream", {"rows": data().to_iterable_dataset(), "max_steps": 3}, "train_dataset is a IterableDataset"),
    ("list", {"rows": list(data())}, "train_dataset is a list"),
    ("no sequence", {"steps": "tester/sequence"}, "sequence='tester/sequence': pass a SelectionSequence"),
    (
        "short step",
        {"steps": sequence(draw(last=3)), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "is 4 micro-batches, but the sequence's shortest step has 3",
    ),
]


@pytest.mark.parametrize("options, words", [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS])
def test_what_does_not_fit_is_refused_before_any_work(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    options = {"steps": sequence(draw()), **options}
    with pytest.raises(ValueError, match=words):
        replay(tmp_path, **options)
