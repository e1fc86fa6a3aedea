"""The C++ operators against plain.py, their definition, and what happens where they cannot be built."""

import importlib
import shutil
import subprocess
import sys

import pytest
import torch

from tolerances import relative_rms


# Relative root mean square by tensor: (tolerance, measured), on x86-64 with AVX-512, torch 2.13. The sums of a logit
# run in another order than in plain.py, so a float32 output differs by what 128 products round to.
TOLERANCES = {
    ("compressed", torch.float32): (6.4e-7, 1.6e-7),
    ("compressed", torch.bfloat16): (4e-3, 0),  # one rounding of the dtype: sums in another order may round apart
    ("compressed", torch.float16): (5e-4, 0),
    ("scores", torch.float32): (8e-7, 2.0e-7),
    ("scores", torch.bfloat16): (8e-7, 2.0e-7),
    ("scores", torch.float16): (8e-7, 2.0e-7),
    ("output", torch.float32): (2.4e-6, 6.4e-7),
    ("output", torch.bfloat16): (2.2e-4, 5.6e-5),
    ("output", torch.float16): (9e-5, 2.3e-5),
    ("log-sum-exp", torch.float32): (3.2e-7, 8.0e-8),
    ("log-sum-exp", torch.bfloat16): (3.2e-7, 8.0e-8),
    ("log-sum-exp", torch.float16): (3.2e-7, 8.0e-8),
}

