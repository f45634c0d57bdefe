"""Bad inputs: each is answered in one sentence, and nothing is written."""

import dataclasses
import itertools
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import sys
import zipfile

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import weights_loader
from concept import Concept
from models import Call, run_script, write_concept

UNET = "unet/diffusion_pytorch_model.safetensors"
INDEX = f"{UNET}.index.json"         # of shards, where there is no whole file
FILES = [UNET, INDEX, "vae/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"]


@pytest.fixture
def folder(weights, tmp_path):
    """A copy of the good model."""
    return shutil.copytree(weights, tmp_path / "sd")


def assert_refused(weights, word):
    """load() raises an error of one sentence with this word."""
    with pytest.raises(ValueError, match=re.escape(str(word))) as error:
        weights_loader.load(weights)
    assert "\n" not in str(error.value) and 10 < len(str(error.value)) < 500


# ---- a model with one file that is not what it should be

@pytest.mark.parametrize("name, content", [*itertools.product(FILES, [
    None, b"", b"[1, 2]", b'{"block_out_channels"', b"\xff\xfe\x00", b"[" * 100_000]),
    ("scheduler/scheduler_config.json", b'{"prediction_type": "sample"}'),
    *itertools.product([UNET], [1, 8, 5000, -1]), *itertools.product([INDEX], [
        b"{}", b'{"weight_map": {}}', b'{"weight_map": {"a": 5}}',
        b'{"weight_map": {"a": "00002-of-00003.safetensors"}}'])])
def test_a_file_of_something_else_or_cut_off(folder, name, content):
    """content: the file's, or how much of it there is."""
    path = folder / name
    if name == INDEX:
        (folder / UNET).unlink()
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    assert_refused(folder, path.parent if name in (INDEX, "tokenizer/vocab.json") else path)


@pytest.mark.parametrize("change", [
    lambda x: torch.cat([x, x]), lambda x: x.sum(), lambda x: x.long(), lambda x: None,
    lambda x: x * float("nan"), lambda x: x / 0])
def test_a_tensor_that_does_not_fit_is_named(folder, change):
    tensors, key = load_file(folder / UNET), "conv_out.weight"
    wrong = change(tensors.pop(key).clone())
    (folder / UNET).unlink()                # the tensors still lie in it
    save_file(tensors if wrong is None else tensors | {key: wrong}, folder / UNET)
    assert_refused(folder, key)


@pytest.mark.parametrize("part, entry, values", [
    ("unet", "block_out_channels", [[3, 3], 5, [], ["a", "b"]]), ("unet", "sample_size", [0, {"height": 64}]),
    ("unet", "norm_num_groups", [0]), ("unet", "down_block_types", [7]), ("vae", "down_block_types", [[1]]),
    ("vae", "layers_per_block", ["2"]), ("text_encoder", "num_attention_heads", [3])])
def test_a_config_of_no_network(folder, part, entry, values):
    path = folder / part / "config.json"
    good = json.loads(path.read_text())
    for value in values:
        path.write_text(json.dumps(good | {entry: value}))
        assert_refused(folder, path.parent)


# ---- the command line

COMMANDS = {  # a right command of each script; capitals stand for what the fixture `places` holds
    "train": "--images IMAGES --super 'teddy bear' --out OUT",
    "sample": "'a <teddy>' --concept TEDDY --steps 1 --out OUT",
    "diagnostics": "--concept TEDDY --out OUT",
    "evaluate": "--concept TEDDY --images IMAGES --prompts tiny --beta 1 --seeds 1 --steps 1 --out OUT",
    "covariance": "--n 100", "export": "--concept TEDDY --out OUT"}
BEFORE = {  # scripts -> {options: values} that are refused before any weights are read
    "train sample diagnostics evaluate": {"--out": ["PICTURE", "BELOW"]},
    "sample diagnostics evaluate export": {"--concept": ["nowhere", "EMPTY"]},
    "train": {
        "--steps --batch --accumulate --resolution --lr --lr-embedding": ["0", "two"], "--beta": ["nan"],
        "--seed --preview --checkpoint": ["-1", "1.5"], "--super": ["' '", "'a {}'"],
        "--token": ["'<>'", "../a", "'" + "a" * 50 + "'"], "--nonsense": ["1"],
        "--images": ["APPLE", "''", "___"], "--weights --out": ["NOT_UTF_8"], "--out": ["IMAGES"],
        "--resume": ["nowhere", "EMPTY"], "--masks": ["TEDDY"]},
    "train evaluate": {"--images": ["nowhere", "EMPTY", "NOTHING"]},
    "sample": {
        "--steps --n": ["1000000"], "--seed": ["99999999999999999999"], "--guidance --tau": ["nan"],
        "--size": ["big", "16x16x16", "-16", "100000"], "--beta": ["low", "0.1,0.2,0.3"],
        "--concept": "NOTHING SHORT PICTURE UNET MISSHAPED HEADER ''".split(), "--negative": ["'a <dog>'"]},
    "diagnostics": {"--prompt": ["''", "'{} {}'"], "--pair": ["'{}'"], "--super": ["cat"],
                    "--concept": ["TEDDY"],
                    "--second": ["EMPTY", "SHORT", "INVERTED", "TEDDY", "nowhere/teddy --second-super bear"]},
    "evaluate": {
        "--seeds --steps --tau": ["0"], "--beta": ["0.9:0.4:0.1", "a:b:c", "0:1:0", "nan", "0:1"],
        "--prompts": ["nowhere", "NOTES", "NOTHING", "GIGABYTE"]},
    "covariance": {"--n": ["0"], "--captions": ["nowhere", "NOTHING", "BINARY"]},
    "export": {"--out": ["EXPORTED"]}}
