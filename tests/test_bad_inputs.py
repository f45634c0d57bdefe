"""Two hundred bad inputs: each is answered with one sentence that names the file."""

import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from models import run_script
from safetensors.torch import load_file, save_file
from small_model import small_model

import clip_text
import perfusion
import unet
import vae
import weights_loader
from weight_files import LoadError, WeightFile

# the smallest networks there are: each bad input is a whole model with one thing wrong
UNET = unet.UNetConfig(block_out_channels=(2, 2), layers_per_block=1, cross_attention_dim=4,
                       attention_heads=1, norm_num_groups=1, cross_attention=(True, False))
VAE = vae.VAEConfig(block_out_channels=(2, 2), layers_per_block=1, norm_num_groups=1)
TEXT = clip_text.TextConfig(vocab_size=514, width=4, layers=1, heads=1, intermediate=4, max_length=16)
WEIGHTS = {part: f"{part}/{names[0]}" for part, names in weights_loader.WEIGHTS.items()}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    torch.manual_seed(0)
    model, folder = small_model(), tmp_path_factory.mktemp("good")
    model.unet, model.vae, model.text_encoder = unet.UNet(UNET), vae.VAE(VAE), clip_text.TextEncoder(TEXT)
    weights_loader.save(model, folder)
    weights_loader.load(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """The good model; files are links, so a test replaces them and never writes into them."""
    for path in good.rglob("*.*"):
        if path.is_file():
            copy = tmp_path / "sd" / path.relative_to(good)
            copy.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, copy)
    return tmp_path / "sd"


def replace(path, data):
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def assert_refused(weights, *words):
    """load() raises a LoadError of one sentence with these words."""
    with pytest.raises(LoadError) as error:
        weights_loader.load(weights)
    sentence = str(error.value)
    assert "\n" not in sentence and 10 < len(sentence) < 500, sentence
    for word in words:
        assert str(word) in sentence, sentence


# ---- damaged files: 60

@pytest.mark.parametrize("seed", range(20))
def test_truncated_weights(folder, seed):
    name = list(WEIGHTS.values())[seed % 3]
    data = (folder / name).read_bytes()
    length = [0, 1, 7, 8, 9][seed] if seed < 5 else random.Random(seed).randrange(len(data))
    replace(folder / name, data[:length])
    assert_refused(folder, name)


@pytest.mark.parametrize("seed", range(30))
def test_a_flipped_bit_in_the_header(folder, seed):
    name, draw = list(WEIGHTS.values())[seed % 3], random.Random(seed)
    data = bytearray((folder / name).read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    start = data.index(b"}") + 1  # not in {"format": "pt"}, which says nothing
    at = draw.randrange(8) if seed < 3 else draw.randrange(start, end)
    data[at] ^= 1 << draw.randrange(8)
    replace(folder / name, bytes(data))
    assert_refused(folder, name)


@pytest.mark.parametrize("seed", range(10))
def test_a_truncated_or_scrambled_bin(folder, seed):
    path = folder / "vae" / "diffusion_pytorch_model.bin"
    torch.save(load_file(folder / WEIGHTS["vae"]), path)
    (folder / WEIGHTS["vae"]).unlink()
    data, draw = bytearray(path.read_bytes()), random.Random(seed)
    if seed % 2:
        data = data[:draw.randrange(len(data))]
    else:
        start = data.index(b"\x80\x02}")  # where the pickle begins
        data[start:start + 200] = draw.randbytes(200)
    replace(path, bytes(data))
    assert_refused(folder, path)


# ---- files that do not fit: shapes, types, names, values

@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("change", ["transposed", "longer", "scalar", "integers", "missing", "unexpected",
                                    "nan", "infinite"])
def test_tensors_that_do_not_fit(folder, part, change):
    path = folder / WEIGHTS[part]
    tensors = load_file(path)
    key = random.Random(change + part).choice([key for key in tensors if tensors[key].ndim > 1])
    tensor = tensors.pop(key)
    if change == "transposed":
        tensors[key] = torch.cat([tensor, tensor]).transpose(0, 1).contiguous()
    elif change == "longer":
        tensors[key] = torch.cat([tensor, tensor])
    elif change == "scalar":
        tensors[key] = torch.tensor(1.0)
    elif change == "integers":
        tensors[key] = tensor.long()
    elif change == "unexpected":
        tensors |= {key: tensor, key + ".lo": tensor.clone()}
        key += ".lo"
    elif change != "missing":
        tensors[key] = tensor.clone()
        tensors[key].view(-1)[-1] = float("nan" if change == "nan" else "inf")
    path.unlink()
    save_file(tensors, path)
    assert_refused(folder, WEIGHTS[part], key.removeprefix("text_model."))


@pytest.mark.parametrize("name", [*WEIGHTS.values(), *weights_loader.CONFIGS])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    assert_refused(folder, folder / name, "no such file")


@pytest.mark.parametrize("name", [*WEIGHTS.values(), *weights_loader.CONFIGS])
@pytest.mark.parametrize("content", [
    b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167540\n", b"<!DOCTYPE html>",
    b"[1, 2]", b'{"block_out_channels"', b"\xff\xfe\x00", b"[" * 100_000])
def test_a_file_of_something_else(folder, name, content):
    replace(folder / name, content)
    assert_refused(folder, folder / name)


@pytest.mark.parametrize("part, change", [
    ("unet", {"block_out_channels": [3, 3], "norm_num_groups": 2}), ("unet", {"block_out_channels": 5}),
    ("unet", {"block_out_channels": []}), ("unet", {"block_out_channels": ["a", "b"]}),
    ("unet", {"block_out_channels": [4, 4]}), ("unet", {"layers_per_block": 2}),
    ("unet", {"layers_per_block": -1}),
    ("unet", {"attention_head_dim": [5, 10]}), ("unet", {"use_linear_projection": True}),
    ("unet", {"down_block_types": ["DownBlock2D"]}), ("unet", {"down_block_types": 7}),
    ("unet", {"_class_name": "UNet1DModel"}), ("unet", {"norm_num_groups": 0}),
    ("vae", {"block_out_channels": "wide"}), ("vae", {"latent_channels": 16}), ("vae", {"shift_factor": 0.1}),
    ("vae", {"latent_channels": None}), ("vae", {"down_block_types": [1]}),
    ("text_encoder", {"hidden_act": "gelu"}), ("text_encoder", {"hidden_size": 5}),
    ("text_encoder", {"num_hidden_layers": 0}), ("text_encoder", {"num_attention_heads": 3}),
    ("text_encoder", {"vocab_size": "all"}), ("text_encoder", {"max_position_embeddings": 77}),
    ("scheduler", {"beta_schedule": "linear"}), ("scheduler", {"prediction_type": "sample"}),
    ("scheduler", {"num_train_timesteps": 10}), ("scheduler", {"prediction_type": ["epsilon"]})])
def test_a_config_of_another_network(folder, part, change):
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    config = json.loads(path.read_text()) | change
    replace(path, json.dumps(config).encode())
    assert_refused(folder, folder / part)


@pytest.mark.parametrize("name, content", [
    ("vocab.json", None), ("vocab.json", b""), ("vocab.json", b"[]"), ("vocab.json", b'{"a": "b"}'),
    ("vocab.json", b'{"a": 0}'), ("merges.txt", None), ("merges.txt", b"one\ntwo three four\n"),
    ("vocab.json", json.dumps({f"w{i}": i for i in range(600)} | {
        "<|startoftext|>": 600, "<|endoftext|>": 601}).encode())])
def test_a_broken_vocabulary(folder, name, content):
    path = folder / "tokenizer" / name
    path.unlink()
    if content is not None:
        replace(path, content)
    assert_refused(folder, folder / "tokenizer")


# ---- things that are not models

@pytest.mark.parametrize("weights", ["", "nowhere", "no/where/at/all", "missing.safetensors",
                                     "a/missing.ckpt", "with spaces/and more", "\u2603", "..", "tiny "])
def test_names_of_nothing(tmp_path, monkeypatch, weights):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert_refused(weights)


def test_an_empty_folder(tmp_path):
    assert_refused(tmp_path, "unet", "no such file")


@pytest.mark.parametrize("name, content", [
    ("picture.png", b"\x89PNG"), ("model.safetensors", b""), ("model.safetensors", b"\x02\0\0\0\0\0\0\0{}"),
    ("model.ckpt", b""), ("model.ckpt", b"PK\x03\x04"),
    ("model.ckpt", b"\x80\x02cos\nsystem\nX\x04\0\0\0echo\x85R."),
    ("model.bin", b"\0" * 100), ("model.pt", b"\0" * 100), ("model", b"")])
def test_files_that_are_no_weights(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path / name, name)


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"state_dict": 5}, [1, 2], {"a": 5},
                                     torch.zeros(3), {"a": torch.zeros(2, 3).T}])
