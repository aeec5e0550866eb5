"""Settings are validated when they are built, and errors are reported in plain words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.save.save_schedule import SaveInterval
from outlast.cluster.config.run_config import RunConfig
from outlast.trainers.checks.resume_checks import check_unchanged
from outlast.trainers.config.base import Settings
from outlast.trainers.config.checkpoint import CheckpointSettings
from outlast.trainers.config.train import Exactness
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.config.validation_errors import _OTHER_NAMES, _settings, findings
from tests.support.groups.worker_group import tiny_config


def body(**sections: Any) -> dict[str, Any]:
    """A valid declaration with these sections merged in."""
    declared = tiny_config("run", "/runs", "/data.txt").model_dump(mode="json", exclude_defaults=True)
    for key, value in sections.items():
        declared[key] = {**declared.get(key, {}), **value} if isinstance(value, dict) else value
    return declared


def error_text(declared: dict[str, Any]) -> str:
    """Return the error text of an invalid declaration."""
    with pytest.raises(ValidationError) as caught:
        TrainingConfig.model_validate(declared)
    return "\n".join(str(item) for item in findings(caught.value, TrainingConfig))


def test_required_settings_are_few() -> None:
    config = TrainingConfig.model_validate(
        {"name": "a", "model": {"path": "gpt2"}, "data": {"train": "a.txt"}},
    )
    assert config.train.epochs == 3
    assert config.train.steps is None
    assert (config.train.batch, config.train.micro_batch) == (8, 4)
    assert (config.checkpoint.storage, config.checkpoint.keep_last) == ("./runs", 3)
    assert config.checkpoint.every == SaveInterval.parse("10m")
    assert config.exactness is Exactness.SAME_WORLD
    assert config.deterministic


def test_a_dump_can_be_loaded() -> None:
    config = TrainingConfig.model_validate(body())
    for exclude in (False, True):
        dumped = config.model_dump(mode="json", exclude_defaults=exclude)
        assert TrainingConfig.model_validate(dumped) == config


@pytest.mark.parametrize("every", [200, "200", "200 steps", "1 epoch", "2 epochs"])
def test_an_interval_is_parsed_once_and_dumped_as_it_was_written(every: int | str) -> None:
    """Claims of 0.1.0 hold the text, and are compared with it."""
    train = {"eval_every": every, "early_stopping": {"patience": 2}}
    config = TrainingConfig.model_validate(body(train=train))
    assert config.train.eval_every == SaveInterval.parse(every)
    assert config.numerics_settings()["train"]["eval_every"] == every


def test_enums_are_dumped_as_they_are_written() -> None:
    train = {"schedule": "inverse_sqrt", "precision": "bf16"}
    others = {"scale": {"parallel": "fsdp"}, "failure": {"non_finite": "roll-back"}, "data": {"prepare": "here"}}
    dumped = TrainingConfig.model_validate(body(train=train, exactness="fast", **others)).model_dump(mode="json")
    assert dumped["exactness"] == "fast"
    for block, settings in {"train": train, **others}.items():
        assert {name: dumped[block][name] for name in settings} == settings


def test_names_of_other_trainers_lead_to_settings_that_exist() -> None:
    known = set(_settings(RunConfig))
    assert set(_OTHER_NAMES.values()) <= known
    assert not {name for name in _OTHER_NAMES if any(path and path[-1] == name for path in known)}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"sed": 1}, "sed: unknown key; did you mean 'seed'?"),
        ({"train": {"learning": 1}}, "train.learning: unknown key; known: ['batch', 'betas',"),
        ({"train": {"micro_batchs": 1}}, "train.micro_batchs: unknown key; did you mean 'micro_batch'?"),
        ({"checkpoint": {"keep_lst": 2}}, "checkpoint.keep_lst: unknown key; did you mean 'keep_last'?"),
        (
            {"model": {"tokenizer": {"train_bep": 300}}},
            "model.tokenizer.train_bep: unknown key; did you mean 'train_bpe'?",
        ),
        ({"data": {"max_len": 9}}, "data.max_len: unknown key; did you mean 'max_length'?"),
        ({"train": {"learning_rate": 1e-4}}, "train.learning_rate: unknown key; did you mean 'lr'?"),
        ({"train": {"num_train_epochs": 1}}, "train.num_train_epochs: unknown key; did you mean 'epochs'?"),
        ({"train": {"save_steps": 9}}, "train.save_steps: unknown key; did you mean 'checkpoint.every'?"),
        ({"output_dir": "out"}, "output_dir: unknown key; did you mean 'checkpoint.storage'?"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(sections: dict[str, Any], message: str) -> None:
    assert message in error_text(body(**sections))


def test_all_findings_are_reported_at_once() -> None:
    lines = error_text(body(train={"lr": -1, "clip": -1}, checkpoint={"keep_last": 1}, sed=1)).splitlines()
    assert [line.split(":")[0] for line in lines] == ["train.lr", "train.clip", "checkpoint.keep_last", "sed"]


@pytest.mark.parametrize("name", ["..", "/", "", "x" * 64, "a/b", ".a", "a b", "a..b"])
def test_names_that_could_leave_the_storage_are_refused(name: str) -> None:
    assert error_text(body(name=name)).startswith(f"name: run name {name!r} is not usable")


@pytest.mark.parametrize("name", ["a", "x" * 63, "support-bot.v2_final"])
def test_valid_names(name: str) -> None:
    assert TrainingConfig.model_validate(body(name=name)).name == name


@pytest.mark.parametrize("every", [200, "200", "10m", "90s", "1 epoch", "2h"])
def test_intervals(every: str | int) -> None:
    config = TrainingConfig.model_validate(body(checkpoint={"every": every}))
    assert config.checkpoint.every == SaveInterval.parse(every)


@pytest.mark.parametrize("every", [0, -1, "often", "0.5 epoch", "10 min"])
def test_invalid_intervals(every: str | int) -> None:
    assert "is not an interval: write 200" in error_text(body(checkpoint={"every": every}))


@pytest.mark.parametrize(
    ("train", "micro_batch"),
    [
        ({"batch": 8}, 4),
        ({"batch": 6}, 2),
        ({"batch": 7}, 1),
        ({"batch": 2}, 2),
        ({"batch": 12}, 4),
        ({}, 4),
        ({"batch": 6, "micro_batch": 0}, 2),
        ({"batch": 6, "micro_batch": None}, 2),
        ({"batch": 6, "micro_batch": 6}, 6),
        ({"batch": "12"}, 4),
        ({"batch": 12.0}, 4),
    ],
)
def test_micro_batch_has_a_default(train: dict[str, Any], micro_batch: int) -> None:
    """Also when YAML or an override gives the batch as a text or as a float without a fraction."""
    declared = {**body(), "train": {"steps": 1, **train}}
    assert TrainingConfig.model_validate(declared).train.micro_batch == micro_batch


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"batch": 8, "micro_batch": 3}}, "train: micro_batch (3) must divide batch (8)"),
        ({"train": {"batch": 4, "micro_batch": 8}}, "train: micro_batch (8) must divide batch (4)"),
        ({"train": {"batch": 0}}, "train.batch: must be greater than or equal to 1"),
        ({"train": {"batch": "many"}}, "train.batch: must be a whole number"),
        ({"train": {"batch": 2.5}}, "train.batch: must be a whole number"),
        ({"train": {"steps": 10, "epochs": 1}}, "train: give steps or epochs, not both"),
        ({"train": {"steps": 0}}, "train.steps: must be greater than or equal to 1"),
        ({"train": {"lr": float("nan")}}, "train.lr: "),
        ({"train": {"precision": "fp8"}}, "train.precision: must be 'fp32', 'bf16' or 'fp16'"),
        ({"checkpoint": {"load_best": True}}, "checkpoint: load_best needs keep_best: 1 or more"),
        ({"checkpoint": {"keep_last": 1}}, "checkpoint.keep_last: must be greater than or equal to 2"),
        ({"checkpoint": {"keep_every": -1}}, "checkpoint.keep_every: must be greater than or equal to 0"),
        ({"checkpoint": {"metric_mode": "most"}}, "checkpoint.metric_mode: must be 'min' or 'max'"),
        ({"data": {"eval": None}}, "evaluation needs data.eval: a file, or a share such as 2%"),
        ({"data": {"eval": "0%"}}, "data.eval: '0%' is not a share: write 2%"),
        ({"data": {"eval": "100%"}}, "data.eval: '100%' is not a share: write 2%"),
        ({"data": {"eval": "few%"}}, "data.eval: 'few%' is not a share: write 2%"),
        ({"data": {"max_length": 1}}, "data.max_length: must be greater than or equal to 2"),
        ({"model": {"path": "gpt2"}}, "model: give either path (a pretrained model) or config (a new one)"),
        ({"model": {"config": {"n_layer": 2}}}, "model: config needs a model_type, such as gpt2 or llama"),
        ({"model": {"tokenizer": None}}, "model: a new model needs a tokenizer"),
        ({"model": {"tokenizer": {}}}, "model.tokenizer: give either train_bpe or path"),
        ({"model": {"tokenizer": {"train_bpe": 300, "path": "gpt2"}}}, "model.tokenizer: give either"),
        ({"model": {"tokenizer": {"train_bpe": 256}}}, "model.tokenizer.train_bpe: must be greater than or"),
        (
            {"model": {"class": "mine.Model"}},
            "model.class: 'mine.Model' is not a class path: write package.module:Class",
        ),
        ({"model": {"task": "masked-ml"}}, "model.task: unknown task 'masked-ml'; did you mean 'masked-lm'"),
        ({"seed": -1}, "seed: must be greater than or equal to 0"),
        ({"seed": 2**63}, "seed: must be less than"),
        ({"name": None}, "name: must be a text"),
        (
            {"data": {"labels": [False, "maybe"]}},
            "data.labels.0: must be a text (it is False); YAML reads no, off and false as false: put the word in",
        ),
        ({"data": {"text": True}}, 'YAML reads yes, on and true as true: put the word in quotes, such as "yes"'),
    ],
)
def test_invalid_settings(sections: dict[str, Any], message: str) -> None:
    assert message in error_text(body(**sections))


@pytest.mark.parametrize(
    ("text", "share"), [("2%", 0.02), ("12.5 %", 0.125), (" 2% ", 0.02), ("held_out.jsonl", None), (None, None)]
)
def test_a_share_of_the_rows(text: str | None, share: float | None) -> None:
    config = TrainingConfig.model_validate(body(data={"eval": text}, train={"eval_every": None}))
    assert config.data.eval_share == share


def test_relative_sources_are_relative_to_the_run_file() -> None:
    sources = ["part-*.jsonl", "/shared/more", "s3://bucket/a.csv"]
    declared = {**body(data={"train": sources, "eval": "held/out"}), "scale": {"workers": 1}}
    data = RunConfig.model_validate(declared).at_home(Path("/home/runs")).data
    assert data.train == ["/home/runs/part-*.jsonl", "/shared/more", "s3://bucket/a.csv"]
    assert data.eval == "/home/runs/held/out"
    assert list(data.places) == ["data.train[0]", "data.train[1]", "data.train[2]", "data.eval"]
    assert list(TrainingConfig.model_validate(body(data={"eval": "2%"})).data.places) == ["data.train"]


def test_what_stays_is_what_was_set() -> None:
    given = {"keep_last": 4, "keep_best": 2, "keep_every": 500, "metric": "eval_accuracy", "metric_mode": "max"}
    retention = TrainingConfig.model_validate(body(checkpoint=given)).checkpoint.retention
    assert {key: getattr(retention, key) for key in given} == given


def test_keeping_the_best_needs_evaluation() -> None:
    message = error_text(body(data={"eval": None}, train={"eval_every": None}, checkpoint={"keep_best": 1}))
    assert "evaluation needs data.eval" in message


def test_every_field_has_a_docstring() -> None:
    def undocumented(model: type[BaseModel]) -> list[str]:
        return [
            f"{model.__name__}.{name}"
            for name, field in model.model_fields.items()
            if not field.description
            and not (isinstance(field.annotation, type) and issubclass(field.annotation, Settings))
        ]

    blocks: list[type[BaseModel]] = [TrainingConfig, *Settings.__subclasses__()]
    assert [line for block in blocks for line in undocumented(block)] == []


def test_numerics_settings() -> None:
    """Exactly the settings that affect no number are left out."""
    config = TrainingConfig.model_validate(body())
    same: list[dict[str, Any]] = [
        {"name": "other"},
        {"checkpoint": {"keep_last": 5, "every": 1}},
        {"train": {"eval_every": 1}},
    ]
    same += [{"train": {"gradient_checkpointing": True}}, {"train": {"loss_scale": 2.0, "power": 3, "decay": 5}}]
    other: list[dict[str, Any]] = [
        {"seed": 1},
        {"train": {"lr": 1}},
        {"train": {"batch": 16}},
        {"exactness": "fast"},
        {"deterministic": False},
    ]
    for sections in same:
        assert TrainingConfig.model_validate(body(**sections)).numerics_settings() == config.numerics_settings()
    for sections in other:
        assert TrainingConfig.model_validate(body(**sections)).numerics_settings() != config.numerics_settings()


def test_settings_count_where_they_have_an_effect() -> None:
    for train, key in (
        ({"precision": "fp16"}, "loss_scale"),
        ({"precision": "fp16"}, "loss_scale_window"),
        ({"schedule": "polynomial"}, "power"),
        ({"schedule": "wsd"}, "decay"),
        ({"compile": True}, "gradient_checkpointing"),
    ):
        config, other = (
            TrainingConfig.model_validate(body(train={**train, **more})).numerics_settings()
            for more in ({}, {key: True if key == "gradient_checkpointing" else 7})
        )
        assert config != other


def test_declared_settings_without_effect_do_not_prevent_a_resume() -> None:
    config = TrainingConfig.model_validate(body())
    older = config.numerics_settings()
    older["train"] |= {"gradient_checkpointing": True, "loss_scale": 2.0, "power": 3.0, "decay": 0.5}
    check_unchanged({"mathematics": older, "data": "same"}, config, "same")


def test_more_steps_are_another_run_and_the_hint_names_the_way() -> None:
    base = {"mathematics": TrainingConfig.model_validate(body()).numerics_settings(), "data": "same"}
    longer = TrainingConfig.model_validate(body(train={"steps": 99}, checkpoint={"storage": "/runs"}))
    with pytest.raises(ConfigError, match=r"train\.steps was 10, is 99") as caught:
        check_unchanged(base, longer, "same")
    assert f"model: {{path: /runs/{longer.name}/model}}" in caught.value.hint


def test_a_changed_class_is_reported_under_its_alias() -> None:
    base = {
        "mathematics": TrainingConfig.model_validate(body(model={"class": "a:B"})).numerics_settings(),
        "data": "same",
    }
    with pytest.raises(ConfigError, match=r"model\.class was 'a:B', is 'a:C'"):
        check_unchanged(base, TrainingConfig.model_validate(body(model={"class": "a:C"})), "same")


def test_a_run_of_an_older_release_resumes() -> None:
    """Settings that the older release did not have count as their defaults."""
    lora = {"config": None, "tokenizer": None, "path": "/model", "lora": {"r": 4}}
    for sections, unknown in (
        ({}, [("deterministic",), ("train", "precision"), ("train", "betas"), ("train", "optimizer_options")]),
        ({}, [("model", "task"), ("model", "lora"), ("exactness",)]),
        ({"model": lora}, [("model", "lora", "dropout"), ("model", "lora", "target_modules")]),
    ):
        config = TrainingConfig.model_validate(body(**sections))
        base = {"mathematics": config.numerics_settings(), "data": "same"}
        for *blocks, key in unknown:
            block: Any = base["mathematics"]
            for name in blocks:
                block = block[name]
            del block[key]
        check_unchanged(base, config, "same")


@pytest.mark.parametrize(
    ("key", "unknown", "sections"),
    [
        ("train.precision was 'fp32', is 'bf16'", ("train", "precision"), {"train": {"precision": "bf16"}}),
        ("exactness was 'same-world', is 'fast'", ("exactness",), {"exactness": "fast"}),
        ("train.early_stopping.patience", ("train", "early_stopping"), {"train": {"early_stopping": {}}}),
        ("train.lr was 5e-05", ("train", "lr"), {"train": {"lr": 1e-2}}),
    ],
)
def test_settings_unknown_to_an_older_release_may_not_change(
    key: str, unknown: tuple[str, ...], sections: dict[str, Any]
) -> None:
    numerics_settings = TrainingConfig.model_validate(body()).numerics_settings()
    block = numerics_settings if len(unknown) == 1 else numerics_settings[unknown[0]]
    del block[unknown[-1]]
    with pytest.raises(ConfigError, match="was started with other settings") as caught:
        check_unchanged(
            {"mathematics": numerics_settings, "data": "same"}, TrainingConfig.model_validate(body(**sections)), None
        )
    assert key in caught.value.message


@pytest.mark.parametrize(
    ("body", "mode"),
    [
        ({}, "min"),
        ({"metric": "eval_loss"}, "min"),
        ({"metric": "eval_mse"}, "min"),
        ({"metric": "eval_accuracy"}, "max"),
        ({"metric": "eval_accuracy", "metric_mode": "min"}, "min"),
    ],
)
def test_the_metrics_name_determines_its_mode(body: dict[str, str], mode: str) -> None:
    assert CheckpointSettings.model_validate(body).retention.metric_mode == mode
