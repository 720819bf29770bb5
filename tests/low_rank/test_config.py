import re
from typing import Any

import pytest
import torch
from peft import PeftConfig
from torch import nn

from hf_efx import LowRankConfig, get_efx_model, low_rank_report
from hf_efx.core.model.adapter import efx_record


def net(*sizes: tuple[int, int]) -> nn.Sequential:
    """Linear layers by (in, out), and a head, which is left alone."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for i, (n, m) in enumerate(sizes):
        model.add_module(f"fc{i}", nn.Linear(n, m))
    model.add_module("head", nn.Linear(4, 4))
    return model


def spectrum(module: Any, sigma: list[float]) -> None:
    """Gives a layer these singular values, and no others."""
    p, _, qh = torch.linalg.svd(module.weight.detach(), full_matrices=False)
    values = torch.tensor([*sigma, *[0.0] * (p.shape[1] - len(sigma))])
    module.weight.data = p @ torch.diag(values) @ qh


def ranks(model: nn.Module) -> dict[str, int]:
    record = efx_record(model)
    assert record is not None
    return {name: spec["rank"] for entry in record["methods"] for name, spec in entry["modules"].items()}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 0}, "rank=0: expected a share of min(in, out) in (0, 1] as a float, a whole rank"),
        ({"rank": -4}, "rank=-4: expected"),
        ({"rank": 0.0}, "rank=0.0: expected"),
        ({"rank": -0.5}, "rank=-0.5: expected"),
        ({"rank": 1.5}, "rank=1.5: expected"),
        ({"rank": float("nan")}, "rank=nan: expected"),
        ({"rank": True}, "rank=True: expected"),
        ({"rank": "0.25"}, "rank='0.25': expected"),
        ({"rank": "half"}, "rank='half': expected"),
        ({"rank": None}, "rank=None: expected"),
        ({"rank_pattern": {"fc": 0}}, "rank_pattern['fc']=0: expected"),
        ({"rank_pattern": {"fc": 2.0}}, "rank_pattern['fc']=2.0: expected"),
        ({"rank_pattern": {"fc": "auto"}}, "rank_pattern['fc']='auto': expected"),
        ({"rank": "auto"}, "parameter_budget=None goes with rank='auto'"),
        ({"rank": 4, "parameter_budget": 0.5}, "parameter_budget=0.5 goes with rank='auto' and with nothing else"),
        ({"rank": "auto", "parameter_budget": 0}, "parameter_budget=0: expected a share in (0, 1]"),
        ({"rank": "auto", "parameter_budget": -3}, "parameter_budget=-3: expected"),
        ({"rank": "auto", "parameter_budget": 1.5}, "parameter_budget=1.5: expected"),
        ({"rank": "auto", "parameter_budget": True}, "parameter_budget=True: expected"),
        ({"rank": "auto", "parameter_budget": "half"}, "parameter_budget='half': expected"),
        ({"rank": "auto", "parameter_budget": float("nan")}, "parameter_budget=nan: expected"),
        ({"rank": "auto", "parameter_budget": 9, "rank_pattern": {"fc": 2}}, "rank_pattern and rank='auto' exclude"),
        ({"init": "xavier"}, "init='xavier': expected one of spectral, spectral_ones, he"),
        ({"spectral_ones_scale": 0}, "spectral_ones_scale=0: expected a number above 0, or 'rms'"),
        ({"spectral_ones_scale": -1.0}, "spectral_ones_scale=-1.0: expected"),
        ({"spectral_ones_scale": "mean"}, "spectral_ones_scale='mean': expected"),
        ({"spectral_ones_scale": True}, "spectral_ones_scale=True: expected"),
        ({"spectral_ones_scale": float("inf")}, "spectral_ones_scale=inf: expected"),
        ({"factor_activation": "sillu"}, "factor_activation='sillu' is no activation of transformers; try 'silu'"),
        ({"colour": 1}, "LowRankConfig: unknown key 'colour' (value 1). Known keys: "),
        ({"layers_to_transform": [0], "target_modules": ".*fc"}, "layers_to_transform=[0] has no effect where"),
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        LowRankConfig(**fields)


def test_it_is_a_peft_config_that_files_keep(tmp_path) -> None:
    config = LowRankConfig(rank=0.5, target_modules=["fc"], init="spectral_ones", rank_pattern={"fc": 3})
    assert isinstance(config, PeftConfig)
    config.save_pretrained(tmp_path)
    again = LowRankConfig.from_pretrained(tmp_path)
    assert type(again) is LowRankConfig and again.method_fields() == config.method_fields()


def test_share_and_whole_rank() -> None:
    # 0.25 of min(32, 64) and of min(12, 40); an int is the rank of every layer
    model = net((64, 32), (40, 12))
    assert ranks(get_efx_model(model, LowRankConfig(rank=0.25))) == {"fc0": 8, "fc1": 3}
    assert ranks(get_efx_model(net((64, 32), (40, 12)), LowRankConfig(rank=5))) == {"fc0": 5, "fc1": 5}


def test_rank_pattern_comes_before_rank() -> None:
    config = LowRankConfig(rank=2, rank_pattern={"fc1": 0.25, ".*2": 7})
    assert ranks(get_efx_model(net((32, 32), (32, 32), (32, 32)), config)) == {"fc0": 2, "fc1": 8, "fc2": 7}


def test_only_if_smaller_leaves_what_would_grow() -> None:
    # break-even: 16 of 32 x 32, 21.3 of 32 x 64; at break-even nothing is saved, so the layer stays dense
    sizes = ((32, 32), (64, 32))
    assert ranks(get_efx_model(net(*sizes), LowRankConfig(rank=15))) == {"fc0": 15, "fc1": 15}
    assert ranks(get_efx_model(net(*sizes), LowRankConfig(rank=16))) == {"fc1": 16}
    with pytest.raises(ValueError, match="rank=22: no layer would get smaller"):
        get_efx_model(net(*sizes), LowRankConfig(rank=22))
    everything = LowRankConfig(rank=32, only_if_smaller=False)
    assert ranks(get_efx_model(net(*sizes), everything)) == {"fc0": 32, "fc1": 32}


@pytest.mark.parametrize(("init", "scale"), [("spectral_ones", 1.0), ("spectral_ones", "rms"), ("he", 1.0)])
def test_inits_that_discard_trained_weights_are_refused_where_these_are_known(init: str, scale: float | str) -> None:
    config = LowRankConfig(rank=4, init=init, spectral_ones_scale=scale)
    with pytest.raises(ValueError, match=f"init='{init}' discards the pretrained weights.*get_efx_model"):
        get_efx_model(net((32, 32)), config, pretrained=True)
    model: Any = get_efx_model(net((32, 32)), config)
    product = model.fc0.product()
    sigma = torch.linalg.svdvals(product)[:4]
    dense = torch.linalg.svdvals(net((32, 32)).fc0.weight.detach())[:4]  # pyright: ignore
    if init == "spectral_ones":
        value = 1.0 if scale == 1.0 else dense.square().mean().sqrt()
        torch.testing.assert_close(sigma, torch.full((4,), float(value)), rtol=1e-5, atol=0)
    else:
        assert sigma.std() > 0.1


def test_auto_spends_the_budget_where_the_spectrum_is() -> None:
    # 32 x 32 layers: 64 parameters a step of rank. fc0 is of rank 2, fc1 falls slowly: rank 1 each takes 128, and the
    # next 4 steps go to fc0's second, and to fc1's second, third and fourth value.
    model: Any = net((32, 32), (32, 32))
    spectrum(model.fc0, [4.0, 3.0])
    spectrum(model.fc1, [4.0, 3.0, 2.0, 1.5, 1.0])
    config = LowRankConfig(rank="auto", parameter_budget=64 * 6)
    assert ranks(get_efx_model(model, config)) == {"fc0": 2, "fc1": 4}
    assert low_rank_report(model).layers[0].stable_rank == pytest.approx(25 / 16, rel=1e-4)


def test_auto_takes_a_share_of_the_dense_count_as_budget() -> None:
    model: Any = net((32, 32), (32, 32))
    spectrum(model.fc0, [4.0, 3.0])
    spectrum(model.fc1, [4.0, 3.0, 2.0, 1.5, 1.0])
    # 0.1875 of 2,048 is 384, as above
    assert ranks(get_efx_model(model, LowRankConfig(rank="auto", parameter_budget=0.1875))) == {"fc0": 2, "fc1": 4}


def test_auto_refuses_what_it_cannot_read() -> None:
    config = LowRankConfig(rank="auto", parameter_budget=0.5)
    with pytest.raises(ValueError, match=r"these look random.*Pass a rank, or train dense first"):
        get_efx_model(net((32, 32), (64, 32)), config)
    with torch.device("meta"), pytest.raises(ValueError, match="the model is on the meta device"):
        get_efx_model(net((32, 32)), config)
    model: Any = net((32, 32))
    spectrum(model.fc0, [2.0, 1.0])
    with pytest.raises(ValueError, match=r"parameter_budget=10 is below 64.*hold 1024 dense.*Raise parameter_budget"):
        get_efx_model(model, LowRankConfig(rank="auto", parameter_budget=10))
    model.fc0.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="'fc0' holds NaN"):
        get_efx_model(model, LowRankConfig(rank="auto", parameter_budget=0.5))


def test_record_says_what_was_done() -> None:
    config = LowRankConfig(rank=0.25)
    model = get_efx_model(net((64, 32)), config)
    modules = {"fc0": {"rank": 8, "shape": [32, 64]}}
    assert efx_record(model) == {
        "format_version": 1,
        "methods": [{"method": "low_rank", "config": config.method_fields(), "modules": modules}],
    }
