"""Whether an answer is right, and where it first differs.

Both sides are plain values (see grading.protocol): numbers, strings, lists, dicts, sets, tensors. Nothing of the
student's takes part in the comparison: no method, no subclass, no __eq__.
"""

import math

import torch


def difference(expected, got, rtol: float = 0.0, atol: float = 0.0, where: str = "") -> str | None:
    """The first difference in words, or None when there is none: kinds first, then sizes, then values in order."""
    at = f" at {where}" if where else ""
    if isinstance(expected, torch.Tensor):
        return _tensors(expected, got, rtol, atol, at)
    if isinstance(expected, list):
        if not isinstance(got, list):
            return f"a sequence of {len(expected)} was expected{at}, and this is {_short(got)}"
        for place, (one, other) in enumerate(zip(expected, got)):
            if found := difference(one, other, rtol, atol, f"{where}[{place}]"):
                return found
        if len(expected) != len(got):
            return f"{len(expected)} entries were expected{at}, and there are {len(got)}; the first {min(len(expected), len(got))} are right"
        return None
    if isinstance(expected, dict):
        return _dicts(expected, got, rtol, atol, where)
    if isinstance(expected, bool) or isinstance(got, bool) or isinstance(expected, str | bytes | set) or expected is None:
        same = type(expected) is type(got) and expected == got
    elif isinstance(expected, int | float) and isinstance(got, int | float):
        same = _close(expected, got, rtol, atol)
    elif isinstance(expected, int | float) and isinstance(got, torch.Tensor) and got.numel() == 1 and got.ndim == 0:
        same = _close(expected, got.item(), rtol, atol)
    else:
        same = False
    one, other = _numbers(expected, got)
    return None if same else f"{one} was expected{at}, and this is {other}"


def _close(expected: float, got: float, rtol: float, atol: float) -> bool:
    if isinstance(expected, int) and isinstance(got, int):
        return abs(expected - got) <= atol
    if math.isnan(expected) or math.isnan(got):
        return math.isnan(expected) and math.isnan(got)
    return math.isclose(expected, got, rel_tol=rtol, abs_tol=atol)


def _dicts(expected: dict, got, rtol: float, atol: float, where: str) -> str | None:
    at = f" at {where}" if where else ""
    if not isinstance(got, dict):
        return f"a dict of {len(expected)} was expected{at}, and this is {_short(got)}"
    for key, value in expected.items():
        if key not in got:
            return f"the key {_short(key)} is missing{at}; its value should be {_short(value)}"
        if found := difference(value, got[key], rtol, atol, f"{where}[{_short(key)}]"):
            return found
    for key in got:
        if key not in expected:
            return f"the key {_short(key)}{at} should not be there"
    return None


def _tensors(expected: torch.Tensor, got, rtol: float, atol: float, at: str) -> str | None:
    if not isinstance(got, torch.Tensor):
        if not isinstance(got, int | float | list):
            return f"a tensor of shape {tuple(expected.shape)} was expected{at}, and this is {_short(got)}"
        try:
            got = torch.tensor(got)
        except (ValueError, TypeError, RuntimeError, OverflowError):
            return f"a tensor of shape {tuple(expected.shape)} was expected{at}, and this is {_short(got)}"
    if expected.shape != got.shape:
        return f"the shape {tuple(expected.shape)} was expected{at}, and this is {tuple(got.shape)}"
    kinds = [_kind(expected), _kind(got)]
    if kinds[0] != kinds[1]:
        return f"a tensor of {kinds[0]} was expected{at} ({expected.dtype}), and this one holds {kinds[1]} ({got.dtype})"
    wide = torch.complex128 if expected.is_complex() else torch.float64 if expected.is_floating_point() else torch.int64
    expected, got = expected.to(wide), got.to(wide)
    right = torch.isclose(got, expected, rtol=rtol, atol=atol, equal_nan=wide != torch.int64)
    if right.all():
        return None
    first = (~right).nonzero()[0].tolist()
    one, other = _numbers(expected[tuple(first)].item(), got[tuple(first)].item())
    wrong = int((~right).sum())
    prefix = f"of the right shape {tuple(expected.shape)}, but " if expected.ndim else ""
    rows = ""
    if expected.ndim > 1 and first[0] > 0:
        rows = "; index 0 of the first dim is right" if first[0] == 1 else f"; indices 0 to {first[0] - 1} of the first dim are right"
    return (f"{prefix}{wrong} of {expected.numel()} entries differ{at}, first at {first}: {one} was expected, and this is {other}"
            f"{rows}")


def _kind(tensor: torch.Tensor) -> str:
    if tensor.dtype is torch.bool:
        return "booleans"
    return "complex numbers" if tensor.is_complex() else "real numbers" if tensor.is_floating_point() else "integers"


def _numbers(one, other) -> tuple[str, str]:
    """Two values, floats with as many digits as it takes to tell them apart, and no more."""
    if not (isinstance(one, float) and isinstance(other, float)):
        return _short(one), _short(other)
    for digits in range(4, 18):
        pair = f"{one:.{digits}g}", f"{other:.{digits}g}"
        if pair[0] != pair[1]:
            break
    return pair


def _short(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
