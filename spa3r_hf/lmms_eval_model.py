"""Spa3-VLM, and any VLM that it works with, as a chat model of lmms-eval (0.7)."""

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText

from .configuration_spa3_vlm import ADAPTER_CONFIG_NAME, adapter_file
from .evaluation_model import EvaluatedModel, Source
from .modeling_spa3_vlm import Spa3VLM
from .optional import require
from .scene_answers import SceneAnswerer


lmms: Any = require("lmms_eval.api.model", extra="lmms").lmms

Messages = list[dict[str, Any]]


class Spa3VLMChat(lmms):
    """
    The model that `--model spa3_vlm` means; its arguments come from `--model_args`.

    Questions about the same pictures or videos are answered together, wherever they stand among the requests.

    Args:
        pretrained: An adapter of Spa3-VLM with its processor beside it, or a VLM, alone: a folder or a Hub repository.
        revision: Of that repository.
        dtype: Of the VLM's weights. "auto": as they were saved; on a CPU float32, which is faster there.
        device: One device for all. Default: the first GPU, or of several processes each its own, else the CPU.
        device_map: Instead of that, where `transformers` puts the VLM's parts: "auto", ...
        attn_implementation: "sdpa", "flash_attention_2", ...
        batch_size: Questions about the same pictures that are answered at once.
        max_batch_size: Of no effect: lmms-eval passes its own.
        seconds_per_frame, min_frames, max_frames: Which frames of videos are seen, where that is not to be as the
            processor has it: see [`FrameSampling`].
        image_size: Width that pictures are resized to, in pixels. Default: the processor's; the paper's 518 for a VLM.
        reuse: Whether such questions share what they can: see [`SceneAnswerer`].

    Raises:
        OSError: There is no such model, or it has no processor.
        ValueError: An argument cannot be used.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        device_map: str | None = None,
        attn_implementation: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        seconds_per_frame: float | None = None,
        min_frames: int | None = None,
        max_frames: int | None = None,
        image_size: int | None = None,
        reuse: bool = True,
    ):
        super().__init__()
        if not str(batch_size).isdigit():
            raise ValueError(f"batch_size = {batch_size!r}; expected a number")
        # The harness gathers results with it, where several processes share the questions.
        self.accelerator = require("accelerate", extra="lmms").Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        place = self.accelerator.device if device is None or self._world_size > 1 else device
        self._device = torch.device(place)
        self._batch_size, self._reuse = int(batch_size), reuse
        source = Source(str(pretrained), revision)
        chosen = EvaluatedModel.choose(adapter=source) if _is_adapter(source) else EvaluatedModel.choose(vlm=source)
        frames = {"seconds_per_frame": seconds_per_frame, "min_frames": min_frames, "max_frames": max_frames}
        self._processor = chosen.load_processor(image_size, **_given(frames))
        options: dict[str, Any] = {"revision": revision or "main", "dtype": chosen.dtype(dtype, self._device)}
        options |= _given({"device_map": device_map, "attn_implementation": attn_implementation})
        loader: Any = AutoModelForImageTextToText if chosen.adapter is None else Spa3VLM
        self._model: Any = loader.from_pretrained(str(pretrained), **options).eval()
        if device_map is None:
            self._model.to(self._device)
        else:
            self._device = self._model.device

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def batch_size(self) -> int:
        return self._batch_size

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "Spa3VLMChat gives no likelihoods; expected a task with output_type: generate_until (vsibench is one)"
        )

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One greedy answer for each request, in their order."""
        asked = []
        for request in requests:
            _, doc_to_messages, settings, doc_id, task, split = request.args
            asked.append(_Asked(settings, doc_to_messages, self.task_dict[task][split], doc_id))
        answers = self._answer(asked)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", (request.args[0], request.args[2]), answer)
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """
        The answers of all rounds for each request.

        The task has a round's messages made from the answers before it. Each round is a conversation of its own, and
        the requests that have one take it together.
        """
        answers: list[list[str]] = [[] for _ in requests]
        notes: list[Any] = [None] * len(requests)
        going, number = list(range(len(requests))), 0
        while going:
            asked: dict[int, _Asked] = {}
            for index in going:
                _, doc_to_messages, settings, doc_id, task, split = requests[index].args
                doc = self.task_dict[task][split][doc_id]
                if not number:
                    messages = doc_to_messages(doc)
                else:
                    before = {"previous_output": list(answers[index]), "previous_round_info": notes[index]}
                    result = doc_to_messages(doc, round_idx=number, **before)
                    # A task that says nothing else has one round.
                    if not isinstance(result, tuple) or len(result) != 4 or result[1]:
                        continue
                    messages, _, _, notes[index] = result
                asked[index] = _Asked(settings, lambda messages: messages, {0: messages}, 0)
            for index, answer in zip(asked, self._answer(list(asked.values())), strict=True):
                answers[index].append(answer)
            going, number = list(asked), number + 1
        return answers

    def _answer(self, asked: Sequence["_Asked"]) -> list[str]:
        groups: dict[tuple[_Settings, tuple[Hashable, ...]], list[int]] = {}
        for index, request in enumerate(asked):
            settings = _Settings.of(request.settings)
            groups.setdefault((settings, _media_of(request.messages())), []).append(index)
        answers = [""] * len(asked)
        with tqdm(total=len(asked), desc="Spa3-VLM", unit="question", disable=self.rank != 0 or not asked) as progress:
            for (settings, _), members in groups.items():
                answerer = SceneAnswerer(
                    self._model,
                    self._processor,
                    max_new_tokens=settings.max_new_tokens,
                    batch_size=self._batch_size,
                    reuse=self._reuse,
                )
                texts = answerer.answer_messages([asked[index].messages() for index in members])
                for index, text in zip(members, texts, strict=True):
                    answers[index] = settings.cut(text.text)
                progress.update(len(members))
        return answers


