"""Files that are written whole or not at all, and texts as people save them.

    with replacing("out/teddy.safetensors") as path:
        save_file(tensors, path)
"""

import contextlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError

MAX_TEXT = 100 * 10 ** 6    # bytes of a text file; 100,000 long captions are a tenth of it


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


def write_json(path: str | os.PathLike, value: dict) -> None:
    """Write an object as a JSON file, see `replacing`."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


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
