"""
Files of Spa3-VLM's adapters: `adapter_config.json` and `adapter_model.safetensors`, in a folder or a Hub repository.

Keys of the weights: `spatial_adapter.*`, and `lora.*` where there is LoRA. A VLM or a spatial encoder that has no
other home stands in a folder beside them, which the configuration names by a path that begins with "./".
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils.hub import extract_commit_hash

from .configuration_spa3_vlm import Spa3AdapterConfig, adapter_file


ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
VLM_FOLDER = "./vlm"
SPATIAL_ENCODER_FOLDER = "./spatial_encoder"

SPATIAL_PREFIX = "spatial_adapter."
LORA_PREFIX = "lora."


def name_of(model: nn.Module | None) -> str | None:
    """The repository id or the folder that a model was loaded from, if any."""
    return getattr(model, "name_or_path", None) or None


def revision_of(model: nn.Module | None) -> str | None:
    """
    The commit of the Hub repository that a model was loaded from, as far as it can be told.

    Newer versions of `transformers` do not note it with the model. Then it is the commit of the default branch in the
    local cache: whoever loads another revision has to record it.
    """
    name = name_of(model)
    noted = getattr(getattr(model, "config", None), "_commit_hash", None)
    if noted is not None or name is None or os.path.exists(name):
        return noted
    try:
        path = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return extract_commit_hash(path if isinstance(path, str) else None, None)


def with_prefix(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """`state_dict` with `prefix` put before every key."""
    return {prefix + key: value for key, value in state_dict.items()}


def under_prefix(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What of `state_dict` is under `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def write_adapter(
    folder: Path, config: Spa3AdapterConfig, spatial: Mapping[str, Tensor], lora: Mapping[str, Tensor]
) -> None:
    """Write the two files of an adapter."""
    config.save_pretrained(folder)
    weights = with_prefix(spatial, SPATIAL_PREFIX) | with_prefix(lora, LORA_PREFIX)
    weights = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    save_file(weights, folder / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})


def read_adapter(
    adapter: str | os.PathLike, **hub_options: Any
) -> tuple[Spa3AdapterConfig, dict[str, Tensor], dict[str, Tensor]]:
    """
    Configuration, weights of the spatial adapter and weights of its LoRA, from a folder or a Hub repository.

    Raises:
        OSError: A file is missing.
        ValueError: The files are not those of an adapter of Spa3-VLM.
    """
    config = Spa3AdapterConfig.from_pretrained(adapter, **hub_options)
    path = adapter_file(adapter, ADAPTER_WEIGHTS_NAME, **hub_options)
    weights = load_file(path)
    others = sorted(key for key in weights if not key.startswith((SPATIAL_PREFIX, LORA_PREFIX)))
    if others:
        raise ValueError(
            f"{path} has {len(others)} keys, such as {others[:3]}, that are not an adapter's of Spa3-VLM; expected "
            f"{SPATIAL_PREFIX}* and {LORA_PREFIX}*"
        )
    return config, under_prefix(weights, SPATIAL_PREFIX), under_prefix(weights, LORA_PREFIX)


def check_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """
    Raises:
        ValueError: Keys are left over or missing, or shapes differ.
    """
    found_shapes, expected_shapes = ({key: value.shape for key, value in d.items()} for d in (found, expected))
    if found_shapes != expected_shapes:
        names = found_shapes.keys() | expected_shapes.keys()
        wrong = sorted(name for name in names if found_shapes.get(name) != expected_shapes.get(name))
        raise ValueError(
            f"the weights do not fit {what}: {len(wrong)} keys are left over, missing or of another shape, such as "
            f"{wrong[:4]}"
        )


def location_of(name: str, adapter: str | os.PathLike, **hub_options: Any) -> str:
    """
    Where to load a model from that an adapter's configuration names: as it says, or beside the adapter itself.

    Raises:
        FileNotFoundError: It ought to be beside the adapter, and is not.
    """
    if not name.startswith("./"):
        return name
    folder = Path(adapter)
    if not folder.is_dir():
        patterns = [f"{name.removeprefix('./')}/*"]
        folder = Path(snapshot_download(str(adapter), allow_patterns=patterns, **hub_options))
    if not (folder / name).is_dir():
        raise FileNotFoundError(f"the adapter {adapter} is for the model in {name}, but there is no {folder / name}")
    return str(folder / name)
