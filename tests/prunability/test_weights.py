"""Which weights count, their order, and that they come back bit for bit."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune

from hf_efx import LowRankConfig, get_efx_model
from hf_efx.prunability import measure_prunability, weights
from hf_efx.prunability.weights import WeightOrder, prunable_weights
from prunability.networks import Odd, traces


def order_of(*tensors: torch.Tensor, **options) -> WeightOrder:
    return WeightOrder({str(i): nn.Parameter(t.clone()) for i, t in enumerate(tensors)}, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("piece", [7, 1 << 22])
def test_global_order_is_that_of_sorting(dtype, piece, monkeypatch):
    monkeypatch.setattr(weights, "PIECE", piece)
    torch.manual_seed(0)
    first, second = torch.randn(9, 6).to(dtype), 0.3 * torch.randn(4, 5, 3).to(dtype)
    order = order_of(first, second)
    magnitudes = torch.cat([first.flatten(), second.flatten()]).abs().double()
    for fraction in (0.01, 0.37, 0.5, 0.99, 1.0):
        count = int(fraction * 114)
        with order.pruned(fraction):
            left = torch.cat([w.detach().flatten() for w in order.weights.values()]).abs().double()
        kept = left[left > 0]
        assert len(kept) == count == sum(order.kept(fraction).values())
        assert sorted(kept.tolist()) == magnitudes.sort().values[114 - count :].tolist()
        assert torch.equal(order.weights["0"].detach(), first) and torch.equal(order.weights["1"].detach(), second)


def test_ties_go_in_order_of_place():
    order = order_of(torch.ones(2, 3), -torch.ones(2, 2))
    with order.pruned(0.3):  # 3 of 10 stay: the last ones
        assert [w.tolist() for w in order.weights.values()] == [[[0] * 3, [0] * 3], [[0, -1], [-1, -1]]]
    assert order.kept(0.3) == {"0": 0, "1": 3}


def test_layer_scope_keeps_the_fraction_of_each_tensor():
    order = order_of(torch.randn(10, 10), 1e-3 * torch.randn(5, 4), scope="layer")
    assert order.kept(0.29) == {"0": 29, "1": 5}
    assert order_of(torch.randn(10, 10).abs() + 1, 1e-3 * torch.randn(5, 4)).kept(0.5) == {"0": 60, "1": 0}


def test_random_order_repeats_and_nests():
    tensors = torch.randn(20, 20), torch.randn(10, 3)

    def kept(order, fraction):
        with order.pruned(fraction):
            return torch.cat([(w != 0).flatten() for w in order.weights.values()])

    order = order_of(*tensors, criterion="random", seed=1)
    few, many = kept(order, 0.2), kept(order, 0.6)
    assert (int(few.sum()), int(many.sum())) == (86, 258)
    assert bool((many | ~few).all())  # what stays of few stays of many
    assert torch.equal(few, kept(order_of(*tensors, criterion="random", seed=1), 0.2))
    assert not torch.equal(few, kept(order_of(*tensors, criterion="random", seed=2), 0.2))
    other = kept(order_of(*tensors), 0.2)
    assert not torch.equal(few, other)


def odd() -> tuple[Odd, torch.Tensor]:
    torch.manual_seed(0)
    model, images = Odd(), torch.randn(3, 2, 4, 4)
    model(images).sum().backward()
    return model, images


def losses_that(error: BaseException | None, images: torch.Tensor):
    calls = []

    def losses(model):
        calls.append(1)
        if error is not None and len(calls) == 5:
            raise error
        model.train()  # what a careless loss function may do: BatchNorm moves, modes change
        model.dropout.eval()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return (model(images) - 1).square().sum(1)

    return losses


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
@pytest.mark.parametrize("error", [None, RuntimeError("half-way"), KeyboardInterrupt()])
def test_the_model_comes_back_bit_for_bit(error, criterion):
    model, images = odd()
    formats = [p.stride() for p in model.parameters()]
    before = traces(model)
    if error is None:
        result = measure_prunability(model, losses_that(None, images), criterion=criterion, exhaustive=True)
        assert result.weights == 2 * 4 * 9 + 3 * 24  # the tied weight once
    else:
        with pytest.raises(type(error)):
            measure_prunability(model, losses_that(error, images), criterion=criterion)
    after = traces(model)
    assert {k for k in before if before[k] != after[k]} == set()
    assert [p.stride() for p in model.parameters()] == formats


@pytest.mark.parametrize("method", ["masked_fill_", "masked_scatter_", "cpu"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_interrupt_while_weights_are_zeroed_or_put_back(method, call, monkeypatch):
    model, _ = odd()
    order = WeightOrder(prunable_weights(model))
    before, calls, original = traces(model), [], getattr(torch.Tensor, method)
    order.kept(0.5)  # what it counts, it has counted

    def interrupted(self, *args, **kwargs):
        if self.dim() and not isinstance(args[:1], int):
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, method, interrupted)
    with pytest.raises(KeyboardInterrupt), order.pruned(0.5):
        pass
    monkeypatch.undo()
    assert traces(model) == before


def test_a_graph_from_before_stays_usable():
    model = nn.Linear(3, 3)
    loss = model(torch.ones(1, 3)).square().sum()
    with WeightOrder(prunable_weights(model)).pruned(0.5):
        pass
    loss.backward()
    assert model.weight.grad is not None


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.position_embeddings = nn.Parameter(torch.randn(1, 6, 4))
        self.class_token = nn.Parameter(torch.randn(1, 1, 4))
        self.layer = nn.Linear(4, 5)
        self.one_output = nn.Linear(4, 1)
        self.norm = nn.LayerNorm(4)


def test_what_counts():
    assert list(prunable_weights(Tables())) == ["layer.weight", "one_output.weight"]
    with_tables = prunable_weights(Tables(), embeddings=True)
    assert list(with_tables) == ["position_embeddings", "words.weight", "layer.weight", "one_output.weight"]


def test_of_lora_and_low_rank_layers_the_stored_matrices_count():
    """What is stored is pruned, so that a factorised layer and its product give different numbers."""
    model = nn.Sequential(nn.Linear(6, 8))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))  # pyright: ignore
    names = [name.removeprefix("base_model.model.0.") for name in prunable_weights(adapted)]
    assert names == ["base_layer.weight", "lora_A.default.weight", "lora_B.default.weight"]
    before = traces(adapted)
    inputs = torch.ones(3, 6)
    result = measure_prunability(adapted, lambda m: (m(inputs) - 1).square().sum(1))
    assert result.weights == 6 * 8 + 2 * 6 + 8 * 2 and traces(adapted) == before
    factorised = get_efx_model(nn.Sequential(nn.Linear(6, 8)), LowRankConfig(rank=2, target_modules=["0"]))
    assert sorted(weight.numel() for weight in prunable_weights(factorised).values()) == [12, 16]


def test_what_cannot_be_ranked():
    with pytest.raises(ValueError, match="no matrix to prune; embeddings=True"):
        prunable_weights(nn.Embedding(3, 3))
    with pytest.raises(ValueError, match="isn't finite|aren't finite"):
        order_of(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(ValueError, match="meta device"):
        prunable_weights(nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="'0.weight' is on the meta device"):  # counted or not
        prunable_weights(nn.Sequential(nn.Embedding(2, 2, device="meta"), nn.Linear(2, 2)))
    with torch.inference_mode():
        frozen = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'weight' was made in inference mode"):
        prunable_weights(frozen)
    with pytest.raises(ValueError, match="'0.weight' has no shape yet: run the model once"):
        prunable_weights(nn.Sequential(nn.LazyLinear(2)))
    with pytest.raises(ValueError, match="'weight' is stored as torch.complex64"):
        prunable_weights(nn.Linear(2, 2, dtype=torch.complex64))
    sparse = nn.Linear(2, 2)
    sparse.weight = nn.Parameter(sparse.weight.detach().to_sparse())
    with pytest.raises(ValueError, match="torch.sparse_coo: prunability ranks dense"):
        prunable_weights(sparse)
    with pytest.raises(ValueError, match="fraction=1.5"), order_of(torch.ones(2, 2)).pruned(1.5):
        pass


def packed(name: str, tensor: torch.Tensor, parameter: bool = False) -> nn.Module:
    layer = nn.Module()
    if parameter:
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    else:
        layer.register_buffer(name, tensor)
    return layer


def quanto_like() -> nn.Module:
    """A weight that says float32 and is none, as torchao's and quanto's: one of torch's own wrapper subclasses."""
    from torch.testing._internal.two_tensor import TwoTensor

    layer = nn.Module()
    layer.weight = nn.Parameter(TwoTensor(torch.ones(2, 2), torch.ones(2, 2)))
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: packed("weight", torch.full((2, 2), 3, dtype=torch.int8), True), "1.weight: torch.int8"),
        (lambda: packed("weight", torch.ones(2, 2).to(torch.float8_e4m3fn), True), "1.weight: torch.float8_e4m3fn"),
        # Of four bits: two numbers in a byte, one after the other.
        (lambda: packed("weight", torch.full((9, 1), 137, dtype=torch.uint8), True), "1.weight: torch.uint8"),
        (lambda: packed("weight", torch.full((9,), 137, dtype=torch.uint8), True), "1.weight: torch.uint8"),
        (lambda: packed("W_q", torch.full((2, 2), 3, dtype=torch.int8)), "1.W_q: torch.int8"),
        (lambda: packed("qweight", torch.ones(2, 2, dtype=torch.int32)), "1.qweight: torch.int32"),
        (quanto_like, "1.weight: TwoTensor"),
        (lambda: torch.ao.nn.quantized.dynamic.Linear(4, 4), "1._packed_params: LinearPackedParams"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*other quantized tensor creation functions:UserWarning")
def test_a_model_with_quantised_parts_is_refused(layer, message):
    model = nn.Sequential(nn.Linear(2, 2), layer())
    with pytest.raises(ValueError, match=rf"1 parts of the model are quantised \({message}\)"):
        prunable_weights(model)


def test_masks_and_positions_are_no_weights():
    model = nn.Linear(2, 2)
    for dtype in (torch.bool, torch.uint8, torch.int8):
        model.register_buffer(f"mask_{dtype}".replace(".", "_"), torch.ones(3, 3).tril().to(dtype))
    model.register_buffer("positions", torch.arange(6)[None])
    model.register_buffer("scale", torch.tensor(7, dtype=torch.uint8))
    assert list(prunable_weights(model)) == ["weight"]


@pytest.mark.parametrize(
    ("compute", "names", "way_out"),
    [
        (lambda m: prune.l1_unstructured(m, "weight", 0.5), "weight_orig", "prune.remove"),
        (torch.nn.utils.weight_norm, "weight_g, weight_v", "remove_weight_norm"),
        (torch.nn.utils.spectral_norm, "weight_orig", "remove_spectral_norm"),
        (parametrizations.weight_norm, "original0, original1", r"remove_parametrizations\(module, 'weight'\)"),
        (parametrizations.orthogonal, "original", r"remove_parametrizations\(module, 'weight'\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*deprecated in favor of:FutureWarning")  # the older functions, still in use
def test_weights_that_torch_computes_from_others_are_refused(compute, names, way_out):
    model = nn.Sequential(nn.Linear(4, 4))
    compute(model[0])
    with pytest.raises(ValueError, match=f"0.weight is computed from {names}.*{way_out}"):
        measure_prunability(model, lambda m: (m(torch.ones(3, 4)) - 1).square().sum(1))


def shapes(model: nn.Module) -> list[str]:
    return [name.removeprefix("base_model.model.") for name in prunable_weights(model)]


def test_what_peft_leaves_idle_does_not_count():
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"], init_lora_weights=False)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), config)  # pyright: ignore
    model.add_adapter("other", LoraConfig(r=3, target_modules=["0"]))
    first = ["0.base_layer.weight", "0.lora_A.default.weight", "0.lora_B.default.weight"]
    assert shapes(model) == [*first, "1.modules_to_save.default.weight"]
    inputs = torch.ones(3, 6)
    found = measure_prunability(model, lambda m: (m(inputs) - 1).square().sum(1))
    assert found.weights == 6 * 8 + 2 * 6 + 8 * 2 + 8 * 3
    model.set_adapter("other")  # has no copy of the second layer
    other = ["0.base_layer.weight", "0.lora_A.other.weight", "0.lora_B.other.weight"]
    assert shapes(model) == [*other, "1.original_module.weight"]
    with model.disable_adapter():
        assert shapes(model) == ["0.base_layer.weight", "1.original_module.weight"]
    model.set_adapter("default")
    model.merge_adapter()
    assert shapes(model) == ["0.base_layer.weight", "1.modules_to_save.default.weight"]
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="merged and switched off.*unmerge_adapter"):
        prunable_weights(model)


def test_the_weight_that_low_rank_factors_stand_in_for_does_not_count():
    config = LowRankConfig(rank=2, target_modules=["0"])
    model: Any = get_peft_model(nn.Sequential(nn.Linear(6, 8)), config)  # pyright: ignore
    assert shapes(model) == ["0.low_rank_u.default", "0.low_rank_v.default"]
    with model.disable_adapter():
        assert shapes(model) == ["0.base_layer.weight"]
