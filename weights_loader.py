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
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

import clip_text
import diffusion
import unet
import vae
from support import weight_names
from support.files import kind, read_json, read_tensors, read_text, replacing, what_is, write_json

NETWORKS = {"unet": unet.UNet, "vae": vae.VAE, "text_encoder": clip_text.TextEncoder}
TINY = Path(__file__).parent / "tiny" / "weights"
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
SINGLE = (".safetensors", ".ckpt")
GUESSES = {  # what people write -> what they may mean
    rf".*(?:huggingface\.co|hf\.co)/({HUB_ID})(?:/tree/.*)?/?": r"\1",
    r"\w+://.*": "the path of the file, once it is downloaded",
    r"(runwayml/)?(sd|stable[-_ ]?diffusion)[-_ ]?v?1[-_. ]?5": "sd15", "tiny": "tiny"}
SD15 = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14")
WEIGHTS = {  # names in the published layout, the preferred first; a variant stands before the suffix
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "text_encoder": ("model.safetensors", "pytorch_model.bin")}
VOCABULARY = {"vocabulary": ["tokenizer/merges.txt tokenizer/vocab.json", "tokenizer/tokenizer.json",
                             "merges.txt vocab.json", "tokenizer.json"]}
SHARD = re.compile(r"-\d{5}-of-(\d{5})(?=\.)")  # in the name of a part of a file
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

    @property
    def training_steps(self) -> int:
        """The steps of a training that suit the model: the paper's 400; for the small one 160, which take it
        under a minute, and after which little changes (RESULTS.md)."""
        return 160 if self.small else 400


def load(weights: str | Path = "tiny", device: str = "cpu", dtype: torch.dtype = torch.float32,
         tokenizer: str | Path | None = None, variant: str | None = None,
         prediction: str | None = None) -> Model:
    """The Model in `weights`. ValueError, in one sentence that names the file, where there is none.

    weights: "tiny"; "sd15"; a folder in the diffusers layout; a single .safetensors or .ckpt file; or the hub
    id "owner/name" of such a folder. tokenizer: a folder with vocab.json and merges.txt, or tokenizer.json,
    instead of the model's own. variant: "fp16" for the half-precision files of a folder or hub id, or where
    there are none the full ones; by default the full ones, or where there are none those in half precision,
    which is said. prediction: what the U-Net was trained to predict, "epsilon" or "v_prediction", instead of
    what the files say.
    """
    path = Path(weights)
    try:
        opened = open_single_file(path) if path.is_file() else open_folder(weights, variant, tokenizer)
    except ValueError as error:
        guess = meant(str(weights))
        raise ValueError(f"{error}; did you mean {guess}?" if guess else error) from error
    parts, predicted, folder = opened
    networks = {part: network for part, (network, _, _) in parts.items()}
    u, v, t = (network.config for network in networks.values())
    if (u.in_channels, u.cross_attention_dim) != (v.latent_channels, t.width):
        raise ValueError(f"{weights}: its U-Net, VAE and text encoder do not belong together")
    vocabulary = tokenizer or find_vocabulary(folder, "sd15")
    tokenizer = clip_text.Tokenizer.load(vocabulary, t.max_length)
    if (words := len(tokenizer.vocabulary)) > t.vocab_size:
        raise ValueError(f"{vocabulary}: {words} words, the text encoder knows {t.vocab_size}")
    model = Model(**networks, tokenizer=tokenizer, schedule=diffusion.Schedule.sd_v1(prediction or predicted),
                  fingerprint="", name=path.stem if path.is_file() else str(weights), folder=folder)
    for remark in remarks(model, parts, variant, predicted):
        warnings.warn(f"{model.name}: {remark}", stacklevel=2)
    digests = [digest for part in parts.values() for digest in fill(*part, device, dtype)]
    model.fingerprint = hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:16]
    return model


def open_folder(weights: str | Path, variant: str | None, tokenizer: str | Path | None) -> tuple:
    """A folder in the diffusers layout, or such a repository of the hub, before any data are read.

    Returns {part: as from connect}, prediction type, folder.
    """
    files = locate(weights, needs(variant) | ({} if tokenizer else VOCABULARY))
    parts = {}
    for part in NETWORKS:
        config = read_json(*files[f"{part}/config"], lambda public: weight_names.read_config(part, public))
        parts[part] = connect(part, config, mapped(files[part]))
    scheduler, = files["scheduler"]
    return parts, read_json(scheduler, weight_names.read_prediction), scheduler.parents[1]


def open_single_file(path: Path) -> tuple:
    """A file in CompVis' layout with all networks, perhaps with its .yaml beside it -> as open_folder."""
    tensors, yaml, predicted = mapped([path]), path.with_suffix(".yaml"), "epsilon"
    if yaml.is_file():
        text = read_text(yaml, "replace")
        if found := re.search(r"^\s*parameterization:\s*[\"']?(\w+)", text, re.MULTILINE):
            predicted = {"eps": "epsilon", "v": "v_prediction"}.get(found[1], f"{found[1]} of {yaml}")
    parts = {part: connect(part, config, tensors) for part, config in weight_names.SD_V1.items()}
    return parts, predicted, path.parent


