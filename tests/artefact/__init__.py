"""Artefacts: what is written, what is refused, and that nothing half-written is left behind."""
