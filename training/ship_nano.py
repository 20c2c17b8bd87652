"""
Put the trained nano family into its Hub folders: float16, shared weights once, cards and scores beside them.

    python training/ship_nano.py --geometry outputs/geometry --semantic outputs/semantic --spa3r outputs/psfm

`vggt-nano` holds no weights of its own: its index points to those inside `spa3r-nano`, whose backbone it is. What the
shipped files score on a few held-out rooms goes to `spa3r-nano/check.json`; a test holds them to it.
"""

import json
import logging
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoImageProcessor, AutoModel, DINOv3ViTConfig, HfArgumentParser

from spa3r_hf import Spa3RForPreTraining
from spa3r_hf.geometry_report import geometry_table, write_geometry_card
from spa3r_hf.licences import describe_sources
from spa3r_hf.model_card import psfm_table, write_psfm_card
from spa3r_hf.nano_family import measure_nano, same_weights
from spa3r_hf.psfm_ablation_report import ablation_report
from spa3r_hf.run_facts import without_folders
from spa3r_hf.semantic_report import write_semantic_report
from spa3r_hf.semantic_trainer import probe_table


logger = logging.getLogger("ship_nano")
REPOSITORY = Path(__file__).resolve().parent.parent
NAMES = ("vggt-nano", "dinov3-rooms-nano", "spa3r-nano")
BACKBONE_PREFIX = "spa3r.backbone."
MARKS = ("<!-- results of the nano family: written by training/ship_nano.py -->", "<!-- end of these results -->")


@dataclass
class ShipArguments:
    geometry: str = field(metadata={"help": "Output folder of run_geometry.py."})
    semantic: str = field(metadata={"help": "Output folder of run_semantic.py."})
    spa3r: str = field(metadata={"help": "Output folder of run_psfm.py, trained with these two as teachers."})
    ablations: str | None = field(default=None, metadata={"help": "Output folder of ablate_psfm.py."})
    readme: str = field(
        default=str(REPOSITORY / "README.md"), metadata={"help": "Where the results go, between its two marks."}
    )
    output_dir: str = field(
        default=str(REPOSITORY / "hub_configs"),
        metadata={"help": "Where vggt-nano, dinov3-rooms-nano, spa3r-nano are."},
    )


def write_papers(source: Path, target: Path) -> None:
    """Card, scores, facts and pictures, with the name the model has from now on."""
    scores, run = (json.loads((source / name).read_text()) for name in ("eval.json", "run.json"))
    # What it was made of is in these folders: rooms, and the others of the family.
    run |= {"name": target.name, "command": without_folders(run["command"])}
    run |= {"sources": describe_sources([run["data"]])}
    if target.name == "spa3r-nano":
        run["teachers"] = list(NAMES[:2])
    if (source / "pictures").exists():
        shutil.copytree(source / "pictures", target / "pictures", dirs_exist_ok=True)
    if target.name == "vggt-nano":
        write_geometry_card(target, scores, run)
    elif target.name == "dinov3-rooms-nano":
        write_semantic_report(target, DINOv3ViTConfig.from_pretrained(source), scores, run)
    else:
        for name, content in (("eval.json", scores), ("run.json", run)):
            (target / name).write_text(json.dumps(content, indent=2) + "\n")
        write_psfm_card(target, scores, run)


def made(run: dict[str, Any]) -> str:
    hardware = run["hardware"] + (f", {run['processes']} processes" if run["processes"] > 1 else "")
    minutes = f"{run['seconds'] / 60:.0f} minutes on {hardware}"
    return f"`{without_folders(run['command'])}`: {run['steps']} steps, seed {run['seed']}, {minutes}."


