"""Sampling text from a model, simply: enough to see what it has learned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_lightning.errors import ConfigError
from neuron_lightning.models.llama import LlamaForCausalLM
from neuron_lightning.parallel import mesh
from neuron_lightning.parallel.collectives import gather_from_tensor_model_parallel_region


@torch.no_grad()
def generate(
    model: LlamaForCausalLM,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Continues prompts token by token. Every tensor-parallel rank calls it together, with equal arguments.

    The whole sequence is computed again for every token: meant for samples of a few hundred tokens. It stops
    early when every row has ended. Beyond ``max_position_embeddings`` only the last tokens are seen.

    Args:
        model: any layout; put back into its mode afterwards.
        input_ids: (batch, sequence) prompts of one length.
        max_new_tokens: most tokens to add.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: samples among the k likeliest only; None: among all.
        seed: the same on all ranks, and so is what they sample.

    Returns:
        (batch, sequence + new) on the device of ``input_ids``; after its end a row repeats the end token.

    Raises:
        ConfigError: a sampling setting makes no sense.
    """
    if max_new_tokens < 0 or temperature < 0 or (top_k is not None and top_k < 1) or not input_ids.numel():
        raise ConfigError(
            "generate() needs a prompt of at least one token, max_new_tokens >= 0, temperature >= 0 and top_k >= 1; "
            f"got a prompt of shape {tuple(input_ids.shape)}, {max_new_tokens}, {temperature} and {top_k}."
        )
    generator = torch.Generator().manual_seed(seed)
    ends = _end_tokens(model)
    ended_B = torch.zeros(len(input_ids), dtype=torch.bool, device="cpu")
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            token_B = _sample(_next_logits(model, input_ids), temperature, top_k, generator)
            if ends:
                token_B[ended_B] = ends[0]
                ended_B |= torch.isin(token_B, torch.tensor(ends, device="cpu"))
            input_ids = torch.cat((input_ids, token_B[:, None].to(input_ids)), dim=1)
            if ended_B.all():
                break
    finally:
        model.train(was_training)
    return input_ids


def _next_logits(model: LlamaForCausalLM, input_ids: Tensor) -> Tensor:
    """Logits (batch, vocabulary) after the last token, on the host, the same on all ranks of a group."""
    multiple = mesh.current().sizes["tp"] if model.sequence_parallel else 1
    longest = model.config.max_position_embeddings // multiple * multiple
    window = input_ids[:, -longest:]
    length = window.shape[1]
    window = F.pad(window, (0, -length % multiple))  # attention is causal: what follows is not seen
    last_BV = model(window).logits[:, length - 1]
    full_BV = gather_from_tensor_model_parallel_region(last_BV.contiguous())
    return full_BV[:, : model.config.vocab_size].double().cpu()


def _sample(logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1)
    if top_k is not None and top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    probabilities_BV = torch.softmax(logits_BV / temperature, dim=-1)
    return torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0]


def _end_tokens(model: LlamaForCausalLM) -> list[int]:
    end = model.config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)
