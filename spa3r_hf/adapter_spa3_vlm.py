"""What Spa3-VLM adds to a vision-language model: its adapters, and which visual tokens read which scene."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from .configuration_spa3_vlm import Spa3AdapterConfig
from .layers_spa3r import Spa3RMLP


# --- layers


class Spa3CrossAttention(nn.Module):
    """Multi-head attention of visual tokens to a scene's tokens, with LayerNorm on queries and keys."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.q_norm = nn.LayerNorm(self.head_dim)
        self.k_norm = nn.LayerNorm(self.head_dim)

    def forward(self, visual: Tensor, spatial: Tensor, spatial_mask: Tensor | None = None) -> Tensor:
        """`visual` (S, M, E) asks, `spatial` (S, K, E) answers where `spatial_mask` (S, K) is true -> (S, M, E)."""
        query, key, value = (
            projection(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, states in ((self.q_proj, visual), (self.k_proj, spatial), (self.v_proj, spatial))
        )
        # Under autocast the norms answer in float32; the attention kernels want one dtype.
        query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        mask = None if spatial_mask is None else spatial_mask[:, None, None]
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.o_proj(output.transpose(1, 2).flatten(2))


class Spa3CrossAttentionAdapter(nn.Module):
    """
    The Residual Cross-Attention Adapter (paper, section 3.4): visual tokens read their scene, and add what they found
    through a gate. The last layer starts at zero, so that an untrained adapter changes nothing.
    """

    def __init__(self, size: int, num_heads: int, spatial_size: int):
        super().__init__()
        self.spatial_projection = Spa3RMLP(spatial_size, size, size)
        self.attention = Spa3CrossAttention(size, num_heads)
        self.norm = nn.LayerNorm(size)
        self.mlp = Spa3RMLP(size, size // 4, size)
        self.gate = nn.Linear(size, size)
        nn.init.zeros_(self.mlp.fc2.weight)
        nn.init.zeros_(self.mlp.fc2.bias)

    def forward(self, visual: Tensor, spatial: Tensor, spatial_mask: Tensor | None = None) -> Tensor:
        """
        Args:
            visual: (S, M, E), visual tokens of S scenes, of any floating type.
            spatial: (S, K, D), the scenes' tokens.
            spatial_mask: (S, K), False = padding of a scene with fewer tokens.

        Returns:
            (S, M, E), the fused visual tokens, in the type of `visual`.
        """
        dtype = self.norm.weight.dtype
        spatial = self.spatial_projection(spatial.to(dtype))
        states = self.norm(self.attention(visual.to(dtype), spatial, spatial_mask))
        return visual + (self.mlp(states) * torch.sigmoid(self.gate(states))).to(visual.dtype)


class Spa3AppendAdapter(nn.Module):
    """Projects a scene's tokens to the width of the visual tokens, beside which they will stand (paper, Table 5)."""

    def __init__(self, size: int, spatial_size: int):
        super().__init__()
        self.spatial_projection = Spa3RMLP(spatial_size, size, size)

    def forward(self, spatial: Tensor) -> Tensor:
        """(S, K, D) -> (S, K, E)."""
        return self.spatial_projection(spatial.to(self.spatial_projection.fc1.weight.dtype))


def build_adapter(config: Spa3AdapterConfig) -> nn.Module:
    """
    The fresh adapter that a configuration describes.

    Raises:
        ValueError: A size is still None.
    """
    sizes = (config.hidden_size, config.num_attention_heads, config.spatial_hidden_size)
    size, num_heads, spatial_size = sizes
    if size is None or num_heads is None or spatial_size is None:
        raise ValueError(
            f"hidden_size, num_attention_heads and spatial_hidden_size are {sizes}; expected numbers: what the VLM "
            "and the spatial encoder cannot tell has to be given"
        )
    if config.integration == "append":
        return Spa3AppendAdapter(size, spatial_size)
    return Spa3CrossAttentionAdapter(size, num_heads, spatial_size)


def idle_inputs(config: Spa3AdapterConfig, like: Tensor) -> tuple[Tensor, ...]:
    """Zeros that an adapter can work on, in the type and on the device of `like`."""
    spatial = like.new_zeros(1, 1, config.spatial_hidden_size or 1)
    return (spatial,) if config.integration == "append" else (like.new_zeros(1, 1, config.hidden_size or 1), spatial)


# --- which visual tokens read which scene


def number_images(is_image: Tensor) -> Tensor:
    """
    Number the images of a batch, in reading order: an image is an unbroken run of placeholders.

    Args:
        is_image: (B, L) bool, the image placeholders.

    Returns:
        (B, L) long, the image that a position belongs to; meaningless where there is no placeholder.
    """
    before = F.pad(is_image, (1, 0))[:, :-1]
    return (is_image & ~before).flatten().long().cumsum(0).view_as(is_image) - 1


def _scenes_of_samples(is_image: Tensor, num_scenes: int) -> Tensor:
    """(B, 1): the scene of every sample, where each has one, or each that has images."""
    has_images = is_image.any(dim=1)
    if num_scenes == len(is_image):
        return torch.arange(num_scenes, device=is_image.device)[:, None]
    if num_scenes == int(has_images.sum()):
        return (has_images.long().cumsum(0) - 1)[:, None]
    raise ValueError(
        f"{num_scenes} scenes are given for {len(is_image)} samples, {int(has_images.sum())} of them with images; "
        "expected one scene for every sample, or for every sample with images, or spatial_scene_ids, which say the "
        "scene of every image"
    )


def _scenes_of_images(is_image: Tensor, num_scenes: int, scene_ids: Tensor) -> Tensor:
    """(B, L), meaningless where there is no placeholder; `scene_ids` as in `assign_scenes`."""
    if scene_ids.numel() and (scene_ids.is_floating_point() or scene_ids.dtype == torch.bool):
        raise ValueError(f"spatial_scene_ids are {scene_ids.dtype}; expected whole numbers")
    if scene_ids.numel() and not -1 <= int(scene_ids.min()) <= int(scene_ids.max()) < num_scenes:
        raise ValueError(
            f"spatial_scene_ids range from {int(scene_ids.min())} to {int(scene_ids.max())}; expected -1 (no scene) "
            f"to {num_scenes - 1}, as {num_scenes} scenes are given"
        )
    if scene_ids.shape == is_image.shape:
        return scene_ids.long()
    if scene_ids.ndim != 1:
        raise ValueError(
            f"spatial_scene_ids have shape {tuple(scene_ids.shape)}; expected (images,), or that of input_ids, "
            f"{tuple(is_image.shape)}"
        )
    images = number_images(is_image)
    num_images = int(images.max()) + 1
    if len(scene_ids) != num_images:
        raise ValueError(
            f"{len(scene_ids)} spatial_scene_ids are given for {num_images} images; expected one for every unbroken "
            "run of image placeholders in input_ids"
        )
    return scene_ids.long()[images.clamp(min=0)] if num_images else images


def assign_scenes(is_image: Tensor, num_scenes: int, scene_ids: Tensor | Sequence[int] | None = None) -> Tensor:
    """
    Which scene every visual token reads.

    Args:
        is_image: (B, L) bool, the image placeholders in `input_ids`.
        num_scenes: Number S of scenes that are given.
        scene_ids: The scene, 0 to S - 1, or -1 for none: of every image (see `number_images`), or (B, L) of every
            position. None: all images of a sample are one scene, and there is a scene for every sample, or for every
            sample that has images.

    Returns:
        (B, L) long, -1 = no scene.

    Raises:
        ValueError: The numbers of scenes, samples and images do not go together, or an id is out of its range.
    """
    if scene_ids is None:
        scenes = _scenes_of_samples(is_image, num_scenes)
    else:
        scenes = _scenes_of_images(is_image, num_scenes, torch.as_tensor(scene_ids, device=is_image.device))
    return torch.where(is_image, scenes, -1)


def stack_scenes(spatial: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Scenes (K_s, D) each -> (S, K, D), padded, and the mask (S, K) of what is no padding, where there is any."""
    lengths = [len(scene) for scene in spatial]
    stacked = pad_sequence(list(spatial), batch_first=True)
    if min(lengths) == max(lengths):
        return stacked, None
    ends = torch.tensor(lengths, device=stacked.device)
    return stacked, torch.arange(stacked.shape[1], device=stacked.device) < ends[:, None]


def fuse_by_scene(adapter: nn.Module, visual: Tensor, scenes: Tensor, spatial: Sequence[Tensor | None]) -> Tensor:
    """
    Let every visual token read its own scene.

    Args:
        adapter: A [`Spa3CrossAttentionAdapter`].
        visual: (M, E), the visual tokens of a batch.
        scenes: (M,), the scene of each; -1, or one that is None, leaves the token as it is.
        spatial: The scenes' tokens, (K_s, D) each.

    Returns:
        (M, E).
    """
    groups = [
        ((scenes == scene).nonzero()[:, 0], tokens) for scene, tokens in enumerate(spatial) if tokens is not None
    ]
    groups = [(readers, tokens) for readers, tokens in groups if len(readers)]
    if not groups:
        return visual
    readers = pad_sequence([readers for readers, _ in groups], batch_first=True, padding_value=-1)
    is_reader = readers >= 0
    stacked, mask = stack_scenes([tokens for _, tokens in groups])
    fused = adapter(visual[readers.clamp(min=0)], stacked, mask)
    return visual.index_copy(0, readers[is_reader], fused[is_reader])


# --- the sequence with the scenes appended


@dataclass
class AppendedSequence:
    """
    A batch of sequences in which every scene's tokens follow the last visual token that belongs to the scene.

    `source` (B, L'): where a position was before, -1 for padding, `-2 - scene` for a token of a scene. Rows are padded
    on the left, so that they still end where they ended, and a cache or `generate` can go on.
    """

    source: Tensor

    @classmethod
    def for_scenes(cls, scenes: Tensor, lengths: Sequence[int]) -> "AppendedSequence":
        """`scenes` (B, L) as from `assign_scenes`; `lengths`: the number of tokens of each scene."""
        rows = []
        for row in scenes.tolist():
            last = {scene: position for position, scene in enumerate(row) if scene >= 0}
            sources = []
            for position, scene in enumerate(row):
                sources.append(position)
                if last.get(scene) == position:
                    sources += [-2 - scene] * lengths[scene]
            rows.append(sources)
        width = max(len(sources) for sources in rows)
        source = [[-1] * (width - len(sources)) + sources for sources in rows]
        return cls(torch.tensor(source, device=scenes.device))

    @property
    def is_appended(self) -> Tensor:
        """(B, L') bool: tokens of scenes."""
        return self.source < -1

    def extend(self, values: Tensor, appended: int, padding: int) -> Tensor:
        """(B, L) -> (B, L'), with one value for the tokens of scenes and one for padding."""
        moved = values.gather(1, self.source.clamp(min=0))
        filling = torch.where(self.is_appended, appended, padding).to(values.dtype)
        return torch.where(self.source >= 0, moved, filling)

    def restore(self, values: Tensor) -> Tensor:
        """(B, L', ...) -> (B, L, ...): what stands at the positions that there were before."""
        kept = self.source >= 0
        return values[kept].unflatten(0, (len(values), -1))

    def placeholders(self, is_image: Tensor, repeats: int) -> Tensor:
        """
        `source` at all placeholders of the longer sequences, row by row: those of images and those of scenes.

        Args:
            is_image: (B, L) bool, the image placeholders that there were before.
            repeats: So many copies of every row, one after the other (as `generate` makes for beams).
        """
        is_placeholder = self.is_appended | self.extend(is_image, False, False)
        return self.source.repeat_interleave(repeats, 0)[is_placeholder.repeat_interleave(repeats, 0)]


def merge_appended(source: Tensor, visual: Tensor, spatial: Sequence[Tensor | None]) -> Tensor:
    """Visual tokens (M, E) and scenes' tokens (K_s, E) for the placeholders that `placeholders` lists."""
    merged = visual.new_empty(len(source), visual.shape[-1])
    merged = merged.index_copy(0, (source >= 0).nonzero()[:, 0], visual)
    appended = (source < -1).nonzero()[:, 0]
    # Runs of one scene's tokens, or of several copies of them where samples that read one scene meet.
    scenes, counts = torch.unique_consecutive(-2 - source[appended], return_counts=True)
    tokens = []
    for scene, count in zip(scenes.tolist(), counts.tolist(), strict=True):
        of_scene = spatial[scene]
        tokens.append(of_scene.repeat(count // len(of_scene), 1).to(visual.dtype))
    return merged.index_copy(0, appended, torch.cat(tokens)) if tokens else merged


def lengths_with_appended(source: Tensor, lengths: Sequence[int]) -> list[int]:
    """Lengths of the pieces that the visual tokens come in, once each piece has the scenes' tokens that follow it."""
    pieces = torch.arange(len(lengths), device=source.device)
    of_visual = pieces.repeat_interleave(torch.tensor(lengths, device=source.device))
    last_visual = (source >= 0).long().cumsum(0) - 1
    return of_visual[last_visual].bincount(minlength=len(lengths)).tolist()


__all__ = ["Spa3AppendAdapter", "Spa3CrossAttentionAdapter"]
