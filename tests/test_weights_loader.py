"""weights_loader.py takes the public files of Stable Diffusion v1 in every form; complete means loadable."""

import dataclasses
import inspect
import json
import re
import shutil
import sys
import types
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import weights_loader
from models import PUBLISHED, SMALL, Call, bins, half, rewritten, shards, single_file_tensors, small_model
from support import weight_names
from support.files import what_is

PARTS = tuple(weights_loader.NETWORKS)
OLD_ATTENTION = {new: old for old, new in PUBLISHED["vae_old_to_new_names"].items()}
PLAIN = "model.diffusion_model."


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with its folder and fingerprint."""
    model = small_model()
    model.folder = tmp_path_factory.mktemp("saved") / "sd"
    weights_loader.save(model, model.folder)
    model.fingerprint = weights_loader.load(model.folder).fingerprint
    return model


@pytest.fixture
def folder(model, tmp_path):
    """The model in the published layout, to be changed."""
    return Path(shutil.copytree(model.folder, tmp_path / "sd"))


@pytest.fixture(autouse=True)
def small_single_files(monkeypatch):
    """Single files hold models of the toy's size."""
    monkeypatch.setattr(weight_names, "SD_V1", SMALL)


def load(weights, **options):
    """(the model, the lines that were said)."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = weights_loader.load(weights, **options)
    return model, [str(warning.message) for warning in said]


def assert_equal(model, loaded):
    for part in PARTS:
        expected, state = (getattr(x, part).state_dict() for x in (model, loaded))
        torch.testing.assert_close(state, expected, rtol=0, atol=0)


def write_single(model, path, tensors, write=torch.save, **options):
    """A single file, of pickles or as `write` does it with these options, and the model's vocabulary."""
    path.parent.mkdir(exist_ok=True)
    model.tokenizer.save(path.parent)
    write(tensors, path, **options)
    return path


# ---- names: the published files, key by key

@pytest.mark.parametrize("name, part", [
    ("diffusers_unet", "unet"), ("diffusers_vae_new_names", "vae"), ("diffusers_vae_old_names", "vae"),
    ("text_encoder", "text_encoder"), *(("ldm_single_file_pruned_with_ema", part) for part in PARTS)])
def test_published_files_fit_as_the_published_maps_say(monkeypatch, name, part):
    monkeypatch.undo()
    integers = {key: torch.int64 if kind == "I64" else torch.int32
                for key, kind in PUBLISHED["ldm_dtypes_nonf32"].items()}
    tensors = {key: (Path(name), torch.empty(shape, dtype=integers.get(key), device="meta"))
               for key, shape in PUBLISHED[name].items()}
    config = weight_names.read_config(part, PUBLISHED["configs_v1-5"][part])
    assert config == weight_names.SD_V1[part]
    network, names, _ = weights_loader.connect(part, config, tensors)
    table = PUBLISHED["map_ldm_to_diffusers"][part] | PUBLISHED["vae_old_to_new_names"]
    assert names.keys() == network.state_dict().keys()
    for ours, key in names.items():
        assert ours == table.get(key, key).removeprefix("text_model.")


# ---- data: every form of file gives the same networks

def changed(part, change):
    """A form: the folder, one of whose files holds change(its tensors)."""
    def write(model, folder):
        path = folder / part / weights_loader.WEIGHTS[part][0]
        save_file(change(load_file(path)), path)
        return folder
    return write


def files(write):
    """A form: the folder, whose files are written anew, see `models.rewritten`."""
    return lambda model, folder: rewritten(folder, write)


def single(change=dict, name="v1.ckpt", **how):
    """A form: a single file that holds change(its tensors), see `write_single`."""
    return lambda model, folder: write_single(model, folder.parent / "one" / name,
                                              change(single_file_tensors(model)), **how)


def attention(**names):
    """A change: other names in the VAE's attention, whose 1x1 convolutions become linear maps."""
    pattern = re.compile(rf"(?<=\.attn_1\.)({'|'.join(names)})(?=\.)")
    return lambda tensors: {pattern.sub(lambda name: names[name[0]], key): x.squeeze() if ".attn_1." in key
                            else x for key, x in tensors.items()}


