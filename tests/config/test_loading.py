"""Recipes, overrides, their order, and a one-line error for every mistake."""

import dataclasses
import importlib.resources
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu2_megatron.config import loading
from emu2_megatron.config.presets import PRESETS
from emu2_megatron.config.schema import Config, DataConfig, LoggingConfig, OptimizerConfig, ParallelConfig
from emu2_megatron.errors import ConfigError


@pytest.fixture
def recipe(tmp_path: Path):
    """Writes a recipe and returns its path."""

    def write(text: str) -> str:
        file = tmp_path / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        return str(file)

    return write


def error_of(name_or_file: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loading.load(name_or_file, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_empty_recipe_is_the_schema(recipe):
    assert loading.load(recipe("")) == Config()


def test_a_later_layer_wins(recipe):
    file = recipe("model: {preset: emu2_tiny, decoder: {num_layers: 6, vocab_size: 2000}}\ntraining: {steps: 7}")
    config = loading.load(file, ["model.decoder.num_layers=8", "training.steps=1", "training.steps=9"])
    tiny = PRESETS["emu2_tiny"]
    assert config.model.decoder.hidden_size == tiny.decoder.hidden_size  # from the preset
    assert config.model.encoder == tiny.encoder
    assert config.model.decoder.vocab_size == 2000  # YAML over the preset
    assert config.model.decoder.num_layers == 8  # override over YAML
    assert config.training.steps == 9  # the last override
    assert config.training.seed == Config().training.seed


def test_the_preset_is_found_in_overrides_then_yaml_then_the_schema(recipe):
    assert loading.load(recipe("")).model == PRESETS["emu2_37b"]
    file = recipe("model: {preset: emu2_tiny}")
    assert loading.load(file).model == PRESETS["emu2_tiny"]
    assert loading.load(file, ["model.preset=emu2_small"]).model == PRESETS["emu2_small"]


def test_every_preset_bears_its_own_name():
    assert {name: preset.preset for name, preset in PRESETS.items()} == {name: name for name in PRESETS}


def test_the_result_is_plain_and_frozen(recipe):
    config = loading.load(recipe("data: {shards: [a.tar, b.tar]}"), ["parallel.pipeline_layout=[1, 3]"])
    assert config.data.shards == ("a.tar", "b.tar") and type(config.data.shards) is tuple
    assert config.parallel.pipeline_layout == (1, 3) and type(config.parallel.pipeline_layout) is tuple
    assert type(config) is Config and type(config.data) is DataConfig
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.training.steps = 1  # type: ignore[misc]
    hash(config)


def test_a_section_with_nothing_in_it_sets_nothing(recipe):
    assert loading.load(recipe("training:\n  # steps: 7\n")) == Config()


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.decoder_lr=1e-3", 1e-3),
        ("optimizer.decoder_lr=1", 1.0),
        ("optimizer.warmup_steps=null", None),
        ("optimizer.warmup_steps=12", 12),
        ("training.train_encoder=true", True),
        ("logging.directory=1e3", "1e3"),  # the text of a string field is taken as it is
        ("logging.directory=a=b: [c", "a=b: [c"),
        ("logging.directory=", ""),
        ("logging.directory=null", "null"),
        ("parallel.pipeline_layout=null", None),
        ("data.shards=[a/*.tar, 'b, c.tar']", ("a/*.tar", "b, c.tar")),
        ("data.shards=[]", ()),
    ],
)
def test_overrides_are_read_by_the_type_of_the_field(recipe, override, value):
    section, _, field = override.partition("=")[0].partition(".")
    found = getattr(getattr(loading.load(recipe(""), [override]), section), field)
    assert found == value and type(found) is type(value)


def test_interpolations(recipe, monkeypatch):
    monkeypatch.setenv("SHARDS", "/data")
    file = recipe("data: {shards: ['${oc.env:SHARDS}/*.tar']}\ncheckpoint: {directory: '${logging.directory}/weights'}")
    config = loading.load(file, ["logging.directory=out"])
    assert config.data.shards == ("/data/*.tar",) and config.checkpoint.directory == "out/weights"


