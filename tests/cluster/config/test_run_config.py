"""What the settings of a run name: models, paths and URLs."""

from __future__ import annotations

import pytest

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.jobs.ray_jobs import check_reachable

BODY = {"name": "far", "data": {"train": ["/a.txt", "s3://b/c"]}, "checkpoint": {"storage": "/runs"}}


def test_a_models_name_that_may_be_a_hub_id_is_no_place() -> None:
    config = RunConfig.model_validate({**BODY, "model": {"path": "gpt2", "lora": {"path": "/adapter"}}})
    assert config.model_names == {"model.path": "gpt2", "model.lora.path": "/adapter"}
    assert config.places == {
        "checkpoint.storage": "/runs",
        "data.train[0]": "/a.txt",
        "data.train[1]": "s3://b/c",
        "model.lora.path": "/adapter",
    }


@pytest.mark.parametrize(
    ("model", "key"),
    [({"path": "./here"}, r"model\.path"), ({"path": "gpt2", "lora": {"path": "./here"}}, r"model\.lora\.path")],
)
def test_a_model_that_other_machines_cannot_resolve(model: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} is '\./here', which each machine"):
        check_reachable(RunConfig.model_validate({**BODY, "model": model}))
