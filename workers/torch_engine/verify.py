"""The checks at load that let any architecture in: the model is compared with itself before it serves.

Class names and configs do not tell whether a model really goes through the attention function in every
layer, keeps state elsewhere, or masks in a way of its own. So it is run: once to see which layers call
(``probe``), and once through the paged path, cut into chunks and single tokens beside a second sequence,
against its own eager attention over the whole text (``compare``).
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import numpy as np
import torch

from protocol.errors import ModelRefused, StartError
from protocol.messages import NewSequence, Plan, pack_ids
from protocol.sampling import SamplingParams
from workers.torch_engine.attention import NAME, PagedAttention
from workers.torch_engine.backend import Backend
from workers.torch_engine.parallel.layers import Absent

log = logging.getLogger(__name__)

LENGTH = 21  # tokens of the text that is compared: longer than one block, short enough to cost little
MOST_LOSS = 0.25  # of the largest logit: what keys and values in FP8 may move those of half of the tokens
TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}  # of the largest logit


def probe(model: Any, attention: PagedAttention[Any], device: torch.device) -> None:
    """One pass in which ``attention`` notes its layers. Raises ModelRefused unless every layer called once."""
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ModelRefused(f"{name} takes no position_ids")
    text = _text(model, 4, 0)[None].to(device)
    try:
        model(input_ids=text, position_ids=torch.arange(4, device=device)[None], use_cache=False)
    except ModelRefused as error:
        raise ModelRefused(f"{name}: {error}") from None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is that this architecture needs, we do not give it
        raise ModelRefused(f"{name} does not run without a cache of its own: {error}") from error
    elsewhere = sum(isinstance(module, Absent) for module in model.modules())
    layers = model.config.get_text_config().num_hidden_layers - elsewhere
    if len(attention.modules) < layers:
        raise ModelRefused(
            f"{name} calls the attention function in {len(attention.modules)} of its {layers} layers: "
            "the others keep state that is not keys and values, or attend in a way of their own"
        )


def own_logits(model: Any, device: torch.device) -> list[torch.Tensor]:
    """Logits [tokens, vocabulary] of the texts as the model gives them with its own eager attention.

    Without position ids: some count theirs from elsewhere than zero. ModelRefused if it does not run so.
    """
    model.set_attn_implementation("eager")
    try:
        return [model(input_ids=text[None], use_cache=False).logits[0].float() for text in _texts(model, device)]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is that this architecture needs, we do not give it
        raise ModelRefused(f"{type(model).__name__} does not run without a cache of its own: {error}") from error
    finally:
        model.set_attn_implementation(NAME)


def compare(backend: Backend[Any], whole: list[torch.Tensor]) -> None:
    """Raise ModelRefused if the paged path and ``whole``, what the model itself says, disagree."""
    model = backend.model
    for own, paged in zip(whole, paged_logits(backend, _texts(model, backend.device)), strict=True):
        distance = (own - paged).abs().amax(-1) / own.abs().amax()
        # A token near a router's tie may take another expert in low precision: most must agree, not all.
        worst = distance.quantile(0.75 if model.dtype != torch.float32 else 0.9).item()
        if not worst <= TOLERANCE.get(model.dtype, 2e-3):
            raise ModelRefused(
                f"{type(model).__name__} gives other logits through paged attention than through its own "
                f"(they differ by {worst:.1%} of the largest): it relies on something that is not served"
            )


def tell_loss(backend: Backend[Any], whole: list[torch.Tensor]) -> None:
    """Say how far logits go from ``whole`` with keys and values as the pool now holds them. StartError where nothing of
    the model would be left."""
    pairs = zip(whole, paged_logits(backend, _texts(backend.model, backend.device)), strict=True)
    distances = torch.cat([(own - paged).abs().amax(-1) / own.abs().amax() for own, paged in pairs])
    median = distances.median().item()
    if not median <= MOST_LOSS:
        raise StartError(
            f"--kv-cache-dtype fp8 moves the logits of {type(backend.model).__name__} by {median:.1%} of the largest: "
            "leave it out for this model"
        )
    log.info(
        "keys and values in FP8 move logits by %.2f%% of the largest, %.2f%% at most", 100 * median,
        100 * distances.max().item(),
    )  # fmt: skip


def paged_logits(backend: Backend[Any], texts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits [tokens, vocabulary] of each of ``texts`` (int64 ids, at most LENGTH), run side by side on the backend's
    empty seats: two chunks each, then token by token."""
    size = backend.config.block_size
    width = -(-LENGTH // size)
    for seat, text in enumerate(texts):
        blocks = pack_ids(range(seat * width, (seat + 1) * width))
        ids = pack_ids(text.tolist())
        backend.seats.add(NewSequence(seat, "", 0, 0, ids, len(text), SamplingParams(), 0, 0, blocks, 0))
    done = [0] * len(texts)
    pieces: list[list[torch.Tensor]] = [[] for _ in texts]
    while any(at < len(text) for at, text in zip(done, texts, strict=True)):
        rows = [seat for seat, text in enumerate(texts) if done[seat] < len(text)]
        counts = [min((9, 4)[done[seat] > 0] if done[seat] < 13 else 1, len(texts[seat]) - done[seat]) for seat in rows]
        plan = Plan(0, 0, 0, np.array(rows, "<u2").tobytes(), pack_ids(counts), bytes(len(rows)))
        logits, _ = backend.forward(backend.build(plan, every_token=True))
        for seat, piece in zip(rows, torch.split(logits.float(), counts), strict=True):
            pieces[seat].append(piece)
            done[seat] += len(piece)
    backend.seats.clear()
    return [torch.cat(piece) for piece in pieces]


def _texts(model: Any, device: torch.device) -> list[torch.Tensor]:
    return [_text(model, length, seed).to(device) for seed, length in enumerate((LENGTH, LENGTH - 6))]


def _text(model: Any, length: int, seed: int) -> torch.Tensor:
    """Random ids, the same at each load."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(seed))
