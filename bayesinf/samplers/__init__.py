"""Samplers, one kernel a file."""
