"""JAX losses: the local posterior of Flax, Equinox or plain pytrees, sampled into our stores."""

from bayesinf.interop.jax._sampling import sample_jax

__all__ = ["sample_jax"]
