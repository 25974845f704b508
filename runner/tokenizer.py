"""A byte-level BPE tokenizer of the corpus, with a ChatML template that marks what the assistant says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lora_planner.errors import BadInput
from runner.corpus import Document, code_documents, prose_documents, split

END_OF_TEXT, TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, TURN, END_OF_TURN)
BYTES = 256

#: {% generation %} makes `return_assistant_tokens_mask` work: the answer and its end, which must be learned too
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """BPE on code and prose that is trained on, about as many bytes of each; no held-out document is seen.

    `vocab_size` counts the special tokens and the 256 bytes. The same corpus gives the same tokenizer.
    """
    smallest = BYTES + len(SPECIAL)
    if vocab_size < smallest:
        raise BadInput(f"a vocabulary of {vocab_size} tokens", "vocab_size",
                       f"It holds 256 bytes and {len(SPECIAL)} special tokens: {smallest} or more.")  # fmt: skip
    code, prose = split(code_documents())[0], split(prose_documents())[0]
    size = min(sum(map(n_bytes, code)), sum(map(n_bytes, prose)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(word, special=True, normalized=False) for word in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in [*first(code, size), *first(prose, size)]), trainer)
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json, as `AutoTokenizer.from_pretrained(directory)` reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [TURN, END_OF_TURN],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def n_bytes(document: Document) -> int:
    return len(document.text.encode("utf-8", "surrogatepass"))


def first(documents: Sequence[Document], size: int) -> list[Document]:
    """The first documents of at least `size` bytes together."""
    taken, total = [], 0
    for document in documents:
        if total >= size:
            break
        taken.append(document)
        total += n_bytes(document)
    return taken
