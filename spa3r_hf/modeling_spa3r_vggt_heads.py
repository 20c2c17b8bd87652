"""VGGT's heads: cameras from the camera tokens, dense maps (depth, points) from the patch tokens of four layers."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_spa3r_vggt import Spa3RVGGTConfig
from .layers_spa3r import Spa3RLayer, Spa3RMLP


class Spa3RVGGTCameraHead(nn.Module):
    """Refines a pose encoding over a few iterations of a trunk that the last estimate modulates (AdaLN)."""

    def __init__(self, config: Spa3RVGGTConfig):
        super().__init__()
        size = config.feature_size
        self.num_iterations = config.camera_num_iterations
        self.token_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.empty_pose = nn.Parameter(torch.zeros(1, 1, 9))
        self.embed_pose = nn.Linear(9, size)
        self.modulation = nn.Linear(size, 3 * size)
        self.modulation_norm = nn.LayerNorm(size, eps=1e-6, elementwise_affine=False)
        self.trunk = nn.ModuleList(
            Spa3RLayer(
                config,
                size,
                4 * size,
                config.camera_num_attention_heads,
                None,
                layerscale_value=config.layerscale_value,
            )
            for _ in range(config.camera_num_hidden_layers)
        )
        self.trunk_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.pose_branch = Spa3RMLP(size, size // 2, 9)

    def forward(self, camera_tokens: Tensor) -> list[Tensor]:
        """Camera tokens (B, V, 2C) -> the pose encodings (B, V, 9) after each iteration, fields of view >= 0."""
        tokens = self.token_norm(camera_tokens)
        pose = self.empty_pose.expand(*tokens.shape[:2], -1)
        poses = []
        for iteration in range(self.num_iterations):
            shift, scale, gate = self.modulation(F.silu(self.embed_pose(pose))).chunk(3, dim=-1)
            hidden_states = tokens + gate * (self.modulation_norm(tokens) * (1 + scale) + shift)
            for layer in self.trunk:
                hidden_states = layer(hidden_states)
            change = self.pose_branch(self.trunk_norm(hidden_states))
            pose = change if iteration == 0 else pose + change
            poses.append(torch.cat((pose[..., :7], F.relu(pose[..., 7:])), dim=-1))
            # As in VGGT, an iteration does not send gradients into the one before it.
            pose = pose.detach()
        return poses


class Spa3RVGGTResidualConvUnit(nn.Module):
    """Two convolutions around a skip connection. The skip carries relu(x), not x: VGGT's first ReLU works in place."""

    def __init__(self, size: int):
        super().__init__()
        self.conv1 = nn.Conv2d(size, size, 3, padding=1)
        self.conv2 = nn.Conv2d(size, size, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        features = F.relu(features)
        return features + self.conv2(F.relu(self.conv1(features)))


class Spa3RVGGTFusionLayer(nn.Module):
    """Adds a finer scale to the coarser ones fused so far, and brings the sum to the next size."""

    def __init__(self, size: int, has_skip: bool):
        super().__init__()
        self.skip_unit = Spa3RVGGTResidualConvUnit(size) if has_skip else None
        self.unit = Spa3RVGGTResidualConvUnit(size)
        self.projection = nn.Conv2d(size, size, 1)

    def forward(self, features: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        if self.skip_unit is not None and skip is not None:
            features = features + self.skip_unit(skip)
        features = F.interpolate(self.unit(features), size=size, mode="bilinear", align_corners=True)
        return self.projection(features)


def uv_position_embedding(features: Tensor, image_size: tuple[int, int]) -> Tensor:
    """
    VGGT's sinusoidal embedding (1, channels, h, w), ratio 0.1, of the positions on an image plane of unit diagonal.

    Args:
        features: (B, channels, h, w); gives size, dtype and device.
        image_size: (height, width) in pixels of the images, for the aspect ratio.
    """
    channels, h, w = features.shape[1:]
    diagonal = math.hypot(*image_size)
    axes = []
    for count, side in ((w, image_size[1]), (h, image_size[0])):
        span = side / diagonal * (count - 1) / count
        axes.append(torch.linspace(-span, span, count, device=features.device))
    frequencies = 100.0 ** -(torch.arange(channels // 4, device=features.device, dtype=torch.float64) * 4 / channels)
    x, y = (axis.double()[:, None] * frequencies for axis in axes)
    x, y = torch.cat((x.sin(), x.cos()), dim=-1), torch.cat((y.sin(), y.cos()), dim=-1)
    embedding = torch.cat((x[None].expand(h, -1, -1), y[:, None].expand(-1, w, -1)), dim=-1)
    return 0.1 * embedding.permute(2, 0, 1)[None].to(features.dtype)


class Spa3RVGGTDenseHead(nn.Module):
    """DPT head: patch tokens of four layers -> a map of `out_channels` numbers and a confidence >= 1 per pixel."""

    # Views decoded at a time: the maps of all views together would be the largest tensors of the whole model.
    views_per_chunk = 8

    def __init__(self, config: Spa3RVGGTConfig, out_channels: int):
        super().__init__()
        self.patch_size = config.patch_size
        size = config.dpt_hidden_size
        first, second, third, fourth = config.dpt_out_channels
        self.norm = nn.LayerNorm(config.feature_size, eps=config.layer_norm_eps)
        self.projections = nn.ModuleList(nn.Conv2d(config.feature_size, width, 1) for width in config.dpt_out_channels)
        self.resizes = nn.ModuleList(
            (
                nn.ConvTranspose2d(first, first, 4, stride=4),
                nn.ConvTranspose2d(second, second, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(fourth, fourth, 3, stride=2, padding=1),
            )
        )
        self.scale_projections = nn.ModuleList(
            nn.Conv2d(width, size, 3, padding=1, bias=False) for width in config.dpt_out_channels
        )
        self.fusion = nn.ModuleList(Spa3RVGGTFusionLayer(size, has_skip=scale < 3) for scale in range(4))
        self.out_conv1 = nn.Conv2d(size, size // 2, 3, padding=1)
        self.out_conv2 = nn.Conv2d(size // 2, 32, 3, padding=1)
        self.out_conv3 = nn.Conv2d(32, out_channels + 1, 1)

    def forward(self, layer_features: Sequence[Tensor], image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Patch features of the four layers, (B, V, N, 2C) each -> (B, V, H, W, out_channels), (B, V, H, W)."""
        batch_and_views = layer_features[0].shape[:2]
        chunks = zip(*(f.flatten(0, 1).split(self.views_per_chunk) for f in layer_features), strict=True)
        maps = torch.cat([self._decode(chunk, image_size) for chunk in chunks])
        maps = maps.permute(0, 2, 3, 1).unflatten(0, batch_and_views)
        return maps[..., :-1], 1 + maps[..., -1].exp()

    def _decode(self, layer_features: Sequence[Tensor], image_size: tuple[int, int]) -> Tensor:
        grid_size = tuple(side // self.patch_size for side in image_size)
        scales = []
        for features, project, resize, scale_project in zip(
            layer_features, self.projections, self.resizes, self.scale_projections, strict=True
        ):
            features = project(self.norm(features).mT.unflatten(-1, grid_size))
            scales.append(scale_project(resize(features + uv_position_embedding(features, image_size))))
        fused = self.fusion[3](scales[3], None, scales[2].shape[-2:])
        fused = self.fusion[2](fused, scales[2], scales[1].shape[-2:])
        fused = self.fusion[1](fused, scales[1], scales[0].shape[-2:])
        fused = self.fusion[0](fused, scales[0], (2 * scales[0].shape[-2], 2 * scales[0].shape[-1]))
        fused = F.interpolate(self.out_conv1(fused), size=image_size, mode="bilinear", align_corners=True)
        fused = fused + uv_position_embedding(fused, image_size)
        return self.out_conv3(F.relu(self.out_conv2(fused)))


class Spa3RVGGTDepthHead(Spa3RVGGTDenseHead):
    """Depth along the optical axis in scene units, above 0."""

    def __init__(self, config: Spa3RVGGTConfig):
        super().__init__(config, out_channels=1)

    def forward(self, layer_features: Sequence[Tensor], image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        maps, confidence = super().forward(layer_features, image_size)
        return maps.exp(), confidence


class Spa3RVGGTPointHead(Spa3RVGGTDenseHead):
    """Points in the first camera's frame, in scene units."""

    def __init__(self, config: Spa3RVGGTConfig):
        super().__init__(config, out_channels=3)

    def forward(self, layer_features: Sequence[Tensor], image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        maps, confidence = super().forward(layer_features, image_size)
        return maps.sign() * maps.abs().expm1(), confidence
