"""The U-Net equals diffusers' UNet2DConditionModel, and lends its text projections in order of execution."""

import gc
from pathlib import Path

import pytest
import torch

import clip_text
import unet
import vae
import weight_formats
import weights_loader
from conftest import build_reference
from models import write_vocabulary


def largest_difference(a, b):
    return (a - b).abs().max().item()


def inputs(model):
    z = torch.randn(2, 4, 8, 12)
    e = torch.randn(2, 7, model.unet.config.cross_attention_dim)
    return z, torch.tensor([981, 3]), e


def run(network, z, t, e):
    return network(z, t, network.keys(e), network.values(e))


def test_the_output_and_its_gradients_equal_the_reference(reference, model):
    z, t, e = inputs(model)
    ours, theirs = [[x.clone().requires_grad_() for x in (z, e)] for _ in range(2)]
    output = run(model.unet, ours[0], t, ours[1])
    expected = reference.unet(theirs[0], t, theirs[1]).sample
    assert expected.abs().max() > 0.1
    assert largest_difference(output, expected) < 1e-5
    weight = torch.randn_like(output) / output[0].numel() ** 0.5
    gradients = torch.autograd.grad((output * weight).sum(), ours)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), theirs)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        assert expected_gradient.abs().max() > 0.01
        assert largest_difference(gradient, expected_gradient) < 1e-5


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0."
BLOCK_SWAPS = [("attn1.to_q", "attn1.to_k"), ("attn1.to_k", "attn1.to_v"), ("attn1.to_q", "attn2.to_q"),
               ("attn2.to_k", "attn2.to_v"), ("attn1.to_out", "attn2.to_out"), ("norm1", "norm2"),
               ("norm2", "norm3"), ("norm1", "norm3")]
SWAPS = [(BLOCK + a, BLOCK + b) for a, b in BLOCK_SWAPS] + [
    ("down_blocks.0.attentions.0", "down_blocks.0.attentions.1"),
    ("down_blocks.0.attentions.0.proj_in", "down_blocks.0.attentions.0.proj_out"),
    ("down_blocks.0.attentions.0.norm", BLOCK + "norm1"),
    ("mid_block.resnets.0", "mid_block.resnets.1"),
    ("mid_block.resnets.0.conv1", "mid_block.resnets.0.conv2"),
    ("mid_block.resnets.0.norm1", "mid_block.resnets.0.norm2"),
    ("up_blocks.1.attentions.0", "up_blocks.1.attentions.2"),
]


@pytest.mark.parametrize("a, b", SWAPS)
def test_a_swap_that_no_shape_check_sees_breaks_parity(reference, model, swapped, a, b):
    z, t, e = inputs(model)
    network = unet.UNet(model.unet.config)
    network.load_state_dict(swapped(model.unet.state_dict(), a, b))
    assert largest_difference(run(network, z, t, e), reference.unet(z, t, e).sample) > 1e-3


def test_exchanged_halves_of_the_geglu_break_parity(reference, model):
    z, t, e = inputs(model)
    network = unet.UNet(model.unet.config)
    state = dict(model.unet.state_dict())
    for name in (BLOCK + "ff.net.0.proj.weight", BLOCK + "ff.net.0.proj.bias"):
        state[name] = torch.cat(state[name].chunk(2)[::-1])
    network.load_state_dict(state)
    assert largest_difference(run(network, z, t, e), reference.unet(z, t, e).sample) > 1e-3


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


def test_sd_v1_has_sixteen_cross_attention_layers_of_these_widths_and_its_published_size():
    with torch.device("meta"):
        network = unet.UNet(unet.SD_V1)
    widths = [layer.to_k.out_features for layer in network.cross_attentions]
    assert widths == [320] * 2 + [640] * 2 + [1280] * 2 + [1280] + [1280] * 3 + [640] * 3 + [320] * 3
    assert len(network.state_dict()) == 686
    assert sum(parameter.numel() for parameter in network.parameters()) == 859_520_964


def test_the_text_projections_are_linear_maps_of_any_batch_of_encodings(model):
    e = torch.randn(3, 5, model.unet.config.cross_attention_dim)
    for project in (model.unet.keys, model.unet.values):
        for whole, rows, row in zip(project(e), project(e[1]), project(e[1, 2]), strict=True):
            torch.testing.assert_close(whole[1], rows)
            torch.testing.assert_close(rows[2], row)
        assert all(not zero.any() for zero in project(torch.zeros_like(e[0, 0])))  # no bias


def test_keys_of_one_prompt_serve_the_whole_batch(model):
    z, t, e = inputs(model)
    torch.testing.assert_close(run(model.unet, z, t, e[:1]), run(model.unet, z, t, e[:1].expand(2, -1, -1)))


def test_one_number_is_the_timestep_of_the_whole_batch(model):
    z, _, e = inputs(model)
    expected = run(model.unet, z, torch.tensor([981, 981]), e)
    for t in (981, torch.tensor(981), torch.tensor([981])):
        torch.testing.assert_close(run(model.unet, z, t, e), expected, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(0, 8), (8, 7), (6, 8), (513, 512)])
def test_latent_sizes_that_do_not_fit_are_refused(model, size):
    _, t, e = inputs(model)
    with pytest.raises(ValueError, match="latent height and width must be positive multiples of 4"):
        run(model.unet, torch.zeros(2, 4, *size), t, e)


@pytest.mark.slow
def test_at_full_size_all_networks_equal_the_reference(tmp_path):
    write_vocabulary(tmp_path / "tokenizer")
    text_config = clip_text.TextConfig(vocab_size=514)  # full width and depth, a short word list
    reference = build_reference(tmp_path, weight_formats.SD_V1 | {"text_encoder": text_config})
    ids = torch.randint(0, text_config.vocab_size, (1, 77))
    z, t, images = torch.randn(1, 4, 32, 32), torch.tensor([981]), torch.rand(1, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        e = reference.text_encoder(ids).last_hidden_state
        expected = [e, reference.unet(z, t, e).sample, reference.vae.encode(images).latent_dist.mean,
                    reference.vae.decode(z[..., :16, :16]).sample]
    folder = Path(reference.folder)
    del reference
    gc.collect()  # two U-Nets would not fit beside each other everywhere
    model = weights_loader.load(folder)
    with torch.no_grad():
        scale = model.vae.config.scaling_factor
        results = [model.text_encoder(model.text_encoder.embed(ids)), run(model.unet, z, t, e),
                   model.vae.moments(images)[0], model.vae.decode(z[..., :16, :16] * scale)]
    for name, result, value in zip(("text", "U-Net", "encoder", "decoder"), results, expected, strict=True):
        difference = largest_difference(result, value)
        print(f"{name}: largest difference {difference:.1e}, largest value {value.abs().max():.2f}")
        assert value.abs().max() > 0.1 and difference < 1e-4, name
