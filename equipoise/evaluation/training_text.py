"""How a policy was trained, in sentences for a paper: every option that was in force, and none that was not.

Everything is read from the run's records, run.json and summary.json; what they do not have is not told.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from equipoise.evaluation.runs import TrainingRun
from equipoise.evaluation.visible import visible
from equipoise.evaluation.wording import listed, pair
from equipoise.policy.algorithms import recorded
from equipoise.protocol.plural import plural
from equipoise.protocol.reward import PROTOCOL_WEIGHTS
from equipoise.protocol.task import Task
from equipoise.runs.targets import is_target_file


def training_text(run: TrainingRun, task: Task) -> str:
    """A paragraph about the run; `task` is the one that its sentences are measured by. Empty without a record."""
    config = run.record.get("config")
    if not isinstance(config, Mapping):
        return ""
    done, title = run.steps[-1] if run.steps else 0, recorded(_group(config, "ppo")).title
    parts = [
        f"The policy of the run {visible(run.name)} was trained with {title} for {plural(done, 'step')} "
        f"({', '.join(_facts(config))}).{_unfinished(config, done)}",
        _how(_group(config, "ppo")),
        _kls(_group(config, "ppo")),
        _occupations(config, run.task, task),
        _weights(_group(config, "policy")),
        _warm_start(run, _group(config, "warm_start"), run.task),
        _reward(config, run.record, run.task),
        _average(_group(config, "ppo")),
        _on_alert(_group(config, "watch"), run, done < _planned(config)),
        _exported(config, run.summary, run.task.pair_noun),
    ]
    return " ".join(part for part in parts if part)


def _how(ppo: Mapping[str, Any]) -> str:
    """What the algorithm makes of rewards, where it is not PPO, which needs no telling."""
    method = recorded(ppo)
    if method.value_head:
        return ""
    size = method.group_size(ppo.get("batch_size") or 0, ppo.get("num_generations") or 0)
    return f"In {method.title} ({method.source}) {method.how.format(group=size, others=size - 1)}."


def _planned(config: Mapping[str, Any]) -> int:
    steps = config.get("steps")
    return steps if isinstance(steps, int) else 0


def _unfinished(config: Mapping[str, Any], done: int) -> str:
    return f" {plural(_planned(config), 'step')} were planned." if done < _planned(config) else ""


def _kls(ppo: Mapping[str, Any]) -> str:
    """Which two distances the options are about."""
    if ppo.get("target_kl") is None or ppo.get("kl_coef") is None:
        return ""
    price = "the price, in reward, of a nat per sentence of"
    if recorded(ppo).kl_in_loss:
        price = "the weight in the loss of a nat per token of"
    return (
        "The KL of an update is, in nats per token, that of the policy before a step to the policy after it; the KL "
        f"coefficient is {price} KL to the reference, the untrained model under the same prompt."
    )


def _group(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name)
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else f"{value}"


def _facts(config: Mapping[str, Any]) -> list[str]:
    """The numbers of the algorithm and of sampling."""
    policy, ppo, sampling = (_group(config, name) for name in ("policy", "ppo", "sampling"))
    method = recorded(ppo)
    # What the algorithm has no use for stands in the configuration too, at its default.
    of_values = ppo if method.value_head else {}
    size = method.group_size(ppo.get("batch_size") or 0, ppo.get("num_generations") or 0)
    facts = [
        ("model", policy.get("model")),
        ("prompt", config.get("prompt")),
        ("system message", config.get("system") or None),
        ("batch", ppo.get("batch_size")),
        ("mini-batch", ppo.get("mini_batch_size")),
        ("group", size if size > 1 else None),
        ("PPO epochs" if method.value_head else "epochs a step", ppo.get("ppo_epochs")),
        ("learning rate", _with_schedule(ppo)),
        ("learning rate of the value head", of_values.get("value_learning_rate")),
        ("hidden units of the value head", of_values.get("value_hidden") or None),
        ("target KL of an update", ppo.get("target_kl")),
        ("KL coefficient", _with_target(ppo)),
        ("KL charged for", KL_IN.get(str(ppo.get("kl_in")))),
        ("entropy bonus", ppo.get("entropy_coef") or None),
        ("clip", ppo.get("clip")),
        ("clip of values", of_values.get("value_clip")),
        ("γ", ppo.get("gamma") if method.token_credit else None),
        ("λ", of_values.get("gae_lambda")),
        ("gradient norm at most", ppo.get("max_grad_norm")),
        ("ε of Adam", ppo.get("adam_eps")),
        ("temperature", sampling.get("temperature")),
        ("top-p", sampling.get("top_p")),
        ("new tokens at most", sampling.get("max_new_tokens")),
        ("seed", config.get("seed")),
    ]
    return [f"{name} {visible(str(value))}" for name, value in facts if value is not None]


KL_IN = {
    "both": "exactly over the vocabulary at the places visited, each place's in the loss, those after it in the reward",
    "loss": "exactly over the vocabulary at the places visited, in the loss alone",
}
"""Where it is not the sampled token's log-ratio, in its reward."""


