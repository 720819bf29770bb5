"""Through peft, beyond the matrix: registration, Auto classes, wrong input."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from matrix import ARCHITECTURES
from torch import nn
from transformers import AutoModelForCausalLM

from hf_efx import LowRankConfig, get_efx_model, register_peft
from hf_efx.core.model.peft_bridge import EfxType
from hf_efx.low_rank.peft_tuner import LowRankAdapterLayer, LowRankTuner

GPT2 = next(architecture for architecture in ARCHITECTURES if architecture.name == "gpt2")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(**GPT2.batch()).logits


def adapters(model: nn.Module) -> list[LowRankAdapterLayer]:
    return [m for m in model.modules() if isinstance(m, LowRankAdapterLayer)]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model and an adapter that knows it."""
    folder = tmp_path_factory.mktemp("adapter")
    GPT2.build().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    peft.get_peft_model(base, LowRankConfig(rank=2, task_type="CAUSAL_LM")).save_pretrained(folder / "adapter")
    return folder


def test_peft_knows_the_method_under_its_own_name() -> None:
    register_peft()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    for key in (EfxType.EFX_LOW_RANK, "EFX_LOW_RANK"):
        assert PEFT_TYPE_TO_CONFIG_MAPPING[key] is LowRankConfig  # pyright: ignore
        assert PEFT_TYPE_TO_TUNER_MAPPING[key] is LowRankTuner  # pyright: ignore
        assert PEFT_TYPE_TO_PREFIX_MAPPING[key] == "low_rank_"  # pyright: ignore


def test_process_that_names_no_config_registers_first(adapter: Path, run_python: Callable[..., str]) -> None:
    program = """
        import sys
        from transformers import AutoModelForCausalLM
        import peft, hf_efx

        base = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/base")
        try:
            peft.PeftModel.from_pretrained(base, sys.argv[1] + "/adapter")
        except KeyError as error:
            print("before:", error)
        hf_efx.register_peft()
        print("after:", type(peft.PeftModel.from_pretrained(base, sys.argv[1] + "/adapter")).__name__)
        print("auto:", type(peft.AutoPeftModelForCausalLM.from_pretrained(sys.argv[1] + "/adapter")).__name__)
    """
    lines = run_python(program, args=[adapter]).splitlines()
    assert [line for line in lines if line.split(":")[0] in ("before", "after", "auto")] == [
        "before: 'EFX_LOW_RANK'",
        "after: PeftModelForCausalLM",
        "auto: PeftModelForCausalLM",
    ]


def test_adapter_config_is_read_back_whole(adapter: Path) -> None:
    saved = json.loads((adapter / "adapter" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "EFX_LOW_RANK" and saved["rank"] == 2 and len(saved["target_modules"]) == 8
    config = LowRankConfig.from_pretrained(str(adapter / "adapter"))
    assert type(config) is LowRankConfig and config.rank == 2
    assert type(peft.PeftConfig.from_pretrained(str(adapter / "adapter"))) is LowRankConfig


def test_unknown_key_in_adapter_config_is_refused(adapter: Path, tmp_path: Path) -> None:
    saved = json.loads((adapter / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**saved, "colour": "red"}))
    for load in (LowRankConfig.from_pretrained, peft.PeftConfig.from_pretrained):
        with pytest.raises(ValueError, match=r"LowRankConfig: unknown key 'colour' \(value 'red'\)"):
            load(str(tmp_path))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # peft's own, before ours
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 99}, r"rank=99 is above min\(in, out\)=32"),
        ({"target_modules": ["q_proj"]}, r"target_modules=\['q_proj'\].*matches no module"),
        ({"target_modules": ["lm_head"]}, r"'lm_head'.*tied"),
        ({"rank_pattern": {"q_proj": 2}}, r"rank_pattern\['q_proj'\] matches no"),
        ({"rank": 1.0}, r"nothing would be factorised"),
    ],
)
def test_bad_config_leaves_the_model_unharmed(fields: dict[str, Any], words: str) -> None:
    model, expected = GPT2.build(), logits(GPT2.build())
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=f"(?s){words}"):
        peft.get_peft_model(model, LowRankConfig(**fields))
    assert list(model.state_dict()) == keys and not adapters(model)
    assert torch.equal(logits(model), expected)


