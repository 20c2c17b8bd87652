"""Supervised fine-tuning of Spa3-VLM: instruction data to batches, with labels on the answers alone."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .errors import BadSampleError
from .instruction_data import Instruction, InstructionData
from .latent_cache import LatentCache
from .media_spa3_vlm import SampleViews, read_conversation
from .optional import require
from .processing_spa3_vlm import Spa3VLMProcessor


IGNORED = -100
# What a bad sample raises, as far as the sample is to blame.
BAD_SAMPLE_ERRORS = (BadSampleError, FileNotFoundError)

_CHARACTERS_PER_TOKEN = 4
# Steps whose samples are sorted by length together: enough for batches of like lengths, few enough for mixed ones.
_POOL_STEPS = 32
# The last number of a seed says what is drawn, so that no two kinds of draw share a stream.
_STEPS = 3

Piece = tuple[str, bool]
"""Some text, and whether it is an answer's."""


# --- where the answers are


def answer_pieces(
    messages: Sequence[dict[str, Any]], render: Callable[[Sequence[dict[str, Any]], bool], str], end_tokens: set[str]
) -> list[Piece]:
    """
    The text of a conversation, cut where answers begin and end.

    An answer begins where the generation prompt ends, and goes on to the token that ends the turn, which is learnt as
    well. Some templates (LLaVA-OneVision's) begin an answer with other white space than they prompt for it with; the
    prompt's is taken, which is what the model will see.

    Args:
        messages: Contents are lists; answers are text.
        render: The text of some messages, with the generation prompt or without.
        end_tokens: Special tokens, which may end a turn.

    Raises:
        BadSampleError: There is no answer.
        ValueError: The chat template does not allow to tell where an answer begins.
    """
    pieces: list[Piece] = []
    before = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, prompt = render(messages[:index], False), render(messages[:index], True)
        answered = render(messages[: index + 1], False)
        answer = "".join(entry["text"] for entry in message["content"])
        for start, longer in ((before, asked), (asked, prompt), (asked, answered)):
            if not longer.startswith(start):
                raise ValueError(
                    "the chat template writes the beginning of a conversation in another way once it goes on: "
                    f"{_end(start)!r} is not in {_end(longer)!r}; expected a template that only adds text"
                )
        header = prompt[len(asked) :]
        words = r"\s*".join(map(re.escape, header.split()))
        turn = answered[len(asked) :]
        begin = re.match(re.escape(header), turn) or re.match(rf"\s*{words}\s*", turn)
        if begin is None or answer not in turn[begin.end() :]:
            raise ValueError(
                f"the chat template writes an answer as {turn[:200]!r}; expected its generation prompt {header!r}, "
                f"then the answer, {answer[:100]!r}"
            )
        learnt = turn[begin.end() :]
        if learnt.rstrip().endswith(tuple(end_tokens)):  # generation stops there
            learnt = learnt.rstrip()
        rest = turn[begin.end() + len(learnt) :]
        pieces += [(asked[len(before) :] + header, False), (learnt, True), (rest, False)]
        before = answered
    if not pieces:
        raise BadSampleError("there is no answer; expected a message of the role 'assistant'")
    return pieces


def _end(text: str) -> str:
    return text[-200:]