# Key/value heads, query heads a group, head size, block size, window, stride.
SHAPES = [
    (2, 16, 128, 64, 32, 16),  # released
    (1, 1, 16, 8, 8, 4),
    (2, 2, 64, 16, 8, 4),
    (1, 8, 80, 32, 12, 8),  # a window that is not a multiple of its stride
    (1, 32, 256, 128, 32, 32),
    (3, 5, 24, 1, 1, 1),  # lanes and vectors both left over
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RATIO, SELECTED, INIT, WINDOW = 2, 6, 1, 2
Q_LENGTHS, K_LENGTHS = [37, 150, 1, 5], [201, 150, 40, 333]


@pytest.fixture(scope="module")
def package(kernel_folder):
    from kernels import get_local_kernel

    return get_local_kernel(kernel_folder, backend="cpu")


@pytest.fixture(scope="module")
def cpu(package):
    module = importlib.import_module(f"{package.__name__}.cpu")
    if module.kernels() is None:
        pytest.skip("no C++ compiler, or INFLLM_V2_CPU_KERNEL=0")
    return module


@pytest.fixture(scope="module")
def plain(package):
    return importlib.import_module(f"{package.__name__}.plain")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    yield lambda count: torch.set_num_threads(count)
    torch.set_num_threads(before)


def assert_near(got, want, name, dtype):
    assert (got.shape, got.dtype) == (want.shape, want.dtype), f"{name}: {got.shape} {got.dtype}"
    seen = torch.isfinite(want)
    assert torch.equal(got[~seen], want[~seen]), f"{name}: not finite in other places"
    error = relative_rms(got[seen], want[seen]) if want[seen].any() else got[seen].abs().max().item()
    assert error <= TOLERANCES[name, dtype][0], f"{name} ({dtype}): relative RMS {error:.2e}"


def bounds(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def prefill_inputs(shape, dtype):
    groups, heads, width = shape[:3]
    query = torch.randn(sum(Q_LENGTHS), groups * heads, width).to(dtype)
    key, value = (torch.randn(sum(K_LENGTHS), groups, width).to(dtype) for _ in range(2))
    positions = torch.cat([torch.arange(k - q, k) for q, k in zip(Q_LENGTHS, K_LENGTHS)]).int()
    return query, key, value, positions


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill(cpu, plain, shape, dtype):
    """Four rows of different length, one of them without a single complete coarse window before its query."""
    block_size, size, stride = shape[3:]
    query, key, value, positions = prefill_inputs(shape, dtype)
    rows = (bounds(Q_LENGTHS), bounds(K_LENGTHS))
    longest = (max(Q_LENGTHS), max(K_LENGTHS))
    windows, scaling = (size, stride, RATIO), shape[2] ** -0.5

    compressed = plain.compress_keys(key, rows[1], longest[1], *windows)
    for got, want in zip(cpu.compress_keys(key, rows[1], longest[1], *windows), compressed):
        assert_near(got, want, "compressed", dtype)

    arguments = (query, *compressed, *rows, *longest, block_size, *windows, scaling)
    scores = plain.block_scores(*arguments)
    assert_near(cpu.block_scores(*arguments), scores, "scores", dtype)

    choice = (scores, positions, SELECTED, INIT, WINDOW, block_size)
    blocks = plain.select_blocks(*choice)
    assert torch.equal(cpu.select_blocks(*choice), blocks)

    arguments = (query, key, value, blocks, *rows, *longest, block_size, scaling)
    output, lse = plain.sparse_attention(*arguments)
    got, got_lse = cpu.sparse_attention(*arguments)
    assert_near(got, output, "output", dtype)
    assert_near(got_lse, lse, "log-sum-exp", dtype)


def decode_inputs(shape, dtype, batch=3, queries=5, total=333):
    groups, heads, width, _, _, stride = shape
    query = torch.randn(batch, queries, groups * heads, width).to(dtype)
    key, value = (torch.randn(batch, groups, total, width).to(dtype) for _ in range(2))
    fine, coarse = (0.3 * torch.randn(batch, groups, total // stride + 1, width) for _ in range(2))
    return query, key, value, fine.to(dtype), coarse.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode(cpu, plain, shape, dtype):
    """Scores, then attention over contiguous and paged caches, with starts and a tree, by scores or by blocks."""
    groups, _, width, block_size, size, stride = shape
    query, key, value, fine, coarse = decode_inputs(shape, dtype)
    batch, queries, total = *query.shape[:2], key.shape[2]
    lengths, starts, scaling = int32(333, 290, 41), int32(0, 43, 2), width**-0.5

    scores = None
    drafts = lengths[:, None] - queries + int32(0, 1, 1, 2, 2)  # a tree: siblings share a position
    for positions in (None, drafts):
        arguments = (query, fine, coarse, lengths, positions, total, block_size, size, stride, RATIO, scaling)
        scores = plain.block_scores_decode(*arguments)
        assert_near(cpu.block_scores_decode(*arguments), scores, "scores", dtype)

    tree = torch.tensor([[1, 3, 5, 11, 21]] * batch)
    page_size = 2 * block_size
    table = torch.randperm(batch * -(-total // page_size)).view(batch, -1).int()
    paged = [torch.randn(table.numel(), groups, page_size, width).to(dtype) for _ in range(2)]
    blocks = plain.select_blocks(scores, drafts.flatten(), SELECTED, INIT, WINDOW, block_size)
    for caches, begins, pages, at, mask in (
        ((key, value), None, None, None, None),
        ((key, value), starts, None, None, None),
        ((key, value), starts, None, drafts, tree),
        (paged, None, table, None, None),
        (paged, None, table, drafts, tree),
    ):
        for chosen in ({"blocks": None, "scores": scores}, {"blocks": blocks, "scores": None}):
            arguments = (query, *caches, *chosen.values(), lengths, at, begins, pages, mask, SELECTED, INIT, WINDOW)
            arguments += (block_size, scaling)
            got, want = (module.sparse_attention_decode(*arguments) for module in (cpu, plain))
            assert_near(got, want, "output", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_compressed_keys(cpu, plain, dtype):
    """In place, only the windows completed since, each row from its own start."""
    key = torch.randn(3, 2, 333, 80).to(dtype)
    fine, coarse = torch.randn(3, 2, 90, 80).to(dtype), torch.randn(3, 2, 90, 80).to(dtype)
    expected = fine.clone(), coarse.clone()
    rows = (int32(0, 43, 2), int32(0, 100, 40), int32(333, 290, 41))
    cpu.update_compressed_keys(key, fine, coarse, *rows, 333, 8, 4, RATIO)
    plain.update_compressed_keys(key, *expected, *rows, 333, 8, 4, RATIO)
    assert_near(fine, expected[0], "compressed", dtype)
    assert_near(coarse, expected[1], "compressed", dtype)


def test_select_blocks_ties_and_extremes(cpu, plain):
    """Equal scores go to the lower block, -0 is 0, an infinite score is not more than a forced block."""
    scores = torch.randint(0, 4, (2, 300, 97)).float()
    scores[:, ::3] *= -1
    scores[:, ::5, 20:40] = torch.inf
    scores[:, ::7, 50:60] = torch.finfo(torch.float32).max
    scores[:, ::11] = -torch.inf
    positions = torch.randint(0, 97 * 8, (300,), dtype=torch.int32)
    for selected, init, window in ((20, 1, 4), (97, 3, 5), (200, 0, 0), (1, 0, 0), (12, 5, 6)):
        arguments = (scores, positions, selected, init, window, 8)
        assert torch.equal(cpu.select_blocks(*arguments), plain.select_blocks(*arguments)), arguments[2:]


def test_scores_that_overflow_are_infinite(cpu, plain):
    """A fine key far above every coarse one: the weight leaves float32, as in plain."""
    shape = SHAPES[2]
    query, _, _, fine, coarse = decode_inputs(shape, torch.float32)
    fine[:, :, 7] = 60 * query[0, 0, 0]
    arguments = (query, fine, coarse, int32(333, 333, 333), None, 333, 16, 8, 4, RATIO, 1.0)
    want = plain.block_scores_decode(*arguments)
    assert want.isinf().any()
    assert torch.equal(cpu.block_scores_decode(*arguments).isinf(), want.isinf())


def test_queries_without_blocks_give_zero(cpu):
    query, key, value, _ = prefill_inputs(SHAPES[2], torch.float32)
    blocks = torch.full((2, len(query), 3), -1, dtype=torch.int32)
    rows = (bounds(Q_LENGTHS), bounds(K_LENGTHS), 150, 333)
    output, lse = cpu.sparse_attention(query, key, value, blocks, *rows, 16, 0.1)
    assert not output.any()
    assert (lse == -torch.inf).all()
    query, key, value, _, _ = decode_inputs(SHAPES[2], torch.float32)
    arguments = (blocks[:, :15].contiguous(), None, int32(333, 290, 41), None, None, None, None, 0, 0, 0, 16, 0.1)
    assert not cpu.sparse_attention_decode(query, key, value, *arguments).any()


def test_threads_and_strides_change_no_bit(cpu, two_threads):
    """Work is divided by size alone, and keys read in place or copied aside give the same sums."""
    shape = (2, 16, 128, 64, 32, 16)
    query, key, value, fine, coarse = decode_inputs(shape, torch.float32, batch=1, queries=2, total=20_000)
    # 4096 bytes between rows: these are copied, as they would evict each other from the cache.
    wide = [torch.empty(1, 2, 20_000, 1024)[..., :128].copy_(tensor) for tensor in (key, value)]
    packed = [tensor[0].transpose(0, 1) for tensor in (query.transpose(1, 2).contiguous(), key, value)]
    results = []
    for threads, caches in ((1, (key, value)), (2, (key, value)), (2, wide)):
        two_threads(threads)
        lengths = int32(20_000)
        scores = cpu.block_scores_decode(query, fine, coarse, lengths, None, 20_000, 64, 32, 16, 4, 0.09)
        at = (lengths, None, None, None, None, 20, 1, 4, 64, 0.09)
        output = cpu.sparse_attention_decode(query, *caches, None, scores, *at)
        compressed = cpu.compress_keys(packed[1], int32(0, 20_000), 20_000, 32, 16, 4)
        rows = (int32(0, 2), int32(0, 20_000), 2, 20_000)
        prefill = cpu.block_scores(packed[0], *compressed, *rows, 64, 32, 16, 4, 0.09)
        blocks = cpu.select_blocks(prefill, int32(19_998, 19_999), 20, 1, 4, 64)
        attended, lse = cpu.sparse_attention(packed[0], *packed[1:], blocks, *rows, 64, 0.09)
        results.append((scores, output, *compressed, prefill, blocks, attended, lse))
    for other in results[1:]:
        for got, want in zip(other, results[0]):
            assert torch.equal(got, want)


def test_tiles_of_queries_change_no_bit(cpu):
    """A query's sums do not depend on the queries beside it, though they share what is in cache."""
    query, key, value, _ = prefill_inputs((1, 4, 64, 16, 8, 4), torch.float32)
    query, key, value = query[:50], key[:150], value[:150]
    blocks = torch.stack([torch.randperm(10)[:4].sort().values for _ in range(50)])[None].int()
    scaling = 0.1
    whole, _ = cpu.sparse_attention(query, key, value, blocks, int32(0, 50), int32(0, 150), 50, 150, 16, scaling)
    for i in (0, 7, 8, 31, 49):
        upto = 100 + i + 1
        alone, _ = cpu.sparse_attention(
            query[i : i + 1], key[:upto], value[:upto], blocks[:, i : i + 1].contiguous(), int32(0, 1), int32(0, upto),
            1, upto, 16, scaling,
        )  # fmt: skip
        assert torch.equal(alone[0], whole[i])


def test_the_door_uses_them_and_the_gradient_is_plain(package, cpu, plain, monkeypatch):
    """`infllm_v2_attention` ends in the C++ operators, forward; its gradient is plain PyTorch's."""
    assert package.ops.implementation(torch.ones(1)) is cpu.kernels()
    settings = {"kernel_size": 8, "kernel_stride": 4, "block_size": 8, "window_size": 16, "topk": 3, "dense_len": -1}
    gradients = []
    for module in (cpu.kernels(), plain):
        monkeypatch.setattr(package.ops, "_cpu", lambda module=module: module)
        torch.manual_seed(0)
        tensors = [torch.randn(2, heads, 150, 16, requires_grad=True) for heads in (4, 2, 2)]
        output = package.infllm_v2_attention(*tensors, starts=[0, 5], **settings)
        output.square().sum().backward()
        gradients.append((output.detach(), *(tensor.grad for tensor in tensors)))
    for got, want in zip(*gradients):
        assert_near(got, want, "output", torch.float32)


# --------------------------------------------------------------------------------------------------------- no building


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def fresh(package, monkeypatch, tmp_path):
    """The module as if nothing had been built: an empty cache folder, and the result forgotten afterwards."""
    module = importlib.import_module(f"{package.__name__}.cpu")
    monkeypatch.setenv("INFLLM_V2_CPU_KERNEL", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module.kernels.cache_clear()
    yield module
    module.kernels.cache_clear()


@pytest.mark.parametrize("case", ["CXX names nothing", "empty PATH", "broken compiler", "mute compiler", "no folder"])
def test_plain_answers_with_one_warning(fresh, monkeypatch, tmp_path, case):
    if case == "CXX names nothing":
        monkeypatch.setenv("CXX", "/nonexistent")
        reason = "CXX names /nonexistent, which is not a program"
    elif case == "empty PATH":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", "")
        reason = "there is no C\\+\\+ compiler in PATH"
    elif case == "broken compiler":
        text = '[ "$1" = --version ] && exit 0\necho "cannot find the standard library" >&2\nexit 1'
        monkeypatch.setenv("CXX", script(tmp_path / "broken", text))
        reason = "failed \\(cannot find the standard library\\)"
    elif case == "mute compiler":
        monkeypatch.setenv("CXX", script(tmp_path / "mute", "exit 3"))
        reason = "does not run"
    else:
        monkeypatch.setenv("CXX", script(tmp_path / "compiler", "exit 0"))
        (tmp_path / "cache").write_text("a file where a folder should be")
        reason = "cannot be written to"
    with pytest.warns(UserWarning, match=reason) as said:
        assert fresh.kernels() is None
    assert len(said) == 1
    assert fresh.kernels() is None  # a second warning would be an error
    leftovers = [] if case == "no folder" else list((tmp_path / "cache").rglob("*.*"))
    assert not leftovers


def test_switched_off_without_a_word(fresh, monkeypatch):
    monkeypatch.setenv("INFLLM_V2_CPU_KERNEL", "0")
    assert fresh.kernels() is None  # a warning would be an error


BUILD = """
import sys, types, torch
package = types.ModuleType("infllm_v2_cpu_alone")
package.__path__ = [sys.argv[1]]
sys.modules[package.__name__] = package
from infllm_v2_cpu_alone import cpu
kernels = cpu.kernels()
scores = torch.arange(20.0).view(1, 2, 10)
print(kernels.select_blocks(scores, torch.tensor([79, 40], dtype=torch.int32), 3, 1, 0, 8).tolist())
"""


def test_two_processes_build_at_once(cpu, fresh, kernel_folder, tmp_path, monkeypatch):
    """Both end up with a whole library and leave nothing else; one that was damaged since is built anew."""
    compiler = cpu._compiler()
    # Unoptimised, which takes a second instead of several.
    quick = script(tmp_path / "quick", f'exec {shutil.which(compiler[0])} "$@" -O0')
    monkeypatch.setenv("CXX", quick)
    command = [sys.executable, "-W", "error", "-c", BUILD, str(kernel_folder / "build" / "torch-cpu")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        assert process.communicate()[0].strip() == "[[[0, 8, 9], [0, 4, 5]]]"
        assert process.returncode == 0
    (library,) = (tmp_path / "cache" / "infllm_v2_kernel").iterdir()
    library.write_bytes(b"half a librar")
    monkeypatch.setattr(cpu, "_functions", {})
    assert fresh.kernels() is not None
    assert library.stat().st_size > 10_000
