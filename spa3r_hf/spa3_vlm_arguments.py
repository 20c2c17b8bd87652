"""Arguments of the scripts that train vision-language models on questions: what is trained, on what, and how."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .rooms_instructions import RoomInstructions, room_instructions
from .spa3_vlm_comparison import VARIANTS
from .training_arguments import RunArguments


HUB_CONFIGS = Path(__file__).resolve().parent.parent / "hub_configs"
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Spa3VLMArguments:
    """The model, and what of it is trained."""

    vlm_name_or_path: str = field(
        default=str(HUB_CONFIGS / "nano-vlm"), metadata={"help": "The base VLM, folder or Hub repo."}
    )
    vlm_revision: str | None = field(default=None, metadata={"help": "Of the base VLM's repo."})
    spatial_encoder_name_or_path: str = field(
        default=str(HUB_CONFIGS / "spa3r-nano"),
        metadata={"help": "A Spa3R model, or, for the features of a backbone, a VGGT; folder or Hub repo."},
    )
    spatial_encoder_revision: str | None = field(default=None, metadata={"help": "Of the spatial encoder's repo."})
    adapter_name_or_path: str | None = field(
        default=None,
        metadata={"help": "An adapter to go on from, folder or Hub repo; what it was trained with is taken from it."},
    )
    integration: Literal["cross_attention", "append"] = field(
        default="cross_attention", metadata={"help": "How visual tokens get at the scene (the paper's Table 5)."}
    )
    spatial_features: Literal["latents", "backbone"] = field(
        default="latents", metadata={"help": "What is read: Spa3R's latents or VGGT's features (Table 3)."}
    )
    train: Literal["adapter", "lora", "language_model"] = field(
        default="language_model",
        metadata={"help": "The adapter alone, with LoRA on the language model, or with all of it (the paper)."},
    )
    train_merger: bool = field(default=False, metadata={"help": "Train the VLM's vision merger as well."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA."})
    lora_alpha: int = field(default=32, metadata={"help": "Its scale is alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the LoRA."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(LORA_TARGETS), metadata={"help": "Which layers of the language model have one."}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={
            "help": "Of the VLM's weights. auto: as they were saved, or float32 where they are trained, since small "
            "steps vanish in bfloat16 (--bf16 computes in it all the same)."
        },
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager, sdpa, flash_attention_2, ..."})


@dataclass
class InstructionArguments:
    """The data, and how it is seen."""

    data: list[str] = field(
        default_factory=list,
        metadata={"help": "JSON or JSONL files of records; 'file.json%%25' takes a quarter of one in every epoch."},
    )
    eval_data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "The same, to be scored on: at the end, and while it trains as --eval_strategy says. Of "
            "'file.json%%25' it is always the same quarter."
        },
    )
    media_dir: str | None = field(
        default=None, metadata={"help": "What the records' paths are relative to. Default: the folder of each file."}
    )
    seconds_per_frame: float = field(default=2.0, metadata={"help": "A frame of a video every so many seconds,"})
    min_frames: int = field(default=4, metadata={"help": "but at least so many,"})
    max_frames: int = field(default=8, metadata={"help": "and at most so many."})
    image_size: int | None = field(default=None, metadata={"help": "Width in pixels. Default: the encoder's."})
    max_length: int = field(
        default=8192,
        metadata={"help": "The most tokens of a sample. Nothing is cut off: longer ones are bad samples."},
    )
    on_bad_sample: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "What to do about samples that cannot be used; skipped ones are named."}
    )
    latents_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where what the encoder makes of each scene is kept for later epochs and runs. None: nowhere."
        },
    )
    latents_dtype: Literal["float16", "bfloat16", "float32"] = field(
        default="float16", metadata={"help": "What latents are kept in."}
    )


@dataclass
class RoomQuestionArguments:
    """Questions about procedural rooms, where there is no other data."""

    num_rooms: int = field(default=160, metadata={"help": "Procedural rooms to train on."})
    num_eval_rooms: int = field(default=40, metadata={"help": "Rooms that questions are asked about afterwards."})
    questions_per_type: int = field(default=8, metadata={"help": "Of each room, before they are balanced."})
    questions_per_conversation: int = field(default=4, metadata={"help": "Learnt together, from one look at a room."})
    eval_questions: int = field(default=400, metadata={"help": "About the rooms held out, of all types together."})
    rooms_dir: str = field(
        default="outputs/room_questions", metadata={"help": "Where questions and frames are kept for later runs."}
    )
    num_workers: int = field(default=2, metadata={"help": "Processes that make questions and frames."})

    def make(self, image_size: int, num_frames: int, seed: int) -> RoomInstructions:
        """See `room_instructions`."""
        return room_instructions(
            Path(self.rooms_dir),
            self.num_rooms,
            self.num_eval_rooms,
            image_size,
            num_frames,
            self.questions_per_type,
            seed,
            self.num_workers,
        )


@dataclass
class ComparisonArguments(RoomQuestionArguments):
    variants: list[str] = field(
        default_factory=lambda: list(VARIANTS), metadata={"help": f"What is compared: some of {', '.join(VARIANTS)}."}
    )


@dataclass
class InstructionTrainingArguments(RunArguments):
    """The paper's setting."""

    output_dir: str | None = field(default="outputs/spa3_vlm", metadata={"help": "Where everything is written."})
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 8
    learning_rate: float = 1e-5
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    logging_steps: float = 10
    ddp_find_unused_parameters: bool | None = False  # all that are trained are used


__all__ = [
    "ComparisonArguments",
    "InstructionArguments",
    "InstructionTrainingArguments",
    "RoomQuestionArguments",
    "Spa3VLMArguments",
]
