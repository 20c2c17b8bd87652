"""What VGGT and the Spa3R encoder and decoder are built of: attention, its position encodings, and the block."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """
    Rotate pairs of channels by the angles whose cosines and sines are given.

    Args:
        states: (..., L, A * 2 * F): A axes one after the other, each in "split halves": channel i pairs with F + i.
        cos, sin: (L, A, F).
    """
    axes, frequencies = cos.shape[-2:]
    first, second = states.unflatten(-1, (axes, 2, frequencies)).unbind(-2)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2).flatten(-3)


def rotary_angles(positions: Tensor, axis_dim: int, theta: float) -> Tensor:
    """Angles (L, A, axis_dim / 2) of positions (L, A) for `axis_dim` channels an axis."""
    exponents = torch.arange(0, axis_dim, 2, device=positions.device, dtype=torch.float32) / axis_dim
    return positions[..., None].float() * theta**-exponents


def grid_positions(grid_size: tuple[int, int], device: torch.device) -> Tensor:
    """(h * w, 2): row and column of every patch, row by row, counted from 0."""
    rows, columns = (torch.arange(n, device=device) for n in grid_size)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)


@dataclass
class RotaryEncoding:
    """
    2-D RoPE of queries and keys: the first half of the channels turns with the row, the second with the column.

    `cos`, `sin`: (L, 2, head_dim / 4), for the keys' tokens; queries are the keys' tokens, or the slice of them that
    `of_queries` is given.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def for_views(
        cls,
        num_prefix_tokens: int,
        grid_size: tuple[int, int],
        num_views: int,
        head_dim: int,
        theta: float,
        like: Tensor,
    ) -> "RotaryEncoding":
        """
        Prefix tokens at position (0, 0), then the patches of `num_views` views, each with (row + 1, column + 1).

        The tables come in the dtype and on the device of `like`, and are meant to be made once per forward.
        """
        patches = grid_positions(grid_size, like.device) + 1
        prefix = patches.new_zeros(num_prefix_tokens, 2)
        positions = torch.cat((prefix, patches.repeat(num_views, 1)))
        angles = rotary_angles(positions, head_dim // 2, theta)
        return cls(angles.cos().to(like.dtype), angles.sin().to(like.dtype))

    def tiled(self, repeats: int) -> "RotaryEncoding":
        """The same for `repeats` times as many tokens: each view again with its own prefix."""
        return RotaryEncoding(self.cos.repeat(repeats, 1, 1), self.sin.repeat(repeats, 1, 1))

    def encode(self, query: Tensor, key: Tensor, value: Tensor, queries: slice) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = self.cos.to(key.dtype), self.sin.to(key.dtype)
        return rotate(query, cos[queries], sin[queries]), rotate(key, cos, sin), value

    def decode(self, output: Tensor, queries: slice) -> Tensor:
        return output


@dataclass
class CameraEncoding:
    """
    PRoPE (arXiv 2507.10496) for the ray tokens of one view; the tokens ahead of them pass through unchanged.

    The first half of the channels, in groups of four, is multiplied by the view's projection matrix; the two quarters
    after it turn with the patch column and the patch row (from 0, in the sense opposite to `rotate`).

    `projection`, `inverse`: (views, 4, 4), P = lift(K) @ [R | t] and P^-1; `cos`, `sin`: (N, 2, head_dim / 8).
    """

    projection: Tensor
    inverse: Tensor
    cos: Tensor
    sin: Tensor
    num_prefix_tokens: int

    @classmethod
    def for_views(
        cls,
        num_prefix_tokens: int,
        grid_size: tuple[int, int],
        projection: Tensor,
        inverse: Tensor,
        head_dim: int,
        theta: float,
    ) -> "CameraEncoding":
        positions = grid_positions(grid_size, projection.device).flip(-1)
        angles = rotary_angles(positions, head_dim // 4, theta)
        return cls(projection, inverse, angles.cos(), angles.sin(), num_prefix_tokens)

    def _transform(self, states: Tensor, matrices: Tensor, sin: Tensor, num_prefix_tokens: int) -> Tensor:
        """`states` (views, heads, L, head_dim); a row vector x becomes x @ matrices[view]."""
        prefix, rays = states[:, :, :num_prefix_tokens], states[:, :, num_prefix_tokens:]
        projected, turned = rays.chunk(2, dim=-1)
        projected = projected.flatten(1).unflatten(-1, (-1, 4)) @ matrices.to(states.dtype)
        turned = rotate(turned, self.cos.to(states.dtype), sin.to(states.dtype))
        rays = torch.cat((projected.view(turned.shape), turned), dim=-1)
        return torch.cat((prefix, rays), dim=2)

    def encode(self, query: Tensor, key: Tensor, value: Tensor, queries: slice) -> tuple[Tensor, Tensor, Tensor]:
        inverse = self.inverse.mT
        query = self._transform(query, self.projection, -self.sin, self._num_prefix_queries(queries))
        key = self._transform(key, inverse, -self.sin, self.num_prefix_tokens)
        value = self._transform(value, inverse, -self.sin, self.num_prefix_tokens)
        return query, key, value

    def decode(self, output: Tensor, queries: slice) -> Tensor:
        return self._transform(output, self.projection.mT, self.sin, self._num_prefix_queries(queries))

    def _num_prefix_queries(self, queries: slice) -> int:
        return self.num_prefix_tokens - (queries.start or 0)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """As the library calls one: output (batch, L, heads, head_dim) and weights. Nothing here has a mask or dropout."""
    weights = torch.softmax(query @ key.mT * scaling, dim=-1)
    return (weights @ value).transpose(1, 2), weights


class Spa3RAttention(nn.Module):
    """Multi-head self-attention with optional query and key norms and a position encoding."""

    def __init__(
        self,
        config: PreTrainedConfig,
        hidden_size: int,
        num_heads: int,
        qk_norm: Literal["layer_norm", "rms_norm"] | None,
    ):
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        norms: dict[str | None, Callable[[], nn.Module]] = {
            None: nn.Identity,
            "layer_norm": lambda: nn.LayerNorm(self.head_dim),
            "rms_norm": lambda: nn.RMSNorm(self.head_dim),
        }
        self.q_norm = norms[qk_norm]()
        self.k_norm = norms[qk_norm]()

    def forward(
        self,
        hidden_states: Tensor,
        positions: RotaryEncoding | CameraEncoding | None = None,
        queries: slice = slice(None),
        num_context_tokens: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden_states: (batch, L, hidden_size).
            positions: How queries, keys, values and output are encoded.
            queries: Tokens that ask; all tokens are asked. The output holds the tokens that ask.
            num_context_tokens: The first so many tokens are context, the rest are target: context sees context only,
                target sees all. Two attention calls do this without a mask.

        Returns:
            (batch, tokens that ask, hidden_size), and the weights (batch, heads, tokens that ask, L) where eager.
        """
        heads = (*hidden_states.shape[:2], -1, self.head_dim)
        query = self.q_proj(hidden_states[:, queries]).unflatten(-1, heads[2:]).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        # Under autocast the norms answer in float32; the attention kernels want one dtype.
        query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        if positions is not None:
            query, key, value = positions.encode(query, key, value, queries)
        output, weights = self._attend(query, key, value, num_context_tokens, **kwargs)
        if positions is not None:
            output = positions.decode(output.transpose(1, 2), queries).transpose(1, 2)
        return self.o_proj(output.flatten(2)), weights

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, num_context_tokens: int | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, heads, L, head_dim) each -> output (batch, L, heads, head_dim) and, where eager, the weights."""
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        if num_context_tokens is None:
            return attention(self, query, key, value, None, scaling=self.scaling, **kwargs)
        context = slice(num_context_tokens)
        context_output, context_weights = attention(
            self, query[:, :, context], key[:, :, context], value[:, :, context], None, scaling=self.scaling, **kwargs
        )
        target_output, target_weights = attention(
            self, query[:, :, num_context_tokens:], key, value, None, scaling=self.scaling, **kwargs
        )
        weights = None
        if context_weights is not None:
            num_target_tokens = key.shape[2] - num_context_tokens
            weights = torch.cat((F.pad(context_weights, (0, num_target_tokens)), target_weights), dim=2)
        return torch.cat((context_output, target_output), dim=1), weights


class Spa3RMLP(nn.Module):
    """Linear, GELU (erf), linear."""

    def __init__(self, hidden_size: int, intermediate_size: int, out_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, out_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.fc1(hidden_states)
        # These are the widest tensors of a model. Where no gradient needs what went in, one of them is enough.
        gelu = F.gelu if torch.is_grad_enabled() else torch.ops.aten.gelu_
        return self.fc2(gelu(hidden_states))


class Spa3RLayerScale(nn.Module):
    """Adds a branch to the residual stream, scaled per channel, in one pass over memory."""

    def __init__(self, hidden_size: int, initial_value: float):
        super().__init__()
        self.initial_value = initial_value
        self.lambda1 = nn.Parameter(torch.full((hidden_size,), initial_value))

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        return torch.addcmul(residual, branch, self.lambda1)


class Spa3RLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block; with `layerscale_value` its two branches are scaled per channel."""

    def __init__(
        self,
        config: PreTrainedConfig,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        qk_norm: Literal["layer_norm", "rms_norm"] | None,
        layerscale_value: float | None = None,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = Spa3RAttention(config, hidden_size, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = Spa3RMLP(hidden_size, intermediate_size, hidden_size)
        self.has_layer_scale = layerscale_value is not None
        if layerscale_value is not None:
            self.layer_scale1 = Spa3RLayerScale(hidden_size, layerscale_value)
            self.layer_scale2 = Spa3RLayerScale(hidden_size, layerscale_value)

    def forward(self, hidden_states: Tensor, queries: slice = slice(None), **kwargs: Any) -> Tensor:
        """(batch, L, hidden_size) -> the same for the tokens of `queries`; the rest goes on to `Spa3RAttention`."""
        branch, _ = self.attention(self.norm1(hidden_states), queries=queries, **kwargs)
        hidden_states = hidden_states[:, queries]
        hidden_states = self.layer_scale1(hidden_states, branch) if self.has_layer_scale else hidden_states + branch
        branch = self.mlp(self.norm2(hidden_states))
        return self.layer_scale2(hidden_states, branch) if self.has_layer_scale else hidden_states + branch
