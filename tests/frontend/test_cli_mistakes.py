"""A table of mistakes that people make: each ends in one sentence that names what is wrong, before the weights load."""

import json
import shutil
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
)

from eva_lora.cli import main
from eva_lora.cli.datafiles import Place
from eva_lora.cli.pretrained import Pretrained
from eva_lora.cli.textdata import TextBatches
from support.files import paragraphs, save_tiny_model, write_jsonl
from support.models import tiny_llama

TEXTS = paragraphs(6)
TEXT = {"text": TEXTS[0]}
USER, ASSISTANT = {"role": "user", "content": "what is"}, {"role": "assistant", "content": TEXTS[1]}
CHAT = {"messages": [USER, ASSISTANT]}
PAIR = {"prompt": "the value", "completion": TEXTS[2]}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}
REFUSED, WRONG_USAGE = 1, 2


ADAPTERS = ("run/adapter", "no base", "base gone", "damaged adapter", "ia3")


@dataclass
class Mistake:
    """What is given, and what is said: ``{here}`` is the folder of the data, ``{models}`` that of the models."""

    name: str
    says: str
    files: dict[str, Any] = field(default_factory=lambda: {"data.jsonl": [TEXT] * 8})
    model: str = "base"
    options: tuple[str, ...] = ()
    code: int = REFUSED
    data: tuple[str, ...] = ()  # what --data names; the files, if nothing else


def of_records(name, says, records, *options, **more):
    return Mistake(name, says, {"data.jsonl": records}, options=options, **more)


FILES = [
    Mistake("an empty file", "data: {here}/data.jsonl holds no records", {"data.jsonl": ""}),
    Mistake("nothing but blank lines", "data: {here}/data.jsonl holds no records", {"data.jsonl": "\n\n"}),
    Mistake(
        "an empty file beside another", "data: {here}/b.jsonl holds no records", {"a.jsonl": [TEXT], "b.jsonl": ""}
    ),
    Mistake("an empty text file", "data: {here}/data.txt holds no records", {"data.txt": ""}),
    Mistake(
        "a line cut off",
        'data: {here}/data.jsonl, line 2: expected a JSON object, got {{"text": "',
        {"data.jsonl": '{"text": "a b"}\n{"text": "\n{"text": "c"}\n'},
    ),
    Mistake(
        "a line that is a list",
        "data: {here}/b.jsonl, line 2: expected a JSON object, got [1, 2]",
        {"a.jsonl": [TEXT], "b.jsonl": '{"text": "a"}\n[1, 2]\n'},
    ),
    Mistake(
        "text for JSON", "data: {here}/data.json, line 1: expected a JSON object, got a b", {"data.json": "a b\nc"}
    ),
    Mistake(
        "bytes for JSON", "data: {here}/data.jsonl, line 1: expected a JSON object, got", {"data.jsonl": b"\xff\0\1"}
    ),
    Mistake("bytes for a table", "data: {here}/data.parquet cannot be read as parquet: ", {"data.parquet": b"PAR1 no"}),
    Mistake("bytes for text", "data: {here}/data.txt cannot be read as text: ", {"data.txt": b"a\xff\xfe\n"}),
    Mistake(
        "two formats",
        "data: expected files of one format (",
        {"a.jsonl": [TEXT], "b.txt": "a b c"},
    ),
    Mistake("a folder of files", "data: {here} is no folder saved by datasets", {"a.jsonl": [TEXT]}, data=("{here}",)),
    Mistake("a folder among files", "data: expected files of one format (", data=("{here}", "{here}/data.jsonl")),
    Mistake("no such file", "data: there is no {here}/absent.jsonl", data=("{here}/absent.jsonl",)),
]

