"""Spa3R (arXiv 2602.21186): an encoder from context views to latents, and Predictive Spatial Field Modeling."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DINOv3ViTModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import TransformersKwargs, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs
from typing_extensions import Unpack

from .camera_spa3r import camera_rays, check_cameras, plucker_rays, projection_matrices, relative_to_first_view
from .configuration_spa3r import Spa3RConfig
from .layers_spa3r import CameraEncoding, RotaryEncoding, Spa3RAttention, Spa3RLayer, Spa3RMLP
from .modeling_spa3r_vggt import (
    Spa3RVGGTModel,
    check_pixel_values,
    check_view_mask,
    grid_size_of,
    image_size_of,
    normalize_pixels,
    order_context_first,
)


def num_context_views(num_views: int, mask_ratio: float) -> int:
    """
    Number of views that stay context: int(V * (1 - ratio)), the first view included.

    Raises:
        ValueError: No context or no target view would be left.
    """
    num_context = int(num_views * (1 - mask_ratio))
    if not 1 <= num_context < num_views:
        raise ValueError(
            f"{num_views} views at mask_ratio = {mask_ratio} leave {max(num_context, 0)} context views; expected at "
            f"least 1 context and 1 target view"
        )
    return num_context


def draw_view_mask(
    batch_size: int,
    num_views: int,
    mask_ratio: float,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """
    Draw the context and target views of every scene as the paper does: (B, V) bool, True = target.

    The first view is context; the others are drawn without replacement until `num_context_views` are.
    """
    num_context = num_context_views(num_views, mask_ratio)
    noise = torch.rand(batch_size, num_views, generator=generator)
    noise[:, 0] = -1.0
    return (noise.argsort(dim=1).argsort(dim=1) >= num_context).to(device)


@dataclass
class Spa3RModelOutput(ModelOutput):
    r"""
    latents (`torch.Tensor` of shape `(B, Q, D)`):
        The scene.
    hidden_states, attentions (`tuple[torch.Tensor]`):
        Of the encoder's layers, on request. The last layer works on the latents alone.
    """

    latents: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class Spa3RDecoderOutput(ModelOutput):
    r"""
    geometric_prediction (`torch.Tensor` of shape `(B, V, N, 2C)`), semantic_prediction (`(B, V, N, semantic width)`):
        Feature maps of the views, their patches row by row; None for a kind that is not among `config.targets`.
    depth_prediction (`torch.Tensor` of shape `(B, V, N, 1)`):
        Depth along the optical axis at every patch, scene units, where the depth probe is on.
    decoder_tokens (`torch.Tensor` of shape `(B, V, N, D)`):
        What the heads read.
    """

    geometric_prediction: Tensor | None = None
    semantic_prediction: Tensor | None = None
    depth_prediction: Tensor | None = None
    decoder_tokens: Tensor | None = None


@dataclass
class Spa3RTargetOutput(ModelOutput):
    r"""
    geometric_target (`torch.Tensor` of shape `(B, V, N, 2C)`), semantic_target (`(B, V, N, semantic width)`),
    depth_target (`torch.Tensor` of shape `(B, V, N, 1)`):
        What the frozen teachers say of the views, as far as the config asks for it.
    view_mask (`torch.Tensor` of shape `(B, V)`):
        True = target view.
    extrinsics (`torch.Tensor` of shape `(B, V, 3, 4)`), intrinsics (`torch.Tensor` of shape `(B, V, 3, 3)`):
        The cameras decoded with: camera <- world, OpenCV, world = first camera, scene units; pixels.
    """

    geometric_target: Tensor | None = None
    semantic_target: Tensor | None = None
    depth_target: Tensor | None = None
    view_mask: Tensor | None = None
    extrinsics: Tensor | None = None
    intrinsics: Tensor | None = None


@dataclass
class Spa3RTeacherOutput(Spa3RTargetOutput):
    r"""
    context_tokens (`torch.Tensor` of shape `(B, V_context, 1 + registers + N, 2C)`):
        Last-layer backbone tokens of the context views, which the encoder reads.

    and the fields of `Spa3RTargetOutput`.
    """

    context_tokens: Tensor | None = None


@dataclass
class Spa3RLossOutput(ModelOutput):
    r"""
    loss (`torch.Tensor` of shape `()`):
        Sum of `losses`.
    losses (`dict[str, torch.Tensor]`):
        `geometric_l1`, `geometric_cosine`, `semantic_l1`, `semantic_cosine`, `depth_probe`, as far as computed.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None


