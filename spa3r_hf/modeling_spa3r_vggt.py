"""VGGT (Visual Geometry Grounded Transformer, arXiv 2503.11651), the geometry backbone of Spa3R."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import TransformersKwargs, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs
from typing_extensions import Unpack

from .camera_spa3r import pose_encoding_to_cameras
from .configuration_spa3r_vggt import Spa3RVGGTConfig
from .layers_spa3r import (
    RotaryEncoding,
    Spa3RAttention,
    Spa3RLayer,
    Spa3RLayerScale,
    grid_positions,
    rotary_angles,
)
from .modeling_spa3r_vggt_heads import Spa3RVGGTCameraHead, Spa3RVGGTDepthHead, Spa3RVGGTPointHead


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize_pixels(pixel_values: Tensor) -> Tensor:
    """Pixels (..., 3, H, W) in [0, 1] -> ImageNet mean 0 and standard deviation 1."""
    mean = pixel_values.new_tensor(IMAGENET_MEAN)[:, None, None]
    std = pixel_values.new_tensor(IMAGENET_STD)[:, None, None]
    return (pixel_values - mean) / std


def image_size_of(pixel_values: Tensor) -> tuple[int, int]:
    """(height, width) in pixels."""
    height, width = pixel_values.shape[-2:]
    return height, width


def grid_size_of(pixel_values: Tensor, patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches."""
    height, width = pixel_values.shape[-2:]
    return height // patch_size, width // patch_size


def check_pixel_values(pixel_values: Tensor, patch_size: int) -> None:
    """
    Raise a `ValueError` unless `pixel_values` is (B, V, 3, H, W), with H and W multiples of `patch_size`, and finite.

    Numbers are not looked at while compiling: a branch on data would break the graph.
    """
    if pixel_values.ndim != 5 or pixel_values.shape[2] != 3:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}; expected (scenes, views, 3, height, width)"
        )
    height, width = pixel_values.shape[-2:]
    if height % patch_size or width % patch_size or not height or not width:
        raise ValueError(f"images are {height} x {width} pixels; expected sides that are multiples of {patch_size}")
    if not torch.compiler.is_compiling() and not pixel_values.isfinite().all():
        scene, view = (~pixel_values.isfinite()).flatten(2).any(-1).nonzero()[0].tolist()
        raise ValueError(f"scene {scene}, view {view} of pixel_values has NaN or infinite pixels; expected [0, 1]")


def order_context_first(view_mask: Tensor) -> Tensor:
    """
    Indices (B, V) that bring each scene's views in the order: context views, then target views, each as they came.

    Args:
        view_mask: (B, V) bool, True = target.
    """
    return view_mask.byte().argsort(dim=1, stable=True)


def check_view_mask(view_mask: Tensor, batch_and_views: tuple[int, ...]) -> int:
    """
    Number of context views of each scene of `view_mask` (B, V), True = target.

    Raises:
        ValueError: Wrong shape or dtype, a first view that is a target, or scenes with unequally many context views.
    """
    if view_mask.shape != batch_and_views or view_mask.dtype != torch.bool:
        raise ValueError(
            f"view_mask is {view_mask.dtype} of shape {tuple(view_mask.shape)}; expected torch.bool of shape "
            f"{tuple(batch_and_views)}"
        )
    num_context = (~view_mask).sum(1).tolist()
    if view_mask[:, 0].any():
        raise ValueError(
            f"view_mask makes the first view of a scene a target: {view_mask.tolist()}; it is always context"
        )
    if len(set(num_context)) > 1:
        raise ValueError(f"view_mask leaves {num_context} context views; expected the same number in every scene")
    return num_context[0]


