"""One op a file: `<op>_ref` in plain torch, the fast paths beside it, and a note of which is taken when.

`explain` tells which of them a model or an LLM runs, and why not a better one (choices.py).
"""

from paceline.kernels.choices import Choice, explain

__all__ = ["Choice", "explain"]
