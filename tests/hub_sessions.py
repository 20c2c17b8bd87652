"""What the processes of `test_hub` do; each has a cache of its own, and no other Hub than that on loopback."""

import contextlib
import io
import json
import os
import runpy
import shutil
import sys
import urllib.request
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[1]
OWNER = "hf_owner"


def interrupt(method: str, part: str, times: int = 1, after: float = 0.5) -> None:
    """See `LoopbackHub.interrupt`."""
    _tell_hub("interrupt", {"method": method, "part": part, "times": times, "after": after})


def recover() -> None:
    """See `LoopbackHub.recover`."""
    _tell_hub("recover", {})


def _tell_hub(what: str, settings: dict) -> None:
    request = urllib.request.Request(f"{os.environ['HF_ENDPOINT']}/{what}", json.dumps(settings).encode())
    urllib.request.urlopen(request).close()


def message_of(function, *args, kind=Exception, **kwargs) -> str:
    """What a call says that fails."""
    from spa3r_hf.hub_errors import explain_hub_error

    try:
        function(*args, **kwargs)
    except kind as error:
        return explain_hub_error(error) or str(error)
    raise AssertionError(f"{function} {args} did not fail")


def script(name: str, *arguments) -> str:
    """Run a training script as a command; what it writes to stderr, and its exit code at the end."""
    sys.argv = [str(REPOSITORY / "training" / name), *map(str, arguments)]
    errors, code = io.StringIO(), 0
    with contextlib.redirect_stderr(errors):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
    return f"{errors.getvalue().strip()}\nexit {code}"


def spa3_vlm_inputs() -> dict:
    from tiny_vlms import SAMPLES, scenes, tiny_inputs

    return {**tiny_inputs("qwen2_5_vl", SAMPLES), "spatial_pixel_values": scenes()}


def encoder_results(encoder) -> dict:
    from tiny_models import scene_pixels

    return {"latents": encoder(scene_pixels(num_views=2)).latents.contiguous()}


# --- a process that sends


def push(root: Path) -> None:
    """Send a model of every kind, with `push_to_hub`; a revision and a private repo; what was interrupted again."""
    import torch
    from huggingface_hub import HfApi
    from safetensors.torch import save_file
    from tiny_models import scene_pixels, tiny_spa3r
    from tiny_processors import tiny_vlm_folder
    from tiny_vlms import LORA, disturb, tiny_vlm
    from transformers import AutoModel, AutoModelForImageTextToText

    from spa3r_hf import Spa3AdapterConfig, Spa3RImageProcessor, Spa3VLMProcessor, get_spa3_vlm
    from spa3r_hf.hub_upload import push_folder

    torch.set_grad_enabled(False)
    expected = {}
    whole = tiny_spa3r()
    whole.push_to_hub("org/spa3r")
    Spa3RImageProcessor(size=42).push_to_hub("org/spa3r")
    expected |= encoder_results(whole.spa3r)
    expected["features"] = whole.spa3r.backbone(scene_pixels(num_views=2)).last_hidden_state.contiguous()
    whole.spa3r.push_to_hub("org/private", private=True)
    whole.spa3r.backbone.push_to_hub("org/vggt")
    HfApi().create_tag("org/spa3r", tag="v1")
    changed = tiny_spa3r(seed=1)
    changed.push_to_hub("org/spa3r", revision="second")
    expected["second"] = encoder_results(changed.spa3r)["latents"]

    tiny_vlm("qwen2_5_vl").save_pretrained(root / "vlm")
    tiny_vlm_folder("qwen2_5_vl", root / "vlm")
    push_folder(root / "vlm", "org/vlm")
    vlm = AutoModelForImageTextToText.from_pretrained("org/vlm")
    settings = Spa3AdapterConfig(lora_config=LORA)
    model = disturb(get_spa3_vlm(vlm, AutoModel.from_pretrained("org/spa3r"), settings)).eval()
    model.push_to_hub("org/adapter", token=OWNER)
    processor = Spa3VLMProcessor.from_vlm("org/vlm", Spa3RImageProcessor(size=28))
    processor.push_to_hub("org/adapter")
    expected["adapter"] = model(**spa3_vlm_inputs()).logits.contiguous()

    # An adapter of folders of this machine.
    whole.save_pretrained(root / "encoder")
    local = get_spa3_vlm(
        AutoModelForImageTextToText.from_pretrained(root / "vlm"),
        AutoModel.from_pretrained(root / "encoder"),
        settings,
    )
    disturb(local).eval().save_pretrained(root / "local")
    expected["local"] = local(**spa3_vlm_inputs()).logits.contiguous()
    print(script("push_to_hub.py", "--folder", root / "local", "--repo_id", "org/local"))
    shutil.rmtree(root / "vlm")
    shutil.rmtree(root / "encoder")

    configs = REPOSITORY / "hub_configs"
    models = ((configs / name, "model") for name in ("vggt-nano", "spa3-vlm-nano"))
    for folder, kind in (*models, (configs / "vsi_bench", "metric"), (root / "app", "space")):
        print(script("push_to_hub.py", "--folder", folder, "--repo_id", f"org/{folder.name}", "--kind", kind))
    print(script("push_to_hub.py", "--folder", root / "results", "--repo_id", "org/adapter", "--kind", "results"))
    print(script("push_to_hub.py", "--folder", root / "nothing", "--repo_id", "org/nothing"))

    # Half a file arrives once: sent again. Nothing arrives any more: an error, and later the rest.
    interrupt("PUT", "/lfs/")
    push_folder(root / "large", "org/large")
    interrupt("PUT", "/lfs/", times=99, after=0.1)
    (root / "large" / "model.safetensors").write_bytes(b"another" * 100_000)
    print("interrupted:", message_of(push_folder, root / "large", "org/large"))
    recover()
    save_file(expected, root / "expected.safetensors")


