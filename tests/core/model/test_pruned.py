"""Zeros that optimizers leave at zero, in the model that was pruned and in its copies."""

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from matrix import ARCHITECTURES, perturb
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_efx.core.model.pruned import hold, is_held, release
from hf_efx.core.model.record import mark_pruned

GPT2, LLAMA = ({a.name: a for a in ARCHITECTURES}[name] for name in ("gpt2", "llama"))


@pytest.fixture(autouse=True, scope="module")
def nothing_left_behind() -> Iterator[None]:
    """No hook on torch's optimizers once the pruned models are gone."""
    yield
    gc.collect()
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1).step()  # the hooks themselves notice
    assert not _global_optimizer_pre_hooks and not _global_optimizer_post_hooks


def pruned(architecture: Any = GPT2, *names: str) -> Any:
    """A model with every second weight of some layers zero."""
    model = perturb(architecture.build())
    names = names or ("transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_attn")
    with torch.no_grad():
        for name in names:
            model.get_submodule(name).weight[::2] = 0
    mark_pruned(model, {name: {} for name in names})
    return model


def zeros(model: nn.Module) -> dict[str, int]:
    counts = {name: int((parameter == 0).sum()) for name, parameter in model.named_parameters()}
    return {name: count for name, count in counts.items() if count}


def train(model: Any, loss: Callable[[], torch.Tensor] | None = None) -> None:
    """Two steps in which every weight would move, zeros too."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        (loss() if loss else sum(p.sum() for p in model.parameters())).backward()  # pyright: ignore
        optimizer.step()
        optimizer.zero_grad()


def saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "deepcopy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "of the body": lambda model: copy.deepcopy(model.transformer),
    "of a layer": lambda model: copy.deepcopy(model.transformer.h[0]),
    "other dtype": lambda model: copy.deepcopy(model).double(),
    "half": lambda model: copy.deepcopy(model).to(torch.bfloat16),
}


@pytest.mark.parametrize("case", COPIES)
def test_a_copy_keeps_its_zeros(case: str) -> None:
    model = COPIES[case](pruned())
    before, values = zeros(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    assert before
    train(model)
    assert zeros(model) == before
    assert not any(torch.equal(parameter, values[name]) for name, parameter in model.named_parameters())


def test_model_init_gives_held_copies_to_a_plain_trainer(tmp_path: Path) -> None:
    model = pruned()
    data = Dataset.from_dict({name: value.tolist() for name, value in GPT2.batch(4).items()})
    args = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no")
    for _ in range(2):
        trainer = Trainer(
            args=args, train_dataset=data, data_collator=default_data_collator, model_init=lambda: copy.deepcopy(model)
        )
        trainer.train()
        assert zeros(trainer.model) == zeros(model)  # pyright: ignore


def test_an_optimizer_of_another_model_is_left_alone() -> None:
    model, other = pruned(), nn.Linear(4, 4)
    with torch.no_grad():
        other.weight.zero_()
    train(other)
    assert (other.weight != 0).all() and zeros(model)


def test_a_copy_s_norm_follows_the_copy_s_own_layer() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4))
    with torch.no_grad():
        for parameter in (*model[0].parameters(), *model[1].parameters()):
            parameter.copy_(torch.arange(1.0, 1 + parameter.numel()).view_as(parameter))
            parameter[:2] = 0
    hold(model, {"0": {"bias": True}, "1": {"follows": "0"}})
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.fill_(1.0)  # nothing of the original is empty any more # pyright: ignore
    train(copied)
    assert all((p[:2] == 0).all() and (p[2:] != 0).all() for p in copied.parameters())


def test_a_pruned_head_is_held_after_the_vocabulary_grew() -> None:
    model = pruned(LLAMA, "lm_head")
    kept = int((model.lm_head.weight == 0).sum())
    model.resize_token_embeddings(70)
    assert not is_held(model.lm_head)  # a new module
    train(model)
    assert zeros(model)["lm_head.weight"] == kept and model.lm_head.weight.shape[0] == 70


def test_let_go_of_as_a_whole_or_in_part() -> None:
    model = pruned()
    before = zeros(model)
    release(model.transformer.h[0])
    train(model)
    assert zeros(model).keys() == before.keys() - {"transformer.h.0.mlp.c_fc.weight"}
    release(model)
    train(model)
    assert not zeros(model)
