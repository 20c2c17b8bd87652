"""The spread of a geometry backbone's features."""

import math

import torch
from torch import Tensor

from .modeling_spa3r_vggt import Spa3RVGGTDinov2Embedding, Spa3RVGGTModel


# Names of the norms whose epsilon is the configuration's; those of DINOv2 have their own.
CONFIGURED_NORMS = ("norm", "norm1", "norm2", "token_norm", "trunk_norm")


@torch.no_grad()
def feature_spread(model: Spa3RVGGTModel, pixel_values: Tensor) -> float:
    """Standard deviation of the last layer's patch features of views (B, V, 3, H, W)."""
    return model(pixel_values).last_hidden_state[:, :, model.config.num_prefix_tokens :].float().std().item()


@torch.no_grad()
def scale_features(model: Spa3RVGGTModel, factor: float) -> None:
    """
    Multiply the features of all layers by a factor, in place, and change nothing that the heads say.

    A backbone trained from scratch gives features of whatever size; PSFM's losses and its fresh encoder are made for a
    spread of about one. All that writes to the residual stream is scaled; all that reads it starts with a LayerNorm,
    whose epsilon is scaled along, in the configuration too.

    Args:
        model: The backbone.
        factor: Above 0.

    Raises:
        ValueError: The factor is not a number above 0.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"factor = {factor}; expected a number above 0")
    embedding = model.patch_embedding
    last = embedding.dinov2.layernorm if isinstance(embedding, Spa3RVGGTDinov2Embedding) else embedding.projection
    written = [last.weight, last.bias, model.camera_token, model.register_token]
    for layer in (*model.frame_layers, *model.global_layers):
        written += [layer.layer_scale1.lambda1, layer.layer_scale2.lambda1]
    for parameter in written:
        if parameter is not None:
            parameter.mul_(factor)
    model.config.layer_norm_eps *= factor**2
    for name, module in model.named_modules():
        if name.split(".")[-1] in CONFIGURED_NORMS and not name.startswith("patch_embedding"):
            module.eps *= factor**2


__all__ = ["feature_spread", "scale_features"]
