import signal

import pytest

from runs import chain, write_shard

# What nohup or a shell's & has ignored is not inherited by the programs that get these signals here.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, signal.SIG_DFL)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_shard(folder / "train_0.bin", chain(20000, 1))
    write_shard(folder / "train_1.bin", chain(7001, 2))
    write_shard(folder / "val_0.bin", chain(3000, 3))
    return folder
