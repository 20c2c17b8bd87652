"""Latents on disk: what is found again, and what is never found."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import scene_pixels, tiny_spa3r
from tiny_vlms import tiny_vlm
from torch import Tensor, nn

from spa3r_hf import Spa3AdapterConfig, Spa3RModel, get_spa3_vlm
from spa3r_hf.latent_cache import LatentCache, SceneEncoder, fingerprint


@pytest.fixture
def encoder() -> Spa3RModel:
    return tiny_spa3r().spa3r


def batch(cache: LatentCache | None, scenes: list[Tensor]) -> dict:
    """As `SFTCollator` gives it."""
    return {"input_ids": 1, **({"spatial_pixel_values": scenes} if cache is None else cache.look_up(scenes))}


class Calls:
    """How often a module was called."""

    def __init__(self, module: nn.Module):
        self.count = 0
        module.register_forward_hook(self)

    def __call__(self, *args) -> None:
        self.count += 1


@pytest.mark.parametrize("features", ["latents", "backbone"])
def test_a_scene_is_encoded_as_the_model_does_it(encoder, features):
    model = get_spa3_vlm(tiny_vlm("qwen2_5_vl"), encoder, Spa3AdapterConfig(spatial_features=features))
    scenes = [*scene_pixels(2, 3), scene_pixels(1, 2)[0]]
    expected = model.get_spatial_latents(scenes)
    result = SceneEncoder(encoder, features).complete(batch(None, scenes))
    assert result.keys() == {"input_ids", "spatial_latents"}
    for one, other in zip(result["spatial_latents"], expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_was_encoded_once_is_read(encoder, tmp_path, dtype):
    scenes = list(scene_pixels(3, 2))
    calls = Calls(encoder)
    first = SceneEncoder(encoder, cache_dir=tmp_path, cache_dtype=dtype)
    made = first.complete(batch(first.cache, scenes[:2]))["spatial_latents"]
    assert calls.count == 2
    # Another run, with a scene that is known and one that is not, which comes twice.
    again = SceneEncoder(encoder, cache_dir=tmp_path, cache_dtype=dtype)
    found = again.complete(batch(again.cache, [scenes[1], scenes[2], scenes[2]]))["spatial_latents"]
    assert calls.count == 3
    assert torch.equal(found[0], made[1]) and torch.equal(found[1], found[2])  # not only nearly
    assert {latents.dtype for latents in made + found} == {getattr(torch, dtype)}
    torch.testing.assert_close(made[0].float(), encoder(scenes[0][None]).latents[0], rtol=1e-2, atol=1e-2)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == {f"{fingerprint(encoder, 'latents')}-{dtype}"}
    assert {path.stem for path in files} == {first.cache.key(views) for views in scenes}
    assert load_file(tmp_path / files[0]).keys() == {"latents"}


def test_a_changed_encoder_reads_nothing_old(encoder, tmp_path):
    views = scene_pixels(1, 2)[0]
    before = SceneEncoder(encoder, cache_dir=tmp_path)
    before.complete(batch(before.cache, [views]))
    changes = {
        "another": tiny_spa3r(seed=1).spa3r,
        "of another form": tiny_spa3r(num_latents=6).spa3r,
        "in another type": tiny_spa3r().spa3r.to(torch.bfloat16),
        "trained on": tiny_spa3r().spa3r,
        "with another norm": tiny_spa3r().spa3r,
    }
    with torch.no_grad():
        next(changes["trained on"].backbone.parameters())[0].add_(1e-6)
    changes["with another norm"].config.backbone_config.layer_norm_eps = 1e-3
    for name, changed in changes.items():
        assert SceneEncoder(changed, cache_dir=tmp_path).cache.load(before.cache.key(views)) is None, name
    for options in ({"spatial_features": "backbone"}, {"cache_dtype": "bfloat16"}):
        assert SceneEncoder(encoder, cache_dir=tmp_path, **options).cache.load(before.cache.key(views)) is None


def test_the_same_encoder_from_elsewhere_reads_it(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "encoder")
    loaded = Spa3RModel.from_pretrained(tmp_path / "encoder").eval()
    assert loaded.name_or_path != encoder.name_or_path
    for features in ("latents", "backbone"):
        assert fingerprint(loaded, features) == fingerprint(encoder, features)
    # What makes the latents of the backbone's features is no part of them.
    with torch.no_grad():
        next(value for name, value in loaded.named_parameters() if not name.startswith("backbone.")).add_(1)
    assert fingerprint(loaded, "latents") != fingerprint(encoder, "latents")
    assert fingerprint(loaded, "backbone") == fingerprint(encoder, "backbone")


def test_keys_tell_pixels_apart(tmp_path):
    cache = LatentCache(tmp_path, "encoder")
    views = scene_pixels(1, 3)[0]
    changed, turned = views.clone(), views.flip(0)
    changed[2, 0, 0, 0] += 1 / 255
    others = [changed, turned, views[:2], views.flatten(2).unflatten(2, (views.shape[3], -1))]
    keys = [cache.key(one) for one in (views, *others)]
    assert len(set(keys)) == 5 and cache.key(views.clone()) == keys[0]


def test_a_damaged_file_is_written_anew(encoder, tmp_path, caplog):
    scenes = SceneEncoder(encoder, cache_dir=tmp_path)
    views = scene_pixels(1, 2)[0]
    made = scenes.complete(batch(scenes.cache, [views]))["spatial_latents"][0]
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    file.write_bytes(file.read_bytes()[:-7])
    with caplog.at_level("WARNING"):
        inputs = batch(scenes.cache, [views])
    assert inputs["spatial_latents"] == [None] and f"{file} cannot be read" in caplog.text
    assert torch.equal(scenes.complete(inputs)["spatial_latents"][0], made)
    assert torch.equal(scenes.cache.load(scenes.cache.key(views)), made)


def test_latents_out_of_range_are_refused(tmp_path):
    cache = LatentCache(tmp_path, "encoder")
    with pytest.raises(ValueError, match="latents reach 1e.05, which torch.float16 cannot hold; .*'bfloat16'"):
        cache.save("key", torch.tensor([[1e5]]))
    assert cache.load("key") is None and not list(cache.folder.iterdir())
    with pytest.raises(ValueError, match="dtype = 'int8'; expected one of"):
        LatentCache(tmp_path, "encoder", "int8")


def _write(folder: Path, count: int) -> None:
    cache = LatentCache(folder, "encoder")
    for _ in range(count):
        cache.save("key", torch.ones(64, 64))


def test_readers_see_whole_files_while_others_write(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path, 100)) for _ in range(2)]
    for writer in writers:
        writer.start()
    cache = LatentCache(tmp_path, "encoder")
    seen = 0
    while any(writer.is_alive() for writer in writers):
        latents = cache.load("key")
        if latents is not None:
            seen += 1
            assert torch.equal(latents, torch.ones(64, 64, dtype=torch.float16))
    assert seen and [writer.exitcode for writer in writers] == [0, 0]
    assert [path.name for path in cache.folder.iterdir()] == ["key.safetensors"]