def test_layers_that_would_not_get_smaller_get_no_adapter() -> None:
    # rank 20: past break-even (16) for a square projection, below it (25.6) for an MLP matrix
    model = peft.get_peft_model(GPT2.build(), LowRankConfig(rank=20))
    named = [name for name, m in model.named_modules() if isinstance(m, LowRankAdapterLayer)]
    assert [name.split("h.")[1] for name in named] == ["0.mlp.c_fc", "0.mlp.c_proj", "1.mlp.c_fc", "1.mlp.c_proj"]


def test_layers_to_transform_holds_through_peft_too() -> None:
    model = peft.get_peft_model(GPT2.build(), LowRankConfig(rank=2, layers_to_transform=[1]))
    assert {name.split("h.")[1][0] for name, m in model.named_modules() if isinstance(m, LowRankAdapterLayer)} == {"1"}
    assert all(".h.1." in name for name in model.peft_config["default"].target_modules)  # pyright: ignore


def test_fused_projection_has_factors_of_its_own_per_block() -> None:
    model = peft.get_peft_model(GPT2.build(), LowRankConfig(rank=2, target_modules=["c_attn"]))
    (first, _) = adapters(model)
    assert first.low_rank_u["default"].shape == (3, 32, 2) and first.low_rank_v["default"].shape == (3, 2, 32)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged default:UserWarning")  # peft's own
def test_only_one_low_rank_adapter_is_active_or_merged() -> None:
    model = peft.get_peft_model(GPT2.build(), LowRankConfig(rank=2))
    model.add_adapter("second", LowRankConfig(rank=4))
    tuner = model.base_model
    tuner.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"active adapters \['default', 'second'\].*only one can be active"):
        logits(model)
    tuner.set_adapter("default")
    dense = logits(GPT2.build())
    expected = logits(model)
    tuner.merge_adapter(["default"])
    with pytest.raises(ValueError, match=r"adapter 'default' is merged already.*'second' can't be merged on top"):
        tuner.merge_adapter(["second"])
    tuner.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), dense)


def test_merge_with_a_factor_activation_is_refused() -> None:
    model = peft.get_peft_model(GPT2.build(), LowRankConfig(rank=2, factor_activation="silu"))
    expected = logits(model)
    with pytest.raises(ValueError, match="factor_activation='silu' stands between the factors"):
        model.merge_and_unload()
    assert torch.equal(logits(model), expected)


def test_safe_merge_stops_at_a_broken_adapter() -> None:
    model = peft.get_peft_model(GPT2.build(), LowRankConfig(rank=2))
    dense = logits(GPT2.build())
    with torch.no_grad():
        adapters(model)[0].low_rank_u["default"][0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaNs or infinities in the product of adapter 'default'"):
        model.merge_and_unload(safe_merge=True)
    with model.disable_adapter():
        assert torch.equal(logits(model), dense)


def test_merge_is_exact_in_float64_and_in_channels_last() -> None:
    architecture = next(architecture for architecture in ARCHITECTURES if architecture.name == "resnet")
    images = architecture.batch()["pixel_values"].double()
    base = architecture.build().double().to(memory_format=torch.channels_last)
    model = peft.get_peft_model(base, LowRankConfig(rank=2))
    expected = model(images).logits
    torch.testing.assert_close(model.merge_and_unload()(images).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rank", [2, 1.0])
def test_lora_is_not_merged_into_factors_of_square_layers(rank: float | int) -> None:
    # A square layer at full rank has a factor of the size of the dense weight: peft would just add to it.
    target = {"target_modules": ["attn.c_proj"]}
    base = get_efx_model(GPT2.build(), LowRankConfig(rank=rank, only_if_smaller=False, **target))  # pyright: ignore
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False, **target))  # pyright: ignore
    expected = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"LoraModel: the adapter on '.*c_proj' can't be merged.*Keep"):
            merge()
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(value, state[key]) for key, value in model.unload().state_dict().items())


def test_lora_on_dense_layers_merges_as_ever() -> None:
    lora = peft.LoraConfig(r=2, target_modules=["c_fc"], init_lora_weights=False, fan_in_fan_out=True)
    model = peft.get_peft_model(GPT2.build(), lora)
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "layer, x", [(nn.Linear(8, 8), torch.ones(2, 8)), (nn.Conv2d(8, 8, 3), torch.ones(2, 8, 4, 4))]
)
def test_a_float32_adapter_on_a_bf16_base_with_bias(layer: nn.Module, x: torch.Tensor) -> None:
    model = nn.Sequential(layer).to(torch.bfloat16)
    adapted = peft.get_peft_model(model, LowRankConfig(rank=2, target_modules=["0"]))
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert adapted(x.to(torch.bfloat16)).dtype == torch.bfloat16