@pytest.mark.parametrize(
    ("yaml", "key", "said"),
    [
        ("model: {encoder: {image_sze: 1}}", "model.encoder.image_sze", "did you mean model.encoder.image_size?"),
        ("training: {stepz: 1}", "training.stepz", "did you mean training.steps?"),
        (
            "training: {stepz: 1}",
            "training.stepz",
            "keys of training: objective, steps, global_batch_size, micro_batch_size",
        ),
        ("steps: 1", "steps", "did you mean training.steps?"),
        ("trainin: {steps: 1}", "trainin", "did you mean training?"),
        ("data: {tensor_parallel_size: 1}", "data.tensor_parallel_size", "mean parallel.tensor_parallel_size?"),
        ("optimizer: {lr: 1}", "optimizer.lr", "keys of optimizer: decoder_lr"),
        ("nope: {deep: {er: 1}}", "nope", "keys of the configuration: model, data,"),
        ("data: {1: 2}", "data.1", "keys of data: shards"),
        ("hello", "hello", "keys of the configuration"),
    ],
)
def test_unknown_key(recipe, yaml, key, said):
    message = error_of(recipe(yaml))
    assert message.startswith(f"{key}: unknown key") and said in message and "recipe.yaml" in message


def test_the_wrong_suggestion_is_worse_than_none(recipe):
    assert "did you mean" not in error_of(recipe("optimizer: {lr: 1}"))


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("training: {steps: x}", "training.steps: 'x' given, int wanted"),
        ("training: {steps: 2.5}", "training.steps: 2.5 given, int wanted"),
        ("training: {steps: true}", "training.steps: true given, int wanted"),
        ("training: {steps: null}", "training.steps: null given, int wanted"),
        ("training: {steps: [1]}", "training.steps: [1] given, int wanted"),
        ("training: {steps: {a: 1}}", "training.steps: {'a': 1} given, int wanted"),
        ("training: {train_encoder: 5}", "training.train_encoder: 5 given, bool wanted"),
        ("training: {train_encoder: maybe}", "training.train_encoder: 'maybe' given, bool wanted"),
        ("optimizer: {decoder_lr: fast}", "optimizer.decoder_lr: 'fast' given, float wanted"),
        ("optimizer: {decoder_lr: true}", "optimizer.decoder_lr: true given, float wanted"),
        ("optimizer: {warmup_steps: 1.5}", "optimizer.warmup_steps: 1.5 given, int or null wanted"),
        ("data: {tokenizer: 007}", "data.tokenizer: 7 given, str wanted; quote it"),
        ("data: {tokenizer: null}", "data.tokenizer: null given, str wanted"),
        ("data: {tokenizer: '???'}", "data.tokenizer: '???' given, str wanted; '???' stands for a value"),
        ("data: {shards: a.tar}", "data.shards: 'a.tar' given, list of str wanted; write [A, B]"),
        ("data: {shards: null}", "data.shards: null given, list of str wanted"),
        ("data: {shards: [a, 3]}", "data.shards: [a, 3] given, list of str wanted"),
        ("data: {shards: [[a]]}", "data.shards: [[a]] given, list of str wanted"),
        ("data: {shards: {a: b}}", "data.shards: {'a': 'b'} given, list of str wanted"),
        ("parallel: {pipeline_layout: [1, x]}", "parallel.pipeline_layout: [1, x] given, list of int or null wanted"),
        ("parallel: {pipeline_layout: '${data.shards}'}", "parallel.pipeline_layout: '${data.shards}' given, list of"),
        ("parallel: 3", "parallel: 3 given, a section wanted; keys of parallel: tensor_parallel_size"),
        ("parallel: [1]", "parallel: [1] given, a section wanted"),
    ],
)
def test_wrong_type(recipe, yaml, said):
    message = error_of(recipe(yaml))
    assert message.startswith(said) and "recipe.yaml" in message


@pytest.mark.parametrize(
    ("yaml", "line", "said"),
    [
        ("data:\n  shards: [a\n", 3, "',' or ']'"),
        ("data:\n\ttokenizer: x", 2, "cannot start any token"),
        ("data: {}\ndata: {}", 2, "duplicate key data"),
        ("\na: *nowhere", 2, "undefined alias"),
        ("a: !!python/object:os.system 1", 1, "could not determine a constructor"),
    ],
)
def test_malformed_yaml_names_file_and_line(recipe, yaml, line, said):
    message = error_of(recipe(yaml))
    assert f"recipe.yaml, line {line}: " in message and said in message


@pytest.mark.parametrize("yaml", ["[1, 2]", "5", "data: \x00"])
def test_yaml_that_is_no_mapping(recipe, yaml):
    assert "recipe.yaml: " in error_of(recipe(yaml))


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml: not UTF-8" in error_of(str(tmp_path / "binary.yaml"))


