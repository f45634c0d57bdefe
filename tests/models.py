"""Toy models for all tests, their vocabulary of bytes, their files, and how to run a script.

`small_model` has Stable Diffusion v1's topology, so exactly its tensor names; `tiny_model` is as little as
the scripts need; REFERENCE has every kind of block, for parity with diffusers.
"""

import gzip
import io
import json
import runpy
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

import clip_text
import covariance
import diffusion
import perfusion
import unet
import vae
import weights_loader
from concept import Concept
from support import clip_image

ROOT = Path(__file__).parents[1]
# keys -> shapes of the published files, and the names of a single file -> diffusers' names
PUBLISHED = json.loads(gzip.open(Path(__file__).parent / "data" / "sd_v1_names.json.gz").read())
WORDS = "a photo of teddy bear cat on the beach next to wearing hat".split()
SMALL = {
    "unet": unet.UNetConfig(block_out_channels=(4, 8, 16, 16), cross_attention_dim=8, attention_heads=2,
                            norm_num_groups=4),
    "vae": vae.VAEConfig(block_out_channels=(4, 8, 16, 16), norm_num_groups=4),
    "text_encoder": clip_text.TextConfig(vocab_size=514, width=8, heads=2, intermediate=16, max_length=16)}
TINY = {
    "unet": unet.UNetConfig(block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16,
                            attention_heads=2, norm_num_groups=8, cross_attention=(True, False),
                            sample_size=8),
    "vae": vae.VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4),
    "text_encoder": clip_text.TextConfig(vocab_size=545, width=16, layers=2, heads=2, intermediate=32,
                                         max_length=24)}
REFERENCE = {  # two downsamplings, resnets with and without a shortcut
    "unet": unet.UNetConfig(block_out_channels=(32, 64, 96), cross_attention_dim=48, attention_heads=4,
                            norm_num_groups=8, cross_attention=(True, True, False)),
    "vae": vae.VAEConfig(block_out_channels=(16, 32, 32), norm_num_groups=8),
    "text_encoder": clip_text.TextConfig(vocab_size=514, width=48, layers=3, heads=4, intermediate=96,
                                         max_length=16)}