def label_answers(
    input_ids: Tensor, pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase, image_token: str
) -> Tensor:
    """
    Labels of a sample: its own tokens where answers are, -100 elsewhere.

    Args:
        input_ids: (L,), the tokens of the pieces, without padding; each picture has become many.
        pieces: See `answer_pieces`, with `image_token` for each picture.
        tokenizer: What made `input_ids`.
        image_token: What stands for a picture in the pieces.

    Returns:
        (L,) long.

    Raises:
        BadSampleError: Tokens reach across the beginning or end of an answer.
    """
    text = "".join(piece for piece, _ in pieces)
    bos = tokenizer.bos_token
    # As the processor does: a template that writes it has all special tokens.
    add_special_tokens = not (bos and text.startswith(bos))

    def encode(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=add_special_tokens)["input_ids"]  # type: ignore[return-value]

    tokens = encode(text)
    added, num_pictures = len(input_ids) - len(tokens), text.count(image_token)
    labels = torch.full_like(input_ids, IGNORED)
    start = end = 0
    for piece, is_answer in pieces:
        start, end = end, end + len(piece)
        if not is_answer:
            continue
        own = []
        for place in (start, end):
            part = encode(text[:place])
            if tokens[: len(part)] != part:
                raise BadSampleError(
                    f"the answer {piece[:100]!r} shares a token with what stands beside it; expected answers that "
                    "begin and end with tokens of their own"
                )
            own.append(len(part))
        # Pictures of one scene have one shape, and so equally many tokens.
        later = text.count(image_token, end)
        shift = added - (added // num_pictures * later if later else 0)
        learnt = slice(own[0] + shift, own[1] + shift)
        labels[learnt] = input_ids[learnt]
        if labels[learnt].tolist() != tokens[own[0] : own[1]]:
            raise BadSampleError(
                f"the answer {piece[:100]!r} cannot be found among the tokens of the conversation; expected pictures "
                "of one shape, where some come after an answer"
            )
    return labels


# --- batches


class SFTCollator:
    """
    Conversations to a batch for [`Spa3VLM`], padded on the right: what [`Spa3VLMProcessor`] gives, and `labels` (B, L)
    on the answers. `spatial_pixel_values` are a list of scenes.

    A batch without pictures gets one more row, a white picture with nothing to learn: so every step of every process
    goes through the same modules, which DDP, FSDP and ZeRO-3 wait for, and some of what is trained has a part in it.

    Bad samples make the batch smaller, nothing takes their place; `bad_samples` is the list of their messages, which
    the trainer has to take out before the model sees the batch.

    Args:
        processor: Of the VLM and its spatial encoder.
        max_length: The most tokens that a sample may have; longer ones are bad samples. None: any number.
        on_bad_sample: What a sample that cannot be used does: `"raise"`, or `"skip"` the sample.
        cache: Where the scenes' latents may be found: see `LatentCache.look_up` for what there is then.
    """

    def __init__(
        self,
        processor: Spa3VLMProcessor,
        max_length: int | None = None,
        on_bad_sample: Literal["raise", "skip"] = "raise",
        cache: LatentCache | None = None,
    ):
        if on_bad_sample not in ("raise", "skip"):
            raise ValueError(f"on_bad_sample is {on_bad_sample!r}; expected 'raise' or 'skip'")
        if processor.chat_template is None:
            raise ValueError("the VLM has no chat template; expected one, as of a VLM made for conversations")
        self.processor = processor
        self.max_length = max_length
        self.on_bad_sample = on_bad_sample
        self.cache = cache
        self._image_token = processor.vlm_processor.image_token
        self._end_tokens = set(processor.tokenizer.get_added_vocab())

    def __call__(self, samples: Sequence[Instruction]) -> dict[str, Any]:
        bad_samples: list[str] = []
        try:
            batch = self._batch(list(map(self._read, samples)))
        except BAD_SAMPLE_ERRORS:
            batch = self._batch(self._good_ones(samples, bad_samples))
        return {**batch, "bad_samples": bad_samples}

    def tokens_per_view(self) -> int:
        """Visual tokens of a square picture."""
        return int((self._batch([])["input_ids"] == self.processor.image_token_id).sum())

    def _good_ones(self, samples: Sequence[Instruction], bad_samples: list[str]) -> list["_Sample"]:
        good = []
        for instruction in samples:
            try:
                sample = self._read(instruction)
                self._batch([sample])
            except BAD_SAMPLE_ERRORS as error:
                message = str(error) if instruction.name in str(error) else f"{instruction.name}: {error}"
                if self.on_bad_sample == "raise":
                    raise BadSampleError(message) from error
                bad_samples.append(message)
            else:
                good.append(sample)
        return good

    def _read(self, instruction: Instruction) -> "_Sample":
        return self._sample(instruction.messages(), instruction.name)

    def _sample(self, messages: list[dict[str, Any]], name: str) -> "_Sample":
        views = read_conversation(messages, self.processor.frame_sampling, name)
        try:
            return views, answer_pieces(views.messages, self._render, self._end_tokens)
        except require("jinja2", "train").TemplateError as error:
            raise BadSampleError(f"{name} is not for this VLM's chat template: {error}") from error

    def _render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
        return self.processor.tokenizer.apply_chat_template(
            messages,
            chat_template=self.processor.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    def _blank(self) -> "_Sample":
        picture = Image.new("RGB", (self.processor.spatial_image_processor.size,) * 2, "white")
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "?"}]
        answer = [{"type": "text", "text": "!"}]
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ]
        views, pieces = self._sample(messages, "blank")
        return views, [(text, False) for text, _ in pieces]

    def _batch(self, samples: list["_Sample"]) -> dict[str, Any]:
        if not any(views.views for views, _ in samples):
            samples = [*samples, self._blank()]
        inputs = self.processor(
            images=[views.views for views, _ in samples],
            text=["".join(text for text, _ in pieces) for _, pieces in samples],
            scenes=[views.scenes for views, _ in samples],
            padding_side="right",
            max_length=self.max_length,
            return_tensors="pt",
        )
        ids = inputs["input_ids"]
        labels = torch.full_like(ids, IGNORED)
        for row, (length, (_, pieces)) in enumerate(zip(inputs["attention_mask"].sum(1), samples, strict=True)):
            labels[row, :length] = label_answers(
                ids[row, :length], pieces, self.processor.tokenizer, self._image_token
            )
        scenes = list(inputs.pop("spatial_pixel_values"))
        known = {"spatial_pixel_values": scenes} if self.cache is None else self.cache.look_up(scenes)
        return {**inputs, "labels": labels, **known}


