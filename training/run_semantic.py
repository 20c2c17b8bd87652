"""
Train a small semantic teacher (DINOv3's architecture) on procedural rooms: what does each patch show?

    python training/run_semantic.py                                                        # minutes on two CPU cores
    python training/run_semantic.py --max_steps 10 --num_rooms 8 --num_eval_rooms 4        # smoke
    python training/run_semantic.py --resume_from_checkpoint last                          # go on after a stop

Rooms of the training, validation and test splits share no seed. Everything is written to --output_dir: checkpoints,
the teacher with its card, and `eval.json` with linear probes of its features and of raw pixels on rooms never trained
on.
"""

import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import DINOv3ViTConfig

from spa3r_hf.geometry_data import RoomGeometryDataset, room_batch_sampler, split_walks
from spa3r_hf.run_facts import RunRecord
from spa3r_hf.semantic_report import PROBED_ROOMS, write_semantic_report
from spa3r_hf.semantic_trainer import PatchCategoryModel, SemanticTrainer, probe_table
from spa3r_hf.training_arguments import (
    RoomArguments,
    RunArguments,
    checkpoint_to_resume,
    parse_with_recipe,
    read_config,
    start_run,
    usage_errors,
)


logger = logging.getLogger("run_semantic")
REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass
class SemanticArguments(RoomArguments):
    config_name: str = field(
        default=str(REPOSITORY / "hub_configs" / "dinov3-rooms-nano"),
        metadata={"help": "Folder or Hub repo with the configuration (DINOv3ViTConfig) of a new teacher."},
    )
    views_per_room: int = field(default=4, metadata={"help": "Views of a room in a batch."})
    images_per_batch: int = field(default=64, metadata={"help": "Budget of images of a batch on one device."})


@dataclass
class SemanticTrainingArguments(RunArguments):
    output_dir: str | None = field(default="outputs/semantic", metadata={"help": "Where everything is written."})
    max_steps: int = 1500
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine_with_min_lr"
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(default_factory=lambda: {"min_lr_rate": 0.02})
    warmup_steps: float = 0.05
    weight_decay: float = 0.05
    logging_steps: float = 50
    save_steps: float = 500
    save_total_limit: int | None = 2
    dataloader_num_workers: int = 1


def build_trainer(
    model: PatchCategoryModel, rooms: SemanticArguments, args: SemanticTrainingArguments
) -> SemanticTrainer:
    side: int = model.config.image_size  # type: ignore[assignment]  # the library allows (height, width) too

    def walks_of(split: str, num_rooms: int):
        return split_walks(split, num_rooms, (side, side), Path(rooms.cache_dir))

    dataset = RoomGeometryDataset(walks_of("train", rooms.num_rooms), args.seed)
    views = (rooms.views_per_room, rooms.views_per_room)
    batches_per_step = args.gradient_accumulation_steps * args.world_size
    return SemanticTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        eval_dataset=RoomGeometryDataset(walks_of(rooms.split, rooms.num_eval_rooms)).batches(8),
        probe_batches=RoomGeometryDataset(walks_of("train", min(PROBED_ROOMS, rooms.num_rooms))).batches(8),
        batch_sampler=room_batch_sampler(dataset, rooms.images_per_batch, views, batches_per_step),
    )


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    started = time.monotonic()
    with usage_errors(__name__):
        rooms, args = parse_with_recipe((SemanticArguments, SemanticTrainingArguments), argv)
        start_run(args)
        model = PatchCategoryModel(read_config("config_name", rooms.config_name, DINOv3ViTConfig))
        resume = checkpoint_to_resume(args.output_dir, args.resume_from_checkpoint)
        trainer = build_trainer(model, rooms, args)
        record = RunRecord("run_semantic.py", argv, args, resume, started)
        trainer.add_callback(record)

    trainer.train(resume_from_checkpoint=resume)
    scores = trainer.score()
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    run = {**record.facts(trainer, model.vit), **rooms.facts()}
    write_semantic_report(Path(args.output_dir), model.config, scores, run)
    logger.info("\n%s\n\nthe teacher and its card are in %s", probe_table(scores), args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
