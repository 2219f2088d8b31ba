"""`shipsfast bench`."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

from .options import Backend, Column, Device, Dtype, Json, Limit, MaxMemory, ModelName, Quiet, Template

PromptFile = Annotated[
    str | None, typer.Argument(help="Prompts, as for scan; random tokens where there are none.")
]
Seconds = Annotated[
    float, typer.Option(help="What the timed scan may take, roughly; heads are sampled for it.")
]


def bench(
    model: ModelName,
    prompts: PromptFile = None,
    seconds: Seconds = 20.0,
    template: Template = "auto",
    column: Column = None,
    limit: Limit = None,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    device: Device = None,
    max_memory: MaxMemory = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure how fast MODEL scans here, how near that is to what the device can do, and what holds it back."""
    from ..prompts.datasets import load_prompts, sample_prompts
    from .options import quiet_transformers

    texts = None if prompts is None else sample_prompts(load_prompts(prompts, column), limit, None, 0)
    quiet_transformers()
    from ..engine.memory_plan import parse_bytes
    from ..models.loading import load_model, load_tokenizer
    from ..scans.bench import bench as run

    memory = None if max_memory is None else parse_bytes(max_memory)
    tokenizer = None if texts is None else load_tokenizer(model)
    if template == "auto":
        template = "chat" if getattr(tokenizer, "chat_template", None) else "none"
    result = run(
        load_model(model, dtype=dtype, device=device), texts, tokenizer, template=template, backend=backend,
        max_memory=memory, seconds=seconds, progress=not quiet,
    )  # fmt: skip
    print(json_module.dumps(result.to_json(), indent=1) if json else result.render())
