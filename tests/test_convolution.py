"""The 3x3 convolution equals torch's, however it is computed, and goes through Winograd's algorithm for large
layers with frozen weights only."""

import pytest
import torch
import torch.nn.functional as F

import convolution


@pytest.fixture
def calls(monkeypatch):
    """The shapes that went through Winograd's algorithm."""
    shapes, original = [], convolution.winograd

    def recorded(x, *args, **options):
        shapes.append(tuple(x.shape))
        return original(x, *args, **options)

    monkeypatch.setattr(convolution, "winograd", recorded)
    return shapes


def frozen(c_in, c_out, **more):
    return convolution.Conv3x3(c_in, c_out, **more).requires_grad_(False)


def relative(result, expected):
    return ((result - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


@pytest.mark.parametrize("points", [convolution.POINTS, (0, 1, -1, 2, -2)])
def test_the_matrices_compute_the_convolution_of_a_tile(points):
    tile, weight = torch.randn(6, 6, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    inputs, weights, outputs = (m.double() for m in convolution.matrices(points))
    result = outputs @ ((inputs @ tile.flatten()) * (weights @ weight.flatten()))
    expected = F.conv2d(tile[None, None], weight[None, None]).flatten()
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)  # the matrices are float32


# one band of tiles; several with a rest; wider than high; so many images that one row of tiles is a band
@pytest.mark.parametrize("shape", [(1, 32, 32), (1, 100, 88), (3, 20, 64), (100, 8, 12)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_output_and_gradient_equal_those_of_torch_in_float64(calls, shape, layout):
    B, H, W = shape
    layer = frozen(128, 144).to(memory_format=layout)
    x = torch.randn(B, 128, H, W).to(memory_format=layout).requires_grad_()
    gradient = torch.randn(B, 144, H, W)
    output = layer(x)
    output.backward(gradient)
    assert calls == [(B, 128, H, W), (B, 144, H, W)]  # forward and backward
    exact = x.detach().double().requires_grad_()
    expected = F.conv2d(exact, layer.weight.double(), layer.bias.double(), padding=1)
    expected.backward(gradient.double())
    assert relative(output, expected) < 3e-6
    assert relative(x.grad, exact.grad) < 3e-6


def test_the_chosen_points_halve_the_error_of_the_usual_ones(monkeypatch):
    layer, x = frozen(256, 256), torch.randn(1, 256, 32, 32)
    expected = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
    chosen = relative(layer(x), expected)
    for name, matrix in zip(("INPUTS", "WEIGHTS", "OUTPUTS"), convolution.matrices((0, 1, -1, 2, -2))):
        monkeypatch.setattr(convolution, name, matrix)
    assert chosen < 0.6 * relative(layer(x), expected)


@pytest.mark.parametrize("case", ["few channels", "few tiles", "odd size", "stride", "bfloat16", "trained",
                                  "autocast"])
def test_all_else_is_left_to_torch(calls, case):
    layer = frozen(64 if case == "few channels" else 128, 128, stride=2 if case == "stride" else 1)
    x = torch.randn(1, layer.in_channels, *{"few tiles": (16, 32), "odd size": (34, 64)}.get(case, (32, 64)))
    if case == "bfloat16":
        layer, x = layer.bfloat16(), x.bfloat16()
    layer.requires_grad_(case == "trained")
    with torch.autocast("cpu", enabled=case == "autocast"):
        output = layer(x)
        expected = F.conv2d(x, layer.weight, layer.bias, stride=layer.stride, padding=1)
    assert torch.equal(output, expected)
    if case == "trained":
        output.sum().backward()
        assert layer.weight.grad.abs().max() > 0
        with torch.no_grad():
            layer(x)  # trained weights are frozen while there are no gradients
        assert len(calls) == 1
    else:
        assert not calls


def test_frozen_and_trained_weights_have_the_same_names():
    assert set(frozen(4, 8).state_dict()) == set(torch.nn.Conv2d(4, 8, 3).state_dict())
