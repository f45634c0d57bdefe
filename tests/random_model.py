"""A whole model of random weights, small enough to draw in a moment, as files; and how to run a script."""

import contextlib
import io
import json
import runpy
import sys
import warnings
from pathlib import Path

import torch

import clip_image
import clip_text
import diffusion
import perfusion
import unet
import vae
import weights_loader

ROOT = Path(__file__).parents[1]
WORDS = "a photo of teddy bear cat on the beach next to wearing hat".split()


def tiny_model():
    """A model of random weights with every part, small enough to draw in a moment."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    torch.manual_seed(0)
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(characters + [c + "</w>" for c in characters])}
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            if (pieces[0], pieces[1]) not in merges:
                merges.append((pieces[0], pieces[1]))
                vocabulary.setdefault(pieces[0] + pieces[1], len(vocabulary))
            pieces[:2] = [pieces[0] + pieces[1]]
    for mark in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[mark] = len(vocabulary)
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    split = [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(split)
    bpe.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    networks = {
        "unet": unet.UNet(unet.UNetConfig(
            block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, attention_heads=2,
            norm_num_groups=8, cross_attention=(True, False))),
        "text_encoder": clip_text.TextEncoder(clip_text.TextConfig(
            vocab_size=len(vocabulary), width=16, layers=2, heads=2, intermediate=32, max_length=24)),
        "vae": vae.VAE(vae.VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4))}
    for network in networks.values():
        network.eval().requires_grad_(False)
    return weights_loader.Model(**networks, tokenizer=clip_text.Tokenizer(bpe, 24), name="random",
                                schedule=diffusion.Schedule.sd_v1(), fingerprint="", folder=None)


def write_weights(folder):
    """The folder of a random model in the published layout, with a CLIP of its own."""
    model = tiny_model()
    weights_loader.save(model, folder)
    model.tokenizer.save(folder / "tokenizer")
    vae_config = folder / "vae" / "config.json"
    vae_config.write_text(json.dumps(json.loads(vae_config.read_text()) | {"sample_size": 16}))
    config = clip_image.ImageConfig(16, 4, 16, 2, 2, 32, 8, 16)
    clip_image.save(clip_image.CLIP(config, model.text_encoder), folder / "clip")
    return folder


def write_concept(weights, path, words="teddy bear", lock="locked", seed=0):
    """A concept file <stem of path> for that model, whose targets are far from its super-category's."""
    torch.manual_seed(seed)
    model = weights_loader.load(weights)
    i_super = perfusion.super_encoding(model.text_encoder, model.tokenizer, words)
    k = len(model.tokenizer.find(words, words)[0])
    concept = perfusion.Concept(f"<{path.stem}>", words, torch.randn(k, len(i_super)), lock=lock,
                                metadata={"base": model.fingerprint})
    if lock != "none":
        concept.i_star, concept.d_star = i_super, i_super.clone()
        concept.layers = perfusion.layer_names(model.unet)
        concept.values = [v + 3 for v in model.unet.values(i_super)]
    if lock == "trained":
        concept.keys = [k + 2 for k in model.unet.keys(i_super)]
    concept.save(path)
    return path


def run_script(name, *arguments):
    """Run a script as a program, in this process for speed; returns (exit code, stdout, stderr)."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [name, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            runpy.run_path(str(ROOT / name), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()
