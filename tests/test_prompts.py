"""Prompt files in every form users bring, and templates."""

import json

import pandas as pd
import pytest

from shipsfast.errors import InputError
from shipsfast.prompts import load_prompts, to_token_ids, tokenize

TEXTS = ["How do I mend a kettle?", 'Say "hello",\nplease', "Ünïcode & <tags>"]


@pytest.mark.parametrize("column", ["input", "Goal", "PROMPT", "query", "Behavior"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_columns_are_found_in_any_case(tmp_path, suffix, column):
    frame = pd.DataFrame({"id": [1, 2, 3], column: TEXTS})
    path = tmp_path / f"p.{suffix}"
    if suffix == "csv":
        frame.to_csv(path, index=False, encoding="utf-8-sig", lineterminator="\r\n")
    elif suffix == "jsonl":
        path.write_text(
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in frame.to_dict("records")), "utf-8"
        )
    else:
        frame.to_parquet(path)
    assert [" ".join(t.split()) for t in load_prompts(path)] == [" ".join(t.split()) for t in TEXTS]


def test_the_named_column_wins(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("goal,other\na,b\nc,d\n")
    assert load_prompts(path, "other") == ["b", "d"]
    assert load_prompts(path) == ["a", "c"]


def test_text_files_hold_one_prompt_a_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufefffirst\r\n\r\nsecond, with comma\n".encode())
    assert load_prompts(path) == ["first", "second, with comma"]


def test_csv_keeps_text_as_it_is(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("prompt\n007\nNA\n1e5\n")
    assert load_prompts(path) == ["007", "NA", "1e5"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"", "is empty"),
        ("p.csv", b"prompt\n", "holds no prompts"),
        ("p.csv", b"a,b\n1,2\n", "no column named .* it has a, b"),
        ("p.csv", b"prompt\nx\n\"\"\ny\n", "row 2 is empty"),
        ("p.csv", b"prompt\n\xff\xfe\n", "not UTF-8"),
        ("p.jsonl", b"{\"prompt\": \"x\"}\nnonsense\n", "not JSON lines"),
        ("p.jsonl", b"[1]\n", "JSON object"),
        ("p.jsonl", b"{\"prompt\": 3}\n", "row 1 is empty"),
        ("p.txt", b"\n\n", "holds no prompts"),
        ("p.txt", b"\xff\xfe", "not UTF-8"),
        ("p.parquet", b"not parquet", "cannot be read as parquet"),
        ("p.xlsx", b"x", "is not a prompt file"),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_prompts(path)
    assert str(path) in str(error.value)


def test_missing_file_and_column(tmp_path):
    with pytest.raises(InputError, match="no prompt file at"):
        load_prompts(tmp_path / "absent.csv")
    path = tmp_path / "p.csv"
    path.write_text("goal\nx\n")
    with pytest.raises(InputError, match="no column 'text': it has goal"):
        load_prompts(path, "text")


class Tokenizer:
    """Words to numbers; begins every text with 1, as tokenizers with a start token do."""

    chat_template = "yes"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [len(word) for word in text.split()]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return f"<s> user {messages[0]['content']} reply"


def test_templates():
    tok = Tokenizer()
    assert tokenize(tok, ["ab c"]) == [[1, 2, 1]]
    assert tokenize(tok, ["ab c"], "chat") == [[3, 4, 2, 1, 5]]
    assert tokenize(tok, ["ab c"], "query-answer") == [[1, 2, len("Query:ab"), 1, 2, len("Answer:")]]
    assert tokenize(tok, ["a {b}"], "x {prompt} yy") == [[1, 1, 1, 3, 2]]
    with pytest.raises(InputError, match="unknown template 'chatty'"):
        tokenize(tok, ["a"], "chatty")
    tok.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        tokenize(tok, ["a"], "chat")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        ("text", "single string"),
        (["a", " "], "prompt 1 is empty"),
        ([[1], []], "prompt 1 has no tokens"),
        ([[1], "a"], "prompt 1 is neither"),
        ([3], "prompt 0 is neither"),
        (["a"], "tokenizer is needed"),
    ],
)
def test_bad_prompts(prompts, message):
    with pytest.raises(InputError, match=message):
        to_token_ids(prompts, None if message.startswith("tokenizer") else Tokenizer())
