"""Models and tokenisers of Hugging Face: checkpoints in, token scores with their text out.

>>> import bayesinf as bi
>>> from bayesinf.interop import huggingface as hf
>>> model = hf.from_pretrained("path/of/checkpoint")  # doctest: +SKIP
>>> train, query = (hf.tokenize(t, tokenizer, max_length=256) for t in texts)  # doctest: +SKIP
>>> task = bi.Task(model, bi.CausalLM(), train=train, query=query)  # doctest: +SKIP
>>> scores = bi.ekfac(task, damping=1e-3, train_tokens="position")  # doctest: +SKIP
>>> scores = hf.add_token_text(scores, tokenizer)  # doctest: +SKIP
"""

from bayesinf.interop._components import components
from bayesinf.interop.huggingface._loading import from_pretrained
from bayesinf.interop.huggingface._model import LanguageModel, SequenceClassifier
from bayesinf.interop.huggingface._prefix import reuse_prefix
from bayesinf.interop.huggingface._text import add_token_text
from bayesinf.interop.huggingface._tokenize import TruncationWarning, tokenize

__all__ = [
    "LanguageModel",
    "SequenceClassifier",
    "TruncationWarning",
    "add_token_text",
    "components",
    "from_pretrained",
    "reuse_prefix",
    "tokenize",
]
