"""Files: written whole or not at all; read as people and tools make them, without running any code in them.

    with replacing("out/teddy.safetensors") as path:
        save_file(tensors, path)
    tensors = read_tensors("v1-5-pruned.ckpt")
"""

import contextlib
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

MAX_TEXT = 100 * 10 ** 6    # bytes of a text file; 100,000 long captions are a tenth of it
MAX_NAMES = 4_000_000       # bytes, from whose names `what_is` tells a file
HARMLESS = (  # what public .ckpt files name besides tensors; Inert objects stand in for them
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar", "numpy.dtype", "numpy.dtypes.Float64DType", "_codecs.encode")
FORMS = {  # how a file begins -> what it is; torch.save writes a zip since version 1.6, before it a pickle
    rb".{8}\{": "safetensors", b"PK": "zip", b"\x80": "pickle", b"$": "empty",
    rb"\s*version https://git-lfs": "a pointer of git-lfs (`git lfs pull` fetches the file itself)",
    rb"\s*<": "a web page (take the link that downloads the file)",
    b"": "a file of another kind"}
OF_TENSORS = ("safetensors", "zip", "pickle")
KINDS = {  # a pattern among the names in a file -> what the file is; the first that is found
    r'"__metadata__":\s*{"concept":': "a concept file",
    r"lora[._](down|up|A|B|unet|te)\b|lora_unet_": "a LoRA, for other tools",
    r"identity.*optimizer": "a checkpoint of train.py, for its --resume",
    r"model\.diffusion_model\.|cond_stage_model\.": "a whole base model, for --weights",
    r"down_blocks\.|text_model\.": "a network of a base model, whose folder is for --weights",
    r'"C":\s*{"dtype"': "the covariance of a base model",
    r"emb_params|string_to_param|<[\w-]+>": "an embedding file, for other tools",
    "": "a file of another kind"}


# ---------------------------------------------------------------------------------------------------- writing

@contextlib.contextmanager
def replacing(path: str | os.PathLike):
    """Yield a temporary path in the folder of `path`; what was written there takes that name at the end.

    The number of the process is part of the temporary name, so that two runs do not meet. After an error the
    temporary file is gone and what `path` held before is untouched. OSError, naming the file, when it cannot
    be written: a full disk, a folder that is missing or read-only.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)       # safetensors leaves files that only their owner can read
        os.replace(partial, path)
    except (OSError, SafetensorError, RuntimeError) as error:   # torch.save's full disk is a RuntimeError
        reason = getattr(error, "strerror", None) or f"{error} (is the disk full?)"
        raise OSError(f"{path} cannot be written: {reason}") from error
    finally:
        partial.unlink(missing_ok=True)


def write(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file of bytes, or of a text as UTF-8, see `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | os.PathLike, value: dict) -> None:
    """Write an object as a JSON file, see `replacing`."""
    write(path, json.dumps(value, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------ texts

def read_text(path: str | os.PathLike, errors: str = "strict") -> str:
    """A text as editors save it: UTF-8, perhaps with a mark in front, or UTF-16. ValueError, OSError.

    errors: as of bytes.decode.
    """
    if Path(path).stat().st_size > MAX_TEXT:
        raise ValueError(f"{path} is larger than {MAX_TEXT // 10 ** 6} MB, the most of a text")
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", errors)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text in UTF-8: save it as UTF-8") from None


def read_lines(path: str | os.PathLike) -> list[str]:
    """The lines of a text that hold more than blanks, stripped; ValueError if there are none. OSError."""
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty: it needs one or more lines")
    return lines


def read_json(path: str | os.PathLike, make: Callable[[dict], object]):
    """What `make` makes of the content of a JSON file; ValueError, with the file's name, where it cannot."""
    try:
        return make(json.loads(read_text(path)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}): it is {kind(path)}") from error
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is not as it should be: {error}") from error


# ---------------------------------------------------------------------------------------------------- tensors

def kind(path: str | os.PathLike) -> str:
    """What a file is by its first bytes, whatever its name: the first of the FORMS that fits. OSError."""
    with open(path, "rb") as file:
        start = file.read(64)
    return next(form for mark, form in FORMS.items() if re.match(mark, start, re.DOTALL))


def what_is(path: str | os.PathLike) -> str:
    """What a file is, in words, by the names at its start: "a LoRA, for other tools". OSError."""
    form = kind(path)
    if form not in OF_TENSORS:
        return form
    with open(path, "rb") as file:
        start = file.read(MAX_NAMES)
    if form == "safetensors":       # names are in the header, after its length
        names = start[8:8 + int.from_bytes(start[:8], "little")]
    else:                           # in a pickle, alone or first in an archive
        names = start.removeprefix(b"PK").partition(b"PK")[0]
    text = names.decode("latin-1")
    return next(what for pattern, what in KINDS.items() if re.search(pattern, text, re.DOTALL))


class Inert:
    """Stands for an object that is not a tensor: takes whatever it is given and does nothing."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


def read_tensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """{name: tensor} of a file of weights, or of its `state_dict`; no code in it is run.

    What else it holds is left out: Inert objects stand in for what is HARMLESS, and a file that asks to run
    code is refused. Tensors are mapped into memory, so only what is used is read, except those of a "pickle".
    ValueError, naming the file, when it cannot be read.
    """
    try:
        form = kind(path)
        if form == "safetensors":
            return load_file(path)
        if form not in OF_TENSORS:
            raise ValueError(f"it is {form}")
        if form == "zip" and any(item.compress_type for item in zipfile.ZipFile(path).infolist()):
            raise ValueError("it is a compressed archive")
        mapped = form == "zip" and Path(path).suffix != ".safetensors"  # torch.load would believe the suffix
        inert = [(Inert, name) for name in HARMLESS]
        with open(path, "rb") as file, torch.serialization.safe_globals(inert):
            content = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
        return {str(name): tensor.detach() for name, tensor in content.get("state_dict", content).items()
                if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_meta}
    except Exception as error:  # a damaged file can fail in any way
        text = str(error).rpartition("WeightsUnpickler error: ")[2]  # torch's advice before it is dangerous
        foreign = re.search(r"GLOBAL (\S+)", text)
        reason = f"it asks to run {foreign[1]}" if foreign else text.partition("\n")[0][:200]
        reason = reason or type(error).__name__
        raise ValueError(f"{path} cannot be read as a file of weights: {reason}") from error
