"""The U-Net and the autoencoder equal diffusers' UNet2DConditionModel and AutoencoderKL."""

import torch

import vae
from models import assert_parity


def run(network, z, t, e):
    return network(z, t, network.keys(e), network.values(e))


def test_the_unets_output_and_its_gradients_equal_the_reference(reference, model):
    z, t, e = torch.randn(2, 4, 8, 12), torch.tensor([981, 3]), torch.randn(2, 7, 48)
    assert_parity(lambda z: run(model.unet, z, t, e), lambda z: reference.unet(z, t, e).sample, z)
    assert_parity(lambda e: run(model.unet, z, t, e), lambda e: reference.unet(z, t, e).sample, e)


def test_the_layers_are_named_in_order_of_execution(model):
    assert model.unet.layer_names() == ["down.0.0", "down.0.1", "down.1.0", "down.1.1", "mid.0",
                                        "up.1.0", "up.1.1", "up.1.2", "up.2.0", "up.2.1", "up.2.2"]


def test_moments_and_their_gradient_equal_the_reference(reference, model):
    assert_parity(lambda x: torch.cat(model.vae.moments(x), 1),
                  lambda x: reference.vae.encode(x).latent_dist.parameters, torch.rand(2, 3, 24, 40) * 2 - 1)


def test_decoded_images_and_their_gradient_equal_the_reference(reference, model):
    scale, z = model.vae.config.scaling_factor, torch.randn(2, 4, 6, 10)
    assert_parity(model.vae.decode, lambda z: reference.vae.decode(z / scale).sample, z)


def test_encode_is_the_scaled_mean_or_a_scaled_sample(model):
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    mean, logvar = model.vae.moments(images)
    noise, scale = torch.randn_like(mean), model.vae.config.scaling_factor
    torch.testing.assert_close(model.vae.encode(images), mean * scale)
    torch.testing.assert_close(model.vae.encode(images, noise), (mean + (logvar / 2).exp() * noise) * scale)


def test_the_log_variance_is_clamped(model):
    network = vae.VAE(model.vae.config)
    network.quant_conv.bias.data[4:6] = torch.tensor([1e3, -1e3])
    logvar = network.moments(torch.zeros(1, 3, 8, 8))[1]
    assert logvar.max() == 20 and logvar.min() == -30
