"""Sentences of which grammars say whether they are acceptable, made by filling the constructions of `grammar.txt`."""

import random
import re
from pathlib import Path

_IRREGULAR = """
sleep slept slept|fall fell fallen|come came come|see saw seen|know knew known|write wrote written|eat ate eaten
break broke broken|give gave given|send sent sent|lend lent lent|sell sold sold|show showed shown|teach taught taught
tell told told|build built built|buy bought bought|make made made|find found found|read read read|leave left left
say said said|think thought thought|cut cut cut|hit hit hit|cost cost cost|sink sank sunk|throw threw thrown
bring brought brought|sing sang sung|drive drove driven|hide hid hidden|win won won|lose lost lost|swim swam swum
get got got|steal stole stolen|hurt hurt hurt|shake shook shaken|bend bent bent|draw drew drawn|choose chose chosen
freeze froze frozen|bite bit bitten|run ran run
"""
IRREGULAR = {v: (past, part) for v, past, part in (entry.split() for entry in re.split(r"[|\n]", _IRREGULAR.strip()))}
DOUBLED = {"cut", "hit", "run", "win", "swim", "get", "pat", "tap", "drip", "plan", "knit", "hop", "stop"}
PLURALS = {"man": "men", "woman": "women", "child": "children", "mouse": "mice", "wolf": "wolves", "knife": "knives"}


def plural(noun: str) -> str:
    if noun.endswith("y") and noun[-2] not in "aeou":
        return noun[:-1] + "ies"
    return PLURALS.get(noun) or noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def past(verb: str, participle: bool = False) -> str:
    if verb in IRREGULAR:
        return IRREGULAR[verb][participle]
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in "aeou":
        return verb[:-1] + "ied"
    return verb + (verb[-1] if verb in DOUBLED else "") + "ed"


def ing(verb: str) -> str:
    if verb == "die":
        return "dying"
    if verb.endswith("e") and not verb.endswith("ee"):
        return verb[:-1] + "ing"
    return verb + (verb[-1] if verb in DOUBLED else "") + "ing"


def er(adjective: str) -> str:
    return adjective + ("r" if adjective.endswith("e") else "er")


FORMS = {
    "v": lambda w: w, "s": plural, "ed": past, "en": lambda w: past(w, True), "ing": ing,
    "pl": plural, "er": er, "est": lambda w: er(w)[:-1] + "st",
}  # fmt: skip


CONSTRUCTIONS = Path(__file__).with_name("grammar.txt")
PHRASES = {
    "NP": ("{A}", "{A}", "the {PERSON}", "the {ADJ} {PERSON}", "[she|he|they|we|I]", "the {BEAST}"),
    "T": ("the {THING}", "the {THING}", "the {ADJ} {THING}", "a {THING}", "a {ADJ} {THING}", "[this|her] {THING}"),
}


class Grammar:
    """The constructions of a file."""

    def __init__(self, path: Path = CONSTRUCTIONS) -> None:
        self.words: dict[str, list[str]] = {}
        self.constructions: list[tuple[list[str], list[str]]] = []
        self.frames: list[str] = []
        part = ""
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("== "):
                part = line[3:]
            elif not line or line.startswith("#"):
                continue
            elif part in ("words", "verbs"):
                name, _, words = line.partition(": ")
                self.words[name] = [word.replace("_", " ") for word in words.split()]
            elif part == "frames":
                self.frames.append(line)
            elif line.startswith("= "):
                self.constructions.append(([], []))
            else:
                self.constructions[-1]["+-".index(line[0])].append(line[2:])

    def pair(self, chance: random.Random) -> tuple[str, str]:
        """A good sentence and a bad one of a construction, with the same words where both have the same slots."""
        good, bad = chance.choice(self.constructions)
        told: dict[str, str] = {}
        names = chance.sample(self.words["NAME_M"] + self.words["NAME_F"], 3)
        told.update(zip("ABC", names, strict=True))
        told.update(M=chance.choice(self.words["NAME_M"]), F=chance.choice(self.words["NAME_F"]))
        frame = chance.choice(self.frames) if chance.random() < 0.3 else "{S}"
        made = []
        for lines in (good, bad):
            text = self._fill(chance.choice(lines), told, chance)
            if frame != "{S}" and text[-1] not in "?!":
                text = self._fill(frame.replace("{S}", text), told, chance)
            made.append(finished(text))
        return made[0], made[1]

    def _fill(self, line: str, told: dict[str, str], chance: random.Random) -> str:
        line = re.sub(r"\[([^\]]*)\]", lambda found: chance.choice(found[1].split("|")), line)
        return re.sub(r"\{([^}]*)\}", lambda found: self._word(found[1], told, chance), line)

    def _word(self, slot: str, told: dict[str, str], chance: random.Random) -> str:
        form, _, name = slot.rpartition(":")
        if name not in told:
            kind = name.rstrip("2")
            if kind in PHRASES:
                told[name] = self._fill(
                    chance.choice(PHRASES[kind]).replace("THING", "THING" + name[len(kind) :]), told, chance
                )
            else:
                others = [told[other] for other in (kind, kind + "2") if other in told]
                told[name] = chance.choice([word for word in self.words[kind] if word not in others])
        return FORMS[form](told[name]) if form else told[name]

    def sentences(self, count: int, seed: int) -> list[tuple[str, int]]:
        """`count` of them, good (1) and bad (0) by turns; the same for the same seed."""
        chance, found = random.Random(seed), []
        while len(found) < count:
            good, bad = self.pair(chance)
            if good != bad:
                found += [(good, 1), (bad, 0)]
        return found[:count]


def finished(text: str) -> str:
    """With a capital, a mark at the end, and `an` before a vowel."""
    text = re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", re.sub(r"\s+", " ", text.strip()))
    text = text[:1].upper() + text[1:]
    return text if text.endswith(("?", "!", ".")) else text + "."


if __name__ == "__main__":
    for sentence, label in Grammar().sentences(200, 5):
        print(label, sentence)
