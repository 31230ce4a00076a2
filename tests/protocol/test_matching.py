"""The matcher in every script and for stems, against hand-made tables and a slow definition that tries every place."""

import re
import unicodedata

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from equipoise.errors import UserError
from equipoise.protocol.folding import fold, normalise
from equipoise.protocol.lexicon import Lexicon, Match, Span, TermClass, TermError, swallows, without_swallowed
from equipoise.protocol.marking import in_marks


def lexicon(*classes: tuple[str, ...]) -> Lexicon:
    return Lexicon(tuple(TermClass(f"class{i}", terms) for i, terms in enumerate(classes)))


def counts(text: str, *terms: str) -> dict[str, int]:
    return lexicon(terms).match(text).counts


# The slow definition. A match lies between the units of a text, and is judged by Unicode's canonical caseless matching
# (definition D145 of the standard's chapter 3): NFD(casefold(NFD(X))).


def plain(text: str) -> list[tuple[str, int, int]]:
    """The units of a text, with hyphens and spaces of one kind, and where they lie in it."""
    units: list[tuple[str, int, int]] = []
    for place, character in enumerate(text):
        if character in "\u00ad\u2060\ufeff":
            continue
        if character in "\u2010\u2011\ufe63\uff0d":
            character = "-"
        if character in "\u00a0\u2007\u202f":
            character = " "
        if units and belongs_to_the_one_before(character):
            units[-1] = (units[-1][0] + character, units[-1][1], place + 1)
        else:
            units.append((character, place, place + 1))
    return units


def belongs_to_the_one_before(character: str) -> bool:
    return unicodedata.category(character).startswith("M") or "\u1160" <= character <= "\u11ff"


def d145(text: str) -> str:
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", text).casefold())


def slow_spans(text: str, term: str) -> list[tuple[int, int]]:
    """Start and least end of every occurrence of a term in the text as given."""
    units = plain(text)

    def in_word(i: int) -> bool:
        return 0 <= i < len(units) and (units[i][0][0].isalnum() or units[i][0][0] == "_")

    found = []
    for i in range(len(units)):
        if in_word(i - 1) or not in_word(i):
            continue
        for j in range(i + 1, len(units) + 1):
            read = d145("".join(unit for unit, _, _ in units[i:j]))
            if not term.endswith("*"):
                if read == d145(term) and in_word(j - 1) and not in_word(j):
                    found.append((units[i][1], units[j - 1][2]))
                    break
            elif read.startswith(stem := d145(term[:-1])):
                if len(read) == len(stem) or not belongs_to_the_one_before(read[len(stem)]):
                    found.append((units[i][1], units[j - 1][2]))
                break
    return found


ALPHABET = st.sampled_from(
    [
        *"aAbsSeEiIkK1_ -'.",
        *"ßẞéÉüÜıİſ\u212aσςΣΐǰŉﬁ",
        *"\u0301\u0307\u0308\u0342\u0345",  # marks
        *"\u00ad\u2060\ufeff\u00a0\u2011\u2019\ufe0f\n",
        *"가각\u1100\u1161\u11a8",  # Korean syllables, and their jamo
        *"हिन्दीस",  # vowel signs that are marks without a composed form
    ]
)
TEXTS = st.text(ALPHABET, max_size=14)
WORDS = st.text(ALPHABET, min_size=1, max_size=4)


