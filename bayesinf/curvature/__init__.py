"""Curvature of the training loss: capture, Kronecker algebra, factors."""
