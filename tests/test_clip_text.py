"""Tokenizer and text transformer equal those of transformers; words are found where the ids are."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from clip_text import Tokenizer
from models import assert_parity

# prompts, and strings of words, scripts, emoji, white space and rarities at random -> transformers' ids
GOLDEN = json.loads((Path(__file__).parent / "data" / "tokenizer_golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer.load(tokenizer_folder)


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_prompts_and_random_strings_have_the_ids_of_the_reference(tokenizer):
    ids, _ = tokenizer.encode(list(GOLDEN))
    assert ids.dtype == torch.long and ids.shape == (len(GOLDEN), 77)
    assert ids.tolist() == [(golden + [49407] * 77)[:77] for golden in GOLDEN.values()]


def test_a_long_prompt_is_truncated_with_a_warning_that_shows_the_rest(tokenizer):
    with pytest.warns(UserWarning, match="2 tokens too many, cut off: 'green apples'"):
        ids, _ = tokenizer.encode(["word " * 75 + "green apples"])
    assert ids[0, 75] == ids[0, 1] and ids[0, 76] == 49407
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.encode(["word " * 75])


def test_a_placeholder_becomes_its_words_and_is_found(tokenizer):
    prompts = ["a photo of a <teddy>", "<teddy>'s friend is<teddy>", "nothing here"]
    ids, positions = tokenizer.encode(prompts, {"<teddy>": "teddy bear"})
    plain = ["a photo of a teddy bear", "teddy bear's friend is teddy bear", "nothing here"]
    assert ids.equal(tokenizer.encode(plain)[0])
    assert positions == [{"<teddy>": [[5, 6]]}, {"<teddy>": [[1, 2], [6, 7]]}, {"<teddy>": []}]
    bear = tokenizer.encode(["teddy bear"])[0][0, 1:3]
    assert all(row[indices].equal(bear) for row, found in zip(ids, positions) for indices in found["<teddy>"])


def test_words_of_several_tokens_accents_and_emoji_do_not_shift_positions(tokenizer):
    words = {"<a>": "photorealistic gleamingly café", "<b>": "cat"}
    ids, [positions] = tokenizer.encode(["İ 👩‍🚀 ＡÉ  <b>\t<a> <b>"], words)
    for placeholder, text in words.items():
        expected = [i for i in tokenizer.encode([text])[0][0].tolist()[1:] if i != 49407]
        assert all(ids[0, indices].tolist() == expected for indices in positions[placeholder])
    assert len(positions["<a>"]) == 1 and len(positions["<b>"]) == 2


def test_of_two_placeholders_the_longer_one_wins_and_words_are_not_cut_open(tokenizer):
    words = {"sks": "dog", "sks dog": "puppy"}
    ids, positions = tokenizer.encode(["a sks and a sks dog and sksy"], words)
    assert ids.equal(tokenizer.encode(["a dog and a puppy and sksy"])[0])
    assert positions == [{"sks": [[2]], "sks dog": [[5]]}]


def test_the_words_of_one_placeholder_are_not_searched_for_another(tokenizer):
    ids, positions = tokenizer.encode(["<a> <b>"], {"<a>": "a <b> toy", "<b>": "cat"})
    assert ids.equal(tokenizer.encode(["a <b> toy cat"])[0])
    assert positions[0]["<b>"] == [[6]]


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_an_occurrence_that_truncation_cuts_is_dropped(tokenizer):
    words = {"<teddy>": "teddy bear"}
    for filler, expected in ((73, [[74, 75]]), (74, []), (75, [])):
        _, [positions] = tokenizer.encode(["word " * filler + "<teddy>"], words)
        assert positions["<teddy>"] == expected


def test_an_ordinary_word_is_found_whole_and_in_any_case(tokenizer):
    prompt = "A Cat and a cat, concatenated; photorealistic"
    assert tokenizer.find(prompt, "cat") == [[2], [5]]
    assert tokenizer.find(prompt, "a cat") == [[1, 2], [4, 5]]
    found, = tokenizer.find(prompt, "photorealistic")
    assert "".join(tokenizer.tokens(tokenizer.encode([prompt])[0][0][found])) == "photorealistic"
    assert tokenizer.find(prompt, "dog") == []


def test_encodings_and_their_gradient_equal_the_reference(reference, model):
    ids = torch.randint(0, 512, (2, model.text_encoder.config.max_length))

    def theirs(embeddings):
        hook = reference.text_encoder.embeddings.token_embedding.register_forward_hook(lambda *_: embeddings)
        expected = reference.text_encoder(ids).last_hidden_state
        hook.remove()
        return expected
    embeddings = model.text_encoder.embed(ids)
    assert_parity(model.text_encoder, theirs, embeddings)
    assert theirs(embeddings).equal(reference.text_encoder(ids).last_hidden_state)