def find_vocabulary(*models: str | Path) -> Path:
    """The folder of the vocabulary of the first of these models that has one, see `locate`. ValueError."""
    for weights in models:
        with contextlib.suppress(ValueError):
            return locate(weights, VOCABULARY)["vocabulary"][0].parent
    raise ValueError(f"no vocabulary (merges.txt, vocab.json) is in {' or '.join(map(str, models))}, nor to "
                     "be had from the hub: for --weights, --tokenizer names the folder of one")


def needs(variant: str | None) -> dict[str, list[str]]:
    """What there must be of a model: {what: alternatives, the preferred first}, each the names of its files.

    fp32 comes before fp16, or where fp16 is asked for after it; .safetensors before .bin.
    """
    need, infixes = {}, {None: ["", ".fp16"], "fp16": [".fp16", ""]}.get(variant, [f".{variant}"])
    for part, names in WEIGHTS.items():
        need[f"{part}/config"] = [f"{part}/config.json"]
        need[part] = [f"{part}/{name.replace('.', infix + '.')}" for infix in infixes for name in names]
    return need | {"scheduler": ["scheduler/scheduler_config.json"]}


def pieces(name: str, listed: set[str]) -> list[str]:
    """The files that hold what one of this name would: itself, or all of its shards, or none."""
    if name in listed:
        return [name]
    shards = sorted(other for other in listed if SHARD.sub("", other) == name)
    return shards if shards and len(shards) == int(SHARD.search(shards[0])[1]) else []


def choose(place: str | Path, listed: set[str], need: dict) -> dict[str, list[str]]:
    """{what: files of the first alternative of which all is listed}; ValueError where there is none."""
    chosen = {}
    for what, alternatives in need.items():
        found = [[pieces(name, listed) for name in names.split()] for names in alternatives]
        complete = [files for files in found if all(files)]
        if not complete:
            raise ValueError(f"{place}/{alternatives[0].split()[0]}: there is no such file")
        chosen[what] = sum(complete[0], [])
    return chosen


def in_folder(folder: Path, need: dict) -> dict[str, list[Path]]:
    """{what: its files} in a folder; ValueError where something is missing."""
    listed = {path.relative_to(folder).as_posix() for depth in ("*", "*/*") for path in folder.glob(depth)
              if path.is_file()}
    return {what: [folder / name for name in names] for what, names in choose(folder, listed, need).items()}


def locate(weights: str | Path, need: dict) -> dict[str, list[Path]]:
    """{what: its files}, see `needs`; ValueError where something is missing.

    weights: "tiny", "sd15", a folder, or a hub id: what the local cache lacks is fetched, and where that
    fails, another commit in the cache serves. fp16 is not taken for fp32 before the hub has been asked.
    """
    folder = TINY if weights == "tiny" else Path(weights)
    if folder.is_dir():
        return in_folder(folder, need)
    repo, revision = SD15 if weights == "sd15" else (str(weights), "main")
    if not re.fullmatch(HUB_ID, repo) or repo.lower().endswith(SINGLE):
        raise ValueError(f"{weights}: there is no such file or folder")
    import huggingface_hub.constants  # the most of it takes half a second, and is imported where it is used
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}")
    ref = cache / "refs" / revision
    wanted = cache / "snapshots" / (ref.read_text() if ref.is_file() else revision)
    as_asked = {what: [names for names in alternatives if ".fp16" in alternatives[0] or ".fp16" not in names]
                for what, alternatives in need.items()}
    try:
        return in_folder(wanted, as_asked)
    except ValueError as error:
        missing = error
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=10)
        files = choose(repo, {file.rfilename for file in info.siblings}, need)
        return {what: [Path(huggingface_hub.hf_hub_download(repo, name, revision=revision)) for name in names]
                for what, names in files.items()}
    except ValueError:
        raise
    except Exception as error:  # the errors of several libraries
        for folder in [wanted, *cache.glob("snapshots/*")]:
            with contextlib.suppress(ValueError):
                files = in_folder(folder, need)
                if folder != wanted:
                    warnings.warn(f"{repo}: out of reach, taken from the local cache, commit {folder.name}")
                return files
        raise ValueError(f"{repo} is no folder here, not to be had from the hub ({type(error).__name__}); "
                         f"in its cache, {missing}") from error


def meant(weights: str) -> str | Path | None:
    """What someone may have meant by the name of something that cannot be loaded."""
    for pattern, guess in GUESSES.items():
        found = re.fullmatch(pattern, weights, re.IGNORECASE)
        if found and weights != guess:
            return found.expand(guess)
    inside, above = sorted(Path(weights).glob("*")), Path(weights).absolute().parents[:2]
    folders = [path for path in (*inside, *above) if (path / "unet/config.json").is_file()]
    files = [path for path in inside if path.suffix.lower() in SINGLE and path.is_file()
             and "whole base" in what_is(path)]
    return next(iter(folders + files), None)


