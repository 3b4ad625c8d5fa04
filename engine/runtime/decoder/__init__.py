"""The language model: prompts as embeddings into vLLM; text, tokens, log-probabilities and [SEG] states out of it."""

from engine.runtime.decoder.decoder import Decoder, Delta

__all__ = ["Decoder", "Delta"]
