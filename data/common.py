"""What the modules of data/ share: the two ways to fail, and the numbers that llm.c's files carry."""

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