def test_pickles_without_plain_tensors(tmp_path, content):
    torch.save(content, tmp_path / "model.ckpt")
    assert_refused(tmp_path / "model.ckpt", "model.ckpt")


def test_a_compressed_archive_is_not_read_as_weights(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain.ckpt")
    with zipfile.ZipFile(tmp_path / "plain.ckpt") as plain, \
            zipfile.ZipFile(tmp_path / "model.ckpt", "w", zipfile.ZIP_DEFLATED) as packed:
        for item in plain.namelist():
            packed.writestr(item, plain.read(item))
    assert_refused(tmp_path / "model.ckpt", "compressed")


def test_a_file_that_shrinks_after_its_header_was_read(folder, tmp_path):
    path = tmp_path / "unet.safetensors"
    path.write_bytes((folder / WEIGHTS["unet"]).read_bytes())
    file = WeightFile(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LoadError, match="truncated in"):
        file.read(max(file.entries, key=lambda key: file.entries[key].offset))


# ---- the command line: exit code 2, one sentence, no traceback

def run(*arguments):
    root = Path(weights_loader.__file__).parent
    done = subprocess.run([sys.executable, "sample.py", *map(str, arguments)], cwd=root, capture_output=True,
                          text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_sample_answers_bad_weights_in_one_sentence(folder, tmp_path):
    name = WEIGHTS["unet"]
    replace(folder / name, (folder / name).read_bytes()[:1000])
    answer = run("a photo", "--weights", folder, "--out", tmp_path / "out", "--device", "cpu")
    assert answer.startswith("error: ") and answer.count("\n") == 1 and name in answer


@pytest.mark.parametrize("length, words", [(0, "damaged"), (7, "damaged"), (60, "damaged"), (-1, "damaged"),
                                           (None, "another base model")])
def test_sample_answers_a_bad_concept_file_in_one_sentence(folder, tmp_path, length, words):
    path = tmp_path / "it.safetensors"
    concept = perfusion.Concept("<it>", "it", torch.zeros(1, 4), lock="none", metadata={"base": "another"})
    concept.save(path)
    replace(path, path.read_bytes()[:length])
    code, _, answer = run_script("sample.py", "an <it>", "--concept", path, "--weights", folder,
                                 "--out", tmp_path / "out", "--device", "cpu", "--size", 16)
    assert code == 2 and answer.startswith("error: ") and answer.count("\n") == 1 and words in answer
