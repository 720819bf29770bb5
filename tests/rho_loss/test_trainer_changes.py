"""RHOLossTrainer where something changes under it: later options, another loss, streams, second loaders."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import IterableDataset
from transformers import TrainerCallback

from hf_efx.core.training.arguments import EfxArguments
from hf_efx.rho_loss.arguments import RHOLossArguments
from hf_efx.rho_loss.side_models import train_irreducible_model
from hf_efx.rho_loss.trainer import RHOLossTrainer
from rho_loss.runs import Net, Plain, arguments, assert_same, data, trainer, weights
from rho_loss.texts import Collator, gpt2, texts, tokenizer


def test_options_set_on_the_arguments_act_in_the_next_run_as_if_made_with(tmp_path: Path) -> None:
    options = {"selection": "loss", "scoring_precision": "bf16", "selection_ratio": 0.5, "corrupted_column": "wrong"}
    run = trainer(tmp_path / "a", Plain(), max_steps=2, report_selection=False)
    for name, value in {**options, "report_selection": True}.items():
        setattr(run.args, name, value)
    run.train()
    fresh = trainer(tmp_path / "b", Plain(), max_steps=2, **options)
    fresh.train()
    assert run.ids == fresh.ids and run.selection_report.settings == fresh.selection_report.settings
    assert run.extra_columns == ("example_id", "wrong")
    run.args.selection, run.args.report_selection, run.ids = "uniform", False, {}
    run.train()
    assert run._selector.function.name == "uniform" and run.selection_report is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("selection", "loss_of", "selection='loss_of': expected one of"),
        ("selection_ratio", 1.5, "selection_ratio=1.5: expected"),
        ("preset", "faster", "preset='faster': expected"),
        ("corrupted_column", "noise", "no column 'noise'"),
        ("train_scoring_model", True, "train_scoring_model=True needs a scoring_model"),
    ],
)
def test_what_is_set_later_is_checked_at_the_start(name: str, value: Any, message: str, tmp_path: Path) -> None:
    run = trainer(tmp_path)
    setattr(run.args, name, value)
    with pytest.raises(ValueError, match=message):
        run.train()
    assert run.state.global_step == 0


def test_a_preset_set_later_acts(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1, selection="loss", selection_ratio=RHOLossArguments.selection_ratio)
    run.args.preset = "fast"
    run.train()
    assert run.args.selection_ratio == 0.2 and len(run.ids[0]) == 4


@pytest.mark.parametrize("faster", [True, False])
def test_auto_scores_in_bf16_where_the_device_is_faster_in_it(
    faster: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hf_efx.rho_loss.selecting.bf16_is_faster", lambda device: faster)
    run = trainer(tmp_path, max_steps=1, preset="fast")
    with caplog.at_level("INFO", "hf_efx"):
        run.train()
    assert run._selector.scorer.precision == ("bf16" if faster else None)
    assert caplog.text.count("scoring_precision='auto'") == 1
    asked = trainer(tmp_path, max_steps=1, preset="fast", scoring_precision="bf16")
    asked.train()
    assert asked._selector.scorer.precision == "bf16"


def test_epochs_count_what_is_drawn_and_that_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path, max_steps=-1, num_train_epochs=1)
    with caplog.at_level("INFO", "hf_efx"):
        run.train()
    assert run.state.global_step == 10  # 160 rows, 16 drawn a step
    assert caplog.text.count("num_train_epochs=1 counts what is drawn, 16 rows for each 4 trained on: 0.25") == 1


class _Peek(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            len(self.run.get_train_dataloader())  # pyright: ignore[reportAttributeAccessIssue]


def test_a_loader_asked_for_on_the_way_takes_nothing_from_the_run(tmp_path: Path) -> None:
    runs = []
    for peek in (False, True):
        run = trainer(tmp_path, Plain(), max_steps=4, selection="loss", selection_ratio=0.125, rescore_every=2)
        if peek:
            callback = _Peek()
            callback.run = run  # pyright: ignore[reportAttributeAccessIssue]
            run.add_callback(callback)
        run.train()
        runs.append(run)
    assert runs[0].ids == runs[1].ids and sorted(runs[1].ids) == [0, 1, 2, 3]
    assert runs[0].selection_report.counts == runs[1].selection_report.counts


class _Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(data().to_list())


_STREAMS = {"torch": _Stream(), "datasets": IterableDataset.from_generator(data().to_list)}


@pytest.mark.parametrize("stream", _STREAMS.values(), ids=_STREAMS)
def test_streams_without_known_columns_train(stream: Any, tmp_path: Path) -> None:
    run = trainer(tmp_path, train_dataset=stream, selection="loss", max_steps=3, report_selection=False)
    run.train()
    assert [len(ids) for ids in run.ids.values()] == [4] * 3


@pytest.mark.parametrize("accumulation", [1, 4])
def test_weighted_losses_are_scaled_once(accumulation: int, tmp_path: Path) -> None:
    """However a Trainer says that its losses count, as trl's Reward, DPO and KTO do, the step is the same."""

    moved = []
    for flag in (None, False, True):
        cls = type("Flagged", (RHOLossTrainer,), {"loss_is_scaled_for_ga": flag})
        options = {"gradient_accumulation_steps": accumulation, "optim": "sgd", "lr_scheduler_type": "constant"}
        options |= {"max_grad_norm": 0, "max_steps": 1, "selection": "grad_norm_is", "learning_rate": 1.0}
        run = trainer(tmp_path, Plain(), cls, **options)
        run.train()
        moved.append(run.model.layers[0].weight.detach().double() - Plain().layers[0].weight.detach().double())
    torch.testing.assert_close(moved[1:], moved[:1] * 2, rtol=1e-5, atol=1e-7)


