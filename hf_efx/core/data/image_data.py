"""Images for classification: idx folders (MNIST's form), data sets on the Hub, scikit-learn's digits.

Pixels are kept as bytes in one Arrow column of fixed length, [channels * height * width]: a batch of a few hundred is
drawn in milliseconds, eight times as fast as from an `Array3D` column. `ImageCollator` makes float tensors of them.
No torchvision; PIL only where a Hub data set holds PIL images.
"""

import gzip
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets.table import InMemoryTable

from hf_efx.core.files import write_atomically

# Share of the images that is held out where a source brings no split of its own: small sets need a large one.
VALIDATION_SHARE = 0.2
_IDX_SPLITS = {"train": "train", "t10k": "validation", "test": "validation", "validation": "validation"}
_UNSIGNED_BYTE = 8  # idx' code of the one type that images and labels have


@dataclass(frozen=True)
class ImageData:
    """Images by split, and what their bytes mean.

    Attributes:
        name: What results and cards call it.
        splits: `train` and `validation`, with `pixel_values` (bytes, [channels * height * width]) and `label`; rows
            come as numpy arrays.
        shape: Channels, height, width.
        label_names: The classes.
    """

    name: str
    splits: DatasetDict
    shape: tuple[int, int, int]
    label_names: list[str]


