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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModel, DINOv3ViTConfig, PreTrainedConfig, PreTrainedModel

from spa3r_hf import Spa3RConfig, Spa3RForPreTraining, Spa3RImageProcessor, Spa3RVGGTConfig
from spa3r_hf.geometry_data import SPLITS, RoomGeometryDataset, room_batches, split_walks
from spa3r_hf.licences import describe_sources
from spa3r_hf.model_card import psfm_table
from spa3r_hf.modeling_spa3r import num_context_views
from spa3r_hf.psfm_data import PSFMBatchSampler, PSFMDataset, StreamingPSFMDataset
from spa3r_hf.psfm_metrics import unseen_depth
from spa3r_hf.psfm_report import draw_orbit, write_psfm_report
from spa3r_hf.psfm_splits import PSFMSplit, batches_of, split_scenes
from spa3r_hf.psfm_trainer import PSFMTrainer
from spa3r_hf.run_facts import RunRecord, shown_path
from spa3r_hf.scenes import SceneDataset, StreamedScenes, open_scenes
from spa3r_hf.scenes_rooms import RoomScenes
from spa3r_hf.training_arguments import (
    RunArguments,
    checkpoint_to_resume,
    parse_with_recipe,
    read_config,
    start_run,
    usage_errors,
)


logger = logging.getLogger("run_psfm")
REPOSITORY = Path(__file__).resolve().parent.parent
ORBIT_VIEWS = 22
TEACHERS: dict[str, type[PreTrainedConfig]] = {"backbone": Spa3RVGGTConfig, "semantic": DINOv3ViTConfig}


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
class PSFMTrainingArguments(RunArguments):
    output_dir: str | None = field(default="outputs/psfm", metadata={"help": "Where everything is written."})
    max_steps: int = 1000
    learning_rate: float = 2e-3
    lr_scheduler_type: str = "cosine_with_min_lr"
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(default_factory=lambda: {"min_lr_rate": 0.1})
    warmup_steps: float = 0.05
    weight_decay: float = 1e-4
    logging_steps: float = 25
    ddp_find_unused_parameters: bool | None = False  # all that are trained are used


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, PSFMTrainingArguments]:
    return parse_with_recipe((ModelArguments, DataArguments, PSFMTrainingArguments), argv)  # type: ignore[return-value]


# --- parts of a run


def build_model(args: ModelArguments) -> tuple[Spa3RForPreTraining, bool]:
    """The model, and whether its backbone has weights that mean something."""
    if args.model_name_or_path:
        for name in ("config_overrides", "backbone_name_or_path", "semantic_name_or_path"):
            if getattr(args, name):
                raise ValueError(f"{name} is for a new model; expected either it or model_name_or_path")
        read_config("model_name_or_path", args.model_name_or_path, Spa3RConfig)
        model = Spa3RForPreTraining.from_pretrained(
            args.model_name_or_path, attn_implementation=args.attn_implementation
        )
        return model, True
    original = read_config("config_name", args.config_name, Spa3RConfig).to_dict()
    paths = {name: getattr(args, f"{name}_name_or_path") for name in TEACHERS}
    settings = original | {"attn_implementation": args.attn_implementation}
    for name, path in paths.items():
        if path:
            settings[f"{name}_config"] = read_config(f"{name}_name_or_path", path, TEACHERS[name]).to_dict()
    for name, value in read_overrides(args.config_overrides).items():
        settings[name] = settings[name] | value if isinstance(value, dict) and name in settings else value
    model = Spa3RForPreTraining(Spa3RConfig(**settings))

    trained = own_teachers(args.config_name)
    for name, path in paths.items():
        if path:
            trained[name] = AutoModel.from_pretrained(path, dtype="float32")
        elif settings[f"{name}_config"] != original[f"{name}_config"]:
            trained[name] = None
    try:
        load_teachers(model, trained)
    except RuntimeError as error:
        raise ValueError(
            f"config_overrides = {args.config_overrides} changes sizes of teachers whose weights are given; expected "
            "one or the other"
        ) from error
    return model, trained["backbone"] is not None


def read_overrides(text: str | None) -> dict[str, Any]:
    try:
        overrides = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"config_overrides = {text!r} is not JSON: {error}") from error
    if not isinstance(overrides, dict):
        raise ValueError(f"config_overrides = {text!r}; expected names of settings and their values")
    return overrides


def own_teachers(config_name: str) -> dict[str, PreTrainedModel | None]:
    """The teachers of a folder or Hub repo that holds more than a configuration."""
    try:
        shipped = Spa3RForPreTraining.from_pretrained(config_name, dtype="float32")
    except OSError:  # no weights there
        return dict.fromkeys(TEACHERS)
    return teachers_of(shipped)


def teachers_of(model: Spa3RForPreTraining) -> dict[str, PreTrainedModel | None]:
    return {"backbone": model.spa3r.backbone, "semantic": model.semantic_teacher}


def load_teachers(model: Spa3RForPreTraining, trained: Mapping[str, PreTrainedModel | None]) -> None:
    for name, teacher in teachers_of(model).items():
        source = trained[name]
        if teacher is not None and source is not None:
            teacher.load_state_dict(source.state_dict())


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


def notes_on(backbone_is_trained: bool, has_cameras: bool) -> list[str]:
    """What whoever reads the scores has to know."""
    if backbone_is_trained:
        return []
    return [
        "The geometry backbone and the semantic teacher have random weights: the features that are predicted mean "
        "nothing yet; this run shows that prediction works.",
        "Cameras are taken from the data, since a random camera head knows none."
        if has_cameras
        else "No cameras come from the data, and a random camera head knows none: views cannot be told apart.",
    ]


