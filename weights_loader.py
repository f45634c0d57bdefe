"""Public Stable Diffusion v1 weights, in every form in which people have them, for the networks written here.

    model = load("tiny")                                 # the small model that comes with this repository
    model = load("sd15", variant="fp16")                 # from the hub: 2.13 GB once, offline afterwards
    model = load("v1-5-pruned-emaonly.safetensors", device="cuda", dtype=torch.float16)

All names, types and shapes are compared with the networks before any data are read: nothing may be missing,
and nothing unexpected but what the table weight_names.IGNORED lists.
"""

import contextlib
import ctypes
import hashlib
import json
import math
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import clip_text
import diffusion
import unet
import vae
import weight_configs
from weight_files import LoadError, WeightFile, some
from weight_names import (EMA_MINIMUM, FOLDER_RENAMES, SINGLE_FILE_PREFIXES, ignored, refuse_other_families,
                          renamed, single_file_renames)

PARTS = {"unet": unet.UNet, "vae": vae.VAE, "text_encoder": clip_text.TextEncoder}
SINGLE_FILE_CONFIGS = {"unet": unet.SD_V1, "vae": vae.SD_V1, "text_encoder": clip_text.SD_V1}
TINY = Path(__file__).parent / "tiny" / "weights"
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.safetensors)(?<!\.ckpt)"
SD15 = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14")
CONFIGS = ("unet/config.json", "vae/config.json", "text_encoder/config.json",
           "scheduler/scheduler_config.json")
VOCABULARY = ("tokenizer/vocab.json", "tokenizer/merges.txt")
WEIGHTS = {  # names in the diffusers layout, the preferred one first; a variant stands before the suffix
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "text_encoder": ("model.safetensors", "pytorch_model.bin"),
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
         "num_train_timesteps": 1000}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
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
        config = self.folder and Path(self.folder) / "vae" / "config.json"
        side = 512 if self.vae.factor == 8 else 64
        if config and config.exists():
            side = json.loads(config.read_text(encoding="utf-8")).get("sample_size", side)
        return side, side

    @property
    def size_step(self) -> int:
        """The sides of a picture must be multiples of this many pixels (64 for SD v1)."""
        return self.vae.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def guidance(self) -> float:
        """The guidance weight that suits the model: SD v1's customary 7.5; 4 for the small one."""
        return 7.5 if self.vae.factor == 8 else 4.0


def load(weights="tiny", device="cpu", dtype=torch.float32, tokenizer=None, variant=None):
    """The Model in `weights`. LoadError, in one sentence, where there is none.

    weights: "tiny"; "sd15"; a folder in the diffusers layout; a single .safetensors or .ckpt file; or the hub
    id "owner/name" of such a folder. tokenizer: a folder with vocab.json and merges.txt, or tokenizer.json,
    instead of the model's own. variant: "fp16" for the half-precision files of a folder or hub id; by default
    the full ones, or in a folder without them those in half precision.

    From then on the process keeps the memory that it frees, see keep_freed_memory.
    """
    path = Path(weights)
    if weights == "tiny":
        path = TINY
    elif weights == "sd15":
        path = download(*SD15, variant)
    elif not path.exists() and re.fullmatch(HUB_ID, str(weights)):
        path = download(str(weights), "main", variant)
    if path.is_dir():
        parts, schedule, vocabulary = open_folder(path, variant)
    elif path.is_file():
        parts, schedule, vocabulary = open_single_file(WeightFile(path), tokenizer)
    else:
        raise LoadError(f"{path}: there is no such file or folder")
    tokenizer = load_tokenizer(Path(tokenizer or vocabulary), parts["text_encoder"][0].config)
    digests = [digest for part in parts.values() for digest in fill(*part, device, dtype)]
    fingerprint = hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:16]
    name, folder = (path.stem, path.parent) if path.is_file() else (str(weights), path)
    networks = {part: network for part, (network, _, _) in parts.items()}

    return Model(**networks, tokenizer=tokenizer, schedule=schedule, fingerprint=fingerprint, name=name,
                 folder=folder)


