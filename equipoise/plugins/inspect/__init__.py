"""The task's sentences in inspect_ai: `inspect eval FILE@occupations`, FILE being what running this as a module
prints."""
