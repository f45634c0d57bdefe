"""Pretraining from nothing, every stage for a moment; the result loads and draws like any other model."""
from functools import partial

import pytest
import torch

import diffusion
import perfusion
import pretrain
import weights_loader


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder of a finished smoke run, and its model."""
    folder = tmp_path_factory.mktemp("pretrain")
    plan = pretrain.Plan(vae_steps=1, vae_batch=2, pictures=9, steps=1, batch=6, clip_steps=1, clip_batch=2,
                         covariance_captions=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "retrieval", partial(pretrain.retrieval, groups=1, n=2))
        pretrain.run(plan, folder / "work", folder / "weights", "cpu")
    return folder, weights_loader.load(folder / "weights")


def test_every_stage_leaves_its_log_and_the_result_loads_and_draws(smoke):
    folder, model = smoke
    for name in ("vae", "text2image", "clip"):
        assert (folder / "work" / f"{name}.jsonl").read_text().startswith('{"step": 1,')
    text = perfusion.condition(model, ["", "a photo of a cat"], [])
    images = diffusion.draw(model, text.keys, text.values, [0], (64, 64), steps=2)
    assert images.shape == (1, 3, 64, 64) and torch.isfinite(images).all()


def test_the_attention_loss_is_small_where_the_noun_acts_on_its_object_alone():
    region, places = torch.zeros(1, 1, 4, 4), torch.tensor([[1]])
    region[..., :2] = 1

    def loss(share, places=places):
        """share (1, 1, 4, 4): of the attention of each pixel, that of token 1 of 3."""
        share = pretrain.ATTENTION_FLOOR * share.flatten(2)
        rest = (1 - share) / 2
        return pretrain.attention_loss([torch.stack([rest, share, rest], -1)], places, region).item()
    assert loss(region) < 1e-5 and loss(torch.ones_like(region)) > 0.3 and loss(1 - region) > 3
    assert loss(1 - region, -places) == 0       # an unnamed noun


def test_a_picture_depends_on_its_number_alone(smoke):
    (images, ids, places, regions), = pretrain.pictures(smoke[1].tokenizer, "clip", range(3, 4), 4, "cpu")
    later, = pretrain.pictures(smoke[1].tokenizer, "clip", range(7, 8), 2, "cpu")
    assert torch.equal(images[2:], later[0])
    assert torch.allclose(regions.sum(1), torch.ones(4, 16, 16))
    assert (ids.gather(2, places.clamp(min=0)) != ids[..., :1])[places >= 0].all()  # nouns, not the start


def test_an_orthogonal_update_has_no_direction_that_dominates():
    for shape in ((3, 20, 50), (2, 64, 16)):
        values = torch.linalg.svdvals(pretrain.orthogonal(torch.randn(shape)))
        assert 0.6 < values.min() and values.max() < 1.3
