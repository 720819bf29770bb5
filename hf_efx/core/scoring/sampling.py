"""Samples of a model's predictions and generations with dropout on (MC dropout), each by itself the same in any batch.

Gal and Ghahramani 2016, arXiv 1506.02142, for predictions; Xiao, Gomez and Gal 2020, arXiv 2006.08344, for generated
sequences.
"""

import logging
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import GenerationConfig

from hf_efx.core.model.wrappers import unwrap_model
from hf_efx.core.scoring.batches import align_left, batch_size, take_rows, trim_padding
from hf_efx.core.scoring.decoding import (
    Decoded,
    decode_rows,
    drawn_tokens,
    generation_config,
    generation_inputs,
    reads_padding,
)
from hf_efx.core.scoring.keyed_dropout import KeyedDropout, row_keys
from hf_efx.core.scoring.scoring_state import base_model, scoring_state

logger = logging.getLogger(__name__)

Masks = Literal["position", "sequence"]
_FORWARD_ROWS = 160  # rows of one pass of `sample_forward`, where the batch itself isn't longer
_said: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class Samples:
    """Generations of n inputs, several each: `samples.texts[i][j]` is the j-th of the i-th input.

    Attributes:
        sequences: [n][num_samples] lists of token ids, without padding, end, decoder start and forced first token; of
            a decoder-only model the continuation alone.
        texts: [n][num_samples] decoded texts; None without a tokenizer.
        log_probs: [n][num_samples] sums of the drawn tokens' log-probabilities under the masked model, before
            temperature and other processors; the end token's is among them, those of forced tokens aren't.
        lengths: [n][num_samples] numbers of tokens that `log_probs` sums over, the end token included.
    """

    sequences: list[list[list[int]]]
    texts: list[list[str]] | None
    log_probs: list[list[float]]
    lengths: list[list[int]]


@contextmanager
def dropout_active(model: nn.Module, sites: str | Sequence[str] | None = None) -> Iterator[None]:
    """Dropout on, all else as in eval, and everything back afterwards.

    LayerDrop, stochastic depth, SpecAugment and routers' noise stay off, batch statistics as they are; see
    `scoring_state`. Masks come from torch's generator, whose state is put back too: draw several samples in one block.

    Args:
        model: Any module, wrappers (compile, DataParallel, DistributedDataParallel) included: call what is inside.
        sites: The modules whose dropouts are on: names, or ends or parts of names, that choose all inside ("encoder",
            "decoder.layers.0", "self_attn"), or one regular expression over whole names. Functional dropout goes by
            the module whose forward calls it. None are all of them, [] none.

    Raises:
        ValueError: If no dropout has a rate above 0, an entry matches no module, or a part of the model is compiled.
    """
    inner = _uncompiled(model)
    chosen = _chosen(inner, sites)
    compiled = [(m, m._compiled_call_impl) for m in inner.modules() if vars(m).get("_compiled_call_impl") is not None]
    with scoring_state(inner, "dropout"):
        for name, module in inner.named_modules():
            module.training = module.training and (chosen is None or name in chosen)
        if chosen is None or chosen:
            _check_rates(inner)
        try:
            for module, _ in compiled:
                module._compiled_call_impl = None  # pyright: ignore[reportAttributeAccessIssue]
            yield
        finally:
            for module, call in compiled:
                module._compiled_call_impl = call  # pyright: ignore[reportAttributeAccessIssue]


