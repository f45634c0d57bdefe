"""Public Stable Diffusion v1 weights, in every form in which people have them, for the networks written here.

    model = load("tiny")                                 # the small model that comes with this repository
    model = load("sd15", variant="fp16")                 # from the hub: 2.13 GB once, offline afterwards
    model = load("v1-5-pruned-emaonly.safetensors", device="cuda", dtype=torch.float16)

A model whose three networks are complete loads. A tensor that is missing or does not fit is refused by name,
before any data are read. What else the files hold, and whatever one may not expect of the result, is said in
a warning of one line.
"""

import contextlib
import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

import clip_text
import diffusion
import unet
import vae
from support import weight_names
from support.files import replacing
from support.weight_files import read_tensors

NETWORKS = {"unet": unet.UNet, "vae": vae.VAE, "text_encoder": clip_text.TextEncoder}
TINY = Path(__file__).parent / "tiny" / "weights"
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.safetensors)(?<!\.ckpt)"
SD15 = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14")
WEIGHTS = {  # names in the published layout, the preferred first; a variant stands before the suffix
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "text_encoder": ("model.safetensors", "pytorch_model.bin")}
CHUNK = 2**28  # bytes, see fill
FINGERPRINT = re.compile(r".*(attn2\.to_[kv]|token_embedding)\.weight")  # what Perfusion edits, and the words


@dataclass
class Model:
    """The networks of one base model, in eval mode and without gradients.

    fingerprint: identifies the base model, whatever the precision of its files; folder: where they lie.
    """
    unet: unet.UNet
    text_encoder: clip_text.TextEncoder
    vae: vae.VAE
    tokenizer: clip_text.Tokenizer
    schedule: diffusion.Schedule
    fingerprint: str
    name: str
    folder: Path | None

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        return next(self.unet.parameters()).device

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels at which the model was trained."""
        side = self.unet.config.sample_size
        height, width = side if isinstance(side, tuple) else (side, side)
        return height * self.vae.factor, width * self.vae.factor

    @property
    def size_step(self) -> int:
        """The sides of a picture must be multiples of this many pixels (64 for SD v1)."""
        return self.vae.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def small(self) -> bool:
        """Whether it is of the embedded model's kind, told by the width of its text encodings."""
        return self.text_encoder.config.width < 768

    @property
    def guidance(self) -> float:
        """The guidance weight that suits the model: SD v1's customary 7.5; 4 for the small one."""
        return 4.0 if self.small else 7.5


def load(weights: str | Path = "tiny", device: str = "cpu", dtype: torch.dtype = torch.float32,
         tokenizer: str | Path | None = None, variant: str | None = None,
         prediction: str | None = None) -> Model:
    """The Model in `weights`. ValueError, in one sentence that names the file, where there is none.

    weights: "tiny"; "sd15"; a folder in the diffusers layout; a single .safetensors or .ckpt file; or the hub
    id "owner/name" of such a folder. tokenizer: a folder with vocab.json and merges.txt, or tokenizer.json,
    instead of the model's own. variant: "fp16" for the half-precision files of a folder or hub id; by default
    the full ones, or where there are none those in half precision. prediction: what the U-Net was trained to
    predict, "epsilon" or "v_prediction", instead of what the files say.
    """
    path = Path(weights)
    if path.is_file():
        parts, predicted = open_single_file(path)
        name, folder, places = path.stem, path.parent, (path.parent, "sd15")
    else:
        parts, predicted = open_folder(weights, variant)
        name, folder, places = str(weights), find(weights, "unet/config.json").parents[1], (weights,)
    networks, names = {}, {}
    for part, (config, tensors) in parts.items():
        networks[part], names[part] = connect(part, config, tensors)
    u, v, t = (networks[part].config for part in NETWORKS)
    if (u.in_channels, u.cross_attention_dim) != (v.latent_channels, t.width):
        raise ValueError(f"{weights}: its U-Net, VAE and text encoder do not belong together")
    vocabulary = tokenizer or find_vocabulary(*places)
    tokenizer = clip_text.Tokenizer.load(vocabulary, t.max_length)
    if tokenizer.vocab_size > t.vocab_size:
        raise ValueError(f"{vocabulary}: {tokenizer.vocab_size} words, the text encoder knows {t.vocab_size}")
    schedule = diffusion.Schedule.sd_v1(prediction or predicted)
    if prediction and prediction != predicted:
        warnings.warn(f"{name}: its U-Net is used with {prediction}, its files say {predicted}", stacklevel=2)
    model = Model(**networks, tokenizer=tokenizer, schedule=schedule, fingerprint="", name=name,
                  folder=folder)
    for remark in remarks(model, parts, names, variant):
        warnings.warn(f"{name}: {remark}", stacklevel=2)
    digests = [digest for part, (_, tensors) in parts.items()
               for digest in fill(networks[part], names[part], tensors, device, dtype)]
    model.fingerprint = hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:16]
    return model


