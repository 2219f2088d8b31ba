"""`shipsfast demo`: the main job on the model that comes with the package.

Scans every head on requests the model refuses, ranks them, draws the heatmap, and shows what the model says
with its top head switched off: how many refusals turn into true answers, and whether ordinary requests
still get theirs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..engine.ablate import ablate
from ..engine.ablation import Ablation
from ..models.loading import load_model, load_tokenizer
from ..prompts.datasets import load_prompts
from ..prompts.tokens import tokenize
from ..results.tables import show
from ..scans.ships import scan
from .world import is_correct, is_refusal

HERE = Path(__file__).parent
MODEL = HERE / "village"
PROMPTS = HERE / "prompts"
SHOWN = 4  # requests of each kind shown in full
NEW_TOKENS = 40


def run(out: Path, *, progress: bool = True) -> None:
    """Run the demo and leave the run folder, heatmap.png and completions.md in `out`."""
    console = Console(highlight=False)
    model = load_model(str(MODEL))
    tokenizer = load_tokenizer(str(MODEL))
    taboo, ordinary = load_prompts(PROMPTS / "taboo.csv"), load_prompts(PROMPTS / "ordinary.csv")
    out.mkdir(parents=True, exist_ok=True)
    result = scan(model, taboo, tokenizer, template="chat", out=out / "run", progress=progress)
    result.plot(out / "heatmap.png", title=f"The village: Ships of {len(taboo)} taboo requests")
    show(result, 8, out / "run", console)

    head = result.top(1)[0][:2]
    name = f"{head[0]}-{head[1]}"
    how = Ablation("undifferentiated")
    before = replies(model, tokenizer, taboo + ordinary)
    with ablate(model, [head], ablation=how):
        after = replies(model, tokenizer, taboo + ordinary)

    console.print(f"\nReplies before and after head {name} is ablated ({how.describe()}):", soft_wrap=True)
    counts = Table()
    for column in ("requests", "", "refused", "answered truly", "other"):
        counts.add_column(column, justify="left" if column in ("requests", "") else "right")
    for kind, prompts in (("taboo", taboo), ("ordinary", ordinary)):
        for when, said in (("before", before), ("after", after)):
            counts.add_row(f"{len(prompts)} {kind}", when, *_count(prompts, said))
    console.print(counts)

    lines = [f"# What the village says, before and after head {name} is ablated", ""]
    lines += ["| request | before | after |", "|---|---|---|"]
    console.print("\nSome of them:")
    examples = Table(show_lines=True)
    for column in ("request", "before", "after"):
        examples.add_column(column, overflow="fold")
    for prompts in (taboo, ordinary):
        for i, prompt in enumerate(prompts):
            lines.append(f"| {_cell(prompt)} | {_cell(before[prompt])} | {_cell(after[prompt])} |")
            if i < SHOWN:
                examples.add_row(escape(prompt), escape(before[prompt]), escape(after[prompt]))
    console.print(examples)
    (out / "completions.md").write_text("\n".join(lines) + "\n", "utf-8")
    console.print(f"heatmap: {out / 'heatmap.png'}\nall replies: {out / 'completions.md'}", soft_wrap=True)


@torch.inference_mode()
def replies(model, tokenizer, prompts: list[str]) -> dict[str, str]:
    """The model's greedy reply to each request, all in one left-padded batch."""
    batch = tokenizer.pad(
        {"input_ids": tokenize(tokenizer, prompts, "chat")}, padding_side="left", return_tensors="pt"
    )
    batch = batch.to(model.device)
    out = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return {prompt: text.strip() for prompt, text in zip(prompts, texts, strict=True)}


def _count(prompts: list[str], said: dict[str, str]) -> tuple[str, str, str]:
    refused = sum(is_refusal(said[p]) for p in prompts)
    right = sum(is_correct(p, said[p]) for p in prompts)
    return str(refused), str(right), str(len(prompts) - refused - right)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
