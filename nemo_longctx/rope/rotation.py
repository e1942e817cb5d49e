"""The rotation itself, in NumPy float64: the plain path that the model's is compared with.

T: positions. D: dimensions of a head. R: rotary_dim, the first dimensions of a head, which are rotated.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nemo_longctx.rope.base import Float64s, RopeVariant


def per_dimension(pairs: npt.NDArray, *, interleaved: bool) -> npt.NDArray:
    """Values a pair [..., R/2] -> values a dimension [..., R].

    Pair j is dimensions (j, j + R/2) in the halves layout of Llama and GPT-NeoX, (2j, 2j + 1) in the interleaved layout of
    the RoPE paper and GPT-J.
    """
    return np.repeat(pairs, 2, axis=-1) if interleaved else np.concatenate([pairs, pairs], axis=-1)


def rotate(
    x_TD: npt.NDArray,
    positions_T: npt.NDArray,
    variant: RopeVariant,
    *,
    rotary_dim: int,
    is_key: bool,
    interleaved: bool = False,
    seq_length: int | None = None,
) -> Float64s:
    """q (or k) as attention sees it: rotated, scaled by the attention factor and, under xPos, by position.

    Args:
        x_TD: q or k of one head.
        positions_T: position of each row.
        rotary_dim: dimensions that are rotated; the rest pass through.
        is_key: xPos scales k by zeta^-t, q by zeta^t.
        interleaved: which dimensions make a pair, see `per_dimension`.
        seq_length: tokens of the input, for variants that look at it.

    Returns:
        float64 [T, D].
    """
    x_TR, rest = np.asarray(x_TD, dtype=np.float64)[:, :rotary_dim], x_TD[:, rotary_dim:]
    angle_TR = per_dimension(np.outer(positions_T, variant.theta(rotary_dim, seq_length)), interleaved=interleaved)
    if interleaved:
        turned_TR = np.stack([-x_TR[:, 1::2], x_TR[:, 0::2]], axis=-1).reshape(x_TR.shape)
    else:
        turned_TR = np.concatenate([-x_TR[:, rotary_dim // 2 :], x_TR[:, : rotary_dim // 2]], axis=-1)
    out_TR = (x_TR * np.cos(angle_TR) + turned_TR * np.sin(angle_TR)) * variant.attention_scaling
    zeta = variant.xpos_zeta(rotary_dim)
    if zeta is not None:
        power_T1 = (-1.0 if is_key else 1.0) * np.asarray(positions_T, dtype=np.float64)[:, None]
        out_TR = out_TR * per_dimension(zeta[None, :] ** power_T1, interleaved=interleaved)
    return np.concatenate([out_TR, rest], axis=-1)
