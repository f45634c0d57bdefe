"""What all scripts share at the command line: the look of --help, a model's flags, errors in one sentence.

    import command_line                              # before matplotlib, see below

    def main(argv=None):
        parser = command_line.Parser(__doc__)
        command_line.add_model(parser)
        args = parser.parse_args(argv)
        ...

    if __name__ == "__main__":
        with command_line.plain_errors(memory="a smaller --size needs less"):
            main()
"""

import argparse
import contextlib
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

# A program started from a notebook's cell inherits the notebook's backend of matplotlib. Where that is not
# installed, matplotlib fails at its import; and outside of notebooks figures are only ever saved.
if "ipykernel" not in sys.modules:
    os.environ["MPLBACKEND"] = "agg"


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


def add_model(parser: argparse._ActionsContainer) -> None:
    """The flags of a base model, for `weights_loader.load` and `drawing.pick_device`."""
    add = parser.add_argument
    add("--weights", default="tiny", help="tiny, sd15, a folder, a single file or a hub id")
    add("--tokenizer", metavar="DIR", help="folder with vocab.json and merges.txt (default: the model's own)")
    add("--prediction", choices=("epsilon", "v_prediction"),
        help="what the U-Net predicts (default: what the model's files say)")
    add("--device", choices=("cpu", "cuda", "mps"), help="(default: the best one present)")


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
