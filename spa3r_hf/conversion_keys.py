"""
Names in the original checkpoints (the Spa3R release, VGGT-1B, DINOv3), and how a model is filled with what has them.

Strict: every key is used, or named in `IGNORED`; every parameter is filled, with the shape it must have.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel


logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=PreTrainedModel)

# Keys that are left out on purpose (matched from the start of the original key).
IGNORED = {
    r"track_head\.": "VGGT's point tracker, which Spa3R does not use",
    r"(dino\.)?rope_embed\.periods$": "recomputed from rope_theta, after a check that it gives these periods",
    r"(dino\.)?blocks\.\d+\.attn\.qkv\.bias_mask$": "constant, after a check that it masks the keys' bias only",
    r"(dino\.)?local_cls_norm\.": "DINOv3's norm for local crops, used in its own training only",
}

_BLOCK = [
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.", ".attention."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
]
VGGT_KEYS = [
    (r"^aggregator\.(camera|register)_token$", r"\1_token"),
    (r"^aggregator\.(frame|global)_blocks\.", r"\1_layers."),
    (r"^aggregator\.patch_embed\.proj\.", "patch_embedding.projection."),
    (
        r"^aggregator\.patch_embed\.patch_embed\.proj\.",
        "patch_embedding.dinov2.embeddings.patch_embeddings.projection.",
    ),
    (r"^aggregator\.patch_embed\.pos_embed$", "patch_embedding.dinov2.embeddings.position_embeddings"),
    (r"^aggregator\.patch_embed\.(cls_token|mask_token|register_tokens)$", r"patch_embedding.dinov2.embeddings.\1"),
    (r"^aggregator\.patch_embed\.blocks\.", "patch_embedding.dinov2.encoder.layer."),
    (r"^aggregator\.patch_embed\.norm\.", "patch_embedding.dinov2.layernorm."),
    (r"^camera_head\.empty_pose_tokens$", "camera_head.empty_pose"),
    (r"^camera_head\.poseLN_modulation\.1\.", "camera_head.modulation."),
    (r"^(depth|point)_head\.projects\.", r"\1_head.projections."),
    (r"^(depth|point)_head\.resize_layers\.", r"\1_head.resizes."),
    *((rf"^(depth|point)_head\.scratch\.layer{i + 1}_rn\.", rf"\1_head.scale_projections.{i}.") for i in range(4)),
    *((rf"^(depth|point)_head\.scratch\.refinenet{i + 1}\.", rf"\1_head.fusion.{i}.") for i in range(4)),
    (r"\.resConfUnit1\.", ".skip_unit."),
    (r"\.resConfUnit2\.", ".unit."),
    (r"\.out_conv\.", ".projection."),
    (r"\.scratch\.output_conv1\.", ".out_conv1."),
    (r"\.scratch\.output_conv2\.0\.", ".out_conv2."),
    (r"\.scratch\.output_conv2\.2\.", ".out_conv3."),
    *_BLOCK,
]
# What older versions of `transformers` call parts of their DINOv2 (saved files have these names with any version).
_OLDER_DINOV2 = {
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
}
DINOV3_KEYS = [
    (r"^(cls_token|mask_token)$", r"embeddings.\1"),
    (r"^storage_tokens$", "embeddings.register_tokens"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"^blocks\.", "model.layer."),
    (r"\.mlp\.fc1\.", ".mlp.up_proj."),
    (r"\.mlp\.fc2\.", ".mlp.down_proj."),
    *_BLOCK,
]
SPA3R_KEYS = [
    (r"^projection\.", "spa3r.encoder.projection."),
    (r"^query_embed\.weight$", "spa3r.encoder.queries"),
    (r"^encoder\.blocks\.", "spa3r.encoder.layers."),
    (r"^encoder\.(norm\.|register_tokens$)", r"spa3r.encoder.\1"),
    (r"^decoder\.blocks\.", "decoder.layers."),
    (r"^pose_tokenizer\.", "decoder.ray_embedding."),
    (r"^heads\.geo\.", "geometric_head."),
    (r"^heads\.sem\.", "semantic_head."),
    (r"^depth_prob\.", "depth_head."),
    *_BLOCK,
]
VGGT_PARTS = ("aggregator.", "camera_head.", "depth_head.", "point_head.")


def strip_prefix(state_dict: Mapping[str, Tensor], prefix: str = "model.") -> dict[str, Tensor]:
    """The same state dict without `prefix`, where every key has it."""
    if state_dict and all(key.startswith(prefix) for key in state_dict):
        return {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return dict(state_dict)


def rename_keys(state_dict: Mapping[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Apply all rules to each key, in their order, and split the fused query-key-value projections."""
    renamed = {}
    for key, value in state_dict.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        if ".attention.qkv." in key:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                renamed[key.replace(".qkv.", f".{name}_proj.")] = part
        else:
            renamed[key] = value
    return renamed


