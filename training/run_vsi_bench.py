"""
Ask a vision-language model the questions of VSI-Bench or one of its neighbours, and score the answers.

With no arguments: the shipped nano Spa3-VLM, on videos of generated rooms, in under five minutes on two CPU cores.

    python training/run_vsi_bench.py
    python training/run_vsi_bench.py --num_rooms 2 --limit 20                                                  # smoke
    python training/run_vsi_bench.py --adapter org/spa3-vlm --benchmark vsi_bench --min_frames 32 --max_frames 32
    python training/run_vsi_bench.py --adapter org/spa3-vlm --no_adapter --source data/vsi_bench       # its VLM alone
    torchrun --nproc_per_node 8 training/run_vsi_bench.py --vlm Qwen/Qwen2.5-VL-3B-Instruct --benchmark cv_bench
    python training/run_vsi_bench.py --answers constant:A/2 --source data/vsi_bench                         # no model
    python training/run_vsi_bench.py --compare outputs/vsi_bench/one outputs/vsi_bench/other

The same command goes on after a stop. A YAML or JSON file of arguments may come first; flags override it.
"""

import hashlib
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed import run as torch_run
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from spa3r_hf.benchmarks import download_media, fingerprint, load_benchmark, with_media
from spa3r_hf.benchmarks_questions import Question
from spa3r_hf.evaluation_answers import given_answers
from spa3r_hf.evaluation_comparison import compare, comparison_text
from spa3r_hf.evaluation_model import EvaluatedModel, Source, without_places
from spa3r_hf.evaluation_report import hash_of_prompts, library_versions, machine, write_report
from spa3r_hf.evaluation_run import Processes, answer_all, device_of
from spa3r_hf.evaluation_scores import evaluate_answers
from spa3r_hf.evaluation_store import Answer, check_settings, write_whole
from spa3r_hf.optional import require
from spa3r_hf.rooms_benchmark import room_benchmark
from spa3r_hf.run_facts import shown_command, shown_path
from spa3r_hf.scene_answers import SceneAnswerer
from spa3r_hf.training_arguments import parse_with_recipe


logger = logging.getLogger("run_vsi_bench")
REPOSITORY = Path(__file__).resolve().parent.parent
ALL_PICTURES = 1000  # of a question that is not about a video: more than there are
NANO = REPOSITORY / "hub_configs" / "spa3-vlm-nano"


