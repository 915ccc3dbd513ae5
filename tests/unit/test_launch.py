"""Who a process is, as each launcher says it."""

import os
import socket

import pytest
import torch
import torch.distributed as dist

from megacode.errors import UserError
from megacode.train.launch import Place, find_device, find_interface, find_place, start_process_group


@pytest.fixture
def environment(monkeypatch):
    """An environment of its own, empty."""
    variables = {}
    monkeypatch.setattr(os, "environ", variables)
    return variables


def test_a_process_started_by_hand_is_alone(environment):
    assert find_place() == Place(0, 0, 1, 1)
    assert environment["MASTER_ADDR"] == "127.0.0.1"


def test_deepspeed_and_torchrun(environment):
    environment |= {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4"}
    assert find_place(local_rank=1) == Place(5, 1, 8, 4)
    environment["LOCAL_WORLD_SIZE"] = "2"
    assert find_place() == Place(5, 1, 8, 2)


def test_srun(environment):
    environment |= {
        "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    }  # fmt: skip
    with pytest.raises(UserError, match="MASTER_ADDR is not set"):
        find_place()
    environment["MASTER_ADDR"] = "node1"
    assert find_place() == Place(9, 1, 16, 8)
    assert environment["RANK"] == "9"
    assert environment["WORLD_SIZE"] == "16"


@pytest.mark.parametrize(
    ("counts", "sizes"), [("2(x2)", [2, 2]), ("2,1", [2, 1]), ("1,3(x2),2", [1, 3, 3, 2]), ("8", [8])]
)
def test_nodes_of_different_sizes(environment, counts, sizes):
    for node, size in enumerate(sizes):
        environment.clear()
        environment |= {
            "SLURM_STEP_NUM_TASKS": str(sum(sizes)), "SLURM_PROCID": str(sum(sizes[:node])), "SLURM_LOCALID": "0",
            "SLURM_STEP_TASKS_PER_NODE": counts, "SLURM_NODEID": str(node), "MASTER_ADDR": "node1",
        }  # fmt: skip
        assert find_place() == Place(sum(sizes[:node]), 0, sum(sizes), size)


def test_the_interface_that_leads_to_an_address():
    assert find_interface("127.0.0.1") == find_interface("localhost") == "lo"
    assert find_interface("nowhere.invalid") is None


def test_a_name_that_means_this_machine_to_itself_only_tells_nothing(monkeypatch):
    real = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: real(self, ("127.0.1.1", address[1])))
    assert find_interface("node1") is None


def test_a_batch_script_is_no_srun_step(environment):
    environment |= {"SLURM_NTASKS": "16", "SLURM_PROCID": "0"}
    assert find_place() == Place(0, 0, 1, 1)


def test_the_device(environment, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device(Place(5, 1, 8, 2)) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="8 processes were started here and there are 2 GPUs"):
        find_device(Place(2, 2, 8, 8))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    environment["SLURM_GPUS_PER_TASK"] = "1"
    with pytest.raises(UserError, match="one GPU that the others do not see"):
        find_device(Place(5, 1, 8, 2))
    environment["DS_ACCELERATOR"] = "cpu"
    assert find_device(Place(2, 2, 8, 8)) == torch.device("cpu")


@pytest.fixture
def taken(environment):
    """A port of this machine that somebody listens on; it is the run's."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1"}
        yield port


def test_a_taken_port_is_a_line(taken):
    with pytest.raises(UserError, match=rf"MASTER_PORT {taken} is in use on this machine, .*; set MASTER_PORT"):
        start_process_group(Place(0, 0, 1, 1), torch.device("cpu"), timeout_seconds=5)


def test_another_fault_of_the_network_is_no_mistake(taken, monkeypatch):
    def init(*args, **kwargs):
        raise dist.DistNetworkError("code: -13, name: EACCES")

    monkeypatch.setattr(dist, "init_process_group", init)
    with pytest.raises(dist.DistNetworkError, match="EACCES"):
        start_process_group(Place(0, 0, 1, 1), torch.device("cpu"), timeout_seconds=5)
