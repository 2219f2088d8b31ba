"""Dataset-level Ships: how far a head turns the subspace that a set of prompts spans (arXiv 2410.13708, eq. 11).

The growing batch hands out every row's last-position hidden states after the final norm; of all rows together
ops/subspaces.py takes the angles. Hidden states of a block of rows at all P prompts are kept until then, which the
memory plan counts.
"""

from __future__ import annotations

import time

import numpy as np
from transformers import PreTrainedModel

from ..clock import seconds_since
from ..engine.measurement import ScanExecution, called_with
from ..models.restore import untouched
from ..results.subspace import HEAD_COLUMNS, SubspaceResult
from ..runs.folder import RunFolder
from .angles import AngleScan, AngleStore
from .measurements import SubspaceMeasurement
from .prepare import prepare
from .rescoring import rescore_angles
from .scan_bar import ScanBar


@called_with(SubspaceMeasurement, ScanExecution)
@untouched
def scan_dataset(
    model: PreTrainedModel, tokenizer, measurement: SubspaceMeasurement, execution: ScanExecution
) -> SubspaceResult:
    """Switch off every head, one at a time, and measure how far the prompts' hidden states turn.

    Dataset-level Ships of arXiv 2410.13708, eq. 11: X [P, hidden] holds each prompt's hidden state at its last
    position, after the final norm; the score is the sum of the `rank` principal angles between the spans of the
    first `rank` left singular vectors of X with and without the head, in degrees, computed in float64.

    Time grows as in `scan`, linearly with P; the angles add about 4 n^2 max(P, hidden) operations and a singular value
    decomposition of size n = min(P, hidden) for each head, in float64: 4 ms a head for P = 100 and hidden 640 on
    two cores, growing with P^2 and then P^3. GPUs take all heads together (ops/jacobi.py). For `stability` of the result each head's Gram matrix [P, P] is kept, as
    long as all of them take 256 MiB or less (180 prompts for 1,024 heads).

    Returns:
        SubspaceResult with .angle_deg float64 [L, H], NaN for heads not in `heads`.
    Raises:
        InputError: as `scan`, and for a rank that the prompts cannot have.
        UnsupportedModelError: the model cannot be scanned exactly.
    """
    started = time.perf_counter()
    prepared = prepare(model, tokenizer, measurement, execution)
    measurement.check(len(prepared.token_ids), len(prepared.units), prepared.anatomy.hidden_size)
    identity = prepared.identity  # the model as it is now, before hours of work
    folder = None if execution.out is None else RunFolder(execution.out, identity, prepared.record)
    found = folder and folder.finished(SubspaceResult.load)
    if found is not None:
        return found
    store = AngleStore(prepared, folder, HEAD_COLUMNS, prepared.grid)
    missing = [u for u in prepared.units if np.isnan(store.angles[u])]
    steps = prepared.layer_passes(prepared.units, missing, len(prepared.plan.prompt_groups))
    scores = len(missing) * len(prepared.token_ids)
    with ScanBar("scan-dataset", steps, scores, prepared, execution) as bar:
        angular = AngleScan(store, bar)
        angular.run((), prepared.units, (), store.keep)
        angular.complete()
    error = rescore_angles(store, store.angles[None], measurement.rank, angular.noise_floor)
    record = (
        prepared.record | angular.record() | {"error": error.to_json(), "seconds": seconds_since(started)}
    )
    result = SubspaceResult(store.angles, error.floor, record, identity, store.grams)
    record["concentration"] = result.concentration().to_json()
    if folder is not None:
        record["rank_stability"] = result.stability_json(10)
        folder.write_manifest(record | {"status": "complete", "noise_floor": error.floor})
    return result
