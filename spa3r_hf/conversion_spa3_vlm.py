"""
From the full checkpoint of the Spa3-VLM release to a [`Spa3VLM`]: VLM, adapter and spatial encoder.

Strict: every key is used, or named in the log as one that Spa3-VLM does not need; every weight is filled.
"""

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from .checkpoint_spa3_vlm import SPATIAL_ENCODER_FOLDER, VLM_FOLDER, check_weights, under_prefix
from .configuration_spa3_vlm import Spa3AdapterConfig
from .configuration_spa3r import Spa3RConfig
from .configuration_spa3r_vggt import Spa3RVGGTConfig
from .conversion_spa3r import _SPA3R, _VGGT_PARTS, _fill, _rename, convert_original_vggt, strip_prefix
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
        vlm_config = AutoConfig.for_model(**vlm_config)
    encoder_state = under_prefix(state_dict, ENCODER_PREFIX)
    adapter_state = _adapter_state(state_dict)
    others = (ENCODER_PREFIX, *_ADAPTER)
    # Copies, as the library would take the tensors themselves for the model's weights.
    vlm_state = {key: value.clone() for key, value in state_dict.items() if not key.startswith(others)}
    vlm = _convert_vlm(vlm_state, vlm_config)
    encoder = _convert_encoder(encoder_state, spatial_encoder_config) if encoder_state else None
    model = Spa3VLM(vlm, encoder)
    model.add_adapter("default", _adapter_config(adapter_state, encoder is not None))
    adapter = model.adapters["default"]
    check_weights(adapter_state, adapter.state_dict(), "the adapter of this VLM")
    adapter.load_state_dict(adapter_state)
    adapter.to(adapter_state["gate.weight"].dtype)
    return model.eval()


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
    return model


def _convert_encoder(state_dict: dict[str, Tensor], config: Spa3RConfig | None) -> Spa3RModel:
    state_dict = strip_prefix(state_dict)
    groups: dict[str, dict[str, Tensor]] = {"vggt": {}, "encoder": {}, "unused": {}, "unknown": {}}
    prefixes = {"vggt": (*_VGGT_PARTS, "track_head."), "encoder": _ENCODER, "unused": _UNUSED}
    for key, value in state_dict.items():
        group = next((name for name, starts in prefixes.items() if key.startswith(starts)), "unknown")
        groups[group][key] = value
    vggt, own = groups["vggt"], groups["encoder"]
    if groups["unused"]:
        logger.info("not needed, as only Spa3R's training uses them: %s", sorted(groups["unused"]))
    needed = ("projection.weight", "query_embed.weight", "encoder.register_tokens", "encoder.blocks.0.mlp.fc1.weight")
    missing = [name for name in needed if name not in own]
    if missing or groups["unknown"]:
        raise ValueError(
            f"{ENCODER_PREFIX}* is not the Spa3R of the release: it has no {missing}, and has "
            f"{len(groups['unknown'])} keys that are none of its: {sorted(groups['unknown'])[:8]}"
        )
    backbone = convert_original_vggt(vggt, None if config is None else config.backbone_config)
    config = config or _encoder_config(own, backbone.config)
    converted = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    converted |= under_prefix(_rename(own, _SPA3R), "spa3r.")
    model = _fill(Spa3RModel(config), converted)
    nn.Module.to(model, own["projection.weight"].dtype)
    return model


def _encoder_config(state_dict: Mapping[str, Tensor], backbone_config: Spa3RVGGTConfig) -> Spa3RConfig:
    hidden_size = len(state_dict["projection.weight"])
    blocks = {int(key.split(".")[2]) for key in state_dict if key.startswith("encoder.blocks.")}
    return Spa3RConfig(
        backbone_config=backbone_config,
        hidden_size=hidden_size,
        num_hidden_layers=max(blocks) + 1,
        num_attention_heads=hidden_size // len(state_dict["encoder.blocks.0.attn.q_norm.weight"]),
        intermediate_size=len(state_dict["encoder.blocks.0.mlp.fc1.weight"]),
        num_latents=len(state_dict["query_embed.weight"]),
        num_register_tokens=state_dict["encoder.register_tokens"].shape[-2],
        depth_probe=backbone_config.use_depth_head,
    )