def novelai_and_half(tensors):
    return {key.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."):
            tensor.half() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


def channels_last(tensors):
    return {key: torch.nn.Parameter(tensor.to(memory_format=torch.channels_last)) if tensor.ndim == 4
            else tensor for key, tensor in tensors.items()}


def notepad(model, folder):
    """Texts with a mark of their encoding in front."""
    for path in [*folder.rglob("*.json"), *folder.rglob("*.txt")]:
        path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    return folder


def tokenizer_json(model, folder):
    model.tokenizer._tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "merges.txt").unlink()
    return folder


def lightning(model, folder):
    """What the published .ckpt files hold beside tensors: an object of Lightning's and numbers of numpy's."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    callback = module.ModelCheckpoint()
    callback.best = 1
    beside = {"callbacks": {"a": callback}, "loss": np.float64(1.5)}
    names = "pytorch_lightning", "pytorch_lightning.callbacks", name
    with mock.patch.dict(sys.modules, dict.fromkeys(names, module)):
        return single(lambda tensors: {"state_dict": tensors} | beside)(model, folder)


def averaged(key):
    """The name of a tensor of the U-Net's moving average in a single file; other names stay."""
    return "model_ema." + key.removeprefix("model.").replace(".", "") if key.startswith(PLAIN) else key


def average_beside(tensors):
    """A change: the plain names are the model; a moving average of something else is added."""
    return {averaged(key): tensor + 1 for key, tensor in tensors.items() if key.startswith(PLAIN)} | tensors


IDS = {"text_model.embeddings.position_ids": torch.arange(16)[None],    # some old files hold them as floats
       "text_model.encoder.text_model.embeddings.position_ids": torch.arange(16.0)[None]}
DREAMBOOTH = {"embedding_manager.initial_embeddings.x": torch.zeros(1, 8), "lora_te.weight": torch.zeros(1),
              **{f"embedding_manager.string_to_param_dict.{i}": torch.zeros(1, 8) for i in "*+"}}
CAPTIONS = {"ss_tag_frequency": "teddy, " * 700_000}      # 5 MB, as training tools keep them
TOP_LEVEL = {"global_step": 3, "epoch": 1, "optimizer": {"state": [1]}, "name": "v1", 7: None}
BUFFERS = "alphas_cumprod* (1)"  # the noise schedule in single files
FORMS = {  # how a model is kept -> a function that keeps it so, parts of the lines that load() says of it
    "as saved": (lambda model, folder: folder, []),
    "the old names of the VAE's attention": (changed("vae", lambda tensors: {
        OLD_ATTENTION.get(key, key): tensor for key, tensor in tensors.items()}), []),
    "no prefix, as transformers 5 saves": (changed("text_encoder", lambda tensors: {
        key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}), []),
    "position ids": (changed("text_encoder", lambda tensors: tensors | IDS), ["not used: text_model* (2)"]),
    "only bins": (files(bins), []), "only half": (files(half), ["in half precision (fp16), there are no"]),
    "shards": (files(shards), []), "tokenizer.json": (tokenizer_json, []),
    "saved by Notepad": (notepad, []), "a pickle": (single(), [BUFFERS]),
    "captions in the header": (single(name="v1.safetensors", write=save_file, metadata=CAPTIONS), [BUFFERS]),
    "a blob of the hub": (single(name="v1", write=save_file), [BUFFERS]),
    "a suffix in capitals": (single(name="V1.SAFETENSORS", write=save_file), [BUFFERS]),
    "safetensors called .ckpt": (single(write=save_file), [BUFFERS]),
    "a pickle called .safetensors": (single(name="v1.safetensors"), [BUFFERS]),
    "a .ckpt before torch 1.6": (single(_use_new_zipfile_serialization=False), [BUFFERS]),
    "NovelAI, in half": (single(novelai_and_half), [BUFFERS]),
    "new attention": (single(attention(q="to_q", k="to_k", v="to_v", proj_out="to_out.0")), [BUFFERS]),
    "old attention": (single(attention(q="query", k="key", v="value", proj_out="proj_attn")), [BUFFERS]),
    "DreamBooth": (single(lambda tensors: tensors | DREAMBOOTH),
                   ["embedding_manager* (3), model_ema* (2), "]),
    "channels last at the top level": (single(lambda tensors: channels_last(tensors) | TOP_LEVEL),
                                       ["not used: model_ema* (2), "]),
    "Lightning": (lightning, ["not used: model_ema* (2), "]),
    "an average beside": (single(average_beside), ["not used: model_ema* (688), "]),
    "an average alone": (single(lambda tensors: {averaged(key): tensor for key, tensor in tensors.items()}),
                         ["its U-Net is the moving average (model_ema)", "not used: model_ema* (2), "])}


