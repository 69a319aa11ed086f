"""What independent draws around the checkpoint need of a posterior."""

from __future__ import annotations

from bayesinf._posterior import LocalPosterior

__all__ = ["require_stationary"]


def require_stationary(kernel: str, posterior: LocalPosterior) -> None:
    """Raise ``ValueError`` unless ``w0`` is a stationary point of a proper posterior."""
    if posterior.potential != "tilted":
        raise ValueError(
            f"{kernel} draws from a Gaussian around w0, and w0 is not the mode of the plain "
            f"potential. Use LocalPosterior(..., potential='tilted'), which is the same at a "
            f"stationary checkpoint, or a kernel that samples the potential itself."
        )
    if not posterior.prior_precision > 0:
        raise ValueError(
            f"{kernel} needs damping: with gamma=0 and weight_decay=0 directions without curvature "
            f"have no proper law. Give the posterior gamma > 0."
        )
