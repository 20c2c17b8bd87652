"""
Train a small semantic teacher (DINOv3's architecture) on procedural rooms: what does each patch show?

    python training/run_semantic.py                                                        # minutes on two CPU cores
    python training/run_semantic.py --max_steps 10 --num_rooms 8 --num_eval_rooms 4        # smoke
    python training/run_semantic.py --resume_from_checkpoint last                          # go on after a stop

Rooms of the training, validation and test splits share no seed. Everything is written to --output_dir: checkpoints,
the teacher with its card, and `eval.json` with linear probes of its features and of raw pixels on rooms never trained
on.
"""

import json
import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, DINOv3ViTConfig, HfArgumentParser, TrainingArguments, set_seed

from spa3r_hf.checkpoint_spa3r import last_checkpoint
from spa3r_hf.geometry_data import RoomGeometryDataset, split_walks
from spa3r_hf.model_card import write_teacher_card
from spa3r_hf.psfm_data import PSFMBatchSampler
from spa3r_hf.run_facts import run_facts
from spa3r_hf.semantic_trainer import MIN_SHARE, PatchCategoryModel, SemanticTrainer, probe_table


logger = logging.getLogger("run_semantic")
REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass
class SemanticArguments:
    config_name: str = field(
        default=str(REPOSITORY / "hub_configs" / "dinov3-rooms-nano"),
        metadata={"help": "Folder or Hub repo with the configuration (DINOv3ViTConfig) of a new teacher."},
    )
    num_rooms: int = field(default=1500, metadata={"help": "Rooms to train on."})
    cache_dir: str = field(
        default="outputs/rooms", metadata={"help": "Where rendered rooms are kept, 3 MB each, for later runs."}
    )
    num_eval_rooms: int = field(default=32, metadata={"help": "Rooms to evaluate on."})
    split: Literal["validation", "test"] = field(default="validation", metadata={"help": "Rooms to evaluate on."})
    views_per_room: int = field(default=4, metadata={"help": "Views of a room in a batch."})
    images_per_batch: int = field(default=64, metadata={"help": "Budget of images of a batch on one device."})


@dataclass
class SemanticTrainingArguments(TrainingArguments):
    output_dir: str | None = field(default="outputs/semantic", metadata={"help": "Where everything is written."})
    max_steps: int = 1500
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine_with_min_lr"
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(default_factory=lambda: {"min_lr_rate": 0.02})
    warmup_steps: float = 0.05
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    logging_steps: float = 50
    save_steps: float = 500
    save_total_limit: int | None = 2
    dataloader_num_workers: int = 1
    report_to: None | str | list[str] = "none"
    seed: int = 0
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint to go on from; 'last': the last one in output_dir."}
    )


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    kinds: Any = (SemanticArguments, SemanticTrainingArguments)
    room_args, args = HfArgumentParser(kinds, allow_abbrev=False).parse_args_into_dataclasses(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    set_seed(args.seed)
    started = time.monotonic()
    output_dir = Path(args.output_dir)
    resume = args.resume_from_checkpoint
    if resume == "last":
        resume = str(last_checkpoint(output_dir))

    config = AutoConfig.from_pretrained(room_args.config_name)
    if not isinstance(config, DINOv3ViTConfig):
        raise ValueError(f"config_name = {room_args.config_name} is a {config.model_type!r}; expected 'dinov3_vit'")
    model = PatchCategoryModel(config)
    side: int = config.image_size  # type: ignore[assignment]  # the library allows (height, width) too
    image_size = (side, side)
    train_walks = split_walks("train", room_args.num_rooms, image_size, Path(room_args.cache_dir))
    probed_walks = split_walks("train", min(64, room_args.num_rooms), image_size, Path(room_args.cache_dir))
    held_out = split_walks(room_args.split, room_args.num_eval_rooms, image_size, Path(room_args.cache_dir))
    views = room_args.views_per_room
    trainer = SemanticTrainer(
        model=model,
        args=args,
        train_dataset=RoomGeometryDataset(train_walks, args.seed),
        eval_dataset=RoomGeometryDataset(held_out).batches(8),
        probe_batches=RoomGeometryDataset(probed_walks).batches(8),
        batch_sampler=PSFMBatchSampler(
            room_args.num_rooms,
            room_args.images_per_batch,
            (views, views),
            args.gradient_accumulation_steps * args.world_size,
            args.seed,
        ),
    )
    trainer.train(resume_from_checkpoint=resume)
    scores = trainer.score()
    if not trainer.is_world_process_zero():
        return
    model.vit.save_pretrained(output_dir)
    run = {
        **run_facts("run_semantic.py", argv, args, model.vit, trainer.state.global_step, started),
        "name": trainer.hub_model_id or output_dir.resolve().name,
        "data": f"procedural rooms 0 to {room_args.num_rooms - 1}",
        "held_out": f"{room_args.num_eval_rooms} rooms of the {room_args.split} split",
    }
    for name, content in (("eval.json", scores), ("run.json", run)):
        (output_dir / name).write_text(json.dumps(content, indent=2) + "\n")
    write_teacher_card(
        output_dir,
        run,
        summary=(
            "A small vision transformer in the architecture of DINOv3, for use as the semantic teacher of Spa3R. It "
            "was trained from scratch on procedural rooms to predict which categories of things each patch shows, and "
            "in what shares; it has nothing of DINOv3's weights or data."
        ),
        use=f"""from transformers import AutoModel

model = AutoModel.from_pretrained("{run["name"]}")
# pictures (B, 3, {config.image_size}, {config.image_size}), ImageNet mean 0 and standard deviation 1
features = model(pixel_values).last_hidden_state[:, {1 + config.num_register_tokens}:]  # of patches, row by row""",
        results=(
            f"Linear probes for the category of a patch (patches with at least {MIN_SHARE:.0%} of one category), "
            f"learnt on 64 training rooms, scored on {run['held_out']}.\n\n{probe_table(scores)}\n"
        ),
        tags=["dinov3", "image-feature-extraction"],
        pipeline_tag="image-feature-extraction",
    )
    logger.info("\n%s\n\nthe teacher and its card are in %s", probe_table(scores), output_dir)


if __name__ == "__main__":
    main()
