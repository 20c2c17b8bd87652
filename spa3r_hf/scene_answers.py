"""Many questions about one scene, answered for little more than the price of one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList
from transformers.utils import logging

from .media_spa3_vlm import read_conversation
from .modeling_spa3_vlm import Spa3VLM
from .processing_spa3_vlm import Spa3VLMProcessor
from .scene_prefix import (
    Messages,
    NoSharedPrefixError,
    ScenePrefix,
    ScoreMargins,
    common_length,
    empty_cache,
    first_tokens,
    rows_of_questions,
    with_last_view_only,
    with_open_views,
)


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class SceneAnswer:
    """
    Attributes:
        text: What the model wrote, without special tokens.
        num_frames: How many views of the scene it saw.
    """

    text: str
    num_frames: int


class SceneAnswerer:
    """
    Answers questions about one scene after another, greedily.

    Frames are decoded once for a scene, the spatial latents and the visual tokens computed once, and what all its
    questions begin with passes through the language model once: its KV cache is copied for each batch of questions,
    and only what is left of them is read. Answers are those of one `generate` for each question.

    ```python
    >>> answerer = SceneAnswerer(Spa3VLM.from_pretrained(adapter), Spa3VLMProcessor.from_pretrained(adapter))
    >>> answers = answerer.answer("scene0011_00.mp4", ["How many chairs are there?", "How large is the room?"])
    ```

    Args:
        model: A [`Spa3VLM`], its adapter enabled or not, or a VLM of `transformers`, which then sees the same frames.
        processor: The model's.
        max_new_tokens: The most tokens of an answer. All else about generation but sampling and beams is as the
            model's `generation_config` says.
        batch_size: Questions of a scene that are answered at once. It changes time and memory only.
        reuse: Whether to do all this. If not, every question goes its own way from the video on.
        tie_tolerance: Where the scores of two tokens come closer than this, rounding decides, which differs with
            `reuse`; such a question is asked again without it. In float32 rounding moves scores by some 1e-5; in
            bfloat16 by 0.1 or more, so that some answers may differ there unless this is made as large.

    Raises:
        TypeError: The processor is another.
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        model: Spa3VLM | PreTrainedModel,
        processor: Spa3VLMProcessor,
        *,
        max_new_tokens: int = 16,
        batch_size: int = 8,
        reuse: bool = True,
        tie_tolerance: float = 1e-3,
    ):
        if not isinstance(processor, Spa3VLMProcessor):
            raise TypeError(f"the processor is a {type(processor).__name__}; expected a Spa3VLMProcessor (from_vlm)")
        for name, value, least in (
            ("max_new_tokens", max_new_tokens, 1),
            ("batch_size", batch_size, 1),
            ("tie_tolerance", tie_tolerance, 0),
        ):
            if not value >= least:
                raise ValueError(f"{name} = {value}; expected at least {least}")
        self.model = model
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.reuse = reuse
        self.tie_tolerance = tie_tolerance

    def answer(self, video: str | Path | Sequence[Image.Image], prompts: Sequence[str]) -> list[SceneAnswer]:
        """
        Args:
            video: A video's path, a folder of its frames, or a list of pictures; of these, the frames that the
                processor's options choose are seen.
            prompts: What is asked, one text for each question.

        Returns:
            An answer for each prompt, in their order.

        Raises:
            BadSampleError: The video cannot be used.
            FileNotFoundError: It is missing.
            ValueError: A prompt is no text, or an empty one.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts = {prompts!r}; expected a list of texts")
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"prompt {index} is {prompt!r}; expected a text that is not empty")
        scene = {"type": "video", "video": video}
        return self.answer_messages(
            [[{"role": "user", "content": [scene, {"type": "text", "text": prompt}]}] for prompt in prompts]
        )

    @torch.no_grad()
    def answer_messages(self, questions: Sequence[Messages]) -> list[SceneAnswer]:
        """
        The same for questions that are more than a video and a text.

        Args:
            questions: Of each, messages as the processor's `apply_chat_template` takes them. The pictures and videos
                are the same in all of them (those of the first are looked at); only the texts differ.

        Raises:
            BadSampleError: A message, or something in it, cannot be used.
            FileNotFoundError: A picture or video is missing.
            ValueError: The numbers of views differ.
        """
        if not questions:
            return []
        with _evaluating(self.model):
            if not self.reuse:
                return [self._answer_alone(question) for question in questions]
            opened, num_frames = with_open_views(questions, self.processor.frame_sampling)
            texts: list[str | None] = [None] * len(opened)
            try:
                # For one there is nothing to be saved.
                texts = self._answer_together(opened) if len(opened) > 1 else texts
            except NoSharedPrefixError as error:
                logger.warning_once(f"questions about a scene are answered one by one: {error}")
            return [
                self._answer_alone(question) if text is None else SceneAnswer(text, num_frames)
                for question, text in zip(opened, texts, strict=True)
            ]

    def _answer_alone(self, question: Messages) -> SceneAnswer:
        inputs = self._inputs(question)
        new_tokens = self._generate(self.model, inputs, self.max_new_tokens)
        num_frames = len(read_conversation(question, self.processor.frame_sampling, "the question").views)
        return SceneAnswer(self._text(self._answers(new_tokens)[0]), num_frames)

    def _answer_together(self, questions: Sequence[Messages]) -> list[str | None]:
        """Answers to questions with open views; None where it takes more than this to be sure of it."""
        cache = empty_cache(self._vlm)
        inputs = self._inputs(questions[0])
        shortened = self.processor.apply_chat_template(
            [with_last_view_only(question) for question in questions],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            padding=False,
        )
        first = inputs["input_ids"][0].tolist()
        rows = rows_of_questions(first, shortened["input_ids"], self.processor.image_token_id)
        prefix = ScenePrefix(rows[0][: common_length(rows)], cache)
        # What `generate` does before its first token is exactly what is to be done; that token is of no use.
        start = first_tokens(inputs, len(prefix.tokens))
        self._generate(self.model, {**start, "past_key_values": cache}, max_new_tokens=1)
        return self._continue(prefix, [row[len(prefix.tokens) :] for row in rows], inputs["input_ids"].device)

    def _continue(
        self, prefix: ScenePrefix, suffixes: Sequence[Sequence[int]], device: torch.device
    ) -> list[str | None]:
        texts: list[str | None] = [None] * len(suffixes)
        for batch in self._batches(prefix, suffixes):
            inputs = prefix.continued([suffixes[index] for index in batch], device)
            margins = ScoreMargins()
            inputs |= {
                "past_key_values": prefix.copies(len(batch)),
                "logits_processor": LogitsProcessorList([margins]),
            }
            # The scene is in the cache: nothing of this is Spa3-VLM's.
            answers = self._answers(self._generate(self._vlm, inputs, self.max_new_tokens))
            # The token that ends an answer was a choice as well.
            steps = [min(len(answer) + 1, self.max_new_tokens) for answer in answers]
            for index, answer, margin in zip(batch, answers, margins.smallest(steps), strict=True):
                texts[index] = self._text(answer) if margin > self.tie_tolerance else None
        if ties := texts.count(None):
            logger.info(f"{ties} of {len(texts)} questions about a scene are asked again, as tokens tied")
        return texts

    def _batches(self, prefix: ScenePrefix, suffixes: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Questions that are answered at once, of lengths as alike as can be."""
        longest = max(map(len, suffixes))
        must_be_equal = prefix.needs_equal_lengths(longest + self.max_new_tokens)
        batch: list[int] = []
        for index in sorted(range(len(suffixes)), key=lambda index: len(suffixes[index])):
            is_longer = bool(batch) and len(suffixes[batch[0]]) < len(suffixes[index])
            if len(batch) == self.batch_size or (must_be_equal and is_longer):
                yield batch
                batch = []
            batch.append(index)
        yield batch

    @property
    def _vlm(self) -> PreTrainedModel:
        return self.model.vlm if isinstance(self.model, Spa3VLM) else self.model

    def _inputs(self, question: Messages) -> dict[str, Any]:
        inputs = self.processor.apply_chat_template(
            question, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        device = _input_device(self._vlm)
        return {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
            if isinstance(self.model, Spa3VLM) or not name.startswith("spatial_")
        }

    def _generate(self, model: Any, inputs: dict[str, Any], max_new_tokens: int) -> Tensor:
        """The new tokens, (B, at most `max_new_tokens`)."""
        paddings = (self._vlm.generation_config.pad_token_id, self.processor.tokenizer.pad_token_id, 0)
        sequences = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=next(padding for padding in paddings if padding is not None),
            use_cache=True,
            cache_implementation=None,
            # Greedy, whatever the model's own settings are.
            **{"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None},
        )
        return sequences[:, inputs["input_ids"].shape[1] :]

    def _answers(self, new_tokens: Tensor) -> list[list[int]]:
        """What comes before the end of each answer."""
        end = self._vlm.generation_config.eos_token_id
        ends = set() if end is None else {end} if isinstance(end, int) else set(end)
        return [list(takewhile(lambda token: token not in ends, row)) for row in new_tokens.tolist()]

    def _text(self, answer: Sequence[int]) -> str:
        return self.processor.tokenizer.decode(answer, skip_special_tokens=True)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """While this lasts, the model is in eval mode; then each of its parts is in the mode that it was in."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


def _input_device(vlm: PreTrainedModel) -> torch.device:
    """Where a model that may lie on several devices takes its inputs; if on none (offloaded), its hooks move them."""
    weight: Any = vlm.get_input_embeddings().weight
    return torch.device("cpu") if weight.is_meta else weight.device


__all__ = ["SceneAnswer", "SceneAnswerer"]
