"""Generation under ablation against a slow loop: no cache, one row at a time, forward hooks on the model's modules."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import LogitsProcessor, LogitsProcessorList

import shipsfast
from shipsfast.engine.ablation import Ablation
from tests.support import hooks
from tests.support.model_state import assert_same, state
from tests.support.models import FAMILIES, VOCAB
from tests.support.speaking_models import NEW, build, slow

PROMPTS = [[5, 6, 7, 8, 9, 10], [5, 6, 9], [11], [5, 6, 7, 8, 9, 10, 12, 13], [5, 6, 9]]
GROUPS = [[], [(0, 1)], [(2, 0)], [(1, 2), (2, 3)], [(1, None)], [(0, 0), (2, 1)], [(2, 0)]]
HOOKED = ["llama-mha", "llama-gqa", "mistral-window", "qwen3-qknorm", "gemma2-softcap-window", "gpt2"]


@pytest.fixture(scope="module")
def texts():
    """Slow texts of a family, made once."""
    made: dict = {}

    def of(family, dtype=torch.float64):
        if (family, dtype) not in made:
            model = build(family, dtype)
            made[family, dtype] = [[slow(model, ids, group) for ids in PROMPTS] for group in GROUPS]
        return made[family, dtype]

    return of


def generate(model, prompts=PROMPTS, groups=GROUPS, **how):
    return shipsfast.generate(model, prompts, groups=groups, max_new_tokens=NEW, progress=False, **how)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("family", HOOKED)
def test_greedy_text_is_that_of_the_slow_loop(family, dtype, texts):
    expected = texts(family, dtype)
    assert len({str(row) for row in expected}) > 2, "the ablations change nothing: the test shows nothing"
    assert generate(build(family, dtype)) == expected


@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
@pytest.mark.parametrize("layers", ["fused", "model"])
def test_every_path_gives_that_text(backend, layers, texts):
    how = {} if layers == "model" else {"layers": "fused"}
    assert generate(build("llama-gqa"), backend=backend, **(how or {"layers": "model"})) == texts("llama-gqa")


@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
@pytest.mark.parametrize("family", ["mistral-window", "gemma2-softcap-window"])
def test_every_backend_sees_the_window(backend, family, texts):
    assert generate(build(family), backend=backend) == texts(family)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(HOOKED)))
def test_other_families_against_transformers(family):
    model = build(family)
    assert generate(model) == generate(model, engine="transformers")


@pytest.mark.parametrize("family", HOOKED)
def test_the_transformers_engine_gives_that_text(family, texts):
    assert generate(build(family), engine="transformers") == texts(family)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16])
def test_rows_that_come_and_go_give_that_text(rows, texts):
    assert generate(build("llama-gqa"), batch_rows=rows) == texts("llama-gqa")


@pytest.mark.parametrize("layers", ["model", "fused"])
def test_little_memory_gives_that_text(layers, texts):
    model = build("qwen3-qknorm")
    # Fused layers hold their weights side by side too, which is no room for rows.
    joined = sum(p.nbytes for p in model.model.layers.parameters()) if layers == "fused" else 0
    assert generate(model, max_memory=90_000 + joined, layers=layers) == texts("qwen3-qknorm")


@pytest.mark.parametrize(
    "kind", ["uniform", "scale", "zero", "head_mean_q", "head_mean_k", "head_mean_v", "mean"]
)
@pytest.mark.parametrize("family", ["llama-gqa", "qwen3-qknorm", "gpt2"])
def test_every_ablation(family, kind):
    model = build(family)
    values = hooks.mean_values(model, PROMPTS) if kind == "mean" else None
    expected = [
        [slow(model, ids, group, kind=kind, values=values) for ids in PROMPTS] for group in GROUPS[:4]
    ]
    assert generate(model, groups=GROUPS[:4], ablation=kind) == expected


def test_a_key_value_group_is_its_heads():
    model = build("llama-gqa")
    alone = generate(model, groups=[[(1, 2), (1, 3)]])
    assert generate(model, groups=[[(1, 1)]], unit="kv_group") == alone


@pytest.mark.parametrize("sample", [False, True])
def test_a_row_does_not_depend_on_its_company(sample):
    model = build("llama-gqa")
    how = {"do_sample": sample, "top_k": 5, "seed": 3}
    together = generate(model, **how)
    for g, group in enumerate(GROUPS[:6]):
        for p, ids in enumerate(PROMPTS[:4]):
            assert generate(model, [ids], [group], **how) == [[together[g][p]]]
    assert generate(model, PROMPTS[:4][::-1], GROUPS[:6][::-1], batch_rows=5, **how) == [
        row[:4][::-1] for row in together[:6][::-1]
    ]
    if sample:  # equal rows draw for themselves
        assert together[0][1] != together[0][4] or together[2][0] != together[6][0]
        assert generate(model, **(how | {"seed": 4})) != together
    else:
        assert together[2] == together[6] and [row[1] for row in together] == [row[4] for row in together]


@pytest.mark.parametrize(("top_k", "temperature"), [(5, 1.0), (3, 2.5), (0, 0.7)])
def test_draws_have_the_frequencies_of_the_distribution(top_k, temperature):
    model, count = build("llama-gqa"), 4000
    drawn = shipsfast.generate(
        model, [PROMPTS[0]] * count, groups=[[(1, 2)]], max_new_tokens=1, do_sample=True, top_k=top_k,
        temperature=temperature, eos_token_id=[], progress=False,
    )[0]  # fmt: skip
    logits = hooks.forward(model, PROMPTS[0], hooks.Off(((1, 2),), "undifferentiated")).logits[-1]
    top = logits.topk(top_k or VOCAB)
    expected = np.zeros(VOCAB)
    expected[top.indices] = torch.softmax(top.values / temperature, -1)
    found = np.bincount([tokens[0] for tokens in drawn], minlength=VOCAB)
    assert found[expected == 0].sum() == 0
    often = expected * count >= 5
    pooled = [np.append(x[often], x[~often].sum()) for x in (found, expected * count)]
    keep = pooled[1] > 0
    assert chisquare(pooled[0][keep], pooled[1][keep]).pvalue > 1e-4


def test_the_limit_and_the_end_token():
    model = build("llama-gqa")
    free = shipsfast.generate(
        model, PROMPTS, groups=GROUPS, max_new_tokens=20, eos_token_id=[], progress=False
    )
    assert all(len(text) == 20 for row in free for text in row)
    ends = {text[3] for row in free for text in row}
    cut = shipsfast.generate(
        model, PROMPTS, groups=GROUPS, max_new_tokens=20, eos_token_id=sorted(ends), progress=False
    )
    for row, whole in zip(cut, free, strict=True):
        for text, full in zip(row, whole, strict=True):
            stop = next(i for i, token in enumerate(full) if token in ends)
            assert text == full[:stop]


def test_rows_that_end_at_once_make_room():
    """What comes in then starts without a step in between, and shares nothing with a row of another prompt."""
    model, prompts = build("llama-gqa"), [[3], [31], [7]]
    expected = [slow(model, ids, []) for ids in prompts]
    assert expected[1] == [] and expected[0][0] == expected[2][0] and expected[0] != expected[2]
    for rows in (1, 2, 3):
        assert generate(model, prompts, [[]], batch_rows=rows) == [expected]


class Forbid(LogitsProcessor):
    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        scores[:, self.tokens] = -float("inf")
        return scores


def test_a_logits_processor_goes_through_transformers():
    model = build("llama-gqa")
    said = sorted({token for row in generate(model) for text in row for token in text})[:10]
    other = generate(model, generate_kwargs={"logits_processor": LogitsProcessorList([Forbid(said)])})
    assert not any(token in said for row in other for text in row for token in text)
    with pytest.raises(shipsfast.InputError, match="engine 'continuous' takes no generate_kwargs"):
        generate(model, engine="continuous", generate_kwargs={"num_beams": 2})


def test_settings_that_come_with_the_model_do_not_count(texts):
    model = build("llama-gqa")
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    model.generation_config.eos_token_id = 2
    assert generate(model) == texts("llama-gqa")
    assert generate(model, engine="transformers") == texts("llama-gqa")
    assert model.generation_config.repetition_penalty == 5.0


@pytest.mark.parametrize("engine", ["continuous", "transformers"])
def test_the_model_is_left_as_it_was(engine):
    model = build("llama-gqa")
    model.train()
    before = state(model)
    generate(model, engine=engine)
    assert_same(before, state(model))


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
@pytest.mark.parametrize("where", ["decode_attention", "LayerCall"])
def test_the_model_is_left_as_it_was_after_an_exception(monkeypatch, error, where):
    model = build("gpt2")
    before = state(model)

    def fail(*_args, **_kwargs):
        raise error

    if where == "LayerCall":
        monkeypatch.setattr("shipsfast.models.layer_call.LayerCall.of", fail)
    else:
        monkeypatch.setattr("shipsfast.engine.decoder.decode_attention", fail)
    with pytest.raises(type(error)):
        generate(model)
    assert_same(before, state(model))


def test_out_of_memory_starts_rows_anew_with_fewer(monkeypatch, texts):
    from shipsfast.ops.decode_attention import decode_attention

    model, real, calls = build("llama-gqa"), decode_attention, []

    def sometimes(*args, **kwargs):
        calls.append(len(args[1]))
        if len(args[1]) > 8 and len(calls) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr("shipsfast.engine.decoder.decode_attention", sometimes)
    assert generate(model) == texts("llama-gqa")
    assert max(calls) > 8 and calls[-1] <= 8


def test_strings_go_in_and_out():
    from shipsfast.demo.run import MODEL, replies
    from shipsfast.demo.run import PROMPTS as FOLDER
    from shipsfast.models.loading import load_model, load_tokenizer

    model, tokenizer = load_model(str(MODEL)), load_tokenizer(str(MODEL))
    prompts = shipsfast.load_prompts(FOLDER / "taboo.csv")[:6]
    out = shipsfast.generate(
        model, prompts, tokenizer, groups=[[], [(0, 2)]], max_new_tokens=40, template="chat", progress=False
    )
    before = replies(model, tokenizer, prompts)
    with shipsfast.ablate(model, [(0, 2)]):
        after = replies(model, tokenizer, prompts)
    assert [t.strip() for t in out[0]] == [before[p] for p in prompts]
    assert [t.strip() for t in out[1]] == [after[p] for p in prompts]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": [[(0, 1), (0, 1)]]}, "group 0 names head 0-1 twice"),
        ({"groups": [[], [(0, None), (0, 1)]]}, "group 1 names head 0-1 twice"),
        ({"groups": [[], [(7, 0)]]}, "group 1: head 7-0 does not exist"),
        ({"groups": []}, "there are no groups"),
        ({"groups": 3}, "groups must be a list"),
        ({"groups": [(0, 1)]}, "group 0 is a single head: groups is a list of lists"),
        ({"groups": [[], ["ab"]]}, "group 1: head 'ab' is not a"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": 60}, "leaves no room for 60 new tokens"),
        ({"do_sample": True, "top_k": VOCAB + 1}, f"top_k is {VOCAB + 1}, and the model's vocabulary has {VOCAB}"),
        ({"do_sample": True, "temperature": 0}, "temperature must be a positive number"),
        ({"do_sample": True, "temperature": 10**400}, "temperature must be a positive number"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 2**63}, "seed must be at most 4,611,686,018,427,387,904, got more"),
        ({"batch_rows": 0}, "batch_rows must be a whole number"),
        ({"ablation": Ablation("resample", prompts=[[1, 2]])}, "prompt 0 has 6 tokens|cannot|resample"),
        ({"engine": "fast"}, "unknown engine 'fast'"),
        ({"max_memory": 1000}, "needs"),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_one_line(change, message):
    how = {"max_new_tokens": NEW, "groups": GROUPS, "progress": False} | change
    with pytest.raises(shipsfast.InputError, match=message) as error:
        shipsfast.generate(build("llama-gqa"), PROMPTS, **how)
    assert "\n" not in str(error.value)


def test_nobody_names_an_end_token():
    model = build("llama-gqa")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    with pytest.raises(
        shipsfast.InputError, match="neither the model nor the tokenizer names an end-of-sequence"
    ):
        generate(model)
    assert generate(model, eos_token_id=2) == generate(build("llama-gqa"))
