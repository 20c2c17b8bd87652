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
from transformers import AutoImageProcessor, AutoModel, HfArgumentParser

from spa3r_hf import Spa3RForPreTraining
from spa3r_hf.nano_family import measure_nano, same_weights


logger = logging.getLogger("ship_nano")
REPOSITORY = Path(__file__).resolve().parent.parent
BACKBONE_PREFIX = "spa3r.backbone."


@dataclass
class ShipArguments:
    geometry: str = field(metadata={"help": "Output folder of run_geometry.py."})
    semantic: str = field(metadata={"help": "Output folder of run_semantic.py."})
    spa3r: str = field(metadata={"help": "Output folder of run_psfm.py, trained with these two as teachers."})
    output_dir: str = field(
        default=str(REPOSITORY / "hub_configs"),
        metadata={"help": "Where vggt-nano, dinov3-rooms-nano, spa3r-nano are."},
    )


def copy_papers(source: Path, target: Path) -> None:
    """Card, scores, facts and pictures, with the name the model has from now on."""
    old, new = json.loads((source / "run.json").read_text())["name"], target.name
    for name in ("eval.json", "run.json"):
        shutil.copyfile(source / name, target / name)
    card = (source / "README.md").read_text()
    card = card.replace(f"# {old}\n", f"# {new}\n").replace(f'from_pretrained("{old}")', f'from_pretrained("{new}")')
    (target / "README.md").write_text(card.replace(f"name: {old}\n", f"name: {new}\n"))
    if (source / "pictures").exists():
        shutil.copytree(source / "pictures", target / "pictures", dirs_exist_ok=True)


def main(argv: list[str] | None = None) -> None:
    parser: Any = HfArgumentParser(ShipArguments, allow_abbrev=False)  # type: ignore[arg-type]
    (args,) = parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    folders = {name: Path(args.output_dir) / name for name in ("vggt-nano", "dinov3-rooms-nano", "spa3r-nano")}
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

    for name, model in (("spa3r-nano", spa3r), ("dinov3-rooms-nano", semantic)):
        model.half().save_pretrained(folders[name])
        for code in folders[name].glob("*.py"):  # the repository has it
            code.unlink()
    backbone.config.save_pretrained(folders["vggt-nano"])
    for code in folders["vggt-nano"].glob("*.py"):
        code.unlink()
    weights = "model.safetensors"
    with safe_open(folders["spa3r-nano"] / weights, "pt") as file:
        keys = [key for key in file.keys() if key.startswith(BACKBONE_PREFIX)]
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, f"../spa3r-nano/{weights}")}
    (folders["vggt-nano"] / f"{weights}.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for name in ("vggt-nano", "spa3r-nano"):
        AutoImageProcessor.from_pretrained(sources[name]).save_pretrained(folders[name])
    for name, source in sources.items():
        copy_papers(source, folders[name])

    check = measure_nano(Path(args.output_dir))
    (folders["spa3r-nano"] / "check.json").write_text(json.dumps(check, indent=2) + "\n")
    size = sum(path.stat().st_size for folder in folders.values() for path in folder.glob("*.safetensors"))
    logger.info("%.1f MB of weights in %s", size / 1e6, ", ".join(map(str, folders.values())))


if __name__ == "__main__":
    main()
