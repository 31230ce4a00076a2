"""PPO: the loop, its maths, and what keeps a run alive (checkpoints, stop signals)."""
