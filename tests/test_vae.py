"""The autoencoder equals diffusers' AutoencoderKL."""

import pytest
import torch

import vae


def largest_difference(a, b):
    return (a - b).abs().max().item()


def reference_decode(reference, z):
    return reference.vae.decode(z / reference.vae.config.scaling_factor).sample


def test_moments_and_their_gradient_equal_the_reference(reference, model):
    images = torch.rand(2, 3, 24, 40) * 2 - 1
    ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
    mean, logvar = model.vae.moments(ours)
    posterior = reference.vae.encode(theirs).latent_dist
    assert mean.shape == (2, 4, 6, 10)
    assert largest_difference(mean, posterior.mean) < 1e-5
    assert largest_difference(logvar, posterior.logvar) < 1e-5
    weight = torch.randn_like(mean)
    gradient, = torch.autograd.grad((mean * weight + logvar).sum(), ours)
    expected, = torch.autograd.grad((posterior.mean * weight + posterior.logvar).sum(), theirs)
    assert expected.abs().max() > 0.1
    assert largest_difference(gradient, expected) < 1e-5


def test_decoded_images_and_their_gradient_equal_the_reference(reference, model):
    latents = torch.randn(2, 4, 6, 10)
    ours, theirs = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    images, expected_images = model.vae.decode(ours), reference_decode(reference, theirs)
    assert images.shape == (2, 3, 24, 40)
    assert expected_images.abs().max() > 0.1
    assert largest_difference(images, expected_images) < 1e-5
    weight = torch.randn_like(images) / images[0].numel() ** 0.5
    gradient, = torch.autograd.grad((images * weight).sum(), ours)
    expected, = torch.autograd.grad((expected_images * weight).sum(), theirs)
    assert expected.abs().max() > 0.01
    assert largest_difference(gradient, expected) < 1e-5


def test_encode_is_the_scaled_mean_or_a_scaled_sample(model):
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    mean, logvar = model.vae.moments(images)
    noise = torch.randn_like(mean)
    scale = model.vae.config.scaling_factor
    torch.testing.assert_close(model.vae.encode(images), mean * scale)
    torch.testing.assert_close(model.vae.encode(images, noise), (mean + (logvar / 2).exp() * noise) * scale)


TENSOR_SWAPS = [
    *(("encoder.mid_block.attentions.0." + a, "encoder.mid_block.attentions.0." + b) for a, b in (
        ("to_q", "to_k"), ("to_q", "to_v"), ("to_k", "to_v"), ("to_q", "to_out.0"), ("to_v", "to_out.0"))),
    ("encoder.mid_block.resnets.0", "encoder.mid_block.resnets.1"),
    ("encoder.mid_block.resnets.0.norm1", "encoder.mid_block.resnets.0.norm2"),
    ("encoder.mid_block.resnets.0.conv1", "encoder.mid_block.resnets.0.conv2"),
    ("encoder.mid_block.resnets.1.norm1", "encoder.mid_block.attentions.0.group_norm"),
    ("encoder.down_blocks.1.resnets.1", "encoder.down_blocks.2.resnets.1"),
    ("decoder.mid_block.attentions.0.to_k", "decoder.mid_block.attentions.0.to_v"),
    ("decoder.mid_block.resnets.0", "decoder.mid_block.resnets.1"),
    ("decoder.up_blocks.0", "decoder.up_blocks.1"),
    ("decoder.up_blocks.0.resnets.0", "decoder.up_blocks.0.resnets.1"),
]


@pytest.mark.parametrize("a, b", TENSOR_SWAPS)
def test_a_swap_that_no_shape_check_sees_breaks_parity(reference, model, swapped, a, b):
    network = vae.VAE(model.vae.config)
    network.load_state_dict(swapped(model.vae.state_dict(), a, b))
    images, latents = torch.rand(1, 3, 24, 24) * 2 - 1, torch.randn(1, 4, 6, 6)
    if a.startswith("encoder"):
        ours, theirs = network.moments(images)[0], reference.vae.encode(images).latent_dist.mean
    else:
        ours, theirs = network.decode(latents), reference_decode(reference, latents)
    assert largest_difference(ours, theirs) > 1e-3


def test_the_log_variance_is_clamped(model):
    network = vae.VAE(model.vae.config)
    network.quant_conv.bias.data[4:6] = torch.tensor([1e3, -1e3])
    logvar = network.moments(torch.zeros(1, 3, 8, 8))[1]
    assert logvar.max() == 20 and logvar.min() == -30
