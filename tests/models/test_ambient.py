"""What is set around a call changes nothing in it, or is refused by name; and it is as before afterwards."""

import contextlib
import functools
import operator
import threading

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import shipsfast
from shipsfast.demo.run import MODEL
from shipsfast.models import ambient
from shipsfast.models.loading import load_tokenizer
from shipsfast.runs.verify import verify
from shipsfast.scans.bench import bench
from tests.support.models import build

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[3, 4, 5, 6, 7], [3, 4, 5, 9], [8, 9, 10]]
TEXTS = ["Is the mill open today?", "Who bakes the bread?"]
QUIET = dict(progress=False)
LIMITED = QUIET | dict(max_new_tokens=4)


def ablated(model):
    with shipsfast.ablate(model, [(0, 1), (2, 2)]), torch.no_grad():
        return model(torch.tensor(PROMPTS[:1], device="cpu")).logits.numpy()


def generated(model, **how):
    return shipsfast.generate(model, PROMPTS, groups=[[], [(0, 1)]], **LIMITED | how)


# What a user calls, but for what needs a tokenizer.
CALLS = {
    "scan": lambda m: shipsfast.scan(m, PROMPTS, **QUIET).scores,
    "scan, own layers": lambda m: shipsfast.scan(m, PROMPTS, layers="model", backend="torch", **QUIET).scores,
    "scan, oracle": lambda m: shipsfast.scan(m, PROMPTS, layers="model", backend="reference", **QUIET).scores,
    "scan, mean": lambda m: shipsfast.scan(m, PROMPTS, ablation="mean", **QUIET).scores,
    "scan_dataset": lambda m: shipsfast.scan_dataset(m, PROMPTS, **QUIET).angle_deg,
    "sahara": lambda m: shipsfast.sahara(m, PROMPTS, group_size=2, **QUIET).angle_deg,
    "generate": generated,
    "generate, drawn": lambda m: generated(m, do_sample=True),
    "generate, transformers": lambda m: generated(m, engine="transformers"),
    "bench": lambda m: bench(m, PROMPTS, seconds=0.01, progress=False).heads,
}


@pytest.fixture(scope="module")
def model():
    return build(dtype=torch.float32)


@pytest.fixture(scope="module")
def plain(model):
    return {name: call(model) for name, call in (CALLS | {"ablate": ablated}).items()}


@pytest.fixture(scope="module")
def village():
    return AutoModelForCausalLM.from_pretrained(MODEL), load_tokenizer(str(MODEL))


@contextlib.contextmanager
def setting(read, write, value):
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def attribute(owner, name, value):
    return setting(lambda: getattr(owner, name), lambda x: setattr(owner, name, x), value)


