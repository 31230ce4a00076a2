"""Ctrl-G, sampled: a language model guided by an automaton of the constraint and a hidden Markov model of itself.

After H. Zhang, P.-N. Kung, M. Yoshida, G. Van den Broeck and N. Peng (2024), "Adaptable Logical Control for Large
Language Models", arXiv 2406.13892. Where this differs: sentences are sampled, not beam-searched; the automaton reads
the tokens' bytes, so that every way to spell a word is covered; what may be written is decided by the automaton alone,
so that compliance does not depend on the model; every sentence comes with its importance weight.
"""

from typing import TYPE_CHECKING, Any

from equipoise.methods.ctrlg.config import CtrlGConfig

if TYPE_CHECKING:
    from equipoise.methods.ctrlg.writer import CtrlG, Written, check_feasible

__all__ = ["CtrlG", "CtrlGConfig", "Written", "check_feasible"]


def __getattr__(name: str) -> Any:
    """The writer's names, imported when first asked for: options and their help need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from equipoise.methods.ctrlg import writer

    return getattr(writer, name)
