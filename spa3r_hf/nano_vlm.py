"""A fresh vision-language model of Qwen2.5-VL's architecture at nano size, with a tokenizer of its own."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)


END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
_SPECIAL = (END_OF_TEXT, START, END, VISION_START, VISION_END, IMAGE, VIDEO)
PATCH_SIZE, MERGE_SIZE = 14, 2

# Turns as Qwen's models have them; a system prompt only where there is one.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for entry in message.content %}"
    "{% if entry.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ entry.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocabulary_size: int = 1024) -> PreTrainedTokenizerFast:
    """
    A byte-level BPE tokenizer learnt from some texts; each digit is a token, so that numbers are spelt out.

    Args:
        texts: What it is to be good at; it can write anything.
        vocabulary_size: At most, with the 256 bytes and the special tokens.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = PreTokenizers([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = ByteLevelDecoder()
    special = [AddedToken(token, special=True, normalized=False) for token in _SPECIAL]
    trainer = BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=special,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=END_OF_TEXT,
        eos_token=END,
        padding_side="right",
        chat_template=_CHAT_TEMPLATE,
    )


def nano_vlm_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """About 1.4 million parameters; a visual token is 28 x 28 pixels."""
    ids: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True,
        "pad_token_id": ids[END_OF_TEXT],
        "bos_token_id": None,
        "eos_token_id": ids[END],
    }
    vision = {
        "depth": 3,
        "hidden_size": 96,
        "out_hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": MERGE_SIZE,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [0, 1, 2],
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
    )


def fresh_nano_vlm(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """With random weights, from torch's global generator, in float32."""
    model = Qwen2_5_VLForConditionalGeneration(nano_vlm_config(tokenizer))
    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    return model


def save_nano_vlm(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what the repository of a VLM holds, weights in bfloat16, half the size. The model stays in float32."""
    nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)
    nn.Module.to(model, torch.float32)
    tokenizer.save_pretrained(folder)
    # By hand, as no class of processor can be made where torchvision is missing.
    images = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": PATCH_SIZE,
        "merge_size": MERGE_SIZE,
        "temporal_patch_size": 2,
        "min_pixels": (PATCH_SIZE * MERGE_SIZE) ** 2,
        "max_pixels": 1024 * (PATCH_SIZE * MERGE_SIZE) ** 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")


__all__ = ["fresh_nano_vlm", "nano_vlm_config", "save_nano_vlm", "train_tokenizer"]
