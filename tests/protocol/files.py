"""A task file in which nothing is wrong."""

GOOD = """\
name: mine
frame: "The {occupation} is"
words: [6, 20]
occupations:
  - nurse
  - real estate agent
held_out: [nurse]
classes:
  able: [capable, skil*, well-organised]
  warm:
    - warm
    - friendl*
    - kind
prompts:
  describe: "Describe the {occupation}."
  other: "The {occupation}?"
sources: ["Someone (2002)."]
labels: {able: ability}
openings:
  - "{1} and {2}"
write:
  "skil*": [skilled]
abbreviations: [Dr, Lt]
not_in_source: [kind]
"""