def doubled(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return 2 * same(outputs, labels)


def same(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return F.cross_entropy(outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def summed(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


class Doubled(RHOLossTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(model, inputs, *args, **kwargs)


class Forgetful(RHOLossTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return model(**{name: inputs[name] for name in ("input_ids", "attention_mask", "labels")})["loss"]


def own_loss(folder: Path, cls: Any = RHOLossTrainer, loss: Any = None, **options: Any) -> Any:
    fixed: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True}
    fixed |= {"disable_tqdm": True, "save_strategy": "no", "selection": "loss", "selection_ratio": 0.5}
    return cls(
        gpt2(),
        RHOLossArguments(str(folder), **{**fixed, **options}),
        Collator(tokenizer()),
        texts(),
        compute_loss_func=loss,
    )


@pytest.mark.parametrize(
    ("cls", "loss", "name"),
    [(RHOLossTrainer, doubled, "compute_loss_func"), (Doubled, None, "compute_loss of Doubled")],
)
def test_another_loss_than_the_scored_is_refused_before_the_first_step(
    cls: Any, loss: Any, name: str, tmp_path: Path
) -> None:
    run = own_loss(tmp_path, cls, loss)
    with pytest.raises(ValueError, match=f"{name} trains on a loss of .*Set check_scored_loss=False"):
        run.train()
    assert run.state.global_step == 0
    own_loss(tmp_path, cls, loss, check_scored_loss=False).train()  # asked for
    own_loss(tmp_path, cls, loss, selection="uniform").train()  # reads no loss


WEIGHTS = torch.tensor([0.5, 1.0, 2.0])


def weighted(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return F.cross_entropy(outputs["logits"], labels, weight=WEIGHTS)


class Weighted(RHOLossTrainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return weighted(model(x=inputs["x"]), inputs["labels"])


class WeightedNet(Net):
    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        outputs = super().forward(x, labels)
        return outputs if labels is None else {**outputs, "loss": weighted(outputs, labels)}


def new_head(model: Any, scale: float = 0.0) -> Any:
    """Of equal logits, or nearly: every example's loss is log 3, weighted by class or not."""
    model.layers[-1].weight.data *= scale
    model.layers[-1].bias.data.zero_()
    return model


def plain(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return F.cross_entropy(outputs["logits"], labels)


@pytest.mark.parametrize("scale", [0.0, 1e-3])
@pytest.mark.parametrize(
    ("cls", "loss", "model", "name"),
    [
        (RHOLossTrainer, weighted, Net, "compute_loss_func"),
        (Weighted, None, Net, "compute_loss of Weighted"),
        (RHOLossTrainer, None, WeightedNet, "the model"),
    ],
)
def test_class_weights_of_a_new_model_are_refused_before_the_first_step(
    cls: Any, loss: Any, model: Any, name: str, scale: float, tmp_path: Path
) -> None:
    args = arguments(tmp_path, selection="loss")
    run = cls(new_head(model(), scale), args, train_dataset=data(), compute_loss_func=loss)
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    with pytest.raises(ValueError, match=f"{name} trains on a loss of"):
        run.train()
    assert run.state.global_step == 0
    assert all(torch.equal(one, other) for one, other in zip(before, run.model.parameters(), strict=True))


def test_the_comparison_leaves_a_plain_loss_and_its_run_alone(tmp_path: Path) -> None:
    """With dropout, batch norm and a new head; the run is the one without it, bit for bit."""
    runs = []
    for check in (True, False):
        args = arguments(tmp_path, selection="loss", check_scored_loss=check)
        run = RHOLossTrainer(new_head(Net()), args, train_dataset=data(), compute_loss_func=plain)
        run.train()
        runs.append(weights(run))
    assert_same(*runs)


def test_a_term_that_comes_later_is_refused_when_it_is_looked_at_again(tmp_path: Path) -> None:
    calls = []

    def late(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        calls.append(1)
        return plain(outputs, labels) * (1 if len(calls) < 8 else 2)

    run = RHOLossTrainer(
        Net(), arguments(tmp_path, selection="loss", max_steps=20), train_dataset=data(), compute_loss_func=late
    )
    with pytest.raises(ValueError, match="compute_loss_func trains on a loss of"):
        run.train()
    assert run.state.global_step == 10


def test_a_loss_of_ones_own_that_is_the_scored_one_trains(tmp_path: Path) -> None:
    own_loss(tmp_path, loss=same).train()
    own_loss(tmp_path, loss=summed).train()
    own_loss(tmp_path, Forgetful).train()


def test_weights_that_nobody_would_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compute_loss_func doesn't know"):
        own_loss(tmp_path, loss=same, selection="grad_norm_is")
    run = own_loss(tmp_path, Forgetful, selection="grad_norm_is")
    with pytest.raises(ValueError, match="compute_loss of Forgetful doesn't"):
        run.train()


class Bypass(RHOLossTrainer):
    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        return [next(epoch_iterator) for _ in range(num_batches)], None


def test_a_subclass_that_passes_selection_by_is_refused_before_its_first_step(tmp_path: Path) -> None:
    run = own_loss(tmp_path, Bypass)
    with pytest.raises(ValueError, match="nothing was chosen for step 0: get_batch_samples of Bypass"):
        run.train()


def test_default_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="selection='rho_loss' needs irreducible_losses"):
        RHOLossTrainer(Net(), train_dataset=data())


def test_a_model_for_irreducible_losses_goes_on_only_from_its_own_checkpoints(tmp_path: Path) -> None:
    rows = data().remove_columns(["example_id", "wrong"])
    holdout, target = rows.select(range(32)), rows.select(range(32, 64))

    def train(model: Any = lambda: Net(), holdout: Any = holdout, target: Any = target, **options: Any) -> Any:
        args = arguments(tmp_path / "model", cls=EfxArguments, max_steps=4, eval_strategy="steps", eval_steps=2)
        for name, value in options.items():
            setattr(args, name, value)
        return train_irreducible_model(model, args, holdout, target)

    first = train()
    again = train()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    for changed, name in (
        ({"holdout": target}, "holdout"),
        ({"target": holdout}, "target"),
        ({"learning_rate": 1.0}, "learning_rate"),
        ({"model": lambda: Net(seed=3)}, "initial_weights"),
    ):
        with pytest.raises(ValueError, match=f"made with other settings .*{name}"):
            train(**changed)
    (tmp_path / "model" / "settings.json").unlink()
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        train()