@dataclass
class Spa3RVGGTOutput(ModelOutput):
    r"""
    last_hidden_state (`torch.Tensor` of shape `(B, V, 1 + registers + N, 2C)`):
        Tokens of the last layer (frame half, then global half): camera token, registers, then the patches row by row.
    layer_features (`dict[int, torch.Tensor]`, each of shape `(B, V, 1 + registers + N, 2C)`):
        The same for the layers that were asked for.
    pose_encodings (`tuple[torch.Tensor]`, each of shape `(B, V, 9)`):
        Translation, quaternion x y z w, vertical and horizontal field of view (rad) after each refinement iteration.
    extrinsics (`torch.Tensor` of shape `(B, V, 3, 4)`):
        Camera <- world, OpenCV axes, world = the first camera, scene units.
    intrinsics (`torch.Tensor` of shape `(B, V, 3, 3)`):
        Pixels; principal point in the middle of the image.
    depth (`torch.Tensor` of shape `(B, V, H, W, 1)`), depth_confidence (`torch.Tensor` of shape `(B, V, H, W)`):
        Depth along the optical axis, scene units; confidence >= 1.
    points (`torch.Tensor` of shape `(B, V, H, W, 3)`), points_confidence (`torch.Tensor` of shape `(B, V, H, W)`):
        Points in the first camera's frame, scene units; confidence >= 1.
    hidden_states, attentions (`tuple[torch.Tensor]`):
        Of the global blocks, on request; given a `view_mask`, context views come first.
    """

    last_hidden_state: Tensor | None = None
    layer_features: dict[int, Tensor] | None = None
    pose_encodings: tuple[Tensor, ...] | None = None
    extrinsics: Tensor | None = None
    intrinsics: Tensor | None = None
    depth: Tensor | None = None
    depth_confidence: Tensor | None = None
    points: Tensor | None = None
    points_confidence: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Spa3RVGGTConvEmbedding(nn.Module):
    """One strided convolution; positions are left to the RoPE of the blocks."""

    def __init__(self, config: Spa3RVGGTConfig):
        super().__init__()
        self.projection = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> (B, N, C)."""
        return self.projection(pixel_values).flatten(2).mT


class Spa3RVGGTDinov2Embedding(nn.Module):
    """DINOv2 with registers: its patch tokens after the final norm."""

    def __init__(self, config: Spa3RVGGTConfig):
        super().__init__()
        dinov2_config = Dinov2WithRegistersConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.patch_embedding_layers,
            num_attention_heads=config.num_attention_heads,
            mlp_ratio=4,
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_register_tokens=4,
            layerscale_value=1.0,
            initializer_range=config.initializer_range,
            attn_implementation=config._attn_implementation,  # type: ignore[call-arg]  # all configurations take it
        )
        self.dinov2 = Dinov2WithRegistersModel(dinov2_config)
        with torch.no_grad():  # here, since the model above has initialised itself by now
            positions = self.dinov2.embeddings.position_embeddings
            positions.copy_(self._fresh_positions(positions, config.rope_theta))

    @staticmethod
    def _fresh_positions(like: Tensor, theta: float) -> Tensor:
        """
        Position embeddings (1, 1 + N, C) to start from: sines and cosines of row and column, zero for the class token.

        They are as large as the patches. Random ones of DINOv2's 0.02 drown in them, and trained from scratch, cameras
        stay unknown for as long as no token says where it is.
        """
        side = math.isqrt(like.shape[1] - 1)
        angles = rotary_angles(grid_positions((side, side), like.device), like.shape[2] // 2, theta)
        waves = torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(1)
        return F.pad(waves, (0, like.shape[2] - waves.shape[1], 1, 0))[None]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> (B, N, C)."""
        num_prefix_tokens = 1 + self.dinov2.config.num_register_tokens
        return self.dinov2(pixel_values).last_hidden_state[:, num_prefix_tokens:]


