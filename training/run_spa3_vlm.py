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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForImageTextToText, set_seed

from spa3r_hf import Spa3AdapterConfig, Spa3RImageProcessor, Spa3VLM, Spa3VLMProcessor, get_spa3_vlm
from spa3r_hf.instruction_data import InstructionData, InstructionSet, messages_of
from spa3r_hf.instruction_evaluation import answer_conversations
from spa3r_hf.latent_cache import SceneEncoder
from spa3r_hf.rooms_questions import RoomQuestion
from spa3r_hf.rooms_questions_balance import question_rows
from spa3r_hf.run_facts import RunRecord
from spa3r_hf.spa3_vlm_arguments import (
    ComparisonArguments,
    InstructionArguments,
    InstructionTrainingArguments,
    Spa3VLMArguments,
)
from spa3r_hf.spa3_vlm_comparison import VARIANTS, comparison_table, pick_evenly, score_answers, score_guessing
from spa3r_hf.spa3_vlm_report import evaluation_table, write_spa3_vlm_report
from spa3r_hf.spa3_vlm_trainer import Spa3VLMTrainer, choose_trained, instruction_trainer
from spa3r_hf.training_arguments import checkpoint_to_resume, parse_with_recipe, start_run, usage_errors


logger = logging.getLogger("run_spa3_vlm")
ROOM_IMAGE_SIZE = 112
# What differs from the defaults where there is no data.
ROOMS_DEFAULTS: dict[str, Any] = {
    "max_steps": 200,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "warmup_steps": 0.05,
    "min_frames": 8,
    "max_frames": 8,
    "latents_dir": "outputs/latents",
    "dataloader_num_workers": 1,
    "logging_steps": 25,
    "save_strategy": "no",
}


def parse_arguments(
    argv: list[str],
) -> tuple[Spa3VLMArguments, InstructionArguments, ComparisonArguments, InstructionTrainingArguments]:
    kinds = (Spa3VLMArguments, InstructionArguments, ComparisonArguments, InstructionTrainingArguments)
    arguments = parse_with_recipe(kinds, argv)
    if not arguments[1].data:
        if arguments[1].eval_data:
            raise ValueError(f"eval_data = {arguments[1].eval_data}, but no data to train on; expected --data as well")
        arguments = parse_with_recipe(kinds, argv, ROOMS_DEFAULTS)
    return arguments  # type: ignore[return-value]


# --- parts of a run


def build_model(args: Spa3VLMArguments) -> Spa3VLM:
    vlm_is_trained = args.train == "language_model" or args.train_merger
    options: dict[str, Any] = {
        "dtype": "float32" if args.dtype == "auto" and vlm_is_trained else args.dtype,
        "attn_implementation": args.attn_implementation,
    }
    build = _adapter_to_go_on_from if args.adapter_name_or_path else _fresh_adapter
    model = build(args, options)
    choose_trained(model, args.train, args.train_merger)
    return model


def _fresh_adapter(args: Spa3VLMArguments, options: dict[str, Any]) -> Spa3VLM:
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


def _adapter_to_go_on_from(args: Spa3VLMArguments, options: dict[str, Any]) -> Spa3VLM:
    path = str(args.adapter_name_or_path)
    config = Spa3AdapterConfig.from_pretrained(path)
    for name in ("integration", "spatial_features"):
        asked, own = getattr(args, name), getattr(config, name)
        if asked not in (own, Spa3VLMArguments.__dataclass_fields__[name].default):
            raise ValueError(f"{name} = {asked} is for a new adapter; {path} has {own}")
    model = Spa3VLM.from_pretrained(path, is_trainable=True, **options)
    if model.spatial_encoder is None:
        raise ValueError(f"{path} does not name its spatial encoder; expected one that does")
    return model


def build_processor(model_args: Spa3VLMArguments, data_args: InstructionArguments) -> Spa3VLMProcessor:
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
    data_args: InstructionArguments,
    args: InstructionTrainingArguments,
    use_scenes: bool = True,
    eval_data: InstructionData | None = None,
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
        eval_data=eval_data,
        max_length=data_args.max_length,
        on_bad_sample=data_args.on_bad_sample,
    )


# --- training on the user's data


def open_data(names: Sequence[str], media_dir: str | None, seed: int) -> InstructionData:
    return InstructionData([InstructionSet.open(name, media_dir) for name in names], seed)


def build_run_on_data(
    model_args: Spa3VLMArguments, data_args: InstructionArguments, args: InstructionTrainingArguments
) -> Spa3VLMTrainer:
    """All that is needed to train on the user's data."""
    data = open_data(data_args.data, data_args.media_dir, args.seed)
    eval_data = open_data(data_args.eval_data, data_args.media_dir, args.seed) if data_args.eval_data else None
    model = build_model(model_args)
    processor = build_processor(model_args, data_args)
    trainer = build_trainer(model, processor, data, data_args, args, eval_data=eval_data)
    trained, total = model.get_nb_trainable_parameters()
    logger.info("%.2f M of %.2f M parameters are trained", trained / 1e6, total / 1e6)
    return trainer