RECORDS = [
    of_records(
        "null", "{here}/data.jsonl, record 3: expected text in field 'text', got null", [TEXT, TEXT, {"text": None}]
    ),
    of_records(
        "null at first", "{here}/data.jsonl, record 1: expected a field 'text'", [{"text": None, "id": "a"}, TEXT]
    ),
    of_records(
        "another field",
        "record 2: expected text in field 'text', got null. Fields: body, text (null)",
        [TEXT, {"body": "a"}],
    ),
    of_records("a number", "record 1: expected text in field 'text', got 3", [{"text": 3}]),
    of_records("a list", "record 1: expected text in field 'text', got ['a', 'b']", [{"text": ["a", "b"]}]),
    Mistake("a column of numbers", "record 1: expected text in field 'text', got 3", {"data.csv": "text\n3\n4\n"}),
    Mistake(
        "an empty cell",
        "{here}/data.csv, record 2: expected text in field 'text', got null",
        {"data.csv": "id,text\n1,a b\n2,\n"},
    ),
    Mistake(
        "null in the second file",
        "data: {here}/b.jsonl, record 2: expected text in field 'text', got null",
        {"a.jsonl": [TEXT] * 3, "b.jsonl": [TEXT, {"text": None}]},
    ),
    Mistake(
        "mixed kinds of files",
        "data: expected files of the same fields, {here}/a.jsonl has text, {here}/b.jsonl has messages",
        {"a.jsonl": [TEXT] * 3, "b.jsonl": [CHAT]},
    ),
    of_records(
        "mixed kinds", "record 2: expected text in field 'text', got null. Fields: messages, text (null)", [TEXT, CHAT]
    ),
    of_records(
        "mixed the other way", "record 2: expected a list of messages in field 'messages', got null", [CHAT, TEXT]
    ),
    of_records(
        "two fields of text", "record 1: expected a field 'text', 'messages', or", [{"title": "a", "body": "b"}]
    ),
    of_records("tokens", "record 1: expected a field 'text', 'messages', or", [{"input_ids": [1, 2]}]),
    of_records(
        "no such text field",
        "text_field: expected a field of text, 'body' is none; fields: text",
        [TEXT],
        "--text-field",
        "body",
    ),
    of_records(
        "a text field of numbers",
        "record 1: expected text in field 'n', got 3",
        [{"n": 3, "text": "a"}],
        "--text-field",
        "n",
    ),
    of_records(
        "a completion of null",
        "record 2: expected text in field 'completion', got null",
        [PAIR, {**PAIR, "completion": None}],
    ),
    of_records(
        "no completion",
        "record 1: expected a field 'text', 'messages', or 'prompt' and 'completion'",
        [{"prompt": "a"}],
    ),
    of_records("no prompt", "record 2: expected text in field 'prompt', got null", [PAIR, {"completion": "a"}]),
    of_records(
        "half a chat",
        "record 1: expected a list of messages in field 'completion', got 'a'",
        [{"prompt": [USER], "completion": "a"}],
    ),
    of_records("--assistant-only without a chat", "assistant_only: expected chats", [TEXT], "--assistant-only"),
]

