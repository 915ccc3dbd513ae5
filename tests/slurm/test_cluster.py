"""The cluster that other tests use is a real one."""


def test_nodes_and_tasks(clusters):
    cluster = clusters()
    output = cluster.run("srun", "-N2", "--ntasks-per-node=2", "bash", "-c", "echo $SLURM_NODEID $SLURM_PROCID")
    assert sorted(output.split("\n"))[1:] == ["0 0", "0 1", "1 2", "1 3"]
    job = cluster.run("sbatch", "--parsable", "--hold", "--wrap=true").strip()
    assert job in cluster.queued()  # with the one before, perhaps, while it ends
    cluster.run("scancel", job)
    cluster.wait()


def test_gpus(clusters):
    cluster = clusters(1, 2, 4)
    devices = cluster.run("srun", "--gres=gpu:2", "bash", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert devices.strip() == "0,1"
    assert "Requested node configuration is not available" in cluster.run(
        "bash", "-c", "srun --gres=gpu:5 true 2>&1", check=False
    )
