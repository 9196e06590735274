"""The command line."""

from typer.testing import CliRunner

from app import __version__
from app.cli import cli


def test_a_configuration_file_that_was_asked_for_has_to_be_there():
    """A misspelt name would otherwise start the service with its defaults."""
    ended = CliRunner().invoke(cli, ["serve", "--config", "typo.yml"])

    assert 2 == ended.exit_code
    assert "llm-service: there is no file typo.yml" in ended.output


def test_the_version_is_printed():
    """The package's own."""
    assert f"{__version__}\n" == CliRunner().invoke(cli, ["version"]).output
