"""A method of another package: distances of inputs from the query, with nothing registered."""

import torch

import bayesinf as bi


def nearest_mean(task: bi.Task, *, scale: float = 1.0, batch_size: int = 256):
    """Distances of inputs."""
    (x, _), (q, _) = task.train.batch(), task.query.batch()
    distance = torch.cdist(q.flatten(1), x.flatten(1)).cpu().numpy()
    return bi.make_scores(
        scale * (distance - distance.mean()),
        query=task.query.ids,
        train=task.train.ids,
        method="nearest_mean",
        estimand="similarity",
        attrs={"n": task.n},
    )


METHOD = bi.Method("nearest_mean", nearest_mean, "similarity", "distance of the inputs")
