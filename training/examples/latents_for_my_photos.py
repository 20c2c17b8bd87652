"""
Spatial latents for my photographs.

    python training/examples/latents_for_my_photos.py photographs/kitchen
    python training/examples/latents_for_my_photos.py room.mp4 --num_views 8 --output room.safetensors

The latents are a description of the scene as a whole: for search, for a head of your own, or for Spa3-VLM.
"""

import argparse
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel

import spa3r_hf  # noqa: F401  # registers the models with the Auto classes
from spa3r_hf.scenes import open_scenes


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", help="a folder of photographs of one place, or a video")
    parser.add_argument("--model", default="hub_configs/spa3r-nano", help="folder or Hub repo")
    parser.add_argument("--num_views", type=int, default=6, help="how many photographs to look at, evenly chosen")
    parser.add_argument("--output", default="latents.safetensors")
    args = parser.parse_args(argv)

    scene = cast(Any, open_scenes(args.photos))[0]
    chosen = np.unique(np.linspace(0, len(scene.images) - 1, args.num_views).round().astype(int)).tolist()
    pictures = [scene.images[index] for index in chosen]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(args.model, dtype="float32").to(device).eval()
    processor = AutoImageProcessor.from_pretrained(args.model)
    pixel_values = processor(pictures, return_tensors="pt")["pixel_values"].to(device)  # (1, V, 3, H, W)
    with torch.no_grad():
        latents = model(pixel_values).latents  # (1, Q, D)

    save_file({"latents": latents.cpu().contiguous()}, args.output)
    print(f"{len(pictures)} views of {scene.name} -> latents {tuple(latents.shape)} in {args.output}")


if __name__ == "__main__":
    main()
