"""Models whose output head and embedding share their weights, and what an adapter makes of that."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel


def untie(model: PreTrainedModel) -> None:
    """Give the output head weights of its own, equal to those that it shares with the embedding, if it does."""
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
        model.config.get_text_config().tie_word_embeddings = False


def tie_if_equal(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Have head and embedding share their weights again where those of the base do and they are equal, and have the
    configuration say whether they do."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not config.get_text_config().tie_word_embeddings:
        return
    tied = head.weight is embedding.weight or torch.equal(head.weight, embedding.weight)
    if tied:
        head.weight = embedding.weight
    model.config.get_text_config().tie_word_embeddings = tied
