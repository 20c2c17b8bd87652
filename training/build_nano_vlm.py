"""
Build the nano VLM: Qwen2.5-VL's architecture at nano size, its own tokenizer, trained on questions about rooms.

    python training/build_nano_vlm.py                                                                   # hours
    python training/build_nano_vlm.py --max_steps 2 --num_rooms 4 --num_eval_rooms 2 --vlm_dir /tmp/nano-vlm  # smoke
    python training/build_nano_vlm.py --resume_from_checkpoint last                                # go on after a stop

All of it is trained, the vision tower too, on procedural rooms of the training split, without their geometry. The VLM
is written to --vlm_dir (3 MB, bfloat16), checkpoints to --output_dir.
"""

import json
import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoTokenizer, TrainingArguments, set_seed
from transformers.utils.logging import disable_progress_bar

from spa3r_hf import Spa3AdapterConfig, Spa3RImageProcessor, Spa3VLMProcessor, get_spa3_vlm
from spa3r_hf.instruction_data import InstructionData, InstructionSet, messages_of
from spa3r_hf.model_card import write_teacher_card
from spa3r_hf.nano_vlm import fresh_nano_vlm, save_nano_vlm, train_tokenizer
from spa3r_hf.rooms_instructions import RoomInstructions, room_instructions
from spa3r_hf.run_facts import run_facts
from spa3r_hf.spa3_vlm_comparison import (
    answer_conversations,
    comparison_table,
    pick_evenly,
    score_answers,
    score_guessing,
)
from spa3r_hf.spa3_vlm_trainer import instruction_trainer
from spa3r_hf.training_arguments import checkpoint_to_resume, parse_with_recipe


logger = logging.getLogger("build_nano_vlm")
REPOSITORY = Path(__file__).resolve().parent.parent
USE = """from transformers import AutoModelForImageTextToText

from spa3r_hf import Spa3VLMProcessor

vlm = AutoModelForImageTextToText.from_pretrained("nano-vlm")
processor = Spa3VLMProcessor.from_vlm("nano-vlm")"""


@dataclass
class NanoArguments:
    num_rooms: int = field(default=600, metadata={"help": "Rooms to train on."})
    num_eval_rooms: int = field(default=40, metadata={"help": "Rooms to be scored on."})
    num_frames: int = field(default=12, metadata={"help": "Of each room."})
    image_size: int = field(default=112, metadata={"help": "Side of the frames in pixels."})
    questions_per_type: int = field(default=12, metadata={"help": "Of each room, before they are balanced."})
    questions_per_conversation: int = field(default=6, metadata={"help": "Learnt together, from one look at a room."})
    eval_questions: int = field(default=400, metadata={"help": "About the rooms held out, of all types together."})
    vocabulary_size: int = field(default=1024, metadata={"help": "Of the tokenizer, at most."})
    rooms_dir: str = field(
        default="outputs/room_questions", metadata={"help": "Where questions and frames are kept for later runs."}
    )
    num_workers: int = field(default=2, metadata={"help": "Processes that make questions and frames."})
    vlm_dir: str = field(
        default=str(REPOSITORY / "hub_configs" / "nano-vlm"), metadata={"help": "Where the VLM is written."}
    )


@dataclass
class NanoTrainingArguments(TrainingArguments):
    output_dir: str | None = field(default="outputs/nano-vlm", metadata={"help": "Where checkpoints are written."})
    max_steps: int = 4000
    per_device_train_batch_size: int = 8
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    weight_decay: float = 0.05
    logging_steps: float = 50
    save_steps: float = 250
    save_total_limit: int | None = 2
    dataloader_num_workers: int = 1
    report_to: None | str | list[str] = "none"
    seed: int = 0
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint to go on from; 'last': the last one in output_dir."}
    )


def make_repository(folder: Path, rooms: RoomInstructions, vocabulary_size: int) -> None:
    """A fresh VLM with its tokenizer."""
    texts = [turn["value"] for record in rooms.records(rooms.train) for turn in record["conversations"]]
    tokenizer = train_tokenizer(texts, vocabulary_size)
    save_nano_vlm(folder, fresh_nano_vlm(tokenizer), tokenizer)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    nano, args = parse_with_recipe((NanoArguments, NanoTrainingArguments), argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    disable_progress_bar()
    started = time.monotonic()
    resume = checkpoint_to_resume(args.output_dir, args.resume_from_checkpoint)
    rooms = room_instructions(
        Path(nano.rooms_dir),
        nano.num_rooms,
        nano.num_eval_rooms,
        nano.image_size,
        nano.num_frames,
        nano.questions_per_type,
        args.seed,
        nano.num_workers,
    )
    asked = pick_evenly(rooms.held_out, nano.eval_questions)
    logger.info("%d questions to learn from, %d to be scored on", len(rooms.train), len(asked))

    set_seed(args.seed)
    folder, fresh = Path(nano.vlm_dir), Path(args.output_dir) / "fresh"
    make_repository(fresh, rooms, nano.vocabulary_size)
    spatial = Spa3RImageProcessor(size=nano.image_size)
    processor = Spa3VLMProcessor.from_vlm(fresh, spatial, min_frames=nano.num_frames, max_frames=nano.num_frames)
    vlm = AutoModelForImageTextToText.from_pretrained(fresh, dtype="float32")
    # The trainer is Spa3-VLM's; there are no scenes, and the adapter has no part in anything.
    model = get_spa3_vlm(vlm, None, Spa3AdapterConfig(spatial_hidden_size=1))
    vlm.requires_grad_(True)
    records = rooms.records(rooms.train, nano.questions_per_conversation, args.seed)
    data = InstructionData([InstructionSet("questions about rooms", records)], args.seed)
    trainer = instruction_trainer(model, processor, data, args, scene_encoder=None)
    trainer.train(resume_from_checkpoint=resume)
    save_nano_vlm(folder, vlm, AutoTokenizer.from_pretrained(fresh))

    # What is scored is what was written: those weights have been rounded.
    prompts = [messages_of(record, Path(), "question")[:-1] for record in rooms.records(asked)]
    answers = answer_conversations(model, processor, prompts, None)
    results = score_guessing(rooms.train, asked) | {"untrained": score_answers(asked, answers)}
    run = {
        **run_facts("build_nano_vlm.py", argv, args, vlm, trainer.state.global_step, started),
        "name": folder.name,
        "data": f"{len(rooms.train)} questions about {nano.num_rooms} procedural rooms",
    }
    (folder / "eval.json").write_text(json.dumps(results, indent=2) + "\n")
    write_teacher_card(
        folder,
        run,
        summary=(
            "A vision-language model of Qwen2.5-VL's architecture at nano size, trained from nothing to answer "
            "VSI-Bench's questions about procedural rooms: a base for the nano Spa3-VLM, and of no other use."
        ),
        use=USE,
        results=f"VSI-Bench's scores on rooms that were never trained on.\n\n{comparison_table(results)}\n",
        tags=["vision-language-model", "nano"],
        pipeline_tag="image-text-to-text",
    )
    logger.info("\n%s\n\nthe VLM and its card are in %s", comparison_table(results), folder)


if __name__ == "__main__":
    main()
