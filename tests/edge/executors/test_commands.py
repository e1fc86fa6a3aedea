"""`minicpm4 export` and `minicpm4 align`: the files they write, and the exit code of a wrong scale."""

import importlib.util
import json

import pytest

from transformers_minicpm4.cli.main import main


if importlib.util.find_spec("xllamacpp") is None or importlib.util.find_spec("gguf") is None:
    pytest.skip("xllamacpp or gguf is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def files(checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "text.txt").write_text("The path of the three. " * 20, encoding="utf-8")
    assert main(["export", str(checkpoints / "plain"), "-o", str(folder / "x.gguf"), "--to", "gguf"]) == 0
    return folder


def test_align_reports_and_writes_a_picture_and_a_timeline(files, checkpoints, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    arguments = [str(checkpoints / "plain"), str(files / "x.gguf"), "--text", str(files / "text.txt")]
    arguments += ["--tokens", "20", "--json", "--plot", str(tmp_path / "p.png"), "--trace", str(tmp_path / "t.json")]
    assert main(["align", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["agreement"], found["divergence"]) == (19, 1.0, None)
    assert found["slope"] == pytest.approx(1, abs=1e-4)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    spans = [event for event in json.loads((tmp_path / "t.json").read_text())["traceEvents"] if event["ph"] == "X"]
    calls = [(span["name"], span["cat"]) for span in spans if span["name"] != "evaluate"]
    assert calls == [("score", "plain"), ("score", "x.gguf")]


def test_a_wrong_scale_is_a_finding(files, checkpoints, tmp_path, capsys):
    """A checkpoint beside the file of another logit scale: the same answers, exit code 1."""
    import shutil

    shutil.copytree(checkpoints / "plain", tmp_path / "wrong")
    config = json.loads((tmp_path / "wrong" / "config.json").read_text())
    config["dim_model_base"] *= 2
    (tmp_path / "wrong" / "config.json").write_text(json.dumps(config))
    arguments = ["align", str(tmp_path / "wrong"), str(files / "x.gguf"), "--text", str(files / "text.txt")]
    assert main([*arguments, "--tokens", "20"]) == 1
    report = capsys.readouterr().out
    assert "slope               0.5000" in report
    assert "first divergence    none" in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "./none", "-o", "x.gguf", "--to", "gguf"], "there is no folder ./none"),
        (["export", "MODEL", "-o", "x.gguf", "--to", "gguf", "--type", "q9"], "type is one of"),
        (["export", "MODEL", "-o", "x", "--to", "openvino", "--type", "q8_0"], "f32 or f16"),
        (["export", "MODEL", "-o", "x", "--to", "openvino", "--tokenizer-pre", "a"], "--tokenizer-pre is for gguf"),
        (["align", "MODEL", "FILE", "--text", "none.txt"], "none.txt cannot be read"),
        (["export", "MODEL", "-o", "FILE", "--to", "gguf"], "is there already; give another name"),
        (["align", "MODEL", "FILE", "--text", "TEXT", "--plot", "p.xyz"], "must end in .png, .svg, .pdf"),
        (["align", "MODEL", "FOREIGN", "--text", "TEXT"], "not a whole GGUF model: cut off, or something else"),
        (["align", "FILE", "FILE", "--text", "TEXT"], "--tokenizer FOLDER"),
        (["align", "MODEL", "MODEL.gguf", "--text", "TEXT"], "there is no folder"),
    ],
)
def test_unusable_input_is_one_sentence(arguments, message, files, checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": checkpoints / "plain", "FILE": files / "x.gguf", "TEXT": files / "text.txt"}
    places["MODEL.gguf"] = tmp_path / "none.gguf"
    places["FOREIGN"] = files / "cut.bin"  # no suffix by which it could be told
    places["FOREIGN"].write_bytes(places["FILE"].read_bytes()[:5000])
    assert main([str(places.get(word, word)) for word in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error.splitlines()[-1]
    assert not list(tmp_path.iterdir())
