"""A number and its noun agree."""

from equipoise.protocol.plural import plural


def test_one_is_singular_and_all_others_plural() -> None:
    assert [plural(n, "step") for n in (0, 1, 2, 2000)] == ["0 steps", "1 step", "2 steps", "2,000 steps"]
    assert plural(1.0, "sentence") == "1 sentence" and plural(60.0, "sentence") == "60 sentences"
    assert (plural(1, "batch", "batches"), plural(2, "batch", "batches")) == ("1 batch", "2 batches")
    assert plural(1, "step", one="") == "step" and plural(8, "step", one="") == "8 steps"