NO_CONTENT = {"role": "assistant", "content": None}
CHATS = [
    of_records(
        "an empty chat", "record 2: expected a list of messages in field 'messages', got []", [CHAT, {"messages": []}]
    ),
    of_records(
        "a chat of text",
        "record 1: expected a list of messages in field 'messages', got 'hello'",
        [{"messages": "hello"}],
    ),
    of_records(
        "from and value",
        "record 1: expected 'role' and 'content' in message 1 of field 'messages', got {{'from'",
        [{"messages": [{"from": "human", "value": "a"}]}],
    ),
    of_records(
        "messages of text",
        "record 1: expected 'role' and 'content' in message 1 of field 'messages', got 'a'",
        [{"messages": ["a", "b"]}],
    ),
    of_records(
        "no role",
        "record 1: expected 'role' and 'content' in message 2",
        [{"messages": [USER, {"role": None, "content": "a"}]}],
    ),
    of_records(
        "null content",
        "record 2: expected text as 'content' of message 2 of field 'messages', got null",
        [CHAT, {"messages": [USER, NO_CONTENT]}],
    ),
    of_records(
        "content of a number",
        "record 1: expected text as 'content' of message 1 of field 'messages', got 3",
        [{"messages": [{"role": "user", "content": 3}]}],
    ),
    of_records(
        "tools of bad JSON",
        "record 2: field 'tools' is text, but no JSON: ",
        [{**CHAT, "tools": "[]"}, {**CHAT, "tools": "[{"}],
    ),
    of_records(
        "tools of names",
        "record 1: expected a list of JSON schemas in field 'tools', got ['look']",
        [{**CHAT, "tools": ["look"]}],
    ),
    of_records(
        "arguments of text",
        "record 1: expected an object in field 'chat_template_kwargs', got 'think'",
        [{**CHAT, "chat_template_kwargs": "think"}],
    ),
    of_records(
        "an argument of rendering itself",
        "record 1: the chat template fails on field 'messages': TypeError",
        [{**CHAT, "chat_template_kwargs": {"tokenize": False}}],
    ),
    of_records(
        "no template", "record 1: it holds a chat, but the tokenizer has no chat template", [CHAT], model="no template"
    ),
    of_records(
        "a template that refuses",
        "{here}/data.jsonl, record 2: the chat template fails on field 'messages': TemplateError: users and assistants",
        [CHAT, {"messages": [USER, USER]}],
        model="strict template",
    ),
    of_records(
        "a template that refuses a prompt",
        "record 1: the chat template fails on field 'prompt': TemplateError",
        [{"prompt": [USER, USER], "completion": [ASSISTANT]}],
        model="strict template",
    ),
    of_records(
        "a template without calls",
        "record 1: the chat template fails on field 'messages': ",
        [{"messages": [USER, {**NO_CONTENT, "tool_calls": [CALL]}]}],
        model="joining template",
    ),
    of_records("a template that is none", "chat_template: line 1: ", [CHAT], "--chat-template", "{here}/bad.jinja"),
    of_records(
        "a template of bytes",
        "chat_template: {here}/bytes.jinja is no text in UTF-8",
        [CHAT],
        "--chat-template",
        "{here}/bytes.jinja",
    ),
]

