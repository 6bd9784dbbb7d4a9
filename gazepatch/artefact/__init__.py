"""Artefacts: folders that turn a base model into a gazing one, made, read, described and published."""
