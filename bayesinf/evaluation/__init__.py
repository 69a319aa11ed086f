"""Judging scores by real retrainings."""
