"""NumPyro: NUTS on our own local posteriors, and influence in models of NumPyro.

>>> import bayesinf as bi
>>> from bayesinf.interop.numpyro import reference_posterior, sample_numpyro
>>> traces = reference_posterior(posterior, draws=1000)  # doctest: +SKIP
>>> scores = bi.bif(traces)  # doctest: +SKIP
>>> data, influence = sample_numpyro(model, rng_key, x, y)  # doctest: +SKIP
"""

try:
    import jax  # noqa: F401
    import numpyro  # noqa: F401
except ImportError as error:
    raise ImportError(
        "bayesinf.interop.numpyro needs JAX and NumPyro: pip install 'bayesinf[numpyro]'"
    ) from error

from bayesinf.interop.numpyro._model import NumPyroInfluence, sample_numpyro
from bayesinf.interop.numpyro._posterior import potential_fn
from bayesinf.interop.numpyro._reference import reference_posterior

__all__ = ["NumPyroInfluence", "potential_fn", "reference_posterior", "sample_numpyro"]
