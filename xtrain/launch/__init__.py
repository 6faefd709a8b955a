"""Which processes a run has: what started them, how they find each other, and that they fail as one."""
