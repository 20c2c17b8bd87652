"""
Teach a vision-language model to read Spa3R's latents, on instruction data.

With no data: a nano VLM learns to answer questions about procedural rooms, alone and with the scene given in several
ways (the paper's Tables 3 and 5), in about 15 minutes on two CPU cores.

    python training/run_spa3_vlm.py
    python training/run_spa3_vlm.py --max_steps 2 --num_rooms 4 --num_eval_rooms 2 --eval_questions 10       # smoke
    python training/run_spa3_vlm.py --vlm_name_or_path Qwen/Qwen2.5-VL-3B-Instruct \
        --spatial_encoder_name_or_path org/spa3r --data vsi_590k.jsonl%25 spar_234k.json --media_dir /data --train lora
    torchrun --nproc_per_node 8 training/run_spa3_vlm.py training/recipes/spa3_vlm_paper.yaml --data ...
    accelerate launch --config_file training/recipes/accelerate_fsdp2.yaml training/run_spa3_vlm.py ...

A YAML or JSON file of arguments may come first; flags override it.
"""

import copy
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModel, AutoModelForImageTextToText, TrainingArguments, set_seed
from transformers.utils.logging import disable_progress_bar

from spa3r_hf import Spa3AdapterConfig, Spa3RImageProcessor, Spa3VLM, Spa3VLMProcessor, get_spa3_vlm
from spa3r_hf.instruction_data import InstructionData, InstructionSet, messages_of
from spa3r_hf.latent_cache import SceneEncoder
from spa3r_hf.rooms_instructions import room_instructions
from spa3r_hf.rooms_questions import RoomQuestion
from spa3r_hf.rooms_questions_balance import question_rows
from spa3r_hf.run_facts import run_facts
from spa3r_hf.spa3_vlm_comparison import (
    VARIANTS,
    answer_conversations,
    comparison_table,
    pick_evenly,
    score_answers,
    score_guessing,
)
from spa3r_hf.spa3_vlm_report import write_spa3_vlm_report
from spa3r_hf.spa3_vlm_trainer import Spa3VLMTrainer, choose_trained, instruction_trainer
from spa3r_hf.training_arguments import checkpoint_to_resume, parse_with_recipe


