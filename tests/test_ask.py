"""A question about pictures, through the command line and the whole path: processor, encoder, adapter, generate."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from script_runs import load_script
from tiny_models import tiny_spa3r
from tiny_processors import tiny_vlm_folder
from tiny_vlms import disturb, tiny_vlm
from transformers import AutoModel, AutoModelForImageTextToText

from spa3r_hf import Spa3AdapterConfig, Spa3RImageProcessor, Spa3VLM, Spa3VLMProcessor, get_spa3_vlm


QUESTION = "w11 w12"


@pytest.fixture(scope="module")
def script():
    return load_script("ask")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """An adapter with its processor, `adapter`, a VLM and an encoder, and five pictures, `scene`."""
    work = tmp_path_factory.mktemp("ask")
    tiny_vlm("qwen2_5_vl").save_pretrained(work / "vlm")
    tiny_vlm_folder("qwen2_5_vl", work / "vlm")
    tiny_spa3r().spa3r.save_pretrained(work / "encoder")
    model = get_spa3_vlm(
        AutoModelForImageTextToText.from_pretrained(work / "vlm"),
        AutoModel.from_pretrained(work / "encoder"),
        Spa3AdapterConfig(),
    )
    with torch.no_grad():
        disturb(model).adapter.mlp.fc2.weight.mul_(30)  # so that the scene changes what is said
    model.save_pretrained(work / "adapter")
    spatial = Spa3RImageProcessor(size=28)
    Spa3VLMProcessor.from_vlm(work / "vlm", spatial, max_frames=4).save_pretrained(work / "adapter")
    (work / "scene").mkdir()
    generator = np.random.default_rng(0)
    for number in (0, 1, 2, 3, 10):
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(work / f"scene/{number}.png")
    return work


def ask(script, capsys, work: Path, media: list[Path], *more: str) -> list[str]:
    """The lines that it prints."""
    words = ["--question", QUESTION, "--adapter", str(work / "adapter"), "--max_new_tokens", "4", "--device", "cpu"]
    script.main(["--media", *map(str, media), *words, *more])
    return capsys.readouterr().out.splitlines()


def answers(work: Path, content: list[dict]) -> tuple[str, str]:
    """With the adapter and without, by hand."""
    model = Spa3VLM.from_pretrained(work / "adapter")
    processor = Spa3VLMProcessor.from_pretrained(work / "adapter")
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}],
        **{"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"},
    )
    said = []
    for spatial in ({}, {"spatial_pixel_values": None}):
        output = model.generate(**{**inputs, **spatial}, max_new_tokens=4, do_sample=False)
        said.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    assert said[0] != said[1]  # else it would not show which is which
    return said[0], said[1]


def said_in(line: str) -> str:
    return re.fullmatch(r"with(?:out)? the adapter:\s+(.*?)    \(\d+\.\d\d s\)", line)[1]


def test_a_folder_of_pictures(script, capsys, work):
    frames, with_adapter, without = ask(script, capsys, work, [work / "scene"])
    assert frames == "4 frames: 0.png, 1.png, 2.png, 10.png"
    expected = answers(work, [{"type": "video", "video": work / "scene"}])
    assert (said_in(with_adapter), said_in(without)) == expected
    assert with_adapter.startswith("with the") and without.startswith("without the")
    assert ask(script, capsys, work, [work / "scene"], "--max_frames", "2")[0] == "2 frames: 0.png, 10.png"


def test_pictures_and_the_vlm_alone(script, capsys, work):
    media = [work / "scene/3.png", work / "scene/1.png"]
    frames, without = ask(script, capsys, work, media, "--without_adapter")
    assert frames == "2 frames: 3.png, 1.png"
    assert said_in(without) == answers(work, [{"type": "image", "image": path} for path in media])[1]


def test_a_video(script, capsys, work, tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "room.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for pixels in np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    lines = ask(script, capsys, work, [tmp_path / "room.mp4"])
    shown = "room.mp4 at 0.00 s, room.mp4 at 1.00 s, room.mp4 at 2.00 s, room.mp4 at 3.50 s"
    assert lines[0] == f"4 frames: {shown}" and len(lines) == 3


@pytest.mark.parametrize(
    ("media", "message"),
    [
        ("nothing.jpg", "nothing.jpg does not exist"),
        ("vlm", "holds no pictures"),
        ("vlm/config.json", "unknown format"),
    ],
)
def test_media_that_cannot_be_used(script, work, media, message):
    with pytest.raises(SystemExit, match=f"ask.py: error: .*{message}"):
        script.main(["--media", str(work / media), "--question", "?", "--adapter", str(work / "adapter")])


def test_models_that_are_missing(script, work, tmp_path, monkeypatch):
    arguments = ["--media", str(work / "scene"), "--question", "?", "--adapter"]
    monkeypatch.setattr(script, "NANO", tmp_path / "spa3-vlm-nano")
    with pytest.raises(SystemExit, match="make one: python training/build_nano_vlm.py && python training/run_spa3"):
        script.main([*arguments, str(script.NANO)])
    # An adapter that was moved away from what stood beside it.
    folder = tmp_path / "moved"
    folder.mkdir()
    for path in (work / "adapter").iterdir():
        text = path.read_bytes()
        if path.name == "adapter_config.json":
            text = text.replace(str(work / "vlm").encode(), b"./../vlm")
        (folder / path.name).write_bytes(text)
    with pytest.raises(SystemExit, match="is for the model in ./../vlm, but there is no .*moved/../vlm"):
        script.main([*arguments, str(folder)])
    (tmp_path / "vlm").symlink_to(work / "vlm")
    with torch.no_grad():
        assert Spa3VLM.from_pretrained(folder).vlm.config.model_type == "qwen2_5_vl"


def test_the_shipped_nano_models_answer(script, capsys, tmp_path):
    """By the name of nothing but the media and the question."""
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (9, 90, 120, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    question = "These are frames of a video.\nHow many chair(s) are in this room?\nPlease answer the question using a "
    script.main(["--media", str(tmp_path), "--question", question + "single word or phrase.", "--device", "cpu"])
    frames, *lines = capsys.readouterr().out.splitlines()
    assert frames.startswith("8 frames: 0.jpg, 1.jpg, ") and frames.endswith("8.jpg")
    for line in lines:
        assert re.fullmatch(r"\d+(\.\d+)?", said_in(line)), line  # it has learnt what is asked for
    assert len(lines) == 2
