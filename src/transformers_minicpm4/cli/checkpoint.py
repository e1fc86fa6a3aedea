"""Where the files of a checkpoint are and whether they can be read, before any weight is loaded."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError, one_line


SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Bits of one element, by safetensors' name of the type. A type that is missing here is not checked for size.
ELEMENT_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    "F4": 4,
}


@dataclass(frozen=True)
class StoredTensor:
    """One entry of a safetensors header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def locate(model: str) -> Path:
    """
    The folder that holds the checkpoint's `config.json`.

    `model` is a folder, or the id of a Hub repository, of which the configuration is then fetched (or found in the
    local cache); the rest of the repository may be absent from the returned folder.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"The folder {model!r} holds no config.json; give a folder made by save_pretrained.")
        return path
    if path.exists():
        raise UserError(f"{model!r} is a file; give the folder of the checkpoint or a Hub id.")
    if not model or model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1:
        raise UserError(
            f"There is no folder {model!r}; give an existing folder or a Hub id such as openbmb/MiniCPM4-0.5B."
        )
    return _locate_on_hub(model)


def _locate_on_hub(model: str) -> Path:
    from huggingface_hub import constants, errors, hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json")).parent
    except errors.HFValidationError:
        raise UserError(
            f"{model!r} is neither an existing folder nor a valid Hub id; an id looks like openbmb/MiniCPM4-0.5B."
        ) from None
    except errors.GatedRepoError as error:
        raise UserError(f"Access to {model!r} is restricted; accept its terms on the Hub and log in.") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"There is no folder {model!r} here and no such public repository on the Hub; check the spelling, or log "
            "in with `hf auth login` if it is private."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "it did not answer"
        raise UserError(
            f"There is no folder {model!r} here, the local Hub cache has no copy, and the Hub cannot be reached "
            f"({reason}); give a folder, or fetch it once online with `hf download {model}`."
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"The Hub repository {model!r} holds no config.json, so it is no checkpoint.") from error
    except OSError as error:
        raise UserError(f"The configuration of {model!r} could not be fetched: {one_line(error)}") from error


def load_config(model: str):
    """The checkpoint's configuration as Transformers (with our registration) understands it."""
    config_file = locate(model) / "config.json"
    try:
        raw = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config_file} is no JSON text ({one_line(error)}); restore the file.") from error
    if not isinstance(raw, dict):
        raise UserError(f"{config_file} holds a {type(raw).__name__}; a configuration is a JSON object.")

    import transformers

    import transformers_minicpm4  # noqa: F401 - registers the architecture

    try:
        return transformers.AutoConfig.from_pretrained(model)
    except Exception as error:
        # Whatever a configuration class objects to is a fault of the file, whichever type of error says so.
        if type(error) is ValueError and raw.get("model_type") not in transformers.CONFIG_MAPPING:
            architectures = ", ".join(raw.get("architectures") or []) or "of no named architecture"
            raise UserError(
                f"{model!r} is a checkpoint {architectures} (model_type {raw.get('model_type')!r}) that neither this "
                f"package nor Transformers {transformers.__version__} knows; give a MiniCPM4 checkpoint."
            ) from error
        raise UserError(f"The configuration of {model!r} cannot be used: {one_line(error)}") from error


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files as its folder or index names them; they need not all exist."""
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    index_file = folder / INDEX_FILE
    if not index_file.exists():
        return []
    try:
        names = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index_file} is not an index of weights; restore the file.") from error
    return [folder / name for name in sorted(set(names))]


def read_header(file: Path) -> list[StoredTensor]:
    """
    The tensors of a safetensors file, read from its header alone and checked against the size of the file.

    Format: 8 bytes with the length of a JSON text, the text, then the data of the tensors without gaps.
    """
    broken = f"The weights file {file} is truncated or corrupt"
    remedy = "copy or download it again."
    file_size = file.stat().st_size
    if file_size < 8:
        raise UserError(f"{broken}: it has {file_size} bytes and no header; {remedy}")
    with file.open("rb") as stream:
        (header_size,) = struct.unpack("<Q", stream.read(8))
        if header_size > file_size - 8:
            raise UserError(f"{broken}: {header_size:,} bytes of header in a file of {file_size:,} bytes; {remedy}")
        text = stream.read(header_size)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        tensors, data_size = [], 0
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            tensors.append(StoredTensor(name, entry["dtype"], tuple(entry["shape"]), end - begin))
            data_size = max(data_size, end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{broken}: its header cannot be read; {remedy}") from error
    announced = 8 + header_size + data_size
    if announced != file_size:
        raise UserError(f"{broken}: its header announces {announced:,} bytes, the file has {file_size:,}; {remedy}")
    for tensor in tensors:
        bits = ELEMENT_BITS.get(tensor.dtype)
        if bits is not None and -(-tensor.num_elements * bits // 8) != tensor.num_bytes:
            raise UserError(f"{broken}: {tensor.num_bytes:,} bytes do not fit the shape of {tensor.name}; {remedy}")
    return tensors


def read_headers(folder: Path) -> dict[Path, list[StoredTensor]]:
    """The tensors of every weights file of a local checkpoint; missing, truncated and corrupt files are refused."""
    files = weight_files(folder)
    if not files:
        raise UserError(
            f"The folder {str(folder)!r} holds neither {SINGLE_FILE} nor {INDEX_FILE}; save the weights with "
            "save_pretrained."
        )
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"Of the {len(files)} weights files that {folder / INDEX_FILE} lists, {len(missing)} are missing (first: "
            f"{missing[0]}); copy or download them again."
        )
    return {file: read_header(file) for file in files}
