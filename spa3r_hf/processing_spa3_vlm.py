"""The processor of Spa3-VLM (arXiv 2602.21186, section 3.4): chat messages to inputs of a VLM and Spa3R's encoder."""

import copy
import inspect
import math
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature

# `transformers` itself hides this class where torchvision is missing (5.17), although it works without.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.processing_utils import ProcessorMixin

from .image_processing_spa3r import Spa3RImageProcessor
from .media_spa3_vlm import FrameSampling, number_scenes, read_conversation, see_views, views_of_prompts
from .tokens_spa3_vlm import check_lengths, count_visual_tokens, scene_ids_of_tokens


@dataclass(frozen=True)
class _Family:
    """
    What differs between families of VLMs.

    Attributes:
        processor: The class of `transformers` that treats pictures.
        images_kwargs: What makes it take every view as one picture, as it is where it takes any size.
        num_tokens: Its attribute that holds the number of visual tokens of a picture, where that is fixed.
    """

    processor: str
    images_kwargs: dict[str, Any] = field(default_factory=dict)
    num_tokens: str | None = None


_FAMILIES = {
    **{f"{name}Processor": _Family(f"{name}Processor", {"do_resize": False}) for name in ("Qwen2VL", "Qwen2_5_VL")},
    "Qwen3VLProcessor": _Family("Qwen3VLProcessor", {"do_resize": False}),
    "LlavaOnevisionProcessor": _Family("LlavaOnevisionProcessor"),
    "InternVLProcessor": _Family("InternVLProcessor", {"crop_to_patches": False}, "image_seq_length"),
    "Idefics3Processor": _Family("Idefics3Processor", {"do_image_splitting": False}, "image_seq_len"),
    # SmolVLM's own class treats pictures alike, but wants num2words, for the captions of its videos.
    "SmolVLMProcessor": _Family("Idefics3Processor", {"do_image_splitting": False}, "image_seq_len"),
    "Gemma3Processor": _Family("Gemma3Processor", {"do_pan_and_scan": False}, "image_seq_length"),
}


# Options of `__call__` that `apply_chat_template` must not take for the template's.
_CALL_OPTIONS = ("padding", "padding_side", "max_length", "truncation")


