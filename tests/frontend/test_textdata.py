"""Data files become batches whose counted tokens are the right ones."""

import datasets
import pytest
import torch
from transformers import AutoTokenizer

from eva_lora.cli.datafiles import describe_files, read_records
from eva_lora.cli.textdata import TextBatches
from support.files import paragraphs, write_jsonl

TEXTS = paragraphs(7)


@pytest.fixture(scope="module")
def tokenizer(files):
    return AutoTokenizer.from_pretrained(files / "base")


def save(table, folder, kind):
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        return write_jsonl(path, table.to_list())
    if kind == "txt":
        path.write_text("\n".join(table["text"]), encoding="utf-8")
    elif kind == "folder":
        table.save_to_disk(str(path))
    elif kind == "tsv":
        table.to_csv(path, sep="\t")
    else:
        getattr(table, f"to_{kind}")(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "txt", "csv", "tsv", "parquet", "folder"])
def test_every_format_gives_the_same_records(kind, tmp_path):
    table = datasets.Dataset.from_dict({"text": TEXTS})
    records = read_records([save(table, tmp_path, kind)])
    assert records["text"] == TEXTS


def test_files_of_one_format_go_together_and_a_limit_cuts(tmp_path):
    parts = [write_jsonl(tmp_path / f"{i}.jsonl", [{"text": text}]) for i, text in enumerate(TEXTS)]
    assert read_records(parts)["text"] == TEXTS
    assert read_records(parts, limit=2)["text"] == TEXTS[:2]
    assert "7 records of " in describe_files(parts, 7)


def test_splits_of_a_saved_dataset(tmp_path):
    table = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "d"))
    assert len(read_records([tmp_path / "d"], split="test")) == 1
    with pytest.raises(ValueError, match=r"has no split 'dev'; it has \['test', 'train'\]"):
        read_records([tmp_path / "d"], split="dev")


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^data: there is no .*absent.jsonl"):
        read_records([tmp_path / "absent.jsonl"])
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^data: expected files of one format .*, got .*image.png"):
        read_records([tmp_path / "image.png"])
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    with pytest.raises(ValueError, match=r"broken.jsonl, line 1: expected a JSON object, got \{\"text\":$"):
        read_records([tmp_path / "broken.jsonl"])
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty.txt (holds no records|cannot be read)"):
        read_records([tmp_path / "empty.txt"])


def test_texts_are_padded_and_every_real_token_counts(tokenizer):
    records = [{"text": text} for text in TEXTS]
    batches = TextBatches(records, tokenizer, batch_size=3, max_length=16)
    assert len(batches) == len(list(batches)) == 3
    for start, batch in zip((0, 3, 6), batches, strict=True):
        assert set(batch) == {"input_ids", "attention_mask"}
        for row, record in enumerate(records[start : start + 3]):
            ids = tokenizer(record["text"])["input_ids"][:16]
            assert batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist() == ids
    assert batches.example()["input_ids"].shape == (3, 16)


def test_order_follows_the_seed_and_starts_again(tokenizer):
    records = [{"text": text} for text in TEXTS]

    def ids(seed):
        return [batch["input_ids"].tolist() for batch in TextBatches(records, tokenizer, batch_size=7, seed=seed)]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)
    assert sorted(map(tuple, ids(1)[0])) == sorted(map(tuple, ids(None)[0]))


def test_prompts_do_not_count(tokenizer):
    records = [{"prompt": "the value of ", "completion": text} for text in TEXTS]
    for batch, text in zip(TextBatches(records, tokenizer, batch_size=1), TEXTS, strict=True):
        counted = batch["labels"][0] != -100
        assert batch["input_ids"][0][counted].tolist() == tokenizer(text)["input_ids"]
        assert torch.equal(batch["labels"][0][counted], batch["input_ids"][0][counted])
    assert "labels" not in next(iter(TextBatches(records, tokenizer, with_labels=False)))
    other = next(iter(TextBatches(records, tokenizer, label_mask_value=-7)))
    assert (other["labels"] == -7).any()


def test_chats_are_rendered_by_the_template(tokenizer):
    chat = [{"role": "user", "content": "what is"}, {"role": "assistant", "content": TEXTS[0]}]
    [batch] = TextBatches([{"messages": chat}], tokenizer)
    rendered = f"<|user|> what is <|assistant|> {TEXTS[0]} "
    assert batch["input_ids"][0].tolist() == tokenizer(rendered)["input_ids"]
    [batch] = TextBatches([{"messages": chat}], tokenizer, assistant_only=True)
    assert batch["input_ids"][0][batch["labels"][0] != -100].tolist() == tokenizer(TEXTS[0])["input_ids"]
    [batch] = TextBatches([{"prompt": chat[:1], "completion": chat[1:]}], tokenizer)
    assert batch["input_ids"][0][batch["labels"][0] != -100].tolist() == tokenizer(TEXTS[0])["input_ids"]


def test_records_that_fit_no_rule_are_named(tokenizer, files):
    with pytest.raises(ValueError, match=r"^data: record 1: expected a field 'text'.*Fields: body, title"):
        TextBatches([{"title": "a", "body": "b"}], tokenizer)
    assert TextBatches([{"title": "a", "body": "b"}], tokenizer, text_field="body").kind == "text"
    with pytest.raises(ValueError, match=r"^text_field: expected a field of text, 'body' is none; fields: title$"):
        TextBatches([{"title": 3}], tokenizer, text_field="body")
    with pytest.raises(ValueError, match=r"^data: record 1: expected 'role' and 'content' in message 1"):
        TextBatches([{"messages": [{"from": "human", "value": "hello"}]}], tokenizer)
    plain = AutoTokenizer.from_pretrained(files / "base")
    plain.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        TextBatches([{"messages": [{"role": "user", "content": "a"}]}], plain)
    with pytest.raises(ValueError, match=r"^assistant_only: expected chats"):
        TextBatches([{"text": "a"}], tokenizer, assistant_only=True)
