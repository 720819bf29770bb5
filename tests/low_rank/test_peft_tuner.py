"""Through peft, as LoRA: heads of classifiers, modules_to_save. More in core/model/test_peft_bridge.py."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers import BertConfig, GPT2Config, GPT2LMHeadModel

from hf_efx import LowRankConfig, get_efx_model

IDS = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
TOKENS = torch.zeros(2, 8, dtype=torch.long)
TASKS = {  # model class, head, labels
    "SEQ_CLS": ("SequenceClassification", "classifier", {"labels": torch.tensor([0, 2])}),
    "TOKEN_CLS": ("TokenClassification", "classifier", {"labels": TOKENS}),
    "QUESTION_ANS": (
        *("QuestionAnswering", "qa_outputs"),
        {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([2, 3])},
    ),
}


def base(task: str) -> Any:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(**sizes, vocab_size=64, num_labels=2 if task == "QUESTION_ANS" else 3)
    return getattr(transformers, f"BertFor{TASKS[task][0]}")(config).eval()


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([value for value in model.eval()(input_ids=IDS).values()])


def trained(model: Any, task: str) -> torch.Tensor:
    """One step; the outputs after it."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()(input_ids=IDS, **TASKS[task][2]).loss.backward()
    optimizer.step()
    return outputs(model)


def heads(model: Any, task: str) -> dict[str, bool]:
    """Which parameters of heads train."""
    return {name: p.requires_grad for name, p in model.named_parameters() if TASKS[task][1] in name}


@pytest.mark.parametrize("task", TASKS)
def test_a_classifier_s_head_is_trained_saved_and_loaded_as_with_lora(task: str, tmp_path: Path) -> None:
    base(task).save_pretrained(tmp_path / "base")
    dense = getattr(transformers, f"AutoModelFor{TASKS[task][0]}").from_pretrained(tmp_path / "base")
    lora = peft.get_peft_model(base(task), peft.LoraConfig(task_type=task, target_modules=["query"]))
    model = peft.get_peft_model(dense, LowRankConfig(rank=2, task_type=task))
    assert heads(model, task) == heads(lora, task) and any(heads(model, task).values())
    before = outputs(model)
    expected = trained(model, task)
    assert not torch.equal(expected, before)

    model.save_pretrained(tmp_path / "adapter")
    saved = [{key for key in peft.get_peft_model_state_dict(each) if TASKS[task][1] in key} for each in (model, lora)]
    assert saved[0] == saved[1] and saved[0]
    loaders = (peft.PeftModel, getattr(peft, f"AutoPeftModelFor{TASKS[task][0]}"))
    for loader, arguments in zip(loaders, ((dense.__class__.from_pretrained(tmp_path / "base"),), ()), strict=True):
        assert torch.equal(outputs(loader.from_pretrained(*arguments, tmp_path / "adapter")), expected)

    again: Any = dense.__class__.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(again, tmp_path / "adapter", is_trainable=True)
    model.add_adapter("second", LowRankConfig(rank=2, task_type=task))
    assert torch.equal(outputs(model), expected)
    model.set_adapter("second")
    assert {n for n, train in heads(model, task).items() if train} == {n for n in heads(model, task) if "second" in n}
    assert not torch.equal(trained(model, task), expected)
    model.set_adapter("default")
    assert torch.equal(outputs(model), expected)  # the second one's training went by the first
    model.delete_adapter("second")
    assert not any("second" in name for name, _ in model.named_parameters())
    with model.disable_adapter():
        torch.testing.assert_close(outputs(model), outputs(base(task)), rtol=0, atol=0)
    assert torch.equal(outputs(model), expected)
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == base(task).state_dict().keys()
    torch.testing.assert_close(outputs(merged), expected, rtol=1e-5, atol=1e-6)


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16)).eval()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # peft's own
def test_modules_to_save_stay_whole_whatever_adapter_comes_after() -> None:
    with pytest.raises(ValueError, match=r"modules_to_save=\['nope'\]: 'nope' matches no module"):
        peft.get_peft_model(gpt2(), LowRankConfig(rank=2, modules_to_save=["nope"]))
    model = peft.get_peft_model(gpt2(), LowRankConfig(rank=2, modules_to_save=["c_fc"]))
    train = {name.split("h.0.")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in train if "c_fc" in name} == {
        f"mlp.c_fc.modules_to_save.default.{p}" for p in ("weight", "bias")
    }
    model.add_adapter("second", LowRankConfig(rank=2))
    assert not any("c_fc" in name for name in model.peft_config["second"].target_modules)  # pyright: ignore
    # In memory nothing is frozen: such a module only stays dense.
    ready = get_efx_model(gpt2(), LowRankConfig(rank=2, modules_to_save=["c_fc"]))
    assert all(p.requires_grad for p in ready.parameters())
    assert not any("c_fc" in name for name in ready.config.efx["methods"][0]["modules"])


def test_loaded_weights_are_not_discarded_but_by_an_adapter_that_was_trained_so(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "base")
    load = lambda: GPT2LMHeadModel.from_pretrained(tmp_path / "base")  # noqa: E731
    with pytest.raises(ValueError, match="init='he' discards the pretrained weights"):
        peft.get_peft_model(load(), LowRankConfig(rank=2, init="he"))
    model = peft.get_peft_model(gpt2(), LowRankConfig(rank=2, init="he"))
    model.save_pretrained(tmp_path / "adapter")
    for options in ({}, {"is_trainable": True}):
        loaded = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter", **options)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