class Spa3VLMProcessor(ProcessorMixin):
    """
    Turns conversations with pictures and videos into the inputs of a [`Spa3VLM`].

    Each view (a picture, or a frame of a video) is resized once, as [`Spa3RImageProcessor`] does. The encoder sees
    that; the VLM sees the same pixels, without the right and lower border that its patches do not fill (Qwen: up to
    multiples of `patch_size * merge_size`), or, in families that have one size for all pictures, all of it in that
    size. Frames of videos are pictures to the VLM, and no picture is cut into tiles, except by LLaVA-OneVision where
    it is alone in its conversation. All this needs no torchvision.

    ```python
    >>> processor = Spa3VLMProcessor.from_vlm("Qwen/Qwen2.5-VL-3B-Instruct")
    >>> content = [{"type": "video", "video": "room.mp4"}, {"type": "text", "text": "How many chairs are there?"}]
    >>> inputs = processor.apply_chat_template(
    ...     [{"role": "user", "content": content}],
    ...     **{"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"},
    ... )
    >>> output = model.generate(**inputs, max_new_tokens=16)
    >>> answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ```

    The views of a conversation are one scene, unless their entries have a "scene": see `apply_chat_template`.

    Args:
        image_processor: The VLM's.
        tokenizer: The VLM's.
        chat_template: The VLM's.
        vlm_processor_class: Name of the VLM's own processor class in `transformers`: that of Qwen2-VL, Qwen2.5-VL,
            Qwen3-VL, LLaVA-OneVision, InternVL, Idefics3, SmolVLM or Gemma 3.
        vlm_processor_options: What else that class is made with: `image_seq_len`, ...
        spatial_options: Options of the encoder's [`Spa3RImageProcessor`], where they are not its defaults.
        seconds_per_frame, min_frames, max_frames: See [`FrameSampling`]. `from_pretrained` takes other values:
            `from_pretrained(path, min_frames=32, max_frames=32)`.

    Raises:
        TypeError: A component of another kind, or an unknown option.
        ValueError: A VLM of another family, or an option out of its range.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        chat_template: Any = None,
        vlm_processor_class: str = "Qwen2_5_VLProcessor",
        vlm_processor_options: dict[str, Any] | None = None,
        spatial_options: dict[str, Any] | None = None,
        seconds_per_frame: float = 2.0,
        min_frames: int = 4,
        max_frames: int = 8,
    ):
        if vlm_processor_class not in _FAMILIES:
            raise ValueError(f"the VLM's processor is a {vlm_processor_class}; expected one of {sorted(_FAMILIES)}")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.vlm_processor_class = vlm_processor_class
        self.vlm_processor_options = dict(vlm_processor_options or {})
        self.spatial_options = dict(spatial_options or {})
        self.seconds_per_frame = seconds_per_frame
        self.min_frames = min_frames
        self.max_frames = max_frames
        # What cannot be made of these options is to be known now.
        _ = self.frame_sampling, self.spatial_image_processor, self.vlm_processor

    @classmethod
    def from_vlm(
        cls,
        vlm: str | os.PathLike | ProcessorMixin,
        spatial: str | os.PathLike | Spa3RImageProcessor | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> "Spa3VLMProcessor":
        """
        The processor for a VLM.

        Args:
            vlm: The VLM's folder or Hub repository, or its own processor.
            spatial: The spatial encoder's folder or Hub repository, or its image processor. Default: one of the
                paper's, of width 518.
            revision: Of the VLM's repository.
            token, cache_dir, local_files_only: For all files that come from the Hub.
            options: `seconds_per_frame`, `min_frames`, `max_frames`.

        Raises:
            OSError: Files are missing.
            ValueError: A VLM of another family, or one whose files contradict each other.
        """
        hub_options: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        if isinstance(spatial, str | os.PathLike):
            spatial = Spa3RImageProcessor.from_pretrained(spatial, **hub_options)
        if spatial is not None:
            options["spatial_options"] = {name: getattr(spatial, name) for name in ("size", "mode", "patch_size")}
        if isinstance(vlm, ProcessorMixin):
            config, vlm_class, settings = None, type(vlm), vlm.to_dict()
            image_processor, tokenizer, template = vlm.image_processor, vlm.tokenizer, vlm.chat_template
        else:
            hub_options |= {"revision": revision or "main"}
            config = AutoConfig.from_pretrained(vlm, **hub_options)
            if type(config) not in PROCESSOR_MAPPING:
                raise ValueError(f"{vlm} is a model of type {config.model_type!r}; expected a vision-language model")
            vlm_class = cast(type[ProcessorMixin], PROCESSOR_MAPPING[type(config)])
            settings = vlm_class.get_processor_dict(vlm, **hub_options)[0]
            image_processor = AutoImageProcessor.from_pretrained(vlm, **hub_options)
            tokenizer = AutoTokenizer.from_pretrained(vlm, **hub_options)
            template = settings.pop("chat_template", None)
        own = inspect.signature(vlm_class.__init__).parameters.keys() - {*vlm_class.get_attributes(), "chat_template"}
        processor = cls(
            image_processor,
            tokenizer,
            chat_template=template if template is not None else tokenizer.chat_template,
            vlm_processor_class=vlm_class.__name__,
            vlm_processor_options={name: settings[name] for name in sorted(own & settings.keys())},
            **options,
        )
        if config is not None:
            processor._check_config(config)
        return processor

    def _check_config(self, config: PreTrainedConfig) -> None:
        """The VLM counts its visual tokens by its own configuration."""
        base, num_tokens = self.vlm_processor, _FAMILIES[self.vlm_processor_class].num_tokens
        ours = {"image_token_id": self.image_token_id}
        theirs = {"image_token_id": getattr(config, "image_token_id", None)}
        if self._patch_sizes is not None:
            ours["patch_size"], ours["merge_size"] = self._patch_sizes
            theirs["patch_size"] = getattr(config.vision_config, "patch_size", None)
            theirs["merge_size"] = getattr(config.vision_config, "spatial_merge_size", None)
        if num_tokens is not None:
            ours[num_tokens] = getattr(base, num_tokens)
            # Gemma 3's. InternVL's configuration has a number, too, but its model does not go by it.
            theirs[num_tokens] = getattr(config, "mm_tokens_per_image", None)
        for name, size in theirs.items():
            if size is not None and size != ours[name]:
                raise ValueError(
                    f"{name} is {ours[name]} by the files of the processor, but {size} in the VLM's config.json; "
                    "expected the same, as else there are more or fewer placeholders than visual tokens"
                )

    @property
    def vlm_processor(self) -> Any:
        """The VLM's own processor, of the same parts, without its videos."""
        family = getattr(transformers, _FAMILIES[self.vlm_processor_class].processor)
        pictures_only = {"get_attributes": classmethod(lambda cls: ["image_processor", "tokenizer"])}
        return type(family.__name__, (family,), pictures_only)(
            image_processor=self.image_processor,
            tokenizer=copy.copy(self.tokenizer),  # Idefics3's makes it forget special tokens that it does not know
            chat_template=self.chat_template,
            **self.vlm_processor_options,
        )

    @property
    def spatial_image_processor(self) -> Spa3RImageProcessor:
        """The encoder's."""
        return Spa3RImageProcessor(**self.spatial_options)

    @property
    def frame_sampling(self) -> FrameSampling:
        """Which frames of videos are seen."""
        return FrameSampling(self.seconds_per_frame, self.min_frames, self.max_frames)

    @property
    def image_token_id(self) -> int:
        """What stands in `input_ids` for every visual token."""
        # Where there are two (Gemma 3), the processor's is that of a whole picture.
        return getattr(self.tokenizer, "image_token_id", None) or self.vlm_processor.image_token_id

    @property
    def _patch_sizes(self) -> tuple[int, int] | None:
        """Pixels of a patch and patches of a visual token, each way, where a picture has as many as fit into it."""
        if not hasattr(self.image_processor, "merge_size"):
            return None
        return self.image_processor.patch_size, self.image_processor.merge_size

    @property
    def model_input_names(self) -> list[str]:
        return [*self.vlm_processor.model_input_names, "spatial_pixel_values", "spatial_scene_ids"]

    def apply_chat_template(  # type: ignore[override]  # without what is for tools, sound and assistants' masks
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **template_kwargs: Any,
    ) -> Any:
        """
        The prompt of a conversation, or what the model takes of it.

        Args:
            conversation: Messages with pictures and videos in them, as `read_conversation` takes them, or a batch of
                such conversations. The views of a conversation are one scene, which all its visual tokens read. For
                more, name them: `{"type": "image", "image": ..., "scene": "kitchen"}`; views of one name are a scene.
            chat_template: Instead of the VLM's.
            add_generation_prompt: Whether to end with the beginning of the assistant's answer. A batch is then padded
                on the left, if `processor_kwargs` do not say otherwise.
            continue_final_message: Whether the last message is to be continued, i.e. not ended.
            tokenize: Whether to go on to `__call__`, or to return the prompts, one `str` for each conversation.
            return_dict: Whether to return all inputs, or `input_ids` alone.
            return_tensors: `"pt"` or `"np"`.
            processor_kwargs: Arguments of `__call__`; `padding`, `padding_side` and `max_length` may stand alone, too.
            template_kwargs: What else the template knows.

        Returns:
            `BatchFeature`, see `__call__`; or as said above.

        Raises:
            BadSampleError: A conversation, or something in it, cannot be used; also as in `__call__`.
            FileNotFoundError: A picture or video is missing.
        """
        settings = {name: template_kwargs.pop(name) for name in _CALL_OPTIONS if name in template_kwargs}
        settings.setdefault("padding_side", "left" if add_generation_prompt else None)
        is_batch = bool(conversation) and all(isinstance(item, list | tuple) for item in conversation)
        sampling = self.frame_sampling
        samples = [
            read_conversation(item, sampling, f"sample {index}")
            for index, item in enumerate(conversation if is_batch else [conversation])
        ]
        prompts = super().apply_chat_template(
            [sample.messages for sample in samples],
            chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            **template_kwargs,
        )
        if not tokenize:
            return prompts if is_batch else prompts[0]
        settings |= processor_kwargs or {}
        inputs = self(
            images=[sample.views for sample in samples],
            text=prompts,
            scenes=[sample.scenes for sample in samples],
            return_tensors=return_tensors,
            **settings,
        )
        return inputs if return_dict else inputs["input_ids"]

    def __call__(  # type: ignore[override]  # with scenes, without sound
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        *,
        scenes: Sequence[Sequence[Hashable]] | None = None,
        padding: bool | str = True,
        padding_side: str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            images: The views: pictures, or functions that open them, for one prompt, or a list for each of B prompts.
            text: One or B prompts, with the VLM's picture token once for every view.
            videos: Not taken: their frames are views.
            scenes: What names the scene of each view, for each prompt. Default: the views of a prompt are one scene.
            padding: To the longest, if True; see the tokenizer.
            padding_side: `"left"` or `"right"`. Default: the tokenizer's.
            max_length: The most tokens that a prompt may have.
            return_tensors: `"pt"` or `"np"`; None gives lists.
            kwargs: For the VLM's own processor: `text_kwargs`, `images_kwargs`, `add_special_tokens`, ...

        Returns:
            What the VLM's own processor gives (`input_ids` (B, L), `attention_mask` (B, L), `pixel_values`, ...), and,
            if there are views, `spatial_pixel_values`, the S scenes' views: (S, V, 3, H, W) in [0, 1], or, where they
            differ in shape, a list of (V, 3, H, W). If a prompt has several scenes, also `spatial_scene_ids` (B, L):
            the scene that a visual token reads, -1 elsewhere. (Otherwise scene i is that of the i-th prompt with
            views, which is what [`Spa3VLM`] supposes.)

        Raises:
            BadSampleError: A prompt is longer than `max_length`; its views and its picture tokens are not equally
                many; a view cannot be used; the views of a scene differ in shape.
            ValueError: An argument cannot be used, or the placeholders do not fit the pixels.
        """
        if videos is not None:
            raise ValueError("videos are given; expected their frames as images, or messages for apply_chat_template")
        if text is None:
            raise ValueError("text is not given; expected a prompt for the images")
        if kwargs.get("truncation") or kwargs.get("text_kwargs", {}).get("truncation"):
            raise ValueError("truncation is given; expected none, as it would cut through the tokens of a picture")
        base, family = self.vlm_processor, _FAMILIES[self.vlm_processor_class]
        prompts = [text] if isinstance(text, str) else list(text)
        views = views_of_prompts(images, prompts, base.image_token, getattr(base, "video_token", None))
        groups = number_scenes(views, scenes)
        pictures, spatial = see_views(views, groups, self.spatial_image_processor, math.prod(self._patch_sizes or ()))
        if self.tokenizer.bos_token and all(prompt.startswith(self.tokenizer.bos_token) for prompt in prompts):
            kwargs.setdefault("add_special_tokens", False)  # the template has written it
        if padding == "max_length":
            kwargs["max_length"] = max_length
        inputs = base(
            images=pictures if any(pictures) else None,
            text=prompts,
            padding=padding,
            padding_side=padding_side or self.tokenizer.padding_side,
            return_tensors=return_tensors,
            images_kwargs={**family.images_kwargs, **kwargs.pop("images_kwargs", {})},
            **kwargs,
        )
        image_token_id = self.image_token_id
        if max_length is not None:
            check_lengths(inputs, image_token_id, max_length)
        sizes = [[picture.size for picture in sample] for sample in pictures]
        fixed = getattr(base, family.num_tokens) if family.num_tokens else None
        counts = count_visual_tokens(inputs, sizes, image_token_id, self._patch_sizes, fixed)
        if spatial:
            inputs["spatial_pixel_values"] = _stack(spatial, return_tensors)
        if any(len(set(sample)) > 1 for sample in groups):
            scene_ids = scene_ids_of_tokens(inputs["input_ids"], image_token_id, groups, counts)
            inputs["spatial_scene_ids"] = _stack(scene_ids, return_tensors)
        return inputs


def _stack(arrays: Sequence[np.ndarray], return_tensors: str | None) -> Any:
    """One array where all have one shape, else a list; tensors where they are asked for."""
    if return_tensors is None:
        return [array.tolist() for array in arrays] if arrays[0].ndim == 1 else list(arrays)
    if return_tensors == "pt":
        tensors = [torch.from_numpy(array) for array in arrays]
        return torch.stack(tensors) if len({tensor.shape for tensor in tensors}) == 1 else tensors
    return np.stack(arrays) if len({array.shape for array in arrays}) == 1 else list(arrays)


__all__ = ["Spa3VLMProcessor"]
