"""Plots: tensors in, a figure out."""

import os
import sys

# A program started from a notebook's cell inherits the notebook's backend of matplotlib. Where that is not
# installed, matplotlib fails at its import.
if os.environ.get("MPLBACKEND", "").endswith("inline") and "ipykernel" not in sys.modules:
    del os.environ["MPLBACKEND"]

from matplotlib.figure import Figure  # noqa: F401, E402