def mapped(paths: list[Path]) -> dict[str, tuple[Path, torch.Tensor]]:
    """{key: (path, tensor without data)} of several files, which hold at least one tensor."""
    tensors = {key: (path, tensor.to("meta")) for path in paths for key, tensor in read_tensors(path).items()}
    if not tensors:
        raise ValueError(f"{paths[0]}: there are no tensors in it")
    return tensors


def connect(part: str, config, tensors: dict) -> tuple[torch.nn.Module, dict[str, str], dict]:
    """The network of a part, without data, {parameter: key}, tensors; ValueError unless every tensor fits."""
    # random numbers on the meta device would import the compiler, for a second
    with torch.device("meta"), mock.patch("torch.nn.init.normal_"):
        network = NETWORKS[part](config)
    candidates = [{name: naming(name) for name, _ in network.named_parameters()}
                  for naming in weight_names.NAMINGS[part]]
    names = max(candidates, key=lambda names: sum(key in tensors for key in names.values()))
    missing = [key for key in names.values() if key not in tensors]
    if missing:
        raise ValueError(f"{next(iter(tensors.values()))[0]}: not a complete Stable Diffusion v1, its {part} "
                         f"lacks {len(missing)} of {len(names)} tensors, such as {missing[0]}")
    for name, parameter in network.named_parameters():
        path, tensor = tensors[key := names[name]]
        shape, stored, dtype = list(parameter.shape), list(tensor.shape), tensor.dtype
        if stored not in (shape, [*shape, 1], [*shape, 1, 1]):  # 1x1 convolutions, in CompVis' VAE
            raise ValueError(f"{path}: {key} has the shape {stored}, not {shape}")
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(f"{path}: {key} holds {dtype}, not floating-point numbers of 16 or more bits")
    return network, names, tensors


def remarks(model: Model, parts: dict, variant: str | None, predicted: str) -> Iterator[str]:
    """What one may not expect of a model, in a line each."""
    held = {(path, key) for _, _, tensors in parts.values() for key, (path, _) in tensors.items()}
    used = {(tensors[key][0], key) for _, names, tensors in parts.values() for key in names.values()}
    kind = *model.size, model.schedule.prediction_type
    if kind[2] != predicted:
        yield f"its U-Net is used with {kind[2]}, its files say {predicted}"
    if any(key.startswith("model_ema.") for _, key in used):
        yield "its U-Net is the moving average (model_ema), the only one in the file"
    if not variant and any(".fp16." in path.name for path, _ in used):
        yield "its files are in half precision (fp16), there are no others"
    if model.folder != TINY and kind != (512, 512, "epsilon"):
        yield "not as in Stable Diffusion v1: trained for {} x {} pixels, with {}".format(*kind)
    rest = Counter(key.split(".")[0] for _, key in sorted(held - used))
    if rest:
        groups = ", ".join(f"{start}* ({number})" for start, number in rest.most_common(8))
        yield f"{rest.total()} other tensors are in the file, not used: {groups}"


@torch.no_grad()
def fill(network: torch.nn.Module, names: dict[str, str], tensors: dict, device: str,
         dtype: torch.dtype) -> list[str]:
    """Copy the data of a connected network from its files; returns what makes the fingerprint.

    A mapped file is opened anew after every CHUNK: what was read of it is counted as memory until then.
    """
    # as the activations lie, else the processor rearranges the weights of a convolution at every call
    network.to(dtype=dtype, memory_format=torch.channels_last).to_empty(device=device)
    network.eval().requires_grad_(False)
    parameters, digests, opened, room = dict(network.named_parameters()), [], None, 0
    for name, key in sorted(names.items(), key=lambda item: tensors[item[1]][0]):  # file by file
        path = tensors[key][0]
        if path != opened or room <= 0:
            data, opened, room = read_tensors(path), path, float("inf") if kind(path) == "pickle" else CHUNK
        tensor = data[key].reshape(parameters[name].shape)
        room -= tensor.nbytes
        if not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"{path}: {key} holds a NaN or an infinite number")
        if FINGERPRINT.fullmatch(name):  # rounded to float16, the fp32 and the fp16 file of a model are equal
            digests.append(name + hashlib.sha256(tensor.half().contiguous().numpy()).hexdigest())
        parameters[name].copy_(tensor)
    return digests


def save(model: Model, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a Model in the published diffusers layout, its weights as `dtype`."""
    folder = Path(folder)
    for part in (*NETWORKS, "scheduler", "tokenizer"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for part in NETWORKS:
        network, naming = getattr(model, part), weight_names.NAMINGS[part][0]
        tensors = {naming(name): parameter.detach().to("cpu", dtype).contiguous()
                   for name, parameter in network.named_parameters()}
        with replacing(folder / part / WEIGHTS[part][0]) as path:
            save_file(tensors, path, metadata={"format": "pt"})
        write_json(folder / part / "config.json", weight_names.write_config(part, network.config))
    write_json(folder / "scheduler" / "scheduler_config.json", weight_names.CONSTANTS["scheduler"] | {
        "_class_name": "DDIMScheduler", "prediction_type": model.schedule.prediction_type,
        "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1})
    model.tokenizer.save(folder / "tokenizer")