@pytest.mark.parametrize("form", FORMS)
def test_a_model_loads_as_it_was_and_what_is_unexpected_is_said_once(model, folder, form):
    keep, expected = FORMS[form]
    loaded, said = load(keep(model, folder))
    assert_equal(model, loaded)
    assert loaded.fingerprint == model.fingerprint
    assert loaded.guidance == 4         # narrow text makes a small model, however deep its VAE is
    assert len(said) == len(expected), said
    for line, words in zip(said, expected):
        assert words in line and line.startswith(f"{loaded.name}: ") and "\n" not in line
    for network in (getattr(loaded, part) for part in PARTS):
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
    assert loaded.tokenizer.encode(["a bear"])[0].equal(model.tokenizer.encode(["a bear"])[0])


def test_whole_files_come_before_others_and_a_variant_by_name(model, folder):
    assert_equal(model, load(folder, variant="fp16")[0])  # where there are no others
    for part, (name, other) in weights_loader.WEIGHTS.items():
        tensors = {key: tensor + 1 for key, tensor in load_file(folder / part / name).items()}
        save_file(tensors, folder / part / name.replace(".safetensors", ".fp16.safetensors"))
        torch.save(tensors, folder / part / other)
    assert_equal(model, load(folder)[0])
    variant, said = load(folder, variant="fp16")
    assert variant.unet.conv_in.weight.equal(model.unet.conv_in.weight + 1) and not said


def test_both_precisions_of_a_model_have_one_fingerprint_and_another_model_another(tmp_path):
    fp32 = small_model()
    for parameter in (*fp32.unet.parameters(), *fp32.text_encoder.parameters()):
        parameter.mul_(1.0001)      # no longer exact in float16
    weights_loader.save(fp32, tmp_path / "fp32")
    weights_loader.save(fp32, tmp_path / "fp16", torch.float16)
    weights_loader.save(small_model(1), tmp_path / "other")
    a, b, c = (load(tmp_path / name)[0].fingerprint for name in ("fp32", "fp16", "other"))
    assert a == b != c and re.fullmatch("[0-9a-f]{16}", a)
    assert load(tmp_path / "fp32", dtype=torch.bfloat16)[0].fingerprint == a
    # concept files carry the fingerprint of their base model: it may not change
    assert load("tiny")[0].fingerprint == "c49265795166c6d5"


def test_convolutions_lie_channels_last_in_memory_and_as_published_in_files(folder):
    loaded, _ = load(folder)
    weights = [p for part in PARTS for p in getattr(loaded, part).parameters() if p.dim() == 4]
    assert len(weights) > 20 and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    weights_loader.save(loaded, folder.parent / "again")
    for path in folder.rglob("*.safetensors"):
        assert (folder.parent / "again" / path.relative_to(folder)).read_bytes() == path.read_bytes()


# ---- what goes with the networks: size, prediction, vocabulary

@pytest.mark.parametrize("unet_side, vae_side, prediction, size", [
    (64, 32, "epsilon", (512, 512)), ([64, 96], 512, "epsilon", (512, 768)),
    (None, [128, 128], "v_prediction", (512, 512))])
def test_a_folder_says_the_size_in_the_unets_config_and_the_prediction_in_the_schedulers(
        folder, unet_side, vae_side, prediction, size):
    for name, change in (("unet/config.json", {"sample_size": unet_side}),
                         ("vae/config.json", {"sample_size": vae_side}),
                         ("scheduler/scheduler_config.json", {"prediction_type": prediction})):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    loaded, said = load(folder)
    assert bool(said) == ((prediction, size) != ("epsilon", (512, 512)))
    assert all(f"trained for {size[0]} x {size[1]} pixels, with {prediction}" in line for line in said)
    weights_loader.save(loaded, folder.parent / "again")
    for model in (loaded, load(folder.parent / "again")[0]):
        assert model.size == size and model.schedule.prediction_type == prediction