logger = logging.getLogger("run_spa3_vlm")
REPOSITORY = Path(__file__).resolve().parent.parent
ROOM_IMAGE_SIZE = 112
# What differs from the defaults where there is no data.
ROOMS_DEFAULTS: dict[str, Any] = {
    "max_steps": 200,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "warmup_steps": 0.05,
    "min_frames": 12,
    "max_frames": 12,
    "latents_dir": "outputs/latents",
    "dataloader_num_workers": 1,
    "logging_steps": 25,
    "save_strategy": "no",
}
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class ModelArguments:
    vlm_name_or_path: str = field(
        default=str(REPOSITORY / "hub_configs" / "nano-vlm"), metadata={"help": "The base VLM, folder or Hub repo."}
    )
    vlm_revision: str | None = field(default=None, metadata={"help": "Of the base VLM's repo."})
    spatial_encoder_name_or_path: str = field(
        default=str(REPOSITORY / "hub_configs" / "spa3r-nano"),
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
class DataArguments:
    data: list[str] = field(
        default_factory=list,
        metadata={"help": "JSON or JSONL files of records; 'file.json%%25' takes a quarter of one in every epoch."},
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
class RoomsArguments:
    num_rooms: int = field(default=160, metadata={"help": "Procedural rooms to train on, where there is no data."})
    num_eval_rooms: int = field(default=40, metadata={"help": "Rooms that questions are asked about afterwards."})
    questions_per_type: int = field(default=8, metadata={"help": "Of each room, before they are balanced."})
    questions_per_conversation: int = field(default=4, metadata={"help": "Learnt together, from one look at a room."})
    eval_questions: int = field(default=400, metadata={"help": "About the rooms held out, of all types together."})
    variants: list[str] = field(
        default_factory=lambda: list(VARIANTS), metadata={"help": f"What is compared: some of {', '.join(VARIANTS)}."}
    )
    rooms_dir: str = field(
        default="outputs/room_questions", metadata={"help": "Where questions and frames are kept for later runs."}
    )
    num_workers: int = field(default=2, metadata={"help": "Processes that make questions and frames."})


@dataclass
class SFTTrainingArguments(TrainingArguments):
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
    report_to: None | str | list[str] = "none"
    seed: int = 0
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint to go on from; 'last': the last one in output_dir."}
    )
    hub_strategy: str = "end"
    ddp_find_unused_parameters: bool | None = False  # all that are trained are used


def parse_arguments(
    argv: list[str],
) -> tuple[ModelArguments, DataArguments, RoomsArguments, SFTTrainingArguments]:
    kinds = (ModelArguments, DataArguments, RoomsArguments, SFTTrainingArguments)
    arguments = parse_with_recipe(kinds, argv)
    if not arguments[1].data:
        arguments = parse_with_recipe(kinds, argv, ROOMS_DEFAULTS)
    return arguments  # type: ignore[return-value]


# --- parts of a run


def build_model(args: ModelArguments) -> Spa3VLM:
    vlm_is_trained = args.train == "language_model" or args.train_merger
    options: dict[str, Any] = {
        "dtype": "float32" if args.dtype == "auto" and vlm_is_trained else args.dtype,
        "attn_implementation": args.attn_implementation,
    }
    build = _adapter_to_go_on_from if args.adapter_name_or_path else _fresh_adapter
    model = build(args, options)
    choose_trained(model, args.train, args.train_merger)
    return model


def _fresh_adapter(args: ModelArguments, options: dict[str, Any]) -> Spa3VLM:
    vlm = AutoModelForImageTextToText.from_pretrained(
        args.vlm_name_or_path, revision=args.vlm_revision or "main", **options
    )
    encoder = AutoModel.from_pretrained(
        args.spatial_encoder_name_or_path, revision=args.spatial_encoder_revision or "main"
    )
    lora = {
        "r": args.lora_r,
        "lora_alpha": args.lora_alpha,
        "lora_dropout": args.lora_dropout,
        "target_modules": args.lora_target_modules,
    }
    config = Spa3AdapterConfig(
        integration=args.integration,
        spatial_features=args.spatial_features,
        lora_config=lora if args.train == "lora" else None,
        base_model_revision=args.vlm_revision,
        spatial_encoder_revision=args.spatial_encoder_revision,
    )
    return get_spa3_vlm(vlm, encoder, config)


def _adapter_to_go_on_from(args: ModelArguments, options: dict[str, Any]) -> Spa3VLM:
    path = str(args.adapter_name_or_path)
    config = Spa3AdapterConfig.from_pretrained(path)
    for name in ("integration", "spatial_features"):
        asked, own = getattr(args, name), getattr(config, name)
        if asked not in (own, ModelArguments.__dataclass_fields__[name].default):
            raise ValueError(f"{name} = {asked} is for a new adapter; {path} has {own}")
    model = Spa3VLM.from_pretrained(path, is_trainable=True, **options)
    if model.spatial_encoder is None:
        raise ValueError(f"{path} does not name its spatial encoder; expected one that does")
    return model


def build_processor(model_args: ModelArguments, data_args: DataArguments) -> Spa3VLMProcessor:
    frames = {name: getattr(data_args, name) for name in ("seconds_per_frame", "min_frames", "max_frames")}
    if model_args.adapter_name_or_path:
        return Spa3VLMProcessor.from_pretrained(model_args.adapter_name_or_path, **frames)
    size: dict[str, Any] = {} if data_args.image_size is None else {"size": data_args.image_size}
    spatial = Spa3RImageProcessor.from_pretrained(model_args.spatial_encoder_name_or_path, **size)
    return Spa3VLMProcessor.from_vlm(model_args.vlm_name_or_path, spatial, revision=model_args.vlm_revision, **frames)


def build_trainer(
    model: Spa3VLM,
    processor: Spa3VLMProcessor,
    data: InstructionData,
    data_args: DataArguments,
    args: SFTTrainingArguments,
    use_scenes: bool = True,
) -> Spa3VLMTrainer:
    """A trainer on some data; without the scenes, of the VLM alone."""
    scene_encoder = None
    if use_scenes:
        features = model.adapter_config.spatial_features
        scene_encoder = SceneEncoder(model.spatial_encoder, features, data_args.latents_dir, data_args.latents_dtype)
    return instruction_trainer(
        model,
        processor,
        data,
        args,
        scene_encoder=scene_encoder,
        max_length=data_args.max_length,
        on_bad_sample=data_args.on_bad_sample,
    )


# --- training on the user's data


def train_on_data(
    model_args: ModelArguments, data_args: DataArguments, args: SFTTrainingArguments, argv: list[str]
) -> None:
    """Train on the user's data, and write the adapter with its card."""
    started = time.monotonic()
    output_dir = Path(str(args.output_dir))
    resume = checkpoint_to_resume(output_dir, args.resume_from_checkpoint)
    data = InstructionData([InstructionSet.open(name, data_args.media_dir) for name in data_args.data], args.seed)
    model = build_model(model_args)
    trainer = build_trainer(model, build_processor(model_args, data_args), data, data_args, args)
    trained, total = model.get_nb_trainable_parameters()
    logger.info("%.2f M of %.2f M parameters are trained", trained / 1e6, total / 1e6)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    run = run_of(trainer, model_args, argv, started)
    write_spa3_vlm_report(output_dir, run)
    if trainer.bad_samples:
        messages = "\n".join(f"{times} x {message}" for message, times in trainer.bad_samples.most_common())
        logger.warning("%d bad samples were left out:\n%s", trainer.bad_samples.total(), messages)
    logger.info("the last loss is %.4f; adapter, card and run.json are in %s", run["loss"], output_dir)
    if args.push_to_hub:
        trainer.push_to_hub()


def run_of(trainer: Spa3VLMTrainer, model_args: ModelArguments, argv: list[str], started: float) -> dict[str, Any]:
    """The facts of a run, for its card."""
    model, config, data = trainer.model, trainer.model.adapter_config, trainer.train_dataset
    return {
        **run_facts("run_spa3_vlm.py", argv, trainer.args, model, trainer.state.global_step, started),
        "name": trainer.hub_model_id or Path(str(trainer.args.output_dir)).resolve().name,
        "vlm": config.base_model_name_or_path,
        "spatial_encoder": config.spatial_encoder_name_or_path,
        "adapter": config.to_dict(),
        "trained": model_args.train + (", vision merger" if model_args.train_merger else ""),
        "data": [f"{part.num_samples} of {len(part)} records of {part.name} an epoch" for part in data.sets],
        "loss": next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry),
        "bad_samples": dict(trainer.bad_samples.most_common()),
    }


