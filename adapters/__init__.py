"""Facts about architectures, one module a layout. `gazepatch.registry` finds them by model type."""