products = torch.backends.cuda.matmul
precision = functools.partial(setting, torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)
SURROUNDINGS = {
    "default dtype": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "a device": lambda: torch.device("meta"),
    "default device": lambda: setting(lambda: None, torch.set_default_device, "meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic": lambda: setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "bfloat16 products": lambda: precision("medium"),
    "TF32 products": lambda: precision("high"),
    "bfloat16 products, newer": lambda: attribute(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "TF32 everywhere, newer": lambda: attribute(torch.backends, "fp32_precision", "tf32"),
    "sums in float16": lambda: attribute(products, "allow_fp16_accumulation", True),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_it_changes_no_bit(model, plain, name):
    for call, run in (CALLS | {"ablate": ablated}).items():
        if call == "ablate" and "products" in name:
            continue  # what runs inside is the caller's
        with SURROUNDINGS[name]():
            found = run(model)
        assert np.array_equal(found, plain[call], equal_nan=True), call


def test_texts_are_judged_alike_on_another_default_device(village):
    calls = (
        lambda: shipsfast.evaluate(village[0], TEXTS, village[1], groups=[[(0, 1)]], **LIMITED).asr,
        lambda: shipsfast.scan_asr(village[0], TEXTS, village[1], heads=[(0, 1)], **LIMITED).scores,
    )
    for call in calls:
        with torch.device("meta"):
            found = call()
        assert np.array_equal(found, call(), equal_nan=True)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("name", CALLS)
def test_autocast_is_refused(model, name):
    with (
        autocast(),
        pytest.raises(shipsfast.InputError, match=r"torch.autocast is on \(for cpu, to bfloat16"),
    ):
        CALLS[name](model)


def test_autocast_is_refused_where_texts_are_judged(village):
    for call in (
        lambda: shipsfast.evaluate(village[0], TEXTS, village[1], groups=[[]], **LIMITED),
        lambda: shipsfast.scan_asr(village[0], TEXTS, village[1], **LIMITED),
    ):
        with autocast(), pytest.raises(shipsfast.InputError, match="torch.autocast is on"):
            call()


@pytest.mark.parametrize("name", ["cuda", "xpu", "mps"])
def test_autocast_of_a_gpu_is_seen_too(monkeypatch, name):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == name)
    with pytest.raises(shipsfast.InputError, match=f"for {name}, to float16"):
        ambient.refuse_surroundings()


def mixed_precision(model):
    """As accelerate prepares a model."""
    forward = model.forward

    @functools.wraps(forward)
    def call(*args, **kwargs):
        with autocast():
            return forward(*args, **kwargs)

    model.forward = call
    return model


@pytest.mark.parametrize("name", CALLS)
def test_a_model_that_switches_autocast_on_is_refused(name):
    with pytest.raises(shipsfast.InputError, match="LlamaForCausalLM.forward switches torch.autocast on"):
        CALLS[name](mixed_precision(build(dtype=torch.float32)))


MEAN = shipsfast.Ablation("mean", prompts=PROMPTS)


@pytest.mark.parametrize(
    "ablation", ["undifferentiated", "zero", "head_mean_q", "head_mean_v", MEAN], ids=str
)
def test_ablate_inside_autocast(model, ablation):
    """The caller's own passes: off from float64 by no more than autocast takes the unablated model."""
    tokens, exact = torch.tensor(PROMPTS[:1]), build()
    off = [(0, 1), (2, 2)]

    def logits(run, heads, inside=contextlib.nullcontext):
        with inside(), shipsfast.ablate(run, heads, ablation=ablation), torch.no_grad():
            return run(tokens).logits.double()

    assert (logits(exact, off) - logits(exact, [])).abs().max() > 0.1
    allowed = (logits(model, [], autocast) - logits(exact, [])).abs().max()
    assert allowed > 1e-3  # autocast is at work
    found = logits(model, off, autocast)
    assert (found - logits(exact, off)).abs().max() <= 3 * allowed
    # What the ablation itself needs is measured without it.
    with shipsfast.ablate(model, off, ablation=ablation), autocast(), torch.no_grad():
        assert torch.equal(model(tokens).logits.double(), found)


def test_means_of_a_model_that_switches_autocast_on_are_refused():
    model = mixed_precision(build(dtype=torch.float32))
    with (
        pytest.raises(shipsfast.InputError, match="switches torch.autocast on"),
        shipsfast.ablate(model, [(0, 1)], ablation=MEAN),
    ):
        pass


def all_settings() -> dict:
    """As they are read by all of torch's ways."""
    backends = torch.backends
    return ambient.matmul_settings() | {
        "all": backends.fp32_precision,
        "cuda": backends.cudnn.fp32_precision,
        "split": (
            products.allow_bf16_reduced_precision_reduction_split_k,
            products.allow_fp16_reduced_precision_reduction_split_k,
        ),
        "older": [asked(torch.get_float32_matmul_precision), asked(lambda: products.allow_tf32)],
        "device": torch.get_default_device(),
    }


def asked(read):
    try:
        return read()
    except RuntimeError as error:  # set by the newer way
        return str(error)[:40]


def test_what_products_are_pinned_to():
    assert {value for name, value in ambient.PINNED.items() if name.endswith("fp32_precision")} == {"ieee"}
    assert {value for name, value in ambient.PINNED.items() if ".allow_" in name} == {False}
    assert len(ambient.PINNED) == 7


def reset():
    """Settings as in a new process."""
    torch.set_float32_matmul_precision("highest")
    precisions(cuda_matmul="none", cudnn="none", cudnn_conv="tf32", mkldnn_matmul="none", mkldnn_conv="none")
    torch.backends.fp32_precision = "none"
    products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = True
    products.allow_fp16_accumulation = False


@pytest.fixture
def fresh():
    """Also afterwards: some of torch's own ways to set them write more than they are told."""
    reset()
    yield
    reset()


def precisions(**given):
    for name, value in given.items():
        operator.attrgetter(name.replace("_", "."))(torch.backends).fp32_precision = value


PRODUCTS = {
    "as torch comes": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow TF32": lambda: setattr(products, "allow_tf32", True),
    "allow no TF32": lambda: setattr(products, "allow_tf32", False),
    "newer, products": lambda: precisions(cuda_matmul="tf32", mkldnn_matmul="bf16"),
    "newer, all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "newer, all and some": lambda: (
        setattr(torch.backends, "fp32_precision", "tf32"), precisions(cuda_matmul="tf32", mkldnn_conv="ieee"),
    ),
    "newer, CUDA": lambda: precisions(cudnn="tf32"),
    "newer, CUDA unlike all": lambda: (
        setattr(torch.backends, "fp32_precision", "bf16"), precisions(cudnn="tf32", cudnn_conv="none"),
    ),
    "no partial sums": lambda: setattr(products, "allow_bf16_reduced_precision_reduction", (False, False)),
    "sums in float16": lambda: setattr(products, "allow_fp16_accumulation", True),
}  # fmt: skip


def as_it_follows() -> list:
    """What is in force now, and after everything else is set anew: what is inherited shows."""
    seen = [all_settings()]
    for owner in (torch.backends, torch.backends.cudnn):
        for value in ("ieee", "tf32"):
            owner.fp32_precision = value
            seen.append(all_settings())
    return seen


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_put_back_as_they_were_set(fresh, name):
    PRODUCTS[name]()
    expected = as_it_follows()
    reset()
    PRODUCTS[name]()
    with ambient.set_aside(), ambient.set_aside():
        assert ambient.matmul_settings() == ambient.PINNED
    assert as_it_follows() == expected


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_pinned_and_recorded(model, fresh, name):
    PRODUCTS[name]()
    before, inside = all_settings(), []

    def metric(base_logits, ablated_logits, prompt_index):
        inside.append(ambient.matmul_settings())
        assert products.allow_bf16_reduced_precision_reduction_split_k == before["split"][0]
        return (ablated_logits - base_logits[prompt_index]).sum(1)

    record = shipsfast.scan(model, PROMPTS, metric=metric, **QUIET).record
    assert all(each == ambient.PINNED for each in inside) and inside
    assert record["matmul"]["ran"] == ambient.PINNED
    assert record["matmul"]["before"] == {name: before[name] for name in ambient.PINNED}
    assert all_settings() == before

    def wrong(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shipsfast.scan(model, PROMPTS, metric=wrong, **QUIET)
    assert all_settings() == before


def test_of_calls_in_two_threads_the_last_puts_back(fresh):
    seen, first_in, second_in, first_out = [], *(threading.Event() for _ in range(3))

    def second():
        first_in.wait()
        with ambient.set_aside():
            second_in.set()
            first_out.wait()
            seen.append(ambient.matmul_settings())

    other = threading.Thread(target=second)
    other.start()
    with precision("high"):
        before = all_settings()
        with ambient.set_aside():
            first_in.set()
            second_in.wait()
        seen.append(ambient.matmul_settings())
        assert ambient.describe_matmul()["before"]["cuda.matmul.fp32_precision"] == "tf32"
        first_out.set()
        other.join()
        assert seen == [ambient.PINNED] * 2 and all_settings() == before


def test_run_folders_hold_it_and_those_without_it_continue(tmp_path, model, monkeypatch):
    whole = shipsfast.scan(model, PROMPTS, out=tmp_path / "whole", **QUIET)
    assert shipsfast.load(tmp_path / "whole").record["matmul"] == whole.record["matmul"]
    assert verify(tmp_path / "whole")["verdict"] == "sound"

    def wrong(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as older:  # a run of an older version, stopped halfway
        look_at = shipsfast.scans.prepare.look_at

        def without(*args):
            subject = look_at(*args)
            del subject.record["matmul"]
            return subject

        older.setattr("shipsfast.scans.prepare.look_at", without)
        older.setattr("shipsfast.scans.ships._spot_check", wrong)
        with pytest.raises(KeyboardInterrupt):
            shipsfast.scan(model, PROMPTS, out=tmp_path / "older", rows_per_block=5, **QUIET)
    found = shipsfast.scan(model, PROMPTS, out=tmp_path / "older", rows_per_block=5, **QUIET)
    assert found.record["matmul"]["ran"] == ambient.PINNED
    np.testing.assert_allclose(found.kl, whole.kl, rtol=0, atol=1e-5)


COMPILED = {
    "the model": lambda m, how: m.compile(backend=how),
    "its layers": lambda m, how: [layer.compile(backend=how) for layer in m.model.layers],
    "a wrapper": lambda m, how: torch.compile(m, backend=how),
}


@pytest.mark.parametrize("part", COMPILED)
def test_compiled_models(plain, part):
    """Scans go without torch.compile; what is compiled is so again afterwards."""
    ran = []

    def compiler(graph, _inputs):
        return lambda *args: (ran.append(1), graph(*args))[1]

    model = build(dtype=torch.float32)
    wrapper = COMPILED[part](model, compiler)
    model = wrapper if part == "a wrapper" else model
    for name in ("scan", "scan, own layers", "generate", "generate, transformers"):
        assert np.array_equal(CALLS[name](model), plain[name], equal_nan=True), name
    assert not ran
    with torch.no_grad():
        model(torch.tensor(PROMPTS[:1]))
    assert ran
    assert np.array_equal(ablated(model), plain["ablate"])


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_scans_inside_of_what_cannot_have_them_are_refused(model):
    def call(x):
        shipsfast.scan(model, PROMPTS, **QUIET)
        return x.sum()

    before = all_settings()
    for inside, words in (
        (torch.func.grad(call), "torch.func"),
        (torch.func.vmap(call), "torch.func"),
        (torch.compile(call, backend="eager"), "torch.compile runs"),
    ):
        with pytest.raises(shipsfast.InputError, match=words):
            inside(torch.zeros(2))
        assert all_settings() == before
    assert torch.get_default_device().type == "cpu"