def _with_schedule(ppo: Mapping[str, Any]) -> str | None:
    if ppo.get("learning_rate") is None:
        return None
    told = []
    if value := ppo.get("value_warmup_steps"):
        told.append(f"0 in the first {plural(value, 'step', one='')}, in which the value head alone learns")
    if (warmup := ppo.get("warmup_steps") or 0) > 1:
        told.append(f"rising over {warmup} steps")
    if decay := ppo.get("decay_steps"):
        told.append(f"falling linearly to 0 at step {decay}")
    return f"{ppo['learning_rate']}" + (f" ({'; '.join(told)})" if told else "")


def _with_target(ppo: Mapping[str, Any]) -> str | None:
    coefficient, target = ppo.get("kl_coef"), ppo.get("ref_kl_target")
    if coefficient is None or target is None:
        return None if coefficient is None else f"{coefficient}"
    return (
        f"{coefficient} (at first; steered towards a KL to the base model of {target} nats per sentence over "
        f"{_number(ppo.get('kl_horizon'))} completions)"
    )


def _occupations(config: Mapping[str, Any], own: Task, measured: Task) -> str:
    told = []
    if own != measured:
        told.append(f"It was trained on the task {visible(own.name)}, which is not the one that is measured here.")
    if config.get("holdout"):
        count = len(own.training_names(holdout=True))
        told.append(
            f"It was trained on {count} of the task’s {plural(len(own.names), 'occupation')}, without "
            f"{listed(own.held_out)}."
        )
    return " ".join(told)


def _weights(policy: Mapping[str, Any]) -> str:
    if policy.get("tuning") == "full":
        return "All weights were trained."
    if policy.get("tuning") == "lora":
        base = ", the frozen base weights in 8 bits" if policy.get("use_8bit") else ""
        return (
            f"LoRA adapters on linear layers were trained (rank {policy.get('lora_rank')}, alpha "
            f"{policy.get('lora_alpha')}{base})."
        )
    return ""


def _warm_start(run: TrainingRun, options: Mapping[str, Any], task: Task) -> str:
    """The supervised stage before reinforcement learning."""
    title = recorded(_group(_group(run.record, "config"), "ppo")).title

    def at(name: str) -> Any:
        return options.get(f"warm_start_{name}")

    how, file, rounds = options.get("warm_start", "off"), at("file"), at("rounds") or 1
    target = TARGETS.get(str(at("target")))
    if file and not is_target_file(str(at("target")), str(file)):
        target = None
    given = bool(file or target)
    if how == "off" and not given:
        return ""
    own = "its own samples that succeed strictly"
    if target:
        writers = "Ctrl-G"
        if repeats := at("target_rounds"):  # none in a run of before there were any
            writers += (
                f" and then, in {plural(repeats, 'round')} of {_number(at('target_samples'))} sentences, of a policy "
                "that learnt them"
            )
        power = _group(_group(run.record, "config"), "diversity").get("even_power")
        source = f"sentences of {writers}, resampled by their importance weights towards "
        source += target.format(_apart(power, task))
        if (tilt := at("fluency")) and at("target_rounds"):
            source += f", in proportion to exp(−{tilt} × its nats per token)"
    elif file:
        source = f"those sentences of the file {visible(str(file))} that succeed strictly"
    elif how == "forced":
        begun = "a term of the class" if len(task.classes) == 1 else "a term of each class"
        source = (
            f"its own strictly successful continuations of forced beginnings with {begun}, every {pair(task)} alike"
        )
    else:
        source = own
    if how == "samples-if-found" and "no_warm_start" in [kind for _, kind in run.events]:
        return f"Too few of its own samples succeeded strictly for a supervised warm start before {title}."
    if rounds > 1 and source != own:
        source += f", and after the first round from {own}"
    # So many were asked for; how many a search found is not on record.
    told = [f"at most {_number(at('sentences'))} sentences" + (" a round" if rounds > 1 else "")]
    told += [f"{rounds} rounds"] if rounds > 1 else []
    told += [_kept(at("candidates"), at("keep"), task, how == "forced" and not given)]
    told += [f"epochs {at('epochs')}", f"batch {at('batch_size')}", f"learning rate {at('learning_rate')} at most"]
    told += (
        [f"at most {plural(at('budget') or 0, 'sample')} drawn in search of them"] if not given or rounds > 1 else []
    )
    return f"Before {title} a supervised warm start taught it from {source} ({', '.join(filter(None, told))})."


TARGETS = {
    "near": "what the untrained model writes where it succeeds strictly",
    "even": "what the untrained model writes where it succeeds strictly, but {}",
}


def _apart(power: Any, task: Task) -> str:
    """How often each pair is to come."""
    if not power:
        return f"every {pair(task)} alike"
    return f"every {pair(task)} in proportion to its share under the untrained model to the power {power}"