def train_on_data(
    trainer: Spa3VLMTrainer, model_args: Spa3VLMArguments, record: RunRecord, resume: str | None
) -> None:
    """Train, and write the adapter with its scores and its card."""
    output_dir = Path(str(trainer.args.output_dir))
    trainer.train(resume_from_checkpoint=resume)
    scores = trainer.score() if trainer.eval_dataset is not None else {}
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    trainer.bad_samples.update(trainer.bad_eval_samples)
    run = run_of(trainer, model_args, record)
    write_spa3_vlm_report(output_dir, run, evaluation_table(scores) if scores else "")
    if scores:
        (output_dir / "eval.json").write_text(json.dumps(scores, indent=2) + "\n")
        logger.info("\n%s\n", evaluation_table(scores))
    if trainer.bad_samples:
        messages = "\n".join(f"{times} x {message}" for message, times in trainer.bad_samples.most_common())
        logger.warning("%d bad samples were left out:\n%s", trainer.bad_samples.total(), messages)
    logger.info("the last loss is %.4f; adapter, card and run.json are in %s", run["loss"], output_dir)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def run_of(trainer: Spa3VLMTrainer, model_args: Spa3VLMArguments, record: RunRecord) -> dict[str, Any]:
    """The facts of a run, for its card."""
    model, config, data = trainer.model, trainer.model.adapter_config, trainer.train_dataset
    return {
        **record.facts(trainer, model),
        "vlm": config.base_model_name_or_path,
        "spatial_encoder": config.spatial_encoder_name_or_path,
        "adapter": config.to_dict(),
        "trained": model_args.train + (", vision merger" if model_args.train_merger else ""),
        "data": [f"{part.num_samples} of {len(part)} records of {part.name} an epoch" for part in data.sets],
        "loss": next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry),
        "bad_samples": dict(trainer.bad_samples.most_common()),
    }


# --- the embedded default: questions about procedural rooms


def check_comparison(
    model_args: Spa3VLMArguments, rooms_args: ComparisonArguments, args: InstructionTrainingArguments
) -> None:
    """
    Raises:
        ValueError: The comparison on procedural rooms cannot be made like this.
    """
    if args.resume_from_checkpoint or args.world_size > 1 or model_args.adapter_name_or_path:
        raise ValueError(
            "the comparison on procedural rooms runs in one process, from its beginning, on fresh adapters; expected "
            "--data for anything else"
        )
    if unknown := sorted(set(rooms_args.variants) - VARIANTS.keys()):
        raise ValueError(f"variants has {unknown}; expected some of {list(VARIANTS)}")


def compare_on_rooms(
    model_args: Spa3VLMArguments,
    data_args: InstructionArguments,
    rooms_args: ComparisonArguments,
    args: InstructionTrainingArguments,
    argv: list[str],
) -> None:
    """Train the base VLM on the same questions in each way, and score all of them on rooms never trained on."""
    output_dir = Path(str(args.output_dir))
    rooms = rooms_args.make(data_args.image_size or ROOM_IMAGE_SIZE, data_args.max_frames, args.seed)
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
        record = RunRecord("run_spa3_vlm.py", argv, own_args, None, started)

        if "untrained" not in results:
            with model.disable_adapter():
                results["untrained"] = score_answers(asked, answer_conversations(model, processor, prompts, None))
        trainer.train()
        trainer.save_model()
        answers = answer_conversations(model, processor, prompts, trainer.scene_encoder)
        write_answers(folder, asked, answers)
        results[name] = score_answers(asked, answers)
        logger.info("%s: %.1f in %.0f s", name, results[name]["overall"], time.monotonic() - started)
        run = run_of(trainer, model_args, record)
        write_spa3_vlm_report(folder, run, comparison_table(results), results[name])
    (output_dir / "eval.json").write_text(json.dumps(results, indent=2) + "\n")
    logger.info("\n%s\n\nadapters, answers and eval.json are in %s", comparison_table(results), output_dir)


def write_answers(folder: Path, questions: Sequence[RoomQuestion], answers: Sequence[str]) -> None:
    """Each question with its answer, a line each, in `answers.jsonl`."""
    rows = [row | {"answer": answer} for row, answer in zip(question_rows(questions), answers, strict=True)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    started = time.monotonic()
    with usage_errors(__name__):
        model_args, data_args, rooms_args, args = parse_arguments(argv)
        start_run(args)
        if data_args.data:
            resume = checkpoint_to_resume(str(args.output_dir), args.resume_from_checkpoint)
            trainer = build_run_on_data(model_args, data_args, args)
            record = RunRecord("run_spa3_vlm.py", argv, args, resume, started)
            trainer.add_callback(record)
        else:
            check_comparison(model_args, rooms_args, args)

    if data_args.data:
        train_on_data(trainer, model_args, record, resume)
    else:
        compare_on_rooms(model_args, data_args, rooms_args, args, argv)


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        # A process that ends while gloo still talks is aborted.
        torch.distributed.destroy_process_group()
