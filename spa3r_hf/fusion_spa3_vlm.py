"""How the visual tokens of a vision-language model come to read scenes, from the inputs of a forward on."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_spa3_vlm import AppendedSequence, fuse_by_scene, lengths_with_appended, merge_appended


Scenes = Tensor | Sequence[Tensor | None]


def check_scenes(scenes: Scenes, name: str, size: int | None, reader: str) -> None:
    """
    Args:
        scenes: What is given as `name`.
        name: "spatial_latents", or "spatial_pixel_values".
        size: The width that latents need to have.
        reader: For the message: who needs it.

    Raises:
        ValueError: They are no scenes: of another shape, width or type, or with numbers that are not finite.
    """
    is_latents = name == "spatial_latents"
    shape = f"tokens, {size}" if is_latents else "views, 3, height, width"
    for index, scene in enumerate(scenes):
        if scene is None:
            continue
        if not isinstance(scene, Tensor) or not scene.is_floating_point():
            what = f"of {scene.dtype}" if isinstance(scene, Tensor) else f"as a {type(scene).__name__}"
            raise ValueError(f"{name} hold scene {index} {what}; expected a tensor of floating point numbers")
        found = tuple(scene.shape)
        if len(found) != shape.count(",") + 1 or 0 in found:
            raise ValueError(f"{name} hold a scene of shape {found}; expected ({shape}) for each scene")
        if is_latents and found[-1] != size:
            raise ValueError(f"{name} are {found[-1]} wide; expected {size}, as {reader}")
        # (Of pixels, the encoder says which view they are in.)
        if is_latents and not torch.compiler.is_compiling() and not scene.isfinite().all():
            raise ValueError(f"{name} hold scene {index} with NaN or infinite numbers; expected finite ones")


@dataclass
class SceneReading:
    """
    What the visual tokens of one forward, or of one `generate`, are to read.

    Attributes:
        is_image: (B, L) bool, the image placeholders in `input_ids`.
        scenes: (B, L) long, the scene that a placeholder's token reads, -1 for none.
        spatial: The scenes' tokens, (K_s, D) each; None for a scene that is not given.
        sequence: The longer sequences, where scenes are appended.
        may_repeat: Whether the VLM may work on several copies of each sample, as in a `generate` with several beams.
        is_done: Whether the VLM has asked for its visual tokens.
    """

    is_image: Tensor
    scenes: Tensor
    spatial: list[Tensor | None]
    sequence: AppendedSequence | None = None
    may_repeat: bool = False
    is_done: bool = False

    def extend_inputs(self, inputs: dict[str, Any], image_token_id: int, pad_token_id: int) -> dict[str, Any]:
        """
        The VLM's inputs with the scenes appended: placeholders in `input_ids`, and what goes with them elsewhere.

        To position encodings and attention masks that tell images from text, the appended tokens are text.

        Raises:
            ValueError: `position_ids` are given, which are those of the shorter sequences.
        """
        if inputs.get("position_ids") is not None:
            raise ValueError(
                "position_ids are given; expected none with integration = 'append', which moves positions"
            )
        lengths = [0 if tokens is None else len(tokens) for tokens in self.spatial]
        self.sequence = AppendedSequence.for_scenes(self.scenes, lengths)
        mask = inputs.get("attention_mask")
        extended = dict(inputs, attention_mask=torch.ones_like(inputs["input_ids"]) if mask is None else mask)
        fillings = {
            **{"input_ids": (image_token_id, pad_token_id), "attention_mask": (1, 0), "labels": (-100, -100)},
            **{"mm_token_type_ids": (0, 0), "token_type_ids": (0, 0)},
        }
        for name, (appended, padding) in fillings.items():
            if extended.get(name) is not None:
                extended[name] = self.sequence.extend(extended[name], appended, padding)
        return extended

    def fuse(self, adapter: nn.Module, features: Any, hidden_size: int | None) -> Any:
        """
        Put what `adapter` makes of the visual tokens in the place of `features.pooler_output`.

        Raises:
            ValueError: The VLM's visual tokens are not what `get_image_features` promises, or are more or fewer than
                the image placeholders.
        """
        self.is_done = True
        pooled = getattr(features, "pooler_output", None)
        if pooled is None:
            raise ValueError(
                f"get_image_features gives a {type(features).__name__} without pooler_output; expected the visual "
                "tokens there, as in the models of transformers that Spa3-VLM works with"
            )
        # One tensor, (images, tokens, E) or (tokens, E), or one (tokens, E) for every image or every sample.
        visual = pooled.flatten(0, -2) if isinstance(pooled, Tensor) else torch.cat(list(pooled))
        if visual.shape[-1] != hidden_size:
            raise ValueError(
                f"get_image_features gives visual tokens of width {visual.shape[-1]}; expected the language model's "
                f"{hidden_size}, so that Spa3-VLM knows them as its tokens"
            )
        num_placeholders = int(self.is_image.sum())
        repeats, rest = divmod(len(visual), num_placeholders)
        if rest or not repeats or (repeats > 1 and not self.may_repeat):
            raise ValueError(
                f"the images make {len(visual)} visual tokens, but input_ids hold {num_placeholders} image "
                "placeholders; expected as many"
            )
        device = next(adapter.parameters()).device
        visual = visual.to(device)
        if self.sequence is None:
            readers = self.is_image.repeat_interleave(repeats, 0)
            scenes = self.scenes.repeat_interleave(repeats, 0)[readers].to(device)
            fused = fuse_by_scene(adapter, visual, scenes, self.spatial)
            features.pooler_output = _as_pieces(fused, pooled)
        else:
            source = self.sequence.placeholders(self.is_image, repeats).to(device)
            projected = [None if tokens is None else adapter(tokens) for tokens in self.spatial]
            features.pooler_output = _appended_pieces(source, pooled, projected)
            if getattr(features, "deepstack_features", None) is not None:
                # Added to hidden states of the language model, where the scenes' tokens have nothing to add.
                nothing = [None if tokens is None else torch.zeros_like(tokens) for tokens in projected]
                features.deepstack_features = [
                    _appended_pieces(source, level, nothing) for level in features.deepstack_features
                ]
        return features


class FusedFeatures:
    """
    Stands in for a VLM's `get_image_features` while its visual tokens are to read scenes.

    The method is replaced on the instance, and only for so long: a copy, a saved file or another thread's model never
    has the replacement. A model has one of these for good, so that code that is compiled around it stays valid.
    """

    def __init__(self) -> None:
        self._compute: Callable[..., Any] | None = None
        self._fuse: Callable[[Any], Any] | None = None

    @contextmanager
    def standing_in(self, owner: Any, fuse: Callable[[Any], Any]) -> Iterator[None]:
        """While this lasts, `fuse` has the last word on what `owner.get_image_features` gives."""
        compute, is_own = owner.get_image_features, "get_image_features" in vars(owner)
        functools.update_wrapper(self, compute)  # the library asks for its signature
        self._compute, self._fuse = compute, fuse
        owner.get_image_features = self
        try:
            yield
        finally:
            if is_own:
                owner.get_image_features = compute
            else:
                del owner.get_image_features
            vars(self).clear()

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._fuse(self._compute(*args, **kwargs))  # type: ignore[misc]  # both are there by now


Pieces = Tensor | Sequence[Tensor]


def _as_pieces(tokens: Tensor, like: Pieces) -> Pieces:
    if isinstance(like, Tensor):
        return tokens.view(like.shape).to(like.device)
    return [piece.to(like[0].device) for piece in tokens.split([len(piece) for piece in like])]


def _appended_pieces(source: Tensor, pieces: Pieces, spatial: Sequence[Tensor | None]) -> Pieces:
    """`merge_appended`, in pieces if the visual tokens came in pieces; a stack of images becomes one of tokens."""
    if isinstance(pieces, Tensor):
        merged = merge_appended(source, pieces.flatten(0, -2).to(source.device), spatial).to(pieces.device)
        return merged if pieces.ndim == 2 else merged[:, None]
    merged = merge_appended(source, torch.cat(list(pieces)).to(source.device), spatial)
    lengths = lengths_with_appended(source, [len(piece) for piece in pieces])
    return [piece.to(pieces[0].device) for piece in merged.split(lengths)]


__all__ = ["FusedFeatures", "SceneReading", "check_scenes"]
