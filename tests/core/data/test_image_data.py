"""Images: idx files, Hub data sets, digits, and what a model is given of them."""

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from hf_efx.core.data import image_data
from hf_efx.core.data.image_data import ImageCollator, channel_statistics, load_images, read_idx


def write_idx(path: Path, values: np.ndarray) -> None:
    """An idx file by the form's own words: two zeros, type 8, the dimensions, their sizes, the values."""
    head = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    data = head + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six training images of 2 x 3 pixels, all of the value of their number, and two others; three classes."""
    for prefix, count, labels in (("train", 6, [0, 1, 2, 0, 1, 2]), ("t10k", 2, [2, 0])):
        pixels = np.arange(count)[:, None, None] + np.zeros((1, 2, 3))
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", pixels)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.array(labels))
    return tmp_path


@pytest.mark.parametrize("name", ["a-idx3-ubyte", "a-idx3-ubyte.gz"])
def test_idx_by_hand(tmp_path, name):
    data = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 255])
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    read = read_idx(tmp_path / name)
    assert read.dtype == np.uint8 and read.tolist() == [[1, 2, 3], [4, 5, 255]]


@pytest.mark.parametrize(
    "data, words",
    [
        (bytes([0, 0, 8, 1, 0, 0, 0, 3, 1, 2]), "holds 10 bytes, but its header promises 8 and [3] values"),
        (bytes([0, 0, 8, 3, 0, 0]), "its header promises 16"),
        (b"\x89PNG....", "no idx file of unsigned bytes: it begins with 89 50 4e 47"),
        (bytes([0, 0, 13, 1, 0, 0, 0, 0]), "no idx file of unsigned bytes"),  # floats
        (b"", "begins with nothing"),
    ],
)
def test_broken_idx_files_are_refused(tmp_path, data, words):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_idx(tmp_path / "x")
    assert words in str(caught.value)


def test_a_cut_gzip_file_is_refused(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(bytes(1000))[:-10])
    with pytest.raises(ValueError, match="no whole gzip file"):
        read_idx(tmp_path / "x.gz")


def test_an_idx_folder(folder):
    images = load_images(folder)
    assert images.name == folder.name and images.shape == (1, 2, 3) and images.label_names == ["0", "1", "2"]
    train, validation = images.splits["train"], images.splits["validation"]
    assert [row["pixel_values"].tolist() for row in train] == [[i] * 6 for i in range(6)]  # pyright: ignore
    assert list(train["label"]) == [0, 1, 2, 0, 1, 2] and list(validation["label"]) == [2, 0]
    rows = train.__getitems__([4, 1])
    assert [row["pixel_values"][0] for row in rows] == [4, 1] and isinstance(rows[0]["pixel_values"], np.ndarray)


def test_folders_that_do_not_fit_are_refused(folder, tmp_path_factory):
    with pytest.raises(FileNotFoundError, match="holds no"):
        load_images(tmp_path_factory.mktemp("empty"))
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_images("./not-there")
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.zeros(3))
    with pytest.raises(ValueError, match=r"shape \[2, 2, 3\] and .* of shape \[3\] don't belong together"):
        load_images(folder)
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte.gz is missing"):
        load_images(folder)
    (folder / "t10k-images-idx3-ubyte.gz").rename(folder / "extra-images-idx3-ubyte.gz")
    with pytest.raises(ValueError, match="'extra' is no split's name"):
        load_images(folder)


def test_without_a_test_file_equal_images_are_on_one_side(folder):
    for name in ("images-idx3", "labels-idx1"):
        (folder / f"t10k-{name}-ubyte.gz").unlink()
    values = np.arange(200) % 50  # each image four times
    write_idx(folder / "train-images-idx3-ubyte.gz", values[:, None, None] + np.zeros((1, 2, 3)))
    write_idx(folder / "train-labels-idx1-ubyte.gz", values % 2)
    splits = load_images(folder).splits
    seen = {name: {int(row[0]) for row in split["pixel_values"]} for name, split in splits.items()}
    assert not seen["train"] & seen["validation"] and seen["train"] | seen["validation"] == set(range(50))
    assert 4 <= len(seen["validation"]) <= 20  # a fifth of 50
    again = load_images(folder).splits
    assert all(list(splits[name]["label"]) == list(again[name]["label"]) for name in splits)


def test_digits_are_whole_and_need_their_extra(monkeypatch):
    digits = load_images()
    assert digits.splits["train"].num_rows + digits.splits["validation"].num_rows == 1797
    assert digits.shape == (1, 8, 8) and len(digits.label_names) == 10
    pixels = np.asarray(digits.splits["train"]["pixel_values"])
    assert pixels.max() == 255 and pixels.min() == 0  # 16 and 0 in the source
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_efx\[tabular\]'"):
        load_images()


def hub(monkeypatch, images: list[Image.Image], labels: list[int]) -> None:
    features = Features({"img": ImageFeature(), "kind": ClassLabel(names=["cat", "dog"]), "note": Value("string")})
    part = Dataset.from_dict({"img": images, "kind": labels, "note": ["x"] * len(labels)}, features=features)
    monkeypatch.setattr(image_data.datasets, "load_dataset", lambda *_: DatasetDict(train=part, test=part))


def test_a_hub_data_set_with_pil_images(monkeypatch):
    red, black = Image.new("RGB", (2, 2), (255, 0, 0)), Image.new("RGB", (4, 4))
    hub(monkeypatch, [red, black], [1, 0])
    with pytest.raises(ValueError, match="several sizes: give one with --image_size"):
        load_images("user/set", "img", "kind")
    images = load_images("user/set", "img", "kind", image_size=2)
    assert (
        images.shape == (3, 2, 2)
        and images.label_names == ["cat", "dog"]
        and set(images.splits)
        == {
            "train",
            "validation",
        }
    )
    assert images.splits["train"][0]["pixel_values"].tolist() == [255] * 4 + [0] * 8  # channels first
    assert list(images.splits["train"]["label"]) == [1, 0]
    for option, column in (("image_column", "image"), ("label_column", "label")):
        with pytest.raises(ValueError, match=f"has no {option}='{column}'; it has img, kind, note"):
            load_images("user/set", **{"image_column": "img", "label_column": "kind", option: column})


def test_a_grey_hub_data_set_has_one_channel(monkeypatch):
    hub(monkeypatch, [Image.new("L", (2, 1), 7)] * 3, [0, 1, 0])
    images = load_images("user/set", "img", "kind")
    assert images.shape == (1, 1, 2) and images.splits["validation"][2]["pixel_values"].tolist() == [7, 7]


def test_collated_by_hand():
    collator = ImageCollator((1, 1, 2), mean=(0.5,), std=(0.25,), channels=3)
    features = [{"pixel_values": np.array([0, 255]), "label": 4}, {"pixel_values": np.array([51, 102]), "label": 0}]
    batch = collator(features)
    # (0 - .5) / .25, (1 - .5) / .25; 51 / 255 = .2, 102 / 255 = .4; the grey channel three times
    expected = torch.tensor([[-2.0, 2.0], [-1.2, -0.4]]).reshape(2, 1, 1, 2).expand(2, 3, 1, 2)
    torch.testing.assert_close(batch["pixel_values"], expected)
    assert batch["labels"].tolist() == [4, 0] and batch["labels"].dtype == torch.int64
    columns = {"pixel_values": np.array([[0, 255], [51, 102]], np.uint8), "label": np.array([4, 0])}
    assert all(batch[name].equal(value) for name, value in collator.from_columns(columns).items())


def test_resizing_keeps_the_mean_of_a_picture():
    pixels = np.array([[0, 0, 200, 200]] * 4).reshape(-1)
    batch = ImageCollator((1, 4, 4), (0.0,), (1.0,), 1, size=(2, 2))([{"pixel_values": pixels, "label": 0}])
    assert batch["pixel_values"].shape == (1, 1, 2, 2)
    left, right = batch["pixel_values"][0, 0, 0].tolist()
    assert left < 60 / 255 and right > 140 / 255 and left + right == pytest.approx(200 / 255, abs=1e-6)


def test_channel_statistics_by_hand():
    # Two images of two channels and two pixels: channel values 0, 255, 255, 0 and 51 throughout.
    rows = Dataset.from_dict({"pixel_values": [[0, 255, 51, 51], [255, 0, 51, 51]], "label": [0, 1]})
    mean, std = channel_statistics(rows, (2, 1, 2))
    assert mean == pytest.approx((0.5, 0.2)) and std == pytest.approx((0.5, 1e-6))


def test_the_saved_processor_prepares_images_alike(tmp_path):
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    collator = ImageCollator((1, 4, 4), (0.3,), (0.2,), channels=3)
    collator.save_pretrained(tmp_path)
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    processor = ViTImageProcessorPil.from_pretrained(tmp_path)
    seen = processor(Image.fromarray(pixels).convert("RGB"), return_tensors="pt")["pixel_values"]
    ours = collator([{"pixel_values": pixels.reshape(-1), "label": 0}])["pixel_values"]
    torch.testing.assert_close(seen, ours, atol=1e-5, rtol=1e-5)
