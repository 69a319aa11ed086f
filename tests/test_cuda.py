"""The same code on a GPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import bayesinf as bi
from tests import quadratic
from tests.cases import BY_NAME
from tests.layered_cases import LAYERED_BY_NAME

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("case", ["mlp-categorical", "cnn"])
def test_classical_scores_are_those_of_the_cpu(case: str) -> None:
    cpu, gpu = BY_NAME[case].task(), BY_NAME[case].task(device="cuda")
    for function, options in (
        (bi.ekfac, {"fisher": "enumerated", "damping": 0.1}),
        (bi.kfac, {"fisher": "empirical", "damping": 0.1}),
        (bi.grad_dot, {}),
        (bi.gauss_newton, {"damping": 0.1}),
        (bi.conjugate_gradient, {"fisher": "enumerated", "damping": 0.1, "tolerance": 1e-12}),
        (bi.deflated_ekfac, {"fisher": "enumerated", "damping": 0.1, "deflate": 5}),
        (bi.lissa, {"damping": 5.0, "tolerance": 1e-12}),
    ):
        expected = function(cpu, **options)["influence"].values  # type: ignore[operator]
        got = function(gpu, **options)["influence"].values  # type: ignore[operator]
        np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("case", ["sequence", "words", "conv-groups", "called-twice"])
def test_curvature_of_every_form_and_token_scores_are_those_of_the_cpu(case: str) -> None:
    cpu, gpu = LAYERED_BY_NAME[case].task(), LAYERED_BY_NAME[case].task(device="cuda")
    for form in ("ekfac", "kfac", "diagonal", "dense", "identity"):
        expected = bi.fit_curvature(cpu, fisher="enumerated", form=form)  # type: ignore[arg-type]
        got = bi.fit_curvature(gpu, fisher="enumerated", form=form)  # type: ignore[arg-type]
        assert got.device.type == "cuda"
        torch.testing.assert_close(got.dense().cpu(), expected.dense(), rtol=1e-7, atol=1e-12)
        draws = got.inverse(0.1).sample(3, torch.Generator("cuda").manual_seed(0))
        assert draws.shape == (3, cpu.dimension)
    if case == "sequence":
        tokens = [
            bi.ekfac(task, fisher="empirical", damping=0.1, train_tokens="position").influence
            for task in (gpu, cpu)
        ]
        np.testing.assert_allclose(*tokens, rtol=1e-7, atol=1e-12)


def test_bif_on_the_gpu_is_the_closed_form() -> None:
    """As on the CPU: the Monte-Carlo error is about 1 %."""
    problem = quadratic.make()
    step = float(0.3 / torch.linalg.eigvalsh(problem.hessian)[-1])
    traces = bi.sample(
        problem.posterior, bi.SGLD(step), chains=64, draws=600, warmup=400, thin=8,
        device="cuda", progress=False,
    )  # fmt: skip
    exact = problem.influence(problem.covariance(step)).numpy()
    error = np.linalg.norm(bi.bif(traces)["influence"].values - exact) / np.linalg.norm(exact)
    assert error < 0.05


def test_resume_on_the_gpu_is_bitwise(tmp_path: Path) -> None:
    problem = quadratic.make()
    options = {"chains": 4, "warmup": 20, "thin": 2, "batch_size": 5, "device": "cuda"}

    def run(draws: int, store: Path) -> np.ndarray:
        traces = bi.sample(
            problem.posterior, bi.SGLD(1e-3), draws=draws, store=store, progress=False, **options
        )  # type: ignore[arg-type]
        return traces.values("train").values

    run(7, tmp_path / "parts.zarr")
    np.testing.assert_array_equal(
        run(20, tmp_path / "parts.zarr"), run(20, tmp_path / "whole.zarr")
    )
