"""Other libraries' objects as this library's, and the other way round: leaves, imported by name."""
