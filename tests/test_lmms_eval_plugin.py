"""Against a stub of what lmms-eval 0.7.3 has its models derive from and register with."""

import abc
import dataclasses
import importlib
import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_spa3r
from tiny_processors import chat_template, tiny_vlm_folder
from tiny_vlms import disturb, tiny_vlm

from spa3r_hf import Spa3AdapterConfig, Spa3RImageProcessor, Spa3VLM, Spa3VLMProcessor, get_spa3_vlm
from spa3r_hf.errors import BadSampleError
from spa3r_hf.scene_answers import SceneAnswerer


GREEDY = {"max_new_tokens": 5, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}


def stub_modules() -> dict[str, ModuleType]:
    class CacheHook:
        def __init__(self):
            self.added = []

        def add_partial(self, attr, req, res):
            self.added.append((attr, req, res))

    class lmms(abc.ABC):
        is_simple = True

        def __init__(self):
            self._rank, self._world_size, self.cache_hook, self.task_dict = 0, 1, CacheHook(), {}

        @abc.abstractmethod
        def loglikelihood(self, requests): ...

        @abc.abstractmethod
        def generate_until(self, requests): ...

        @abc.abstractmethod
        def generate_until_multi_round(self, requests): ...

        @classmethod
        def create_from_arg_string(cls, arg_string, additional_config):
            arguments = dict(pair.split("=") for pair in arg_string.split(",") if pair)
            arguments = {name: int(value) if value.isdigit() else value for name, value in arguments.items()}
            return cls(**arguments, **{name: value for name, value in additional_config.items() if value is not None})

        @property
        def rank(self):
            return self._rank

        @property
        def world_size(self):
            return self._world_size

    @dataclasses.dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None
        aliases: tuple[str, ...] = ()

    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models", "lmms_eval.models.registry_v2")
    modules = {name: ModuleType(name) for name in names}
    modules["lmms_eval.api.model"].lmms = lmms
    modules["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest
    return modules


@pytest.fixture
def chat_class(monkeypatch):
    """The class as lmms-eval finds and checks it."""
    for name, module in stub_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "spa3r_hf.lmms_eval_model", raising=False)
    manifest = importlib.import_module("spa3r_hf.lmms_eval_plugin").manifests()[0]
    assert manifest.model_id == "spa3_vlm" and manifest.simple_class_path is None
    module, name = manifest.chat_class_path.rsplit(".", 1)
    found = getattr(importlib.import_module(module), name)
    assert issubclass(found, sys.modules["lmms_eval.api.model"].lmms) and not found.is_simple
    yield found
    sys.modules.pop("spa3r_hf.lmms_eval_model", None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adapter with all that belongs to it, its VLM in bfloat16; and that VLM alone."""
    root = tmp_path_factory.mktemp("models")
    model = disturb(get_spa3_vlm(tiny_vlm("qwen2_5_vl", seed=3), tiny_spa3r().spa3r, Spa3AdapterConfig()))
    model.vlm.to(torch.bfloat16)
    tiny_vlm_folder("qwen2_5_vl", root / "vlm")
    model.vlm.save_pretrained(root / "vlm")
    # Prompts end with the questions' last words, so that answers of a random model differ.
    template = chat_template("qwen2_5_vl").replace(" <eos>\n{% endfor %}", "{% endfor %}")
    template = template.replace("assistant : ", "")
    (root / "vlm" / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    processor = Spa3VLMProcessor.from_vlm(root / "vlm", Spa3RImageProcessor(size=42))
    assert processor.chat_template == template
    model.save_pretrained(root / "adapter", save_vlm=True, save_spatial_encoder=True)
    processor.save_pretrained(root / "adapter")
    return root


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 84, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Folders of frames, which stand for videos."""
    root = tmp_path_factory.mktemp("scenes")
    for scene in range(3):
        (root / f"scene{scene}").mkdir()
        for frame in range(6):
            picture(10 * scene + frame).save(root / f"scene{scene}" / f"{frame}.png")
    return root


def create(chat_class, folder, **arguments):
    arguments = {"pretrained": folder, "image_size": 42, **arguments}
    settings = ",".join(f"{name}={value}" for name, value in arguments.items())
    return chat_class.create_from_arg_string(settings, {"batch_size": 2, "max_batch_size": None, "device": None})


def doc_to_messages(doc):
    media = [{"type": "video" if isinstance(source, str) else "image", "url": source} for source in doc["media"]]
    return [{"role": "user", "content": [*media, {"type": "text", "text": doc["question"]}]}]


def requests_for(model, docs, settings=None, to_messages=doc_to_messages, task="vsibench"):
    model.task_dict[task] = {"test": docs}
    settings = settings or [GREEDY] * len(docs)
    arguments = [(f"ctx {i}", to_messages, settings[i], i, task, "test") for i in range(len(docs))]
    return [SimpleNamespace(args=args) for args in arguments]


def interleaved(scenes, questions=2) -> list[dict]:
    """Questions about three videos and a picture, those of one scene far apart."""
    media = [[str(scenes / f"scene{scene}")] for scene in range(3)] + [[picture(40)]]
    docs = []
    for number in range(questions):
        for scene, sources in enumerate(media):
            words = np.random.default_rng((scene, number)).integers(10, 80, 5)
            docs.append({"media": sources, "question": " ".join(f"w{word}" for word in words)})
    return docs


def counted_tower(model) -> list[str]:
    calls: list[str] = []
    vlm = getattr(model._model, "vlm", model._model)
    vlm.model.visual.register_forward_hook(lambda *_: calls.append("vision tower"))
    return calls


@pytest.mark.parametrize("name", ["adapter", "vlm"])
def test_requests_of_a_scene_are_answered_together_and_in_order(chat_class, folders, scenes, name):
    model = create(chat_class, folders / name, seconds_per_frame=1)
    assert isinstance(model._model, Spa3VLM) == (name == "adapter")
    docs = interleaved(scenes)
    calls = counted_tower(model)
    answers = model.generate_until(requests_for(model, docs))
    assert len(calls) == 4
    alone = SceneAnswerer(model._model, model._processor, max_new_tokens=5, reuse=False)
    expected = [alone.answer_messages([doc_to_messages(doc)])[0].text for doc in docs]
    assert answers == expected and len(set(answers)) > 4
    added = [("generate_until", (f"ctx {i}", GREEDY), answer) for i, answer in enumerate(answers)]
    assert model.cache_hook.added == added
    assert model.generate_until([]) == []


def test_arguments_arrive(chat_class, folders):
    model = create(chat_class, folders / "adapter", min_frames=2, max_frames=3, attn_implementation="eager")
    assert (model._processor.min_frames, model._processor.max_frames) == (2, 3)
    assert model._processor.seconds_per_frame == 2.0 and model._processor.spatial_image_processor.size == 42
    vlm = model._model.vlm
    # Saved in bfloat16, but here is a CPU.
    assert vlm.dtype == torch.float32 and vlm.config._attn_implementation == "eager"
    assert (model.batch_size, model.rank, model.world_size) == (2, 0, 1)
    assert model.device.type == "cpu" and not model._model.training
    model = create(chat_class, folders / "vlm", dtype="bfloat16", device_map="cpu", image_size=56)
    assert model._processor.spatial_image_processor.size == 56
    assert model._model.dtype == torch.bfloat16 and model.device.type == "cpu"
    for arguments, message in (
        ({"max_frames": 2}, "min_frames = 4 and max_frames = 2"),
        ({"batch_size": "auto"}, "batch_size = 'auto'"),
    ):
        with pytest.raises(ValueError, match=message):
            chat_class(str(folders / "adapter"), **arguments)
    with pytest.raises(TypeError, match="num_frames"):
        create(chat_class, folders / "adapter", num_frames=3)
    with pytest.raises(OSError):
        create(chat_class, folders / "missing")


def test_settings_of_tasks_count(chat_class, folders, scenes):
    model = create(chat_class, folders / "adapter", seconds_per_frame=1)
    docs = interleaved(scenes, questions=1)[:1] * 4
    model._model.generation_config.eos_token_id = None
    whole = model.generate_until(requests_for(model, docs[:1], [{"max_new_tokens": 8}]))[0].split()
    assert len(set(whole[:6])) == 6
    settings = [
        {"max_new_tokens": 3, "do_sample": False, "temperature": 0.7},
        {"max_new_tokens": 8, "until": [whole[4], ""], "temperature": 0},
        {"max_new_tokens": 8, "until": whole[2]},
        {},
    ]
    answers = [answer.split() for answer in model.generate_until(requests_for(model, docs, settings))]
    assert answers[:3] == [whole[:3], whole[:4], whole[:2]]
    assert answers[3][: len(whole)] == whole and 64 < len(answers[3]) <= 128
    for refused in ({"do_sample": True}, {"temperature": 0.2}, {"num_beams": 3}):
        with pytest.raises(ValueError, match="expected greedy decoding"):
            model.generate_until(requests_for(model, docs[:1], [refused]))
    with pytest.raises(NotImplementedError, match="output_type: generate_until"):
        model.loglikelihood([])


def test_what_cannot_be_seen_is_refused(chat_class, folders, scenes):
    model = create(chat_class, folders / "adapter")

    def to_messages(content):
        return [{"role": "user", "content": content}]

    path = str(scenes / "scene0")
    for entry, error, message in (
        ({"type": "audio", "url": "a.wav"}, BadSampleError, "type 'audio'"),
        ({"type": "video", "url": path, "start_time": 1.0, "end_time": 2.0}, ValueError, "expected whole videos"),
        ({"type": "video", "url": {"url": path, "video_start": 1}}, BadSampleError, "a dict as its video"),
        ({"type": "video", "url": "missing.mp4"}, FileNotFoundError, "missing.mp4"),
        ({"type": "image", "url": "https://x.org/a.png"}, BadSampleError, "expected the path of a file"),
    ):
        content = [entry, {"type": "text", "text": "w11"}]
        with pytest.raises(error, match=message):
            model.generate_until(requests_for(model, [content], to_messages=to_messages))


def test_rounds_follow_on_answers(chat_class, folders, scenes):
    model = create(chat_class, folders / "adapter", seconds_per_frame=1)
    docs = [dict(doc, rounds=1 + index % 3) for index, doc in enumerate(interleaved(scenes)[:6])]
    seen = []

    def rounds(doc, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return doc_to_messages(doc)
        seen.append((round_idx, previous_round_info))
        if round_idx == doc["rounds"]:
            return None, True, previous_output, None
        asked = dict(doc, question=f"{doc['question']} {previous_output[-1].split()[0]}")
        return doc_to_messages(asked), False, previous_output, {"round": round_idx}

    answers = model.generate_until_multi_round(requests_for(model, docs, to_messages=rounds))
    assert [len(texts) for texts in answers] == [doc["rounds"] for doc in docs]
    assert (1, None) in seen and (2, {"round": 1}) in seen
    for doc, texts in zip(docs, answers, strict=True):
        for number, text in enumerate(texts):
            question = doc["question"] + (f" {texts[number - 1].split()[0]}" if number else "")
            asked = dict(doc, question=question)
            assert model.generate_until(requests_for(model, [asked])) == [text]
    # A task without a protocol for rounds has one.
    plain = requests_for(model, docs[:2], to_messages=lambda doc, **_: doc_to_messages(doc))
    assert model.generate_until_multi_round(plain) == [texts[:1] for texts in answers[:2]]
    assert model.generate_until_multi_round([]) == []


def test_nothing_of_it_is_needed_elsewhere():
    program = (
        "import json, sys, spa3r_hf, spa3r_hf.scene_answers\n"
        "from spa3r_hf.lmms_eval_plugin import manifests\n"
        "try:\n    manifests()\nexcept ImportError as error:\n    message = str(error)\n"
        "print(json.dumps([message, 'lmms_eval' in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    message, is_imported = json.loads(result.stdout)
    assert 'pip install "spa3r_hf[lmms]"' in message and not is_imported
