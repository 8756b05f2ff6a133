"""Both ways of reducing agree with a reference in float64, whatever the values are."""

import numpy as np
import pytest
import torch

from ray_app.capture.moments import can_compile, make_accumulator

needs_compiler = pytest.mark.skipif(not can_compile(), reason="no C++ compiler on this machine")


@pytest.mark.parametrize("reduction", ["eager", pytest.param("compiled", marks=needs_compiler)])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (100.0, 1.0), (-3.0, 0.05), (1e4, 100.0)])
def test_statistics_agree_with_two_passes_in_float64(
    reduction: str, mean: float, std: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(700, 24, generator=generator) * std + mean
    z[:, 3] = 0
    accumulator = make_accumulator(24, reduction=reduction)  # type: ignore[arg-type]
    for part in z.split([1, 128, 300, 271]):
        accumulator.add(part)
    columns = {name: column.to_numpy() for name, column in accumulator.columns().items()}
    exact = z.double().numpy()
    np.testing.assert_array_equal(columns["n"], 700)
    np.testing.assert_allclose(columns["mean"], exact.mean(0), rtol=1e-6, atol=1e-7 * std)
    np.testing.assert_allclose(columns["m2"], exact.var(0) * 700, rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(columns["abs_sum"], np.abs(exact).sum(0), rtol=1e-5)
    np.testing.assert_allclose(columns["sqrt_sum"], np.sqrt(np.abs(exact)).sum(0), rtol=1e-5)
    np.testing.assert_allclose(columns["pos_sum"], exact.clip(min=0).sum(0), rtol=1e-5)
    np.testing.assert_allclose(columns["neg_sum"], exact.clip(max=0).sum(0), rtol=1e-5)
    np.testing.assert_array_equal(columns["pos_count"], (exact > 0).sum(0))
    np.testing.assert_array_equal(columns["nonzero_count"], (exact != 0).sum(0))
    np.testing.assert_array_equal(columns["min"], z.numpy().min(0))
    np.testing.assert_array_equal(columns["max"], z.numpy().max(0))


@needs_compiler
def test_a_value_that_is_not_finite_is_found_by_the_kernel_too() -> None:
    z = torch.ones(5, 4)
    z[2, 1] = torch.nan
    z[3, 2] = torch.inf
    for reduction in ("eager", "compiled"):
        accumulator = make_accumulator(4, reduction=reduction)  # type: ignore[arg-type]
        accumulator.add(z)
        assert accumulator.first_non_finite() == 1
