"""PPO fine-tuning of language models toward balanced occupational descriptions, and the tools to measure it."""

__version__ = "0.1.0"
