"""The project's one way to write a file: whole, or not at all; pictures by number; and to read text and tensors.

    with replacing("out/teddy.safetensors") as path:
        save_file(tensors, path)
    tensors = read_tensors("pytorch_model.bin")
"""

import itertools
import os
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

HEADER_LIMIT = 4_000_000  # bytes; of Stable Diffusion's own safetensors file: 156,444
HARMLESS = (  # what public .ckpt files name besides tensors; Inert objects stand in for them
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar", "numpy.dtype", "numpy.dtypes.Float64DType", "_codecs.encode")
MAX_TEXT = 100 * 10 ** 6    # bytes of a text file; 100,000 long captions are a tenth of it


@contextmanager
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
        raise OSError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def add_picture(folder: str | os.PathLike, content: bytes) -> Path:
    """Write a PNG under the next free number of a folder, 0000.png and on; return its path. OSError.

    Of several programs at once only one holds the claim on a number, so that no picture takes another's
    place. A claim that a killed program left behind costs its number and nothing else.
    """
    folder = Path(folder)
    taken = [int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal()]
    for number in itertools.count(max(taken, default=-1) + 1):
        path, claim = folder / f"{number:04d}.png", folder / f".{number:04d}.claim"
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            continue
        try:
            if not path.exists():
                with replacing(path) as partial:
                    partial.write_bytes(content)
                return path
        finally:
            claim.unlink()


def read_lines(path: str | os.PathLike) -> list[str]:
    """The lines of a text file that hold more than blanks, stripped. ValueError, OSError.

    utf-8-sig, as Windows' Notepad puts a mark in front of UTF-8, which would become a word.
    """
    path = Path(path)
    if path.stat().st_size > MAX_TEXT:
        raise ValueError(f"{path} is larger than {MAX_TEXT // 10 ** 6} MB: give fewer lines")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text in UTF-8: save it as UTF-8") from None
    return [line.strip() for line in lines if line.strip()]


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