@dataclass
class Spa3RForPreTrainingOutput(Spa3RModelOutput, Spa3RTargetOutput, Spa3RDecoderOutput, Spa3RLossOutput):
    """
    The loss, which comes first, and the fields of `Spa3RDecoderOutput`, `Spa3RTargetOutput` and `Spa3RModelOutput` (of
    the context views alone).
    """


def _layers(config: Spa3RConfig, count: int) -> nn.ModuleList:
    return nn.ModuleList(
        Spa3RLayer(config, config.hidden_size, config.intermediate_size, config.num_attention_heads, "rms_norm")
        for _ in range(count)
    )


class Spa3REncoder(nn.Module):
    """Presses the features of context views into latents."""

    def __init__(self, config: Spa3RConfig):
        super().__init__()
        self.config = config
        self.projection = nn.Linear(config.backbone_config.feature_size, config.hidden_size)
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, config.hidden_size))
        self.queries = nn.Parameter(torch.zeros(1, config.num_latents, config.hidden_size))
        self.layers = _layers(config, config.num_hidden_layers)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, features: Tensor, grid_size: tuple[int, int], **kwargs: Unpack[TransformersKwargs]) -> Tensor:
        """
        Args:
            features: (B, V, N, 2C), last-layer patch features of the context views, row by row.
            grid_size: (h, w) with h * w = N.

        Returns:
            Latents (B, Q, D).
        """
        batch_size, num_views = features.shape[:2]
        prefix = torch.cat((self.register_tokens, self.queries), dim=1)
        patches = self.projection(features.flatten(1, 2))
        hidden_states = torch.cat((prefix.expand(batch_size, -1, -1).to(patches.dtype), patches), dim=1)
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        positions = RotaryEncoding.for_views(
            prefix.shape[1], grid_size, num_views, head_dim, self.config.rope_theta, like=hidden_states
        )
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states, positions=positions, **kwargs)
        # Only the latents leave the encoder: in the last block nothing else needs to ask.
        latents = slice(self.config.num_register_tokens, prefix.shape[1])
        return self.norm(self.layers[-1](hidden_states, positions=positions, queries=latents, **kwargs))


class Spa3RDecoder(nn.Module):
    """Predicts what a camera would see, in feature space, from the latents alone."""

    def __init__(self, config: Spa3RConfig):
        super().__init__()
        self.config = config
        ray_size = 3 if config.camera_conditioning == "prope" else 6
        self.ray_embedding = nn.Linear(ray_size, config.hidden_size)
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, config.hidden_size))
        self.layers = _layers(config, config.decoder_num_hidden_layers)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        latents: Tensor,
        extrinsics: Tensor,
        intrinsics: Tensor,
        image_size: tuple[int, int],
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """
        Args:
            latents: (B, Q, D).
            extrinsics: (B, V, 3, 4), camera <- world, world = first camera.
            intrinsics: (B, V, 3, 3), pixels.
            image_size: (H, W), pixels.

        Returns:
            Ray tokens (B, V, N, D), row by row.
        """
        config = self.config
        batch_size, num_views = extrinsics.shape[:2]
        patch_size = config.backbone_config.patch_size
        grid_size = (image_size[0] // patch_size, image_size[1] // patch_size)
        head_dim = config.hidden_size // config.num_attention_heads
        num_prefix_tokens = config.num_register_tokens + config.num_latents
        positions: CameraEncoding | RotaryEncoding
        # Cameras stay in float32; what they do to the tokens may be in less.
        with torch.autocast(device_type=latents.device.type, enabled=False):
            extrinsics, intrinsics = extrinsics.float(), intrinsics.float()
            if config.camera_conditioning == "prope":
                rays = camera_rays(intrinsics, grid_size, patch_size)
                projection, inverse = projection_matrices(
                    extrinsics.flatten(0, 1), intrinsics.flatten(0, 1), image_size
                )
                positions = CameraEncoding.for_views(
                    num_prefix_tokens, grid_size, projection, inverse, head_dim, config.rope_theta
                )
            else:
                rays = plucker_rays(extrinsics, intrinsics, grid_size, patch_size)
                positions = RotaryEncoding.for_views(
                    num_prefix_tokens, grid_size, 1, head_dim, config.rope_theta, like=latents
                )
        rays = self.ray_embedding(rays.flatten(0, 1).to(self.ray_embedding.weight.dtype))
        prefix = torch.cat((self.register_tokens.expand(batch_size, -1, -1).to(latents.dtype), latents), dim=1)
        hidden_states = torch.cat((prefix.repeat_interleave(num_views, 0).to(rays.dtype), rays), dim=1)
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states, positions=positions, **kwargs)
        # Only the ray tokens leave the decoder: in the last block nothing else needs to ask.
        ray_tokens = slice(num_prefix_tokens, None)
        hidden_states = self.norm(self.layers[-1](hidden_states, positions=positions, queries=ray_tokens, **kwargs))
        return hidden_states.unflatten(0, (batch_size, num_views))