def keys_under(state_dict: Mapping[str, Tensor], prefixes: Iterable[str]) -> dict[str, Tensor]:
    """What of a state dict is under any of some prefixes, its names unchanged."""
    return {key: value for key, value in state_dict.items() if key.startswith(tuple(prefixes))}


def without_ignored(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same without what is left out on purpose, which is logged."""
    kept = {key: value for key, value in state_dict.items() if not any(re.match(p, key) for p in IGNORED)}
    if len(kept) < len(state_dict):
        logger.info("left out on purpose: %s", sorted(set(state_dict) - set(kept)))
    return kept


class Shapes(Mapping[str, torch.Size]):
    """Shapes of a state dict; a key that is missing says what the checkpoint should have been."""

    def __init__(self, state_dict: Mapping[str, Tensor], kind: str):
        self.state_dict, self.kind = state_dict, kind

    def __getitem__(self, key: str) -> torch.Size:
        if key not in self.state_dict:
            found = sorted(self.state_dict)[:5]
            raise ValueError(
                f"not an original {self.kind} checkpoint: it has no key {key}; its {len(self.state_dict)} keys begin "
                f"with {found}"
            )
        return self.state_dict[key].shape

    def __iter__(self):
        return iter(self.state_dict)

    def __len__(self) -> int:
        return len(self.state_dict)

    def count(self, pattern: str) -> int:
        """1 + the largest number that `pattern` finds at the start of a key."""
        found = [int(match.group(1)) for key in self.state_dict if (match := re.match(pattern, key))]
        if not found:
            raise ValueError(f"not an original {self.kind} checkpoint: no key matches {pattern}")
        return 1 + max(found)


def _name_in_this_version(key: str, expected: Mapping[str, Tensor]) -> str:
    if key not in expected and "patch_embedding.dinov2." in key:
        for newer, older in _OLDER_DINOV2.items():
            if key.replace(newer, older) in expected:
                return key.replace(newer, older)
    return key


def _squeezed(shape: torch.Size) -> list[int]:
    return [n for n in shape if n != 1]


def fill_model(model: Model, converted: Mapping[str, Tensor]) -> Model:
    """Load strictly, with every difference named. Extra axes of length one, as in (1, 2, 1, C) tokens, are dropped."""
    expected = model.state_dict()
    converted = {_name_in_this_version(key, expected): value for key, value in converted.items()}
    differences = {
        "left over": sorted(set(converted) - set(expected)),
        "missing": sorted(set(expected) - set(converted)),
        "of another shape": [
            f"{key}: {tuple(converted[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in sorted(set(expected) & set(converted))
            if _squeezed(converted[key].shape) != _squeezed(expected[key].shape)
        ],
    }
    if any(differences.values()):
        raise ValueError(
            f"the checkpoint does not fit {type(model).__name__}: "
            + "; ".join(f"{len(keys)} {what}: {keys[:8]}" for what, keys in differences.items() if keys)
        )
    model.load_state_dict({key: value.reshape(expected[key].shape) for key, value in converted.items()})
    return model.eval()
