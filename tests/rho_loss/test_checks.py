"""What a table refuses of a data collator."""

import numpy as np
import pytest
import torch

from hf_efx.rho_loss.checks import check_same_twice


def test_labels_that_differ_each_time_are_refused(caplog):
    """What is drawn for the comparison isn't missing from the run's own draws."""
    labels, images = torch.tensor([[5, 6], [7, -100]]), torch.full((2, 3), torch.nan)

    def masked():
        return {"labels": torch.randint(2**40, (2, 2)), "input_ids": labels}

    def augmented():
        return {"labels": labels, "pixel_values": images + torch.rand(2, 3), "other": torch.tensor(np.random.rand(2))}

    torch.manual_seed(0)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"data_collator=masked .* makes other labels of the same rows each time"):
        check_same_twice(masked, masked)
    check_same_twice(lambda: {"labels": labels, "x": images, "text": ["a"]}, dict)
    assert "same rows" not in caplog.text
    check_same_twice(augmented, augmented)
    assert "makes other other of the same rows" in caplog.text  # NaNs are alike
    assert torch.equal(torch.get_rng_state(), before)
