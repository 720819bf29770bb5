"""Methods on wrapped models: what is saved by the model inside is what comes back."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from matrix import ARCHITECTURES, perturb
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel

from hf_efx import (
    LowRankConfig,
    TargetedDropoutConfig,
    default_targets,
    get_efx_model,
    merge_and_unload,
    prune,
    unload,
)
from hf_efx.core.model.record import efx_record
from hf_efx.core.model.wrappers import inner_model

GPT2 = next(architecture for architecture in ARCHITECTURES if architecture.name == "gpt2")
BATCH = {"input_ids": torch.arange(3, 11)[None]}


def bert() -> BertModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 64}
    return BertModel(BertConfig(num_hidden_layers=1, **sizes)).eval()


class Classifier(nn.Module):
    """A module of one's own around a body, whose config it shares."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = bert()
        self.config = self.backbone.config
        self.head = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 3))

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(**batch).pooler_output)


class Embedder(nn.Sequential):
    """Like a SentenceTransformer: a list of modules, the first of which keeps the transformers model."""

    def __init__(self) -> None:
        first = nn.Module()
        first.auto_model = bert()
        super().__init__(first, nn.Identity())

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        first: Any = self[0]
        return first.auto_model(**batch).pooler_output


WRAPPERS: dict[str, Callable[[], nn.Module]] = {
    "compile": lambda: torch.compile(GPT2.build(), backend="eager"),  # pyright: ignore
    "DataParallel": lambda: nn.DataParallel(GPT2.build()),
    "own classifier": Classifier,
    "own embedder": Embedder,
}


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result = model.eval()(**BATCH)
    return result if isinstance(result, torch.Tensor) else result.logits


def loaded(inner: Any, folder: Path) -> Any:
    inner.save_pretrained(folder)
    auto = AutoModelForCausalLM if "LMHead" in type(inner).__name__ else AutoModel
    return auto.from_pretrained(folder)


@pytest.mark.parametrize("case", WRAPPERS)
def test_the_model_inside_is_what_is_changed_recorded_and_saved(case: str, tmp_path: Path) -> None:
    model = WRAPPERS[case]()
    before = outputs(model)  # compiled and run before
    assert get_efx_model(model, LowRankConfig(rank=2)) is model
    inner = inner_model(model)
    perturb(inner)
    assert not torch.equal(outputs(model), before)
    modules = efx_record(model)["methods"][0]["modules"]  # pyright: ignore
    assert efx_record(inner) is efx_record(model) and set(modules) <= {name for name, _ in inner.named_modules()}
    again = loaded(inner, tmp_path)
    assert again.state_dict().keys() == inner.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in inner.state_dict().items())
    expected = outputs(model)
    assert merge_and_unload(model) is model and efx_record(model) is None
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", WRAPPERS)
def test_methods_that_train_alone_and_zeros(case: str, tmp_path: Path) -> None:
    model = WRAPPERS[case]()
    inner = inner_model(model)
    get_efx_model(model, TargetedDropoutConfig())
    assert unload(model) is model and efx_record(model) is None
    prune(inner, 0.5)
    again = get_efx_model(loaded(inner, tmp_path))
    assert efx_record(again)["pruned"] == efx_record(model)["pruned"]  # pyright: ignore


def test_names_are_those_inside() -> None:
    model = Classifier()
    assert default_targets(model) == default_targets(model.backbone)
    with pytest.raises(ValueError, match="'head' matches no module of BertModel"):
        get_efx_model(model, LowRankConfig(rank=2, target_modules=["head"]))
    get_efx_model(model.head, LowRankConfig(rank=2, target_modules=["0"]))  # by itself
    assert efx_record(model) is None and efx_record(model.head) is not None


def test_several_models_side_by_side_are_taken_one_by_one() -> None:
    pair = nn.ModuleDict({"query": bert(), "document": bert()})
    for call in (lambda model: get_efx_model(model, LowRankConfig(rank=2)), unload, merge_and_unload, default_targets):
        with pytest.raises(ValueError, match=r"holds 2 transformers models \(query, document\).*one by one"):
            call(pair)
    assert efx_record(pair) is None
    shared = bert()
    assert inner_model(nn.ModuleDict({"query": shared, "document": shared})) is shared


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_model_that_fsdp_has_wrapped_is_refused() -> None:
    model = nn.Module()
    model._fsdp_wrapped_module = GPT2.build()  # as FullyShardedDataParallel names it, which needs an accelerator
    for call in (lambda: get_efx_model(model, LowRankConfig(rank=2)), lambda: unload(model)):
        with pytest.raises(ValueError, match="wrapped by FSDP"):
            call()


def test_parameters_that_ddp_reduces_are_not_replaced(process_group: None) -> None:
    model = nn.parallel.DistributedDataParallel(GPT2.build())
    with pytest.raises(ValueError, match="replaces parameters whose gradients DistributedDataParallel reduces"):
        get_efx_model(model, LowRankConfig(rank=2))
    assert efx_record(model) is None
    get_efx_model(model, TargetedDropoutConfig())
    assert efx_record(model.module) is not None and efx_record(unload(model)) is None
    factorised = nn.parallel.DistributedDataParallel(get_efx_model(GPT2.build(), LowRankConfig(rank=2)))
    with pytest.raises(ValueError, match="merge_and_unload replaces parameters"):
        merge_and_unload(factorised)
