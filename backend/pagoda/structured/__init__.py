"""Output that must follow a JSON schema, a regular expression, a list of choices or a grammar.

llguidance (https://github.com/guidance-ai/llguidance) computes the masks; it is loaded when the first structure comes.
"""

from pagoda.structured.compiler import Compiler, Grammar
from pagoda.structured.limits import MAX_TEXT_BYTES
from pagoda.structured.matcher import Matcher

__all__ = ["MAX_TEXT_BYTES", "Compiler", "Grammar", "Matcher"]