# --- the embedded default: questions about procedural rooms


def compare_on_rooms(
    model_args: ModelArguments,
    data_args: DataArguments,
    rooms_args: RoomsArguments,
    args: SFTTrainingArguments,
    argv: list[str],
) -> None:
    """Train the base VLM on the same questions in each way, and score all of them on rooms never trained on."""
    if args.resume_from_checkpoint or args.world_size > 1 or model_args.adapter_name_or_path:
        raise ValueError(
            "the comparison on procedural rooms runs in one process, from its beginning, on fresh adapters; expected "
            "--data for anything else"
        )
    unknown = sorted(set(rooms_args.variants) - VARIANTS.keys())
    if unknown:
        raise ValueError(f"variants has {unknown}; expected some of {list(VARIANTS)}")
    output_dir = Path(str(args.output_dir))
    rooms = room_instructions(
        Path(rooms_args.rooms_dir),
        rooms_args.num_rooms,
        rooms_args.num_eval_rooms,
        data_args.image_size or ROOM_IMAGE_SIZE,
        data_args.max_frames,
        rooms_args.questions_per_type,
        args.seed,
        rooms_args.num_workers,
    )
    records = rooms.records(rooms.train, rooms_args.questions_per_conversation, args.seed)
    data = InstructionData([InstructionSet("questions about rooms", records)], args.seed)
    asked = pick_evenly(rooms.held_out, rooms_args.eval_questions)
    prompts = [messages_of(record, Path(), "question")[:-1] for record in rooms.records(asked)]
    logger.info(
        "%d questions about %d rooms to learn from, %d about %d others to be scored on",
        *(len(rooms.train), rooms_args.num_rooms, len(asked), rooms_args.num_eval_rooms),
    )
    processor = build_processor(model_args, data_args)
    results = score_guessing(rooms.train, asked)
    for name in rooms_args.variants:
        started = time.monotonic()
        variant, folder = VARIANTS[name], output_dir / name
        set_seed(args.seed)  # the same first weights for all
        model = build_model(replace(model_args, **(variant or {})))
        own_args = copy.copy(args)
        own_args.output_dir = str(folder)
        trainer = build_trainer(model, processor, data, data_args, own_args, use_scenes=variant is not None)

        if "untrained" not in results:
            with model.disable_adapter():
                results["untrained"] = score_answers(asked, answer_conversations(model, processor, prompts, None))
        trainer.train()
        trainer.save_model()
        answers = answer_conversations(model, processor, prompts, trainer.scene_encoder)
        write_answers(folder, asked, answers)
        results[name] = score_answers(asked, answers)
        logger.info("%s: %.1f in %.0f s", name, results[name]["overall"], time.monotonic() - started)
        write_spa3_vlm_report(folder, run_of(trainer, model_args, argv, started), comparison_table(results))
    (output_dir / "eval.json").write_text(json.dumps(results, indent=2) + "\n")
    logger.info("\n%s\n\nadapters, answers and eval.json are in %s", comparison_table(results), output_dir)


def write_answers(folder: Path, questions: Sequence[RoomQuestion], answers: Sequence[str]) -> None:
    """Each question with its answer, a line each, in `answers.jsonl`."""
    rows = [row | {"answer": answer} for row, answer in zip(question_rows(questions), answers, strict=True)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, rooms_args, args = parse_arguments(argv)
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
    if data_args.data:
        train_on_data(model_args, data_args, args, argv)
    else:
        compare_on_rooms(model_args, data_args, rooms_args, args, argv)


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        # A process that ends while gloo still talks is aborted.
        torch.distributed.destroy_process_group()
