"""Files of weights, read without ever copying them twice and without ever running what they say.

A WeightFile first shows the names, types and shapes of its tensors; read() then brings one tensor at a time
into fresh, aligned memory. So a caller can refuse a file before it reads any data, the old safetensors files
whose data start at an odd address need no special care, and the peak of memory is what the caller keeps.
"""

import json
import math
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

DTYPES = {  # of the safetensors format, without its 8-bit floats
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool}
HARMLESS = (  # what the public .ckpt files name besides tensors; Inert objects stand in for them
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar", "numpy.dtype", "numpy.dtypes.Float64DType", "_codecs.encode")


class LoadError(ValueError):
    """Weights that cannot be used; the message is one sentence that names the file and the tensor."""


class Entry(NamedTuple):
    """What a tensor is, and where it lies in its file (offset in bytes)."""
    dtype: torch.dtype
    shape: tuple
    offset: int


class WeightFile:
    """A .safetensors, .ckpt or .bin file: entries is {key: Entry}. LoadError if it is damaged or unsafe."""

    def __init__(self, path):
        self.path = Path(path)
        readers = {".safetensors": safetensors_entries, ".ckpt": pickle_entries, ".bin": pickle_entries}
        if not self.path.is_file():
            raise LoadError(f"{path}: there is no such file")
        if self.path.suffix not in readers:
            raise LoadError(f"{path}: weights are read from .safetensors, .ckpt or .bin files")
        self.entries = readers[self.path.suffix](self.path)

    def read(self, key):
        """The tensor in fresh memory."""
        dtype, shape, offset = self.entries[key]
        tensor = torch.empty(shape, dtype=dtype)
        data = tensor.view(-1).view(torch.uint8).numpy()
        with open(self.path, "rb") as f:  # not mapped: mapped pages would count as a second copy
            f.seek(offset)
            if f.readinto(data) != data.size:
                raise LoadError(f"{self.path}: the file is truncated in {key}")
        return tensor


def safetensors_entries(path):
    """{key: Entry} of a safetensors file: 8 bytes with the header's length, the header (JSON), the data."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        start = 8 + int.from_bytes(f.read(8), "little")
        if size < 8 or start > size:
            raise LoadError(f"{path}: not a safetensors file, or truncated (it has {size} bytes)")
        header = f.read(start - 8)
    try:
        header = {key: value for key, value in json.loads(header).items() if key != "__metadata__"}
        entries = {key: Entry(DTYPES[value["dtype"]], tuple(value["shape"]), start + value["data_offsets"][0])
                   for key, value in header.items()}
        ends = {key: start + value["data_offsets"][1] for key, value in header.items()}
        sizes = {key: entry.dtype.itemsize * math.prod(entry.shape) for key, entry in entries.items()}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise LoadError(f"{path}: the header is damaged ({type(error).__name__})") from error
    position = start
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].offset, ends[item[0]])):
        positive = all(isinstance(n, int) and n >= 0 for n in entry.shape)
        if not positive or entry.offset != position or ends[key] != position + sizes[key]:
            raise LoadError(f"{path}: the header is damaged at {key!r}")
        position = ends[key]
        if position > size:
            raise LoadError(f"{path}: the file is truncated in {key!r} (it has {size} bytes)")
    if position != size:
        raise LoadError(f"{path}: damaged, there are {size - position} bytes after the last tensor")
    return entries


class Inert:
    """Stands for an object that is not a tensor: takes whatever it is given and does nothing."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


def pickle_entries(path):
    """{key: Entry} of a .ckpt or .bin file: a zip archive of one pickle and the data of the tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes two seconds: only where it is needed
    stand_ins = [(type(name.rpartition(".")[2], (Inert,), {}), name) for name in HARMLESS]
    try:
        with zipfile.ZipFile(path) as archive:
            if any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist()):
                raise LoadError(f"{path}: a compressed archive, not a file of torch.save")
        with torch.serialization.safe_globals(stand_ins):
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if foreign:
                raise LoadError(f"{path}: refused, because it asks to run {', '.join(sorted(foreign))}")
            with FakeTensorMode():  # tensors without data that know their place in the file
                state = torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile:
        raise LoadError(f"{path}: truncated, or not written by torch 1.6 or later") from None
    except (LoadError, OSError):
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise LoadError(f"{path}: damaged ({type(error).__name__})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not state:
        raise LoadError(f"{path}: there are no tensors in it")
    odd = [str(key) for key, t in state.items() if not (isinstance(t, torch.Tensor) and t.is_contiguous())]
    if odd:
        raise LoadError(f"{path}: {some(odd)} is not a plain tensor")
    places = {key: t.untyped_storage()._checkpoint_offset + t.storage_offset() * t.dtype.itemsize
              for key, t in state.items()}
    return {str(key): Entry(t.dtype, tuple(t.shape), places[key]) for key, t in state.items()}


def some(names):
    """The first of several names, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
