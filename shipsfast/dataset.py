"""Dataset-level Ships: how far a head turns the subspace that a set of prompts spans (arXiv 2410.13708, eq. 11).

The growing batch hands out every row's last-position hidden states after the final norm; of all rows together
subspaces.py takes the angles. Hidden states of a block of rows at all P prompts are kept until then, which the
memory plan counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from . import runs
from .ablation import DEFAULT_SCALE, Ablation, Head
from .checks import check_hidden, longest_prompt, plain_hidden
from .clock import seconds_since
from .errors import InputError
from .grams import ROOM as GRAMS
from .grams import Grams
from .nonfinite import explain, refuse_base
from .out_of_memory import OutOfMemory, once_more
from .packing import PackedPrompts
from .plain_text import counted
from .prepared import Prepared, prepare, run_blocks
from .results import HEAD_COLUMNS, SubspaceResult, stability_json
from .subspaces import check_rank, gram_matrices, leading_subspace, singular_values, subspace_angle_deg
from .untouched import untouched


@untouched
def scan_dataset(
    model: PreTrainedModel,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    tokenizer=None,
    *,
    rank: int = 1,
    template: str = "none",
    ablation: str | Ablation = "undifferentiated",
    scale: float = DEFAULT_SCALE,
    heads: Iterable[Sequence[int | None]] | None = None,
    unit: str = "head",
    backend: str = "auto",
    layers: str = "auto",
    out: str | Path | None = None,
    progress: bool = True,
    max_memory: int | None = None,
    chunk_tokens: int | None = None,
    rows_per_block: int | None = None,
    prompts_per_group: int | None = None,
) -> SubspaceResult:
    """Switch off every head, one at a time, and measure how far the prompts' hidden states turn.

    Dataset-level Ships of arXiv 2410.13708, eq. 11: X [P, hidden] holds each prompt's hidden state at its last
    position, after the final norm; the score is the sum of the `rank` principal angles between the spans of the
    first `rank` left singular vectors of X with and without the head, in degrees, computed in float64.

    Time grows as in `scan`, linearly with P; the angles add about 4 n^2 max(P, hidden) operations and a singular value
    decomposition of size n = min(P, hidden) for each head, in float64: 4 ms a head for P = 100 and hidden 640 on
    two cores, growing with P^2 and then P^3. For `stability` of the result each head's Gram matrix [P, P] is kept, as
    long as all of them take 256 MiB or less (180 prompts for 1,024 heads).

    Args:
        rank: r, below P: with r = P both spans are all of R^P, and every angle is 0. All others: as in `scan`.
    Returns:
        SubspaceResult with .angle_deg float64 [L, H], NaN for heads not in `heads`.
    Raises:
        InputError: as `scan`, and for a rank that the prompts cannot have.
        UnsupportedModelError: the model cannot be scanned exactly.
    """
    started = time.perf_counter()
    prepared = prepare(
        "subspace", model, prompts, tokenizer, template=template, ablation=ablation, scale=scale, heads=heads,
        unit=unit, backend=backend, layers=layers, max_memory=max_memory, chunk_tokens=chunk_tokens,
        rows_per_block=rows_per_block, prompts_per_group=prompts_per_group, keep_hidden=True,
    )  # fmt: skip
    rank = check_rank(rank, len(prepared.token_ids), prepared.anatomy.hidden_size)
    prepared.identity["rank"] = rank
    shape = tuple(prepared.identity["shape"][1:])
    angles, folder = np.full(shape, np.nan), None
    if out is not None:
        folder = runs.RunFolder(out, prepared.identity, prepared.record)
        found = folder.finished(SubspaceResult.load, (runs.SCORES, GRAMS))
        if found is not None:
            return found
        angles = runs.read_scores(folder.path, shape, HEAD_COLUMNS, "angle_deg")
        prepared.continue_plan(folder)
        prepared.record["plan"] = prepared.plan.to_json()
        folder.write_manifest(folder.previous_measures() | prepared.record | {"status": "running"})
    grams = Grams.empty(len(prepared.token_ids), shape)
    if grams is not None and folder is not None:
        grams = grams.read(folder.path, HEAD_COLUMNS)

    def keep(part: np.ndarray, units: list[Head]) -> None:
        if folder is not None:
            frames = {runs.SCORES: runs.score_frame(part, HEAD_COLUMNS, "angle_deg")}
            if grams is not None:
                frames[GRAMS] = grams.part(HEAD_COLUMNS, units)
            folder.write_parts(frames, plan=prepared.plan.to_json())

    missing = [u for u in prepared.units if np.isnan(angles[u])]
    steps = prepared.layer_passes(prepared.units, missing, len(prepared.plan.prompt_groups))
    with tqdm(
        total=steps,
        desc="scan-dataset",
        unit=" layer passes",
        unit_scale=True,
        disable=not progress or not steps,
    ) as bar:
        angular = AngleScan(prepared, rank, bar, folder, None if grams is None else grams.base)
        angular.run(angles, prepared.units, (), keep, None if grams is None else grams.heads)
        angular.complete()
    record = prepared.record | angular.record() | {"seconds": seconds_since(started)}
    result = SubspaceResult(angles, angular.noise_floor, record, prepared.identity, grams)
    record["concentration"] = result.concentration().to_json()
    if folder is not None:
        record["rank_stability"] = stability_json(result, 10)
        folder.write_manifest(record | {"status": "complete", "noise_floor": angular.noise_floor})
    return result


# The unablated model's subspace in a run folder: a run that goes on measures against the very same numbers.
BASIS, BASIS_COLUMNS = "basis", ("prompt", "vector")


class AngleScan:
    """Angles of many units on top of a group that is already off, against the unablated model."""

    def __init__(
        self,
        prepared: Prepared,
        rank: int,
        bar,
        folder: runs.RunFolder | None,
        base_gram: np.ndarray | None = None,
    ) -> None:
        """base_gram: [P, P], to be filled with the unablated model's Gram matrix."""
        self.prepared, self.rank, self.bar, self.folder, self.base_gram = (
            prepared,
            rank,
            bar,
            folder,
            base_gram,
        )
        self.basis = None if folder is None else self._read_basis()  # [P, r], of the unablated model
        before = folder.previous_measures() if folder else {}
        # Whether the packed model has been held against its own forward pass.
        self.checked = "noise_floor" in before and folder.same_environment
        self.singular_values: list[float] = before.get("base_singular_values", [])
        self.noise_floor: float = before.get("noise_floor", 0.0)
        self.parent_angle = 0.0  # of the group that was off in the last block
        self._packs: dict[tuple[int, ...], tuple[PackedPrompts, object]] = {}

    def run(
        self,
        angles: np.ndarray,
        units: Sequence[Head],
        parent: tuple[Head, ...],
        keep: Callable[[np.ndarray, list[Head]], None],
        grams: np.ndarray | None = None,
    ) -> None:
        """Fill in angles [L, H], and grams [L, H, P, P] if given, of `units` with `parent` off as well.

        keep(part, units) is called with what was missing of each block.
        """
        while True:
            try:
                run_blocks(
                    self.prepared,
                    units,
                    lambda: [u for u in units if np.isnan(angles[u])],
                    lambda block: self._block(block, parent, angles, keep, grams),
                    self.bar,
                )
                return
            except OutOfMemory:
                groups = self.prepared.plan.prompt_groups
                if all(len(g) == 1 for g in groups):
                    raise
                halves = [h for g in groups for h in (g[: len(g) // 2], g[len(g) // 2 :]) if h]
                self.prepared.plan = self.prepared.plan.regrouped(halves, self.prepared.tree_ids)
                self._packs = {}

    def record(self) -> dict:
        """What the run folder keeps of it."""
        return {"plan": self.prepared.plan.to_json(), "base_singular_values": self.singular_values}

    def _block(
        self, block: list[Head], parent: tuple[Head, ...], angles: np.ndarray, keep: Callable, grams
    ) -> None:
        # The basis is that of the first block of all, so that a run that was interrupted gets the same.
        first = self.prepared.blocks(self.prepared.units, self.prepared.units)[0]
        own = not parent and list(block) == list(first)
        if not own and not self._has_basis():
            self._begin(self._hidden(first, ()), first)
        hidden = self._hidden(block, parent)  # [1 + units, P, hidden]
        if own and not self._has_basis():
            self._begin(hidden, block)
        self._check_finite(hidden, block, parent)
        found = subspace_angle_deg(self.basis, hidden).cpu().numpy()
        self.parent_angle = float(found[0])
        # Before any angle is taken: what runs out of memory here is done again.
        matrices = None if grams is None else gram_matrices(hidden[1:]).cpu().numpy()
        part, new = np.full_like(angles, np.nan), [unit for unit in block if np.isnan(angles[unit])]
        for at, unit in enumerate(block):
            if np.isnan(angles[unit]):
                part[unit] = found[1 + at]
                if matrices is not None:
                    grams[unit] = matrices[at]
        keep(part, new)
        for unit in new:
            angles[unit] = part[unit]

    def complete(self) -> None:
        """Bring back a basis that was damaged in the folder while no angle was missing."""
        if not self._has_basis():
            first = self.prepared.blocks(self.prepared.units, self.prepared.units)[0]
            what = "taking the unablated model's subspace"
            once_more(what, lambda: self._begin(self._hidden(first, ()), first))

    def _has_basis(self) -> bool:
        without = self.base_gram is not None and np.isnan(self.base_gram).any()
        return self.basis is not None and self.checked and not without

    def _begin(self, hidden: torch.Tensor, block: list[Head]) -> None:
        """Take the basis from the first block's hidden states, if the folder has none, and make the checks."""
        self._check_finite(hidden, block, ())
        if self.basis is None:
            self._set_basis(hidden[0])
        if self.base_gram is not None:
            self.base_gram[:] = gram_matrices(hidden[:1])[0].cpu().numpy()
        if not self.checked:
            self._check(hidden, block)
            self.checked = True

    def _check_finite(self, hidden: torch.Tensor, block: list[Head], parent: tuple[Head, ...]) -> None:
        bad = (~torch.isfinite(hidden).flatten(1).all(1)).nonzero().flatten().tolist()
        if bad:
            self._refuse(hidden[bad[0]], None if bad[0] == 0 else block[bad[0] - 1], parent)

    def _refuse(self, hidden: torch.Tensor, unit: Head | None, parent: tuple[Head, ...]) -> None:
        """Raises for hidden states [P, hidden] that are not finite, naming where it begins. They have no angle: one prompt
        that is none leaves no subspace, so that there is nothing to mark."""
        prepared = self.prepared
        prompt = int((~torch.isfinite(hidden)).any(-1).nonzero()[0])
        if unit is None and not parent:
            refuse_base(prepared, prompt, "the hidden states")
        *others, last = (*parent, unit) if unit is not None else parent
        place, base = explain(prepared, prompt, last, tuple(others))
        if base:
            refuse_base(prepared, prompt, "the hidden states")
        names = " and ".join(f"{layer}-{index}" for layer, index in (*others, last))
        raise InputError(
            f"the hidden states of {prepared.unit} {names} on prompt {prompt} are not numbers with "
            f"{prepared.how.describe()}: {place or 'a plain forward pass does not repeat it'}; use a smaller scale or a "
            "wider dtype"
        )

    def _hidden(self, block: list[Head], parent: tuple[Head, ...]) -> torch.Tensor:
        """Last-position hidden states after the final norm, [1 + units, P, hidden], of the parent and each unit."""
        out: list[torch.Tensor] = []
        for group in self.prepared.plan.prompt_groups:
            packed, values = self._packs.get(group) or self.prepared.pack(group)
            if self.prepared.how.kind != "resample":  # whose values take as much as many rows
                self._packs[group] = packed, values
            with self.prepared.wavefront(packed, self.bar.update) as wavefront:
                place = torch.as_tensor(wavefront.prompt_place)
                prompts = torch.as_tensor(group)

                def consume(rows: slice, hidden: torch.Tensor, _first, place=place, prompts=prompts) -> None:
                    if not out:
                        shape = (len(block) + 1, len(self.prepared.token_ids), hidden.shape[-1])
                        out.append(hidden.new_empty(shape))
                    out[0][rows, prompts.to(hidden.device)] = hidden[:, place.to(hidden.device)]

                wavefront.run(self.prepared.mask(block, values, parent), consume, hidden_states=True)
        return out[0]

    def _set_basis(self, base: torch.Tensor) -> None:
        values = singular_values(base)
        span = int((values > values[0] * max(base.shape) * 1e-14).sum())
        if self.rank > span:
            raise InputError(
                f"rank {self.rank} is more than the prompts have: their hidden states span "
                f"{counted(span, 'direction')} (duplicates add none); lower the rank or add prompts"
            )
        basis = leading_subspace(base[None], self.rank)[0]
        self.singular_values = values[: self.rank + 1].tolist()
        if self.folder is not None:
            frame = runs.score_frame(basis.cpu().numpy(), BASIS_COLUMNS, "value")
            self.folder.write_part(frame, BASIS, base_singular_values=self.singular_values)
        self.basis = basis

    def _read_basis(self) -> torch.Tensor | None:
        shape = (len(self.prepared.token_ids), self.rank)
        basis = runs.read_scores(self.folder.path, shape, BASIS_COLUMNS, "value", room=BASIS)
        return None if np.isnan(basis).any() else torch.from_numpy(basis).to(self.prepared.device)

    def _check(self, hidden: torch.Tensor, block: list[Head]) -> None:
        """The unablated model and one unit against plain forward passes; and the noise floor of the angles."""
        prepared = self.prepared
        prompt = longest_prompt(prepared, range(len(prepared.token_ids)))
        at = len(block) // 2
        check_hidden(prepared, prompt, block[at], hidden[0, prompt], hidden[1 + at, prompt])
        plain = plain_hidden(prepared, range(len(prepared.token_ids))).to(hidden.device)
        self.noise_floor = max(self.noise_floor, float(subspace_angle_deg(self.basis, plain[None])[0]))
        if self.folder is not None:  # before the first scores are
            self.folder.update(noise_floor=self.noise_floor, base_singular_values=self.singular_values)
