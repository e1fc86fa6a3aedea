"""The package and Transformers with the kernel: the same answers as without it, whichever way it was asked for."""

import kernels
import pytest
import torch
from transformers import AutoModelForCausalLM, KernelConfig, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from tolerances import relative_rms, within
from transformers_minicpm4 import InfLLMv2Config
from transformers_minicpm4.infllm_v2 import infllm_v2_attention
from transformers_minicpm4.infllm_v2.cache import InfLLMv2CacheLayer
from transformers_minicpm4.infllm_v2.kernel import kernelized

from .conftest import REPO


CONFIG = InfLLMv2Config(kernel_size=8, kernel_stride=4, block_size=8, window_size=16, topk=3, dense_len=-1)
NEW = 12


def changed(**fields):
    return InfLLMv2Config(**{**CONFIG.to_dict(), **fields})


def tensors(queries, total, batch=1, heads=4, groups=2, size=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(queries + total)
    shapes = ((batch, heads, queries, size), (batch, groups, total, size), (batch, groups, total, size))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def assert_kernel_equals_reference(arguments, name="attention_float32", **options):
    got, read = infllm_v2_attention(*arguments, implementation="kernel", return_blocks=True, **options)
    want, chosen = infllm_v2_attention(*arguments, implementation="reference", return_blocks=True, **options)
    assert torch.equal(read, chosen)
    assert got.dtype == want.dtype
    error = relative_rms(got, want)
    assert within(error, name), f"output: off by {error:.2e}"
    alone = infllm_v2_attention(*arguments, implementation="kernel", **options)
    assert torch.equal(alone, got), "asking for the blocks changes the output"


class TestThroughTheDoor:
    """`infllm_v2_attention` with the kernel against the definition."""

    pytestmark = pytest.mark.usefixtures("named")

    @pytest.mark.parametrize("queries", [97, 30, 1])
    @pytest.mark.parametrize("dense_len", [-1, 61])
    def test_padded_rows(self, queries, dense_len):
        mask = torch.ones(3, 97)
        mask[0, :13] = 0
        mask[2, :81] = 0
        config = changed(dense_len=dense_len)
        assert_kernel_equals_reference((*tensors(queries, 97, batch=3), config), attention_mask=mask)

    def test_right_padding(self):
        mask = torch.ones(2, 90)
        mask[1, 60:] = 0
        arguments = (*tensors(90, 90, batch=2), CONFIG)
        assert_kernel_equals_reference(arguments, attention_mask=mask)

    @pytest.mark.parametrize("heads, groups", [(4, 4), (16, 2), (32, 1)])
    def test_groups(self, heads, groups):
        for queries in (40, 2):
            assert_kernel_equals_reference((*tensors(queries, 90, heads=heads, groups=groups), CONFIG))

    def test_bfloat16(self):
        for queries in (90, 1):
            arguments = (*tensors(queries, 90, dtype=torch.bfloat16), CONFIG)
            assert_kernel_equals_reference(arguments, "attention_bfloat16")

    @pytest.mark.parametrize("longest", [99, 100])
    def test_dense_by_call(self, longest):
        mask = torch.ones(2, 100)
        mask[1, :40] = 0
        mask[0, : 100 - longest] = 0
        config = changed(dense_len=100, dense_switch="call")
        assert_kernel_equals_reference((*tensors(100, 100, batch=2), config), attention_mask=mask)

    def test_use_nope_selects_with_the_unrotated_tensors(self):
        arguments = (*tensors(60, 110), changed(use_nope=True))
        query, key, _ = (tensor.flip(-1) * 1.5 for tensor in tensors(60, 110))
        assert_kernel_equals_reference(arguments, selection_query=query, selection_key=key)

    def test_compressed_keys_of_the_cache(self):
        """Views of buffers with room to spare, rows of different length, grown in chunks."""
        query, key, value = tensors(100, 100, batch=2)
        starts = [0, 37]
        mask = torch.ones(2, 100)
        mask[1, :37] = 0
        layer = InfLLMv2CacheLayer(CONFIG)
        for begin, end in ((0, 50), (50, 51), (51, 99), (99, 100)):
            keys, values = layer.update(key[:, :, begin:end], value[:, :, begin:end], row_starts=starts)
            assert_kernel_equals_reference(
                (query[:, :, begin:end], keys, values, CONFIG),
                attention_mask=mask[:, :end],
                compressed_keys=layer.compressed_keys,
            )

    def test_compressed_keys_that_lack_some(self):
        with pytest.raises(ValueError, match="compressed_keys has 1 entries"):
            infllm_v2_attention(*tensors(1, 90), CONFIG, compressed_keys=(torch.zeros(1, 2, 1, 16),) * 2)

    def test_features_far_apart_are_copied(self):
        query, key, value = (tensor.mT.contiguous().mT for tensor in tensors(20, 90))
        assert query.stride(-1) != 1
        assert_kernel_equals_reference((query, key, value, CONFIG))


class TestModel:
    """MiniCPM4 in float32, with `INFLLM_V2_IMPLEMENTATION=kernel`: whatever the kernel does not do is an error."""

    @pytest.fixture
    def model(self, tiny_model, sparse_config):
        model = tiny_model(sparse_config=sparse_config).float()
        model.generation_config.eos_token_id = None
        return model

    @pytest.fixture
    def rows(self):
        ids = torch.randint(1, 120, (2, 90))
        mask = torch.ones_like(ids)
        mask[0, :33] = 0
        return {"input_ids": ids, "attention_mask": mask}

    @pytest.fixture
    def with_kernel(self, named, monkeypatch):
        """Run a function as users have it, then with the kernel or nothing."""

        def both(function):
            monkeypatch.setenv("INFLLM_V2_IMPLEMENTATION", "blockwise")
            torch.manual_seed(3)
            plain = function()
            monkeypatch.setenv("INFLLM_V2_IMPLEMENTATION", "kernel")
            torch.manual_seed(3)
            return plain, function()

        return both

    @pytest.mark.parametrize(
        "options",
        [{}, {"num_beams": 2}, {"prefill_chunk_size": 31}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True}],
        ids=["greedy", "beams", "chunked_prefill", "prompt_lookup", "sampling"],
    )
    def test_generate_is_the_same(self, model, rows, with_kernel, options):
        if "prompt_lookup_num_tokens" in options:
            rows = {name: tensor[1:] for name, tensor in rows.items()}  # Transformers takes one row here
        options = {"max_new_tokens": NEW, "do_sample": False, **options}
        plain, with_it = with_kernel(lambda: model.generate(**rows, **options))
        assert torch.equal(plain, with_it)

    def test_use_nope(self, tiny_model, rows, with_kernel):
        model = tiny_model(sparse_config=changed(use_nope=True)).float()
        plain, with_it = with_kernel(lambda: model.generate(**rows, max_new_tokens=NEW, do_sample=False))
        assert torch.equal(plain, with_it)

    def test_chunks_over_a_cache(self, model, rows, with_kernel):
        ids, mask = rows.values()

        def logits():
            cache, parts = DynamicCache(), []
            for begin, end in ((0, 50), (50, 51), (51, 90)):
                parts.append(model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
            return torch.cat(parts, 1)[mask.bool()].detach()

        with torch.no_grad():
            plain, with_it = with_kernel(logits)
        assert within(relative_rms(with_it, plain), "kernel_logits_float32")

    def test_the_named_kernel_is_what_answers(self, model, rows, named, said, monkeypatch):
        """Without a word from anybody, that is: "auto" takes it and has nothing to warn about."""
        calls = []
        original = kernels.get_kernel(REPO, version=1).infllm_v2_attention
        monkeypatch.setattr(
            "transformers_minicpm4.infllm_v2.kernel.load", lambda *_, **__: (lambda *a, **k: record(*a, **k), None)
        )

        def record(*args, **kwargs):
            calls.append(args[0].shape[2])
            return original(*args, **kwargs)

        model.generate(**rows, max_new_tokens=3, do_sample=False)
        assert calls == [90, 90, 90, 1, 1, 1, 1, 1, 1]  # three layers, the prompt and two steps
        assert said() == []

    def test_training_on_a_cpu_stays_blockwise_and_says_so_once(self, model, rows, named, said, monkeypatch):
        def gradients():
            model(**rows, labels=rows["input_ids"]).loss.backward()
            found = [parameter.grad.clone() for parameter in model.parameters()]
            model.zero_grad()
            return found

        with_it = [gradients() for _ in range(2)][-1]
        assert len(said()) == 1
        assert "backward pass" in said()[0]
        monkeypatch.delenv("INFLLM_V2_KERNEL")
        assert all(torch.equal(got, want) for got, want in zip(with_it, gradients()))
        # Forced, the kernel's own backward pass runs.
        monkeypatch.setenv("INFLLM_V2_KERNEL", named)
        monkeypatch.setenv("INFLLM_V2_IMPLEMENTATION", "kernel")
        for got, want in zip(gradients(), with_it):
            assert within(relative_rms(got, want), "kernel_gradient_float32")

    def test_the_config_may_name_it(self, tiny_model, rows, named, monkeypatch, tmp_path):
        """By the name alone and on disk: what a checkpoint would say."""
        monkeypatch.delenv("INFLLM_V2_KERNEL")
        model = tiny_model(sparse_config=changed(kernel=REPO, implementation="kernel")).float()
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert loaded.config.sparse_config["kernel"] == REPO
        with torch.no_grad():
            assert torch.equal(loaded(**rows).logits, model(**rows).logits)
        monkeypatch.setenv("INFLLM_V2_IMPLEMENTATION", "blockwise")
        with torch.no_grad():
            assert within(relative_rms(loaded(**rows).logits, model(**rows).logits), "kernel_logits_float32")


class TestKernelize:
    @pytest.fixture(autouse=True)
    def restore(self):
        yield
        vars(kernelized).pop("forward", None)

    @pytest.fixture
    def model(self, tiny_model, sparse_config):
        return tiny_model(sparse_config=sparse_config).float()

    @pytest.fixture
    def ids(self):
        return torch.randint(1, 120, (2, 90))

    def in_place(self):
        return kernelized.forward.__func__.__module__.startswith("_infllm_v2_cpu_")

    @torch.no_grad()
    def test_by_a_mapping(self, model, ids, kernel_folder, said, monkeypatch):
        before, keys = model(ids).logits, list(model.state_dict())
        layer = kernels.LocalLayerRepository(kernel_folder, layer_name="InfLLMv2Attention")
        with kernels.use_kernel_mapping({"InfLLMv2Attention": {"cpu": layer}}, inherit_mapping=False):
            kernels.kernelize(model, mode=kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE, device="cpu")
        assert self.in_place()
        after = model(ids).logits
        assert not torch.equal(after, before)  # another order of sums: it was the kernel
        assert within(relative_rms(after, before), "kernel_logits_float32")
        assert list(model.state_dict()) == keys
        model.double()(ids)  # what it cannot do goes on as before, and says so
        assert len(said()) == 1
        assert "float64" in said()[0]
        monkeypatch.setenv("INFLLM_V2_IMPLEMENTATION", "blockwise")
        assert torch.equal(model.float()(ids).logits, before)

    @torch.no_grad()
    def test_no_mapping_changes_nothing(self, model, ids):
        before = model(ids).logits
        with kernels.use_kernel_mapping({}, inherit_mapping=False):
            kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
        assert not self.in_place()
        assert torch.equal(model(ids).logits, before)

    @pytest.fixture
    def cpu_is_supported(self, monkeypatch):
        """Transformers' list of devices for a KernelConfig has no CPU, though `kernels` does."""
        monkeypatch.setattr("transformers.utils.kernel_config.KERNELS_SUPPORTED_DEVICE_TYPES", ["cpu"])

    @torch.no_grad()
    def test_by_use_kernels(self, model, ids, named, cpu_is_supported, monkeypatch, tmp_path):
        monkeypatch.delenv("INFLLM_V2_KERNEL")
        model.save_pretrained(tmp_path)
        before = model(ids).logits
        # A version would be looked up on the Hub before LOCAL_KERNELS is read; a revision is not.
        layer = (f"{named}:InfLLMv2Attention", {"revision": "v1", "trust_remote_code": True})
        config = KernelConfig({"InfLLMv2Attention": layer}, inherit_mapping=False)
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, use_kernels=True, kernel_config=config
        )
        assert self.in_place()
        assert within(relative_rms(loaded.eval()(ids).logits, before), "kernel_logits_float32")

    @torch.no_grad()
    def test_by_a_local_kernel_config(self, model, ids, kernel_folder, forget, cpu_is_supported):
        before = model(ids).logits
        layer = {"InfLLMv2Attention": f"{kernel_folder}:InfLLMv2Attention"}
        model.set_use_kernels(True, KernelConfig(layer, use_local_kernel=True))
        assert self.in_place()
        assert within(relative_rms(model(ids).logits, before), "kernel_logits_float32")


