"""Ways to get completions for the protocol's occupations, and the file that they are written to."""
