"""The U-Net equals diffusers' UNet2DConditionModel, with its text projections lent in order of execution."""

import torch

from models import assert_parity


def run(network, z, t, e):
    return network(z, t, network.keys(e), network.values(e))


def test_the_output_and_its_gradients_equal_the_reference(reference, model):
    z, t, e = torch.randn(2, 4, 8, 12), torch.tensor([981, 3]), torch.randn(2, 7, 48)
    assert_parity(lambda z: run(model.unet, z, t, e), lambda z: reference.unet(z, t, e).sample, z)
    assert_parity(lambda e: run(model.unet, z, t, e), lambda e: reference.unet(z, t, e).sample, e)


def test_the_layers_are_named_in_order_of_execution(model):
    assert model.unet.layer_names() == ["down.0.0", "down.0.1", "down.1.0", "down.1.1", "mid.0",
                                        "up.1.0", "up.1.1", "up.1.2", "up.2.0", "up.2.1", "up.2.2"]
