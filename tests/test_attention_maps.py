"""Maps from recorded queries agree with the attention that the U-Net itself computes."""

import pytest
import torch

from attention_maps import attention, noised_map, record_queries, share_inside, word_map
from models import tiny_model


@pytest.fixture
def unet():
    return tiny_model().unet


@pytest.fixture
def inputs(unet):
    """z, t, keys and values of two pictures."""
    e = torch.randn(2, 5, 16)
    return torch.randn(2, 4, 4, 8), 10, unet.keys(e), unet.values(e)


def test_attention_times_values_is_what_the_network_computes(unet, inputs):
    seen, (_, _, keys, values) = [], inputs
    for layer in unet.cross_attentions:
        layer.to_out.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with record_queries(unet) as queries:
        unet(*inputs)
    for weights, v, expected in zip(attention(queries, keys, 2), values, seen, strict=True):
        v = v.unflatten(2, (2, -1)).transpose(1, 2)
        torch.testing.assert_close((weights @ v).transpose(1, 2).flatten(2), expected, rtol=1e-4, atol=1e-5)


def test_maps_are_float32_under_autocast_too(unet, inputs):
    with torch.autocast("cpu", torch.bfloat16), record_queries(unet) as queries:
        unet(*inputs)
        maps = attention(queries, inputs[2], 2)
        where = word_map(maps, [1], (4, 8))
    assert queries[0].dtype == torch.bfloat16 and where.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(maps, attention(queries, inputs[2], 2)))


def test_recording_leaves_the_output_and_the_network_as_they_were(unet, inputs):
    plain = unet(*inputs)
    with pytest.raises(RuntimeError), record_queries(unet):
        assert torch.equal(unet(*inputs), plain)
        raise RuntimeError
    assert not any(layer.to_q._forward_hooks for layer in unet.cross_attentions)


def test_the_maps_of_all_tokens_sum_to_one_and_sub_tokens_are_averaged(unet, inputs):
    with record_queries(unet) as queries:
        unet(*inputs)
    maps = attention(queries, inputs[2], 2)
    single = [word_map(maps, [i], (4, 8)) for i in range(5)]
    torch.testing.assert_close(sum(single), torch.ones(2, 4, 8))
    torch.testing.assert_close(word_map(maps, [1, 3], (4, 8)), (single[1] + single[3]) / 2)


def test_a_map_is_the_mean_over_layers_of_every_resolution_and_keeps_the_orientation():
    fine, coarse, middle = (torch.full((1, 1, n, 3), value) for n, value in ((64, 0.9), (16, 0.2), (4, 0.7)))
    torch.testing.assert_close(word_map([fine, coarse, middle], [1], (8, 8)), torch.full((1, 8, 8), 0.6))
    coarse = torch.zeros(1, 1, 8, 3)
    coarse[0, 0, 3, 1] = 1              # the end of the first of two rows of four
    found = word_map([coarse], [1], (4, 8))[0]
    assert found.argmax() % 8 == 7 and found[:2].sum() > found[2:].sum()


def test_the_share_inside_is_a_weighted_mean_and_resizes_the_mask():
    where, mask = torch.zeros(2, 4, 4), torch.zeros(1, 8, 8)
    where[0, :2], where[1] = 1, 1
    mask[:, :4] = 1
    torch.testing.assert_close(share_inside(where, mask), torch.tensor([1.0, 0.5]))


def test_a_noised_map_is_the_word_map_of_one_forward_pass(inputs):
    model, (z, _, keys, values) = tiny_model(), inputs
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
    with record_queries(model.unet) as queries:
        model.unet(model.schedule.add_noise(z, noise, torch.tensor([400, 400])), 400, keys, values)
    found = noised_map(model, z, 400, keys, values, [1, 2], seed=3)
    torch.testing.assert_close(found, word_map(attention(queries, keys, 2), [1, 2], (4, 8)))
