"""Bad inputs: each is answered in one sentence, and nothing is written."""

import json
import os
import pickle
import resource
import shlex
import subprocess
import sys
import zipfile

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import weights_loader
from models import ROOT, Call, run_script, write_concept, write_weights
from perfusion import Concept

WEIGHTS = {part: f"{part}/{names[0]}" for part, names in weights_loader.WEIGHTS.items()}
FILES = [*WEIGHTS.values(), *(f"{part}/config.json" for part in WEIGHTS), "scheduler/scheduler_config.json",
         "tokenizer/vocab.json"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("good") / "weights")


@pytest.fixture
def folder(weights, tmp_path):
    """The good model; its files are links, so a test replaces them and never writes into them."""
    for path in [path for path in weights.rglob("*.*") if path.is_file()]:
        copy = tmp_path / "sd" / path.relative_to(weights)
        copy.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, copy)
    return tmp_path / "sd"


def replace(path, content):
    path.unlink()
    if content is not None:
        path.write_bytes(content)


def assert_refused(weights, word):
    """load() raises an error of one sentence with this word."""
    with pytest.raises(ValueError) as error:
        weights_loader.load(weights)
    sentence = str(error.value)
    assert "\n" not in sentence and 10 < len(sentence) < 500 and str(word) in sentence, sentence


# ---- a model with one file that is not what it should be

@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [
    None, b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167540\n",
    b"<!DOCTYPE html>", b"[1, 2]", b'{"block_out_channels"', b"\xff\xfe\x00", b"[" * 100_000])
def test_a_file_of_something_else(folder, name, content):
    replace(folder / name, content)
    assert_refused(folder, (folder / name).parent if name.startswith("tokenizer") else folder / name)


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("length", [1, 7, 8, 9, 100, 5000, -1])
def test_truncated_weights(folder, part, length):
    replace(folder / WEIGHTS[part], (folder / WEIGHTS[part]).read_bytes()[:length])
    assert_refused(folder, WEIGHTS[part])


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("change", [
    lambda x: torch.cat([x, x]).transpose(0, 1).contiguous(), lambda x: torch.cat([x, x]), lambda x: x.sum(),
    lambda x: x.long(), lambda x: None, lambda x: x * float("nan"), lambda x: x / 0],
    ids=["transposed", "longer", "scalar", "integers", "missing", "nan", "infinite"])
