"""docs/models.md line by line: a family that was exact stays exact, and no family gives a wrong number.

The page is about one version of transformers. With another one, families that it does not have are skipped, and the
others may have become refused or unbuilt, but never wrong.
"""

import pytest
import transformers

from tests.support import model_matrix
from tests.support.tiny_configs import families

pytestmark = pytest.mark.usefixtures("one_thread")

EXPECTED = model_matrix.committed()
SAME_VERSION = transformers.__version__ == model_matrix.committed_version()
LEAST_EXACT = 40


@pytest.mark.parametrize("family", EXPECTED)
def test_family(family):
    if family not in families():
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    row = model_matrix.check(family)
    if SAME_VERSION:
        assert row.status == EXPECTED[family], row.detail
    elif EXPECTED[family] == "exact" and row.status != "exact":
        pytest.skip(f"transformers {transformers.__version__}: {row.status}, {row.detail}")


@pytest.mark.skipif(not SAME_VERSION, reason="the page is about another version of transformers")
def test_the_page_has_every_family():
    assert list(EXPECTED) == families(), "run python -m tests.support.model_matrix"


def test_enough_families_are_exact():
    assert sum(status == "exact" for status in EXPECTED.values()) >= LEAST_EXACT


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "lfm2"])
def test_the_matrix_notices_a_wrong_number(family, monkeypatch):
    """One row's mask vectors are off by one part in a thousand."""
    from shipsfast.engine import growing_batch

    plain = growing_batch.GrowingBatch._layer_mask

    def wrong(self, index, like, rows, nodes=None, groups=None):
        mask = plain(self, index, like, rows, nodes, groups)
        mask.logit_scale[:, 0] *= 1.001
        return mask

    monkeypatch.setattr(growing_batch.GrowingBatch, "_layer_mask", wrong)
    with pytest.raises(AssertionError, match="off by"):
        monkeypatch.setattr("shipsfast.scans.ships.packing_noise_nats", lambda *_args: 0.0)
        monkeypatch.setattr("shipsfast.scans.ships._spot_check", lambda _work: None)
        model_matrix.check(family)
