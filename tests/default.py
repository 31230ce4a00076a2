"""The default task's values by short names, for tests that are about something else."""

from equipoise.protocol.task import PROTOCOL

AGENTIC, COMMUNAL = (each.terms for each in PROTOCOL.classes)
OCCUPATIONS, HOLDOUT = PROTOCOL.names, PROTOCOL.held_out
LEXICON = PROTOCOL.lexicon
MIN_WORDS, MAX_WORDS = PROTOCOL.min_words, PROTOCOL.max_words
PROMPTS = {prompt.name: prompt for prompt in PROTOCOL.prompts}
get_prompt, prefix, sentence = PROTOCOL.prompt, PROTOCOL.prefix, PROTOCOL.sentence
score, strict_success, complies = PROTOCOL.score, PROTOCOL.strict, PROTOCOL.complies
