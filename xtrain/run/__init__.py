"""One run of a Trainer: what it consists of, its set-up, its loops and its end."""