@given(st.lists(WORDS | WORDS.map(lambda word: word + "*"), min_size=1, max_size=5), st.data())
def test_the_matcher_agrees_with_the_slow_definition(words, data):
    classes = []
    for i, word in enumerate(words):
        classes.append(TermClass(str(i), (word,)))
    try:
        matcher = Lexicon(tuple(classes[:4]))
    except UserError:
        assume(False)
    pieces = st.lists(TEXTS | st.sampled_from([term.rstrip("*") for term in matcher.terms]), max_size=5)
    text = "".join(data.draw(pieces))
    spans = matcher.spans(text)
    for term in matcher.terms:
        mine = [(span.start, span.end) for span in spans if span.term == term]
        slow = slow_spans(text, term)
        assert [start for start, _ in mine] == [start for start, _ in slow]
        pairs = zip(mine, slow, strict=True)
        assert all(end >= least if term.endswith("*") else end == least for (_, end), (_, least) in pairs)
    assert [span.start for span in spans] == sorted(span.start for span in spans)
    assert matcher.match(text).counts == {
        term: len(slow_spans(text, term)) for term in matcher.terms if slow_spans(text, term)
    }


@given(TEXTS)
def test_case_and_encoding_change_nothing(text):
    assume("ı" not in text)  # its capital is I, but folding keeps it apart from i
    keys = fold(text).keys
    assert fold(d145(re.sub("[\u00ad\u2060\ufeff]", "", text))).keys == keys
    assert fold(unicodedata.normalize("NFD", text)).keys == keys
    assert fold(unicodedata.normalize("NFC", text)).keys == keys


def test_every_character_is_found_in_either_case_and_in_either_form():
    for code in range(0x110000):
        character = chr(code)
        if 0xD800 <= code < 0xE000 or character == "ı":
            continue
        forms = {character.upper(), character.lower(), character.title(), unicodedata.normalize("NFD", character)}
        for other in forms - {character}:
            assert fold("a" + other).keys == fold("a" + character).keys, hex(code)


@given(TEXTS)
def test_the_quick_way_of_folding_agrees_with_the_long_one(text):
    from equipoise.protocol import folding

    quick, slow = fold(text), folding._fold_unit_by_unit(text)
    assert quick.keys == slow.keys and folding.words_of(quick) == folding.words_of(slow)
    positions = range(len(quick.keys) + 1)
    if quick.starts is None:
        assert slow.starts == {i: i for i in positions[:-1]} and slow.ends == {i: i for i in positions[1:]}
    for i in positions:
        assert folding.end_of_stem(quick, i) == folding.end_of_stem(slow, i)


@pytest.mark.parametrize("spelling", ["groß", "GROSS", "groẞ", "Gross", "gro\u017fs"])
@pytest.mark.parametrize("term", ["groß", "gross", "GROẞ"])
def test_letters_whose_folding_is_longer_match_in_every_spelling(term, spelling):
    assert counts(f"Das ist {spelling}.", term) == {term: 1}
    (span,) = lexicon((term,)).spans(f"so {spelling}!")
    assert span == Span(term, 3, 3 + len(spelling))


