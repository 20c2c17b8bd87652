import math

import pytest
import torch
from tiny_models import scene_pixels, tiny_vggt_config
from torch.nn import functional as F
from transformers import AutoModel

from spa3r_hf import Spa3RVGGTModel
from spa3r_hf.feature_scale import scale_features
from spa3r_hf.layers_spa3r import Spa3RAttention
from spa3r_hf.modeling_spa3r_vggt import order_context_first


MASK = torch.tensor([[False, True, False, True], [False, False, True, True]])
NUM_VIEW_TOKENS = 1 + 2 + 2 * 3
HEADS = {"output_cameras": True, "output_depth": True, "output_points": True}
HEAD_OUTPUTS = ("extrinsics", "intrinsics", "depth", "depth_confidence", "points", "points_confidence")


def close(left, right, tolerance=2e-5):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def tiny_vggt(**options) -> Spa3RVGGTModel:
    torch.manual_seed(0)
    return Spa3RVGGTModel(tiny_vggt_config(**options)).eval()


@pytest.fixture(scope="module", params=["layer_norm", "rms_norm"])
def model(request):
    return tiny_vggt(global_qk_norm=request.param)


@pytest.fixture(scope="module")
def pixels():
    return scene_pixels()


@torch.no_grad()
def test_asymmetric_attention_is_attention_with_a_boolean_mask(model, pixels, monkeypatch):
    two_calls = model(pixels, view_mask=MASK, output_layers=range(3))

    # The reference leaves the views in their order, and masks the keys of target views for queries of context views.
    is_target = MASK.repeat_interleave(NUM_VIEW_TOKENS, dim=1)
    allowed = ~(~is_target[:, :, None] & is_target[:, None, :])

    def masked_attention(self, query, key, value, num_context_tokens, **kwargs):
        assert num_context_tokens is None
        mask = allowed[:, None] if query.shape[2] == allowed.shape[1] else None
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2), None

    monkeypatch.setattr(Spa3RAttention, "_attend", masked_attention)
    reference = model(pixels, output_layers=range(3))
    for layer in range(3):
        close(two_calls.layer_features[layer], reference.layer_features[layer])
    monkeypatch.undo()
    unmasked = model(pixels).last_hidden_state
    assert not torch.allclose(unmasked, reference.last_hidden_state, atol=1e-2)


@torch.no_grad()
def test_masks_that_mask_nothing_or_all_but_the_first_view(model, pixels):
    plain = model(pixels, **HEADS)
    close(model(pixels, view_mask=torch.zeros_like(MASK)).last_hidden_state, plain.last_hidden_state)
    first_only = torch.ones_like(MASK)
    first_only[:, 0] = False
    masked = model(pixels, view_mask=first_only).last_hidden_state
    close(masked[:, :1], model(pixels[:, :1]).last_hidden_state)


@torch.no_grad()
def test_batch_of_two_is_two_of_one_and_views_may_be_permuted(model, pixels):
    both = model(pixels, view_mask=MASK, **HEADS)
    one = model(pixels[1:], view_mask=MASK[1:], **HEADS)
    order = [0, 2, 3, 1]
    permuted = model(pixels[:, order], view_mask=MASK[:, order], **HEADS)
    for key in ("last_hidden_state", *HEAD_OUTPUTS):
        close(one[key][0], both[key][1], 1e-4)
        close(permuted[key], both[key][:, order], 1e-4)


@torch.no_grad()
def test_the_first_view_has_tokens_of_its_own(model, pixels):
    order = [1, 0, 2, 3]
    assert not torch.allclose(model(pixels[:, order]).last_hidden_state, model(pixels).last_hidden_state[:, order])


def test_context_comes_first_in_its_order():
    assert order_context_first(MASK).tolist() == [[0, 2, 1, 3], [0, 1, 2, 3]]


@torch.no_grad()
def test_only_wanted_layers_are_kept(model, pixels):
    for needed in ({2}, {0, 2}):
        assert set(model._aggregate(pixels, None, needed)) == needed
    kept = []
    aggregate = model._aggregate

    def spy(pixel_values, view_mask, needed, **kwargs):
        kept.append(needed)
        return aggregate(pixel_values, view_mask, needed, **kwargs)

    model._aggregate = spy
    try:
        plain = model(pixels)
        model(pixels, output_cameras=True)
        depth = model(pixels, output_depth=True)
        chosen = model(pixels, output_layers=(1,))
    finally:
        del model._aggregate
    assert kept == [{2}, {2}, {0, 1, 2}, {1, 2}]
    assert plain.layer_features is None and depth.layer_features is None and set(chosen.layer_features) == {1}
    assert [key for key in HEAD_OUTPUTS if getattr(plain, key) is not None] == []


