"""The task's sentences in lm-evaluation-harness: `--include_path` takes this folder, which running it as a module
prints."""
