"""Prints the file whose task `occupations` `inspect eval` takes."""

from pathlib import Path

print(Path(__file__).with_name("task.py"))
