"""What transformers calls the cache."""

from __future__ import annotations

from dataclasses import fields

from transformers.modeling_outputs import BaseModelOutputWithPast

#: The cache's name in a model's arguments and in its output before transformers 5.24.
FORMER = "past_key_values"

#: Its name in the installed transformers.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else FORMER