MODELS = [
    Mistake("no such model", "model: {models}/absent does not load: ", model="absent"),
    Mistake(
        "a short context",
        "max_length: expected at most 64, the positions that the model has, got 65",
        model="gpt2",
        options=("--max-length", "65"),
    ),
    Mistake(
        "a pad token beyond",
        "tokenizer: it pads with '<extra>', token 97, but the model's embedding ends with token 96",
        model="pad beyond",
    ),
    Mistake(
        "a vocabulary beyond",
        "record 2: field 'text' holds '<extra>', token 97, but the model's embedding ends with token 96",
        {"data.jsonl": [TEXT, {"text": "the <extra> of"}]},
        model="more tokens",
    ),
    Mistake("no tokenizer", "model: {models}/no tokenizer has no tokenizer that loads: ", model="no tokenizer"),
    Mistake(
        "a damaged tokenizer",
        "model: {models}/damaged tokenizer has no tokenizer that loads: ",
        model="damaged tokenizer",
    ),
    Mistake("a damaged config", "model: {models}/damaged config does not load: ", model="damaged config"),
    Mistake("a config of another kind", "model: {models}/unknown kind does not load: ", model="unknown kind"),
    Mistake(
        "code of its own",
        "model: {models}/own code brings code of its own, which runs only with --trust-remote-code",
        model="own code",
    ),
    Mistake(
        "code that is not there",
        "model: {models}/own code does not load: ",
        model="own code",
        options=("--trust-remote-code",),
    ),
    Mistake("an encoder-decoder", "model: {models}/t5 is an encoder-decoder; call", model="t5"),
    Mistake(
        "a folder that init wrote",
        "model: {models}/run is no model, but holds adapters: adapter, lora; name one of them",
        model="run",
    ),
    Mistake(
        "an adapter without a base", "model: {models}/no base is an adapter that names no base model", model="no base"
    ),
    Mistake("an adapter whose base is gone", "model: {models}/gone does not load: ", model="base gone"),
    Mistake("an adapter that is damaged", "model: {models}/damaged adapter does not load: ", model="damaged adapter"),
    Mistake("another kind of adapter", "model: expected a LoRA adapter, {models}/ia3 is", model="ia3"),
    Mistake(
        "an adapter and options",
        "model: {models}/run/adapter is an adapter with its own LoraConfig",
        model="run/adapter",
        options=("--rank", "8"),
    ),
    Mistake(
        "unknown targets",
        "target_modules: expected names of modules, the model has no 'nope'; it has ",
        options=("--target-modules", "nope"),
    ),
    Mistake(
        "one unknown target of two",
        "target_modules: expected names of modules, the model has no 'q_porj'; it has ",
        options=("--target-modules", "q_porj,v_proj"),
    ),
    Mistake(
        "targets of another kind",
        "target_modules: Target module LlamaRMSNorm",
        options=("--target-modules", "input_layernorm"),
    ),
    Mistake("no such device", "device: 'warp' cannot be used: ", options=("--device", "warp")),
    Mistake("a device without values", "device: 'meta' cannot be used: ", options=("--device", "meta")),
    Mistake(
        "a seed of many digits",
        "--seed: expected an integer of 64 bits",
        options=("--seed", str(2**80)),
        code=WRONG_USAGE,
    ),
    Mistake("an alpha of nothing", "expected a positive number, got 0.0", options=("--alpha", "0"), code=WRONG_USAGE),
    Mistake(
        "an alpha that is none", "expected a positive number, got nan", options=("--alpha", "nan"), code=WRONG_USAGE
    ),
    Mistake(
        "no target",
        "--target-modules: expected names of modules, got none",
        options=("--target-modules", ","),
        code=WRONG_USAGE,
    ),
    Mistake("no such dtype", "dtype: expected 'auto' or a floating dtype", options=("--dtype", "int8")),
    Mistake(
        "an output below a file",
        "--output: {here}/data.jsonl/run cannot be made in {here}/data.jsonl",
        options=("--output", "{here}/data.jsonl/run"),
        code=WRONG_USAGE,
    ),
]

#: What only the layers' ranks can show; ``--dry-run`` finds it, too.
RANKS = [
    Mistake("ranks of too much", "min_rank: expected at most 4, the most that", options=("--min-rank", "1000")),
    Mistake("ranks of too little", "budget: expected at most the 21 components", options=("--max-rank", "1")),
]

