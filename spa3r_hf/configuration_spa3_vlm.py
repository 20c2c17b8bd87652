"""Configuration of the adapter that gives a vision-language model Spa3R's latents (arXiv 2602.21186, section 3.4)."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.utils.hub import cached_file


ADAPTER_CONFIG_NAME = "adapter_config.json"
# What a file says it is: PEFT's own files have the same name.
_ADAPTER_TYPE = "spa3_vlm"

INTEGRATIONS = ("cross_attention", "append")
SPATIAL_FEATURES = ("latents", "backbone")


def adapter_file(adapter: str | os.PathLike, name: str, **hub_options: Any) -> Path:
    """
    A file of an adapter, downloaded where it is in a Hub repository.

    Raises:
        OSError: It cannot be had.
    """
    try:
        return Path(str(cached_file(adapter, name, **hub_options)))
    except OSError as error:
        raise OSError(f"cannot find {name} of the adapter {adapter}: {error}") from error


def _plain(value: Any) -> Any:
    """What JSON can hold of a value of PEFT's configurations: sets become sorted lists, enums their values."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


@strict(accept_kwargs=True)
@dataclass
class Spa3AdapterConfig:
    """
    Configuration of one adapter of a [`Spa3VLM`]. The defaults are those of the paper.

    What is None is filled in by `get_spa3_vlm`, from the models that it is given.

    Args:
        integration (`"cross_attention"` or `"append"`): The visual tokens read the scene in a residual
            cross-attention, or the scene's tokens are appended to its visual tokens (the paper's Table 5). Untrained,
            `"cross_attention"` changes nothing; `"append"` makes sequences longer, and so changes logits at once.
        spatial_features (`"latents"` or `"backbone"`): What is read: the Q latents of the Spa3R encoder, or the
            last-layer patch features of all views, as the geometry backbone gives them (the paper's Table 3).
        hidden_size (`int`): Width E of the VLM's language model.
        num_attention_heads (`int`): Heads of the cross-attention. Default: as many as the language model has.
        spatial_hidden_size (`int`): Width D of the latents, or 2C of the backbone's features.
        lora_config (`peft.LoraConfig` or `dict` of its arguments): LoRA on the language model, which belongs to this
            adapter: trained, saved, loaded, switched and disabled with it. Kept as a dict. None: no LoRA.
        base_model_name_or_path (`str`), base_model_revision (`str`), base_model_type (`str`): The VLM that the adapter
            is for. The revision has to be given if it is not the default branch's, as `transformers` does not tell it.
            A path that begins with "./" is a folder beside this file: a VLM that was trained as well.
        spatial_encoder_name_or_path (`str`), spatial_encoder_revision (`str`): The same for the spatial encoder.

    Raises:
        ValueError: A value is out of its range, or a key is unknown.
    """

    integration: str = "cross_attention"
    spatial_features: str = "latents"
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    spatial_hidden_size: int | None = None
    lora_config: Any = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_type: str | None = None
    spatial_encoder_name_or_path: str | None = None
    spatial_encoder_revision: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs:
            known = [field.name for field in fields(self)]
            raise ValueError(f"Spa3AdapterConfig does not know {sorted(kwargs)}; its keys are {known}")
        for name, choices in (("integration", INTEGRATIONS), ("spatial_features", SPATIAL_FEATURES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} = {getattr(self, name)!r}; expected one of {choices}")
        for name in ("hidden_size", "num_attention_heads", "spatial_hidden_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}; expected a number above 0")
        if self.hidden_size is not None:
            self._check_hidden_size(self.hidden_size)
        if self.lora_config is not None:
            self.lora_config = self._lora_settings(self.lora_config)

    def _check_hidden_size(self, size: int) -> None:
        if self.integration != "cross_attention":
            return
        if size % 4:
            raise ValueError(
                f"hidden_size = {size}; expected a multiple of 4, as the adapter's MLP is a quarter as wide"
            )
        if self.num_attention_heads is not None and size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads}; expected a divisor of hidden_size = {size}"
            )

    @staticmethod
    def _lora_settings(lora_config: Any) -> dict[str, Any]:
        settings = lora_config.to_dict() if hasattr(lora_config, "to_dict") else lora_config
        if not isinstance(settings, Mapping):
            raise ValueError(f"lora_config is a {type(lora_config).__name__}; expected a peft.LoraConfig or a dict")
        settings = {key: _plain(value) for key, value in settings.items() if value is not None}
        if settings.get("peft_type", "LORA") != "LORA":
            raise ValueError(f"lora_config is of peft_type {settings['peft_type']!r}; expected 'LORA'")
        return settings

    def to_dict(self) -> dict[str, Any]:
        """All settings, as they stand in the file."""
        return {"adapter_type": _ADAPTER_TYPE, **asdict(self)}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Spa3AdapterConfig":
        """
        The inverse of `to_dict`.

        Raises:
            ValueError: The settings are another kind of adapter's, a value is out of its range, or a key is unknown.
        """
        settings = dict(settings)
        kind = settings.pop("adapter_type", None)
        if kind != _ADAPTER_TYPE:
            peft_type = settings.get("peft_type")
            what = f"a PEFT adapter of type {peft_type!r}" if peft_type else f"adapter_type = {kind!r}"
            raise ValueError(f"this is the configuration of {what}; expected adapter_type = {_ADAPTER_TYPE!r}")
        return cls(**settings)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `adapter_config.json`."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ADAPTER_CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, adapter: str | os.PathLike, **hub_options: Any) -> "Spa3AdapterConfig":
        """
        Read `adapter_config.json` of a folder or of a Hub repository.

        Args:
            adapter: The folder, or the repository's id.
            hub_options: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`, ...

        Raises:
            OSError: There is no such file.
            ValueError: It is no JSON object, or as in `from_dict`.
        """
        path = adapter_file(adapter, ADAPTER_CONFIG_NAME, **hub_options)
        try:
            settings = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        if not isinstance(settings, dict):
            raise ValueError(f"{path} holds a {type(settings).__name__}; expected an object of settings")
        return cls.from_dict(settings)


__all__ = ["Spa3AdapterConfig"]
