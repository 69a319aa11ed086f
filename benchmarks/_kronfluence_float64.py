"""kronfluence's empirical EK-FAC in float64, run by an interpreter that has kronfluence.

``python _kronfluence_float64.py --out DIR [--no-bias]`` leaves ``DIR/NAME.npy`` and ``NAME.json``
like the peers' own programs, which have no switch for the precision.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model  # type: ignore[import-not-found]
from kronfluence.arguments import FactorArguments, ScoreArguments  # type: ignore[import-not-found]
from kronfluence.task import Task  # type: ignore[import-not-found]
from torch import Tensor, nn
from torch.utils.data import TensorDataset

_F64 = torch.float64
_FACTORS = FactorArguments(
    strategy="ekfac",
    use_empirical_fisher=True,
    activation_covariance_dtype=_F64,
    gradient_covariance_dtype=_F64,
    eigendecomposition_dtype=_F64,
    per_sample_gradient_dtype=_F64,
    lambda_dtype=_F64,
)


class _SummedLoss(Task):
    """Cross-entropy, summed over a batch: per-example losses have weight 1."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(model(inputs), labels, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


def _network(weights: dict[str, Tensor]) -> nn.Module:
    layers: list[nn.Module] = []
    for name in ("fc1", "fc2", "fc3"):
        weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=_F64)
        layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def scores(folder: Path, bias: bool, damping: float) -> np.ndarray:
    """``∇φ_qᵀ (C + λI)⁻¹ ∇ℓ_t`` of every pair, ``[query, train]``."""
    saved = torch.load(folder / ("digits.pt" if bias else "digits_nobias.pt"), weights_only=True)
    train_x, train_y, query_x, query_y = saved["data"]
    train, query = (
        TensorDataset(train_x.double(), train_y),
        TensorDataset(query_x.double(), query_y),
    )
    task = _SummedLoss()
    model = prepare_model(_network(saved["state_dict"]), task)
    precise = ScoreArguments(
        damping_factor=damping, score_dtype=_F64, per_sample_gradient_dtype=_F64,
        precondition_dtype=_F64,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        analyzer = Analyzer(
            "float64", model, task, cpu=True, disable_tqdm=True, output_dir=scratch, log_level=40
        )
        analyzer.fit_all_factors(
            "factors", train, per_device_batch_size=len(train), factor_args=_FACTORS
        )
        analyzer.compute_pairwise_scores(
            "scores", "factors", query_dataset=query, train_dataset=train, score_args=precise,
            per_device_query_batch_size=len(query), per_device_train_batch_size=len(train),
        )  # fmt: skip
        found: np.ndarray = analyzer.load_pairwise_scores("scores")["all_modules"].numpy()
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--damping", type=float, default=1e-3)
    parser.add_argument("--no-bias", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name = "kronfluence_float64" + "_nobias" * args.no_bias
    np.save(args.out / f"{name}.npy", scores(args.out, not args.no_bias, args.damping))
    report = {"name": name, "damping": args.damping}
    (args.out / f"{name}.json").write_text(json.dumps(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
