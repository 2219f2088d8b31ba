"""What shipsfast says of a real chat model, held against plain passes with hooks: one prompt, one head at a time, no cache."""

import copy
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import shipsfast
from tests.support.command_line import run
from tests.support.hooks import Off, Oracle, forward, kl_nats

from .conftest import PROMPTS

pytestmark = [pytest.mark.real, pytest.mark.serial, pytest.mark.timeout(600)]

LAYERS, HEADS = 30, 9
# Drawn once; with the first and last layer, and 18-8, which stands far above the others.
SAMPLE = ((0, 1), (3, 7), (7, 2), (18, 8), (24, 0), (29, 3))
AT = (slice(None), *np.transpose(SAMPLE))


def plain_ships(model, ids):
    """Of the heads of SAMPLE, float64 [P, heads], nats."""
    oracle = Oracle(model, ids, "undifferentiated")
    pairs = [list(zip(oracle.passes(), oracle.passes([head]), strict=True)) for head in SAMPLE]
    return np.array([[kl_nats(a.logits[-1], b.logits[-1]) for a, b in both] for both in pairs]).T


@pytest.fixture(scope="module")
def exact(wide, ids):
    return plain_ships(wide, ids)


def test_the_model_is_what_it_says(scanned):
    assert scanned.kl.shape == (len(PROMPTS), LAYERS, HEADS)
    assert scanned.record["model"]["kv_heads"] == 3
    assert np.isfinite(scanned.kl).all()
    assert scanned.top(1)[0][:2] == (18, 8)


def test_scan_in_float32(model, ids, scanned, exact):
    """As near to float64 as plain passes in float32 are: their largest relative error, twice."""
    plain = np.abs(plain_ships(model, ids) - exact) / exact
    assert np.max(np.abs(scanned.kl[AT] - exact) / exact) <= 2 * plain.max()


def test_scan_in_float64(wide, ids, exact):
    """transformers' norms round to float32 in float64 models too, so that two ways to the same number differ by that."""
    result = shipsfast.scan(wide, ids, heads=SAMPLE, progress=False)
    np.testing.assert_allclose(result.kl[AT], exact, rtol=2e-5)


def test_scan_in_float64_to_the_end(wide, ids):
    """With norms that do not round, every step is in float64."""
    model = copy.deepcopy(wide)
    for layer in model.model.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, _norm(getattr(layer, name)))
    model.model.norm = _norm(model.model.norm)
    result = shipsfast.scan(model, ids, heads=SAMPLE, progress=False)
    np.testing.assert_allclose(result.kl[AT], plain_ships(model, ids), rtol=1e-10)


def _norm(rounding):
    norm = torch.nn.RMSNorm(rounding.weight.shape, eps=rounding.variance_epsilon, dtype=torch.float64)
    norm.weight = rounding.weight
    return norm.eval()


def test_top_heads_of_a_screen_in_bfloat16(model, tokenizer, scanned):
    found = shipsfast.top_heads(
        model, list(PROMPTS), tokenizer, 5, template="chat", screen="bfloat16", progress=False
    )
    assert [h[:2] for h in found.heads] == [h[:2] for h in scanned.top(5)]
    np.testing.assert_allclose([h.score for h in found.heads], [h.score for h in scanned.top(5)], rtol=1e-4)
    bounded = ~np.isnan(found.upper)
    assert (
        found.certificate.unscored == bounded.sum() > 200 and (found.upper >= scanned.mean())[bounded].all()
    )


def test_dataset_level_scan(model, wide, ids):
    result = shipsfast.scan_dataset(model, ids, heads=SAMPLE, rank=2, progress=False)
    oracle = Oracle(wide, ids, "undifferentiated")
    exact = [oracle.angle_deg([head], 2) for head in SAMPLE]
    np.testing.assert_allclose(result.angle_deg[AT[1:]], exact, rtol=1e-3)


def test_sahara(wide, ids):
    """Two steps of the search among the heads of SAMPLE."""
    result = shipsfast.sahara(wide, ids, heads=SAMPLE, group_size=2, progress=False)
    oracle = Oracle(wide, ids, "undifferentiated")
    group: list = []
    for step in range(2):
        angles = oracle.angles_deg(1, parent=group, among=[h for h in SAMPLE if h not in group])
        np.testing.assert_allclose(result.angle_deg[step], angles, rtol=1e-4)
        group.append(np.unravel_index(np.nanargmax(angles), angles.shape))
    assert result.heads == [tuple(map(int, head)) for head in group]


