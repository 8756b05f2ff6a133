"""GGUF files, unpacked once per machine into a folder of safetensors.

Reading GGUF takes transformers many seconds and always reads the whole file. Every process that
needs the configuration, the tokenizer or some of the layers reads the unpacked folder instead.
"""

import os
import shutil
from pathlib import Path

import safetensors.torch
import torch
import transformers
from filelock import FileLock

__all__ = ["unpack_gguf"]


def unpack_gguf(path: Path, digest: str) -> Path:
    """The folder that holds the model of a GGUF file, with its weights as float32.

    The folder is made on first use, below ``$ACTLAKE_CACHE`` (``~/.cache/actlake`` if not set), and
    appears whole or not at all. Of processes that need it at the same time one unpacks and the
    others wait; what a killed one left behind is removed by the next.

    Args:
        path: the GGUF file.
        digest: hexadecimal digest of its content, which names the folder.

    Raises:
        Exception: whatever transformers trips over in an unreadable file.
    """
    # Another version of transformers may convert names or weights in another way.
    folder = _cache_folder() / f"gguf-{digest[:16]}-{transformers.__version__}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.unpacking")
    # The operating system frees the lock of a process that dies.
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                _unpack(path, temporary)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _unpack(path: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    config = transformers.AutoConfig.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **source, config=config, dtype=torch.float32
    )
    folder.mkdir()
    # save_pretrained refuses a model that was read from GGUF; its tensors are plain by now.
    safetensors.torch.save_model(model, str(folder / "model.safetensors"), {"format": "pt"})
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _cache_folder() -> Path:
    given = os.environ.get("ACTLAKE_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "actlake"
