"""llama.cpp's converter, told which pre-tokenizer our made-up tokenizer has: it knows published ones by a hash.

python gguf_convert.py FOLDER_OF_LLAMA_CPP [arguments of its convert_hf_to_gguf.py]
"""

from __future__ import annotations

import runpy
import sys

sources = sys.argv[1]
sys.path.insert(0, f"{sources}/gguf-py")
sys.path.insert(0, sources)

from conversion.base import TextModel  # type: ignore[import-not-found] # noqa: E402

TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.argv = [f"{sources}/convert_hf_to_gguf.py", *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
