"""What a model answers to questions; which instruction records have short answers, and what its own answers score."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .benchmarks_scores import NOT_MEANS, vsi_bench_metric
from .instruction_data import Instruction
from .latent_cache import SceneEncoder
from .modeling_spa3_vlm import Spa3VLM
from .processing_spa3_vlm import Spa3VLMProcessor


MAX_NEW_TOKENS = 16  # VSI-Bench's
_MOST_WORDS = 5
# Stand-ins: types of VSI-Bench whose answers are numbers, and letters.
_NUMBER_TYPE, _LETTER_TYPE = "object_counting", "route_planning"


@torch.no_grad()
def answer_conversations(
    model: Spa3VLM,
    processor: Spa3VLMProcessor,
    conversations: Sequence[list[dict[str, Any]]],
    scene_encoder: SceneEncoder | None,
    batch_size: int = 16,
) -> list[str]:
    """
    What a model answers, greedily, in at most 16 tokens.

    Args:
        model: In whatever mode; left in eval mode.
        processor: Its processor.
        conversations: Messages with pictures or videos, each ending with a question.
        scene_encoder: Encodes the scenes. None: the VLM alone is asked.
        batch_size: Conversations at a time.
    """
    model.eval()
    answers: list[str] = []
    for start in range(0, len(conversations), batch_size):
        inputs = processor.apply_chat_template(
            list(conversations[start : start + batch_size]),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        scenes = list(inputs.pop("spatial_pixel_values", ()))
        batch = {name: value.to(model.device) for name, value in inputs.items()}
        if scene_encoder is not None and scenes:
            known = {"spatial_pixel_values": scenes}
            batch |= scene_encoder.complete(
                known if scene_encoder.cache is None else scene_encoder.cache.look_up(scenes)
            )
        output = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers += processor.tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


@dataclass(frozen=True)
class ShortQuestion:
    """
    A question whose answer can be compared with the right one.

    Attributes:
        messages: The conversation up to the question.
        truth: The right answer.
        question_type: VSI-Bench's, or None.
    """

    messages: list[dict[str, Any]]
    truth: str
    question_type: str | None


def short_question(instruction: Instruction) -> ShortQuestion | None:
    """
    The last question of a record, if its answer has five words or fewer.

    Raises:
        BadSampleError: The record cannot be used.
    """
    messages = instruction.messages()
    truth = "".join(entry["text"] for entry in messages[-1]["content"])
    if len(truth.split()) > _MOST_WORDS:
        return None
    return ShortQuestion(messages[:-1], truth, _vsi_bench_type(instruction.question_type, truth))


def _vsi_bench_type(question_type: Any, truth: str) -> str | None:
    """The type, if it is one of VSI-Bench's and this is an answer to it."""
    metric = vsi_bench_metric()
    try:
        metric.check_references([truth], [question_type], [""])
    except ValueError:
        return None
    return question_type


def score_short_answers(questions: Sequence[ShortQuestion], answers: Sequence[str]) -> dict[str, float]:
    """
    Args:
        questions: N questions.
        answers: What a model answered, (N,).

    Returns:
        Scores, 0-100, of what there is: those of VSI-Bench's metric (`overall`, `object_counting`, ...) for questions
        of its types; for the others, `mra`, the mean relative accuracy of numbers, and `exact_match`, the share of
        right letters and words (upper and lower case, and a dot at the end, are alike).
    """
    metric = vsi_bench_metric()
    typed: list[tuple[str, str, str]] = []
    others: dict[str, list[float]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        truth = question.truth
        if question.question_type is not None:
            typed.append((answer, truth, question.question_type))
        elif _is_number(truth):
            others["mra"].append(float(metric.score_answers([answer], [truth], [_NUMBER_TYPE])[1][0]))
        elif metric.parse_answer(truth, _LETTER_TYPE) == truth.upper():
            others["exact_match"].append(float(metric.score_answers([answer], [truth], [_LETTER_TYPE])[1][0]))
        else:
            others["exact_match"].append(float(_plain(answer) == _plain(truth)))
    scores = metric.score(*zip(*typed, strict=True))[2] if typed else {}
    means = {name: float(value) for name, value in scores.items() if not name.startswith(NOT_MEANS)}
    return means | {name: 100 * float(np.mean(values)) for name, values in others.items()}


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".").lower()


__all__ = ["ShortQuestion", "answer_conversations", "score_short_answers", "short_question"]
