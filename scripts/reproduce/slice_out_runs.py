"""One run of the SliceOut study: the data, the two small models, the peers, and training under transformers' Trainer.

Each run trains on one thread. Its seconds are CPU seconds of its process inside the training loop, evaluation left
out: other processes on the machine hardly change them.
"""

import functools
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from selection_runs import clock_and_curve, quiet
from study_jobs import Job
from torch import nn

IMAGES, TESTED = 2000, 4000
BLOCK, BLOCKS, EVALUATION_BLOCKS, VOCABULARY = 128, 200, 64, 1024
BATCHES = {"cnn": 64, "lm": 8}
LM: dict[str, Any] = {"n_layer": 2, "n_embd": 192, "n_head": 8, "n_positions": BLOCK}
RATES, WARMUP = {"cnn": 1e-3, "lm": 2e-3}, 0.06  # of learning; share of the steps


class ConvBlock(nn.Module):
    """Two convolutions: the channels between them are what is dropped."""

    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(inputs, hidden, 3, padding=1, bias=False)
        self.expand_norm = nn.BatchNorm2d(hidden)
        self.reduce = nn.Conv2d(hidden, outputs, 3, stride, padding=1, bias=False)
        self.reduce_norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, inputs, h, w] -> [n, outputs, h / stride, w / stride]."""
        hidden = self.expand_norm(self.expand(x)).relu()
        return self.reduce_norm(self.reduce(hidden)).relu()


class ConvNet(nn.Module):
    """A stem, two blocks of two convolutions, and a hidden layer."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(shape[0], 16, 3, 2, padding=1)
        self.blocks = nn.Sequential(ConvBlock(16, 64, 32, 2), ConvBlock(32, 64, 32, 1))
        side = -(-shape[1] // 4), -(-shape[2] // 4)
        self.fc1, self.fc2 = nn.Linear(32 * side[0] * side[1], 256), nn.Linear(256, classes)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Logits [n, classes], and the mean cross-entropy where there are labels."""
        x = self.blocks(self.stem(pixel_values).relu())
        logits = self.fc2(self.fc1(x.flatten(1)).relu())
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def cnn_blocks() -> list[Any]:
    """How a model of one's own names its blocks."""
    from hf_efx.slice_out import Block

    return [
        Block("conv", emits=["expand"], norms=["expand_norm"], reads=["reduce"]),
        Block("mlp", emits=["fc1"], reads=["fc2"]),
    ]


@dataclass(frozen=True)
class Configuration:
    """How a run regularises.

    Attributes:
        kind: "none", "dropout", "channels", "layers", "own", or "slice_out".
        rate: Share that is dropped.
        targets: Kinds of blocks; None for all.
        options: Of SliceOutConfig; in the place of `final_dense_steps` a share of all steps, `final_dense`.
    """

    kind: str = "none"
    rate: float = 0.25
    targets: tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def put_dropout(model: nn.Module, kind: str, rate: float, rows: Any) -> None:
    """Drops single features ("dropout") or whole channels ("channels") of what each block's readers read."""
    from hf_efx.core.model.block_map import find_blocks

    for block in find_blocks(model, rows):
        drop = F.dropout2d if kind == "channels" and block.block.kind == "conv" else F.dropout
        for name in map(block.path, block.block.reads):
            model.get_submodule(name).register_forward_pre_hook(functools.partial(_drop_inputs, drop, rate))


def _drop_inputs(drop: Callable[..., torch.Tensor], rate: float, module: nn.Module, args: tuple[Any, ...]) -> Any:
    return drop(args[0], rate, module.training), *args[1:]


def put_layerdrop(layers: nn.ModuleList, rate: float) -> None:
    """Skips whole layers in training, each with this probability (Fan et al. 2019); none in evaluation."""

    def skipping(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            skip = layer.training and float(torch.rand(())) < rate
            return hidden_states if skip else forward(hidden_states, *args, **kwargs)

        return run

    for layer in layers:
        layer.forward = skipping(layer, layer.forward)


def new_model(part: str, configuration: Configuration, seed: int, steps: int, data: Mapping[str, Any]) -> nn.Module:
    """A new model of a seed, regularised as a configuration says."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from hf_efx import get_efx_model
    from hf_efx.core.model.block_map import block_map
    from hf_efx.slice_out import SliceOutConfig

    kind, rate = configuration.kind, configuration.rate
    torch.manual_seed(seed)
    if part == "cnn":
        model: Any = ConvNet(data["pixels"].shape[1:], int(data["labels"].max()) + 1)
        rows = cnn_blocks()
    else:
        own = rate if kind.startswith("own") else 0.0
        dropouts: Any = {"resid_pdrop": own, "attn_pdrop": own if kind == "own" else 0.0, "embd_pdrop": 0.0}
        sizes: Any = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(**LM, **sizes, **dropouts))
        rows = block_map(model).blocks
    if kind in ("dropout", "channels"):
        put_dropout(model, kind, rate, rows)
    elif kind == "layers":
        put_layerdrop(model.transformer.h, rate)
    elif kind == "slice_out":
        options = dict(configuration.options)
        if "final_dense" in options:
            options["final_dense_steps"] = round(options.pop("final_dense") * steps)
        if configuration.targets:
            options["targets"] = configuration.targets
        if part == "cnn":
            options["blocks"] = rows
        model = get_efx_model(model, SliceOutConfig(rate=rate, **options))
    return model


class Rows(torch.utils.data.Dataset):
    """Tensors of equal length, drawn a batch at a time."""

    def __init__(self, **columns: torch.Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitems__(self, places: list[int]) -> dict[str, torch.Tensor]:
        """The rows of a batch, collated."""
        chosen = torch.tensor(places)
        return {name: column[chosen] for name, column in self.columns.items()}


def prepare(
    images: str | None,
    text: str | None,
    folder: Path,
    parts: Sequence[str],
    *,
    images_kept: int = IMAGES,
    blocks_kept: int = BLOCKS,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Writes the arrays that all runs read; returns their sources' names and fingerprints, and their lengths."""
    from hf_efx.core.data.image_data import load_images
    from hf_efx.core.data.text_data import (
        content_fingerprint,
        load_text,
        source_name,
        tokenize_blocks,
        train_tokenizer,
    )

    names, prints, sizes = [], [], {}
    if "cnn" in parts:
        loaded = load_images(images)
        chosen = {"train": images_kept, "validation": TESTED}
        splits = {
            k: loaded.splits[k].shuffle(seed=0).select(range(min(n, len(loaded.splits[k])))) for k, n in chosen.items()
        }
        pixels = {
            k: np.asarray(v["pixel_values"][:], np.float32).reshape(-1, *loaded.shape) for k, v in splits.items()
        }
        mean, std = pixels["train"].mean(), pixels["train"].std()
        np.savez(
            folder / "cnn.npz",
            pixels=(pixels["train"] - mean) / std,
            labels=np.asarray(splits["train"]["label"][:]),
            test_pixels=(pixels["validation"] - mean) / std,
            test_labels=np.asarray(splits["validation"]["label"][:]),
        )
        names.append(f"{len(pixels['train']):,} images of {loaded.name}")
        prints.append(content_fingerprint(splits["train"]))
        sizes["cnn"] = len(pixels["train"])
    if "lm" in parts:
        parts_of_text = load_text(text)
        most = min(30 * blocks_kept, len(parts_of_text["train"]))  # more than the blocks take
        paragraphs = parts_of_text["train"].shuffle(seed=0).select(range(most))
        tokenizer = train_tokenizer(paragraphs, VOCABULARY)
        blocks = np.asarray(
            tokenize_blocks(paragraphs, tokenizer, BLOCK).with_format("numpy")["input_ids"][:blocks_kept]
        )
        held_out = tokenize_blocks(parts_of_text["validation"].shuffle(seed=0), tokenizer, BLOCK)
        tested = np.asarray(held_out.with_format("numpy")["input_ids"][:EVALUATION_BLOCKS])
        np.savez(folder / "lm.npz", tokens=blocks.astype(np.int64), test_tokens=tested.astype(np.int64))
        names.append(f"{blocks.size:,} tokens of {source_name(text)}")
        prints.append(content_fingerprint(paragraphs))
        sizes["lm"] = len(blocks)
    return {"name": ", ".join(names), "fingerprint": " ".join(prints)}, sizes


def evaluation(part: str, data: Mapping[str, Any]) -> Callable[[nn.Module], float]:
    """A model's accuracy on test images, or its perplexity on held-out text; the model stays in its mode."""

    def evaluate(model: Any) -> float:
        training = model.training
        model.eval()
        with torch.no_grad():
            if part != "lm":
                logits = torch.cat([model(x)["logits"] for x in data["test_pixels"].split(500)])
                figure = float((logits.argmax(1) == data["test_labels"]).float().mean())
            else:
                losses = [model(input_ids=x, labels=x).loss for x in data["test_tokens"].split(16)]
                figure = math.exp(float(torch.stack(losses).mean()))
        model.train(training)
        return figure

    return evaluate


def dataset(part: str, data: Mapping[str, Any]) -> Rows:
    """The training data under the names that the models take."""
    if part == "lm":
        return Rows(input_ids=data["tokens"], labels=data["tokens"])
    return Rows(pixel_values=data["pixels"], labels=data["labels"])


def load(part: str, folder: str) -> dict[str, Any]:
    """The arrays that `prepare` wrote, as tensors; for a process of one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with np.load(Path(folder, f"{part}.npz")) as arrays:
        return {name: torch.from_numpy(values) for name, values in arrays.items()}


def fit(
    model: nn.Module, rows: Rows, watch: Any, seed: int, steps: int, callbacks: list[Any], **options: Any
) -> float:
    """Trains under transformers' Trainer, without weight decay; returns the last logged training loss.

    Args:
        model: It takes a batch of `rows` by name.
        rows: The training data.
        watch: Of `clock_and_curve`; its clock starts here.
        seed: Of the order.
        steps: Optimizer steps.
        callbacks: Before the watch.
        **options: Of TrainingArguments.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as output:
        args = transformers.TrainingArguments(
            output,
            max_steps=steps,
            weight_decay=0.0,
            save_strategy="no",
            remove_unused_columns=False,
            dataloader_drop_last=True,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
            data_seed=seed,
            **options,
        )
        collate = cast(Any, lambda batch: batch)  # the rows come as whole batches
        trainer = transformers.Trainer(
            model, args, train_dataset=rows, data_collator=collate, callbacks=[*callbacks, watch]
        )
        watch.start = time.process_time()
        quiet(trainer).train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log][-1]


def run(job: Job, queue: Any, folder: str, evaluations: int, **_: Any) -> dict[str, Any]:
    """Trains one configuration in this process, on one thread, and returns its row."""
    from hf_efx.slice_out import SliceOutCallback

    part = job.configuration.partition(": ")[0]
    configuration: Configuration = job.options["configuration"]
    data = load(part, folder)
    model = new_model(part, configuration, job.seed, job.steps, data)
    every = max(job.steps // evaluations, 1)
    watch = clock_and_curve(evaluation(part, data), every, queue)
    loss = fit(
        model,
        dataset(part, data),
        watch,
        job.seed,
        job.steps,
        [SliceOutCallback(measure_time=False)] if configuration.kind == "slice_out" else [],
        learning_rate=RATES[part],
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=round(WARMUP * job.steps),
        per_device_train_batch_size=BATCHES[part],
        logging_steps=every,
    )
    return {"steps": job.steps, "seconds": watch.curve[-1][1], "training_loss": loss, "curve": watch.curve}
