"""OpenVINO computes what PyTorch computes, step by step and in pieces of any length, with its state reset between."""

import importlib.util
import sys

import pytest
import torch

from transformers_minicpm4.edge.alignment import align
from transformers_minicpm4.edge.executors import CallNotOffered, open_executor
from transformers_minicpm4.edge.executors.openvino_executor import MODEL_FILE, OpenVINOExecutor, export_openvino
from transformers_minicpm4.generation.draft_tree import ROOT, DraftTree


if importlib.util.find_spec("openvino") is None:  # not imported here: see the last test
    pytest.skip("openvino is not installed", allow_module_level=True)

CONTEXT = 100


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory):
    """Converting takes seconds: once, of the ternary checkpoint, with the long factors of LongRoPE."""
    folder = tmp_path_factory.mktemp("openvino") / "made"
    export_openvino(checkpoints / "ternary", folder)
    return folder


@pytest.fixture(scope="module")
def pair(exported, checkpoints):
    return open_executor(checkpoints / "ternary", CONTEXT, dtype="float32"), open_executor(exported, CONTEXT)


def test_openvino_agrees_with_torch(pair, token_ids):
    found = align(*pair, token_ids)
    assert found.slope == pytest.approx(1, abs=1e-4), found.report()
    assert found.max_difference < 2e-5, found.report()  # measured 5e-6
    assert found.agreement == 1


def test_steps_of_any_length_go_on_where_the_last_ended(pair, token_ids, monkeypatch):
    reference, made = pair
    monkeypatch.setattr("transformers_minicpm4.edge.executors.openvino_executor.CHUNK_TOKENS", 8)
    for _ in range(2):  # again, after a reset: nothing of the first text is left
        for executor in pair:
            executor.reset()
        for begin, end in ((0, 1), (1, 22), (22, 40)):
            want = reference.prefill(token_ids[begin:end])
            torch.testing.assert_close(made.prefill(token_ids[begin:end]), want, rtol=0, atol=5e-5)
        for token in token_ids[40:]:
            torch.testing.assert_close(made.decode(token), reference.decode(token), rtol=0, atol=5e-5)
    assert made.generate(token_ids[:10], 12) == reference.generate(token_ids[:10], 12)
    torch.testing.assert_close(made.decode(3), reference.decode(3), rtol=0, atol=5e-5)
    with pytest.raises(CallNotOffered, match="openvino does not offer verify; it offers generate, score, prefill"):
        made.verify(1, DraftTree((2,), (ROOT,)))


def test_exports_are_whole_and_refusals_name_the_reason(exported, checkpoints, tmp_path):
    with pytest.raises(FileExistsError, match="new or empty folder"):
        export_openvino(checkpoints / "plain", exported)
    with pytest.raises(ValueError, match="f32 or f16, got 'q8_0'"):
        export_openvino(checkpoints / "plain", tmp_path / "x", "q8_0")
    with pytest.raises(ValueError, match="has no openvino_model.xml"):
        OpenVINOExecutor(tmp_path)
    (tmp_path / "config.json").write_bytes((exported / "config.json").read_bytes())
    (tmp_path / MODEL_FILE).write_text("<net")
    with pytest.raises(ValueError, match="OpenVINO does not load"):
        OpenVINOExecutor(tmp_path)


def test_the_import_reports_to_nobody(pair):
    """`import openvino` sends an event by `openvino_telemetry` where that can be imported."""
    assert "openvino" in sys.modules
    assert not [name for name in sys.modules if name.startswith("openvino_telemetry.")]
