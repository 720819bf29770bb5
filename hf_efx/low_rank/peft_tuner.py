"""Low-rank training through peft: a tuner whose layers answer with factors in place of the base weight.

The dense base weight stays in memory, since several adapters and disabling them need it: what saves memory is
`get_efx_model`, and `EfxConfig` while loading.
"""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from hf_efx.core.model.pretrained import weights_were_loaded
from hf_efx.core.model.targets import match_targets, warn_of_skipped
from hf_efx.core.model.weight_view import WeightView
from hf_efx.low_rank.initialisation import initial_factors
from hf_efx.low_rank.layers import factorised_conv2d, factorised_linear


class LowRankAdapterLayer(nn.Module, BaseTunerLayer):
    """A frozen Linear, Conv1D or Conv2d and the factors of each adapter.

    Attributes:
        low_rank_u: For each adapter U, [blocks, out / blocks, r].
        low_rank_v: For each adapter Vᵀ, [blocks, r, in].
    """

    adapter_layer_names = ("low_rank_u", "low_rank_v")
    other_param_names = ("low_rank_activation",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.low_rank_u = nn.ParameterDict()
        self.low_rank_v = nn.ParameterDict()
        self.low_rank_activation: dict[str, str | None] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged_weight: torch.Tensor | None = None
        view = WeightView(base_layer)
        self.in_features, self.out_features = view.in_dim, view.out_dim

    def add_adapter(self, adapter_name: str, config: Any, spec: dict[str, Any]) -> None:
        """Adds an adapter with factors of the base weight, as `spec` (of `LowRankConfig.plan`) says."""
        view = WeightView(self.get_base_layer(), spec.get("blocks", 1))
        factors = [
            initial_factors(m, spec["rank"], config.init, config.spectral_ones_scale) for m in view.block_matrices()
        ]
        dtype = view.weight.dtype
        self.low_rank_u[adapter_name] = nn.Parameter(torch.stack([u for u, _ in factors]).to(dtype))
        self.low_rank_v[adapter_name] = nn.Parameter(torch.stack([v.mT for _, v in factors]).to(dtype).contiguous())
        self.low_rank_activation[adapter_name] = config.factor_activation
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _active(self) -> str | None:
        """The active adapter here, None if there is none."""
        names = [name for name in self.active_adapters if name in self.low_rank_u]
        if len(names) > 1:
            raise ValueError(
                f"active adapters {names}: a low-rank adapter takes the weight's place, so only one can be active. "
                f"Call set_adapter with one name."
            )
        return names[0] if names else None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Like the base layer's forward, with U Vᵀ of the active adapter for its weight."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        name = None if self.disable_adapters or self.merged else self._active()
        if name is None:
            return self.base_layer(x, *args, **kwargs)
        u, v = self.low_rank_u[name], self.low_rank_v[name]
        base: Any = self.get_base_layer()
        dtype = x.dtype
        x = self._cast_input_dtype(x, u.dtype)
        activation, factors = self.low_rank_activation[name], (u.flatten(0, 1), v.flatten(0, 1))
        if isinstance(base, nn.Conv2d):
            return factorised_conv2d(base, x, *factors, activation).to(dtype)
        bias = None if base.bias is None else base.bias.to(u.dtype)  # peft keeps adapters of a bf16 base in float32
        return factorised_linear(x, *factors, bias, len(u), activation).to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes the product of the factors over the base weight, of which a copy is kept for `unmerge`.

        Raises:
            ValueError: With a factor activation, for a second adapter, or, if `safe_merge`, where the product isn't
                finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.low_rank_u:
                continue
            if self.merged_adapters:
                raise ValueError(
                    f"adapter {self.merged_adapters[0]!r} is merged already: a low-rank adapter takes the weight's "
                    f"place, so {name!r} can't be merged on top. Call unmerge_adapter, and merge one alone."
                )
            if self.low_rank_activation[name]:
                raise ValueError(
                    f"factor_activation={self.low_rank_activation[name]!r} stands between the factors: no matrix "
                    f"has the same outputs, so the adapter can't be merged."
                )
            view = WeightView(self.get_base_layer())
            pairs = zip(self.low_rank_u[name], self.low_rank_v[name], strict=True)
            wide = torch.promote_types(view.weight.dtype, torch.float32)
            product = torch.cat([u.detach().to(wide) @ v.detach().to(wide) for u, v in pairs])
            if safe_merge and not product.isfinite().all():
                raise ValueError(f"NaNs or infinities in the product of adapter {name!r}: it seems to be broken.")
            self._unmerged_weight = view.weight.detach().clone()
            view.write(product)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Puts the base weight back."""
        if self._unmerged_weight is not None:
            WeightView(self.get_base_layer()).weight.data.copy_(self._unmerged_weight)
            self._unmerged_weight = None
            self.merged_adapters.clear()


class LowRankTuner(BaseTuner):
    """peft's tuner for `LowRankConfig`: `peft.get_peft_model(model, LowRankConfig(...))` makes one."""

    prefix: str = "low_rank_"
    tuner_layer_cls = LowRankAdapterLayer  # pyright: ignore[reportAssignmentType]
    target_module_mapping: dict[str, Any] = {}
    _plan: dict[str, dict[str, Any]]

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        saved = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper))
        layers = {
            name: module.get_base_layer() if isinstance(module, LowRankAdapterLayer) else module
            for name, module in model.named_modules()
            if ".base_layer" not in f".{name}" and not name.startswith(saved)
        }
        targets = match_targets(model, peft_config, layers)
        if peft_config.target_modules in (None, "all-linear"):
            warn_of_skipped(model)
            peft_config.target_modules = sorted(targets)  # what peft matches by, and writes into the adapter's config
        trained = not peft_config.from_file and weights_were_loaded(model, targets)
        self._plan = peft_config.plan(model, targets, pretrained=trained)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config  # the defaults depend on the model itself: see _prepare_model

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        spec = self._plan.get(current_key)
        if spec is None:  # stays dense: no parameters to save
            return
        layer = target if isinstance(target, LowRankAdapterLayer) else LowRankAdapterLayer(target)
        layer.add_adapter(adapter_name, peft_config, spec)
        if layer is not target:
            if adapter_name not in self.active_adapters:  # a further adapter is not trained until it is made active
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
