"""
From the full checkpoint of the Spa3-VLM release to a [`Spa3VLM`]: VLM, adapter and spatial encoder.

Strict: every key is used, or named in the log as one that Spa3-VLM does not need; every weight is filled.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .checkpoint_spa3_vlm import SPATIAL_ENCODER_FOLDER, VLM_FOLDER, check_weights, under_prefix
from .configuration_spa3_vlm import Spa3AdapterConfig
from .configuration_spa3r import Spa3RConfig
from .conversion_keys import SPA3R_KEYS, VGGT_PARTS, Shapes, fill_model, keys_under, rename_keys, strip_prefix
from .conversion_spa3r import compare_outputs, convert_original_vggt, infer_vggt_config
from .modeling_spa3_vlm import Spa3VLM
from .modeling_spa3r import Spa3RModel


logger = logging.getLogger(__name__)

ENCODER_PREFIX = "geometry_encoder.spa3r."
# The release's names of the adapter's parts.
_ADAPTER = {
    "geometry_projector.0.": "spatial_projection.fc1.",
    "geometry_projector.2.": "spatial_projection.fc2.",
    "geom_cross_attention.proj.": "attention.o_proj.",
    "geom_cross_attention.": "attention.",
    "ln.": "norm.",
    "geometry_adaptor.0.": "mlp.fc1.",
    "geometry_adaptor.2.": "mlp.fc2.",
    "geometry_gate.0.": "gate.",
}
_ENCODER = ("projection.", "query_embed.", "encoder.")
# Parts of Spa3R's training that the release may have left in.
_UNUSED = ("decoder.", "pose_tokenizer.", "heads.", "depth_prob.", "dino.")


def convert_original_spa3_vlm(
    state_dict: Mapping[str, Tensor],
    vlm_config: PreTrainedConfig | Mapping[str, Any],
    spatial_encoder_config: Spa3RConfig | None = None,
) -> Spa3VLM:
    """
    Spa3-VLM from the full state dict of the release, in eval mode, every part in the type that it has there.

    `save_pretrained` of the result writes VLM and spatial encoder beside the adapter, as they have no other home.

    Args:
        state_dict: The VLM's keys as `transformers` named them then (`visual.*`, `model.*`, `lm_head.*`) or does now,
            the adapter's (`geom_cross_attention.*`, ...), and the encoder's (`geometry_encoder.spa3r.*`), if any:
            without them there is no spatial encoder, and `spatial_latents` have to be given.
        vlm_config: The VLM's configuration, or what its `config.json` holds.
        spatial_encoder_config: The configuration to fill. None: as the shapes tell, with defaults for the rest.

    Raises:
        ValueError: Keys are left over or missing, or shapes differ.
    """
    if not isinstance(vlm_config, PreTrainedConfig):
        vlm_config = _vlm_config(vlm_config)
    encoder_state = strip_prefix(under_prefix(state_dict, ENCODER_PREFIX))
    adapter_state = _adapter_state(state_dict)
    others = (ENCODER_PREFIX, *_ADAPTER)
    # Copies, as the library would take the tensors themselves for the model's weights.
    vlm_state = {key: value.clone() for key, value in state_dict.items() if not key.startswith(others)}
    vlm = _convert_vlm(vlm_state, vlm_config)
    encoder = None
    if encoder_state:
        encoder = _convert_encoder(encoder_state, spatial_encoder_config or infer_spatial_encoder_config(state_dict))
    model = Spa3VLM(vlm, encoder)
    model.add_adapter("default", _adapter_config(adapter_state, encoder is not None))
    adapter = model.adapters["default"]
    check_weights(adapter_state, adapter.state_dict(), "the adapter of this VLM")
    adapter.load_state_dict(adapter_state)
    adapter.to(adapter_state["gate.weight"].dtype)
    return model.eval()


def _vlm_config(settings: Mapping[str, Any]) -> PreTrainedConfig:
    model_type = settings.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"the VLM's configuration has model_type = {model_type!r}; expected one of transformers")
    return AutoConfig.for_model(**settings)


def _adapter_state(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state_dict.items():
        # The longest name first: one part's may begin another's.
        if prefix := max((name for name in _ADAPTER if key.startswith(name)), key=len, default=None):
            renamed[_ADAPTER[prefix] + key.removeprefix(prefix)] = value
    needed = ("spatial_projection.fc1.weight", "attention.q_norm.weight", "gate.weight")
    if missing := [name for name in needed if name not in renamed]:
        raise ValueError(f"this is no checkpoint of Spa3-VLM: it has no weights for the adapter's {missing}")
    return renamed


def _adapter_config(adapter_state: Mapping[str, Tensor], has_encoder: bool) -> Spa3AdapterConfig:
    hidden_size, spatial_hidden_size = adapter_state["spatial_projection.fc1.weight"].shape
    return Spa3AdapterConfig(
        hidden_size=hidden_size,
        num_attention_heads=hidden_size // len(adapter_state["attention.q_norm.weight"]),
        spatial_hidden_size=spatial_hidden_size,
        base_model_name_or_path=VLM_FOLDER,
        spatial_encoder_name_or_path=SPATIAL_ENCODER_FOLDER if has_encoder else None,
    )


def _convert_vlm(state_dict: dict[str, Tensor], config: PreTrainedConfig) -> PreTrainedModel:
    """The library's own loading knows the old names of its models' keys."""
    if not state_dict:
        raise ValueError("this is no full checkpoint of Spa3-VLM: it has no weights for the VLM")
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(f"the configuration is of a {config.model_type!r}; expected a vision-language model's")
    model_class: Any = AutoModelForImageTextToText._model_mapping[type(config)]
    model, report = model_class.from_pretrained(
        None,
        config=config,
        state_dict=state_dict,
        dtype=next(iter(state_dict.values())).dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    wrong = {what: sorted(map(str, keys))[:8] for what, keys in report.items() if keys}
    if wrong:
        raise ValueError(f"the checkpoint does not fit {model_class.__name__}: {wrong}")
    head = model.get_output_embeddings()
    if config.tie_word_embeddings and head.weight is not model.get_input_embeddings().weight:
        # Saved and loaded again, it would have lost one of them.
        raise ValueError(
            "the configuration has tie_word_embeddings = True, but the checkpoint's output layer has other weights "
            "than its embeddings; expected False"
        )
    return model


def infer_spatial_encoder_config(state_dict: Mapping[str, Tensor], **options: Any) -> Spa3RConfig:
    """
    Configuration of the spatial encoder in the full state dict of the release; `options` override what is inferred,
    and may hold a dict of the same for VGGT, `backbone_config`.

    Raises:
        ValueError: There is no spatial encoder, or a key is missing that tells its size.
    """
    own = strip_prefix(under_prefix(state_dict, ENCODER_PREFIX))
    if not own:
        raise ValueError(f"the checkpoint has no keys {ENCODER_PREFIX}*; expected a spatial encoder to configure")
    shapes = Shapes(own, f"Spa3R ({ENCODER_PREFIX}*)")
    backbone = infer_vggt_config(keys_under(own, VGGT_PARTS), **options.pop("backbone_config", {}))
    hidden_size = shapes["projection.weight"][0]
    settings: dict[str, Any] = {
        "backbone_config": backbone,
        "hidden_size": hidden_size,
        "num_hidden_layers": shapes.count(r"encoder\.blocks\.(\d+)\."),
        "num_attention_heads": hidden_size // shapes["encoder.blocks.0.attn.q_norm.weight"][0],
        "intermediate_size": shapes["encoder.blocks.0.mlp.fc1.weight"][0],
        "num_latents": shapes["query_embed.weight"][0],
        "num_register_tokens": shapes["encoder.register_tokens"][-2],
        "depth_probe": backbone.use_depth_head,
    }
    return Spa3RConfig(**(settings | options))


def _convert_encoder(state_dict: Mapping[str, Tensor], config: Spa3RConfig) -> Spa3RModel:
    """From its keys in the release, without `ENCODER_PREFIX`."""
    groups: dict[str, dict[str, Tensor]] = {"vggt": {}, "encoder": {}, "unused": {}, "unknown": {}}
    prefixes = {"vggt": (*VGGT_PARTS, "track_head."), "encoder": _ENCODER, "unused": _UNUSED}
    for key, value in state_dict.items():
        group = next((name for name, starts in prefixes.items() if key.startswith(starts)), "unknown")
        groups[group][key] = value
    vggt, own = groups["vggt"], groups["encoder"]
    if groups["unused"]:
        logger.info("not needed, as only Spa3R's training uses them: %s", sorted(groups["unused"]))
    if groups["unknown"]:
        raise ValueError(
            f"{ENCODER_PREFIX}* is not the Spa3R of the release: it has {len(groups['unknown'])} keys that are none "
            f"of its: {sorted(groups['unknown'])[:8]}"
        )
    backbone = convert_original_vggt(vggt, config.backbone_config)
    converted = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    converted |= under_prefix(rename_keys(own, SPA3R_KEYS), "spa3r.")
    model = fill_model(Spa3RModel(config), converted)
    nn.Module.to(model, own["projection.weight"].dtype)
    return model


# --- the release's numbers


@torch.no_grad()
def compare_with_release(
    model: Spa3VLM, reference: Mapping[str, Tensor], rtol: float = 1e-4, atol: float = 1e-5
) -> dict[str, float]:
    """
    Compare a converted model, computing in float32 whatever its type, with stored numbers of the release.

    Args:
        reference: `input.input_ids`, `input.spatial_latents`, `input.pixel_values`, ... (what the VLM takes), and
            `output.*` of float32: `logits` and `loss`, `logits_without_spatial` and `loss_without_spatial`,
            `image_embeds` and `fused_image_embeds` (visual tokens before and after the adapter); `latents` of
            `input.images`. Other outputs are passed over.

    Returns:
        The largest absolute difference of each output that was compared.

    Raises:
        ValueError: Outputs differ by more than `atol + rtol * |reference|`, or none could be compared.
    """
    inputs = under_prefix(reference, "input.")
    with _in_float32(model):
        outputs: dict[str, Any] = _outputs(model, inputs) if "input_ids" in inputs else {}
        if "images" in inputs and model.spatial_encoder is not None:
            outputs["latents"] = model.get_spatial_latents(inputs["images"])
    return compare_outputs(outputs, reference, type(model).__name__, rtol, atol)


def _outputs(model: Spa3VLM, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if "spatial_latents" not in inputs or "pixel_values" not in inputs:
        raise ValueError(
            f"the reference has input.{{{', '.join(sorted(inputs))}}}; expected input.pixel_values and "
            "input.spatial_latents beside input.input_ids"
        )
    is_image = inputs["input_ids"] == model.config.image_token_id
    # What the processors of today give, and what those of the release's time had the model find out.
    given = {"mm_token_type_ids": is_image.int(), **inputs}
    given.pop("images", None)
    latents = given.pop("spatial_latents")
    fused, plain = model(**given, spatial_latents=latents), model(**given)
    outputs = {"logits": fused.logits, "logits_without_spatial": plain.logits}
    if "labels" in given:
        outputs |= {"loss": fused.loss, "loss_without_spatial": plain.loss}
    grids = {name: value for name, value in given.items() if name == "image_grid_thw"}
    features = model.vlm.get_image_features(given["pixel_values"], **grids, return_dict=True).pooler_output
    tokens = features.flatten(0, -2) if isinstance(features, Tensor) else torch.cat(list(features))
    outputs["image_embeds"] = tokens
    if len(latents) == 1:
        outputs["fused_image_embeds"] = model.adapter(tokens[None], latents)[0]
    return outputs


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """While this lasts, parameters are float32; afterwards exactly what they were."""
    before = [(parameter, parameter.dtype) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in before:
            parameter.data = parameter.data.to(dtype)


__all__ = ["compare_with_release", "convert_original_spa3_vlm", "infer_spatial_encoder_config"]
