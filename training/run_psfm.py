"""
Pre-train Spa3R by Predictive Spatial Field Modeling (PSFM).

With no arguments: the nano model on procedural rooms, with the nano teachers, under ten minutes on two CPU cores.

    python training/run_psfm.py
    python training/run_psfm.py --max_steps 20 --num_rooms 8 --num_eval_rooms 4                   # smoke
    torchrun --nproc_per_node 8 training/run_psfm.py training/recipes/psfm_paper.yaml --data_dir /data/scannet

A YAML or JSON file of arguments may come first; flags override it.
"""

import json
import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import AutoConfig, AutoModel, HfArgumentParser, PreTrainedModel, TrainingArguments, set_seed
from transformers.utils.logging import disable_progress_bar

from spa3r_hf import Spa3RConfig, Spa3RForPreTraining, Spa3RImageProcessor
from spa3r_hf.checkpoint_spa3r import last_checkpoint
from spa3r_hf.geometry_data import SPLITS, RoomGeometryDataset, room_batches, split_walks
from spa3r_hf.model_card import psfm_table
from spa3r_hf.psfm_data import PSFMBatchSampler, PSFMDataset, StreamingPSFMDataset
from spa3r_hf.psfm_metrics import unseen_depth
from spa3r_hf.psfm_report import draw_orbit, write_psfm_report
from spa3r_hf.psfm_splits import PSFMSplit, batches_of, split_scenes
from spa3r_hf.psfm_trainer import PSFMTrainer
from spa3r_hf.run_facts import run_facts
from spa3r_hf.scenes import SceneDataset, StreamedScenes, open_scenes
from spa3r_hf.scenes_rooms import RoomScenes


logger = logging.getLogger("run_psfm")
REPOSITORY = Path(__file__).resolve().parent.parent
ORBIT_VIEWS = 22


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A Spa3RForPreTraining checkpoint to go on from, folder or Hub repo."}
    )
    config_name: str = field(
        default=str(REPOSITORY / "hub_configs" / "spa3r-nano"),
        metadata={"help": "Folder or Hub repo with the configuration and image processor of a new model."},
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changes to the configuration, as JSON: '{\"mask_ratio\": 0.25}'."}
    )
    backbone_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Weights of the frozen VGGT (Spa3RVGGTModel). None: config_name's own, else random ones."},
    )
    semantic_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Weights of the frozen DINOv3 (DINOv3ViTModel). None: config_name's own, else random ones."},
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager, sdpa, flash_attention_2, ..."})


@dataclass
class DataArguments:
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "A folder of photographs, a folder of such folders, ScanNet, ScanNet++, a video or a folder of "
            "videos, a saved data set or its name on the Hub. None: procedural rooms."
        },
    )
    split: str = field(default="train", metadata={"help": "Split of ScanNet++ or of a data set."})
    image_column: str = field(default="images", metadata={"help": "A data set's column of lists of images."})
    streaming: bool = field(default=False, metadata={"help": "Stream a data set instead of downloading it first."})
    cameras: Literal["auto", "data", "backbone"] = field(
        default="auto",
        metadata={
            "help": "Where cameras come from: the data, or the backbone's camera head. auto: the data where it has "
            "cameras and the backbone has random weights; else the backbone."
        },
    )
    image_size: int | None = field(default=None, metadata={"help": "Width in pixels; default: the image processor's."})
    frame_step: list[int] | None = field(
        default=None,
        metadata={"help": "Lowest and highest distance between views of a sample; default: the layout's."},
    )
    min_views: int = field(default=4, metadata={"help": "Fewest views of a sample."})
    max_views: int = field(default=12, metadata={"help": "Most views of a sample."})
    images_per_batch: int = field(default=24, metadata={"help": "Budget of images of a batch on one device."})
    num_rooms: int = field(default=192, metadata={"help": "Procedural rooms to train on."})
    num_eval_rooms: int = field(default=16, metadata={"help": "Procedural rooms held out."})
    views_per_room: int = field(default=40, metadata={"help": "Length of the camera walk through a room."})
    eval_scenes: int = field(default=8, metadata={"help": "Scenes of data_dir to hold out, at most a quarter."})
    eval_views: int = field(default=8, metadata={"help": "Views of a held-out scene, context and target."})
    on_bad_sample: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "What to do about scenes that cannot be read; skipped ones are named."}
    )


