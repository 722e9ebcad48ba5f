import pytest

from runs import chain, write_shard


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_shard(folder / "train_0.bin", chain(20000, 1))
    write_shard(folder / "train_1.bin", chain(7001, 2))
    write_shard(folder / "val_0.bin", chain(3000, 3))
    return folder
