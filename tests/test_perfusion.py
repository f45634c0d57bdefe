"""The method against its equations, in float64; the concept and its file."""

import dataclasses
import re

import pytest
import torch

import perfusion
from concept import KEYS, Concept, prepare
from models import tiny_model
from perfusion import edit, split

d, B, T = 16, 2, 5
EXACT = dict(rtol=0, atol=1e-10)        # float64: about 1e4 roundings of numbers near 1


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# A covariance with a condition number of about 1e4, and its inverse.
x = normal(200, d, seed=1) * torch.logspace(-2, 0, d) @ torch.linalg.qr(normal(d, d, seed=2))[0]
C = x.T @ x / len(x)
C_INVERSE = torch.linalg.inv(C)


@pytest.fixture(scope="module")
def model():
    """A tiny_model in float64."""
    model = tiny_model()
    model.text_encoder.double()
    model.unet.double()
    return model


def concept(model, token="<teddy>", lock="locked", seed=5, k=2):
    i_star = normal(d, seed=seed)
    targets = [normal(len(o), seed=seed + 1) for o in model.unet.values(i_star)]
    return Concept(token, "teddy bear", normal(k, d, seed=seed), i_star, C_INVERSE @ i_star, targets,
                   [o + 1 for o in targets] if lock == "trained" else None, keys=lock,
                   layers=model.unet.layer_names(), metadata={"base": "", "steps": 3})


# ---------------------------------------------------------------------------------------------- the equations

def test_the_titles_equation_maps_i_star_to_o_star_and_no_other_map_changes_the_outputs_over_C_less():
    """Why C^-1: against random maps with the same property, and the minimum that Lagrange's method gives."""
    W, i_star, o_star = normal(8, d, seed=8), normal(d, seed=7), normal(8, seed=9)
    d_star = C_INVERSE @ i_star
    e_perp, ratio = split(torch.eye(d, dtype=torch.float64)[None], i_star[None], d_star[None])
    h, = edit(lambda x: [x @ W.T], e_perp, ratio, [o_star[None]])         # W' of every unit vector
    edited = h[0].T
    expected = W + torch.outer(o_star - W @ i_star, d_star) / (i_star @ d_star)
    torch.testing.assert_close(edited, expected, **EXACT)
    torch.testing.assert_close(edited @ i_star, o_star, **EXACT)

    def change(other):
        return torch.trace((other - W) @ C @ (other - W).T)               # E |(W' - W) e|^2
    for seed in range(100):
        away = normal(8, d, seed=100 + seed)
        away -= torch.outer(away @ i_star, i_star) / (i_star @ i_star)     # keeps the constraint
        assert change(edited + 0.01 * away) > change(edited)
    # The gradient of the change and the constraint, in one linear system: (2 C, i*; i*^T, 0).
    system = torch.zeros(d + 1, d + 1, dtype=torch.float64)
    system[:d, :d], system[:d, d], system[d, :d] = 2 * C, i_star, i_star
    minimum = torch.linalg.solve(system, torch.cat([2 * C @ W.T, o_star[None]]))[:d].T
    torch.testing.assert_close(minimum, edited, rtol=0, atol=1e-8)      # C's condition number is 1e4
    assert torch.linalg.matrix_rank(edited - W) == 1


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_n_by_n_solve_is_the_papers_cholesky_and_qr(n):
    e, I = normal(B, T, d), normal(n, d, seed=11)
    L = torch.linalg.cholesky(C)                                    # x -> L^-1 x makes the metric Euclidean
    Q, _ = torch.linalg.qr(torch.linalg.solve_triangular(L, I.T, upper=False))
    white = torch.linalg.solve_triangular(L, e.reshape(-1, d).T, upper=False)
    expected = (L @ (white - Q @ (Q.T @ white))).T.reshape(B, T, d)
    e_perp, _ = split(e, I, I @ C_INVERSE)
    torch.testing.assert_close(e_perp, expected, **EXACT)
    torch.testing.assert_close(split(e_perp, I, I @ C_INVERSE)[1], e_perp.new_zeros(B, T, n), **EXACT)


