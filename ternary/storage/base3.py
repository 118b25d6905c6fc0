"""Ternary codes at rest: five base-3 digits in a byte, 1.6 bits a weight.

A row of K codes (0, 1, 2 for -1, 0, +1) becomes P = ceil(K / 5) bytes. As in the 2-bit layout, the
codes of a byte are not neighbours but P apart, which makes packing and unpacking a few operations
on whole rows:

    byte[n, i] = c(n, i) + 3 c(n, i + P) + 9 c(n, i + 2 P) + 27 c(n, i + 3 P) + 81 c(n, i + 4 P)

Where i + d P >= K there is no code; digit 1 is written and nothing is read. Bytes above 242
(= 3^5 - 1) never occur, and are refused.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8

from flux_jax.errors import UserError
from pallas_kernels import packed_width
from pallas_kernels.packing import BLOCK_BYTES
from ternary.storage.threads import over_rows

DIGITS = 5
LARGEST = 3**DIGITS - 1

Rows = UInt8[np.ndarray, "N K"]


def base3_width(in_features: int) -> int:
    """Bytes of a row of `in_features` codes."""
    return -(-in_features // DIGITS)


def pack_base3(codes: Rows) -> UInt8[np.ndarray, "N P"]:
    """Codes to base-3 bytes.

    Args:
      codes: (N, K) uint8, each 0, 1 or 2; any other value is the caller's error and makes bytes
        that `unpack_base3` refuses or that mean something else.

    Returns:
      (N, `base3_width(K)`) uint8.
    """
    rows, columns = codes.shape
    out = np.empty((rows, base3_width(columns)), np.uint8)
    over_rows(lambda part: encode_block(codes[part], out[part]), rows, columns)
    return out


def encode_block(codes: Rows, out: UInt8[np.ndarray, "N P"]) -> None:
    """`pack_base3` of a few rows into `out`, on this thread."""
    columns, width = codes.shape[1], out.shape[1]
    out[...] = 0
    for digit in reversed(range(DIGITS)):
        start = min(digit * width, columns)
        present = min(start + width, columns) - start
        out *= np.uint8(3)
        out[:, :present] += codes[:, start : start + present]
        out[:, present:] += np.uint8(1)


def unpack_base3(data: UInt8[np.ndarray, "N P"], in_features: int, *, what: str = "data") -> Rows:
    """Base-3 bytes to codes, the inverse of `pack_base3`.

    Args:
      data: (N, P) uint8.
      in_features: K, with `base3_width(K)` = P.
      what: name of the tensor, for messages.

    Returns:
      (N, K) uint8.

    Raises:
      UserError: another width, or a byte above 242.
    """
    check_width(data, in_features, what)
    rows = data.shape[0]
    out = np.empty((rows, in_features), np.uint8)

    def block(part: slice) -> None:
        check_bytes(data[part], what, part.start)
        wide = _scratch(data[part], in_features)
        _decode_block(data[part], wide)
        out[part] = wide[:, :in_features]

    over_rows(block, rows, in_features)
    return out


def base3_to_packed(
    data: UInt8[np.ndarray, "N P"], in_features: int, *, what: str = "data"
) -> UInt8[np.ndarray, "N Kp"]:
    """Base-3 bytes straight to the 2-bit layout of `pallas_kernels.packing`.

    The codes are never there for more than a few rows. Arguments and errors as for `unpack_base3`.

    Returns:
      (N, `packed_width(K)`) uint8.
    """
    check_width(data, in_features, what)
    rows, width = data.shape[0], packed_width(in_features)
    out = np.empty((rows, width), np.uint8)

    def block(part: slice) -> None:
        check_bytes(data[part], what, part.start)
        wide = _scratch(data[part], in_features)
        _decode_block(data[part], wide)
        # Behind the last code: what the file has there does not count, and the layout has code 1.
        wide[:, in_features:] = 1
        _combine_block(wide[:, : 4 * width], out[part])

    over_rows(block, rows, in_features)
    return out


def check_bytes(data: UInt8[np.ndarray, "N P"], what: str, first_row: int = 0) -> None:
    """Refuse bytes that are no five digits.

    Raises:
      UserError: naming the tensor and the first place.
    """
    if data.size and data.max() > LARGEST:
        row, column = np.argwhere(data > LARGEST)[0]
        raise UserError(
            f"tensor `{what}`: byte {data[row, column]} at row {first_row + row}, column {column} "
            f"is no five base-3 digits, expected at most {LARGEST}; the file is damaged"
        )


def check_width(data: np.ndarray, in_features: int, what: str) -> None:
    """Refuse rows of another width than `in_features` codes have.

    Raises:
      UserError: naming the tensor and both widths.
    """
    if data.shape[1] != base3_width(in_features):
        raise UserError(
            f"tensor `{what}` has {data.shape[1]} bytes a row, expected "
            f"{base3_width(in_features)} for {in_features} inputs"
        )


def _scratch(data: np.ndarray, in_features: int) -> np.ndarray:
    """Room for all digits of some rows and for whole 2-bit blocks; rows start at 8-byte borders."""
    width = max(DIGITS * data.shape[1], 4 * packed_width(in_features))
    return np.empty((data.shape[0], -(-width // 8) * 8), np.uint8)


def _decode_block(data: np.ndarray, wide: np.ndarray) -> None:
    """The digits of some rows, digit d in columns [d P, (d + 1) P)."""
    width = data.shape[1]
    rest = data
    for digit in range(DIGITS - 1):
        quotient = rest // np.uint8(3)
        np.subtract(rest, quotient * np.uint8(3), out=wide[:, digit * width : (digit + 1) * width])
        rest = quotient
    wide[:, (DIGITS - 1) * width : DIGITS * width] = rest


def _combine_block(codes: np.ndarray, out: np.ndarray) -> None:
    """`pallas_kernels.pack_codes` of rows that fill whole blocks, eight bytes at a time."""
    rows = codes.shape[0]
    planes = codes.view(np.uint64).reshape(rows, -1, 4, BLOCK_BYTES // 8)
    target = out.view(np.uint64).reshape(rows, -1, BLOCK_BYTES // 8)
    # Codes have two bits, so that a shift by at most 6 stays within its byte.
    np.left_shift(planes[:, :, 1], np.uint64(2), out=target)
    target |= planes[:, :, 0]
    shifted = planes[:, :, 2] << np.uint64(4)
    target |= shifted
    np.left_shift(planes[:, :, 3], np.uint64(6), out=shifted)
    target |= shifted
