"""Configuration of Spa3R (arXiv 2602.21186)."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import DINOv3ViTConfig, PreTrainedConfig

from .configuration_spa3r_vggt import Spa3RVGGTConfig, check_positive, refuse_unknown_keys


# DINOv3 ViT-L/16, the paper's semantic teacher.
_DINOV3_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_register_tokens": 4,
}


@strict
class Spa3RConfig(PreTrainedConfig):
    """
    Configuration of [`Spa3RModel`] and [`Spa3RForPreTraining`]. The defaults are those of the paper.

    Args:
        backbone_config (`Spa3RVGGTConfig` or `dict`): The frozen geometry backbone. Default: VGGT-1B.
        semantic_config (`DINOv3ViTConfig` or `dict`): The frozen semantic teacher. Default: DINOv3 ViT-L/16.
        hidden_size (`int`): Width D of encoder, decoder and latents; D / heads must be a multiple of 8 for PRoPE.
        num_hidden_layers (`int`), decoder_num_hidden_layers (`int`): Blocks of the encoder and of the decoder.
        num_attention_heads (`int`): Heads of either.
        intermediate_size (`int`): Width of their MLPs.
        num_latents (`int`): Number Q of latents that a scene is pressed into.
        num_register_tokens (`int`): Register tokens of encoder and of decoder.
        rope_theta (`float`): Base of the encoder's 2-D RoPE and of PRoPE's rotary half.
        layer_norm_eps (`float`): Epsilon of the LayerNorms.
        mask_ratio (`float`): Share of the views of a scene that becomes targets, in (0, 1); see `draw_view_mask`.
        masking_mode (`"asymmetric"` or `"two_pass"`): One backbone pass in which context views do not see target views
            (the paper's Asymmetric View Aggregator), or one pass over the context views alone and one over all views
            (the release's default).
        loss_views (`"all"` or `"target"`): Views that the loss averages over. The release takes all, the paper speaks
            of targets.
        camera_conditioning (`"prope"` or `"plucker"`): How the decoder is told the camera (the paper ablates it).
        targets (`list[str]`): What is predicted: `"geometric"` (backbone features), `"semantic"` (DINOv3), or both.
        depth_probe (`bool`): Whether a probe on the detached decoder tokens predicts the backbone's depth.
        semantic_image_size (`int`): Side in pixels that views are resized to for the semantic teacher.
        initializer_range (`float`): Standard deviation of fresh weights.

    Raises:
        ValueError: A value is out of its range, or a key is unknown.
    """

    model_type = "spa3r"
    sub_configs = {"backbone_config": Spa3RVGGTConfig, "semantic_config": DINOv3ViTConfig}

    # A dict, a configuration or None is accepted, and checked below; from then on they are configurations.
    backbone_config: Any = None
    semantic_config: Any = None
    hidden_size: int = 768
    num_hidden_layers: int = 6
    decoder_num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    num_latents: int = 256
    num_register_tokens: int = 4
    rope_theta: float | int = 100.0
    layer_norm_eps: float | int = 1e-6
    mask_ratio: float = 0.5
    masking_mode: Literal["asymmetric", "two_pass"] = "asymmetric"
    loss_views: Literal["all", "target"] = "all"
    camera_conditioning: Literal["prope", "plucker"] = "prope"
    targets: list[str] | tuple[str, ...] = ("geometric", "semantic")
    depth_probe: bool = True
    semantic_image_size: int = 224
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        refuse_unknown_keys(self, kwargs)
        if self.backbone_config is None or isinstance(self.backbone_config, dict):
            self.backbone_config = Spa3RVGGTConfig(**(self.backbone_config or {}))
        if self.semantic_config is None or isinstance(self.semantic_config, dict):
            settings, known = self.semantic_config or _DINOV3_LARGE, DINOv3ViTConfig()
            # The library's own class takes any key; a misspelt one would be lost without a word.
            own_keys = known.to_dict().keys() - {"model_type"}
            refuse_unknown_keys(known, {key: value for key, value in settings.items() if key not in own_keys})
            self.semantic_config = DINOv3ViTConfig(**settings)
        for name, expected in self.sub_configs.items():
            if not isinstance(getattr(self, name), expected):
                raise ValueError(f"{name} is a {type(getattr(self, name)).__name__}; expected a {expected.__name__}")
        super().__post_init__(**kwargs)
        check_positive(
            self,
            *("hidden_size", "num_hidden_layers", "decoder_num_hidden_layers", "num_attention_heads"),
            *("intermediate_size", "num_latents", "rope_theta", "layer_norm_eps", "semantic_image_size"),
        )
        if self.hidden_size % (8 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size = {self.hidden_size} with num_attention_heads = {self.num_attention_heads}; "
                "expected hidden_size to be a multiple of 8 * num_attention_heads, as PRoPE needs it"
            )
        if not 0.0 < self.mask_ratio < 1.0:
            raise ValueError(f"mask_ratio = {self.mask_ratio}; expected a share of the views in (0, 1)")
        if not self.targets or set(self.targets) - {"geometric", "semantic"}:
            raise ValueError(f"targets = {list(self.targets)}; expected 'geometric', 'semantic', or both")
        if self.depth_probe and not self.backbone_config.use_depth_head:
            raise ValueError("depth_probe = True, but backbone_config.use_depth_head = False; the probe needs depth")
        if self.semantic_image_size % self.semantic_config.patch_size:
            raise ValueError(
                f"semantic_image_size = {self.semantic_image_size}; expected a multiple of the semantic teacher's "
                f"patch_size = {self.semantic_config.patch_size}"
            )


__all__ = ["Spa3RConfig"]