@torch.no_grad()
def test_head_outputs_have_the_documented_shapes_and_ranges(model, pixels):
    result = model(pixels, **HEADS)
    shapes = [(2, 4, 3, 4), (2, 4, 3, 3), (2, 4, 28, 42, 1), (2, 4, 28, 42), (2, 4, 28, 42, 3), (2, 4, 28, 42)]
    assert [tuple(result[key].shape) for key in HEAD_OUTPUTS] == shapes
    assert len(result.pose_encodings) == 2 and result.pose_encodings[0].shape == (2, 4, 9)
    assert (result.depth > 0).all() and (result.depth_confidence >= 1).all() and (result.points_confidence >= 1).all()
    assert all(result[key].isfinite().all() for key in HEAD_OUTPUTS)


@torch.no_grad()
def test_dense_heads_do_not_depend_on_their_chunks(model, pixels, monkeypatch):
    whole = model(pixels, output_depth=True).depth
    monkeypatch.setattr(type(model.depth_head), "views_per_chunk", 3)
    close(model(pixels, output_depth=True).depth, whole)


@torch.no_grad()
def test_dinov2_patch_embedding_takes_other_sizes_than_its_own():
    model = tiny_vggt(patch_embedding="dinov2")
    assert model(scene_pixels(1, 1, 28, 28)).last_hidden_state.shape == (1, 1, 3 + 4, 64)
    assert model(scene_pixels(1, 2, 42, 56)).last_hidden_state.shape == (1, 2, 3 + 12, 64)


def test_hidden_states_and_attentions_of_the_global_blocks(pixels):
    model = tiny_vggt(attn_implementation="eager")
    result = model(pixels, view_mask=MASK, output_hidden_states=True, output_attentions=True, **HEADS)
    assert [tuple(state.shape) for state in result.hidden_states] == [(2, 36, 32)] * 4
    assert [tuple(weights.shape) for weights in result.attentions] == [(2, 2, 36, 36)] * 3
    for weights in result.attentions:
        close(weights.sum(-1), torch.ones(2, 2, 36))
        assert not weights[:, :, :18, 18:].any() and weights[:, :, 18:, 18:].all()


@pytest.mark.parametrize("head", ["camera", "depth", "point"])
def test_heads_that_do_not_exist_are_named(head, pixels):
    model = tiny_vggt(**{f"use_{head}_head": False})
    option = {"camera": "output_cameras", "depth": "output_depth", "point": "output_points"}[head]
    with pytest.raises(ValueError, match=f"the {head} head is asked for, .* use_{head}_head = False"):
        model(pixels, **{option: True})


def test_bad_input_is_named(model, pixels):
    with pytest.raises(ValueError, match=r"output_layers = \(1, 3\); expected \[0, 2\]"):
        model(pixels, output_layers=(1, 3))
    with pytest.raises(ValueError, match=r"pixel_values has shape \(4, 3, 28, 42\)"):
        model(pixels[0])
    with pytest.raises(ValueError, match="first view of a scene a target"):
        model(pixels, view_mask=~MASK)
    endless = pixels.clone()
    endless[0, 3, 1, 2, 2] = torch.inf
    with pytest.raises(ValueError, match="scene 0, view 3 of pixel_values"):
        model(endless)


@torch.no_grad()
def test_save_and_load(model, pixels, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is Spa3RVGGTModel
    expected, result = model(pixels, **HEADS), loaded(pixels, **HEADS)
    for key in ("last_hidden_state", *HEAD_OUTPUTS):
        assert torch.equal(result[key], expected[key]), key


@pytest.mark.parametrize("patch_embedding", ["conv", "dinov2"])
def test_scaled_features_leave_the_heads_as_they_were(patch_embedding, tmp_path):
    model = tiny_vggt(patch_embedding=patch_embedding)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    pixels = scene_pixels()
    with torch.no_grad():
        before = model(pixels, **HEADS)
        scale_features(model, 0.1)
        after = model(pixels, **HEADS)
        model.save_pretrained(tmp_path)
        again = Spa3RVGGTModel.from_pretrained(tmp_path).eval()(pixels, **HEADS)
    close(after.last_hidden_state, 0.1 * before.last_hidden_state, tolerance=1e-4)
    for key in HEAD_OUTPUTS:
        close(after[key], before[key], tolerance=1e-4)
        close(again[key], after[key])
    for factor in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"factor = {factor}"):
            scale_features(model, factor)