def build_trainer(
    model: Spa3RForPreTraining,
    processor: Spa3RImageProcessor,
    split: PSFMSplit,
    data_args: DataArguments,
    args: PSFMTrainingArguments,
) -> PSFMTrainer:
    mask_ratio = model.config.mask_ratio
    num_context_views(data_args.min_views, mask_ratio)  # refuses samples without context or target
    max_views = data_args.max_views
    smallest_scene = data_args.views_per_room if data_args.data_dir is None else split.smallest_scene
    if smallest_scene is not None and smallest_scene < max_views:
        max_views = smallest_scene
        logger.info("samples have at most %d views: the smallest scene has no more", max_views)
    batching: dict[str, Any] = {
        "images_per_batch": data_args.images_per_batch,
        "views": (data_args.min_views, max_views),
        "batches_per_step": args.gradient_accumulation_steps * args.world_size,
    }
    sampling: dict[str, Any] = {
        "seed": args.seed,
        "mask_ratio": mask_ratio,
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
    return PSFMTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=batches_of(split.eval_samples),
        mean_batches=batches_of(split.mean_samples),
        batch_sampler=batch_sampler,
        processing_class=processor,
    )


def score_unseen_depth(trainer: PSFMTrainer, args: DataArguments, size: int) -> dict[str, float]:
    """The true depth of rooms is known: how well does the probe tell it for views that the encoder has not seen?"""
    rooms = RoomGeometryDataset(split_walks("test", args.num_eval_rooms, (size, size)), frame_step=(2, 4))
    with trainer.evaluated_model() as model:
        return unseen_depth(model, [trainer._prepare_inputs(batch) for batch in room_batches(rooms, args.eval_views)])


def write_report(trainer: PSFMTrainer, scores: dict[str, Any], run: dict[str, Any], draws_orbit: bool) -> None:
    """What the run leaves beside its model, and what it says at the end."""
    folder, model = trainer.output_dir, trainer.model.eval()
    batches = [trainer._prepare_inputs(batch) for batch in trainer.eval_dataset[:2]]
    write_psfm_report(folder, model, batches, scores, trainer.state.log_history, run)
    if draws_orbit:
        walk = split_walks("test", 1, tuple(batches[0]["pixel_values"].shape[-2:]))[0].rgb[:ORBIT_VIEWS]
        pictures = torch.from_numpy(walk).movedim(-1, 1).float().to(trainer.args.device) / 255
        draw_orbit(model, pictures, folder / "pictures")
    if trainer.bad_samples:
        messages = "\n".join(f"{times} x {message}" for message, times in trainer.bad_samples.most_common())
        logger.warning("%d bad samples were left out:\n%s", trainer.bad_samples.total(), messages)
    logger.info("\n%s\n\nmodel, card, eval.json and pictures are in %s", psfm_table(scores), folder)


def made_of(args: ModelArguments, data: DataArguments, backbone_is_trained: bool) -> dict[str, Any]:
    """The names of the teachers, and what is known of their licences and the data's."""
    if args.model_name_or_path:
        teachers = [args.model_name_or_path]
    else:
        given = (args.backbone_name_or_path, args.semantic_name_or_path)
        own = args.config_name if backbone_is_trained else None
        teachers = [name for name in dict.fromkeys(path or own for path in given) if name]
    sources = describe_sources([data.data_dir or "procedural rooms", *teachers])
    return {"teachers": [shown_path(name) for name in teachers], "sources": sources}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    started = time.monotonic()
    with usage_errors(__name__):
        model_args, data_args, args = parse_arguments(argv)
        start_run(args)
        resume = checkpoint_to_resume(str(args.output_dir), args.resume_from_checkpoint)
        if resume:
            read_config("resume_from_checkpoint", resume, Spa3RConfig)
        model, backbone_is_trained = build_model(model_args)
        processor = build_processor(model_args, data_args)
        use_cameras = data_args.cameras == "data" or (data_args.cameras == "auto" and not backbone_is_trained)
        split, name = build_split(data_args, processor, model.config, use_cameras)
        if data_args.cameras == "data" and not split.has_cameras:
            raise ValueError(f"cameras = data, but {name} has no cameras; expected cameras.npz, or cameras = backbone")
        notes = notes_on(backbone_is_trained, split.has_cameras)
        for note in notes:
            logger.info(note)
        trainer = build_trainer(model, processor, split, data_args, args)
        record = RunRecord("run_psfm.py", argv, args, resume, started)
        trainer.add_callback(record)

    trainer.train(resume_from_checkpoint=resume)
    trainer.bad_samples.update(split.bad_samples)
    scores = trainer.score()
    on_rooms = data_args.data_dir is None
    if on_rooms and model.config.depth_probe:
        scores["unseen_depth"] = score_unseen_depth(trainer, data_args, processor.size)
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    run = {
        **record.facts(trainer, model),
        "data": name,
        **made_of(model_args, data_args, backbone_is_trained),
        "held_out": split.held_out,
        "num_train_scenes": "a stream" if isinstance(split.train, StreamedScenes) else len(split.train),
        "cameras": "from the data" if split.has_cameras else "from the backbone's camera head",
        "notes": notes,
        "bad_samples": dict(trainer.bad_samples.most_common()),
    }
    # In an orbit, cameras are the backbone's.
    write_report(trainer, scores, run, draws_orbit=on_rooms and not split.has_cameras)
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
