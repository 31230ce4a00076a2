"""From a document to the parts of a task: what is missing is filled in, what cannot be is refused with its line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from equipoise.errors import UserError
from equipoise.protocol.folding import fold_term
from equipoise.protocol.lexicon import Lexicon, TermClass, TermError, checked, spell, swallows, without_swallowed
from equipoise.protocol.possible import Occupation, check_beginning, check_bounds, check_opening, unsayable
from equipoise.protocol.prompts import (
    PLACE,
    RAW,
    Prompt,
    filled,
    open_with,
    placeholders,
    require_template,
    word_count,
    words_to_write,
)
from equipoise.protocol.task_file import Document
from equipoise.protocol.task_values import Values, kind, nearest
from equipoise.protocol.task_words import word_lists

KEYS = (
    "name", "frame", "words", "occupations", "held_out", "classes", "prompts", "sources",
    "labels", "openings", "write", "abbreviations", "not_in_source", "gendered", "negations",
)  # fmt: skip
"""The keys of a task file, in the order in which `Task.document` writes them."""

RESERVED = frozenset(
    (
        "text", "words", "base", "bonus", "length_penalty", "lengthpenalty", "repetition_penalty", "repetitionpenalty",
        "reward", "strict", "sentence", "inlength", "model", "occupation", "occupations", "runid", "wordcount", "label",
        "method", "seed", "both", "one", "none", "neither", "any", "all", "step", "file", "line", "measured",
        "duplicate", "gendered", "negated", "outcome", "complete", "nll", "tokens", "acceptable", "frame", "min_words",
        "max_words",
    )
)  # fmt: skip
"""Names that no class may have, whatever their case: columns and words of the files that are written."""


class Defaults(NamedTuple):
    """What a task file need not say."""

    frame: str
    words: tuple[int, int]
    templates: Mapping[str, str]
    """Of prompts by name, `require` not among them."""
    abbreviations: tuple[str, ...]


def parts_of(document: Document, defaults: Defaults | None) -> dict[str, Any]:
    """The fields of a Task. Raises UserError, with file and line, for what cannot be.

    Without `defaults` only what is after `sources` may be left out.
    """
    return _Checks(document, defaults).parts()


class _Checks(Values):
    def __init__(self, document: Document, defaults: Defaults | None) -> None:
        super().__init__(document)
        self.defaults = defaults
        for key in self.data:
            if key not in KEYS:
                raise self.error(f"there is no key {key!r}{nearest(key, KEYS)}; the keys are {', '.join(KEYS)}", key)
        for key in ("name", "occupations", "classes") if defaults else KEYS[:8]:
            if self.data.get(key) is None:
                raise self.error(f"the task has no {key}; add `{key}:`, as in the packaged task files", key)

    def parts(self) -> dict[str, Any]:
        name = self.text(self.data["name"], "the name", "name")
        occupations = self.occupations()
        abbreviations = self.abbreviations()
        frame = self.frame(occupations, abbreviations)
        classes, notes = self.classes(abbreviations)
        lexicon = Lexicon(classes)
        min_words, max_words = self.bounds(frame, occupations, lexicon)
        begun = min((frame.replace(PLACE, occupation.frame) for occupation in occupations), key=word_count)
        labels = self.labels(lexicon.names)
        write = self.write(lexicon)
        words = {name: words_to_write(terms, dict(write)) for name, terms in classes}
        return {
            "name": name,
            "classes": classes,
            "occupations": occupations,
            "held_out": self.held_out(occupations),
            "frame": frame,
            "min_words": min_words,
            "max_words": max_words,
            "prompts": self.prompts(placeholders(frame, min_words, max_words, words), words, labels, lexicon),
            "sources": self.texts("sources"),
            "labels": labels,
            "openings": self.openings(lexicon, tuple(words.values()), begun, max_words, abbreviations),
            "write": write,
            "abbreviations": abbreviations,
            "not_in_source": self.not_in_source(lexicon),
            "lists": word_lists(self),
            "notes": notes,
        }

    # The keys.

    def occupations(self) -> tuple[Occupation, ...]:
        value = self.data["occupations"]
        if isinstance(value, Mapping):
            given = self.mapping(value, "`occupations`", "nurse: nurse", "occupations")
            found = [self.occupation(name, forms) for name, forms in given.items()]
        else:
            entries = self.list(value, "`occupations`", "occupations")
            listed = [self.text(entry, "an occupation", "occupations", i) for i, entry in enumerate(entries)]
            found = [Occupation(name, name, name) for name in listed]
        if not found:
            raise self.error("the list of occupations is empty; it needs at least one", "occupations")
        names: dict[str, str] = {}
        frames: dict[str, str] = {}
        for (name, frame, _), place in zip(found, self.places("occupations"), strict=True):
            if other := names.get(fold_term(name)):
                twice = "comes twice" if other == name else f"is {other!r} in other letters"
                raise self.error(f"the occupation {name!r} {twice}; remove one", *place)
            if other := frames.get(fold_term(frame)):
                message = f"the occupation {name!r} stands in the frame as {other!r} does, as {frame!r}; remove one"
                raise self.error(message, *place)
            names[fold_term(name)] = name
            frames[fold_term(frame)] = name
        return tuple(found)

    def occupation(self, key: str, forms: Any) -> Occupation:
        name, place = self.text(key, "an occupation", "occupations", key), ("occupations", key)
        if not isinstance(forms, Mapping):
            form = self.text(forms, f"the occupation {name!r}", *place)
            return Occupation(name, form, form)
        for part in self.mapping(forms, f"the occupation {name!r}", "frame: nurse", *place):
            if part not in ("frame", "prompt"):
                raise self.error(f"there is no {part!r} of an occupation; give `frame` and `prompt`", *place, part)
        frame, prompt = (
            self.text(forms.get(part, name), f"the {part} of {name!r}", *place, part) for part in ("frame", "prompt")
        )
        return Occupation(name, frame, prompt)

    def held_out(self, occupations: Sequence[Occupation]) -> tuple[str, ...]:
        names = [occupation.name for occupation in occupations]
        held_out = self.texts("held_out")
        for i, name in enumerate(held_out):
            if name not in names:
                raise self.error(f"{name!r}, held out, is no occupation{nearest(name, names)}", "held_out", i)
        if len(held_out) == len(names):
            raise self.error("all occupations are held out, which leaves none to train on; keep one", "held_out")
        return held_out

    def abbreviations(self) -> tuple[str, ...]:
        if self.data.get("abbreviations") is None and self.defaults:
            return self.defaults.abbreviations
        found = tuple(each.rstrip(".") for each in self.texts("abbreviations"))
        for i, each in enumerate(found):
            if not each[:1].isalnum():
                message = "an abbreviation begins with no letter or digit; write it as in `Dr`, without its last point"
                raise self.error(message, "abbreviations", i)
        return found

    def frame(self, occupations: Sequence[Occupation], abbreviations: tuple[str, ...]) -> str:
        given = self.data.get("frame")
        frame = self.defaults.frame if given is None and self.defaults else self.text(given, "the frame", "frame")
        if frame.count(PLACE) != 1:
            raise self.error(
                f"the frame {frame!r} has {PLACE} {frame.count(PLACE)} times; it stands there exactly once", "frame"
            )
        self.begins(frame, "x", abbreviations, "frame")
        for occupation, place in zip(occupations, self.places("occupations"), strict=True):
            self.begins(frame, occupation.frame, abbreviations, *place)
        return frame

    def begins(self, frame: str, form: str, abbreviations: tuple[str, ...], *place: str | int) -> None:
        try:
            check_beginning(frame.replace(PLACE, form), abbreviations)
        except UserError as error:
            raise self.error(str(error), *place) from None

    def places(self, key: str) -> Sequence[tuple[str | int, ...]]:
        """Where the entries of a list, or of a mapping, stand."""
        value = self.data[key]
        return [(key, each) for each in (value if isinstance(value, Mapping) else range(len(value)))]

    def bounds(self, frame: str, occupations: Sequence[Occupation], lexicon: Lexicon) -> tuple[int, int]:
        given = self.data.get("words")
        bounds = self.defaults.words if given is None and self.defaults else given
        if not (isinstance(bounds, list | tuple) and len(bounds) == 2 and all(type(bound) is int for bound in bounds)):
            raise self.error(f"`words` is {kind(bounds)}; expected two whole numbers: `words: [8, 15]`", "words")
        min_words, max_words = bounds
        try:
            check_bounds(min_words, max_words, frame, occupations, lexicon)
        except UserError as error:
            raise self.error(str(error), "words") from None
        return min_words, max_words

    def classes(self, abbreviations: tuple[str, ...]) -> tuple[tuple[TermClass, ...], tuple[str, ...]]:
        given = self.mapping(self.data["classes"], "`classes`", "warm: [kind, friendl*]", "classes")
        classes: list[TermClass] = []
        for name, terms in given.items():
            place: tuple[str | int, ...] = ("classes", name)
            if not re.fullmatch(r"[\w-]+", name) or not any(map(str.isalnum, name)):
                message = f"a class is named {name!r}; use letters or digits, and '-' and '_' between them"
                raise self.error(message, *place)
            if name.casefold() in RESERVED:
                raise self.error(f"a class is named {name!r}, as something else in the files; rename it", *place)
            listed = self.list([] if terms is None else terms, f"the class {name!r}", *place)
            words = [self.text(term, f"a term of {name!r}", *place, i) for i, term in enumerate(listed)]
            classes.append(TermClass(name, tuple(words)))
        try:
            found = without_swallowed(checked(classes))
        except TermError as error:
            place = ("classes", *(classes[number].name for number in error.place[:1]), *error.place[1:])
            raise self.error(str(error), *place) from None
        if each := unsayable(found[0], abbreviations):
            message = f"every term of {each.name!r} ends a sentence within, as {each.terms[0]!r} does, so that no one "
            message += "sentence can hold it; leave its end mark out, or list it under `abbreviations`"
            raise self.error(message, "classes", each.name)
        return found

    def labels(self, names: Sequence[str]) -> tuple[str, ...]:
        given = self.data.get("labels")
        labels = {} if given is None else self.mapping(given, "`labels`", f"{names[0]}: ...", "labels")
        for name in labels:
            if name not in names:
                raise self.error(f"there is no class {name!r} to label{nearest(name, names)}", "labels", name)
        return tuple(self.text(labels.get(name, name), f"the label of {name!r}", "labels", name) for name in names)

    def write(self, lexicon: Lexicon) -> tuple[tuple[str, tuple[str, ...]], ...]:
        given = {} if self.data.get("write") is None else self.data["write"]
        found: dict[str, tuple[str, ...]] = {}
        for key, listed in self.mapping(given, "`write`", '"skil*": [skilled]', "write").items():
            term = self.term(key, lexicon, "write", key)
            words = self.distinct(listed, f"the words for {term!r}", "write", key)
            if words and not term.endswith("*"):
                message = f"{term!r} is written as it is; only a stem, as in 'skil*', has words ([]: never write it)"
                raise self.error(message, "write", key)
            for i, word in enumerate(words):
                if not any(span.term == term for span in lexicon.spans(word)):
                    raise self.error(f"{word!r} does not begin with {term!r}; write words that do", "write", key, i)
                own = lexicon.class_of(term)
                if other := [t for n, terms in enumerate(lexicon.match(word).terms) if n != own for t in terms]:
                    message = (
                        f"{word!r}, to be written for {term!r}, holds {other[0]!r} of another class; leave that out"
                    )
                    raise self.error(message, "write", key, i)
            if term in found:
                raise self.error(f"the words for {term!r} are given twice; keep one of the two", "write", key)
            found[term] = words
        return tuple(found.items())

    def term(self, given: str, lexicon: Lexicon, *place: str | int) -> str:
        """The term of the lexicon that `given` spells."""
        for term in lexicon.terms:
            if fold_term(term) == fold_term(spell(given)):
                return term
        covering = next((f", for {stem!r} covers it" for stem in lexicon.terms if swallows(stem, given)), "")
        raise self.error(f"{given!r} is no term of the classes{covering or nearest(given, lexicon.terms)}", *place)

    def not_in_source(self, lexicon: Lexicon) -> tuple[str, ...]:
        given = self.texts("not_in_source")
        return tuple(self.term(term, lexicon, "not_in_source", i) for i, term in enumerate(given))

    def openings(
        self,
        lexicon: Lexicon,
        words: Sequence[Sequence[str]],
        begun: str,
        max_words: int,
        abbreviations: tuple[str, ...],
    ) -> tuple[str, ...]:
        """`begun`: the shortest of the frames with their occupations."""
        openings = self.texts("openings")
        numbers = [str(number + 1) for number in range(len(words))]
        for i, opening in enumerate(openings):
            places = re.findall(r"\{(a|[0-9]+)\}", opening)
            if {*places} - {"a"} != {*numbers} or places[-1] == "a":
                wanted = ", ".join(f"{{{number}}}" for number in numbers)
                message = f"the opening {opening!r} needs {wanted}, and a number after each {{a}}; no other numbers"
                raise self.error(message, "openings", i)
            if all(words):
                filled_in = open_with(opening, [min(own, key=word_count) for own in words])
                try:
                    check_opening(opening, filled_in, begun, max_words, abbreviations)
                except UserError as error:
                    raise self.error(str(error), "openings", i) from None
                if not lexicon.match(filled_in).complete:
                    message = f"the opening {opening!r} makes other words of the terms; keep them apart"
                    raise self.error(message, "openings", i)
        return openings

    def prompts(
        self, values: Mapping[str, str], words: Mapping[str, Sequence[str]], labels: Sequence[str], lexicon: Lexicon
    ) -> tuple[Prompt, ...]:
        given = self.data.get("prompts")
        writable = [name for name, own in words.items() if own]
        if given is None and self.defaults:
            templates = {**self.defaults.templates, "require": require_template(writable)}
        else:
            templates = dict(self.mapping(given, "`prompts`", 'describe: "Describe the {occupation}."', "prompts"))
            if not templates:
                raise self.error(
                    "there are no prompts; give one, or leave out the key to have the default ones", "prompts"
                )
        prompts: list[Prompt] = []
        for name, template in templates.items():
            if name == RAW:
                raise self.error(f"the prompt {RAW!r} is the one without an instruction; rename it", "prompts", name)
            self.text(template, f"the prompt {name!r}", "prompts", name)
            try:
                prompts.append(filled(name, template.strip(), values))
            except UserError as error:
                raise self.error(str(error), "prompts", name) from None
        if "require" not in templates:
            # A label may hold a term, which is no leak where the words that follow name it too.
            named = {term for own in words.values() for term in lexicon.match(", ".join(own)).counts}
            labelled = [f"{label}: " if named.issuperset(lexicon.match(label).counts) else "" for label in labels]
            lines = [f"{label}{{{name}}}" for name, label in zip(words, labelled, strict=True) if name in writable]
            prompts.append(filled("require", "\n".join([prompts[0].template, *lines]), values))
        return (*prompts, Prompt(RAW, None))
