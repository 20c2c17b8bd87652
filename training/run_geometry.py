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

import json
import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, HfArgumentParser, TrainingArguments, set_seed

from spa3r_hf import Spa3RImageProcessor, Spa3RVGGTConfig, Spa3RVGGTModel
from spa3r_hf.checkpoint_spa3r import last_checkpoint
from spa3r_hf.geometry_data import RoomGeometryDataset, split_walks
from spa3r_hf.geometry_report import geometry_table, write_geometry_report
from spa3r_hf.geometry_trainer import GeometryTrainer
from spa3r_hf.psfm_data import PSFMBatchSampler
from spa3r_hf.run_facts import run_facts, shown_command


logger = logging.getLogger("run_geometry")
REPOSITORY = Path(__file__).resolve().parent.parent
PICTURED_VIEWS = 4


@dataclass
class GeometryArguments:
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
    num_rooms: int = field(default=1500, metadata={"help": "Rooms to train on."})
    cache_dir: str = field(
        default="outputs/rooms", metadata={"help": "Where rendered rooms are kept, 3 MB each, for later runs."}
    )
    num_eval_rooms: int = field(default=32, metadata={"help": "Rooms to evaluate on."})
    split: Literal["validation", "test"] = field(default="validation", metadata={"help": "Rooms to evaluate on."})
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
class GeometryTrainingArguments(TrainingArguments):
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
    max_grad_norm: float = 1.0
    logging_steps: float = 50
    save_steps: float = 250
    save_total_limit: int | None = 2
    dataloader_num_workers: int = 1
    report_to: None | str | list[str] = "none"
    seed: int = 0
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint to go on from; 'last': the last one in output_dir."}
    )
    ddp_find_unused_parameters: bool | None = True  # the mask token of the patch embedding, for one


def build_model(args: GeometryArguments) -> Spa3RVGGTModel:
    if args.model_name_or_path:
        return Spa3RVGGTModel.from_pretrained(
            args.model_name_or_path, attn_implementation=args.attn_implementation, dtype="float32"
        )
    config = AutoConfig.from_pretrained(args.config_name, attn_implementation=args.attn_implementation)
    if not isinstance(config, Spa3RVGGTConfig):
        raise ValueError(f"config_name = {args.config_name} is a {config.model_type!r}; expected 'spa3r_vggt'")
    return Spa3RVGGTModel(config)


def note_command(output_dir: Path, command: str, resume: str | None) -> list[str]:
    """All commands that made a run so far, the one that goes on from a checkpoint last."""
    path = output_dir / "commands.json"
    commands = json.loads(path.read_text()) if resume and path.exists() else []
    if command not in commands:
        commands.append(command)
    output_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(commands, indent=2) + "\n")
    return commands


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    kinds: Any = (GeometryArguments, GeometryTrainingArguments)
    room_args, args = HfArgumentParser(kinds, allow_abbrev=False).parse_args_into_dataclasses(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    set_seed(args.seed)
    started = time.monotonic()
    output_dir = Path(args.output_dir)
    resume = args.resume_from_checkpoint
    if resume == "last":
        resume = str(last_checkpoint(output_dir))

    model = build_model(room_args)
    image_size = (model.config.image_size, model.config.image_size)
    cache_dir = Path(room_args.cache_dir)
    train_walks = split_walks("train", room_args.num_rooms, image_size, cache_dir)
    held_out = RoomGeometryDataset(split_walks(room_args.split, room_args.num_eval_rooms, image_size, cache_dir))
    batch_sampler = PSFMBatchSampler(
        room_args.num_rooms,
        room_args.images_per_batch,
        (room_args.min_views, room_args.max_views),
        args.gradient_accumulation_steps * args.world_size,
        args.seed,
    )
    trainer = GeometryTrainer(
        model=model,
        args=args,
        train_dataset=RoomGeometryDataset(train_walks, args.seed, frame_step=tuple(room_args.frame_step)),
        eval_dataset={f"{views}_views": held_out.batches(views) for views in room_args.eval_views},
        batch_sampler=batch_sampler,
        processing_class=Spa3RImageProcessor(size=model.config.image_size, patch_size=model.config.patch_size),
    )
    commands = note_command(output_dir, shown_command("run_geometry.py", argv, args.world_size), resume)
    trainer.train(resume_from_checkpoint=resume)
    scores = trainer.score()
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    run = {
        **run_facts("run_geometry.py", argv, args, model, trainer.state.global_step, started),
        "command": "; ".join(commands),
        "name": trainer.hub_model_id or output_dir.resolve().name,
        "data": f"procedural rooms 0 to {room_args.num_rooms - 1}",
        "held_out": f"{room_args.num_eval_rooms} rooms of the {room_args.split} split",
    }
    batch = trainer._prepare_inputs(held_out.batches(PICTURED_VIEWS)[0])
    write_geometry_report(output_dir, model.eval(), batch, scores, run)
    logger.info("\n%s\n\nthe backbone, its card and pictures are in %s", geometry_table(scores), output_dir)


if __name__ == "__main__":
    main()
