"""
Train a geometry backbone (VGGT) on procedural rooms: cameras, depth and points, from pictures.

    python training/run_geometry.py                                                        # the nano backbone: hours
    python training/run_geometry.py --max_steps 10 --num_rooms 8 --num_eval_rooms 4        # smoke
    python training/run_geometry.py --resume_from_checkpoint last                          # go on after a stop
    torchrun --nproc_per_node 2 training/run_geometry.py --use_cpu --bf16                  # one process a core

Rooms of the training, validation and test splits share no seed. Everything is written to --output_dir: checkpoints,
the backbone with its card and pictures, and `eval.json` with its scores on rooms never trained on, next to trivial
baselines.
"""

import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spa3r_hf import Spa3RImageProcessor, Spa3RVGGTConfig, Spa3RVGGTModel
from spa3r_hf.feature_scale import feature_spread, scale_features
from spa3r_hf.geometry_data import RoomGeometryDataset, room_batch_sampler, split_walks
from spa3r_hf.geometry_report import geometry_table, write_geometry_report
from spa3r_hf.geometry_trainer import GeometryTrainer
from spa3r_hf.run_facts import RunRecord
from spa3r_hf.training_arguments import (
    RoomArguments,
    RunArguments,
    checkpoint_to_resume,
    parse_with_recipe,
    read_config,
    start_run,
    usage_errors,
)


logger = logging.getLogger("run_geometry")
REPOSITORY = Path(__file__).resolve().parent.parent
PICTURED_VIEWS = 4


@dataclass
class GeometryArguments(RoomArguments):
    config_name: str = field(
        default=str(REPOSITORY / "hub_configs" / "vggt-nano"),
        metadata={"help": "Folder or Hub repo with the configuration of a new backbone."},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A backbone to go on from, folder or Hub repo, instead of a new one."}
    )
    attn_implementation: str = field(
        default="eager", metadata={"help": "eager is fastest on CPU at nano size; sdpa, flash_attention_2, ..."}
    )
    min_views: int = field(default=2, metadata={"help": "Fewest views of a sample."})
    max_views: int = field(default=8, metadata={"help": "Most views of a sample."})
    frame_step: list[int] = field(
        default_factory=lambda: [1, 4], metadata={"help": "Lowest and highest distance of views along the walk."}
    )
    images_per_batch: int = field(default=32, metadata={"help": "Budget of images of a batch on one device."})
    eval_views: list[int] = field(
        default_factory=lambda: [2, 4, 8], metadata={"help": "Numbers of views to evaluate with."}
    )


@dataclass
class GeometryTrainingArguments(RunArguments):
    output_dir: str | None = field(default="outputs/geometry", metadata={"help": "Where everything is written."})
    max_steps: int = 10000
    learning_rate: float = 6e-4
    # The rate stays up until the last steps, so that a run can be made longer when it goes on.
    lr_scheduler_type: str = "warmup_stable_decay"
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default_factory=lambda: {"num_decay_steps": 1000, "decay_type": "1-sqrt", "min_lr_ratio": 0.01}
    )
    warmup_steps: float = 100
    weight_decay: float = 0.05
    adam_beta2: float = 0.95
    logging_steps: float = 50
    save_steps: float = 250
    save_total_limit: int | None = 2
    dataloader_num_workers: int = 1
    ddp_find_unused_parameters: bool | None = True  # the mask token of the patch embedding, for one


def build_model(args: GeometryArguments) -> Spa3RVGGTModel:
    options: dict[str, Any] = {"attn_implementation": args.attn_implementation}
    if args.model_name_or_path:
        read_config("model_name_or_path", args.model_name_or_path, Spa3RVGGTConfig)
        return Spa3RVGGTModel.from_pretrained(args.model_name_or_path, dtype="float32", **options)
    return Spa3RVGGTModel(read_config("config_name", args.config_name, Spa3RVGGTConfig, **options))


def build_trainer(
    model: Spa3RVGGTModel, rooms: GeometryArguments, args: GeometryTrainingArguments, held_out: RoomGeometryDataset
) -> GeometryTrainer:
    config = model.config
    walks = split_walks("train", rooms.num_rooms, (config.image_size, config.image_size), Path(rooms.cache_dir))
    dataset = RoomGeometryDataset(walks, args.seed, frame_step=tuple(rooms.frame_step))  # type: ignore[arg-type]
    batches_per_step = args.gradient_accumulation_steps * args.world_size
    return GeometryTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        eval_dataset={f"{views}_views": held_out.batches(views) for views in rooms.eval_views},
        batch_sampler=room_batch_sampler(
            dataset, rooms.images_per_batch, (rooms.min_views, rooms.max_views), batches_per_step
        ),
        processing_class=Spa3RImageProcessor(size=config.image_size, patch_size=config.patch_size),
    )


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    started = time.monotonic()
    with usage_errors(__name__):
        rooms, args = parse_with_recipe((GeometryArguments, GeometryTrainingArguments), argv)
        start_run(args)
        resume = checkpoint_to_resume(args.output_dir, args.resume_from_checkpoint)
        if resume:
            read_config("resume_from_checkpoint", resume, Spa3RVGGTConfig)
        model = build_model(rooms)
        image_size = (model.config.image_size, model.config.image_size)
        held_out_walks = split_walks(rooms.split, rooms.num_eval_rooms, image_size, Path(rooms.cache_dir))
        held_out = RoomGeometryDataset(held_out_walks)
        trainer = build_trainer(model, rooms, args, held_out)
        record = RunRecord("run_geometry.py", argv, args, resume, started)
        trainer.add_callback(record)

    trainer.train(resume_from_checkpoint=resume)
    batch = trainer._prepare_inputs(held_out.batches(PICTURED_VIEWS)[0])
    scale_features(model, 1 / feature_spread(model, batch["pixel_values"]))
    scores = trainer.score()
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    run = {**record.facts(trainer, model), **rooms.facts()}
    write_geometry_report(Path(args.output_dir), model.eval(), batch, scores, run)
    logger.info("\n%s\n\nthe backbone, its card and pictures are in %s", geometry_table(scores), args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
