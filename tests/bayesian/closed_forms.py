"""Posteriors in closed form: exact draws, and means for any weights of the observations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr


@dataclass(frozen=True)
class LinearRegression:
    """``y ~ N(Xw, σ²)``, ``w ~ N(0, τ²)``; a conjugate normal mean where X is a column of ones."""

    x: np.ndarray
    y: np.ndarray
    sigma: float = 1.0
    tau: float = 2.0

    def posterior(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance with the likelihood ``Π p_i^{b_i}``."""
        b = np.ones(len(self.y)) if weights is None else weights
        precision = (self.x.T * b) @ self.x / self.sigma**2 + np.eye(self.x.shape[1]) / self.tau**2
        covariance = np.linalg.inv(precision)
        return covariance @ (self.x.T @ (b * self.y)) / self.sigma**2, covariance

    def influence(self) -> np.ndarray:
        """``d E[w] / d b_i = V x_i (y_i − x_iᵀμ)/σ²``, ``(d, n)``."""
        mean, covariance = self.posterior()
        return covariance @ self.x.T * (self.y - self.x @ mean) / self.sigma**2

    def second_order(self) -> np.ndarray:
        """``d² E[w] / d b_i² = −2 h_i d E[w] / d b_i``, with the leverage h."""
        return -2 * self.leverage() * self.influence()

    def leverage(self) -> np.ndarray:
        """``x_iᵀ V x_i / σ²``."""
        covariance = self.posterior()[1]
        return np.einsum("ni,ij,nj->n", self.x, covariance, self.x) / self.sigma**2

    def log_p(self, w: np.ndarray) -> np.ndarray:
        """``(C, T, n)`` of weights ``(C, T, d)``."""
        residual = self.y - w @ self.x.T
        return -0.5 * (residual / self.sigma) ** 2 - np.log(self.sigma * np.sqrt(2 * np.pi))

    def draws(self, seed: int, chains: int = 4, draws: int = 500) -> np.ndarray:
        """Independent draws ``(C, T, d)``."""
        mean, covariance = self.posterior()
        z = np.random.default_rng(seed).standard_normal((chains, draws, len(mean)))
        return mean + z @ np.linalg.cholesky(covariance).T

    def tree(self, seed: int, chains: int = 4, draws: int = 500) -> xr.DataTree:
        """As ArviZ has it."""
        w = self.draws(seed, chains, draws)
        dims, coords = ("chain", "draw"), {"chain": np.arange(chains), "draw": np.arange(draws)}
        posterior = xr.Dataset({"w": ((*dims, "feature"), w)}, coords=coords)
        likelihood = xr.Dataset({"y": ((*dims, "obs"), self.log_p(w))}, coords=coords)
        likelihood = likelihood.assign_coords(obs=np.arange(len(self.y)))
        return xr.DataTree.from_dict({"posterior": posterior, "log_likelihood": likelihood})


def normal_mean(seed: int = 0, n: int = 12) -> LinearRegression:
    rng = np.random.default_rng(seed)
    return LinearRegression(np.ones((n, 1)), rng.normal(1, 1, n))


def regression(seed: int = 0, n: int = 20, d: int = 3) -> LinearRegression:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d))
    return LinearRegression(x, x @ np.arange(1.0, d + 1) + rng.standard_normal(n))