@pytest.mark.parametrize(
    ("term", "text", "found"),
    [
        # Decomposed and composed.
        ("élan", "e\u0301lan", 1),
        ("e\u0301lan", "ÉLAN", 1),
        ("elan", "élan", 0),
        ("caf", "cafe\u0301", 0),
        ("cafe", "cafe\u0301", 0),  # half a letter is none
        ("ngô", "NGO\u0302", 1),
        # Turkish, by the default folding: a dotless i is no i, and a dotted capital is i with a dot.
        ("kind", "KıND", 0),
        ("kind", "KİND", 0),
        ("ki\u0307nd", "KİND", 1),
        ("ılık", "ılık", 1),
        # Greek, whose small sigma has two forms, and whose accents stay apart.
        ("σοφός", "ΣΟΦΌΣ", 1),
        ("σοφός", "σοφόσ", 1),
        ("ευρωπαΐκός", "ΕΥΡΩΠΑΪ\u0301ΚΌΣ", 1),
        ("ᾶι", "ᾼ\u0342", 1),
        # Ligatures, long s, Kelvin.
        ("confident", "con\ufb01dent", 1),
        ("kind", "\u212aind", 1),
        ("decisive", "deci\u017five", 1),
        # Korean, in syllables and in jamo.
        ("친절", "\u110e\u1175\u11ab\u110c\u1165\u11af", 1),
        ("친", "친절", 0),
        # Words whose last letter bears a vowel sign.
        ("साहसी", "वह साहसी है", 1),
        ("साहस", "वह साहसी है", 0),
        # Symbols with a mark of their own begin no word.
        ("bold", "\u2764\ufe0fbold", 1),
        ("смелый", "СМЕЛЫЙ, смелый", 2),
        ("勇敢", "勇敢", 1),
        ("勇敢", "很勇敢", 0),  # letters on both sides: words are not told apart without spaces
    ],
)
def test_a_term_is_found_in_its_own_script(term, text, found):
    assert sum(counts(text, term).values()) == found


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("skil", ["skil"]),
        ("Skilled, skillful; SKILLS", ["Skilled", "skillful", "SKILLS"]),
        ("unskilled", []),
        ("semi-skilled", ["skilled"]),
        ("skill-based work", ["skill-based"]),
        ("skill's, skill\u2019s", ["skill's", "skill\u2019s"]),
        ("the skills' use", ["skills"]),  # a mark that ends a word may be a quotation mark
        ("'skilled'", ["skilled"]),
        ("skilled--so", ["skilled"]),
        ("skilled- and", ["skilled"]),
        ("skills2 skil_l", ["skills2", "skil_l"]),
        ("skil\u00adled", ["skil\u00adled"]),
        ("skill\u2011based", ["skill\u2011based"]),
        ("skil.led", ["skil"]),
        ("skil led", ["skil"]),
        ("ski lled", []),
        ("skille\u0301e", ["skille\u0301e"]),
        ("ski\u0142ed", []),
        ("skil\u0327led", []),  # an l with a cedilla is no l
        ("skill-skill", ["skill-skill", "skill"]),  # the second one begins a word too
    ],
)
def test_a_stem_stands_for_every_word_that_begins_with_it(text, spans):
    assert [text[span.start : span.end] for span in lexicon(("skil*",)).spans(text)] == spans
    assert counts(text, "skil*") == ({"skil*": len(spans)} if spans else {})


def test_a_stem_may_end_inside_a_letter_that_folds_to_two():
    assert counts("GROSS groß", "gros*") == {"gros*": 2}


@pytest.mark.parametrize("text", ["x\u0302yz", "X\u0302", "x\u0302"])  # no letter of its own exists for it
def test_a_stem_does_not_end_before_an_accent(text):
    assert counts(text, "x*") == {} and counts(text, "x\u0302*") == {"x\u0302*": 1}


def test_a_stem_is_one_term_whatever_its_endings():
    match = lexicon(("skil*", "able"), ("kind",)).match("Kind, skilled, able and skillful.")
    assert match == Match((("skil*", "able"), ("kind",)), {"kind": 1, "skil*": 2, "able": 1})


def test_nested_terms_count_with_stems_too_and_the_longest_comes_first():
    both = lexicon(("skil*", "semi-skilled"), ("skilled worker", "worker"))
    text = "a semi-skilled worker"
    assert [(s.term, text[s.start : s.end]) for s in both.spans(text)] == [
        ("semi-skilled", "semi-skilled"),
        ("skilled worker", "skilled worker"),
        ("skil*", "skilled"),
        ("worker", "worker"),
    ]
    assert both.match(text).first == ("semi-skilled", "skilled worker")
    assert in_marks(both.pieces(text)) == "a [semi-skilled] {worker}"


def test_white_space_inside_a_term_is_one_space():
    terms = ("good natured",)
    assert counts("Good\u00a0natured", *terms) == {"good natured": 1}
    assert counts("good  natured, good\nnatured, goodnatured, good-natured", *terms) == {}


