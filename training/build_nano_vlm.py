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
from typing import Any

from transformers import AutoModelForImageTextToText, AutoTokenizer, set_seed

from spa3r_hf import Spa3AdapterConfig, Spa3RImageProcessor, Spa3VLMProcessor, get_spa3_vlm
from spa3r_hf.instruction_data import InstructionData, InstructionSet, messages_of
from spa3r_hf.instruction_evaluation import answer_conversations
from spa3r_hf.model_card import benchmark_metrics, measured, paragraph, write_teacher_card
from spa3r_hf.nano_vlm import fresh_nano_vlm, save_nano_vlm, train_tokenizer
from spa3r_hf.rooms_instructions import RoomInstructions
from spa3r_hf.run_facts import RunRecord
from spa3r_hf.spa3_vlm_arguments import HUB_CONFIGS, RoomQuestionArguments
from spa3r_hf.spa3_vlm_comparison import comparison_table, pick_evenly, score_answers, score_guessing
from spa3r_hf.spa3_vlm_trainer import instruction_trainer
from spa3r_hf.training_arguments import (
    RunArguments,
    checkpoint_to_resume,
    parse_with_recipe,
    start_run,
    usage_errors,
)


logger = logging.getLogger("build_nano_vlm")
USE = """from transformers import AutoModelForImageTextToText

from spa3r_hf import Spa3VLMProcessor

vlm = AutoModelForImageTextToText.from_pretrained("nano-vlm")
processor = Spa3VLMProcessor.from_vlm("nano-vlm")"""


@dataclass
class NanoArguments(RoomQuestionArguments):
    num_rooms: int = field(default=400, metadata={"help": "Rooms to train on."})
    questions_per_type: int = field(default=12, metadata={"help": "Of each room, before they are balanced."})
    questions_per_conversation: int = field(default=6, metadata={"help": "Learnt together, from one look at a room."})
    num_frames: int = field(default=8, metadata={"help": "Of each room."})
    image_size: int = field(default=112, metadata={"help": "Side of the frames in pixels."})
    vocabulary_size: int = field(default=1024, metadata={"help": "Of the tokenizer, at most."})
    vlm_dir: str = field(default=str(HUB_CONFIGS / "nano-vlm"), metadata={"help": "Where the VLM is written."})


@dataclass
class NanoTrainingArguments(RunArguments):
    output_dir: str | None = field(default="outputs/nano-vlm", metadata={"help": "Where checkpoints are written."})
    max_steps: int = 800
    per_device_train_batch_size: int = 8
    learning_rate: float = 1.5e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    weight_decay: float = 0.05
    logging_steps: float = 50
    save_steps: float = 100
    save_total_limit: int | None = 2
    dataloader_num_workers: int = 1


def make_repository(folder: Path, rooms: RoomInstructions, vocabulary_size: int) -> None:
    """A fresh VLM with its tokenizer."""
    texts = [turn["value"] for record in rooms.records(rooms.train) for turn in record["conversations"]]
    tokenizer = train_tokenizer(texts, vocabulary_size)
    save_nano_vlm(folder, fresh_nano_vlm(tokenizer), tokenizer)


def write_report(folder: Path, results: dict[str, Any], run: dict[str, Any]) -> None:
    """Write `eval.json`, `run.json` and the card."""
    for name, content in (("eval.json", results), ("run.json", run)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    write_teacher_card(
        folder,
        run,
        summary=paragraph(
            "A vision-language model of Qwen2.5-VL's architecture at nano size, trained from nothing to answer "
            "VSI-Bench's questions about procedural rooms: a base for the nano Spa3-VLM, and of no other use."
        ),
        use=USE,
        results=f"VSI-Bench's scores on rooms that were never trained on.\n\n{comparison_table(results)}\n",
        eval_results=measured(
            results,
            benchmark_metrics(results["untrained"], prefix="untrained."),
            task="visual-question-answering",
            data="VSI-Bench's questions about procedural rooms",
        ),
        tags=["vision-language-model", "nano"],
        pipeline_tag="image-text-to-text",
    )


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    started = time.monotonic()
    with usage_errors(__name__):
        nano, args = parse_with_recipe((NanoArguments, NanoTrainingArguments), argv)
        start_run(args)
        resume = checkpoint_to_resume(args.output_dir, args.resume_from_checkpoint)
    rooms = nano.make(nano.image_size, nano.num_frames, args.seed)
    asked = pick_evenly(rooms.held_out, nano.eval_questions)
    logger.info("%d questions to learn from, %d to be scored on", len(rooms.train), len(asked))

    set_seed(args.seed)  # whatever making the rooms has drawn
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
    record = RunRecord("build_nano_vlm.py", argv, args, resume, started)
    trainer.add_callback(record)
    trainer.train(resume_from_checkpoint=resume)
    save_nano_vlm(folder, vlm, AutoTokenizer.from_pretrained(fresh))

    # What is scored is what was written: those weights have been rounded.
    prompts = [messages_of(record, Path(), "question")[:-1] for record in rooms.records(asked)]
    answers = answer_conversations(model, processor, prompts, None)
    results = score_guessing(rooms.train, asked) | {"untrained": score_answers(asked, answers)}
    run = {
        **record.facts(trainer, vlm),
        "name": folder.name,
        "data": f"{len(rooms.train)} questions about {nano.num_rooms} procedural rooms",
    }
    write_report(folder, results, run)
    logger.info("\n%s\n\nthe VLM and its card are in %s", comparison_table(results), folder)


if __name__ == "__main__":
    main()
