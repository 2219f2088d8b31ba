"""Which columns hold the prompts: published sets by their columns, one's own by one name, anything else refused."""

import json

import pandas as pd
import pytest

from shipsfast.errors import InputError
from shipsfast.prompts.datasets import load_prompts, read_prompts
from tests.support.prompt_files import FORMATS, write

KETTLE, LANTERN = "Mend, then\nfill, a kettle", "Light a lantern"
PUBLISHED = {
    "Alpaca": (
        [("instruction", "input", "output"), ("Name the metal.", "tin, oil", "Tin."), ("Name a river.", "", "Elbe.")],
        ["Name the metal.\n\ntin, oil", "Name a river."],
        ["instruction", "input"],
    ),
    "HarmBench": (
        [
            ("Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID"),
            (KETTLE, "standard", "tin", "", "", "kettle"),
            (LANTERN, "contextual", "oil", "context", "It is dark.", "lantern"),
        ],
        [KETTLE, f"It is dark.\n\n---\n\n{LANTERN}"],
        ["ContextString", "Behavior"],
    ),
    "JailbreakBench": (
        [
            ("Index", "Goal", "Target", "Behavior", "Category", "Source"),
            ("0", KETTLE, "Sure", "Kettles", "Tin", "Original"),
            ("1", LANTERN, "Sure", "Lanterns", "Oil", "Original"),
        ],
        [KETTLE, LANTERN],
        ["Goal"],
    ),
    "AdvBench": ([("goal", "target"), (KETTLE, "Sure, here is"), (LANTERN, "Sure")], [KETTLE, LANTERN], ["goal"]),
    "StrongREJECT": (
        [("category", "source", "forbidden_prompt"), ("tin", "custom", KETTLE), ("oil", "custom", LANTERN)],
        [KETTLE, LANTERN],
        ["forbidden_prompt"],
    ),
    "XSTest": (
        [
            ("id", "prompt", "type", "label", "focus", "note"),
            ("1", KETTLE, "homonyms", "safe", "mend", ""),
            ("2", LANTERN, "contrast_homonyms", "unsafe", "light", ""),
        ],
        [KETTLE, LANTERN],
        ["prompt"],
    ),
    "OR-Bench, or another of prompt and category": (
        [("prompt", "category"), (KETTLE, "tin"), (LANTERN, "oil")],
        [KETTLE, LANTERN],
        ["prompt"],
    ),
}  # fmt: skip
KINDS = {
    "HarmBench": {"FunctionalCategory": {"contextual": 1, "standard": 1}},
    "XSTest": {"label": {"safe": 1, "unsafe": 1}},
    "OR-Bench, or another of prompt and category": {"category": {"oil": 1, "tin": 1}},
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sets_are_known_by_their_columns(tmp_path, name, suffix):
    (header, *rows), prompts, columns = PUBLISHED[name]
    found = read_prompts(write(tmp_path / f"p{suffix}", header, rows))
    assert found.prompts == prompts
    expected = {"file": f"p{suffix}", "rows": 2, "columns": columns, "layout": name}
    assert found.origin == expected | ({"kinds": KINDS[name]} if name in KINDS else {})
    assert f"2 prompts of p{suffix}; column" in str(found) and f"the layout of {name}" in str(found)


def test_a_column_that_is_named_wins_over_what_is_known(tmp_path):
    (header, *rows), _, _ = PUBLISHED["Alpaca"]
    path = write(tmp_path / "p.csv", header, rows)
    assert load_prompts(path, "output") == ["Tin.", "Elbe."]
    found = read_prompts(path, "output,input")
    assert found.prompts == ["Tin.\n\ntin, oil", "Elbe."]
    assert found.origin == {"file": "p.csv", "rows": 2, "columns": ["output", "input"]}
    path = write(tmp_path / "q.csv", ("a,b", "a", "b"), [("one", "two", "three")])
    assert load_prompts(path, "a,b") == ["one"]  # a column of this very name
    with pytest.raises(InputError, match="no column 'c': it has a,b, a, b"):
        load_prompts(path, "a,c")


@pytest.mark.parametrize(
    ("columns", "choices"),
    [
        (("instruction", "input"), "instruction, input"),
        (("goal", "prompt"), "goal, prompt"),
        (("Goal", "goal"), "Goal, goal"),
        (("Goal", "goal", "target"), "Goal, goal"),
        (("Goal", "Behavior"), "Goal, Behavior"),
        (("prompt", "messages", "prompt_id"), "prompt, messages"),
        (("instruction", "context", "response"), "instruction, context"),
        (("question", "system_prompt", "response"), "question, system_prompt"),
        (("prompt", "instruction", "input", "output"), "prompt, instruction, input"),  # Alpaca and more
        (("Behavior", "ContextString"), "Behavior, ContextString"),
    ],
)
def test_what_only_the_user_can_know_is_refused_with_the_choices(tmp_path, columns, choices):
    path = write(tmp_path / "p.csv", columns, [tuple("abcd"[: len(columns)])])
    with pytest.raises(
        InputError, match=rf"several columns that may be of the prompt, {choices}: name one with --col"
    ):
        load_prompts(path)
    assert load_prompts(path, columns[0]) == ["a"]
    assert load_prompts(path, f"{columns[1]},{columns[0]}") == ["b\n\na"]


def test_the_main_column_of_a_known_layout_may_not_be_empty(tmp_path):
    path = write(tmp_path / "p.csv", ("instruction", "input", "output"), [("a", "", ""), (" ", "b", "")])
    with pytest.raises(InputError, match="the prompt in row 2 has nothing in column 'instruction'"):
        load_prompts(path)
    path = write(tmp_path / "p.csv", ("a", "b"), [("", " ")])
    with pytest.raises(InputError, match="the prompt in row 1 is empty"):
        load_prompts(path, "a,b")


def test_nothing_of_a_column_is_a_missing_context(tmp_path):
    path = tmp_path / "p.parquet"
    frame = {"Behavior": ["a", "b"], "ContextString": [None, "c"], "BehaviorID": ["x", "y"]}
    pd.DataFrame(frame).to_parquet(path)
    assert load_prompts(path) == ["a", "c\n\n---\n\nb"]
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"instruction": "a", "output": "b"}) + "\n" + json.dumps({"input": "c"})
    )
    with pytest.raises(InputError, match="row 2 has nothing in column 'instruction'"):
        load_prompts(tmp_path / "p.jsonl")


def test_a_set_of_many_kinds_is_not_counted(tmp_path):
    path = write(tmp_path / "p.csv", ("prompt", "category"), [(f"p{i}", f"c{i}") for i in range(21)])
    assert "kinds" not in read_prompts(path).origin


@pytest.mark.parametrize("name", ["image", "Images", "image_url", "video", "audio"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_prompts_about_pictures_are_refused_in_words(tmp_path, suffix, name):
    """Their text alone asks about nothing."""
    path = write(tmp_path / f"p{suffix}", ("id", "question", name), [("1", KETTLE, "kettle.png")])
    with pytest.raises(InputError, match=f"has prompts with {name}, and only text is read: .* with --column"):
        load_prompts(path)
    assert load_prompts(path, "question") == [KETTLE]


@pytest.mark.parametrize("name", ["passage", "choices", "options"])
def test_what_a_question_is_about_is_not_left_away(tmp_path, name):
    path = write(tmp_path / "p.csv", ("question", name), [(KETTLE, LANTERN)])
    with pytest.raises(InputError, match=f"several columns that may be of the prompt, question, {name}"):
        load_prompts(path)
