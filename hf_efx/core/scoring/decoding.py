"""Generation for `sampling`: a loop that leaves finished rows out, and the log-probabilities of what was generated."""

import copy
import functools
import inspect
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import Cache, DynamicCache, EncoderDecoderCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import logits_process, stopping_criteria
from transformers.utils.generic import ModelOutput

from hf_efx.core.scoring.batches import align_left, sequence_names, take_columns
from hf_efx.core.scoring.keyed_dropout import KeyedDropout
from hf_efx.core.scoring.scoring_state import base_model

logger = logging.getLogger(__name__)

# What looks at each row alone; others may count rows, so that none can be left out before them.
_BY_ROW = {
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.TemperatureLogitsWarper,
    logits_process.RepetitionPenaltyLogitsProcessor,
    logits_process.TopPLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.SequenceBiasLogitsProcessor,
    logits_process.NoBadWordsLogitsProcessor,
    logits_process.ForcedBOSTokenLogitsProcessor,
    logits_process.ForcedEOSTokenLogitsProcessor,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.ExponentialDecayLengthPenalty,
    logits_process.LogitNormalization,
    logits_process.SuppressTokensAtBeginLogitsProcessor,
    logits_process.SuppressTokensLogitsProcessor,
    stopping_criteria.MaxLengthCriteria,
    stopping_criteria.MaxTimeCriteria,
    stopping_criteria.EosTokenCriteria,
}
_LIMITS = {"max_length": "max_new_tokens", "min_length": "min_new_tokens"}  # of columns, and of steps
# What belongs to `do_sample=True`.
DRAWING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_COUNTS_PADDING = ("repetition_penalty", "no_repeat_ngram_size", "encoder_repetition_penalty")
_FINISHED = 0.1  # the share of finished rows from which leaving them out is worth the copies


def generation_config(model: Any, given: Mapping[str, Any], tokenizer: Any) -> tuple[GenerationConfig, dict[str, Any]]:
    """The generation config that samples go by, and what `generate` takes beside it.

    Args:
        model: A transformers model that generates.
        given: What the caller would have given to `generate`.
        tokenizer: The caller's, or None.

    Raises:
        ValueError: For what samples can't go by; see `sample_generate`.
    """
    kwargs = dict(given)
    if kwargs.get("num_return_sequences") not in (None, 1):
        raise ValueError("num_return_sequences: the samples of an input are num_samples; leave it out")
    config = copy.deepcopy(kwargs.pop("generation_config", None) or GenerationConfig())
    config.num_beams = kwargs.get("num_beams") or config.num_beams or 1
    config.do_sample = bool(kwargs.get("do_sample", config.do_sample))
    idle = () if config.do_sample else DRAWING
    idle += () if config.num_beams > 1 else ("early_stopping", "length_penalty")
    own = {name: x for name, x in base_model(model).generation_config.to_dict().items() if name not in idle}
    config.update(defaults_only=True, allow_custom_entries=True, **own)
    rest = config.update(**kwargs)
    # Nothing of it is handed on, and scores of all steps take memory.
    config.update(num_return_sequences=1, return_dict_in_generate=False, output_scores=False, output_logits=False)
    if config.num_beams > 1 and config.do_sample:
        raise ValueError(f"num_beams={config.num_beams} with do_sample=True: beam search can't draw keyed tokens")
    if config.stop_strings and tokenizer is None:
        raise ValueError(f"stop_strings={config.stop_strings!r} need a tokenizer")
    base = base_model(model)
    if not base.config.is_encoder_decoder:
        if config.eos_token_id is None:
            raise ValueError(f"{type(base).__name__} has no end token: give eos_token_id, or set it in its config")
        if config.pad_token_id is None:
            config.pad_token_id = _as_list(config.eos_token_id)[0]
            logger.info("%s has no pad token: its end token pads, on the left", type(base).__name__)
        for columns, steps in _LIMITS.items():
            if getattr(config, columns) and getattr(config, steps) is None:
                raise ValueError(
                    f"{columns}={getattr(config, columns)} counts the prompt and the batch's padding in a "
                    f"decoder-only model: give {steps}"
                )
    return config, rest


def generation_inputs(model: Any, inputs: Any, config: GenerationConfig) -> dict[str, Any]:
    """Inputs on the model's device with a mask, padded on the side where its padding changes nothing."""
    source = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    source = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in source.items()}
    tokens = source.get("input_ids")
    if tokens is not None and source.get("attention_mask") is None:
        pad = config.pad_token_id
        masked = pad is not None and pad not in _as_list(config.eos_token_id)
        source["attention_mask"] = (tokens != pad).long() if masked else torch.ones_like(tokens)
    if base_model(model).config.is_encoder_decoder:
        return align_left(source)[0]
    mask = source["attention_mask"]
    if not mask[:, -1].all():
        past = (mask.flip(1) != 0).to(torch.uint8).argmax(1)  # columns after the last token
        columns = (torch.arange(mask.shape[1], device=mask.device) - past[:, None]) % mask.shape[1]
        source |= {name: take_columns(source[name], columns) for name in sequence_names(source)}
    return source


