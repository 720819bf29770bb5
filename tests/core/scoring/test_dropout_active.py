"""Which modules drop inside `dropout_active`."""

from typing import Any

import pytest
import transformers
from test_sampling import build

from hf_efx.core.scoring.sampling import dropout_active


def test_layerdrop_and_stochastic_depth_are_off():
    model = build("marian").train()
    with dropout_active(model):
        assert model.model.encoder.layerdrop == model.config.encoder_layerdrop == 0
        assert model.model.encoder.training
    assert model.model.encoder.layerdrop == model.config.encoder_layerdrop == 0.5
    beit = transformers.BeitForImageClassification(
        transformers.BeitConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8,
            patch_size=4, drop_path_rate=0.9, hidden_dropout_prob=0.1,
        )
    ).train()  # fmt: skip
    paths = [m for m in beit.modules() if type(m).__name__.endswith("DropPath")]
    with dropout_active(beit):
        assert paths and not any(path.training for path in paths) and beit.training
    assert all(path.training for path in paths)
    size: dict[str, Any] = {
        "hidden_dim": 8,
        "image_size": 16,
        "depthwise_padding": [],
        "num_block_repeats": [1],
        "kernel_sizes": [3],
    }
    blocks: dict[str, Any] = {"in_channels": [32], "out_channels": [16], "strides": [1], "expand_ratios": [1]}
    net = transformers.EfficientNetModel(
        transformers.EfficientNetConfig(**size, **blocks, width_coefficient=0.25, depth_coefficient=1.0)
    ).train()
    branches: list[Any] = [m.dropout for m in net.modules() if type(m).__name__ == "EfficientNetFinalBlockLayer"]
    with dropout_active(net):
        assert branches and not any(branch.training for branch in branches)


def test_sites_choose_modules():
    model = build("marian")
    names = dict(model.named_modules())

    def on(sites):
        with dropout_active(model, sites):
            return {name for name, module in names.items() if module.training}

    assert on(None) == set(names)
    assert on([]) == set()
    encoder = {name for name in names if name == "model.encoder" or name.startswith("model.encoder.")}
    assert on(["encoder"]) == encoder
    assert on(["decoder.layers.0"]) == {n for n in names if f"{n}.".startswith("model.decoder.layers.0.")}
    assert on(r".*layers\.1") == {"model.encoder.layers.1", "model.decoder.layers.1"}
    with pytest.raises(ValueError, match="'encodr' matches no module of MarianMTModel"):
        on(["encodr"])
