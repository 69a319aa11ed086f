"""Recorded training runs: their checkpoints, schedules and batches, and exact derivatives."""

from bayesinf.training._recorder import CheckpointRecorder
from bayesinf.training._runs import Checkpoints, open_checkpoints
from bayesinf.training._unrolled import unrolled_response

__all__ = ["CheckpointRecorder", "Checkpoints", "open_checkpoints", "unrolled_response"]
