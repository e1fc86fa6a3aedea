"""
Every operator against its definition (`plain.py`) or an independent computation in float64: odd lengths, groups of 1
to 32 heads, rows of different length, ties, empty rows, trees, pages. Errors are relative root mean squares.
"""

import functools
import sys

import pytest
import torch


# dtype: (tolerance, largest error measured). The interpreter cuts bfloat16 off where hardware rounds.
OUTPUT = {torch.float32: (1.4e-6, 4.5e-7), torch.bfloat16: (2.2e-2, 5.8e-3), torch.float16: (2.4e-3, 6e-4)}
GRADIENT = {torch.float32: (1.9e-6, 6e-7), torch.bfloat16: (2.6e-2, 8.7e-3), torch.float16: (2.8e-3, 9e-4)}
MEANS = {torch.float32: (9e-7, 2.4e-7), torch.bfloat16: (1.6e-2, 4.1e-3)}
SCORES = (1e-6, 2.5e-7)

# heads a group, key/value heads, head size, block size, window size and stride
SHAPES = {
    "group 1": (1, 2, 16, 8, 8, 4),
    "group 2, head size 80": (2, 1, 80, 16, 8, 4),
    "group 8": (8, 2, 64, 16, 8, 4),
    "group 16, released": (16, 1, 128, 64, 32, 16),
    "group 12, odd": (12, 1, 24, 12, 6, 3),
    "group 32": (32, 1, 16, 16, 8, 8),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
# Every shape in float32, and the 16-bit types where the code differs.
CASES = [(shape, torch.float32) for shape in SHAPES.values()]
CASES += [(SHAPES["group 16, released"], torch.bfloat16), (SHAPES["group 2, head size 80"], torch.bfloat16)]
CASES += [(SHAPES["group 8"], torch.float16)]
NAMES = [f"{name}, {dtype}" for shape, dtype in CASES for name, known in SHAPES.items() if known is shape]


def bounds(lengths, device):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


def error(got, want):
    """Relative root mean square; infinities must stand in the same places."""
    got, want = got.double().cpu(), want.double().cpu()
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite)
    got, want = got[finite], want[finite]
    scale = want.pow(2).mean().sqrt()
    return ((got - want).pow(2).mean().sqrt() / (scale if scale > 0 else 1)).item() if want.numel() else 0.0


def close(got, want, tolerance, name):
    found = error(got, want)
    assert found <= tolerance[0], f"{name}: relative RMS {found:.2e}, tolerance {tolerance[0]:.1e}"


@functools.cache
def rows(released):
    """Queries and keys of each row: a whole prefill, a single token, a chunk after a past."""
    return ((5,), (150,)) if released else ((19, 1, 9), (19, 1, 77))


@pytest.fixture(autouse=True)
def few_programs(kernel, device, monkeypatch):
    """The interpreter runs programs one after another: split a decode step over a few."""
    if device == "cpu":
        for operator in ("sparse_attention_decode", "block_scores_decode"):
            monkeypatch.setattr(sys.modules[getattr(kernel.ops._triton(), operator).__module__], "PROGRAMS", 16)


class Packed:
    """Random rows one after another, and blocks chosen by the definition."""

    def __init__(self, plain, shape, device, dtype=torch.float32, lengths=None, tied=False):
        self.group, self.groups, self.size, self.block_size, self.window, self.stride = shape
        self.q_lengths, self.k_lengths = lengths or rows(self.block_size == 64)
        self.cu_q, self.cu_k = bounds(self.q_lengths, device), bounds(self.k_lengths, device)
        self.max_q, self.max_k = max(self.q_lengths), max(self.k_lengths)
        self.args = (self.cu_q, self.cu_k, self.max_q, self.max_k)
        self.query = torch.randn(sum(self.q_lengths), self.group * self.groups, self.size).to(device, dtype)
        self.key = torch.randn(sum(self.k_lengths), self.groups, self.size).to(device, dtype)
        self.value = torch.randn(sum(self.k_lengths), self.groups, self.size).to(device, dtype)
        self.windows = {"size": self.window, "stride": self.stride, "ratio": 4}
        self.scaling = self.size**-0.5
        self.fine, self.coarse = plain.compress_keys(self.key, self.cu_k, self.max_k, *self.windows.values())
        self.positions = (
            torch.cat([torch.arange(k - q, k) for q, k in zip(self.q_lengths, self.k_lengths)]).int().to(device)
        )
        self.scores = plain.block_scores(
            self.query, self.fine, self.coarse, *self.args, self.block_size, *self.windows.values(), self.scaling
        )
        if tied:
            self.scores = (self.scores * 2).round() / 2
        self.choice = {"init_blocks": 1, "window_blocks": 1, "block_size": self.block_size}
        self.blocks = plain.select_blocks(self.scores, self.positions, 4, 1, 1, self.block_size)


