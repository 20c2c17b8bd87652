"""What a VLM's repository holds for its processor, for the tiny VLMs of `tiny_vlms`, made by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_vlms import BOS, CONFIGS, END, EOS, IMAGE, PAD, START, VIDEO, VOCABULARY
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from spa3r_hf import Spa3RImageProcessor, Spa3VLMProcessor


UNKNOWN, FAKE, GLOBAL, UTTERANCE = 3, 94, 95, 96
_QWEN = {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>", START: "<|vision_start|>", END: "<|vision_end|>"}
_IDEFICS = {
    **{IMAGE: "<image>", VIDEO: "<video>", FAKE: "<fake_token_around_image>"},
    **{GLOBAL: "<global-img>", UTTERANCE: "<end_of_utterance>"},
}
TOKENS = {
    **{"qwen2_vl": _QWEN, "qwen2_5_vl": _QWEN, "qwen3_vl": _QWEN, "idefics3": _IDEFICS, "smolvlm": _IDEFICS},
    "llava_onevision": {IMAGE: "<image>", VIDEO: "<video>"},
    "internvl": {IMAGE: "<IMG_CONTEXT>", VIDEO: "<video>", START: "<img>", END: "</img>"},
    "gemma3": {IMAGE: "<image_soft_token>", START: "<start_of_image>", END: "<end_of_image>"},
}
# By these names the families' processors ask their tokenizers for them.
_NAMES = {
    "internvl": {
        **{"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"},
        "video_token": "<video>",
    },
    "gemma3": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
}
PICTURE = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "<|vision_start|><|image_pad|><|vision_end|>"),
    **dict.fromkeys(("idefics3", "smolvlm", "llava_onevision"), "<image>"),
    **{"internvl": "<IMG_CONTEXT>\n", "gemma3": "<start_of_image>"},
}
_SIZE = {"height": 4, "width": 4}
_QWEN_IMAGES = {
    **{"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 2, "merge_size": 2, "temporal_patch_size": 2},
    # Had they a say, both would have pictures resized.
    **{"min_pixels": 65536, "max_pixels": 131072},
}
IMAGE_PROCESSORS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), _QWEN_IMAGES),
    "llava_onevision": {
        **{"image_processor_type": "LlavaOnevisionImageProcessor", "size": _SIZE, "image_grid_pinpoints": [[4, 4]]},
    },
    "internvl": {"image_processor_type": "GotOcr2ImageProcessor", "size": _SIZE, "crop_to_patches": True},
    "idefics3": {
        **{"image_processor_type": "Idefics3ImageProcessor", "size": {"longest_edge": 8}},
        **{"max_image_size": {"longest_edge": 4}, "do_image_splitting": True},
    },
    "smolvlm": {
        **{"image_processor_type": "SmolVLMImageProcessor", "size": {"longest_edge": 8}},
        **{"max_image_size": {"longest_edge": 4}, "do_image_splitting": True},
    },
    "gemma3": {"image_processor_type": "Gemma3ImageProcessor", "size": _SIZE},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "llava_onevision": {"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
    "internvl": {"image_seq_length": 4},
    "idefics3": {"image_seq_len": 4},
    "smolvlm": {"image_seq_len": 4},
    "gemma3": {"image_seq_length": 4},
}


def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """One id for each of the words w10 to w79, and for what the family has special tokens for."""
    special = {PAD: "<pad>", BOS: "<bos>", EOS: "<eos>", UNKNOWN: "<unk>", **TOKENS[family]}
    words = [f"w{index}" for index in range(VOCABULARY)]
    words[4:7] = ["user", "assistant", ":"]
    for index, token in special.items():
        words[index] = token
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(list(special.values()))
    if family == "gemma3":  # whose template writes it as well
        tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"},
        extra_special_tokens=_NAMES.get(family, {}),
        padding_side="right",
    )


def chat_template(family: str) -> str:
    """Each message on its own, its pictures where they are; LLaVA-OneVision's come first, as in its own template."""
    picture = (
        "{% for message in messages %}{{ message.role }} : {% if message.content is string %}{{ message.content }}"
        "{% else %}{% for entry in message.content %}{% if entry.type == 'image' %}PICTURE{% else %}{{ entry.text }} "
        "{% endif %}{% endfor %}{% endif %} <eos>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    return ("{{ bos_token }}" if family == "gemma3" else "") + picture.replace("PICTURE", PICTURE[family])


def tiny_vlm_folder(family: str, folder: Path) -> Path:
    """A VLM's repository without its weights, its files as those on the Hub are."""
    CONFIGS[family]().save_pretrained(folder)
    tokenizer = tiny_tokenizer(family)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_PROCESSORS[family]))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": chat_template(family)}))
    if family in OPTIONS:
        (folder / "processor_config.json").write_text(json.dumps(OPTIONS[family]))
    return folder


class Processors(dict):
    """
    A processor of every family, made when it is asked for.

    Args:
        root: Where their VLMs' folders are made.
        size: Of the encoder's pictures.
        options: Of the processors.
    """

    def __init__(self, root: Path, size: int, **options: Any):
        super().__init__()
        self.root, self.size, self.options = root, size, options

    def __missing__(self, family: str) -> Spa3VLMProcessor:
        folder = tiny_vlm_folder(family, self.root / family)
        try:
            self[family] = Spa3VLMProcessor.from_vlm(folder, Spa3RImageProcessor(size=self.size), **self.options)
        except ValueError as error:
            if "Could not load any image processor" not in str(error):
                raise
            pytest.skip(f"this version of transformers needs torchvision for {family}")  # 5.17: Idefics3, SmolVLM
        return self[family]
