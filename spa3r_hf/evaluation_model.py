"""Which model an evaluation asks: any VLM, alone or with an adapter, and exactly which weights these are."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils.hub import cached_file, extract_commit_hash

from .checkpoint_spa3_vlm import location_of
from .configuration_spa3_vlm import ADAPTER_CONFIG_NAME, Spa3AdapterConfig
from .image_processing_spa3r import Spa3RImageProcessor
from .modeling_spa3_vlm import Spa3VLM
from .processing_spa3_vlm import Spa3VLMProcessor
from .run_facts import shown_path


_HASH = "sha256:"
_DECISIVE = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*config.json", "tokenizer.json")


@dataclass(frozen=True)
class Source:
    """
    A folder or a Hub repository.

    Attributes:
        name: Path or id.
        revision: Of the repository; None for that of its default branch.
        config_name: Which of its files is looked for to learn its commit.
        label: What it is called, where that is not its name.
    """

    name: str
    revision: str | None = None
    config_name: str = "config.json"
    label: str | None = None

    def identity(self) -> dict[str, str | None]:
        """
        `id`, and as `revision` the commit, or of a folder a hash of its weights and configuration.

        Raises:
            OSError: There is no such folder or repository.
        """
        if Path(self.name).is_dir():
            return {"id": shown_path(self.label or self.name), "revision": _HASH + hash_of_folder(Path(self.name))}
        path = cached_file(self.name, self.config_name, revision=self.revision or "main")
        return {"id": self.name, "revision": extract_commit_hash(str(path), None)}


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of which folders are what they hold, wherever they are."""
    return {
        name: value["revision"] if isinstance(value, dict) and _is_hash(value.get("revision")) else value
        for name, value in settings.items()
    }


def _is_hash(revision: Any) -> bool:
    return isinstance(revision, str) and revision.startswith(_HASH)