def open_folder(weights: str | Path, variant: str | None) -> tuple[dict, str]:
    """A folder in the diffusers layout -> {part: (config, tensors as from mapped)}, prediction type."""
    parts = {}
    for part in NETWORKS:
        config = read_json(find(weights, f"{part}/config.json"),
                           lambda public: weight_names.read_config(part, public))
        parts[part] = config, mapped(find_weights(weights, part, variant))
    return parts, read_json(find(weights, "scheduler/scheduler_config.json"), weight_names.read_prediction)


def open_single_file(path: Path) -> tuple[dict, str]:
    """A file in CompVis' layout with all networks, perhaps with its .yaml beside it -> as open_folder."""
    tensors, yaml, predicted = mapped([path]), path.with_suffix(".yaml"), "epsilon"
    if yaml.is_file():
        text = yaml.read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^\s*parameterization:\s*[\"']?(\w+)", text, re.MULTILINE):
            predicted = {"eps": "epsilon", "v": "v_prediction"}.get(found[1], f"{found[1]} of {yaml}")
    return {part: (config, tensors) for part, config in weight_names.SD_V1.items()}, predicted


def find(weights: str | Path, *names: str) -> Path:
    """The first of these files that there is in a folder, or on the hub and then in the hub's local cache.

    weights: "tiny", "sd15", a folder or a hub id. ValueError where it has none of them.
    """
    folder = TINY if weights == "tiny" else Path(weights)
    if folder.is_dir():
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise ValueError(f"{folder / names[0]}: there is no such file")
    repo, revision = SD15 if weights == "sd15" else (str(weights), "main")
    if not re.fullmatch(HUB_ID, repo):
        raise ValueError(f"{folder}: there is no such file or folder")
    import huggingface_hub as hub  # takes half a second: only where it is needed
    from huggingface_hub.errors import RemoteEntryNotFoundError
    for name in names:
        try:
            path = hub.try_to_load_from_cache(repo, name, revision=revision)
            if path is None:  # neither there nor known to be absent
                with contextlib.suppress(RemoteEntryNotFoundError):
                    # this asks once; without a network, hf_hub_download alone would try for 23 seconds
                    hub.get_hf_file_metadata(hub.hf_hub_url(repo, name, revision=revision))
                path = hub.hf_hub_download(repo, name, revision=revision)  # notes in the cache what is absent
            if isinstance(path, str):
                return Path(path)
        except RemoteEntryNotFoundError:
            pass
        except Exception as error:  # the errors of several libraries
            raise ValueError(f"{repo}: neither a folder here, nor is {name} in the local cache or to be had "
                             f"from the hub ({type(error).__name__})") from error
    raise ValueError(f"{repo}: there is no file {names[0]} in this hub repository")


def find_weights(weights: str | Path, part: str, variant: str | None) -> list[Path]:
    """The files of a part: fp32 before fp16, .safetensors before .bin, in one piece before in shards."""
    path = find(weights, *(f"{part}/{file}" for infix in ([f".{variant}"] if variant else ["", ".fp16"])
                           for name in WEIGHTS[part]
                           for file in (f"{Path(name).stem}{infix}{Path(name).suffix}",
                                        f"{name}.index{infix}.json")))
    if path.suffix != ".json":
        return [path]
    shards = read_json(path, lambda index: sorted(set(index["weight_map"].values())))
    return [find(weights, f"{part}/{shard}") for shard in shards] or [path]


def find_vocabulary(place: str | Path, *others: str | Path) -> Path:
    """The folder of vocab.json and merges.txt, or of tokenizer.json, in the first place that has one."""
    try:
        path = find(place, "tokenizer/merges.txt", "tokenizer/tokenizer.json", "merges.txt", "tokenizer.json")
    except ValueError:
        if not others:
            raise
        return find_vocabulary(*others)
    if path.name == "merges.txt":
        find(place, "tokenizer/vocab.json", "vocab.json")
    return path.parent


