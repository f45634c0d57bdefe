"""Tokenizer and text transformer equal those of transformers; words are found where the ids are."""

import json
import random
import warnings
from pathlib import Path

import pytest
import torch

import perfusion
from clip_text import Tokenizer
from models import ROOT, assert_parity

GOLDEN = json.loads((Path(__file__).parent / "data" / "tokenizer_golden.json").read_text(encoding="utf-8"))
PIECES = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u200b", "\u2009", *"""
    a photo of the Astronaut RIDING HORSE on mars photorealistic sks don't I'M we've you'll it's they'd 're ’s
    café naïve Ångström cafe\u0301 ÉCOLE straße İstanbul ﬁne Ａ żółć 日本語 テスト 中文字 한국어 мир Ελλάς עברית हिन्दी ไทย
    😀 👩‍🚀 🏳️‍🌈 ❤️ 👍🏽 🇩🇪 2023 4k 3.14 1,000 x2y ² ½ ٣ Ⅷ ! ? . , : ; ( ) [ ] { } @ # $ % ^ & * + = / \\ | ~ ` "
    ' ... -- <new1> __init__ — « 、 <|startoftext|> <|endoftext|> <|EndOfText|> <|endoftext </w>
    \x00 \x7f \ufeff \u0378 \U0010ffff \u0301 \ufffd""".split()]


def random_prompt(generator):
    pieces = generator.choices(PIECES, k=generator.randint(0, 40))
    return "".join(piece + generator.choice(["", " ", " "]) for piece in pieces)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer.load(tokenizer_folder)


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_golden_prompts_have_their_published_ids(tokenizer):
    ids, _ = tokenizer.encode(list(GOLDEN))
    assert ids.dtype == torch.long and ids.shape == (len(GOLDEN), 77)
    assert ids.tolist() == [(golden + [49407] * 77)[:77] for golden in GOLDEN.values()]


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_five_hundred_random_strings_have_the_ids_of_the_reference(tokenizer, tokenizer_folder):
    from transformers import CLIPTokenizer

    reference = CLIPTokenizer(vocab=str(tokenizer_folder / "vocab.json"),
                              merges=str(tokenizer_folder / "merges.txt"), model_max_length=77)
    generator = random.Random(0)
    prompts = [random_prompt(generator) for _ in range(500)]
    expected = reference(prompts, padding="max_length", truncation=True, max_length=77).input_ids
    ids = tokenizer.encode(prompts)[0].tolist()
    different = [prompts[i] for i in range(500) if ids[i] != expected[i]]
    assert different == []
    assert sum(theirs[-2] != 49407 for theirs in expected) > 5  # truncation is among them


def test_a_long_prompt_is_truncated_with_a_warning_that_shows_the_rest(tokenizer, recwarn):
    tokenizer.encode(["word " * 75])
    assert not recwarn
    with pytest.warns(UserWarning, match="2 tokens too many, cut off: 'green apples'"):
        ids, _ = tokenizer.encode(["word " * 75 + "green apples"])
    assert ids[0, 75] == ids[0, 1] and ids[0, 76] == 49407


TEDDY = {"<teddy>": "teddy bear"}


@pytest.mark.filterwarnings("ignore:the prompt has")
@pytest.mark.parametrize("words, prompt, plain, expected", [
    (TEDDY, "a photo of a <teddy>", "a photo of a teddy bear", [[[5, 6]]]),
    (TEDDY, "<teddy>'s friend is<teddy>", "teddy bear's friend is teddy bear", [[[1, 2], [6, 7]]]),
    (TEDDY, "nothing here", "nothing here", [[]]),
    ({"sks": "dog", "sks dog": "puppy"}, "a sks and a sks dog and sksy", "a dog and a puppy and sksy",
     [[[2]], [[5]]]),                                           # the longer one wins, no word is cut open
    ({"<a>": "a <b> toy", "<b>": "cat"}, "<a> <b>", "a <b> toy cat", [[[1, 2, 3, 4, 5]], [[6]]]),
    ({"<a>": "gleamingly café", "<b>": "cat"}, "İ 👩‍🚀 ＡÉ  <b>\t<a> <b>", "İ 👩‍🚀 ＡÉ  cat\tgleamingly café cat",
     [[[10, 11, 12, 13]], [[9], [14]]]),                        # what stands before is several tokens
    (TEDDY, "word " * 73 + "<teddy>", "word " * 73 + "teddy bear", [[[74, 75]]]),
    (TEDDY, "word " * 74 + "<teddy>", "word " * 74 + "teddy bear", [[]])])      # cut by truncation
def test_placeholders_become_their_words_and_are_found(tokenizer, words, prompt, plain, expected):
    ids, positions = tokenizer.encode([prompt], words)
    assert ids.equal(tokenizer.encode([plain])[0])
    assert positions == [dict(zip(words, expected))]


def test_an_ordinary_word_is_found_whole_and_in_any_case(tokenizer):
    prompt = "A Cat and a cat, concatenated; photorealistic"
    assert tokenizer.find(prompt, "cat") == [[2], [5]]
    assert tokenizer.find(prompt, "a cat") == [[1, 2], [4, 5]]
    found, = tokenizer.find(prompt, "photorealistic")
    assert "".join(tokenizer.tokens(tokenizer.encode([prompt])[0][0][found])) == "photorealistic"
    assert tokenizer.find(prompt, "dog") == []


@pytest.mark.parametrize("prompt, plain, said", [
    ("a {} (wearing a hat) (on) the beach", "a {} wearing a hat on the beach", "( )"),
    ("😀 a {} with «a hat»; 日本", "a {} with a hat", None), ("((((: {}, hat", "{}, hat", ": ("),
    ("a Café {}&hat", "a caf {} hat", "é &")])
def test_what_the_vocabulary_cannot_spell_is_left_out_and_named_once(prompt, plain, said):
    tokenizer = Tokenizer.load(ROOT / "tiny" / "weights" / "tokenizer", 48)
    with warnings.catch_warnings(record=True) as lines:
        warnings.simplefilter("always")
        for _ in range(2):
            ids, positions = tokenizer.encode([prompt.format("<teddy>")], TEDDY)
    assert len(lines) == 1 and str(lines[0].message).startswith("unknown to the vocabulary and left out: ")
    assert said is None or str(lines[0].message).endswith(f": {said}")
    assert ids.equal(tokenizer.encode([plain.format("<teddy>")], TEDDY)[0])
    assert positions[0]["<teddy>"] == tokenizer.find(prompt.format("teddy bear"), "teddy bear")
    hat, = tokenizer.find(prompt.format("teddy bear"), "hat")
    assert tokenizer.tokens(ids[0, hat]) == ["hat"] and tokenizer.end not in ids[0, :hat[-1]]


def test_words_of_characters_that_are_all_unknown_stand_nowhere():
    tokenizer = Tokenizer.load(ROOT / "tiny" / "weights" / "tokenizer", 48)
    with pytest.warns(UserWarning, match="left out"):
        assert tokenizer.encode(["a <t>"], {"<t>": "日本"})[1] == [{"<t>": []}]
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='the super-category "日本 ;" is empty'):
        perfusion.super_encoding(None, tokenizer, "日本 ;")


def test_encodings_and_their_gradient_equal_the_reference(reference, model):
    config = model.text_encoder.config
    ids = torch.randint(0, config.vocab_size - 2, (2, config.max_length))

    def theirs(embeddings):
        hook = reference.text_encoder.embeddings.token_embedding.register_forward_hook(lambda *_: embeddings)
        expected = reference.text_encoder(ids).last_hidden_state
        hook.remove()
        return expected
    embeddings = model.text_encoder.embed(ids)
    assert_parity(model.text_encoder, theirs, embeddings)
    assert theirs(embeddings).equal(reference.text_encoder(ids).last_hidden_state)
