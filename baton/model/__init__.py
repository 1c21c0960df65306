"""Models: what they are called, what shape they have, and how text becomes token ids.

`locate` turns a name into a local folder, `load_spec` reads its shape and constants, `TextCodec`
its tokenizer and chat template. No torch here: the router needs this room and computes nothing.
Loading the weights into a compute device is the engine's business.
"""

from baton.model.catalog import known_models, locate
from baton.model.fingerprint import fingerprint
from baton.model.spec import ModelSpec, load_spec
from baton.model.text import TextCodec
from baton.model.text_stream import TextStream

__all__ = [
    "ModelSpec",
    "TextCodec",
    "TextStream",
    "fingerprint",
    "known_models",
    "load_spec",
    "locate",
]
