"""A look at a task before GPU hours are spent: what a model reads, what leaks, whether and how often it can be met."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from equipoise.errors import UserError
from equipoise.measures.shares import wilson
from equipoise.methods.ctrlg.feasible import fewest_words
from equipoise.protocol.plural import plural
from equipoise.protocol.prompts import Prompt, word_count
from equipoise.protocol.task import Task

SHOWN = 6
"""Prefixes and terms that are listed in full; of more, so many and their number."""
ENOUGH = 0.05
"""A base rate of every class from which PPO finds enough to learn from by itself: with 64 sentences a step, three."""


@dataclass(frozen=True)
class Inspection:
    """Lines for a person, and whether sentences that succeed strictly exist for every occupation."""

    lines: tuple[str, ...]
    feasible: bool


def inspect_task(task: Task, max_new_tokens: int = 32) -> Inspection:
    """All that can be said without a model that writes at most so many tokens. Takes a second or two."""
    lines = [
        f"task       {task.name}: {plural(len(task.names), 'occupation')}, {len(task.held_out)} of them held out",
        *(f"note       {note}" for note in task.notes),
        *_classes(task),
        f"length     {task.bounds}, the frame included",
        *_prefixes(task),
        *_prompts(task),
        *(f"leak       {leak}" for leak in leaks(task)),
        *(f"nested     {pair}" for pair in nested(task)),
        *_forcing(task),
        *_beside(task),
    ]
    problems = infeasible(task, max_new_tokens)
    lines += [f"CANNOT     {problem}" for problem in problems] or [_feasible_line(task)]
    return Inspection(tuple(lines), not problems)


def _shortened(items: list[str]) -> str:
    more = f", … ({len(items)} in all)" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more


def _classes(task: Task) -> Iterator[str]:
    for each, label in zip(task.classes, task.labels, strict=True):
        named = each.name if label == each.name else f"{each.name} ({label})"
        yield f"class      {named}: {_shortened(list(each.terms))}"
    possible = f"{task.pair_count} {task.pair_noun} are possible"
    yield f"           a sentence complies with a term of {task.all_classes}; {possible}"


def _prefixes(task: Task) -> Iterator[str]:
    for name in task.names[:SHOWN]:
        yield f"prefix     {task.prefix(name)!r}"
    if len(task.names) > SHOWN:
        yield f"           … and {len(task.names) - SHOWN} more"


def _prompts(task: Task) -> Iterator[str]:
    for number, prompt in enumerate(task.prompts):
        message = task.user_message(prompt, task.names[0])
        default = ", the default" if number == 0 else ""
        yield (
            f"prompt     {prompt.name}{default}: {message!r}"
            if message
            else f"prompt     {prompt.name}: no instruction"
        )


def _beside(task: Task) -> Iterator[str]:
    """What an evaluation looks for beside the terms."""
    lists = task.lists.for_frame(task.frame)
    for key, own, count, noun in (
        ("gendered", task.lists.gendered, sum(len(words) for _, words in lists.gendered or ()), "gendered word"),
        ("negations", task.lists.negations, len(lists.negations.cues if lists.negations else ()), "negation cue"),
    ):
        if count:
            whose = "the task's" if own is not None else "English, as the frame is"
            yield f"evaluated  {plural(count, noun)} looked for ({whose})"
        elif own is None:
            yield f"evaluated  no {noun}s looked for, since the frame is not known as English: `{key}` names them"


def leaks(task: Task) -> list[str]:
    """Terms that the model reads in a prompt, the frame or an occupation, and would earn by copying, a line each."""
    found = []
    in_frames = {name: tuple(task.match(task.prefix(name)).counts) for name in task.names}
    for name, terms in in_frames.items():
        if terms:
            found.append(f"{task.prefix(name)!r} already holds {', '.join(terms)}: every sentence of {name!r} has it")
    for prompt in task.prompts:
        plain: Prompt = task.leak_free(prompt)
        held: dict[str, str] = {}
        for name in task.names:
            message = task.user_message(plain, name) or ""
            for term in task.match(message).counts:
                if term not in in_frames[name]:
                    held.setdefault(term, name)
        if held:
            found.append(
                f"the prompt {prompt.name!r} holds {', '.join(held)}, which a model can earn by copying: "
                "word it otherwise"
            )
    return found


def nested(task: Task) -> list[str]:
    """Terms that hold another term, so that one word or phrase counts twice, a line each."""
    lines = []
    for outer in task.lexicon.terms:
        inner = [term for term in task.match(outer.removesuffix("*")).counts if term != outer]
        for term in inner:
            classes = {task.classes[task.lexicon.class_of(each)].name for each in (outer, term)}
            lines.append(
                f"{outer!r} holds {term!r}: where the one stands, both count ({' and '.join(sorted(classes))})"
            )
    return lines


def _forcing(task: Task) -> Iterator[str]:
    if task.can_force:
        words = " × ".join(str(len(task.words_of(number))) for number in range(len(task.classes)))
        yield f"warm start forced sentences can be written: {plural(len(task.openings), 'opening')}, {words} words"
    elif task.openings:
        lacking = [c.name for n, c in enumerate(task.classes) if not task.words_of(n)]
        yield f"warm start no forced sentences: the stems of {', '.join(lacking)} have no words under `write`"
    else:
        yield "warm start no forced sentences, since the task has no openings: free samples are learnt if enough comply"


def infeasible(task: Task, max_new_tokens: int) -> list[str]:
    """Why sentences of some occupations cannot succeed strictly, a line each; nothing where all can."""
    problems: dict[str, list[str]] = {}
    for name in task.names:
        try:
            needed = fewest_words(task, name)
        except UserError as error:
            problems.setdefault(str(error), []).append(name)
            continue
        if needed > task.max_words:
            reason = f"the shortest sentence has {needed} words, and at most {task.max_words} are allowed: raise words"
            problems.setdefault(reason, []).append(name)
    try:
        task.check_new_tokens(max_new_tokens)
    except UserError as error:
        problems.setdefault(str(error), []).extend(task.names)
    return [f"{_shortened(names)}: {reason}" for reason, names in problems.items()]


def _feasible_line(task: Task) -> str:
    longest = max(task.names, key=lambda name: word_count(task.prefix(name)))
    fewest = max(fewest_words(task, longest), task.min_words)
    return f"feasible   yes: {task.prefix(longest)!r} can be ended in {plural(fewest, 'word')}"


def look_with_model(
    task: Task,
    model: str,
    prompt: str | None,
    samples: int,
    max_new_tokens: int,
    device: str,
    say: Callable[[str], None],
) -> None:
    """What the model makes of the task: the prompt as it reads it, the tokens it needs, and how often it complies.

    Says a line after the other. Raises UserError, also where no sentence fits into the new tokens.
    """
    # Only here: without a model no command needs torch.
    from equipoise.methods.ctrlg.config import CtrlGConfig
    from equipoise.methods.ctrlg.writer import check_feasible
    from equipoise.policy.config import PolicyConfig, SamplingConfig
    from equipoise.policy.load import load_for_generation
    from equipoise.policy.prompt import leaked_terms, prompt_text, render_prompts
    from equipoise.policy.source import load_tokenizer, resolve
    from equipoise.policy.verify import settle
    from equipoise.ppo.evaluate import draw_sentences

    chosen = task.prompt(prompt) if prompt else task.default_prompt
    tokenizer = load_tokenizer(resolve(model))
    say(f"reads      {prompt_text(tokenizer, chosen, task.names[0], task)!r}")
    if leaked := leaked_terms(tokenizer, chosen, task):
        say(f"leak       with this model's template the prompt holds {', '.join(leaked)}")
    sampling = SamplingConfig(max_new_tokens=max_new_tokens)
    check_feasible(tokenizer, chosen, sampling, CtrlGConfig(), task)
    say(f"tokens     a sentence that succeeds fits into {max_new_tokens} new tokens")
    policy = load_for_generation(PolicyConfig(model, device=device), chosen)
    prompts = render_prompts(tokenizer, chosen, task).ids
    settle(policy, list(prompts.values()), max_new_tokens, say)
    seed = hashlib.sha256(task.fingerprint().encode()).hexdigest()
    say(f"sampling {plural(samples, 'sentence')} of {model} under the prompt {chosen.name!r}")
    texts = draw_sentences(policy, task, prompts, sampling, samples, f"task {seed}", min(samples, 128)).texts
    for line in base_rates(task, texts):
        say(line)


def base_rates(task: Task, texts: list[str]) -> list[str]:
    """How often sentences of the untrained model hold each class and all of them, with 95 % Wilson intervals, and what
    that means for training."""
    matches, n = [task.match(text) for text in texts], len(texts)
    counts = {label: sum(bool(match.terms[number]) for match in matches) for number, label in enumerate(task.labels)}
    every = sum(match.complete for match in matches)
    counts |= {task.all_classes: every} if len(task.classes) > 1 else {}
    counts |= {"strict success": sum(map(task.strict, texts))}
    width = max(map(len, counts))
    lines = []
    for label, hits in counts.items():
        low, high = wilson(hits, n)
        lines.append(
            f"base rate  {label:<{width}}  {hits} of {n}: {100 * hits / n:.1f} % "
            f"(95 % interval {100 * low:.1f} to {100 * high:.1f})"
        )
    return [*lines, _meaning(task, every, n)]


def _meaning(task: Task, hits: int, n: int) -> str:
    """One sentence on what the base rate of every class asks for."""
    high = wilson(hits, n).high
    seen = f"none of {n}: below {100 * high:.1f} %" if not hits else f"{hits} of {n}"
    if hits / n >= ENOUGH:
        return f"meaning    {seen}, enough for PPO to learn from by itself"
    if task.can_force:
        remedy = "PPO needs a warm start; `--preset varied` has one, and `--warm-start forced` asks for it"
    else:
        remedy = "PPO needs a warm start: give the task openings, or sentences with --warm-start-file"
    return f"meaning    {seen}, so {remedy}"
