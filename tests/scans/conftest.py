"""Angles go another way on GPUs. `each_way` runs a test that way as well, on the CPU."""

import pytest


@pytest.fixture(params=["lapack", "jacobi"])
def each_way(request, monkeypatch) -> str:
    if request.param == "jacobi":
        monkeypatch.setattr("shipsfast.ops.subspaces.LAPACK_ON", ())
    return request.param