class Spa3RPreTrainedModel(PreTrainedModel):
    config: Spa3RConfig
    config_class = Spa3RConfig
    base_model_prefix = "spa3r"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["Spa3RLayer", "Dinov2WithRegistersLayer", "DINOv3ViTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(Spa3RLayer, layer_name="encoder.layers"),
        "attentions": OutputRecorder(Spa3RAttention, index=1, layer_name="encoder.layers"),
    }
    # Parts that are never trained: in eval mode and without gradients, whatever `train()` and the optimizer say.
    frozen_parts: tuple[str, ...] = ()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Spa3REncoder):
            init.normal_(module.queries, std=self.config.initializer_range)
            init.normal_(module.register_tokens, std=1e-6)
        elif isinstance(module, Spa3RDecoder):
            init.normal_(module.register_tokens, std=1e-6)

    def train(self, mode: bool = True) -> "Spa3RPreTrainedModel":
        super().train(mode)
        for name in self.frozen_parts:
            part = getattr(self, name)
            if part is not None:
                part.eval().requires_grad_(False)
        return self

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:  # type: ignore[override]
        # The library would name the saved class alone, but either class loads from the other's folder.
        classes = {"AutoModel": Spa3RModel, "AutoModelForPreTraining": Spa3RForPreTraining}
        self.config.auto_map = {
            **(getattr(self.config, "auto_map", None) or {}),
            **{auto_class: f"modeling_spa3r.{model.__name__}" for auto_class, model in classes.items()},
        }
        super().save_pretrained(save_directory, **kwargs)


