"""All networks against the reference at the full size of Stable Diffusion v1; test_unet, test_vae and
test_clip_text are the same at a small size, with gradients."""

import gc

import pytest
import torch

import clip_text
import weight_formats
import weights_loader
from conftest import build_reference
from models import largest_difference, write_vocabulary


@torch.no_grad()
@pytest.mark.slow
def test_at_full_size_all_networks_equal_the_reference(tmp_path):
    write_vocabulary(tmp_path / "tokenizer")
    text_config = clip_text.TextConfig(vocab_size=514)  # full width and depth, a short word list
    reference = build_reference(tmp_path, weight_formats.SD_V1 | {"text_encoder": text_config})
    ids, z = torch.randint(0, text_config.vocab_size, (1, 77)), torch.randn(1, 4, 16, 16)
    t, e, images = torch.tensor([981]), torch.randn(1, 77, 768), torch.rand(1, 3, 128, 128) * 2 - 1
    expected = [reference.text_encoder(ids).last_hidden_state, reference.unet(z, t, e).sample,
                reference.vae.encode(images).latent_dist.mean, reference.vae.decode(z).sample]
    del reference
    gc.collect()  # two U-Nets would not fit beside each other everywhere
    model = weights_loader.load(tmp_path)
    text, unet, vae = model.text_encoder, model.unet, model.vae
    results = [text(text.embed(ids)), unet(z, t, unet.keys(e), unet.values(e)), vae.moments(images)[0],
               vae.decode(z * vae.config.scaling_factor)]
    for name, result, value in zip(("text", "U-Net", "encoder", "decoder"), results, expected, strict=True):
        difference = largest_difference(result, value)
        print(f"{name}: largest difference {difference:.1e}, largest value {value.abs().max():.2f}")
        assert value.abs().max() > 0.1 and difference < 1e-4, name
