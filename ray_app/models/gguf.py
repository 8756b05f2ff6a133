"""GGUF files, unpacked once per machine into a folder of safetensors.

Reading GGUF takes transformers many seconds and always reads the whole file. Every process that
needs the configuration, the tokenizer or some of the layers reads the unpacked folder instead.
"""

import os
import shutil
import uuid
from pathlib import Path

import safetensors.torch
import torch
import transformers

__all__ = ["unpack_gguf"]


def unpack_gguf(path: Path, digest: str) -> Path:
    """The folder that holds the model of a GGUF file, with its weights as float32.

    The folder is made on first use, below ``$ACTLAKE_CACHE`` (``~/.cache/actlake`` if not set), and
    appears whole or not at all; processes that unpack at the same time do not disturb each other.

    Args:
        path: the GGUF file.
        digest: hexadecimal digest of its content, which names the folder.

    Raises:
        OSError, ValueError, KeyError, RuntimeError: what transformers says of an unreadable file.
    """
    # Another version of transformers may convert names or weights in another way.
    folder = _cache_folder() / f"gguf-{digest[:16]}-{transformers.__version__}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        config = transformers.AutoConfig.from_pretrained(**source)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **source, config=config, dtype=torch.float32
        )
        temporary.mkdir()
        # save_pretrained refuses a model that was read from GGUF; its tensors are plain by now.
        safetensors.torch.save_model(model, str(temporary / "model.safetensors"), {"format": "pt"})
        config.architectures = [type(model).__name__]
        config.save_pretrained(temporary)
        transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _cache_folder() -> Path:
    given = os.environ.get("ACTLAKE_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "actlake"
