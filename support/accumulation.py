"""What a training step is summed over: parts of its batch, to save memory, and processes; half precision.

torchrun --nproc_per_node=2 starts a script twice, and the two share each batch.
"""

import atexit
import math
import os
import sys
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as distributed
from torch import Tensor

from support.command_line import DTYPES

VARIABLES = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}     # of torchrun; and for a process alone


def join_processes(device: str) -> str:
    """Meet the other processes if torchrun started this one; returns its own device, of the kind asked for.

    Only the first one goes on speaking. ValueError if the environment holds only a part of torchrun's
    variables, left by something else (torch says it if it is another part).
    """
    values = [os.environ.get(name, alone) for name, alone in VARIABLES.items()]
    count, rank, place = (int(value) if value.isdecimal() else -1 for value in values)
    if not (0 <= rank < count and 0 <= place < count):
        raise ValueError(f"{', '.join(VARIABLES)} are {', '.join(values)} in the environment, not as "
                         "torchrun sets them: start with it, or unset them")
    if count == 1:
        return device
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
        warnings.simplefilter("ignore")
    if device == "cuda":
        device = f"cuda:{place}"
        torch.cuda.set_device(device)
    distributed.init_process_group("gloo" if device in ("cpu", "mps") else "nccl")
    atexit.register(distributed.destroy_process_group)
    return device


class Accumulation:
    """The gradients, the loss and the word's encoding of one step, over all parts and processes."""

    def __init__(self, learned: list[Tensor], batch: int, parts: int, precision: str, device: torch.device):
        """batch: images per step over all processes, each of which works on its share in `parts` parts."""
        self.learned, self.batch, self.number = learned, batch, parts
        several = distributed.is_available() and distributed.is_initialized()
        self.processes = distributed.get_world_size() if several else 1
        self.rank = distributed.get_rank() if several else 0
        if batch % (self.processes * parts):
            raise ValueError(f"--batch {batch} is no multiple of {self.processes} processes x {parts} parts")
        # Mixed precision is for the U-Net; the text side and the metric stay in float32.
        self.autocast = torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.loss, self.encoding = 0, 0

    def parts(self, choices: list[Tensor]) -> Iterator[list[Tensor]]:
        """The random choices (B, ...) of a step, those of one part after the other."""
        share = torch.arange(self.batch).chunk(self.processes)[self.rank]
        for part in share.chunk(self.number):
            yield [x[part] for x in choices]

    def backward(self, loss: Tensor, e_concept: Tensor) -> None:
        """Add the gradients of a part's mean loss, and its encodings e_concept (n, d) of the word."""
        loss = loss * (len(e_concept) / self.batch)
        self.scaler.scale(loss).backward()
        self.loss = self.loss + loss.detach()
        self.encoding = self.encoding + e_concept.sum(0)

    def update(self, optimizer: torch.optim.Optimizer) -> tuple[float, Tensor]:
        """One optimizer step; returns the mean loss and the mean encoding (d,) of the word in the batch.

        ValueError if the loss is not a number: nothing is updated then.
        """
        loss, encoding = self.loss, self.encoding / self.batch
        self.loss, self.encoding = 0, 0
        if self.processes > 1:
            for x in (loss, encoding, *(x.grad for x in self.learned)):
                distributed.all_reduce(x)       # x becomes the sum over the processes
        loss = loss.item()          # here the processor waits for the device
        if not math.isfinite(loss):
            raise ValueError("the loss is not a number: try a lower --lr; what was written before is good")
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()
        return loss, encoding
