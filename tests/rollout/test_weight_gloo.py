"""Weights over gloo: what arrives is what was sent, in real engines too, and a death is noticed in time."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from rigs import CONFIG, SAME, request
from test_weight_sync import GROUPS, perturb, probes

from rollout.errors import WeightSyncError
from rollout.pool import start_actor_engines
from rollout.transports import GlooStream
from rollout.weight_gloo import CHUNK_BYTES, GlooSender, receive
from rollout.weight_source import ModuleSource
from rollout.weight_sync import WeightSync

pytestmark = pytest.mark.engine

HOST = "127.0.0.1"


@pytest.fixture
def sender():
    return GlooSender(HOST, timeout_s=20)


def some_bytes(count: int = 1000) -> torch.Tensor:
    return torch.arange(count).remainder(251).to(torch.uint8)


def test_what_arrives_is_what_was_sent(sender):
    data, location = some_bytes(), sender.new_location()
    with sender.serving(location, data):
        assert torch.equal(receive(location, len(data), timeout_s=20), data)


def test_more_than_one_chunk_arrives_in_order(sender, monkeypatch):
    monkeypatch.setattr("rollout.weight_gloo.CHUNK_BYTES", 300)
    data, location = some_bytes(1000), sender.new_location()
    with sender.serving(location, data):
        assert torch.equal(receive(location, len(data), timeout_s=20), data)
    assert CHUNK_BYTES < 2**31  # more than that gloo does not move at once


def test_several_receivers_take_the_same_update_side_by_side_and_one_sender_serves_update_after_update(
    sender,
):
    for version in range(3):
        data, location = some_bytes() + version, sender.new_location()
        with sender.serving(location, data), ThreadPoolExecutor(3) as threads:
            answers = [threads.submit(receive, location, len(data), timeout_s=20) for _ in range(3)]
            assert all(torch.equal(answer.result(), data) for answer in answers)


def test_a_location_without_its_secret_gives_nothing(sender):
    data, location = some_bytes(), sender.new_location()
    guessed = location.rpartition("/")[0] + "/" + "0" * 32
    with sender.serving(location, data), pytest.raises(WeightSyncError, match="did not arrive"):
        receive(guessed, len(data), timeout_s=1)


def test_nobody_at_the_address_is_an_error_at_once():
    with socket.socket() as unused:
        unused.bind((HOST, 0))
        location = f"gloo://{HOST}:{unused.getsockname()[1]}/secret"
        started = time.monotonic()
        with pytest.raises(WeightSyncError, match="refused"):
            receive(location, 10, timeout_s=30)
    assert time.monotonic() - started < 10


def test_a_closed_sender_listens_no_more(sender):
    location = sender.new_location()
    with sender.serving(location, some_bytes(10)):
        receive(location, 10, timeout_s=20)
    sender.close()
    sender.close()
    address = (HOST, int(location.split(":")[2].partition("/")[0]))
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:  # the server's own thread ends it
        with contextlib.closing(socket.socket()) as probe:
            if probe.connect_ex(address) != 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"{address} still listens")


def test_a_sender_that_never_serves_is_an_error_at_the_deadline(sender):
    started = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"did not arrive from 127\.0\.0\.1"):
        receive(sender.new_location(), 10, timeout_s=1)
    assert time.monotonic() - started < 10


OTHER_END = """
import os, sys, time, torch
from rollout import weight_gloo
from rollout.weight_gloo import GlooSender, receive
def stop(what):
    print(what, flush=True)
    time.sleep(600)
"""
SENDER_THAT_STOPS = (
    OTHER_END
    + """
sender = GlooSender("127.0.0.1", timeout_s=60)
location = sender.new_location()
print(location, flush=True)
pair = weight_gloo._pair
weight_gloo._pair = lambda *arguments: (pair(*arguments), stop("met"))
with sender.serving(location, torch.zeros(10, dtype=torch.uint8)):
    time.sleep(600)
"""
)
RECEIVER_THAT_STOPS = (
    OTHER_END
    + """
