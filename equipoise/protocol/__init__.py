"""What is computed: terms, occupations, the matcher, prompts, sentences, the reward. Needs no torch."""
