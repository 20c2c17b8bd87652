"""Original checkpoints as they lie on disk: safetensors, in shards or whole, or pickles of tensors alone."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor


CONFIG_NAME = "config.json"
# What a folder may hold, the first that is there: a file, or the index of several.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """
    State dict of a safetensors file or a pickle, or of a folder that holds one of them, whole or in shards.

    In a pickle the state dict may lie under `state_dict` or `model`; in a file of reference numbers it lies beside
    inputs and outputs, under `weights.*`.

    Raises:
        ValueError: A file is absent or damaged, or holds more than tensors and plain containers, or no state dict; the
            index of a folder names other tensors than its shards hold.
    """
    if not path.is_dir():
        return _read_file(path)
    name = next((name for name in _WEIGHTS if (path / name).exists()), None)
    if name is None:
        raise ValueError(f"{path} holds no weights; expected one of {_WEIGHTS} in this folder")
    return _read_shards(path / name) if name.endswith(".index.json") else _read_file(path / name)


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            weights = {key.removeprefix("weights."): tensors[key] for key in tensors if key.startswith("weights.")}
            return weights or tensors
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} is refused; expected safetensors or a pickle of tensors alone: {error}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict; expected tensors by name, bare, or under state_dict or model")
    return content


def _read_shards(index: Path) -> dict[str, Tensor]:
    shard_of = _read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise ValueError(f"{index} has no weight_map; expected the name of a file for every tensor")
    state_dict: dict[str, Tensor] = {}
    for shard in sorted(set(shard_of.values())):
        # Only a name: an index is no leave to read what lies elsewhere.
        if Path(shard).name != shard:
            raise ValueError(f"{index} names the shard {shard!r}; expected a file of the same folder")
        tensors = _read_file(index.with_name(shard))
        named = {key for key, name in shard_of.items() if name == shard}
        if named != tensors.keys():
            lost, extra = sorted(named - tensors.keys()), sorted(tensors.keys() - named)
            raise ValueError(
                f"{index.with_name(shard)} is not the shard that the index describes: {len(lost)} tensors are "
                f"missing, such as {lost[:3]}, and {len(extra)} are not expected, such as {extra[:3]}"
            )
        state_dict |= tensors
    return state_dict


def read_config(checkpoint: Path) -> dict[str, Any] | None:
    """
    The model's configuration as it lies with a checkpoint: `config` in the metadata of a safetensors file, or
    `config.json` in the folder. None where there is none.

    Raises:
        ValueError: It is no JSON object.
    """
    if checkpoint.suffix == ".safetensors" and checkpoint.is_file():
        with safe_open(checkpoint, "pt") as file:
            text = (file.metadata() or {}).get("config")
        if text is not None:
            return _object(text, f"config in the metadata of {checkpoint}")
    path = folder_of(checkpoint) / CONFIG_NAME
    return _read_json(path) if path.is_file() else None


def folder_of(checkpoint: Path) -> Path:
    """Where what goes with a checkpoint lies: the folder itself, or that of its file."""
    return checkpoint if checkpoint.is_dir() else checkpoint.parent


def _read_json(path: Path) -> dict[str, Any]:
    return _object(path.read_text(), str(path))


def _object(text: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds a {type(value).__name__}; expected an object")
    return value


__all__ = ["folder_of", "read_checkpoint", "read_config"]
