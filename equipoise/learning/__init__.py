"""Learning from sentences: finding them, the optimizer, supervised steps."""
