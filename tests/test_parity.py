"""All networks against the reference: what breaks the parity, and at the full size of Stable Diffusion v1."""

import copy
import gc
from pathlib import Path

import pytest
import torch

import clip_text
import weights_loader
from conftest import build_reference
from models import largest_difference, write_vocabulary
from support import weight_names

BLOCK, LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.", "encoder.layers.1."
SWAPS = [("unet", BLOCK + "attn1.to_q", BLOCK + "attn1.to_k"), ("unet", BLOCK + "norm1", BLOCK + "norm3"),
         ("unet", BLOCK + "attn2.to_k", BLOCK + "attn2.to_v"),
         ("unet", "up_blocks.1.attentions.0", "up_blocks.1.attentions.2"),
         ("vae", "decoder.up_blocks.0.resnets.0", "decoder.up_blocks.0.resnets.1"),
         ("text_encoder", LAYER + "layer_norm1", "final_layer_norm")]


def outputs(networks, ids, z, t, e, images):
    """Of our text encoder, U-Net, encoder and decoder."""
    text, unet, vae = networks.text_encoder, networks.unet, networks.vae
    return [text(text.embed(ids)), unet(z, t, unet.keys(e), unet.values(e)), vae.moments(images)[0],
            vae.decode(z * vae.config.scaling_factor)]


def expected_outputs(networks, ids, z, t, e, images):
    """Of the reference's."""
    return [networks.text_encoder(ids).last_hidden_state, networks.unet(z, t, e).sample,
            networks.vae.encode(images).latent_dist.mean, networks.vae.decode(z).sample]


@torch.no_grad()
@pytest.mark.parametrize("part, a, b", SWAPS)
def test_a_swap_that_no_shape_check_sees_breaks_parity(reference, model, part, a, b):
    changed = copy.deepcopy(model)
    for first, second in ((a, b), (b, a)):
        getattr(changed, part).get_submodule(first).load_state_dict(
            getattr(model, part).get_submodule(second).state_dict())
    inputs = (torch.randint(0, 512, (2, 16)), torch.randn(2, 4, 8, 8), torch.tensor([981, 3]),
              torch.randn(2, 7, 48), torch.rand(2, 3, 32, 32) * 2 - 1)
    pairs = list(zip(outputs(changed, *inputs), expected_outputs(reference, *inputs), strict=True))
    assert max(largest_difference(*pair) for pair in pairs) > 1e-3


@torch.no_grad()
@pytest.mark.slow
def test_at_full_size_all_networks_equal_the_reference(tmp_path):
    write_vocabulary(tmp_path / "tokenizer")
    text_config = clip_text.TextConfig(vocab_size=514)  # full width and depth, a short word list
    reference = build_reference(tmp_path, weight_names.SD_V1 | {"text_encoder": text_config})
    inputs = (torch.randint(0, text_config.vocab_size, (1, 77)), torch.randn(1, 4, 16, 16),
              torch.tensor([981]), torch.randn(1, 77, 768), torch.rand(1, 3, 128, 128) * 2 - 1)
    expected, folder = expected_outputs(reference, *inputs), Path(reference.folder)
    del reference
    gc.collect()  # two U-Nets would not fit beside each other everywhere
    results = outputs(weights_loader.load(folder), *inputs)
    for name, result, value in zip(("text", "U-Net", "encoder", "decoder"), results, expected, strict=True):
        difference = largest_difference(result, value)
        print(f"{name}: largest difference {difference:.1e}, largest value {value.abs().max():.2f}")
        assert value.abs().max() > 0.1 and difference < 1e-4, name
