"""
The paper's ablations of PSFM at nano scale: targets, mask ratio, camera conditioning, masking, number of latents.

    python training/ablate_psfm.py                                        # every variant, 3 seeds, on all cores
    python training/ablate_psfm.py --seeds 1 --steps 20 --num_rooms 8 --num_probe_rooms 60 --num_test_rooms 12  # smoke

Every run leaves a JSON file in --output_dir; a run that has one is not made again, so that the command can be stopped
at any time and continued. Tables (`ablations.md`) and a chart (`ablations.png`) are made from these files alone.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from spa3r_hf import Spa3RConfig, Spa3RForPreTraining
from spa3r_hf.geometry_data import RoomGeometryDataset, room_batches, split_walks
from spa3r_hf.psfm_ablation import (
    ProbeData,
    TeacherCache,
    all_variants,
    build_variant,
    measure_backbone,
    measure_variant,
    teacher_fingerprint,
    train_variant,
    write_result,
)
from spa3r_hf.psfm_ablation_report import ablation_chart, ablation_report
from spa3r_hf.psfm_metrics import mean_features
from spa3r_hf.spatial_probes import RoomFacts, backbone_tokens, rooms_of, views_of
from spa3r_hf.training_arguments import parse_with_recipe, read_config, usage_errors


logger = logging.getLogger("ablate_psfm")
REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class AblationArguments:
    model_name_or_path: str = field(
        default=str(REPOSITORY / "hub_configs" / "spa3r-nano"),
        metadata={"help": "Spa3RForPreTraining whose teachers and configuration all variants share."},
    )
    output_dir: str = field(default="outputs/ablations", metadata={"help": "Where everything is written."})
    cache_dir: str = field(default="outputs/rooms", metadata={"help": "Where rendered rooms are kept, 3 MB each."})
    seeds: int = field(default=3, metadata={"help": "Runs of each variant."})
    steps: int = field(default=250, metadata={"help": "Steps of a run, of four rooms each."})
    num_rooms: int = field(default=192, metadata={"help": "Rooms to train on; two sets of eight views of each."})
    num_eval_rooms: int = field(default=32, metadata={"help": "Rooms to predict unseen views of."})
    num_probe_rooms: int = field(default=400, metadata={"help": "Rooms that the probes learn from."})
    num_test_rooms: int = field(default=100, metadata={"help": "Rooms that the probes are scored on."})
    num_processes: int = field(default=os.cpu_count() or 1, metadata={"help": "Runs made side by side."})

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} = {value}; expected at least 1")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)


# Views of a training or evaluation sample; views along the walk to probe with; two disjoint sets of them.
NUM_VIEWS = 8
PROBE_VIEWS = range(0, 40, 5)
HALVES = (range(0, 40, 10), range(5, 40, 10))


@lru_cache(maxsize=1)
def load_base(path: str) -> Spa3RForPreTraining:
    # Eager attention is fastest on CPU at nano size.
    return Spa3RForPreTraining.from_pretrained(path, dtype="float32", attn_implementation="eager").eval()


def image_size_of_rooms(base: Spa3RForPreTraining) -> tuple[int, int]:
    side = base.config.backbone_config.image_size
    return side, side


@lru_cache(maxsize=1)
def rooms(args: AblationArguments) -> tuple[RoomGeometryDataset, list[dict[str, Any]], list[dict[str, Any]]]:
    """Rooms to train on, batches for the mean feature, and batches of held-out rooms."""
    size = image_size_of_rooms(load_base(args.model_name_or_path))
    train = RoomGeometryDataset(split_walks("train", args.num_rooms, size, Path(args.cache_dir)), frame_step=(2, 4))
    test_walks = split_walks("test", args.num_eval_rooms, size, Path(args.cache_dir))
    few = RoomGeometryDataset(split_walks("train", min(16, args.num_rooms), size, Path(args.cache_dir)))
    return (
        train,
        room_batches(few, NUM_VIEWS),
        room_batches(RoomGeometryDataset(test_walks, frame_step=(2, 4)), NUM_VIEWS),
    )


@lru_cache(maxsize=1)
def probe_data(args: AblationArguments) -> ProbeData:
    base = load_base(args.model_name_or_path)
    size = image_size_of_rooms(base)
    learn = split_walks("train", args.num_probe_rooms, size, Path(args.cache_dir))
    test = split_walks("test", args.num_test_rooms, size, Path(args.cache_dir))

    def tokens(walks, views):
        return backbone_tokens(base.spa3r, views_of(walks, views), len(walks))

    return ProbeData(
        tokens=torch.cat((tokens(learn, PROBE_VIEWS), tokens(test, PROBE_VIEWS))),
        num_train=len(learn),
        facts=RoomFacts(rooms_of(learn) + rooms_of(test)),
        halves=(tokens(test, HALVES[0]), tokens(test, HALVES[1])),
    )


def teacher_cache(args: AblationArguments, changes: dict[str, Any]) -> TeacherCache:
    """The answers that a variant learns from. Teachers answer by how views are masked, and by nothing else."""
    base = load_base(args.model_name_or_path)
    model = build_variant(base, {key: changes[key] for key in ("masking_mode", "mask_ratio") if key in changes}, 0)
    name = f"{teacher_fingerprint(base)}_{model.config.masking_mode}_{model.config.mask_ratio}"
    return TeacherCache(args.folder / "teachers" / name, model, rooms(args)[0], NUM_VIEWS, max(1, args.num_rooms // 2))


def run_variant(args: AblationArguments, name: str, changes: dict[str, Any], seed: int) -> str:
    """One run, in a process of its own."""
    torch.set_num_threads(1)
    started = time.monotonic()
    base = load_base(args.model_name_or_path)
    size = image_size_of_rooms(base)
    model = build_variant(base, changes, seed)
    losses = train_variant(model, teacher_cache(args, changes), size, args.steps, seed)
    model.eval()
    _, mean_batches, eval_batches = rooms(args)
    inputs = [{key: batch[key] for key in ("pixel_values", "view_mask")} for batch in mean_batches]
    scores = measure_variant(model, eval_batches, mean_features(model, inputs), probe_data(args), size)
    content = {"changes": changes, "seed": seed, "steps": args.steps, "scores": scores}
    content["losses"] = [round(loss, 4) for loss in losses[:: max(1, len(losses) // 50)]]
    write_result(args.folder / f"{name}_seed{seed}.json", content, started)
    return f"{name}, seed {seed}"


def check_same_settings(args: AblationArguments) -> None:
    """Results of other settings must not be mixed into one table."""
    base = load_base(args.model_name_or_path)
    ignored = {"output_dir", "cache_dir", "seeds", "num_processes", "model_name_or_path"}
    settings = {key: value for key, value in asdict(args).items() if key not in ignored}
    settings["teachers"] = teacher_fingerprint(base)
    path = args.folder / "settings.json"
    if path.exists() and (old := json.loads(path.read_text())) != settings:
        different = sorted(key for key in settings if old.get(key) != settings[key])
        raise ValueError(
            f"{args.folder} holds results with other {', '.join(different)}: {old}; expected the same settings, or "
            "another --output_dir"
        )
    path.write_text(json.dumps(settings, indent=2) + "\n")


def make_runs(args: AblationArguments, pending: list[tuple[str, dict[str, Any], int]]) -> Iterator[str]:
    """Yields the name of each run when it is done."""
    if args.num_processes == 1:
        yield from (run_variant(args, *job) for job in pending)
        return
    with ProcessPoolExecutor(args.num_processes, mp_context=get_context("spawn")) as pool:
        for job in as_completed([pool.submit(run_variant, args, *job) for job in pending]):
            yield job.result()


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with usage_errors(__name__):
        (args,) = parse_with_recipe((AblationArguments,), sys.argv[1:] if argv is None else argv)
        read_config("model_name_or_path", args.model_name_or_path, Spa3RConfig)
        args.folder.mkdir(parents=True, exist_ok=True)
        check_same_settings(args)
    pending = [
        (name, changes, seed)
        for seed in range(args.seeds)
        for name, changes in all_variants().items()
        if not (args.folder / f"{name}_seed{seed}.json").exists()
    ]
    if not (args.folder / "backbone.json").exists():
        started = time.monotonic()
        scores = measure_backbone(load_base(args.model_name_or_path), probe_data(args))
        content = {"scores": scores, "num_test_rooms": args.num_test_rooms}
        write_result(args.folder / "backbone.json", content, started)
    if pending:
        logger.info("keeping teachers' answers")
        for changes in all_variants().values():
            teacher_cache(args, changes)
    logger.info("%d runs to make, %d side by side", len(pending), args.num_processes)
    for count, name in enumerate(make_runs(args, pending), start=1):
        logger.info("%d of %d: %s", count, len(pending), name)
    report = ablation_report(args.folder)
    (args.folder / "ablations.md").write_text(report)
    ablation_chart(args.folder).save(args.folder / "ablations.png")
    logger.info("\n%s\ntables and chart are in %s", report, args.folder)


if __name__ == "__main__":
    main()