def load_images(
    source: str | os.PathLike[str] | None = None,
    image_column: str = "image",
    label_column: str = "label",
    image_size: int | None = None,
) -> ImageData:
    """Loads labelled images as `train` and `validation`.

    Args:
        source: None for scikit-learn's 1,797 digits of 8 x 8 pixels; a folder of idx files (`train-images-idx3-ubyte`,
            `train-labels-idx1-ubyte`, `t10k-...`, also as .gz); else a data set on the Hub, `"name"` or
            `"name:config"`.
        image_column: Where a Hub data set holds the images.
        label_column: Where it holds the labels.
        image_size: Side in pixels to which a Hub data set's images are resized. Without it they must be of one size.

    Raises:
        FileNotFoundError: If the source isn't there.
        ImportError: If an extra is missing; it is named.
        ValueError: If the files are broken, don't belong together, or a column is missing.
    """
    if source is None:
        return _digits()
    path = Path(source).expanduser()
    if path.is_dir():
        return _idx_folder(path)
    source = os.fspath(source)
    if path.exists() or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"dataset={source!r}: there is no such folder of idx files")
    return _hub_images(source, image_column, label_column, image_size)


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an idx file of unsigned bytes, gzipped or not: two zeros, the type, the number of dimensions, then each
    dimension's size as a big-endian uint32, then the values (the form is described at the MNIST files' origin).

    Returns:
        uint8 of the dimensions that the file names.

    Raises:
        ValueError: If it is no such file, or cut.
    """
    path = Path(path)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no whole gzip file: {error}") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != _UNSIGNED_BYTE:
        raise ValueError(f"{path} is no idx file of unsigned bytes: it begins with {data[:4].hex(' ') or 'nothing'}")
    start = 4 + 4 * data[3]
    shape = np.frombuffer(data, ">u4", data[3], 4).tolist() if len(data) >= start else []
    if len(data) < start or len(data) - start != int(np.prod(shape)):
        raise ValueError(f"{path} holds {len(data)} bytes, but its header promises {start} and {shape} values: cut?")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _idx_folder(folder: Path) -> ImageData:
    """All pairs of images and labels in a folder."""
    images = {name.name.split("-")[0]: name for name in sorted(folder.glob("*-images*idx3*"))}
    if not images:
        raise FileNotFoundError(f"dataset={str(folder)!r}: the folder holds no *-images-idx3-ubyte[.gz]")
    if unknown := set(images) - set(_IDX_SPLITS):
        raise ValueError(f"dataset={str(folder)!r}: {unknown.pop()!r} is no split's name; there are {[*_IDX_SPLITS]}")
    parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for prefix, file in images.items():
        labels = file.with_name(file.name.replace("images", "labels").replace("idx3", "idx1"))
        if not labels.exists():
            raise FileNotFoundError(f"dataset={str(folder)!r}: {labels.name} is missing beside {file.name}")
        pixels, classes = read_idx(file), read_idx(labels)
        if pixels.ndim != 3 or classes.shape != pixels.shape[:1]:
            raise ValueError(
                f"{file.name} of shape {list(pixels.shape)} and {labels.name} of shape {list(classes.shape)} don't "
                f"belong together: expected [n, height, width] and [n]"
            )
        parts[_IDX_SPLITS[prefix]] = (pixels[:, None], classes)
    classes = max(int(labels.max()) for _, labels in parts.values()) + 1
    return _image_data(folder.resolve().name, parts, [str(i) for i in range(classes)])


def _digits() -> ImageData:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "without a dataset images are scikit-learn's digits: install it with pip install 'hf_efx[tabular]', or "
            "name a folder or a Hub data set with --dataset."
        ) from error
    digits: Any = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)[:, None]  # values are 0 to 16
    return _image_data("scikit-learn digits", {"train": (pixels, digits.target)}, [str(i) for i in range(10)])


def _hub_images(source: str, image_column: str, label_column: str, image_size: int | None) -> ImageData:
    name, _, config = source.partition(":")
    try:
        parts = dict(datasets.load_dataset(name, config or None))
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(f"dataset={source!r} is no folder here, and the Hub says: {error}") from error
    if "train" not in parts:
        raise ValueError(f"dataset={source!r} has no 'train' split, only {sorted(map(str, parts))}")
    train: Any = parts["train"]
    for option, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in train.column_names:
            raise ValueError(f"dataset={source!r} has no {option}={column!r}; it has {', '.join(train.column_names)}")
    feature = train.features[label_column]
    names = feature.names if isinstance(feature, ClassLabel) else None
    held_out: Any = next((parts[key] for key in ("validation", "test") if key in parts), None)
    arrays = {}
    for split, part in {"train": train, "validation": held_out}.items():
        if part is not None:
            arrays[split] = (_decoded(part[image_column], image_size, image_column), np.asarray(part[label_column]))
    if names is None:
        names = [str(value) for value in range(int(max(labels.max() for _, labels in arrays.values())) + 1)]
    return _image_data(source, arrays, names)


def _decoded(images: Sequence[Any], image_size: int | None, column: str) -> np.ndarray:
    """PIL images as bytes [n, channels, height, width]: grey ones have one channel, all others three."""
    grey = images[0].mode in ("1", "L", "I", "I;16")
    size = (image_size, image_size) if image_size else images[0].size
    result = np.empty((len(images), 1 if grey else 3, size[1], size[0]), np.uint8)
    for row, image in zip(result, images, strict=True):
        if image_size is None and image.size != size:
            raise ValueError(f"image_column={column!r} holds images of several sizes: give one with --image_size")
        image = image.convert("L" if grey else "RGB")
        pixels = np.asarray(image if image.size == size else image.resize(size))
        row[:] = pixels[None] if grey else pixels.transpose(2, 0, 1)
    return result


def _image_data(name: str, parts: dict[str, tuple[np.ndarray, np.ndarray]], label_names: list[str]) -> ImageData:
    """Puts arrays [n, channels, height, width] and [n] into Arrow, and cuts a validation split where there is none."""
    shape = parts["train"][0].shape[1:]
    if wrong := [split for split, (pixels, _) in parts.items() if pixels.shape[1:] != shape]:
        raise ValueError(f"dataset={name!r}: images of {wrong[0]!r} have another shape than {list(shape)}")
    if "validation" not in parts:
        pixels, labels = parts["train"]
        digests = [hashlib.sha256(image.tobytes()).digest() for image in pixels]  # equal images: the same side
        places = np.array([int.from_bytes(digest[:8], "big") / 2**64 for digest in digests])
        inside = places < VALIDATION_SHARE
        parts = {"train": (pixels[~inside], labels[~inside]), "validation": (pixels[inside], labels[inside])}
    length = int(np.prod(shape))
    features = Features(
        {"pixel_values": datasets.List(Value("uint8"), length=length), "label": ClassLabel(names=label_names)}
    )
    splits = {}
    for split, (pixels, labels) in sorted(parts.items()):  # train first
        rows = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(pixels).reshape(-1)), length)
        table = pa.table({"pixel_values": rows, "label": pa.array(labels.astype(np.int64))})
        splits[split] = Dataset(InMemoryTable(table.cast(features.arrow_schema))).with_format("numpy")
    return ImageData(name, DatasetDict(splits), (shape[0], shape[1], shape[2]), label_names)


@dataclass(frozen=True)
class ImageCollator:
    """Batches rows of `ImageData` for a classifier: float32 `pixel_values` [n, channels, h, w] and `labels` [n].

    Attributes:
        shape: Channels, height, width of the rows.
        mean: Of a channel's values in [0, 1], subtracted.
        std: Likewise, divided by.
        channels: How many the model takes; one grey channel is repeated.
        size: Height and width that the model takes, if not the rows' own: bilinear.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int
    size: tuple[int, int] | None = None

    @property
    def model_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what comes out."""
        height, width = self.size or self.shape[1:]
        return self.channels, height, width

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return self.from_columns({name: np.stack([f[name] for f in features]) for name in ("pixel_values", "label")})

    def from_columns(self, columns: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Batches rows that come by column: `pixel_values` [n, channels * height * width] and `label` [n]."""
        pixels = torch.from_numpy(columns["pixel_values"].astype(np.float32)).reshape(-1, *self.shape) / 255
        if self.size is not None and self.size != self.shape[1:]:
            pixels = F.interpolate(pixels, self.size, mode="bilinear", align_corners=False, antialias=True)
        mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (self.mean, self.std))
        pixels = (pixels.expand(-1, self.channels, -1, -1) - mean) / std
        return {"pixel_values": pixels, "labels": torch.from_numpy(columns["label"].astype(np.int64))}

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `preprocessor_config.json`, from which `AutoImageProcessor` prepares images in the same way."""
        _, height, width = self.model_shape
        repeat = self.channels // len(self.mean)
        settings = {
            "image_processor_type": "ViTImageProcessor",  # transformers' plain one: resize, rescale, normalise
            "do_resize": True,
            "size": {"height": height, "width": width},
            "resample": 2,  # bilinear
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean) * repeat,
            "image_std": list(self.std) * repeat,
        }
        write_atomically(Path(folder, "preprocessor_config.json"), json.dumps(settings, indent=2) + "\n")


def channel_statistics(train: Dataset, shape: tuple[int, int, int]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel's values in [0, 1], over a split's images."""
    count, total, squares = 0, np.zeros(shape[0]), np.zeros(shape[0])
    for batch in train.select_columns("pixel_values").with_format("numpy").iter(4096):
        values = np.asarray(batch["pixel_values"]).reshape(-1, shape[0], shape[1] * shape[2]) / 255  # type: ignore[index]
        count += len(values) * shape[1] * shape[2]
        total, squares = total + values.sum((0, 2)), squares + np.square(values).sum((0, 2))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
    return tuple(mean.tolist()), tuple(std.tolist())
