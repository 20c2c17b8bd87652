"""A tiny random VLM of every family that Spa3-VLM works with, and inputs to go with it, made by hand."""

import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny_models import scene_pixels
from torch import Tensor, nn
from transformers import (
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    LlavaOnevisionConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForImageTextToText

from spa3r_hf import Spa3AdapterConfig, Spa3VLM, get_spa3_vlm


IMAGE, VIDEO, START, END, PAD, BOS, EOS = 90, 91, 92, 93, 0, 1, 2
VOCABULARY = 100
WIDTH = 16  # of all language models: E
SPATIAL_WIDTH = 32  # of tiny_models.tiny_spa3r: D

_TEXT = {
    **{"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "initializer_range": 0.3},
    **{"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "tie_word_embeddings": False},
}
_IDS = {"image_token_id": IMAGE, "tie_word_embeddings": False}
_QWEN_IDS = {**_IDS, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
_QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 2, "temporal_patch_size": 2, "spatial_merge_size": 2}
_SIGLIP = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 4, "patch_size": 1, "initializer_range": 0.3},
}


def _qwen_text(sections: Sequence[int]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {**_TEXT, "rope_parameters": rope, "head_dim": 8}


def _qwen2_vl() -> Qwen2VLConfig:
    vision = {**_QWEN_VISION, "embed_dim": 16, "hidden_size": WIDTH, "mlp_ratio": 2}
    return Qwen2VLConfig(text_config=_qwen_text((2, 1, 1)), vision_config=vision, **_QWEN_IDS)


def _qwen2_5_vl() -> Qwen2_5_VLConfig:
    vision = {
        **_QWEN_VISION,
        **{"hidden_size": 16, "out_hidden_size": WIDTH, "intermediate_size": 24, "window_size": 8},
        "fullatt_block_indexes": [0],
    }
    return Qwen2_5_VLConfig(text_config=_qwen_text((2, 1, 1)), vision_config=vision, **_QWEN_IDS)


def _qwen3_vl() -> Qwen3VLConfig:
    vision = {
        **_QWEN_VISION,
        **{"depth": 2, "hidden_size": 16, "out_hidden_size": WIDTH, "intermediate_size": 24},
        **{"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    }
    return Qwen3VLConfig(text_config=_qwen_text((2, 1, 1)), vision_config=vision, **_QWEN_IDS)


def _llava_onevision() -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        text_config={**_TEXT, "model_type": "qwen2"},
        vision_config={**_SIGLIP, "model_type": "siglip_vision_model", "patch_size": 2, "vision_use_head": False},
        **{"image_grid_pinpoints": [[4, 4]], "vision_feature_layer": -1, "video_token_id": VIDEO},
        **_IDS,
    )


def _internvl() -> InternVLConfig:
    vision = {
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"image_size": [4, 4], "patch_size": [1, 1], "initializer_range": 0.3},
    }
    return InternVLConfig(text_config={**_TEXT, "model_type": "qwen2"}, vision_config=vision, **_IDS)


def _idefics3() -> Idefics3Config:
    text = {**_TEXT, "model_type": "llama"}
    return Idefics3Config(text_config=text, vision_config=_SIGLIP, scale_factor=2, pad_token_id=PAD, **_IDS)


def _smolvlm() -> SmolVLMConfig:
    text = {**_TEXT, "model_type": "llama"}
    return SmolVLMConfig(text_config=text, vision_config=_SIGLIP, scale_factor=2, pad_token_id=PAD, **_IDS)


def _gemma3() -> Gemma3Config:
    return Gemma3Config(
        text_config={
            **_TEXT,
            "head_dim": 8,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config={**_SIGLIP, "model_type": "siglip_vision_model", "vision_use_head": False},
        **{"mm_tokens_per_image": 4, "boi_token_index": START, "eoi_token_index": END},
        **_IDS,
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "gemma3": _gemma3,
}
FAMILIES = tuple(CONFIGS)


def tiny_vlm(family: str, seed: int = 0) -> PreTrainedModel:
    """A fresh VLM in eval mode, whose weights are large enough for pictures to matter."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(CONFIGS[family]()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3 if "embed" not in name else 1.0)
    model.generation_config.eos_token_id = None
    return model


@dataclass
class Sample:
    """A prompt: ids of text, with pictures (3, H, W) between them, in the order given."""

    parts: list[int | Tensor] = field(default_factory=list)

    @property
    def images(self) -> list[Tensor]:
        return [part for part in self.parts if isinstance(part, Tensor)]


def some_sample(num_images: int, seed: int, length: int = 4) -> Sample:
    """Text, pictures with text between them, text."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(10, 80, (count,), generator=generator).tolist()

    parts: list[int | Tensor] = [BOS, *words(2)]
    for _ in range(num_images):
        parts += [torch.randn(3, 4, 4, generator=generator), *words(1)]
    return Sample([*parts, *words(length)])


def _num_tokens(family: str, sample: Sample, index: int) -> int:
    if family.startswith("qwen"):
        return 4 if index % 2 == 0 else 6
    if family == "llava_onevision":
        # One picture comes whole and in parts, with a token at the end of each row; several come whole only.
        return 4 + 2 * 3 if len(sample.images) == 1 else 4 + 1
    return 4


def _patches(image: Tensor, index: int) -> tuple[Tensor, list[int]]:
    """A picture as Qwen's processors cut it: flat patches, here of random projection, and the grid."""
    grid = [1, 4, 4] if index % 2 == 0 else [1, 4, 6]
    repeated = image.flatten().repeat(grid[1] * grid[2] * 24 // image.numel() + 1)[: grid[1] * grid[2] * 24]
    return (repeated * torch.linspace(0.5, 1.5, len(repeated))).view(-1, 24), grid


def _pictures(family: str, samples: Sequence[Sample]) -> dict[str, Tensor]:
    images = [image for sample in samples for image in sample.images]
    if not images:
        return {}
    if family.startswith("qwen"):
        cut = [_patches(image, index) for sample in samples for index, image in enumerate(sample.images)]
        grids = torch.tensor([grid for _, grid in cut])
        return {"pixel_values": torch.cat([patches for patches, _ in cut]), "image_grid_thw": grids}
    if family in ("idefics3", "smolvlm"):
        pixels = torch.zeros(len(samples), max(len(sample.images) for sample in samples), 3, 4, 4)
        for row, sample in zip(pixels, samples, strict=True):
            for place, image in zip(row, sample.images, strict=False):
                place.copy_(image)
        return {"pixel_values": pixels}
    if family == "llava_onevision":
        return {
            "pixel_values": torch.stack([torch.stack((image, image.flip(-1))) for image in images]),
            "image_sizes": torch.tensor([[4, 4]] * len(images)),
            "batch_num_images": torch.tensor([len(sample.images) for sample in samples if sample.images]),
        }
    return {"pixel_values": torch.stack(images)}


def tiny_inputs(family: str, samples: Sequence[Sample], padding: str = "right") -> dict[str, Tensor]:
    """What the family's processor would give for these prompts, padded on the "right" or on the "left"."""
    rows = []
    for sample in samples:
        row: list[int] = []
        for part in sample.parts:
            if isinstance(part, Tensor):
                index = row.count(START)
                row += [START, *[IMAGE] * _num_tokens(family, sample, index), END]
            else:
                row.append(part)
        rows.append(row)
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for place, seen, row in zip(ids, mask, rows, strict=True):
        columns = slice(len(row)) if padding == "right" else slice(width - len(row), None)
        place[columns], seen[columns] = torch.tensor(row), 1
    inputs = {"input_ids": ids, "attention_mask": mask, **_pictures(family, samples)}
    if family.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    if family == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).int()
    return inputs


# --- Spa3-VLMs of them

# Samples with two pictures, none, one and three.
COUNTS = (2, 0, 1, 3)
SAMPLES = [some_sample(count, seed, length=3 + seed) for seed, count in enumerate(COUNTS)]
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def scenes(number: int = len(SAMPLES), views: int = 2, seed: int = 7) -> Tensor:
    return scene_pixels(number, views, 28, 28, seed)


def latents(number: int = len(SAMPLES), tokens: int = 5, width: int = SPATIAL_WIDTH, seed: int = 7) -> Tensor:
    return torch.randn(number, tokens, width, generator=torch.Generator().manual_seed(seed))


def disturb(model: Spa3VLM, seed: int = 3) -> Spa3VLM:
    """Weights as if the active adapter had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim > 1 else 0.5))
        for name, parameter in model.vlm.named_parameters():
            if f"lora_B.{model.active_adapter}" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def trained(family: str, encoder: nn.Module | None, **settings) -> Spa3VLM:
    return disturb(get_spa3_vlm(tiny_vlm(family), encoder, Spa3AdapterConfig(**settings)))


def close(left: Tensor, right: Tensor, tolerance: float = 5e-5) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@contextmanager
def counted(model: Spa3VLM):
    """Calls of the spatial encoder and of its backbone."""
    calls: list[str] = []
    parts = {"encoder": model.spatial_encoder, "backbone": model.spatial_encoder.backbone}
    hooks = [part.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, part in parts.items()]
    yield calls
    for hook in hooks:
        hook.remove()


@contextmanager
def propagated(name: str):
    """The library's loggers keep their records to themselves, where pytest cannot see them."""
    logger = logging.getLogger(name)
    before, logger.propagate = logger.propagate, True
    yield
    logger.propagate = before
