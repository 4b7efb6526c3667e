"""A stand-in for the module cupy on a machine without a card: the calls that CudaBackend and CudaRunner make.

Kernels run on the CPU (cuda_cpu). A stream keeps what it is given and works it off only when the host waits, and reads
pinned memory only then: a host that changes a buffer too early, or reads a result too soon, gets wrong numbers here as
it would on a card. While a stream captures, whatever a graph cannot hold is refused.
"""
from __future__ import annotations

import ctypes
import types
import weakref
from collections import deque

import cuda_cpu
import numpy as np

float32, float64, uint64, int64, inf = np.float32, np.float64, np.uint64, np.int64, np.inf
FAULTS: dict[str, Exception] = {}  # kernel name -> what its launch raises
LOST: list[Exception] = []  # once something is in it, the context is broken and every call raises it
MEMORY = [8 << 30]  # bytes that the card has
MODE = ["fast"]  # of cuda_cpu: "check" also finds races and what reads or writes beyond an array
_allocated = [0]
_owners: list[weakref.ref] = []  # of the memory that `zeros` gave out
_functions: dict[int, RawKernel] = {}  # by the handle that a driver would know
_pinned: list[np.ndarray] = []


class OutOfMemoryError(MemoryError):
    pass


class DeviceArray(np.ndarray):
    """Memory of the card: a NumPy array whose contents the host gets and sets through a stream."""

    def set(self, source: np.ndarray, stream: Stream) -> None:
        if self.shape != source.shape or self.dtype != source.dtype or not self.flags.c_contiguous:
            raise ValueError(f"{source.shape} {source.dtype} does not fit {self.shape} {self.dtype}")
        if stream.capturing is not None:  # CuPy does not ask whether the memory is pinned
            raise RuntimeError("the current stream is capturing, so H2D transfers are disallowed")
        stream.add(lambda: np.copyto(self, source))  # which the caller keeps as it is until then

    @property
    def data(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(ptr=self.ctypes.data)


def zeros(shape, dtype=np.float32) -> DeviceArray:
    if any(stream.capturing is not None for stream in Stream.all):
        raise RuntimeError("an allocation while a stream captures")
    owner = np.zeros(shape, dtype)
    array = owner.view(DeviceArray)
    if _allocated[0] + array.nbytes > MEMORY[0]:
        raise OutOfMemoryError(f"Out of memory allocating {array.nbytes} bytes")
    _allocated[0] += array.nbytes
    _owners[:] = [known for known in _owners if known() is not None] + [weakref.ref(owner)]
    return array


empty = zeros


def asarray(source) -> DeviceArray:
    """A copy from a pinned buffer: nothing else can have seen the new array, so it is as good as done at its turn."""
    source = np.asarray(source)
    array = zeros(source.shape, source.dtype)
    array[...] = source
    return array


def asnumpy(array: DeviceArray) -> np.ndarray:
    Stream.current.synchronize()
    return np.array(array)


def raise_if_lost() -> None:
    if LOST:
        raise LOST[0]


class Stream:
    """Work in order; nothing is done before somebody waits for it."""

    all: list[Stream] = []
    current: Stream

    def __init__(self, non_blocking: bool = False):
        self.work: deque = deque()
        self.ptr = id(self)
        self.capturing: list | None = None
        self.num_added = self.num_done = 0
        Stream.all.append(self)

    def __enter__(self) -> Stream:
        self._outer, Stream.current = Stream.current, self
        return self

    def __exit__(self, *_) -> None:
        Stream.current = self._outer

    def add(self, action) -> None:
        if self.capturing is not None:
            self.capturing.append(action)
        else:
            self.work.append(action)
            self.num_added += 1

    def run_until(self, count: int) -> None:
        raise_if_lost()
        if self.capturing is not None:
            raise RuntimeError("cudaErrorStreamCaptureUnsupported: waiting")
        while self.num_done < count:
            self.num_done += 1
            self.work.popleft()()

    def synchronize(self) -> None:
        self.run_until(self.num_added)

    def begin_capture(self) -> None:
        self.capturing = []

    def end_capture(self) -> Graph:
        graph, self.capturing = Graph(self.capturing), None
        return graph


class Graph:
    """Captured launches: their arguments are those of the capture for ever."""

    def __init__(self, actions: list):
        self.actions = actions

    def upload(self, stream: Stream) -> None:
        pass

    def launch(self, stream: Stream) -> None:
        for action in self.actions:
            stream.add(action)


class Event:
    def __init__(self, block: bool = False, disable_timing: bool = False):
        self._stream, self._place = None, 0

    def record(self, stream: Stream) -> None:
        self._stream, self._place = stream, stream.num_added

    def synchronize(self) -> None:
        if self._stream:
            self._stream.run_until(self._place)


class Device:
    compute_capability = "80"
    attributes = {"MultiProcessorCount": 4}

    def __init__(self, index: int = 0):
        self.id = index
        self.pci_bus_id = f"0000:0{8 - index}:00.0"

    def use(self) -> None:
        pass

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_) -> None:
        raise_if_lost()  # it sets the device that was current before


