"""LoRA on the language model of a VLM, in place, by `peft`: an adapter of Spa3-VLM may have one of its own."""

import re
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .checkpoint_spa3_vlm import check_weights
from .optional import require


def _peft() -> ModuleType:
    return require("peft.functional", "lora")


def has_lora(vlm: PreTrainedModel) -> bool:
    """Whether anything of PEFT's has been put into the VLM."""
    return bool(getattr(vlm, "peft_config", None))


def add_lora(
    vlm: PreTrainedModel, settings: Mapping[str, Any], name: str, weights: dict[str, Tensor] | None = None
) -> None:
    """
    Put LoRA layers under the name `name` into the language model, and nowhere else: fresh, or with `weights`, which
    `lora_state_dict` gave.

    Raises:
        ImportError: `peft` is missing.
        ValueError: No module of the language model is a target, or the weights do not fit.
    """
    config = require("peft", "lora").LoraConfig(**settings)
    if config.exclude_modules is None:
        # Vision towers have modules of the same names.
        language_model = vlm.get_decoder()
        prefix = next(name for name, module in vlm.named_modules() if module is language_model)
        config.exclude_modules = rf"(?!{re.escape(prefix)}\.).*"
    trained = [parameter for parameter in vlm.parameters() if parameter.requires_grad]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        try:
            _peft().inject_adapter_in_model(config, vlm, adapter_name=name)
        except ValueError as error:
            # Nothing was changed, but PEFT has noted the configuration all the same.
            getattr(vlm, "peft_config", {}).pop(name, None)
            raise ValueError(
                f"lora_config has target_modules = {settings.get('target_modules')}; expected modules of the language "
                f"model: {error}"
            ) from error
    # PEFT froze all but the new layers; what was trained before still is.
    for parameter in trained:
        parameter.requires_grad_(True)
    # Small weights train badly in half precision; the base keeps its own.
    _peft().cast_adapter_dtype(vlm, name)
    if weights is None:
        return
    try:
        fill_lora(vlm, name, weights)
    except ValueError:
        delete_lora(vlm, name)
        raise


def fill_lora(vlm: PreTrainedModel, name: str, weights: dict[str, Tensor]) -> None:
    """
    Put what `lora_state_dict` gave into the LoRA of a name.

    Raises:
        ValueError: Keys are left over or missing, or shapes differ.
    """
    check_weights(weights, lora_state_dict(vlm, name, vlm.state_dict()), "the language model's LoRA")
    _peft().set_peft_model_state_dict(vlm, weights, adapter_name=name)


def switch_lora(vlm: PreTrainedModel, name: str | None, is_trainable: bool = False) -> None:
    """Let the LoRA of one name work, or none; the others rest, and are frozen."""
    if not has_lora(vlm):
        return
    layer_class = require("peft.tuners.tuners_utils", "lora").BaseTunerLayer
    for layer in (module for module in vlm.modules() if isinstance(module, layer_class)):
        layer.enable_adapters(name is not None)
    if name is not None:
        _peft().set_adapter(vlm, name, inference_mode=not is_trainable)


def delete_lora(vlm: PreTrainedModel, name: str) -> None:
    """Take the LoRA of a name out again."""
    with warnings.catch_warnings():
        # Which of the others works then is for `switch_lora` to say.
        warnings.filterwarnings("ignore", ".*was active which is now deleted")
        _peft().delete_adapter(vlm, name, prefix="lora_")
    del vlm.peft_config[name]


def lora_state_dict(vlm: PreTrainedModel, name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA's own entries of the VLM's `state_dict`, without its name in their keys."""
    return _peft().get_peft_model_state_dict(
        vlm, state_dict=state_dict, adapter_name=name, save_embedding_layers=False
    )


def plain_key(key: str) -> str:
    """What a weight of the VLM's own was called before LoRA was put in."""
    return key.replace(".base_layer.", ".")


def without_lora(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The VLM's state dict as it was before LoRA was put in."""
    return {plain_key(key): value for key, value in state_dict.items() if ".lora_" not in key}


def vlm_is_trained(vlm: PreTrainedModel) -> bool:
    """Whether any weight of the VLM's own, not of a LoRA, requires gradients."""
    return any(parameter.requires_grad for name, parameter in vlm.named_parameters() if ".lora_" not in name)
