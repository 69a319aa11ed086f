"""Models and tokenisers of Hugging Face: checkpoints in, token scores with their text out."""

from bayesinf.interop._components import components
from bayesinf.interop.huggingface._model import LanguageModel, SequenceClassifier

__all__ = ["LanguageModel", "SequenceClassifier", "components"]
