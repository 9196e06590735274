"""What the configuration says of a registry, seen from the composition."""

from typing import Any

import pytest

from app.config import ModelConfig, load_settings
from app.engine.model_source import LoadSpec
from app.errors import ConfigError
from app.model_builder import registered_models


def models(name: str = "models/tiny-chat", source: str = "local", **sections: Any) -> object:
    config = ModelConfig.model_validate({"name": name, "source": source})
    return registered_models(
        load_settings("no-such-file.yml", None, **sections), [LoadSpec(name="chat", config=config)]
    )


@pytest.mark.parametrize(
    ("name", "sections", "message"),
    [
        ("models:/chat", {"mlflow_tracking_uri": "http://a.test"}, "model.name: must be models:/name/version"),
        ("chat", {"mlflow_tracking_uri": "http://a.test"}, "model.name: must be models:/name/version"),
        ("models:/chat/1", {}, "mlflow.tracking_uri: is needed by source: mlflow"),
        ("models:/chat/1", {"mlflow_tracking_uri": "sqlite:///x"}, "mlflow.tracking_uri: must begin with http://"),
        ("models:/chat/1", {"mlflow_tracking_uri": "http://me:canary@a.test"}, "must hold no name or password"),
    ],
)
def test_a_model_of_a_registry_that_cannot_be_reached_stops_the_start(
    name: str, sections: dict[str, Any], message: str
):
    with pytest.raises(ConfigError) as refused:
        models(name, "mlflow", **sections)

    assert message in str(refused.value)
    assert "canary" not in str(refused.value)


def test_a_variable_of_another_program_stops_nothing():
    """MLFLOW_TRACKING_URI may name a file or a database for programs beside this one."""
    assert models(mlflow_tracking_uri="sqlite:///x") is None


def test_without_an_address_there_is_no_registry():
    assert models() is None
    assert models(mlflow_tracking_uri="http://a.test") is not None
