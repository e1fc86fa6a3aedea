"""
Every path of the packed linear layer against its definition, `x @ W.T` with the dense weight in float64.

Shape letters: `O` outputs, `I` inputs.
"""

import subprocess
import sys
import warnings

import pytest
import torch
from torch.nn.functional import linear

from transformers_minicpm4.quantization.bitcpm4 import ternary_cpu
from transformers_minicpm4.quantization.bitcpm4 import ternary_linear as module
from transformers_minicpm4.quantization.bitcpm4.ternary_linear import dequantize_ternary, ternary_linear
from transformers_minicpm4.quantization.bitcpm4.ternary_packing import pack_ternary, unpack_ternary


VARIANTS = {
    "native": ternary_cpu.VARIANTS,
    "avx2": (("-march=haswell", "-fopenmp"),),
    "portable": (("-march=x86-64", "-fopenmp"), ("-fopenmp",), ()),
    "plain": None,
}
# Relative RMS; measured at most 2.3e-7, 1.8e-3 and 2.2e-4: for 16 bits what rounding the result costs.
TOLERANCE = {torch.float32: 9e-7, torch.bfloat16: 7e-3, torch.float16: 8e-4}
# (O, I, group size): whole and broken vectors, groups the C++ code takes and does not, one group, one of everything.
SHAPES = [
    (1, 1, 1), (6, 5, 5), (5, 17, 17), (9, 200, 64), (33, 256, 48), (33, 264, 32), (11, 600, 16), (7, 136, 8),
    (13, 1000, 1000), (4, 4096, 128), (5, 1024, 512), (3, 90, 7),
]  # fmt: skip


