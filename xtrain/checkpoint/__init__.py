"""Checkpoints: what a state is, the folder it is kept in, how a run goes on from it."""
