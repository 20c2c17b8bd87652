"""
Train a geometry backbone (VGGT) on procedural rooms: cameras, depth and points, from pictures.

    python training/run_geometry.py                                                        # the nano backbone: hours
    python training/run_geometry.py --max_steps 10 --num_rooms 8 --num_eval_rooms 4        # smoke
    python training/run_geometry.py --resume_from_checkpoint last                          # go on after a stop

Rooms of the training, validation and test splits share no seed. Everything is written to --output_dir: checkpoints,
the backbone, and `eval.json` with its scores on rooms never trained on, next to trivial baselines.
"""

import json
import logging
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate
from transformers import AutoConfig, HfArgumentParser, TrainingArguments, set_seed

from spa3r_hf import Spa3RImageProcessor, Spa3RVGGTConfig, Spa3RVGGTModel
from spa3r_hf.checkpoint_spa3r import last_checkpoint
from spa3r_hf.geometry_data import RoomGeometryDataset
from spa3r_hf.geometry_trainer import GeometryTrainer
from spa3r_hf.model_card import markdown_table
from spa3r_hf.psfm_data import PSFMBatchSampler


logger = logging.getLogger("run_geometry")
REPOSITORY = Path(__file__).resolve().parent.parent
# First seeds of the splits. No split reaches the next one.
SPLITS = {"train": 0, "validation": 10**6, "test": 2 * 10**6}


@dataclass
class GeometryArguments:
    config_name: str = field(
        default=str(REPOSITORY / "hub_configs" / "vggt-nano"),
        metadata={"help": "Folder or Hub repo with the configuration of a new backbone."},
    )
    num_rooms: int = field(default=1500, metadata={"help": "Rooms to train on; all are kept in memory, 3 MB each."})
    num_eval_rooms: int = field(default=32, metadata={"help": "Rooms to evaluate on."})
    split: str = field(default="validation", metadata={"help": "Rooms to evaluate on: validation or test."})
    min_views: int = field(default=2, metadata={"help": "Fewest views of a sample."})
    max_views: int = field(default=8, metadata={"help": "Most views of a sample."})
    images_per_batch: int = field(default=48, metadata={"help": "Budget of images of a batch on one device."})
    eval_views: list[int] = field(
        default_factory=lambda: [2, 4, 8], metadata={"help": "Numbers of views to evaluate with."}
    )


@dataclass
class GeometryTrainingArguments(TrainingArguments):
    output_dir: str | None = field(default="outputs/geometry", metadata={"help": "Where everything is written."})
    max_steps: int = 8000
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine_with_min_lr"
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(default_factory=lambda: {"min_lr_rate": 0.02})
    warmup_steps: float = 0.02
    weight_decay: float = 0.05
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    logging_steps: float = 25
    save_steps: float = 250
    save_total_limit: int | None = 2
    dataloader_num_workers: int = 1
    report_to: None | str | list[str] = "none"
    seed: int = 0
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint to go on from; 'last': the last one in output_dir."}
    )


def eval_batches(args: GeometryArguments, image_size: tuple[int, int]) -> dict[str, list[dict[str, Any]]]:
    """Batches of four rooms for each number of views, the same in every run."""
    if args.split not in ("validation", "test"):
        raise ValueError(f"split = {args.split}; expected validation or test")
    first = SPLITS[args.split]
    rooms = RoomGeometryDataset(range(first, first + args.num_eval_rooms), image_size)
    return {
        f"{num_views}_views": [
            default_collate([rooms[0, index, num_views] for index in range(start, min(start + 4, len(rooms)))])
            for start in range(0, len(rooms), 4)
        ]
        for num_views in args.eval_views
    }


def score_table(scores: dict[str, dict[str, dict[str, float]]]) -> str:
    columns = [(views, name) for views in scores for name in ("model", "baseline")]
    rows = [
        [key, *(f"{scores[views][name][key]:.3f}" for views, name in columns)]
        for key in next(iter(scores.values()))["model"]
    ]
    return markdown_table(["", *(f"{views.replace('_', ' ')}, {name}" for views, name in columns)], rows)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    kinds: Any = (GeometryArguments, GeometryTrainingArguments)
    parser = HfArgumentParser(kinds, allow_abbrev=False)
    data_args, args = parser.parse_args_into_dataclasses(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    set_seed(args.seed)
    started = time.monotonic()
    output_dir = Path(args.output_dir)
    resume = args.resume_from_checkpoint
    if resume == "last":
        resume = str(last_checkpoint(output_dir))

    config = AutoConfig.from_pretrained(data_args.config_name)
    if not isinstance(config, Spa3RVGGTConfig):
        raise ValueError(f"config_name = {data_args.config_name} is a {config.model_type!r}; expected 'spa3r_vggt'")
    model = Spa3RVGGTModel(config)
    image_size = (config.image_size, config.image_size)
    first = SPLITS["train"]
    batch_sampler = PSFMBatchSampler(
        data_args.num_rooms,
        data_args.images_per_batch,
        (data_args.min_views, data_args.max_views),
        args.gradient_accumulation_steps * args.world_size,
        args.seed,
    )
    trainer = GeometryTrainer(
        model=model,
        args=args,
        train_dataset=RoomGeometryDataset(range(first, first + data_args.num_rooms), image_size, args.seed),
        eval_dataset=eval_batches(data_args, image_size),
        batch_sampler=batch_sampler,
        processing_class=Spa3RImageProcessor(size=config.image_size, patch_size=config.patch_size),
    )
    trainer.train(resume_from_checkpoint=resume)
    scores = trainer.score()
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    run = {
        "command": " ".join(["python", "training/run_geometry.py", *argv]),
        "steps": trainer.state.global_step,
        "seed": args.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(time.monotonic() - started, 1),
        "hardware": torch.cuda.get_device_name() if args.device.type == "cuda" else f"{os.cpu_count()} CPU cores",
    }
    (output_dir / "run.json").write_text(json.dumps(run, indent=2) + "\n")
    (output_dir / "eval.json").write_text(json.dumps(scores, indent=2) + "\n")
    logger.info("\n%s\n\nthe backbone and eval.json are in %s", score_table(scores), output_dir)


if __name__ == "__main__":
    main()
