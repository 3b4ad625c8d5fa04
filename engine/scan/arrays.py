"""What a user's array object holds: NumPy's, PyTorch's, or any that NumPy can read; with the affine it may bring."""

from __future__ import annotations

import sys

import numpy as np

from engine.errors import InvalidInput, one_line
from engine.scan.affine import LPS_TO_RAS
from engine.scan.npy import of_three_axes

_SMALL_FLOATS = ("bfloat16", "float8")  # ml_dtypes' names, which NumPy itself knows nothing of


def is_array(source: object) -> bool:
    """Whether `source` is an array, or something that NumPy can make one of."""
    return not isinstance(source, type) and any(
        hasattr(source, name) for name in ("__array__", "__array_interface__", "__dlpack__")
    )


def array_of(source: object) -> np.ndarray:
    """The values of an array object, on the CPU, in a dtype that .npy files have; a view where that is possible.

    Raises InvalidInput for what is not one volume of real numbers, naming what was given.
    """
    what = f"{type(source).__module__}.{type(source).__qualname__}"
    if isinstance(source, np.ma.MaskedArray) and np.ma.is_masked(source):
        raise InvalidInput("the array has masked values: fill them, with array.filled(background), and hand that over")
    try:
        array = np.asarray(_on_cpu(source))
    except InvalidInput:
        raise
    except Exception as error:  # whatever a foreign class raises when it is asked for its values
        raise InvalidInput(
            f"the values of the {what} cannot be read ({one_line(error)}): hand over a NumPy array with its affine"
        ) from None
    return real_volume(array, f"the array ({what})")


def real_volume(array: np.ndarray, what: str, exactly: bool = False) -> np.ndarray:
    """`array` in a dtype that readers know. Raises InvalidInput unless it holds real numbers along 3 axes.

    Axes of length 1 may stand in front of the three (batch, channel) or behind them (time), unless it is `exactly` 3.
    """
    if array.dtype.name.startswith(_SMALL_FLOATS):
        array = array.astype(np.float32)
    if array.dtype.kind not in "biuf":
        raise InvalidInput(f"{what} holds {array.dtype} values; real numbers are wanted: integers or floats")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)  # how long double is stored differs between machines
    if len(array.shape if exactly else of_three_axes(array.shape)) != 3:
        shape = " x ".join(map(str, array.shape)) or "of a scalar"
        hint = (
            "of a series (time points, channels) hand over one volume, such as array[..., 0]"
            if array.ndim > 3
            else "hand over the whole volume, its slices stacked with numpy.stack"
        )
        raise InvalidInput(f"{what} has shape {shape}; one volume of 3 axes is wanted: {hint}")
    return array


def own_affine(source: object) -> object | None:
    """The affine that an array object brings, RAS+ mm, as MONAI's MetaTensor and TorchIO's images do; None without one.

    MONAI gives a tensor that was not read from a file the identity, which says nothing.
    """
    try:
        affine = getattr(source, "affine", None)
    except Exception as error:  # a property of somebody else's class
        raise InvalidInput(
            f"the affine of the {type(source).__name__} cannot be read ({error}): give affine="
        ) from None
    if affine is None or callable(affine):
        return None
    matrix = np.squeeze(np.asarray(_on_cpu(affine)))
    meta = getattr(source, "meta", None)
    if not isinstance(meta, dict) or matrix.shape != (4, 4):
        return matrix
    if "filename_or_obj" not in meta and np.array_equal(matrix, np.eye(4)):
        return None
    return LPS_TO_RAS @ matrix if str(meta.get("space")).endswith("LPS") else matrix


def _on_cpu(source: object) -> object:
    """A PyTorch tensor as a NumPy array; all else as it is."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(source, torch.Tensor):
        return source
    tensor = source.detach()
    if tensor.device.type == "meta":
        raise InvalidInput("the tensor is on the meta device, which holds no values: hand over one with values")
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.is_complex():
        raise InvalidInput(f"the tensor holds {tensor.dtype} values; real numbers are wanted: integers or floats")
    tensor = tensor.cpu().resolve_conj().resolve_neg()
    if tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
        tensor = tensor.float()
    return tensor.as_subclass(torch.Tensor).numpy()