def test_a_tensor_that_does_not_fit_is_named(folder, part, change):
    tensors = load_file(folder / WEIGHTS[part])
    key = sorted(key for key in tensors if tensors[key].ndim > 1)[len(tensors) // 4]
    tensors[key] = change(tensors[key].clone())
    replace(folder / WEIGHTS[part], None)
    save_file({key: x for key, x in tensors.items() if x is not None}, folder / WEIGHTS[part])
    assert_refused(folder, key.removeprefix("text_model."))


@pytest.mark.parametrize("part, change", [(part, change) for part, changes in {
    "unet": [{"block_out_channels": [3, 3], "norm_num_groups": 2}, {"block_out_channels": 5},
             {"block_out_channels": []}, {"block_out_channels": ["a", "b"]}, {"block_out_channels": [4, 4]},
             {"layers_per_block": 2}, {"layers_per_block": -1}, {"attention_head_dim": [5, 10]},
             {"use_linear_projection": True}, {"down_block_types": ["DownBlock2D"]}, {"down_block_types": 7},
             {"_class_name": "UNet1DModel"}, {"norm_num_groups": 0}, {"norm_eps": 1e-6}, {"in_channels": 9},
             {"addition_embed_type": "text_time"}, {"up_block_types": ["UpBlock2D"] * 2},
             *({"sample_size": side} for side in (0, 64.5, "64", [64], [64, None], {"height": 64}))],
    "vae": [{"block_out_channels": "wide"}, {"latent_channels": 16}, {"shift_factor": 0.1},
            {"down_block_types": [1]}, {"down_block_types": ["AttnDownBlock2D"] * 2},
            {"layers_per_block": "2"}, {"use_quant_conv": False}, {"norm_num_groups": 0}],
    "text_encoder": [{"hidden_act": "gelu"}, {"hidden_size": 5}, {"num_hidden_layers": 0},
                     {"model_type": "t5"}, {"num_attention_heads": 3}, {"vocab_size": "all"},
                     {"max_position_embeddings": 77}],
    "scheduler": [{"beta_schedule": "linear"}, {"prediction_type": "sample"}, {"num_train_timesteps": 10},
                  {"prediction_type": ["epsilon"]}]}.items() for change in changes])
def test_a_config_of_another_network(folder, part, change):
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    replace(path, json.dumps(json.loads(path.read_text()) | change).encode())
    assert_refused(folder, "prediction type" if "prediction_type" in change else folder / part)


# ---- the command line

COMMANDS = {  # a right command of each script; capitals stand for what the fixture `places` holds
    "train": "--images IMAGES --super 'teddy bear' --out OUT",
    "sample": "'a <teddy>' --concept TEDDY --steps 1 --out OUT",
    "diagnostics": "--concept TEDDY --out OUT",
    "evaluate": "--concept TEDDY --images IMAGES --prompts tiny --beta 1 --seeds 1 --steps 1 --out OUT",
    "covariance": "--n 100", "export": "--concept TEDDY --out OUT"}
CONCEPT = "nowhere EMPTY NOTHING SHORT PICTURE UNET MISSHAPED HEADER ''".split()
IMAGES = ["nowhere", "EMPTY", "NOTHING", "APPLE", "''"]
BEFORE = {  # script -> {options: values} that are refused before any weights are read
    "train": {
        "--steps --batch --accumulate --resolution": ["0", "-1", "1.5", "two", "''"],
        "--lr --lr-embedding": ["0", "-1", "nan", "inf", "''"], "--beta": ["nan", "inf", "two"],
        "--seed --preview --checkpoint": ["-1", "two", "1.5"],
        "--super": ["''", "' '", "'<teddy>'", "'a {}'", "'a|b'"],
        "--token": ["''", "'a b'", "'<>'", "a/b", "../a", "'" + "a" * 50 + "'"], "--images": [*IMAGES, "___"],
        "--masks": ["nowhere", "TEDDY"], "--lock": ["open"], "--precision": ["fp8"],
        "--resume": ["nowhere", "EMPTY"], "--init-embedding": [*CONCEPT, "EVIL"],
        "--out": ["PICTURE", "BELOW", "IMAGES"], "--prediction": ["sample", "''"], "--device": ["tpu"],
        "--weights --images --out": ["NOT_UTF_8"], "--nonsense": ["1"]},
    "sample": {
        "--steps --n": ["0", "-1", "1.5", "1000000", "two"], "--seed": ["-1", "1e3", "99999999999999999999"],
        "--size": ["0", "big", "16x16x16", "-16", "100000", "''"], "--sampler": ["euler"],
        "--guidance": ["nan", "inf", "much"], "--beta": ["nan", "low", "0.1,0.2,0.3", "''"],
        "--tau": ["0", "-1", "nan", "soft"], "--lock": ["open"], "--concept": CONCEPT,
        "--precision": ["fp8"], "--negative": ["'a <dog>'"], "--out": ["PICTURE", "BELOW"]},
    "diagnostics": {
        "--steps": ["0", "1000", "two"], "--seed": ["-1", "two"], "--guidance": ["nan", "much"],
        "--prompt": ["''", "'{} {}'", "'{'"], "--pair": ["'{}'"], "--super": ["cat"],
        "--second": ["PICTURE", "EMPTY"], "--out": ["PICTURE"]},
    "evaluate": {
        "--seeds --steps": ["0", "-1", "1.5", "1000000", "two"], "--guidance": ["nan", "much"],
        "--beta": ["0.9:0.4:0.1", "a:b:c", "0:1:0", "nan", "''", "0:1"], "--tau": ["0", "nan", "soft"],
        "--concept": CONCEPT, "--images": [*IMAGES, "'EMPTY EMPTY'"], "--lock": ["open"],
        "--prompts": ["nowhere", "EMPTY", "NOTES", "PICTURE", "NOTHING", "GIGABYTE"],
        "--out": ["PICTURE", "BELOW"]},
    "covariance": {"--n": ["0", "-1", "many"], "--positions": ["some"],
                   "--captions": ["nowhere", "EMPTY", "NOTHING", "PICTURE", "BINARY", "GIGABYTE"]},
    "export": {"--concept": CONCEPT}}
LATER = {  # what can only be seen in the weights, or beside them
    "train": {
        "--weights": ["''", "nowhere", "no/such/folder", "missing.safetensors", "a/missing.ckpt", "..",
                      "EMPTY", "PICTURE", "TEDDY", "NOTHING", "HEADER", "EVIL", "BOMB", "BOUNDLESS"],
        "--tokenizer": ["nowhere", "EMPTY", "PICTURE"], "--resolution": ["15"], "--accumulate": ["3"],
        "--super": ["'" + "bear " * 30 + "'"], "--images": ["HUGE"], "--masks": ["EMPTY", "BLACK"],
        "--resume": ["PICTURE", "TEDDY", "EVIL"]},
    "sample": {"--size": ["7", "513"], "--concept": ["OTHER_BASE", "TEDDY"]},
    "diagnostics": {
        "--concept": [*CONCEPT, "OTHER_BASE", "INVERTED"], "--trained": ["nowhere", "TEDDY"],
        "--inversion": ["nowhere", "OTHER_BASE"], "--second": ["SHORT", "TEDDY"],
        "--words": ["castle", "bear"], "--prompt": ["'" + "a photo " * 20 + "{}'"],
        "--images": ["nowhere --super cat"],
        "--super": ["'" + "bear " * 30 + "' --images IMAGES"]},
    "evaluate": {"--concept": ["OTHER_BASE"], "--images": ["HUGE"], "--clip": ["nowhere", "EMPTY"]},
    "covariance": {}, "export": {"--concept": ["OTHER_BASE"], "--out": ["PICTURE", "BELOW"]}}
for script in [script for script in LATER if script != "train"]:
    LATER[script] |= {"--weights": ["nowhere", "TEDDY"], "--tokenizer": ["nowhere"]}
CASES = [(when, script, option, value) for when, scripts in (("before", BEFORE), ("later", LATER))
         for script, own in scripts.items() for options, values in own.items()
         for option in options.split() for value in values]


@pytest.fixture(scope="module")
def places(weights, tmp_path_factory):
    """What the capitals of the tables stand for."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    for name in ("images/picture.png", "black/picture.png", "___/a.png", "apple/a.HEIC"):
        (folder / name).parent.mkdir()
        Image.new("L", (16, 16)).save(folder / name, "PNG")
    picture = folder / "images" / "picture.png"
    Image.new("1", (20_000, 10_000)).save(folder / "huge.png")                  # 200 megapixels, 25 kB
    teddy = write_concept(weights, folder / "teddy.safetensors")
    write_concept(weights, folder / "inverted.safetensors", lock="none")
    run_script("covariance.py", "--weights", weights, "--n", 300)               # train.py would write it there
    for name, change in {"other_base": {"metadata": {"base": "another"}},
                         "misshaped": {"embedding": torch.zeros(2, 5)}}.items():
        concept = Concept.load(teddy)
        vars(concept).update(change)
        concept.save(folder / f"{name}.safetensors")
    for name, content, size in (
            ("nothing.safetensors", b"", None), ("notes.txt", b"no place", None),
            ("binary.txt", b"\xff\xfe\x00", None), ("short.safetensors", teddy.read_bytes()[:-1], None),
            ("gigabyte.txt", b"", 10 ** 9),
            ("header.safetensors", (10 ** 8).to_bytes(8, "little") + b"{", 10 ** 8 + 8),
            ("evil.ckpt", pickle.dumps(Call(os.mkdir, str(folder / "burgled"))), None)):
        (folder / name).write_bytes(content)
        os.truncate(folder / name, len(content) if size is None else size)      # what is longer takes no room
    with zipfile.ZipFile(folder / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("archive/data.pkl", "w") as file:
            for _ in range(70):                                                 # 700 MB in 3 MB
                file.write(bytes(10 ** 7))
    torch.save({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1).expand(10 ** 12)},
               folder / "boundless.ckpt")
    files = {path.stem.upper(): path for path in folder.iterdir()}
    return files | {"PICTURE": picture, "BELOW": picture / "below", "WEIGHTS": weights,
                    "UNET": weights / WEIGHTS["unet"], "NOT_UTF_8": os.fsdecode(b"caf\xe9"),
                    "BURGLED": folder / "burgled"}


@pytest.fixture
def little_memory():
    """600 MB more than now, above which python raises MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 600 * 10 ** 6, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("when, script, option, value", CASES)
def test_a_wrong_option_is_one_sentence_before_weights_are_read_and_nothing_is_written(
        when, script, option, value, places, tmp_path, monkeypatch, little_memory):
    read, load = [], weights_loader.load
    monkeypatch.setattr(weights_loader, "load", lambda *args, **kw: read.append(args) or load(*args, **kw))
    monkeypatch.chdir(tmp_path)
    here, before = places | {"OUT": tmp_path / "out"}, snapshot(places)
    command = shlex.split(f"{COMMANDS[script]} --weights WEIGHTS {option} {value}")
    assert_one_sentence(*run_script(f"{script}.py", *[str(here.get(word, word)) for word in command]))
    assert bool(read) == (when == "later")
    assert not list(tmp_path.glob("out/**/*.*")) and snapshot(places) == before


def snapshot(places):
    """All files around, and when they were written."""
    return {path: path.stat().st_mtime_ns for root in (places["WEIGHTS"], places["EMPTY"].parent)
            for path in root.rglob("*")}


def assert_one_sentence(code, _, stderr):
    lines = [line for line in stderr.splitlines() if not line.startswith("warning: ")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), stderr
    assert 15 < len(lines[0]) < 500 and "out of memory" not in stderr, stderr


def test_a_script_as_a_program_answers_in_the_same_way():
    command = [sys.executable, "sample.py", "--nonsense"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert_one_sentence(done.returncode, done.stdout, done.stderr)
