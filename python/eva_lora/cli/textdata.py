"""Records as batches of tokens: texts, prompts with completions, chats."""

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .datafiles import Place
from .recordfields import chat_of, kind_of, template_arguments, template_variables, text_of
from .running import reason

__all__ = ["TextBatches"]

#: Fields of a record that a chat template is given, by these names or as what is in them.
_GIVEN = {"messages", "prompt", "completion", "tools", "chat_template_kwargs"}


class TextBatches:
    """Records as padded batches: input_ids, attention_mask, and labels where not every token counts, or always.

    A record is a chat ("messages"), a "prompt" with its "completion" (text or chats), or a text. Chats are rendered by
    the tokenizer's chat template, with the record's "tools" and what its "chat_template_kwargs" hold, as TRL does.
    Prompts do not count, as in training on completions.

    Args:
        records: A sequence of mappings, such as a ``datasets.Dataset``.
        tokenizer: Of the model.
        batch_size: Records per batch; the last may be smaller.
        max_length: Tokens per record, cut behind.
        text_field: The field that holds the text. None: found by the rules above.
        assistant_only: Count only what the assistant says; the chat template must mark it.
        with_labels: Whether the model takes labels; without, every token counts. "always": every batch has them.
        label_mask_value: The label of tokens that do not count.
        seed: Order of the records. None: as they are.
        shard: (rank, ranks): every ``ranks``-th batch, from number ``rank`` on.
        vocabulary: Tokens that the model has an embedding for. None: unknown.
        paths: The files that the records are from, for messages.
        checked_batches: So many batches are made beforehand, to find what is wrong with a record before the pass.

    Raises:
        ValueError: fields that fit none of the rules, or hold something else; no chat template, one that fails, or
            that does not mark the assistant's words; tokens beyond the vocabulary. File, record and field are named.
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
        with_labels: bool | Literal["always"] = True,
        label_mask_value: int = -100,
        seed: int | None = None,
        shard: tuple[int, int] = (0, 1),
        vocabulary: int | None = None,
        paths: Sequence[str | Path] = (),
        checked_batches: int = 1,
    ) -> None:
        self._records, self._tokenizer, self._shard = records, tokenizer, shard
        self._batch_size, self.max_length, self._vocabulary = batch_size, max_length, vocabulary
        self._assistant_only, self._with_labels = assistant_only, with_labels
        self._uncounted = label_mask_value
        self._paths = tuple(Path(path) for path in paths)
        self.kind, self._field = kind_of(records[0], text_field, self._place(0))
        self._order = list(range(len(records)))
        if seed is not None:
            random.Random(seed).shuffle(self._order)
        self._pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
        if vocabulary is not None and self._pad >= vocabulary and batch_size > 1:
            token = tokenizer.convert_ids_to_tokens(self._pad)
            raise ValueError(
                f"tokenizer: it pads with {token!r}, token {self._pad}, but the model's embedding ends with token "
                f"{vocabulary - 1}; resize_token_embeddings and save the model, or pad with a token that it has"
            )
        if assistant_only and not (self.kind == "chat" and "generation" in str(tokenizer.chat_template)):
            raise ValueError(
                "assistant_only: expected chats and a template with {% generation %} marks around the assistant's words"
            )
        self._look_at_template(records[0])
        self._last = self._order[:batch_size]
        for start in self._starts()[:checked_batches]:
            for index in self._order[start : start + batch_size]:
                self._encode(index)

    def _look_at_template(self, record: Mapping[str, Any]) -> None:
        """Warn of fields that a chat template takes and is not given; raises ValueError if it is none."""
        template = self._tokenizer.chat_template
        if template is None or not (self.kind == "chat" or isinstance(record.get("prompt"), (list, tuple))):
            return
        missed = (template_variables(template) & set(record)) - _GIVEN - set(record.get("chat_template_kwargs") or ())
        if missed:
            warnings.warn(
                f"EVA renders chats without {', '.join(map(repr, sorted(missed)))}, which the template takes: like "
                "TRL's SFTTrainer it gives the template 'tools' and what 'chat_template_kwargs' holds, no other field",
                stacklevel=3,
            )

    def __len__(self) -> int:
        return len(self._starts())

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in self._starts():
            self._last = self._order[start : start + self._batch_size]
            yield self.remake()

    def remake(self) -> dict[str, Tensor]:
        """The batch that was made last, once more; of those of an iteration the first, before any."""
        encoded = [self._encode(index) for index in self._last]
        return self._padded([pair for pair in encoded if pair[0]] or encoded)

    def _starts(self) -> range:
        """The first record of each batch."""
        rank, ranks = self._shard
        return range(rank * self._batch_size, len(self._order), ranks * self._batch_size)

    def _place(self, index: int) -> Place:
        return Place(index, self._paths)

    def describe_last(self) -> str:
        """Which records are in the batch that was made last."""
        first, *others = self._last
        return f"{self._place(first)}" + (f" and {len(others)} more" if others else "")

    def example(self) -> dict[str, Tensor]:
        """A batch as large as batches get: every row of full length."""
        ids = torch.zeros(self._batch_size, self.max_length, dtype=torch.long, device="cpu")
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _padded(self, encoded: list[tuple[list[int], list[bool]]]) -> dict[str, Tensor]:
        width = max(1, *(len(ids) for ids, _ in encoded))
        shape = (len(encoded), width)
        ids = torch.full(shape, self._pad, dtype=torch.long, device="cpu")
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, self._uncounted)
        for row, (tokens, counts) in enumerate(encoded):
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long, device="cpu")
            mask[row, : len(tokens)] = 1
            counted = torch.tensor(counts, dtype=torch.bool, device="cpu")
            labels[row, : len(tokens)] = torch.where(counted, ids[row, : len(tokens)], self._uncounted)
        batch = {"input_ids": ids, "attention_mask": mask}
        if self._with_labels == "always" or (self._with_labels and not all(all(counts) for _, counts in encoded)):
            batch["labels"] = labels
        return batch

    def _encode(self, index: int) -> tuple[list[int], list[bool]]:
        """Token ids, and for each whether it counts."""
        record, place = self._records[index], self._place(index)
        if self.kind == "chat":
            ids, counts = self._encode_chat(record, place)
        elif self.kind == "completion":
            ids, counts = self._encode_completion(record, place)
        else:
            text = text_of(record, self._field, place)
            ids = self._tokens(text, self._field, place, truncation=True, max_length=self.max_length)
            counts = [True] * len(ids)
        ids, counts = ids[: self.max_length], counts[: self.max_length]
        largest = max(ids, default=0)
        if self._vocabulary is not None and largest >= self._vocabulary:
            token = self._tokenizer.convert_ids_to_tokens(largest)
            raise ValueError(
                f"data: {place}: field {self._field!r} holds {token!r}, token {largest}, but the model's embedding "
                f"ends with token {self._vocabulary - 1}; resize_token_embeddings and save the model, or take the "
                "tokenizer that belongs to it"
            )
        return ids, counts

    def _encode_chat(self, record: Mapping[str, Any], place: Place) -> tuple[list[int], list[bool]]:
        encoded = self._rendered(
            chat_of(record, self._field, place), record, self._field, place,
            return_assistant_tokens_mask=self._assistant_only,
        )  # fmt: skip
        ids = encoded["input_ids"]
        return ids, [bool(mark) for mark in encoded["assistant_masks"]] if self._assistant_only else [True] * len(ids)

    def _encode_completion(self, record: Mapping[str, Any], place: Place) -> tuple[list[int], list[bool]]:
        if isinstance(record.get("prompt"), (list, tuple)):
            prompt, completion = chat_of(record, "prompt", place), chat_of(record, "completion", place)
            before = self._rendered(prompt, record, "prompt", place, add_generation_prompt=True)["input_ids"]
            ids = self._rendered([*prompt, *completion], record, "completion", place)["input_ids"]
        else:
            text = text_of(record, "prompt", place)
            before = self._tokens(text, "prompt", place)
            ids = self._tokens(text + text_of(record, "completion", place), "completion", place)
        # Where prompt and completion meet, tokens may merge, and the prompt alone may end in a special token.
        shared = next((i for i, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), len(before))
        return ids, [i >= shared for i in range(len(ids))]

    def _tokens(self, text: str, field: str, place: Place, **options: Any) -> list[int]:
        try:
            ids: list[int] = self._tokenizer(text, **options)["input_ids"]
            return ids
        except Exception as error:
            raise ValueError(f"data: {place}: the tokenizer fails on field {field!r}: {reason(error)}") from error

    def _rendered(self, chat: Any, record: Mapping[str, Any], field: str, place: Place, **options: bool) -> Any:
        if self._tokenizer.chat_template is None:
            raise ValueError(f"data: {place}: it holds a chat, but the tokenizer has no chat template; pass one")
        given = {**template_arguments(record, place), **options}
        try:
            return self._tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, **given)
        except Exception as error:  # templates raise what they please
            raise ValueError(f"data: {place}: the chat template fails on field {field!r}: {reason(error)}") from error