LATER = {  # what can only be seen in the weights, or beside them
    " ".join(COMMANDS): {"--weights": ["nowhere"]},
    "train": {
        "--weights": "'' missing.safetensors EMPTY PICTURE TEDDY HEADER EVIL BOMB BOUNDLESS".split(),
        "--tokenizer": ["nowhere", "EMPTY"], "--resolution": ["15"], "--accumulate": ["3"],
        "--super": ["'" + "bear " * 30 + "'"], "--masks": ["EMPTY", "BLACK"],
        "--resume": ["PICTURE", "TEDDY", "EVIL"], "--images": ["HUGE"]},
    "sample": {"--size": ["7", "513"], "--concept": ["OTHER_BASE", "TEDDY"]},
    "diagnostics": {
        "--inversion": ["INVERTED"], "--words": ["castle"], "--prompt": ["'" + "a " * 40 + "{}'"],
        "--images": ["nowhere --super cat"], "--super": ["'" + "bear " * 30 + "' --images IMAGES"]},
    "evaluate": {"--clip": ["nowhere", "EMPTY"], "--images": ["HUGE"], "--concept": ["OTHER_BASE"]},
    "export": {"--out": ["PICTURE", "BELOW"], "--concept": ["OTHER_BASE", "TEDDY", "LARGE"]}}
CASES = [(when, script, option, value) for when, table in (("before", BEFORE), ("later", LATER))
         for scripts, own in table.items() for script in scripts.split()
         for options, values in own.items() for option in options.split() for value in values]


@pytest.fixture(scope="module")
def places(weights, tmp_path_factory):
    """What the capitals of the tables stand for."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    for name in ("images/picture.png", "black/picture.png", "___/a.png", "apple/a.HEIC",
                 "exported/teddy_lora.safetensors"):
        (folder / name).parent.mkdir()
        Image.new("L", (16, 16)).save(folder / name, "PNG")
    picture = folder / "images" / "picture.png"
    Image.new("1", (20_000, 10_000)).save(folder / "huge.png")                  # 200 megapixels, 25 kB
    teddy = write_concept(weights, folder / "teddy.safetensors")
    write_concept(weights, folder / "inverted.safetensors", "cat", "none")
    concept, one = Concept.load(teddy), torch.eye(16)[0]
    for name, change in {
            "other_base": {"metadata": {"base": "another"}}, "misshaped": {"embedding": torch.zeros(2, 5)},
            "large": {"token": "<large>", "i_star": one / 100, "d_star": one,       # not in float16
                      "o_values": [value + 6e4 for value in concept.o_values]}}.items():
        dataclasses.replace(concept, **change).save(folder / f"{name}.safetensors")
    for name, content in {
            "nothing.safetensors": b"", "notes.txt": b"no place", "binary.txt": b"\xff\xfe\x00",
            "short.safetensors": teddy.read_bytes()[:-1], "gigabyte.txt": b"",
            "header.safetensors": (10 ** 8).to_bytes(8, "little") + b"{",
            "evil.ckpt": pickle.dumps(Call(os.mkdir, str(folder / "burgled")))}.items():
        (folder / name).write_bytes(content)
    for name in ("gigabyte.txt", "header.safetensors"):
        os.truncate(folder / name, 10 ** 9)                                     # sparse: takes no room
    with zipfile.ZipFile(folder / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", bytes(35 * 10 ** 7))               # 350 MB in 2 MB
    torch.save({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1).expand(10 ** 12)},
               folder / "boundless.ckpt")
    files = {path.stem.upper(): path for path in folder.iterdir()}
    return files | {"PICTURE": picture, "BELOW": picture / "below", "WEIGHTS": weights,
                    "UNET": weights / UNET, "NOT_UTF_8": os.fsdecode(b"caf\xe9")}


@pytest.fixture
def little_memory():
    """300 MB more than now, above which python raises MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 10 ** 6, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("when, script, option, value", CASES)
def test_a_wrong_option_is_one_sentence_before_weights_are_read_and_nothing_is_written(
        when, script, option, value, places, tmp_path, monkeypatch, little_memory):
    read, load = [], weights_loader.load
    monkeypatch.setattr(weights_loader, "load", lambda *args, **kw: read.append(args) or load(*args, **kw))
    monkeypatch.chdir(tmp_path)

    def around():
        """All files, and when they were written."""
        return {path: path.stat().st_mtime_ns for folder in (places["WEIGHTS"], places["EMPTY"].parent)
                for path in folder.rglob("*")}
    here, before = places | {"OUT": tmp_path / "out"}, around()
    command = shlex.split(f"{COMMANDS[script]} --weights WEIGHTS {option} {value}")
    code, _, stderr = run_script(f"{script}.py", *[str(here.get(word, word)) for word in command])
    lines = [line for line in stderr.splitlines() if not line.startswith("warning: ")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), stderr
    assert 15 < len(lines[0]) < 500 and "out of memory" not in stderr, stderr
    assert bool(read) == (when == "later")
    assert not list(tmp_path.glob("out/**/*.*")) and around() == before