def keep_freed_memory():
    """Let this process keep what it frees from now on, if its C library is glibc.

    By default, glibc gives large blocks back to the system at once. To get them anew, page by page, takes about
    5 % of the time of a step of Stable Diffusion on a CPU. The price is a somewhat higher peak (README).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 2 ** 30)
        mallopt(M_TRIM_THRESHOLD, -1)


def open_folder(folder, variant=None):
    """A folder in the diffusers layout -> (parts, Schedule, folder of the tokenizer).

    parts: {part: (network, WeightFile, {parameter: key})}. The networks have no data yet (meta device), but
    the files are known to hold exactly what they need.
    """
    parts = {}
    for part, network in PARTS.items():
        file = WeightFile(find_weights(folder / part, WEIGHTS[part], variant))
        refuse_other_families(file)
        path = folder / part / "config.json"
        public = read_json(path)
        try:
            config = weight_configs.READ[part](public)
        except (ValueError, TypeError, AttributeError) as error:
            raise LoadError(f"{path}: {error}") from error
        parts[part] = connect(network, config, file, renamed(file, file.entries, FOLDER_RENAMES[part]))
    return parts, read_schedule(folder / "scheduler" / "scheduler_config.json"), folder / "tokenizer"


def open_single_file(file, tokenizer=None):
    """A WeightFile in CompVis' layout, with all three networks -> as open_folder.

    The vocabulary lies in `tokenizer` if that is given, or beside the file, or comes from the hub.
    """
    refuse_other_families(file, single=True)
    ema = sum(key.startswith("model_ema.") for key in file.entries) > EMA_MINIMUM
    parts, rest = {}, set(file.entries)
    for part, prefix in SINGLE_FILE_PREFIXES.items():
        keys = [key for key in file.entries if key.startswith(prefix)]
        names = renamed(file, keys, single_file_renames(part, SINGLE_FILE_CONFIGS[part]), prefix)
        rest -= set(keys)
        if part == "unet" and ema:  # the plain names then hold raw weights, for more training
            names = {name: "model_ema." + key.removeprefix("model.").replace(".", "")
                     for name, key in names.items()}
            rest -= set(names.values())
        parts[part] = connect(PARTS[part], SINGLE_FILE_CONFIGS[part], file, names)
    unexpected = sorted(key for key in rest if not ignored(key))
    if unexpected:
        raise LoadError(f"{file.path}: unexpected tensor {some(unexpected)}")
    beside = [folder for folder in (file.path.parent, file.path.parent / "tokenizer")
              if (folder / "vocab.json").exists() or (folder / "tokenizer.json").exists()]
    vocabulary = tokenizer or (beside[0] if beside else hub_files(*SD15, VOCABULARY) / "tokenizer")
    return parts, diffusion.Schedule.sd_v1(), vocabulary


class Uninitialised(torch.overrides.TorchFunctionMode):
    """Leaves out all of torch.nn.init: random numbers on the meta device import the compiler, for seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def connect(network, config, file, names):
    """(network on the meta device, file, {parameter: key}); LoadError unless names, shapes and types fit."""
    with torch.device("meta"), Uninitialised():
        network = network(config)
    expected = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    unexpected = [key for name, key in names.items() if name not in expected]
    missing = [name for name in expected if names.get(name) not in file.entries]
    if unexpected or missing:
        raise LoadError(f"{file.path}: " + (f"unexpected tensor {some(unexpected)}" if unexpected
                                            else f"no tensor for {some(missing)}"))
    for name, shape in expected.items():
        dtype, stored, _ = file.entries[names[name]]
        linear = len(shape) == 2 and stored[2:] in ((1,), (1, 1))  # CompVis' VAE has 1x1 convolutions there
        if shape != (stored[:2] if linear else stored):
            raise LoadError(f"{file.path}: {names[name]} has the shape {list(stored)}, not {list(shape)}")
        if not dtype.is_floating_point:
            raise LoadError(f"{file.path}: {names[name]} holds {dtype}, not floating-point numbers")
    return network, file, names


def fill(network, file, names, device, dtype):
    """Read the data of a connected network, one tensor at a time; returns what makes the fingerprint."""
    state, digests = {}, []
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    for name, key in sorted(names.items(), key=lambda item: file.entries[item[1]].offset):
        tensor = file.read(key).reshape(shapes[name])
        if not all(math.isfinite(extreme) for extreme in tensor.aminmax()):
            raise LoadError(f"{file.path}: {key} holds a NaN or an infinite number")
        if FINGERPRINT.fullmatch(name):  # rounded to float16, the fp32 and the fp16 file of a model are equal
            digests.append(name + hashlib.sha256(tensor.half().numpy()).hexdigest())
        # As the activations lie, else the processor rearranges the weights of a convolution at every call; and
        # one by one: the whole network at the end would hold them twice.
        order = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
        state[name] = tensor.to(device, dtype).to(memory_format=order)
    network.load_state_dict(state, assign=True)
    network.eval().requires_grad_(False)
    return digests


