"""What all scripts share: the command line, errors in one sentence, files written whole or not at all.

    import shell                                     # before matplotlib, see below

    def main(argv=None):
        parser = shell.Parser(__doc__)
        shell.add_model(parser)
        args = parser.parse_args(argv)
        with shell.replacing("out/teddy.safetensors") as path:
            save_file(tensors, path)

    if __name__ == "__main__":
        with shell.plain_errors(memory="a smaller --size needs less"):
            main()
"""

import argparse
import contextlib
import io
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

HEADER_LIMIT = 4_000_000  # bytes; of Stable Diffusion's own safetensors file: 156,444
HARMLESS = (  # what public .ckpt files name besides tensors; Inert objects stand in for them
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar", "numpy.dtype", "numpy.dtypes.Float64DType", "_codecs.encode")
MAX_TEXT = 100 * 10 ** 6    # bytes of a text file; 100,000 long captions are a tenth of it

# A program started from a notebook's cell inherits the notebook's backend of matplotlib. Where that is not
# installed, matplotlib fails at its import.
if os.environ.get("MPLBACKEND", "").endswith("inline") and "ipykernel" not in sys.modules:
    del os.environ["MPLBACKEND"]


# --------------------------------------------------------------------------------------------- command lines

class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it stands, and those defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default is False or action.default in (None, [], "")
        return action.help if silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse in one look; a wrong command is a ValueError, which `plain_errors` tells."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=Help)

    def parse_args(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        argv = sys.argv[1:] if argv is None else argv
        for text in argv:
            if any("\udc80" <= character <= "\udcff" for character in text):  # Python's stand-ins for bytes
                self.error(f"{text} is not UTF-8, and no concept could be read there: rename it")
        return super().parse_args(argv)

    def error(self, message: str):
        raise ValueError(f"{message} (--help lists all options)")


def between(least: float, most: float, kind: type = int) -> Callable[[str], float]:
    """A type for argparse: numbers from least to most, both included; never nan."""
    def number(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be {least} to {most}, not {text}")
        return value
    number.__name__ = "whole number" if kind is int else "number"       # for argparse's own message
    return number


def unquoted(text: str) -> str:
    """A prompt without the quotes that a shell or a table left around it: they would be words of it."""
    return re.sub(r"""^\s*["'“‘]([^"'“”‘’]*)["'”’]\s*$""", r"\1", text)


def ordinary_words(text: str) -> str:
    """--super without quotes and stops around it: the keys are locked to the last of its tokens."""
    words = text.strip(" \t\n\"'“”‘’«»„.,;:!?…")
    if not re.search(r"\w", words) or re.search(r"[<>{}|]", words):
        raise argparse.ArgumentTypeError(f'"{text}" must be ordinary words, like "teddy bear"')
    return words


def concept_name(text: str | None, images: Path) -> str:
    """The bare name of the token: given, or else made from the name of the images' folder."""
    if text is None:
        path = images.resolve()
        text = re.sub(r"[^a-z0-9]+", "-", (path.name if path.is_dir() else path.stem).lower()).strip("-")[:41]
        if not text:
            raise ValueError(f"no name can be made from {images}: give one with --token")
    name = text[1:-1] if text.startswith("<") and text.endswith(">") else text
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,40}", name):
        raise ValueError(f'--token "{text}" must consist of up to 41 letters, digits, - and _')
    return name


def add_model(parser: argparse._ActionsContainer) -> None:
    """The flags of a base model, for `weights_loader.load` and `pick_device`."""
    add = parser.add_argument
    add("--weights", default="tiny", help="tiny, sd15, a folder, a single file or a hub id")
    add("--tokenizer", metavar="DIR", help="folder with vocab.json and merges.txt (default: the model's own)")
    add("--prediction", choices=("epsilon", "v_prediction"),
        help="what the U-Net predicts (default: what the model's files say)")
    add("--device", choices=("cpu", "cuda", "mps"), help="(default: the best one present)")


def pick_device(name: str | None = None) -> str:
    """A device name that is present: the one asked for (ValueError if it is missing), or the best one."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is not None and not present[name]:
        raise ValueError(f"this machine, or this build of torch, has no {name} device: use --device cpu")
    return name or next(device for device in present if present[device])


@contextlib.contextmanager
def plain_errors(memory: str) -> Iterator[None]:
    """Errors that the user can mend end the program: one sentence on stderr, exit code 2; 130 after Ctrl-C.

    memory: what to try when memory runs out. Warnings become one line, and what the terminal cannot show
    becomes a question mark. Every other exception is a mistake of the program and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):    # it is another in a notebook, and None if it was closed
            stream.reconfigure(errors="replace")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        sentence = str(error)
        if isinstance(error, OSError) and error.filename:
            sentence = f"{error.filename}: {error.strerror}"
        elif isinstance(error, MemoryError | RuntimeError):
            if isinstance(error, RuntimeError) and "memory" not in sentence:
                raise
            sentence = f"out of memory: {memory}"
        print("error:", sentence.replace("\n", " "), file=sys.stderr)
        sys.exit(2)


# ----------------------------------------------------------------------------------------------------- files

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
        reason = getattr(error, "strerror", None) or f"is the disk full? ({error})"
        raise OSError(f"{path} cannot be written: {reason}") from error
    finally:
        partial.unlink(missing_ok=True)


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
