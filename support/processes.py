"""Data-parallel training: torchrun --nproc_per_node=2 starts a script twice, and the two share each batch."""

import atexit
import os

import torch
import torch.distributed as distributed
from torch import Tensor


class Processes:
    """The processes that torchrun started, or this one alone; device: this one's, of the kind asked for."""

    def __init__(self, device: str = "cpu"):
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
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
