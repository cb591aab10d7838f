"""What the tests of every package share: a tiny model directory, a loop for engines, a Ray cluster. Real
things, small.
"""

import os
import secrets

# before torch is imported: engines and the tests take turns on the cores
os.environ["OMP_WAIT_POLICY"] = "passive"
# before ray is imported (vLLM does it too): Ray listens on all interfaces
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from forks import RAY_WORKERS
from tiny_tokenizer import BOS, EOS, PAD, tiny_tokenizer
from watched_run import WatchedRun, watch
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from rollout.loop import LoopThread

# no deadline: on machines of any speed, and beside other load. `make test-all` takes the deep one.
hypothesis.settings.register_profile("quick", deadline=None, max_examples=50)
hypothesis.settings.register_profile("deep", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("quick")

MAX_LENGTH = 1024


WHOLE_RUN, ENGINES = "whole run", "engines"
STARTING = ("engine", "ray", "process")
"""Markers of tests that start something."""
WATCHED_RUN = "watched_run"  # the fixture, in the text of a file
TESTS = Path(__file__).parent


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Share the tests out for `make test`, which runs two processes of them: each file is one process's,
    and so are the users of the whole run, and of the engines that all of `tests/rollout` shares.
    """
    return Lanes(config, log)


class Lanes(LoadScopeScheduling):
    """A lane is what one process runs without a break."""

    def _split_scope(self, nodeid: str) -> str:
        return _lane(TESTS.parent / nodeid.partition("::")[0])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest lanes come first, and the pure ones last: two processes then end together."""
    lanes = {path: _lane(path) for path in {item.path for item in items}}
    starting = {lanes[item.path] for item in items if any(map(item.get_closest_marker, STARTING))}
    items.sort(
        key=lambda item: (
            lanes[item.path] != WHOLE_RUN,
            lanes[item.path] != ENGINES,
            lanes[item.path] not in starting,
        )
    )


def _lane(path: Path) -> str:
    if WATCHED_RUN in path.read_text():
        return WHOLE_RUN
    return ENGINES if path.is_relative_to(TESTS / "rollout") else str(path)


@pytest.fixture(scope="session")
def make_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A factory of `save_pretrained` directories: a two-layer Llama, 64 wide, with a tokenizer and chat
    template.

    The weights are five times larger than usual, so that next-token distributions are far from uniform.
    head_dim is 32: vLLM's CPU attention has no 16.
    """

    def make(*, tied: bool = True, seed: int = 0, num_layers: int = 2) -> Path:
        model_dir = tmp_path_factory.mktemp("model")
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained(model_dir)
        _model(len(tokenizer), tied=tied, seed=seed, num_layers=num_layers).save_pretrained(model_dir)
        return model_dir

    return make


@pytest.fixture(scope="session")
def tied_model_dir(make_model_dir: Callable[..., Path]) -> Path:
    """One tiny model directory with tied embeddings."""
    return make_model_dir(tied=True)


@pytest.fixture(scope="session")
def untied_model_dir(make_model_dir: Callable[..., Path]) -> Path:
    """One tiny model directory with an output head of its own."""
    return make_model_dir(tied=False)


@pytest.fixture(scope="session")
def make_gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A factory of GPT-2 directories with a table of so many positions: a longer sequence is an IndexError.
    Tokenizer and chat template are those of `make_model_dir`.
    """

    def make(num_positions: int) -> Path:
        model_dir = tmp_path_factory.mktemp("gpt2")
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained(model_dir)
        _gpt2(len(tokenizer), num_positions).save_pretrained(model_dir)
        return model_dir

    return make


@pytest.fixture(scope="session")
def loop() -> Iterator[LoopThread]:
    """The event loop on which the session's engines live."""
    with LoopThread() as thread:
        yield thread


@pytest.fixture(scope="session")
def start_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], None]]:
    """Call it to have a local Ray of two CPUs until the session ends. What depends on this fixture is closed
    before.
    """
    started = False

    def start() -> None:
        nonlocal started
        import ray

        if not started:
            with RAY_WORKERS.forking(tmp_path_factory.mktemp("ray") / "forks"):
                ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        started = True

    yield start
    if started:
        import ray

        ray.shutdown()


@pytest.fixture(scope="session")
def ray_cluster(start_ray: Callable[[], None]) -> None:
    """A local Ray of two CPUs."""
    start_ray()


@pytest.fixture(scope="session")
def watched_run(tmp_path_factory: pytest.TempPathFactory) -> WatchedRun:
    """The whole tiny chain on Ray and vLLM, once, in a directory of its own; and what was seen meanwhile."""
    run = watch(tmp_path_factory.mktemp("chain"))
    assert run.code == 0, (run.directory / "out").read_text() + (run.directory / "err").read_text()
    return run


def _model(vocab_size: int, *, tied: bool, seed: int, num_layers: int):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=tied,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.1,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def _gpt2(vocab_size: int, num_positions: int):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=num_positions,
        n_embd=64,
        n_layer=2,
        n_head=2,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval()
