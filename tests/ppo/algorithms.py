"""Which algorithms tests go through."""

OTHERS = ("grpo", "rloo", "reinforce++")
