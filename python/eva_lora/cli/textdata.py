"""Text files as batches of tokens: jsonl, text, csv, parquet or a ``datasets`` folder, chats included."""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["TextBatches", "describe_files", "read_records"]

#: Reader of the ``datasets`` library by file ending.
FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}


def read_records(paths: Sequence[str | Path], *, split: str = "train", limit: int | None = None) -> Any:
    """The records of all files together, as one ``datasets.Dataset``.

    Args:
        paths: Files with a known ending, all of one format, or one folder that ``datasets`` saved.
        split: Which part of a saved ``DatasetDict``.
        limit: Use only so many records, the first ones.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: another format, a damaged file, no such split, or no records.
        ImportError: ``datasets`` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("data: reading it needs the datasets library: pip install datasets") from error
    files = [Path(path) for path in paths]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"data: there is no {file}")
    if len(files) == 1 and files[0].is_dir():
        records = _saved_dataset(files[0], split)
    else:
        kinds = {FORMATS.get(file.suffix.lower()) for file in files}
        kind = kinds.pop()
        if kinds or kind is None:
            expected = ", ".join(FORMATS)
            raise ValueError(f"data: expected files of one format ({expected}) or one folder, got {_names(files)}")
        options = {"delimiter": "\t"} if files[0].suffix.lower() == ".tsv" else {}
        try:
            records = datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train", **options)
        except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
            cause = str(error.__cause__ or error).splitlines()[0]
            raise ValueError(f"data: {_names(files)} cannot be read as {kind}: {cause}") from error
    if limit is not None:
        records = records.select(range(min(limit, len(records))))
    if len(records) == 0:
        raise ValueError(f"data: {_names(files)} holds no records")
    return records


def _saved_dataset(folder: Path, split: str) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except FileNotFoundError as error:
        raise ValueError(f"data: {folder} is no folder saved by datasets' save_to_disk") from error
    if not isinstance(loaded, Mapping):
        return loaded
    if split not in loaded:
        raise ValueError(f"data: {folder} has no split {split!r}; it has {sorted(loaded)}")
    return loaded[split]


def describe_files(paths: Sequence[str | Path], num_records: int) -> str:
    """Names, sizes and digests, by which data can be recognised again."""
    described = []
    for path in map(Path, paths):
        if path.is_file():
            digest = hashlib.sha256()
            with path.open("rb") as file:
                for block in iter(lambda: file.read(1 << 20), b""):
                    digest.update(block)
            described.append(f"{path} ({path.stat().st_size:,} bytes, sha256 {digest.hexdigest()[:16]}…)")
        else:
            described.append(str(path))
    return f"{num_records:,} records of {', '.join(described)}"


class TextBatches:
    """Records as padded batches: input_ids, attention_mask, and labels where not every token counts.

    A record is a chat ("messages"), a "prompt" with its "completion" (text or chats), or a text. Chats are
    rendered by the tokenizer's chat template. Prompts do not count, as in training on completions.

    Args:
        records: A sequence of mappings, such as a ``datasets.Dataset``.
        tokenizer: Of the model.
        batch_size: Records per batch; the last may be smaller.
        max_length: Tokens per record, cut behind.
        text_field: The field that holds the text. None: found by the rules above.
        assistant_only: Count only what the assistant says; the chat template must mark it.
        with_labels: Whether the model takes labels; without, every token counts.
        label_mask_value: The label of tokens that do not count.
        seed: Order of the records. None: as they are.
        shard: (rank, ranks): every ``ranks``-th batch, from number ``rank`` on.

    Raises:
        ValueError: fields that fit none of the rules, no chat template, or one that does not mark the
            assistant's words.
    """

    def __init__(
        self,
        records: Any,
        tokenizer: Any,
        *,
        batch_size: int = 4,
        max_length: int = 512,
        text_field: str | None = None,
        assistant_only: bool = False,
        with_labels: bool = True,
        label_mask_value: int = -100,
        seed: int | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self._records, self._tokenizer, self._shard = records, tokenizer, shard
        self._batch_size, self._max_length = batch_size, max_length
        self._assistant_only, self._with_labels = assistant_only, with_labels
        self._uncounted = label_mask_value
        self.kind, self._field = _kind_of(records[0], text_field)
        self._order = list(range(len(records)))
        if seed is not None:
            random.Random(seed).shuffle(self._order)
        self._pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
        chats = self.kind == "chat" or (self.kind == "completion" and not isinstance(records[0]["prompt"], str))
        if chats and tokenizer.chat_template is None:
            raise ValueError("data: it holds chats, but the tokenizer has no chat template; pass one")
        if assistant_only and not (self.kind == "chat" and "generation" in str(tokenizer.chat_template)):
            raise ValueError(
                "assistant_only: expected chats and a template with {% generation %} marks around the assistant's words"
            )
        self._encode(records[self._order[0]])  # a record that cannot be encoded shows before the model loads

    def __len__(self) -> int:
        return len(self._starts())

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in self._starts():
            encoded = [self._encode(self._records[i]) for i in self._order[start : start + self._batch_size]]
            yield self._padded([pair for pair in encoded if pair[0]] or encoded)

    def _starts(self) -> range:
        """The first record of each batch."""
        rank, ranks = self._shard
        return range(rank * self._batch_size, len(self._order), ranks * self._batch_size)

    def example(self) -> dict[str, Tensor]:
        """A batch as large as batches get: every row of full length."""
        ids = torch.zeros(self._batch_size, self._max_length, dtype=torch.long, device="cpu")
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _padded(self, encoded: list[tuple[list[int], list[bool]]]) -> dict[str, Tensor]:
        width = max(1, *(len(ids) for ids, _ in encoded))
        shape = (len(encoded), width)
        ids = torch.full(shape, self._pad, dtype=torch.long, device="cpu")
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, self._uncounted)
        for row, (tokens, counts) in enumerate(encoded):
            ids[row, : len(tokens)] = ids.new_tensor(tokens)
            mask[row, : len(tokens)] = 1
            counted = ids.new_tensor(counts, dtype=torch.bool)
            labels[row, : len(tokens)] = torch.where(counted, ids[row, : len(tokens)], self._uncounted)
        batch = {"input_ids": ids, "attention_mask": mask}
        if self._with_labels and not all(all(counts) for _, counts in encoded):
            batch["labels"] = labels
        return batch

    def _encode(self, record: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        """Token ids, and for each whether it counts."""
        if self.kind == "chat":
            return self._encode_chat(record[self._field])
        if self.kind == "completion":
            return self._encode_completion(record["prompt"], record["completion"])
        ids = self._tokenizer(record[self._field] or "", truncation=True, max_length=self._max_length)["input_ids"]
        return ids, [True] * len(ids)

    def _encode_chat(self, messages: Any) -> tuple[list[int], list[bool]]:
        encoded = self._tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=self._assistant_only
        )
        ids = encoded["input_ids"][: self._max_length]
        if not self._assistant_only:
            return ids, [True] * len(ids)
        return ids, [bool(mark) for mark in encoded["assistant_masks"][: self._max_length]]

    def _encode_completion(self, prompt: Any, completion: Any) -> tuple[list[int], list[bool]]:
        if isinstance(prompt, str):
            before = self._tokenizer(prompt)["input_ids"]
            ids = self._tokenizer(prompt + completion)["input_ids"]
        else:
            template = self._tokenizer.apply_chat_template
            before = template(prompt, tokenize=True, return_dict=True, add_generation_prompt=True)["input_ids"]
            ids = template([*prompt, *completion], tokenize=True, return_dict=True)["input_ids"]
        ids = ids[: self._max_length]
        # Where prompt and completion meet, tokens may merge, and the prompt alone may end in a special token.
        shared = next((i for i, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), len(before))
        return ids, [i >= shared for i in range(len(ids))]


def _kind_of(record: Mapping[str, Any], text_field: str | None) -> tuple[str, str]:
    """Whether records are a "text", a "chat" or a "completion", and the field that holds it."""
    if text_field is not None:
        if not isinstance(record.get(text_field), str):
            raise ValueError(f"text_field: expected a field of text, {text_field!r} is none; fields: {sorted(record)}")
        return "text", text_field
    if "messages" in record:
        messages = record["messages"]
        if not messages or not {"role", "content"} <= set(messages[0]):
            raise ValueError(f"data: expected messages with 'role' and 'content', got {messages!r:.80}")
        return "chat", "messages"
    if {"prompt", "completion"} <= set(record):
        return "completion", "completion"
    texts = [name for name, value in record.items() if isinstance(value, str)]
    if "text" in texts:
        return "text", "text"
    if len(texts) == 1:
        return "text", texts[0]
    raise ValueError(
        "data: expected a field 'text', 'messages', or 'prompt' and 'completion'; pass text_field for another. "
        f"Fields: {sorted(record)}"
    )


def _names(files: Sequence[Path]) -> str:
    return ", ".join(str(file) for file in files)