def test_unknown_recipe_and_missing_file(tmp_path):
    assert error_of("stage3").startswith("unknown recipe 'stage3' (did you mean stage2?); recipes: stage2, tiny_all")
    missing = str(tmp_path / "missing.yaml")
    assert error_of(missing) == f"{missing}: No such file or directory; give a YAML file or one of: " + ", ".join(
        loading.recipes()
    )
    assert "Is a directory" in error_of(f"{tmp_path}/")


@pytest.mark.parametrize("given", ["emu2_tin", ""])
def test_unknown_preset(recipe, given):
    message = error_of(recipe(f"model: {{preset: '{given}'}}"))
    assert f"model.preset: unknown preset '{given}'" in message and "legal: emu2_37b, emu2_chat_37b" in message
    assert error_of(recipe("model: {preset: [1]}")).startswith("model.preset: unknown preset [1]")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.steps", "override 'training.steps': no '='; write KEY=VALUE"),
        ("=3", "'': a section, not a value"),
        ("training=3", "training: a section, not a value; keys of training: objective, steps"),
        ("trainin.steps=3", "trainin.steps: unknown key (did you mean training.steps?); keys of the configuration"),
        ("training.stepz=3", "training.stepz: unknown key (did you mean training.steps?)"),
        ("data.shards[0]=a", "data.shards[0]: unknown key (did you mean data.shards?)"),
        ("data.shards=[*.tar]", "data.shards: '[*.tar]' is not YAML, line 1"),
        ("training.steps=x", "training.steps: 'x' given, int wanted"),
        ("training.steps=", "training.steps: null given, int wanted"),
        ("training.steps=${", "training.steps: '${': "),
        ("data.tokenizer=${", "data.tokenizer: '${': "),
        ("data.tokenizer=${nowhere}", "data.tokenizer: Interpolation key 'nowhere' not found"),
        ("data.tokenizer=${data.shards}", "data.tokenizer: "),
    ],
)
def test_wrong_override(recipe, override, said):
    assert error_of(recipe(""), override).startswith(said)


@pytest.mark.parametrize("name", loading.recipes())
def test_recipes_load_and_come_back(recipe, name):
    config = loading.load(name)
    assert config != Config()
    assert loading.load(recipe(loading.to_yaml(config))) == config


def test_recipes_are_found_in_the_package():
    assert loading.recipes() == [
        "stage2",
        "tiny_all_kinds",
        "tiny_interleaved",
        "video_decoder",
        "video_decoder_tiny",
        "visual_decoder",
        "visual_decoder_tiny",
    ]
    folder = importlib.resources.files("emu2_megatron.config") / "recipes"
    assert [file.name for file in folder.iterdir() if not file.name.endswith(".yaml")] == []


# Line breaks and other control characters are left out: YAML folds or refuses some of them, and no path has them.
_text = st.text(st.characters(exclude_categories=("C", "Zl", "Zp"))).filter(lambda text: text != "???")
_tricky = st.sampled_from(
    ["007", "1e3", "yes", "null", "~", "2024-01-01", "0x1", "${a}", r"\${a}", r"x\\${a} \ y\\", "$"]
)
_size = st.integers(1, 10**6)
_number = st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=50)
@given(
    data=st.builds(
        DataConfig,
        shards=st.lists(_text | _tricky).map(tuple),
        weights=st.lists(_number).map(tuple),
        samples_per_step=st.lists(_size).map(tuple),
        tokenizer=_text | _tricky,
        sequence_length=_size,
        image_first_probability=_number,
        supervise_image_markers=st.booleans(),
    ),
    parallel=st.builds(
        ParallelConfig,
        _size,
        _size,
        _size,
        st.none() | st.lists(_size).map(tuple),
        _size,
        st.booleans(),
        st.booleans(),
        data_parallel_size=st.none() | _size,
    ),
    optimizer=st.builds(OptimizerConfig, *[_number] * 8, _text, _number, st.none() | _size, st.none() | _number),
    logging=st.builds(LoggingConfig, _text | _tricky),
    model=st.sampled_from(list(PRESETS.values())),
)
def test_any_configuration_comes_back(tmp_path_factory, data, parallel, optimizer, logging, model):
    config = Config(model=model, data=data, parallel=parallel, optimizer=optimizer, logging=logging)
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(loading.to_yaml(config), encoding="utf-8")
    assert loading.load(str(file)) == config