@dataclass
class PSFMTrainingArguments(TrainingArguments):
    output_dir: str | None = field(default="outputs/psfm", metadata={"help": "Where everything is written."})
    max_steps: int = 1000
    learning_rate: float = 2e-3
    lr_scheduler_type: str = "cosine_with_min_lr"
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(default_factory=lambda: {"min_lr_rate": 0.1})
    warmup_steps: float = 0.05
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    logging_steps: float = 25
    report_to: None | str | list[str] = "none"
    seed: int = 0
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint to go on from; 'last': the last one in output_dir."}
    )
    hub_strategy: str = "end"
    ddp_find_unused_parameters: bool | None = False  # all that are trained are used


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, PSFMTrainingArguments]:
    kinds: Any = (ModelArguments, DataArguments, PSFMTrainingArguments)
    parser = HfArgumentParser(kinds, allow_abbrev=False)
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        read = json.loads if argv[0].endswith(".json") else yaml.safe_load
        recipe = read(Path(argv[0]).read_text())
        if not isinstance(recipe, dict):
            raise ValueError(f"{argv[0]} holds {recipe!r}; expected names of arguments and their values")
        unknown = sorted(recipe.keys() - {action.dest for action in parser._actions})
        if unknown:
            raise ValueError(f"{argv[0]} has unknown arguments {unknown}; see --help for those that exist")
        # As flags they are checked as flags are; those that follow override them.
        flags = [flag for name, value in recipe.items() if value is not None for flag in _to_flags(name, value)]
        argv = flags + argv[1:]
    return parser.parse_args_into_dataclasses(argv)  # type: ignore[return-value]


def _to_flags(name: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *(value if isinstance(value, str) else json.dumps(value) for value in values)]


def build_model(args: ModelArguments) -> tuple[Spa3RForPreTraining, bool]:
    """The model, and whether its backbone has weights that mean something."""
    if args.model_name_or_path:
        for name in ("config_overrides", "backbone_name_or_path", "semantic_name_or_path"):
            if getattr(args, name):
                raise ValueError(f"{name} is for a new model; expected either it or model_name_or_path")
        model = Spa3RForPreTraining.from_pretrained(
            args.model_name_or_path, attn_implementation=args.attn_implementation
        )
        return model, True
    config = AutoConfig.from_pretrained(args.config_name)
    if not isinstance(config, Spa3RConfig):
        raise ValueError(f"config_name = {args.config_name} is a {config.model_type!r}; expected 'spa3r'")
    settings = config.to_dict()
    for name in ("backbone", "semantic"):
        if path := getattr(args, f"{name}_name_or_path"):
            settings[f"{name}_config"] = AutoConfig.from_pretrained(path).to_dict()
    for name, value in json.loads(args.config_overrides or "{}").items():
        settings[name] = settings[name] | value if isinstance(value, dict) and name in settings else value
    settings["attn_implementation"] = args.attn_implementation
    model = Spa3RForPreTraining(Spa3RConfig(**settings))
    teachers = {"backbone": model.spa3r.backbone, "semantic": model.semantic_teacher}
    own = own_teachers(args.config_name)
    backbone_is_trained = False
    for name, teacher in teachers.items():
        if teacher is None:
            continue
        if path := getattr(args, f"{name}_name_or_path"):
            trained = AutoModel.from_pretrained(path, dtype="float32")
        elif own[name] is not None and settings[f"{name}_config"] == config.to_dict()[f"{name}_config"]:
            trained = own[name]
        else:
            continue
        teacher.load_state_dict(trained.state_dict())
        backbone_is_trained |= name == "backbone"
    return model, backbone_is_trained


def own_teachers(config_name: str) -> dict[str, PreTrainedModel | None]:
    """The teachers of a folder or Hub repo that holds more than a configuration."""
    try:
        shipped = Spa3RForPreTraining.from_pretrained(config_name, dtype="float32")
    except OSError:  # no weights there
        return {"backbone": None, "semantic": None}
    return {"backbone": shipped.spa3r.backbone, "semantic": shipped.semantic_teacher}


def build_processor(model_args: ModelArguments, data_args: DataArguments) -> Spa3RImageProcessor:
    options: dict[str, Any] = {} if data_args.image_size is None else {"size": data_args.image_size}
    return Spa3RImageProcessor.from_pretrained(model_args.model_name_or_path or model_args.config_name, **options)


def build_split(
    args: DataArguments, processor: Spa3RImageProcessor, config: Spa3RConfig, use_cameras: bool
) -> tuple[PSFMSplit, str]:
    """What to train on and what to evaluate on, and its name."""
    scenes: SceneDataset | StreamedScenes
    held_out = None
    options: dict[str, Any] = {"use_cameras": use_cameras}
    if args.frame_step:
        options["frame_step"] = tuple(args.frame_step)
    if args.data_dir is None:
        options |= {"num_views": args.views_per_room, "image_size": (processor.size,) * 2}
        scenes = RoomScenes(range(args.num_rooms), **options)
        held_out = RoomScenes(range(SPLITS["test"], SPLITS["test"] + args.num_eval_rooms), **options)
        name = f"procedural rooms 0 to {args.num_rooms - 1}"
    else:
        scenes = open_scenes(
            args.data_dir, split=args.split, column=args.image_column, streaming=args.streaming, **options
        )
        name = Path(args.data_dir).resolve().name if Path(args.data_dir).exists() else args.data_dir
    split = split_scenes(
        scenes,
        processor,
        held_out=held_out,
        num_held_out=args.eval_scenes,
        num_views=args.eval_views,
        min_views=args.min_views,
        mask_ratio=config.mask_ratio,
        on_bad_sample=args.on_bad_sample,
    )
    return split, name