def _kept(candidates: Any, keep: Any, task: Task, forced: bool) -> str:
    if (candidates or 1) == 1:
        return ""
    likeliest = f"the likeliest under the untrained model, of each {pair(task)} alike and no two of one mould"
    resampled = "resampled towards what the untrained model writes"
    if keep == "even":
        resampled += f", of each {pair(task)} alike"
    if keep not in ("conditional", "even"):
        kept = likeliest
    else:
        kept = f"in the first round {likeliest}, then {resampled}" if forced else resampled
    return f"{candidates} candidates for each, of which are kept {kept}"


def _reward(config: Mapping[str, Any], record: Mapping[str, Any], task: Task) -> str:
    """What was paid, where that is not the reward as the protocol has it."""
    diversity = _group(config, "diversity")
    told = []
    if bonus := config.get("strict_bonus"):
        told.append(f"a bonus of {bonus} for strict success")
    if weight := diversity.get("diversity_weight"):
        if diversity.get("diversity_on") == "even":
            told.append(
                f"for strict success {weight} × nats that were raised or lowered for each {pair(task)} towards "
                f"{_apart(diversity.get('even_power'), task)} (dual ascent)"
            )
        else:
            of = {"terms": "terms", "pairs": task.pair_noun}.get(
                str(diversity.get("diversity_on")), f"terms and {task.pair_noun}"
            )
            told.append(
                f"a diversity bonus of at most ±{weight} for rare {of} (frequencies over the last "
                f"{plural(diversity.get('diversity_window') or 0, 'compliant sentence', one='')})"
            )
    if weight := diversity.get("opening_weight"):
        told.append(f"a malus of at most {weight} for beginning as other sentences do")
    if weight := config.get("fluency_weight"):
        told.append(f"a malus of {weight} for each nat per token under the untrained model")
    if penalty := config.get("missing_eos_penalty"):
        told.append(f"a penalty of {penalty} for a sentence that was cut off")
    parts = [f"Added to each sentence’s reward: {'; '.join(told)}."] if told else []
    if function := record.get("reward_fn"):
        return " ".join([f"The reward was the function {visible(str(function))}, in place of the protocol’s.", *parts])
    standard = dataclasses.asdict(PROTOCOL_WEIGHTS)
    changed = [
        f"{name.replace('_', ' ')} {value} in place of {standard[name]}"
        for name, value in _group(config, "reward").items()
        if name in standard and value != standard[name]
    ]
    if changed:
        parts.append(f"Weights of the reward that differ from the protocol’s: {', '.join(changed)}.")
    return " ".join(parts)


def _average(ppo: Mapping[str, Any]) -> str:
    decay = ppo.get("average_weights")
    return (
        f"Evaluated and exported is the moving average of the weights over steps, with decay {decay}." if decay else ""
    )


def _on_alert(watch: Mapping[str, Any], run: TrainingRun, short: bool) -> str:
    """What an alert was to bring about, and whether it did; `short`: the run has fewer steps than were planned."""
    if watch.get("on_alert") == "stop":
        raised = f"one did at step {run.alerts[-1].step:,}" if run.alerts and short else "none did"
        return f"An alert of the hacking watch was to end the run; {raised}."
    if watch.get("on_alert") == "rollback":
        done = run.summary.get("alert_rollbacks")
        if not isinstance(done, int):  # a run that has not ended
            done = sum(kind == "rollback" for _, kind in run.events)
        remedies = ", each time with other settings than the above as a remedy" if done else ""
        return (
            "After an alert of the hacking watch training was to go back to the last sound checkpoint, "
            f"{plural(watch.get('alert_rollbacks') or 0, 'time')} at most; it did so {plural(done, 'time')}{remedies}."
        )
    return ""


def _exported(config: Mapping[str, Any], summary: Mapping[str, Any], noun: str) -> str:
    """Which step was exported, and by which rule."""
    evaluation, run = _group(config, "evaluation"), _group(config, "run")
    step, because = summary.get("exported_step"), summary.get("exported_because")
    exported = "" if step is None else f"Exported: step {step:,}, {visible(str(because))}."
    if not evaluation:
        return exported
    count = evaluation.get("eval_sentences")
    if not count or evaluation.get("export") == "last":
        rule = "the last weights"
    else:
        settings = f"temperature {evaluation.get('eval_temperature')}, top-p {evaluation.get('eval_top_p')}"
        every = run.get("save_every")
        often = plural(every, "step", one="") if isinstance(every, int) else "so many steps"
        rule = (
            f"the best of evaluations of {plural(count, 'sentence')} ({settings}), made every {often} and at the end, "
            f"by {_rank(summary, noun)}"
        )
    return f"{exported} The rule: {rule}." if exported else f"To be exported: {rule}."


def _rank(summary: Mapping[str, Any], noun: str) -> str:
    found = summary.get("evaluation")
    if isinstance(found, Mapping) and "rank" in found:
        return "a function of our own"
    return (
        f"strict success, within its sampling error by effective {noun}, then by KL to the base model (k1, of the "
        "evaluation’s sentences)"
    )
