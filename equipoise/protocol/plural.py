"""A number with what it is a number of: "1 step", "2,000 steps"."""


def plural(number: float, noun: str, several: str | None = None, *, one: str = "1") -> str:
    """`number`, a whole one, with `noun` or with its plural (`several`; the noun with an s unless given).

    `one` is how a single one is written, for instance "a" or nothing.
    """
    if number == 1:
        return f"{one} {noun}".strip()
    return f"{number:,.0f} {several or noun + 's'}"
