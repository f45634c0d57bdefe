"""With fast_cpu switched on the networks compute what they did, and each trick is used where it belongs."""

import copy
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from bench import difference
from support import fast_cpu
from test_unet_and_vae import run


@pytest.fixture
def winograd(monkeypatch):
    """Knows what went through Winograd's algorithm."""
    monkeypatch.setattr(fast_cpu, "winograd", Mock(wraps=fast_cpu.winograd))
    return fast_cpu.winograd


@pytest.fixture
def fast(model, monkeypatch):
    """The model with everything switched on, whose convolutions all count as large."""
    monkeypatch.setattr(fast_cpu, "TILES", 1)
    monkeypatch.setattr(fast_cpu, "CHANNELS", 1)
    fast = copy.deepcopy(model)
    fast_cpu.enable(fast)
    return fast


def frozen(c_in, c_out, stride=1):
    return fast_cpu.FastConv2d(c_in, c_out, 3, stride, padding=1).requires_grad_(False)


def test_the_networks_compute_the_same_and_keep_their_parameters(model, fast, winograd):
    images, z, e = torch.rand(2, 3, 64, 64), torch.randn(2, 4, 16, 16), torch.randn(2, 7, 48)
    jobs = {"unet": lambda m: run(m.unet, z, 501, e), "vae": lambda m: m.vae.decode(m.vae.encode(images)),
            "text_encoder": lambda m: m.text_encoder(e)}
    for name, job in jobs.items():
        winograd.reset_mock()
        assert difference(job(fast), job(model)) < 1e-5, name       # float32, in another order of summation
        assert winograd.called == (name != "text_encoder"), name
        assert difference(job(copy.deepcopy(fast)), job(model)) < 1e-5, name
        state, expected = getattr(fast, name).state_dict(), getattr(model, name).state_dict()
        assert list(state) == list(expected) and all(state[key].equal(expected[key]) for key in expected)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_gradients_stay_the_same(model, fast, winograd, trained, checkpointing):
    results, z, e = [], torch.randn(1, 4, 16, 16), torch.randn(1, 7, 48)
    for network in (copy.deepcopy(model.unet), fast.unet):
        network.requires_grad_(trained).checkpointing = checkpointing
        z, e = z.detach().requires_grad_(), e.detach().requires_grad_()
        run(network, z, 501, e).square().sum().backward()
        results.append([z.grad, e.grad, *(p.grad for p in network.parameters() if trained)])
    for ours, expected in zip(*results, strict=True):
        assert difference(ours, expected) < 1e-4        # float32, in another order of summation
    assert winograd.called != trained
    with torch.no_grad():
        run(fast.unet, z, 501, e)
    assert winograd.called                              # without gradients all weights are frozen


def test_on_another_device_nothing_changes(model):
    other = copy.deepcopy(model)
    other.unet.to("meta")
    fast_cpu.enable(other)
    for network in (other.unet, other.vae):
        assert not {type(module) for module in network.modules()} & set(fast_cpu.FASTER.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer, shape", [
    (fast_cpu.FastLinear(8, 6), (2, 5, 8)), (fast_cpu.FastGEGLU(8, 16), (2, 5, 8)),
    (frozen(4, 8), (2, 4, 8, 8)), (fast_cpu.FastConv2d(4, 8, 1, bias=False), (2, 4, 8, 8))])
def test_half_precision_is_computed_in_float32_where_it_is_slow(monkeypatch, dtype, layer, shape):
    x = torch.randn(shape)
    rounded = copy.deepcopy(layer).to(dtype).float()            # its weights, as `dtype` holds them
    expected = rounded(x.to(dtype).float())
    monkeypatch.setattr(fast_cpu, "HALF_IS_SLOW", True)
    leaf = x.to(dtype).requires_grad_()
    result = copy.deepcopy(layer).to(dtype)(leaf)
    assert result.equal(expected.to(dtype))                     # rounded once, at the end
    result.sum().backward()
    assert leaf.grad.abs().max() > 0
    with torch.autocast("cpu", dtype):
        automatic = layer(x)
    assert automatic.dtype == dtype and difference(automatic, layer(x)) < 0.01


# one band of tiles; several with a rest; wider than high; so many images that one row of tiles is a band
@pytest.mark.parametrize("shape", [(1, 128, 32, 32), (1, 128, 100, 88), (3, 128, 20, 64), (100, 128, 8, 12)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_output_and_gradient_equal_those_of_torch_in_float64(winograd, shape, layout):
    layer, x = frozen(128, 144).to(memory_format=layout), torch.randn(shape).to(memory_format=layout)
    output = layer(x.requires_grad_())
    gradient = torch.randn_like(output)
    output.backward(gradient)
    assert [call.args[0].shape for call in winograd.mock_calls] == [x.shape, output.shape]  # and backward
    exact = x.detach().double().requires_grad_()
    expected = F.conv2d(exact, layer.weight.double(), layer.bias.double(), padding=1)
    expected.backward(gradient.double())
    assert difference(output, expected) < 3e-6
    assert difference(x.grad, exact.grad) < 3e-6


@pytest.mark.parametrize("channels, stride, size, dtype", [
    (64, 1, (32, 64), torch.float32), (128, 1, (16, 32), torch.float32), (128, 1, (34, 64), torch.float32),
    (128, 2, (32, 64), torch.float32), (128, 1, (32, 64), torch.bfloat16)])
def test_few_channels_or_tiles_odd_sizes_strides_and_bfloat16_are_left_to_torch(
        monkeypatch, winograd, channels, stride, size, dtype):
    monkeypatch.setattr(fast_cpu, "HALF_IS_SLOW", False)
    layer = frozen(channels, 128, stride).to(dtype, memory_format=torch.channels_last)
    x = torch.randn(1, channels, *size, dtype=dtype)
    assert layer(x).equal(F.conv2d(x, layer.weight, layer.bias, stride=stride, padding=1))
    assert not winograd.called
