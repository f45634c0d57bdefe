"""The project's one way to write a file: whole, or not at all; pictures by number, and lines of text.

    with replacing("out/teddy.safetensors") as path:
        save_file(tensors, path)
"""

import itertools
import os
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

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
        partial.chmod(0o666 & ~umask)       # the package safetensors leaves files that only their owner can read
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
