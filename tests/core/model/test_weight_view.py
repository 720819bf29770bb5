import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_efx.core.model.weight_view import WeightView


def linear(rows: list[list[float]]) -> nn.Linear:
    module = nn.Linear(len(rows[0]), len(rows), bias=False)
    module.weight.data = torch.tensor(rows)
    return module


def test_linear_is_its_weight() -> None:
    view = WeightView(linear([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    assert (view.out_dim, view.in_dim, view.block_dim, view.transposed) == (3, 2, 3, False)
    assert view.matrix().tolist() == [[1, 2], [3, 4], [5, 6]]


def test_conv1d_is_stored_transposed() -> None:
    module = Conv1D(3, 2)  # nf, nx: weight [in=2, out=3]
    module.weight.data = torch.tensor([[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]])
    view = WeightView(module)
    assert (view.out_dim, view.in_dim, view.transposed) == (3, 2, True)
    assert view.matrix().tolist() == [[1, 2], [3, 4], [5, 6]]
    x = torch.tensor([[1.0, 10.0]])
    assert module(x).tolist() == (x @ view.matrix().mT).tolist() == [[21, 43, 65]]


def test_convolution_is_a_matrix_on_its_unfolded_input() -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(3, 5, (2, 3), stride=2, padding=1, bias=False).double()
    view = WeightView(module)
    assert (view.out_dim, view.in_dim) == (5, 3 * 2 * 3)
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    patches = F.unfold(x, (2, 3), stride=2, padding=1)  # [B, in, positions]
    torch.testing.assert_close(module(x).flatten(2), view.matrix() @ patches, rtol=0, atol=1e-12)


def test_blocks_stand_on_top_of_each_other() -> None:
    view = WeightView(linear([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]), blocks=2)
    assert view.block_dim == 2
    assert [block.tolist() for block in view.block_matrices()] == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: Conv1D(4, 6), lambda: nn.Conv2d(2, 4, (3, 1))])
def test_write_is_the_reverse_of_matrix(make, memory_format) -> None:
    module = make()
    if module.weight.dim() == 4:
        module = module.to(memory_format=memory_format)
    view, parameter = WeightView(module), module.weight
    new = torch.arange(24.0).view(4, 6)
    view.write(new)
    assert torch.equal(view.matrix(), new)
    assert module.weight is parameter and parameter.requires_grad


def test_wrong_modules_are_refused() -> None:
    with pytest.raises(TypeError, match="takes Linear, Conv1D or Conv2d, got Embedding"):
        WeightView(nn.Embedding(3, 2))
    with pytest.raises(ValueError, match="groups=2 is not one matrix: leave it out with exclude_modules"):
        WeightView(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="blocks=2 doesn't divide out_dim=3"):
        WeightView(nn.Linear(2, 3), blocks=2)
