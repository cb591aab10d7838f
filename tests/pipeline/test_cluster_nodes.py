"""What every node of a joined cluster is asked, and the line for each wrong answer."""

from dataclasses import replace

import pytest

from pipeline import cluster
from rollout.ground.errors import EnvironmentProblem


@pytest.fixture
def nonce(tmp_path):
    with cluster.nonce_in(tmp_path / "outputs") as (file, text):
        yield file, text


def lines(nonce, answer) -> list[tuple[str, str]]:
    return list(cluster.problems([("10.0.0.2", answer)], *nonce))


def test_a_node_like_this_one_is_fit(nonce):
    assert lines(nonce, cluster.report(nonce[0])) == []


def test_a_node_that_reads_another_text_does_not_share_the_outputs(nonce):
    ((node, line),) = lines(nonce, replace(cluster.report(nonce[0]), text="yesterday's"))
    assert node == "10.0.0.2" and line.startswith(f"does not see {nonce[0].parent}")


def test_other_code_is_found_even_under_the_same_version(nonce):
    ((_, line),) = lines(nonce, replace(cluster.report(nonce[0]), code="rlhf-pipeline 0.1.0 (code 0)"))
    assert line.startswith("has rlhf-pipeline 0.1.0 (code 0), not rlhf-pipeline")


def test_another_version_of_a_package_is_named(nonce):
    here = cluster.report(nonce[0])
    packages = dict(here.packages) | {"torch": "1.0"}
    del packages["transformers"]
    found = [line for _, line in lines(nonce, replace(here, packages=packages))]
    assert any(line.startswith("has torch 1.0, not ") for line in found)
    assert any(line.startswith("has no transformers, which is ") for line in found)
    assert len(found) == 2


def test_a_node_that_does_not_answer_is_named(nonce):
    ((_, line),) = lines(nonce, "GetTimeoutError")
    assert line.startswith("does not answer (GetTimeoutError)")


def test_the_file_is_gone_afterwards(tmp_path):
    with cluster.nonce_in(tmp_path) as (file, text):
        assert file.read_text() == text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variable", cluster.TOKEN_VARIABLES)
def test_a_token_comes_from_the_environment(monkeypatch, variable):
    for name in cluster.TOKEN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(EnvironmentProblem, match=r"resources.address head:6379: .* RAY_AUTH_TOKEN"):
        cluster.require_token("head:6379")
    monkeypatch.setenv(variable, "secret")
    cluster.require_token("head:6379")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_nothing_listening_is_one_line_at_once(host):
    with pytest.raises(EnvironmentProblem, match="no answer"):
        cluster.require_answer(f"{host}:1")
    cluster.require_answer("auto")


def test_a_changed_source_file_is_other_code(tmp_path, monkeypatch):
    before = cluster.code_version()
    cluster.code_version.cache_clear()
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/cluster.py").write_text("changed\n")
    monkeypatch.setattr(cluster, "__file__", str(tmp_path / "pipeline/cluster.py"))
    assert cluster.code_version() != before
    cluster.code_version.cache_clear()
