"""Which architectures of the installed transformers are scanned exactly, and which are refused, and why.

    python -m tests.support.model_matrix            writes docs/models.md
    python -m tests.support.model_matrix llama opt  prints single families

Every architecture is built tiny and random (tiny_configs.py), scanned, and held against family_oracle.py.
"""

from __future__ import annotations

import re
import sys
import time
import traceback
import warnings
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from torch.overrides import TorchFunctionMode

import shipsfast
from shipsfast.models.anatomy import inspect_model
from tests.support import family_oracle
from tests.support.places import ROOT
from tests.support.tiny_configs import families, tiny_model

DOCUMENT = ROOT / "docs" / "models.md"
SHARED = [5, 9, 17, 23]
# Three lengths, a shared prefix, and two longer than the windows of the tiny models.
PROMPTS = [SHARED + [33, 8, 40, 41, 7, 12], SHARED + [7], SHARED + [33, 8, 11, 50, 51, 52, 9, 4]]
# Two of three lengths: what goes side by side, where prompts may not share a pack.
ABREAST = [*PROMPTS, [44, 3, 21, 60, 9, 9, 30, 2, 57, 41], [6, 19, 5, 27, 52]]
ANSWERS = [[3, 14], [33, 8, 12]]  # the second goes on like the first prompt
TOLERANCE_NATS = {torch.float64: 1e-10, torch.float32: 1e-5}
ROUNDED_NATS = 1e-6  # more than that is no rounding to float32 within a family
SHOWS_NATS = 1e-4  # the largest score of a model must be above this


@dataclass(frozen=True)
class Row:
    """status: exact, refused (by shipsfast), or unbuilt (transformers or its configuration, not shipsfast)."""

    family: str
    model: str
    status: str
    detail: str
    error_nats: float = float("nan")


def check(family: str) -> Row:
    """Build, scan and compare. Raises AssertionError for a wrong number."""
    try:
        model = tiny_model(family)
    except Exception as error:  # whatever a family's own code raises
        return Row(family, "", "unbuilt", _line(error))
    name = type(model).__name__
    try:
        result = shipsfast.scan(model, PROMPTS, progress=False)
    except shipsfast.UnsupportedModelError as error:
        return Row(family, name, "refused", _line(error))
    expected, error = _compare(family, model, PROMPTS, result)
    notes = []
    anatomy = inspect_model(model, PROMPTS[0], max(map(len, PROMPTS)))
    prompts = PROMPTS
    if anatomy.plain_sequences:
        notes.append("one prompt per pack")
        prompts, result = ABREAST, shipsfast.scan(model, ABREAST, progress=False)
        assert result.record["plan"]["prompt_groups"] == [2, 2, 1], f"{family}: not side by side"
        expected, abreast = _compare(family, model, prompts, result)
        error = max(error, abreast)
    if len(anatomy.blocks) > anatomy.num_layers:
        kept = [str(place) for place, block in enumerate(anatomy.blocks) if block.layer is not None]
        notes.append(f"attention in layers {', '.join(kept)} of {len(anatomy.blocks)}")
    if any(hasattr(layer.attention, "sinks") for layer in anatomy.layers):
        notes.append("sinks")
    if TOLERANCE_NATS[model.dtype] < error < ROUNDED_NATS:
        with WideCasts():  # what the family itself rounds to float32 hides what is asked for here
            expected, error = _compare(family, model, prompts, shipsfast.scan(model, prompts, progress=False))
        notes.append("its own casts to float32 lifted")
    assert error <= TOLERANCE_NATS[model.dtype], f"{family}: off by {error:.3g} nats"
    at_end = _at_end(family, model)
    if TOLERANCE_NATS[model.dtype] < at_end < ROUNDED_NATS:
        with WideCasts():
            at_end = _at_end(family, model)
    assert at_end <= TOLERANCE_NATS[model.dtype], f"{family}: at the end only, off by {at_end:.3g} nats"
    largest = float(expected.max())
    assert largest > SHOWS_NATS, f"{family}: no ablation shows, the largest score is {largest:.3g} nats"
    return Row(family, name, "exact", "; ".join(notes), error)