def push_again(root: Path) -> None:
    """After an interruption."""
    from spa3r_hf.hub_upload import push_folder

    push_folder(root / "large", "org/large")
    os.environ.pop("HF_TOKEN")
    print("without token:", message_of(push_folder, root / "large", "org/large", token="hf_stranger"))


def train(root: Path) -> None:
    """Training scripts with --push_to_hub."""
    for name, arguments in json.loads((root / "runs.json").read_text()).items():
        output = script(name, *arguments)
        assert output.endswith("exit 0"), output


# --- processes that load


def pull(root: Path) -> None:
    """Load everything; from a warm cache where HF_HUB_OFFLINE is set."""
    import evaluate
    import torch
    from safetensors.torch import load_file
    from tiny_models import scene_pixels
    from transformers import AutoModel, AutoModelForPreTraining, AutoProcessor
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from spa3r_hf import Spa3RForPreTraining, Spa3VLM, Spa3VLMProcessor

    torch.set_grad_enabled(False)
    expected = load_file(root / "expected.safetensors")
    if not os.environ.get("HF_HUB_OFFLINE"):
        interrupt("GET", "config.json")
        interrupt("GET", "model.safetensors")

    assert torch.equal(encoder_results(AutoModel.from_pretrained("org/spa3r"))["latents"], expected["latents"])
    whole = AutoModelForPreTraining.from_pretrained("org/spa3r", revision="v1")
    assert isinstance(whole, Spa3RForPreTraining)
    assert torch.equal(encoder_results(whole.spa3r)["latents"], expected["latents"])
    second = AutoModel.from_pretrained("org/spa3r", revision="second")
    assert torch.equal(encoder_results(second)["latents"], expected["second"])
    assert AutoImageProcessor.from_pretrained("org/spa3r").size == 42
    backbone = AutoModel.from_pretrained("org/vggt")
    assert torch.equal(backbone(scene_pixels(num_views=2)).last_hidden_state, expected["features"])
    private = AutoModel.from_pretrained("org/private", token=OWNER)
    assert torch.equal(encoder_results(private)["latents"], expected["latents"])

    for name in ("adapter", "local"):
        model = Spa3VLM.from_pretrained(f"org/{name}")
        assert torch.equal(model(**spa3_vlm_inputs()).logits, expected[name]), name
    processor = AutoProcessor.from_pretrained("org/adapter")
    assert type(processor) is Spa3VLMProcessor and processor.spatial_image_processor.size == 28

    if not os.environ.get("HF_HUB_OFFLINE"):
        interrupt("GET", "model.safetensors", after=0.75)  # 17 MB; huggingface_hub keeps whole pieces of 10 MB
    own = AutoModel.from_pretrained(REPOSITORY / "hub_configs" / "vggt-nano").state_dict()
    nano = AutoModel.from_pretrained("org/vggt-nano").state_dict()
    assert own.keys() == nano.keys() and all(torch.equal(value, nano[key]) for key, value in own.items())
    metric = evaluate.load("org/vsi_bench")
    types = ["object_counting", "route_planning"]
    assert metric.compute(predictions=["three", "A."], references=["4", "B"], question_types=types)["overall"] == 30

    shipped = Spa3VLM.from_pretrained("org/spa3-vlm-nano")
    assert shipped.spatial_encoder is not None and shipped.vlm.config.model_type == "qwen2_5_vl"

    assert type(AutoModel.from_pretrained("org/trained-psfm", token=OWNER)).__name__ == "Spa3RModel"
    assert type(AutoModel.from_pretrained("org/trained-geometry")).__name__ == "Spa3RVGGTModel"
    assert Spa3VLM.from_pretrained("org/trained-adapter").adapter_config.lora_config is not None
    assert type(AutoProcessor.from_pretrained("org/trained-adapter")) is Spa3VLMProcessor