class Spa3RVGGTPreTrainedModel(PreTrainedModel):
    config: Spa3RVGGTConfig
    config_class = Spa3RVGGTConfig
    # What its keys begin with in a checkpoint of `Spa3RForPreTraining`, which it loads from just as well.
    base_model_prefix = "spa3r.backbone"
    _keys_to_ignore_on_load_unexpected = [r"^(spa3r\.encoder|decoder|geometric_head|semantic_\w+|depth_head)\."]
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["Spa3RLayer", "Dinov2WithRegistersLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(Spa3RLayer, layer_name="global_layers"),
        "attentions": OutputRecorder(Spa3RAttention, index=1, layer_name="global_layers"),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            if isinstance(module, nn.Linear) or module.in_channels == 3:  # the conv patch embedding reads pixels
                init.trunc_normal_(module.weight, std=self.config.initializer_range)
            else:
                # The dense heads', by fan-in: a fixed spread that suits wide convolutions leaves narrow ones dead.
                init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Spa3RLayerScale):
            init.constant_(module.lambda1, module.initial_value)
        elif isinstance(module, Spa3RVGGTCameraHead):
            init.zeros_(module.empty_pose)
        elif isinstance(module, Spa3RVGGTModel):
            init.normal_(module.camera_token, std=1e-6)
            init.normal_(module.register_token, std=1e-6)