def attention_float64(packed, query, key, value, blocks=None):
    """Masked softmax attention, written out: every row, head and query by itself in float64."""
    blocks = packed.blocks if blocks is None else blocks
    outputs, q0, k0 = [], 0, 0
    for queries, keys in zip(packed.q_lengths, packed.k_lengths):
        for s in range(q0, q0 + queries):
            position = keys - queries + s - q0
            heads = []
            for h in range(query.shape[1]):
                g = h // packed.group
                read = [
                    n
                    for block in blocks[g, s].tolist()
                    if block >= 0
                    for n in range(block * packed.block_size, min((block + 1) * packed.block_size, keys))
                    if n <= position
                ]
                if not read:
                    heads.append(query[s, h] * 0)
                    continue
                at = torch.tensor(read, device=query.device) + k0
                heads.append((key[at, g] @ query[s, h] * packed.scaling).softmax(0) @ value[at, g])
            outputs.append(torch.stack(heads))
        q0, k0 = q0 + queries, k0 + keys
    return torch.stack(outputs)


# ----------------------------------------------------------------------------------------------------- compressed keys


@shapes
@pytest.mark.parametrize("dtype", MEANS, ids=str)
def test_compressed_keys_are_the_means_of_complete_windows(kernel, plain, shape, dtype, device):
    packed = Packed(plain, shape, device, dtype)
    compressed = kernel.compress_keys(packed.key, packed.cu_k, packed.max_k, **packed.windows)
    for keys, ratio, name in zip(compressed, (1, 4), ("fine", "coarse")):
        size, stride, want = packed.window * ratio, packed.stride * ratio, torch.zeros_like(keys, dtype=torch.float64)
        start = 0
        for length in packed.k_lengths:
            for j in range((length - size) // stride + 1 if length >= size else 0):
                window = packed.key[start + j * stride : start + j * stride + size]
                want[start // stride + j] = window.double().mean(0)
            start += length
        close(keys, want, MEANS[dtype], name)


@shapes
def test_updates_in_pieces_equal_one_update(kernel, shape, device):
    group, groups, size, _, window, stride = shape
    key = torch.randn(2, groups, 190, size, device=device)
    starts = torch.tensor([0, 7], dtype=torch.int32, device=device)
    windows = {"size": window, "stride": stride, "ratio": 4}

    def filled(steps):
        fine = torch.zeros(2, groups, 190 // stride + 1, size, device=device)
        coarse = torch.zeros(2, groups, 190 // (4 * stride) + 1, size, device=device)
        done = torch.zeros(2, dtype=torch.int32, device=device)
        for step in steps:
            lengths = torch.tensor([step, max(step - 7, 0)], dtype=torch.int32, device=device)
            kernel.update_compressed_keys(key, fine, coarse, starts, done, lengths, 190, **windows)
            done = lengths
        return fine, coarse

    for pieces, whole, name in zip(filled([3, 50, 51, 64, 130, 131, 190]), filled([190]), ("fine", "coarse")):
        assert torch.equal(pieces, whole), name
    for row, start in enumerate(starts.tolist()):
        own = key[row, :, start:].transpose(0, 1).contiguous()
        packed = kernel.compress_keys(own, bounds([own.shape[0]], device), own.shape[0], **windows)
        for cached, alone in zip(filled([190]), packed):
            assert torch.equal(cached[row, :, : alone.shape[0]].transpose(0, 1), alone)


# --------------------------------------------------------------------------------------------------- scores, selection


@pytest.mark.parametrize("shape, dtype", CASES, ids=NAMES)
def test_block_scores(kernel, plain, shape, dtype, device):
    packed = Packed(plain, shape, device, dtype)
    got = kernel.block_scores(
        packed.query, packed.fine, packed.coarse, *packed.args, block_size=packed.block_size, **packed.windows
    )
    close(got, packed.scores, SCORES, "scores")


@pytest.mark.parametrize("splits", [1, 8], ids=["one program a row", "split"])
def test_scores_of_a_long_row_walk_through_many_tiles(kernel, plain, splits, device, monkeypatch):
    """More coarse keys, and more blocks, than one tile holds; later logits that are larger than all before."""
    monkeypatch.setattr(sys.modules[kernel.ops._triton().block_scores_decode.__module__], "PROGRAMS", splits)
    packed = Packed(plain, SHAPES["group 2, head size 80"], device, lengths=((3,), (1301,)))
    growing = packed.key * torch.linspace(0.2, 3, 1301, device=device)[:, None, None]
    fine, coarse = plain.compress_keys(growing, packed.cu_k, 1301, *packed.windows.values())
    options = {"block_size": 16, **packed.windows}
    want = plain.block_scores(packed.query, fine, coarse, *packed.args, *options.values(), packed.scaling)
    if splits == 1:
        close(kernel.block_scores(packed.query, fine, coarse, *packed.args, **options), want, SCORES, "scores")
    compressed = [keys.transpose(0, 1)[None] for keys in (fine, coarse)]
    got = kernel.block_scores_decode(packed.query[None], *compressed, packed.cu_k[1:], 1301, **options)
    close(got, want, SCORES, "scores of a decode step")


@pytest.mark.parametrize("init_blocks, window_blocks, selected", [(1, 1, 4), (0, 0, 1), (2, 3, 9), (1, 0, 100)])
def test_selection_takes_the_best_and_of_equals_the_lower(kernel, plain, init_blocks, window_blocks, selected, device):
    scores = (torch.rand(2, 12, 23, device=device) * 4).round() / 4  # many ties
    scores[0, 0] = 0
    scores[1, 1, 3:7] = torch.inf
    positions = torch.randint(0, 23 * 16, (12,), dtype=torch.int32, device=device)
    positions[0] = 0
    choice = {"init_blocks": init_blocks, "window_blocks": window_blocks, "block_size": 16}
    got = kernel.select_blocks(scores, positions, selected, **choice)
    assert torch.equal(got, plain.select_blocks(scores, positions, selected, *choice.values()))
    for g in range(2):
        for s, position in enumerate(positions.tolist()):
            chosen, own = [block for block in got[g, s].tolist() if block >= 0], position // 16
            forced = {block for block in range(own + 1) if block < init_blocks or block >= own - window_blocks}
            assert chosen == sorted(set(chosen))
            assert forced <= set(chosen)
            assert max(chosen) == own
            assert len(chosen) == min(selected, own + 1)
            left = [(-float(scores[g, s, block]), block) for block in range(own + 1) if block not in forced]
            assert set(chosen) - forced == {block for _, block in sorted(left)[: len(chosen) - len(forced)]}


# ----------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("shape, dtype", CASES, ids=NAMES)
def test_attention_and_its_gradients(kernel, plain, shape, dtype, device):
    packed = Packed(plain, shape, device, dtype)
    inputs = [tensor.clone().requires_grad_() for tensor in (packed.query, packed.key, packed.value)]
    output, lse = kernel.sparse_attention(*inputs, packed.blocks, *packed.args, block_size=packed.block_size)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    want = attention_float64(packed, *exact)
    close(output, want, OUTPUT[dtype], "output")
    want_lse = plain.sparse_attention(
        *(tensor.detach() for tensor in inputs), packed.blocks, *packed.args, packed.block_size, packed.scaling
    )[1]
    close(lse, want_lse, SCORES, "lse")
    grad = torch.randn_like(output)
    output.backward(grad)
    want.backward(grad.double())
    for name, tensor, reference in zip(("query", "key", "value"), inputs, exact):
        close(tensor.grad, reference.grad, GRADIENT[dtype], f"gradient of {name}")


def test_backward_in_segments_is_the_same_sum_and_every_run_the_same_bits(kernel, plain, device, monkeypatch):
    packed = Packed(plain, SHAPES["group 2, head size 80"], device)
    grad = torch.randn_like(packed.query)

    def gradients():
        inputs = [tensor.clone().requires_grad_() for tensor in (packed.query, packed.key, packed.value)]
        output, _ = kernel.sparse_attention(*inputs, packed.blocks, *packed.args, block_size=packed.block_size)
        output.backward(grad)
        return [tensor.grad for tensor in inputs]

    whole = gradients()
    module = sys.modules[kernel.ops._triton().sparse_attention.__module__]
    monkeypatch.setattr(module, "SEGMENT", 16)
    first, second = gradients(), gradients()
    for a, b, reference in zip(first, second, whole):
        assert torch.equal(a, b)
        close(a, reference, GRADIENT[torch.float32], "gradient in segments")


def test_a_query_without_blocks_gives_zero_and_no_gradient(kernel, plain, device):
    packed = Packed(plain, SHAPES["group 8"], device)
    blocks = packed.blocks.clone()
    blocks[:, 3] = -1
    inputs = [tensor.clone().requires_grad_() for tensor in (packed.query, packed.key, packed.value)]
    output, lse = kernel.sparse_attention(*inputs, blocks, *packed.args, block_size=packed.block_size)
    assert not output[3].any()
    assert bool((lse[3] == -torch.inf).all())
    assert bool(lse[4].isfinite().all())
    output.sum().backward()
    assert not inputs[0].grad[3].any()
    assert all(bool(tensor.grad.isfinite().all()) for tensor in inputs)


def test_all_blocks_are_dense_causal_attention(kernel, plain, device):
    """The other independent computation: PyTorch's own attention."""
    packed = Packed(plain, SHAPES["group 8"], device, lengths=((45,), (45,)))
    blocks = torch.arange(3, dtype=torch.int32, device=device).expand(2, 45, 3)
    blocks = torch.where(blocks <= (packed.positions // 16)[:, None], blocks, -1).contiguous()
    output, _ = kernel.sparse_attention(packed.query, packed.key, packed.value, blocks, *packed.args, block_size=16)
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (packed.query, packed.key, packed.value))
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    close(output, want[0].transpose(0, 1), OUTPUT[torch.float32], "output")


def test_strided_views_need_no_copy(kernel, plain, device):
    """Keys as a cache lays them, queries as a projection does: only features need to lie together."""
    packed = Packed(plain, SHAPES["group 8"], device)
    args = (packed.blocks, *packed.args)
    want, _ = kernel.sparse_attention(packed.query, packed.key, packed.value, *args, block_size=16)
    query, key, value = (
        t.transpose(0, 1).contiguous().transpose(0, 1) for t in (packed.query, packed.key, packed.value)
    )
    got, _ = kernel.sparse_attention(query, key, value, *args, block_size=16)
    assert not key.is_contiguous()
    assert torch.equal(got, want)


# -------------------------------------------------------------------------------------------------------------- decode


class Cache:
    """Two rows of different length in a cache with padding on the left, and scores by the definition."""

    def __init__(self, plain, shape, queries, device, dtype=torch.float32):
        group, self.groups, size, self.block_size, self.window, self.stride = shape
        self.lengths = torch.tensor([118, 67], dtype=torch.int32, device=device)
        self.starts = torch.tensor([0, 51], dtype=torch.int32, device=device)
        self.query = torch.randn(2, queries, group * self.groups, size).to(device, dtype)
        self.key, self.value = torch.randn(2, 2, self.groups, 118, size).to(device, dtype)
        self.windows = {"size": self.window, "stride": self.stride, "ratio": 4}
        self.fine = torch.zeros(2, self.groups, 118 // self.stride + 1, size, device=device, dtype=dtype)
        self.coarse = torch.zeros(2, self.groups, 118 // (4 * self.stride) + 1, size, device=device, dtype=dtype)
        done = torch.zeros_like(self.lengths)
        plain.update_compressed_keys(
            self.key, self.fine, self.coarse, self.starts, done, self.lengths, 118, *self.windows.values()
        )
        self.scores = plain.block_scores_decode(
            self.query,
            self.fine,
            self.coarse,
            self.lengths,
            None,
            118,
            self.block_size,
            *self.windows.values(),
            size**-0.5,
        )
        self.positions = (self.lengths[:, None] - queries + torch.arange(queries, device=device)).int().flatten()
        self.blocks = plain.select_blocks(self.scores, self.positions, 4, 1, 1, self.block_size)
        self.choice = {"num_selected": 4, "init_blocks": 1, "window_blocks": 1, "block_size": self.block_size}
        self.scaling = size**-0.5

    def definition(self, plain, **changes):
        given = {
            "blocks": None,
            "scores": None,
            "positions": None,
            "starts": self.starts,
            "page_table": None,
            "tree_mask": None,
        }
        given.update(changes)
        key, value = given.pop("key", self.key), given.pop("value", self.value)
        return plain.sparse_attention_decode(
            self.query, key, value, given["blocks"], given["scores"], self.lengths, given["positions"],
            given["starts"], given["page_table"], given["tree_mask"], *self.choice.values(), self.scaling,
        )  # fmt: skip


@shapes
def test_decode_scores(kernel, plain, shape, device):
    cache = Cache(plain, shape, 1 if shape[0] == 16 else 3, device)
    args = (cache.query, cache.fine, cache.coarse, cache.lengths, 118)
    got = kernel.block_scores_decode(*args, block_size=cache.block_size, **cache.windows)
    close(got, cache.scores, SCORES, "scores")


def test_decode_scores_at_given_positions_see_no_window_beyond_the_row(kernel, plain, device):
    cache = Cache(plain, SHAPES["group 8"], 3, device)
    positions = torch.tensor([[117, 119, 119], [67, 40, 3]], dtype=torch.int32, device=device)
    args = (cache.query, cache.fine, cache.coarse, cache.lengths)
    got = kernel.block_scores_decode(*args, 118, positions=positions, block_size=16, **cache.windows)
    want = plain.block_scores_decode(*args, positions, 118, 16, *cache.windows.values(), cache.scaling)
    close(got, want, SCORES, "scores")


@pytest.mark.parametrize("splits", [1, 16], ids=["one program a query", "split"])
@pytest.mark.parametrize("shape, dtype", CASES[2:-1], ids=NAMES[2:-1])
def test_decode_chooses_and_attends(kernel, plain, shape, dtype, splits, device, monkeypatch):
    monkeypatch.setattr(sys.modules[kernel.ops._triton().sparse_attention_decode.__module__], "PROGRAMS", splits)
    cache = Cache(plain, shape, 1 if splits > 1 else 2, device, dtype)
    args = (cache.query, cache.key, cache.value, cache.lengths)
    got = kernel.sparse_attention_decode(*args, scores=cache.scores, starts=cache.starts, **cache.choice)
    close(got, cache.definition(plain, scores=cache.scores), OUTPUT[dtype], "output")
    listed = kernel.sparse_attention_decode(
        *args, blocks=cache.blocks, starts=cache.starts, block_size=cache.block_size
    )
    assert torch.equal(got, listed), "choosing on the way and a list of the same blocks differ"


def test_decode_of_a_tree_of_drafts(kernel, plain, device):
    """Each path through the tree answers as if its tokens alone had been appended."""
    cache = Cache(plain, SHAPES["group 8"], 5, device)
    parents = [-1, 0, 0, 1, 2]
    paths = [[i] for i in range(5)]
    for i, parent in enumerate(parents):
        paths[i] = (paths[parent] if parent >= 0 else []) + [i]
    mask = torch.tensor([[sum(1 << j for j in path) for path in paths]] * 2, device=device)
    depth = torch.tensor([len(path) - 1 for path in paths], device=device)
    positions = (cache.lengths[:, None] - 5 + depth).int().contiguous()
    args = (cache.query, cache.key, cache.value, cache.lengths)
    given = {"blocks": cache.blocks, "starts": cache.starts, "positions": positions, "tree_mask": mask}
    got = kernel.sparse_attention_decode(*args, **given, block_size=16)
    close(got, cache.definition(plain, **given), OUTPUT[torch.float32], "tree")
    for b, (start, length) in enumerate(zip(cache.starts.tolist(), cache.lengths.tolist())):
        for i, path in enumerate(paths):
            base = length - 5
            read = [
                n
                for m in cache.blocks[0, b * 5 + i].tolist()
                if m >= 0
                for n in range(m * 16, m * 16 + 16)
                if n < base
            ]
            at = start + torch.tensor(sorted(read) + [base + j for j in path], device=device)
            keys, values = (tensor[b, 0, at].double() for tensor in (cache.key, cache.value))
            weights = (cache.query[b, i, :8].double() @ keys.T * cache.scaling).softmax(-1)
            close(got[b, i, :8], weights @ values, OUTPUT[torch.float32], f"row {b}, draft {i}")


def test_pages_hold_the_same_rows(kernel, plain, device):
    cache = Cache(plain, SHAPES["group 8"], 3, device)
    page, order = 32, torch.randperm(12, device=device)
    table = order[:12].view(2, 6).int().contiguous()
    pages = torch.randn(2, 12, cache.groups, page, 64, device=device)
    for b, (start, length) in enumerate(zip(cache.starts.tolist(), cache.lengths.tolist())):
        for n in range(length):
            for kept, tensor in zip(pages, (cache.key, cache.value)):
                kept[table[b, n // page], :, n % page] = tensor[b, :, start + n]
    mask = torch.tensor([[1, 3, 5]] * 2, device=device)
    for given in ({"blocks": cache.blocks}, {"scores": cache.scores}, {"blocks": cache.blocks, "tree_mask": mask}):
        choice = cache.choice if "scores" in given else {"block_size": 16}
        paged = kernel.sparse_attention_decode(
            cache.query, pages[0], pages[1], cache.lengths, page_table=table, **given, **choice
        )
        contiguous = kernel.sparse_attention_decode(
            cache.query, cache.key, cache.value, cache.lengths, starts=cache.starts, **given, **choice
        )
        assert torch.equal(paged, contiguous)


def test_a_decode_step_is_four_launches(kernel, plain, device, monkeypatch):
    cache, launches = Cache(plain, SHAPES["group 8"], 1, device), []
    kernels = type(sys.modules[kernel.ops._triton().select_blocks.__module__]._select_kernel)
    run = kernels.run
    monkeypatch.setattr(
        kernels, "run", lambda self, *args, **kwargs: launches.append(self) or run(self, *args, **kwargs)
    )
    kernel.infllm_v2_attention(
        cache.query.transpose(1, 2), cache.key, cache.value, kernel_size=8, kernel_stride=4, block_size=16,
        window_size=16, topk=3, dense_len=-1, compressed_keys=(cache.fine, cache.coarse),
    )  # fmt: skip
    assert len(launches) == 4


# ------------------------------------------------------------------------------------------------------------ one call


@pytest.mark.parametrize("queries", [2, 40], ids=["decode", "prefill"])
def test_one_call_equals_the_operators_of_the_definition(kernel, plain, queries, device, monkeypatch):
    fields = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "window_size": 16, "topk": 3, "dense_len": 100}
    query = torch.randn(2, 8, queries, 16, device=device)
    key, value = torch.randn(2, 2, 2, 130, 16, device=device)
    got = kernel.infllm_v2_attention(query, key, value, starts=[0, 11], **fields)
    monkeypatch.setattr(kernel.ops, "implementation", lambda tensor: plain)
    want = kernel.infllm_v2_attention(query, key, value, starts=[0, 11], **fields)
    close(got, want, OUTPUT[torch.float32], "output")


# ------------------------------------------------------------------------------------------------------- torch.library


def calls(kernel, plain, device):
    """Every operator with small arguments."""
    packed, cache = (
        Packed(plain, SHAPES["group 8"], device, lengths=((3,), (40,))),
        Cache(plain, SHAPES["group 8"], 1, device),
    )
    ops, windows = kernel.ops.ops, tuple(packed.windows.values())
    inputs = [tensor.clone().requires_grad_() for tensor in (packed.query, packed.key, packed.value)]
    output, lse = plain.sparse_attention(packed.query, packed.key, packed.value, packed.blocks, *packed.args, 16, 0.1)
    zero = torch.zeros_like(cache.lengths)
    return {
        "compress_keys": (packed.key, packed.cu_k, packed.max_k, *windows),
        "update_compressed_keys": (cache.key, cache.fine, cache.coarse, cache.starts, zero, cache.lengths, 118,
        *windows), "block_scores": (packed.query, packed.fine, packed.coarse, *packed.args, 16, *windows, 0.1),
        "block_scores_decode": (cache.query, cache.fine, cache.coarse, cache.lengths, None, 118, 16, *windows, 0.1),
        "select_blocks": (packed.scores, packed.positions, 4, 1, 1, 16), "sparse_attention": (*inputs, packed.blocks,
        *packed.args, 16, 0.1),
        "sparse_attention_backward": (
            output, packed.query, packed.key, packed.value, output, lse, packed.blocks, *packed.args, 16, 0.1
        ),
        "sparse_attention_decode": (
            cache.query, cache.key, cache.value, None, cache.scores, cache.lengths, None, cache.starts, None, None,
            4, 1, 1, 16, 0.1
        ),
    }, ops  # fmt: skip


@pytest.mark.parametrize("name", [
    "compress_keys", "update_compressed_keys", "block_scores", "block_scores_decode", "select_blocks",
    "sparse_attention", "sparse_attention_backward", "sparse_attention_decode",
])  # fmt: skip
def test_opcheck(kernel, plain, name, device):
    arguments, ops = calls(kernel, plain, device)
    torch.library.opcheck(getattr(ops, name).default, arguments[name])


@pytest.mark.filterwarnings("ignore:.*`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiles_as_one_graph(kernel, plain, device):
    packed = Packed(plain, SHAPES["group 8"], device, lengths=((3,), (40,)))

    def step(query, key, value):
        fine, coarse = kernel.compress_keys(key, packed.cu_k, packed.max_k, **packed.windows)
        scores = kernel.block_scores(query, fine, coarse, *packed.args, block_size=16, **packed.windows)
        blocks = kernel.select_blocks(scores, packed.positions, 4, window_blocks=1, block_size=16)
        return kernel.sparse_attention(query, key, value, blocks, *packed.args, block_size=16)[0]

    args = (packed.query.requires_grad_(), packed.key, packed.value)
    want = step(*args)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*args)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(out.sum(), packed.query)[0] for out in (got, want)))


# ----------------------------------------------------------------------------------------------------------- bad input


def refusals(packed, cache, kernel):
    key, query, value, blocks = packed.key, packed.query, packed.value, packed.blocks

    def attend(**changes):
        given = {
            "query": query, "key": key, "value": value, "blocks": blocks, "cu_seqlens_q": packed.cu_q,
            "cu_seqlens_k": packed.cu_k, "max_seqlen_q": packed.max_q, "max_seqlen_k": packed.max_k, "block_size": 16,
        }  # fmt: skip
        return lambda: kernel.sparse_attention(**{**given, **changes})

    def decode(**changes):
        given = {"query": cache.query, "key": cache.key, "value": cache.value, "lengths": cache.lengths,
        "blocks": cache.blocks,
                 "block_size": 16, "starts": cache.starts}  # fmt: skip
        return lambda: kernel.sparse_attention_decode(**{**given, **changes})

    wide, one, few = torch.zeros(40, 3, 300), cache.query.transpose(1, 2), {"window_blocks": 1, "num_selected": 4}
    tree = torch.ones(2, 64, dtype=torch.int64)
    rising = blocks.clone()
    rising[0, 2, :2] = torch.tensor([1, 0])
    return {
        "float64": (attend(query=query.double()), "float64; allowed are"),
        "mixed dtypes": (attend(key=key.bfloat16(), value=value.bfloat16()), "must agree"),
        "dimensions": (attend(key=key[None], value=value[None]), "must have 3 dimensions"),
        "value shape": (attend(value=value[:-1]), "must have one shape"),
        "heads": (attend(query=query[:, :7]), "do not divide"),
        "head size": (attend(key=key[..., :8].contiguous(), value=value[..., :8].contiguous()), "head size"),
        "large head": (lambda: kernel.block_scores(wide, wide, wide, *packed.args), "head size 300"),
        "features apart": (attend(query=query.transpose(1, 2).contiguous().transpose(1, 2)), "contiguous\\(\\) first"),
        "cu_seqlens end": (attend(cu_seqlens_k=packed.cu_k - packed.cu_k // 90), "must rise from 0"),
        "cu_seqlens fall": (attend(cu_seqlens_q=packed.cu_q.flip(0).contiguous()), "must rise from 0"),
        "cu_seqlens dtype": (attend(cu_seqlens_q=packed.cu_q.long()), "contiguous int32"),
        "no rows": (attend(cu_seqlens_q=packed.cu_q[:1], cu_seqlens_k=packed.cu_k[:1]), "at least one row"),
        "more queries than keys": (
            attend(query=torch.cat([query] * 3), blocks=torch.cat([blocks] * 3, 1), cu_seqlens_q=packed.cu_q * 3,
                   max_seqlen_q=120),
            "are the last of the keys",
        ),
        "maximum too small": (attend(max_seqlen_k=50), "the maximum given is 50"),
        "index too high": (attend(blocks=blocks + 100), "allowed are 0"),
        "index too low": (attend(blocks=blocks - 7), "allowed are 0"),
        "indices fall": (attend(blocks=rising), "must rise"),
        "blocks shape": (attend(blocks=blocks[:, 1:].contiguous()), "blocks must be"),
        "block size": (attend(block_size=512), "1 to 128"),
        "windows": (lambda: kernel.compress_keys(key, packed.cu_k, 93, size=4, stride=8), "0 < stride <= size"),
        "stride": (
            lambda: kernel.block_scores(query, packed.fine, packed.coarse, *packed.args, block_size=16, size=8,
            stride=5), "multiple of stride",
        ),
        "selected": (lambda: kernel.select_blocks(packed.scores, packed.positions, 3, window_blocks=8),
        "at least their sum"), "position": (lambda: kernel.select_blocks(packed.scores, packed.positions + 500, 96,
        block_size=16), "positions hold"), "half scores": (lambda: kernel.select_blocks(packed.scores.half(),
        packed.positions), "contiguous float32"),
        "overlapping output": (
            lambda: kernel.update_compressed_keys(
                cache.key, cache.fine[..., :1].expand(-1, -1, -1, 64), cache.coarse, cache.starts, cache.lengths,
                cache.lengths, 1),
            "contiguous|overlaps itself",
        ),
        "expanded output": (
            lambda: kernel.update_compressed_keys(
                cache.key, cache.fine[:, :, :1].expand(-1, -1, 40, -1), cache.coarse, cache.starts, cache.lengths,
                cache.lengths, 1),
            "overlaps itself",
        ),
        "row grows backwards": (
            lambda: kernel.update_compressed_keys(
                cache.key, cache.fine, cache.coarse, cache.starts, cache.lengths, cache.lengths - 1, 1, size=8,
                stride=4),
            "goes from",
        ),
        "row too long": (decode(lengths=cache.lengths + 30), "has room for"),
        "many queries": (decode(query=cache.query.expand(-1, 65, -1, -1)), "1 to 64"),
        "both": (decode(scores=cache.scores), "either blocks"),
        "neither": (decode(blocks=None), "either blocks"),
        "page": (
            decode(page_table=torch.full((2, 1), 7, dtype=torch.int32), starts=None),
            "names pages|has room|hold whole blocks",
        ),
        "large head to compress": (lambda: kernel.compress_keys(wide, packed.cu_q, 40), "head size 300"),
        "large head to update": (
            lambda: kernel.update_compressed_keys(
                *(torch.zeros(1, 1, n, 300) for n in (40, 4, 2)), *(packed.cu_q[:1],) * 3, 1
            ),
            "head size 300",
        ),
        "scores beyond the means": (
            lambda: kernel.block_scores(
                query, packed.fine, packed.coarse, packed.cu_q, packed.cu_k * 100, 40, 9300, block_size=16,
                **packed.windows,
            ),
            "fine holds 23 means",
        ),
        "scores, maximum too small": (
            lambda: kernel.block_scores(
                query, packed.fine, packed.coarse, packed.cu_q, packed.cu_k, 40, 64, block_size=16, **packed.windows
            ),
            "the maximum given is 64",
        ),
        "means of fewer rows": (
            lambda: kernel.block_scores_decode(
                cache.query, cache.fine, cache.coarse[:1], cache.lengths, 118, block_size=16, **cache.windows
            ),
            "1 of coarse",
        ),
        "negative start": (decode(starts=cache.starts - 1), "from slots"),
        "-1 before a block": (decode(blocks=cache.blocks.flip(2).contiguous()), "must rise"),
        "too few scores": (
            decode(blocks=None, scores=cache.scores[..., :2].contiguous(), **few),
            "scores of 2 blocks",
        ),
        "negative position": (decode(positions=cache.lengths[:, None] - 500), "positions holds"),
        "row shorter than its drafts": (
            decode(
                query=cache.query.expand(-1, 64, -1, -1), lengths=cache.lengths - 40, tree_mask=tree,
                blocks=cache.blocks.repeat_interleave(64, 1), positions=torch.ones(2, 64, dtype=torch.int32),
            ),
            "at least 64",
        ),
        "value shape in one call": (
            lambda: kernel.infllm_v2_attention(one, cache.key, cache.value[:, :, :50]), "key and value alike"
        ),
        "float64 in one call": (
            lambda: kernel.infllm_v2_attention(one.double(), cache.key.double(), cache.value.double()),
            "float64",
        ),
        "block of nothing": (
            lambda: kernel.infllm_v2_attention(one, cache.key, cache.value, block_size=0),
            "1 to 128",
        ),
        "topk 0": (lambda: kernel.infllm_v2_attention(one, cache.key, cache.value, topk=0), "at least their sum"),
        "tree": (decode(tree_mask=torch.ones(2, 1, dtype=torch.int32)), "contiguous int64"),
    }  # fmt: skip


REFUSALS = [
    "float64", "mixed dtypes", "dimensions", "value shape", "heads", "head size", "large head", "features apart",
    "cu_seqlens end", "cu_seqlens fall", "cu_seqlens dtype", "no rows", "more queries than keys", "maximum too small",
    "index too high", "index too low", "indices fall", "blocks shape", "block size", "windows", "stride", "selected",
    "position", "half scores", "overlapping output", "expanded output", "row grows backwards", "row too long",
    "many queries", "both", "neither", "page", "tree",
    "large head to compress",
    "large head to update",
    "scores beyond the means",
    "scores, maximum too small",
    "means of fewer rows",
    "negative start",
    "-1 before a block",
    "too few scores",
    "negative position",
    "row shorter than its drafts",
    "value shape in one call",
    "float64 in one call",
    "block of nothing",
    "topk 0",
]  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_refused_at_the_door(kernel, plain, name, monkeypatch):
    monkeypatch.setattr(kernel.ops, "implementation", lambda tensor: pytest.fail("reached a kernel"))
    cases = refusals(
        Packed(plain, SHAPES["group 8"], "cpu", lengths=((40,), (93,))),
        Cache(plain, SHAPES["group 8"], 1, "cpu"),
        kernel,
    )
    assert set(cases) == set(REFUSALS)
    call, message = cases[name]
    with pytest.raises(ValueError, match=f"infllm-v2: .*({message})"):
        call()


def test_no_queries_and_empty_rows(kernel, plain, device):
    packed = Packed(plain, SHAPES["group 8"], device, lengths=((0, 5, 0), (0, 40, 7)))
    output, lse = kernel.sparse_attention(
        packed.query, packed.key, packed.value, packed.blocks, *packed.args, block_size=16
    )
    close(
        output,
        attention_float64(packed, *(t.double() for t in (packed.query, packed.key, packed.value))),
        OUTPUT[torch.float32],
        "output",
    )
    nothing = Packed(plain, SHAPES["group 8"], device, lengths=((0,), (40,)))
    output, lse = kernel.sparse_attention(
        nothing.query, nothing.key, nothing.value, nothing.blocks, *nothing.args, block_size=16
    )
    assert output.shape == (0, 16, 64)
    assert lse.shape == (0, 16)


def test_no_rows(kernel, plain, device):
    none = torch.zeros(0, 4, 1, 16, device=device), *torch.zeros(2, 0, 2, 40, 16, device=device)
    output, blocks = kernel.infllm_v2_attention(*none, return_blocks=True)
    assert output.shape == (0, 4, 1, 16)
    assert blocks.shape == (0, 2, 1, 1)
    lengths, fine = torch.zeros(0, dtype=torch.int32, device=device), torch.zeros(0, 2, 3, 16, device=device)
    scores = kernel.block_scores_decode(none[0].transpose(1, 2), fine, fine, lengths, 40)
    assert scores.shape == (2, 0, 1)


def test_an_index_that_is_no_block_is_skipped_where_it_was_not_looked_at(kernel, plain, device, monkeypatch):
    """As for indices that lie on a GPU: neither read nor NaN, wherever in the list it stands."""
    monkeypatch.setattr(kernel.ops, "_looks_at_values", lambda tensor: False)
    cache = Cache(plain, SHAPES["group 8"], 1, device)
    args = (cache.query, cache.key, cache.value, cache.lengths)
    wild = torch.tensor([-1, 0, 2**30, 2, -7, 3], dtype=torch.int32, device=device).expand(2, 2, 6).contiguous()
    tame = torch.tensor([0, 2, 3], dtype=torch.int32, device=device).expand(2, 2, 3).contiguous()
    given = {"starts": cache.starts, "block_size": 16}
    close(
        kernel.sparse_attention_decode(*args, blocks=wild, **given),
        kernel.sparse_attention_decode(*args, blocks=tame, **given),
        OUTPUT[torch.float32],
        "decode",
    )
    packed = Packed(plain, SHAPES["group 8"], device, lengths=((2,), (93,)))
    got, want = (
        kernel.sparse_attention(packed.query, packed.key, packed.value, blocks, *packed.args, block_size=16)[0]
        for blocks in (wild, tame)
    )
    close(got, want, OUTPUT[torch.float32], "attention")


def test_bounds_are_read_once_a_tensor_and_again_when_it_changes(kernel, device, monkeypatch):
    reads = []
    read = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self) or read(self))
    key, cu = torch.zeros(40, 1, 16, device=device), bounds([40], device)
    reads.clear()
    for _ in range(3):
        kernel.compress_keys(key, cu, 40)
    assert len(reads) == 1
    cu[0] = 3
    with pytest.raises(ValueError, match="must rise from 0"):
        kernel.compress_keys(key, cu, 40)
