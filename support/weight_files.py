"""Files of tensors and their configs, of whatever tool and name: read without running any code in them."""

import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

HARMLESS = (  # what public .ckpt files name besides tensors; Inert objects stand in for them
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar", "numpy.dtype", "numpy.dtypes.Float64DType", "_codecs.encode")
FORMS = {b"PK": "zip", b"\x80": "pickle"}  # how files of torch.save begin, since version 1.6 and before
STRANGERS = {  # how a file begins that stands in another's place -> what it is, and what to do
    b"version https://git-lfs": "a pointer of git-lfs (`git lfs pull` fetches the file itself)",
    b"<": "a web page (take the link that downloads the file)"}
KINDS = {  # a pattern among the names in a file -> what the file is; the first that is found
    r'"__metadata__":\s*{"concept":': "a concept file",
    r"lora[._](down|up|A|B|unet|te)\b|lora_unet_": "a LoRA, for other tools",
    r"identity.*optimizer": "a checkpoint of train.py, for its --resume",
    r"model\.diffusion_model\.|cond_stage_model\.": "a whole base model, for --weights",
    r"down_blocks\.|text_model\.": "a network of a base model, whose folder is for --weights",
    r'"C":\s*{"dtype"': "the covariance of a base model",
    r"emb_params|string_to_param|<[\w-]+>": "an embedding file, for other tools"}
LONGEST = 4_000_000         # bytes of names, from which `what_is` tells a file


class Inert:
    """Stands for an object that is not a tensor: takes whatever it is given and does nothing."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


def kind(path: str | os.PathLike) -> str:
    """What a file is by its first bytes, whatever its name.

    "safetensors", one of the FORMS, or in words why it is no file of tensors, perhaps one of STRANGERS.
    """
    with open(path, "rb") as file:
        start = file.read(64)
    if start[8:9] == b"{":  # after the length of the header
        return "safetensors"
    found = [what for mark, what in (FORMS | STRANGERS).items() if start.lstrip().startswith(mark)]
    return (found or ["neither of safetensors nor of torch.save" if start else "empty"])[0]


def read(path: str | os.PathLike) -> object:
    """What is in a file of tensors, whatever tool wrote it; no code in it is run.

    {name: tensor} of a safetensors file, what was given to torch.save of another, with Inert objects in the
    place of what is HARMLESS. Tensors are mapped into memory, so only what is used is read, except those of a
    "pickle". A file that asks to run code is refused. ValueError, naming the file, when it cannot be read.
    """
    try:
        form = kind(path)
        if form == "safetensors":
            return load_file(path)
        if form not in FORMS.values():
            raise ValueError(f"it is {form}")
        if form == "zip" and any(item.compress_type for item in zipfile.ZipFile(path).infolist()):
            raise ValueError("it is a compressed archive")
        mapped = form == "zip" and Path(path).suffix != ".safetensors"  # torch.load would believe the suffix
        inert = [(Inert, name) for name in HARMLESS]
        with open(path, "rb") as file, torch.serialization.safe_globals([torch.nn.ParameterDict, *inert]):
            return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file can fail in any way
        text = str(error).rpartition("WeightsUnpickler error: ")[2]  # torch's advice before it is dangerous
        foreign = re.search(r"GLOBAL (\S+)", text)
        reason = f"it asks to run {foreign[1]}" if foreign else text.partition("\n")[0][:200]
        reason = reason or type(error).__name__
        raise ValueError(f"{path} cannot be read as a file of weights: {reason}") from error


def read_tensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """{name: tensor} of a file as `read` reads it, or of its `state_dict`. What is no tensor is left out."""
    content = read(path)
    content = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be read as a file of weights: its content has no names")
    return {str(name): tensor.detach() for name, tensor in content.items()
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_meta}


def read_text(path: str | os.PathLike, errors: str = "strict") -> str:
    """A text as editors save it: UTF-8, perhaps with a mark in front, or UTF-16. ValueError, OSError."""
    data = Path(path).read_bytes()
    return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", errors)


def read_json(path: str | os.PathLike, make: Callable[[dict], object]):
    """What `make` makes of the object in a JSON file; ValueError, with the file's name, where it cannot."""
    try:
        if (form := kind(path)) in STRANGERS.values():
            raise ValueError(f"it is {form}")
        value = json.loads(read_text(path))
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
        return make(value)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is not as it should be: {error}") from error


def what_is(path: str | os.PathLike) -> str:
    """What a file is, in words, by the names at its start: "a LoRA, for other tools". Never an error."""
    try:
        form = kind(path)
        with open(path, "rb") as file:
            start = file.read(LONGEST)
    except OSError:
        form, start = "", b""
    # Of safetensors the header, after its length; of torch.save a pickle, alone or first in an archive.
    names = b"" if start[8:9] != b"{" else start[8:8 + int.from_bytes(start[:8], "little")]
    if start.startswith(tuple(FORMS)):
        names = start.removeprefix(b"PK").partition(b"PK")[0]
    for pattern, what in KINDS.items():
        if re.search(pattern, names.decode("latin-1"), re.DOTALL):
            return what
    return form if form in STRANGERS.values() else "a file of another kind"
