"""Copies of a factorised model: what comes back is what went in."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import ARCHITECTURES

from hf_efx import LowRankConfig, get_efx_model
from hf_efx.low_rank.decay import factorised_layers


def torch_saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def resized(model: Any) -> Any:
    model = copy.deepcopy(model)
    model.resize_token_embeddings(model.config.vocab_size + 5)
    return model


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": torch_saved,
    "resized": resized,
}


CASES = [("gpt2", made) for made in COPIES] + [("resnet", made) for made in COPIES if made != "resized"]


@pytest.mark.parametrize(("name", "made"), CASES)  # Linear; Conv2d, where there are no embeddings to resize
def test_copies_are_factorised_alike_and_so_is_what_they_save(name: str, made: str, tmp_path: Path) -> None:
    architecture = next(architecture for architecture in ARCHITECTURES if architecture.name == name)
    model = get_efx_model(architecture.build(), LowRankConfig(rank=2))
    copied, batch = COPIES[made](model), architecture.batch()
    copied.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for other in (copied, loaded):
        assert other.config.efx == model.config.efx
        assert factorised_layers(other).keys() == factorised_layers(model).keys()
        with torch.no_grad():
            logits = other.eval()(**batch).logits
            assert torch.equal(
                logits[..., : model.config.vocab_size] if made == "resized" else logits, model(**batch).logits
            )
    assert copied is not model and copied.config is not model.config
    if made == "resized":
        assert loaded.config.vocab_size == model.config.vocab_size + 5