#: What only the weights or the first batch can show; ``--dry-run`` finds those whose sentence it is given.
LATER = [
    *((mistake, mistake.says) for mistake in RANKS),
    (Mistake("damaged weights", "model: {models}/damaged weights does not load: ", model="damaged weights"), None),
    (Mistake("weights of another size", "model: {models}/other size does not load: ", model="other size"), None),
    (
        Mistake("no pad token for batches of a classifier",
                "model: {models}/classifier fails, without EVA too, on the batch of {here}/data.jsonl, record ",
                model="classifier"),
        "model: its forward cannot be rehearsed: ",
    ),
]  # fmt: skip


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of models, most of them with something wrong."""
    folder = tmp_path_factory.mktemp("models")
    base = save_tiny_model(folder / "base")

    def tokenizer():
        return AutoTokenizer.from_pretrained(base)

    def extended(name, **special):
        extended = tokenizer()
        extended.add_special_tokens(special)
        save(tiny_llama(), extended, folder / name)

    def copied(name, damaged="", content=b""):
        shutil.copytree(base, folder / name)
        if damaged:
            (folder / name / damaged).write_bytes(content)
        return folder / name

    extended("pad beyond", pad_token="<extra>")
    extended("more tokens", additional_special_tokens=["<extra>"])
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=1, n_head=4))
    save(gpt2, tokenizer(), folder / "gpt2")
    save(tiny_llama(), None, folder / "no tokenizer")
    nameless = tokenizer()
    nameless.pad_token = nameless.eos_token = None
    save(tiny_llama(), nameless, folder / "no pad or eos")
    save(tiny_llama(), with_template(tokenizer(), None), folder / "no template")
    strict = (
        "{% for m in messages %}{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
        "{{ raise_exception('users and assistants take turns') }}{% endif %}{{ m.content }} {% endfor %}"
    )
    save(tiny_llama(), with_template(tokenizer(), strict), folder / "strict template")
    joining = "{% for m in messages %}{{ m.role + ' ' + m.content }} {% endfor %}"
    save(tiny_llama(), with_template(tokenizer(), joining), folder / "joining template")
    telling = (
        "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
        "{% for d in documents or [] %}{{ d.text }} {% endfor %}{% if enable_thinking %}the {% endif %}"
        "{% for m in messages %}{{ m.content or '' }} {% for c in m.tool_calls or [] %}{{ c.function.name }} "
        "{% endfor %}{% endfor %}"
    )
    save(tiny_llama(), with_template(tokenizer(), telling), folder / "telling template")

    copied("damaged tokenizer", "tokenizer.json", b"{}")
    copied("damaged config", "config.json", b'{"model_type": ')
    copied("unknown kind", "config.json", b'{"model_type": "nonesuch"}')
    config = json.loads((base / "config.json").read_text())
    auto = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    copied("own code", "config.json", json.dumps({**config, "model_type": "own", "auto_map": auto}).encode())
    copied("damaged weights", "model.safetensors", b"\0" * 100)
    copied("other size", "config.json", json.dumps({**config, "vocab_size": 101}).encode())
    (folder / "t5").mkdir()
    T5Config(d_model=32, num_layers=1, vocab_size=97).save_pretrained(folder / "t5")

    lora = LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path=str(base))
    for place in ("run/adapter", "run/lora"):
        lora.save_pretrained(folder / place)
    LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(folder / "no base")
    lora.base_model_name_or_path = str(folder / "gone")
    lora.save_pretrained(folder / "base gone")
    (folder / "damaged adapter").mkdir()
    (folder / "damaged adapter" / "adapter_config.json").write_text("[]")
    other = get_peft_model(tiny_llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    other.peft_config["default"].save_pretrained(folder / "ia3")

    llama = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    save(LlamaForSequenceClassification(llama), tokenizer(), folder / "classifier")
    return folder


def run(mistake, models, here, *options):
    for name, content in mistake.files.items():
        if isinstance(content, list):
            write_jsonl(here / name, content)
        else:
            (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (here / "bad.jinja").write_text("{% for m in %}")
    (here / "bytes.jinja").write_bytes(b"\xff\xfe")
    data = [path.format(here=here) for path in mistake.data] or [str(here / name) for name in mistake.files]
    command = ["init", str(models / mistake.model), *(part for path in data for part in ("--data", path))]
    rank = [] if mistake.model in ADAPTERS else ["--rank", "2"]
    given = [option.format(here=here) for option in mistake.options]
    # What comes later counts: an option of the mistake's own replaces one of these.
    return CliRunner().invoke(main, [*command, *rank, "--max-batches", "4", "--quiet", *options, *given])


def sentence(text, models, here):
    return text.format(models=models, here=here)


@pytest.fixture
def no_weights(monkeypatch):
    def load(self):
        raise AssertionError("the weights are not needed to know this")

    monkeypatch.setattr(Pretrained, "load", load)


@pytest.mark.parametrize("dry", [True, False], ids=["dry run", "init"])
@pytest.mark.parametrize("mistake", [*FILES, *RECORDS, *CHATS, *MODELS], ids=lambda mistake: mistake.name)
def test_mistakes_are_named_before_the_weights_load(mistake, dry, models, tmp_path, no_weights):
    here, output = tmp_path / "data", tmp_path / "run"
    here.mkdir()
    done = run(mistake, models, here, *(["--dry-run"] if dry else ["--output", str(output)]))
    assert done.exit_code == mistake.code, done.output
    assert sentence(mistake.says, models, here) in done.output
    assert "Traceback" not in done.output
    assert "bug" not in done.output
    assert not output.exists()


@pytest.mark.parametrize(("mistake", "rehearsed"), LATER, ids=lambda value: getattr(value, "name", ""))
def test_mistakes_that_only_weights_or_batches_show_are_named(mistake, rehearsed, models, tmp_path):
    done = run(mistake, models, tmp_path, "--output", str(tmp_path / "run"))
    assert done.exit_code == mistake.code, done.output
    assert sentence(mistake.says, models, tmp_path) in done.output
    assert "Traceback" not in done.output
    done = run(mistake, models, tmp_path, "--dry-run")
    assert done.exit_code == (0 if rehearsed is None else REFUSED), done.output
    assert (rehearsed or "") in done.output


def test_an_error_of_ours_stays_a_bug(models, tmp_path, monkeypatch):
    """The model alone can be fed this batch: what fails is not the user's."""
    from eva_lora.collecting.run import Run

    monkeypatch.setattr(Run, "finish_batch", lambda *_: {}["absent"])
    done = run(Mistake("none", ""), models, tmp_path, "--output", str(tmp_path / "run"))
    assert done.exit_code == 70
    assert "please report it" in done.output


