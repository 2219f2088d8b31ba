"""A text ends at every token that model, tokenizer or chat template name as an end, not only at the first to name one."""

import pytest
from tokenizers import AddedToken

import shipsfast
from shipsfast.answers.end_tokens import find_end_tokens
from shipsfast.prompts.end_of_turn import end_of_turn
from tests.support.evaluations import make_tokenizer
from tests.support.models import VOCAB
from tests.support.speaking_models import NEW, build

TURNS = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <|im_end|> ' }}{% endfor %}"
PARTS = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] + ' <|im_end|> ' }}{% endfor %}{% endfor %}"


def tokenizer(template=None):
    made = make_tokenizer()
    made.add_tokens([AddedToken("<|im_end|>", special=True)])
    made.chat_template = template
    return made


@pytest.mark.parametrize("template", [TURNS, PARTS], ids=["text", "parts"])
def test_the_template_names_its_end_of_turn(template):
    made = tokenizer(template)
    assert end_of_turn(made) == made.convert_tokens_to_ids("<|im_end|>")


def test_the_first_special_token_ends_the_turn():
    """What a template writes behind it begins the next one."""
    made = tokenizer(TURNS.replace("<|im_end|> ", "<|im_end|> <|im_start|> "))
    made.add_tokens([AddedToken("<|im_start|>", special=True)])
    assert end_of_turn(made) == made.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ messages[0]['content'] }}",
        "{{ raise_exception('users only') }}",
        "{% for m in messages %}{{ m['content'] + ' said.' }}{% endfor %}",
        "<|im_end|> {{ messages[1]['content'] }}",
    ],
)
def test_templates_that_name_none(template):
    assert end_of_turn(tokenizer(template)) is None


def test_all_that_are_named_count():
    model, made = build("llama-gqa"), tokenizer(TURNS)
    model.generation_config.eos_token_id = [7, 8]
    model.config.eos_token_id = 9
    model.resize_token_embeddings(len(made))
    wanted = {7, 8, 9, made.eos_token_id, made.convert_tokens_to_ids("<|im_end|>")}
    assert find_end_tokens(model, made, None, len(made)) == wanted
    # A token beyond the model's vocabulary is never said.
    assert find_end_tokens(model, made, None, 9) == {t for t in wanted if t < 9}
    assert find_end_tokens(model, made, 5, VOCAB) == {5}


def test_a_text_ends_where_only_the_template_says():
    """The model says its own end of turn, which neither its config nor its tokenizer calls an end."""
    model = build("llama-gqa")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    (text,) = shipsfast.generate(
        model, [[5, 6, 7]], groups=[[]], max_new_tokens=NEW, eos_token_id=[], progress=False
    )[0]
    made = make_tokenizer()
    turn = made.convert_ids_to_tokens(text[3])
    made.add_special_tokens({"extra_special_tokens": [turn]})
    made.chat_template = TURNS.replace("<|im_end|>", turn)
    prompt = made.decode([5, 6, 7])
    (said,) = shipsfast.generate(model, [prompt], made, groups=[[]], max_new_tokens=NEW, progress=False)[0]
    assert said == made.decode(text[: text.index(text[3])], skip_special_tokens=True)