@dataclass(frozen=True)
class _Asked:
    """A request. Its messages are made when they are needed: the pictures of all together may be large."""

    settings: Mapping[str, Any]
    doc_to_messages: Callable[[Any], Messages]
    docs: Any
    doc_id: Any

    def messages(self) -> Messages:
        return self.doc_to_messages(self.docs[self.doc_id])


@dataclass(frozen=True)
class _Settings:
    """
    What a task says about generation, as far as it has a meaning here.

    Attributes:
        max_new_tokens: lmms-eval's own models take 128 by default.
        until: Texts that end an answer.
    """

    max_new_tokens: int
    until: tuple[str, ...]

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "_Settings":
        samples = settings.get("do_sample") or (settings.get("do_sample") is None and settings.get("temperature"))
        if samples or (settings.get("num_beams") or 1) > 1:
            raise ValueError(
                f"generation_kwargs are {dict(settings)}; expected greedy decoding, as nothing else is done here: "
                "--gen_kwargs do_sample=False,temperature=0,num_beams=1 says so"
            )
        until = settings.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        return cls(int(settings.get("max_new_tokens") or 128), until)

    def cut(self, text: str) -> str:
        for end in self.until:
            text = text.split(end)[0] if end else text
        return text


def _media_of(messages: Messages) -> tuple[Hashable, ...]:
    """What tells whether messages have the same pictures and videos."""
    media: list[Hashable] = []
    for message in messages:
        content = message["content"]
        for entry in content if isinstance(content, list) else []:
            if entry.get("start_time") is not None or entry.get("end_time") is not None:
                raise ValueError(f"a video is to be seen in part: {entry}; expected whole videos")
            source = entry.get("url", entry.get(entry["type"]))
            if isinstance(source, Image.Image):
                source = (source.mode, source.size, hashlib.sha256(source.tobytes()).digest())
            elif entry["type"] != "text" and not isinstance(source, str):
                source = id(entry)  # whatever it is, it is not shared
            if entry["type"] != "text":
                media.append((entry["type"], source))
    return tuple(media)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _is_adapter(source: Source) -> bool:
    try:
        adapter_file(source.name, ADAPTER_CONFIG_NAME, revision=source.revision or "main")
    except OSError:  # also where there is nothing at all, which is said when it is loaded
        return False
    return True


__all__ = ["Spa3VLMChat"]
