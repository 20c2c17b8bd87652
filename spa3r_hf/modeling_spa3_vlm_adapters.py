"""Adapters of Spa3-VLM beside each other in one model: made, loaded, switched, disabled, deleted."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .adapter_spa3_vlm import build_adapter
from .checkpoint_spa3_vlm import check_weights, name_of, read_adapter, revision_of
from .configuration_spa3_vlm import Spa3AdapterConfig
from .fusion_spa3_vlm import FusedFeatures
from .lora_spa3_vlm import add_lora, delete_lora, has_lora, switch_lora
from .modeling_spa3r import Spa3RForPreTraining, Spa3RModel
from .modeling_spa3r_vggt import Spa3RVGGTModel


logger = logging.get_logger(__name__)


def _spatial_hidden_size(encoder: Spa3RModel | Spa3RVGGTModel, spatial_features: str) -> int:
    """Width of what a spatial encoder gives."""
    if spatial_features == "backbone":
        return backbone_of(encoder).config.feature_size
    if isinstance(encoder, Spa3RVGGTModel):
        raise ValueError(
            f"the spatial encoder is a {type(encoder).__name__}, which has no latents; expected a Spa3RModel, or "
            "spatial_features = 'backbone'"
        )
    return encoder.config.hidden_size


def backbone_of(encoder: Spa3RModel | Spa3RVGGTModel) -> Spa3RVGGTModel:
    return encoder if isinstance(encoder, Spa3RVGGTModel) else encoder.backbone


@torch.no_grad()
def encode_scenes(encoder: Spa3RModel | Spa3RVGGTModel, views: Tensor, spatial_features: str) -> Tensor:
    """
    What a spatial encoder makes of S scenes, in its own type, within autocast as well.

    Args:
        encoder: The spatial encoder.
        views: (S, V, 3, H, W) in [0, 1].
        spatial_features: See `Spa3AdapterConfig`.

    Returns:
        (S, Q, D), latents, or (S, V * N, 2C), the backbone's features of all patches.

    Raises:
        ValueError: The views are no such pixels.
    """
    if views.numel() and not torch.compiler.is_compiling():
        low, high = (float(value) for value in views.aminmax())
        # A little more may come of resizing. (NaN, which the encoder names, is neither.)
        if not views.is_floating_point() or low < -0.1 or high > 1.1:
            raise ValueError(
                f"the pixels of scenes are {views.dtype} from {low:.3g} to {high:.3g}; expected floating point "
                "numbers in [0, 1], as Spa3RImageProcessor gives them"
            )
    device = next(encoder.parameters()).device
    views = views.to(device)
    with torch.autocast(device.type, enabled=False):
        if spatial_features == "latents":
            return encoder(views).latents
        backbone = backbone_of(encoder)
        return backbone(views).last_hidden_state[:, :, backbone.config.num_prefix_tokens :].flatten(1, 2)


def _check_encoder(encoder: nn.Module | None) -> Spa3RModel | Spa3RVGGTModel | None:
    """The part of a spatial encoder that is needed."""
    encoder = encoder.spa3r if isinstance(encoder, Spa3RForPreTraining) else encoder
    if encoder is None or isinstance(encoder, Spa3RModel | Spa3RVGGTModel):
        return encoder
    raise TypeError(f"the spatial encoder is a {type(encoder).__name__}; expected a Spa3RModel")


def features_owner(vlm: PreTrainedModel) -> nn.Module | None:
    """The module whose `get_image_features` the VLM's forward, and `generate`, call."""
    return next((module for module in (vlm.base_model, vlm) if hasattr(module, "get_image_features")), None)


def _check_vlm(vlm: nn.Module) -> None:
    """
    Raises:
        TypeError: This is no model of `transformers`.
        ValueError: Spa3-VLM cannot work with this model; the message says why.
    """
    if hasattr(vlm, "get_base_model") or (isinstance(vlm, PreTrainedModel) and has_lora(vlm)):
        raise ValueError(
            f"the VLM ({type(vlm).__name__}) already carries PEFT adapters; expected it without: give their "
            "configuration as Spa3AdapterConfig(lora_config=...), and they are trained, saved and switched together"
        )
    if not isinstance(vlm, PreTrainedModel):
        raise TypeError(f"the VLM is a {type(vlm).__name__}; expected a model of AutoModelForImageTextToText")
    text = vlm.config.get_text_config()
    reasons = {
        "it is an encoder-decoder, whose decoder never sees the visual tokens": vlm.config.is_encoder_decoder,
        "it has no get_image_features, where its visual tokens could be reached": features_owner(vlm) is None,
        "its configuration has no image_token_id, which says where the visual tokens stand": (
            getattr(vlm.config, "image_token_id", None) is None
        ),
        "its text configuration has no hidden_size": not hasattr(text, "hidden_size"),
    }
    if found := [reason for reason, applies in reasons.items() if applies]:
        raise ValueError(f"Spa3-VLM cannot work with a {type(vlm).__name__}: {'; '.join(found)}")


