"""What a piece of work costs; see :mod:`bayesinf._measuring`."""

from bayesinf._measuring import Cost, measured, peak_mb, resident_mb

__all__ = ["Cost", "measured", "peak_mb", "resident_mb"]
