"""Configurations small enough for tests, and scenes to go with them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from spa3r_hf import Spa3RConfig, Spa3RForPreTraining, Spa3RVGGTConfig


FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN = {
    "rms_norm": FIXTURES / "spa3r_reference_rmsnorm.safetensors",
    "layer_norm": FIXTURES / "spa3r_reference_layernorm.safetensors",
}


def tiny_vggt_config(**options: Any) -> Spa3RVGGTConfig:
    settings: dict[str, Any] = {
        **{"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48},
        **{"image_size": 28, "patch_embedding": "conv", "patch_embedding_layers": 1, "num_register_tokens": 2},
        **{"camera_num_attention_heads": 2, "camera_num_hidden_layers": 1, "camera_num_iterations": 2},
        **{"dpt_hidden_size": 8, "dpt_out_channels": (4, 4, 8, 8), "dpt_layers": (0, 1, 1, 2)},
        # Fresh weights of 0.02 in so few layers would leave all tokens nearly alike, and tests blind.
        **{"layerscale_value": 0.5, "initializer_range": 0.2},
    }
    return Spa3RVGGTConfig(**(settings | options))


def tiny_spa3r_config(backbone: dict[str, Any] | None = None, **options: Any) -> Spa3RConfig:
    settings: dict[str, Any] = {
        "backbone_config": tiny_vggt_config(**(backbone or {})),
        "semantic_config": {
            **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
            "num_register_tokens": 1,
        },
        **{"hidden_size": 32, "num_hidden_layers": 2, "decoder_num_hidden_layers": 2, "num_attention_heads": 2},
        **{"intermediate_size": 48, "num_latents": 5, "num_register_tokens": 2},
        **{"semantic_image_size": 32, "initializer_range": 0.2},
    }
    return Spa3RConfig(**(settings | options))


def tiny_spa3r(seed: int = 0, **options: Any) -> Spa3RForPreTraining:
    """A fresh model in eval mode."""
    torch.manual_seed(seed)
    return Spa3RForPreTraining(tiny_spa3r_config(**options)).eval()


def scene_pixels(batch_size: int = 2, num_views: int = 4, height: int = 28, width: int = 42, seed: int = 0) -> Tensor:
    """Pixel values (B, V, 3, H, W) in [0, 1]."""
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.random((batch_size, num_views, 3, height, width), dtype=np.float32))


def some_cameras(batch_size: int = 2, num_views: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Extrinsics (B, V, 3, 4), camera <- world, in a world frame that is no camera's, and intrinsics (B, V, 3, 3)."""
    generator = torch.Generator().manual_seed(seed)
    rotations = torch.linalg.qr(torch.randn(batch_size, num_views, 3, 3, generator=generator)).Q
    rotations = rotations * torch.linalg.det(rotations)[..., None, None]
    extrinsics = torch.cat((rotations, torch.randn(batch_size, num_views, 3, 1, generator=generator)), dim=-1)
    intrinsics = torch.eye(3).repeat(batch_size, num_views, 1, 1)
    intrinsics[..., (0, 1), (0, 1)] = 30 + 10 * torch.rand(batch_size, num_views, 2, generator=generator)
    intrinsics[..., 0, 2], intrinsics[..., 1, 2] = 20.0, 15.0
    return extrinsics, intrinsics


def golden(qk_norm: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The release's state dict, and its `input.*` and `output.*` tensors."""
    tensors = load_file(GOLDEN[qk_norm])
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    return weights, {key: value for key, value in tensors.items() if not key.startswith("weights.")}
