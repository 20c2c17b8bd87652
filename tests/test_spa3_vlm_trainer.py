"""What of a model is trained, and its loss."""

import pytest
import torch
from tiny_vlms import FAMILIES, LORA, tiny_vlm
from torch.nn import functional as F

from spa3r_hf import Spa3AdapterConfig, get_spa3_vlm
from spa3r_hf.spa3_vlm_trainer import answer_loss, choose_trained, vision_mergers


def build(family: str, **settings):
    return get_spa3_vlm(tiny_vlm(family), None, Spa3AdapterConfig(spatial_hidden_size=4, **settings))


def trained_parts(model) -> set[str]:
    """By the part of the model that they are in."""
    heads = {id(parameter) for parameter in model.vlm.get_output_embeddings().parameters()}
    language = {id(parameter) for parameter in model.language_model.parameters()}
    mergers = {id(parameter) for merger in vision_mergers(model.vlm) for parameter in merger.parameters()}
    parts = {}
    for name, parameter in model.named_parameters():
        part = next((label for label, ids in (("head", heads), ("merger", mergers)) if id(parameter) in ids), None)
        if part is None:
            inside = "lora" if ".lora_" in name else "language model" if id(parameter) in language else "vision"
            part = "adapter" if name.startswith("adapters.") else inside
        parts.setdefault(part, set()).add(parameter.requires_grad)
    assert all(len(values) == 1 for values in parts.values()), parts  # all of a part, or nothing
    return {part for part, (is_trained,) in parts.items() if is_trained}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained(family):
    for merger in (False, True):
        also = {"merger"} if merger else set()
        model = build(family)
        choose_trained(model, "adapter", merger)
        assert trained_parts(model) == {"adapter", *also}
        model = build(family)
        choose_trained(model, "language_model", merger)
        assert trained_parts(model) == {"adapter", "language model", "head", *also}
        model = build(family, lora_config=LORA)
        choose_trained(model, "lora", merger)
        assert trained_parts(model) == {"adapter", "lora", *also}


def test_an_adapter_made_for_something_else():
    with pytest.raises(ValueError, match="trained = 'lora', but the adapter has no LoRA"):
        choose_trained(build("qwen2_5_vl"), "lora")
    with pytest.raises(ValueError, match="trained = 'adapter', but the adapter has a LoRA"):
        choose_trained(build("qwen2_5_vl", lora_config=LORA), "adapter")
    vlm = tiny_vlm("qwen2_5_vl")
    vlm.model.visual.merging, vlm.model.visual.merger = vlm.model.visual.merger, torch.nn.Identity()
    del vlm.model.visual.merger
    with pytest.raises(ValueError, match="has no vision merger; expected a module of one of the names"):
        vision_mergers(vlm)


def test_loss_of_the_answers():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 1, -100, -100, 6]])
    expected = torch.stack(
        [
            F.cross_entropy(logits[row, place - 1], labels[row, place])
            for row, place in ((0, 2), (0, 3), (1, 1), (1, 4))
        ]
    )
    loss, accuracy = answer_loss(logits, labels)
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(answer_loss(logits, labels, torch.tensor(10))[0], expected.sum() / 10)
    assert accuracy == 0
    logits[0, 1, 3] = logits[1, 3, 6] = 99.0
    assert answer_loss(logits, labels)[1] == 0.5


def test_nothing_to_learn_gives_a_loss_of_zero_that_reaches_the_model():
    logits = torch.randn(1, 4, 7, requires_grad=True)
    loss, accuracy = answer_loss(logits, torch.full((1, 4), -100), torch.tensor(0))
    loss.backward()
    assert loss == 0 and accuracy is None and not logits.grad.any()