def results_section(sources: dict[str, Path], ablations: Path | None) -> str:
    """Markdown: what each of the family scores, and the command that made it, from the runs' own files."""
    scores, runs = (
        {name: json.loads((source / file).read_text()) for name, source in sources.items()}
        for file in ("eval.json", "run.json")
    )
    psfm = scores["spa3r-nano"]
    depth = psfm["unseen_depth"]
    titles = {
        "vggt-nano": f"the geometry backbone, on {runs['vggt-nano']['held_out']}",
        "dinov3-rooms-nano": f"the semantic teacher, on {runs['dinov3-rooms-nano']['held_out']}",
        "spa3r-nano": (
            f"PSFM on these two, cameras from the backbone, on {psfm['num_target_views']} target views of "
            f"{psfm['num_scenes']} rooms never trained on"
        ),
    }
    probed = (
        f"True depth of unseen views by the depth probe: AbsRel {depth['probe_abs_rel']:.3f}; by the backbone, which "
        f"sees them: {depth['backbone_abs_rel']:.3f}."
    )
    tables = {
        "vggt-nano": geometry_table(scores["vggt-nano"]),
        "dinov3-rooms-nano": probe_table(scores["dinov3-rooms-nano"]),
        "spa3r-nano": f"{psfm_table(psfm)}\n\n{probed}",
    }
    parts = [f"**`{name}`**, {titles[name]}:\n\n{tables[name]}\n\n{made(runs[name])}" for name in sources]
    if ablations is not None:
        parts.append(
            "**The paper's ablations at nano scale**, `python training/ablate_psfm.py`:\n\n"
            f"![ablations](hub_configs/spa3r-nano/pictures/ablations.png)\n\n{ablation_report(ablations)}"
        )
    return "\n\n".join(parts)


def write_between_marks(path: Path, text: str) -> None:
    """Replace what stands between the marks of the results in a Markdown file."""
    before, _, rest = path.read_text().partition(MARKS[0])
    _, found, after = rest.partition(MARKS[1])
    if not found:
        raise ValueError(f"{path} lacks {MARKS[0]} and {MARKS[1]}; expected both, around the results")
    path.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


def main(argv: list[str] | None = None) -> None:
    parser: Any = HfArgumentParser(ShipArguments, allow_abbrev=False)  # type: ignore[arg-type]
    (args,) = parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    folders = {name: Path(args.output_dir) / name for name in NAMES}
    sources = dict(zip(folders, (Path(args.geometry), Path(args.semantic), Path(args.spa3r)), strict=True))

    spa3r = Spa3RForPreTraining.from_pretrained(sources["spa3r-nano"])
    backbone = AutoModel.from_pretrained(sources["vggt-nano"])
    semantic = AutoModel.from_pretrained(sources["dinov3-rooms-nano"])
    for folder, own, inside in (
        (args.geometry, backbone, spa3r.spa3r.backbone),
        (args.semantic, semantic, spa3r.semantic_teacher),
    ):
        if inside is None or not same_weights(own, inside):
            raise ValueError(f"{args.spa3r} was trained with other teachers than {folder}; expected the same weights")

    for part in (spa3r.config.backbone_config, spa3r.config.semantic_config):
        part._name_or_path = ""  # a folder of this machine
    for name, model in (("spa3r-nano", spa3r), ("dinov3-rooms-nano", semantic)):
        model.half().save_pretrained(folders[name])
    backbone.config.save_pretrained(folders["vggt-nano"])
    weights = "model.safetensors"
    with safe_open(folders["spa3r-nano"] / weights, "pt") as file:
        keys = [key for key in file.keys() if key.startswith(BACKBONE_PREFIX)]
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, f"../spa3r-nano/{weights}")}
    (folders["vggt-nano"] / f"{weights}.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for name in ("vggt-nano", "spa3r-nano"):
        AutoImageProcessor.from_pretrained(sources[name]).save_pretrained(folders[name])
    for name, source in sources.items():
        write_papers(source, folders[name])
        for code in folders[name].glob("*.py"):  # the package has it
            code.unlink()

    ablations = Path(args.ablations) if args.ablations else None
    results = results_section(sources, ablations)
    write_between_marks(Path(args.readme), results)
    if ablations is not None:
        shutil.copyfile(ablations / "ablations.png", folders["spa3r-nano"] / "pictures" / "ablations.png")
        card = folders["spa3r-nano"] / "README.md"
        report = f"## Ablations\n\n![ablations](pictures/ablations.png)\n\n{ablation_report(ablations)}\n"
        card.write_text(card.read_text().replace("## Licence\n", f"{report}\n## Licence\n", 1))
    check = measure_nano(Path(args.output_dir))
    (folders["spa3r-nano"] / "check.json").write_text(json.dumps(check, indent=2) + "\n")
    size = sum(path.stat().st_size for folder in folders.values() for path in folder.glob("*.safetensors"))
    logger.info("%.1f MB of weights in %s", size / 1e6, ", ".join(map(str, folders.values())))


if __name__ == "__main__":
    main()
