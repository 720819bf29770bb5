"""Optimizers of one's own, which the switch must be able to make anew."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_efx import LowRankConfig, LowRankTrainer
from low_rank.switching import DATA, arguments, build


class MadeOnce(LowRankTrainer):
    def create_optimizer(self, model: Any = None) -> Any:
        if "made" not in vars(self):
            self.made = torch.optim.AdamW(self.model.parameters())  # pyright: ignore
        self.optimizer = self.made
        return self.optimizer


class ByDimension(LowRankTrainer):
    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            matrices = [p for p in self.model.parameters() if p.dim() == 2]  # pyright: ignore
            self.optimizer = torch.optim.AdamW([{"params": matrices}, {"params": self.model.transformer.ln_f.bias}])  # pyright: ignore
        return self.optimizer


class SetLater(LowRankTrainer):
    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.optimizer = torch.optim.AdamW(self.model.parameters())  # pyright: ignore
        return super().train(*args, **kwargs)


class Fails(LowRankTrainer):
    def create_optimizer(self, model: Any = None) -> Any:
        if any(p.dim() > 2 for p in self.model.parameters()):  # pyright: ignore
            raise NotImplementedError("three dimensions")
        return super().create_optimizer(model)


def test_an_optimizer_that_the_switch_could_not_make_anew_is_refused(tmp_path: Path) -> None:
    """Before the first step. An optimizer made once would go on with weights that are gone."""
    for cls, words in (
        (MadeOnce, "the Trainer's optimizer isn't what its create_optimizer makes"),
        (SetLater, "the Trainer's optimizer isn't what its create_optimizer makes"),
        (ByDimension, "leaves out the factor 'transformer.h.0.attn.c_attn.weight' of the switched model"),
        (Fails, "three dimensions"),
    ):
        for config in (LowRankConfig(), LowRankConfig(rank="auto", parameter_budget=0.5)):
            one = cls(
                build(),
                arguments(tmp_path, dense_warmup_steps=1, max_steps=2),
                train_dataset=DATA,
                low_rank_config=config,
            )
            with pytest.raises((ValueError, NotImplementedError), match=words):
                one.train()
            assert one.state.global_step == 0


class DecaysAll(LowRankTrainer):
    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.1)  # pyright: ignore
        return self.optimizer


class Passes(LowRankTrainer):
    def create_optimizer(self, model: Any = None) -> Any:
        return super().create_optimizer()


def test_two_decays_of_the_factors_are_refused_before_the_first_step(tmp_path: Path) -> None:
    for cls in (DecaysAll, Passes):
        args = arguments(tmp_path, dense_warmup_steps=1, max_steps=2, factor_decay=0.1)
        one = cls(build(), args, train_dataset=DATA, low_rank_config=LowRankConfig())
        if cls is Passes:  # its factors leave the groups with weight decay once they are there
            one.train()
            assert one.state.global_step == 2
        else:
            with pytest.raises(ValueError, match=r"factor_decay=0.1: create_optimizer gives .* the weight_decay=0.1"):
                one.train()
            assert one.state.global_step == 0