@pytest.fixture(params=VARIANTS)
def path(request, monkeypatch):
    """Answer by one variant of the C++ code, or by plain PyTorch."""
    if request.param == "plain":
        monkeypatch.setattr(module, "kernels", lambda: None)
        return request.param
    if request.param == "avx2" and not torch.cpu.get_capabilities().get("avx2"):
        pytest.skip("this processor has no AVX2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = ternary_cpu.kernels(VARIANTS[request.param])
    if built is None:
        pytest.skip(f"no compiler builds the {request.param} kernel here")
    monkeypatch.setattr(module, "kernels", lambda: built)
    return request.param


def make_layer(outputs, inputs, group_size, dtype=torch.float16):
    """Packed codes, scales and the dense float64 weight."""
    codes = torch.randint(-1, 2, (outputs, inputs), dtype=torch.int8)
    scales = (torch.rand(outputs, -(-inputs // group_size)) + 0.1).to(dtype)
    spread = scales.double().repeat_interleave(group_size, 1)[:, :inputs]
    return pack_ternary(codes), scales, codes.double() * spread


def relative_rms(got, want):
    return ((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt()).item()


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("outputs, inputs, group_size", SHAPES)
def test_answers_are_the_dense_layer_s(path, outputs, inputs, group_size):
    for rows in (1, 2, 3, 7, module.DIRECT_ROWS + 1):
        for dtype, scale_dtype in ((torch.float32, torch.float16), (torch.bfloat16, torch.float32),
                                   (torch.float16, torch.float16)):  # fmt: skip
            packed, scales, weight = make_layer(outputs, inputs, group_size, scale_dtype)
            x, bias = torch.randn(rows, inputs).to(dtype), torch.randn(outputs) if rows > 1 else None
            out = ternary_linear(x, packed, scales, group_size, bias)
            assert out.dtype == dtype
            want = linear(x.double(), weight, None if bias is None else bias.double())
            error = relative_rms(out, want)
            # One product of one weight may round by a whole unit; relative to nothing else.
            assert error <= TOLERANCE[dtype] or torch.allclose(out.double(), want, rtol=torch.finfo(dtype).eps), (
                f"{rows} rows, {dtype}: relative RMS {error:.2e}"
            )


@pytest.mark.parametrize("outputs, inputs, group_size", SHAPES)
def test_dequantize_is_exact(path, outputs, inputs, group_size, monkeypatch):
    packed, scales, weight = make_layer(outputs, inputs, group_size)
    assert torch.equal(dequantize_ternary(packed, scales, group_size, inputs).double(), weight)
    monkeypatch.setattr(module, "BLOCK_WEIGHTS", 2 * inputs)
    assert torch.equal(dequantize_ternary(packed, scales, group_size, inputs).double(), weight)


def test_every_float16_scale_is_read_exactly(path):
    scales = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    scales = scales[scales.isfinite()][:, None]
    packed = pack_ternary(torch.ones(len(scales), 1, dtype=torch.int8))
    out = ternary_linear(torch.ones(1, 1), packed, scales, 1)
    assert torch.equal(out[0], scales[:, 0].float())
    assert torch.equal(dequantize_ternary(packed, scales, 1, 1), scales.float())


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_what_is_not_finite_shows_as_in_a_dense_layer(path, rows):
    packed, scales, _ = make_layer(9, 64, 32)
    weight = dequantize_ternary(packed, scales, 32, 64)
    x = torch.randn(rows, 64)
    x[0, 5], x[-1, 40] = torch.inf, torch.nan
    assert weight[:, 5].eq(0).any()  # the case in question: 0 * inf
    assert torch.equal(ternary_linear(x, packed, scales, 32).isnan(), linear(x, weight).isnan())


def test_a_row_s_answer_does_not_depend_on_threads_or_neighbours(path):
    if path == "plain":
        pytest.skip("PyTorch's own products may depend on both")
    packed, scales, _ = make_layer(130, 1024, 64)
    x = torch.randn(7, 1024)
    threads = torch.get_num_threads()
    answers = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            answers += [ternary_linear(x, packed, scales, 64) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    alone = torch.cat([ternary_linear(row[None], packed, scales, 64) for row in x])
    assert torch.equal(alone, answers[0])


@pytest.mark.parametrize("rows", [3, 40])
def test_strides_and_leading_dimensions(path, rows):
    packed, scales, weight = make_layer(10, 48, 16)
    x = torch.randn(48, 2, rows).permute(1, 2, 0)
    assert not x.is_contiguous()
    out = ternary_linear(x, packed, scales, 16)
    assert out.shape == (2, rows, 10)
    assert relative_rms(out, linear(x.double(), weight)) < TOLERANCE[torch.float32]
    strided = torch.stack([packed, packed], 2)[..., 0], torch.stack([scales, scales], 2)[..., 0]
    assert torch.equal(ternary_linear(x, *strided, 16), out)
    assert torch.equal(ternary_linear(x[0, 0], packed, scales, 16), ternary_linear(x[0, :1], packed, scales, 16)[0])


def test_nothing_in_nothing_out(path):
    packed, scales, _ = make_layer(10, 48, 16)
    assert ternary_linear(torch.randn(0, 48), packed, scales, 16).shape == (0, 10)
    assert ternary_linear(torch.randn(2, 0, 48), packed, scales, 16).shape == (2, 0, 10)
    assert ternary_linear(torch.randn(2, 48), packed[:0], scales[:0], 16).shape == (2, 0)


def test_no_rows_have_gradients_too(path):
    packed, scales, _ = make_layer(10, 48, 16)
    x = torch.randn(0, 48, requires_grad=True)
    ternary_linear(x, packed, scales, 16).sum().backward()
    assert x.grad.shape == (0, 48)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("blocks", [1 << 20, 300])
def test_gradients_are_the_dense_layer_s(path, rows, blocks, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_WEIGHTS", blocks)
    packed, scales, weight = make_layer(33, 130, 32)
    x, bias = torch.randn(2, rows, 130, requires_grad=True), torch.randn(33, requires_grad=True)
    exact_x, exact_bias = (tensor.detach().double().requires_grad_() for tensor in (x, bias))
    toward = torch.randn(2, rows, 33)
    ternary_linear(x, packed, scales, 32, bias).backward(toward)
    linear(exact_x, weight, exact_bias).backward(toward.double())
    assert relative_rms(x.grad, exact_x.grad) < TOLERANCE[torch.float32]
    assert relative_rms(bias.grad, exact_bias.grad) < TOLERANCE[torch.float32]


def test_gradients_keep_the_dtype_of_the_input(path):
    packed, scales, weight = make_layer(33, 128, 64)
    x = torch.randn(3, 128, dtype=torch.bfloat16, requires_grad=True)
    toward = torch.randn(3, 33).bfloat16()
    ternary_linear(x, packed, scales, 64).backward(toward)
    assert x.grad.dtype == torch.bfloat16
    assert relative_rms(x.grad, toward.double() @ weight) < TOLERANCE[torch.bfloat16]


def test_a_bias_alone_can_train(path):
    packed, scales, _ = make_layer(5, 32, 32)
    bias = torch.zeros(5, requires_grad=True)
    ternary_linear(torch.randn(4, 32), packed, scales, 32, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((5,), 4.0))


def test_a_low_rank_update_on_a_packed_layer_learns(path):
    packed, scales, _ = make_layer(16, 32, 32)
    first = torch.nn.Linear(32, 32)
    down, up = torch.nn.Linear(32, 4, bias=False), torch.nn.Linear(4, 16, bias=False)
    torch.nn.init.zeros_(up.weight)
    optimizer = torch.optim.Adam([*first.parameters(), *down.parameters(), *up.parameters()], lr=0.01)
    x, goal = torch.randn(64, 32), torch.randn(64, 16)
    losses = []
    for _ in range(60):
        hidden = first(x)
        loss = (ternary_linear(hidden, packed, scales, 32) + up(down(hidden)) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(path, mode):
    packed, scales, _ = make_layer(8, 64, 64)
    x = torch.randn(2, 64, requires_grad=True)
    with mode():
        out = ternary_linear(x, packed, scales, 64)
    assert not out.requires_grad
    assert torch.equal(out, ternary_linear(x, packed, scales, 64).detach())


@pytest.mark.parametrize("rows", [2, 40])
def test_autocast_is_what_it_is_to_a_linear_layer(path, rows):
    packed, scales, weight = make_layer(8, 64, 64)
    x = torch.randn(rows, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ternary_linear(x, packed, scales, 64)
    assert out.dtype == torch.bfloat16
    # Float32 inside: the answer is what the layer says of the rounded input outside of autocast, bit for bit.
    assert torch.equal(out, ternary_linear(x.bfloat16(), packed, scales, 64))
    out.sum().backward()
    assert x.grad.dtype == torch.float32


def test_a_compiled_graph_gives_the_same_answers():
    packed, scales, weight = make_layer(8, 64, 16)
    compiled = torch.compile(ternary_linear, backend="eager", fullgraph=True)
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert relative_rms(compiled(x, packed, scales, 16), linear(x.double(), weight)) < TOLERANCE[torch.float32]


# -------------------------------------------------------------------------------------------------------------- memory


def test_prefill_never_holds_the_dense_weight(path):
    """Peak of memory in a process of its own: the dense weight would be 128 MiB, scratch may be 16."""
    program = f"""
import resource, torch
torch.set_num_threads(1)
from transformers_minicpm4.quantization.bitcpm4 import ternary_linear as module
if {path == "plain"}:
    module.kernels = lambda: None
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
packed = torch.zeros(8192, 1024, dtype=torch.uint8)
scales = torch.ones(8192, 64, dtype=torch.float16)
x = torch.ones(64, 4096)
module.ternary_linear(x, packed[:512], scales[:512], 64)
before = peak()
module.ternary_linear(x, packed, scales, 64)
print(peak() - before)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert float(said) < 24  # MiB; the output takes 2


# ----------------------------------------------------------------------------------------------------------- the doors


LAYER = {
    "x": torch.zeros(2, 20),
    "packed": torch.zeros(3, 6, dtype=torch.uint8),
    "scales": torch.ones(3, 2, dtype=torch.float16),
    "group_size": 16,
}


@pytest.mark.parametrize(
    "changes, error, said",
    [
        ({"x": torch.zeros(2, 20, dtype=torch.float64)}, TypeError, "float16 inputs; got torch.float64"),
        ({"x": torch.tensor(1.0)}, ValueError, "got a scalar"),
        ({"x": torch.zeros(2, 25)}, ValueError, r"25 inputs have shape \[outputs, 8\]; got \[3, 6\]"),
        ({"packed": torch.zeros(3, 6)}, TypeError, "uint8; got torch.float32"),
        ({"scales": torch.ones(3, 2).bfloat16()}, TypeError, "float16 or float32; got torch.bfloat16"),
        ({"scales": torch.ones(3, 1)}, ValueError, r"groups of 16 have scales of shape \[3, 2\]; got \[3, 1\]"),
        ({"scales": torch.ones(2, 2)}, ValueError, r"of shape \[3, 2\]; got \[2, 2\]"),
        ({"group_size": 0}, ValueError, "at least 1; got 0"),
        ({"group_size": -1}, ValueError, "give in_features, 20"),
        ({"group_size": 16.0}, ValueError, "got 16.0"),
        ({"bias": torch.zeros(4)}, ValueError, r"shape \[3\], one for each output; got torch.float32 \[4\]"),
        ({"bias": torch.zeros(3, dtype=torch.int32)}, ValueError, "floating.*got torch.int32"),
        ({"bias": torch.zeros(3, device="meta")}, ValueError, "one device; got cpu, meta"),
    ],
)
def test_bad_input_is_named(changes, error, said):
    ternary_linear(**LAYER)
    with pytest.raises(error, match=said):
        ternary_linear(**{**LAYER, **changes})


def test_shapes_travel_through_the_meta_device():
    out = ternary_linear(**{**LAYER, **{name: LAYER[name].to("meta") for name in ("x", "packed", "scales")}})
    assert out.shape == (2, 3)
    assert out.device.type == "meta"


# ------------------------------------------------------------------------------------------------------------ building


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder and nothing built yet in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ternary_cpu.kernels.cache_clear()
    yield tmp_path
    ternary_cpu.kernels.cache_clear()


def test_without_a_compiler_one_warning_and_the_same_answer(fresh, monkeypatch):
    packed, scales, weight = make_layer(8, 64, 16)
    x = torch.randn(3, 64)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="CXX names no-such-compiler.*MINICPM4_CPU_KERNEL=0 silences") as said:
        both = [ternary_linear(x, packed, scales, 16) for _ in range(2)]
    assert len(said) == 1
    assert relative_rms(both[0], linear(x.double(), weight)) < TOLERANCE[torch.float32]


def test_the_variable_turns_the_kernel_off_without_a_word(fresh, monkeypatch):
    monkeypatch.setenv("MINICPM4_CPU_KERNEL", "0")
    assert ternary_cpu.kernels() is None
    assert not any(fresh.iterdir())


def test_a_failing_compiler_is_quoted(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.warns(UserWarning, match="the compiler false"):
        assert ternary_cpu.kernels() is None


def test_a_damaged_library_is_built_again(fresh):
    library = ternary_cpu._library(ternary_cpu.VARIANTS)
    whole = library.stat().st_size
    library.write_bytes(b"not a library")
    assert ternary_cpu.kernels() is not None
    assert [(file.name, file.stat().st_size) for file in library.parent.iterdir()] == [(library.name, whole)]


def test_a_library_cut_short_is_built_again(fresh):
    """Loading it would kill the process, so it must not come to that."""
    library = ternary_cpu._library(ternary_cpu.VARIANTS)
    whole = library.stat().st_size
    library.write_bytes(library.read_bytes()[:6000])
    assert ternary_cpu.kernels() is not None
    assert library.stat().st_size == whole


def test_a_folder_that_anybody_can_write_to_is_not_trusted(fresh):
    ternary_cpu._library(ternary_cpu.VARIANTS).parent.chmod(0o777)
    with pytest.warns(UserWarning, match="anybody can write to it"):
        assert ternary_cpu.kernels() is None


def test_a_compiler_named_in_no_shell_s_words_is_no_crash(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "g++ 'x")
    with pytest.warns(UserWarning, match="No closing quotation"):
        assert ternary_cpu.kernels() is None


def test_reading_codes_back_gives_the_weight():
    packed, scales, weight = make_layer(5, 40, 40)
    assert torch.equal(unpack_ternary(packed, 40) * scales.double(), weight)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("group_size", [16, 64])
@pytest.mark.parametrize("rows", [2, 40])
def test_a_traced_layer_answers_for_other_inputs(path, rows, group_size):
    """What the kernels write into memory the trace would take for a constant."""
    packed, scales, weight = make_layer(32, 64, group_size)

    def layer(x):
        return ternary_linear(x, packed, scales, group_size)

    traced = torch.jit.trace(layer, torch.randn(rows, 64))
    x = torch.randn(rows, 64)
    assert relative_rms(traced(x), linear(x.double(), weight)) <= TOLERANCE[torch.float32]
