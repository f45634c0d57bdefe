"""What all scripts share on the command line: options, types, devices, and errors in one sentence.

    def main(argv=None):
        parser = command_line.Parser(__doc__)
        command_line.add_model(parser)
        args = parser.parse_args(argv)

    if __name__ == "__main__":
        command_line.run(main, memory="a smaller --size needs less")
"""

import argparse
import io
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}     # --precision


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it stands, and those defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default is False or action.default in (None, [], "")
        return action.help if silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse in one look; a wrong command is a ValueError, which `run` tells."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=Help)

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        argv = sys.argv[1:] if argv is None else argv
        for word in argv:
            if re.search("[\udc80-\udcff]", word):          # Python's stand-ins for bytes
                self.error(f"{word} is not {sys.getfilesystemencoding()}, and no concept could be read "
                           "there: rename it, or set LC_ALL=C.UTF-8")
        home = os.path.expanduser("~")          # which the shell leaves to us in --out=~/pictures
        return super().parse_args([re.sub(r"^(--[\w-]+=|)~(?=/|$)", lambda found: found[1] + home, word)
                                   for word in argv])

    def _parse_optional(self, text: str):
        """None for a value: argparse would take "-blurry" for an option. Ours have two dashes, or are -h."""
        return super()._parse_optional(text) if text == "-h" or text.startswith("--") else None

    def error(self, message: str):
        hint = "; before a value that begins with -- put =" * message.endswith("expected one argument")
        raise ValueError(f"{message}{hint} (--help lists all options)")


def between(least: float, most: float, kind: type = int) -> Callable[[str], float]:
    """A type for argparse: numbers from least to most, both included; never nan."""
    def number(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be {least} to {most}, not {text}")
        return value
    number.__name__ = "whole number" if kind is int else "number"       # for argparse's own message
    return number


def numbers(text: str) -> list[float]:
    """A type for argparse: '0.6', '0.6,0.7' or '0.4:0.9:0.05' (both ends included) -> list of numbers."""
    read = between(-100, 100, float)
    if ":" not in text:
        return [read(part) for part in text.split(",")]
    start, stop, step = (read(part) for part in text.split(":"))
    if not (step > 0 and stop >= start and (stop - start) / step < 1000):
        raise argparse.ArgumentTypeError(f"{text} is not START:STOP:STEP with a positive step")
    return [round(start + k * step, 6) for k in range(int((stop - start) / step + 1e-6) + 1)]


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
        text = re.sub(r"[^a-z0-9_]+", "-", (path.name if path.is_dir() else path.stem).lower())
        text = text.lstrip("_-").rstrip("-")[:41]
    name = text[1:-1] if text.startswith("<") and text.endswith(">") else text
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,40}", name):
        raise ValueError(f'"{name or images.name}" cannot be a name: give one of up to 41 letters, digits, - '
                         "and _ with --token")
    return name


def add_model(parser: argparse._ActionsContainer) -> None:
    """The flags of a base model, for `base_model.open_model`."""
    add = parser.add_argument
    add("--weights", default="tiny", metavar="MODEL", help="tiny, sd15, a folder, a single file or a hub id")
    add("--tokenizer", metavar="DIR", help="folder with vocab.json and merges.txt (default: the model's own)")
    add("--prediction", choices=("epsilon", "v_prediction"),
        help="what the U-Net predicts (default: what the model's files say)")
    add("--device", choices=("cpu", "cuda", "mps"), help="(default: the best one present)")


def command(args: argparse.Namespace, script: str, *words: object) -> str:
    """A line for the shell that runs a script with these words, on the base model of `args`."""
    for name, default in (("weights", "tiny"), ("tokenizer", None), ("prediction", None)):
        if (value := getattr(args, name, default)) != default:
            words += (f"--{name}", value)
    path = script if Path.cwd() == ROOT else ROOT / script
    return "python " + shlex.join(str(word) for word in (path, *words))


def pick_device(name: str | None = None) -> str:
    """A device name that is present: the one asked for (ValueError if it is missing), or the best one."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is not None and not present[name]:
        raise ValueError(f"this machine, or this build of torch, has no {name} device: use --device cpu")
    return name or next(device for device in present if present[device])


def run(main: Callable[[], None], memory: str) -> None:
    """Call main; errors that the user can mend end it with one sentence and exit code 2, Ctrl-C with 130.

    memory: what to try when memory runs out. Warnings become one line, and what the terminal cannot show
    becomes a question mark. Every other exception is a mistake of the program and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):    # it is another in a notebook, and None if it was closed
            stream.reconfigure(errors="replace")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        sentence = str(error)
        if getattr(error, "filename", None):        # of an OSError
            sentence = f"{error.filename}: {error.strerror}"
        elif isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "memory" in sentence:
            sentence = f"out of memory: {memory}"
        elif isinstance(error, RuntimeError):
            raise
        print("error:", sentence.replace("\n", " "), file=sys.stderr)
        sys.exit(2)
