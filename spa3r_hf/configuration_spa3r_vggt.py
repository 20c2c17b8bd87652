"""Configuration of the geometry backbone: VGGT (arXiv 2503.11651)."""

from collections.abc import Mapping
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


# What the library itself writes into, or passes on to, a configuration besides the fields of the class.
_LIBRARY_KEYS = {
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation_internal",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "tie_word_embeddings",
    "torch_dtype",
    "use_cache",
}


def refuse_unknown_keys(config: PreTrainedConfig, keys: Mapping[str, Any]) -> None:
    """
    Check the settings that are left over once the fields of `config`'s class have taken theirs.

    Raises:
        ValueError: They say that this is the configuration of another architecture, or neither the class nor the
            library knows a key; the message names every such key.
    """
    model_type = keys.get("model_type", config.model_type)
    if model_type != config.model_type:
        raise ValueError(
            f"this is the configuration of a {model_type!r} model; {type(config).__name__} expected "
            f"{config.model_type!r}"
        )
    unknown = sorted(set(keys) - _LIBRARY_KEYS)
    if unknown:
        known = sorted(name for name in type(config).__annotations__)
        raise ValueError(f"{type(config).__name__} does not know {unknown}; its own keys are {known}")


def check_positive(config: PreTrainedConfig, *names: str) -> None:
    """Raise a `ValueError` for the first attribute among `names` that is not above 0, or for registers below 0."""
    for name in names:
        if not getattr(config, name) > 0:  # false for NaN as well
            raise ValueError(f"{type(config).__name__}.{name} = {getattr(config, name)}; expected a number above 0")
    if config.num_register_tokens < 0:
        raise ValueError(
            f"{type(config).__name__}.num_register_tokens = {config.num_register_tokens}; expected 0 or more"
        )


@strict
class Spa3RVGGTConfig(PreTrainedConfig):
    """
    Configuration of [`Spa3RVGGTModel`]. The defaults are those of VGGT-1B.

    Args:
        hidden_size (`int`): Width C of the tokens; the features of a layer are 2C wide (frame and global half).
        num_hidden_layers (`int`): Number of layers; each is one frame and one global attention block.
        num_attention_heads (`int`): Heads of either block; C / heads must be a multiple of 4 for the 2-D RoPE.
        intermediate_size (`int`): Width of the MLPs.
        image_size (`int`): Side in pixels of the square whose position grid the DINOv2 patch embedding holds.
            Images of other sizes work: the grid is interpolated.
        patch_size (`int`): Side of a patch in pixels; image sides must be multiples of it.
        patch_embedding (`"dinov2"` or `"conv"`): A DINOv2 with registers, or one strided convolution (small models).
        patch_embedding_layers (`int`): Layers of that DINOv2.
        num_register_tokens (`int`): Register tokens of a view, beside its one camera token.
        global_qk_norm (`"layer_norm"` or `"rms_norm"`): Query and key norm of the global blocks: LayerNorm with bias
            in the original VGGT-1B, RMSNorm in the checkpoints of the Spa3R release.
        rope_theta (`float`): Base of the 2-D RoPE.
        layer_norm_eps (`float`): Epsilon of all LayerNorms but those inside the DINOv2 (1e-6).
        layerscale_value (`float`): What a fresh LayerScale starts with.
        use_camera_head, use_depth_head, use_point_head (`bool`): Which heads exist.
        camera_num_attention_heads, camera_num_hidden_layers, camera_num_iterations (`int`):
            Trunk and refinement iterations of the camera head, which is 2C wide.
        dpt_hidden_size (`int`), dpt_out_channels (`list[int]`), dpt_layers (`list[int]`):
            Fusion width, widths of the four scales, and the four layers that the depth and point heads read.
        initializer_range (`float`): Standard deviation of fresh weights.

    Raises:
        ValueError: A value is out of its range, or a key is unknown.
    """

    model_type = "spa3r_vggt"

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    image_size: int = 518
    patch_size: int = 14
    patch_embedding: Literal["dinov2", "conv"] = "dinov2"
    patch_embedding_layers: int = 24
    num_register_tokens: int = 4
    global_qk_norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    rope_theta: float | int = 100.0
    layer_norm_eps: float | int = 1e-5
    layerscale_value: float | int = 0.01
    use_camera_head: bool = True
    use_depth_head: bool = True
    use_point_head: bool = True
    camera_num_attention_heads: int = 16
    camera_num_hidden_layers: int = 4
    camera_num_iterations: int = 4
    dpt_hidden_size: int = 256
    dpt_out_channels: list[int] | tuple[int, ...] = (256, 512, 1024, 1024)
    dpt_layers: list[int] | tuple[int, ...] = (4, 11, 17, 23)
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        refuse_unknown_keys(self, kwargs)
        super().__post_init__(**kwargs)
        check_positive(
            self,
            *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size"),
            *("patch_size", "patch_embedding_layers", "dpt_hidden_size", "rope_theta", "layer_norm_eps"),
            *("camera_num_attention_heads", "camera_num_hidden_layers", "camera_num_iterations"),
        )
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size = {self.hidden_size} with num_attention_heads = {self.num_attention_heads}; "
                "expected hidden_size to be a multiple of 4 * num_attention_heads, as the 2-D RoPE needs it"
            )
        if 2 * self.hidden_size % self.camera_num_attention_heads:
            raise ValueError(
                f"camera_num_attention_heads = {self.camera_num_attention_heads}; expected a divisor of "
                f"2 * hidden_size = {2 * self.hidden_size}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size = {self.image_size}; expected a multiple of patch_size = {self.patch_size}")
        if self.use_depth_head or self.use_point_head:
            if len(self.dpt_layers) != 4 or any(not 0 <= i < self.num_hidden_layers for i in self.dpt_layers):
                raise ValueError(
                    f"dpt_layers = {list(self.dpt_layers)}; expected four layers in [0, {self.num_hidden_layers - 1}]"
                )
            if len(self.dpt_out_channels) != 4 or any(width % 4 for width in self.dpt_out_channels):
                raise ValueError(f"dpt_out_channels = {list(self.dpt_out_channels)}; expected four multiples of 4")

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens of a view ahead of its patches: one camera token and the registers."""
        return 1 + self.num_register_tokens

    @property
    def feature_size(self) -> int:
        """Width 2C of the features of a layer."""
        return 2 * self.hidden_size


__all__ = ["Spa3RVGGTConfig"]