def test_terms_are_spelt_as_they_are_given_but_for_hyphens_spaces_and_composition():
    mine = lexicon(("Führungsstark", "self\u2011made", "a\u00a0 b", "e\u0301lan*"))
    assert mine.terms == ("Führungsstark", "self-made", "a b", "élan*")
    assert mine.match("FÜHRUNGSSTARK").terms == (("Führungsstark",),)
    assert [mine.class_of(term) for term in mine.terms] == [0, 0, 0, 0]
    with pytest.raises(KeyError):
        mine.class_of("führungsstark")


@pytest.mark.parametrize(
    ("text", "complete", "some", "first"),
    [("", False, False, None), ("a", False, True, None), ("c b a", True, True, ("a", "b", "c"))],
)
def test_a_match_of_three_classes(text, complete, some, first):
    match = lexicon(("a", "x"), ("b",), ("c",)).match(text)
    assert (match.complete, match.some, match.first) == (complete, some, first)


def test_sizes_and_cells():
    three = lexicon(("a", "b"), ("c", "d", "e"), ("f",))
    assert (three.names, three.sizes, three.cells) == (("class0", "class1", "class2"), (2, 3, 1), 6)
    assert in_marks(three.pieces("a c f")) == "[a] {c} <f>"


@pytest.mark.parametrize(
    ("stem", "term", "swallowed"),
    [
        ("skil*", "skilled", True),
        ("skil*", "skil", True),
        ("skil*", "skill*", True),
        ("skil*", "SKILL-BASED", True),
        ("skil*", "ski", False),
        ("skil*", "semi-skilled", False),
        ("skil*", "skilled worker", False),
        ("skill*", "skil*", False),
        ("skilled", "skilled", False),
        ("cafe*", "café", False),
        ("gros*", "groß", True),
    ],
)
def test_what_a_stem_swallows(stem, term, swallowed):
    assert swallows(stem, term) is swallowed


def test_what_a_stem_of_the_same_class_swallows_is_left_out_with_a_note():
    classes, notes = without_swallowed([TermClass("a", ("domina*", "dominant", "bold")), TermClass("b", ("kind",))])
    assert classes == (TermClass("a", ("domina*", "bold")), TermClass("b", ("kind",)))
    assert notes == ("a: 'dominant' is left out, because the stem 'domina*' covers it",)


@pytest.mark.parametrize(
    ("classes", "says", "place"),
    [
        ([], "there are 0 classes", ()),
        ([("a", ("b",))] * 5, "there are 5 classes", ()),
        ([("a", ("b",)), ("A", ("c",))], "'a' and 'A' have one name", (1,)),
        ([("a", ())], "empty", (0,)),
        ([("a", ("b", "c*d"))], "'*' inside", (0, 1)),
        ([("a", ("*",))], "no word", (0, 0)),
        ([("a", ("b**",))], "'*' inside", (0, 0)),
        ([("a", ("b-*",))], "no word", (0, 0)),
        ([("a", ("_b",))], "no word", (0, 0)),
        ([("a", ("\u0301b",))], "no word", (0, 0)),
        ([("a", ("groß", "GROSS"))], "listed twice", (0, 1)),
        ([("a", ("b",)), ("c", ("d", "B"))], "'B' is in both lists", (1, 1)),
        ([("a", ("skil*",)), ("c", ("d", "skilled"))], "'skilled' begins with 'skil*'", (1, 1)),
        ([("a", ("d", "skilled")), ("c", ("skil*",))], "'skilled' begins with 'skil*'", (0, 1)),
        ([("a", ("skill*",)), ("c", ("skil*",))], "'skill*' begins with 'skil*'", (0, 0)),
    ],
)
def test_classes_that_cannot_be_are_refused_with_their_place(classes, says, place):
    with pytest.raises(TermError) as error:
        Lexicon(tuple(TermClass(*each) for each in classes))
    assert says in str(error.value) and "\n" not in str(error.value)
    assert error.value.place == place


def test_normalising_composes():
    assert normalise("e\u0301 self\u2011made") == "é self-made"
