"""What can be known of a GPU without one: gpu_check.py keeps working, and no two devices are mixed."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffusion
import gpu_check
import perfusion
import train
import weights_loader
from concept import Concept, prepare
from support.pictures import Data

aten = torch.ops.aten
NUMBER, TENSOR = aten._local_scalar_dense.default, aten._to_copy.default
WAITS = {NUMBER: "number", TENSOR: "tensor", aten._linalg_check_errors.default: "solved"}
MOVED = (aten.index.Tensor, aten.index_put.default, aten.copy_.default)     # by torch, to their first tensor


def test_every_line_passes_at_tiny_sizes_on_the_cpu(capsys):
    assert gpu_check.main(["--small", "--device", "cpu"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines()[4:] if line.startswith("| ")]
    assert len(lines) > 30 and all(line.endswith(("| ok |", "|  |")) for line in lines)


def test_a_line_that_fails_says_why_and_stops_nothing(capsys):
    assert gpu_check.main(["--small", "--device", "cpu", "--checks", "picture", "resume"]) == 1
    table = capsys.readouterr().out     # no script has drawn the picture
    assert "| picture fp32 | FileNotFoundError: " in table and "| training resumed, fp16 | two whole" in table


class Device(TorchDispatchMode):
    """`meta` stands for a GPU: what is computed there has a shape and no numbers.

    Whatever mixes it with the CPU is an error as on a GPU: a tensor made on the default device, a mask, an
    index, a generator. Tensors without dimensions are numbers, which torch moves. `waits`: where a processor
    waits for the GPU, because something is read from it; what is read is ones.

    It finds no kernel that a device lacks, no precision, no order of summation, nothing that is particular to
    MPS or to autocast, and no wait inside of a kernel.
    """

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = any(x.is_meta for x in tensors)
        moved = op in MOVED and args[0].is_meta
        assert not there or moved or all(x.is_meta or not x.ndim for x in tensors), f"{op} mixes devices"
        waits = there and op in WAITS and (op is not TENSOR or kwargs.get("device") == torch.device("cpu"))
        if waits:
            self.waits.append(WAITS[op])
        if waits and op is not aten._linalg_check_errors.default:
            return 1 if op is NUMBER else torch.ones(args[0].shape, dtype=kwargs.get("dtype"))
        result, generator = op(*args, **kwargs), kwargs.get("generator")
        assert not generator or generator.device == result.device, f"{op} has a generator of another device"
        return result


@pytest.fixture
def device(monkeypatch):
    """Switched on. Autocast, which does not know `meta`, is left out."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with Device() as device:
        yield device


@pytest.fixture
def model(weights):
    return weights_loader.load(weights, "meta")


@pytest.mark.parametrize("mistake", [
    lambda x: x + torch.ones(2), lambda x: torch.ones(1, 2) @ x, lambda x: torch.cat([x, torch.ones(2)]),
    lambda x: torch.ones(2)[x.long()], lambda x: torch.randn(2, device="meta", generator=torch.Generator())])
def test_a_mix_of_devices_is_found(device, mistake):
    with pytest.raises(AssertionError, match="device"):
        mistake(torch.ones(2, device="meta"))
    assert not device.waits and torch.ones(2, device="meta").sum().item() == 1 and device.waits == ["number"]


@pytest.mark.parametrize("keys", ["locked", "none"])
def test_a_training_step_mixes_no_devices_and_waits_for_its_loss_and_the_words_encoding(model, device, keys):
    latents = torch.zeros(3, 2, 4, 8, 8, device="meta")
    data = Data(latents[:, 0], latents, latents[:, :, :1])
    settings = train.Settings("teddy bear", "<teddy>", batch=4, accumulate=2, keys=keys)
    training = train.Training(model, data, settings, torch.eye(16, dtype=torch.float64))
    device.waits.clear()
    training.step()
    # in each part the metric's equation; the loss; i_star, which is kept on the CPU
    edits = keys == "locked"
    assert device.waits == ["solved", "solved"] * edits + ["number"] + ["tensor"] * edits


def test_drawing_mixes_no_devices_and_waits_once_in_a_step(model, concept_files, device):
    concepts = prepare([Concept.load(concept_files["teddy"])], model)
    keys, values, *_ = perfusion.condition(model, ["", "a <teddy> on the beach"], concepts)
    assert device.waits == ["solved"]
    diffusion.draw(model, keys, values, [0, 1], model.size, 5)
    assert device.waits == ["solved"] + 5 * ["number"] + 2 * ["number", "tensor"]  # steps; pictures
