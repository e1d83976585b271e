"""Generation over a language model's step function."""

from tilescan.decoding.chat import Conversation
from tilescan.decoding.prompts import Answer, continue_prompts
from tilescan.decoding.sampling import Generation, filter_logits, generate, stream
from tilescan.decoding.text import GeneratedText, generate_text, load_writer, stream_text

__all__ = [
    "Answer",
    "Conversation",
    "GeneratedText",
    "Generation",
    "continue_prompts",
    "filter_logits",
    "generate",
    "generate_text",
    "load_writer",
    "stream",
    "stream_text",
]
