"""cuLaunchKernelEx gets what was meant, field by field: a C library that knows the real cuda.h reads it."""
import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import kernel_code
from harness import need_tool
from rustinfer import DeviceError, KernelLauncher, LaunchAttribute, LaunchConfig

FUNCTION, STREAM, ADDRESS = 0x7F00_1234_5678_9AB0, 0x5566_7788_99AA_BBC0, 0xFEDC_BA98_7654_3210
LARGE = (1 << 31) - 1


class FakeCuda:
    """The library as ctypes sees it."""

    def __init__(self, path: Path):
        self.path, self.library = str(path), ctypes.CDLL(str(path))

    def value(self, name: str, kind=ctypes.c_uint):
        return kind.in_dll(self.library, name).value

    def values(self, name: str, count: int, kind=ctypes.c_uint) -> list:
        return list((kind * count).in_dll(self.library, name))

    def set(self, name: str, *values: int, kind=ctypes.c_int) -> None:
        (kind * len(values)).in_dll(self.library, name)[:] = values

    def expect(self, *args: np.generic) -> None:
        self.set("parameter_sizes", *(arg.itemsize for arg in args), kind=ctypes.c_size_t)
        self.set("num_parameters", len(args))

    def launch(self, *args: np.generic, grid=(1,), block=(32,), shared_bytes=0, stream=STREAM):
        """A launch; the bytes that each parameter of the kernel got."""
        self.expect(*args)
        launcher = KernelLauncher(self.path)
        launcher.launch(FUNCTION, grid, block, list(args), shared_bytes, stream)
        rows = (ctypes.c_ubyte * 16 * 32).in_dll(self.library, "parameters")
        return [bytes(row)[:arg.itemsize] for row, arg in zip(rows, args)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    kernel_code.need_wheels("include/cuda.h")
    path = tmp_path_factory.mktemp("fake") / "libcuda.so.1"
    headers = Path(kernel_code.wheel_file("include/cuda.h")).parent
    source = Path(__file__).with_name("fake_cuda.c")
    subprocess.run([need_tool("gcc", "cc"), "-Wall", "-Werror", "-shared", "-fPIC", f"-I{headers}", source, "-o", path],
                   check=True)
    return path


@pytest.fixture
def cuda(library, tmp_path):
    """A library of its own for each test: a path that was loaded before would have the globals of before."""
    return FakeCuda(Path(shutil.copy(library, tmp_path)))


def size_and_offset(structure: type[ctypes.Structure], name: str) -> list[int]:
    field = getattr(structure, name)
    return [field.size, field.offset]


def test_structures_have_the_layout_of_cuda_h(cuda):
    names = ("shared_bytes", "stream", "attributes", "num_attributes")
    assert cuda.values("config_layout", 9, ctypes.c_size_t) == [
        ctypes.sizeof(LaunchConfig), *(number for name in names for number in size_and_offset(LaunchConfig, name))]
    assert cuda.values("attribute_layout", 5, ctypes.c_size_t) == [
        ctypes.sizeof(LaunchAttribute), *size_and_offset(LaunchAttribute, "id"),
        *size_and_offset(LaunchAttribute, "value")]


def test_shape_stream_and_function_arrive(cuda):
    cuda.launch(np.int32(1), grid=(LARGE, 65535, 3), block=(128, 4, 2), shared_bytes=99072)
    assert cuda.values("grid", 3) == [LARGE, 65535, 3] and cuda.values("block", 3) == [128, 4, 2]
    assert cuda.value("shared_bytes") == 99072 and cuda.value("num_launches") == 1
    assert cuda.value("stream", ctypes.c_ulonglong) == STREAM
    assert cuda.value("function", ctypes.c_ulonglong) == FUNCTION
    assert cuda.value("extra", ctypes.c_ulonglong) == 0


@pytest.mark.parametrize("sizes", [(7,), (7, 5), (7, 5, 3)])
def test_missing_dimensions_are_one(cuda, sizes):
    cuda.launch(np.int32(1), grid=sizes, block=sizes, stream=0)
    assert cuda.values("grid", 3) == cuda.values("block", 3) == [7, *sizes[1:], 1, 1][:3]
    assert cuda.value("stream", ctypes.c_ulonglong) == 0


def test_programmatic_launch_is_asked_for(cuda):
    cuda.launch(np.int32(1))
    assert cuda.value("num_attributes") == cuda.value("is_programmatic") == 1
    assert cuda.value("attribute_id") == cuda.value("programmatic_stream_serialization")


def test_arguments_of_every_kind_keep_size_and_bits(cuda):
    args = [np.uint64(ADDRESS), np.int32(-LARGE - 1), np.float32(-0.1), np.uint64(0), np.float32(np.nan), np.int32(7)]
    assert cuda.launch(*args) == [arg.tobytes() for arg in args]


def test_more_arguments_than_any_kernel_has(cuda):
    args = [np.uint64(ADDRESS + i) if i % 3 else np.int32(-i) for i in range(32)]
    assert cuda.launch(*args) == [arg.tobytes() for arg in args]


def test_one_launcher_launches_again_with_other_arguments(cuda):
    cuda.expect(np.int32(0))
    launcher = KernelLauncher(cuda.path)
    for number in (1, 2, 3):
        launcher.launch(FUNCTION, (number,), (32,), [np.int32(number)], 0, 0)
        assert cuda.value("grid") == number == cuda.value("parameters", ctypes.c_int) == cuda.value("num_launches")
    assert cuda.value("num_attributes") == cuda.value("is_programmatic") == 1


@pytest.mark.parametrize("result", [1, 700, 719])  # invalid value, illegal address, launch failure
def test_failed_launch_is_an_error_that_names_the_result(cuda, result):
    cuda.set("result", result)
    with pytest.raises(DeviceError, match=rf"cuLaunchKernelEx.*\b{result}\b"):
        cuda.launch(np.int32(1))


def test_machine_without_a_driver_says_which_library_is_missing(tmp_path):
    with pytest.raises(OSError, match="libcuda"):
        KernelLauncher(str(tmp_path / "libcuda.so.1"))
