"""
Ask the field what a camera would see that never took a picture.

    python training/examples/query_a_novel_view.py photographs/kitchen --yaw 20 --forward 0.5

Shown are the photographs, their features, and those predicted for a camera where the first one stood, turned, moved.
"""

import argparse
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoImageProcessor

from spa3r_hf import Spa3RForPreTraining
from spa3r_hf.scenes import open_scenes
from spa3r_hf.visualization import feature_basis
from spa3r_hf.visualization_geometry import picture_grid


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", help="a folder of photographs of one place, or a video")
    parser.add_argument("--model", default="hub_configs/spa3r-nano", help="folder or Hub repo")
    parser.add_argument("--yaw", type=float, default=20.0, help="degrees to the right")
    parser.add_argument("--pitch", type=float, default=0.0, help="degrees upwards")
    parser.add_argument("--forward", type=float, default=0.0, help="in the scene's units")
    parser.add_argument("--output", default="novel_view.png")
    args = parser.parse_args(argv)

    scene = cast(Any, open_scenes(args.photos))[0]
    chosen = np.unique(np.linspace(0, len(scene.images) - 1, 4).round().astype(int)).tolist()
    pictures = [scene.images[index] for index in chosen]
    model = Spa3RForPreTraining.from_pretrained(args.model, dtype="float32").eval()
    pixel_values = AutoImageProcessor.from_pretrained(args.model)(pictures, return_tensors="pt")["pixel_values"]
    image_size = tuple(pixel_values.shape[-2:])
    seen = model.spa3r.backbone(pixel_values, output_cameras=True)  # its world is the first photograph's camera

    yaw, pitch = np.radians((args.yaw, args.pitch))
    turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])  # OpenCV: y is down
    tilt = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
    rotation = turn @ tilt  # world <- camera
    moved = [[0], [0], [-args.forward]]  # the camera goes forwards: the world comes towards it
    extrinsics = torch.tensor(np.hstack((rotation.T, moved)), dtype=torch.float32)[None, None]
    view = model.decode(model.spa3r(pixel_values).latents, extrinsics, seen.intrinsics[:, :1], image_size)

    config = model.config.backbone_config
    own = seen.last_hidden_state[0, :, config.num_prefix_tokens :]  # (V, N, 2C)
    maps = torch.cat((own, view.geometric_prediction[0])).unflatten(1, (-1, image_size[1] // config.patch_size))
    basis = feature_basis(own.numpy())
    rows = {"photographs": list(map(np.asarray, pictures)), "features": [basis.to_rgb(each) for each in maps.numpy()]}
    picture_grid(rows, "last: the view that is asked for").save(args.output)
    print(f"{len(chosen)} views of {scene.name}, turned by {args.yaw:g} degrees: {args.output}")


if __name__ == "__main__":
    main()