def reads_padding(config: GenerationConfig) -> bool:
    """Whether padding changes what comes of a row, so that rows of one call must have one length."""
    return any((getattr(config, name) or 0) not in (0, 1) for name in _COUNTS_PADDING)


class Decoded(NamedTuple):
    """What one call generated.

    Attributes:
        tokens: [rows, steps] after the prompt, filled up after the end token.
        log_probs: [rows, steps] under the masked model, of no meaning after the end token.
        first_logits: [rows, vocabulary] of the first step.
        prompt: Columns before the first step.
    """

    tokens: torch.Tensor
    log_probs: torch.Tensor
    first_logits: torch.Tensor
    prompt: int


def decode_rows(
    model: Any, inputs: Mapping[str, Any], config: Any, keyed: KeyedDropout, tokenizer: Any, kwargs: Mapping[str, Any]
) -> Decoded:
    """Generates by a loop of ours, which leaves finished rows out, or by transformers' own beam search.

    Args:
        model: A transformers model that generates.
        inputs: What `generate` takes, rows first.
        config: The GenerationConfig, whole.
        keyed: The masks, active, with the rows set.
        tokenizer: For `stop_strings`.
        kwargs: More of what `generate` takes.
    """
    if config.num_beams == 1 and not config.stop_strings:
        loop = functools.partial(_decode, keyed=keyed)
        return generate_by(config, model, **inputs, custom_generate=loop, **kwargs)
    if "decoder_input_ids" in inputs:
        raise ValueError("decoder_input_ids: beam search and stop_strings take no start of the decoder's side here")
    options = {**kwargs, "tokenizer": tokenizer} if config.stop_strings else kwargs
    sequences = generate_by(config, model, **inputs, **options)
    prompt = 1 if base_model(model).config.is_encoder_decoder else inputs["input_ids"].shape[1]
    logits = at_least_float(model(**teacher_forcing(model, inputs, sequences)).logits)[:, prompt - 1 :]
    tokens = sequences[:, prompt:]
    return Decoded(tokens, log_probs_of(logits, tokens), logits[:, 0], prompt)


def generate_by(config: GenerationConfig, model: Any, **kwargs: Any) -> Any:
    """`model.generate` by this config alone: the model's own would be warned of where the two differ."""
    config, base = copy.copy(config), base_model(model)
    for columns, steps in _LIMITS.items():
        if getattr(config, steps) is not None:
            setattr(config, columns, None)
    kept, base.generation_config = base.generation_config, config
    try:
        return model.generate(generation_config=config, **kwargs)
    finally:
        base.generation_config = kept


def drawn_tokens(
    model: Any, config: GenerationConfig, tokens: torch.Tensor, prompt: int
) -> tuple[torch.Tensor, list[int], list[int]]:
    """Which tokens were drawn, neither forced nor padding, and where each row's text ends and begins.

    Args:
        model: The model.
        config: What they were generated by.
        tokens: [rows, steps] after the prompt.
        prompt: Columns before them.

    Returns:
        Of the tokens [rows, steps] bool, the end token's among them; ends [rows], before the end token; starts [rows].
    """
    width = tokens.shape[1]
    place = torch.arange(width, device=tokens.device)
    end = torch.isin(tokens, torch.tensor(_as_list(config.eos_token_id), device=tokens.device))
    ends = torch.where(end, place, width).amin(1)  # before the end token
    if config.pad_token_id is not None:  # after a stop string
        text = torch.where(tokens != config.pad_token_id, place + 1, 0).amax(1)
        ends = torch.minimum(ends, torch.where(end.any(1), width, text))
    counted = place <= ends[:, None]
    counted &= ~((place == ends[:, None]) & ~end)
    skip = torch.zeros_like(ends)
    if base_model(model).config.is_encoder_decoder and config.forced_bos_token_id is not None:
        skip = (tokens[:, 0] == config.forced_bos_token_id).long()
        counted[:, 0] &= skip == 0
    if config.forced_eos_token_id is not None and prompt + width == _limit(config, prompt):
        counted[:, -1] = False
    return counted, ends.tolist(), skip.tolist()


def _as_list(ids: Any) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [int(ids)]


def _limit(config: GenerationConfig, prompt: int) -> int:
    """Columns at which `generate` stops: 20 steps where nothing is said."""
    if config.max_new_tokens is not None:
        return prompt + config.max_new_tokens
    return prompt + 20 if config.max_length is None else config.max_length


