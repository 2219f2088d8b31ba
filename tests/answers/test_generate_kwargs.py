"""Settings for the model's own `generate`: each has its effect on every row, whatever goes through beside it, or is refused."""

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria

import shipsfast
from shipsfast.demo.run import MODEL
from shipsfast.demo.run import PROMPTS as FILES
from shipsfast.models.loading import load_model, load_tokenizer
from shipsfast.prompts.datasets import load_prompts
from shipsfast.prompts.tokens import tokenize
from tests.support.speaking_models import NEW, build

# Of different lengths, so that a batch of them would be padded.
PROMPTS = [[5, 6, 7, 8, 9, 10], [5, 6, 9], [11], [7, 6, 9], [5, 6, 7, 8, 9, 10, 12, 13]]
GROUPS = [[], [(0, 1)], [(1, 2), (2, 3)]]


@pytest.fixture(scope="module")
def model():
    return build("llama-gqa")


def generate(model, prompts=PROMPTS, **given):
    how = dict(groups=GROUPS, max_new_tokens=NEW, eos_token_id=2, progress=False)
    return shipsfast.generate(model, prompts, **how, generate_kwargs=given or None)


class LongEnough(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 9)


class OnlyOne(StoppingCriteria):
    """Says the same of all rows, as criteria for a single row do."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), bool(input_ids[0, -1] % 2))


class Parity(LogitsProcessor):
    """Rules out what the number of different tokens says: padding would count among them."""

    def __call__(self, input_ids, scores):
        for row, seen in zip(scores, input_ids.tolist(), strict=True):
            row[len(set(seen)) % 2 :: 2] = -torch.inf
        return scores


def odd_or_even(batch_id, input_ids):
    return list(range(3 + batch_id % 2, 60, 2))


@pytest.mark.parametrize(
    "given",
    [
        {"stopping_criteria": [LongEnough()]},
        {"stopping_criteria": [OnlyOne()]},
        {"logits_processor": [Parity()]},
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 2},
        {"prefix_allowed_tokens_fn": odd_or_even},
    ],
    ids=lambda given: next(iter(given)),
)
def test_a_row_does_not_depend_on_its_company(model, given):
    together = generate(model, **given)
    alone = [generate(model, [ids], **given) for ids in PROMPTS]
    assert together == [[rows[g][0] for rows in alone] for g in range(len(GROUPS))]
    assert together != generate(model)


def test_a_row_ends_where_its_criterion_says(model):
    """And is no longer, with no end-of-sequence token to cut it at either."""
    plain = shipsfast.generate(
        model, PROMPTS, groups=GROUPS, max_new_tokens=NEW, eos_token_id=[], progress=False
    )
    cut = shipsfast.generate(
        model, PROMPTS, groups=GROUPS, max_new_tokens=NEW, eos_token_id=[], progress=False,
        generate_kwargs={"stopping_criteria": [LongEnough()]},
    )  # fmt: skip
    for whole, part in zip(plain, cut, strict=True):
        wanted = [text[: max(1, 9 - len(ids))] for ids, text in zip(PROMPTS, whole, strict=True)]
        assert part == wanted


def test_stop_strings():
    """On the embedded model, whose tokenizer is one that stop strings can be found in. Its texts are whole sentences."""
    model, tokenizer = load_model(str(MODEL)), load_tokenizer(str(MODEL))
    prompts = load_prompts(FILES / "taboo.csv")[:2]
    how = dict(groups=[[], [(0, 2)]], max_new_tokens=12, template="chat", progress=False)
    plain = shipsfast.generate(model, prompts, tokenizer, **how)
    given = {"stop_strings": [" the"], "tokenizer": tokenizer}
    cut = shipsfast.generate(model, prompts, tokenizer, **how, generate_kwargs=given)
    ended = [[text[: text.find(" the") + 4] if " the" in text else text for text in row] for row in plain]
    assert cut == ended != plain
    # Theirs is the tokenizer of the texts, unless another is given.
    assert (
        shipsfast.generate(model, prompts, tokenizer, **how, generate_kwargs={"stop_strings": [" the"]})
        == cut
    )
    (ids,) = tokenize(tokenizer, prompts[:1], "chat")
    with shipsfast.ablate(model, [(0, 2)]):
        text = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, **given)
    assert tokenizer.decode(text[0, len(ids) :], skip_special_tokens=True) == cut[1][0]


def test_stop_strings_without_a_tokenizer_are_refused(model):
    with pytest.raises(
        shipsfast.InputError, match="generate_kwargs has stop_strings, and there is no tokenizer"
    ):
        generate(model, stop_strings=["the"])


def test_assisted_decoding_says_the_same(model):
    assert generate(model, prompt_lookup_num_tokens=2) == generate(model)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("attention_mask", torch.ones(1, 3), "the prompts say it"),
        ("input_ids", torch.ones(1, 3), "the prompts say it"),
        ("num_return_sequences", 2, "give the prompt several times"),
        ("return_dict_in_generate", True, "only texts come back"),
        ("max_new_tokens", 3, "a keyword of its own"),
        ("eos_token_id", 5, "a keyword of its own"),
        ("max_time", 1.0, "how fast this machine is"),
    ],
)
def test_what_cannot_be_given_is_refused_by_name(model, name, value, why):
    with pytest.raises(shipsfast.InputError, match=f"generate_kwargs has {name}.*{why}"):
        generate(model, **{name: value})


def test_one_return_sequence_is_what_there_is(model):
    assert generate(model, num_return_sequences=1) == generate(model)


@pytest.mark.parametrize(
    "given",
    [
        {"no_such_setting": 3},
        {"repetition_penalty": -1.0},
        {"early_stopping": 7},
        {"cache_implementation": "none"},
    ],
)
def test_what_transformers_does_not_take_is_one_line(model, given):
    with pytest.raises(
        shipsfast.InputError, match=rf"generate_kwargs \({next(iter(given))}\) cannot be used"
    ) as error:
        generate(model, **given)
    assert "\n" not in str(error.value)