def score_unseen_depth(trainer: PSFMTrainer, args: DataArguments, size: int) -> dict[str, float]:
    """The true depth of rooms is known: how well does the probe tell it for views that the encoder has not seen?"""
    rooms = RoomGeometryDataset(split_walks("test", args.num_eval_rooms, (size, size)), frame_step=(2, 4))
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    return unseen_depth(model, [trainer._prepare_inputs(batch) for batch in room_batches(rooms, args.eval_views)])


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, args = parse_arguments(argv)
    logging.basicConfig(
        level=logging.INFO if args.should_log else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    disable_progress_bar()  # of loading and saving; training keeps its own
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs; expected torchrun --nproc_per_node {args.n_gpu}, or one GPU "
            "(CUDA_VISIBLE_DEVICES=0)"
        )
    set_seed(args.seed)
    started = time.monotonic()
    output_dir = Path(str(args.output_dir))
    resume = args.resume_from_checkpoint
    if resume == "last":
        resume = str(last_checkpoint(output_dir))
    old = sorted(path.name for path in output_dir.glob("checkpoint-*"))
    if old and not resume:
        # They would be mixed up with those of this run, and lose their frozen weights.
        raise FileExistsError(
            f"{output_dir} holds the checkpoints of another run, {old}; expected --resume_from_checkpoint last, or "
            "another --output_dir"
        )

    model, backbone_is_trained = build_model(model_args)
    processor = build_processor(model_args, data_args)
    use_cameras = data_args.cameras == "data" or (data_args.cameras == "auto" and not backbone_is_trained)
    split, name = build_split(data_args, processor, model.config, use_cameras)
    if data_args.cameras == "data" and not split.has_cameras:
        raise ValueError(f"cameras = data, but {name} has no cameras; expected cameras.npz, or cameras = backbone")
    notes = []
    if not backbone_is_trained:
        notes.append(
            "The geometry backbone and the semantic teacher have random weights: the features that are predicted mean "
            "nothing yet; this run shows that prediction works."
        )
        notes.append(
            "Cameras are taken from the data, since a random camera head knows none."
            if split.has_cameras
            else "No cameras come from the data, and a random camera head knows none: views cannot be told apart."
        )
    for note in notes:
        logger.info(note)

    max_views = data_args.max_views
    if split.smallest_scene is not None and split.smallest_scene < max_views:
        max_views = split.smallest_scene
        logger.info("samples have at most %d views: the smallest scene has no more", max_views)
    batching: dict[str, Any] = {
        "images_per_batch": data_args.images_per_batch,
        "views": (data_args.min_views, max_views),
        "batches_per_step": args.gradient_accumulation_steps * args.world_size,
    }
    sampling: dict[str, Any] = {
        "seed": args.seed,
        "mask_ratio": model.config.mask_ratio,
        "on_bad_sample": data_args.on_bad_sample,
    }
    batch_sampler = None
    train_dataset: PSFMDataset | StreamingPSFMDataset
    if isinstance(split.train, StreamedScenes):
        train_dataset = StreamingPSFMDataset(split.train, processor, **batching, **sampling)
    else:
        train_dataset = PSFMDataset(split.train, processor, **sampling)
        # A handful of scenes gives many samples: an epoch then goes through them several times.
        repeats = max(1, 256 // len(split.train))
        batch_sampler = PSFMBatchSampler(repeats * len(split.train), seed=args.seed, **batching)

    eval_batches = batches_of(split.eval_samples)
    trainer = PSFMTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_batches,
        mean_batches=batches_of(split.mean_samples),
        batch_sampler=batch_sampler,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.bad_samples.update(split.bad_samples)
    scores = trainer.score()
    if data_args.data_dir is None and model.config.depth_probe:
        scores["unseen_depth"] = score_unseen_depth(trainer, data_args, processor.size)
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return

    run = {
        **run_facts("run_psfm.py", argv, args, model, trainer.state.global_step, started),
        "name": trainer.hub_model_id or output_dir.resolve().name,
        "data": name,
        "held_out": split.held_out,
        "num_train_scenes": "a stream" if isinstance(split.train, StreamedScenes) else len(split.train),
        "cameras": "from the data" if split.has_cameras else "from the backbone's camera head",
        "notes": notes,
        "bad_samples": dict(trainer.bad_samples.most_common()),
    }
    model.eval()
    prepared = [trainer._prepare_inputs(batch) for batch in eval_batches[:2]]
    write_psfm_report(output_dir, model, prepared, scores, trainer.state.log_history, run)
    if data_args.data_dir is None and not split.has_cameras:  # cameras are the backbone's, at any view of the walk
        walk = split_walks("test", 1, (processor.size,) * 2)[0].rgb[:ORBIT_VIEWS]
        pictures = torch.from_numpy(walk).movedim(-1, 1).float().to(args.device) / 255
        draw_orbit(model, pictures, output_dir / "pictures")
    if trainer.bad_samples:
        messages = "\n".join(f"{times} x {message}" for message, times in trainer.bad_samples.most_common())
        logger.warning("%d bad samples were left out:\n%s", trainer.bad_samples.total(), messages)
    logger.info("\n%s\n\nmodel, card, eval.json and pictures are in %s", psfm_table(scores), output_dir)
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
