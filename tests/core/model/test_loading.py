"""from_pretrained where something is wrong. That it works on every architecture stands in tests/test_matrix.py."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import ARCHITECTURES, perturb
from safetensors.torch import load_file, load_model, save_file, save_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from hf_efx import EfxConfig, LowRankConfig, get_efx_model, merge_and_unload
from hf_efx.core.model.adapter import efx_record

GPT2 = next(architecture for architecture in ARCHITECTURES if architecture.name == "gpt2")
FACTOR = "transformer.h.0.attn.c_attn.factor_v"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    perturb(get_efx_model(GPT2.build(), LowRankConfig(rank=2))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    perturb(GPT2.build()).save_pretrained(folder)
    return folder


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def entry(config: dict[str, Any]) -> dict[str, Any]:
    return config["efx"]["methods"][0]


def spec(config: dict[str, Any]) -> dict[str, Any]:
    return next(iter(entry(config)["modules"].values()))


CONFIG_CASES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer format": (lambda c: c["efx"].update(format_version=2), r"format_version=2.*[Uu]pgrade"),
    "no format": (lambda c: c["efx"].pop("format_version"), r"format_version=None"),
    "no record": (lambda c: c.pop("efx"), r"quant_method='hf_efx'.*no 'efx' entry.*Restore config.json"),
    "unknown method": (lambda c: entry(c).update(method="later"), r"method 'later'.*Upgrade hf_efx"),
    "unknown key of the entry": (lambda c: entry(c).update(later=1), r"unknown key 'later' in its 'low_rank' entry"),
    "unknown key of the config": (
        lambda c: entry(c).update(config={"later": 1}),
        r"LowRankConfig: unknown key 'later' \(value 1\).*[Uu]pgrade hf_efx",
    ),
    "bad value in the config": (lambda c: entry(c).update(config={"rank": -3}), r"rank=-3: expected"),
    "unknown key of a module": (lambda c: spec(c).update(later=1), r"h.0.attn.c_attn'.*'later' is unknown"),
    "module without a rank": (lambda c: spec(c).pop("rank"), r"'transformer.h.0.attn.c_attn'; expected rank, shape"),
    "module of another model": (
        lambda c: entry(c)["modules"].update({"transformer.h.7.mlp.c_fc": {"rank": 2, "shape": [128, 32]}}),
        r"'transformer.h.7.mlp.c_fc",
    ),
    "other rank": (lambda c: spec(c).update(rank=3), r"c_attn.weight' has shape \[1, 96, 2\].*promises \[1, 96, 3\]"),
    "other size": (lambda c: c.update(n_embd=16), r"promises 'transformer.h.0.attn.c_attn' with shape \[96, 32\]"),
    "foreign key beside quant_method": (
        lambda c: c["quantization_config"].update(bits=4),
        r"EfxConfig: unknown key 'bits'",
    ),
}


@pytest.mark.parametrize("case", CONFIG_CASES)
def test_edited_config_is_refused(case: str, broken: Path) -> None:
    change, words = CONFIG_CASES[case]
    edit_config(broken, change)
    with pytest.raises(ValueError, match=f"(?s){words}"):
        AutoModelForCausalLM.from_pretrained(broken)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_checkpoint_cut_short_is_refused(share: float, broken: Path) -> None:
    file = broken / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"model.safetensors is no whole safetensors file .*fetch the file again"):
        AutoModelForCausalLM.from_pretrained(broken)


def test_missing_factor_is_refused(broken: Path) -> None:
    edit_weights(broken, lambda tensors: tensors.pop(FACTOR))
    with pytest.raises(ValueError, match=rf"lacks the factor '{FACTOR}' \(shape \[6, 32\]\)"):
        AutoModelForCausalLM.from_pretrained(broken)


def test_factor_of_another_shape_is_refused(broken: Path) -> None:
    edit_weights(broken, lambda tensors: tensors.update({FACTOR: torch.zeros(5, 32)}))
    with pytest.raises(ValueError, match=rf"'{FACTOR}' has shape \[5, 32\], config.efx promises \[6, 32\]"):
        AutoModelForCausalLM.from_pretrained(broken)


def test_dense_weights_under_an_efx_config_are_refused(broken: Path, dense: Path) -> None:
    """As a dense model that was built from this config is saved; the error's way out works."""
    shutil.copy(dense / "model.safetensors", broken)
    with pytest.raises(
        ValueError, match=r"has shape \[32, 96\].*promises \[1, 96, 2\].*take efx and quantization_config"
    ):
        AutoModelForCausalLM.from_pretrained(broken)
    edit_config(broken, lambda config: [config.pop(key) for key in ("efx", "quantization_config")])
    loaded, expected = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (broken, dense))
    assert all(torch.equal(value, loaded[name]) for name, value in expected.items())