def write_vocabulary(folder, merges=()):
    """vocab.json and merges.txt with the 256 bytes, the same at a word's end, the merges, start and end."""
    folder.mkdir(exist_ok=True)
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*characters, *(c + "</w>" for c in characters), *("".join(merge.split()) for merge in merges),
               "<|startoftext|>", "<|endoftext|>"]
    vocab = {entry: i for i, entry in enumerate(entries)}
    text = json.dumps(vocab, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / "vocab.json").write_text(text, encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def toy_tokenizer(max_length, words=()):
    """Bytes, and these words as single tokens."""
    merges = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges[" ".join(pieces[:2])] = None
            pieces[:2] = [pieces[0] + pieces[1]]
    with tempfile.TemporaryDirectory() as folder:
        write_vocabulary(Path(folder), list(merges))
        return clip_text.Tokenizer.load(folder, max_length)


def toy_model(configs, tokenizer, name):
    """A Model of these sizes with random weights, as the networks start.

    But for the text encoder's last norm: without a shift its encodings span one dimension less than d.
    """
    networks = {part: network(configs[part]).eval().requires_grad_(False)
                for part, network in weights_loader.NETWORKS.items()}
    torch.nn.init.normal_(networks["text_encoder"].final_layer_norm.bias, std=0.1)
    return weights_loader.Model(**networks, tokenizer=tokenizer, schedule=diffusion.Schedule.sd_v1(),
                                fingerprint="", name=name, folder=None)


def small_model(seed=0, configs=SMALL):
    """A Model with random weights that float16 holds exactly."""
    torch.manual_seed(seed)
    model = toy_model(configs, toy_tokenizer(configs["text_encoder"].max_length), "small")
    for part in configs:
        for parameter in getattr(model, part).parameters():
            parameter.copy_(torch.randn(parameter.shape).half())
    return model


def tiny_model():
    """A Model of random weights, small enough to draw in a moment, that knows WORDS."""
    torch.manual_seed(0)
    return toy_model(TINY, toy_tokenizer(24, WORDS), "random")


def single_file_tensors(model):
    """The tensors of a small_model as CompVis' code saved them, through the published table of names."""
    tensors = {}
    for part in weights_loader.NETWORKS:
        state = getattr(model, part).state_dict()
        for single, ours in PUBLISHED["map_ldm_to_diffusers"][part].items():
            if not single.endswith("position_ids"):
                tensors[single] = state[ours.removeprefix("text_model.")].clone()
    for key in PUBLISHED["map_ldm_to_diffusers"]["vae_squeeze_1x1_conv_to_linear"]:
        tensors[key] = tensors[key][:, :, None, None]
    for key in PUBLISHED["map_ldm_to_diffusers"]["ignore_exact"]:
        tensors[key] = torch.zeros(PUBLISHED["ldm_single_file_emaonly"][key])
    tensors["model_ema.num_updates"] = torch.tensor(7, dtype=torch.int32)
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(16)[None]
    return tensors


def bins(tensors, path):
    """The older form beside a path: a pickle."""
    torch.save(tensors, path.with_name(dict(weights_loader.WEIGHTS.values())[path.name]))


def half(tensors, path):
    """The variant in half precision beside a path."""
    save_file({key: tensor.half() for key, tensor in tensors.items()}, path.with_suffix(".fp16.safetensors"))


def shards(tensors, path):
    """Three parts beside a path, as diffusers and transformers split large networks. No index is needed."""
    for i in range(3):
        part = path.with_name(f"{path.stem}-0000{i + 1}-of-00003.safetensors")
        save_file({key: tensors[key] for key in list(tensors)[i::3]}, part)


def rewritten(folder, write):
    """The folder with every file of weights replaced by what write(tensors, path) makes of it."""
    for part, (name, _) in weights_loader.WEIGHTS.items():
        path = folder / part / name
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        path.unlink()
        write(tensors, path)
    return folder


def write_weights(folder, captions=0):
    """The folder of a tiny_model in the published layout, with a CLIP of its own; C of so many captions."""
    model = tiny_model()
    weights_loader.save(model, folder)
    config = clip_image.ImageConfig(16, 4, 16, 2, 2, 32, 8, 16)
    clip_image.save(clip_image.CLIP(config, model.text_encoder), folder / "clip")
    if captions:
        model = weights_loader.load(folder)
        texts = covariance.built_in_captions(captions, model.tokenizer)
        covariance.store(covariance.covariance(model.text_encoder, model.tokenizer, texts), model)
    return folder


def write_concept(weights, path, words="teddy bear", lock="locked", seed=0):
    """A concept file <stem of path> for that model, whose targets are far from its super-category's."""
    torch.manual_seed(seed)
    model = weights_loader.load(weights)
    i_super = perfusion.super_encoding(model.text_encoder, model.tokenizer, words)
    k = len(model.tokenizer.find(words, words)[0])
    concept = Concept(f"<{path.stem}>", words, torch.randn(k, len(i_super)), keys=lock,
                                metadata={"base": model.fingerprint})
    if lock != "none":
        concept.i_star, concept.d_star = i_super, i_super.clone()
        concept.layers = model.unet.layer_names()
        concept.o_values = [v + 3 for v in model.unet.values(i_super)]
    if lock == "trained":
        concept.o_keys = [k + 2 for k in model.unet.keys(i_super)]
    concept.save(path)
    return path


def largest_difference(a, b):
    return (a - b).abs().max().item()


def assert_parity(ours, theirs, x):
    """Two functions have the same value, and the same gradient with respect to x."""
    weight = torch.randn_like(theirs(x))
    weight /= weight[0].numel() ** 0.5
    found, expected = (torch.autograd.functional.vjp(function, x, weight) for function in (ours, theirs))
    for a, b, at_least in zip(found, expected, (0.1, 0.01)):
        assert a.shape == b.shape and b.abs().max() > at_least
        assert largest_difference(a, b) < 1e-5


def noise(height, width, seed=0):
    """A picture."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


class Call:
    """Pickled, it is a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def run_script(name, *arguments):
    """Run a script as a program, in this process for speed; returns (exit code, stdout, stderr)."""
    code, argv = 0, [name, *map(str, arguments)]
    with (mock.patch("sys.argv", argv), mock.patch("sys.stdout", io.StringIO()) as out,
          mock.patch("sys.stderr", io.StringIO()) as err, warnings.catch_warnings()):
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()