# --- what is no mistake


def rows(encoded):
    return [batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
            for batch in encoded for row in range(len(batch["input_ids"]))]  # fmt: skip


def test_a_context_shorter_than_the_default_cuts_records(models, tmp_path):
    done = run(Mistake("none", "", model="gpt2"), models, tmp_path, "--output", str(tmp_path / "run"))
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert "x 64 tokens" in report["run"]["batches"]


def test_without_a_pad_or_eos_token_any_will_do(models, tmp_path):
    """It is masked: every record's own tokens are all that counts."""
    done = run(Mistake("none", "", model="no pad or eos"), models, tmp_path, "--output", str(tmp_path / "run"))
    assert done.exit_code == 0, done.output
    tokenizer = AutoTokenizer.from_pretrained(models / "no pad or eos")
    records = [{"text": text} for text in TEXTS]
    [batch] = TextBatches(records, tokenizer, batch_size=6, vocabulary=97)
    assert rows([batch]) == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_a_pad_token_beyond_the_embedding_does_not_matter_to_single_records(models, tmp_path):
    done = run(Mistake("none", "", model="pad beyond"), models, tmp_path, "--dry-run", "--batch-size", "1")
    assert done.exit_code == 0, done.output


def test_tokens_that_no_record_holds_may_be_beyond_the_embedding(models, tmp_path):
    done = run(Mistake("none", "", model="more tokens"), models, tmp_path, "--dry-run")
    assert done.exit_code == 0, done.output


def test_records_that_no_batch_will_hold_may_be_anything(models, tmp_path):
    files = {"data.jsonl": [TEXT] * 16 + [{"text": None}]}  # four batches of four
    done = run(Mistake("none", "", files), models, tmp_path, "--dry-run", "--no-shuffle")
    assert done.exit_code == 0, done.output
    done = run(Mistake("none", "", files), models, tmp_path, "--dry-run", "--no-shuffle", "--max-batches", "5")
    assert done.exit_code == REFUSED


CALLING = {"messages": [USER, {**NO_CONTENT, "tool_calls": [CALL]}, {"role": "tool", "content": "a"}, ASSISTANT]}