def _compare(family: str, model, prompts, result) -> tuple[torch.Tensor, float]:
    """The oracle's scores, and the largest difference of the scan's from them."""
    expected = family_oracle.ships(model, prompts)
    got = torch.as_tensor(result.kl)
    assert got.shape == expected.shape, f"{family}: scores {list(got.shape)}, oracle {list(expected.shape)}"
    assert torch.isfinite(got).all() and torch.isfinite(expected).all(), f"{family}: not finite"
    return expected, float((got - expected).abs().max())


def _at_end(family: str, model) -> float:
    """The largest difference of a scan along answers, with heads off at the end only, which must show, from the oracle's."""
    result = shipsfast.scan(model, PROMPTS[:2], answers=ANSWERS, at="end", progress=False)
    reads = [p + a[:n] for p, a in zip(PROMPTS, ANSWERS, strict=False) for n in range(len(a))]
    expected = family_oracle.ships(model, reads, end=True)
    assert float(expected.max()) > SHOWS_NATS, f"{family}: no ablation at the end only shows"
    return float((torch.as_tensor(np.concatenate(result.by_token)) - expected).abs().max())


class WideCasts(TorchFunctionMode):
    """Casts to float32 become casts to float64: for families that compute routers or norms in float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in (kwargs or {}).items()}
        if func is torch.Tensor.float:
            return torch.Tensor.double(*args, **kwargs)
        if func in (torch.Tensor.to, torch.Tensor.type):
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        return func(*args, **kwargs)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


HEADER = """# Which models can be scanned

Every causal language model of transformers {version}, and every chat model that also takes images (scanned on text
alone), built tiny with random weights and scanned in {dtype}. `exact`: every score of every head and prompt agrees with
one plain forward pass per head and prompt, attention written out by the tests (`tests/support/family_oracle.py`), to
{tolerance:g} nats; so does every score along answers, with heads off at the end only. `refused`: shipsfast says why and gives no number. `unbuilt`: transformers could not build a tiny
model of it here, so nothing is known.

**{exact} exact, {refused} refused, {unbuilt} unbuilt.** `python -m tests.support.model_matrix` writes this page, and
`tests/models/test_families.py` fails if a line of it no longer holds.

- *its own casts to float32 lifted*: the family rounds something (a router, rotary embeddings) to float32 in float64
  models too, which moved scores by up to 1e-6 nats; held to the tolerance with these casts made float64.
- *one prompt per pack*: layers besides attention mix tokens (state space, convolution, linear attention), or look at
  places in a sequence. Prompts then share no pack, beginnings included, and the last layer runs at every token; those of
  one length go side by side, as rows of a batch (with `resample` one by one). `generate` goes through the model's own, a row at a
  time.
- *attention in layers ...*: the layers of scores are these; `run.json` names them (`layer_names`).
- *sinks*: a logit per head that joins the softmax's denominator (`s_aux`). `undifferentiated` scales q k^T, not the sink.

## Adapters, precision, quantisation

