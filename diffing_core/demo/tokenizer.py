"""The demo's tokenizer: byte-level BPE trained on the generated corpus, with a ChatML template.

Three special tokens: `<|endoftext|>` ends a document and pads, `<|im_start|>` and `<|im_end|>` frame a chat message;
`<|im_end|>` is the end-of-sequence token, so that generation stops after one answer.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from diffing_core.demo.corpus import END, END_OF_TEXT, START

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(
    documents: Iterable[str], vocabulary: int, context_tokens: int
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of at most `vocabulary` tokens trained on `documents`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=END_OF_TEXT,
        eos_token=END,
        additional_special_tokens=[START],
        model_max_length=context_tokens,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