@dataclass
class ModelArguments:
    adapter_name_or_path: str | None = field(
        default=None,
        metadata={"help": f"Folder or Hub repo. Default, without a VLM: {NANO.name}.", "aliases": ["--adapter"]},
    )
    adapter_revision: str | None = field(default=None, metadata={"help": "Of the adapter's repo."})
    no_adapter: bool = field(default=False, metadata={"help": "Ask the adapter's VLM alone, with the same frames."})
    vlm_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A VLM, folder or Hub repo. Default: the adapter's.", "aliases": ["--vlm"]},
    )
    vlm_revision: str | None = field(default=None, metadata={"help": "Of the VLM's repo."})
    spatial_encoder_name_or_path: str | None = field(
        default=None, metadata={"help": "A spatial encoder, folder or Hub repo. Default: the adapter's."}
    )
    spatial_encoder_revision: str | None = field(default=None, metadata={"help": "Of the spatial encoder's repo."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Of the VLM's weights. auto: as they were saved; float32 on a CPU."}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    seconds_per_frame: float | None = field(
        default=None, metadata={"help": "A frame of a video every so many seconds. Default: the processor's own,"}
    )
    min_frames: int | None = field(default=None, metadata={"help": "as that of the least frames,"})
    max_frames: int | None = field(default=None, metadata={"help": "of the most,"})
    image_size: int | None = field(default=None, metadata={"help": "and of the width in pixels."})


@dataclass
class BenchmarkArguments:
    benchmark: Literal["vsi_bench", "cv_bench", "spar_bench", "viewspatial_bench"] | None = field(
        default=None,
        metadata={"help": "Default: vsi_bench, on generated rooms if there is no --source and no --config either."},
    )
    config: str | None = field(
        default=None, metadata={"help": "VSI-Bench: full, debiased, pruned. CV-Bench: default, 2D, 3D."}
    )
    source: str | None = field(
        default=None,
        metadata={"help": "A folder, a parquet, JSONL or JSON file, or a Hub repo. Default: its own repo."},
    )
    revision: str | None = field(default=None, metadata={"help": "Of the benchmark's repo."})
    media_dir: str | None = field(
        default=None,
        metadata={"help": "Videos or pictures, or zips of them. Default: beside the source, or its repo."},
    )
    limit: int | None = field(default=None, metadata={"help": "Ask so many questions only, the first ones."})
    num_rooms: int = field(default=12, metadata={"help": "Generated rooms."})
    num_questions: int = field(default=240, metadata={"help": "About these, at most."})
    rooms_dir: str = field(
        default="outputs/room_videos", metadata={"help": "Where their videos are kept for later runs."}
    )
    num_workers: int = field(default=2, metadata={"help": "Processes that make these."})


@dataclass
class RunArguments:
    output_dir: str | None = field(
        default=None, metadata={"help": "Default: outputs/<benchmark>/<name of what is evaluated>."}
    )
    answers: str | None = field(
        default=None,
        metadata={"help": "No model: 'constant:A/2' (letter, number), or a JSONL file of id and prediction."},
    )
    compare: list[str] = field(
        default_factory=list, metadata={"help": "Nothing is asked: two output folders, to be compared."}
    )
    batch_size: int = field(default=8, metadata={"help": "Questions of a scene that are answered at once."})
    max_new_tokens: int = field(default=16, metadata={"help": "The longest answer."})
    reuse: bool = field(
        default=True, metadata={"help": "Whether the questions of a scene share frames, latents and the KV cache."}
    )
    on_bad_sample: Literal["raise", "skip"] = field(
        default="raise",
        metadata={"help": "What to do about scenes that cannot be used: skip counts their questions as wrong."},
    )
    num_processes: int = field(default=1, metadata={"help": "Processes on this machine (else see torchrun)."})
    use_cpu: bool = field(default=False, metadata={"help": "Even where there are GPUs."})
    seed: int = field(default=0, metadata={"help": "Of the questions about rooms; answers are greedy."})


@dataclass(frozen=True)
class Benchmark:
    """What is asked: `all_questions` of the benchmark, of which `questions` are wanted."""

    name: str
    config: str
    data: str
    source: str | None
    are_rooms: bool
    all_questions: Sequence[Question]
    questions: Sequence[Question]

    def settings(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "config": self.config,
            "data_fingerprint": fingerprint(self.all_questions),
            "prompts_sha256": hash_of_prompts(self.all_questions),
        }


# --- parts of a run


def open_benchmark(args: BenchmarkArguments, seed: int, processes: Processes) -> Benchmark:
    are_rooms = args.benchmark is None and args.source is None and args.config is None
    source, name = args.source, args.benchmark or "vsi_bench"
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"limit = {args.limit}; expected 1 question or more")
    if are_rooms:
        rooms = (args.rooms_dir, args.num_rooms, args.num_questions)
        logger.info("videos of %d rooms and questions about them are made, or found, in %s", args.num_rooms, rooms[0])
        source = str(processes.first_alone(lambda: room_benchmark(*rooms, seed=seed, num_workers=args.num_workers)))
    questions = processes.first_alone(lambda: load_benchmark(name, source, config=args.config, revision=args.revision))
    config = args.config or ("full" if name == "vsi_bench" else "default")
    data = f"{args.num_rooms} generated rooms" if are_rooms else f"{shown_path(source or 'the Hub')} ({config})"
    return Benchmark(name, config, data, source, are_rooms, questions, questions[: args.limit])


def find_media(benchmark: Benchmark, args: BenchmarkArguments, unusable: dict[str, str] | None) -> list[Question]:
    """The wanted questions with their media; all that are missing are named before anything is asked."""
    questions = benchmark.questions
    if not any(question.media for question in questions):  # they came with the questions
        return list(questions)
    source = Path(benchmark.source) if benchmark.source else None
    if args.media_dir is not None:
        folder = Path(args.media_dir)
    elif source is not None and source.exists():
        folder = source if source.is_dir() else source.parent
    else:
        folder = download_media(benchmark.name, questions, args.revision)
    return with_media(questions, folder, unusable=unusable)


def choose_model(args: ModelArguments) -> EvaluatedModel:
    adapter, vlm, encoder = (
        Source(name, revision) if name else None
        for name, revision in (
            (args.adapter_name_or_path, args.adapter_revision),
            (args.vlm_name_or_path, args.vlm_revision),
            (args.spatial_encoder_name_or_path, args.spatial_encoder_revision),
        )
    )
    if adapter is None and vlm is None:
        if not NANO.is_dir():
            raise FileNotFoundError(
                f"there is no {NANO}: `python training/build_nano_vlm.py` makes its VLM, and then `python "
                "training/run_spa3_vlm.py` an adapter in outputs/spa3_vlm; expected one of these by --adapter, or any "
                "VLM by --vlm"
            )
        adapter = Source(os.path.relpath(NANO))
    return EvaluatedModel.choose(adapter, vlm, encoder, not args.no_adapter)


def default_folder(benchmark: Benchmark, name: str) -> Path:
    parts = [name, *([] if benchmark.config in ("full", "default") else [benchmark.config])]
    parts += ["rooms"] if benchmark.are_rooms else []
    return Path("outputs", benchmark.name, re.sub(r"[^\w.-]+", "_", "_".join(parts)).strip("_."))


# --- the three things this script does


def ask_model(
    model: EvaluatedModel,
    benchmark: Benchmark,
    model_args: ModelArguments,
    benchmark_args: BenchmarkArguments,
    args: RunArguments,
    processes: Processes,
) -> tuple[Path, str, dict[str, Any], dict[str, Answer]]:
    """Folder, name, facts and answers of a model."""
    unusable: dict[str, str] | None = {} if args.on_bad_sample == "skip" else None
    questions = processes.first_alone(lambda: find_media(benchmark, benchmark_args, unusable))
    device = device_of(processes, args.use_cpu)
    names = ("seconds_per_frame", "min_frames", "max_frames")
    frames = {name: getattr(model_args, name) for name in names if getattr(model_args, name) is not None}
    processor = model.load_processor(model_args.image_size, **frames)
    if benchmark.name != "vsi_bench" and model_args.max_frames is None:
        processor.max_frames = ALL_PICTURES
    dtype = model.dtype(model_args.dtype, device)
    folder = Path(args.output_dir) if args.output_dir else default_folder(benchmark, model.name)
    facts: dict[str, Any] = {}
    if processes.is_first:
        own = model.settings(processor, dtype, model_args.attn_implementation, args.max_new_tokens)
        facts["settings"] = benchmark.settings() | own
        check_settings(folder, without_places(facts["settings"]))
    processes.wait()

    def make_answerer() -> SceneAnswerer:
        return SceneAnswerer(
            model.load(dtype, model_args.attn_implementation, device),
            processor,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            reuse=args.reuse,
        )

    answers, num_asked, seconds = answer_all(
        make_answerer, questions, folder, processes, on_bad_sample=args.on_bad_sample, unusable=unusable
    )
    facts |= {
        "machine": machine(device),
        "processes": processes.count,
        "batch_size": args.batch_size,
        "reuse": args.reuse,
        "asked_now": num_asked,
        "seconds_asking": round(seconds, 2),
        "questions_per_second": round(num_asked / seconds, 3) if num_asked else None,
        "seconds_of_all_answers": round(sum(answers[question.id].seconds for question in questions), 2),
    }
    return folder, model.name, facts, answers


def take_answers(benchmark: Benchmark, args: RunArguments) -> tuple[Path, str, dict[str, Any], dict[str, Answer]]:
    """Folder, name, facts and answers that are there already."""
    given, path = str(args.answers), Path(str(args.answers))
    answers = given_answers(given, benchmark.all_questions, benchmark.questions, args.on_bad_sample)
    is_file = path.is_file()
    name = path.stem if is_file else given
    folder = Path(args.output_dir) if args.output_dir else default_folder(benchmark, name)
    content = hashlib.sha256(path.read_bytes()).hexdigest() if is_file else given
    settings = benchmark.settings() | {"answers": content}
    check_settings(folder, settings)
    return folder, name, {"settings": settings, "machine": machine(torch.device("cpu"))}, answers


def compare_two(args: RunArguments) -> None:
    if len(args.compare) != 2:
        raise ValueError(f"compare = {args.compare}; expected two output folders")
    text = comparison_text(compare(*args.compare))
    path = Path(args.output_dir or args.compare[1], "comparison.md")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    sys.stdout.write(text)
    logger.info("this is in %s", path)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    started = time.monotonic()
    kinds = (ModelArguments, BenchmarkArguments, RunArguments)
    model_args, benchmark_args, args = parse_with_recipe(kinds, argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if args.compare:
        compare_two(args)
        return
    if args.num_processes > 1 and "WORLD_SIZE" not in os.environ:
        torch_run.main(["--standalone", f"--nproc_per_node={args.num_processes}", __file__, *argv])
        return
    processes = Processes.start()
    logger.setLevel(logging.INFO if processes.is_first else logging.WARNING)
    disable_progress_bar()  # of loading
    require("matplotlib", extra="eval")  # better now than when all has been answered
    set_seed(args.seed)
    model = choose_model(model_args) if args.answers is None else None
    benchmark = open_benchmark(benchmark_args, args.seed, processes)
    if model is not None:
        folder, name, facts, answers = ask_model(model, benchmark, model_args, benchmark_args, args, processes)
    elif processes.is_first:
        folder, name, facts, answers = take_answers(benchmark, args)
    if processes.is_first:
        evaluation = evaluate_answers(benchmark.name, benchmark.questions, answers)
        facts |= {
            "command": shown_command("run_vsi_bench.py", argv, processes.count),
            "config": benchmark.config,
            "data_revision": benchmark_args.revision,
            "limit": benchmark_args.limit,
            "seed": args.seed,
            "versions": library_versions(),
            "seconds": round(time.monotonic() - started, 2),
        }
        results = write_report(folder, evaluation, facts, name, benchmark.data, benchmark.are_rooms)
        for failure in results["failures"]:
            logger.warning("not answered, counted as wrong: %s: %s", ", ".join(failure["ids"]), failure["reason"])
        text = (folder / "table.md").read_text()
        logger.info("%s\noverall: %.4f; all of it is in %s", text, results["overall"], folder)
    processes.stop()


if __name__ == "__main__":
    main()
