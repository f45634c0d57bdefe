"""Files of tensors, of whatever tool: read without running any code in them."""

import os
import re
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

HEADER_LIMIT = 4_000_000  # bytes; of Stable Diffusion's own safetensors file: 156,444
HARMLESS = (  # what public .ckpt files name besides tensors; Inert objects stand in for them
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar", "numpy.dtype", "numpy.dtypes.Float64DType", "_codecs.encode")

KINDS = {  # a pattern among the names in a file -> what the file is; the first that is found
    r'"__metadata__":\s*{"concept":': "a concept file",
    r"lora[._](down|up|A|B|unet|te)\b|lora_unet_": "a LoRA, for other tools",
    r"identity.*optimizer": "a checkpoint of train.py, for its --resume",
    r"model\.diffusion_model\.|cond_stage_model\.": "a whole base model, for --weights",
    r"down_blocks\.|text_model\.": "a network of a base model, whose folder is for --weights",
    r'"C":\s*{"dtype"': "the covariance of a base model",
    r"emb_params|string_to_param|<[\w-]+>": "an embedding file, for --init-embedding of train.py"}
LONGEST = 4_000_000         # bytes of names, from which `what_is` tells a file


class Inert:
    """Stands for an object that is not a tensor: takes whatever it is given and does nothing."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


def read_tensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """{name: tensor} of a .safetensors file, or of one of torch.save (under `state_dict`, if there is one).

    The tensors are mapped into memory: only what is used is read. What is no tensor is left out; a pickle
    that asks to run code is refused. ValueError, naming the file, when it cannot be read.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            with open(path, "rb") as file:
                if int.from_bytes(file.read(8), "little") > HEADER_LIMIT:
                    raise ValueError(f"its header would have more than {HEADER_LIMIT} bytes")
            return load_file(path)
        if any(item.compress_type != zipfile.ZIP_STORED for item in zipfile.ZipFile(path).infolist()):
            raise ValueError("it is a compressed archive")
        with torch.serialization.safe_globals([(Inert, name) for name in HARMLESS]):
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if foreign:
                raise ValueError(f"it asks to run {', '.join(sorted(foreign))}")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {str(name): tensor.detach() for name, tensor in content.get("state_dict", content).items()
                if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_meta}
    except Exception as error:  # a damaged file can fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{path} cannot be read as a file of weights: {reason}") from error


def what_is(path: str | os.PathLike) -> str:
    """What a file is, in words, by the names at its start: "a LoRA, for other tools". Never an error."""
    try:
        with open(path, "rb") as file:
            start = file.read(LONGEST)
    except OSError:
        start = b""
    # Of safetensors the header, after its length; of torch.save a pickle, alone or first in an archive.
    names = b"" if start[8:9] != b"{" else start[8:8 + int.from_bytes(start[:8], "little")]
    if start.startswith((b"\x80", b"PK")):
        names = start.removeprefix(b"PK").partition(b"PK")[0]
    text = names.decode("latin-1")
    found = [kind for pattern, kind in KINDS.items() if re.search(pattern, text, re.DOTALL)]
    return (found or ["a file of another kind"])[0]