def log_probs_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [...] of tokens [...] under logits [..., vocabulary]."""
    losses = F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none")  # half logsumexp's time
    return -losses.view_as(tokens)


def at_least_float(logits: torch.Tensor) -> torch.Tensor:
    """In float32, or float64 where they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def teacher_forcing(model: Any, inputs: Mapping[str, Any], sequences: torch.Tensor) -> dict[str, Any]:
    """A batch in which the model reads generated sequences [rows, columns], each token after those before it."""
    base = base_model(model)
    if base.config.is_encoder_decoder:
        return {**inputs, "decoder_input_ids": sequences[:, :-1], "use_cache": False}
    mask = inputs["attention_mask"]
    mask = torch.cat([mask, mask.new_ones(len(mask), sequences.shape[1] - mask.shape[1] - 1)], 1)
    inputs = {**inputs, "input_ids": sequences[:, :-1], "attention_mask": mask, "use_cache": False}
    if "position_ids" in inspect.signature(type(base).forward).parameters:
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    return inputs


def _decode(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    keyed: Any = None,
    **model_kwargs: Any,
) -> Decoded:
    """Greedy search and sampling as `generate` runs them, for its `custom_generate`."""
    config, tokens, prompt = generation_config, input_ids, input_ids.shape[1]
    by_row = {type(item) for item in (*logits_processor, *stopping_criteria)} <= _BY_ROW
    rows = torch.arange(len(tokens), device=tokens.device)
    finished, steps, first = torch.zeros_like(rows, dtype=torch.bool), [], None
    outputs = model._prefill(tokens, config, model_kwargs)
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder
        )
        logits = at_least_float(outputs.logits[:, -1].to(tokens.device))
        del outputs
        first = logits if first is None else first
        scores = logits_processor(tokens, logits.clone()) if logits_processor else logits
        drawn = torch.multinomial(scores.softmax(-1), 1)[:, 0] if config.do_sample else scores.argmax(-1)
        if config._pad_token_tensor is not None:
            drawn = torch.where(finished, config._pad_token_tensor.to(drawn.device), drawn)
        steps.append((rows, drawn, log_probs_of(logits, drawn)))
        tokens = torch.cat([tokens, drawn[:, None]], 1)
        finished = finished | stopping_criteria(tokens, None)
        left = int((~finished).sum())
        if not left:
            return _table(steps, len(input_ids), config._pad_token_tensor, first, prompt)
        if by_row and left <= (1 - _FINISHED) * len(rows) and _divisible(model_kwargs):
            kept = (~finished).nonzero()[:, 0]
            model_kwargs = {name: _keep(value, kept, len(rows)) for name, value in model_kwargs.items()}
            keyed.keep_rows(kept.to(keyed.device))
            rows, tokens, finished = rows[kept], tokens[kept], finished[kept]
        length = 1 if model_kwargs["use_cache"] else None
        inputs = model.prepare_inputs_for_generation(tokens, next_sequence_length=length, **model_kwargs)
        outputs = model(**inputs, return_dict=True)


def _table(steps: list[Any], rows: int, pad: torch.Tensor | None, first: Any, prompt: int) -> Decoded:
    shape = (rows, len(steps))
    tokens = torch.full(shape, 0 if pad is None else int(pad), device=first.device)
    log_probs = torch.zeros(shape, dtype=first.dtype, device=first.device)
    for step, (living, drawn, log_prob) in enumerate(steps):
        tokens[living, step], log_probs[living, step] = drawn, log_prob
    return Decoded(tokens, log_probs, first, prompt)


def _divisible(model_kwargs: Mapping[str, Any]) -> bool:
    """Whether rows can be taken out of all that goes on from step to step."""
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.dim() != 2:
        return False
    caches = [value for value in model_kwargs.values() if isinstance(value, Cache)]
    parts = [part for cache in caches for part in _parts(cache)]
    layers = [layer for part in parts for layer in part.layers]
    return all(type(part) is DynamicCache for part in parts) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
    )


def _parts(cache: Cache) -> list[Any]:
    return (
        [cache.self_attention_cache, cache.cross_attention_cache]
        if isinstance(cache, EncoderDecoderCache)
        else [cache]
    )


def _keep(value: Any, kept: torch.Tensor, rows: int) -> Any:
    """The kept rows [k] of a tensor, an encoder's output or a cache."""
    if isinstance(value, Cache):
        value.batch_select_indices(kept)
    elif isinstance(value, ModelOutput):
        return type(value)(**{name: _keep(part, kept, rows) for name, part in value.items()})
    elif isinstance(value, tuple):
        return tuple(_keep(part, kept, rows) for part in value)
    elif isinstance(value, torch.Tensor) and value.dim() and len(value) == rows:
        return value[kept.to(value.device)]
    return value
