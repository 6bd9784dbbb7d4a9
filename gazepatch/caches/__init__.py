"""What a patched model remembers of a sequence: caches of transformers whose layers keep images region by region."""