@pytest.mark.parametrize("yaml, prediction", [
    (None, "epsilon"), (b"# \xe9\nparameterization: v", "v_prediction"),
    ("parameterization: v".encode("utf-16"), "v_prediction"),
    (b'model:\r\n    parameterization: "v"  # and not eps\r\n', "v_prediction"),
    (b"    parameterization: 'eps'\n", "epsilon"), (b"    # parameterization: v\n", "epsilon")])
def test_the_yaml_beside_a_single_file_says_what_it_predicts(model, tmp_path, yaml, prediction):
    path = write_single(model, tmp_path / "v1.5 (tuned).safetensors", single_file_tensors(model))
    (tmp_path / "v1.5.yaml").write_text("parameterization: v")  # of another file
    if yaml is not None:
        path.with_suffix(".yaml").write_bytes(yaml)
    loaded, said = load(path)
    assert loaded.schedule.prediction_type == prediction
    assert ("512 pixels, with v_prediction" in said[0]) == (prediction == "v_prediction")


def test_the_users_word_goes_before_the_yaml_and_another_type_is_one_sentence(model, tmp_path):
    path = write_single(model, tmp_path / "v1.safetensors", single_file_tensors(model))
    path.with_suffix(".yaml").write_text("parameterization: x0")
    loaded, said = load(path, prediction="v_prediction")
    assert loaded.schedule.prediction_type == "v_prediction" and "its files say x0 of" in said[0]
    with pytest.raises(ValueError, match="not 'x0 of .*v1.yaml'"):
        load(path)


@pytest.mark.parametrize("place", ["", "tokenizer", "given"])
def test_a_single_file_takes_the_vocabulary_beside_it_or_the_one_given(model, tmp_path, monkeypatch, place):
    path = write_single(model, tmp_path / "v1.ckpt", single_file_tensors(model))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", tmp_path)  # there is nothing in it
    (tmp_path / place).mkdir(exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).rename(tmp_path / place / name)
    if place == "given":
        with pytest.raises(ValueError, match="no vocabulary .* --tokenizer names the folder of one$"):
            load(path)
    load(path, tokenizer=tmp_path / place if place == "given" else None)  # there is no other


# ---- what is refused

CONV_IN = PLAIN + "input_blocks.0.0.weight"
@pytest.mark.parametrize("change, words", [
    (lambda tensors: {key: tensor for key, tensor in tensors.items() if not key.startswith("cond")},
     "its text_encoder lacks 196 of 196 tensors"),              # SDXL, SD 2
    (lambda tensors: tensors | {CONV_IN: torch.zeros(4, 9, 3, 3)}, r"has the shape \[4, 9, 3"),  # inpainting
    (lambda tensors: tensors | {CONV_IN: tensors[CONV_IN].to(torch.float8_e5m2)}, "float8_e5m2, not")])
def test_an_incomplete_or_other_model_is_refused_in_one_sentence(model, tmp_path, change, words):
    path = write_single(model, tmp_path / "model.ckpt", change(single_file_tensors(model)))
    (tmp_path / "merges.txt").unlink()  # what it is comes before what it lacks
    with pytest.raises(ValueError, match=rf"^.*model.ckpt.*{words}.*\Z"):
        load(path)


def entries(part, reference):
    """All entries of the config that the reference's newest version writes."""
    path, = (reference.folder / part).glob("*config.json")
    return json.loads(path.read_text())


def read(part, public):
    if part == "scheduler":
        return weight_names.read_prediction(public)
    return weight_names.read_config(part, public)


CONFIGS = {"unet": {"time_cond_proj_dim": 256, "attention_type": "gated", "flip_sin_to_cos": None, "new": 1},
           "vae": {"use_post_quant_conv": False, "latents_mean": [0.1], "new": "fast"},
           "text_encoder": {"use_attention_mask": True, "layer_norm_eps": 1e-6, "new": 0.5},
           "scheduler": {"rescale_betas_zero_snr": True, "shift": 3.0, "beta_end": 0.02}}


