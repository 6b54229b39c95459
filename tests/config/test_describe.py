"""Every field is documented, and the documentation is what the schema says."""

import dataclasses

from emu2_megatron.config import describe
from emu2_megatron.config.schema import Config


def leaves(value, prefix=""):
    """An independent walk over an instance: `{dotted key: value}`."""
    found = {}
    for field in dataclasses.fields(value):
        item, key = getattr(value, field.name), f"{prefix}{field.name}"
        found |= leaves(item, f"{key}.") if dataclasses.is_dataclass(item) else {key: item}
    return found


def test_every_field_has_a_docstring():
    documented = describe.documentation()
    fields = {
        (section.__name__, f.name) for section in describe.sections().values() for f in dataclasses.fields(section)
    }
    assert fields <= documented.keys()
    assert [place for place, doc in documented.items() if not doc] == []


def test_every_field_is_described_once_with_its_default():
    assert {entry.key: entry.default for entry in describe.describe()} == leaves(Config())
    assert len(describe.describe()) == len(leaves(Config()))


def test_types_in_words():
    types = {entry.key: entry.type for entry in describe.describe()}
    assert types["training.steps"] == "int"
    assert types["training.train_encoder"] == "bool"
    assert types["data.shards"] == "list of str"
    assert types["parallel.pipeline_layout"] == "list of int or null"
    assert types["optimizer.warmup_ratio"] == "float or null"


def test_a_docstring_of_two_lines_is_one_sentence():
    entry = next(entry for entry in describe.describe() if entry.key == "model.decoder.make_vocab_size_divisible_by")
    assert entry.doc.endswith("Padding never gets probability and never leaves the engine.")


def test_help_shows_every_key_as_an_override():
    text = describe.help_text()
    lines = text.splitlines()
    for entry in describe.describe():
        assert f"  {entry.key}={describe.yaml_value(entry.default)}  ({entry.type})" in lines
    assert "  parallel.pipeline_layout=null  (list of int or null)" in lines
    assert "  data.shards=[]  (list of str)" in lines
    assert "Peak learning rate of the language model." in text
    assert "\noptimizer: AdamW and its schedule.\n" in text
    assert max(map(len, lines)) <= 120
