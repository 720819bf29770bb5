"""A checkpoint's weights in whatever form they were saved, and what must not be taken for them."""

import copy
import json

import pytest
import torch
import transformers
from matrix import perturb
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from hf_efx.core.training.weights import load_weights

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGES = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 2}


def build(name="ViTForImageClassification", seed=0):
    torch.manual_seed(seed)
    config = {
        "ViTForImageClassification": lambda: transformers.ViTConfig(**SIZES, **IMAGES),
        "Dinov2ForImageClassification": lambda: transformers.Dinov2Config(**SIZES, **IMAGES),
        "MixtralForCausalLM": lambda: transformers.MixtralConfig(
            **SIZES, vocab_size=32, num_key_value_heads=2, num_local_experts=3, tie_word_embeddings=True
        ),
    }[name]()
    return perturb(getattr(transformers, name)(config))  # every parameter off its starting value, biases too


def assert_same(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("form", ["whole", "sharded", "torch.save", "torch.save, sharded", "own names"])
@pytest.mark.parametrize("name", ["ViTForImageClassification", "Dinov2ForImageClassification", "MixtralForCausalLM"])
def test_older_layouts_come_back_bit_for_bit(name, form, tmp_path):
    saved, model = build(name), build(name, seed=1)
    saved.save_pretrained(tmp_path, max_shard_size="4KB" if "sharded" in form else "1GB")
    state = revert_weight_conversion(saved, saved.state_dict())
    assert state.keys() != saved.state_dict().keys()  # what is guarded against
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == ("sharded" in form)
    if form == "own names":
        save_file({n: v.clone() for n, v in saved.state_dict().items() if n != "lm_head.weight"}, files[0])
    elif "torch.save" in form:
        weight_map = {}
        for number, file in enumerate(files):
            shard = f"pytorch_model-{number}.bin" if "sharded" in form else WEIGHTS_NAME
            weight_map.update(dict.fromkeys(load_file(file), shard))
            torch.save(load_file(file), tmp_path / shard)
            file.unlink()
        if "sharded" in form:
            (tmp_path / "model.safetensors.index.json").unlink()
            (tmp_path / WEIGHTS_INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    parameters = [*model.parameters()]
    load_weights(model, tmp_path)
    assert_same(model, saved)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))  # an optimizer may hold them


def test_a_loaded_model_and_one_with_a_head_of_its_own(tmp_path):
    build().save_pretrained(tmp_path / "first")
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "first")
    loaded.classifier = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 2))
    expected = copy.deepcopy(loaded)
    loaded.save_pretrained(tmp_path / "second")
    load_weights(perturb(loaded), tmp_path / "second")
    assert_same(loaded, expected)


def test_other_weights_are_refused_and_the_model_is_unchanged(tmp_path):
    build().save_pretrained(tmp_path)
    state = load_file(tmp_path / SAFE_WEIGHTS_NAME)
    first, *_, last = state
    changes = {
        "missing": {name: value for name, value in state.items() if name != last},
        "unexpected": state | {"extra.weight": torch.ones(1)},
        "of another shape|can't be converted": state | {first: state[first].flatten().repeat(2)},
        "hold the weights of this Linear": {"weight": torch.ones(3, 2)},
    }
    for message, changed in changes.items():
        model = nn.Linear(2, 3) if "Linear" in message else build(seed=1)
        before = copy.deepcopy(model)
        save_file(changed, tmp_path / SAFE_WEIGHTS_NAME)
        with pytest.raises(ValueError, match=message):
            load_weights(model, tmp_path)
        assert_same(model, before)
    (tmp_path / SAFE_WEIGHTS_NAME).unlink()
    with pytest.raises(ValueError, match="holds no model.safetensors or pytorch_model.bin.*save_on_each_node"):
        load_weights(build(), tmp_path)


# peft 0.21 asks models for the name that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_all_adapters_come_back_under_any_name(tmp_path):
    import peft

    def make():
        options = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["classifier"]}
        model = peft.get_peft_model(build(), peft.LoraConfig(**options), adapter_name="first")
        model.add_adapter("second", peft.LoraConfig(**options))
        return model

    saved, model = make(), make()
    with torch.no_grad():
        for name, parameter in saved.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(1)
    saved.save_pretrained(tmp_path)
    model.train()
    load_weights(model, tmp_path)
    assert_same(model, saved)
    assert model.training
    file = tmp_path / "second/adapter_model.safetensors"
    state = load_file(file)
    save_file({name: value for name, value in state.items() if "layers.1" not in name}, file)
    with pytest.raises(ValueError, match="second' doesn't hold the weights of this PeftModel: missing"):
        load_weights(model, tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="no weights of the adapter 'second'"):
        load_weights(model, tmp_path)