pair = weight_gloo._pair
weight_gloo._pair = lambda *arguments: (pair(*arguments), stop("met"))
receive(sys.argv[1], 10, timeout_s=60)
"""
)


def other_end(program: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True, env=os.environ
    )


def test_a_sender_that_dies_before_the_bytes_is_an_error_long_before_the_deadline():
    process = other_end(SENDER_THAT_STOPS)
    location = process.stdout.readline().strip()

    def kill_once_met() -> None:
        assert process.stdout.readline() == "met\n"
        process.send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill_once_met)
    killer.start()
    started = time.monotonic()
    with pytest.raises(WeightSyncError, match="did not arrive"):
        receive(location, 10, timeout_s=120)
    assert time.monotonic() - started < 60
    killer.join()
    process.wait()


def test_a_receiver_that_dies_does_not_keep_the_others_from_their_bytes(sender):
    data, location = some_bytes(10), sender.new_location()
    process = other_end(RECEIVER_THAT_STOPS, location)
    with sender.serving(location, data):
        assert process.stdout.readline() == "met\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert torch.equal(receive(location, 10, timeout_s=20), data)


# In engines
# ------------------------------------------------------------------------------------------------------------


def gloo_sync(rig) -> WeightSync:
    config = rig.config.model_copy(update={"sync": "gloo"})
    return WeightSync(
        ModuleSource(rig.model, dtype="float32"), engine=rig.engine, loop=rig.loop, config=config
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["vllm", "hf"])
def test_an_engine_computes_with_what_gloo_brought(rigs, kind, tied):
    rig = rigs(kind, tied=tied)
    rig.reset()
    before = rig.submit(probes())
    perturb(rig.model, tuple(ending for endings in GROUPS.values() for ending in endings))
    assert rig.max_diff(before) > 1e-3
    sync = gloo_sync(rig)
    rig.version += 1
    report = sync.sync(rig.version)
    after = rig.submit(probes())
    assert rig.max_diff(after) < 1e-5
    assert {drawn for rollout in after for drawn in rollout.weight_versions} == {rig.version}
    assert sync.diagnose() == SAME and report.num_bytes > 0
    perturb(rig.model, GROUPS["norms"])
    assert any("norm" in name for name in sync.diagnose().differing)
    sync.close()


@pytest.mark.parametrize("kind", ["vllm", "hf"])
def test_bytes_that_changed_on_the_way_are_refused_and_nothing_is_loaded(rigs, kind):
    rig = rigs(kind, tied=True)
    rig.reset()
    before = rig.submit(probes())
    perturb(rig.model, GROUPS["q"])
    transport = GlooStream(HOST, timeout_s=20)
    update = transport.pack(ModuleSource(rig.model, dtype="float32"), version=99)
    wrong = dataclasses.replace(
        update, tensors=(dataclasses.replace(update.tensors[0], digest="0" * 64), *update.tensors[1:])
    )
    rig.run(rig.engine.pause())
    with transport.serving(update), pytest.raises(WeightSyncError, match="are not the bytes that were sent"):
        rig.run(rig.engine.update(wrong))
    rig.run(rig.engine.resume())
    assert rig.run(rig.engine.version()) == rig.version
    assert rig.submit(probes()) == before
    transport.close()


def test_a_vllm_engine_whose_sender_is_gone_says_so_before_the_deadline(rigs):
    rig = rigs("vllm", tied=True)
    rig.reset()
    transport = GlooStream(HOST, timeout_s=20)
    update = transport.pack(ModuleSource(rig.model, dtype="float32"), version=99)
    host, _, rest = update.location.removeprefix("gloo://").partition(":")
    gone = dataclasses.replace(update, location=f"gloo://{host}:1/{rest.partition('/')[2]}")
    rig.run(rig.engine.pause())
    started = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"did not arrive from 127\.0\.0\.1:1 .*rebuild this engine"):
        rig.run(rig.engine.update(gone))
    assert time.monotonic() - started < rig.config.sync_timeout_s
    rig.run(rig.engine.resume())
    transport.close()


def test_two_actors_take_one_update_and_a_dead_one_fails_the_next(
    start_ray, loop, make_model_dir, tied_model_dir, tmp_path
):
    import ray
    from transformers import AutoModelForCausalLM

    start_ray()
    config = CONFIG.model_copy(update={"engine": "hf", "num_engines": 2, "sync": "gloo"})
    pool = start_actor_engines(
        config, model_dir=tied_model_dir, dtype="float32", max_model_len=64, log_dir=tmp_path
    )
    model = AutoModelForCausalLM.from_pretrained(make_model_dir(tied=True, seed=3))
    sync = WeightSync(ModuleSource(model, dtype="float32"), engine=pool, loop=loop, config=config)
    sync.sync(3)
    requests = [request(index, max_tokens=4, seed=5) for index in range(4)]
    rollouts = loop.run(pool.submit(requests), timeout_s=60, what="submit")
    assert len({rollout.response_ids for rollout in rollouts}) == 1
    assert {version for rollout in rollouts for version in rollout.weight_versions} == {3}
    ray.kill(pool._engines[1]._actor)
    started = time.monotonic()
    with pytest.raises(WeightSyncError, match="engine-1"):
        for version in range(4, 50):  # the kill is only on its way: a sync before it still succeeds
            sync.sync(version)
    assert time.monotonic() - started < config.sync_timeout_s + 20
    sync.close()
    loop.run(pool.close(), timeout_s=60, what="close")
