"""What `train_rlhf.py` is made of: the guide's script, whose constants and whose call of `setup_model_and_tokenizer`
a user may edit, and whose options are those of `equipoise train`."""

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from equipoise.commands.several import only_first_speaks, started
from equipoise.commands.train import GUIDE_NAMES, announced, configure
from equipoise.options import spelled
from equipoise.ppo.presets import preset
from equipoise.runs.ranks import ALONE, joined

if TYPE_CHECKING:
    from equipoise.policy.load import Policy
    from equipoise.ppo.config import TrainConfig
    from equipoise.ppo.train import Trainer

NUMBERS: Mapping[str, Any] = {
    "BATCH_SIZE": preset("guide").ppo.batch_size,
    "MINI_BATCH_SIZE": preset("guide").ppo.mini_batch_size,
    "PPO_EPOCHS": preset("guide").ppo.ppo_epochs,
    "LEARNING_RATE": preset("guide").ppo.learning_rate,
    "TARGET_KL": preset("guide").ppo.target_kl,
    "TRAINING_STEPS": preset("guide").steps,
}
"""The guide's constants. A preset decides where a script leaves them as they are."""


class GuideRun:
    """The run of a script: its command line read, its model set up, trained; in this order."""

    def __init__(self, constants: Mapping[str, Any]) -> None:
        """`constants`: the script's by name; one that is not the guide's is an option too (`KL_COEF` is --kl-coef)."""
        self.edited = {k: value for k, value in constants.items() if k not in NUMBERS or value != NUMBERS[k]}
        self._config: TrainConfig | None = None
        self._no_8bit = False
        self._trainer: Trainer | None = None
        self._ranks = ALONE
        self._open = ExitStack()

    def setup_model_and_tokenizer(self, use_8bit: bool = False) -> tuple[Any, Any, Any]:
        """(model, ref_model, tokenizer): the policy with its adapters, the reference that KL is measured against (the
        same model with adapters off, or a frozen copy where all weights are trained), and the tokenizer.

        `use_8bit` keeps the frozen weights in 8 bits, as `--use-8bit` does. In a script that trains, these are the
        run's own: it is opened here, and what it found and chose is printed. Called from elsewhere it loads the guide's
        model. Raises UserError, and SystemExit(0) for a run that is complete.
        """
        from equipoise.policy.reference import reference_of

        policy = self._loaded_alone(use_8bit) if self._config is None else self._opened(self._config, use_8bit)
        return policy.model, reference_of(policy), policy.tokenizer

    def read(self, argv: list[str]) -> None:
        """Take the command line. Raises UserError for options that there are not, before torch is loaded; SystemExit
        with the exit code where it asks for several processes, which do all the rest."""
        code, argv = started(argv, (sys.argv[0],), "train_rlhf.py", GUIDE_NAMES)
        if code is not None:
            raise SystemExit(code)
        self._ranks = self._open.enter_context(joined())
        only_first_speaks(self._ranks)
        self._no_8bit = "--no-use-8bit" in spelled(argv)
        read = self._ranks.first_does(lambda: configure(argv, self.edited, "train_rlhf.py"))
        self._config, self._lines, self._overwrite = read

    def train(self, model: Any, ref_model: Any, tokenizer: Any) -> int:
        """Train what `setup_model_and_tokenizer` returned. Returns the exit code."""
        trainer = self._trainer
        if trainer is None or trainer.policy is None or trainer.policy.model is not model:
            raise ValueError("train what setup_model_and_tokenizer returned: the run goes with its model")
        with self._open:
            return trainer.train().exit_code

    def _opened(self, config: "TrainConfig", use_8bit: bool) -> "Policy":
        lines, edited = list(self._lines), dict(self.edited)
        if use_8bit and self._no_8bit:
            lines.append("option    --no-use-8bit from the command line, not use_8bit=True of train_rlhf.py")
        elif use_8bit:
            edited["use_8bit"] = True
            if not config.policy.use_8bit:
                config = replace(config, policy=replace(config.policy, use_8bit=True))
                lines.append("option    --use-8bit, from setup_model_and_tokenizer(use_8bit=True) in train_rlhf.py")
        decided = config
        config = self._ranks.first_does(lambda: announced(decided, lines, self._ranks.size, self._overwrite))
        from equipoise.ppo.train import Trainer

        with self._open.pop_all() as opened:
            trainer = Trainer(config, overwrite=self._overwrite, edited=edited, ranks=self._ranks)
            self._trainer = opened.enter_context(trainer)
            if self._trainer.run.complete:
                raise SystemExit(self._trainer.train().exit_code)
            policy = self._trainer.load()
            self._open = opened.pop_all()
        return policy

    @staticmethod
    def _loaded_alone(use_8bit: bool) -> "Policy":
        from equipoise.policy.load import load_policy

        guide = preset("guide")
        return load_policy(replace(guide.policy, use_8bit=use_8bit), guide.task.prompt(guide.prompt))