def hash_of_folder(folder: Path) -> str:
    """Of what decides what a folder's model computes: settings and weights, also those its index finds elsewhere."""
    files = {path for pattern in _DECISIVE for path in folder.glob(pattern)}
    for index in folder.glob("*.index.json"):
        files |= {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
    state = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        state.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                state.update(block)
    return state.hexdigest()


@dataclass(frozen=True)
class EvaluatedModel:
    """
    The parts of a model, none of them loaded yet.

    Attributes:
        name: For tables.
        vlm: The base VLM.
        adapter: None: the VLM alone is asked.
        spatial_encoder: The adapter's.
        processor: What the processor is made of: the adapter, or the VLM.
    """

    name: str
    vlm: Source
    adapter: Source | None
    spatial_encoder: Source | None
    processor: Source

    @classmethod
    def choose(
        cls,
        adapter: Source | None = None,
        vlm: Source | None = None,
        spatial_encoder: Source | None = None,
        use_adapter: bool = True,
    ) -> "EvaluatedModel":
        """
        Args:
            adapter: None: a VLM alone.
            vlm: Default: that of the adapter.
            spatial_encoder: Default: that of the adapter.
            use_adapter: Whether the adapter is used, or its VLM is asked alone, with the frames that the adapter gets.

        Raises:
            OSError: There is no such adapter.
            ValueError: No model is given, or the adapter does not name its VLM or its encoder.
        """
        if adapter is None:
            if vlm is None or spatial_encoder is not None or not use_adapter:
                raise ValueError("there is no adapter; expected a VLM alone, or an adapter")
            return cls(_last_part(vlm.name), vlm, None, None, vlm)
        options = {"revision": adapter.revision or "main"}
        adapter = Source(adapter.name, adapter.revision, ADAPTER_CONFIG_NAME)
        config = Spa3AdapterConfig.from_pretrained(adapter.name, **options)
        parts = {"base_model": vlm, "spatial_encoder": spatial_encoder}
        for part, given in parts.items():
            named = getattr(config, f"{part}_name_or_path")
            if given is None and named is not None:
                place = location_of(named, adapter.name, **options)
                label = f"{adapter.name}/{named.removeprefix('./')}" if named.startswith("./") else None
                parts[part] = Source(place, getattr(config, f"{part}_revision"), label=label)
        if parts["base_model"] is None:
            raise ValueError(f"the adapter {adapter.name} does not name its VLM; expected one by --vlm_name_or_path")
        if not use_adapter:
            return cls(f"{_last_part(adapter.name)}, VLM alone", parts["base_model"], None, None, adapter)
        if parts["spatial_encoder"] is None:
            raise ValueError(
                f"the adapter {adapter.name} does not name its encoder; expected one by --spatial_encoder_name_or_path"
            )
        return cls(_last_part(adapter.name), parts["base_model"], adapter, parts["spatial_encoder"], adapter)

    def identities(self) -> dict[str, dict[str, str | None] | None]:
        """`Source.identity` of `vlm`, `adapter` and `spatial_encoder`, None for what there is not."""
        parts = {"vlm": self.vlm, "adapter": self.adapter, "spatial_encoder": self.spatial_encoder}
        return {name: None if part is None else part.identity() for name, part in parts.items()}

    def settings(
        self, processor: Spa3VLMProcessor, dtype: str, attn_implementation: str, max_new_tokens: int
    ) -> dict[str, Any]:
        """All about the model and its inputs that decides its answers."""
        pixels = processor.spatial_image_processor
        template = str(processor.chat_template)
        return {
            **self.identities(),
            "dtype": dtype,
            "attn_implementation": attn_implementation,
            "frames": {name: getattr(processor, name) for name in ("seconds_per_frame", "min_frames", "max_frames")},
            "pixels": {name: getattr(pixels, name) for name in ("size", "mode", "patch_size")},
            "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
            "max_new_tokens": max_new_tokens,
        }

    def load_processor(self, image_size: int | None = None, **frames: Any) -> Spa3VLMProcessor:
        """
        Args:
            image_size: Width that pictures are resized to, in pixels. Default: the processor's own.
            frames: `seconds_per_frame`, `min_frames`, `max_frames`, where they are not the processor's own.
        """
        options: dict[str, Any] = {"revision": self.processor.revision or "main"}
        if self.processor is self.vlm:
            spatial = None if image_size is None else Spa3RImageProcessor(size=image_size)
            return Spa3VLMProcessor.from_vlm(self.vlm.name, spatial, **options, **frames)
        processor = Spa3VLMProcessor.from_pretrained(self.processor.name, **options, **frames)
        if image_size is not None:
            processor.spatial_options["size"] = image_size
            _ = processor.spatial_image_processor  # refuses a size that cannot be
        return processor

    def dtype(self, asked: str, device: torch.device) -> str:
        """The type of the VLM's weights: "auto" is as they were saved, on a CPU float32, which is faster there."""
        if asked != "auto":
            return asked
        if device.type == "cpu":
            return "float32"
        saved = AutoConfig.from_pretrained(self.vlm.name, revision=self.vlm.revision or "main").dtype
        return str(saved or torch.float32).removeprefix("torch.")

    def load(self, dtype: str, attn_implementation: str, device: torch.device) -> Spa3VLM | PreTrainedModel:
        """The model, in eval mode, the encoder in its own type."""
        vlm: Any = AutoModelForImageTextToText.from_pretrained(
            self.vlm.name,
            revision=self.vlm.revision or "main",
            dtype=dtype,
            attn_implementation=attn_implementation,
        )
        if self.adapter is None or self.spatial_encoder is None:
            return vlm.to(device).eval()
        encoder: Any = AutoModel.from_pretrained(
            self.spatial_encoder.name, revision=self.spatial_encoder.revision or "main"
        )
        revision = self.adapter.revision or "main"
        model = Spa3VLM.from_pretrained(self.adapter.name, vlm.to(device), encoder.to(device), revision=revision)
        return model.eval()


def _last_part(name: str) -> str:
    path = Path(name)
    return (path.resolve() if path.is_dir() else path).name


__all__ = ["EvaluatedModel", "Source", "without_places"]