def refused(root: Path) -> None:
    """What cannot be read, and what is said about it; a download that breaks off, and goes on."""
    import torch
    from huggingface_hub import constants
    from safetensors.torch import load_file
    from tiny_models import scene_pixels
    from transformers import AutoModel

    torch.set_grad_enabled(False)
    load = AutoModel.from_pretrained
    said = {
        "private": message_of(load, "org/private", kind=OSError),
        "missing": message_of(load, "org/nowhere", kind=OSError),
        "revision": message_of(load, "org/spa3r", revision="third", kind=OSError),
    }
    try:
        load("org/private")
    except OSError as error:
        said["by transformers"] = str(error)
    for name in ("dinov3-vitl16-pretrain-lvd1689m", "VGGT-1B-Commercial"):
        said[name] = message_of(load, f"facebook/{name}", kind=OSError)
    teacher = ("--semantic_name_or_path", "facebook/dinov3-vitl16-pretrain-lvd1689m")
    said["script"] = script("run_psfm.py", *teacher, "--output_dir", root / "x")

    # Half of the weights arrives, then nothing any more: an error, and no file that looks whole.
    interrupt("GET", "model.safetensors", times=1, after=0.5)
    interrupt("GET", "model.safetensors", times=99, after=0.0)
    said["interrupted"] = message_of(load, "org/vggt")
    blobs = Path(constants.HF_HUB_CACHE, "models--org--vggt", "blobs")
    said["left"] = [path.stat().st_size for path in blobs.iterdir() if path.suffix != ".incomplete"]
    said["from the cache"] = message_of(load, "org/vggt", local_files_only=True, kind=OSError)
    recover()
    features = load("org/vggt")(scene_pixels(num_views=2)).last_hidden_state
    assert torch.equal(features, load_file(root / "expected.safetensors")["features"])
    (root / "said.json").write_text(json.dumps(said))


def bare(root: Path) -> None:
    """Without the package: the code comes with the models."""
    sys.modules["spa3r_hf"] = None  # type: ignore[assignment]  # makes its import fail
    import evaluate
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoModelForPreTraining, AutoProcessor
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    torch.set_grad_enabled(False)
    expected = load_file(root / "expected.safetensors")
    pixels = load_file(root / "pixels.safetensors")["pixels"]
    options = {"trust_remote_code": True}
    model = AutoModel.from_pretrained("org/spa3r", **options)
    assert "transformers_modules" in type(model).__module__
    assert torch.equal(model(pixels).latents, expected["latents"])
    second = AutoModel.from_pretrained("org/spa3r", revision="second", **options)
    assert torch.equal(second(pixels).latents, expected["second"])
    whole = AutoModelForPreTraining.from_pretrained("org/spa3r", **options)
    assert torch.equal(whole.spa3r(pixels).latents, expected["latents"])
    assert AutoImageProcessor.from_pretrained("org/spa3r", **options).size == 42
    backbone = AutoModel.from_pretrained("org/vggt", **options)
    assert torch.equal(backbone(pixels).last_hidden_state, expected["features"])
    nano = AutoModel.from_pretrained("org/vggt-nano", **options)
    assert type(nano).__name__ == "Spa3RVGGTModel" and "transformers_modules" in type(nano).__module__
    processor = AutoProcessor.from_pretrained("org/adapter", **options)
    assert "transformers_modules" in type(processor).__module__ and processor.spatial_image_processor.size == 28
    assert (
        evaluate.load("org/vsi_bench").compute(
            predictions=["4"], references=["4"], question_types=["object_counting"]
        )["overall"]
        == 100
    )
