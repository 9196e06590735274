"""The names of registered models: what they mean, and what is refused before anything is looked up."""

import pytest

from app.registry.model_uri import parse_model_uri


@pytest.mark.parametrize(
    ("text", "kind", "value", "moves"),
    [
        ("models:/chat/3", "version", "3", False),
        ("models:/chat@production", "alias", "production", True),
        ("models:/chat/Production", "stage", "Production", True),
        ("models:/my chat.v2-x/12", "version", "12", False),
    ],
)
def test_a_name_says_which_version_is_meant(text: str, kind: str, value: str, moves: bool):
    uri = parse_model_uri(text)

    assert (kind, value, moves, text) == (uri.kind, uri.value, uri.moves, str(uri))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "chat",
        "models:/chat",
        "models:/chat/0",
        "models:/chat/latest",
        "models:/chat/3/4",
        "models:/chat/3@production",
        "models:/chat@",
        "models:/chat@a b",
        "models:/../3",
        "models:/a..b/3",
        "models:/./3",
        "models:/.hidden/3",
        "models:/%2e%2e/3",
        "models:/a%2fb/3",
        "models:/a\\b/3",
        "models://server/chat/3",
        "models://profile@server/chat/3",
        "models:/http://169.254.169.254/3",
        "models:/chat/3?x=1",
        "models:/chat/3#x",
        "models:/chat/3\n",
        "models:/чат/3",
        "models:/chat/٣",
        f"models:/{'a' * 300}/3",
        "runs:/0123/model",
        "mlflow-artifacts:/0/models",
        "file:///etc/passwd",
        "s3://bucket/model",
        "http://example.test/model",
        "/etc/passwd",
    ],
)
def test_any_other_name_is_refused_without_repeating_it(text: str):
    with pytest.raises(ValueError, match=r"^must be models:/name/version, models:/name@alias") as refusal:
        parse_model_uri(text)

    assert not text or text not in str(refusal.value)
