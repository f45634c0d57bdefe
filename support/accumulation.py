"""What a training step is summed over: parts of its batch, to save memory, and processes; half precision."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from support.command_line import DTYPES
from support.processes import Processes


class Accumulation:
    """The gradients, the loss and the word's encoding of one step, over all parts and processes."""

    def __init__(self, learned: list[Tensor], batch: int, parts: int, precision: str, device: torch.device,
                 processes: Processes | None = None):
        """batch: images per step over all processes, each of which works on its share in `parts` parts."""
        self.learned, self.batch, self.precision, self.device = learned, batch, precision, device
        self.number, self.processes = parts, processes or Processes()
        if batch % (self.processes.count * parts):
            raise ValueError(f"a batch of {batch} cannot be shared by {self.processes.count} processes in "
                             f"{parts} parts each: choose a multiple of both")
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.loss, self.encoding = 0, 0

    def parts(self, choices: list[Tensor]) -> Iterator[list[Tensor]]:
        """The random choices (B, ...) of a step, those of one part after the other."""
        for part in self.processes.share(self.batch).chunk(self.number):
            yield [x[part] for x in choices]

    def autocast(self) -> torch.autocast:
        """Mixed precision for the U-Net; the text side and the metric stay in float32."""
        return torch.autocast(self.device.type, DTYPES[self.precision], enabled=self.precision != "fp32")

    def backward(self, loss: Tensor, e_concept: Tensor) -> None:
        """Add the gradients of a part's mean loss, and its encodings e_concept (n, d) of the word."""
        loss = loss * (len(e_concept) / self.batch)
        self.scaler.scale(loss).backward()
        self.loss = self.loss + loss.detach()
        self.encoding = self.encoding + e_concept.sum(0)

    def update(self, optimizer: torch.optim.Optimizer) -> tuple[float, Tensor]:
        """One optimizer step; returns the mean loss and the mean encoding (d,) of the word in the batch.

        FloatingPointError if the loss is not a number: nothing is updated then.
        """
        loss, encoding = self.loss, self.encoding / self.batch
        self.loss, self.encoding = 0, 0
        self.processes.add_up([loss, encoding, *(x.grad for x in self.learned)])
        loss = loss.item()          # here the processor waits for the device
        if not math.isfinite(loss):
            raise FloatingPointError("the loss is not a number")
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()
        return loss, encoding
