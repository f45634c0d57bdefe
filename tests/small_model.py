"""A random model with Stable Diffusion v1's topology, so exactly its tensor names, a few channels wide."""

import gzip
import json
import tempfile
from pathlib import Path

import torch
from tokenizers import models, pre_tokenizers

import clip_text
import diffusion
import unet
import vae
import weights_loader

# keys -> shapes of the published files, and the names of a single file -> diffusers' names
PUBLISHED = json.loads(gzip.open(Path(__file__).parent / "data" / "sd_v1_names.json.gz").read())
UNET = unet.UNetConfig(block_out_channels=(4, 8, 16, 16), cross_attention_dim=8, attention_heads=2,
                       norm_num_groups=4)
VAE = vae.VAEConfig(block_out_channels=(4, 8, 16, 16), norm_num_groups=4)
TEXT = clip_text.TextConfig(vocab_size=514, width=8, heads=2, intermediate=16, max_length=16)


def small_tokenizer():
    """The 256 bytes, inside and at the end of a word, without merges."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*pieces, *(piece + "</w>" for piece in pieces), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        models.BPE({piece: i for i, piece in enumerate(pieces)}, []).save(folder)
        return clip_text.Tokenizer.load(folder, TEXT.max_length)


def small_model(seed=0):
    """A Model with random weights that float16 holds exactly."""
    torch.manual_seed(seed)
    networks = {"unet": unet.UNet(UNET), "vae": vae.VAE(VAE), "text_encoder": clip_text.TextEncoder(TEXT)}
    for network in networks.values():
        network.eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape).half())
    return weights_loader.Model(**networks, tokenizer=small_tokenizer(), schedule=diffusion.Schedule.sd_v1(),
                                fingerprint="", name="small", folder=None)


def single_file_tensors(model, ema=False):
    """The tensors of the model as CompVis' code saved them, through the published table of names."""
    tensors = {}
    for part, table in PUBLISHED["map_ldm_to_diffusers"].items():
        if part in ("unet", "vae", "text_encoder"):
            state = getattr(model, part).state_dict()
            for single, ours in table.items():
                if not single.endswith("position_ids"):
                    tensors[single] = state[ours.removeprefix("text_model.")].clone()
    for key in PUBLISHED["map_ldm_to_diffusers"]["vae_squeeze_1x1_conv_to_linear"]:
        tensors[key] = tensors[key][:, :, None, None]
    for key in PUBLISHED["map_ldm_to_diffusers"]["ignore_exact"]:
        tensors[key] = torch.zeros(PUBLISHED["ldm_single_file_emaonly"][key])
    tensors["model_ema.num_updates"] = torch.tensor(7, dtype=torch.int32)
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(16)[None]
    if ema:
        for key in [key for key in tensors if key.startswith("model.diffusion_model.")]:
            tensors["model_ema." + key.removeprefix("model.").replace(".", "")] = tensors[key]
            tensors[key] = tensors[key] + 1
    return tensors
