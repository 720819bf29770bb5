"""Dropout whose masks are a function of what they fall on, so that a sample is the same in any batch."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from hf_efx.core.scoring.scoring_state import base_model

_ROOT, _ENCODER, _DECODER = range(3)
_DRAWS = 1 << 40  # the "site" of the draws of tokens
# Multipliers that spread 64 bits (Steele et al. 2014, SplitMix64) and 32 bits (Wellons' lowbias32), as signed numbers.
_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
_FIRST32, _SECOND32 = 0x7FEB352D, 0x846CA68B - (1 << 32)
_TIME_MAJOR = ("fsmt", "xlnet")  # they turn [rows, positions, ...] round, where a square can't be told from its like


def row_keys(seed: int, ids: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """A key [rows] int64 for each row's sample, the same whatever stands beside it.

    Args:
        seed: Any integer.
        ids: The examples' ids [rows] int64.
        samples: Which of its samples a row is [rows] int64.
    """
    start = torch.tensor(seed % (1 << 63), dtype=torch.int64, device=ids.device)
    return _mix(_mix(_mix(start + _STEP) + ids) + samples + _STEP)


@dataclass
class _Call:
    """A forward of the model, its encoder or its decoder that is under way."""

    unit: int
    rows: int
    width: int  # columns of ids or embeddings, 0 where the input is no sequence
    offset: int  # positions in the cache
    site: int = 0
    keys: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class KeyedDropout(TorchFunctionMode):
    """Inside it, dropout masks are an integer hash of the row's key, the site, the position and the channel.

    A site is the how-manieth dropout it is in the forward of the encoder, the decoder or the model around them; a
    position counts from the row's first token, through the cache. Both `nn.Dropout` and `functional.dropout` arrive
    here, `scaled_dot_product_attention` with dropout is computed openly (a mask is keyed by head, query and key), and
    `torch.multinomial` draws one token a row by a key of its position. Rows of beam search share their sample's masks.
    It holds for one thread; nothing in torch is replaced.

    Args:
        model: An unwrapped model, whose dropout is on; hooks stand on it in the meantime.
        masks: `"position"` draws anew at every position; `"sequence"` once a row, shared by its positions (those of
            attention by its queries).

    Raises:
        ValueError: For a model whose tensors don't have rows first, an attention kernel or a kind of dropout whose
            masks are out of reach.
    """

    def __init__(self, model: nn.Module, masks: Literal["position", "sequence"] = "position") -> None:
        super().__init__()
        if masks not in ("position", "sequence"):
            raise ValueError(f"masks={masks!r} is unknown; choose 'position' or 'sequence'")
        base = base_model(model)
        config = getattr(base, "config", None)
        if getattr(config, "model_type", None) in _TIME_MAJOR:
            raise ValueError(f"{type(base).__name__} doesn't keep rows first, so that its masks can't be keyed by row")
        for module in model.modules():
            part: Any = vars(module).get("config")
            kernel = getattr(part, "_attn_implementation", None)
            if kernel not in (None, "eager", "sdpa") and getattr(part, "attention_dropout", 0):
                raise ValueError(
                    f"attention_dropout={part.attention_dropout} in {kernel} attention, whose masks can't be keyed: "
                    f"call model.set_attn_implementation('sdpa') first"
                )
        self._units: list[nn.Module] = [base]
        if getattr(config, "is_encoder_decoder", False):
            self._units += [base.get_encoder(), base.get_decoder()]
        self._by_sequence, self._calls, self._end = masks == "sequence", [], 0
        self._keys, self._padding = torch.zeros(0, dtype=torch.int64), None
        self._channels: dict[Any, torch.Tensor] = {}
        self._hooks: list[Any] = []
        feature = (F.dropout1d, F.dropout2d, F.dropout3d)
        self._handlers: dict[Any, Any] = {F.dropout: self._dropout, torch.multinomial: self._draw}
        self._handlers |= {F.scaled_dot_product_attention: self._attention, **dict.fromkeys(feature, self._features)}
        others = (F.alpha_dropout, F.feature_alpha_dropout, F.multi_head_attention_forward)
        self._handlers |= {function: _refusing(function) for function in others}

    @property
    def device(self) -> torch.device:
        """Where the rows' keys are."""
        return self._keys.device

    def set_rows(self, keys: torch.Tensor, padding: torch.Tensor | None = None) -> None:
        """Says which rows the next forwards hold.

        Args:
            keys: `row_keys` [rows].
            padding: Columns [rows] before each row's first token, for models without an encoder apart.
        """
        self._keys, self._padding = keys, padding if len(self._units) == 1 else None

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Keeps the rows of those indices [k] alone, as the caller does with its tensors."""
        self._keys = self._keys[rows]
        self._padding = None if self._padding is None else self._padding[rows]

    def __enter__(self) -> "KeyedDropout":
        for unit, module in enumerate(self._units):
            enter = lambda module, args, kwargs, unit=unit: self._enter_call(unit, args, kwargs)  # noqa: E731
            self._hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._leave_call, always_call=True))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._calls.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = self._handlers.get(func)
        return func(*args, **(kwargs or {})) if handler is None else handler(*args, **(kwargs or {}))

    def _enter_call(self, unit: int, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        names = ("decoder_input_ids", "input_ids", "decoder_inputs_embeds", "inputs_embeds")
        candidates = (*(kwargs.get(name) for name in names), *args, *kwargs.values())
        inputs = next((x for x in candidates if isinstance(x, torch.Tensor) and x.dim() > 1), None)
        if inputs is None:
            raise ValueError(f"{type(self._units[unit]).__name__} was called without a tensor [rows, ...]")
        past = kwargs.get("past_key_values")
        offset = 0 if past is None else int(past.get_seq_length())
        width = inputs.shape[1] if inputs.dim() < 4 else 0
        self._calls.append(_Call(unit, len(inputs), width, offset))

    def _leave_call(self, *_: Any) -> None:
        if self._calls:  # none where entering it failed
            call = self._calls.pop()
            self._end = call.offset + call.width

    def _next_site(self) -> tuple[_Call, int]:
        if not self._calls:
            raise ValueError(f"dropout outside the forward of {type(self._units[0]).__name__} can't be keyed")
        call = self._calls[-1]
        call.site += 1
        return call, call.site

    def _dropout(self, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        call, site = self._next_site()
        if not training or p == 0:
            return input
        scaled = input.mul_(_scale(p)) if inplace else input * _scale(p)
        return scaled.masked_fill_(self._dropped(call, site, input, input.shape, p), 0)

    def _features(self, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        """Drops whole channels [rows, channels, ...]."""
        call, site = self._next_site()
        if not training or p == 0:
            return input
        dropped = self._dropped(call, site, input, input.shape[:2], p)
        scaled = input.mul_(_scale(p)) if inplace else input * _scale(p)
        return scaled.masked_fill_(dropped.reshape(*dropped.shape, *(1,) * (input.dim() - 2)), 0)

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> torch.Tensor:
        if dropout_p == 0:
            self._next_site()
            return F.scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal, **options)
        if options.get("enable_gqa"):
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        scale = options.get("scale")
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        lowest = torch.finfo(scores.dtype).min
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), lowest)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, lowest)
        elif attn_mask is not None:
            scores = scores + attn_mask
        weights = scores.softmax(-1)
        if self._calls[-1].width == 1:  # transformers lays the heads that share keys out as queries of one step
            return self._dropout(weights.flatten(1, 2)[:, :, None], dropout_p).view_as(weights) @ value
        return self._dropout(weights, dropout_p) @ value

    def _draw(self, input: torch.Tensor, num_samples: int, *_: Any, **__: Any) -> torch.Tensor:
        if num_samples != 1 or len(input) != len(self._keys):
            raise ValueError("keyed draws are one token a row: beam search can't sample (do_sample=True) beside them")
        position = torch.tensor(self._end) if self._padding is None else self._end - self._padding
        key = _mix(_mix(self._keys + position.to(self._keys.device) * _STEP) + _DRAWS)
        uniform = _shifted(key, 11).double() * 2.0**-53
        below = input.double().cumsum(-1)
        found = torch.searchsorted(below, uniform.to(input.device)[:, None] * below[:, -1:], right=True)
        return found.clamp(max=input.shape[-1] - 1)

    def _dropped(self, call: _Call, site: int, like: torch.Tensor, shape: torch.Size, p: float) -> torch.Tensor:
        """Which elements of a tensor of that shape are dropped."""
        if p >= 1:
            return torch.ones(shape, dtype=torch.bool, device=like.device)
        folded, left = divmod(shape[0], call.rows)
        if left or not folded:
            raise ValueError(
                f"{type(self._units[call.unit]).__name__} drops a tensor of shape {list(shape)} in a batch of "
                f"{call.rows} rows: its masks can't be keyed by row"
            )
        if len(shape) + (folded > 1) == 4:  # attention: heads, queries, keys
            view = (call.rows, shape.numel() // (call.rows * shape[-2] * shape[-1]), *shape[-2:])
            first, second = (key[:, None, :, None] for key in self._position_keys(call, view[2], like.device))
            channel = self._of_keys(call, site, view, like.device)
        else:
            if len(shape) == 2 and folded == call.width:  # positions laid end to end
                view = (call.rows, folded, shape[1])
            else:
                view = tuple(shape) if len(shape) == 3 else (call.rows, 1, shape.numel() // call.rows)
            first, second = (key[..., None] for key in self._position_keys(call, view[1], like.device))
            channel = self._of_channels(call, site, view[2], like.device)
        hashed = (channel ^ first).mul_(_FIRST32)
        hashed ^= (hashed >> 15).bitwise_and_(0x1FFFF)
        hashed ^= second
        hashed *= _SECOND32
        dropped = hashed < min(round(p * 2**32), 2**32 - 1) - 2**31
        return dropped.expand(view).reshape(shape)

    def _position_keys(self, call: _Call, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Two hashes [rows, length] int32 of row and position; [rows, 1] where positions share them."""
        length = 1 if self._by_sequence else length
        if length not in call.keys:
            keys = self._keys.to(device)[:, None]
            if not self._by_sequence:
                position = torch.arange(call.offset, call.offset + length, device=device)
                if self._padding is not None:
                    position = position - self._padding.to(device)[:, None]
                keys = _mix(keys + position * _STEP)
            keys = keys.repeat_interleave(call.rows // len(keys), 0)  # beams
            call.keys[length] = _upper(keys), _upper(keys << 32)
        return call.keys[length]

    def _of_channels(self, call: _Call, site: int, count: int, device: torch.device) -> torch.Tensor:
        """Hashes [count] int32 of a site's channels."""
        name = (call.unit, site, count, device)
        if name not in self._channels:
            start = _site_key(call.unit, site, device)
            self._channels[name] = _upper(_mix(start + torch.arange(count, device=device) * _STEP))
        return self._channels[name]

    def _of_keys(self, call: _Call, site: int, view: Sequence[int], device: torch.device) -> torch.Tensor:
        """Hashes [rows or 1, heads, 1, keys] int32 of a site's heads and key positions."""
        rows, heads, queries, width = view
        place = torch.arange(width, device=device)[None]
        if len(self._units) == 1:  # a sliding window holds the last keys alone
            place = place + max(0, call.offset + queries - width)
            if self._padding is not None:
                place = place - self._padding.to(device).repeat_interleave(rows // len(self._padding))[:, None]
        place = place[:, None, None] + (torch.arange(heads, device=device)[:, None, None] << 32)
        return _upper(_mix(_site_key(call.unit, site, device) + place * _STEP))


def _site_key(unit: int, site: int, device: torch.device) -> torch.Tensor:
    return _mix(torch.tensor((unit << 32) + site, device=device))


def _scale(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


def _shifted(bits: torch.Tensor, count: int) -> torch.Tensor:
    """int64 shifted to the right, zeros coming in."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _upper(bits: torch.Tensor) -> torch.Tensor:
    return (bits >> 32).to(torch.int32)


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser of int64, which wraps."""
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _refusing(function: Any) -> Any:
    """The function, refused where it would drop."""
    signature = inspect.signature(function)

    def handle(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        if given.arguments["training"] and given.arguments.get("p", given.arguments.get("dropout_p")):
            raise ValueError(f"the masks of {function.__name__} can't be keyed: leave its module out of sites")
        return function(*args, **kwargs)

    return handle
