"""Compiled training: the networks one by one, or the whole step with its backwards and optimizers."""
