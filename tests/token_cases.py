"""Small batches of token ids with everything that must not count."""

import torch

PAD = -7


def tokens(rng, outputs):
    """Five rows of ids for logits ``(5, T ≥ 4, V)``: with a hole, a hidden prompt, padding."""
    ids = torch.randint(outputs.shape[2], outputs.shape[:2], generator=rng)
    ids[0, 0] = PAD
    ids[1, 2] = PAD
    ids[2, :2] = PAD
    ids[3, 2:] = PAD
    return ids
