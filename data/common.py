"""What the modules of data/ share: the two ways to fail, how an input is opened, and the numbers that llm.c's files carry."""

import errno
import os
import stat
from typing import IO, Any

HEADER_INTS = 256  # every llm.c header: 256 little-endian int32
HEADER_BYTES = 4 * HEADER_INTS
SHARD_MAGIC, SHARD_VERSION = 20240520, 1
TOKENIZER_MAGIC = 20240328
MAX_VOCAB = 1 << 16  # token ids are uint16 in a shard
SHORT_TOKEN = 255  # bytes: the longest token of versions 1 and 2 of the tokenizer binary, whose lengths are a u8
EOT_TEXT = "<|endoftext|>"


class InputError(Exception):
    """What the user gave cannot be used: one line, exit code 2."""


class RunError(Exception):
    """The input was fine and the run failed (disk, network, a killed worker): one line, exit code 1."""


def open_input(path: str, mode: str = "rb", **how: Any) -> IO[Any]:
    """open() for reading a regular file. For a pipe, open() itself would wait until somebody writes, and most inputs are
    read more than once: it is an OSError, as is a device."""

    def regular(name: str, flags: int) -> int:
        handle = os.open(name, flags | os.O_NONBLOCK)
        kind = os.fstat(handle).st_mode
        if stat.S_ISREG(kind) or stat.S_ISDIR(kind):  # open() has its own word for a folder
            return handle
        os.close(handle)
        raise OSError(errno.EINVAL, "no regular file", name)

    return open(path, mode, opener=regular, **how)