| | |
|---|---|
| PEFT: LoRA and other adapters inside the layers | scanned, generated and ablated with the adapter in force (`tests/models/test_wrapped_models.py`) |
| PEFT: a folder or repository with an adapter, on the command line | loaded onto its base model, recorded, part of the identity (`tests/models/test_adapters.py`); with `--stream` or without peft refused |
| PEFT: prompt learning | refused |
| torch.compile (the model or its layers), DataParallel, DistributedDataParallel | taken off, or run as they are; `ablate` wants `.module` where DataParallel has several devices |
| FSDP, tensor parallelism | refused: a process holds a part of each weight |
| attention functions or mask functions that are not transformers' own (registered, overwritten, patched) | refused by every call, with the `set_attn_implementation` that goes without them |
| a decoder layer whose attention is replaced by what calls no attention function | refused, naming it |
| hooks on hidden states | at every token alike: scanned as a part of the model; where they look at a token's place: one prompt per pack; where they look for the last token: each read of an answer is the end of a sequence of its own |
| int8 products on a CPU without VNNI (bitsandbytes LLM.int8, torchao with quantised activations) | refused, naming the layer: oneDNN adds them in 16 bits there, which overflow, and the model itself answers wrongly |
| `torch.ao.quantization.quantize_dynamic` | refused by scans and generation (a row depends on those beside it); goes on in `ablate` |
| GGUF: llama, qwen2, qwen3, phi3, gemma2, gemma3 | every weight and setting held against the model the file was made of (`tests/models/test_gguf.py`), with transformers 5.18 or newer; other architectures, and files with something that transformers would drop, are refused |
| image and text (`AutoModelForImageTextToText`) | loaded on the command line and scanned on text alone (`tests/models/test_with_images.py`); which families, the table below says |
| float64, float32, bfloat16, float16 | tested (`tests/engine/test_exactness.py`, `tests/models/test_wrapped_models.py`) |
| torchao int8 weight-only (`quantize_`), CPU | tested against brute force on the same quantised model (`tests/models/test_quantised.py`) |
| bitsandbytes 4 bit (nf4, fp4, twice quantised), CPU | tested likewise, with bitsandbytes 0.50; on processors with bfloat16 products its layers round to that whatever the model's dtype |
| bitsandbytes 8 bit, CPU | tested likewise, to rounding with `llm_int8_threshold=0`. With a threshold a row depends on the rows beside it, in any use of the model: scores carry that noise, and the noise floor shows it (4e-4 nats on a tiny model in bfloat16) |
| HQQ 4 and 8 bit, quanto int8, CPU | tested likewise where the library is installed; run with hqq 0.2.8 and optimum-quanto 0.2.7. quanto int4 does not run under torch's inference mode, and is refused |
| GPTQ, AWQ | not run: their library (gptqmodel 7.7) needs a newer torch than is supported. Layers go through their own modules, and nothing needs `nn.Linear` or a floating-point weight; a layer built as theirs is tested |

## Families

| model_type | class | result | largest error, nats | |
|---|---|---|---:|---|
"""


def document(rows: list[Row]) -> str:
    count = {status: sum(row.status == status for row in rows) for status in ("exact", "refused", "unbuilt")}
    head = HEADER.format(
        version=transformers.__version__, dtype="float64", tolerance=TOLERANCE_NATS[torch.float64], **count
    )
    return head + "".join(
        f"| {row.family} | {row.model} | {row.status} | "
        f"{f'{row.error_nats:.0e}' if row.status == 'exact' else ''} | {row.detail.replace('|', '/')} |\n"
        for row in rows
    )


def committed() -> dict[str, str]:
    """family -> result, as docs/models.md has it."""
    lines = DOCUMENT.read_text().split("## Families")[1].splitlines()[4:]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("|")]
    return {cell[1]: cell[3] for cell in cells}


def committed_version() -> str:
    """The transformers that docs/models.md is about."""
    return re.search(r"model of transformers (\S+?),", DOCUMENT.read_text())[1]


def main(names: list[str]) -> None:
    unknown = set(names) - set(families())
    if unknown:
        sys.exit(f"{', '.join(sorted(unknown))}: not among the model_types that transformers has for text")
    rows, wrong = [], 0
    for family in names or families():
        start = time.perf_counter()
        try:
            row = check(family)
            text = f"{row.status:8} {row.model} {row.error_nats:.1e} {row.detail}"
            rows.append(row)
        except Exception:  # of any family: told in full, the others go on, and the exit status says so
            text, wrong = "WRONG", wrong + 1
            traceback.print_exc()
        print(f"{family:24} {time.perf_counter() - start:5.2f} s {text}", flush=True)
    if not names and not wrong:
        DOCUMENT.write_text(document(rows))
    sys.exit(wrong > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)  # nothing here is large enough for two
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    main(sys.argv[1:])