class Spa3RVGGTModel(Spa3RVGGTPreTrainedModel):
    """
    Alternating frame and global attention over the views of a scene, with heads for cameras, depth and points.

    Given a `view_mask`, the global attention is that of the Asymmetric View Aggregator (Spa3R paper): context
    views see context views only, target views see all, so that one pass gives context features that are independent of
    the targets, and target features beside them. Two attention calls do this; no mask tensor is made.
    """

    def __init__(self, config: Spa3RVGGTConfig):
        super().__init__(config)
        size = config.hidden_size
        embedding = Spa3RVGGTDinov2Embedding if config.patch_embedding == "dinov2" else Spa3RVGGTConvEmbedding
        self.patch_embedding = embedding(config)
        # The first of each pair is for the first view of a scene, the second for all others.
        self.camera_token = nn.Parameter(torch.zeros(2, 1, size))
        self.register_token = nn.Parameter(torch.zeros(2, config.num_register_tokens, size))

        def layers(qk_norm):
            return nn.ModuleList(
                Spa3RLayer(
                    *(config, size, config.intermediate_size, config.num_attention_heads, qk_norm),
                    layerscale_value=config.layerscale_value,
                )
                for _ in range(config.num_hidden_layers)
            )

        self.frame_layers = layers("layer_norm")
        self.global_layers = layers(config.global_qk_norm)
        self.camera_head = Spa3RVGGTCameraHead(config) if config.use_camera_head else None
        self.depth_head = Spa3RVGGTDepthHead(config) if config.use_depth_head else None
        self.point_head = Spa3RVGGTPointHead(config) if config.use_point_head else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.patch_embedding

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        view_mask: Tensor | None = None,
        output_layers: Sequence[int] = (),
        output_cameras: bool = False,
        output_depth: bool = False,
        output_points: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Spa3RVGGTOutput:
        """
        Args:
            pixel_values: (B, V, 3, H, W) in [0, 1], H and W multiples of the patch size.
            view_mask: (B, V), True = target; the first view is always context, and all scenes have equally many
                context views. None: all views are context.
            output_layers: Layers whose tokens are returned; only what is read is kept in memory.
            output_cameras, output_depth, output_points: Which heads to run.

        Raises:
            ValueError: Images, mask or layers are not as described, or a head is asked for that does not exist.
        """
        check_pixel_values(pixel_values, self.config.patch_size)
        wanted = {"camera": output_cameras, "depth": output_depth, "point": output_points}
        heads = {name: getattr(self, f"{name}_head") for name in wanted if wanted[name]}
        for name, head in heads.items():
            if head is None:
                raise ValueError(f"the {name} head is asked for, but the config says use_{name}_head = False")
        if any(not 0 <= layer < self.config.num_hidden_layers for layer in output_layers):
            raise ValueError(f"output_layers = {output_layers}; expected [0, {self.config.num_hidden_layers - 1}]")

        image_size = image_size_of(pixel_values)
        needed = {*output_layers, self.config.num_hidden_layers - 1}
        if output_depth or output_points:
            needed |= set(self.config.dpt_layers)
        features = self._aggregate(pixel_values, view_mask, needed, **kwargs)
        last = features[self.config.num_hidden_layers - 1]
        output = Spa3RVGGTOutput(last_hidden_state=last)
        if output_layers:
            output.layer_features = {layer: features[layer] for layer in output_layers}
        # The heads work in float32 under autocast, as VGGT's do: poses and depths are not for eight bits of mantissa.
        with torch.autocast(device_type=last.device.type, enabled=False):
            dtype = self.camera_token.dtype
            if output_cameras:
                poses = heads["camera"](last[:, :, 0].to(dtype))
                output.pose_encodings = tuple(poses)
                output.extrinsics, output.intrinsics = pose_encoding_to_cameras(poses[-1].float(), image_size)
            if output_depth or output_points:
                first_patch = self.config.num_prefix_tokens
                maps = [features[layer][:, :, first_patch:].to(dtype) for layer in self.config.dpt_layers]
                if output_depth:
                    output.depth, output.depth_confidence = heads["depth"](maps, image_size)
                if output_points:
                    output.points, output.points_confidence = heads["point"](maps, image_size)
        return output

    def _aggregate(
        self, pixel_values: Tensor, view_mask: Tensor | None, needed: set[int], **kwargs
    ) -> dict[int, Tensor]:
        """Tokens (B, V, P, 2C) of the layers in `needed`."""
        config = self.config
        batch_size, num_views = pixel_values.shape[:2]
        images = normalize_pixels(pixel_values).flatten(0, 1).to(self.camera_token.dtype)
        patches = self.patch_embedding(images).unflatten(0, (batch_size, num_views))
        special = torch.cat((self.camera_token, self.register_token), dim=1).to(patches.dtype)
        special = torch.cat((special[:1], special[1:].expand(num_views - 1, -1, -1)))
        tokens = torch.cat((special.expand(batch_size, -1, -1, -1), patches), dim=2)

        # Global attention does not care about the order of the views, so that context first makes it two plain calls.
        order = restore = num_context_tokens = None
        if view_mask is not None:
            num_context = check_view_mask(view_mask, (batch_size, num_views))
            if num_context < num_views:
                num_context_tokens = num_context * tokens.shape[2]
                order = order_context_first(view_mask)
                restore = order.argsort(dim=1)
                tokens = torch.take_along_dim(tokens, order[..., None, None], dim=1)

        grid_size = grid_size_of(pixel_values, config.patch_size)
        head_dim = config.hidden_size // config.num_attention_heads
        frame_positions = RotaryEncoding.for_views(
            config.num_prefix_tokens, grid_size, 1, head_dim, config.rope_theta, like=tokens
        )
        global_positions = frame_positions.tiled(num_views)
        features = {}
        shape = tokens.shape
        for index, (frame_layer, global_layer) in enumerate(zip(self.frame_layers, self.global_layers, strict=True)):
            frame = frame_layer(tokens.reshape(-1, *shape[2:]), positions=frame_positions, **kwargs)
            tokens = global_layer(
                frame.view(batch_size, -1, shape[-1]),
                positions=global_positions,
                num_context_tokens=num_context_tokens,
                **kwargs,
            ).view(shape)
            if index in needed:
                layer_features = torch.cat((frame.view(shape), tokens), dim=-1)
                if restore is not None:
                    layer_features = torch.take_along_dim(layer_features, restore[..., None, None], dim=1)
                features[index] = layer_features
        return features


__all__ = ["Spa3RVGGTModel", "Spa3RVGGTOutput", "Spa3RVGGTPreTrainedModel"]