@pytest.mark.parametrize(
    "record",
    [
        CALLING,
        {**CALLING, "tools": [TOOL]},
        {**CALLING, "tools": json.dumps([TOOL])},
        {**CHAT, "chat_template_kwargs": {"enable_thinking": True}},
        {**CHAT, "chat_template_kwargs": {"documents": [{"title": "a", "text": "an object"}]}},
        {
            "prompt": [USER],
            "completion": [ASSISTANT],
            "tools": [TOOL],
            "chat_template_kwargs": {"enable_thinking": True},
        },
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ASSISTANT]},
    ],
    ids=["calls", "tools", "tools as JSON", "thinking", "documents", "completion", "parts"],
)
def test_templates_are_given_what_training_would_give_them(record, models, tmp_path):
    """Against the tokens that TRL's SFTTrainer makes of the same record."""
    data_utils = pytest.importorskip("trl.data_utils")
    tokenizer = AutoTokenizer.from_pretrained(models / "telling template")
    tools = record.get("tools")
    given = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **record.get("chat_template_kwargs", {}),
    }
    messages = record["messages"] if "messages" in record else record["prompt"] + record["completion"]
    expected = data_utils._tokenize(tokenizer, messages, **given)["input_ids"]
    assert rows(TextBatches([record], tokenizer)) == [expected]
    plain = data_utils._tokenize(tokenizer, messages)["input_ids"]
    assert (expected != plain) == any(given.values())  # the template says what it was given
    done = run(of_records("none", "", [record] * 4, model="telling template"), models, tmp_path, "--dry-run")
    assert done.exit_code == 0, done.output


def test_fields_that_a_template_takes_but_training_would_not_give_it_are_named(models, tmp_path):
    records = [{**CHAT, "documents": [{"text": "a"}], "enable_thinking": True, "id": "a"}] * 4
    done = run(of_records("none", "", records, model="telling template"), models, tmp_path, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "warning: EVA renders chats without 'documents', 'enable_thinking', which the template takes" in done.output


# --- what the checks rest on

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 32, "max_position_embeddings": 12}
GPT = {"vocab_size": 97, "n_positions": 12, "n_embd": 32, "n_layer": 1, "n_head": 4}
POSITIONS = {
    "GPT-2": (GPT2LMHeadModel, GPT2Config(**GPT), 12),
    "GPT-J": (GPTJForCausalLM, GPTJConfig(**GPT, rotary_dim=4), 12),
    "OPT": (OPTForCausalLM, OPTConfig(**SIZES, max_position_embeddings=12, word_embed_proj_dim=32, ffn_dim=32), 12),
    "BERT": (BertModel, BertConfig(**WIDE), 12),
    "RoBERTa": (RobertaModel, RobertaConfig(**{**WIDE, "max_position_embeddings": 14}), 12),  # from 2 on
    "CLIP": (CLIPTextModel, CLIPTextConfig(**WIDE, eos_token_id=2), 12),
    "Llama": (LlamaForCausalLM, LlamaConfig(**WIDE), None),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_limits_are_where_the_model_itself_fails(name, tmp_path):
    make, config, context = POSITIONS[name]
    model = make(config).eval()
    model.save_pretrained(tmp_path)
    limits = Pretrained(str(tmp_path)).limits()
    assert (limits.vocabulary, limits.context) == (97, context)

    def fails(num_tokens, token=5):
        try:
            with torch.no_grad():
                model(torch.full((1, num_tokens), token))
        except (IndexError, RuntimeError, ValueError):
            return True
        return False

    assert not fails(12)
    assert fails(13) == (context is not None)
    assert not fails(3, token=96)
    assert fails(3, token=97)


def test_places_count_through_files(tmp_path):
    paths = tuple(write_jsonl(tmp_path / f"{i}.jsonl", [TEXT] * size) for i, size in enumerate((3, 1, 2)))
    assert [str(Place(index, paths)) for index in (0, 2, 3, 4, 5)] == [
        f"{paths[file]}, record {number}" for file, number in ((0, 1), (0, 3), (1, 1), (2, 1), (2, 2))
    ]
    assert str(Place(4)) == "record 5"