def sample_forward(
    model: nn.Module,
    batch: Mapping[str, Any],
    num_samples: int = 10,
    *,
    seed: int = 0,
    ids: Sequence[int] | torch.Tensor | None = None,
    masks: Masks = "position",
    sites: str | Sequence[str] | None = None,
) -> torch.Tensor:
    """Logits of several passes with dropout, whose masks depend on seed, example id, sample and place alone.

    Args:
        model: A transformers model, or a module that returns logits or a tuple that begins with them.
        batch: What the model takes, rows first. Labels are left out, but where a seq2seq model makes the decoder's
            inputs of them.
        num_samples: Passes of each row, at least 2.
        seed: With `ids` what the masks are made of.
        ids: [n] integers, the examples' own; None numbers the rows, so that a row's masks go by its place.
        masks: As in `KeyedDropout`.
        sites: As in `dropout_active`.

    Returns:
        Logits [num_samples, n, ...].

    Raises:
        ValueError: As `dropout_active` and `KeyedDropout`; fewer than 2 samples; samples that agree bit for bit.
    """
    n = batch_size(batch)
    _check_numbers(num_samples, _FORWARD_ROWS)
    identities = _as_ids(ids, n)
    with dropout_active(model, sites):
        inner = _uncompiled(model)
        inputs = _forward_inputs(inner, batch)
        step = max(1, min(num_samples, _FORWARD_ROWS // n))
        parts = []
        with KeyedDropout(inner, masks) as keyed:
            for start in range(0, num_samples, step):
                samples = torch.arange(start, min(start + step, num_samples)).repeat_interleave(n)
                rows = torch.arange(n).repeat(len(samples) // n)
                chunk = take_rows(inputs, rows)
                keyed.set_rows(row_keys(seed, identities[rows], samples), _padding(chunk))
                outputs = inner(**chunk)
                outputs = outputs["logits"] if isinstance(outputs, Mapping) else outputs
                logits = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
                parts.append(logits.unflatten(0, (-1, n)))
        logits = torch.cat(parts)
        if all(torch.equal(logits[0], other) for other in logits[1:]):
            raise ValueError(_no_dropout(inner, f"{num_samples} passes agree bit for bit"))
    return logits


def sample_generate(
    model: Any,
    inputs: Mapping[str, Any] | torch.Tensor,
    num_samples: int = 10,
    *,
    seed: int = 0,
    ids: Sequence[int] | torch.Tensor | None = None,
    masks: Masks = "position",
    tokenizer: Any = None,
    max_batch_rows: int = 160,
    sites: str | Sequence[str] | None = None,
    **generate_kwargs: Any,
) -> Samples:
    """Generates several sequences for each input, each with dropout masks of its own from the encoder on.

    A sample depends on the seed, the input's id and its number among the samples, not on the batch, its order or
    `max_batch_rows`; what floating-point rounding decides (a near tie) may differ between batches. Samples are greedy,
    whatever the model's generation config says, unless `num_beams` or `do_sample=True` is given; a token's draw is
    keyed as the masks are.

    Args:
        model: A transformers model that generates.
        inputs: What the tokenizer gives, or `input_ids` [n, seq]: a pad token is then masked where it isn't the end
            token too. Decoder-only models are padded on the left; padding on the right is moved there.
        num_samples: Of each input, at least 2.
        seed: With `ids` what the masks are made of.
        ids: [n] integers, the examples' own; None numbers the rows, so that a row's masks go by its place.
        masks: As in `KeyedDropout`.
        tokenizer: Decodes the texts.
        max_batch_rows: Most rows of one forward pass, beams included.
        sites: As in `dropout_active`; [] with `do_sample=True` draws by temperature alone.
        **generate_kwargs: As `generate` takes them. Limit decoder-only models by `max_new_tokens`: `max_length` counts
            the batch's padding.

    Returns:
        The samples, on the CPU.

    Raises:
        ValueError: As `dropout_active` and `KeyedDropout`; fewer than 2 samples; `num_return_sequences`; samples that
            can't differ, or agree bit for bit; a decoder-only model without an end token or limited by columns.
    """
    _check_numbers(num_samples, max_batch_rows)
    inner = _uncompiled(model)
    config, kwargs = _config(inner, sites, generate_kwargs, tokenizer)
    source = generation_inputs(inner, inputs, config)
    n = batch_size(source)
    identities, lengths = _as_ids(ids, n), _source_lengths(source)
    rows = lengths.argsort(descending=True, stable=True).repeat_interleave(num_samples)
    samples = torch.arange(num_samples).repeat(n)
    results = _Results(inner, config, n, num_samples)
    with dropout_active(model, sites), KeyedDropout(inner, masks) as keyed:
        for chunk in _chunks(lengths[rows], max(1, max_batch_rows // config.num_beams), reads_padding(config)):
            part = trim_padding(take_rows(source, rows[chunk]))
            keys = row_keys(seed, identities[rows[chunk]], samples[chunk])
            keyed.set_rows(keys.to(inner.device), _padding(part))
            decoded = decode_rows(inner, part, config, keyed, tokenizer, kwargs)
            results.add(rows[chunk], samples[chunk], decoded, differ=sites is None or len(sites) > 0)
    return results.samples(tokenizer)


def check_sampling(
    model: Any, masks: Masks, sites: str | Sequence[str] | None, tokenizer: Any, **generate_kwargs: Any
) -> GenerationConfig:
    """The generation config of `sample_generate`'s samples; raises, without a call of the model, what that would."""
    inner = _uncompiled(model)
    config, _ = _config(inner, sites, generate_kwargs, tokenizer)
    with dropout_active(model, sites):
        KeyedDropout(inner, masks)
    return config


def _config(model: Any, sites: Any, given: Mapping[str, Any], tokenizer: Any) -> tuple[GenerationConfig, Any]:
    config, kwargs = generation_config(model, given, tokenizer)
    if sites is not None and not len(sites) and not config.do_sample:
        raise ValueError("sites=[] turns all dropout off, and samples would agree: give do_sample=True, or sites")
    return config, kwargs


class _Results:
    """Gathers what the calls generated, row by row, and looks whether dropout acted in the first input's samples."""

    def __init__(self, model: Any, config: GenerationConfig, n: int, num_samples: int) -> None:
        self.model, self.config = model, config
        self.sequences: list[list[list[int]]] = [[[] for _ in range(num_samples)] for _ in range(n)]
        self.log_probs = [[0.0] * num_samples for _ in range(n)]
        self.lengths = [[0] * num_samples for _ in range(n)]
        self.first: list[torch.Tensor] | None = []
        self.begun = -1

    def add(self, rows: torch.Tensor, samples: torch.Tensor, decoded: Decoded, differ: bool) -> None:
        """Takes the samples [k] of the inputs [k] out of what one call generated."""
        if differ and self.first is not None:
            self._check(rows, decoded.first_logits)
        counted, ends, skip = drawn_tokens(self.model, self.config, decoded.tokens, decoded.prompt)
        sums = (decoded.log_probs.double() * counted).sum(1).tolist()
        tokens, lengths = decoded.tokens.tolist(), counted.sum(1).tolist()
        for at, (row, sample) in enumerate(zip(rows.tolist(), samples.tolist(), strict=True)):
            self.sequences[row][sample] = tokens[at][skip[at] : ends[at]]
            self.log_probs[row][sample], self.lengths[row][sample] = sums[at], lengths[at]

    def _check(self, rows: torch.Tensor, first_logits: torch.Tensor) -> None:
        """Raises if the first step's logits [k, vocabulary] are the same in all samples of the first input."""
        assert self.first is not None
        self.begun = self.begun if self.first else int(rows[0])
        self.first += list(first_logits[(rows == self.begun).to(first_logits.device)])
        if any(not torch.equal(self.first[0], other) for other in self.first[1:]):
            self.first = None
        elif len(self.first) == len(self.lengths[0]):
            raise ValueError(_no_dropout(self.model, f"{len(self.first)} samples agree bit for bit"))

    def samples(self, tokenizer: Any) -> Samples:
        """All of them, decoded if there is a tokenizer."""
        texts = None
        if tokenizer is not None:
            texts = [tokenizer.batch_decode(row, skip_special_tokens=True) for row in self.sequences]
        return Samples(self.sequences, texts, self.log_probs, self.lengths)


def _source_lengths(source: Mapping[str, Any]) -> torch.Tensor:
    """Tokens [n] of each input, on the CPU; zeros where there is no mask."""
    mask = source.get("attention_mask")
    return torch.zeros(batch_size(source), dtype=torch.int64) if mask is None else (mask != 0).sum(1).cpu()


def _chunks(lengths: torch.Tensor, most: int, by_length: bool) -> Iterator[slice]:
    """Rows of one call each: at most that many, and of one length if asked for."""
    start = 0
    for stop in range(1, len(lengths) + 1):
        split = stop < len(lengths) and by_length and bool(lengths[stop] != lengths[start])
        if stop - start == most or stop == len(lengths) or split:
            yield slice(start, stop)
            start = stop


def _forward_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a forward takes of a batch, on the model's device."""
    base = base_model(model)
    inputs = dict(batch)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        apart = {k: v for k, v in batch.items() if k == "labels" or k.startswith("decoder_")}
        inputs = {**align_left({k: v for k, v in batch.items() if k not in apart})[0], **apart}
        if not any(name.startswith("decoder_input") for name in apart):
            apart = {}  # the decoder's inputs come of the labels
        inputs = {k: v for k, v in inputs.items() if k != "labels" or not apart}
    else:
        inputs.pop("labels", None)
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def _padding(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Columns [n] before each row's first token; None where there are none."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or bool((mask[:, 0] != 0).all()):
        return None
    return (mask != 0).to(torch.uint8).argmax(1)


def _as_ids(ids: Any, n: int) -> torch.Tensor:
    """Ids [n] int64 on the CPU."""
    if ids is None:
        return torch.arange(n)
    identities = torch.as_tensor(ids).cpu()
    if identities.shape != (n,) or identities.is_floating_point() or identities.dtype == torch.bool:
        raise ValueError(
            f"ids of shape {list(identities.shape)}, {identities.dtype}: give one integer for each of {n} rows"
        )
    return identities.long()


def _check_numbers(num_samples: int, max_batch_rows: int) -> None:
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 2:
        raise ValueError(f"num_samples={num_samples!r}: give 2 or more, since one sample has nothing to differ from")
    if not isinstance(max_batch_rows, int) or max_batch_rows < 1:
        raise ValueError(f"max_batch_rows={max_batch_rows!r}: give 1 or more")


def _uncompiled(model: nn.Module) -> Any:
    """The model inside its wrappers; says once where it was compiled."""
    inner = unwrap_model(model)
    if inner is not model and inner not in _said:
        logger.warning(
            "%s is sampled outside its wrappers, %s, which would hide its dropout",
            type(inner).__name__,
            type(model).__name__,
        )
        _said.add(inner)
    if any(type(module).__name__ == "OptimizedModule" for module in inner.modules()):
        raise ValueError(
            f"a part of {type(inner).__name__} is compiled, which hides its dropout: compile it as a whole"
        )
    return inner


def _chosen(model: nn.Module, sites: str | Sequence[str] | None) -> set[str] | None:
    """Names of the modules that `dropout_active` names."""
    if sites is None:
        return None
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(sites, str):
        found = {entry: [name for name in names if re.fullmatch(entry, name)] for entry in (sites,)}
    else:
        found = {entry: [name for name in names if f".{entry}." in f".{name}."] for entry in sites}
    for entry, matched in found.items():
        if not matched:
            raise ValueError(
                f"sites: {entry!r} matches no module of {type(model).__name__}, such as {names[len(names) // 2]!r}"
            )
    return {name for matched in found.values() for name in matched}


def _check_rates(model: nn.Module) -> None:
    """Raises if no module that is on has a dropout rate above 0, nor the config."""
    for module in model.modules():
        if not module.training:
            continue
        if isinstance(module, _DropoutNd) and module.p > 0:
            return
        if any("drop" in name and _is_rate(value) for name, value in vars(module).items()):
            return
    if not any(_is_rate(value) for value in _rate_fields(model).values()):
        raise ValueError(_no_dropout(model, "no dropout has a rate above 0"))


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _rate_fields(model: nn.Module) -> dict[str, Any]:
    """The config's fields, its parts' too, that hold rates of dropout, but for layers and paths that are dropped."""
    config = getattr(base_model(model), "config", None)
    found: dict[str, Any] = {}

    def collect(values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                collect(value)
            elif "dropout" in (name := str(name)) or name.endswith("pdrop"):  # labels are named by numbers
                found[name] = max(value or 0.0, found.get(name, 0.0))

    collect({} if config is None else config.to_dict())
    return found


def _no_dropout(model: nn.Module, what: str) -> str:
    fields = ", ".join(f"{name}={value}" for name, value in _rate_fields(model).items()) or "its config names none"
    return (
        f"{type(base_model(model)).__name__} has no dropout to sample by, {what} ({fields}): "
        f"set a rate above 0 when the model is built or loaded, as in from_pretrained(..., dropout=0.1), choose other "
        f"sites, or draw by temperature with sites=[] and do_sample=True"
    )
