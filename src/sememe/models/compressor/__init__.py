"""Text → concepts → text: `model` the two halves together, `slots` segments of chosen lengths,
`decode` the decompressor, `beams` its search, `start` what is set before training."""

from sememe.models.compressor.model import CompressorForCausalLM, CompressorOutput, Encoded

__all__ = ["CompressorForCausalLM", "CompressorOutput", "Encoded"]