@pytest.mark.parametrize("part, key", [(part, key) for part, changes in CONFIGS.items() for key in changes])
def test_an_entry_that_changes_the_result_is_refused_known_or_not(reference, part, key):
    public = entries(part, reference)
    read(part, public | {"new_but_off": False, "other": None, "_written_by": "x", "dropout": 0.1})
    with pytest.raises(ValueError, match=f"^{key} is"):
        read(part, public | {key: CONFIGS[part][key]})


@pytest.mark.parametrize("part", PARTS)
def test_no_entry_of_the_reference_is_changed_unseen(reference, part):
    """Each is refused, read, or named in a table as without effect."""
    public = entries(part, reference)
    before = read(part, public)
    for key, value in public.items():
        other = {bool: not value, str: "other", list: [97]}.get(type(value), 97)
        try:
            unseen = read(part, public | {key: other}) == before and not key.startswith("_")
        except (ValueError, TypeError):
            continue
        assert not unseen or key in weight_names.WITHOUT_EFFECT, key


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_scheduler_with_the_noise_of_sd_v1_is_read_but_those_of_distilled_models():
    from diffusers import LCMScheduler, PNDMScheduler
    noise = weight_names.CONSTANTS["scheduler"]
    kinds = [kind for kind in PNDMScheduler().compatibles
             if "beta_start" in inspect.signature(kind).parameters]
    assert len(kinds) > 8 and all(read("scheduler", kind(**noise).config) == "epsilon" for kind in kinds)
    with pytest.raises(ValueError, match="original_inference_steps is 50, which is not of Stable"):
        read("scheduler", LCMScheduler(**noise).config)


def test_parts_of_two_models_are_refused(folder):
    other = SMALL | {"text_encoder": dataclasses.replace(SMALL["text_encoder"], width=32)}
    weights_loader.save(small_model(configs=other), folder)
    with pytest.raises(ValueError, match="its U-Net, VAE and text encoder do not belong together"):
        load(folder)


def test_a_pickle_that_would_run_code_is_refused_by_name_and_does_not_run(tmp_path):
    path, evil = tmp_path / "evil.ckpt", Call(eval, f"open({str(tmp_path / 'was-run')!r}, 'w')")
    torch.save({"state_dict": {"a": torch.zeros(1)}, "callbacks": evil}, path)
    with pytest.raises(ValueError, match="evil.ckpt.*asks to run eval$"):
        load(path)
    assert list(tmp_path.iterdir()) == [path]
    torch.load(path, weights_only=False)
    assert (tmp_path / "was-run").exists()      # so it was a real one


@pytest.mark.parametrize("given, guess", [
    ("https://huggingface.co/someone/model/tree/main", "someone/model"), ("hf.co/a/b/", "a/b"),
    ("https://civitai.com/models/1", "the path of the file, once"), ("SD15", "sd15"), ("sd-v1.5", "sd15"),
    ("runwayml/stable-diffusion-v1-5", "sd15"), ("Tiny", "tiny"), ("HERE/sd/model_index.json", "HERE/sd"),
    ("HERE/sd/unet/config.json", "HERE/sd"), ("HERE/sd/unet", "HERE/sd"), ("HERE", "HERE/sd"),
    ("HERE/one", "HERE/one/v1.ckpt"), ("HERE/styles", "")])
def test_what_was_meant_is_guessed(folder, monkeypatch, given, guess):
    monkeypatch.chdir(folder.parent)
    for name in ("one", "styles"):
        Path(name).mkdir()
        Path(name, "style.safetensors").write_bytes(bytes(9999))
    torch.save({"model.diffusion_model.out.2.bias": torch.zeros(1)}, "one/v1.ckpt")
    given, guess = (text.replace("HERE", str(folder.parent)) for text in (given, guess))
    with pytest.raises(ValueError, match=rf"; did you mean {guess}[^/]*\?$" if guess else "no such[^;]*$"):
        load(given)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json",
                                  "tokenizer/vocab.json"])
@pytest.mark.parametrize("content, words", [
    (b"version https://git-lfs.github.com/spec/v1\noid", "`git lfs pull` fetches the file itself\\)$"),
    (b"\n<!DOCTYPE html>", "a web page \\(take the link that downloads the file\\)$")])
def test_what_stands_in_the_place_of_a_file_is_told(folder, name, content, words):
    (folder / name).write_bytes(content)
    assert re.search(words, what_is(folder / name))
    with pytest.raises(ValueError, match=words):
        load(folder)
