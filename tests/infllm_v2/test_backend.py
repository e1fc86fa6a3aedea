"""The door: rows of a batch, where dense ends, tensors of use_nope and of the cache, bad input, who answers."""

import builtins
import logging
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from test_reference import tensors
from transformers.utils.logging import warning_once

from tolerances import assert_close
from transformers_minicpm4 import MiniCPM4Config
from transformers_minicpm4.infllm_v2 import InfLLMv2Config, backend, infllm_v2_attention, kernel
from transformers_minicpm4.infllm_v2.reference import compress_keys


IMPLEMENTATIONS = ["reference", "blockwise"]
CONFIG = InfLLMv2Config(kernel_size=8, kernel_stride=4, block_size=8, window_size=16, topk=3, dense_len=-1)


@pytest.fixture(autouse=True)
def nobody_named_a_kernel(monkeypatch):
    for name in ("INFLLM_V2_KERNEL", "INFLLM_V2_IMPLEMENTATION", "LOCAL_KERNELS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [97, 30, 1])
def test_padded_rows_are_as_if_alone(implementation, length):
    query, key, value = tensors(4, 2, length, 97, batch=3)
    mask = torch.ones(3, 97)
    mask[0, :13] = 0
    mask[2, :81] = 0
    output, blocks = infllm_v2_attention(
        query, key, value, CONFIG, attention_mask=mask, implementation=implementation, return_blocks=True
    )
    for row, start in enumerate((13, 0, 81)):
        padding = max(start - (97 - length), 0)
        alone, read = infllm_v2_attention(
            query[row : row + 1, :, padding:],
            key[row : row + 1, :, start:],
            value[row : row + 1, :, start:],
            CONFIG,
            implementation=implementation,
            return_blocks=True,
        )
        assert_close(output[row : row + 1, :, padding:], alone, "attention_float64", f"row {row}")
        assert torch.equal(blocks[row : row + 1, :, padding:, : read.shape[-1]], read)
        assert not output[row, :, :padding].any()
        assert not blocks[row, :, :padding].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_right_padding_is_never_read(implementation):
    query, key, value = tensors(4, 2, 90, 90)
    mask = torch.ones(1, 90)
    mask[:, 70:] = 0
    output = infllm_v2_attention(query, key, value, CONFIG, attention_mask=mask, implementation=implementation)
    alone = infllm_v2_attention(
        query[:, :, :70], key[:, :, :70], value[:, :, :70], CONFIG, implementation=implementation
    )
    assert_close(output[:, :, :70], alone, "attention_float64", "output")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dense_len", [-1, 0, 61, 150])
def test_the_answer_does_not_depend_on_the_cut(implementation, dense_len):
    config = InfLLMv2Config(**{**CONFIG.to_dict(), "dense_len": dense_len})
    query, key, value = tensors(4, 2, 170, 170)
    whole, read = infllm_v2_attention(query, key, value, config, implementation=implementation, return_blocks=True)
    for cuts in ([0, 1, 59, 60, 61, 62, 170], [0, 149, 150, 151, 170], list(range(0, 171, 17))):
        for begin, end in zip(cuts[:-1], cuts[1:]):
            part, blocks = infllm_v2_attention(
                query[:, :, begin:end],
                key[:, :, :end],
                value[:, :, :end],
                config,
                implementation=implementation,
                return_blocks=True,
            )
            assert_close(part, whole[:, :, begin:end], "attention_float64", f"queries {begin} to {end}")
            assert torch.equal(blocks, read[:, :, begin:end, : blocks.shape[-1]])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dense_until_dense_len_by_position_or_by_call(implementation):
    query, key, value = tensors(4, 2, 120, 120)
    covered = CONFIG.selected_blocks * CONFIG.block_size  # 40 tokens
    fields = {**CONFIG.to_dict(), "dense_len": 100}

    def blocks(switch, total):
        config = InfLLMv2Config(**{**fields, "dense_switch": switch})
        _, read = infllm_v2_attention(
            query[:, :, :total],
            key[:, :, :total],
            value[:, :, :total],
            config,
            implementation=implementation,
            return_blocks=True,
        )
        return read.sum(-1)

    everything = (torch.arange(120) // 8 + 1).expand(1, 2, -1)
    assert torch.equal(blocks("call", 99), everything[..., :99])  # the released rule: this call is dense
    sparse = blocks("call", 100)  # ... and this one is not, for any of its queries
    assert torch.equal(sparse, everything[..., :100].clamp_max(CONFIG.selected_blocks))
    by_position = blocks("position", 120)
    assert torch.equal(by_position[..., :99], everything[..., :99])
    assert (by_position[..., 99:] == CONFIG.selected_blocks).all()
    differ = (blocks("call", 120) != by_position).any(1).any(0)
    assert differ.nonzero().min() >= covered
    assert differ.nonzero().max() < 99


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_call_switch_goes_by_the_longest_row(implementation):
    config = InfLLMv2Config(**{**CONFIG.to_dict(), "dense_len": 90, "dense_switch": "call"})
    query, key, value = tensors(4, 2, 97, 97, batch=2)
    mask = torch.ones(2, 97)
    mask[1, :40] = 0  # 57 tokens: short, but its neighbour is long
    _, blocks = infllm_v2_attention(
        query, key, value, config, attention_mask=mask, implementation=implementation, return_blocks=True
    )
    assert blocks[1, 0, -1].sum() == config.selected_blocks
    mask[0, :10] = 0  # now the longest row has 87
    _, blocks = infllm_v2_attention(
        query, key, value, config, attention_mask=mask, implementation=implementation, return_blocks=True
    )
    assert blocks[1, 0, -1].sum() == 8


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compressed_keys_may_come_from_outside(implementation):
    query, key, value = tensors(4, 2, 20, 130)
    compressed = tuple(compress_keys(key, *CONFIG.windows(coarse)) for coarse in (False, True))
    spare = tuple(torch.cat([keys, torch.full_like(keys[:, :, :3], torch.nan)], 2) for keys in compressed)
    own = infllm_v2_attention(query, key, value, CONFIG, implementation=implementation)
    for given in (compressed, spare):  # spare entries are never looked at
        output = infllm_v2_attention(query, key, value, CONFIG, compressed_keys=given, implementation=implementation)
        assert torch.equal(output, own)
    with pytest.raises(ValueError, match="compressed_keys has 30 entries"):
        infllm_v2_attention(query, key, value, CONFIG, compressed_keys=(compressed[0][:, :, :30], compressed[1]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_use_nope_selects_with_the_unrotated_tensors(implementation):
    config = InfLLMv2Config(**{**CONFIG.to_dict(), "use_nope": True})
    query, key, value = tensors(4, 2, 60, 110)
    other_query, other_key, _ = (tensor.flip(-1) * 1.5 for tensor in tensors(4, 2, 60, 110))
    output, blocks = infllm_v2_attention(
        query,
        key,
        value,
        config,
        selection_query=other_query,
        selection_key=other_key,
        implementation=implementation,
        return_blocks=True,
    )
    _, wanted = infllm_v2_attention(other_query, other_key, value, CONFIG, return_blocks=True)
    assert torch.equal(blocks, wanted)
    # Attention itself is over the rotated tensors: softmax over the tokens of those blocks, computed directly.
    tokens, positions = torch.arange(110), torch.arange(50, 110)
    allowed = wanted[..., tokens // 8] & (tokens <= positions[:, None])
    logits = (query @ key.repeat_interleave(2, 1).mT * 16**-0.5).masked_fill(
        ~allowed.repeat_interleave(2, 1), -torch.inf
    )
    assert_close(output, logits.softmax(-1) @ value.repeat_interleave(2, 1), "attention_float64", "output")


def refusals():
    query, key, value = tensors(4, 2, 10, 30)
    ones = torch.ones(1, 30)
    holes = ones.clone()
    holes[:, 12] = 0
    nope = InfLLMv2Config(use_nope=True)
    yield (query[:, :3], key, value, CONFIG), {}, ValueError, "3 query heads do not divide among 2"
    yield (query, key, value[:, :, 1:], CONFIG), {}, ValueError, "must have one shape"
    yield (query, key[:, :, :9], value[:, :, :9], CONFIG), {}, ValueError, "10 queries for 9 keys"
    yield (query[0], key, value, CONFIG), {}, ValueError, "query must be .batch, heads, tokens, head size"
    yield (query[..., :8], key, value, CONFIG), {}, ValueError, "differ in batch or head size"
    yield (query, key, value, CONFIG.to_dict()), {}, TypeError, "InfLLMv2Config.from_dict"
    yield (query, key, value, CONFIG), {"attention_mask": ones[:, 1:]}, ValueError, r"\[1, 30\]"
    yield (query, key, value, CONFIG), {"attention_mask": ones[None, None]}, ValueError, "four-dimensional"
    yield (query, key, value, CONFIG), {"attention_mask": holes}, ValueError, "row 0 has zeros between its ones"
    yield (query, key, value, CONFIG), {"implementation": "cuda"}, ValueError, "'reference', 'blockwise'"
    yield (query, key, value, CONFIG), {"implementation": "kernel"}, ValueError, "use 'auto' or 'blockwise'"
    yield (query, key, value, nope), {}, ValueError, "pass selection_query"
    yield (
        (query, key, value, nope),
        {"selection_query": query[:, :, 1:], "selection_key": key},
        ValueError,
        "shape of query",
    )


@pytest.mark.parametrize("args, kwargs, error, words", list(refusals()))
def test_bad_input_is_refused_in_one_sentence(args, kwargs, error, words):
    with pytest.raises(error, match=words):
        infllm_v2_attention(*args, **kwargs)


def changed(**fields):
    return InfLLMv2Config(**{**CONFIG.to_dict(), **fields})


def floats(*args, **kwargs):
    return tuple(tensor.float() for tensor in tensors(*args, **kwargs))


@pytest.fixture
def said(caplog, monkeypatch):
    """Warnings so far, as a list; what was said before the test is forgotten."""
    warning_once.cache_clear()
    for name in ("transformers_minicpm4", "transformers"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    yield lambda: [record.message for record in caplog.records if "InfLLM v2 runs" in record.message]
    warning_once.cache_clear()


@pytest.fixture
def fake_hub(monkeypatch):
    """
    A `kernels` library whose kernels answer 7 everywhere, but for `org/none` and `org/bad`, which fail to load; its
    `requests` are what was asked of it, its `calls` what the kernels were given.
    """
    fake = ModuleType("kernels")
    fake.requests, fake.calls = [], []

    def attend(query, key, value, **options):
        fake.calls.append(options)
        return torch.full_like(query, 7)

    def get(name, **options):
        fake.requests.append((str(name), options))
        if name in ("org/none", "org/bad"):
            return ModuleType("no_attention_in_it") if name == "org/none" else 1 / 0
        return SimpleNamespace(infllm_v2_attention=attend)

    fake.get_kernel = fake.get_local_kernel = get
    monkeypatch.setitem(sys.modules, "kernels", fake)
    kernel.load.__wrapped__.cache_clear()
    yield fake
    kernel.load.__wrapped__.cache_clear()


class TestWhoAnswers:
    """Argument before environment before config; a fake kernel answers 7."""

    @pytest.fixture
    def answer(self, fake_hub):
        query, key, value = floats(4, 2, 10, 60)

        def who(config=CONFIG, implementation="auto"):
            output = infllm_v2_attention(query, key, value, config, implementation=implementation)
            if (output == 7).all():
                return "kernel"
            for name in ("reference", "blockwise"):
                if torch.equal(output, infllm_v2_attention(query, key, value, CONFIG, implementation=name)):
                    return name
            return None

        return who

    @pytest.mark.parametrize("argument", ["auto", "kernel", "blockwise", "reference"])
    @pytest.mark.parametrize("environment", [None, "", "auto", "kernel", "blockwise", "reference"])
    @pytest.mark.parametrize("config", ["auto", "kernel", "blockwise", "reference"])
    def test_precedence(self, answer, monkeypatch, argument, environment, config):
        monkeypatch.setenv("INFLLM_V2_KERNEL", "org/good")
        if environment is not None:
            monkeypatch.setenv("INFLLM_V2_IMPLEMENTATION", environment)
        wanted = argument if argument != "auto" else environment or config
        assert answer(changed(implementation=config), argument) == wanted.replace("auto", "kernel")

    def test_no_kernel_named_is_blockwise_without_a_word(self, answer, fake_hub, said):
        assert answer() == "blockwise"
        assert said() == []
        assert fake_hub.requests == []

    def test_the_environment_names_before_the_config(self, answer, fake_hub, monkeypatch):
        monkeypatch.setenv("INFLLM_V2_KERNEL", "org/good@v3")
        assert answer(changed(kernel="org/other")) == "kernel"
        assert [name for name, _ in fake_hub.requests] == ["org/good"]
        monkeypatch.setenv("INFLLM_V2_KERNEL", "")
        assert answer(changed(kernel="org/other")) == "kernel"
        assert [name for name, _ in fake_hub.requests] == ["org/good", "org/other"]

    def test_it_gets_the_rule_and_all_rows_at_once(self, fake_hub, monkeypatch):
        monkeypatch.setenv("INFLLM_V2_KERNEL", "org/good")
        mask = torch.ones(2, 60)
        mask[1, :20] = 0
        infllm_v2_attention(*floats(4, 2, 10, 60, batch=2), CONFIG, attention_mask=mask, scaling=0.5)
        (options,) = fake_hub.calls
        assert {name: options[name] for name in kernel.RULE} == {n: getattr(CONFIG, n) for n in kernel.RULE}
        assert (options["starts"], options["longest"], options["scaling"]) == ([0, 20], 60, 0.5)
        assert options["compressed_keys"] is None
        assert options["return_blocks"] is False

    def test_unknown_name_in_the_environment(self, answer, monkeypatch):
        monkeypatch.setenv("INFLLM_V2_IMPLEMENTATION", "cuda")
        with pytest.raises(ValueError, match="'auto', got 'cuda'.*INFLLM_V2_IMPLEMENTATION"):
            answer()


class TestLoading:
    @pytest.mark.parametrize(
        "name, which",
        [
            ("org/good", {"version": 1}),
            ("org/good@v2", {"version": 2}),
            ("org/good@main", {"revision": "main"}),
            ("org/good@refs/pr/3", {"revision": "refs/pr/3"}),
        ],
    )
    def test_names_of_repositories_and_trust(self, fake_hub, name, which):
        """The user's word in the environment is consent to this one repository; a config's is not."""
        for by_user, trust in ((True, ["org/good"]), (False, False)):
            attend, reason = kernel.load(name, by_user=by_user)
            assert reason is None
            options = {"backend": "cpu", "trust_remote_code": trust, **which}
            assert fake_hub.requests[-1] == ("org/good", options)
            assert attend(*floats(4, 2, 1, 9)).max() == 7

    def test_a_folder_only_by_the_user(self, fake_hub, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "org" / "good" / "build").mkdir(parents=True)
        kernel.load("./org/good", by_user=True)
        assert fake_hub.requests[-1] == (str((tmp_path / "org" / "good").resolve()), {"backend": "cpu"})
        kernel.load("org/good", by_user=False)
        assert fake_hub.requests[-1][0] == "org/good"

    def test_once_a_process_and_failures_too(self, fake_hub, said, monkeypatch):
        inputs = floats(4, 2, 10, 60)
        for name in ("org/good", "org/bad"):
            monkeypatch.setenv("INFLLM_V2_KERNEL", name)
            for _ in range(3):
                infllm_v2_attention(*inputs, CONFIG)
        assert [name for name, _ in fake_hub.requests] == ["org/good", "org/bad"]
        assert len(said()) == 1
        assert "'org/bad' could not be loaded (ZeroDivisionError: division by zero)" in said()[0]

    @pytest.mark.parametrize(
        "name, words",
        [
            ("somewhere", "neither owner/repo or owner/repo@revision nor a folder"),
            ("./a/b/c", "no such folder"),
            ("org/none", "no attribute 'infllm_v2_attention'"),
        ],
    )
    def test_what_is_wrong_is_said(self, fake_hub, monkeypatch, name, words):
        monkeypatch.setenv("INFLLM_V2_KERNEL", name)
        with pytest.raises(ValueError, match=f"implementation='kernel' cannot run: the kernel '{name}'.*{words}"):
            infllm_v2_attention(*floats(4, 2, 10, 60), CONFIG, implementation="kernel")

    def test_a_name_of_the_config_that_fails_says_how_to_trust_it(self, fake_hub, said):
        infllm_v2_attention(*floats(4, 2, 10, 60), changed(kernel="org/bad"))
        assert "if you trust it, name it yourself: INFLLM_V2_KERNEL" in said()[0]

    def test_without_the_kernels_package(self, fake_hub, said, monkeypatch):
        original = builtins.__import__

        def refuse(name, *args, **kwargs):
            if name == "kernels":
                raise ModuleNotFoundError("No module named 'kernels'")
            return original(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", refuse)
        monkeypatch.setenv("INFLLM_V2_KERNEL", "org/good")
        infllm_v2_attention(*floats(4, 2, 10, 60), CONFIG)
        assert "No module named 'kernels'" in said()[0]

    def test_offline_and_not_in_the_cache(self, said, monkeypatch, tmp_path):
        """The real library: nothing is downloaded, nothing is raised, one sentence."""
        kernel.load.__wrapped__.cache_clear()
        monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
        monkeypatch.setenv("INFLLM_V2_KERNEL", "test-org/not-there")
        for _ in range(2):
            infllm_v2_attention(*floats(4, 2, 10, 60), CONFIG)
        assert len(said()) == 1
        assert "is not available in the local cache" in said()[0]
        kernel.load.__wrapped__.cache_clear()


def tensor_like(device="cpu", dtype=torch.float32, shape=(1, 4, 8, 16)):
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=shape)


class TestWhereTheKernelCannotRun:
    @pytest.mark.parametrize(
        "query, config, words",
        [
            (
                tensor_like(dtype=torch.float64),
                CONFIG,
                "takes float32, bfloat16 or float16, .* are float32, float64",
            ),
            (tensor_like(device="mps"), CONFIG, "runs on cuda .NVIDIA and ROCm. and cpu, the tensors are on mps"),
            (tensor_like(device="xpu"), CONFIG, "the tensors are on xpu"),
            (tensor_like(shape=(1, 4, 8, 512)), CONFIG, "head sizes up to 256, not 512"),
            (tensor_like(shape=(1, 128, 8, 16)), CONFIG, "query heads a key/value head up to 32, not 64"),
            (tensor_like(), changed(block_size=256), "block_size up to 128, not 256"),
        ],
    )
    def test_the_reason(self, query, config, words):
        key = tensor_like(shape=(1, 2, 8, query.shape[-1]))
        assert re.search(words, kernel.refusal(query, key, key, config))

    def test_a_gpu_without_triton(self, monkeypatch):
        tensor = tensor_like(device="cuda")
        monkeypatch.setattr(kernel, "_lacks_triton", lambda: None)
        assert kernel.refusal(tensor, tensor, tensor, CONFIG) is None
        monkeypatch.setattr(kernel, "_lacks_triton", lambda: "which is not installed")
        assert "needs triton 3.3 or newer, which is not installed" in kernel.refusal(tensor, tensor, tensor, CONFIG)

    def test_auto_falls_back_with_one_warning_and_kernel_is_an_error(self, fake_hub, said, monkeypatch):
        monkeypatch.setenv("INFLLM_V2_KERNEL", "org/good")
        inputs = tensors(4, 2, 10, 60)  # float64
        for _ in range(3):
            output = infllm_v2_attention(*inputs, CONFIG)
        assert torch.equal(output, infllm_v2_attention(*inputs, CONFIG, implementation="blockwise"))
        assert len(said()) == 1
        assert "the tensors are float64" in said()[0]
        with pytest.raises(ValueError, match="cannot run: .* are float64; use 'auto' or 'blockwise'"):
            infllm_v2_attention(*inputs, CONFIG, implementation="kernel")

    def test_gradients_on_a_cpu(self, fake_hub, said, monkeypatch):
        monkeypatch.setenv("INFLLM_V2_KERNEL", "org/good")
        query, key, value = floats(4, 2, 10, 60)
        value.requires_grad_()
        with torch.no_grad():
            assert (infllm_v2_attention(query, key, value, CONFIG) == 7).all()
        assert said() == []
        assert infllm_v2_attention(query, key, value, CONFIG).requires_grad
        assert len(said()) == 1
        assert "backward pass" in said()[0]
        forced = infllm_v2_attention(query, key, value, CONFIG, implementation="kernel")
        assert (forced == 7).all()

    @pytest.mark.parametrize("compiled", [True, False])
    def test_a_cpu_without_a_compiler(self, fake_hub, said, monkeypatch, compiled):
        """The kernel's plain form is right and slow: nobody gets it without asking for it by name."""
        package = ModuleType("_infllm_v2_fake")
        package.is_compiled = lambda tensor: compiled
        monkeypatch.setitem(sys.modules, "_infllm_v2_fake", package)
        attend = kernel.load("org/good", by_user=True)[0]
        monkeypatch.setattr(attend, "__module__", "_infllm_v2_fake.attention")
        monkeypatch.setenv("INFLLM_V2_KERNEL", "org/good")
        inputs = floats(4, 2, 10, 60)
        assert (infllm_v2_attention(*inputs, CONFIG) == 7).all() == compiled
        assert ["no C++ compiler" in words for words in said()] == [True] * (not compiled)
        assert (infllm_v2_attention(*inputs, CONFIG, implementation="kernel") == 7).all()


class TestConfigFields:
    def test_written_only_where_set(self, tmp_path):
        assert not {"implementation", "kernel"} & set(CONFIG.to_dict())
        fields = {"implementation": "blockwise", "kernel": "org/good@v2"}
        assert fields.items() <= changed(**fields).to_dict().items()
        MiniCPM4Config(sparse_config=changed(**fields)).save_pretrained(tmp_path)
        assert MiniCPM4Config.from_pretrained(tmp_path).infllm_v2 == changed(**fields)

    @pytest.mark.parametrize(
        "name", ["/home/me/kernel", "../kernel", "./owner/kernel", "~/kernel", "kernel", "a/b/c", ""]
    )
    def test_a_folder_cannot_come_with_a_checkpoint(self, name):
        with pytest.raises(ValueError, match="kernel must name a Hub repository.*INFLLM_V2_KERNEL"):
            changed(kernel=name)

    def test_what_they_may_say(self):
        with pytest.raises(ValueError, match="implementation must be one of auto, kernel, blockwise, reference"):
            changed(implementation="triton")
        with pytest.raises(TypeError, match="kernel must be str | None"):
            changed(kernel=3)
        with pytest.raises(TypeError, match="implementation must be str"):
            changed(implementation=None)


def test_a_mistyped_folder_is_not_taken_for_a_repository(tmp_path, monkeypatch):
    (tmp_path / "hub_kernels").mkdir()
    monkeypatch.chdir(tmp_path)
    kernel.load.__wrapped__.cache_clear()
    attend, reason = kernel.load("hub_kernels/infllm-v2", by_user=True)
    assert attend is None
    assert "a folder hub_kernels/ is here; ./hub_kernels/infllm-v2 names one in it" in reason
    attend, reason = kernel.load("./hub_kernels", by_user=True)
    assert attend is None
    assert "it holds no build/, run `make kernels`" in reason


def test_a_mask_is_looked_at_once_and_again_when_it_changes(monkeypatch):
    looks = []
    read = backend._read_rows
    monkeypatch.setattr(backend, "_read_rows", lambda mask: looks.append(mask) or read(mask))
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert backend.row_starts(mask) == backend.row_starts(mask) == ([1, 0], 3)
    assert len(looks) == 1
    mask[1, 0] = 0
    assert backend.row_starts(mask) == ([1, 1], 2)