class Spa3AdapterModel(nn.Module):
    """A VLM, a spatial encoder, and any number of named adapters between them, one of which is active."""

    vlm: Any
    spatial_encoder: Any
    # What `Trainer` asks for before it trains anything on a quantised model.
    _hf_peft_config_loaded = True

    def __init__(self, vlm: PreTrainedModel, spatial_encoder: nn.Module | None):
        """Without an adapter yet: use `get_spa3_vlm`, or `Spa3VLM.from_pretrained`."""
        super().__init__()
        _check_vlm(vlm)
        self.vlm = vlm.requires_grad_(False)
        self.spatial_encoder = _check_encoder(spatial_encoder)
        if self.spatial_encoder is not None:
            self.spatial_encoder.eval().requires_grad_(False)
        self.adapters = nn.ModuleDict()
        self.adapter_configs: dict[str, Spa3AdapterConfig] = {}
        self.active_adapter = ""
        self._is_disabled = False
        self._fused_features = FusedFeatures()
        self.train(vlm.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "vlm":
                raise
            return getattr(self.vlm, name)

    def train(self, mode: bool = True) -> "Spa3AdapterModel":
        super().train(mode)
        if self.spatial_encoder is not None:
            self.spatial_encoder.eval()
        return self

    @property
    def language_model(self) -> nn.Module:
        """The VLM's language model, without its output layer."""
        return self.vlm.get_decoder()

    @property
    def adapter(self) -> nn.Module:
        """The active adapter."""
        return self.adapters[self.active_adapter]

    @property
    def adapter_config(self) -> Spa3AdapterConfig:
        """The configuration of the active adapter."""
        return self.adapter_configs[self.active_adapter]

    def add_adapter(self, adapter_name: str, adapter_config: Spa3AdapterConfig) -> None:
        """
        Add a fresh adapter, which `set_adapter` makes the active one.

        Raises:
            ValueError: The name is taken or has a dot, or the configuration is for another VLM or encoder.
        """
        self._check_new_name(adapter_name)
        config = self._complete(adapter_config)
        self._insert(adapter_name, config, build_adapter(config))

    def load_adapter(
        self,
        adapter_path_or_repo: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        **hub_options: Any,
    ) -> None:
        """
        Add an adapter that `save_pretrained` wrote, beside those that are there; `set_adapter` makes it active.

        Args:
            adapter_path_or_repo: A folder, or the id of a Hub repository.
            adapter_name: What it is to be called here.
            is_trainable: Whether it is made active at once, to be trained on.
            hub_options: `revision`, `token`, `cache_dir`, `local_files_only`, ...

        Raises:
            OSError: There is no such adapter.
            ValueError: It is for another VLM or encoder, or its weights are not those that its configuration needs.
        """
        config, weights, lora = read_adapter(adapter_path_or_repo, **hub_options)
        self.load_weights(adapter_name, config, weights, lora)
        if is_trainable:
            self.set_adapter(adapter_name)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """
        Make an adapter, with its LoRA, the active one; the others are frozen.

        Args:
            adapter_name: Its name.
            inference_mode: Whether it is frozen as well.

        Raises:
            ValueError: There is no adapter of that name.
        """
        self._check_name(adapter_name)
        self.active_adapter = adapter_name
        for name, adapter in self.adapters.items():
            adapter.requires_grad_(name == adapter_name and not inference_mode)
        self._switch_lora()

    def delete_adapter(self, adapter_name: str) -> None:
        """
        Take an adapter out, with its LoRA. If it was the active one, the first of the others is active then, frozen.

        Raises:
            ValueError: There is no adapter of that name, or no other.
        """
        self._check_name(adapter_name)
        if len(self.adapters) == 1:
            raise ValueError(f"{adapter_name!r} is the only adapter; expected another, or use disable_adapter()")
        if self.adapter_configs[adapter_name].lora_config is not None:
            delete_lora(self.vlm, adapter_name)
        del self.adapters[adapter_name], self.adapter_configs[adapter_name]
        if self.active_adapter == adapter_name:
            self.set_adapter(next(iter(self.adapters)), inference_mode=True)
        else:
            self._switch_lora()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """While this lasts, the model is the base VLM: no adapter, no LoRA, and spatial inputs are not looked at."""
        before, self._is_disabled = self._is_disabled, True
        self._switch_lora()
        try:
            yield
        finally:
            self._is_disabled = before
            self._switch_lora()

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Number of parameters that are trained, and of all: adapters, VLM and spatial encoder."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Say on the standard output how many parameters are trained, as PEFT's models do."""
        trained, total = self.get_nb_trainable_parameters()
        sys.stdout.write(
            f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}\n"
        )

    def adapter_device(self) -> torch.device:
        """Where adapters live: with the VLM, wherever its first weights really are."""
        devices = (parameter.device for parameter in self.vlm.parameters())
        return next((device for device in devices if device.type != "meta"), torch.device("cpu"))

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """
        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "an adapter of Spa3-VLM cannot be merged into the VLM, as what it adds to a visual token depends on the "
            "scene that the token reads; expected it to be kept beside the VLM (save_pretrained)"
        )

    merge_and_unload = merge_adapter

    def _check_name(self, name: str) -> None:
        if name not in self.adapters:
            raise ValueError(f"there is no adapter {name!r}; expected one of {list(self.adapters)}")

    def _check_new_name(self, name: str) -> None:
        if name in self.adapters:
            raise ValueError(f"there is an adapter {name!r} already; expected another name than {list(self.adapters)}")
        if not name or "." in name:
            raise ValueError(f"adapter_name = {name!r}; expected a name without dots")

    def load_weights(
        self, name: str, config: Spa3AdapterConfig, weights: dict[str, Tensor], lora: dict[str, Tensor]
    ) -> None:
        """Add an adapter, frozen, with the weights that `read_adapter` gave; errors as in `load_adapter`."""
        self._check_new_name(name)
        config = self._complete(config)
        with torch.device("meta"):
            adapter = build_adapter(config)
        check_weights(weights, adapter.state_dict(), f"adapter {name!r}")
        # What is assigned keeps the type that it was saved in.
        adapter.load_state_dict(weights, assign=True)
        self._insert(name, config, adapter, lora)

    def _insert(
        self, name: str, config: Spa3AdapterConfig, adapter: nn.Module, lora: dict[str, Tensor] | None = None
    ) -> None:
        if config.lora_config is not None:
            add_lora(self.vlm, config.lora_config, name, lora)
        self.adapters[name] = adapter.to(self.adapter_device()).requires_grad_(False)
        self.adapter_configs[name] = config
        self.active_adapter = self.active_adapter or name
        self._switch_lora()

    def _switch_lora(self) -> None:
        """Let the LoRA of the active adapter work, and be trained where that adapter is."""
        has_one = self.adapter_config.lora_config is not None and not self._is_disabled
        is_trainable = any(parameter.requires_grad for parameter in self.adapter.parameters())
        switch_lora(self.vlm, self.active_adapter if has_one else None, is_trainable)

    def _complete(self, config: Spa3AdapterConfig) -> Spa3AdapterConfig:
        """Fill in what the VLM and the encoder tell, on a copy, and refuse what contradicts them."""
        vlm, encoder = self.vlm, self.spatial_encoder
        text = vlm.config.get_text_config()
        known = {"base_model_type": vlm.config.model_type, "hidden_size": text.hidden_size}
        if encoder is not None:
            known["spatial_hidden_size"] = _spatial_hidden_size(encoder, config.spatial_features)
        for name, value in known.items():
            if getattr(config, name) not in (None, value):
                raise ValueError(
                    f"the adapter is for {name} = {getattr(config, name)!r}; this VLM or spatial encoder has {value!r}"
                )
        filled = known | {"num_attention_heads": getattr(text, "num_attention_heads", None)}
        for part, model in {"base_model": vlm, "spatial_encoder": encoder}.items():
            recorded, actual = getattr(config, f"{part}_name_or_path"), name_of(model)
            if recorded is None and model is not None:
                filled[f"{part}_name_or_path"] = actual
                filled[f"{part}_revision"] = revision_of(model)
            elif None not in (recorded, actual) and recorded != actual and not recorded.startswith("./"):
                logger.warning("the adapter is for %s = %r, and is now used with %r", part, recorded, actual)
        return replace(config, **{name: value for name, value in filled.items() if getattr(config, name) is None})


__all__ = ["Spa3AdapterModel", "backbone_of", "encode_scenes"]
