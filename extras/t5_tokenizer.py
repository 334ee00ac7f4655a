"""T5's tokenizer, from the published spiece.model, or from tokenizer.json if `tokenizers` is installed."""

import functools

import sentencepiece

from common import UserError, first_line

REMEDY = "copy T5's published spiece.model to the weights and import them again"


def load_tokenizer(content):
    """Return (the function from a text to its token ids, without </s>; the number of tokens).

    content: the bytes of spiece.model or tokenizer.json. Raises UserError for other bytes.
    """
    try:
        if not content.startswith(b"{"):
            processor = sentencepiece.SentencePieceProcessor(model_proto=content)
            processor.encode("music")  # an empty model fails only here
            return processor.encode, processor.vocab_size()
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(content.decode())
        return functools.partial(encode, tokenizer), tokenizer.get_vocab_size()
    except ImportError:
        raise UserError(f"this T5 has only a tokenizer.json; pip install tokenizers, or {REMEDY}") from None
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(f"T5's tokenizer cannot be read ({first_line(error)}); {REMEDY}") from None


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids
