"""weights_loader.py takes the public files of Stable Diffusion v1 in every form, strictly, once and fast."""

import hashlib
import json
import platform
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import PUBLISHED, TEXT, UNET, VAE, single_file_tensors, small_model

import weight_configs
import weight_names
import weights_loader
from weight_files import Entry, LoadError

CONFIGS = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def folder(model, tmp_path):
    weights_loader.save(model, tmp_path / "sd")
    return tmp_path / "sd"


@pytest.fixture
def small_single_files(monkeypatch):
    monkeypatch.setattr(weights_loader, "SINGLE_FILE_CONFIGS", CONFIGS)


def assert_equal(model, loaded, atol=0):
    for part in weights_loader.PARTS:
        expected, state = getattr(model, part).state_dict(), getattr(loaded, part).state_dict()
        assert expected.keys() == state.keys()
        for name, value in state.items():
            assert torch.allclose(value, expected[name], rtol=0, atol=atol), name


def header(name, dtype=torch.float32):
    """A file that has the names, shapes and types of a published one, and no data."""
    integers = {key: torch.int64 if kind == "I64" else torch.int32
                for key, kind in PUBLISHED["ldm_dtypes_nonf32"].items()} | {
                    "text_model.embeddings.position_ids": torch.int64}
    entries = {key: Entry(integers.get(key, dtype), tuple(shape), 0)
               for key, shape in PUBLISHED[name].items()}
    return types.SimpleNamespace(path=Path(f"{name}.safetensors"), entries=entries)


def rewrite_keys(path, rename):
    save_file({rename(key): tensor for key, tensor in load_file(path).items()}, path)


# ---- names: the published files, key by key

@pytest.mark.parametrize("name, part", [("diffusers_unet", "unet"), ("diffusers_vae_new_names", "vae"),
                                        ("diffusers_vae_old_names", "vae"), ("text_encoder", "text_encoder")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_published_folder_files_fit_strictly(name, part, dtype):
    file, network = header(name, dtype), weights_loader.PARTS[part]
    names = weight_names.renamed(file, file.entries, weight_names.FOLDER_RENAMES[part])
    config = weight_configs.READ[part](PUBLISHED["configs_v1-5"][part])
    weights_loader.connect(network, config, file, names)
    for ours, key in names.items():
        new = PUBLISHED["vae_old_to_new_names"].get(key, key).removeprefix("text_model.")
        assert ours == new
    unused = set(file.entries) - set(names.values())
    assert unused <= {"text_model.embeddings.position_ids"}


@pytest.mark.parametrize("name", ["ldm_single_file_emaonly", "ldm_single_file_pruned_with_ema"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_published_single_files_fit_strictly_and_as_the_published_map_says(name, dtype):
    file = header(name, dtype)
    parts, schedule, _ = weights_loader.open_single_file(file, tokenizer="elsewhere")
    for part, (_, _, names) in parts.items():
        table = {single: ours.removeprefix("text_model.")
                 for single, ours in PUBLISHED["map_ldm_to_diffusers"][part].items()}
        if part == "unet" and name.endswith("ema"):
            table = {"model_ema." + single.removeprefix("model.").replace(".", ""): ours
                     for single, ours in table.items()}
        assert names == {ours: single for single, ours in table.items() if not ours.endswith("position_ids")}
    assert schedule.prediction_type == "epsilon"


def test_every_missing_unexpected_or_misshaped_tensor_of_a_single_file_is_named():
    keys = list(PUBLISHED["ldm_single_file_emaonly"])
    for i, key in enumerate(keys[::67]):
        if weight_names.ignored(key) or key.endswith("position_ids"):
            continue
        file, change = header("ldm_single_file_emaonly"), i % 3
        if change == 0:
            file.entries[key + "x"] = file.entries.pop(key)
        elif change == 1:
            file.entries[key] = Entry(torch.float32, (3, *file.entries[key].shape), 0)
        else:
            file.entries[key] = Entry(torch.int64, file.entries[key].shape, 0)
        with pytest.raises(LoadError, match=re.escape(key)):
            weights_loader.open_single_file(file, tokenizer="elsewhere")
    file = header("ldm_single_file_emaonly")
    del file.entries["first_stage_model.quant_conv.bias"]
    with pytest.raises(LoadError, match="no tensor for quant_conv.bias"):
        weights_loader.open_single_file(file, tokenizer="elsewhere")


def test_two_tensors_for_one_parameter_are_refused():
    file = header("diffusers_vae_old_names")
    old, new = next(iter(PUBLISHED["vae_old_to_new_names"].items()))
    file.entries[new] = file.entries[old]
    with pytest.raises(LoadError, match="two tensors for one parameter"):
        weight_names.renamed(file, file.entries, weight_names.FOLDER_RENAMES["vae"])


def test_every_ignored_tensor_has_a_reason():
    published = [*PUBLISHED["map_ldm_to_diffusers"]["ignore_exact"], "text_model.embeddings.position_ids"]
    other = ["logvar", "scale_factor", "loss.discriminator.main.0.weight", "embeddings.position_ids",
             "text_model.encoder.text_model.embeddings.position_ids"]
    assert all(weight_names.ignored(key) for key in published + other)
    taken = {key for name in ("diffusers_unet", "diffusers_vae_old_names") for key in PUBLISHED[name]}
    assert not any(weight_names.ignored(key) for key in taken)


@pytest.mark.parametrize("keys, kind", [
    ({"conditioner.embedders.0.transformer.x": (1,)}, "Stable Diffusion XL"),
    ({"cond_stage_model.model.ln_final.weight": (1024,)}, "Stable Diffusion 2"),
    ({"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024)},
     "Stable Diffusion 2"),
    ({"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}, "an inpainting model"),
    ({"model.diffusion_model.input_blocks.0.0.weight": (320, 8, 3, 3)}, "an instruct-pix2pix model"),
    ({"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": (1, 1)}, "a LoRA"),
    ({"unet.mid_block.attentions.0.to_q.lora_A.weight": (1, 1)}, "a LoRA"),
    ({"encoder.conv_in.weight": (128, 3, 3, 3), "decoder.conv_in.weight": (512, 4, 3, 3)}, "a VAE alone"),
    ({"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)}, "a VAE alone"),
    ({"text_model.embeddings.token_embedding.weight": (49408, 768)}, "a text encoder alone"),
    ({"conv_in.weight": (320, 4, 3, 3), "time_embedding.linear_1.weight": (1280, 320)}, "a U-Net alone"),
    ({"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "a ControlNet"),
    ({"emb_params": (1, 768)}, "a textual inversion"),
    ({"model.diffusion_model.joint_blocks.0.x": (1,)}, "Stable Diffusion 3"),
    ({"some.weight": (1,)}, "something else")])
def test_other_kinds_of_files_are_named(tmp_path, keys, kind):
    save_file({key: torch.zeros(shape) for key, shape in keys.items()}, tmp_path / "file.safetensors")
    with pytest.raises(LoadError, match=f"file.safetensors: not Stable Diffusion v1 but {kind}"):
        weights_loader.load(tmp_path / "file.safetensors")


# ---- data: every form of file gives the same networks

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_saved_model_is_loaded_as_it_was(model, tmp_path, dtype):
    weights_loader.save(model, tmp_path, dtype)
    loaded = weights_loader.load(str(tmp_path))
    assert_equal(model, loaded)
    for part in weights_loader.PARTS:
        assert getattr(loaded, part).config == getattr(model, part).config
        assert not getattr(loaded, part).training
        assert all(p.dtype == torch.float32 for p in getattr(loaded, part).parameters())
        assert not any(p.requires_grad for p in getattr(loaded, part).parameters())
    assert loaded.tokenizer.encode(["a bear"])[0].equal(model.tokenizer.encode(["a bear"])[0])
    assert loaded.folder == tmp_path
    z, t = torch.zeros(1, 4, 8, 8), torch.tensor([1])
    e = loaded.text_encoder(loaded.text_encoder.embed(loaded.tokenizer.encode(["a bear"])[0]))
    noise = loaded.unet(z, t, loaded.unet.keys(e), loaded.unet.values(e))
    assert noise.shape == z.shape and noise.device.type == "cpu"  # nothing was left without data


def test_convolutions_lie_channels_last_in_memory_and_as_published_in_files(folder):
    loaded = weights_loader.load(folder)
    weights = [p for part in weights_loader.PARTS for p in getattr(loaded, part).parameters() if p.dim() == 4]
    assert len(weights) > 50 and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    weights_loader.save(loaded, folder.parent / "again")
    for path in folder.rglob("*.safetensors"):
        assert (folder.parent / "again" / path.relative_to(folder)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_networks_have_the_type_that_was_asked_for(folder, dtype):
    loaded = weights_loader.load(folder, dtype=dtype)
    assert {p.dtype for part in weights_loader.PARTS for p in getattr(loaded, part).parameters()} == {dtype}


def test_both_precisions_of_a_model_have_one_fingerprint_and_another_model_another(model, tmp_path):
    for parameter in [*model.unet.parameters()][:50]:
        assert parameter.equal(parameter.half().float())
    fp32 = small_model()
    for part in weights_loader.PARTS:
        for parameter in getattr(fp32, part).parameters():
            parameter.mul_(1.0001)  # no longer exact in float16
    weights_loader.save(fp32, tmp_path / "fp32")
    weights_loader.save(fp32, tmp_path / "fp16", torch.float16)
    weights_loader.save(small_model(seed=1), tmp_path / "other")
    a, b, c = (weights_loader.load(tmp_path / name).fingerprint for name in ("fp32", "fp16", "other"))
    assert a == b != c and re.fullmatch("[0-9a-f]{16}", a)
    assert weights_loader.load(tmp_path / "fp32", dtype=torch.bfloat16).fingerprint == a


def test_old_attention_names_of_the_vae_load(model, folder):
    old = {new: old for old, new in PUBLISHED["vae_old_to_new_names"].items()}
    rewrite_keys(folder / "vae" / "diffusion_pytorch_model.safetensors", lambda key: old.get(key, key))
    assert_equal(model, weights_loader.load(folder))


def test_a_text_encoder_as_transformers_5_saves_it_loads(model, folder):
    rewrite_keys(folder / "text_encoder" / "model.safetensors", lambda key: key.removeprefix("text_model."))
    assert_equal(model, weights_loader.load(folder))


def test_position_ids_of_old_files_are_left_out(model, folder):
    path = folder / "text_encoder" / "model.safetensors"
    extra = {"text_model.embeddings.position_ids": torch.arange(16)[None],
             "text_model.encoder.text_model.embeddings.position_ids": torch.arange(16.0)[None]}
    save_file(load_file(path) | extra, path)
    assert_equal(model, weights_loader.load(folder))


def test_bin_files_load_and_safetensors_are_preferred(model, folder):
    for part, names in weights_loader.WEIGHTS.items():
        path = folder / part / names[0]
        torch.save(load_file(path), folder / part / names[1])
        path.unlink()
    assert_equal(model, weights_loader.load(folder))
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: tensor + 1 for key, tensor in torch.load(path.with_suffix(".bin")).items()}, path)
    assert not weights_loader.load(folder).unet.conv_in.weight.equal(model.unet.conv_in.weight)


def test_the_fp16_variant_is_found_by_name_or_where_it_is_alone(model, folder):
    for part, names in weights_loader.WEIGHTS.items():
        tensors = {key: tensor.half() for key, tensor in load_file(folder / part / names[0]).items()}
        save_file(tensors, folder / part / names[0].replace(".safetensors", ".fp16.safetensors"))
        (folder / part / names[0]).write_bytes(b"unreadable")
    assert_equal(model, weights_loader.load(folder, variant="fp16"))
    with pytest.raises(LoadError, match="truncated"):
        weights_loader.load(folder)
    for part, names in weights_loader.WEIGHTS.items():
        (folder / part / names[0]).unlink()
    assert_equal(model, weights_loader.load(folder))


@pytest.mark.parametrize("padding", range(4))
def test_data_at_odd_addresses_load_into_aligned_memory(model, folder, padding):
    for part, names in weights_loader.WEIGHTS.items():
        data = (folder / part / names[0]).read_bytes()
        length = int.from_bytes(data[:8], "little")
        head = data[8:8 + length].rstrip() + b" " * padding
        (folder / part / names[0]).write_bytes(len(head).to_bytes(8, "little") + head + data[8 + length:])
    loaded = weights_loader.load(folder)
    assert_equal(model, loaded)
    assert all(parameter.data_ptr() % 16 == 0 for parameter in loaded.unet.parameters())


def test_the_prediction_type_comes_with_the_model(model, folder):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    assert weights_loader.load(folder).schedule.prediction_type == "v_prediction"
    weights_loader.save(weights_loader.load(folder), folder.parent / "again")
    assert weights_loader.load(folder.parent / "again").schedule.prediction_type == "v_prediction"


# ---- single files

@pytest.mark.parametrize("suffix, ema", [(".safetensors", False), (".safetensors", True), (".ckpt", True)])
def test_single_files_load_and_their_moving_average_is_used(model, tmp_path, small_single_files, suffix, ema):
    tensors, path = single_file_tensors(model, ema), tmp_path / f"v1{suffix}"
    assert len(tensors) == (1831 if ema else 1145)
    if suffix == ".ckpt":
        torch.save({"epoch": 3, "state_dict": tensors}, path)
    else:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    model.tokenizer.save(tmp_path)
    loaded = weights_loader.load(path)
    assert_equal(model, loaded)
    assert loaded.name == "v1" and loaded.folder == tmp_path
    weights_loader.save(model, tmp_path / "sd")
    assert weights_loader.load(tmp_path / "sd").fingerprint == loaded.fingerprint


def test_a_single_file_takes_the_tokenizer_that_it_is_given(model, tmp_path, small_single_files):
    save_file(single_file_tensors(model), tmp_path / "v1.safetensors")
    (tmp_path / "words").mkdir()
    model.tokenizer.save(tmp_path / "words")
    assert_equal(model, weights_loader.load(tmp_path / "v1.safetensors", tokenizer=tmp_path / "words"))


def test_novelai_names_and_a_half_precision_single_file_load(model, tmp_path, small_single_files):
    tensors = {key.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."):
               tensor.half() if tensor.is_floating_point() else tensor
               for key, tensor in single_file_tensors(model).items()}
    save_file(tensors, tmp_path / "v1.safetensors")
    model.tokenizer.save(tmp_path)
    assert_equal(model, weights_loader.load(tmp_path / "v1.safetensors"))


def test_lightning_and_numpy_objects_in_a_ckpt_are_harmless_and_unused(model, tmp_path, small_single_files):
    import numpy
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    modules = {"pytorch_lightning": types.ModuleType("pytorch_lightning"),
               "pytorch_lightning.callbacks": types.ModuleType("pytorch_lightning.callbacks"), name: module}
    callback = module.ModelCheckpoint()
    callback.best = 1
    with pytest.MonkeyPatch.context() as patch:
        for key, value in modules.items():
            patch.setitem(sys.modules, key, value)
        torch.save({"state_dict": single_file_tensors(model), "callbacks": {module.ModelCheckpoint: callback},
                    "loss": numpy.float64(1.5)}, tmp_path / "v1.ckpt")
    model.tokenizer.save(tmp_path)
    assert name not in sys.modules
    assert_equal(model, weights_loader.load(tmp_path / "v1.ckpt"))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_by_name_and_does_not_run(tmp_path, zipped):
    target = tmp_path / "was-run"
    content = {"state_dict": {"a": torch.zeros(1)}, "callbacks": Evil(target)}
    if zipped:
        torch.save(content, tmp_path / "evil.ckpt")
    else:
        torch.save(content, tmp_path / "evil.ckpt", _use_new_zipfile_serialization=False)
    reason = "refused, because it asks to run .*pathlib" if zipped else "truncated, or not written by torch"
    with pytest.raises(LoadError, match=reason):
        weights_loader.load(tmp_path / "evil.ckpt")
    assert not target.exists()
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert target.exists()  # so it was a real one


# ---- files written here, speed and memory

def test_saved_files_have_the_published_names_and_leave_nothing_else(model, folder):
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == [
        "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.safetensors",
        "tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors"]
    keys = {part: load_file(folder / part / names[0]).keys()
            for part, names in weights_loader.WEIGHTS.items()}
    assert keys["unet"] == PUBLISHED["diffusers_unet"].keys()
    assert keys["vae"] == PUBLISHED["diffusers_vae_new_names"].keys()
    assert keys["text_encoder"] == PUBLISHED["text_encoder"].keys() - {"text_model.embeddings.position_ids"}


def test_diffusers_and_transformers_load_what_is_saved(model, folder):
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    for part, reference in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL),
                            ("text_encoder", transformers.CLIPTextModel)):
        loaded, info = reference.from_pretrained(folder / part, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], part
        state = {key.removeprefix("text_model."): value for key, value in loaded.state_dict().items()}
        assert all(state[key].equal(value) for key, value in getattr(model, part).state_dict().items())


def test_a_failed_save_leaves_the_old_file(model, folder):
    before = hashlib.sha256((folder / "unet/config.json").read_bytes()).hexdigest()
    with pytest.raises(TypeError):
        weights_loader.write_json(folder / "unet" / "config.json", {"a": object()})
    assert hashlib.sha256((folder / "unet/config.json").read_bytes()).hexdigest() == before
    assert len(list((folder / "unet").iterdir())) == 2


MEASURE = """
import resource, sys, torch, unet, weights_loader
from weight_files import WeightFile
config = unet.UNetConfig(block_out_channels=(96, 192, 384), layers_per_block=1,
                         cross_attention=(True, True, False))
if sys.argv[1] == "write":
    from safetensors.torch import save_file
    save_file(dict(unet.UNet(config).state_dict()), sys.argv[2])
else:
    torch.zeros(8).aminmax()
    file = WeightFile(sys.argv[2])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    part = weights_loader.connect(unet.UNet, config, file, {key: key for key in file.entries})
    weights_loader.fill(*part, "cpu", torch.float32)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_loading_needs_the_memory_of_the_weights_once(tmp_path):
    path = tmp_path / "unet.safetensors"
    for mode in ("write", "read"):
        done = subprocess.run([sys.executable, "-c", MEASURE, mode, path], check=True, capture_output=True,
                              text=True, cwd=Path(weights_loader.__file__).parent)
    assert int(done.stdout) < 1.05 * path.stat().st_size + 2e7  # 20 MB: the largest tensor, and modules


def test_loading_a_small_model_takes_less_than_a_second(folder):
    weights_loader.load(folder)  # the first use of torch
    start = time.process_time()
    weights_loader.load(folder)
    assert time.process_time() - start < 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_after_loading_large_blocks_are_reused_without_fetching_their_pages_anew():
    code = ("import resource, torch, weights_loader\n"
            "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "def cost():\n"
            "    before = faults()\n"
            "    torch.ones(2 ** 24)  # 64 MB\n"
            "    return faults() - before\n"
            "before = [cost() for _ in range(5)][-1]\n"
            "weights_loader.load()\n"
            "print(before, [cost() for _ in range(5)][-1])")
    before, after = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                                            cwd=Path(__file__).parents[1]).stdout.split())
    assert after < 0.1 * before