class TestHubString:
    """`attn_implementation="owner/repo"` on a plain Llama: Transformers alone, none of our package."""

    pytestmark = pytest.mark.usefixtures("named")

    @pytest.fixture
    def load(self, tmp_path):
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            pad_token_id=0,
            eos_token_id=None,
        )
        config.sparse_config = CONFIG.to_dict()
        LlamaForCausalLM(config).save_pretrained(tmp_path)

        def from_pretrained(attn_implementation, **options):
            return LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=attn_implementation, **options)

        return from_pretrained

    @pytest.fixture
    def rows(self):
        ids = torch.randint(1, 60, (2, 90))
        mask = torch.ones_like(ids)
        mask[1, :20] = 0
        return {"input_ids": ids, "attention_mask": mask}

    @torch.no_grad()
    @pytest.mark.parametrize("side", ["left", "right", "none"])
    def test_equals_the_package(self, load, rows, side, monkeypatch):
        monkeypatch.setenv("INFLLM_V2_IMPLEMENTATION", "reference")
        if side == "right":
            rows["attention_mask"] = rows["attention_mask"].flip(-1)
        elif side == "none":
            del rows["attention_mask"]
        real = rows.get("attention_mask", torch.ones_like(rows["input_ids"])).bool()
        got, want = (load(name)(**rows).logits[real] for name in (REPO, "infllm_v2"))
        assert within(relative_rms(got, want), "kernel_logits_float32")
        assert relative_rms(got, load("sdpa")(**rows).logits[real]) > 1e-2  # sparse it was

    @pytest.mark.parametrize(
        "options",
        [{}, {"prefill_chunk_size": 31}, {"cache_implementation": "static", "disable_compile": True}],
        ids=["dynamic", "chunked_prefill", "static"],
    )
    @pytest.mark.parametrize("padded", [True, False])
    def test_generate_equals_the_package(self, load, rows, options, padded, monkeypatch):
        monkeypatch.setenv("INFLLM_V2_IMPLEMENTATION", "blockwise")
        if not padded:
            rows["attention_mask"] = torch.ones_like(rows["input_ids"])
        want = load("infllm_v2").generate(**rows, max_new_tokens=NEW, do_sample=False)
        got = load(REPO).generate(**rows, max_new_tokens=NEW, do_sample=False, **options)
        assert torch.equal(got, want)

    def test_it_trains(self, load, rows):
        model = load(REPO).train()
        model(**rows, labels=rows["input_ids"]).loss.backward()
        got = model.model.layers[0].self_attn.k_proj.weight.grad
        other = load("infllm_v2").train()
        other(**rows, labels=rows["input_ids"]).loss.backward()
        want = other.model.layers[0].self_attn.k_proj.weight.grad
        assert within(relative_rms(got, want), "kernel_gradient_float32")

    @torch.no_grad()
    def test_released_defaults_where_the_model_names_none(self, load, rows):
        model = load(REPO)
        del model.config.sparse_config
        dense = load("sdpa")(**rows).logits
        real = rows["attention_mask"].bool()
        assert within(relative_rms(model(**rows).logits[real], dense[real]), "kernel_logits_float32")

    @torch.inference_mode()
    def test_inference_mode(self, load, rows):
        assert load(REPO)(**rows).logits.isfinite().all()

    def test_masks_it_cannot_honour(self, load, rows):
        model, ids = load(REPO), rows["input_ids"]
        packed = torch.cat([torch.arange(40), torch.arange(50)])[None].expand(2, -1)
        window = torch.ones(90, 90, dtype=torch.bool).tril().triu(-20).expand(2, 1, -1, -1)
        for options in ({"position_ids": packed, "use_cache": False}, {"attention_mask": window}):
            with pytest.raises(ValueError, match="more than causal with padding on one side"):
                model(ids, **options)
        with pytest.raises(ValueError, match=r"the mask is torch.float32 \(2, 1, 90, 90\); it must be bool"):
            model(ids, attention_mask=window.float())

    @pytest.mark.parametrize(
        "fields, words",
        [({"use_nope": True}, "un-rotated"), ({"top_k": 3}, "unknown field.s. top_k; known are kernel_size")],
    )
    def test_settings_it_cannot_honour(self, load, rows, fields, words):
        model = load(REPO)
        model.config.sparse_config = {**CONFIG.to_dict(), **fields}
        with pytest.raises(ValueError, match=words):
            model(**rows)

    def test_dropout_softcap_and_both_ways(self, kernel, load):
        module = load(REPO).model.layers[0].self_attn
        query, key, value = tensors(5, 5)
        for options, words in (
            ({"dropout": 0.1}, "attention_dropout=0.1"),
            ({"softcap": 30.0}, "LlamaAttention asks for softcap"),
            ({"is_causal": False}, "LlamaAttention is not causal"),
        ):
            with pytest.raises(ValueError, match=words):
                kernel.flash_attn_forward(module, query, key, value, None, **options)
