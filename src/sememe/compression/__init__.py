"""Texts ⇄ concept ids with a compressor: in Python, and as files that can be gone on with
(docs/formats.md, codes.json)."""

from sememe.compression.codes import Codes
from sememe.compression.use import compress, decompress

__all__ = ["Codes", "compress", "decompress"]
