"""Figures; nothing imports this."""
