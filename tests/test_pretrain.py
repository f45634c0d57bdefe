"""Pretraining from nothing, every stage for a moment; the result loads and draws like any other model."""
from functools import partial

import pytest
import torch

import diffusion
import pretrain
import weights_loader


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folders of a finished smoke run."""
    folder = tmp_path_factory.mktemp("pretrain")
    plan = pretrain.Plan(vae_steps=1, vae_batch=8, pictures=9, steps=1, batch=6, clip_steps=1, clip_batch=8,
                         covariance_captions=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "retrieval", partial(pretrain.retrieval, groups=1, n=8))
        pretrain.run(plan, folder / "work", folder / "weights", "cpu")
    return folder


def test_every_stage_leaves_its_log_and_the_published_layout(smoke):
    for name in ("unet/config.json", "clip/model.safetensors", "covariance.safetensors"):
        assert (smoke / "weights" / name).is_file(), name
    for name in ("vae.jsonl", "text2image.jsonl"):
        assert (smoke / "work" / name).read_text().startswith('{"step": 1,')


def test_the_result_loads_and_draws(smoke):
    model = weights_loader.load(str(smoke / "weights"))
    e = model.text_encoder(model.text_encoder.embed(model.tokenizer.encode(["", "a photo of a cat"])[0]))
    images = diffusion.draw(model, model.unet.keys(e), model.unet.values(e), [0], (64, 64), steps=2)
    assert images.shape == (1, 3, 64, 64) and torch.isfinite(images).all()


def attention_of(shares):
    """Attention (1, 1 head, 16 pixels, 3 tokens) in which token 1 has these shares (4, 4) of the pixels."""
    rest = (1 - shares.flatten()) / 2
    return torch.stack([rest, shares.flatten(), rest], dim=1)[None, None]


def test_the_attention_loss_is_small_where_the_noun_acts_on_its_object_alone():
    region = torch.zeros(1, 1, 4, 4)
    region[..., :2] = 1
    places, floor = torch.tensor([[1]]), pretrain.ATTENTION_FLOOR
    inside, outside, everywhere = floor * region[0, 0], floor * (1 - region[0, 0]), torch.full((4, 4), floor)
    good, bad, leaking = (pretrain.attention_loss([attention_of(x)], places, region).item()
                          for x in (inside, outside, everywhere))
    assert good < 1e-5 and leaking > 0.3 and bad > 3
    assert pretrain.attention_loss([attention_of(outside)], -places, region) == 0    # an unnamed noun


def test_the_attention_loss_teaches_the_queries_and_the_text():
    unet, e = pretrain.UNet(pretrain.UNET_CONFIG), torch.randn(1, 32, 128, requires_grad=True)
    keys = unet.keys(e)
    with pretrain.record_queries(unet) as queries:
        unet(torch.randn(1, unet.config.in_channels, 16, 16), torch.tensor([100]), keys, unet.values(e))
    maps = pretrain.attention(queries, keys, 2)
    pretrain.attention_loss(maps, torch.tensor([[3, -1]]), torch.rand(1, 2, 16, 16)).backward()
    assert e.grad[0, 3].any() and all(layer.to_q.weight.grad.any() for layer in unet.cross_attentions)


def test_a_picture_depends_on_its_number_alone(smoke):
    tokenizer = weights_loader.load(str(smoke / "weights")).tokenizer
    (images, ids, places, regions), = pretrain.pictures(tokenizer, "clip", range(3, 4), 4, "cpu")
    later, = pretrain.pictures(tokenizer, "clip", range(7, 8), 2, "cpu")
    assert torch.equal(images[2:], later[0])
    assert torch.allclose(regions.sum(1), torch.ones(4, 16, 16))
    assert (ids.gather(2, places.clamp(min=0)) != ids[..., :1])[places >= 0].all()  # nouns, not the start


def test_an_orthogonal_update_has_no_direction_that_dominates():
    for shape in ((3, 20, 50), (2, 64, 16)):
        values = torch.linalg.svdvals(pretrain.orthogonal(torch.randn(shape)))
        assert 0.6 < values.min() and values.max() < 1.3
