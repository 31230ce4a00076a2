"""Texts made fit to be shown: whatever a name, note or sentence holds, a reader sees that it is there."""

import re

# Controls but for the line break and tab, what turns the direction of the text after it, and halves of surrogate pairs.
# Each is replaced by one character, so that positions stay.
_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def visible(text: str) -> str:
    """`text` with each control character as its picture (NUL as ␀) and what no file can hold as �."""
    return _UNSHOWN.sub(lambda hit: chr(0x2400 + ord(hit[0])) if hit[0] < "\x20" else "\ufffd", text)


def shortened(name: str, most: int = 40) -> str:
    """`name` in `most` characters, what is too much cut out of its middle: names that differ often do so at the end."""
    tail = most // 2
    return name if len(name) <= most else f"{name[: most - tail - 1]}…{name[-tail:]}"
