"""Spa3-VLM (arXiv 2602.21186, section 3.4): any vision-language model of `transformers`, reading Spa3R's latents."""

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .adapter_spa3_vlm import assign_scenes, idle_inputs
from .configuration_spa3_vlm import Spa3AdapterConfig
from .fusion_spa3_vlm import SceneReading, Scenes, check_scenes
from .modeling_spa3_vlm_adapters import encode_scenes, features_owner
from .modeling_spa3_vlm_files import SavedSpa3AdapterModel


logger = logging.get_logger(__name__)

_SPATIAL_INPUTS = ("pixel_values", "latents", "scene_ids")


class Spa3VLM(SavedSpa3AdapterModel):
    """
    A vision-language model whose visual tokens read the scene that they are part of.

    The VLM is held as it is, in `vlm`, and what is not found here is looked up there (`config`, `device`,
    `gradient_checkpointing_enable`, ...). While a forward runs, the visual tokens that its `get_image_features` gives
    pass through the active adapter. Nothing else of the VLM is touched, and nothing of it outside of a forward.

    Qwen3-VL's deepstack features are left as they are: they are added to hidden states that already carry the fused
    visual tokens at the same positions, so that the scene reaches those layers, and one adapter serves every family.

    Example:

    ```python
    >>> vlm = AutoModelForImageTextToText.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct", dtype="bfloat16")
    >>> model = get_spa3_vlm(vlm, Spa3RModel.from_pretrained("org/spa3r"), Spa3AdapterConfig())
    >>> model(**inputs, spatial_pixel_values=views, labels=labels).loss.backward()  # trains the adapter alone
    >>> model.save_pretrained("adapter")

    >>> model = Spa3VLM.from_pretrained("adapter")
    >>> latents = model.get_spatial_latents(views)  # once for a scene, for any number of questions
    >>> answer = model.generate(**inputs, spatial_latents=latents, max_new_tokens=16)
    ```

    LoRA on the language model comes with `Spa3AdapterConfig(lora_config=peft.LoraConfig(...))`. To train the whole
    language model, `model.language_model.requires_grad_(True)`; `save_pretrained` then saves the VLM as well.
    """

    def get_spatial_latents(self, spatial_pixel_values: Scenes) -> Tensor | list[Tensor | None]:
        """
        What the visual tokens read of each scene; give it as `spatial_latents` to any number of forwards.

        Args:
            spatial_pixel_values: (S, V, 3, H, W) in [0, 1], V views of S scenes, H and W multiples of the encoder's
                patch size; or, where scenes differ, a list of (V_i, 3, H_i, W_i), None for a scene that is not given.

        Returns:
            (S, Q, D), or a list of (Q, D): latents; of the backbone's features, where `spatial_features` says so, all
            patches of all views, (S, V * N, 2C), or a list of (V_i * N_i, 2C).

        Raises:
            ValueError: There is no spatial encoder, or the pictures are not as described.
        """
        if self.spatial_encoder is None:
            raise ValueError(
                "spatial_pixel_values are given, but there is no spatial encoder; expected spatial_latents"
            )
        features = self.adapter_config.spatial_features
        if isinstance(spatial_pixel_values, Tensor):
            return encode_scenes(self.spatial_encoder, spatial_pixel_values, features)
        alike: dict[torch.Size, dict[int, Tensor]] = {}
        for scene, views in enumerate(spatial_pixel_values):
            if views is not None:
                alike.setdefault(views.shape, {})[scene] = views
        latents: list[Tensor | None] = [None] * len(spatial_pixel_values)
        for scenes in alike.values():
            encoded = encode_scenes(self.spatial_encoder, torch.stack(list(scenes.values())), features)
            for scene, tokens in zip(scenes, encoded, strict=True):
                latents[scene] = tokens
        return latents

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        spatial_pixel_values: Scenes | None = None,
        spatial_latents: Scenes | None = None,
        spatial_scene_ids: Tensor | Sequence[int] | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput | tuple:
        """
        The VLM's own forward, with its visual tokens fused with the scenes that are given.

        Args:
            input_ids: (B, L).
            attention_mask: (B, L), padded on either side.
            spatial_pixel_values: The views of S scenes, as `get_spatial_latents` takes them. Or
            spatial_latents: (S, Q, D), or a list of (Q_s, D), None for a scene that is not given: the scenes' tokens.
            spatial_scene_ids: The scene, 0 to S - 1, or -1 for none: of every image of the batch, in the order of
                their placeholders in `input_ids`, an image being an unbroken run of them; or (B, L), of every
                position, which serves images without text between them, and images that a processor cuts into tiles.
                Default: the images of a sample are one scene, and there is a scene for every sample, or for every
                sample that has images.
            labels: (B, L), -100 = not to be predicted.
            kwargs: All else that the VLM takes: `pixel_values`, ...

        Returns:
            What the VLM returns. With `integration="append"`, `logits` are those of the positions of `input_ids`; all
            else that has a length (`past_key_values`, `hidden_states`, ...) has the longer sequences'.

        Raises:
            ValueError: Scenes, images and placeholders do not go together, or scenes are not of the adapter's width.
        """
        inputs = dict(kwargs, input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        reading = self._reading(inputs, spatial_pixel_values, spatial_latents, spatial_scene_ids)
        sequence = None if reading is None else reading.sequence
        return_dict, logits_to_keep = inputs.pop("return_dict", True), 0
        if sequence is not None:
            logits_to_keep = inputs.pop("logits_to_keep", 0)
        with self._fusing(reading):
            output = self.vlm(**inputs, return_dict=True)
        if sequence is not None:
            logits = sequence.restore(output.logits)
            output.logits = (
                logits[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else logits[:, logits_to_keep]
            )
        if reading is None and output.get("loss") is not None:
            output.loss = self._with_idle_adapter(output.loss)
        return output.to_tuple() if return_dict is False else output

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """
        The VLM's own `generate`; scenes are given as in `forward`, and encoded once.

        Raises:
            ValueError: As in `forward`.
        """
        spatial = [kwargs.pop(f"spatial_{name}", None) for name in _SPATIAL_INPUTS]
        prompts = kwargs.pop("input_ids", inputs)
        arguments = kwargs if prompts is None else {"input_ids": prompts, **kwargs}
        reading = self._reading(arguments, *spatial)
        if reading is not None:
            reading.may_repeat = True
        if reading is None or reading.sequence is None:
            with self._fusing(reading):
                return self.vlm.generate(**arguments)
        length = arguments["input_ids"].shape[1]
        if arguments.get("max_length") is not None:
            arguments["max_length"] += length - prompts.shape[1]
        with self._fusing(reading):
            output = self.vlm.generate(**arguments)

        def with_own_prompts(sequences: Tensor) -> Tensor:
            own = prompts.repeat_interleave(len(sequences) // len(prompts), 0)
            return torch.cat((own.to(sequences.device), sequences[:, length:]), dim=1)

        if isinstance(output, Tensor):
            return with_own_prompts(output)
        output.sequences = with_own_prompts(output.sequences)
        return output

    def _reading(
        self,
        inputs: dict[str, Any],
        pixel_values: Scenes | None,
        latents: Scenes | None,
        scene_ids: Tensor | Sequence[int] | None,
    ) -> SceneReading | None:
        """What the visual tokens of `inputs` read, if anything. Where scenes are appended, `inputs` become longer."""
        if unknown := sorted(name for name in inputs if name.startswith("spatial_")):
            known = ", ".join(f"spatial_{name}" for name in _SPATIAL_INPUTS)
            raise TypeError(f"{unknown} are given; expected {known}")
        self._warn_of_lost_positions(inputs)
        given, name = (pixel_values, "spatial_pixel_values") if latents is None else (latents, "spatial_latents")
        if self._is_disabled or given is None:
            return None
        if pixel_values is not None and latents is not None:
            raise ValueError("spatial_pixel_values and spatial_latents are given; expected one of them")
        if inputs.get("pixel_values_videos") is not None:
            raise ValueError("pixel_values_videos are given; expected the frames of a video as images")
        input_ids = inputs.get("input_ids")
        if input_ids is None:
            raise ValueError("input_ids are not given; expected them, as they say which image is whose")
        config = self.adapter_config
        reader = f"adapter {self.active_adapter!r} reads {config.spatial_features} of that width"
        check_scenes(given, name, config.spatial_hidden_size, reader)
        is_image = input_ids == self.vlm.config.image_token_id
        if not is_image.any():
            # Text, or what a user's own loop feeds one token after the other.
            return None
        scenes = assign_scenes(is_image, len(given), scene_ids)
        missing = [scene for scene, tokens in enumerate(given) if tokens is None]
        if missing:
            scenes = torch.where(torch.isin(scenes, torch.tensor(missing, device=scenes.device)), -1, scenes)
        if not (scenes >= 0).any():
            return None
        tokens = self.get_spatial_latents(given) if latents is None else latents
        home = next(self.adapter.parameters()).device
        reading = SceneReading(is_image, scenes, [None if scene is None else scene.to(home) for scene in tokens])
        if config.integration == "append":
            padding = getattr(self.vlm.config.get_text_config(), "pad_token_id", None) or 0
            inputs.update(reading.extend_inputs(inputs, self.vlm.config.image_token_id, padding))
        return reading

    def _warn_of_lost_positions(self, inputs: dict[str, Any]) -> None:
        has_grids = inputs.get("image_grid_thw") is not None and inputs.get("position_ids") is None
        if has_grids and inputs.get("mm_token_type_ids") is None:
            if "mm_token_type_ids" in inspect.signature(self.vlm.forward).parameters:
                logger.warning_once(
                    "image_grid_thw are given without mm_token_type_ids, so that this VLM counts the visual tokens of "
                    "an image as a line of text, not as its rows and columns; expected what its processor gives"
                )

    @contextmanager
    def _fusing(self, reading: SceneReading | None) -> Iterator[None]:
        """While this lasts, this VLM's visual tokens pass through the active adapter."""
        if reading is None:
            yield
            return
        fuse = functools.partial(reading.fuse, self.adapter, hidden_size=self.adapter_config.hidden_size)
        with self._fused_features.standing_in(features_owner(self.vlm), fuse):
            yield
        if not reading.is_done:
            raise ValueError(
                f"scenes and image placeholders are given, but {type(self.vlm).__name__} computed no visual tokens; "
                "expected pixel_values, and a model whose forward calls get_image_features"
            )

    def _with_idle_adapter(self, loss: Tensor) -> Tensor:
        """
        A loss that no adapter had a part in, still depending on the active one, with gradients of zero.

        Where several processes train together (DDP, FSDP), one may have text alone when the others have images.
        """
        parameter = next(self.adapter.parameters())
        if self._is_disabled or not (self.training and torch.is_grad_enabled() and parameter.requires_grad):
            return loss
        result = self.adapter(*idle_inputs(self.adapter_config, parameter))
        return loss + 0.0 * result.float().sum().to(loss.device)


def get_spa3_vlm(
    vlm: PreTrainedModel,
    spatial_encoder: nn.Module | None,
    adapter_config: Spa3AdapterConfig,
    adapter_name: str = "default",
) -> Spa3VLM:
    """
    Give a vision-language model a fresh adapter, to be trained; all else is frozen.

    Args:
        vlm: A model of `AutoModelForImageTextToText`; it is held, not copied.
        spatial_encoder: A [`Spa3RModel`], or a [`Spa3RVGGTModel`] where `spatial_features` are those of the backbone.
            None, if only ready-made `spatial_latents` will be given.
        adapter_config: What is None in it is filled in, on a copy.
        adapter_name: What the adapter is to be called.

    Raises:
        TypeError: `vlm` or `spatial_encoder` is no such model.
        ValueError: Spa3-VLM cannot work with this VLM, or the configuration is for another.
    """
    model = Spa3VLM(vlm, spatial_encoder)
    model.add_adapter(adapter_name, adapter_config)
    model.set_adapter(adapter_name)
    return model


__all__ = ["Spa3VLM", "get_spa3_vlm"]