_Sample = tuple[SampleViews, list[Piece]]


class LengthGroupedBatchSampler:
    """
    Batches of numbers of `InstructionData`, of samples of like lengths, so that little is padding.

    An epoch is what `InstructionData.draw` gives, and some of it a second time to fill its last step. Batches are
    whole steps, so `accelerate` deals them out evenly: batch i to process i % num_processes. `batch_size` is None for
    it, and `drop_last` True, as nothing is to be filled up.

    Args:
        data: The records.
        length_of: The length of a record, by its number, in whatever unit.
        samples_per_batch: On one device.
        batches_per_step: Accumulation steps x processes.
        seed: Of the order of the steps.

    Raises:
        ValueError: A number out of range.
    """

    batch_size = None
    drop_last = True

    def __init__(
        self,
        data: InstructionData,
        length_of: Callable[[int], int],
        samples_per_batch: int,
        batches_per_step: int = 1,
        seed: int = 0,
    ):
        for name, value in (("samples_per_batch", samples_per_batch), ("batches_per_step", batches_per_step)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        self.data = data
        self.length_of = length_of
        self.samples_per_batch = samples_per_batch
        self.batches_per_step = batches_per_step
        self.seed = seed
        self.steps_per_epoch = math.ceil(data.num_samples / (samples_per_batch * batches_per_step))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.steps_per_epoch * self.batches_per_step

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.epoch
        per_step = self.samples_per_batch * self.batches_per_step
        numbers = np.resize(self.data.draw(epoch), self.steps_per_epoch * per_step)
        steps: list[np.ndarray] = []
        for start in range(0, len(numbers), _POOL_STEPS * per_step):
            pool = numbers[start : start + _POOL_STEPS * per_step]
            lengths = [self.length_of(int(number)) for number in pool]
            steps += list(pool[np.argsort(lengths, kind="stable")].reshape(-1, per_step))
        for step in np.random.default_rng((self.seed, epoch, _STEPS)).permutation(len(steps)):
            for batch in steps[step].reshape(self.batches_per_step, -1):
                yield batch.tolist()


class EstimatedLengths:
    """
    How many tokens a record has, about, without opening its pictures; 0 where it cannot be read.

    Args:
        data: The records.
        tokens_per_view: Visual tokens of a picture.
        views_per_video: Frames of a video that are seen.
    """

    def __init__(self, data: InstructionData, tokens_per_view: int, views_per_video: int):
        self.data = data
        self.tokens = {"image": tokens_per_view, "video": tokens_per_view * views_per_video}
        self._known: dict[int, int] = {}

    def __call__(self, number: int) -> int:
        if number not in self._known:
            try:
                messages = self.data[number].messages()
            except BadSampleError:
                messages = []
            entries = [entry for message in messages for entry in message["content"]]
            self._known[number] = sum(
                self.tokens.get(entry["type"], len(entry.get("text", "")) // _CHARACTERS_PER_TOKEN)
                for entry in entries
            )
        return self._known[number]


__all__ = ["EstimatedLengths", "LengthGroupedBatchSampler", "SFTCollator", "answer_pieces", "label_answers"]