def read_json(path: Path, read: Callable[[dict], object]):
    """What `read` makes of the object in a JSON file; ValueError, with the file's name, where it cannot."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
        return read(value)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is not as it should be: {error}") from error


def mapped(paths: list[Path]) -> dict[str, tuple[Path, torch.Tensor]]:
    """{key: (path, mapped tensor)} of several files, which hold at least one tensor."""
    tensors = {key: (path, tensor) for path in paths for key, tensor in read_tensors(path).items()}
    if not tensors:
        raise ValueError(f"{paths[0]}: there are no tensors in it")
    return tensors


class Uninitialised(torch.overrides.TorchFunctionMode):
    """Leaves out all of torch.nn.init: random numbers on the meta device import the compiler, for seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def connect(part: str, config, tensors: dict) -> tuple[torch.nn.Module, dict[str, str]]:
    """The network of a part, without data, and {parameter: key}; ValueError unless every tensor fits."""
    with torch.device("meta"), Uninitialised():
        network = NETWORKS[part](config)
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    candidates = [{name: naming(name) for name in shapes} for naming in weight_names.NAMINGS[part]]
    names = max(candidates, key=lambda names: sum(key in tensors for key in names.values()))
    missing = [key for key in names.values() if key not in tensors]
    if missing:
        raise ValueError(f"{next(iter(tensors.values()))[0]}: not a complete Stable Diffusion v1, its {part} "
                         f"lacks {len(missing)} of {len(names)} tensors, such as {missing[0]}")
    for name, key in names.items():
        (path, tensor), shape = tensors[key], shapes[name]
        stored, dtype = tuple(tensor.shape), tensor.dtype
        if stored not in (shape, (*shape, 1), (*shape, 1, 1)):  # 1x1 convolutions, in CompVis' VAE
            raise ValueError(f"{path}: {key} has the shape {list(stored)}, not {list(shape)}")
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(f"{path}: {key} holds {dtype}, not floating-point numbers of 16 or more bits")
    return network, names


def remarks(model: Model, parts: dict, names: dict, variant: str | None) -> Iterator[str]:
    """What one may not expect of a model, in a line each."""
    held = {(path, key) for _, tensors in parts.values() for key, (path, _) in tensors.items()}
    used = {(parts[part][1][key][0], key) for part in parts for key in names[part].values()}
    if any(key.startswith("model_ema.") for _, key in used):
        yield "its U-Net is the moving average (model_ema), the only one in the file"
    if not variant and any(".fp16." in path.name for path, _ in used):
        yield "its files are in half precision (fp16), it has no others"
    kind = *model.size, model.schedule.prediction_type
    if model.folder != TINY and kind != (512, 512, "epsilon"):
        yield "not as in Stable Diffusion v1: trained for {} x {} pixels, with {}".format(*kind)
    rest = Counter(key.split(".")[0] for _, key in sorted(held - used)).most_common()
    if rest:
        groups = [f"{start}* ({number})" for start, number in rest[:8]] + ["..."] * (len(rest) > 8)
        yield f"also in the file, not used: {', '.join(groups)}"


@torch.no_grad()
def fill(network: torch.nn.Module, names: dict[str, str], tensors: dict, device: str,
         dtype: torch.dtype) -> list[str]:
    """Copy the data of a connected network from its files; returns what makes the fingerprint.

    A file is opened anew after every CHUNK: what was read of a mapped file is counted as memory until then.
    """
    parameters, ours = dict(network.named_parameters()), {key: name for name, key in names.items()}
    state, digests, opened, room = {}, [], None, 0
    for key in [key for key in tensors if key in ours]:
        path, name = tensors[key][0], ours[key]
        if path != opened or room <= 0:
            data, opened, room = read_tensors(path), path, CHUNK
        tensor = data[key].reshape(parameters[name].shape)
        room -= tensor.nbytes
        if not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"{path}: {key} holds a NaN or an infinite number")
        if FINGERPRINT.fullmatch(name):  # rounded to float16, the fp32 and the fp16 file of a model are equal
            digests.append(name + hashlib.sha256(tensor.half().contiguous().numpy()).hexdigest())
        # as the activations lie, else the processor rearranges the weights of a convolution at every call
        order = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        state[name] = torch.empty_like(parameters[name], device=device, dtype=dtype, memory_format=order)
        state[name].copy_(tensor)
    network.load_state_dict(state, assign=True)
    network.eval().requires_grad_(False)
    return digests


def save(model: Model, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a Model in the published diffusers layout, its weights as `dtype`."""
    folder, configs = Path(folder), {}
    for part in (*NETWORKS, "scheduler", "tokenizer"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for part in NETWORKS:
        network, naming = getattr(model, part), weight_names.NAMINGS[part][0]
        tensors = {naming(name): parameter.detach().to("cpu", dtype).contiguous()
                   for name, parameter in network.named_parameters()}
        with replacing(folder / part / WEIGHTS[part][0]) as path:
            save_file(tensors, path, metadata={"format": "pt"})
        configs[f"{part}/config.json"] = weight_names.write_config(part, network.config)
    configs["scheduler/scheduler_config.json"] = weight_names.CONSTANTS["scheduler"] | {
        "_class_name": "DDIMScheduler", "prediction_type": model.schedule.prediction_type,
        "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    for name, config in configs.items():
        with replacing(folder / name) as path:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    model.tokenizer.save(folder / "tokenizer")
