"""Lectures 7 and 8: fewer trained parameters. From prompts to adapters to LoRA and after.

`attach` is the one way in which every method gets into a model and out of it again.
"""

from fewer.peft.attach import Attachment, Wrap, attach

__all__ = ["Attachment", "Wrap", "attach"]