NEAR = 1e-3  # two logits so near may change places by rounding


def test_generation_under_ablation(model, tokenizer, ids):
    """Against a loop that runs the whole text anew for each token."""
    groups, limit = [[], [(7, 2)], [(7, 2), (24, 0)]], 12
    texts = shipsfast.generate(
        model, ids[:2], groups=groups, max_new_tokens=limit, eos_token_id=tokenizer.eos_token_id
    )
    for group, answers in zip(groups, texts, strict=True):
        for prompt, answer in zip(ids, answers, strict=False):
            said: list[int] = []
            while len(said) < limit:
                logits = forward(model, [*prompt, *said], Off(tuple(group), "undifferentiated")).logits[-1]
                token = int(logits.argmax())
                if token == tokenizer.eos_token_id:
                    assert answer == said
                    break
                if len(said) < len(answer) and answer[len(said)] != token:
                    assert logits[token] - logits[answer[len(said)]] < NEAR
                    break
                said.append(token)
            else:
                assert answer == said


def test_bfloat16_agrees_with_float32(model, scanned, ids):
    """1,080 scores. What was seen: 9 of the first ten, Spearman 0.994."""
    result = shipsfast.scan(copy.deepcopy(model).bfloat16(), ids, progress=False)
    narrow, wide = result.mean().ravel(), scanned.mean().ravel()
    both = set(np.argsort(-narrow)[:10]) & set(np.argsort(-wide)[:10])
    assert len(both) >= 8
    assert spearmanr(narrow, wide).statistic >= 0.98
    # What it says of its own error, from a dozen scores, is what all of them show.
    true = np.abs(result.kl - scanned.kl) / scanned.kl
    assert result.error.against == "float32"
    assert result.error.relative["median"] / 3 <= np.median(true) <= 3 * result.error.relative["median"]
    assert result.error.relative["max"] >= np.quantile(true, 0.7)


def test_a_head_at_rest(model, ids):
    """18-8 looks at the first token alone and gives the same everywhere: made to look around it breaks most, and else is not
    missed."""
    kinds = ["undifferentiated", "zero", "mean"]
    found = shipsfast.scan(model, ids, heads=SAMPLE, ablation=kinds, progress=False)
    sinks = found.sink_mass
    assert sinks.at_rest[18, 8] and sinks.first_token[18, 8] > 0.999 and sinks.varies[18, 8] < 1e-3
    assert found.top(1)[0][:2] == (18, 8) and found.mean()[18, 8] > 0.5
    assert found.by_ablation["zero"].mean()[18, 8] < 0.01 and found.by_ablation["mean"].mean()[18, 8] < 1e-6


def test_on_the_command_line(capsys, gguf, scanned, tmp_path):
    """The file as it is, the prompts in a file, the chat template unasked."""
    (tmp_path / "mild.txt").write_text("\n".join(PROMPTS))
    heads = ",".join(f"{layer}-{head}" for layer, head in SAMPLE)
    status, out, _ = run(
        capsys,
        "scan",
        gguf,
        tmp_path / "mild.txt",
        "--heads",
        heads,
        "--json",
        "-q",
        "--out",
        tmp_path / "run",
    )
    found = json.loads(out)["record"]
    assert status == 0 and found["template"] == "chat"
    assert found["model"]["gguf"]["file"] == gguf.name and "Q4_1" in str(found["model"]["gguf"])
    np.testing.assert_allclose(shipsfast.load(tmp_path / "run").kl[AT], scanned.kl[AT], rtol=1e-3)


CHILD = """
import sys
from shipsfast.models.loading import load_model
from tests.real.test_smollm2 import _scan_in_parts
_scan_in_parts(load_model(sys.argv[1], dtype="float32"), eval(sys.argv[3]), sys.argv[2])
"""


def _scan_in_parts(model, ids, out):
    heads = [(layer, None) for layer in range(20, LAYERS)]
    return shipsfast.scan(model, ids, heads=heads, rows_per_block=10, out=out, progress=False)


def test_resume_after_a_kill(gguf, model, ids, tmp_path):
    whole = _scan_in_parts(model, ids, tmp_path / "whole")
    killed = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(gguf), str(killed), str(ids)])
    until = time.monotonic() + 300
    while not list((killed / "scores").glob("*.parquet")) and child.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    before = len(list((killed / "scores").glob("*.parquet")))
    assert 0 < before < len(list((tmp_path / "whole" / "scores").glob("*.parquet")))
    np.testing.assert_array_equal(_scan_in_parts(model, ids, killed).kl, whole.kl)
