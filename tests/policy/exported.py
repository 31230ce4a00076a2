"""Models to export, and exports loaded again."""

import logging
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from equipoise.policy.export import ModelCard

CARD = ModelCard(method="PPO, 3 steps", prompt="describe")
IDS = torch.arange(3, 40)[None]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def with_adapters(model: nn.Module, scale: float = 0.1, **options: object) -> PeftModel:
    """LoRA on every linear layer, moved away from its start at zero."""
    config = LoraConfig(r=4, lora_alpha=7, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    peft_model = get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=scale)
    return peft_model.eval()


def reload(folder: Path) -> nn.Module:
    """As anyone would load it; a complaint by transformers is a failure."""
    lines: list[str] = []
    transformers_logging.get_logger("transformers").addHandler(handler := ListHandler(lines))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)
    transformers_logging.get_logger("transformers").removeHandler(handler)
    assert lines == []
    return model


class ListHandler(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(level="WARNING")
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
