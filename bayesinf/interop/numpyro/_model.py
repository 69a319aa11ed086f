"""Influence of observations in a model of NumPyro: plates say what an example is."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import xarray as xr
from arviz_base import from_numpyro
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, init_to_sample

from bayesinf._diagnostics import ConvergenceWarning
from bayesinf.bayesian import case_influence
from bayesinf.bayesian._draws import Quantities

__all__ = ["NumPyroInfluence", "sample_numpyro"]

_FIELDS = "accept_prob", "num_steps", "energy"


class NumPyroInfluence(NamedTuple):
    """What :func:`sample_numpyro` found; ``data, influence = sample_numpyro(model, …)``.

    Attributes
    ----------
    data
        Draws in ArviZ's schema: groups ``posterior``, ``log_likelihood``, ``sample_stats``,
        ``observed_data``.
    influence
        Scores, as of :func:`bayesinf.case_influence`.
    """

    data: xr.DataTree
    influence: xr.Dataset


def sample_numpyro(
    model: Any,
    rng_key: Any = None,
    *args: Any,
    posterior_samples: Mapping[str, Any] | None = None,
    num_warmup: int = 1000,
    num_samples: int = 1000,
    num_chains: int = 4,
    plate: str | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    var_names: str | Sequence[str] | None = None,
    quantities: Quantities | None = None,
    progress_bar: bool = False,
    **kwargs: Any,
) -> NumPyroInfluence:
    r"""Signed influence of every observation of a NumPyro model on its posterior means.

    .. math:: \frac{d E[\phi]}{d b_i} = \mathrm{Cov}(\phi, \log p(y_i \mid \theta))

    for the likelihood :math:`\prod_i p(y_i \mid \theta)^{b_i}` at ``b = 1``. The model is sampled
    by NUTS, or has been; observed sites give the log-likelihoods, and their plates the dimensions
    of examples.

    Parameters
    ----------
    model
        A model, which is then sampled by NUTS in vectorised chains; or an ``MCMC``, with whatever
        kernel and lengths: one that has run is used as it is, another is run first.
    rng_key
        Key of the run, as of ``MCMC.run``; an integer will do. None where nothing is to be run.
    *args, **kwargs
        Of the model. (An ``MCMC`` that has run remembers its own.)
    posterior_samples
        Draws of the model that there are already, by site, ``(chain, draw, …)``, as
        ``mcmc.get_samples(group_by_chain=True)`` gives them: nothing is sampled.
    num_warmup, num_samples, num_chains, progress_bar
        As of ``MCMC``, where a model is given.
    plate
        Examples are the members of this plate: an example's log-likelihood is the sum over all
        observed sites in the plate and over other plates within. Default: every observation of
        every observed site is an example.
    coords
        Names of members, by plate: ``{"school": ["Choate", …]}``.
    var_names, quantities
        Which φ, as of :func:`bayesinf.case_influence`; all latent and deterministic sites by
        default.

    Returns
    -------
    NumPyroInfluence
        ``data``, a ``DataTree`` for ArviZ, and ``influence (query, train)`` with ``mcse``.

    Raises
    ------
    ValueError
        If no observed site is pointwise, one is scaled (a subsampled plate, ``handlers.scale``), no
        observed site is in ``plate``, or draws are missing or given twice.

    Warns
    -----
    ConvergenceWarning
        If transitions diverged or chains have not met.
    UserWarning
        Naming observed sites and factors that are not pointwise: they stay as they are, and have no
        influence.

    Examples
    --------
    >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
    >>> from bayesinf.interop.numpyro import sample_numpyro
    >>> def model(y):
    ...     mu = numpyro.sample("mu", dist.Normal(0, 10))
    ...     with numpyro.plate("case", len(y)):
    ...         numpyro.sample("y", dist.Normal(mu, 1), obs=y)
    >>> data, influence = sample_numpyro(model, 0, jnp.array([1.0, 2.0, 6.0]))
    >>> influence["train"].values.tolist()
    [0, 1, 2]
    """
    if posterior_samples is not None:
        run = _given(model, rng_key, posterior_samples, args, kwargs)
    elif isinstance(model, MCMC):
        run = _finished(model, rng_key, args, kwargs)
    else:
        lengths = {
            "num_warmup": num_warmup, "num_samples": num_samples, "num_chains": num_chains,
            "chain_method": "vectorized", "progress_bar": progress_bar,
        }  # fmt: skip
        run = _finished(MCMC(NUTS(model), **lengths), rng_key, args, kwargs)
    pointwise = _pointwise(run.sampler.model, run._args, run._kwargs)
    data = from_numpyro(run, log_likelihood=True, coords=dict(coords or {}))
    data = data.map_over_datasets(lambda group: group.map(np.array))  # not arrays of JAX
    cases = data["log_likelihood"].to_dataset()[pointwise]
    data["log_likelihood"] = xr.DataTree(cases if plate is None else _members(cases, plate))
    _warn_of_divergences(data)
    return NumPyroInfluence(data, case_influence(data, var_names, quantities=quantities))


def _given(
    model: Any,
    rng_key: Any,
    samples: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if rng_key is not None or isinstance(model, MCMC):
        raise ValueError(
            "posterior_samples are draws of a model, which is then not sampled: give the model "
            "function and rng_key=None, or leave posterior_samples out."
        )
    return _Given.of(model, samples, args, kwargs)


def _finished(mcmc: MCMC, rng_key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MCMC:
    """Run what has not run yet."""
    if mcmc.last_state is not None:
        if rng_key is not None or args or kwargs:
            raise ValueError(
                "this MCMC has run and keeps its own arguments; it is not run again. Leave rng_key "
                "and the model's arguments out: sample_numpyro(mcmc)."
            )
        return mcmc
    if rng_key is None:
        raise ValueError(
            "sampling needs a key: sample_numpyro(model, jax.random.key(0), …). An MCMC that has "
            "run is taken without one."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of the same after the run
        _pointwise(mcmc.sampler.model, args, kwargs)
    key = jax.random.PRNGKey(rng_key) if isinstance(rng_key, int) else rng_key
    fields = _FIELDS if isinstance(mcmc.sampler, NUTS) else ()
    mcmc.run(key, *args, extra_fields=fields, **kwargs)
    return mcmc


def _pointwise(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Names of the observed sites that have one log-likelihood per example."""
    seeded = handlers.substitute(handlers.seed(model, 0), substitute_fn=init_to_sample)
    sites = handlers.trace(seeded).get_trace(*args, **kwargs)
    observed = {n: s for n, s in sites.items() if s["type"] == "sample" and s["is_observed"]}
    for name, site in observed.items():
        if site["scale"] is not None and not np.all(np.asarray(site["scale"]) == 1):
            raise ValueError(
                f"the observed site {name!r} is scaled by {np.asarray(site['scale'])}, so that its "
                f"pointwise log-likelihood is not what the posterior has. Usual causes: a plate "
                f"with subsample_size, or handlers.scale. Influence is for the whole data: leave "
                f"the subsample or scale out."
            )
    pointwise = [n for n, s in observed.items() if s["fn"].batch_shape]
    if not pointwise:
        raise ValueError(
            f"no observed site has one log-likelihood per example (observed: {list(observed)}). "
            f"Observe the examples in a plate: with numpyro.plate('case', len(y)): "
            f"numpyro.sample('y', …, obs=y)."
        )
    rest = [name for name in observed if name not in pointwise]
    if rest:
        warnings.warn(
            f"the observed sites {rest} are single numbers, as of a joint likelihood or a factor: "
            f"they belong to the posterior and have no influence of their own here.",
            stacklevel=3,
        )
    return pointwise


