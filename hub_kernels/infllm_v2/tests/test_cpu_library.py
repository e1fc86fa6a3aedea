"""The library that `cpu.py` builds, keeps and loads: nothing of others, nothing that was cut short."""

import importlib
import os

import pytest


@pytest.fixture
def cpu(kernel, monkeypatch, tmp_path):
    """The module with an empty cache folder and nothing built yet in this process."""
    module = importlib.import_module(f"{kernel.__name__}.cpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("INFLLM_V2_CPU_KERNEL", raising=False)
    monkeypatch.setattr(module, "EXTRAS", [[]])  # any compiler's, and no OpenMP
    monkeypatch.setattr(module, "FLAGS", [flag for flag in module.FLAGS if flag != "-O3"])  # seconds instead of ten
    functions = dict(module._functions)
    module.kernels.cache_clear()
    try:
        module._compiler()
    except module._CannotBuild as error:
        pytest.skip(f"needs a C++ compiler: {error}")
    yield module
    module.kernels.cache_clear()
    module._functions.update(functions)


def test_a_library_cut_short_is_built_again(cpu):
    """Loading it would kill the process, so it must not come to that."""
    library = cpu._library()
    whole = library.stat().st_size
    assert cpu._is_whole(library)
    library.write_bytes(library.read_bytes()[:6000])
    assert cpu._library() == library
    assert library.stat().st_size == whole
    assert cpu.kernels() is not None


def test_a_damaged_library_is_built_again(cpu):
    library = cpu._library()
    whole = library.stat().st_size
    library.write_bytes(b"not a library")
    assert cpu.kernels() is not None
    assert [(file.name, file.stat().st_size) for file in library.parent.iterdir()] == [(library.name, whole)]


def test_a_folder_that_anybody_can_write_to_is_not_trusted(cpu):
    cpu._library().parent.chmod(0o777)
    with pytest.warns(UserWarning, match="anybody can write to it"):
        assert cpu.kernels() is None


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs users with numbers (POSIX)")
def test_what_belongs_to_another_user_is_not_loaded(cpu, monkeypatch):
    library = cpu._library()
    monkeypatch.setattr(cpu.os, "getuid", lambda: library.stat().st_uid + 1)
    assert not cpu._ours(library)
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert cpu.kernels() is None


def test_a_library_that_anybody_can_write_to_is_built_again(cpu):
    library = cpu._library()
    library.write_bytes(b"put there by somebody")
    library.chmod(0o777)
    assert cpu._library() == library
    assert library.read_bytes()[:4] != b"put "
