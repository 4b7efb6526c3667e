"""A stand-in for the module cupy that computes with NumPy and is as strict as a card: host arrays are refused.

CuPy raises TypeError when a host array meets a device array; so does this, which lets a machine without a card prove
that the array expressions never mix the two. Nothing else of a card is imitated.
"""
from __future__ import annotations

import numpy as np

float32, float64, uint64, int64, inf = np.float32, np.float64, np.uint64, np.int64, np.inf


class DeviceArray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array that only meets arrays of its own kind, and scalars."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __array__(self, *_, **__):
        raise TypeError("implicit conversion to a host array; use asnumpy")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        return wrap(getattr(ufunc, method)(*map(unwrap, inputs), **{k: unwrap(v) for k, v in kwargs.items()}))

    def __getitem__(self, key):
        return wrap(self.array[unwrap_key(key)])

    def __setitem__(self, key, value):
        self.array[unwrap_key(key)] = unwrap(value)

    def __len__(self) -> int:
        return len(self.array)

    def __bool__(self) -> bool:
        return bool(self.array)

    def __getattr__(self, name):
        value = getattr(self.array, name)
        return method(value) if callable(value) else wrap(value)


def wrap(value):
    return DeviceArray(value) if isinstance(value, (np.ndarray, np.generic)) else value


def unwrap(value):
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError("a host array meets the device")
    if isinstance(value, (tuple, list)):
        return type(value)(map(unwrap, value))
    return value.array if isinstance(value, DeviceArray) else value


def unwrap_key(key):
    return tuple(map(unwrap, key)) if isinstance(key, tuple) else unwrap(key)


def method(function):
    return lambda *args, **kwargs: wrap(function(*map(unwrap, args), **{k: unwrap(v) for k, v in kwargs.items()}))


def asarray(host):
    """To the device; CuPy takes host arrays here and only here."""
    return host if isinstance(host, DeviceArray) else DeviceArray(np.array(host))


class get_default_memory_pool:
    """As much of CuPy's allocator as closing a model calls."""

    def free_all_blocks(self) -> None:
        pass


def asnumpy(array):
    return np.array(array.array)


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    value = getattr(np, name)
    if name == "split":
        return lambda *args: [wrap(part) for part in value(*map(unwrap, args))]
    return method(value) if callable(value) and not isinstance(value, type) else value


class cuda:
    """One card, number 0."""

    class Device:
        def __init__(self, id: int = 0):
            self.id = id
            self.pci_bus_id = "0000:01:00.0"

        def use(self) -> None:
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            pass