class RawModule:
    def __init__(self, *, code: str, options: tuple[str, ...]):
        if not isinstance(options, tuple):
            raise TypeError("Argument 'options' has incorrect type (expected tuple)")
        self._module = cuda_cpu.RawModule(code=code, options=options, mode=MODE[0])

    def compile(self) -> None:
        pass

    def get_function(self, name: str) -> RawKernel:
        return RawKernel(self._module, name)


class RawKernel:
    def __init__(self, module: cuda_cpu.RawModule, name: str):
        self._module, self._name, self._kernel = module, name, module.get_function(name)
        self.kernel = types.SimpleNamespace(ptr=len(_functions) + 1)
        _functions[self.kernel.ptr] = self
        self._is_loaded = False

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._kernel.max_dynamic_shared_size_bytes

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, value: int) -> None:
        self._kernel.max_dynamic_shared_size_bytes = value

    def __call__(self, grid, block, args, shared_mem: int = 0) -> None:
        if self._name in FAULTS:
            raise FAULTS[self._name]
        if not isinstance(grid, tuple) or not isinstance(block, tuple):
            raise TypeError(f"{self._name}: grid and block must be tuples")
        self._load()
        for arg in args:
            if not isinstance(arg, (DeviceArray, np.generic)):
                raise TypeError(f"{self._name}: a kernel cannot take {type(arg).__name__}")
        self._module.buffers[:] = _pinned
        is_null = lambda arg: isinstance(arg, np.uint64) and arg == 0
        plain = [np.asarray(arg) if isinstance(arg, DeviceArray) else None if is_null(arg) else arg for arg in args]
        Stream.current.add(lambda: self._kernel(grid, block, plain, shared_mem=shared_mem))

    def _load(self) -> None:
        """A kernel is loaded at its first launch, for which the driver may have to wait for the card."""
        raise_if_lost()
        if Stream.current.capturing is not None and not self._is_loaded:
            raise RuntimeError(f"{self._name}: the first launch while a stream captures")
        self._is_loaded = True

    def launch_by_address(self, grid, block, args, shared_mem: int) -> None:
        """As the driver launches: every pointer is a number."""
        self._load()
        if not all(isinstance(arg, np.generic) for arg in args):
            raise TypeError(f"{self._name}: the driver takes scalars and addresses")

        def run() -> None:
            self._module.buffers[:] = [*_pinned, *owners]
            is_null = lambda arg: isinstance(arg, np.uint64) and arg == 0
            self._kernel(grid, block, [None if is_null(arg) else arg for arg in args], shared_mem=shared_mem)

        # Kept until the launch has run, as CuPy's pool keeps what is freed for later work of the same stream.
        owners = [owner for known in _owners if (owner := known()) is not None and owner.size]
        Stream.current.add(run)


class Launcher:
    """Takes the place of rustinfer.KernelLauncher, with the kernels above in place of a driver."""

    def __init__(self, *_, **__):
        pass

    def launch(self, function: int, grid, block, args, shared_bytes: int, stream: int) -> None:
        if stream != Stream.current.ptr:
            raise ValueError("a launch on another stream than the current one")
        _functions[function].launch_by_address(grid, block, args, shared_bytes)


def alloc_pinned_memory(size: int):
    """Memory that a stream reads and writes when its turn comes, and kernels directly; has the address as `ptr`."""
    kind = type("PinnedMemory", (ctypes.c_char * size,), {"ptr": property(ctypes.addressof)})
    memory = kind()
    _pinned.append(np.frombuffer(memory, np.int32, size // 4))
    return memory


def _mem_get_info() -> tuple[int, int]:
    return MEMORY[0] - _allocated[0], MEMORY[0]


Stream.current = Stream()
runtime = types.SimpleNamespace(getDeviceCount=lambda: 1, memGetInfo=_mem_get_info, driverGetVersion=lambda: 13000)
cuda = types.SimpleNamespace(Stream=Stream, Event=Event, Device=Device, runtime=runtime, memory=types.SimpleNamespace(
    OutOfMemoryError=OutOfMemoryError), alloc_pinned_memory=alloc_pinned_memory)


class get_default_memory_pool:
    """What is freed stays with the pool, for the arrays to come, until it is told to give it back."""

    def free_all_blocks(self) -> None:
        _allocated[0] = self.used_bytes()

    def used_bytes(self) -> int:
        """Of arrays that somebody still holds."""
        return sum(owner.nbytes for known in _owners if (owner := known()) is not None)
