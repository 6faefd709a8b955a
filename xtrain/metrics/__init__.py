"""Logged values: collected in the steps, reduced over epochs and ranks, sent to the loggers."""