def test_the_metric_stays_in_float32_under_autocast_and_for_half_precision_encodings():
    e, i_star = normal(B, T, d).bfloat16(), normal(1, d, seed=7).float()
    d_star = i_star @ C_INVERSE.float()
    with torch.autocast("cpu", torch.bfloat16):
        e_perp, ratio = split(e, i_star, d_star)
    assert e_perp.dtype == torch.bfloat16 and ratio.dtype == torch.float32
    assert torch.equal(ratio, split(e.float(), i_star, d_star)[1])


# -------------------------------------------------------------------------------------------- keys and values

def both(model, concepts, lock="local", beta=0.7, tau=0.15, prompts=["a <teddy> and a <cat> on the beach"]):
    """Encodings e, e_super of prompts, and what `condition` makes of them: keys, values, positions, gates."""
    e, e_super, _ = perfusion.encode(model.text_encoder, model.tokenizer, prompts, concepts)
    return e, e_super, perfusion.condition(model, prompts, concepts, beta, tau, lock)


def test_the_global_lock_uses_the_plain_keys_of_the_super_category_prompt(model):
    teddy, = prepare([concept(model)], model)
    _, e_super, (keys, values, *_) = both(model, [teddy], lock="global")
    plain, _, _ = both(model, [], prompts=["a teddy bear and a <cat> on the beach"])
    torch.testing.assert_close(e_super, plain, **EXACT)
    torch.testing.assert_close(keys, model.unet.keys(plain), **EXACT)
    torch.testing.assert_close(values, both(model, [teddy])[2].values, **EXACT)


def test_textual_inversion_is_the_plain_model_with_a_learned_word(model):
    word = concept(model, lock="none")
    e, e_super, (keys, values, _, gates) = both(model, [word])
    assert not torch.equal(e, e_super) and gates is None
    torch.testing.assert_close(keys + values, model.unet.keys(e) + model.unet.values(e), rtol=0, atol=0)


def test_keys_and_values_follow_eq_3_for_two_concepts_beside_a_word_without_a_gate(model):
    """The second is a single token of "teddy bear", and stands in the place of the last word."""
    concepts = prepare([concept(model), concept(model, "<hat>", "none", seed=30),
                        concept(model, "<cat>", "trained", seed=20, k=1)], model)
    e, _, (keys, values, positions, gates) = both(model, concepts, "local", [0.6, 0, 0.8], [0.1, 0, 0.2])
    first, _, second = concepts
    assert positions == [{"<teddy>": [[2, 3]], "<hat>": [], "<cat>": [[8]]}] and second.words == "bear"
    locked = model.unet.keys(perfusion.super_encoding(model.text_encoder, model.tokenizer, "teddy bear"))
    torch.testing.assert_close(first.o_keys, locked, **EXACT)
    I, D = torch.stack([first.i_star, second.i_star]), torch.stack([first.d_star, second.d_star])
    ratio, (beta, tau) = e @ D.T / (I * D).sum(1), torch.tensor([[0.6, 0.8], [0.1, 0.2]], dtype=e.dtype)
    opened = torch.sigmoid((ratio - beta) / tau)
    torch.testing.assert_close(gates, opened, **EXACT)
    e_perp, _ = split(e, I, D)
    for i, layer in enumerate(model.unet.cross_attentions):
        o_K, o_V = (torch.stack([a[i], b[i]]) for a, b in ((first.o_keys, second.o_keys),
                                                           (first.o_values, second.o_values)))
        torch.testing.assert_close(keys[i], layer.to_k(e_perp) + opened @ o_K, **EXACT)
        torch.testing.assert_close(values[i], layer.to_v(e_perp) + opened @ o_V, **EXACT)


def test_the_embedding_is_written_at_every_occurrence_and_receives_its_gradient(model):
    teddy = concept(model)
    teddy.embedding.requires_grad_()
    ids, positions = model.tokenizer.encode(["<teddy> on <teddy>", "none"], {"<teddy>": teddy.words})
    plain = model.text_encoder.embed(ids)
    learned = perfusion.insert(plain, positions, [teddy])
    assert (learned != plain).any(-1).nonzero().tolist() == [[0, 1], [0, 2], [0, 4], [0, 5]]
    learned.sum().backward()
    assert torch.equal(teddy.embedding.grad, torch.full_like(teddy.embedding, 2))


