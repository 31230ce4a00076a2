"""Run by `test_peers` with the interpreter that has TRL: what its trainers make of rewards, and their losses.

Arguments: the model's folder, grpo or rloo, where the tensors go. The first batch's rewards, log-probabilities and
advantages; then what goes into each of a few losses, after the policy has moved too, and the losses.
"""

import sys
import tempfile

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

folder, algorithm, path = sys.argv[1:]
config, trainer = (GRPOConfig, GRPOTrainer) if algorithm == "grpo" else (RLOOConfig, RLOOTrainer)
noted: dict[str, torch.Tensor] = {}
drawn = torch.Generator().manual_seed(0)


def reward(completions, **_):
    """Of any kind: −0.2, 0.3 or 1."""
    given = torch.tensor([-0.2, 0.3, 1.0])[torch.randint(3, (len(completions),), generator=drawn)]
    noted.setdefault("rewards", given)
    return given.tolist()


class Noting(trainer):
    """The trainer as it is; what comes out of its methods is kept."""

    losses = 0

    def _get_per_token_logps_and_entropies(self, *given, **more):
        found = super()._get_per_token_logps_and_entropies(*given, **more)
        self.seen = [*getattr(self, "seen", []), found[0].detach()]
        return found

    def _generate_and_score_completions(self, inputs):
        self.seen = []
        found = super()._generate_and_score_completions(inputs)
        if "advantages" not in noted:
            old, reference = self.seen
            noted.update(advantages=found["advantages"], mask=found["completion_mask"], old=old, reference=reference)
        return found

    def _compute_loss(self, model, inputs):
        self.seen = []
        loss = super()._compute_loss(model, inputs)
        kept = {"mask": "completion_mask", "advantages": "advantages"}
        kept |= {"old": "old_per_token_logps", "reference": "ref_per_token_logps"} if algorithm == "grpo" else {}
        kept |= {"old": "old_logps"} if algorithm == "rloo" else {}
        noted.update({f"{self.losses}.{name}": inputs[key] for name, key in kept.items()})
        noted.update({f"{self.losses}.new": self.seen[0], f"{self.losses}.loss": loss.detach()})
        self.losses += 1
        return loss


# GRPO as in the paper: TRL's default also weighs all tokens alike, and multiplies the KL by the probability ratio.
paper = {"loss_type": "grpo", "use_bias_correction_kl": False} if algorithm == "grpo" else {}
with tempfile.TemporaryDirectory() as output:
    arguments = config(
        output_dir=output, max_steps=4, per_device_train_batch_size=8, num_generations=4, num_iterations=2, beta=0.2,
        learning_rate=0.02, lr_scheduler_type="constant", max_completion_length=12, report_to=[], use_cpu=True,
        save_strategy="no", bf16=False, seed=0, **paper,
    )  # fmt: skip
    Noting(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(folder),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": f"The {name} was"} for name in ("nurse", "pilot", "chef")]),
    ).train()
save_file({name: x.contiguous().clone() for name, x in noted.items()}, path)
