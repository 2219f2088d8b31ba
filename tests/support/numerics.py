"""The one place where tests compare floating-point results. Exact facts are asserted with torch.equal instead."""

import torch


def assert_close_abs(actual, expected, atol, what="result"):
    """Asserts |actual - expected| <= atol everywhere, both finite, in float64. atol may be a tensor."""
    # A plain number would be rounded to float32 on its way to float64.
    actual, expected = (torch.as_tensor(x, dtype=torch.float64).detach().cpu() for x in (actual, expected))
    assert actual.shape == expected.shape, (
        f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    )
    assert torch.isfinite(expected).all(), f"{what}: the expected values are not finite"
    bad = int((~torch.isfinite(actual)).sum())
    assert bad == 0, f"{what}: {bad} of {actual.numel()} values are not finite"
    if actual.numel() == 0:
        return
    excess = (actual - expected).abs() - torch.as_tensor(atol, dtype=torch.float64).cpu()
    worst = int(excess.argmax())
    error = float((actual - expected).abs().flatten()[worst])
    assert float(excess.max()) <= 0, (
        f"{what}: off by {error:.3e} at flat index {worst}: {float(actual.flatten()[worst])!r}, "
        f"expected {float(expected.flatten()[worst])!r}, allowed {float(error - excess.max()):.3e}"
    )
