"""The command direction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..scans.measurements import DirectionMeasurement
from .asked import Asked, check_place, taken
from .options import _option, command
from .shown import show_json

PromptsB = Annotated[str, typer.Argument(help="The prompts that PROMPTS are compared with, likewise.")]
File = Annotated[
    Path | None, typer.Option("--out", help="Write the direction of every layer here (safetensors).")
]
Layer = _option(DirectionMeasurement, "layer", least=0)
Position = _option(DirectionMeasurement, "position")
# No head is off, and there is no run folder.
NOT_HERE = ("out", "resume", "ablation", "scale", "source", "align", "unit", "layers")


@command(without=NOT_HERE)
def direction(
    asked: Asked, prompts_b: PromptsB, out: File = None, layer: Layer = None, position: Position = -1
):
    """Find the direction of MODEL's residual stream that tells PROMPTS from PROMPTS_B, after every layer.

    Difference of means, and how well each layer tells prompts apart that it was not made of. --limit and --sample take as many
    of both, --seed draws the halves too. The file goes into scan --metric projection:FILE.
    """
    from ..scans.direction import direction as run

    check_place(out)
    found = taken(
        prompts_b, asked.given["column"], asked.given["quiet"], "the prompts compared with", asked.choose
    )
    asked.prompts_from["prompts_b"] = found.origin
    result = asked.run(run, others=found.prompts, layer=layer, position=position)
    if out is not None:
        result.save(out)
    if asked.given["json"]:
        return show_json(result.as_json() | {"file": None if out is None else str(out)})
    result.show()
    if out is not None:
        print(f"direction: {out}")
