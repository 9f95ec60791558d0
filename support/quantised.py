"""Checkpoints whose weights are quantised: refused, but GGUF files, which transformers can dequantise."""

import math
from importlib.util import find_spec
from pathlib import Path

from support.errors import InputError


def gguf_file(name: str) -> str | None:
    """The name of the .gguf file in a directory without config.json; None if there is none."""
    folder = Path(name)
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if not files or (folder / "config.json").exists():
        return None
    if len(files) > 1:
        raise InputError(
            f"{name}: several .gguf files ({', '.join(files)}): put the one to train into a "
            "directory of its own, the parts of a split one merged (--model)"
        )
    if not (find_spec("gguf") and find_spec("accelerate")):
        raise InputError(
            f"{name}: reading {files[0]} needs two more packages: pip install gguf accelerate"
        )
    return files[0]


def check_config(name: str, config) -> None:
    """InputError for a config that says how the weights are quantised."""
    text = config.get_text_config()  # of a model that reads images, too
    how = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
    if how:
        method = how.get("quant_method", "by a method without a name")
        raise InputError(
            f"{name}: the weights are quantised ({method}): train the "
            "checkpoint that it was made from, or have transformers write a dequantised one "
            "(docs/running.md, Your own model)"
        )


def check_gguf(path: str, model) -> None:
    """InputError if the file has something that transformers leaves out: weights, or a setting whose
    value is not in the config, such as the scaling of rotary embeddings."""
    # parts of transformers that may move in another version
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS, GgufHeader, read_gguf_metadata

    metadata, _ = read_gguf_metadata(path)
    kind = metadata["general.architecture"]
    if kind in GGUF_CONFIG_ARCHS:  # transformers reads all that these have
        return
    settings = model.config.to_dict()
    known = [*settings.values(), *(settings.get("rope_parameters") or {}).values()]
    left_out = []
    for key, value in metadata.items():
        if key.startswith(f"{kind}.") and value not in known:
            left_out.append(f"{key} = {value}")
    weights = sum(math.prod(tensor.shape) for tensor in GgufHeader.from_file(path).tensors)
    more = weights - model.num_parameters()  # where two are tied, both have one
    if more > 0:
        left_out.append(f"{more} weights")
    if left_out:
        raise InputError(
            f"{path}: transformers leaves out a part of this GGUF file, so the model would be "
            f"another one: {', '.join(left_out)}: train the checkpoint that it was made from"
        )
