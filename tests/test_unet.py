"""The U-Net equals diffusers' UNet2DConditionModel, and lends its text projections in order of execution."""

import torch

from models import assert_parity


def inputs(model):
    z = torch.randn(2, 4, 8, 12)
    e = torch.randn(2, 7, model.unet.config.cross_attention_dim)
    return z, torch.tensor([981, 3]), e


def run(network, z, t, e):
    return network(z, t, network.keys(e), network.values(e))


def test_the_output_and_its_gradients_equal_the_reference(reference, model):
    z, t, e = inputs(model)
    assert_parity(lambda z: run(model.unet, z, t, e), lambda z: reference.unet(z, t, e).sample, z)
    assert_parity(lambda e: run(model.unet, z, t, e), lambda e: reference.unet(z, t, e).sample, e)


def test_keys_and_values_are_those_of_the_layers_in_order_of_execution(model):
    network, (z, t, e) = model.unet, inputs(model)
    seen = []
    hooks = [layer.register_forward_hook(lambda layer, args, output: seen.append((layer, *args[1:])))
             for name, layer in network.named_modules() if name.endswith("attn2")]
    keys, values = network.keys(e), network.values(e)
    network(z, t, keys, values)
    for hook in hooks:
        hook.remove()
    assert [layer for layer, _, _ in seen] == network.cross_attentions
    assert network.layer_names() == ["down.0.0", "down.0.1", "down.1.0", "down.1.1", "mid.0",
                                     "up.1.0", "up.1.1", "up.1.2", "up.2.0", "up.2.1", "up.2.2"]
    assert all(used is key for (_, used, _), key in zip(seen, keys, strict=True))
    assert all(used is value for (_, _, used), value in zip(seen, values, strict=True))