def find_weights(folder, names, variant):
    """The weights in the folder of a part: .bin only where there is no .safetensors."""
    variants = [f".{variant}"] if variant else ["", ".fp16"]
    paths = [folder / (Path(name).stem + middle + Path(name).suffix) for name in names for middle in variants]
    found = next((path for path in paths if path.is_file()), None)
    if not found:
        raise LoadError(f"{paths[0]}: there is no such file")
    return found


def read_json(path):
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoadError(f"{path}: there is no such file") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise LoadError(f"{path}: not a JSON object")
    return value


def read_schedule(path):
    """The Schedule of a scheduler_config.json, whose betas must be SD v1's."""
    config = read_json(path)
    for key, value in (BETAS | {"trained_betas": None, "rescale_betas_zero_snr": False}).items():
        if config.get(key, value) != value:
            raise LoadError(f"{path}: {key} is {config[key]!r}, Stable Diffusion v1 has {value!r}")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise LoadError(f"{path}: the prediction type {prediction!r} is neither 'epsilon' nor 'v_prediction'")
    return diffusion.Schedule.sd_v1(prediction)


def load_tokenizer(folder, config):
    """The Tokenizer in a folder, whose ids the text encoder with this config must know."""
    try:
        tokenizer = clip_text.Tokenizer.load(folder, config.max_length)
    except ValueError as error:
        raise LoadError(f"{error}" if str(folder) in str(error) else f"{folder}: {error}") from error
    if tokenizer.vocab_size > config.vocab_size:
        raise LoadError(f"{folder}: {tokenizer.vocab_size} words, the text encoder knows {config.vocab_size}")
    return tokenizer


def download(repo, revision, variant=None):
    """The folder of a hub repository with exactly the files load() needs (SD v1: 4.27 GB, fp16 2.13 GB)."""
    suffix = f".{variant}.safetensors" if variant else ".safetensors"
    weights = [f"{part}/{Path(names[0]).stem}{suffix}" for part, names in WEIGHTS.items()]
    return hub_files(repo, revision, (*CONFIGS, *VOCABULARY, *weights))


def hub_files(repo, revision, names):
    """The local folder with these files of a hub repository, fetched unless they are in the hub's cache."""
    import huggingface_hub as hub  # takes half a second: only where it is needed
    from huggingface_hub import errors
    for name in names:
        try:
            path = hub.try_to_load_from_cache(repo, name, revision=revision)
            if not isinstance(path, str):
                # this asks once; without a network, hf_hub_download alone would try for 23 seconds
                hub.get_hf_file_metadata(hub.hf_hub_url(repo, name, revision=revision))
                path = hub.hf_hub_download(repo, name, revision=revision)
        except errors.RemoteEntryNotFoundError as error:
            raise LoadError(f"{repo}: there is no file {name} in this hub repository") from error
        except errors.RepositoryNotFoundError as error:
            raise LoadError(f"{repo}: neither a folder here nor a public repository on the hub") from error
        except Exception as error:  # the errors of several libraries
            raise LoadError(f"{repo}: {name} is not in the local cache and could not be fetched from the hub "
                            f"({type(error).__name__})") from error
    return Path(path).parents[1]


def save(model, folder, dtype=torch.float32):
    """Write a Model in the published diffusers layout, its weights as `dtype`; each file atomically."""
    from safetensors.torch import save_file
    folder = Path(folder)
    for part in (*PARTS, "scheduler", "tokenizer"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        network = getattr(model, part)
        prefix = "text_model." if part == "text_encoder" else ""
        tensors = {prefix + name: parameter.detach().to("cpu", dtype).contiguous()
                   for name, parameter in network.named_parameters()}
        with replacing(folder / part / WEIGHTS[part][0]) as path:
            save_file(tensors, path, metadata={"format": "pt"})
        write_json(folder / part / "config.json", weight_configs.WRITE[part](network.config))
    write_json(folder / "scheduler" / "scheduler_config.json", BETAS | {
        "_class_name": "DDIMScheduler", "prediction_type": model.schedule.prediction_type,
        "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1})
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        model.tokenizer.save(temporary)
        for path in Path(temporary).iterdir():
            os.replace(path, folder / "tokenizer" / path.name)


@contextlib.contextmanager
def replacing(path):
    """A temporary path that takes the place of `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write a JSON file, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
