"""Loss by position of a live Megatron-Core model over whole windows of held-out documents."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from nemo_longctx.adapters.megatron.loss import forward_with_chunked_loss
from nemo_longctx.bars import ProgressBar
from nemo_longctx.config import ConfigError
from nemo_longctx.data.corpus import Corpus
from nemo_longctx.eval.position import PositionLosses

WINDOWS_OF_A_DOCUMENT = 4  # so that a few books do not make up the whole mean
SEED = 1234


def loss_by_position(
    model: torch.nn.Module, corpus: Corpus, *, edges: np.ndarray, max_windows: int, name: str = "model"
) -> PositionLosses:
    """Losses of every token of windows of one document each, by their position in the window.

    Args:
        model: `megatron.core.models.gpt.GPTModel` on one rank, in evaluation mode.
        corpus: held-out documents; those of at least one window and its last label are read.
        edges: int64 [N + 1], bin edges; the last one is the window, tokens.
        max_windows: read at most so many windows.
        name: for the progress bar.

    Returns:
        sums by document, so that the standard error is over documents.

    Raises:
        ConfigError: no document is long enough.
    """
    window = int(edges[-1])
    losses = PositionLosses(edges)
    windows = _windows(corpus, window, max_windows)
    if not windows:
        longest = int(max(corpus.lengths, default=0))
        raise ConfigError("seq_length", window, f"the longest held-out document has {longest} tokens; take a shorter window")
    documents = sorted({document for document, _ in windows})
    with ProgressBar(total=len(windows), desc=f"loss by position, {name}", unit="window") as bar:
        for document in documents:
            sums, counts = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1, np.int64)
            for tokens in _tokens(corpus, document, windows, window):
                window_sums, window_counts = losses.bin_sums(_token_losses(model, tokens))
                sums, counts = sums + window_sums[0], counts + window_counts[0]
                bar.update()
            losses.add_sums(sums[None], counts[None])
    return losses


def _windows(corpus: Corpus, window: int, max_windows: int) -> list[tuple[int, int]]:
    """(document, first token) of the windows to read: the first of each document before the second of any.

    Windows lie side by side from a random place of their document (the same for any run), and go on at its beginning after its
    end. So every token is as likely at one position as at another: were early positions to hold more titles, licences and
    imports than late ones, the text would pass for an effect of position.
    """
    lengths = np.asarray(corpus.lengths)
    first = np.floor(np.random.default_rng(SEED).random(len(lengths)) * lengths).astype(np.int64)
    found = [
        (document, int((first[document] + turn * window) % lengths[document]))
        for turn in range(WINDOWS_OF_A_DOCUMENT)
        for document in np.flatnonzero(lengths >= (turn + 1) * window + 1).tolist()
    ]
    return found[:max_windows]


def _tokens(corpus: Corpus, document: int, windows: list[tuple[int, int]], window: int) -> Iterator[torch.Tensor]:
    """int64 [window + 1] of each window of `document`."""
    length = int(corpus.lengths[document])
    for owner, first in windows:
        if owner == document:
            end = first + window + 1
            parts = [corpus.tokens(document, first, min(end, length)), corpus.tokens(document, 0, max(0, end - length))]
            yield torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _token_losses(model: torch.nn.Module, tokens: torch.Tensor) -> np.ndarray:
    """Losses float64 [1, S] of the last S of S + 1 tokens."""
    device = next(model.parameters()).device
    tokens = tokens.to(device)[None]
    positions = torch.arange(tokens.shape[1] - 1, device=device)[None]
    with torch.no_grad():
        losses = forward_with_chunked_loss(
            model, {"tokens": tokens[:, :-1], "position_ids": positions, "labels": tokens[:, 1:]}
        )
    return losses.double().cpu().numpy()
