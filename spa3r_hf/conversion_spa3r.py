"""
From the original checkpoints (the Spa3R release, VGGT-1B, DINOv3) to the models of this package.

Strict: every key is used, or is one of `conversion_keys.IGNORED`; every parameter is filled, with the shape it must
have.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DINOv3ViTConfig, DINOv3ViTModel, PreTrainedModel

from .configuration_spa3r import Spa3RConfig
from .configuration_spa3r_vggt import Spa3RVGGTConfig
from .conversion_keys import (
    DINOV3_KEYS,
    SPA3R_KEYS,
    VGGT_KEYS,
    VGGT_PARTS,
    Shapes,
    fill_model,
    keys_under,
    rename_keys,
    strip_prefix,
    without_ignored,
)
from .modeling_spa3r import Spa3RForPreTraining
from .modeling_spa3r_vggt import Spa3RVGGTModel


logger = logging.getLogger(__name__)


def infer_vggt_config(state_dict: Mapping[str, Tensor], **options: Any) -> Spa3RVGGTConfig:
    """
    Configuration of an original VGGT state dict (keys `aggregator.*`, `camera_head.*`, ...).

    What shapes cannot tell is a default that `options` overrides: the camera head has as many attention heads as the
    aggregator, the dense heads read layers 4, 11, 17, 23 of 24 (of other depths, the last of each quarter).
    """
    shapes = Shapes(state_dict, "VGGT")
    hidden_size, head_dim = (
        shapes["aggregator.camera_token"][-1],
        shapes["aggregator.frame_blocks.0.attn.q_norm.weight"][0],
    )
    num_layers = shapes.count(r"aggregator\.frame_blocks\.(\d+)\.")
    conv = "aggregator.patch_embed.proj.weight" in state_dict
    patch_key = "proj.weight" if conv else "patch_embed.proj.weight"
    patch_size = shapes[f"aggregator.patch_embed.{patch_key}"][-1]
    settings: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // head_dim,
        "intermediate_size": shapes["aggregator.frame_blocks.0.mlp.fc1.weight"][0],
        "patch_size": patch_size,
        "patch_embedding": "conv" if conv else "dinov2",
        "num_register_tokens": shapes["aggregator.register_token"][-2],
        "camera_num_attention_heads": hidden_size // head_dim,
        "dpt_layers": (4, 11, 17, 23) if num_layers == 24 else tuple((i + 1) * num_layers // 4 - 1 for i in range(4)),
    }
    if not conv:
        positions = shapes["aggregator.patch_embed.pos_embed"][1] - 1
        settings["image_size"] = round(positions**0.5) * patch_size
        settings["patch_embedding_layers"] = shapes.count(r"aggregator\.patch_embed\.blocks\.(\d+)\.")
    for head in ("camera", "depth", "point"):
        settings[f"use_{head}_head"] = any(key.startswith(f"{head}_head.") for key in state_dict)
    if settings["use_camera_head"]:
        settings["camera_num_hidden_layers"] = shapes.count(r"camera_head\.trunk\.(\d+)\.")
    for head in ("depth_head", "point_head"):
        if settings[f"use_{head}"]:
            settings["dpt_hidden_size"] = shapes[f"{head}.scratch.layer1_rn.weight"][0]
            settings["dpt_out_channels"] = tuple(shapes[f"{head}.projects.{i}.weight"][0] for i in range(4))
    has_bias = "aggregator.global_blocks.0.attn.q_norm.bias" in state_dict
    settings["global_qk_norm"] = "layer_norm" if has_bias else "rms_norm"
    logger.info(
        "global blocks normalise queries and keys with %s (aggregator.global_blocks.0.attn.q_norm.bias is %s)",
        settings["global_qk_norm"],
        "there" if has_bias else "absent",
    )
    return Spa3RVGGTConfig(**(settings | options))


def infer_dinov3_config(state_dict: Mapping[str, Tensor], **options: Any) -> DINOv3ViTConfig:
    """Configuration of an original DINOv3 ViT state dict; `options` override what is inferred."""
    shapes = Shapes(state_dict, "DINOv3")
    hidden_size, patch_size = shapes["patch_embed.proj.weight"][0], shapes["patch_embed.proj.weight"][-1]
    settings: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_hidden_layers": shapes.count(r"blocks\.(\d+)\."),
        # The RoPE has one period for every four channels of a head.
        "num_attention_heads": hidden_size // (4 * shapes["rope_embed.periods"][0]),
        "intermediate_size": shapes["blocks.0.mlp.fc1.weight"][0],
        "patch_size": patch_size,
        "num_register_tokens": shapes["storage_tokens"][-2],
    }
    return DINOv3ViTConfig(**(settings | options))


def infer_spa3r_config(state_dict: Mapping[str, Tensor], **options: Any) -> Spa3RConfig:
    """
    Configuration of a state dict of the Spa3R release (bare, or under a `model.` prefix); `options` override what is
    inferred, and may hold dicts of the same, `backbone_config` and `semantic_config`. `masking_mode` becomes the
    release's default, `two_pass`.
    """
    backbone_options = options.pop("backbone_config", {})
    semantic_options = options.pop("semantic_config", {})
    state_dict = strip_prefix(state_dict)
    shapes = Shapes(state_dict, "Spa3R")
    hidden_size = shapes["projection.weight"][0]
    targets = {"geometric": "heads.geo.", "semantic": "heads.sem."}
    settings: dict[str, Any] = {
        "backbone_config": infer_vggt_config(keys_under(state_dict, VGGT_PARTS), **backbone_options),
        "hidden_size": hidden_size,
        "num_hidden_layers": shapes.count(r"encoder\.blocks\.(\d+)\."),
        "decoder_num_hidden_layers": shapes.count(r"decoder\.blocks\.(\d+)\."),
        "num_attention_heads": hidden_size // shapes["encoder.blocks.0.attn.q_norm.weight"][0],
        "intermediate_size": shapes["encoder.blocks.0.mlp.fc1.weight"][0],
        "num_latents": shapes["query_embed.weight"][0],
        "num_register_tokens": shapes["encoder.register_tokens"][-2],
        "camera_conditioning": "prope" if shapes["pose_tokenizer.weight"][-1] == 3 else "plucker",
        "targets": tuple(kind for kind, head in targets.items() if any(key.startswith(head) for key in state_dict)),
        "depth_probe": any(key.startswith("depth_prob.") for key in state_dict),
        "masking_mode": "two_pass",
    }
    if "semantic" in settings["targets"]:
        dinov3 = strip_prefix(keys_under(state_dict, ("dino.",)), "dino.")
        settings["semantic_config"] = infer_dinov3_config(dinov3, **semantic_options)
    return Spa3RConfig(**(settings | options))


def convert_original_vggt(state_dict: Mapping[str, Tensor], config: Spa3RVGGTConfig | None = None) -> Spa3RVGGTModel:
    """
    VGGT from its original state dict.

    Raises:
        ValueError: Keys are left over or missing, shapes differ, or `config` names the other q/k norm.
    """
    state_dict = strip_prefix(state_dict)
    return fill_model(
        Spa3RVGGTModel(config or infer_vggt_config(state_dict)), _convert_vggt(without_ignored(state_dict))
    )


def convert_original_dinov3(state_dict: Mapping[str, Tensor], config: DINOv3ViTConfig | None = None) -> DINOv3ViTModel:
    """DINOv3 ViT from its original state dict; errors as in `convert_original_vggt`."""
    state_dict = strip_prefix(state_dict)
    config = config or infer_dinov3_config(state_dict)
    return fill_model(DINOv3ViTModel(config), _convert_dinov3(state_dict, config))


def convert_original_spa3r(state_dict: Mapping[str, Tensor], config: Spa3RConfig | None = None) -> Spa3RForPreTraining:
    """
    Spa3R from the state dict of the release, bare or under a `model.` prefix.

    Args:
        state_dict: All keys of the release: VGGT, DINOv3, encoder, decoder and heads.
        config: The configuration to fill; None: `infer_spa3r_config(state_dict)`.

    Raises:
        ValueError: Keys are left over or missing, shapes differ, or `config` names the other q/k norm.
    """
    state_dict = strip_prefix(state_dict)
    config = config or infer_spa3r_config(state_dict)
    converted = {f"spa3r.backbone.{k}": v for k, v in _convert_vggt(keys_under(state_dict, VGGT_PARTS)).items()}
    dinov3 = strip_prefix(keys_under(state_dict, ("dino.",)), "dino.")
    if dinov3:
        converted |= {f"semantic_teacher.{k}": v for k, v in _convert_dinov3(dinov3, config.semantic_config).items()}
    own = {key: value for key, value in state_dict.items() if not key.startswith((*VGGT_PARTS, "dino."))}
    converted |= rename_keys(without_ignored(own), SPA3R_KEYS)
    return fill_model(Spa3RForPreTraining(config), converted)


@torch.no_grad()
def reference_outputs(model: PreTrainedModel, images: Tensor, view_mask: Tensor | None = None) -> dict[str, Tensor]:
    """
    What a converted model computes, under the names of the reference files (`output.*`, without that prefix).

    Args:
        model: As the functions above return it.
        images: (B, V, 3, H, W) in [0, 1] for Spa3R and VGGT; (B, 3, H, W), normalised, for DINOv3.
        view_mask: (B, V), True = target; without it, what depends on it is left out.
    """
    if isinstance(model, DINOv3ViTModel):
        return {"last_hidden_state": model(images).last_hidden_state}
    backbone = model.spa3r.backbone if isinstance(model, Spa3RForPreTraining) else model
    config = backbone.config
    views = backbone(
        images,
        output_layers=range(config.num_hidden_layers),
        output_cameras=config.use_camera_head,
        output_depth=config.use_depth_head,
        output_points=config.use_point_head,
    )
    outputs = {f"aggregator.layer_{i}": features for i, features in views.layer_features.items()}
    if config.use_camera_head:
        outputs["camera.pose_encoding"] = views.pose_encodings[-1]
        outputs |= {"camera.extrinsics": views.extrinsics, "camera.intrinsics": views.intrinsics}
    if config.use_depth_head:
        outputs |= {"depth.depth": views.depth, "depth.confidence": views.depth_confidence}
    if config.use_point_head:
        outputs |= {"points.points": views.points, "points.confidence": views.points_confidence}
    if view_mask is not None:
        outputs["aggregator.asymmetric_last"] = backbone(images, view_mask=view_mask).last_hidden_state
    if isinstance(model, Spa3RForPreTraining):
        outputs["latents"] = model.spa3r(images).latents
        if model.semantic_teacher is not None:
            outputs["semantic.features"] = model.semantic_features(images)
        if view_mask is not None:
            outputs |= _training_outputs(model, images, view_mask)
    return outputs


def compare_with_reference(
    model: PreTrainedModel, reference: Mapping[str, Tensor], rtol: float = 1e-4, atol: float = 1e-5
) -> dict[str, float]:
    """
    Compare a converted model with stored numbers of the original.

    Args:
        reference: `input.images`, `input.view_mask` if need be, and `output.*`; outputs that this model does not have
            (a VGGT has no latents) and other keys are passed over.

    Returns:
        The largest absolute difference of each output that was compared.

    Raises:
        ValueError: Outputs differ by more than `atol + rtol * |reference|`, or none could be compared.
    """
    if "input.images" not in reference:
        raise ValueError(f"the reference has no input.images; its keys begin with {sorted(reference)[:5]}")
    outputs = reference_outputs(model, reference["input.images"], reference.get("input.view_mask"))
    return compare_outputs(outputs, reference, type(model).__name__, rtol, atol)


def compare_outputs(
    outputs: Mapping[str, Tensor], reference: Mapping[str, Tensor], model_name: str, rtol: float, atol: float
) -> dict[str, float]:
    """The comparison of `compare_with_reference`, of outputs that were computed already."""
    differences, wrong = {}, []
    for name, output in outputs.items():
        if (expected := reference.get(f"output.{name}")) is None:
            continue
        if expected.numel() != output.numel():
            wrong.append(f"{name} has shape {tuple(output.shape)} instead of {tuple(expected.shape)}")
            continue
        expected = expected.reshape(output.shape)
        differences[name] = (output - expected).abs().max().item()
        if not torch.allclose(output, expected, rtol=rtol, atol=atol):
            wrong.append(f"{name} differs by up to {differences[name]:.3g}")
    if wrong or not differences:
        raise ValueError(
            f"{model_name} does not agree with the reference (rtol {rtol}, atol {atol}): "
            + ("; ".join(wrong) or f"it computes none of {sorted(k for k in reference if k.startswith('output.'))}")
        )
    return differences


def _training_outputs(model: Spa3RForPreTraining, images: Tensor, view_mask: Tensor) -> dict[str, Tensor]:
    """Outputs of both masking modes, with the loss over all views as in the release, however the model is set."""
    loss_names = {
        "geometric_l1": "geo.l1",
        "geometric_cosine": "geo.cos",
        "semantic_l1": "sem.l1",
        "semantic_cosine": "sem.cos",
        "depth_probe": "depth_prob",
    }
    outputs: dict[str, Tensor] = {}
    config = model.config
    own_settings = config.masking_mode, config.loss_views
    try:
        config.loss_views = "all"
        for mode in ("asymmetric", "two_pass"):
            config.masking_mode = mode
            result = model(images, view_mask=view_mask)
            outputs |= {f"{mode}.latents": result.latents, f"{mode}.decoder_tokens": result.decoder_tokens}
            for kind in ("geometric", "semantic", "depth"):
                if (prediction := getattr(result, f"{kind}_prediction")) is not None:
                    outputs[f"{mode}.prediction.{kind}"] = prediction
            outputs |= {f"{mode}.loss.{loss_names[name]}": loss for name, loss in result.losses.items()}
    finally:
        config.masking_mode, config.loss_views = own_settings
    return outputs


def _convert_vggt(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return rename_keys(state_dict, VGGT_KEYS)


def _convert_dinov3(state_dict: Mapping[str, Tensor], config: DINOv3ViTConfig) -> dict[str, Tensor]:
    head_dim = config.hidden_size // config.num_attention_heads
    expected = config.rope_theta ** torch.arange(0, 1, 4 / head_dim)
    periods = state_dict.get("rope_embed.periods")
    # bfloat16 in the original files.
    if periods is None or periods.shape != expected.shape or not periods.float().allclose(expected, rtol=1e-2):
        raise ValueError(
            f"DINOv3 rope_embed.periods are {periods if periods is None else periods.tolist()}; rope_theta = "
            f"{config.rope_theta} with heads of {head_dim} channels gives {expected.tolist()}"
        )
    for key, mask in state_dict.items():
        if key.endswith(".qkv.bias_mask"):
            q, k, v = mask.nan_to_num().chunk(3)
            if not ((q == 1).all() and (k == 0).all() and (v == 1).all()):
                raise ValueError(f"DINOv3 {key} masks more than the keys' bias; expected ones, zeros, ones")
    renamed = rename_keys(without_ignored(state_dict), DINOV3_KEYS)
    # The bias of the keys is masked, and has no place in the converted model.
    return {key: value for key, value in renamed.items() if not key.endswith(".k_proj.bias")}
