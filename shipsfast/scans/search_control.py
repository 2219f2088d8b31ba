"""What a group of heads does to ordinary prompts: the control of a search.

    control KL of a group G on prompt c = KL(p(base) || p(G off)) of the token after c, in nats

Like angles it is taken of many heads at once, on top of a group that is already off, and always against the unablated
model. KL and not the angle of the control's own subspace: see docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import NoReturn

import numpy as np
import torch

from ..engine.heads import Head
from ..errors import InputError, UnsupportedModelError
from ..models.forward import alarm
from ..ops.divergences import kl_rows
from ..results.sahara import KL
from ..runs.folder import RunFolder
from ..runs.identity import prompt_hashes
from ..runs.kinds import CONTROL, CONTROL_COLUMNS
from ..runs.tables import read_scores, score_frame
from .control import of_the_control
from .measurements import ScanMeasurement
from .nonfinite import check_base_logits, explain
from .prepare import Prepared, prepare, run_by_prompts
from .scan_bar import ScanBar
from .self_check import ablated_outputs, longest_prompt, own_layers_hint, packing_noise_nats, plain_outputs

PLAN, NOISE = "control_plan", "control_noise_floor"  # in run.json


class Ordinary(ScanMeasurement):
    """The heads of a search on its control prompts."""

    kind = "control"


class ControlScan:
    """KL in nats of a search's groups on its control prompts, and the run folder that keeps it.

    kl_nats: float64 [..., C, L, H]; prepared: the control prompts; judged: the prompts of the search.
    """

    def __init__(self, judged: Prepared, tokenizer, shape: tuple[int, ...]) -> None:
        """shape: of the groups that heads are added to. Raises InputError for control prompts that cannot be."""
        measurement, how = judged.measurement, judged.how
        if how.kind == "resample" and len(how.prompts) > 1:
            raise InputError(
                "ablation resample takes outputs from one prompt for each, and control prompts have none of their own: give "
                "one prompt for all, or leave control (--control) out"
            )
        own = {f.name: getattr(measurement, f.name) for f in fields(Ordinary)}
        try:
            ordinary = Ordinary(**own | {"prompts": measurement.control})
            self.prepared = prepare(judged.model, tokenizer, ordinary, judged.execution)
        except InputError as error:
            raise of_the_control(error) from error
        self.judged, self.folder = judged, None
        self.kl_nats = np.full((*shape, len(self.prepared.token_ids), *self.prepared.grid), np.nan)
        self.noise_floor, self.checked = 0.0, False
        self._packed: tuple | None = None  # the prompts at hand, their pack, and values
        self._unablated: torch.Tensor | None = None  # their next-token logits [U, V]
        judged.record |= self.record() | {"control_prompting": self.prepared.record["prompting"]}

    def identity(self) -> dict:
        """What the identity of a run says of it, beside the penalty."""
        return {"control": {"prompts": prompt_hashes(self.prepared.token_ids)}}

    def record(self) -> dict:
        """What the run folder keeps of it."""
        noise = {NOISE: self.noise_floor} if self.checked else {}
        return {PLAN: self.prepared.plan.to_json()} | noise

    def go_on(self, folder: RunFolder) -> None:
        """Read what the folder holds of an unfinished run, and go on as it was cut."""
        self.folder, before = folder, folder.previous_measures()
        self.kl_nats = read_scores(folder.path, self.kl_nats.shape, CONTROL_COLUMNS, KL, room=CONTROL)
        self.noise_floor = before.get(NOISE) or 0.0
        self.checked = NOISE in before and folder.same_environment
        self.prepared.continue_plan(folder, PLAN)
        self.judged.record |= self.record()

    def mean(self, at: tuple[int, ...]) -> np.ndarray:
        """Over the prompts, float64 [L, H]."""
        return self.kl_nats[at].mean(0)

    @property
    def layer_passes(self) -> int:
        """(row, layer) steps of one group with every head more: the unit of progress."""
        prepared = self.prepared
        return prepared.layer_passes(prepared.units, prepared.units, len(prepared.plan.prompt_groups))

    def run(self, at: tuple[int, ...], units: Iterable[Head], parent: tuple[Head, ...], bar: ScanBar) -> None:
        """Fill in what is missing at `at`, of `units` with `parent` off as well."""
        units, nats = list(units), self.kl_nats[at]
        run_by_prompts(
            self.prepared,
            units,
            lambda together: [u for u in units if np.isnan(nats[list(together), *u]).any()],
            lambda block, together: self._block(at, block, parent, together, bar),
            bar,
        )

    def take(self, at: tuple[int, ...], known: dict[Head, tuple[int, ...]]) -> None:
        """known: units whose groups were scored before, and where."""
        part = np.full_like(self.kl_nats[at], np.nan)
        for unit, (*place, layer, index) in known.items():
            part[:, *unit] = self.kl_nats[*place, :, layer, index]
        self._keep(at, part)

    def _block(
        self,
        at: tuple[int, ...],
        block: Sequence[Head],
        parent: tuple[Head, ...],
        together: tuple[int, ...],
        bar: ScanBar,
    ) -> None:
        self.prepared.share_means(self.judged)
        if not self.checked:
            self._check()
        nats = self._nats(block, parent, together, bar)
        bad = np.argwhere(~np.isfinite(nats))
        if len(bad):
            self._refuse(together[bad[0][1]], block[bad[0][0]], parent)
        part = np.full_like(self.kl_nats[at], np.nan)
        for unit, row in zip(block, nats, strict=True):
            part[list(together), *unit] = row
        self._keep(at, part)

    def _keep(self, at: tuple[int, ...], part: np.ndarray) -> None:
        """What is missing of `part` [C, L, H]. To the disk first: what runs out of memory or disk here is still missing."""
        new = ~np.isnan(part) & np.isnan(self.kl_nats[at])
        if not new.any():
            return
        if self.folder is not None:
            whole = np.full_like(self.kl_nats, np.nan)
            whole[at][new] = part[new]
            self.folder.write_part(score_frame(whole, CONTROL_COLUMNS, KL), CONTROL, **self.record())
        self.kl_nats[at][new] = part[new]

    def _nats(
        self, block: Sequence[Head], parent: tuple[Head, ...], together: tuple[int, ...], bar: ScanBar
    ) -> np.ndarray:
        """float64 [units, prompts packed together]."""
        prepared = self.prepared
        if self._packed is None or self._packed[0] != together:
            self._packed, self._unablated = (together, *prepared.pack(together)), None
        _, packed, values = self._packed
        # With a parent, row 0 is what the others fork from, and not what they are compared with. The unablated model then has
        # a pass of its own, so that a run that goes on has the same logits to the last bit.
        if parent and self._unablated is None:
            with prepared.growing_batch(packed) as batch:
                batch.run(prepared.mask([], values), self._see_unablated)
        base = [self._unablated] if parent else []
        found: list[torch.Tensor] = []

        def consume(_rows: slice, logits: torch.Tensor, first: torch.Tensor) -> None:
            if not base:
                base.append(first)
            index = torch.arange(len(first), device=logits.device).repeat(len(logits))
            found.append(kl_rows(base[0], logits.flatten(0, 1), index).view(len(logits), -1))

        with prepared.growing_batch(packed, bar.update) as batch:
            batch.run(prepared.mask(block, values, parent), consume)
        check_base_logits(prepared, together, batch.prompt_place, base[0])
        return torch.cat(found)[1:].cpu().numpy()[:, batch.prompt_place]

    def _see_unablated(self, _rows: slice, _logits: torch.Tensor, first: torch.Tensor) -> None:
        self._unablated = first

    def _refuse(self, prompt: int, unit: Head, parent: tuple[Head, ...]) -> NoReturn:
        place, _ = explain(self.prepared, prompt, unit, parent)
        names = " and ".join(f"{layer}-{index}" for layer, index in (*parent, unit))
        raise InputError(
            f"the KL of {self.prepared.unit} {names} on control prompt {prompt} is not a finite number with "
            f"{self.prepared.how.describe()}: {place or 'a plain forward pass does not repeat it'}; use a smaller scale or a "
            "wider dtype"
        )

    def _check(self) -> None:
        """The unablated model and one unit, on the longest prompt, against plain forward passes; and the noise floor."""
        prepared = self.prepared
        prompt = longest_prompt(prepared, range(len(prepared.token_ids)))
        unit = prepared.units[len(prepared.units) // 2]
        together = next(group for group in prepared.plan.prompt_groups if prompt in group)
        packed, values = prepared.pack(together)
        seen: list[torch.Tensor] = []
        with prepared.growing_batch(packed) as batch:
            at = int(batch.prompt_place[together.index(prompt)])
            batch.run(
                prepared.mask([unit], values),
                lambda _rows, logits, _first: seen.extend(logits[:, at].clone()),
            )
        base, off = seen
        plain = plain_outputs(prepared, prompt, 1)[None][0].to(base.device)
        try:
            noise = packing_noise_nats(prepared, prompt, plain, base)
        except UnsupportedModelError as error:
            raise of_the_control(error) from error
        plain_off, plain_base = ablated_outputs(prepared, prompt, [unit])[None]
        got, expected = _kl(base, off), _kl(plain_base, plain_off)
        absolute, relative = alarm(prepared.model)
        if np.isfinite(got) and not abs(got - expected) <= absolute + relative * abs(expected):
            raise UnsupportedModelError(
                f"the KL of {prepared.unit} {unit[0]}-{unit[1]} on control prompt {prompt} is {got:.6g}, a plain forward pass "
                f"gives {expected:.6g}: {type(prepared.model).__name__} cannot be scanned exactly{own_layers_hint(prepared)}"
            )
        self.noise_floor, self.checked = max(self.noise_floor, noise), True
        if self.folder is not None:  # before the first scores are
            self.folder.update(**self.record())


def _kl(base: torch.Tensor, other: torch.Tensor) -> float:
    """KL(base || other) of logits [V]."""
    row = torch.zeros(1, dtype=torch.long, device=base.device)
    return kl_rows(base[None], other[None].to(base.dtype), row).item()
