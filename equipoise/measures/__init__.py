"""Numbers that several floors share: shares with their intervals, and how varied sentences are. Needs no torch."""