def _members(cases: xr.Dataset, plate: str) -> xr.Dataset:
    """Sum log-likelihoods over all but the members of a plate."""
    inside = [str(name) for name, array in cases.items() if plate in array.dims]
    if not inside:
        known = sorted({str(d) for array in cases.values() for d in array.dims[2:]})
        raise ValueError(f"no observed site is in the plate {plate!r}; there are {known}.")
    sums = [cases[n].sum([d for d in cases[n].dims[2:] if d != plate]) for n in inside]
    return sum(sums[1:], start=sums[0]).to_dataset(name="_and_".join(inside))


def _warn_of_divergences(data: xr.DataTree) -> None:
    stats = data["sample_stats"].to_dataset() if "sample_stats" in data.children else xr.Dataset()
    count = int(stats["diverging"].sum()) if "diverging" in stats else 0
    if count:
        warnings.warn(
            f"{count} transitions diverged: the draws may miss a part of the posterior. Usual "
            f"remedies: NUTS(model, target_accept_prob=0.95), or another parametrisation.",
            ConvergenceWarning,
            stacklevel=3,
        )


@dataclass(frozen=True)
class _Given:
    """Draws in place of an ``MCMC`` that has run."""

    sampler: Any
    samples: dict[str, np.ndarray]
    num_chains: int
    num_samples: int
    _args: tuple[Any, ...]
    _kwargs: dict[str, Any]
    thinning: int = 1

    @classmethod
    def of(
        cls,
        model: Any,
        samples: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> _Given:
        arrays = {name: np.asarray(values) for name, values in samples.items()}
        leading = {array.shape[:2] for array in arrays.values()}
        if len(leading) != 1 or len(shape := leading.pop()) != 2:
            raise ValueError(
                f"posterior_samples must be (chain, draw, …) for every site; got "
                f"{ {name: array.shape for name, array in arrays.items()} }. Usual cause: chains "
                f"one after the other; use mcmc.get_samples(group_by_chain=True)."
            )
        chains, draws = shape
        return cls(SimpleNamespace(model=model), arrays, chains, draws, args, kwargs)

    def get_samples(self, group_by_chain: bool = False) -> dict[str, np.ndarray]:
        """As of ``MCMC``."""
        if group_by_chain:
            return self.samples
        return {
            name: values.reshape(-1, *values.shape[2:]) for name, values in self.samples.items()
        }

    def get_extra_fields(self, group_by_chain: bool = False) -> dict[str, Any]:
        """None were kept."""
        return {}