def test_two_concepts_of_one_kind_are_named_with_their_similarity_to_one_another(model):
    first, other = concept(model), concept(model, "<hat>", seed=20)
    i_star = 0.9 * first.i_star + 0.1 * other.i_star
    near = dataclasses.replace(other, token="<cat>", i_star=i_star, d_star=C_INVERSE @ i_star)
    ab, ba = (x.i_star @ y.d_star / (y.i_star @ y.d_star) for x, y in ((first, near), (near, first)))
    with pytest.warns(UserWarning, match=f"<teddy> and <cat> are of one kind.*{ab:.2f} and {ba:.2f}") as said:
        prepare([first, other, near], model)
    assert len(said) == 1                       # nothing of the others


REFUSED = {  # sentence -> what is refused
    "call prepare": lambda model, first: both(model, [first]),
    'the lock is "local" or "global"': lambda model, first: both(model, [first], "universal"),
    "<teddy> does not fit": lambda model, first: prepare(
        [dataclasses.replace(first, o_values=[torch.ones(8)])], model),
    "<teddy> and <cat> cannot be told apart": lambda model, first: prepare(
        [first, dataclasses.replace(first, token="<cat>", d_star=3 * first.d_star)], model),
    "two concepts are called <teddy>": lambda model, first: prepare([first, first], model),
    "values.down.0.0 is not finite in torch.float16": lambda model, first: dataclasses.replace(
        first, o_values=[1e6 * o for o in first.o_values]).save("no folder/x")}      # float16 ends at 65504


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_used_or_written_is_refused(model, sentence):
    with pytest.raises(ValueError, match=sentence):
        REFUSED[sentence](model, concept(model))


# --------------------------------------------------------------------------------------------------- the file

@pytest.mark.parametrize("lock", KEYS)
def test_a_file_comes_back_as_it_was_written(model, tmp_path, lock):
    written = concept(model, lock=lock)
    written.save(tmp_path / "teddy.safetensors", torch.float32)
    read = Concept.load(tmp_path / "teddy.safetensors")
    for name in ("token", "super_category", "beta", "tau", "keys", "metadata"):
        assert getattr(read, name) == getattr(written, name)
    torch.testing.assert_close(read.embedding, written.embedding.float())
    assert (read.i_star is None) == (lock == "none") and (read.o_keys is None) == (lock != "trained")
    if lock != "none":
        assert read.layers == written.layers and torch.equal(read.i_star, written.i_star.float())
        torch.testing.assert_close(read.o_values, [o.float() for o in written.o_values])
    if lock == "trained":
        torch.testing.assert_close(read.o_keys, [o.float() for o in written.o_keys])


def test_a_d_star_of_any_scale_survives_float16(model, tmp_path):
    written, e = concept(model), normal(1, T, d).float()
    _, expected = split(e, written.i_star[None], written.d_star[None])
    for scale in (1e-9, 1, 1e9):
        dataclasses.replace(written, d_star=written.d_star * scale).save(tmp_path / "c.safetensors")
        read = Concept.load(tmp_path / "c.safetensors")
        _, ratio = split(e, read.i_star[None], read.d_star[None])
        torch.testing.assert_close(ratio, expected, rtol=0.01, atol=0.01)    # 11 bits, condition 1e4


@pytest.mark.parametrize("sound, damaged", [
    (rb"keys\.mid\.0", b"keys.mid.9"), (rb"tau(\W+)0\.1", rb"tau\g<1>0.0"),
    (rb"..\Z", b"\xff\xff"), (rb"format", b"former"), (rb'":"{', b'":"[')])       # the first is a NaN
def test_a_damaged_file_is_refused_in_one_sentence_that_names_it(model, tmp_path, sound, damaged):
    path = tmp_path / "c.safetensors"
    concept(model, lock="trained").save(path)
    content, changes = re.subn(sound, damaged, path.read_bytes(), flags=re.DOTALL)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.safetensors is a concept file, and not usable.*: .*\Z"):
        Concept.load(path)
    assert changes == 1
