"""Questions about a scene, answered by a vision-language model with and without Spa3R's latents."""

import re
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import torch
from PIL import Image
from torch import Tensor

from spa3r_hf import Spa3VLM, Spa3VLMProcessor


MAX_NEW_TOKENS = 32
TYPES = {
    "object_counting": "Counting",
    "object_abs_distance": "Distance",
    "object_size_estimation": "Size",
    "room_size_estimation": "Size of the room",
    "object_rel_distance": "What is closest",
    "object_rel_direction_easy": "Direction, easy",
    "object_rel_direction_medium": "Direction, medium",
    "object_rel_direction_hard": "Direction, hard",
    "route_planning": "Route",
    "obj_appearance_order": "Order of appearance",
}
"""VSI-Bench's types of questions, and what they are called here."""

GENERIC = [
    {"type": question_type, "text": text}
    for question_type, text in {
        "object_counting": "How many chair(s) are in this room?",
        "object_abs_distance": "Measuring from the closest point of each object, what is the distance between the "
        "table and the door (in meters)?",
        "object_size_estimation": "What is the length of the longest dimension (length, width, or height) of the "
        "table, measured in centimeters?",
        "room_size_estimation": "What is the size of this room (in square meters)? \nIf multiple rooms are shown, "
        "estimate the size of the combined space.",
        "object_rel_distance": "Measuring from the closest point of each object, which of these objects (chair, "
        "window, lamp) is the closest to the door?\nA. chair\nB. window\nC. lamp",
        "object_rel_direction_easy": "If I am standing by the door and facing the window, is the table to the left or "
        "the right of the window?\nA. left\nB. right",
        "object_rel_direction_medium": "If I am standing by the door and facing the window, is the table to my left, "
        "right, or back?\nAn object is to my back if I would have to turn at least 135 degrees in order to face it."
        "\nA. left\nB. right\nC. back",
        "object_rel_direction_hard": "If I am standing by the door and facing the window, is the table to my "
        "front-left, front-right, back-left, or back-right?\nThe directions refer to the quadrants of a Cartesian "
        "plane (if I am standing at the origin and facing along the positive y-axis).\nA. front-left\nB. front-right"
        "\nC. back-left\nD. back-right",
        "route_planning": "You are a robot beginning at the door and facing the window. You want to navigate to the "
        "table. You will perform the following actions (Note: for each [please fill in], choose either 'turn back,' "
        "'turn left,' or 'turn right.'): 1. [please fill in] 2. Go forward until the table. You have reached the "
        "final destination.\nA. Turn Left\nB. Turn Right\nC. Turn Back",
        "obj_appearance_order": "What will be the first-time appearance order of the following categories in the "
        "video: chair, door, lamp, window?\nA. chair, door, lamp, window\nB. door, chair, window, lamp\nC. lamp, "
        "window, door, chair\nD. window, lamp, chair, door",
    }.items()
]
"""One question of each type for scenes of which nothing is known, so without an answer."""


def prompt_of(text: str) -> str:
    """A question as VSI-Bench puts it to a model; lines "A. ..." at its end are its options."""
    question, *options = re.split(r"\n(?=[A-D]\. )", text)
    if options:
        end = ["Options:", *options, "Answer with the option's letter from the given choices directly."]
    else:
        end = ["Please answer the question using a single word or phrase."]
    return "\n".join(["These are frames of a video.", question, *end])


def spelt_out(answer: str, question: str) -> str:
    """An answer to be shown: a lone letter with its option, and something where there is nothing."""
    letter = re.fullmatch(r"([A-D])\.?", answer)
    option = re.search(rf"^{letter[1]}\. .*$", question, re.MULTILINE) if letter else None
    return option[0] if option else answer or "(no answer)"


class Asker:
    """
    A Spa3-VLM with its processor, for all visitors.

    Args:
        adapter: A folder or the id of a Hub repository. Its configuration names the VLM and the spatial encoder.
        device: Such as "cuda".

    Raises:
        OSError: Files are missing.
        ValueError: They are no Spa3-VLM's.
    """

    def __init__(self, adapter: str | Path, device: str = "cpu"):
        self.model = Spa3VLM.from_pretrained(adapter, dtype=torch.float32).to(device)
        self.processor = Spa3VLMProcessor.from_pretrained(adapter)
        # While it runs, a Spa3-VLM's forward is not to be entered by another thread.
        self._lock = Lock()

    @torch.no_grad()
    def encode(self, views: Sequence[Image.Image]) -> Tensor:
        """What the VLM's visual tokens read of a scene, of the views that it sees: (1, Q, D)."""
        pixels = self._inputs(views, "")["spatial_pixel_values"]
        return self.model.get_spatial_latents(pixels)

    @torch.no_grad()
    def answer(self, views: Sequence[Image.Image], question: str, latents: Tensor | None) -> str:
        """
        Greedily, in at most `MAX_NEW_TOKENS` tokens.

        Args:
            views: Pictures of one size.
            question: See `prompt_of`.
            latents: See `encode`. None: the VLM alone is asked, without its adapter.

        Returns:
            The answer, see `spelt_out`.
        """
        inputs = self._inputs(views, prompt_of(question)).to(self.model.device)
        inputs.pop("spatial_pixel_values")
        length = inputs["input_ids"].shape[1]
        settings = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
        with self._lock:
            if latents is None:
                with self.model.disable_adapter():
                    output = self.model.generate(**inputs, **settings)
            else:
                output = self.model.generate(**inputs, spatial_latents=latents, **settings)
        answer = self.processor.decode(output[0, length:], skip_special_tokens=True)
        return spelt_out(answer.strip(), question)

    def _inputs(self, views: Sequence[Image.Image], prompt: str):
        content = [{"type": "video", "video": list(views)}, {"type": "text", "text": prompt}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
