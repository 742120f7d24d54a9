"""Fields that clients of other servers send and that we do not act on: which may pass, and which are refused by name.

A field that nobody lists here and no record of `server.api.requests` has is unknown.
Sources: OpenAI's specification 2.3.0; vLLM 0.33, SGLang 0.5.23, llama.cpp's server and LoRAX for their additions.
"""

from __future__ import annotations

from collections.abc import Mapping

# Accepted whatever they hold: no value of theirs could change this server's answer.
INERT = frozenset(
    {
        "metadata",
        "parallel_tool_calls",  # says how tools are called; tools themselves are refused
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

# Refused unless null or one of the values that ask for what we do anyway.
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    # OpenAI
    "audio": (),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "chat_template": (),
    "documents": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "min_tokens": (0,),
    "priority": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    # SGLang
    "ebnf": (),
    "json_schema": (),
    "min_new_tokens": (0,),
    "no_stop_trim": (False,),
    "regex": (),
    "return_hidden_states": (False,),
    "stop_regex": ([],),
    # llama.cpp
    "cache_prompt": (True,),
    "dry_multiplier": (0, 0.0),
    "grammar": ("",),
    "id_slot": (-1,),
    "mirostat": (0,),
    "n_probs": (0,),
    "repeat_penalty": (1, 1.0),
    "typical_p": (1, 1.0),
    "xtc_probability": (0, 0.0),
    # LoRAX
    "adapter_source": ("hub",),
    "api_token": (),
    "schema": (),
}


def is_neutral(name: str, value: object) -> bool:
    """Whether `value` asks for nothing that we do not do. True is not 1: types count."""
    return value is None or any(type(value) is type(same) and value == same for same in UNSUPPORTED[name])
