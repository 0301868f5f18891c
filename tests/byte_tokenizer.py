"""A tokenizer made on the spot: one token per byte, an end token, optionally a beginning token and a chat template."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
BEGIN = "<s>"
CHAT_TEMPLATE = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}" + END


def byte_tokenizer(*, begin: bool = False, chat: bool = False, end: bool = True) -> PreTrainedTokenizerFast:
    """Token ids 0 to 255 are bytes (in some order), then `END`, then `BEGIN`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, BEGIN])
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(f"{BEGIN} $0", special_tokens=[(BEGIN, 257)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END if end else None,
        pad_token=END,
        bos_token=BEGIN if begin else None,
        chat_template=CHAT_TEMPLATE if chat else None,
    )
