"""llama.cpp's own converters, run as often as asked in one process, since their imports take longer than their work.

    python gguf_convert.py FOLDER_OF_LLAMA_CPP SCRIPT '[["arguments", "of", "one", "run"], ...]'

They know the pre-tokenizers of published models by a hash; ours is made up, so it is told.
"""

from __future__ import annotations

import json
import runpy
import sys

sources, script, runs = sys.argv[1:]
sys.path.insert(0, f"{sources}/gguf-py")
sys.path.insert(0, sources)

from conversion.base import TextModel  # type: ignore[import-not-found] # noqa: E402

TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
for run in json.loads(runs):
    sys.argv = [f"{sources}/{script}", *run]
    runpy.run_path(sys.argv[0], run_name="__main__")
