"""Half-precision products added to float32: tried before they are relied on."""

import pytest
import torch

from shipsfast.ops import mixed_products
from shipsfast.ops.mixed_products import problem_of_products, why_not

CPU = torch.device("cpu")
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def tried_anew():
    why_not.cache_clear()
    yield
    why_not.cache_clear()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_right_products_pass(dtype):
    assert problem_of_products(dtype, CPU) is None


def sums_in_half(start, y, weight, out):
    out.copy_(torch.baddbmm(start.to(y.dtype), y, weight))


def sums_onto_what_was_there(start, y, weight, out):
    out += y.float() @ weight.float()


def sums_without_start(start, y, weight, out):
    out.copy_(y.float() @ weight.float())


def products_rounded_before_they_are_added(x, y, weight):
    x += (y @ weight).float()


def refused(*_):
    raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")


def no_such_argument(*_):
    raise TypeError("addmm() got an unexpected keyword argument 'out_dtype'")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("name", "instead", "words"),
    [
        ("sums_of_products", sums_in_half, "wrongly"),
        ("sums_of_products", sums_onto_what_was_there, "wrongly"),
        ("sums_of_products", sums_without_start, "wrongly"),
        ("sums_of_products", refused, "does not add .* here: self and mat2 must have the same dtype"),
        ("add_product_", products_rounded_before_they_are_added, "wrongly"),
        ("add_product_", no_such_argument, "unexpected keyword argument 'out_dtype'"),
    ],
)
def test_wrong_products_are_found(monkeypatch, dtype, name, instead, words):
    monkeypatch.setattr(mixed_products, name, instead)
    problem = problem_of_products(dtype, CPU)
    assert problem is not None
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(problem)


def test_it_is_tried_once_for_each_dtype_and_device(monkeypatch):
    tried = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mixed_products, "problem_of_products", lambda *how: tried.append(how))
    gpus = [torch.device("cuda", i) for i in range(2)]
    for _ in range(2):
        for dtype in HALF:
            for gpu in gpus:
                assert why_not(dtype, gpu) is None
        assert why_not(torch.float16, CPU) is None
    assert tried == [(dtype, gpu) for dtype in HALF for gpu in gpus]


def test_a_gpu_that_is_not_here_cannot_be_tried(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not(torch.bfloat16, torch.device("cuda", 0)) is None


def test_a_full_device_is_no_reason(monkeypatch):
    """It may be right the next time."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(mixed_products, "problem_of_products", full)
        with pytest.raises(torch.OutOfMemoryError):
            why_not(torch.bfloat16, torch.device("cuda", 0))
        patch.setattr(mixed_products, "problem_of_products", lambda *_: None)
        assert why_not(torch.bfloat16, torch.device("cuda", 0)) is None
    monkeypatch.setattr(mixed_products, "add_product_", full)
    with pytest.raises(torch.OutOfMemoryError):
        problem_of_products(torch.bfloat16, CPU)
