"""Angles of many heads at once, on top of a group that is already off: what dataset-level Ships and Sahara share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..engine.heads import Head
from ..errors import InputError
from ..memory import OutOfMemory, once_more
from ..ops.prefix_tree import PackedPrompts
from ..ops.subspaces import gram_matrices, leading_subspace, subspace_angle_deg
from ..results.gram_bootstrap import Grams
from ..runs.folder import RunFolder
from ..runs.kinds import BASIS, GRAMS, SCORES
from ..runs.tables import read_scores, score_frame
from ..text import counted
from .nonfinite import explain, refuse_base
from .prepare import Prepared, run_blocks
from .self_check import check_hidden, check_own_hidden, longest_prompt, plain_hidden, unpacked_outputs

# The unablated model's subspace in a run folder: a run that goes on measures against the very same numbers.
BASIS_COLUMNS = ("prompt", "vector")


class AngleStore:
    """Angles so far, float64 [..., L, H], their Gram matrices (None: too many), and their run folder."""

    def __init__(
        self, prepared: Prepared, folder: RunFolder | None, names: tuple[str, ...], shape: tuple[int, ...]
    ) -> None:
        """What the folder holds of an unfinished run is read, and the run goes on as it was cut.

        names: the columns that index the dimensions of `shape`.
        """
        self.prepared, self.folder, self.names = prepared, folder, names
        self.angles = np.full(shape, np.nan)
        self.before: dict = {}  # what an unfinished run has measured beside its angles
        if folder is not None:
            self.angles = read_scores(folder.path, shape, names, "angle_deg")
            self.before = folder.previous_measures()
            prepared.continue_plan(folder)
            prepared.record["plan"] = prepared.plan.to_json()
            folder.write_manifest(self.before | prepared.record | {"status": "running"})
        self.grams = Grams.empty(len(prepared.token_ids), shape)
        if self.grams is not None and folder is not None:
            self.grams.read(folder.path, names)

    def keep(self, at: tuple[int, ...], part: np.ndarray, units: list[Head], **record) -> None:
        """Write the angles `part` [L, H] of `units` at `at`, which may be (), and their Gram matrices; `record` goes
        into the manifest."""
        if self.folder is None:
            return
        whole = np.full_like(self.angles, np.nan)
        whole[at] = part
        frames = {SCORES: score_frame(whole, self.names, "angle_deg")}
        if self.grams is not None:
            frames[GRAMS] = self.grams.part(self.names, [(*at, *unit) for unit in units])
        self.folder.write_parts(frames, plan=self.prepared.plan.to_json(), **record)


class AngleScan:
    """Angles of many units on top of a group that is already off, against the unablated model."""

    def __init__(self, store: AngleStore, bar) -> None:
        self.store, self.prepared, self.folder, self.bar = store, store.prepared, store.folder, bar
        self.rank = store.prepared.measurement.rank
        # [P, P], to be filled with the unablated model's Gram matrix.
        self.base_gram = None if store.grams is None else store.grams.base
        self.basis = None if self.folder is None else self._read_basis()  # [P, r], of the unablated model
        # Whether the packed model has been held against its own forward pass.
        self.checked = "noise_floor" in store.before and self.folder.same_environment
        self.singular_values: list[float] = store.before.get("base_singular_values", [])
        # What packing does; the result's is the larger of this and what rounding does.
        self.noise_floor: float = store.before.get("packing_noise", store.before.get("noise_floor", 0.0))
        self.parent_angle = 0.0  # of the group that was off in the last block
        self._packs: dict[tuple[int, ...], tuple[PackedPrompts, object]] = {}

    def run(
        self,
        at: tuple[int, ...],
        units: Sequence[Head],
        parent: tuple[Head, ...],
        keep: Callable[[tuple[int, ...], np.ndarray, list[Head]], None],
    ) -> None:
        """Fill in the store's angles [L, H] at `at`, and their Gram matrices, of `units` with `parent` off as well.

        keep(at, part, units) is called with what was missing of each block.
        """
        angles = self.store.angles[at]
        while True:
            try:
                run_blocks(
                    self.prepared,
                    units,
                    lambda: [u for u in units if np.isnan(angles[u])],
                    lambda block: self._block(at, block, parent, keep),
                    self.bar,
                    passes=len(self.prepared.plan.prompt_groups),
                )
                return
            except OutOfMemory:
                groups = self.prepared.plan.prompt_groups
                if all(len(g) == 1 for g in groups):
                    raise
                halves = [h for g in groups for h in (g[: len(g) // 2], g[len(g) // 2 :]) if h]
                self.prepared.plan = self.prepared.plan.regrouped(halves, self.prepared.sequences.ids)
                self._packs = {}

    def record(self) -> dict:
        """What the run folder keeps of it."""
        plan = self.prepared.plan.to_json()
        return {"plan": plan, "packing_noise": self.noise_floor, "base_singular_values": self.singular_values}

    def _block(
        self, at: tuple[int, ...], block: list[Head], parent: tuple[Head, ...], keep: Callable
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
        angles, grams = self.store.angles[at], self.store.grams
        # Before any angle is taken: what runs out of memory here is done again.
        matrices = None if grams is None else gram_matrices(hidden[1:]).cpu().numpy()
        part, new = np.full_like(angles, np.nan), [unit for unit in block if np.isnan(angles[unit])]
        for row, unit in enumerate(block):
            if np.isnan(angles[unit]):
                part[unit] = found[1 + row]
                if grams is not None:
                    grams.heads[at][unit] = matrices[row]
        keep(at, part, new)
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
        for together in self.prepared.plan.prompt_groups:
            packed, values = self._packs.get(together) or self.prepared.pack(together)
            if self.prepared.how.kind != "resample":  # whose values take as much as many rows
                self._packs[together] = packed, values
            with self.prepared.growing_batch(packed, self.bar.update) as batch:
                place = torch.as_tensor(batch.prompt_place)
                prompts = torch.as_tensor(together)

                def consume(rows: slice, hidden: torch.Tensor, _first, place=place, prompts=prompts) -> None:
                    if not out:
                        shape = (len(block) + 1, len(self.prepared.token_ids), hidden.shape[-1])
                        out.append(hidden.new_empty(shape))
                    out[0][rows, prompts.to(hidden.device)] = hidden[:, place.to(hidden.device)]

                batch.run(self.prepared.mask(block, values, parent), consume, hidden_states=True)
        return out[0]

    def _set_basis(self, base: torch.Tensor) -> None:
        values = torch.linalg.svdvals(base.double())
        span = int((values > values[0] * max(base.shape) * 1e-14).sum())
        if self.rank > span:
            raise InputError(
                f"rank {self.rank} is more than the prompts have: their hidden states span "
                f"{counted(span, 'direction')} (duplicates add none); lower the rank or add prompts"
            )
        basis = leading_subspace(base[None], self.rank)[0]
        self.singular_values = values[: self.rank + 1].tolist()
        if self.folder is not None:
            frame = score_frame(basis.cpu().numpy(), BASIS_COLUMNS, "value")
            self.folder.write_part(frame, BASIS, base_singular_values=self.singular_values)
        self.basis = basis

    def _read_basis(self) -> torch.Tensor | None:
        shape = (len(self.prepared.token_ids), self.rank)
        basis = read_scores(self.folder.path, shape, BASIS_COLUMNS, "value", room=BASIS)
        return None if np.isnan(basis).any() else torch.from_numpy(basis).to(self.prepared.device)

    def _check(self, hidden: torch.Tensor, block: list[Head]) -> None:
        """The unablated model and one unit against plain forward passes; and the noise floor of the angles."""
        prepared = self.prepared
        prompt = longest_prompt(prepared, range(len(prepared.token_ids)))
        at = len(block) // 2
        check_hidden(prepared, prompt, block[at], hidden[0, prompt], hidden[1 + at, prompt])
        plain = plain_hidden(prepared, range(len(prepared.token_ids))).to(hidden.device)
        if not torch.isfinite(plain[prompt]).all():
            refuse_base(prepared, prompt, "the last hidden state")
        check_own_hidden(prepared, prompt, hidden[0, prompt], plain[prompt])
        if prepared.fp32_residual:
            own = [unpacked_outputs(prepared, p, hidden_states=True)[None] for p in range(len(plain))]
            plain = torch.stack(own).to(hidden.device)
        self.noise_floor = max(self.noise_floor, float(subspace_angle_deg(self.basis, plain[None])[0]))
        if self.folder is not None:  # before the first scores are
            self.folder.update(
                noise_floor=self.noise_floor, packing_noise=self.noise_floor,
                base_singular_values=self.singular_values,
            )  # fmt: skip
