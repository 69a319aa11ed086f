"""Scores that were made elsewhere, in the sign, unit and format of this library's own."""

from bayesinf.scores._bergson import read_bergson
from bayesinf.scores._from_array import from_array, read_npy
from bayesinf.scores._kronfluence import read_kronfluence
from bayesinf.scores._self_sign import Sign, SignWarning
from bayesinf.scores._tensors import read_dattri, read_quanda

__all__ = [
    "Sign",
    "SignWarning",
    "from_array",
    "read_bergson",
    "read_dattri",
    "read_kronfluence",
    "read_npy",
    "read_quanda",
]