class Spa3RModel(Spa3RPreTrainedModel):
    """
    The frozen geometry backbone and the Spa3R encoder: pictures of a scene in, latents out.

    Example:

    ```python
    >>> model = Spa3RModel.from_pretrained("org/spa3r")
    >>> processor = Spa3RImageProcessor.from_pretrained("org/spa3r")
    >>> latents = model(**processor(pictures, return_tensors="pt")).latents  # (1, Q, D)
    ```
    """

    frozen_parts = ("backbone",)
    # What a pre-training checkpoint holds besides the encoder.
    _keys_to_ignore_on_load_unexpected = [r"^(decoder|geometric_head|semantic_head|depth_head|semantic_teacher)\."]

    def __init__(self, config: Spa3RConfig):
        super().__init__(config)
        self.backbone = Spa3RVGGTModel(config.backbone_config)
        self.encoder = Spa3REncoder(config)
        self.post_init()
        self.train(self.training)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]) -> Spa3RModelOutput:
        """
        Args:
            pixel_values: (B, V, 3, H, W) in [0, 1], H and W multiples of the patch size; all views are context.

        Raises:
            ValueError: The images have another shape, or pixels that are not finite.
        """
        with torch.no_grad():
            tokens = self.backbone(pixel_values).last_hidden_state
        return Spa3RModelOutput(latents=self.encode(tokens, image_size_of(pixel_values), **kwargs))

    def encode(self, tokens: Tensor, image_size: tuple[int, int], **kwargs: Unpack[TransformersKwargs]) -> Tensor:
        """Last-layer backbone tokens (B, V, 1 + registers + N, 2C) of context views -> latents (B, Q, D)."""
        config = self.config.backbone_config
        grid_size = (image_size[0] // config.patch_size, image_size[1] // config.patch_size)
        return self.encoder(tokens[:, :, config.num_prefix_tokens :], grid_size, **kwargs)


class Spa3RForPreTraining(Spa3RPreTrainedModel):
    """
    Spa3R with its decoder and the frozen semantic teacher, trained by Predictive Spatial Field Modeling:
    the features of all views are predicted from the latents of the context views.
    """

    frozen_parts = ("semantic_teacher",)

    def __init__(self, config: Spa3RConfig):
        super().__init__(config)
        size = config.hidden_size
        self.spa3r = Spa3RModel(config)
        self.decoder = Spa3RDecoder(config)

        def head(wanted: bool, out_size: int) -> Spa3RMLP | None:
            return Spa3RMLP(size, 4 * size, out_size) if wanted else None

        has_semantic = "semantic" in config.targets
        self.geometric_head = head("geometric" in config.targets, config.backbone_config.feature_size)
        self.semantic_head = head(has_semantic, config.semantic_config.hidden_size)
        self.depth_head = head(config.depth_probe, 1)
        self.semantic_teacher = DINOv3ViTModel(config.semantic_config) if has_semantic else None
        self.post_init()
        self.train(self.training)

    def get_input_embeddings(self) -> nn.Module:
        return self.spa3r.get_input_embeddings()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        view_mask: Tensor | None = None,
        extrinsics: Tensor | None = None,
        intrinsics: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Spa3RForPreTrainingOutput:
        """
        Args:
            pixel_values: (B, V, 3, H, W) in [0, 1], H and W multiples of the patch size.
            view_mask: (B, V) bool, True = target; the first view is context, and all scenes have equally many context
                views. None: drawn at random, with `config.mask_ratio`.
            extrinsics, intrinsics: (B, V, 3, 4) camera <- world in any world frame, and (B, V, 3, 3) in pixels, where
                the cameras are known. None: the backbone's camera head says.

        Raises:
            ValueError: Images, mask or cameras are not as described.
        """
        teachers = self.teach(pixel_values, view_mask, extrinsics, intrinsics)
        return self.learn(teachers, image_size_of(pixel_values), **kwargs)

    @torch.no_grad()
    def teach(
        self,
        pixel_values: Tensor,
        view_mask: Tensor | None = None,
        extrinsics: Tensor | None = None,
        intrinsics: Tensor | None = None,
    ) -> Spa3RTeacherOutput:
        """What the frozen parts say of a batch, the first half of `forward`, which has the same arguments."""
        check_pixel_values(pixel_values, self.config.backbone_config.patch_size)
        batch_size, num_views = pixel_values.shape[:2]
        if view_mask is None:
            view_mask = draw_view_mask(batch_size, num_views, self.config.mask_ratio, device=pixel_values.device)
        if (extrinsics is None) != (intrinsics is None):
            raise ValueError("only one of extrinsics and intrinsics is given; expected both or neither")
        num_context = check_view_mask(view_mask, (batch_size, num_views))
        if extrinsics is not None and intrinsics is not None:
            check_cameras(extrinsics, intrinsics, (batch_size, num_views))
            extrinsics = relative_to_first_view(extrinsics.float())

        config, backbone = self.config, self.spa3r.backbone
        context = order_context_first(view_mask)[:, :num_context]
        asymmetric = config.masking_mode == "asymmetric"
        views = backbone(
            pixel_values,
            view_mask=view_mask if asymmetric else None,
            output_cameras=extrinsics is None,
            output_depth=config.depth_probe,
        )
        if asymmetric:
            context_tokens = torch.take_along_dim(views.last_hidden_state, context[..., None, None], dim=1)
        else:
            context_pixels = torch.take_along_dim(pixel_values, context[..., None, None, None], dim=1)
            context_tokens = backbone(context_pixels).last_hidden_state
        if extrinsics is None:
            extrinsics, intrinsics = views.extrinsics, views.intrinsics

        answers = Spa3RTeacherOutput(
            context_tokens=context_tokens, view_mask=view_mask, extrinsics=extrinsics, intrinsics=intrinsics
        )
        if self.geometric_head is not None:
            answers.geometric_target = views.last_hidden_state[:, :, config.backbone_config.num_prefix_tokens :]
        if self.semantic_head is not None:
            answers.semantic_target = self.semantic_features(pixel_values)
        if self.depth_head is not None:
            grid_size = grid_size_of(pixel_values, config.backbone_config.patch_size)
            depth = F.interpolate(views.depth.flatten(0, 1).permute(0, 3, 1, 2), size=grid_size, mode="nearest")
            answers.depth_target = depth.flatten(2).mT.unflatten(0, pixel_values.shape[:2])
        return answers

    def learn(
        self, teachers: Spa3RTeacherOutput, image_size: tuple[int, int], **kwargs: Unpack[TransformersKwargs]
    ) -> Spa3RForPreTrainingOutput:
        """The trained parts and the loss, the second half of `forward`. Teachers' answers may be kept and reused."""
        latents = self.spa3r.encode(teachers["context_tokens"], image_size, **kwargs)
        prediction = self._decode(latents, teachers.extrinsics, teachers.intrinsics, image_size, **kwargs)
        answers = {key: value for key, value in teachers.items() if key != "context_tokens"}
        losses = self._losses(prediction, teachers)
        return Spa3RForPreTrainingOutput(
            **prediction, **answers, loss=torch.stack(list(losses.values())).sum(), losses=losses, latents=latents
        )

    def decode(
        self, latents: Tensor, extrinsics: Tensor, intrinsics: Tensor, image_size: tuple[int, int]
    ) -> Spa3RDecoderOutput:
        """
        Query the field: what would these cameras see?

        Args:
            latents: (B, Q, D) of B scenes.
            extrinsics: (B, V, 3, 4), camera <- world, OpenCV axes, world = the scene's first context camera.
            intrinsics: (B, V, 3, 3), pixels.
            image_size: (H, W) in pixels, multiples of the patch size.

        Returns:
            The feature maps of the B x V cameras, one token a patch, row by row.

        Raises:
            ValueError: Latents, cameras or image size are not as described.
        """
        config, patch_size = self.config, self.config.backbone_config.patch_size
        if latents.ndim != 3 or latents.shape[1:] != (config.num_latents, config.hidden_size):
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}; expected "
                f"(scenes, {config.num_latents}, {config.hidden_size})"
            )
        if len(image_size) != 2 or any(side <= 0 or side % patch_size for side in image_size):
            raise ValueError(f"image_size = {tuple(image_size)}; expected (height, width), multiples of {patch_size}")
        check_cameras(extrinsics, intrinsics, (latents.shape[0], *extrinsics.shape[1:2]))
        return self._decode(latents, extrinsics[..., :3, :], intrinsics, tuple(image_size))

    def _decode(self, latents, extrinsics, intrinsics, image_size, **kwargs) -> Spa3RDecoderOutput:
        tokens = self.decoder(latents, extrinsics, intrinsics, image_size, **kwargs)
        return Spa3RDecoderOutput(
            geometric_prediction=self.geometric_head(tokens) if self.geometric_head is not None else None,
            semantic_prediction=self.semantic_head(tokens) if self.semantic_head is not None else None,
            # The probe reads; it does not teach.
            depth_prediction=self.depth_head(tokens.detach()) if self.depth_head is not None else None,
            decoder_tokens=tokens,
        )

    @torch.no_grad()
    def semantic_features(self, pixel_values: Tensor) -> Tensor:
        """
        Features (B, V, N, semantic width) of views (B, V, 3, H, W), on the grid of the backbone's patches.

        Raises:
            ValueError: The model has no semantic teacher, as its `config.targets` says.
        """
        config = self.config
        if self.semantic_teacher is None:
            raise ValueError(f"targets = {list(config.targets)}; expected 'semantic' among them for semantic features")
        side = config.semantic_image_size // config.semantic_config.patch_size
        grid_size = grid_size_of(pixel_values, config.backbone_config.patch_size)
        images = F.interpolate(
            pixel_values.flatten(0, 1), size=(config.semantic_image_size,) * 2, mode="bilinear", align_corners=False
        )
        tokens = self.semantic_teacher(normalize_pixels(images)).last_hidden_state
        maps = tokens[:, 1 + config.semantic_config.num_register_tokens :].mT.unflatten(-1, (side, side))
        maps = F.interpolate(maps, size=grid_size, mode="bilinear", align_corners=False)
        return maps.flatten(2).mT.unflatten(0, pixel_values.shape[:2])

    def _losses(self, prediction: Spa3RDecoderOutput, teachers: Spa3RTeacherOutput) -> dict[str, Tensor]:
        """The PSFM loss: smooth L1 and cosine distance for each kind of feature; smooth L1 for the depth probe."""
        losses = {}

        def chosen(features: Tensor) -> Tensor:
            return (features[teachers.view_mask] if self.config.loss_views == "target" else features).float()

        for kind in ("geometric", "semantic"):
            if getattr(prediction, f"{kind}_prediction") is not None:
                predicted, target = chosen(prediction[f"{kind}_prediction"]), chosen(teachers[f"{kind}_target"])
                losses[f"{kind}_l1"] = F.smooth_l1_loss(predicted, target)
                losses[f"{kind}_cosine"] = (1 - F.cosine_similarity(predicted, target, dim=-1)).mean()
        if prediction.depth_prediction is not None:
            losses["depth_probe"] = F.smooth_l1_loss(
                chosen(prediction.depth_prediction), chosen(teachers["depth_target"])
            )
        return losses


__all__ = [
    "Spa3RDecoderOutput",
    "Spa3RForPreTraining",
    "Spa3RForPreTrainingOutput",
    "Spa3RModel",
    "Spa3RModelOutput",
    "Spa3RPreTrainedModel",
    "Spa3RTargetOutput",
    "Spa3RTeacherOutput",
    "draw_view_mask",
    "num_context_views",
]
