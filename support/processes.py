"""Data-parallel training: torchrun --nproc_per_node=2 starts a script twice, and the two share each batch."""

import atexit
import os

import torch
import torch.distributed as distributed
from torch import Tensor

VARIABLES = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}     # of torchrun; and for a process alone


class Processes:
    """The processes that torchrun started, or this one alone; device: this one's, of the kind asked for."""

    def __init__(self, device: str = "cpu"):
        """ValueError if the environment holds only a part of torchrun's variables, left by something else."""
        values = [os.environ.get(name, alone) for name, alone in VARIABLES.items()]
        self.count, self.rank, place = (int(value) if value.isdecimal() else -1 for value in values)
        alone = self.count == 1 or {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
        if not (0 <= self.rank < self.count and 0 <= place < self.count and alone):
            raise ValueError(f"{', '.join(VARIABLES)} are {', '.join(values)} in the environment, not as "
                             "torchrun sets them: start with it, or unset them")
        self.device = f"cuda:{place}" if device == "cuda" else device
        if self.count > 1:
            if device == "cuda":
                torch.cuda.set_device(self.device)
            distributed.init_process_group("nccl" if device == "cuda" else "gloo")
            atexit.register(distributed.destroy_process_group)

    def share(self, batch: int) -> Tensor:
        """The places in a batch that belong to this process."""
        return torch.arange(batch).chunk(self.count)[self.rank]

    def add_up(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over all processes (one message for all of them)."""
        if self.count > 1:
            packed = torch.cat([x.flatten() for x in tensors])
            distributed.all_reduce(packed)
            for x, total in zip(tensors, packed.split([x.numel() for x in tensors])):
                x.copy_(total.view_as(x))
