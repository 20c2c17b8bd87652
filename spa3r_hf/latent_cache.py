"""What the frozen spatial encoder makes of scenes, kept on disk: encoded once, for all epochs and runs."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .modeling_spa3_vlm_adapters import backbone_of, encode_scenes
from .modeling_spa3r import Spa3RModel
from .modeling_spa3r_vggt import Spa3RVGGTModel


logger = logging.getLogger(__name__)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_NAME = "latents"
_OF_FILES = {"architectures", "auto_map", "dtype", "transformers_version"}


def fingerprint(encoder: nn.Module, spatial_features: str) -> str:
    """
    A hash of all that decides what `spatial_features` of given pixels are: configuration, weights and their types.

    Args:
        encoder: A [`Spa3RModel`] or [`Spa3RVGGTModel`].
        spatial_features: See `Spa3AdapterConfig`.
    """
    part: Any = encoder if spatial_features == "latents" else backbone_of(encoder)  # type: ignore[arg-type]
    settings = [spatial_features, _settings(part.config.to_dict())]
    state = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, value in sorted(part.state_dict().items()):
        state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        state.update(_bytes(value))
    return state.hexdigest()


def _settings(config: Any) -> Any:
    """A configuration without what it says of its own files, which changes nothing that is computed."""
    if not isinstance(config, dict):
        return config
    return {
        key: _settings(value) for key, value in config.items() if not (key in _OF_FILES or str(key).startswith("_"))
    }


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


class LatentCache:
    """
    Latents of scenes in safetensors files, `<folder>/<encoder's fingerprint>-<type>/<key of the scene>.safetensors`.

    A scene's key is a hash of its pixels as the encoder gets them, which follow from the content of its pictures and
    from the preprocessing. Whatever changes these, the encoder or the type makes another file: nothing old is read.
    Files are written whole or not at all, so that several processes may share a folder.

    Args:
        folder: Made if need be.
        encoder_fingerprint: See `fingerprint`.
        dtype: What latents are stored in: "float16" (the default; latents have passed a LayerNorm, and keep 11 bits),
            "bfloat16" (8 bits, but any range) or "float32" (exact, twice the size).

    Raises:
        ValueError: An unknown type.
    """

    def __init__(self, folder: str | os.PathLike, encoder_fingerprint: str, dtype: str = "float16"):
        if dtype not in DTYPES:
            raise ValueError(f"dtype = {dtype!r}; expected one of {sorted(DTYPES)}")
        self.dtype = DTYPES[dtype]
        self.folder = Path(folder) / f"{encoder_fingerprint}-{dtype}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def key(self, views: Tensor) -> str:
        """The key of a scene: `views` (V, 3, H, W), as the encoder gets them."""
        return hashlib.sha256(f"{views.dtype} {tuple(views.shape)}".encode() + _bytes(views)).hexdigest()

    def look_up(self, scenes: Sequence[Tensor]) -> dict[str, list[Any]]:
        """
        What is known of some scenes, for `SceneEncoder.complete`.

        Args:
            scenes: Their views, (V, 3, H, W) each.

        Returns:
            `spatial_keys`; `spatial_latents`, None where there are none yet; `spatial_pixel_values`, None otherwise.
        """
        keys = [self.key(views) for views in scenes]
        found = [self.load(key) for key in keys]
        missing = [views if latents is None else None for views, latents in zip(scenes, found, strict=True)]
        return {"spatial_keys": keys, "spatial_latents": found, "spatial_pixel_values": missing}

    def load(self, key: str) -> Tensor | None:
        """Latents (K, D) in the type that they are stored in, or None where there are none, or none that are whole."""
        path = self._path(key)
        try:
            return load_file(path)[_NAME]
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError) as error:
            logger.warning("%s cannot be read and is written anew: %s", path, error)
            return None

    def save(self, key: str, latents: Tensor) -> Tensor:
        """
        Keep the latents (K, D) of a scene.

        Returns:
            What `load` will give, on the device of `latents`: so the first use of a scene is as all others.

        Raises:
            ValueError: They are out of the range of the type.
        """
        stored = latents.detach().to(self.dtype)
        if not stored.isfinite().all():
            raise ValueError(
                f"latents reach {float(latents.abs().max()):.3g}, which {self.dtype} cannot hold; expected finite "
                "ones, or dtype = 'bfloat16'"
            )
        path = self._path(key)
        # Its name is not read until it is whole; two processes that write it write the same.
        part = path.with_name(f"{key}.{os.getpid()}.part")
        save_file({_NAME: stored.cpu().contiguous()}, part)
        part.replace(path)
        return stored

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


class SceneEncoder:
    """
    A frozen spatial encoder, apart from the model that is trained, so that nothing wraps, shards or saves it.

    Every scene is encoded by itself, in the encoder's own type, so that what comes out does not depend on its batch.

    Args:
        encoder: A [`Spa3RModel`] or [`Spa3RVGGTModel`].
        spatial_features: See `Spa3AdapterConfig`.
        cache_dir: See `LatentCache`. None: nothing is kept.
        cache_dtype: See `LatentCache`.
    """

    def __init__(
        self,
        encoder: Spa3RModel | Spa3RVGGTModel,
        spatial_features: str = "latents",
        cache_dir: str | os.PathLike | None = None,
        cache_dtype: str = "float16",
    ):
        self.encoder = encoder.eval().requires_grad_(False)
        self.spatial_features = spatial_features
        self.cache = None
        if cache_dir is not None:
            self.cache = LatentCache(cache_dir, fingerprint(encoder, spatial_features), cache_dtype)

    def to(self, device: torch.device) -> "SceneEncoder":
        self.encoder.to(device)  # type: ignore[arg-type]
        return self

    def encode(self, views: Tensor) -> Tensor:
        """A scene's views (V, 3, H, W) -> (K, D): its latents, or the backbone's features of all patches."""
        return encode_scenes(self.encoder, views[None], self.spatial_features)[0]

    def complete(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """
        Inputs with the latents of all their scenes, `spatial_latents`, instead of `spatial_pixel_values`, or of what
        `LatentCache.look_up` gives of them.
        """
        batch = dict(inputs)
        scenes = batch.pop("spatial_pixel_values")
        keys: Sequence[str | None] = batch.pop("spatial_keys", [None] * len(scenes))
        latents = batch.pop("spatial_latents", [None] * len(scenes))
        made: dict[str | None, Tensor] = {}
        for place, (views, key) in enumerate(zip(scenes, keys, strict=True)):
            if latents[place] is not None:
                continue
            if key in made:
                latents[place] = made[key]
                continue
            encoded = self.encode(views)
            if self.cache is not None and key is not None:
                made[key] = encoded = self.cache.save(key, encoded)
            latents[place] = encoded
        return batch | {"spatial_latents": latents}


__all__ = ["LatentCache", "SceneEncoder", "fingerprint"]
