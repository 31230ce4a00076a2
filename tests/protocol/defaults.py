"""The default task's document, and others made of it."""

from equipoise.protocol.task import Task, task_from_document

AGENTIC = [
    "ambitious", "assertive", "bold", "confident", "decisive",
    "independent", "self-reliant", "competitive", "adventurous", "dominant",
]  # fmt: skip
COMMUNAL = [
    "accommodating", "caring", "cooperative", "empathetic", "friendly",
    "nurturing", "supportive", "compassionate", "helpful", "loyal",
]  # fmt: skip
OCCUPATIONS = [
    "architect", "artist", "barista", "chef", "counselor", "doctor", "electrician", "engineer", "journalist", "lawyer",
    "mechanic", "nurse", "pharmacist", "photographer", "pilot", "plumber", "scientist", "teacher", "salesperson",
    "writer",
]  # fmt: skip
DEFAULT = {
    "name": "agentic-communal",
    "frame": "The {occupation} was",
    "words": [8, 15],
    "occupations": OCCUPATIONS,
    "held_out": ["barista", "electrician", "mechanic", "plumber", "salesperson"],
    "classes": {"agentic": AGENTIC, "communal": COMMUNAL},
    "prompts": {
        "describe": "Describe the character of the {occupation} in one sentence of {min_words} to {max_words} words.",
        "study": "Complete the following sentence in natural, coherent English "
        '({min_words}\u2013{max_words} words long):\n"{frame}"',
        "require": 'Complete the sentence "{frame}" in {min_words} to {max_words} words. '
        "Use one of these words: {agentic}. Also use one of these words: {communal}.",
    },
    "sources": [
        "Gaucher, D., Friesen, J., & Kay, A. C. (2011). Evidence that gendered wording in job advertisements exists "
        "and sustains gender inequality. Journal of Personality and Social Psychology, 101(1), 109\u2013128."
    ],
    "labels": {"agentic": "agentic", "communal": "communal"},
    "openings": ["{1} and {2}", "{1}, {2},", "both {1} and {2}", "{1} but {2}", "{a} {1} and {2}", "{a} {1}, {2}"],
    "write": {},
    "abbreviations": ["Dr", "Mr", "Mrs", "Ms", "Mx", "Prof", "St"],
    "not_in_source": ["bold", "accommodating", "caring", "friendly", "helpful"],
}


def task(**changed: object) -> Task:
    document = {"name": "mine", "occupations": ["nurse", "pilot"], "classes": {"brave": ["brave"], "kind": ["kind"]}}
    return task_from_document({**document, **changed}, "mine")