def test_missing_shard_is_refused(tmp_path: Path) -> None:
    get_efx_model(GPT2.build(), LowRankConfig(rank=2)).save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    (tmp_path / index["weight_map"][FACTOR]).unlink()
    with pytest.raises(OSError, match="safetensors"):  # transformers' own words
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"init": "he"}, r"init='he' discards the pretrained weights.*init='spectral'"),
        ({"init": "spectral_ones"}, r"init='spectral_ones' discards"),
        ({"factor_activation": "silu"}, r"factor_activation='silu' discards"),
        ({"rank": 99}, r"rank=99 is above min\(in, out\)=32"),
        ({"target_modules": ["q_proj"]}, r"target_modules=\['q_proj'\].*matches no module"),
        ({"target_modules": ["lm_head"]}, r"'lm_head'.*tied"),
        ({"rank": "auto", "parameter_budget": 0.5}, r"look random"),
    ],
)
def test_dense_checkpoint_with_a_config_that_cannot_be(dense: Path, fields: dict[str, Any], words: str) -> None:
    config = EfxConfig(LowRankConfig(**{"rank": 2, **fields}))
    with pytest.raises(ValueError, match=f"(?s){words}"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)


def test_bitsandbytes_on_an_efx_checkpoint_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"quantized with EfxConfig but you are passing a BitsAndBytesConfig"):
        AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_config_passed_for_an_efx_checkpoint_gives_way_to_its_own(checkpoint: Path) -> None:
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=EfxConfig(LowRankConfig(rank=3)))
    assert model.transformer.h[0].mlp.c_fc.rank == 2


def test_several_configs_go_in_in_order(dense: Path, tmp_path: Path) -> None:
    configs = [LowRankConfig(rank=2, target_modules=["c_fc"]), LowRankConfig(rank=3, target_modules=["c_attn"])]
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=EfxConfig(configs))
    ranks = [
        {spec["rank"] for spec in entry["modules"].values()}
        for entry in efx_record(model)["methods"]  # pyright: ignore
    ]
    assert ranks == [{2}, {3}]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert efx_record(again) == efx_record(model)


def test_config_json_is_as_documented(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "hf_efx"}
    assert config["efx"]["format_version"] == 1
    assert entry(config)["method"] == "low_rank" and entry(config)["config"] == LowRankConfig(rank=2).method_fields()
    assert spec(config) == {"rank": 2, "shape": [96, 32], "blocks": 3}
    names = load_file(checkpoint / "model.safetensors").keys()
    assert all(f"{name}.{part}" in names for name in entry(config)["modules"] for part in ("weight", "factor_v"))


def test_version_1_written_by_hand_loads(dense: Path, tmp_path: Path) -> None:
    """The format as docs/checkpoints.md has it, without a line of ours in the writing: it must go on to load."""
    torch.manual_seed(0)
    u, v = torch.randn(1, 96, 2), torch.randn(6, 32)  # three blocks [32, 32] of rank 2
    tensors = load_file(dense / "model.safetensors")
    name = "transformer.h.0.attn.c_attn"
    blocks = [u[0, 32 * i : 32 * (i + 1)] @ v[2 * i : 2 * (i + 1)] for i in range(3)]
    product = torch.cat(blocks).mT.contiguous()  # Conv1D stores [in, out]
    shutil.copytree(dense, tmp_path, dirs_exist_ok=True)
    tensors |= {f"{name}.weight": u, f"{name}.factor_v": v}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    modules = {name: {"rank": 2, "shape": [96, 32], "blocks": 3}}
    record = {"format_version": 1, "methods": [{"method": "low_rank", "config": {"rank": 2}, "modules": modules}]}
    edit_config(tmp_path, lambda c: c.update(efx=record, quantization_config={"quant_method": "hf_efx"}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        expected.transformer.h[0].attn.c_attn.weight.copy_(product)
        torch.testing.assert_close(model(**GPT2.batch()).logits, expected(**GPT2.batch()).logits, rtol=1e-5, atol=1e-5)


def test_the_quantizer_takes_itself_off(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        assert not hasattr(model, name)
    assert not hasattr(model.config, "_is_quantized")
    assert model.half().dtype == torch.float16 and model.float().dtype == torch.float32


@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_a_state_dict_fits_the_same_structure_alone(form: str, checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    file = tmp_path / "weights"
    if form == "torch":
        torch.save(model.state_dict(), file)
    else:
        save_model(model, str(file))

    def load(into: Any) -> Any:
        if form == "safetensors":
            load_model(into, file, strict=False)
        else:
            into.load_state_dict(torch.load(file), strict=False)
        return into

    fresh = load(get_efx_model(GPT2.build(seed=1), LowRankConfig(rank=2)))
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())
    for other in (GPT2.build(), get_efx_model(GPT2.build(), LowRankConfig(rank=3))):
        with pytest.raises(RuntimeError, match="size mismatch for transformer.h.0.attn.c_attn"):
            load(other)


def test_merged_model_leaves_nothing_behind(checkpoint: Path) -> None:
    model = merge_and_unload(AutoModelForCausalLM.from_pretrained(checkpoint))
    assert not {"efx", "quantization_config"} & model.config.to_dict().keys()


def test_body_and_whole_read_each_others_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    body = AutoModel.from_pretrained(checkpoint)
    whole = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert "h.0.attn.c_attn" in efx_record(body)["methods"][0]["modules"]  # pyright: ignore
    for key, value in whole.transformer.state_dict().items():
        assert torch.equal(body.state_dict()[key], value), key
    body.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for key, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_model_from_the_config_alone_starts_anew(checkpoint: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    get_efx_model(model)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.transformer.h[0].attn.c_attn.factor_v.shape == (6, 32)
